/* Cases of a linear layer's backward, of its weight and of its adapters. */
#include <stdio.h>
#include <string.h>

#include "cases.h"

/* Weights, adapters and biases trained together would not occur, but say all about the op. */
static void add_linear_bwd(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                           int32_t rank, bool trains_weight)
{
    char lora[24] = "";
    if (rank > 0)
        snprintf(lora, sizeof lora, " LoRA %d", rank);
    gpu_case *c =
        cases_add(cases, PML_OP_linear_bwd, "%s [%d,%d]x[%d,%d]%s%s", pml_dtype_name(d), (int)rows,
                  (int)k, 2 * n, (int)k, lora, trains_weight ? " dw, dbias" : "");
    pml_linear_bwd_args *a = &c->args.linear_bwd;
    *a = (pml_linear_bwd_args){.dy = shaped(rows, 2 * n, 8, d),
                               .x = shaped(rows, k, 0, d),
                               .w = shaped(2 * n, k, 0, d),
                               .dx = shaped(rows, k, 16, d),
                               .parts = 3,
                               .part_cols = {n, n / 2, n - n / 2}};
    c->tolerance = d == PML_F32 ? 3e-6 : cases_loose(d);
    if (trains_weight) {
        a->dw = shaped(2 * n, k, 0, PML_F32);
        a->dbias = shaped(1, 2 * n, 0, PML_F32);
    }
    if (rank == 0)
        return;
    a->lora_parts = 5;
    a->rank = rank;
    a->lora_scale[0] = 0.75F;
    a->lora_scale[2] = rank % 2 == 0 ? 0.75F : 0.5F;
    a->a = shaped(2 * rank, k, 0, d);
    a->b = shaped(n + (n - n / 2), rank, 0, d);
    a->u = shaped(rows, 2 * rank, 8, d);
    a->da = shaped(2 * rank, k, 0, PML_F32);
    a->db = shaped(n + (n - n / 2), rank, 0, PML_F32);
}

/* With borders behind dy and w and below w. */
static void add_bordered_bwd(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                             int32_t rank, int32_t border)
{
    add_linear_bwd(cases, d, rows, n, k, rank, false);
    gpu_case *c = &cases->at[cases->count - 1];
    size_t length = strlen(c->name);
    snprintf(c->name + length, sizeof c->name - length, ", border %d", border);
    pml_linear_bwd_args *a = &c->args.linear_bwd;
    a->border = border;
    a->dy = shaped(rows, 2 * n, border, d);
    a->w = shaped(2 * n, k, border, d);
}

enum { DX = 1, DA = 2 };

/* With dropout; adapters on parts whose bits are set, and what of dx and da is wanted. */
static void add_dropped_bwd(gpu_cases *cases, pml_dtype d, int64_t rows, int32_t n, int64_t k,
                            int32_t rank, uint32_t adapted, int wants)
{
    add_linear_bwd(cases, d, rows, n, k, rank, false);
    gpu_case *c = &cases->at[cases->count - 1];
    pml_linear_bwd_args *a = &c->args.linear_bwd;
    size_t length = strlen(c->name);
    snprintf(c->name + length, sizeof c->name - length, " of %x, dropout%s%s", adapted,
             (wants & DX) != 0 ? "" : ", no dx", (wants & DA) != 0 ? "" : ", no da");
    int64_t columns = rank * __builtin_popcount(adapted);
    a->lora_parts = adapted;
    a->lora_scale[1] = 0.25F;
    a->a = shaped(columns, k, 0, d);
    a->b = shaped(cases_adapted(a->part_cols, adapted), rank, 0, d);
    a->u = shaped(rows, columns, 8, d);
    a->db = shaped(a->b.rows, rank, 0, PML_F32);
    a->da = shaped(columns, k, 0, PML_F32);
    a->lora_dropout = 0.3F;
    a->lora_purpose = (1 << 16) + 11;
    if ((wants & DX) == 0)
        a->dx = (pml_view){0};
    if ((wants & DA) == 0)
        a->x = a->da = (pml_view){0};
    cases_drop(c, 7, rows);
}

/* By kernels that draw masks: each of them, with more tiles a block than are under way at a time
 * (on up to 132 processors), and a strip that is but begun. */
static void add_drawn(gpu_cases *cases, pml_dtype d)
{
    static const struct {
        int32_t rank;
        uint32_t adapted;
        int wants;
    } kinds[] = {{16, 7, DX | DA}, {8, 5, DX | DA}, {16, 1, DX | DA}, {32, 4, DX | DA},
                 {16, 4, DX},      {32, 5, DX},     {8, 7, DA},       {24, 1, DA}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        add_dropped_bwd(cases, d, 1000, 24, 14344, kinds[i].rank, kinds[i].adapted, kinds[i].wants);
}

/* v and db by one pass over dy, or for what is none of its ranks by products: rows of one tile, of
 * whole ones and of one behind them; parts narrower than a box, of whole tiles, and short ones. */
static void add_passes(gpu_cases *cases, pml_dtype d)
{
    static const int32_t shapes[][3] = {{1, 48, 16},    {64, 1024, 8},   {65, 1040, 16},
                                        {129, 528, 16}, {333, 1040, 32}, {130, 528, 64}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int32_t rows = shapes[s][0], n = shapes[s][1], rank = shapes[s][2];
        add_linear_bwd(cases, d, rows, n, 96, rank, false);
        cases->at[cases->count - 1].args.linear_bwd.lora_scale[2] = 0.5F;
        add_bordered_bwd(cases, d, rows, n, 64, rank, 2 * rank);
    }
}

void cases_of_linear_bwd(gpu_cases *cases)
{
    static const int64_t shapes[][3] = {{1, 8, 8}, {37, 66, 65}, {130, 448, 1000}, {257, 768, 576}};
    for (int f = 0; f < CASES_FLOATS; f++) {
        pml_dtype d = cases_floats[f];
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
            int64_t rows = shapes[s][0], k = shapes[s][2];
            int32_t n = (int32_t)shapes[s][1];
            add_linear_bwd(cases, d, rows, n, k, 0, false);
            add_linear_bwd(cases, d, rows, n, k, 3 + 5 * (int32_t)s, false);
            add_linear_bwd(cases, d, rows, n, k, 0, true);
            add_dropped_bwd(cases, d, rows, n, k, 3 + 5 * (int32_t)s, 5, s % 2 == 0 ? DX | DA : DA);
        }
        add_bordered_bwd(cases, d, 100, 384, 256, 16, 64);
        add_bordered_bwd(cases, d, 70, 65, 129, 3, 11);
        add_bordered_bwd(cases, d, 256, 128, 512, 40, 128);
        add_bordered_bwd(cases, d, 37, 130, 64, 4, 64);
        add_bordered_bwd(cases, d, 300, 1040, 96, 16, 64); /* v and db by one kernel: short tiles */
        add_bordered_bwd(cases, d, 1001, 1024, 72, 8, 64);
        add_bordered_bwd(cases, d, 5001, 1040, 72, 16, 64); /* many tiles a block */
        add_linear_bwd(cases, d, 300, 1040, 96, 16, false);
        if (d != PML_F32) { /* more units than our own kernel's clusters have at once */
            add_linear_bwd(cases, d, 16100, 12, 1040, 0, false);
            add_linear_bwd(cases, d, 33100, 320, 520, 0, false);
        }
        add_dropped_bwd(cases, d, 300, 1040, 96, 16, 5, DX | DA);
        add_dropped_bwd(cases, d, 5, 24, 8208, 8, 5,
                        DX | DA); /* a row has masks by several blocks */
        add_dropped_bwd(cases, d, 130, 64, 72, 24, 7, DX | DA);   /* a group and a half a part */
        add_dropped_bwd(cases, d, 4321, 64, 136, 40, 5, DX | DA); /* by masked copies */
        if (d != PML_F32)
            add_drawn(cases, d);
        add_passes(cases, d);
    }
}
