/* What linear and its backward share: where each part's adapter lies, and dropout in front of it.
 */
#ifndef PMLI_CPU_LORA_H
#define PMLI_CPU_LORA_H

#include "check.h"
#include "device.h"

/* The attributes that both argument structs end with. */
typedef struct pmli_lora {
    int32_t parts;
    const int32_t *part_cols;
    uint32_t lora_parts;
    int32_t rank;
    const float *scale; /* of each part */
    float dropout;
    uint32_t purpose;
} pmli_lora;

#define PMLI_LORA_OF(args)                                                                         \
    ((pmli_lora){(args)->parts, (args)->part_cols, (args)->lora_parts, (args)->rank,               \
                 (args)->lora_scale, (args)->lora_dropout, (args)->lora_purpose})

/* One part that has an adapter. */
typedef struct pmli_adapter {
    int part;
    int64_t y_col; /* its first column of y and dy        */
    int64_t b_row; /* its first row of b                  */
    int64_t u_col; /* its first column of u, and row of a */
    int64_t cols;  /* N_p                                 */
} pmli_adapter;

/* Adapters in order; how many. */
int pmli_adapters(const pmli_lora *lora, pmli_adapter out[PML_LINEAR_MAX_PARTS]);

/* R: columns of u, rows of a. */
int64_t pmli_lora_width(const pmli_lora *lora);

/* The attributes against N = cols, and a [R,K], b [Nb,rank], rng and places against the
 * attributes. */
void pmli_lora_check(pmli_check *c, const pmli_lora *lora, int64_t cols, int64_t k,
                     const pml_view *a, const pml_view *b, const pml_view *rng,
                     const pml_view *places, int64_t rows);

/* y = m x, or y += m x with add: m is the dropout mask of that part, 0 or about 1/(1 - dropout). */
void pmli_lora_mask(pmli_pool *pool, const pmli_lora *lora, int part, const pml_view *rng,
                    const pml_view *places, pml_view x, bool add, pml_view y);

/* Whether all parts with an adapter have the same scale; it is then that of adapters[0].part. */
bool pmli_one_scale(const pmli_lora *lora, const pmli_adapter *adapters, int count);

#endif
