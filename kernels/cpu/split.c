/* Splitting, and the plain product. The unit's own is in amx.c. */
#include "split.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "widen.h"

enum { PARTS = PMLI_PARTS, WORDS = 256, PAIRS = PMLI_CELL_K / 2, LANES = 16 };

/* A tile is 256 words, each a pair of bfloat16 whose lower half stands for the even k. */
typedef uint32_t words __attribute__((vector_size(64), aligned(64), may_alias));

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

PMLI_INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

PMLI_INLINE float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The upper half of x's bits, rounded to nearest even. */
PMLI_INLINE uint32_t rounded(float x)
{
    uint32_t bits = bits_of(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
}

/* Each part as the upper half of a word. The last is exact as it stands; there a NaN whose bits
 * rounding has carried away is still one. */
PMLI_INLINE void split(float x, uint32_t *first, uint32_t *second, uint32_t *third)
{
    *first = rounded(x);
    x -= of_bits(*first);
    *second = rounded(x);
    x -= of_bits(*second);
    *third = bits_of(x) & 0xffff0000;
}

/* One row of k or, across, one pair of rows: 16 words of each part. */
PMLI_INLINE void split_words(const float *even, const float *odd, int step, float alpha,
                             uint32_t *out)
{
#pragma omp simd
    for (int i = 0; i < LANES; i++) {
        uint32_t a[PARTS], b[PARTS];
        split(alpha * even[i * step], &a[0], &a[1], &a[2]);
        split(alpha * odd[i * step], &b[0], &b[1], &b[2]);
        out[i] = a[0] >> 16 | b[0];
        out[WORDS + i] = a[1] >> 16 | b[1];
        out[2 * WORDS + i] = a[2] >> 16 | b[2];
    }
}

/* Words (i,j) and (j,i) change places: blocks of 1, 2, 4, then 8. */
PMLI_INLINE void transpose(uint32_t *tile)
{
    words r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        r[i] = ((words *)tile)[i];
#define SWAP(distance, ...)                                                                        \
    _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) if ((i & (distance)) == 0)            \
    {                                                                                              \
        words a = r[i], b = r[i + (distance)];                                                     \
        r[i] = __builtin_shufflevector(a, b, __VA_ARGS__);                                         \
        r[i + (distance)] = __builtin_shufflevector(b, a, ODD_##distance);                         \
    }
/* Of b and a: as the even blocks, but the odd ones of a first. */
#define ODD_1 17, 1, 19, 3, 21, 5, 23, 7, 25, 9, 27, 11, 29, 13, 31, 15
#define ODD_2 18, 19, 2, 3, 22, 23, 6, 7, 26, 27, 10, 11, 30, 31, 14, 15
#define ODD_4 20, 21, 22, 23, 4, 5, 6, 7, 28, 29, 30, 31, 12, 13, 14, 15
#define ODD_8 24, 25, 26, 27, 28, 29, 30, 31, 8, 9, 10, 11, 12, 13, 14, 15
    SWAP(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
    SWAP(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
    SWAP(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
    SWAP(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#undef SWAP
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        ((words *)tile)[i] = r[i];
}

/* n elements as float32, and zeros up to `most`. */
PMLI_INLINE void take(const void *from, int64_t at, int64_t n, int64_t most, const bool narrow,
                      float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = pmli_take_one(from, at + i, narrow);
    memset(out + n, 0, (size_t)(most - n) * sizeof *out);
}

/* One cell of rows along k: n <= 16 of them, k <= 32, the first element at `at`. */
PMLI_INLINE void cell_along(const pml_view *x, int64_t at, int64_t n, int64_t k, float alpha,
                            const bool narrow, bool turn, uint32_t *out)
{
    float edge[PMLI_CELL_K];
    for (int64_t i = 0; i < LANES; i++) {
        const float *row = (const float *)x->data + at + i * x->ld;
        if (narrow || i >= n || k < PMLI_CELL_K) {
            take(x->data, at + i * x->ld, i < n ? k : 0, PMLI_CELL_K, narrow, edge);
            row = edge;
        }
        split_words(row, row + 1, 2, alpha, out + i * PAIRS);
    }
    for (int part = 0; turn && part < PARTS; part++)
        transpose(out + part * WORDS);
}

PMLI_INLINE void cell_across(const pml_view *x, int64_t at, int64_t n, int64_t k, float alpha,
                             const bool narrow, bool turn, uint32_t *out)
{
    float edge[2][LANES];
    for (int64_t p = 0; p < PAIRS; p++) {
        const float *rows[2];
        for (int64_t h = 0; h < 2; h++) {
            int64_t l = 2 * p + h;
            rows[h] = (const float *)x->data + at + l * x->ld;
            if (narrow || n < LANES || l >= k) {
                take(x->data, at + l * x->ld, l < k ? n : 0, LANES, narrow, edge[h]);
                rows[h] = edge[h];
            }
        }
        split_words(rows[0], rows[1], 1, alpha, out + p * LANES);
    }
    for (int part = 0; turn && part < PARTS; part++)
        transpose(out + part * WORDS);
}

/* Cells of one part, from bfloat16: pairs that lie side by side already, */
PMLI_INLINE void single_along(const pml_view *x, int64_t at, int64_t n, int64_t k, uint32_t *out)
{
    memset(out, 0, n < LANES || k < PMLI_CELL_K ? PMLI_PART_BYTES : 0);
    for (int64_t i = 0; i < n; i++)
        memcpy(out + i * PAIRS, (const uint16_t *)x->data + at + i * x->ld,
               (size_t)k * sizeof(uint16_t));
    transpose(out);
}

/* and pairs of two rows. */
PMLI_INLINE void single_across(const pml_view *x, int64_t at, int64_t n, int64_t k, uint32_t *out)
{
    static const uint16_t zeros[LANES];
    uint16_t edge[2][LANES] = {{0}};
    for (int64_t p = 0; p < PAIRS; p++) {
        const uint16_t *rows[2];
        for (int64_t h = 0; h < 2; h++) {
            int64_t l = 2 * p + h;
            rows[h] = l < k ? (const uint16_t *)x->data + at + l * x->ld : zeros;
            if (n < LANES && l < k) {
                memcpy(edge[h], rows[h], (size_t)n * sizeof *edge[h]);
                rows[h] = edge[h];
            }
        }
#pragma omp simd
        for (int i = 0; i < LANES; i++)
            out[p * LANES + i] = rows[0][i] | (uint32_t)rows[1][i] << 16;
    }
}

/* Either way x is read along its rows, as many of them side by side as a cell has. */
PMLI_CLONES static void split_along(bool turn, const pml_view *x, float alpha, int parts,
                                    unsigned char *strips, int64_t pitch)
{
    for (int64_t i = 0; i < x->rows; i += PMLI_STRIP, strips += pitch)
        for (int64_t l = 0; l < x->cols; l += PMLI_CELL_K) {
            int64_t at = i * x->ld + l, n = pmli_min(PMLI_STRIP, x->rows - i);
            int64_t k = pmli_min(PMLI_CELL_K, x->cols - l);
            uint32_t *out = (void *)(strips + l / PMLI_CELL_K * parts * PMLI_PART_BYTES);
            if (parts == 1)
                single_along(x, at, n, k, out);
            else if (x->dtype == PML_BF16)
                cell_along(x, at, n, k, alpha, true, turn, out);
            else
                cell_along(x, at, n, k, alpha, false, turn, out);
        }
}

PMLI_CLONES static void split_across(bool turn, const pml_view *x, float alpha, int parts,
                                     unsigned char *strips, int64_t pitch)
{
    for (int64_t l = 0; l < x->rows; l += PMLI_CELL_K, strips += parts * PMLI_PART_BYTES)
        for (int64_t i = 0; i < x->cols; i += PMLI_STRIP) {
            int64_t at = l * x->ld + i, n = pmli_min(PMLI_STRIP, x->cols - i);
            int64_t k = pmli_min(PMLI_CELL_K, x->rows - l);
            uint32_t *out = (void *)(strips + i / PMLI_STRIP * pitch);
            if (parts == 1)
                single_across(x, at, n, k, out);
            else if (x->dtype == PML_BF16)
                cell_across(x, at, n, k, alpha, true, turn, out);
            else
                cell_across(x, at, n, k, alpha, false, turn, out);
        }
}

#pragma GCC diagnostic pop

void pmli_split(pmli_side side, bool along, pml_view x, float alpha, int parts,
                unsigned char *strips, int64_t pitch)
{
    if (along)
        split_along(side == PMLI_RIGHT, &x, alpha, parts, strips, pitch);
    else
        split_across(side == PMLI_LEFT, &x, alpha, parts, strips, pitch);
}

/* ---- the plain product ---- */

/* sum [16,16] += A B of two tiles: even and odd k are added up apart, then to what was there. */
static void plain_tile(const uint32_t *a, const uint32_t *b, float *sum)
{
    for (int m = 0; m < LANES; m++) {
        float even[LANES] = {0}, odd[LANES] = {0};
        for (int p = 0; p < PAIRS; p++) {
            uint32_t left = a[m * PAIRS + p];
            float left_even = of_bits(left << 16), left_odd = of_bits(left & 0xffff0000);
            for (int n = 0; n < LANES; n++) {
                uint32_t right = b[p * LANES + n];
                even[n] += left_even * of_bits(right << 16);
                odd[n] += left_odd * of_bits(right & 0xffff0000);
            }
        }
        for (int n = 0; n < LANES; n++)
            sum[m * LANES + n] += even[n] + odd[n];
    }
}

void pmli_split_plain(int64_t m, int64_t n, int64_t cells, int parts, const unsigned char *a,
                      int64_t a_pitch, const unsigned char *b, int64_t b_pitch, float *c,
                      int64_t ldc, bool add)
{
    static const int pairs[][2] = {{0, 2}, {0, 1}, {0, 0}, {2, 0}, {1, 0}, {1, 1}};
    for (int64_t i = 0; i < m; i += PMLI_STRIP)
        for (int64_t j = 0; j < n; j += PMLI_STRIP) {
            float sum[PMLI_STRIP * PMLI_STRIP] = {0}, *at = c + i * ldc + j;
            int64_t rows = pmli_min(PMLI_STRIP, m - i);
            for (int64_t r = 0; add && r < rows; r++)
                memcpy(sum + r * PMLI_STRIP, at + r * ldc, PMLI_STRIP * sizeof *sum);
            const uint32_t *left = (const void *)(a + i / PMLI_STRIP * a_pitch);
            const uint32_t *right = (const void *)(b + j / PMLI_STRIP * b_pitch);
            for (int64_t cell = 0; cell < cells; cell++)
                for (int p = 0; p < 6; p++)
                    if (pairs[p][1] < parts)
                        plain_tile(left + (cell * PARTS + pairs[p][0]) * WORDS,
                                   right + (cell * parts + pairs[p][1]) * WORDS, sum);
            for (int64_t r = 0; r < rows; r++)
                memcpy(at + r * ldc, sum + r * PMLI_STRIP, PMLI_STRIP * sizeof *sum);
        }
}

/* ---- the choice, made once: asking the processor and the kernel takes longer than a product ----
 */

static pmli_split_fn *chosen;

static void choose(void)
{
    const char *wish = getenv("PANTHERAML_MATRIX");
    if (wish != NULL && strcmp(wish, "plain") == 0)
        chosen = pmli_split_plain;
    else if (wish == NULL || strcmp(wish, "off") != 0)
        chosen = pmli_split_unit();
}

pmli_split_fn *pmli_split_pick(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
    return chosen;
}

const char *pmli_split_name(void)
{
    pmli_split_fn *product = pmli_split_pick();
    return product == NULL ? "" : product == pmli_split_plain ? "+plain" : "+amx";
}
