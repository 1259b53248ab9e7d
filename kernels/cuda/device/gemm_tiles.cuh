// Who makes which tile of a product in gemm_hopper.cu: arithmetic alone, which a test goes through
// on the CPU (tests/cuda/tiles.cc).
#ifndef PMLI_CUDA_GEMM_TILES_CUH
#define PMLI_CUDA_GEMM_TILES_CUH

#include "params.h"

// The tiles of this block, one after the other; its cluster has M x N of a unit at once.
template <int M, int N> struct Tiles {
    static constexpr bool WHOLE = M == GEMM_DOWN && N == GEMM_ACROSS;
    static constexpr int TURNS = GEMM_DOWN / M * (GEMM_ACROSS / N); // that a unit takes
    int down, across; // the block's place in its cluster
    int turn;
    int row, column;                            // of the tile's first element
    __device__ inline explicit Tiles(int block) // its number in its cluster
    {
        down = block % M, across = block / M;
        turn = (int)blockIdx.x / (M * N);
    }
    // Clusters of eight have e of all u units, i u / e rounded down, those of two the others,
    // spread evenly among them: the i-th of their t is (i + 1) u / t rounded up, less one.
    __device__ inline bool next(const pmli_gemm_hopper_params &p)
    {
        const int i = turn / TURNS, part = turn % TURNS, half = turn - p.twos * TURNS;
        const unsigned all = (unsigned)(p.eights + p.twos); // its square is no more than 32 bits
        turn += (int)gridDim.x / (M * N);
        if (WHOLE) {
            if (i >= p.eights)
                return false;
            place_in((int)((unsigned)i * all / (unsigned)p.eights), 0, p);
        } else if (half < 0) {
            const unsigned twos = (unsigned)p.twos;
            place_in((int)(((unsigned)(i + 1) * all + twos - 1) / twos) - 1, part, p);
        } else { // the first M rows of tiles of what lies below the units
            constexpr int SIDE = GEMM_ACROSS / N;
            if (half >= p.halves * SIDE)
                return false;
            place_at(p.units_m, half / SIDE, half % SIDE * (GEMM_DOWN / M));
        }
        return true;
    }

  private:
    __device__ inline void place_in(int unit, int part, const pmli_gemm_hopper_params &p)
    {
        const int before = unit / (p.band * p.units_n) * p.band, at = unit - before * p.units_n;
        const int here = min(p.band, p.units_m - before);
        place_at(before + at % here, at / here, part);
    }
    __device__ inline void place_at(int unit_row, int unit_column, int part)
    {
        row = (unit_row * GEMM_DOWN + part % (GEMM_DOWN / M) * M + down) * GEMM_ROWS;
        column = (unit_column * GEMM_ACROSS + part / (GEMM_DOWN / M) * N + across) * GEMM_COLUMNS;
    }
};

#endif
