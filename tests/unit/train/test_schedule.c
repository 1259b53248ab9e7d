/* Learning-rate factors against numbers printed by transformers 5.23's get_scheduler. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "pml/train/config.h"

typedef struct curve {
    pml_schedule schedule;
    int64_t warmup, total;
    double factors[12];
} curve;

static const curve curves[] = {
    {PML_SCHEDULE_LINEAR,
     3,
     10,
     {0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.8571428571428571, 0.7142857142857143,
      0.5714285714285714, 0.42857142857142855, 0.2857142857142857, 0.14285714285714285, 0.0, 0.0}},
    {PML_SCHEDULE_COSINE,
     3,
     10,
     {0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.9504844339512095, 0.8117449009293668,
      0.6112604669781572, 0.38873953302184283, 0.18825509907063326, 0.04951556604879048, 0.0,
      0.04951556604879043}},
    {PML_SCHEDULE_CONSTANT_WITH_WARMUP,
     3,
     10,
     {0.0, 0.3333333333333333, 0.6666666666666666, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {PML_SCHEDULE_CONSTANT, 3, 10, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
    {PML_SCHEDULE_LINEAR, 0, 4, {1.0, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0, 0, 0}},
};

static void test_factors(void **state)
{
    (void)state;
    for (size_t c = 0; c < sizeof curves / sizeof *curves; c++)
        for (int64_t step = 0; step < 12; step++) {
            double got =
                pml_schedule_factor(curves[c].schedule, step, curves[c].warmup, curves[c].total);
            if (fabs(got - curves[c].factors[step]) > 1e-15)
                fail_msg("%s at step %lld: %.17g, expected %.17g",
                         pml_schedule_name(curves[c].schedule), (long long)step, got,
                         curves[c].factors[step]);
        }
}

static void test_names(void **state)
{
    (void)state;
    for (int i = 0; i <= PML_SCHEDULE_CONSTANT_WITH_WARMUP; i++) {
        pml_schedule schedule = PML_SCHEDULE_CONSTANT;
        const char *name = pml_schedule_name((pml_schedule)i);
        assert_int_equal(pml_schedule_from_name(name, &schedule, NULL), PML_OK);
        assert_int_equal(schedule, i);
    }
    pml_schedule schedule;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_schedule_from_name("cosin", &schedule, &err), PML_INVALID);
    assert_non_null(strstr(err.message, "'cosine'"));
    assert_int_equal(pml_schedule_from_name("", &schedule, &err), PML_INVALID);
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
    REFUSED(dtype, PML_BF16, PML_UNSUPPORTED, "BF16");
    REFUSED(model[0], '\0', PML_INVALID, "model");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_factors),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_config),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
