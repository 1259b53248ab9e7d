/* Cases of what passes between SwiGLU and the linear layers beside it: u, v, db and da made while
 * gate, up and h are in hand, and the linear ops that are given them. */
#include <stdio.h>
#include <string.h>

#include "cases.h"

static void add_forward(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols, int32_t rank,
                        int64_t border)
{
    gpu_case *c = cases_add(cases, PML_OP_swiglu, "%s [%d,%d]+%d u of %d", pml_dtype_name(d),
                            (int)rows, (int)cols, (int)border, rank);
    c->args.swiglu = (pml_swiglu_args){.gate_up = shaped(rows, 2 * cols, border, d),
                                       .h = shaped(rows, cols, 2 * border, d),
                                       .a = shaped(rank, cols, border / 2, d),
                                       .u = shaped(rows, rank, border / 8, d),
                                       .lora_scale = 0.75F};
    c->tolerance = cases_loose(d);
}

/* What of the adapters: those of gate_up by bit, rank of down's, h as well. */
typedef struct beside {
    uint32_t parts;
    int32_t rank, down;
    bool h, in_place;
} beside;

static void add_backward(gpu_cases *cases, pml_dtype d, int64_t rows, int64_t cols, beside b,
                         int64_t border)
{
    gpu_case *c = cases_add(cases, PML_OP_swiglu_bwd, "%s [%d,%d]+%d v, db %#x of %d, da %d%s%s",
                            pml_dtype_name(d), (int)rows, (int)cols, (int)border, b.parts, b.rank,
                            b.down, b.h ? ", h" : "", b.in_place ? ", in place" : "");
    int64_t count = __builtin_popcount(b.parts);
    pml_swiglu_bwd_args *a = &c->args.swiglu_bwd;
    *a = (pml_swiglu_bwd_args){.dh = shaped(rows, cols, border, d),
                               .gate_up = shaped(rows, 2 * cols, border, d),
                               .dgate_up = shaped(rows, 2 * cols, border, d),
                               .lora_parts = b.parts,
                               .rank = b.rank,
                               .lora_scale = {0.75F, 0.5F}};
    if (b.h)
        a->h = shaped(rows, cols, border, d);
    if (count > 0) {
        a->u = shaped(rows, count * b.rank, 8, d);
        a->b = shaped(count * cols, b.rank, 0, d);
        a->v = shaped(rows, count * b.rank, 0, d);
        a->db = shaped(count * cols, b.rank, 0, PML_F32);
    }
    if (b.down > 0) {
        a->v_down = shaped(rows, b.down, 24, d);
        a->da = shaped(b.down, cols, 8, PML_F32);
    }
    if (b.in_place) { /* as a step has it: v behind the rows of dgate_up */
        c->inside[PML_OPERAND(swiglu_bwd, dgate_up)] = PML_OPERAND(swiglu_bwd, gate_up);
        c->inside[PML_OPERAND(swiglu_bwd, h)] = b.h ? PML_OPERAND(swiglu_bwd, dh) : -1;
    }
    if (b.in_place && count > 0 && border >= count * b.rank) {
        a->v.ld = a->dgate_up.ld;
        c->inside[PML_OPERAND(swiglu_bwd, v)] = PML_OPERAND(swiglu_bwd, gate_up);
        c->column[PML_OPERAND(swiglu_bwd, v)] = 2 * cols;
    }
    c->tolerance = cases_loose(d);
}

static void add_all(gpu_cases *cases, pml_dtype d)
{
    static const int64_t shapes[][2] = {{1, 8},      {37, 63},    {130, 704},
                                        {300, 1040}, {1001, 520}, {70, 4864}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t rows = shapes[s][0], cols = shapes[s][1];
        for (int form = 0; form < 3; form++) {
            static const int32_t ranks[] = {16, 8, 3};
            int32_t rank = ranks[form], down = ranks[(form + s) % 3];
            add_forward(cases, d, rows, cols, rank, form == 1 ? 0 : 64);
            add_backward(cases, d, rows, cols, (beside){3, rank, down, false, true}, 64);
        }
        add_backward(cases, d, rows, cols, (beside){1, 16, 0, s % 2 == 0, false}, 0);
        add_backward(cases, d, rows, cols, (beside){2, 8, 16, s % 2 == 1, true}, 8);
        add_backward(cases, d, rows, cols, (beside){0, 0, 16, false, false}, 8);
    }
    add_forward(cases, d, 200, 512, 40, 64);
    add_backward(cases, d, 200, 512, (beside){3, 40, 64, false, true}, 128);
    add_backward(cases, d, 300, 14336, (beside){3, 16, 16, false, true}, 64);
    add_backward(cases, d, 1200, 14336, (beside){0, 0, 3, false, true}, 64); /* rows at a time */
}

/* u given, in a layer with borders and without. */
static void add_given_u(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                        int32_t rank, int32_t border)
{
    gpu_case *c = cases_add(cases, PML_OP_linear, "%s [%d,%d]x[%d,%d] u of %d made, border %d",
                            pml_dtype_name(d), (int)rows, (int)k, n, (int)k, rank, border);
    c->args.linear = (pml_linear_args){.x = shaped(rows, k, border, d),
                                       .w = shaped(n, k, border, d),
                                       .a = shaped(rank, k, 0, d),
                                       .b = shaped(n, rank, 0, d),
                                       .y = shaped(rows, n, 0, d),
                                       .u = shaped(rows, rank, 8, d),
                                       .parts = 1,
                                       .part_cols = {n},
                                       .lora_parts = 1,
                                       .rank = rank,
                                       .lora_scale = {0.75F},
                                       .border = border,
                                       .u_made = true};
    c->tolerance = cases_loose(d);
}

/* v handed on, or given: apart from dy's border, or in it. */
static void add_given_v(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                        int32_t rank, int32_t border, bool inside, bool made)
{
    gpu_case *c = cases_add(cases, PML_OP_linear_bwd, "%s [%d,%d]x[%d,%d] v of %d %s%s, border %d",
                            pml_dtype_name(d), (int)rows, (int)k, 2 * n, (int)k, rank,
                            made ? "made" : "handed on", inside ? " in place" : "", border);
    pml_linear_bwd_args *a = &c->args.linear_bwd;
    *a = (pml_linear_bwd_args){.dy = shaped(rows, 2 * n, border, d),
                               .x = shaped(rows, k, 0, d),
                               .w = shaped(2 * n, k, border, d),
                               .a = shaped(2 * rank, k, 0, d),
                               .b = shaped(2 * n, rank, 0, d),
                               .dx = shaped(rows, k, 16, d),
                               .da = shaped(2 * rank, k, 0, PML_F32),
                               .v = shaped(rows, 2 * rank, 0, d),
                               .parts = 2,
                               .part_cols = {n, n},
                               .lora_parts = 3,
                               .rank = rank,
                               .lora_scale = {0.75F, 0.5F},
                               .border = border,
                               .kept = made ? PML_V_MADE : 0};
    if (inside) {
        a->v.ld = a->dy.ld;
        c->inside[PML_OPERAND(linear_bwd, v)] = PML_OPERAND(linear_bwd, dy);
        c->column[PML_OPERAND(linear_bwd, v)] = 2 * n;
    }
    if (!made) {
        a->u = shaped(rows, 2 * rank, 0, d);
        a->db = shaped(2 * n, rank, 0, PML_F32);
    }
    c->tolerance = cases_loose(d);
}

void cases_of_mlp(gpu_cases *cases)
{
    for (int f = 0; f < CASES_FLOATS; f++) {
        pml_dtype d = cases_floats[f];
        add_all(cases, d);
        add_given_u(cases, d, 130, 192, 520, 16, 64);
        add_given_u(cases, d, 130, 192, 521, 3, 9);
        add_given_u(cases, d, 40, 192, 520, 8, 0);
        for (int made = 0; made < 2; made++)
            for (int inside = 0; inside < 2; inside++) {
                add_given_v(cases, d, 300, 520, 96, 16, 64, inside, made);
                add_given_v(cases, d, 130, 64, 129, 3, 11, inside, made); /* zeros behind */
                add_given_v(cases, d, 37, 64, 96, 8, 64, inside, made);   /* too few tokens */
            }
        add_given_v(cases, d, 130, 64, 96, 40, 0, false, true);
    }
}
