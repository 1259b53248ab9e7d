/* The loss scale at work in a stepper: found by trying, undone exactly, halved by an overflow whose
 * update is left out, kept in a checkpoint, one for all workers.
 *
 *   scaled [--cuda [--fp16]] FIXTURES
 *
 * The rule is the same in every dtype, so that float32 on the CPU answers for it, where a scale
 * changes no bit of what is not too large; with --fp16 it is at work where it is needed. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/train/checkpoint.h"
#include "pml_op/cpu.h"
#include "session.h"

static char root[] = "/tmp/pml-scaled-XXXXXX";
static const pml_loss_scale unknown = {.dynamic = true};

static double scale_of(const session *s)
{
    return pml_stepper_loss_scale(s->stepper).value;
}

/* A session as a float16 run begins, whatever its dtype: with its scale to be found. */
static void begin(const pml_train_config *config, session *s)
{
    session_open(&(session_options){.config = config}, s);
    MUST(pml_stepper_set_loss_scale(s->stepper, unknown, err));
}

static void set(session *s, double value)
{
    const pml_loss_scale scale = {.value = value, .finite = 3, .dynamic = true};
    MUST(pml_stepper_set_loss_scale(s->stepper, scale, err));
}

static size_t floats(const session *s)
{
    return pml_stepper_state_floats(s->stepper);
}

/* Whether the gradients as they stand are finite; and whether all are zero. */
static bool sound(session *s, bool *zero)
{
    float *gradients = session_read(s, PML_STATE_GRAD);
    bool all = true;
    *zero = true;
    for (size_t i = 0; i < floats(s); i++) {
        all = all && isfinite(gradients[i]);
        *zero = *zero && gradients[i] == 0;
    }
    free(gradients);
    return all;
}

static bool bears(const pml_train_config *config, const pml_batch *batch, double scale)
{
    session s;
    bool zero;
    session_open(&(session_options){.config = config}, &s);
    set(&s, scale);
    MUST(pml_stepper_micro(s.stepper, batch, err));
    bool good = sound(&s, &zero);
    check(!zero, "a micro-batch leaves no gradient");
    session_close(&s);
    return good;
}

/* The largest scale that the first micro-batch bears, less the head-room; nothing is left behind.
 */
static void check_found(const pml_train_config *config, const char *name)
{
    session s;
    pml_batch batch;
    bool zero;
    begin(config, &s);
    MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
    check(pml_stepper_micro(s.stepper, &batch, NULL) == PML_INVALID,
          "%s: a step without a scale was made", name);
    MUST(pml_stepper_calibrate(s.stepper, &batch, err));
    double found = scale_of(&s), most = ldexp(1, PML_LOSS_SCALE_MOST);
    double edge = ldexp(found, PML_LOSS_SCALE_HEADROOM);
    printf("%s: loss scale %g\n", name, found);
    check(sound(&s, &zero) && zero, "%s: trying leaves gradients behind", name);
    check(bears(config, &batch, edge), "%s: %g is too much", name, edge);
    check(edge == most || !bears(config, &batch, 2 * edge), "%s: %g would do", name, 2 * edge);
    check(session_dtype == PML_F16 || edge == most, "%s: float32 bears only %g", name, edge);
    set(&s, 1);
    MUST(pml_stepper_calibrate(s.stepper, &batch, err));
    check(scale_of(&s) == 1, "%s: a scale that is known was sought again", name);
    session_close(&s);
}

static float *trained(const pml_train_config *config, double scale, pml_step_result *last)
{
    session s;
    session_open(&(session_options){.config = config}, &s);
    if (scale > 0)
        set(&s, scale);
    for (int i = 0; i < 4; i++)
        *last = session_step(&s, NULL);
    float *values = session_read(&s, PML_STATE_VALUE);
    session_close(&s);
    return values;
}

/* In float32 a power of two changes no bit, of weights or of what is told. */
static void check_undone(const pml_train_config *config, const char *name)
{
    pml_step_result plain, scaled;
    session s;
    session_open(&(session_options){.config = config}, &s);
    size_t bytes = floats(&s) * sizeof(float);
    session_close(&s);
    float *want = trained(config, 0, &plain), *got = trained(config, 8192, &scaled);
    check(memcmp(want, got, bytes) == 0, "%s: a loss scale changes the weights", name);
    check(plain.loss == scaled.loss && plain.grad_norm == scaled.grad_norm,
          "%s: a loss scale changes loss or norm", name);
    check(plain.loss_scale == 0 && scaled.loss_scale == 8192, "%s: told %g and %g", name,
          plain.loss_scale, scaled.loss_scale);
    free(want);
    free(got);
}

/* So much that several halvings are needed. What overflows in float32 is a gradient, or on a GPU
 * its square. */
static double too_much(const pml_train_config *config)
{
    session s;
    pml_batch batch;
    if (session_dtype == PML_F32)
        return strcmp(session_device, "cpu") == 0 ? 0x1p127 : 0x1p70;
    begin(config, &s);
    MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
    MUST(pml_stepper_calibrate(s.stepper, &batch, err));
    double found = scale_of(&s);
    session_close(&s);
    return ldexp(found, PML_LOSS_SCALE_HEADROOM + 5);
}

/* Each overflow halves the scale and changes nothing else; then training goes on. */
static void check_overflow(const pml_train_config *config, const char *name)
{
    session s;
    int skipped = 0;
    double scale = too_much(config);
    session_open(&(session_options){.config = config}, &s);
    set(&s, scale);
    for (bool through = false; !through && skipped < 40;) {
        float *before = session_read(&s, PML_STATE_VALUE);
        float *moments = session_read(&s, PML_STATE_EXP_AVG);
        pml_step_result r = session_step(&s, NULL);
        float *after = session_read(&s, PML_STATE_VALUE);
        float *moments_after = session_read(&s, PML_STATE_EXP_AVG);
        bool same = memcmp(before, after, floats(&s) * sizeof *after) == 0 &&
                    memcmp(moments, moments_after, floats(&s) * sizeof *moments) == 0;
        through = !r.skipped;
        check(r.overflow == r.skipped && same == r.skipped && isfinite(r.loss) &&
                  isfinite(r.grad_norm) == through && r.loss_scale == scale,
              "%s: step %lld at scale %g: skipped %d, overflow %d, unchanged %d, norm %g", name,
              (long long)s.step, scale, r.skipped, r.overflow, same, r.grad_norm);
        skipped += r.skipped;
        scale = r.skipped ? scale / 2 : scale;
        check(scale_of(&s) == scale, "%s: the scale is %g, not %g", name, scale_of(&s), scale);
        free(before);
        free(after);
        free(moments);
        free(moments_after);
    }
    check(skipped > 1 && skipped < 40, "%s: %d steps were skipped", name, skipped);
    check(pml_stepper_applied(s.stepper) == 1, "%s: skipped steps count as updates", name);
    session_close(&s);
}

/* A loss that is not finite is not the scale's: no step is made, and the next one finds a scale. */
static void check_forward(const pml_train_config *config, const char *name)
{
    session s;
    begin(config, &s);
    float *values = session_read(&s, PML_STATE_VALUE), *sane = session_read(&s, PML_STATE_VALUE);
    for (size_t i = 0; i < floats(&s); i++)
        values[i] = NAN;
    MUST(pml_stepper_write(s.stepper, PML_STATE_VALUE, values, err));
    pml_step_result r = session_step(&s, NULL);
    check(r.skipped && !r.overflow && isnan(r.loss), "%s: a model of NaNs: loss %g, overflow %d",
          name, r.loss, r.overflow);
    check(r.loss_scale == 1, "%s: a model of NaNs had scale %g", name, r.loss_scale);
    check(scale_of(&s) == 0, "%s: a model of NaNs leaves scale %g", name, scale_of(&s));
    MUST(pml_stepper_write(s.stepper, PML_STATE_VALUE, sane, err));
    r = session_step(&s, NULL);
    check(!r.skipped && r.loss_scale > 1, "%s: after NaNs scale %g, skipped %d", name, r.loss_scale,
          r.skipped);
    free(values);
    free(sane);
    session_close(&s);
}

/* Saved in the midst of overflows, a run goes on as if it had not stopped: with as many halvings to
 * come. */
static void check_resume(const pml_train_config *config, const char *name)
{
    session s, resumed;
    pml_snapshot *saved = NULL, *loaded = NULL;
    char folder[sizeof root + 32];
    snprintf(folder, sizeof folder, "%s/%s", root, name);
    session_open(&(session_options){.config = config}, &s);
    set(&s, too_much(config));
    pml_step_result r = session_step(&s, NULL);
    check(r.overflow, "%s: no overflow to save after", name);
    pml_train_state state = {.step = s.step,
                             .cursor = s.cursor,
                             .learning_rate = config->learning_rate,
                             .accumulation = 1,
                             .schedule = config->schedule};
    MUST(pml_stepper_identity(s.stepper, state.identity, sizeof state.identity, err));
    MUST(pml_snapshot_new(s.stepper, config, &saved, err));
    MUST(pml_snapshot_take(saved, s.stepper, &state, err));
    MUST(pml_checkpoint_write(saved, folder, NULL, err));
    begin(config, &resumed);
    MUST(pml_snapshot_new(resumed.stepper, config, &loaded, err));
    MUST(pml_checkpoint_load(folder, loaded, err));
    MUST(pml_snapshot_restore(loaded, resumed.stepper, err));
    pml_loss_scale was = pml_stepper_loss_scale(s.stepper);
    pml_loss_scale is = pml_stepper_loss_scale(resumed.stepper);
    check(memcmp(&was, &is, sizeof was) == 0, "%s: the scale comes back as %g, %d", name, is.value,
          is.finite);
    resumed.step = pml_snapshot_state(loaded)->step;
    resumed.cursor = pml_snapshot_state(loaded)->cursor;
    int skipped = 0;
    for (int i = 0; i < 8; i++) {
        pml_step_result a = session_step(&s, NULL), b = session_step(&resumed, NULL);
        skipped += a.skipped;
        check(a.skipped == b.skipped && a.loss == b.loss && a.loss_scale == b.loss_scale,
              "%s: step %lld differs after a resume", name, (long long)s.step);
    }
    check(skipped > 0, "%s: no overflow after the resume", name);
    float *want = session_read(&s, PML_STATE_VALUE), *got = session_read(&resumed, PML_STATE_VALUE);
    check(memcmp(want, got, floats(&s) * sizeof *got) == 0, "%s: the resumed run has other weights",
          name);
    free(want);
    free(got);
    pml_snapshot_destroy(&saved);
    pml_snapshot_destroy(&loaded);
    session_close(&s);
    session_close(&resumed);
}

typedef struct rank {
    const pml_train_config *config;
    int fd, number;
    double too_much;
    pml_loss_scale scale[2]; /* found, and after a step */
    bool overflow;
} rank;

/* Rank 1 has nothing to try with; and its scale is what rank 0's gradients bear. */
static void *run_rank(void *argument)
{
    rank *r = argument;
    pml_comm *comm;
    session s;
    pml_batch batch, none = {0};
    MUST(pml_comm_shared(r->fd, r->number, 2, &comm, err));
    session_open(&(session_options){.config = r->config, .comm = comm, .threads = 1}, &s);
    MUST(pml_stepper_set_loss_scale(s.stepper, unknown, err));
    MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
    MUST(pml_stepper_calibrate(s.stepper, r->number == 0 ? &batch : &none, err));
    r->scale[0] = pml_stepper_loss_scale(s.stepper);
    set(&s, r->too_much);
    r->overflow = session_step(&s, comm).overflow;
    r->scale[1] = pml_stepper_loss_scale(s.stepper);
    session_close(&s);
    pml_comm_destroy(&comm);
    return NULL;
}

static void check_workers(const pml_train_config *config, const char *name)
{
    rank ranks[2] = {{.config = config, .number = 0}, {.config = config, .number = 1}};
    pthread_t threads[2];
    int fd;
    MUST(pml_comm_shared_create(2, &fd, err));
    for (int r = 0; r < 2; r++) {
        ranks[r].fd = fd;
        ranks[r].too_much = too_much(config);
        if (pthread_create(&threads[r], NULL, run_rank, &ranks[r]) != 0)
            abort();
    }
    for (int r = 0; r < 2; r++)
        pthread_join(threads[r], NULL);
    close(fd);
    check(memcmp(ranks[0].scale, ranks[1].scale, sizeof ranks[0].scale) == 0,
          "%s: workers have scales %g and %g, then %g and %g", name, ranks[0].scale[0].value,
          ranks[1].scale[0].value, ranks[0].scale[1].value, ranks[1].scale[1].value);
    check(ranks[0].overflow && ranks[1].overflow, "%s: workers overflow %d, %d", name,
          ranks[0].overflow, ranks[1].overflow);
    check(ranks[0].scale[0].value > 0, "%s: workers found no scale", name);
}

int main(int argc, char **argv)
{
    static const char *const cases[] = {"llama-untied-lora", "llama-tied-full"};
    pml_cpu_prepare_process(argc, argv);
    int at = 1;
    for (; at < argc && strncmp(argv[at], "--", 2) == 0; at++)
        session_option(argv[at]);
    if (at + 1 == argc && session_is_skipped())
        return SESSION_SKIPPED;
    if (at + 1 != argc || mkdtemp(root) == NULL) {
        fprintf(stderr, "usage: scaled [--cuda [--fp16]] FIXTURES\n");
        return EXIT_FAILURE;
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_train_config config;
        load_case(argv[at], cases[i], &config);
        config.schedule.warmup_steps = 0; /* the first step that is made moves something */
        check_found(&config, cases[i]);
        if (session_dtype == PML_F32)
            check_undone(&config, cases[i]);
        check_overflow(&config, cases[i]);
        check_forward(&config, cases[i]);
        check_resume(&config, cases[i]);
        check_workers(&config, cases[i]);
    }
    MUST(pml_tree_remove("/tmp", root + strlen("/tmp/"), err));
    return summary();
}
