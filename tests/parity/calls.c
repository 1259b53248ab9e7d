/* What a step asks of its device: no memory, one wait, host memory that stays as it is until the
 * device is beyond it, and nothing that is compiled in the midst of it.
 *
 *   calls [--cuda [--bf16]] FIXTURES
 *
 * A backend that counts stands before the real one. It also keeps a copy of what each upload reads,
 * and holds the source against it when the queue is known to be beyond the upload (a mark that has
 * passed, or a sync): on a GPU a source that was written again before would reach the device as
 * something else, now and then. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml_op/cpu.h"
#include "session.h"

enum { PENDING = 4096, WARM = 30, STEPS = 8 };

typedef struct counts {
    int allocs, uploads, downloads, syncs, waits, recordings, launches;
} counts;

typedef struct pending {
    const void *from;
    void *copy;
    size_t bytes;
} pending;

static const pml_backend *real;
static counts calls;
static pending reads[PENDING]; /* in the queue's order */
static int n_reads, overwritten;
static int marked[PML_MARKS]; /* how many of them stand before a mark */

/* The queue is beyond the first n. */
static void settle(int n)
{
    for (int i = 0; i < n; i++) {
        overwritten += memcmp(reads[i].from, reads[i].copy, reads[i].bytes) != 0;
        free(reads[i].copy);
    }
    n_reads -= n;
    memmove(reads, reads + n, (size_t)n_reads * sizeof *reads);
    for (int i = 0; i < PML_MARKS; i++)
        marked[i] = marked[i] > n ? marked[i] - n : 0;
}

static pml_status count_alloc(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    calls.allocs++;
    return real->alloc(device, bytes, base, err);
}

static pml_status count_host_alloc(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    calls.allocs++;
    return real->host_alloc(device, bytes, base, err);
}

static pml_status count_upload(pml_queue *queue, void *to, const void *from, size_t bytes,
                               pml_error *err)
{
    calls.uploads++;
    if (bytes > 0) {
        pending *p = &reads[n_reads];
        *p = (pending){.from = from, .copy = malloc(bytes), .bytes = bytes};
        if (++n_reads == PENDING || p->copy == NULL)
            abort();
        memcpy(p->copy, from, bytes);
    }
    return real->upload(queue, to, from, bytes, err);
}

static pml_status count_download(pml_queue *queue, void *to, const void *from, size_t bytes,
                                 pml_error *err)
{
    calls.downloads++;
    return real->download(queue, to, from, bytes, err);
}

static pml_status count_sync(pml_queue *queue, pml_error *err)
{
    calls.syncs++;
    pml_status status = real->sync(queue, err);
    settle(n_reads);
    return status;
}

static pml_status count_mark(pml_queue *queue, int index, pml_error *err)
{
    marked[index] = n_reads;
    return real->mark(queue, index, err);
}

static pml_status count_passed(pml_queue *queue, int index, pml_error *err)
{
    calls.waits++;
    pml_status status = real->passed(queue, index, err);
    settle(marked[index]);
    return status;
}

static pml_status count_begin(pml_queue *queue, pml_error *err)
{
    calls.recordings++;
    return real->graph_begin(queue, err);
}

static pml_status count_launch(pml_queue *queue, pml_graph *graph, pml_error *err)
{
    calls.launches++;
    return real->graph_launch(queue, graph, err);
}

static int begun; /* how often the stepper began to have something compiled aside */

static void count_prepares(pml_device *device, bool on)
{
    begun += on; /* the end is another thread's */
    if (real->prepares != NULL)
        real->prepares(device, on);
}

/* Where nothing is compiled late, what is asked for takes no time. */
static pml_status prepare(pml_device *device, pml_op op, const pml_op_args *args, pml_error *err)
{
    return real->prepare != NULL ? real->prepare(device, op, args, err) : PML_OK;
}

static const pml_backend *counting(void)
{
    static pml_backend b;
    int index;
    MUST(pml_backend_named(session_device, false, &real, &index, err));
    b = *real;
    b.alloc = count_alloc;
    b.host_alloc = count_host_alloc;
    b.upload = count_upload;
    b.download = count_download;
    b.sync = count_sync;
    b.mark = count_mark;
    b.passed = count_passed;
    b.prepare = prepare;
    b.prepares = count_prepares;
    if (b.graph_begin != NULL) {
        b.graph_begin = count_begin;
        b.graph_launch = count_launch;
    }
    return &b;
}

/* Steps as a run makes them once it goes: all that comes is known. */
static void check_steps(const char *fixtures, const char *name, double dropout)
{
    pml_train_config config;
    session s;
    load_case(fixtures, name, &config);
    config.lora_dropout = dropout;
    config.accumulation = 3;
    config.max_steps = WARM + STEPS;
    session_open(&(session_options){.config = &config}, &s);
    for (int i = 0; i < WARM || pml_stepper_is_compiling(s.stepper); i++)
        session_step(&s, NULL);
    for (int i = 0; i < STEPS; i++) {
        const int micros = pml_sampler_micros(s.sampler, s.cursor);
        calls = (counts){0};
        session_step(&s, NULL);
        const counts *c = &calls;
        check(c->allocs == 0, "%s: %d times memory was taken", name, c->allocs);
        check(c->syncs == 1, "%s: %d waits for all", name, c->syncs);
        check(c->downloads == 1, "%s: %d reads of what is told", name, c->downloads);
        check(c->waits == micros, "%s: %d waits for %d micro-batches' places", name, c->waits,
              micros);
        check(c->recordings == 0, "%s: %d graphs recorded", name, c->recordings);
        check(c->launches == (real->graph_begin != NULL ? c->waits : 0),
              "%s: %d graphs launched for %d batches", name, c->launches, c->waits);
        if (i == STEPS - 1)
            printf("%s, dropout %g: %d micro-batches a step: %d uploads, %d downloads, "
                   "%d wait for all, %d for a place, %d graphs\n",
                   name, dropout, micros, c->uploads, c->downloads, c->syncs, c->waits,
                   c->launches);
    }
    session_close(&s);
    check(overwritten == 0, "%s: %d uploads' sources were written too early", name, overwritten);
}

/* What comes between steps, too. */
static void check_between(const char *fixtures, const char *name)
{
    pml_train_config config;
    session s;
    pml_batch batch;
    double loss = 0;
    int32_t out[8], n_out;
    static const int32_t prompt[] = {1, 2, 3};
    const pml_generate_options options = {
        .prompt = prompt, .n_prompt = 3, .n_prompts = 1, .max_new_tokens = 8};
    load_case(fixtures, name, &config);
    config.max_steps = 6;
    session_open(&(session_options){.config = &config}, &s);
    for (int i = 0; i < 6; i++) {
        session_step(&s, NULL);
        MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
        MUST(pml_stepper_evaluate(s.stepper, &batch, &loss, err));
        MUST(pml_stepper_generate(s.stepper, &options, out, &n_out, err));
        MUST(pml_stepper_set_loss_scale(s.stepper, pml_stepper_loss_scale(s.stepper), err));
    }
    session_close(&s);
    check(overwritten == 0, "%s: %d uploads' sources were written too early", name, overwritten);
}

/* What is compiled late is compiled aside: for the planned number of documents while weights come,
 * for another one when the first micro-batch has it, and not for an evaluation. */
static void check_aside(const char *fixtures, const char *name)
{
    enum { MORE_DOCUMENTS = 24 };
    pml_train_config config;
    session s;
    pml_batch batch;
    double loss = 0;
    load_case(fixtures, name, &config);
    config.max_steps = 3;
    session_open(&(session_options){.config = &config}, &s);
    pml_batch_limits limits = pml_stepper_plan(s.stepper)->limits;
    session_close(&s);
    limits.docs += MORE_DOCUMENTS;
    begun = 0;
    session_open(&(session_options){.config = &config, .limits = &limits}, &s);
    check(begun == 1, "%s: something was compiled aside %d times while weights came", name, begun);
    for (int i = 0; i < 4; i++) {
        while (pml_stepper_is_compiling(s.stepper)) /* what comes meanwhile is asked for later */
            pml_clock_sleep(0.001);
        if (i > 0) {
            session_step(&s, NULL);
            continue;
        }
        MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
        MUST(pml_stepper_evaluate(s.stepper, &batch, &loss, err));
        check(begun == 1, "%s: something was compiled aside for an evaluation", name);
    }
    check(begun == 2, "%s: something was compiled aside %d times, not once more", name, begun);
    session_close(&s);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    for (int i = 1; i + 1 < argc; i++)
        session_option(argv[i]);
    if (argc < 2 || argv[argc - 1][0] == '-') {
        fprintf(stderr, "usage: calls [--cuda [--bf16]] FIXTURES\n");
        return EXIT_FAILURE;
    }
    if (session_is_skipped())
        return SESSION_SKIPPED;
    const char *fixtures = argv[argc - 1];
    session_backend = counting();
    check_steps(fixtures, "llama-untied-lora", 0);
    check_steps(fixtures, "llama-untied-lora", 0.3);
    check_steps(fixtures, "qwen3-tied-full", 0);
    check_between(fixtures, "llama-untied-lora");
    check_aside(fixtures, "llama-untied-lora");
    check(n_reads == 0, "%d uploads were under way when what they read had ended", n_reads);
    return summary();
}
