#include "reserve_map.h"

#include <string.h>

enum { BITS = 64 };

/* Of word w those bits that lie in [from, to). */
static uint64_t within(size_t w, size_t from, size_t to)
{
    uint64_t mask = UINT64_MAX;
    if (from > w * BITS)
        mask &= UINT64_MAX << (from - w * BITS);
    if (to < (w + 1) * BITS)
        mask &= UINT64_MAX >> ((w + 1) * BITS - to);
    return mask;
}

void pmli_map_clear(pmli_map *m)
{
    memset(m->words, 0, pmli_map_words(m) * sizeof *m->words);
}

void pmli_map_put(pmli_map *m, size_t from, size_t to, bool value)
{
    to = to < m->n ? to : m->n;
    for (size_t w = from / BITS; from < to && w <= (to - 1) / BITS; w++) {
        uint64_t mask = within(w, from, to);
        m->words[w] = value ? m->words[w] | mask : m->words[w] & ~mask;
    }
}

size_t pmli_map_count(const pmli_map *m)
{
    size_t n = 0;
    for (size_t w = 0; w < pmli_map_words(m); w++)
        n += (size_t)__builtin_popcountll(m->words[w]);
    return n;
}

size_t pmli_map_next(const pmli_map *m, size_t from, bool value)
{
    for (size_t w = from / BITS; from < m->n && w < pmli_map_words(m); w++) {
        uint64_t found = (value ? m->words[w] : ~m->words[w]) & within(w, from, m->n);
        if (found != 0)
            return w * BITS + (size_t)__builtin_ctzll(found);
    }
    return m->n;
}

size_t pmli_map_end(const pmli_map *m, size_t end, bool value)
{
    end = end < m->n ? end : m->n;
    for (size_t w = (end + BITS - 1) / BITS; w-- > 0;) {
        uint64_t found = (value ? m->words[w] : ~m->words[w]) & within(w, 0, end);
        if (found != 0)
            return (w + 1) * BITS - (size_t)__builtin_clzll(found);
    }
    return 0;
}
