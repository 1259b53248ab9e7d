#include "tile.h"

/* Of C, what fits the registers; what is left of them goes in fours first. */
enum { PLAIN_ROWS = 4, AVX2_ROWS = 6, AVX512_ROWS = 14, REST_ROWS = 4 };

#define TILE(name)  plain_##name
#define TILE_TARGET /* what every machine of this architecture has */
#define TILE_LANES  4
#define TILE_ROWS   PLAIN_ROWS
#include "tile_body.h"

#if defined(__x86_64__)
#define TILE(name)  avx2_##name
#define TILE_TARGET __attribute__((target("avx2,fma")))
#define TILE_LANES  8
#define TILE_ROWS   AVX2_ROWS
#include "tile_body.h"

#define TILE(name)  avx512_##name
#define TILE_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define TILE_LANES  16
#define TILE_ROWS   AVX512_ROWS
#include "tile_body.h"

/* The levels that PMLI_CLONES names: x86-64-v4 and x86-64-v3. */
bool pmli_has_avx512(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
}

static bool has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
}

pmli_tile_fn *pmli_tile_pick(void)
{
    return pmli_has_avx512() ? avx512_product : has_avx2() ? avx2_product : plain_product;
}

int pmli_tile_width(void)
{
    return pmli_has_avx512() ? 32 : has_avx2() ? 16 : 0;
}

int64_t pmli_tile_waste(int64_t rows)
{
    int64_t rest = rows % (pmli_has_avx512() ? AVX512_ROWS : has_avx2() ? AVX2_ROWS : PLAIN_ROWS);
    return (REST_ROWS - rest % REST_ROWS) % REST_ROWS;
}

const char *pmli_instructions(void)
{
    return pmli_has_avx512() ? "avx512" : has_avx2() ? "avx2" : "x86-64";
}
#else
bool pmli_has_avx512(void)
{
    return false;
}

pmli_tile_fn *pmli_tile_pick(void)
{
    return plain_product;
}

int pmli_tile_width(void)
{
    return 0;
}

int64_t pmli_tile_waste(int64_t rows)
{
    return (REST_ROWS - rows % PLAIN_ROWS % REST_ROWS) % REST_ROWS;
}

const char *pmli_instructions(void)
{
#if defined(__aarch64__)
    return "aarch64";
#else
    return "generic";
#endif
}
#endif
