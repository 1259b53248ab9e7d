#include "pml/base/table.h"

#include <stdlib.h>

enum { FIRST_ROOM = 16 };

void *pml_table_room(void *table, size_t *capacity, size_t wanted, size_t size)
{
    size_t bytes, room = *capacity > 0 ? *capacity : FIRST_ROOM;
    if (wanted <= *capacity)
        return table;
    while (room < wanted)
        if (__builtin_mul_overflow(room, (size_t)2, &room))
            return NULL;
    if (__builtin_mul_overflow(room, size, &bytes))
        return NULL;
    void *larger = realloc(table, bytes);
    if (larger != NULL)
        *capacity = room;
    return larger;
}
