/* Learning rates against what transformers' get_scheduler gives (schedule_curves.inc). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "pml/train/config.h"

typedef struct curve {
    const char *name;
    int64_t warmup, total;
    double learning_rate;
    const char *keywords;
    double rates[24];
} curve;

typedef struct measured_curve {
    const char *name;
    double learning_rate;
    const char *keywords;
    double losses[24], rates[24];
} measured_curve;

/* clang-format off */
#include "schedule_curves.inc"
/* clang-format on */

/* run.json's words as a schedule. */
static pml_schedule schedule_of(const char *name, int64_t warmup, double rate, const char *keywords)
{
    pml_schedule schedule = {.warmup_steps = warmup, .learning_rate = rate};
    pml_message *record = NULL;
    pml_error err = PML_ERROR_INIT;
    if (pml_message_parse_as(PML_RECORD_schedule, keywords, strlen(keywords), &record, &err) !=
            PML_OK ||
        pml_schedule_from_name(name, &schedule.type, &err) != PML_OK)
        fail_msg("%s %s: %s", name, keywords, err.message);
    pml_schedule_set_keywords(&schedule, record);
    pml_message_destroy(&record);
    return schedule;
}

/* constant takes no keyword here, and transformers ignores it. */
static void test_factors(void **state)
{
    (void)state;
    for (size_t c = 0; c < sizeof curves / sizeof *curves; c++) {
        const curve *want = &curves[c];
        pml_schedule schedule =
            schedule_of(want->name, want->warmup, want->learning_rate, want->keywords);
        assert_int_equal(pml_schedule_check(&schedule, NULL), PML_OK);
        for (int64_t step = 0; step < CURVE_STEPS; step++) {
            double got = want->learning_rate * pml_schedule_factor(&schedule, step, want->total);
            if (fabs(got - want->rates[step]) > 1e-15 * want->learning_rate)
                fail_msg("%s %s at step %lld: %.17g, expected %.17g", want->name, want->keywords,
                         (long long)step, got, want->rates[step]);
        }
    }
}

/* A run that is interrupted after each evaluation goes on from what state.json keeps. */
static void through_file(pml_schedule *schedule, pml_schedule_state *state)
{
    pml_json_writer *w;
    pml_json *document;
    char *text;
    size_t size;
    assert_int_equal(pml_json_writer_new(&w, NULL), PML_OK);
    pml_schedule_write(w, schedule, state);
    assert_int_equal(pml_json_writer_finish(w, 0, &text, &size, NULL), PML_OK);
    pml_json_writer_destroy(&w);
    pml_schedule before = *schedule;
    memset(schedule, 0x5a, sizeof *schedule);
    memset(state, 0x5a, sizeof *state);
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_json_parse(text, size, "state", &pml_json_file_limits, &document, &err),
                     PML_OK);
    if (pml_schedule_read(pml_json_root(document, "state"), schedule, state, &err) != PML_OK)
        fail_msg("%s", err.message);
    assert_true(pml_schedule_same(schedule, &before));
    pml_json_destroy(&document);
    free(text);
}

static void test_measured(void **state)
{
    (void)state;
    int fell = 0, rose = 0, smooth = 0;
    for (size_t c = 0; c < sizeof measured_curves / sizeof *measured_curves; c++) {
        const measured_curve *want = &measured_curves[c];
        pml_schedule schedule = schedule_of(want->name, 0, want->learning_rate, want->keywords);
        pml_schedule_state stands;
        assert_true(pml_schedule_measures(&schedule));
        pml_schedule_begin(&schedule, &stands);
        for (int i = 0; i < CURVE_STEPS; i++) {
            double before = stands.factor;
            pml_schedule_measured(&schedule, &stands, want->learning_rate, want->losses[i]);
            double got = want->learning_rate * stands.factor;
            if (fabs(got - want->rates[i]) > 1e-15)
                fail_msg("%s %s after evaluation %d: %.17g, expected %.17g", want->name,
                         want->keywords, i + 1, got, want->rates[i]);
            fell += stands.factor < before;
            rose += stands.factor > before;
            through_file(&schedule, &stands);
        }
        if (stands.n_window > 0) { /* an evaluation that is NaN does not stay in the mean */
            double sum = stands.sum;
            pml_schedule_measured(&schedule, &stands, want->learning_rate, NAN);
            assert_true(stands.sum == sum);
            through_file(&schedule, &stands);
        }
        smooth += stands.n_window > 0;
    }
    assert_true(fell > 5 && rose > 5 && smooth > 0);
}

/* A file that says another length than a window can have is refused, not followed. */
static void test_windows_of_a_file(void **state)
{
    (void)state;
    static const struct {
        const char *size, *window;
    } files[] = {{"1e9", "[1]"}, {"-1", "[1]"}, {"2", "[1, 2, 3]"}, {"2", "[1, \"x\"]"}};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char text[512];
        pml_json *document;
        pml_schedule schedule;
        pml_schedule_state stands;
        pml_error err = PML_ERROR_INIT;
        int n =
            snprintf(text, sizeof text,
                     "{\"type\": \"greedy\", \"warmup_steps\": 0, \"learning_rate\": 1, "
                     "\"keywords\": {\"window_size\": %s}, \"factor\": 1, \"best\": 1, "
                     "\"measured\": 1, \"bad\": 0, \"good\": 0, \"cooldown\": 0, \"warmup\": 0, "
                     "\"reset\": 1, \"sum\": 1, \"window\": %s}",
                     files[i].size, files[i].window);
        assert_int_equal(
            pml_json_parse(text, (size_t)n, "state", &pml_json_file_limits, &document, &err),
            PML_OK);
        assert_int_equal(
            pml_schedule_read(pml_json_root(document, "state"), &schedule, &stands, &err),
            PML_INVALID);
        assert_non_null(strstr(err.message, "window"));
        pml_json_destroy(&document);
    }
}

static void refuse(const char *name, const char *keywords, const char *word)
{
    pml_error err = PML_ERROR_INIT;
    pml_schedule schedule = schedule_of(name, 0, 1e-3, keywords);
    assert_int_equal(pml_schedule_check(&schedule, &err), PML_INVALID);
    if (strstr(err.message, word) == NULL)
        fail_msg("%s %s: %s", name, keywords, err.message);
}

static void test_keywords(void **state)
{
    (void)state;
    refuse("linear", "{\"num_cycles\": 1}", "linear has no keyword num_cycles; it has none");
    refuse("cosine", "{\"min_lr\": 1e-5}", "cosine has no keyword min_lr; it has num_cycles");
    refuse("cosine_with_min_lr", "{}", "min_lr and min_lr_rate");
    refuse("cosine_with_min_lr", "{\"min_lr\": 0, \"min_lr_rate\": 0}", "one of min_lr");
    refuse("polynomial", "{\"lr_end\": 0.01}", "lr_end");
    refuse("warmup_stable_decay", "{\"num_stable_steps\": 2}", "num_decay_steps");
    refuse("reduce_lr_on_plateau", "{\"factor\": 1}", "factor");
    refuse("reduce_lr_on_plateau", "{\"max_lr\": 1}", "max_lr");
    pml_message *record = NULL;
    static const char unknown[] = "{\"cycles\": 1}";
    assert_int_equal(
        pml_message_parse_as(PML_RECORD_schedule, unknown, sizeof unknown - 1, &record, NULL),
        PML_INVALID);
}

static void test_names(void **state)
{
    (void)state;
    for (int i = 0; i < PML_SCHEDULE_COUNT; i++) {
        pml_schedule_type type = PML_SCHEDULE_COUNT;
        const char *name = pml_schedule_name((pml_schedule_type)i);
        assert_int_equal(pml_schedule_from_name(name, &type, NULL), PML_OK);
        assert_int_equal(type, i);
    }
    pml_schedule_type type;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_schedule_from_name("cosin", &type, &err), PML_INVALID);
    assert_non_null(strstr(err.message, "'cosine'"));
    assert_int_equal(pml_schedule_from_name("", &type, &err), PML_INVALID);
}

/* Steps of epochs are rounded up; so is a warmup that is a share of them. */
static void test_complete(void **state)
{
    (void)state;
    pml_train_config config = {.warmup_ratio = 0.1};
    pml_train_config_complete(&config, 1.5, 7);
    assert_int_equal(config.max_steps, 11);
    assert_int_equal(config.schedule.warmup_steps, 2);
    config = (pml_train_config){.warmup_ratio = 0.1, .schedule.warmup_steps = 5, .max_steps = 30};
    pml_train_config_complete(&config, 1, 7);
    assert_int_equal(config.max_steps, 30);
    assert_int_equal(config.schedule.warmup_steps, 5);
}

static pml_train_config valid(void)
{
    return (pml_train_config){.model = "m",
                              .dtype = PML_F32,
                              .lora_rank = 4,
                              .lora_alpha = 8,
                              .lora_targets = PML_TARGET_Q,
                              .max_steps = 10,
                              .learning_rate = 1e-3,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .epsilon = 1e-8,
                              .batch_size = 1,
                              .accumulation = 1,
                              .max_length = 16};
}

#define REFUSED(field, value, status, word)                                                        \
    do {                                                                                           \
        pml_train_config config = valid();                                                         \
        pml_error err = PML_ERROR_INIT;                                                            \
        config.field = value;                                                                      \
        assert_int_equal(pml_train_config_check(&config, &err), status);                           \
        assert_non_null(strstr(err.message, word));                                                \
    } while (0)

static void test_config(void **state)
{
    (void)state;
    pml_train_config good = valid();
    assert_int_equal(pml_train_config_check(&good, NULL), PML_OK);
    REFUSED(learning_rate, -1, PML_INVALID, "learning_rate");
    REFUSED(learning_rate, NAN, PML_INVALID, "learning_rate");
    REFUSED(beta2, 1, PML_INVALID, "adam_beta2");
    REFUSED(lora_dropout, 1, PML_INVALID, "lora_dropout");
    REFUSED(max_grad_norm, INFINITY, PML_INVALID, "max_grad_norm");
    REFUSED(max_steps, 0, PML_INVALID, "max_steps");
    REFUSED(batch_size, 0, PML_INVALID, "per_device_train_batch_size");
    REFUSED(accumulation, 0, PML_INVALID, "gradient_accumulation_steps");
    REFUSED(lora_rank, 0, PML_INVALID, "lora r");
    REFUSED(lora_alpha, 0, PML_INVALID, "lora_alpha");
    REFUSED(lora_targets, 0, PML_INVALID, "target_modules");
    REFUSED(lora_targets, 0x80, PML_INVALID, "target_modules");
    REFUSED(momentum, 1, PML_INVALID, "momentum");
    REFUSED(nesterov, true, PML_INVALID, "nesterov");
    REFUSED(warmup_ratio, 1, PML_INVALID, "warmup_ratio");
    REFUSED(schedule.type, PML_SCHEDULE_GREEDY, PML_INVALID, "eval_data");
    REFUSED(schedule.given, 1, PML_INVALID, "num_cycles");
    REFUSED(dtype, PML_F64, PML_UNSUPPORTED, "F64");
    REFUSED(model[0], '\0', PML_INVALID, "model");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_factors),
        cmocka_unit_test(test_measured),
        cmocka_unit_test(test_windows_of_a_file),
        cmocka_unit_test(test_keywords),
        cmocka_unit_test(test_complete),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_config),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
