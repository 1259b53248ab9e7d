/* Op calls as data, for a GPU to run and the CPU reference to judge: shapes first, all placed in
 * one arena, then run. See test_ops.c for how they are judged. */
#ifndef TESTS_GPU_CASES_H
#define TESTS_GPU_CASES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml_op/backend.h"

enum { CASES_MAX = 4096 };

typedef struct gpu_case {
    char name[96];
    pml_op op;
    pml_op_args args; /* shapes; after cases_place device addresses, too */
    /* Operand i lies in operand inside[i]'s rows, from column column[i] on; -1: a place of its own.
     */
    int inside[PML_OP_MAX_VIEWS];
    int64_t column[PML_OP_MAX_VIEWS];
    size_t workspace; /* bytes, what the backend asks for; operands lie behind it */
    int shift;        /* elements by which every operand is off its 256-byte alignment */
    int32_t indices;  /* I32 operands hold numbers below this */
    bool distinct;    /* …each once, and some -1 */
    bool e4m3;        /* U8 operands hold codes of numbers, none of NaN */
    int in_pieces; /* parts of an output in 8 bits, whose scales are operand `scales`: it is held */
    int codes, scales; /* against the reference as the numbers that both mean; 0: there is none */
    bool levelled;     /* operand 0 and its scales may be brought to one scale a row */
    const void *given[PML_OP_MAX_VIEWS]; /* I32 or F32 contents, rows end to end; NULL: drawn */
    int positive;                        /* this operand's numbers are; -1: none */
    double tolerance;                    /* of |difference| / |reference|; 0: the same bits */
    double of_f32; /* the same for outputs in F32 where others are narrower; 0: as for those */
    int exact;     /* this output is the reference's, rounded once, bit by bit; -1: none */
    double
        unit; /* where the reference is all zero: rms of the terms that cancel; 0: not expected */
} gpu_case;

typedef struct gpu_cases {
    gpu_case at[CASES_MAX];
    int count;
    size_t workspace, operands; /* bytes; the arena is workspace first, then operands */
} gpu_cases;

/* What the GPU computes on. */
enum { CASES_FLOATS = 3 };
static const pml_dtype cases_floats[CASES_FLOATS] = {PML_F32, PML_BF16, PML_F16};

/* A result that is rounded once to the dtype, and nothing on the way to it: an operand that is
 * rounded before it is used makes 2.4e-3 of bfloat16's 1.7e-3. */
static inline double cases_once(pml_dtype dtype)
{
    return dtype == PML_F32 ? 2e-6 : dtype == PML_BF16 ? 2.1e-3 : 2.6e-4;
}

/* A result that is rounded once to the dtype, or thrice where u and y are rounded on the way. */
static inline double cases_tight(pml_dtype dtype)
{
    return dtype == PML_F32 ? 2e-6 : dtype == PML_BF16 ? 4e-3 : 6e-4;
}

/* A few roundings to the dtype on the way, and products of rounded numbers. */
static inline double cases_loose(pml_dtype dtype)
{
    return dtype == PML_F32 ? 5e-6 : dtype == PML_BF16 ? 1.2e-2 : 1.5e-3;
}

/* A case to fill in: all operands absent. */
gpu_case *cases_add(gpu_cases *cases, pml_op op, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* A view that has a shape and no place yet. */
pml_view shaped(int64_t rows, int64_t cols, int64_t border, pml_dtype dtype);

/* Rows of b: of all parts with an adapter. */
int64_t cases_adapted(const int32_t part_cols[], uint32_t adapted);

/* Dropout in a linear layer's LoRA branch or its backward's: rng and places at operands at, at + 1.
 */
void cases_drop(gpu_case *c, int at, int64_t rows);

/* Embedding, norms, linear layers and moving rows; everything that training adds, attention and a
 * linear layer's backward by themselves; and what passes between SwiGLU and the layers beside it.
 */
void cases_of_forward(gpu_cases *cases);
void cases_of_training(gpu_cases *cases);
void cases_of_attention(gpu_cases *cases);
void cases_of_linear_bwd(gpu_cases *cases);
void cases_of_mlp(gpu_cases *cases);
/* Weights in 8 bits. */
void cases_of_fp8(gpu_cases *cases);

/* Which cases are run. */
typedef struct gpu_choice {
    const char *only;       /* in their names; NULL: any */
    const char *without[8]; /* not in their names */
    int part, parts;        /* of them, each parts-th from the part-th on; parts = 0: all */
} gpu_choice;

/* Leave out the others; before they are placed. */
void cases_keep(gpu_cases *cases, const gpu_choice *choice);

/* Operand i and what the op may write around it: a linear layer's borders. */
pml_view cases_reach(const gpu_case *c, int operand);

/* Give every operand its offset (as its address), ask the backend for workspaces. */
void cases_place(gpu_cases *cases, const pml_backend *backend);

/* Turn offsets into addresses. */
void cases_rebase(gpu_cases *cases, unsigned char *base);

/* Offload, await and fetch of a block of so many rows (copies.c), op by op (way 0), or from a graph
 * that is replayed `way` times: how many elements are not what they must be. Ends the program when
 * a call fails. */
int64_t copies_wrong(const pml_backend *gpu, pml_device *device, pml_queue *queue, int64_t rows,
                     int way);

/* Bytes from a view's first element to behind its last. */
size_t view_span(const pml_view *v);

#endif
