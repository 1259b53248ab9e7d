/* Table: an array that grows. Its room doubles, so n elements cost n moves in sum.
 *
 *   order *larger = pml_table_room(q->items, &q->capacity, q->n + 1, sizeof *larger);
 *   if (larger == NULL)
 *       return false;
 *   q->items = larger; */
#ifndef PML_BASE_TABLE_H
#define PML_BASE_TABLE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* `table` with room for `wanted` (1 or more) elements of `size` bytes: the same where *capacity is
 * enough, else moved to a larger one, whose new elements are not initialised, and *capacity is what
 * it has room for. `table` NULL with *capacity 0 is an empty one. The caller frees what it got.
 * NULL: no memory (or more than addresses reach); table and *capacity are what they were. */
void *pml_table_room(void *table, size_t *capacity, size_t wanted, size_t size);

#ifdef __cplusplus
}
#endif
#endif
