#include "pml/data/packing.h"

#include <stdlib.h>
#include <string.h>

enum { WORD = 64 };

/* The open bins by how much room is left in them.
 *
 *   head[room] ──► bin ──► next[bin] ──► …           last opened or filled first
 *   bit `room` of low is set where head[room] has a bin; bit w of high where word w of low is not 0
 */
typedef struct rooms {
    int64_t *head; /* [capacity + 1], -1 = none */
    int64_t *next; /* [bins] */
    uint64_t *low, *high;
    size_t low_words, high_words;
} rooms;

static void rooms_free(rooms *r)
{
    free(r->head);
    free(r->next);
    free(r->low);
    free(r->high);
}

/* What was taken is freed by rooms_free, on failure too. */
static pml_status rooms_new(rooms *r, int64_t n, int32_t capacity, pml_error *err)
{
    r->low_words = (size_t)capacity / WORD + 1;
    r->high_words = r->low_words / WORD + 1;
    r->head = calloc((size_t)capacity + 1, sizeof *r->head);
    r->next = calloc((size_t)n, sizeof *r->next);
    r->low = calloc(r->low_words, sizeof *r->low);
    r->high = calloc(r->high_words, sizeof *r->high);
    if (r->head == NULL || r->next == NULL || r->low == NULL || r->high == NULL) {
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to pack %lld rows", (long long)n);
    }
    return PML_OK;
}

static void rooms_clear(rooms *r, int32_t capacity)
{
    for (int32_t room = 0; room <= capacity; room++)
        r->head[room] = -1;
    memset(r->low, 0, r->low_words * sizeof *r->low);
    memset(r->high, 0, r->high_words * sizeof *r->high);
}

static void rooms_put(rooms *r, int32_t room, int64_t bin)
{
    size_t word = (size_t)room / WORD;
    r->next[bin] = r->head[room];
    r->head[room] = bin;
    r->low[word] |= UINT64_C(1) << (room % WORD);
    r->high[word / WORD] |= UINT64_C(1) << (word % WORD);
}

static int64_t rooms_take(rooms *r, int32_t room)
{
    size_t word = (size_t)room / WORD;
    int64_t bin = r->head[room];
    r->head[room] = r->next[bin];
    if (r->head[room] < 0) {
        r->low[word] &= ~(UINT64_C(1) << (room % WORD));
        if (r->low[word] == 0)
            r->high[word / WORD] &= ~(UINT64_C(1) << (word % WORD));
    }
    return bin;
}

/* First set bit at or after `from`, -1 when there is none. */
static int64_t next_bit(const uint64_t *bits, size_t words, size_t from)
{
    size_t word = from / WORD;
    if (word >= words)
        return -1;
    uint64_t rest = bits[word] & (~UINT64_C(0) << (from % WORD));
    while (rest == 0) {
        if (++word == words)
            return -1;
        rest = bits[word];
    }
    return (int64_t)(word * WORD) + __builtin_ctzll(rest);
}

/* The least room >= wanted that some bin has, -1 when there is none. */
static int32_t rooms_best(const rooms *r, int32_t wanted)
{
    size_t word = (size_t)wanted / WORD;
    uint64_t here = r->low[word] & (~UINT64_C(0) << (wanted % WORD));
    if (here != 0)
        return (int32_t)(word * WORD) + __builtin_ctzll(here);
    int64_t found = next_bit(r->high, r->high_words, word + 1);
    return found < 0 ? -1 : (int32_t)(found * WORD) + __builtin_ctzll(r->low[found]);
}

/* Rows from long to short, stable: a counting sort. */
static pml_status by_length(const int32_t *length, int64_t n, int32_t capacity, int64_t **sorted,
                            pml_error *err)
{
    int64_t *first = calloc((size_t)capacity + 1, sizeof *first);
    int64_t *order = calloc((size_t)n, sizeof *order);
    if (first == NULL || order == NULL) {
        free(first);
        free(order);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to pack %lld rows", (long long)n);
    }
    for (int64_t row = 0; row < n; row++)
        first[length[row]]++;
    int64_t before = 0;
    for (int32_t len = capacity; len >= 0; len--) {
        int64_t count = first[len];
        first[len] = before;
        before += count;
    }
    for (int64_t row = 0; row < n; row++)
        order[first[length[row]]++] = row;
    free(first);
    *sorted = order;
    return PML_OK;
}

/* Number the bins by their first row; renumber [bins] is scratch. */
static void number_by_first_row(int64_t *bin_of_row, int64_t n, int64_t *renumber, int64_t n_bins)
{
    int64_t used = 0;
    for (int64_t bin = 0; bin < n_bins; bin++)
        renumber[bin] = -1;
    for (int64_t row = 0; row < n; row++) {
        int64_t *number = &renumber[bin_of_row[row]];
        if (*number < 0)
            *number = used++;
        bin_of_row[row] = *number;
    }
}

/* One window; *n_bins is how many bins it has, numbered from 0. */
static pml_status pack_window(rooms *open, const int32_t *length, int64_t n, int32_t capacity,
                              int64_t *bin_of_row, int64_t *n_bins, pml_error *err)
{
    int64_t *sorted = NULL, bins = 0;
    pml_status status = by_length(length, n, capacity, &sorted, err);
    if (status != PML_OK)
        return status;
    rooms_clear(open, capacity);
    for (int64_t i = 0; i < n; i++) {
        int64_t row = sorted[i];
        int32_t room = rooms_best(open, length[row]);
        int64_t bin = room < 0 ? bins++ : rooms_take(open, room);
        int32_t left = (room < 0 ? capacity : room) - length[row];
        bin_of_row[row] = bin;
        if (left > 0)
            rooms_put(open, left, bin);
    }
    number_by_first_row(bin_of_row, n, open->next, bins);
    *n_bins = bins;
    free(sorted);
    return PML_OK;
}

pml_status pml_pack(const int32_t *length, int64_t n, int32_t capacity, int64_t *bin_of_row,
                    int64_t *n_bins, pml_error *err)
{
    rooms open = {0};
    int64_t window = n < PML_PACK_WINDOW ? n : PML_PACK_WINDOW;
    pml_status status = rooms_new(&open, window, capacity, err);
    *n_bins = 0;
    for (int64_t first = 0; status == PML_OK && first < n; first += window) {
        int64_t bins = 0, rows = n - first < window ? n - first : window;
        status = pack_window(&open, length + first, rows, capacity, bin_of_row + first, &bins, err);
        for (int64_t row = first; row < first + rows; row++)
            bin_of_row[row] += *n_bins;
        *n_bins += bins;
    }
    rooms_free(&open);
    return status;
}
