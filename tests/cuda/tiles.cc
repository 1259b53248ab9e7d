// Who makes which tile of a product by clusters of eight and of two (kernels/cuda/gemm_hopper.c and
// device/gemm_tiles.cuh): each block of both kernels is gone through, as the device would.
//
// Built and run by test_tiles.py.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __device__
static struct {
    unsigned x;
} blockIdx, gridDim;
using std::min;

extern "C" {
#include "shares.h"
}

#include "gemm_tiles.cuh"

static int failed;

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            std::printf("FAIL %s: %lld x %lld on %d, %d clusters\n", #condition, (long long)m,     \
                        (long long)n, d.processors, d.clusters);                                   \
            failed++;                                                                              \
        }                                                                                          \
    } while (0)

static int64_t up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

// How often each tile is made, and the most that a block makes.
struct Made {
    int64_t rows, columns, most = 0;
    std::vector<int> times;
    Made(int64_t m, int64_t n)
        : rows(up(m, 512) * 4), columns(up(n, 512) * 2), times((size_t)(rows * columns))
    {
    }
    template <int M, int N> void by(const shares_kernel &k)
    {
        gridDim.x = k.blocks;
        for (unsigned block = 0; block < k.blocks; block++) {
            blockIdx.x = block;
            Tiles<M, N> tiles((int)block % (M * N));
            int64_t count = 0;
            for (; tiles.next(k.params); count++)
                times.at((size_t)(tiles.row / GEMM_ROWS * columns + tiles.column / GEMM_COLUMNS))++;
            most = std::max(most, count);
        }
    }
};

static void go_through(const shares_device &d, int64_t m, int64_t n)
{
    shares_kernel all[2];
    int kernels = shares_of(&d, m, n, 4096, all);
    EXPECT(kernels >= 1 && all[0].cluster == 8 && !all[0].early);
    if (kernels < 1)
        return;
    Made made(m, n);
    made.by<4, 2>(all[0]);
    if (kernels == 2) {
        EXPECT(all[1].cluster == 2 && all[1].early && d.driver >= 12030);
        made.by<2, 1>(all[1]);
    }
    int64_t missing = 0, twice = 0;
    for (int64_t i = 0; i < (int64_t)made.times.size(); i++) {
        bool is_there = i / made.columns * GEMM_ROWS < m && i % made.columns * GEMM_COLUMNS < n;
        missing += is_there && made.times[(size_t)i] == 0;
        twice += made.times[(size_t)i] > 1;
    }
    EXPECT(missing == 0 && twice == 0);
    // What there is to do by all blocks at once, in whole units, or with half ones behind as many
    // others as clusters of two need to be done with them.
    int twos = d.driver >= 12030 ? (d.processors - 8 * d.clusters) / 2 : 0;
    bool has_halves = m >= 4096 && twos >= 5;
    int64_t rows = has_halves ? up(m, 256) * 2 : up(m, 512) * 4;
    int64_t blocks = all[0].blocks + (kernels == 2 ? all[1].blocks : 0);
    EXPECT(made.most <= up(rows * made.columns, blocks) + 1);
}

int main()
{
    // H200, H100 PCIe, a whole number of clusters, a slice of a GPU, a driver that knows of no
    // half.
    static const shares_device devices[] = {{132, 15, 13000}, {132, 16, 13000}, {114, 13, 12030},
                                            {128, 16, 13000}, {16, 1, 13000},   {132, 15, 12000}};
    static const int64_t widths[] = {8, 512, 520, 1040, 3584, 4096, 6144, 28672};
    for (const shares_device &d : devices) {
        for (int64_t n : widths) {
            for (int64_t m = 1; m < 2200; m += 97)
                go_through(d, m, n);
            for (int64_t m = 4096; m <= 8192; m += 256)
                go_through(d, m, n);
        }
        go_through(d, 33100, 128256);
    }
    // What the failure of one line would name: 8B's products as they are shared out on an H200.
    const shares_device &d = devices[0];
    shares_kernel all[2];
    int64_t m = 8192, n = 28672;
    EXPECT(shares_of(&d, m, n, 4128, all) == 2 && all[0].blocks == 120 && all[1].blocks == 12);
    EXPECT(all[0].params.eights == 825 && all[0].params.twos == 71 && all[0].params.halves == 0);
    EXPECT(all[0].params.steps == 65 && all[0].params.last == 2);
    m = 7936;
    EXPECT(shares_of(&d, m, n, 4096, all) == 2 && all[0].params.units_m == 15 &&
           all[0].params.halves == 56 && all[0].params.steps == 64 && all[0].params.last == 4);
    n = 512;
    EXPECT(shares_of(&d, m, n, 24, all) > 0 && all[0].params.steps == GEMM_LEAST &&
           all[0].params.last == 1);
    // A candidate only where there is a tile for each processor, and not with more units than
    // counted.
    m = 8192, n = 512;
    EXPECT(!shares_serve(&d, m, 256 * 2, 4096) && shares_serve(&d, m, 256 * 3, 4096));
    EXPECT(shares_serve(&d, 512 * 1024, 512 * 63, 4096));
    EXPECT(!shares_serve(&d, 512 * 1024, 512 * 64, 4096));
    std::puts(failed == 0 ? "each tile once" : "");
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
