/* A fixture's folder trained to its end, or to a checkpoint and on from it in another process: the
 * curve as one JSON line. tools/bench/curve.py sets it beside transformers'.
 *
 *   test_curve FOLDER CASE [--device cuda] [--bf16 | --fp16] [--fast] [--quant fp8] [--stop N]
 *                          [--save CHECKPOINT] [--from CHECKPOINT]
 *
 * CASE is a folder in FOLDER with model, rows.safetensors, case.json and perhaps an adapter, as the
 * committed fixtures have them. Deterministic unless --fast. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/train/checkpoint.h"
#include "pml_op/cpu.h"
#include "session.h"

typedef struct curve_options {
    const char *save, *from;
    const char *quant; /* instead of the case's own; NULL: that */
    int64_t stop;      /* 0: at the end */
    bool fast;
} curve_options;

static void go_on_from(const char *folder, session *s)
{
    pml_snapshot *snapshot = NULL;
    MUST(pml_snapshot_new(s->stepper, &s->config, &snapshot, err));
    MUST(pml_checkpoint_load(folder, snapshot, err));
    MUST(pml_snapshot_restore(snapshot, s->stepper, err));
    s->step = pml_snapshot_state(snapshot)->step;
    s->cursor = pml_snapshot_state(snapshot)->cursor;
    pml_snapshot_destroy(&snapshot);
}

static void save_to(const char *folder, session *s)
{
    pml_snapshot *snapshot = NULL;
    pml_train_state state = {.step = s->step,
                             .cursor = s->cursor,
                             .learning_rate = s->config.learning_rate,
                             .weight_decay = s->config.weight_decay,
                             .max_grad_norm = s->config.max_grad_norm,
                             .accumulation = s->config.accumulation,
                             .schedule = s->config.schedule};
    MUST(pml_stepper_identity(s->stepper, state.identity, sizeof state.identity, err));
    MUST(pml_snapshot_new(s->stepper, &s->config, &snapshot, err));
    MUST(pml_snapshot_take(snapshot, s->stepper, &state, err));
    MUST(pml_checkpoint_write(snapshot, folder, NULL, err));
    pml_snapshot_destroy(&snapshot);
}

static void print_all(const char *name, const double *values, int64_t n)
{
    printf("\"%s\": [", name);
    for (int64_t i = 0; i < n; i++)
        printf("%s%.9g", i > 0 ? ", " : "", values[i]);
    printf("], ");
}

static void run(const char *folder, const char *name, const curve_options *o)
{
    pml_train_config config;
    load_case(folder, name, &config);
    config.deterministic = !o->fast;
    if (o->quant != NULL)
        config.quant = quant_named(o->quant);
    session s;
    session_open(&(session_options){.config = &config}, &s);
    if (o->from != NULL)
        go_on_from(o->from, &s);
    int64_t end = o->stop > 0 ? o->stop : config.max_steps, first = s.step, n = end - first;
    double *losses = calloc((size_t)(n > 0 ? n : 1), sizeof *losses);
    double *norms = calloc((size_t)(n > 0 ? n : 1), sizeof *norms);
    if (n <= 0 || losses == NULL || norms == NULL) {
        fprintf(stderr, "no steps from %lld to %lld, or no memory\n", (long long)first,
                (long long)end);
        exit(EXIT_FAILURE);
    }
    int64_t skipped = 0;
    double begin = pml_clock_monotonic();
    while (s.step < end) {
        pml_step_result result = session_step(&s, NULL);
        losses[s.step - first - 1] = result.loss;
        norms[s.step - first - 1] = result.grad_norm;
        skipped += result.skipped;
    }
    double seconds = pml_clock_monotonic() - begin;
    if (o->save != NULL)
        save_to(o->save, &s);
    printf("{");
    print_all("loss", losses, n);
    print_all("grad_norm", norms, n);
    printf("\"first\": %lld, \"skipped\": %lld, \"seconds\": %.3f}\n", (long long)first + 1,
           (long long)skipped, seconds);
    free(losses);
    free(norms);
    session_close(&s);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"device", required_argument, NULL, 'd'},
                                          {"bf16", no_argument, NULL, 'b'},
                                          {"fp16", no_argument, NULL, 'h'},
                                          {"fast", no_argument, NULL, 'f'},
                                          {"quant", required_argument, NULL, 'q'},
                                          {"stop", required_argument, NULL, 'n'},
                                          {"save", required_argument, NULL, 's'},
                                          {"from", required_argument, NULL, 'r'},
                                          {NULL, 0, NULL, 0}};
    curve_options o = {0};
    pml_cpu_prepare_process(argc, argv);
    for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (c) {
        case 'd':
            session_device = optarg;
            break;
        case 'b':
            session_dtype = PML_BF16;
            break;
        case 'h':
            session_dtype = PML_F16;
            break;
        case 'f':
            o.fast = true;
            break;
        case 'q':
            o.quant = optarg;
            break;
        case 'n':
            o.stop = atoll(optarg);
            break;
        case 's':
            o.save = optarg;
            break;
        case 'r':
            o.from = optarg;
            break;
        default:
            return EXIT_FAILURE;
        }
    }
    if (argc - optind != 2) {
        fputs("usage: test_curve FOLDER CASE [--device cuda] [--bf16 | --fp16] [--fast] "
              "[--quant fp8] [--stop N] [--save CHECKPOINT] [--from CHECKPOINT]\n",
              stderr);
        return EXIT_FAILURE;
    }
    run(argv[optind], argv[optind + 1], &o);
    return EXIT_SUCCESS;
}
