/* The tile product once, for one width of vector. tile.c includes this with
 *   TILE(name)    the name of this width's function
 *   TILE_TARGET   the attribute that allows its instructions
 *   TILE_LANES    floats in a vector: 4, 8 or 16
 *   TILE_ROWS     rows of C that stay in registers: TILE_ROWS * 2 sums + 2 of B + 1 of A
 *
 * For each block of rows and two vectors of columns the sums stay in registers over all of k; each
 * step broadcasts one element of A a row and multiplies it with B's two vectors. */
typedef float TILE(vec) __attribute__((vector_size(TILE_LANES * 4), aligned(4), may_alias));

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi" /* the vectors never cross a call: all is inlined */

TILE_TARGET static inline __attribute__((always_inline)) void
TILE(block)(const int rows, const int vecs, int64_t k, const float *a, int64_t row, int64_t col,
            const float *b, int64_t ldb, float *c, int64_t ldc, bool add)
{
    TILE(vec) sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++)
            sum[i][j] = (TILE(vec)){0};
    /* A base for every four rows leaves all addresses in registers: base, row and 3 row. */
    const float *base[(TILE_ROWS + 3) / 4];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i += 4)
        base[i / 4] = a + i * row;
    for (int64_t l = 0; l < k; l++) {
        TILE(vec) right[2];
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++)
            right[j] = *(const TILE(vec) *)(b + l * ldb + j * TILE_LANES);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            float left = base[i / 4][i % 4 * row];
#pragma GCC unroll 2
            for (int j = 0; j < vecs; j++)
                sum[i][j] += left * right[j];
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i += 4)
            base[i / 4] += col;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vecs; j++) {
            TILE(vec) *out = (TILE(vec) *)(c + i * ldc + j * TILE_LANES);
            if (add)
                *out += sum[i][j];
            else
                *out = sum[i][j];
        }
}

/* All rows of C in columns of `vecs` vectors. */
TILE_TARGET static inline __attribute__((always_inline)) void
TILE(columns)(const int vecs, int64_t m, int64_t k, const float *a, int64_t row, int64_t col,
              const float *b, int64_t ldb, float *c, int64_t ldc, bool add)
{
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        TILE(block)(TILE_ROWS, vecs, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
    for (; i + 4 <= m; i += 4)
        TILE(block)(4, vecs, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
    for (; i + 2 <= m; i += 2)
        TILE(block)(2, vecs, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
    if (i < m)
        TILE(block)(1, vecs, k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, add);
}

TILE_TARGET static void TILE(product)(int64_t m, int64_t n, int64_t k, const float *a, int64_t row,
                                      int64_t col, const float *b, int64_t ldb, float *c,
                                      int64_t ldc, bool add)
{
    int64_t j = 0;
    for (; j + 2 * TILE_LANES <= n; j += 2 * TILE_LANES)
        TILE(columns)(2, m, k, a, row, col, b + j, ldb, c + j, ldc, add);
    for (; j < n; j += TILE_LANES)
        TILE(columns)(1, m, k, a, row, col, b + j, ldb, c + j, ldc, add);
}

#pragma GCC diagnostic pop
#undef TILE
#undef TILE_TARGET
#undef TILE_LANES
#undef TILE_ROWS
