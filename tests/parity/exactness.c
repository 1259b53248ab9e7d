/* Exactness: the same numbers whichever way the same step is cut up.
 *
 *   packed = unpacked, accumulated = full batch, two workers = one:   loss 1e-6, gradients 5e-6
 *   recomputed = kept, restored = undisturbed:                        every bit
 *   frozen weights held as bfloat16 = as float32:                     every bit
 *   quantised weights as codes = as products read them:               every bit
 *
 * with dropout too: a token's mask does not follow where it lies.
 *
 *   exactness FIXTURES
 *   exactness --cuda [--bf16] FIXTURES    recompute, offload and FP8 on a GPU, alone */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "made.h"
#include "pml/base/file.h"
#include "pml/model/convert.h"
#include "pml_op/cpu.h"
#include "session.h"

static const double loss_limit = 1e-6, gradient_limit = 5e-6;
static const char *const cases[] = {"llama-tied-full", "llama-untied-lora", "llama-biased-lora",
                                    "qwen2-tied-lora", "qwen2-untied-full", "qwen3-mixed-lora",
                                    "llama-saved-lora"};
enum { CASES = sizeof cases / sizeof *cases };

/* One whole epoch as one step: its loss, and its gradients tensor by tensor. */
typedef struct epoch {
    session s;
    float *gradients;
    double loss;
} epoch;

static epoch run_epoch(const pml_train_config *config)
{
    epoch e;
    session_open(&(session_options){.config = config}, &e.s);
    int64_t labels = session_micros(&e.s, NULL);
    e.gradients = session_read(&e.s, PML_STATE_GRAD);
    pml_step_result result;
    pml_update update = {.step = 1, .learning_rate = 0, .labels = labels};
    MUST(pml_stepper_update(e.s.stepper, &update, &result, err));
    e.loss = result.loss;
    return e;
}

static void end_epoch(epoch *e)
{
    session_close(&e->s);
    free(e->gradients);
}

static void compare_tensors(const char *what, session *s, const float *a, const float *b)
{
    for (int i = 0; i < pml_stepper_trainable_count(s->stepper); i++) {
        const char *name;
        int64_t rows, cols;
        pml_stepper_trainable(s->stepper, i, &name, &rows, &cols, NULL);
        double distance = relative_distance(a, b, (size_t)(rows * cols));
        check(distance <= gradient_limit, "%s: gradient of %s is %.1e apart", what, name, distance);
        a += rows * cols;
        b += rows * cols;
    }
}

static void compare_epochs(const char *what, const pml_train_config *one,
                           const pml_train_config *other)
{
    epoch a = run_epoch(one), b = run_epoch(other);
    double distance = fabs(a.loss - b.loss) / b.loss;
    check(distance <= loss_limit, "%s: losses are %.1e apart", what, distance);
    compare_tensors(what, &a.s, a.gradients, b.gradients);
    end_epoch(&a);
    end_epoch(&b);
}

/* Rows of an epoch: bins, when they are packed. */
static int64_t rows_of(const pml_train_config *config)
{
    session s;
    session_open(&(session_options){.config = config}, &s);
    int64_t rows = pml_sampler_rows(s.sampler);
    session_close(&s);
    return rows;
}

/* A fixture's settings, with dropout where there is an adapter and it is asked for. */
static void load(const char *fixtures, const char *name, double dropout, pml_train_config *config)
{
    load_case(fixtures, name, config);
    config->lora_dropout = config->method == PML_METHOD_LORA ? dropout : 0;
}

static void check_packing(const char *fixtures, const char *name, double dropout)
{
    pml_train_config packed, unpacked;
    char what[96];
    load(fixtures, name, dropout, &packed);
    packed.batch_size = 1;
    packed.accumulation = 64;
    unpacked = packed;
    packed.packing = true;
    snprintf(what, sizeof what, "%s: packed against unpacked, dropout %g", name, dropout);
    check(rows_of(&packed) < rows_of(&unpacked), "%s: nothing was packed", what);
    compare_epochs(what, &packed, &unpacked);
}

static void check_accumulation(const char *fixtures, const char *name, double dropout)
{
    pml_train_config accumulated, whole;
    char what[96];
    load(fixtures, name, dropout, &accumulated);
    whole = accumulated;
    accumulated.batch_size = 1;
    accumulated.accumulation = whole.batch_size = 64;
    whole.accumulation = 1;
    snprintf(what, sizeof what, "%s: accumulated against one batch, dropout %g", name, dropout);
    compare_epochs(what, &accumulated, &whole);
}

/* Field by field: a struct's padding is nobody's. */
static bool same(const pml_step_result *a, const pml_step_result *b)
{
    return a->loss == b->loss && a->grad_norm == b->grad_norm && a->skipped == b->skipped;
}

/* Three steps that make things again end with the weights of three that keep them, bit for bit:
 * each level, in one of the two layers and in both. */
static void check_made_again(const char *name, const pml_train_config *given)
{
    pml_train_config config = *given;
    config.deterministic = true;
    float *kept = NULL;
    pml_step_result first = {0};
    size_t least = SIZE_MAX, most = 0;
    static const int32_t choices[][4] = {{0, 0, 0, 0},
                                         {PML_RECOMPUTE_NORMS, 2, 0, 0},
                                         {PML_RECOMPUTE_ATTENTION, 2, 0, 0},
                                         {PML_RECOMPUTE_LAYER, 1, 0, 0},
                                         {PML_RECOMPUTE_LAYER, 2, 0, 0},
                                         /* … of them, what waits on the host */
                                         {0, 0, PML_RECOMPUTE_NONE, 1},
                                         {PML_RECOMPUTE_LAYER, 2, PML_RECOMPUTE_NORMS, 1},
                                         {PML_RECOMPUTE_LAYER, 2, PML_RECOMPUTE_LAYER, 1}};
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
        session s;
        session_open(&(session_options){.config = &config,
                                        .recompute = choices[i][0],
                                        .recompute_layers = choices[i][1],
                                        .offload = choices[i][2],
                                        .offload_layers = choices[i][3],
                                        .head_chunk = 16},
                     &s);
        pml_step_result result;
        for (int step = 0; step < 3; step++)
            result = session_step(&s, NULL);
        float *values = session_read(&s, PML_STATE_VALUE);
        size_t n = pml_stepper_state_floats(s.stepper), arena = pml_stepper_plan(s.stepper)->arena;
        check((pml_stepper_plan(s.stepper)->host > 0) == (choices[i][3] > 0),
              "%s: choice %zu keeps %zu bytes on the host", name, i,
              pml_stepper_plan(s.stepper)->host);
        session_close(&s);
        least = arena < least ? arena : least;
        if (i == 0) {
            kept = values;
            first = result;
            most = arena;
            continue;
        }
        check(memcmp(kept, values, n * sizeof(float)) == 0, "%s: recompute %zu changes weights",
              name, i);
        check(same(&first, &result), "%s: recompute %zu changes losses", name, i);
        free(values);
    }
    check(least < most, "%s: recompute does not save memory (%zu, %zu)", name, most, least);
    free(kept);
}

static void check_recompute(const char *fixtures, const char *name, double dropout)
{
    pml_train_config config;
    load(fixtures, name, dropout, &config);
    check_made_again(name, &config);
}

/* For a model that is made here. */
static void new_folder(pml_train_config *config)
{
    snprintf(config->model, sizeof config->model, "/tmp/pml-exactness-XXXXXX");
    if (mkdtemp(config->model) == NULL)
        abort();
}

static void remove_folder(const pml_train_config *config)
{
    MUST(pml_tree_remove("/tmp", config->model + strlen("/tmp/"), err));
}

/* A fixture's settings over a model that is made here, in a folder of its own: for sizes that no
 * fixture has. */
static void load_made(const char *fixtures, int head_dim, pml_train_config *config)
{
    load(fixtures, "llama-untied-lora", 0, config);
    new_folder(config);
    make_model_in_units(config->model, head_dim);
    config->lora_init[0] = '\0';
}

/* Heads as large models have them: in bfloat16 on Hopper attention's backward by its own kernels.
 */
static void check_wide_heads(const char *fixtures)
{
    pml_train_config config;
    load_made(fixtures, 128, &config);
    check_made_again("heads of 128", &config);
    remove_folder(&config);
}

/* Quantised weights as codes, as products read them (NF4's numbers; FP8's codes turned round, too),
 * and some of each: the same bits; with layers made again, where a weight that was unpacked for
 * that serves the backward, too. */
static void check_unpacked(const char *name, const pml_train_config *config)
{
    enum { RUNS = 4, LINEARS = 4 };
    float *values[RUNS];
    pml_step_result results[RUNS];
    size_t n = 0, weights[RUNS];
    for (int i = 0; i < RUNS; i++) {
        session s;
        const int unpacked[RUNS] = {0, LINEARS + 1, 2 * LINEARS, LINEARS - 1};
        session_open(&(session_options){.config = config,
                                        .recompute = i == 3 ? PML_RECOMPUTE_LAYER : 0,
                                        .recompute_layers = i == 3 ? 2 : 0,
                                        .head_chunk = 16,
                                        .unpacked = unpacked[i],
                                        .unpacked_as_given = true},
                     &s);
        for (int step = 0; step < 3; step++)
            results[i] = session_step(&s, NULL);
        values[i] = session_read(&s, PML_STATE_VALUE);
        n = pml_stepper_state_floats(s.stepper);
        weights[i] = pml_stepper_plan(s.stepper)->by_cause[PML_CAUSE_WEIGHTS];
        session_close(&s);
        check(memcmp(values[0], values[i], n * sizeof(float)) == 0,
              "%s: %d weights unpacked change what is trained", name, unpacked[i]);
        check(same(&results[0], &results[i]), "%s: %d weights unpacked change losses", name,
              unpacked[i]);
    }
    check(weights[0] < weights[3] && weights[3] < weights[1] && weights[1] < weights[2],
          "%s: weights of %zu, %zu, %zu, %zu bytes", name, weights[0], weights[3], weights[1],
          weights[2]);
    for (int i = 0; i < RUNS; i++)
        free(values[i]);
}

static void check_unpacked_nf4(const char *fixtures, const char *name)
{
    pml_train_config config;
    load(fixtures, name, 0, &config);
    check_unpacked(name, &config);
}

/* No fixture has sizes that products of 8 bits take; with rows enough that adapters stand in the
 * codes' borders where there are borders. */
static void check_unpacked_fp8(const char *fixtures)
{
    pml_train_config config;
    load_made(fixtures, 16, &config);
    config.quant = PML_QUANT_FP8;
    config.batch_size = 8;
    check_unpacked("fp8", &config);
    remove_folder(&config);
}

/* A micro-batch run in pieces gives the loss and gradients of the whole, but for the order of sums.
 */
static void check_pieces(const char *fixtures, const char *name)
{
    pml_train_config config;
    load(fixtures, name, 0, &config);
    config.batch_size = 4;
    pml_step_result results[2];
    float *gradients[2];
    size_t n = 0;
    for (int i = 0; i < 2; i++) {
        session s;
        session_open(&(session_options){.config = &config, .head_chunk = 16, .pieces = 1 + i}, &s);
        check(pml_stepper_plan(s.stepper)->choices.pieces == 1 + i, "%s: not in pieces", name);
        session_micros(&s, NULL);
        gradients[i] = session_read(&s, PML_STATE_GRAD);
        n = pml_stepper_state_floats(s.stepper);
        session_close(&s);
        session_open(&(session_options){.config = &config, .head_chunk = 16, .pieces = 1 + i}, &s);
        results[i] = session_step(&s, NULL);
        session_close(&s);
    }
    double apart = fabs(results[0].loss - results[1].loss) / results[0].loss;
    check(apart <= 1e-6, "%s: pieces change the loss by %.1e", name, apart);
    double distance = relative_distance(gradients[0], gradients[1], n);
    check(distance <= 5e-6, "%s: pieces change the gradients by %.1e", name, distance);
    free(gradients[0]);
    free(gradients[1]);
}

enum { STEPS = 6 };

typedef struct rank {
    const pml_train_config *config;
    int fd, number;
    pml_step_result results[STEPS];
    float *first_moments; /* after the first update: (1 - beta1) times the clipped gradient */
    float *values;
    session s;
} rank;

static void *run_rank(void *argument)
{
    rank *r = argument;
    pml_comm *comm;
    MUST(pml_comm_shared(r->fd, r->number, 2, &comm, err));
    session_open(&(session_options){.config = r->config, .comm = comm, .threads = 1}, &r->s);
    for (int step = 0; step < STEPS; step++) {
        r->results[step] = session_step(&r->s, comm);
        if (step == 0)
            r->first_moments = session_read(&r->s, PML_STATE_EXP_AVG);
    }
    r->values = session_read(&r->s, PML_STATE_VALUE);
    pml_comm_destroy(&comm);
    return NULL;
}

/* Two workers with one micro-batch each against one worker with two. */
static void check_workers(const char *fixtures, const char *name, double dropout)
{
    pml_train_config alone, shared;
    char what[96];
    load(fixtures, name, dropout, &alone);
    alone.accumulation = 2;
    alone.schedule.warmup_steps = 0;
    shared = alone;
    shared.accumulation = 1;
    rank ranks[2] = {{.config = &shared, .number = 0}, {.config = &shared, .number = 1}};
    pthread_t threads[2];
    int fd;
    MUST(pml_comm_shared_create(2, &fd, err));
    for (int r = 0; r < 2; r++) {
        ranks[r].fd = fd;
        if (pthread_create(&threads[r], NULL, run_rank, &ranks[r]) != 0)
            abort();
    }
    for (int r = 0; r < 2; r++)
        pthread_join(threads[r], NULL);
    close(fd);
    session one;
    session_open(&(session_options){.config = &alone}, &one);
    snprintf(what, sizeof what, "%s: two workers against one, dropout %g", name, dropout);
    for (int step = 0; step < STEPS; step++) {
        pml_step_result result = session_step(&one, NULL);
        double distance = fabs(ranks[0].results[step].loss - result.loss) / result.loss;
        check(distance <= (step == 0 ? loss_limit : 1e-4), "%s: loss of step %d is %.1e apart",
              what, step + 1, distance);
        check(same(&ranks[0].results[step], &ranks[1].results[step]),
              "%s: the workers report different losses of step %d", what, step + 1);
        if (step == 0) {
            float *moments = session_read(&one, PML_STATE_EXP_AVG);
            compare_tensors(what, &one, ranks[0].first_moments, moments);
            free(moments);
        }
    }
    check(memcmp(ranks[0].values, ranks[1].values,
                 pml_stepper_state_floats(one.stepper) * sizeof(float)) == 0,
          "%s: the workers end with different weights", what);
    for (int r = 0; r < 2; r++) {
        session_close(&ranks[r].s);
        free(ranks[r].first_moments);
        free(ranks[r].values);
    }
    session_close(&one);
}

/* The model's folder once more, its tensors as float32. */
static void widen_model(const char *from, const char *to)
{
    char path[PML_PATH_MAX + 32];
    char *text = NULL;
    size_t size;
    pml_safetensors *file = NULL;
    pml_safetensors_writer *w = NULL;
    snprintf(path, sizeof path, "%s/config.json", from);
    MUST(pml_file_read(path, 1 << 20, true, &text, &size, err));
    snprintf(path, sizeof path, "%s/config.json", to);
    MUST(pml_file_write(path, text, size, 0600, err));
    free(text);
    MUST(pml_safetensors_open_folder(from, &file, err));
    snprintf(path, sizeof path, "%s/model.safetensors", to);
    MUST(pml_safetensors_writer_new(path, 0600, &w, err));
    for (size_t i = 0; i < pml_safetensors_count(file); i++) {
        const pml_stored *t = pml_safetensors_at(file, i);
        MUST(pml_safetensors_writer_add(w, t->name, PML_F32, t->shape, t->n_dims, err));
    }
    for (size_t i = 0; i < pml_safetensors_count(file); i++) {
        const pml_stored *t = pml_safetensors_at(file, i);
        float *values = malloc((size_t)t->elements * sizeof *values);
        void *data = malloc(t->bytes);
        MUST(pml_stored_read(t, 0, t->bytes, data, err));
        MUST(pml_convert_to_f32(data, t->dtype, (size_t)t->elements, values, err));
        MUST(pml_safetensors_writer_write(w, values, (size_t)t->elements * sizeof *values, err));
        free(data);
        free(values);
    }
    MUST(pml_safetensors_writer_finish(w, err));
    pml_safetensors_writer_destroy(&w);
    pml_safetensors_close(&file);
}

/* What a frozen weight is stored in changes its bytes and no result. config.json says bfloat16 of
 * both folders: the files are believed. */
static void check_stored(const char *fixtures, const char *name)
{
    pml_train_config config;
    load(fixtures, name, 0, &config);
    epoch narrow = run_epoch(&config);
    const pml_train_config fixture = config;
    new_folder(&config);
    widen_model(fixture.model, config.model);
    epoch wide = run_epoch(&config);
    size_t n = pml_stepper_state_floats(wide.s.stepper);
    size_t held[2] = {pml_stepper_plan(narrow.s.stepper)->by_cause[PML_CAUSE_WEIGHTS],
                      pml_stepper_plan(wide.s.stepper)->by_cause[PML_CAUSE_WEIGHTS]};
    check(narrow.loss == wide.loss, "%s: held as bfloat16 the loss is %.9g, not %.9g", name,
          narrow.loss, wide.loss);
    check(memcmp(narrow.gradients, wide.gradients, n * sizeof(float)) == 0,
          "%s: held as bfloat16 gradients differ", name);
    check(held[0] < held[1] * 3 / 4, "%s: %zu bytes of weights, %zu as float32", name, held[0],
          held[1]);
    end_epoch(&narrow);
    end_epoch(&wide);
    remove_folder(&config);
}

/* What is made again, or waited on the host, leaves every bit on a GPU, too: with products whose
 * algorithm is not chosen by the clock. */
static int on_gpu(const char *fixtures)
{
    if (session_is_skipped())
        return SESSION_SKIPPED;
    check_recompute(fixtures, "qwen3-tied-full", 0);
    check_recompute(fixtures, "llama-untied-lora", 0);
    check_recompute(fixtures, "llama-untied-lora", 0.3);
    check_recompute(fixtures, "qwen2-tied-lora", 0);
    check_wide_heads(fixtures);
    if (session_has(PML_U8))
        check_unpacked_fp8(fixtures);
    return summary();
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    if (argc > 2 && argc < 5 && strcmp(argv[1], "--cuda") == 0) {
        if (argc == 4 && strcmp(argv[2], "--bf16") == 0)
            session_dtype = PML_BF16;
        session_device = "cuda";
        return on_gpu(argv[argc - 1]);
    }
    if (argc != 2) {
        fprintf(stderr, "usage: exactness [--cuda [--bf16]] FIXTURES\n");
        return EXIT_FAILURE;
    }
    for (int i = 0; i < 2 * CASES; i++) {
        const char *name = cases[i / 2];
        double dropout = i % 2 == 0 ? 0 : 0.3;
        if (dropout > 0 && strstr(name, "lora") == NULL)
            continue;
        check_packing(argv[1], name, dropout);
        check_accumulation(argv[1], name, dropout);
        check_recompute(argv[1], name, dropout);
        check_workers(argv[1], name, dropout);
    }
    check_pieces(argv[1], "llama-biased-full");
    check_pieces(argv[1], "qwen3-layers-lora");
    check_recompute(argv[1], "qwen3-tied-full", 0);
    check_wide_heads(argv[1]);
    check_unpacked_nf4(argv[1], "llama-nf4-lora"); /* quantised while it is loaded */
    check_unpacked_nf4(argv[1], "qwen2-nf4-lora"); /* quantised in its folder */
    check_unpacked_fp8(argv[1]);
    session_beside = true; /* swiglu makes codes */
    check_unpacked_fp8(argv[1]);
    session_beside = false;
    check_stored(argv[1], "llama-bf16-lora");
    return summary();
}
