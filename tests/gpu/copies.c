/* Copies to and from the host beside other ops: what arrives, and that what follows an await
 * follows the copies. The block is large enough that a copy takes a millisecond, so that an op
 * which does not wait for it is there first; initcheck needs milliseconds a row and sees no more in
 * many. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases.h"

enum { COLS = 4032, PITCH = 4096 };

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error must = PML_ERROR_INIT, *err = &must;                                             \
        if ((call) != PML_OK) {                                                                    \
            fprintf(stderr, "copies: %s\n", must.message);                                         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

typedef struct trip {
    const pml_backend *gpu;
    pml_queue *queue;
    int64_t rows;
    pml_view x, y, host;
} trip;

static void run(const trip *t, pml_op op, pml_op_args args)
{
    MUST(pml_op_run(t->gpu, op, t->queue, &args, err));
}

static void fill(const trip *t, pml_view v, double value)
{
    run(t, PML_OP_fill, (pml_op_args){.fill = {v, value}});
}

/* x is 1 when it is sent and 2 as soon as it may be; what comes back over y's 3 is 1, and a copy of
 * it into x, which comes after its await, too. */
static void there_and_back(const trip *t)
{
    fill(t, t->x, 1);
    run(t, PML_OP_offload, (pml_op_args){.offload = {t->x, t->host}});
    fill(t, t->y, 3); /* beside it */
    run(t, PML_OP_await, (pml_op_args){.await = {t->x}});
    fill(t, t->x, 2);
    run(t, PML_OP_fetch, (pml_op_args){.fetch = {t->host, t->y}});
    run(t, PML_OP_await, (pml_op_args){.await = {t->y}});
    run(t, PML_OP_await, (pml_op_args){.await = {t->y}}); /* nothing is under way: no matter */
    run(t, PML_OP_copy, (pml_op_args){.copy = {t->y, t->x}});
}

/* Elements of v that are not `value`, and of what lies between its rows that are not `between`. */
static int64_t wrong(const trip *t, pml_view v, float *image, float value, float between)
{
    int64_t count = 0;
    MUST(t->gpu->download(t->queue, image, v.data, (size_t)t->rows * PITCH * sizeof *image, err));
    MUST(t->gpu->sync(t->queue, err));
    for (int64_t i = 0; i < t->rows * PITCH; i++)
        count += image[i] != (i % PITCH < COLS ? value : between);
    return count;
}

static int64_t judge(const trip *t, float *image)
{
    int64_t count = wrong(t, t->x, image, 1, 7) + wrong(t, t->y, image, 1, 7);
    const float *host = t->host.data;
    for (int64_t i = 0; i < t->rows * COLS; i++)
        count += host[i] != 1;
    return count;
}

/* Where nothing of the last time is left to be mistaken for this one's. */
static void forget(const trip *t)
{
    const pml_view blocks[] = {t->x, t->y};
    for (int i = 0; i < 2; i++)
        fill(t, (pml_view){blocks[i].data, t->rows, PITCH, PITCH, PML_F32}, 7);
    MUST(t->gpu->sync(t->queue, err));
    memset(t->host.data, 0, (size_t)t->rows * COLS * sizeof(float));
}

int64_t copies_wrong(const pml_backend *gpu, pml_device *device, pml_queue *queue, int64_t rows,
                     int way)
{
    const size_t block = (size_t)rows * PITCH * sizeof(float);
    const size_t there = (size_t)rows * COLS * sizeof(float);
    void *base = NULL, *host = NULL;
    float *image = malloc(block);
    pml_graph *graph = NULL;
    size_t bytes = 0;
    MUST(image != NULL ? PML_OK : PML_FAIL(err, PML_NO_MEMORY, "no host memory"));
    MUST(gpu->alloc(device, 2 * block, &base, err));
    MUST(gpu->host_alloc(device, there, &host, err));
    const trip t = {.gpu = gpu,
                    .queue = queue,
                    .rows = rows,
                    .x = {base, rows, COLS, PITCH, PML_F32},
                    .y = {(char *)base + block, rows, COLS, PITCH, PML_F32},
                    .host = {host, rows, COLS, COLS, PML_F32}};
    forget(&t);
    if (way > 0)
        MUST(gpu->graph_begin(queue, err));
    there_and_back(&t);
    if (way > 0) {
        MUST(gpu->graph_end(queue, SIZE_MAX, &graph, &bytes, err));
        for (int replay = 0; replay < way; replay++) {
            forget(&t);
            MUST(gpu->graph_launch(queue, graph, err));
        }
    }
    MUST(gpu->sync(queue, err));
    int64_t count = judge(&t, image);
    if (graph != NULL)
        gpu->graph_destroy(&graph);
    gpu->host_free(device, &host, there);
    gpu->free(device, &base, 2 * block);
    free(image);
    return count + (host != NULL) + (base != NULL);
}
