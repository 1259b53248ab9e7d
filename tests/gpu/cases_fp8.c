/* Cases of weights in 8 bits: the reference's codes to the bit, and linear layers over them. */
#include <stdio.h>
#include <string.h>

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

/* The last part's weight is 2^-5 of the others': its adapter has as many bits as theirs. */
static void add_apart(gpu_cases *cases, pml_dtype d)
{
    static float apart[256];
    add_linear(cases, d, (const int64_t[]){200, 128, 208}, 16, false, 128);
    gpu_case *c = &cases->at[cases->count - 1];
    snprintf(c->name + strlen(c->name), sizeof c->name - strlen(c->name), " apart");
    for (int i = 0; i < 256; i++)
        apart[i] = scales()[i] * (i < 192 ? 1 : 0x1p-5F);
    c->given[PML_OPERAND(linear, w_scale)] = apart;
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
                               .w = shaped(k, 2 * n, border, PML_U8),
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

/* Of pieces, most alike: what levelling finds. */
static const float *piece_scales(void)
{
    static float all[1 << 14];
    for (int i = 0; i < 1 << 14; i++)
        all[i] = i % 5 == 3 ? 0x1p-16F : i % 7 == 2 ? 0x1p-8F : 0x1p-12F;
    return all;
}

/* What is in codes when it comes: x, with u made; and dy, with v. */
static void add_made(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                     int32_t rank, int32_t border)
{
    gpu_case *c = cases_add(cases, PML_OP_linear, "%s fp8 [%d,%d]x[%d,%d] codes of x, r %d, +%d",
                            pml_dtype_name(d), (int)rows, (int)k, n, (int)k, rank, border);
    pml_linear_args *a = &c->args.linear;
    *a = (pml_linear_args){.x = shaped(rows, k, border, PML_U8),
                           .w = shaped(n, k, border, PML_U8),
                           .w_scale = shaped(1, n, 0, PML_F32),
                           .x_scale = shaped(rows, pml_fp8_pieces(k), 3, PML_F32),
                           .y = shaped(rows, n, 16, d),
                           .parts = 1,
                           .part_cols = {n},
                           .border = border};
    c->e4m3 = c->levelled = true;
    c->given[PML_OPERAND(linear, w_scale)] = scales();
    c->given[PML_OPERAND(linear, x_scale)] = piece_scales();
    c->tolerance = 2 * tolerance_of(d);
    if (rank > 0) {
        a->lora_parts = 1;
        a->rank = rank;
        a->lora_scale[0] = 0.75F;
        a->u_made = true;
        a->a = shaped(rank, k, 0, d);
        a->b = shaped(n, rank, 0, d);
        a->u = shaped(rows, rank, 8, d);
    }

    c = cases_add(cases, PML_OP_linear_bwd, "%s fp8 [%d,%d]x[%d,%d] codes of dy, r %d, +%d",
                  pml_dtype_name(d), (int)rows, 2 * n, 2 * n, (int)k, rank, border);
    pml_linear_bwd_args *b = &c->args.linear_bwd;
    *b = (pml_linear_bwd_args){.dy = shaped(rows, 2 * n, border, PML_U8),
                               .w = shaped(k, 2 * n, border, PML_U8),
                               .w_scale = shaped(1, 2 * n, 0, PML_F32),
                               .dy_scale = shaped(rows, 2 * pml_fp8_pieces(n), 0, PML_F32),
                               .dx = shaped(rows, k, 16, d),
                               .parts = 2,
                               .part_cols = {n, n},
                               .border = border};
    c->e4m3 = c->levelled = true;
    c->given[PML_OPERAND(linear_bwd, w_scale)] = scales();
    c->given[PML_OPERAND(linear_bwd, dy_scale)] = piece_scales();
    c->tolerance = 2 * tolerance_of(d);
    if (rank == 0)
        return;
    b->lora_parts = 3;
    b->rank = rank;
    b->lora_scale[0] = b->lora_scale[1] = 0.75F;
    b->kept = PML_V_MADE;
    b->x = shaped(rows, k, 0, d);
    b->a = shaped(2 * rank, k, 0, d);
    b->b = shaped(2 * n, rank, 0, d);
    b->v = shaped(rows, 2 * rank, 0, d);
    b->da = shaped(2 * rank, k, 0, PML_F32);
}

/* Swiglu whose results are codes: by the kernels that also do what adapters want where the rank is
 * one of theirs, by some rows at a time elsewhere. */
static void add_swiglu(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols, int32_t rank)
{
    static float w_scale[2 * 14336];
    for (int i = 0; i < 2 * 14336; i++)
        w_scale[i] = (float)(i % 13 + 1) * 0.1F;
    gpu_case *c = cases_add(cases, PML_OP_swiglu, "%s fp8 [%d,%d] codes of h, u of %d",
                            pml_dtype_name(d), (int)rows, (int)cols, rank);
    pml_swiglu_args *a = &c->args.swiglu;
    *a = (pml_swiglu_args){.gate_up = shaped(rows, 2 * cols, 8, d),
                           .h = shaped(rows, cols, 64, PML_U8),
                           .h_scale = shaped(rows, pml_fp8_pieces(cols), 1, PML_F32),
                           .lora_scale = 0.75F};
    if (rank > 0) {
        a->a = shaped(rank, cols, 0, d);
        a->u = shaped(rows, rank, 8, d);
    }
    c->codes = PML_OPERAND(swiglu, h), c->scales = PML_OPERAND(swiglu, h_scale);
    c->in_pieces = 1;
    /* Four times what large ones come to: in a small one a few of its largest numbers decide. */
    c->tolerance = d == PML_F32 ? 5e-6 : d == PML_BF16 ? 2e-2 : 3e-3;

    gpu_case *g = cases_add(cases, PML_OP_swiglu_bwd, "%s fp8 [%d,%d] codes of dgate_up, r %d",
                            pml_dtype_name(d), (int)rows, (int)cols, rank);
    pml_swiglu_bwd_args *b = &g->args.swiglu_bwd;
    *b = (pml_swiglu_bwd_args){.dh = shaped(rows, cols, 0, d),
                               .gate_up = shaped(rows, 2 * cols, 8, d),
                               .dgate_up = shaped(rows, 2 * cols, 64, PML_U8),
                               .w_scale = shaped(1, 2 * cols, 0, PML_F32),
                               .scale = shaped(rows, 2 * pml_fp8_pieces(cols), 0, PML_F32)};
    if (rank > 0) {
        b->lora_parts = 3;
        b->rank = rank;
        b->lora_scale[0] = 0.75F, b->lora_scale[1] = 0.5F;
        b->u = shaped(rows, 2 * rank, 8, d);
        b->b = shaped(2 * cols, rank, 0, d);
        b->v = shaped(rows, 2 * rank, 0, d);
        b->db = shaped(2 * cols, rank, 0, PML_F32);
        b->v_down = shaped(rows, rank, 8, d);
        b->da = shaped(rank, cols, 0, PML_F32);
    }
    g->given[PML_OPERAND(swiglu_bwd, w_scale)] = w_scale;
    g->codes = PML_OPERAND(swiglu_bwd, dgate_up), g->scales = PML_OPERAND(swiglu_bwd, scale);
    g->in_pieces = 2;
    g->tolerance = c->tolerance;
}

static void add_turn(gpu_cases *cases, int64_t rows, int64_t cols, int64_t border)
{
    gpu_case *c =
        cases_add(cases, PML_OP_fp8_turn, "fp8 [%d,%d]+%d", (int)rows, (int)cols, (int)border);
    c->args.fp8_turn = (pml_fp8_turn_args){shaped(rows, cols, border, PML_U8),
                                           shaped(cols, rows, 2 * border, PML_U8)};
}

static void add_codes(gpu_cases *cases, pml_dtype d)
{
    static const int64_t shapes[][3] = {
        /* rows, n, k */ {1, 16, 16}, {70, 48, 528}, {200, 272, 1024}, {513, 144, 4096}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int form = 0; form < 3; form++)
            add_made(cases, d, shapes[s][0], (int32_t)shapes[s][1], shapes[s][2],
                     form == 0 ? 0 : 16, form < 2 ? 0 : 128);
    static const int32_t ranks[] = {0, 16, 8, 3};
    for (int r = 0; r < 4; r++) {
        add_swiglu(cases, d, 600, 48, ranks[r]);
        add_swiglu(cases, d, 301, 1040, ranks[r]);
        add_swiglu(cases, d, 130, 704, ranks[r]);
    }
    add_swiglu(cases, d, 700, 14336, 16);
}

void cases_of_fp8(gpu_cases *cases)
{
    static const int64_t shapes[][3] = {/* rows, n, k: one tile and less, many, cut ones */
                                        {1, 16, 16},
                                        {7, 48, 208},
                                        {128, 64, 128},
                                        {200, 144, 80},
                                        {513, MOST_N, 400}};
    add_turn(cases, 16, 16, 0);
    add_turn(cases, 48, 208, 16);
    add_turn(cases, 272, 400, 32);
    for (int f = 0; f < FLOATS; f++) {
        pml_dtype d = floats[f];
        add_codes(cases, d);
        add_apart(cases, d);
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
