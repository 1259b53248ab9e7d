/* Parity: the same losses, gradients, curves and greedy tokens as transformers and PEFT in float32.
 *
 *   parity [--cuda [--bf16]] FIXTURES [case…]        fixtures come from
 * tools/fixtures/make_parity.py */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml_op/cpu.h"
#include "session.h"

static const char *const cases[] = {
    "llama-tied-full",    "llama-untied-lora", "llama-biased-lora", "qwen2-tied-lora",
    "qwen2-untied-full",  "llama-biased-full", "llama-bf16-lora",   "mistral-window-full",
    "mistral-yarn-lora",  "qwen2-window-lora", "qwen3-tied-full",   "qwen3-layers-lora",
    "llama-dynamic-lora", "llama-nf4-lora",    "qwen2-nf4-lora",    "qwen3-mixed-lora",
    "llama-saved-lora",   "llama-upper-lora"};

static double loss_limit = 1e-5, gradient_limit = 1e-4, curve_limit = 1e-4;
static const double adapter_limit = 5e-3; /* of the largest element */

/* In bfloat16 a gradient is held to its direction, and losses and norms to what 8 bits can tell;
 * the greedy tokens of a random model are then a matter of luck. */
static bool narrow;
static const double least_cosine = 0.995;

static const void *expected(const pml_safetensors *file, const char *name, size_t *n)
{
    const pml_stored *stored = pml_safetensors_find(file, name);
    if (stored == NULL) {
        printf("fixture has no '%s'\n", name);
        exit(EXIT_FAILURE);
    }
    *n = (size_t)stored->elements;
    return stored->data;
}

static double expected_double(const pml_safetensors *file, const char *name, size_t index)
{
    size_t n;
    const char *data = expected(file, name, &n);
    double value;
    memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
}

static void close_to(const char *what, double got, double want, double limit)
{
    double distance = fabs(got - want) / fabs(want);
    check(distance <= limit, "%s is %.9g, expected %.9g (%.1e apart)", what, got, want, distance);
}

static void check_evaluation(session *s, const char *name, const pml_safetensors *file)
{
    double loss = 0;
    int64_t labels = 0;
    char what[128];
    pml_cursor cursor = {0, 0};
    while (cursor.epoch == 0) {
        for (int32_t i = 0; i < pml_sampler_micros(s->sampler, cursor); i++) {
            pml_batch batch;
            MUST(pml_sampler_batch(s->sampler, cursor, i, &batch, err));
            MUST(pml_stepper_evaluate(s->stepper, &batch, &loss, err));
            labels += batch.n_labels;
        }
        cursor = pml_sampler_next(s->sampler, cursor);
    }
    snprintf(what, sizeof what, "%s: evaluation loss", name);
    close_to(what, loss / (double)labels, expected_double(file, "evaluation_loss", 0), loss_limit);
}

static double cosine(const float *a, const float *b, size_t n)
{
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; i++) {
        ab += (double)a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
    }
    return aa == 0 && bb == 0 ? 1 : ab / sqrt(aa * bb);
}

/* Gradients of the sum of losses, as they stand before update(), against those of the mean. */
static void check_gradients(session *s, const char *name, const pml_safetensors *file,
                            int64_t labels)
{
    float *gradients = session_read(s, PML_STATE_GRAD), *at = gradients;
    double worst = 0;
    for (int i = 0; i < pml_stepper_trainable_count(s->stepper); i++) {
        const char *tensor;
        int64_t rows, cols;
        char key[192];
        size_t n;
        pml_stepper_trainable(s->stepper, i, &tensor, &rows, &cols, NULL);
        snprintf(key, sizeof key, "grad.%s", tensor);
        float *want = malloc((size_t)(rows * cols) * sizeof *want);
        const void *stored = expected(file, key, &n);
        if (want == NULL || n != (size_t)(rows * cols))
            exit(EXIT_FAILURE);
        memcpy(want, stored, n * sizeof *want);
        for (size_t e = 0; e < n; e++)
            at[e] /= (float)labels;
        double distance = narrow ? 1 - cosine(at, want, n) : relative_distance(at, want, n);
        worst = fmax(worst, distance);
        check(distance <= (narrow ? 1 - least_cosine : gradient_limit),
              "%s: gradient of %s is %.1e apart", name, tensor, distance);
        free(want);
        at += n;
    }
    printf("%-20s worst gradient %.1e", name, worst);
    free(gradients);
}

enum { NEW_TOKENS = 20 }; /* as the fixtures were made */

/* Copy a tensor of token ids; ends the program when it has none, or more than capacity. */
static size_t expected_ints(const pml_safetensors *file, const char *name, int32_t *out,
                            size_t capacity)
{
    size_t n;
    const void *stored = expected(file, name, &n);
    if (n == 0 || n > capacity) {
        printf("fixture's '%s' has %zu tokens, not 1 to %zu\n", name, n, capacity);
        exit(EXIT_FAILURE);
    }
    memcpy(out, stored, n * sizeof *out);
    return n;
}

static void check_greedy(session *s, const char *name, const pml_safetensors *file,
                         const char *which)
{
    int32_t prompt[64], want[NEW_TOKENS], got[NEW_TOKENS], n_got;
    size_t n_prompt = expected_ints(file, "prompt", prompt, sizeof prompt / sizeof *prompt);
    size_t n_want = expected_ints(file, which, want, NEW_TOKENS);
    const pml_generate_options options = {
        .prompt = prompt, .n_prompt = (int32_t)n_prompt, .max_new_tokens = NEW_TOKENS};
    MUST(pml_stepper_generate(s->stepper, &options, got, &n_got, err));
    check((size_t)n_got == n_want && memcmp(got, want, n_want * sizeof *want) == 0,
          "%s: %s differs after %d of %zu tokens", name, which, n_got, n_want);
}

/* The adapter after the last step, tensor by tensor. */
static void check_adapter(session *s, const char *name, const pml_safetensors *file)
{
    float *values = session_read(s, PML_STATE_VALUE), *at = values;
    double worst = 0;
    for (int i = 0; i < pml_stepper_trainable_count(s->stepper); i++) {
        const char *tensor;
        int64_t rows, cols;
        char key[192];
        size_t n;
        pml_stepper_trainable(s->stepper, i, &tensor, &rows, &cols, NULL);
        snprintf(key, sizeof key, "final.%s", tensor);
        const char *stored = expected(file, key, &n);
        check(n == (size_t)(rows * cols), "%s: %s has another size", name, key);
        double largest = 0, apart = 0;
        for (size_t e = 0; e < n; e++) {
            float want;
            memcpy(&want, stored + e * sizeof want, sizeof want);
            largest = fmax(largest, fabs((double)want));
            apart = fmax(apart, fabs((double)at[e] - want));
        }
        check(apart <= adapter_limit * largest, "%s: final %s is %.1e of %.1e apart", name, tensor,
              apart, largest);
        worst = fmax(worst, apart / largest);
        at += rows * cols;
    }
    printf(", adapter %.1e", worst);
    free(values);
}

static void check_case(const char *fixtures, const char *name)
{
    pml_train_config config;
    load_case(fixtures, name, &config);
    char path[2 * PML_PATH_MAX], what[128];
    snprintf(path, sizeof path, "%s/%s/expected.safetensors", fixtures, name);
    pml_safetensors *file;
    MUST(pml_safetensors_open(path, &file, err));
    session s;
    /* Long rows are to need several chunks of the head; the planner would take one. */
    session_open(
        &(session_options){.config = &config, .head_chunk = config.max_length > 64 ? 64 : 0}, &s);
    check_evaluation(&s, name, file);
    if (!narrow)
        check_greedy(&s, name, file, "greedy_before");

    /* The first step twice: once to look at its gradients, which update() of no effect clears. */
    int64_t labels = session_micros(&s, NULL);
    check_gradients(&s, name, file, labels);
    pml_step_result result;
    pml_update nothing = {.step = 1, .labels = 0};
    MUST(pml_stepper_update(s.stepper, &nothing, &result, err));
    check(result.skipped, "%s: an update without labels was not skipped", name);

    double worst = 0;
    for (size_t step = 0; step < (size_t)config.max_steps; step++) {
        result = session_step(&s, NULL);
        double want = expected_double(file, "loss", step);
        snprintf(what, sizeof what, "%s: loss of step %zu", name, step + 1);
        close_to(what, result.loss, want, step == 0 ? loss_limit : curve_limit);
        worst = fmax(worst, fabs(result.loss - want) / want);
        want = expected_double(file, "grad_norm", step);
        snprintf(what, sizeof what, "%s: gradient norm of step %zu", name, step + 1);
        close_to(what, result.grad_norm, want, curve_limit);
        worst = fmax(worst, fabs(result.grad_norm - want) / want);
        check(!result.skipped, "%s: step %zu was skipped", name, step + 1);
    }
    printf(", curves %.1e", worst);
    if (config.method == PML_METHOD_LORA && config.quant == PML_QUANT_NONE && !narrow)
        check_adapter(&s, name, file);
    putchar('\n');
    if (!narrow)
        check_greedy(&s, name, file, "greedy_after");
    session_close(&s);
    pml_safetensors_close(&file);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    int at = 1;
    for (; at < argc && strncmp(argv[at], "--", 2) == 0; at++) {
        if (strcmp(argv[at], "--bf16") == 0) {
            narrow = true;
            session_dtype = PML_BF16;
            loss_limit = 5e-3;
            curve_limit = 5e-2;
        } else {
            session_device = argv[at] + 2;
        }
    }
    if (at >= argc) {
        fprintf(stderr, "usage: parity [--cuda [--bf16]] FIXTURES [case…]\n");
        return EXIT_FAILURE;
    }
    const char *fixtures = argv[at++];
    for (size_t i = 0; argc == at && i < sizeof cases / sizeof *cases; i++)
        check_case(fixtures, cases[i]);
    for (; at < argc; at++)
        check_case(fixtures, argv[at]);
    return summary();
}
