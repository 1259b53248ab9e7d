// Sums over the threads of one row.
#ifndef PMLI_CUDA_ROW_TOTAL_CUH
#define PMLI_CUDA_ROW_TOTAL_CUH

// A row is a part of a warp (a power of two), a warp, or the whole block. All threads of a block
// come here. The order depends on shapes only.
__device__ inline float row_total(float x)
{
    __shared__ float of_warp[32];
    for (int d = min(blockDim.x, 32) / 2; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    if (blockDim.x <= 32)
        return x;
    if (threadIdx.x % 32 == 0)
        of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

#endif
