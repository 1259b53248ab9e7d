/* Cases of weights in 8 bits: the reference's codes to the bit, and linear layers over them. */
#include "cases.h"

static const pml_dtype floats[] = {PML_F32, PML_BF16, PML_F16};
enum { FLOATS = 3, MOST_N = 272 };

/* Codes are the reference's on either side; what is left is the order and the width of sums, in
 * which tensor cores keep fewer bits of 8-bit operands' products than of others, and the low-rank
 * factors as two codes each. */
static double tolerance_of(pml_dtype dtype)
{
    return dtype == PML_BF16 ? 6e-3 : 2e-3;
}

static void add_quantise(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols, int64_t border)
{
    gpu_case *c = cases_add(cases, PML_OP_fp8_quantise, "%s [%d,%d]+%d", pml_dtype_name(d),
                            (int)rows, (int)cols, (int)border);
    c->args.fp8_quantise = (pml_fp8_quantise_args){.x = shaped(rows, cols, border, d),
                                                   .codes = shaped(rows, cols, border, PML_U8),
                                                   .scale = shaped(1, rows, 0, PML_F32)};
}

/* Scales that bring codes, drawn anywhere up to 448, to the size of what adapters add. */
static const float *scales(void)
{
    static float all[2 * MOST_N];
    for (int i = 0; i < 2 * MOST_N; i++)
        all[i] = (float)(i % 7 + 3) * 1e-3F;
    return all;
}

/* Three parts, adapters on the outer two; rank 0: none. */
static void add_linear(gpu_cases *cases, pml_dtype d, const int64_t shape[3], int32_t rank,
                       bool bias, int32_t border)
{
    int64_t rows = shape[0], k = shape[2];
    int32_t n = (int32_t)shape[1];
    gpu_case *c = cases_add(cases, PML_OP_linear, "%s fp8 [%d,%d]x[%d,%d] r %d%s, border %d",
                            pml_dtype_name(d), (int)rows, (int)k, 2 * n, (int)k, rank,
                            bias ? " bias" : "", border);
    pml_linear_args *a = &c->args.linear;
    *a = (pml_linear_args){.x = shaped(rows, k, 8, d),
                           .w = shaped(2 * n, k, border, PML_U8),
                           .w_scale = shaped(1, 2 * n, 0, PML_F32),
                           .y = shaped(rows, 2 * n, 16, d),
                           .parts = 3,
                           .part_cols = {n, n / 2, n - n / 2},
                           .border = border};
    c->e4m3 = true;
    c->given[PML_OPERAND(linear, w_scale)] = scales();
    c->tolerance = tolerance_of(d);
    if (bias)
        a->bias = shaped(1, 2 * n, 0, d);
    if (rank == 0)
        return;
    a->lora_parts = 5;
    a->rank = rank;
    a->lora_scale[0] = a->lora_scale[2] = 0.75F;
    a->a = shaped(2 * rank, k, 0, d);
    a->b = shaped(n + (n - n / 2), rank, 0, d);
    a->u = shaped(rows, 2 * rank, 0, d);
}

static void add_linear_bwd(gpu_cases *cases, pml_dtype d, const int64_t shape[3], int32_t rank,
                           int32_t border)
{
    int64_t rows = shape[0], k = shape[2];
    int32_t n = (int32_t)shape[1];
    gpu_case *c = cases_add(cases, PML_OP_linear_bwd, "%s fp8 [%d,%d]x[%d,%d] r %d, border %d",
                            pml_dtype_name(d), (int)rows, (int)k, 2 * n, (int)k, rank, border);
    pml_linear_bwd_args *a = &c->args.linear_bwd;
    *a = (pml_linear_bwd_args){.dy = shaped(rows, 2 * n, 8, d),
                               .x = shaped(rows, k, 0, d),
                               .w = shaped(2 * n, k, border, PML_U8),
                               .w_scale = shaped(1, 2 * n, 0, PML_F32),
                               .dx = shaped(rows, k, 16, d),
                               .parts = 2,
                               .part_cols = {n, n},
                               .border = border};
    c->e4m3 = true;
    c->given[PML_OPERAND(linear_bwd, w_scale)] = scales();
    c->tolerance = 2 * tolerance_of(d);
    if (rank == 0)
        return;
    a->lora_parts = 2;
    a->rank = rank;
    a->lora_scale[1] = 0.75F;
    a->a = shaped(rank, k, 0, d);
    a->b = shaped(n, rank, 0, d);
    a->u = shaped(rows, rank, 0, d);
    a->da = shaped(rank, k, 0, PML_F32);
    a->db = shaped(n, rank, 0, PML_F32);
}

void cases_of_fp8(gpu_cases *cases)
{
    static const int64_t shapes[][3] = {/* rows, n, k: one tile and less, many, cut ones */
                                        {1, 16, 16},
                                        {7, 48, 208},
                                        {128, 64, 128},
                                        {200, 144, 80},
                                        {513, MOST_N, 400}};
    for (int f = 0; f < FLOATS; f++) {
        pml_dtype d = floats[f];
        add_quantise(cases, d, 1, 1, 0);
        add_quantise(cases, d, 5, 33, 3);
        add_quantise(cases, d, 40, 64, 8);
        add_quantise(cases, d, 300, 4096, 0);
        add_quantise(cases, d, 3, 28672, 64);
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            int32_t rank = s % 2 ? 7 : 16;
            add_linear(cases, d, shapes[s], 0, s % 2 == 1, 0);
            add_linear_bwd(cases, d, shapes[s], 0, 0);
            for (int32_t border = 0; border <= 128; border += 128) { /* low-rank factors in it */
                add_linear(cases, d, shapes[s], rank, s % 2 == 0, border);
                add_linear_bwd(cases, d, shapes[s], rank, border);
            }
        }
    }
}
