/* Whether a GPU's libraries compile attention: cuDNN and its compiler, which both can be there, of
 * a version each, and not work. */
#include "native.h"

#include <stdbool.h>

#include "pml_op/backend.h"

/* Some documents of a few rows, heads of 64: what cuDNN has attention for wherever it works. */
enum { TOKENS = 512, DOCS = 4, LONGEST = 256, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64 };
enum { COLS = HEADS * HEAD_DIM, KV_COLS = KV_HEADS * HEAD_DIM };

/* Nobody reads at this address: it is only that of an operand that is there. */
static pml_view somewhere(int64_t rows, int64_t cols, pml_dtype dtype)
{
    static char place[256] __attribute__((aligned(256)));
    return pml_matrix(place, rows, cols, dtype);
}

static pml_status prepare(const pml_backend *backend, pml_device *device, pml_op op,
                          pml_op_args *args, pml_view *ws, pml_error *err)
{
    size_t bytes = backend->workspace(device, op, args);
    *ws = somewhere(1, (int64_t)bytes, PML_U8);
    return backend->prepare(device, op, args, err);
}

static pml_status compile(const pml_backend *backend, pml_device *device, pml_dtype dtype,
                          pml_error *err)
{
    const pml_view q = somewhere(TOKENS, COLS, dtype), kv = somewhere(TOKENS, KV_COLS, dtype),
                   lse = somewhere(HEADS, TOKENS, PML_F32),
                   bounds = somewhere(1, DOCS + 1, PML_I32);
    pml_op_args forward = {.attention = {.q = q,
                                         .k = kv,
                                         .v = kv,
                                         .cu_q = bounds,
                                         .cu_k = bounds,
                                         .o = q,
                                         .lse = lse,
                                         .heads = HEADS,
                                         .kv_heads = KV_HEADS,
                                         .head_dim = HEAD_DIM,
                                         .max_q = LONGEST,
                                         .scale = 0.125F}};
    pml_op_args backward = {.attention_bwd = {.dout = q,
                                              .q = q,
                                              .k = kv,
                                              .v = kv,
                                              .o = q,
                                              .lse = lse,
                                              .cu_q = bounds,
                                              .cu_k = bounds,
                                              .dq = q,
                                              .dk = kv,
                                              .dv = kv,
                                              .heads = HEADS,
                                              .kv_heads = KV_HEADS,
                                              .head_dim = HEAD_DIM,
                                              .max_q = LONGEST,
                                              .scale = 0.125F}};
    pml_status status =
        prepare(backend, device, PML_OP_attention, &forward, &forward.attention.ws, err);
    return status == PML_OK ? prepare(backend, device, PML_OP_attention_bwd, &backward,
                                      &backward.attention_bwd.ws, err)
                            : status;
}

PyDoc_STRVAR(compile_attention_doc,
             "compile_attention(index, /)\n--\n\n"
             "Compile attention for a GPU as a run would, forward and backward; gives what the GPU "
             "lacks after that, with what to install (\"\": nothing). A broken library may end "
             "the process.");

static PyObject *compile_attention(PyObject *module, PyObject *argument)
{
    const pml_backend *backend;
    pml_device_options options = {0};
    pml_device_info info = {0};
    pml_device *device = NULL;
    pml_error err = PML_ERROR_INIT;
    unsigned dtypes = 0;
    if (!pmli_gpu_index(module, argument, &options.index))
        return NULL;
    PyThreadState *gil = PyEval_SaveThread();
    pml_status status = pml_backend_cuda(&backend, &err);
    if (status == PML_OK)
        status = backend->dtypes_of(options.index, &dtypes, &err);
    if (status == PML_OK)
        status = backend->open(&options, &device, &err);
    bool bf16 = (dtypes >> PML_BF16 & 1) != 0;
    if (status == PML_OK && backend->prepare != NULL)
        status = compile(backend, device, bf16 ? PML_BF16 : PML_F16, &err);
    if (status == PML_OK)
        status = backend->info(device, &info, &err);
    if (device != NULL)
        backend->close(&device);
    PyEval_RestoreThread(gil);
    if (status != PML_OK)
        return pmli_raise(pmli_state_of(module), &err);
    return PyUnicode_FromString(info.lacks);
}

PyMethodDef pmli_attention_methods[] = {
    {"compile_attention", compile_attention, METH_O, compile_attention_doc},
    {NULL, NULL, 0, NULL},
};
