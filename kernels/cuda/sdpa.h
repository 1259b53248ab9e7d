/* Attention by cuDNN, whose kernels are the fastest there are on current chips but for the backward
 * that attention_hopper.h has: documents lie end to end in buffers [tokens, ld], a fixed number of
 * slots says where (cuDNN's ragged offsets), so that one recorded graph serves every packing.
 * Documents known to be equally long need no offsets, and cuDNN is 6 to 10 % faster without.
 * Causal, with or without a window, one document's queries and keys the same rows.
 *
 * Behind this C header is the one C++ file of the backend, on NVIDIA's header-only cudnn-frontend
 * (attention is some 14 operations forward and 24 backward in cuDNN's own interface). Built only
 * where its headers are; cuDNN itself is found at run time. */
#ifndef PMLI_CUDA_SDPA_H
#define PMLI_CUDA_SDPA_H

#include "pml_op/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pmli_sdpa pmli_sdpa;

/* PML_NOT_FOUND without cuDNN 9; the message says what to install. Its plans are compiled at their
 * first use and kept in the driver's cache folder, which is one of ours in a worker. */
pml_status pmli_sdpa_new(pmli_sdpa **sdpa, pml_error *err);
void pmli_sdpa_destroy(pmli_sdpa **sdpa);
size_t pmli_sdpa_version(const pmli_sdpa *sdpa); /* 91900 */

/* What a plan is built for. Leading dimensions count elements. */
typedef struct pmli_sdpa_shape {
    int64_t slots, longest; /* documents, rows of the longest */
    int64_t heads, kv_heads, head_dim;
    int64_t window; /* keys that a query sees, itself the last; 0: all before it */
    int64_t ld_q, ld_k, ld_v, ld_o, ld_dout, ld_dq, ld_dk, ld_dv;
    int64_t ld_stats; /* of equal documents */
    float scale;
    int32_t dtype; /* PML_BF16 or PML_F16 */
    int32_t backward;
    int32_t equal; /* every slot has `longest` rows: no lengths, no offsets */
} pmli_sdpa_shape;

/* Device addresses. lengths [slots] I32; offsets of q, k, v, o, dout, dq, dk, dv and stats
 * [slots + 1] I64, in elements; stats [tokens, heads] F32, of equal documents [heads, ld_stats]. */
typedef struct pmli_sdpa_call {
    pmli_sdpa_shape shape;
    const void *q, *k, *v, *dout;
    void *o, *stats, *dq, *dk, *dv;
    const void *lengths;
    const void *at_q, *at_k, *at_v, *at_o, *at_dout, *at_dq, *at_dk, *at_dv, *at_stats;
    void *workspace;
    size_t workspace_size;
} pmli_sdpa_call;

/* Put it on a stream. *done = false, and nothing on the stream, where cuDNN has no kernel for the
 * shape or wants more workspace than there is, which is logged once; and, unless `waits`, while
 * another thread compiles, or is about to and this shape has not been. */
pml_status pmli_sdpa_run(pmli_sdpa *sdpa, void *stream, const pmli_sdpa_call *call, bool waits,
                         bool *done, pml_error *err);

/* The same but for the stream: what would be compiled is. */
pml_status pmli_sdpa_compile(pmli_sdpa *sdpa, const pmli_sdpa_call *call, bool *done,
                             pml_error *err);

/* Why cuDNN has no kernel for the last shape of those it has none for; "": it has them all. *some:
 * it has one for another shape. */
enum { PMLI_SDPA_REFUSED = 200 };
void pmli_sdpa_refused(pmli_sdpa *sdpa, char why[PMLI_SDPA_REFUSED], bool *some);

/* From on to off a thread compiles, one shape after the other. */
void pmli_sdpa_ahead(pmli_sdpa *sdpa, bool on);

#ifdef __cplusplus
}
#endif
#endif
