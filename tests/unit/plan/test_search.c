/* Plans: which one is found for which limit, and what it is told by. */
#include "small.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/json.h"
#include "pml/plan/rates.h"

static pml_status plan_batch(const pml_batch_limits *of, size_t available, pml_plan *plan,
                             pml_error *err)
{
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    return pml_plan_make(&small, &config, of, pml_backend_cpu(), available, plan, err);
}

static pml_status plan_within(size_t available, pml_plan *plan, pml_error *err)
{
    return plan_batch(&limits, available, plan, err);
}

/* Less memory, more recompute or more pieces, never beyond the limit; and the plan is what the
 * program takes. limits: whole has one document, that cannot be cut. */
static void check_search(const pml_batch_limits *of, unsigned all_levels, int32_t pieces)
{
    pml_plan best, tight;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(plan_batch(of, 0, &best, &err), PML_OK);
    assert_int_equal(best.choices.recompute, PML_RECOMPUTE_NONE);
    assert_int_equal(best.choices.pieces, 1);
    pml_plan_choices last = best.choices;
    unsigned levels = 0;
    size_t available = best.total;
    pml_status status;
    while ((status = plan_batch(of, available, &tight, &err)) == PML_OK) {
        assert_true(tight.total <= available);
        assert_true(tight.flops >= best.flops);
        levels |= 1U << tight.choices.recompute;
        last = tight.choices;
        available = tight.total - 1;
    }
    assert_int_equal(status, PML_NO_MEMORY);
    assert_int_equal(levels & all_levels, all_levels); /* each was the best for some limit */
    assert_int_equal(last.pieces, pieces);
    assert_non_null(strstr(err.message, " fits")); /* the nearest settings that do */
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    pml_program *p;
    assert_int_equal(pml_plan_build(&tight, &small, &config, pml_backend_cpu(), &p, &err), PML_OK);
    assert_int_equal(p->arena, tight.arena);
    pml_program_destroy(&p);
}

static void test_search(void **state)
{
    (void)state;
    const pml_batch_limits one = {512, 1, 500, 512, 0};
    check_search(&one, (1U << PML_RECOMPUTE_COUNT) - 1, 1);
    check_search(&limits, 1U << PML_RECOMPUTE_NONE, 4);
}

/* What a refusal says is needed is enough. */
static void test_what_is_needed_fits(void **state)
{
    (void)state;
    for (int32_t n = 40; n < 1000; n += 67) {
        const pml_batch_limits one = {n, 1, n, n, n};
        pml_plan needed, plan;
        pml_error err = PML_ERROR_INIT;
        assert_int_equal(plan_batch(&one, 1, &needed, NULL), PML_NO_MEMORY);
        size_t room = pml_plan_room(needed.total);
        assert_int_equal(plan_batch(&one, room, &plan, &err), PML_OK);
        assert_true(plan.total <= room);
    }
}

/* Where many bytes cost next to no time they are not kept, limit or none: by pieces, or by norms
 * made again where one document cannot be cut; where few do, or the memory is a GPU's, all is kept.
 */
static void test_memory_that_is_spared(void **state)
{
    (void)state;
    pml_model_spec wide = small;
    wide.hidden = 1024;
    wide.intermediate = 4096;
    wide.heads = wide.kv_heads = 16;
    wide.head_dim = 64;
    pml_backend gpu = *pml_backend_cpu();
    gpu.name = "cuda";
    gpu.op.offload = NULL;
    const pml_batch_limits rows = {2048, 4, 2000, 512, 0}, row = {2048, 1, 2000, 2048, 0};
    const pml_batch_limits many = {16384, 32, 16000, 512, 0};
    const struct {
        const pml_model_spec *spec;
        const pml_batch_limits *batch;
        const pml_backend *backend;
        size_t spared; /* MiB at least */
        int threads, pieces, recompute;
    } cases[] = {{&small, &rows, pml_backend_cpu(), 0, 2, 1, PML_RECOMPUTE_NONE},
                 {&wide, &rows, &gpu, 0, 2, 1, PML_RECOMPUTE_NONE},
                 {&wide, &rows, pml_backend_cpu(), 48, 2, 1, PML_RECOMPUTE_NORMS},
                 {&wide, &many, pml_backend_cpu(), 512, 2, 2, PML_RECOMPUTE_NONE},
                 {&wide, &many, pml_backend_cpu(), 256, 16, 1, PML_RECOMPUTE_NORMS},
                 {&wide, &row, pml_backend_cpu(), 48, 2, 1, PML_RECOMPUTE_NORMS}};
    const pml_plan_choices all_kept = {.pieces = 1, .head_chunk = 512};
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t limit = 0; limit <= (size_t)8 << 30; limit += (size_t)8 << 30) {
            pml_plan plan, kept;
            pml_error err = PML_ERROR_INIT;
            config.threads = cases[i].threads;
            assert_int_equal(pml_plan_make(cases[i].spec, &config, cases[i].batch, cases[i].backend,
                                           limit, &plan, &err),
                             PML_OK);
            assert_int_equal(plan.choices.pieces, cases[i].pieces);
            assert_int_equal(plan.choices.recompute, cases[i].recompute);
            assert_int_equal(pml_plan_given(cases[i].spec, &config, cases[i].batch,
                                            cases[i].backend, &all_kept, &kept, &err),
                             PML_OK);
            assert_true(plan.seconds <= 1.005 * kept.seconds);
            assert_true(plan.total + (cases[i].spared << 20) <= kept.total);
        }
}

/* What a GPU has left holds NF4's numbers instead of codes, more of them the more there is;
 * recompute and pieces come first. Without a limit to go by, on a CPU and without NF4 nothing is
 * unpacked. */
static void test_unpacked(void **state)
{
    (void)state;
    pml_backend gpu = *pml_backend_cpu();
    gpu.name = "cuda";
    gpu.op.offload = NULL; /* else layers wait on the host for more weights to be unpacked */
    const int32_t all = small.layers * 4;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    pml_plan plan, packed;
    pml_error err = PML_ERROR_INIT;
    const size_t plenty = (size_t)4 << 30;
    assert_int_equal(pml_plan_make(&small, &config, &limits, &gpu, plenty, &plan, &err), PML_OK);
    assert_int_equal(plan.choices.unpacked, 0);
    config.quant = PML_QUANT_NF4;
    assert_int_equal(
        pml_plan_make(&small, &config, &limits, pml_backend_cpu(), plenty, &plan, &err), PML_OK);
    assert_int_equal(plan.choices.unpacked, 0);
    assert_int_equal(pml_plan_make(&small, &config, &limits, &gpu, 0, &packed, &err), PML_OK);
    assert_int_equal(packed.choices.unpacked, 0);
    size_t available = plenty, seen = 0;
    int32_t last = all;
    while (pml_plan_make(&small, &config, &limits, &gpu, available, &plan, &err) == PML_OK &&
           plan.total > packed.total) {
        assert_true(plan.total <= available);
        assert_int_equal(plan.choices.recompute, PML_RECOMPUTE_NONE);
        assert_int_equal(plan.choices.pieces, 1);
        assert_true(seen == 0 ? plan.choices.unpacked == all : plan.choices.unpacked < last);
        assert_true(plan.seconds < packed.seconds);
        last = plan.choices.unpacked;
        available = (plan.total + packed.total) / 2; /* half of what is left */
        seen++;
    }
    assert_true(seen >= 3 && last > 0);
    assert_int_equal(err.code, PML_OK);
    assert_int_equal(plan.choices.unpacked, 0); /* the next smaller is the packed one */
    /* Given its other choices again, what is left is spent anew, in a program that has its size. */
    pml_plan_choices choices = packed.choices;
    assert_int_equal(pml_plan_given(&small, &config, &limits, &gpu, &choices, &plan, &err), PML_OK);
    assert_int_equal(pml_plan_unpack(&small, &config, &limits, &gpu, plenty, &plan, &err), PML_OK);
    assert_int_equal(plan.choices.unpacked, all);
    pml_program *p;
    assert_int_equal(pml_plan_build(&plan, &small, &config, &gpu, &p, &err), PML_OK);
    assert_int_equal(p->arena, plan.arena);
    for (int32_t n = 0; n < p->n_nodes; n++)
        assert_int_not_equal(p->nodes[n].op, PML_OP_nf4_dequantise);
    pml_program_destroy(&p);
    choices.unpacked = all + 1;
    assert_int_equal(pml_plan_given(&small, &config, &limits, &gpu, &choices, &plan, NULL),
                     PML_INVALID);
}

/* The estimate is not above what the places take, and not far below. */
static void test_estimate(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_FULL, 0);
    for (int level = 0; level < PML_RECOMPUTE_COUNT; level++) {
        pml_error err = PML_ERROR_INIT;
        pml_program *p[2];
        for (int estimate = 0; estimate < 2; estimate++) {
            const pml_program_options options = {
                .spec = &small,
                .config = &config,
                .limits = limits,
                .backend = pml_backend_cpu(),
                .choices = {.recompute = level,
                            .recompute_layers = level > 0 ? small.layers : 0,
                            .head_chunk = 64,
                            .pieces = 1},
                .estimate = estimate};
            assert_int_equal(pml_program_build(&options, &p[estimate], &err), PML_OK);
        }
        assert_true(p[1]->arena <= p[0]->arena && p[1]->arena > p[0]->arena * 9 / 10);
        assert_int_equal(pml_program_check_places(p[0], &err), PML_OK);
        pml_program_destroy(&p[0]);
        pml_program_destroy(&p[1]);
    }
}

static void test_rates(void **state)
{
    (void)state;
    pml_rates rates;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_rates_get("cpu", &rates, &err), PML_OK);
    double before = rates.op[PML_OP_rope].flops;
    static const char text[] = "{\"linear\": {\"gflops\": 2, \"gbytes\": 4, \"microseconds\": 3}}";
    assert_int_equal(pml_rates_parse(text, sizeof text - 1, "t", &rates, &err), PML_OK);
    assert_true(fabs(pml_rates_seconds(&rates, PML_OP_linear,
                                       (pml_cost){.flops = 4e9, .bytes = 4e9, .narrow = 0}) -
                     2.000003) < 1e-9);
    assert_true(fabs(pml_rates_seconds(&rates, PML_OP_linear,
                                       (pml_cost){.flops = 4e9, .bytes = 16e9, .narrow = 0}) -
                     4.000003) < 1e-9);
    rates.narrow = 2; /* of 4 G operations 2 in 8 bits */
    assert_true(fabs(pml_rates_seconds(&rates, PML_OP_linear,
                                       (pml_cost){.flops = 4e9, .bytes = 4e9, .narrow = 2e9}) -
                     1.500003) < 1e-9);
    assert_true(rates.op[PML_OP_rope].flops == before);
    assert_string_equal(rates.source, "t");
    for (int i = 0; i < 2; i++) { /* whose prices they are is told with them */
        assert_int_equal(pml_rates_get(i == 0 ? "cpu" : "cuda", &rates, &err), PML_OK);
        assert_non_null(strstr(rates.source, "docs/performance"));
        assert_non_null(strstr(rates.source, "20"));
    }
    static const char bad[] = "{\"linear\": {\"gflops\": 0}}";
    assert_int_equal(pml_rates_parse(bad, sizeof bad - 1, "t", &rates, &err), PML_INVALID);
    assert_non_null(strstr(err.message, "linear.gflops"));
}

/* Left open, AdamW keeps float32 moments while memory lasts, and has 8 bits where nothing else fits
 * or what they save in recompute is worth it; closed, it is refused there and told so. */
static void test_optimizer_width(void **state)
{
    (void)state;
    pml_train_config wide = config_for(PML_METHOD_FULL, 0), open = wide, narrow = wide;
    open.optimizer = PML_OPTIMIZER_ADAMW_AUTO;
    narrow.optimizer = PML_OPTIMIZER_ADAMW_8BIT;
    pml_plan best, plan;
    pml_error err = PML_ERROR_INIT;
    const pml_backend *cpu = pml_backend_cpu();
    assert_int_equal(pml_plan_make(&small, &wide, &limits, cpu, 0, &best, &err), PML_OK);
    assert_int_equal(pml_plan_make(&small, &open, &limits, cpu, 0, &plan, &err), PML_OK);
    assert_int_equal(plan.choices.moments_8bit, 0);
    assert_int_equal(plan.total, best.total);
    size_t available = best.total; /* down to where float32 moments do not fit any more */
    while (pml_plan_make(&small, &wide, &limits, cpu, available, &plan, &err) == PML_OK) {
        double seconds = plan.seconds;
        available = plan.total - 1;
        assert_int_equal(pml_plan_make(&small, &open, &limits, cpu, plan.total, &best, &err),
                         PML_OK);
        assert_true(best.choices.moments_8bit ? best.seconds < 0.98 * seconds
                                              : best.seconds == seconds);
    }
    assert_int_equal(err.code, PML_NO_MEMORY);
    assert_non_null(strstr(err.message, "optim=\"adamw_8bit\" fits"));
    assert_int_equal(pml_plan_make(&small, &narrow, &limits, cpu, available, &best, &err), PML_OK);
    assert_int_equal(pml_plan_make(&small, &open, &limits, cpu, available, &plan, &err), PML_OK);
    assert_int_equal(plan.choices.moments_8bit, 1);
    assert_int_equal(plan.total, best.total);
    assert_true(plan.total <= available);
    /* What was chosen once is given again, and is what a program is built for. */
    assert_int_equal(pml_plan_given(&small, &open, &limits, cpu, &plan.choices, &best, &err),
                     PML_OK);
    assert_int_equal(best.total, plan.total);
    pml_plan_settle(&plan.choices, &open);
    assert_int_equal(open.optimizer, PML_OPTIMIZER_ADAMW_8BIT);
    pml_program *p;
    assert_int_equal(pml_plan_build(&plan, &small, &open, cpu, &p, &err), PML_OK);
    assert_true(p->exp_avg_codes >= 0);
    pml_program_destroy(&p);
}

static void test_nothing_fits(void **state)
{
    (void)state;
    pml_plan plan;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(plan_within(1 << 20, &plan, &err), PML_NO_MEMORY);
    assert_non_null(strstr(err.message, "smaller model"));
    /* What is available is said as it was given; the margin is part of what is needed. */
    assert_non_null(strstr(err.message, "5.0 MiB are available"));
    assert_non_null(strstr(err.message, "4 MiB to spare"));
    assert_int_equal(plan_within(pml_plan_room(1 << 20), &plan, &err), PML_NO_MEMORY);
    assert_non_null(strstr(err.message, "less than that is available"));
}

static void test_impossible_limits(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    const pml_batch_limits none = {0, 1, 1, 1, 0}, long_documents = {16, 1, 1, 17, 0},
                           negative = {16, 1, 1, 16, -1};
    const pml_batch_limits *bad[] = {&none, &long_documents, &negative};
    for (int i = 0; i < 3; i++) {
        pml_plan plan;
        assert_int_equal(pml_plan_make(&small, &config, bad[i], pml_backend_cpu(), 0, &plan, NULL),
                         PML_INVALID);
    }
}

static void test_print(void **state)
{
    (void)state;
    pml_plan plan;
    pml_error err = PML_ERROR_INIT;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    assert_int_equal(plan_within(0, &plan, &err), PML_OK);
    char *text;
    assert_int_equal(pml_plan_print_program(&small, &config, &plan, pml_backend_cpu(), &text, &err),
                     PML_OK);
    assert_non_null(strstr(text, "attention backward"));
    assert_non_null(strstr(text, pml_op_describe(PML_OP_swiglu)->sentence));
    pml_json *document;
    assert_int_equal(
        pml_json_parse(text, strlen(text), "program", &pml_json_file_limits, &document, &err),
        PML_OK);
    assert_int_equal(pml_json_length(pml_json_field(document, "segments")), PML_SEGMENT_COUNT);
    pml_json_destroy(&document);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_search),
        cmocka_unit_test(test_memory_that_is_spared),
        cmocka_unit_test(test_unpacked),
        cmocka_unit_test(test_estimate),
        cmocka_unit_test(test_rates),
        cmocka_unit_test(test_optimizer_width),
        cmocka_unit_test(test_what_is_needed_fits),
        cmocka_unit_test(test_nothing_fits),
        cmocka_unit_test(test_impossible_limits),
        cmocka_unit_test(test_print),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
