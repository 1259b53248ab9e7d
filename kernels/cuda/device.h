/* What the handles of backend.h are made of here, and how an op starts a kernel. */
#ifndef PMLI_CUDA_DEVICE_H
#define PMLI_CUDA_DEVICE_H

#include <stdbool.h>

#include "cublas.h"
#include "driver.h"
#include "gemm.h"
#include "images.h"
#include "pml_op/backend.h"
#include "sdpa.h"
#include "staging.h"

struct pml_device {
    CUdevice id;
    CUcontext context; /* the primary one, shared with whatever else is in this process */
    char name[128];
    char bus[20];          /* PCI address */
    char lacks[PML_LACKS]; /* as pml_device_info */
    int capability;        /* 90 is compute capability 9.0 */
    char target[16];       /* what the kernels were compiled for: "sm_90a", "compute_75" */
    int code;              /* the capability in it: 90, 75 */
    int shared_most;       /* bytes of shared memory that a block may ask for */
    int shared_all;        /* and that a processor's blocks have together */
    int processors;        /* streaming multiprocessors */
    int clusters;          /* of eight blocks that fill a processor each, at once; on Hopper */
    cublasLtHandle_t lt;
    pmli_gemm_cache *products;
    pmli_sdpa *sdpa;    /* NULL: no cuDNN */
    bool deterministic; /* bits that do not vary between runs */
    CUlibrary images[PMLI_FAMILY_COUNT];
    CUfunction kernels[PMLI_KERNEL_COUNT];
};

struct pml_queue {
    pml_device *device;
    CUstream stream;
    bool recording;
    bool preparing;           /* what would be compiled is, and nothing is started */
    CUstream copies;          /* to and from the host beside `stream`; made when first used */
    CUevent fork;             /* … from where in `stream` the next of them may begin */
    CUevent join;             /* … and where in `copies` what is awaited ends */
    bool under_way;           /* copies were put there since the last await */
    CUevent marks[PML_MARKS]; /* made when first used */
    pmli_staging *staging;    /* made with the queue: weights come soon */
};

struct pml_graph {
    pml_device *device;
    CUgraphExec exec;
};

/* Slots of pml_backend, which has their contracts (pml_op/backend.h). */
pml_status pmli_cuda_identity(int index, pml_device_identity *identity, pml_error *err);
pml_status pmli_cuda_open(const pml_device_options *options, pml_device **device, pml_error *err);
void pmli_cuda_close(pml_device **device);
pml_status pmli_cuda_info(pml_device *device, pml_device_info *info, pml_error *err);
void pmli_cuda_lacks(pml_device *device, char lacks[PML_LACKS]);
pml_status pmli_cuda_alloc(pml_device *device, size_t bytes, void **base, pml_error *err);
void pmli_cuda_free(pml_device *device, void **base, size_t bytes);
pml_status pmli_cuda_host_alloc(pml_device *device, size_t bytes, void **base, pml_error *err);
void pmli_cuda_host_free(pml_device *device, void **base, size_t bytes);
pml_status pmli_cuda_queue_new(pml_device *device, pml_queue **queue, pml_error *err);
void pmli_cuda_queue_destroy(pml_queue **queue);
pml_status pmli_cuda_upload(pml_queue *queue, void *to, const void *from, size_t bytes,
                            pml_error *err);
pml_status pmli_cuda_download(pml_queue *queue, void *to, const void *from, size_t bytes,
                              pml_error *err);
pml_status pmli_cuda_upload_file(pml_queue *queue, void *to, size_t pitch, const pml_file_at *from,
                                 size_t width, size_t rows, pml_error *err);
pml_status pmli_cuda_uploaded(pml_queue *queue, pml_error *err);
pml_status pmli_cuda_sync(pml_queue *queue, pml_error *err);
pml_status pmli_cuda_graph_begin(pml_queue *queue, pml_error *err);
pml_status pmli_cuda_graph_end(pml_queue *queue, size_t room, pml_graph **graph, size_t *bytes,
                               pml_error *err);
pml_status pmli_cuda_graph_launch(pml_queue *queue, pml_graph *graph, pml_error *err);
void pmli_cuda_graph_destroy(pml_graph **graph);
pml_status pmli_cuda_mark(pml_queue *queue, int index, pml_error *err);
pml_status pmli_cuda_passed(pml_queue *queue, int index, pml_error *err);
pml_status pmli_cuda_between(pml_queue *queue, int from, int to, double *seconds, pml_error *err);

/* 75 for 7.5, of one of `count` devices; makes no context. $PML_CUDA_CAPABILITY, where it is less,
 * stands for it: an older GPU's ways can be gone on a newer one (tests/gpu/run). */
pml_status pmli_cuda_capability(int index, int count, int *capability, pml_error *err);

/* PML_UNSUPPORTED: none of the code that this build has runs on a GPU of that capability; `name` is
 * the GPU's. */
pml_status pmli_cuda_has_code(int capability, const char *name, pml_error *err);

/* Kernels that may have so many bytes of dynamic shared memory from here on: more than 48 KiB has
 * to be asked for, kernel by kernel. what: "shared memory for …", for an error. */
pml_status pmli_cuda_allow_shared(pml_device *device, const pmli_kernel *kernels, size_t count,
                                  int bytes, const char *what, pml_error *err);

/* Whether the kernels are those for sm_90a alone: wgmma, and the copy engine's tensors. */
bool pmli_cuda_is_hopper(const pml_device *device);

/* What offload and fetch have made for a queue (op_offload.c). */
void pmli_cuda_copies_destroy(pml_queue *queue);

/* Make the device's context the calling thread's. Every entry point begins with this: a queue is
 * used by one thread at a time, not always by the same one. */
pml_status pmli_cuda_enter(pml_device *device, pml_error *err);

/* Put one kernel on the queue. params is the kernel's one argument, a struct of device/params.h. */
typedef struct pmli_launch {
    unsigned grid_x, grid_y, block_x, block_y;
    unsigned shared;  /* bytes of dynamic shared memory */
    unsigned cluster; /* blocks that see each other's shared memory; 0: none do */
    bool early;       /* may begin once the kernel before it lets it, for which it waits itself */
    bool together;    /* blocks wait for one another: all run at once, or none is started */
} pmli_launch;
pml_status pmli_cuda_launch(pml_queue *queue, pmli_kernel kernel, pmli_launch shape, void *params,
                            pml_error *err);

/* Whether `early` is heeded, else a kernel waits for the end of the one before it: graphs know of
 * it since CUDA 12.3. */
bool pmli_cuda_begins_early(void);

#endif
