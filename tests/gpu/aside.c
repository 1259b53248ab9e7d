/* Attention on a queue while another thread compiles just it: by our own kernels then, by cuDNN's
 * afterwards, and right each time. Which of them served first is the machine's to say; on one whose
 * driver has cuDNN's kernels kept it may be cuDNN's alone. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "pml/base/clock.h"
#include "session.h"

typedef struct aside {
    const session *s;
    pml_device *device;
    const gpu_case *c;
    pthread_t thread;
    atomic_bool begun;
    pml_error error;
    pml_status status;
} aside;

static void *compile(void *user)
{
    aside *a = user;
    pml_error *err = &a->error;
    atomic_store(&a->begun, true);
    a->status = a->s->gpu->prepare(a->device, a->c->op, &a->c->args, err);
    return NULL;
}

static void run_once(session *s, pml_queue *queue, const gpu_case *c, const char *when)
{
    gpu_case named = *c;
    pml_error err = PML_ERROR_INIT;
    snprintf(named.name, sizeof named.name, "%.60s, %s", c->name, when);
    if (pml_op_run(s->gpu, c->op, queue, &c->args, &err) != PML_OK)
        session_stop(named.name, &err);
    MUST(s->gpu->download(queue, s->eager, s->arena, s->size, err));
    MUST(s->gpu->sync(queue, err));
    judge(s, &named);
}

/* bfloat16 in whole tiles of some rows: what cuDNN is asked for. */
static const gpu_case *first_of(const session *s, pml_op op)
{
    for (int n = 0; n < s->cases.count; n++) {
        const gpu_case *c = &s->cases.at[n];
        const pml_attention_args *f = &c->args.attention;
        const pml_attention_bwd_args *b = &c->args.attention_bwd;
        bool forward = op == PML_OP_attention;
        const pml_view *q = forward ? &f->q : &b->q, *ws = forward ? &f->ws : &b->ws;
        if (c->op == op && q->dtype == PML_BF16 && q->rows > 64 && ws->data != NULL &&
            (forward ? f->window : b->window) == 0)
            return c;
    }
    return NULL;
}

static void beside(session *s, const gpu_case *c)
{
    const pml_device_options options = {0};
    aside a = {.s = s, .c = c};
    pml_queue *queue = NULL;
    MUST(s->gpu->open(&options, &a.device, err));
    MUST(s->gpu->queue_new(a.device, &queue, err));
    MUST(s->gpu->upload(queue, s->arena, s->start, s->size, err));
    MUST(s->gpu->sync(queue, err));
    MUST(pthread_create(&a.thread, NULL, compile, &a) == 0
             ? PML_OK
             : PML_FAIL(err, PML_NO_MEMORY, "no thread"));
    while (!atomic_load(&a.begun))
        pml_clock_sleep(0.001);
    pml_clock_sleep(0.01); /* it is in the midst of it */
    run_once(s, queue, c, "beside its compilation");
    pthread_join(a.thread, NULL);
    if (a.status != PML_OK)
        session_stop(c->name, &a.error);
    run_once(s, queue, c, "once it is compiled");
    s->gpu->queue_destroy(&queue);
    s->gpu->close(&a.device);
}

void attention_compiled_aside(session *s)
{
    static const pml_op ops[] = {PML_OP_attention, PML_OP_attention_bwd};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        const gpu_case *c = first_of(s, ops[i]);
        if (c != NULL)
            beside(s, c);
    }
}
