/* A bit for each MiB of a device: whose it is. Stretches are [from, to). */
#ifndef PMLI_RESERVE_MAP_H
#define PMLI_RESERVE_MAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct pmli_map {
    uint64_t *words; /* bits at n and above are 0 */
    size_t n;
} pmli_map;

static inline size_t pmli_map_words(const pmli_map *m)
{
    return (m->n + 63) / 64;
}

/* All of it nobody's. */
void pmli_map_clear(pmli_map *m);
/* What of the stretch is below n. */
void pmli_map_put(pmli_map *m, size_t from, size_t to, bool value);
/* How many bits are set. */
size_t pmli_map_count(const pmli_map *m);

/* The first bit of this value at `from` or above; n: none. */
size_t pmli_map_next(const pmli_map *m, size_t from, bool value);
/* The bit behind the last one of this value below `end`; 0: none. */
size_t pmli_map_end(const pmli_map *m, size_t end, bool value);

#endif
