/* Backend: one kind of device, as a struct of function pointers that is chosen once.
 *
 *   pml_backend (static, const)  ──open──►  pml_device  ──queue_new──►  pml_queue ──► ops in order
 *                                              │
 *                                              └─alloc──► the arena: one large block that
 *                                                         views point into
 *
 * Work put on a queue runs in order and may be asynchronous: host memory given to upload/download
 * must stay valid until pml sync. A queue is used by one thread at a time. The CPU backend runs
 * everything before it returns. No op allocates. */
#ifndef PML_OP_BACKEND_H
#define PML_OP_BACKEND_H

#include "pml/base/file_at.h"
#include "pml_op/ops.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pml_device pml_device; /* opened device: context, library handles, thread pool */
typedef struct pml_queue pml_queue;   /* in-order work: a thread pool's caller, or a stream   */
typedef struct pml_graph pml_graph;   /* a recorded sequence of ops that can be replayed      */

typedef struct pml_device_options {
    int index;          /* which device of this kind; CPU: ignored */
    int threads;        /* CPU: worker threads, 0 = all cores allowed to this process */
    bool deterministic; /* only kernels whose bits do not vary between runs */
    const char *cache;  /* folder for tuned choices and compiled kernels, NULL = none */
} pml_device_options;

enum { PML_LACKS = 400 };

typedef struct pml_device_info {
    char name[128];        /* "AMD EPYC …", "NVIDIA H200" */
    char libraries[256];   /* what decides bits: "OpenBLAS 0.3.21 SkylakeX", "cuBLASLt 13.1.0" */
    char instructions[64]; /* "avx512+amx", "sm_90a" */
    char narrow[16]; /* what products with frozen matrices in `frozen` dtypes use beside: "+amx" */
    size_t memory_total; /* bytes; on the CPU bounded by the cgroup's limit */
    size_t memory_free;
    size_t held;           /* what an open device takes by itself, no longer in memory_free */
    char lacks[PML_LACKS]; /* what is missing for its full speed, what to install; "": nothing */
    char bus[20];          /* PCI address, "0000:0f:00.0", for pml_gauges_new; "": none */
    int threads;
    int capability; /* a GPU's: 90 is compute capability 9.0 (PML_CUDA_CAPABILITY); else 0 */
} pml_device_info;

/* What a device is before it is opened. */
typedef struct pml_device_identity {
    char uuid[37]; /* of the device, or of the part of one that this process sees (MIG) */
    char bus[20];  /* as pml_device_info */
    size_t memory_total;
} pml_device_identity;

#define PML_OP_SLOT(name, signature, sentence)                                                     \
    pml_status (*name)(pml_queue *, const pml_##name##_args *, pml_error *);

typedef struct pml_op_table {
    PML_OPS(PML_OP_SLOT)
} pml_op_table;
#undef PML_OP_SLOT

typedef struct pml_backend {
    unsigned abi;         /* PML_BACKEND_ABI of the header it was compiled with */
    const char *name;     /* "cpu", "cuda" */
    unsigned dtypes;      /* bit pml_dtype: weights and activations may have it */
    unsigned frozen;      /* the same bits: matrices that are not trained may have it beside F32 */
    bool drops_out;       /* linear and its backward know lora_dropout */
    int32_t border;       /* they use borders, of whole multiples of so many columns; 0: none */
    bool adapters_beside; /* swiglu and its backward gain by working for adapters, too */

    /* How many devices of this kind there are: at least one, or PML_NOT_FOUND and what to do. Makes
     * no context and takes no memory of a device. */
    pml_status (*devices)(int *count, pml_error *err);
    /* Of dtypes those that this device multiplies: GPUs before sm_80 have no bfloat16. And U8 where
     * it multiplies E4M3 codes: from sm_89 on. As devices, makes no context. PML_UNSUPPORTED: a GPU
     * that nothing of this build runs on. */
    pml_status (*dtypes_of)(int index, unsigned *dtypes, pml_error *err);
    /* Which device it is; as devices, makes no context. NULL: there is only the host. */
    pml_status (*identity_of)(int index, pml_device_identity *identity, pml_error *err);

    /* Libraries that such devices use beside their driver, without a device and without a driver:
     * where the one of this number (from 0) lies. PML_NOT_FOUND: what to install; PML_INVALID:
     * there are no more. NULL: they use none. */
    pml_status (*library)(int which, char *path, size_t capacity, pml_error *err);

    pml_status (*open)(const pml_device_options *options, pml_device **device, pml_error *err);
    void (*close)(pml_device **device);
    pml_status (*info)(pml_device *device, pml_device_info *info, pml_error *err);
    /* What of info may change while it is open, for who asks often: allocates nothing and asks no
     * driver. NULL: it does not change. */
    void (*lacks)(pml_device *device, char lacks[PML_LACKS]);

    /* One large block, 256-byte aligned. On the CPU: its own mapping, prefaulted. */
    pml_status (*alloc)(pml_device *device, size_t bytes, void **base, pml_error *err);
    void (*free)(pml_device *device, void **base, size_t bytes);

    /* Host memory that offload and fetch copy to and from while ops run, 256-byte aligned: on a GPU
     * page-locked, about 0.3 s a GiB to take; on the CPU as alloc. */
    pml_status (*host_alloc)(pml_device *device, size_t bytes, void **base, pml_error *err);
    void (*host_free)(pml_device *device, void **base, size_t bytes);

    pml_status (*queue_new)(pml_device *device, pml_queue **queue, pml_error *err);
    void (*queue_destroy)(pml_queue **queue);
    pml_status (*upload)(pml_queue *queue, void *to, const void *from, size_t bytes,
                         pml_error *err);
    pml_status (*download)(pml_queue *queue, void *to, const void *from, size_t bytes,
                           pml_error *err);
    pml_status (*sync)(pml_queue *queue, pml_error *err);

    /* Rows of `width` bytes that lie end to end in a file, to rows that begin `pitch` bytes apart.
     * Comes behind what stands on the queue, but what stands behind it need not wait: nothing may
     * use `to` before `uploaded`, which puts what comes next behind all such uploads so far and
     * says what went wrong with one of them (pml_file_at_read's errors, too); it or sync must have
     * come before the file is closed. As much may be read at once as the link takes, through memory
     * of a fixed size. Not recorded. */
    pml_status (*upload_file)(pml_queue *queue, void *to, size_t pitch, const pml_file_at *from,
                              size_t width, size_t rows, pml_error *err);
    pml_status (*uploaded)(pml_queue *queue, pml_error *err);

    /* Recording: ops between begin and end are recorded, not run. NULL where replay gains nothing
     * (CPU); the caller then runs ops one by one. Run the same ops once before recording them, so
     * that what a backend looks up per shape is there. A graph holds the addresses and attributes
     * it was recorded with. upload, download and sync cannot be recorded: PML_BUSY. An op that
     * fails between begin and end leaves the recording open; end always closes it. A graph takes
     * memory of the device, for each kernel and copy in it: end tells how many *bytes, by an
     * estimate, for CUDA above all that was measured. Where they are more than `room`, *graph is
     * NULL, PML_OK. */
    pml_status (*graph_begin)(pml_queue *queue, pml_error *err);
    pml_status (*graph_end)(pml_queue *queue, size_t room, pml_graph **graph, size_t *bytes,
                            pml_error *err);
    pml_status (*graph_launch)(pml_queue *queue, pml_graph *graph, pml_error *err);
    void (*graph_destroy)(pml_graph **graph);

    /* Moments of a queue: mark remembers when the queue comes to this point (index below
     * PML_MARKS), passed waits until it is beyond one that was made, between gives the seconds from
     * one mark to another, after a sync. Not recorded. */
    pml_status (*mark)(pml_queue *queue, int index, pml_error *err);
    pml_status (*passed)(pml_queue *queue, int index, pml_error *err);
    pml_status (*between)(pml_queue *queue, int from, int to, double *seconds, pml_error *err);

    /* Bytes of `ws` this op wants for args: shapes and attributes, data pointers are not read (here
     * an operand is given when it has rows). device may be NULL: the answer then holds for any. */
    size_t (*workspace)(pml_device *device, pml_op op, const pml_op_args *args);

    /* Compile what this op will want for args, as far as that is done at its first use: as
     * workspace, and nothing is put on a queue. Any thread may call it beside a queue's user. NULL:
     * nothing is compiled late. */
    pml_status (*prepare)(pml_device *device, pml_op op, const pml_op_args *args, pml_error *err);

    /* Some calls of prepare come (on), or are through. Ops between may do without what is not
     * compiled yet, by something slower, unless the device is deterministic or they are recorded:
     * those compile or wait. NULL with prepare. */
    void (*prepares)(pml_device *device, bool on);

    /* That ops will soon read `bytes` at `data` from the beginning to the end, cut evenly to the
     * threads, after the op that comes next: threads that wait may fetch it. Where what is read is
     * what an op costs (a sampled token's products) and others are made by one thread between
     * them. Changes no result. It need not be there any more when it is fetched. NULL: gains
     * nothing. */
    void (*ahead)(pml_queue *queue, const void *data, size_t bytes);

    pml_op_table op;
} pml_backend;

enum { PML_BACKEND_ABI = 22, PML_MARKS = 4096 };

/* The CPU backend: always there, complete, the oracle. Never NULL. */
const pml_backend *pml_backend_cpu(void);

/* The CUDA backend from its shared object beside the program (or $PML_CUDA_BACKEND).
 * PML_NOT_FOUND without a driver or object, the message says which and what to install. */
pml_status pml_backend_cuda(const pml_backend **backend, pml_error *err);

/* The same, also where no driver is: what a plan asks of a backend (ops, dtypes, workspace) is
 * there, devices and open fail. */
pml_status pml_backend_cuda_to_plan(const pml_backend **backend, pml_error *err);

/* The backend a device's name means: "cpu", "cuda", "cuda:1"; *index is the device's number. With
 * to_plan the CUDA backend may be without a driver. PML_INVALID for any other name. */
pml_status pml_backend_named(const char *device, bool to_plan, const pml_backend **backend,
                             int *index, pml_error *err);

/* Whether the backend has this op. */
bool pml_op_is_there(const pml_backend *backend, pml_op op);

/* Run one op by its number. PML_UNSUPPORTED when the backend has no such op. */
pml_status pml_op_run(const pml_backend *backend, pml_op op, pml_queue *queue,
                      const pml_op_args *args, pml_error *err);

#ifdef __cplusplus
}
#endif
#endif
