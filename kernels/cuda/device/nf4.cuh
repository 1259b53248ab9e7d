// The 8-bit map of magnitudes, made where it is used: 256 different words of a kernel's parameters
// would be read one by one.
#ifndef PMLI_CUDA_NF4_CUH
#define PMLI_CUDA_NF4_CUH

// Point i of the line from 0.1 to 1 in 2^decade steps, as pml_dynamic_map has it.
__device__ inline float nf4_point(int decade, int i)
{
    const int steps = 1 << decade;
    const float step = __fdiv_rn(__fsub_rn(1.0f, 0.1f), (float)steps);
    return i < (steps + 1) / 2 ? __fmaf_rn(step, (float)i, 0.1f)
                               : __fmaf_rn(-step, (float)(steps - i), 1.0f);
}

// Entry `index` of the map, to the bit: 127 negative numbers, 0, 127 positive ones, 1.
__device__ inline float nf4_magnitude(int index)
{
    if (index == 127 || index == 255)
        return index == 127 ? 0.0f : 1.0f;
    const int rank = index < 127 ? 127 - index : index - 127; // from 1, by size
    const int decade = 31 - __clz(rank), i = rank - (1 << decade);
    const float middle = __fmul_rn(__fadd_rn(nf4_point(decade, i), nf4_point(decade, i + 1)), 0.5f);
    const float power = decade == 0   ? 1e-6f
                        : decade == 1 ? 1e-5f
                        : decade == 2 ? 1e-4f
                        : decade == 3 ? 1e-3f
                        : decade == 4 ? 1e-2f
                        : decade == 5 ? 1e-1f
                                      : 1.0f;
    const float value = __fmul_rn(power, middle);
    return index < 127 ? -value : value;
}

// Of a block, from the code of its magnitude: each step rounded by itself.
__device__ inline float nf4_scale(int code, float nested, float offset)
{
    return __fadd_rn(__fmul_rn(nf4_magnitude(code), nested), offset);
}

#endif
