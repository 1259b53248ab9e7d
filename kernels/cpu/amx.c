/* The product of split.h on AMX. */
#include "split.h"

#include <stddef.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16")))

enum { TILE_BYTES = PMLI_PART_BYTES, ROW_BYTES = 64, BLOCK = 2 * PMLI_STRIP };

/* What LDTILECFG reads: eight tiles of 16 rows of 64 bytes. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "as the instruction has it");

/* The intrinsics are statements that do not say which memory they touch. */
#define MEMORY_FENCE() __asm__ volatile("" ::: "memory")

/* Tiles 0 to 3 are C's, 4 and 5 A's, 6 and 7 B's. */
#define LOAD_LEFT(part)                                                                            \
    do {                                                                                           \
        _tile_loadd(4, a + (part)*TILE_BYTES, ROW_BYTES);                                          \
        if (down == 2)                                                                             \
            _tile_loadd(5, a + a_pitch + (part)*TILE_BYTES, ROW_BYTES);                            \
    } while (0)
#define LOAD_RIGHT(part)                                                                           \
    do {                                                                                           \
        _tile_loadd(6, b + (part)*TILE_BYTES, ROW_BYTES);                                          \
        if (across == 2)                                                                           \
            _tile_loadd(7, b + b_pitch + (part)*TILE_BYTES, ROW_BYTES);                            \
    } while (0)
#define MULTIPLY()                                                                                 \
    do {                                                                                           \
        _tile_dpbf16ps(0, 4, 6);                                                                   \
        if (across == 2)                                                                           \
            _tile_dpbf16ps(1, 4, 7);                                                               \
        if (down == 2)                                                                             \
            _tile_dpbf16ps(2, 5, 6);                                                               \
        if (down == 2 && across == 2)                                                              \
            _tile_dpbf16ps(3, 5, 7);                                                               \
    } while (0)

/* `down` strips of A by `across` strips of B: in this order each product needs one new factor. Of a
 * B of one part the products with the others, which are zeros, are left out. */
AMX static inline __attribute__((always_inline)) void
block(const int down, const int across, const int parts, int64_t cells, const unsigned char *a,
      int64_t a_pitch, const unsigned char *b, int64_t b_pitch, float *c, int64_t ldc, bool add)
{
    const int64_t row = ldc * (int64_t)sizeof(float);
    if (add) {
        _tile_loadd(0, c, row);
        if (across == 2)
            _tile_loadd(1, c + PMLI_STRIP, row);
        if (down == 2)
            _tile_loadd(2, c + PMLI_STRIP * ldc, row);
        if (down == 2 && across == 2)
            _tile_loadd(3, c + PMLI_STRIP * ldc + PMLI_STRIP, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < cells; i++, a += PMLI_CELL_BYTES, b += parts * TILE_BYTES) {
        LOAD_LEFT(0);
        if (parts > 1) {
            LOAD_RIGHT(2);
            MULTIPLY();
            LOAD_RIGHT(1);
            MULTIPLY();
        }
        LOAD_RIGHT(0);
        MULTIPLY();
        LOAD_LEFT(2);
        MULTIPLY();
        LOAD_LEFT(1);
        MULTIPLY();
        if (parts > 1) {
            LOAD_RIGHT(1);
            MULTIPLY();
        }
    }
    _tile_stored(0, c, row);
    if (across == 2)
        _tile_stored(1, c + PMLI_STRIP, row);
    if (down == 2)
        _tile_stored(2, c + PMLI_STRIP * ldc, row);
    if (down == 2 && across == 2)
        _tile_stored(3, c + PMLI_STRIP * ldc + PMLI_STRIP, row);
}

/* Rows that are fewer than tiles have: through a copy, so that nothing beyond them is touched. */
AMX static inline __attribute__((always_inline)) void
edge(int down, int across, const int parts, int64_t rows, int64_t cells, const unsigned char *a,
     int64_t a_pitch, const unsigned char *b, int64_t b_pitch, float *c, int64_t ldc, bool add)
{
    float copy[BLOCK * BLOCK] = {0};
    size_t bytes = (size_t)across * PMLI_STRIP * sizeof *copy;
    for (int64_t r = 0; add && r < rows; r++)
        memcpy(copy + r * BLOCK, c + r * ldc, bytes);
    MEMORY_FENCE();
    if (down == 2 && across == 2)
        block(2, 2, parts, cells, a, a_pitch, b, b_pitch, copy, BLOCK, add);
    else if (down == 2)
        block(2, 1, parts, cells, a, a_pitch, b, b_pitch, copy, BLOCK, add);
    else if (across == 2)
        block(1, 2, parts, cells, a, a_pitch, b, b_pitch, copy, BLOCK, add);
    else
        block(1, 1, parts, cells, a, a_pitch, b, b_pitch, copy, BLOCK, add);
    MEMORY_FENCE();
    for (int64_t r = 0; r < rows; r++)
        memcpy(c + r * ldc, copy + r * BLOCK, bytes);
}

AMX static inline __attribute__((always_inline)) void
product(int64_t m, int64_t n, int64_t cells, const int parts, const unsigned char *a,
        int64_t a_pitch, const unsigned char *b, int64_t b_pitch, float *c, int64_t ldc, bool add)
{
    for (int64_t j = 0; j < n; j += BLOCK) {
        const unsigned char *right = b + j / PMLI_STRIP * b_pitch;
        int across = n - j >= BLOCK ? 2 : 1;
        for (int64_t i = 0; i < m; i += BLOCK) {
            const unsigned char *left = a + i / PMLI_STRIP * a_pitch;
            float *at = c + i * ldc + j;
            if (m - i >= BLOCK && across == 2)
                block(2, 2, parts, cells, left, a_pitch, right, b_pitch, at, ldc, add);
            else
                edge(m - i > PMLI_STRIP ? 2 : 1, across, parts, m - i < BLOCK ? m - i : BLOCK,
                     cells, left, a_pitch, right, b_pitch, at, ldc, add);
        }
    }
}

AMX static void amx_product(int64_t m, int64_t n, int64_t cells, int parts, const unsigned char *a,
                            int64_t a_pitch, const unsigned char *b, int64_t b_pitch, float *c,
                            int64_t ldc, bool add)
{
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = ROW_BYTES;
        config.rows[i] = PMLI_STRIP;
    }
    MEMORY_FENCE();
    _tile_loadconfig(&config);
    if (parts == 1)
        product(m, n, cells, 1, a, a_pitch, b, b_pitch, c, ldc, add);
    else
        product(m, n, cells, PMLI_PARTS, a, a_pitch, b, b_pitch, c, ldc, add);
    _tile_release(); /* so that the kernel has no tiles to save when it changes threads */
    MEMORY_FENCE();
}

/* Linux hands the tiles' state to a process that asks, for all threads that it will have. */
static bool allowed(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

pmli_split_fn *pmli_split_unit(void)
{
    enum { FEATURES = 7, BF16 = 1 << 22, TILE = 1 << 24 }; /* of leaf 7, in EDX */
    unsigned eax, ebx, ecx, edx;
    bool there = __get_cpuid_count(FEATURES, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & BF16) != 0 &&
                 (edx & TILE) != 0;
    return there && allowed() ? amx_product : NULL;
}
#else
pmli_split_fn *pmli_split_unit(void)
{
    return NULL;
}
#endif
