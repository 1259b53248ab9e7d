/* The CUDA backend as a struct, and the one function this shared object exports. */
#include "backend_loader.h"

#include "border.h"
#include "cublas.h"
#include "device.h"
#include "driver.h"
#include "find_library.h"
#include "fp8.h"
#include "ops.h"

static size_t workspace(pml_device *device, pml_op op, const pml_op_args *args)
{
    (void)device;
    switch (op) {
    case PML_OP_embed_bwd:
        return pmli_cuda_embed_bwd_ws(&args->embed_bwd);
    case PML_OP_linear:
        return pmli_cuda_linear_ws(&args->linear);
    case PML_OP_swiglu:
        return pmli_cuda_swiglu_ws(&args->swiglu);
    case PML_OP_swiglu_bwd:
        return pmli_cuda_swiglu_bwd_ws(&args->swiglu_bwd);
    case PML_OP_linear_bwd:
        return pmli_cuda_linear_bwd_ws(&args->linear_bwd);
    case PML_OP_rmsnorm_bwd:
        return pmli_cuda_rmsnorm_bwd_ws(&args->rmsnorm_bwd);
    case PML_OP_head_norm_bwd:
        return pmli_cuda_head_norm_bwd_ws(&args->head_norm_bwd);
    case PML_OP_attention:
        return pmli_cuda_attention_ws(&args->attention);
    case PML_OP_attention_bwd:
        return pmli_cuda_attention_bwd_ws(&args->attention_bwd);
    case PML_OP_head_loss:
        return pmli_cuda_head_loss_ws(&args->head_loss);
    case PML_OP_sum:
        return pmli_cuda_sum_ws(&args->sum.x);
    case PML_OP_sumsq:
        return pmli_cuda_sum_ws(&args->sumsq.x);
    case PML_OP_nf4_quantise:
        return pmli_cuda_nf4_quantise_ws(&args->nf4_quantise);
    case PML_OP_fp8_quantise:
        return pmli_cuda_fp8_quantise_ws();
    default:
        return 0;
    }
}

/* The ops that are compiled when a shape comes for the first time: attention by cuDNN. */
static pml_status prepare(pml_device *device, pml_op op, const pml_op_args *args, pml_error *err)
{
    pml_queue nowhere = {.device = device, .preparing = true};
    pml_status status = pmli_cuda_enter(device, err);
    if (status == PML_OK && op == PML_OP_attention)
        status = pmli_cuda_attention(&nowhere, &args->attention, err);
    if (status == PML_OK && op == PML_OP_attention_bwd)
        status = pmli_cuda_attention_bwd(&nowhere, &args->attention_bwd, err);
    return status;
}

static void prepares(pml_device *device, bool on)
{
    if (device->sdpa != NULL)
        pmli_sdpa_ahead(device->sdpa, on);
}

/* Driver and cuBLASLt are looked for here and not at the entry: a plan needs neither. */
static pml_status devices(int *count, pml_error *err)
{
    *count = 0;
    pml_status status = pmli_driver_load(err);
    if (status == PML_OK)
        status = pmli_cublas_load(err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGetCount(count), "counting GPUs", err);
    return status;
}

enum { DTYPES = 1 << PML_F32 | 1 << PML_BF16 | 1 << PML_F16, FIRST_WITH_BF16 = 80 };

static pml_status dtypes_of(int index, unsigned *dtypes, pml_error *err)
{
    int count, capability = 0;
    *dtypes = 0;
    pml_status status = devices(&count, err);
    if (status == PML_OK)
        status = pmli_cuda_capability(index, count, &capability, err);
    if (status == PML_OK)
        status = pmli_cuda_has_code(capability, "the GPU", err);
    if (status == PML_OK)
        *dtypes = (capability >= FIRST_WITH_BF16 ? DTYPES : DTYPES & ~(1 << PML_BF16)) |
                  (capability >= PMLI_FIRST_WITH_E4M3 ? 1 << PML_U8 : 0);
    return status;
}

static pml_status identity_of(int index, pml_device_identity *identity, pml_error *err)
{
    int count;
    pml_status status = devices(&count, err);
    return status == PML_OK ? pmli_cuda_identity(index, identity, err) : status;
}

static pml_status open_device(const pml_device_options *options, pml_device **device,
                              pml_error *err)
{
    int count;
    *device = NULL;
    pml_status status = devices(&count, err);
    return status == PML_OK ? pmli_cuda_open(options, device, err) : status;
}

static const pml_backend backend = {
    .abi = PML_BACKEND_ABI,
    .name = "cuda",
    .dtypes = DTYPES,
    .drops_out = true,
    .border = PMLI_BORDER,
    .adapters_beside = true,
    .devices = devices,
    .dtypes_of = dtypes_of,
    .identity_of = identity_of,
    .library = pmli_find_library,
    .open = open_device,
    .close = pmli_cuda_close,
    .info = pmli_cuda_info,
    .lacks = pmli_cuda_lacks,
    .alloc = pmli_cuda_alloc,
    .free = pmli_cuda_free,
    .host_alloc = pmli_cuda_host_alloc,
    .host_free = pmli_cuda_host_free,
    .queue_new = pmli_cuda_queue_new,
    .queue_destroy = pmli_cuda_queue_destroy,
    .upload = pmli_cuda_upload,
    .download = pmli_cuda_download,
    .sync = pmli_cuda_sync,
    .upload_file = pmli_cuda_upload_file,
    .uploaded = pmli_cuda_uploaded,
    .graph_begin = pmli_cuda_graph_begin,
    .graph_end = pmli_cuda_graph_end,
    .graph_launch = pmli_cuda_graph_launch,
    .graph_destroy = pmli_cuda_graph_destroy,
    .mark = pmli_cuda_mark,
    .passed = pmli_cuda_passed,
    .between = pmli_cuda_between,
    .workspace = workspace,
    .prepare = prepare,
    .prepares = prepares,
    .op =
        {
            .embed = pmli_cuda_embed,
            .embed_bwd = pmli_cuda_embed_bwd,
            .rmsnorm = pmli_cuda_rmsnorm,
            .rmsnorm_bwd = pmli_cuda_rmsnorm_bwd,
            .linear = pmli_cuda_linear,
            .linear_bwd = pmli_cuda_linear_bwd,
            .rope = pmli_cuda_rope,
            .attention = pmli_cuda_attention,
            .attention_bwd = pmli_cuda_attention_bwd,
            .swiglu = pmli_cuda_swiglu,
            .swiglu_bwd = pmli_cuda_swiglu_bwd,
            .head_loss = pmli_cuda_head_loss,
            .sum = pmli_cuda_sum,
            .sumsq = pmli_cuda_sumsq,
            .fill = pmli_cuda_fill,
            .copy = pmli_cuda_copy,
            .gather_rows = pmli_cuda_gather_rows,
            .scatter_rows = pmli_cuda_scatter_rows,
            .clip_scale = pmli_cuda_clip_scale,
            .adamw = pmli_cuda_adamw,
            .adamw_8bit = pmli_cuda_adamw_8bit,
            .sgd = pmli_cuda_sgd,
            .head_norm = pmli_cuda_head_norm,
            .head_norm_bwd = pmli_cuda_head_norm_bwd,
            .nf4_quantise = pmli_cuda_nf4_quantise,
            .nf4_dequantise = pmli_cuda_nf4_dequantise,
            .offload = pmli_cuda_offload,
            .fetch = pmli_cuda_fetch,
            .await = pmli_cuda_await,
            .fp8_quantise = pmli_cuda_fp8_quantise,
            .fp8_turn = pmli_cuda_fp8_turn,
        },
};

/* Declared by its type, so that it cannot drift from what the loader calls. */
__attribute__((visibility("default"))) pml_backend_entry PML_CUDA_ENTRY;

pml_status PML_CUDA_ENTRY(unsigned abi, const pml_backend **result, pml_error *err)
{
    *result = NULL;
    if (abi != PML_BACKEND_ABI)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "the CUDA backend speaks version %d of the op table, this program %u; "
                        "they must come from the same build",
                        PML_BACKEND_ABI, abi);
    *result = &backend;
    return PML_OK;
}
