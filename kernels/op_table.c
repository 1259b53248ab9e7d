/* What each op is called and made of; and the one switch that turns a number into a call. */
#include <string.h>

#include "pml_op/backend.h"

/* Operand names are the members of the argument structs, in order. Kept beside the structs' order
 * by tests/unit/kernels/test_op_table.c, which compares offsets. */
static const char *const names_embed[] = {"ids", "table", "y"};
static const char *const names_embed_bwd[] = {"ids", "dy", "dtable", "ws"};
static const char *const names_rmsnorm[] = {"x", "add", "weight", "sum", "y", "rstd"};
static const char *const names_rmsnorm_bwd[] = {"dy", "x",       "weight",  "rstd", "dres",
                                                "dx", "rounded", "dweight", "ws"};
static const char *const names_head_norm[] = {"x", "q_weight", "k_weight", "y", "rstd"};
static const char *const names_head_norm_bwd[] = {
    "dy", "x", "q_weight", "k_weight", "rstd", "dx", "dq_weight", "dk_weight", "ws"};
static const char *const names_linear[] = {"x",   "w",      "w_scale", "bias", "a",       "b",
                                           "rng", "places", "y",       "u",    "x_scale", "ws"};
static const char *const names_linear_bwd[] = {"dy", "x",   "w",      "w_scale",  "a",  "b",
                                               "u",  "rng", "places", "dx",       "dw", "dbias",
                                               "da", "db",  "v",      "dy_scale", "ws"};
static const char *const names_rope[] = {"x", "pos", "table"};
static const char *const names_attention[] = {"q", "k", "v", "cu_q", "cu_k", "o", "lse", "ws"};
static const char *const names_attention_bwd[] = {"dout", "q",   "k",     "v",  "o",  "lse", "cu_q",
                                                  "cu_k", "pos", "table", "dq", "dk", "dv",  "ws"};
static const char *const names_swiglu[] = {"gate_up", "h", "a", "u", "h_scale", "ws"};
static const char *const names_swiglu_bwd[] = {"dh",      "gate_up", "dgate_up", "h",      "u",
                                               "b",       "v",       "db",       "v_down", "da",
                                               "w_scale", "scale",   "ws"};
static const char *const names_head_loss[] = {"x",    "w",  "rows", "labels", "scale",
                                              "loss", "dx", "dw",   "ws"};
static const char *const names_sum[] = {"x", "total", "ws"};
static const char *const names_sumsq[] = {"x", "total", "ws"};
static const char *const names_fill[] = {"y"};
static const char *const names_copy[] = {"x", "y"};
static const char *const names_gather_rows[] = {"x", "index", "y"};
static const char *const names_scatter_rows[] = {"x", "index", "y"};
static const char *const names_clip_scale[] = {"sumsq", "hyper", "norm", "loss"};
static const char *const names_adamw[] = {"p", "g", "m", "v", "hyper", "copy"};
static const char *const names_adamw_8bit[] = {"p",         "g",         "m",     "v",
                                               "m_largest", "v_largest", "hyper", "copy"};
static const char *const names_sgd[] = {"p", "g", "m", "hyper", "copy"};
static const char *const names_nf4_quantise[] = {"x", "codes", "absmax", "nested", "offset", "ws"};
static const char *const names_nf4_dequantise[] = {"codes", "absmax", "nested", "offset", "y"};
static const char *const names_offload[] = {"x", "y"};
static const char *const names_fetch[] = {"x", "y"};
static const char *const names_await[] = {"x"};
static const char *const names_fp8_quantise[] = {"x", "codes", "scale", "ws"};
static const char *const names_fp8_turn[] = {"x", "y"};
static const char *const names_allreduce[] = {"x"};

#define ROW(name, signature, sentence)                                                             \
    {#name, signature, sentence, names_##name, (int)(sizeof names_##name / sizeof *names_##name)},
static const pml_op_info infos[PML_OP_COUNT] = {PML_OPS(ROW)};
#undef ROW

#define CHECK(name, signature, sentence)                                                           \
    _Static_assert(sizeof(signature) - 1 == sizeof names_##name / sizeof *names_##name,            \
                   "signature and operand names of " #name " disagree");
PML_OPS(CHECK)
#undef CHECK

const pml_op_info *pml_op_describe(pml_op op)
{
    return (unsigned)op < PML_OP_COUNT ? &infos[op] : NULL;
}

bool pml_op_is_there(const pml_backend *backend, pml_op op)
{
    switch (op) {
#define CASE(name, signature, sentence)                                                            \
    case PML_OP_##name:                                                                            \
        return backend->op.name != NULL;
        PML_OPS(CASE)
#undef CASE
    case PML_OP_COUNT:
        break;
    }
    return false;
}

pml_status pml_op_run(const pml_backend *backend, pml_op op, pml_queue *queue,
                      const pml_op_args *args, pml_error *err)
{
    switch (op) {
#define CASE(name, signature, sentence)                                                            \
    case PML_OP_##name:                                                                            \
        if (backend->op.name == NULL)                                                              \
            break;                                                                                 \
        return backend->op.name(queue, &args->name, err);
        PML_OPS(CASE)
#undef CASE
    case PML_OP_COUNT:
        break;
    }
    const pml_op_info *info = pml_op_describe(op);
    return PML_FAIL(err, PML_UNSUPPORTED, "the %s backend has no op '%s'", backend->name,
                    info != NULL ? info->name : "?");
}
