/* Opening a device: context, cuBLASLt, kernels; and its one block of memory. */
#include "device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "find_library.h"
#include "gemm_hopper.h"
#include "low_rank.h"
#include "masked.h"
#include "mlp.h"
#include "ops.h"
#include "pass.h"

/* Context and kernels, measured on an H200 with driver 580; the driver tells nobody. */
enum { CONTEXT_BYTES = 530 << 20 };

pml_status pmli_cuda_enter(pml_device *device, pml_error *err)
{
    return PMLI_CU(pmli_cu.cuCtxSetCurrent(device->context), "entering the device's context", err);
}

pml_status pmli_cuda_capability(int index, int count, int *capability, pml_error *err)
{
    CUdevice id = 0;
    int major = 0, minor = 0;
    const char *what = "GPU's compute capability";
    if (index < 0 || index >= count)
        return PML_FAIL(err, PML_NOT_FOUND, "no GPU cuda:%d: the driver sees %d", index, count);
    pml_status status = PMLI_CU(pmli_cu.cuDeviceGet(&id, index), "opening a GPU", err);
    if (status == PML_OK)
        status = PMLI_CU(
            pmli_cu.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, id),
            what, err);
    if (status == PML_OK)
        status = PMLI_CU(
            pmli_cu.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, id),
            what, err);
    *capability = 10 * major + minor;
    const char *wish = getenv("PML_CUDA_CAPABILITY");
    const int least = wish != NULL ? atoi(wish) : 0;
    if (least > 0 && least < *capability)
        *capability = least;
    return status;
}

bool pmli_cuda_is_hopper(const pml_device *device)
{
    return strcmp(device->target, "sm_90a") == 0;
}

pml_status pmli_cuda_allow_shared(pml_device *d, const pmli_kernel *kernels, size_t count,
                                  int bytes, const char *what, pml_error *err)
{
    pml_status status = PML_OK;
    for (size_t i = 0; status == PML_OK && i < count; i++)
        status = PMLI_CU(pmli_cu.cuFuncSetAttribute(d->kernels[kernels[i]],
                                                    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                    bytes),
                         what, err);
    return status;
}

pml_status pmli_cuda_has_code(int capability, const char *name, pml_error *err)
{
    char targets[200] = "";
    if (pmli_image_for(pmli_images[0].family, capability) != NULL)
        return PML_OK;
    for (size_t i = 0; i < pmli_image_count; i++) /* all families are compiled for the same */
        if (strcmp(pmli_images[i].family, pmli_images[0].family) == 0) {
            size_t n = strlen(targets);
            snprintf(targets + n, sizeof targets - n, "%s%s", n > 0 ? ", " : "",
                     pmli_images[i].target);
        }
    return PML_FAIL(err, PML_UNSUPPORTED,
                    "%s has compute capability %d.%d, for which this build has no kernels (%s)",
                    name, capability / 10, capability % 10, targets);
}

/* As nvidia-smi writes it, without its "GPU-". */
static void print_uuid(const CUuuid *uuid, char text[37])
{
    char *at = text;
    for (int i = 0; i < 16; i++)
        at += sprintf(at, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
                      (unsigned char)uuid->bytes[i]);
}

pml_status pmli_cuda_identity(int index, pml_device_identity *identity, pml_error *err)
{
    int count = 0;
    CUdevice id = 0;
    CUuuid uuid = {0};
    *identity = (pml_device_identity){0};
    pml_status status = PMLI_CU(pmli_cu.cuDeviceGetCount(&count), "counting GPUs", err);
    if (status == PML_OK && (index < 0 || index >= count))
        return PML_FAIL(err, PML_NOT_FOUND, "no GPU cuda:%d: the driver sees %d", index, count);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGet(&id, index), "opening a GPU", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGetUuid_v2(&uuid, id), "GPU's uuid", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGetPCIBusId(identity->bus, (int)sizeof identity->bus, id),
                         "GPU's PCI address", err);
    if (status == PML_OK)
        status =
            PMLI_CU(pmli_cu.cuDeviceTotalMem(&identity->memory_total, id), "GPU's memory", err);
    print_uuid(&uuid, identity->uuid);
    return status;
}

static pml_status identify(pml_device *d, int index, pml_error *err)
{
    int count = 0;
    pml_status status = PMLI_CU(pmli_cu.cuDeviceGetCount(&count), "counting GPUs", err);
    if (status == PML_OK)
        status = pmli_cuda_capability(index, count, &d->capability, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGet(&d->id, index), "opening a GPU", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGetName(d->name, (int)sizeof d->name, d->id), "GPU's name",
                         err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGetPCIBusId(d->bus, (int)sizeof d->bus, d->id),
                         "GPU's PCI address", err);
    if (status == PML_OK)
        status = PMLI_CU(
            pmli_cu.cuDeviceGetAttribute(
                &d->shared_most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, d->id),
            "GPU's shared memory", err);
    if (status == PML_OK)
        status = PMLI_CU(
            pmli_cu.cuDeviceGetAttribute(
                &d->shared_all, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, d->id),
            "a multiprocessor's shared memory", err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDeviceGetAttribute(
                             &d->processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, d->id),
                         "GPU's multiprocessors", err);
    return status;
}

static pml_status load_images(pml_device *d, const char *const families[PMLI_FAMILY_COUNT],
                              pml_error *err)
{
    pml_status status = pmli_cuda_has_code(d->capability, d->name, err);
    for (int i = 0; status == PML_OK && i < PMLI_FAMILY_COUNT; i++) {
        const pmli_image *image = pmli_image_for(families[i], d->capability);
        status = PMLI_CU(
            pmli_cu.cuLibraryLoadData(&d->images[i], image->data, NULL, NULL, 0, NULL, NULL, 0),
            families[i], err);
        if (status != PML_OK)
            return pml_error_prefix(err,
                                    "loading kernels for %s, compiled by %s, into a driver for "
                                    "CUDA %d.%d",
                                    image->target, pmli_images_compiler, pmli_cu.version / 1000,
                                    pmli_cu.version % 1000 / 10);
        snprintf(d->target, sizeof d->target, "%s", image->target);
        d->code = image->capability;
    }
    return status;
}

/* All kernels are looked up now: the driver loads a function's code at this point, which must not
 * happen while a graph is recorded. */
static pml_status load_kernels(pml_device *d, pml_error *err)
{
    static const char *const families[PMLI_FAMILY_COUNT] = {
#define FAMILY(family) #family,
        PMLI_FAMILIES(FAMILY)
#undef FAMILY
    };
    static const struct {
        const char *name;
        pmli_family family;
    } kernels[PMLI_KERNEL_COUNT] = {
#define KERNEL(family, kernel) {#kernel, PMLI_FAMILY_##family},
        PMLI_KERNELS(KERNEL)
#undef KERNEL
    };
    pml_status status = load_images(d, families, err);
    for (int i = 0; i < PMLI_KERNEL_COUNT && status == PML_OK; i++) {
        CUkernel kernel = NULL;
        status = PMLI_CU(
            pmli_cu.cuLibraryGetKernel(&kernel, d->images[kernels[i].family], kernels[i].name),
            kernels[i].name, err);
        if (status == PML_OK)
            status =
                PMLI_CU(pmli_cu.cuKernelGetFunction(&d->kernels[i], kernel), kernels[i].name, err);
    }
    return status;
}

/* As cudnn-frontend looks for it, which takes either wherever the loader finds it. */
static bool is_runtime_by_name(const pmli_library *library)
{
    return library == &pmli_runtime_library && (dlopen("libcudart.so.12", RTLD_NOW) != NULL ||
                                                dlopen("libcudart.so.13", RTLD_NOW) != NULL);
}

/* cuDNN compiles its attention with NVRTC, and cudnn-frontend asks CUDA's runtime for the chip;
 * both are looked for by name, and once they are opened here they are found wherever they lie. */
static void look_beside_cudnn(pml_device *d)
{
    static const struct {
        const pmli_library *library;
        const char *what;
    } needed[] = {{&pmli_nvrtc_library, "compiler"}, {&pmli_runtime_library, "CUDA runtime"}};
    int driver = pmli_cu.version / 1000;
    int newest = driver < PMLI_NEWEST_CUDA ? driver : PMLI_NEWEST_CUDA;
    for (size_t i = 0; d->lacks[0] == '\0' && i < sizeof needed / sizeof *needed; i++) {
        pml_error why = PML_ERROR_INIT;
        void *handle;
        if (pmli_open_library(needed[i].library, newest, &handle, &why) != PML_OK &&
            !is_runtime_by_name(needed[i].library))
            snprintf(d->lacks, sizeof d->lacks,
                     "cuDNN has no %s for its attention, our own kernels take its place: %.300s",
                     needed[i].what, why.message);
    }
}

/* cuDNN may be missing: the device's info then says so, and our own kernels do attention. Its
 * kernels for attention begin with sm_80. */
static pml_status open_cudnn(pml_device *d, pml_error *err)
{
    if (d->capability < 80)
        return PML_OK;
    pml_error why = PML_ERROR_INIT;
    pml_status status = pmli_sdpa_new(&d->sdpa, &why);
    if (status == PML_OK) {
        look_beside_cudnn(d);
        return PML_OK;
    }
    if (status == PML_NOT_FOUND) {
        snprintf(d->lacks, sizeof d->lacks, "our own kernels do attention: %.300s", why.message);
        return PML_OK;
    }
    if (err != NULL)
        *err = why;
    return status;
}

/* Deterministic devices take the heuristic's first choices and keep nothing. */
static pmli_choices *kept_choices(const pml_device *d, const char *folder)
{
    return d->deterministic
               ? NULL
               : pmli_choices_new(folder, d->name, pmli_cu.version, pmli_lt.cublasLtGetVersion());
}

pml_status pmli_cuda_open(const pml_device_options *options, pml_device **device, pml_error *err)
{
    *device = NULL;
    pml_device *d = calloc(1, sizeof *d);
    if (d == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a device");
    d->deterministic = options->deterministic;
    pml_status status = identify(d, options->index, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuDevicePrimaryCtxRetain(&d->context, d->id),
                         "making the GPU's context", err);
    if (status == PML_OK)
        status = pmli_cuda_enter(d, err);
    if (status == PML_OK)
        status = load_kernels(d, err);
    if (status == PML_OK)
        status = pmli_cuda_attention_prepare(d, err);
    if (status == PML_OK)
        status = pmli_low_rank_prepare(d, err);
    if (status == PML_OK)
        status = pmli_gemm_hopper_prepare(d, err);
    if (status == PML_OK)
        status = pmli_masked_prepare(d, err);
    if (status == PML_OK)
        status = pmli_pass_prepare(d, err);
    if (status == PML_OK)
        status = pmli_mlp_prepare(d, err);
    if (status == PML_OK)
        status = pmli_cuda_head_loss_prepare(d, err);
    if (status == PML_OK)
        status = pmli_cuda_rmsnorm_prepare(d, err);
    if (status == PML_OK)
        status = PMLI_LT(pmli_lt.cublasLtCreate(&d->lt), "starting cuBLASLt", err);
    if (status == PML_OK)
        status = pmli_gemm_cache_new(kept_choices(d, options->cache), &d->products, err);
    if (status == PML_OK)
        status = open_cudnn(d, err);
    if (status != PML_OK)
        pmli_cuda_close(&d);
    *device = d;
    return status;
}

void pmli_cuda_close(pml_device **device)
{
    pml_device *d = *device;
    if (d == NULL)
        return;
    pmli_gemm_cache_destroy(&d->products);
    if (d->context != NULL) {
        /* Nothing to tell anybody any more: each release stands for itself. */
        pmli_cu.cuCtxSetCurrent(d->context);
        pmli_sdpa_destroy(&d->sdpa);
        if (d->lt != NULL)
            pmli_lt.cublasLtDestroy(d->lt);
        for (int i = 0; i < PMLI_FAMILY_COUNT; i++)
            if (d->images[i] != NULL)
                pmli_cu.cuLibraryUnload(d->images[i]);
        pmli_cu.cuCtxSetCurrent(NULL);
        pmli_cu.cuDevicePrimaryCtxRelease(d->id);
    }
    free(d);
    *device = NULL;
}

void pmli_cuda_lacks(pml_device *d, char lacks[PML_LACKS])
{
    char why[PMLI_SDPA_REFUSED] = "";
    bool some = false;
    snprintf(lacks, PML_LACKS, "%s", d->lacks);
    if (lacks[0] != '\0' || d->sdpa == NULL)
        return;
    pmli_sdpa_refused(d->sdpa, why, &some);
    if (why[0] == '\0')
        return;
    if (some)
        snprintf(lacks, PML_LACKS,
                 "cuDNN has no kernel for attention of one of the shapes here, our own kernels "
                 "take its place there: %s",
                 why);
    else /* both libraries are there: one is broken, or not made for the other or for the driver */
        snprintf(lacks, PML_LACKS,
                 "cuDNN does not compile its attention, our own kernels take its place: %s; "
                 "install it and its compiler anew with pip install --upgrade %s",
                 why,
                 pmli_cuda_there() >= 13 ? "nvidia-cudnn-cu13 nvidia-cuda-nvrtc"
                                         : "nvidia-cudnn-cu12 nvidia-cuda-nvrtc-cu12");
}

pml_status pmli_cuda_info(pml_device *d, pml_device_info *info, pml_error *err)
{
    memset(info, 0, sizeof *info);
    size_t version = pmli_lt.cublasLtGetVersion();
    /* 130100 is 13.1.0 */
    snprintf(info->name, sizeof info->name, "%s", d->name);
    snprintf(info->bus, sizeof info->bus, "%s", d->bus);
    pmli_cuda_lacks(d, info->lacks);
    int n = snprintf(info->libraries, sizeof info->libraries,
                     "cuBLASLt %zu.%zu.%zu, driver for CUDA %d.%d, ", version / 10000,
                     version / 100 % 100, version % 100, pmli_cu.version / 1000,
                     pmli_cu.version % 1000 / 10);
    version = d->sdpa != NULL ? pmli_sdpa_version(d->sdpa) : 0; /* 91900 is 9.19.0 */
    if (version > 0)
        snprintf(info->libraries + n, sizeof info->libraries - (size_t)n, "cuDNN %zu.%zu.%zu",
                 version / 10000, version / 100 % 100, version % 100);
    else
        snprintf(info->libraries + n, sizeof info->libraries - (size_t)n, "no cuDNN");
    snprintf(info->instructions, sizeof info->instructions, "%s", d->target);
    info->threads = 1;
    info->capability = d->capability;
    info->held = CONTEXT_BYTES;
    pml_status status = pmli_cuda_enter(d, err);
    if (status != PML_OK)
        return status;
    return PMLI_CU(pmli_cu.cuMemGetInfo(&info->memory_free, &info->memory_total),
                   "asking for the GPU's free memory", err);
}

pml_status pmli_cuda_alloc(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    CUdeviceptr address = 0;
    *base = NULL;
    pml_status status = pmli_cuda_enter(device, err);
    if (status == PML_OK)
        status = PMLI_CU(pmli_cu.cuMemAlloc(&address, bytes), "taking the arena", err);
    if (status != PML_OK)
        return pml_error_prefix(err, "%zu bytes on %s", bytes, device->name);
    *base = (void *)(uintptr_t)address;
    return PML_OK;
}

void pmli_cuda_free(pml_device *device, void **base, size_t bytes)
{
    (void)bytes; /* the driver knows */
    if (*base == NULL)
        return;
    pmli_cu.cuCtxSetCurrent(device->context);
    pmli_cu.cuMemFree((CUdeviceptr)(uintptr_t)*base);
    *base = NULL;
}

/* Page-locked, so that copies run beside kernels and can be recorded. Portable is not asked for:
 * one context uses it. */
pml_status pmli_cuda_host_alloc(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    *base = NULL;
    pml_status status = pmli_cuda_enter(device, err);
    if (status == PML_OK)
        status =
            PMLI_CU(pmli_cu.cuMemHostAlloc(base, bytes, 0), "taking page-locked host memory", err);
    return status == PML_OK ? status : pml_error_prefix(err, "%zu MiB", bytes >> 20);
}

void pmli_cuda_host_free(pml_device *device, void **base, size_t bytes)
{
    (void)bytes; /* the driver knows */
    if (*base == NULL)
        return;
    pmli_cu.cuCtxSetCurrent(device->context);
    pmli_cu.cuMemFreeHost(*base);
    *base = NULL;
}
