/* Activations that wait in host memory: what is sent and brought back, where it lies meanwhile, and
 * when a plan asks for it. That no bit changes is exactness.c's. */
#include "small.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pml_program *with_offload(const pml_train_config *config, pml_plan_choices choices)
{
    choices.head_chunk = 64;
    choices.pieces = 1;
    return built(&small, config, &limits, choices);
}

/* The same ops, and a driver that would be there: prices, context and chunks of a GPU. */
static pml_backend as_gpu(void)
{
    pml_backend gpu = *pml_backend_cpu();
    gpu.name = "cuda";
    return gpu;
}

typedef struct passage {
    int32_t offload, offloaded, fetch, fetched; /* nodes of one tensor, -1: none */
    int32_t host, back;
} passage;

/* Every tensor's way to the host and back, by its number. */
static passage *passages(const pml_program *p)
{
    passage *all = calloc((size_t)p->n_tensors, sizeof *all);
    int32_t *from = calloc((size_t)p->n_tensors, sizeof *from);
    assert_non_null(all);
    assert_non_null(from);
    memset(all, -1, (size_t)p->n_tensors * sizeof *all);
    memset(from, -1, (size_t)p->n_tensors * sizeof *from);
    for (int32_t n = 0; n < p->n_nodes; n++) {
        const pml_node *node = &p->nodes[n];
        int32_t x = node->operands[0].tensor, y = node->operands[1].tensor;
        if (node->op == PML_OP_offload) {
            assert_int_equal(all[x].offload, -1); /* once */
            all[x].offload = n;
            all[x].host = y;
            from[y] = x;
        } else if (node->op == PML_OP_fetch) {
            assert_true(from[x] >= 0);
            all[from[x]].fetch = n;
            all[from[x]].back = y;
            from[y] = from[x];
        } else if (node->op == PML_OP_await) {
            int32_t whose = from[x] >= 0 ? from[x] : x;
            *(from[x] >= 0 ? &all[whose].fetched : &all[whose].offloaded) = n;
        }
    }
    free(from);
    return all;
}

static bool writes(const pml_node *node, int operand)
{
    return strchr("OoUu", pml_op_describe(node->op)->signature[operand]) != NULL;
}

/* Between asking and awaiting nobody writes what is sent, and nobody touches what comes or where it
 * waits; after that only what came is read. */
static void check_hands_off(const pml_program *p, int32_t t, const passage *w)
{
    for (int32_t n = p->segments[PML_SEGMENT_MICRO].first; n < p->segments[PML_SEGMENT_MICRO].end;
         n++)
        for (int v = 0; v < pml_op_describe(p->nodes[n].op)->n_views; v++) {
            int32_t id = p->nodes[n].operands[v].tensor;
            if (id == t && n > w->offload)
                assert_true(n <= w->offloaded && !(n < w->offloaded && writes(&p->nodes[n], v)));
            if (id == w->back && n != w->fetch)
                assert_true(n >= w->fetched);
            if (id == w->host)
                assert_true(n == w->offload || n == w->fetch);
        }
}

/* Returns the bytes that go over the link once. */
static size_t check_passages(const pml_program *p, int32_t layers, int32_t most_on_the_way)
{
    passage *all = passages(p);
    size_t bytes = 0;
    bool seen[16] = {false};
    int32_t offloaded = 0;
    for (int32_t t = 0; t < p->n_tensors; t++) {
        const passage *w = &all[t];
        if (w->offload < 0)
            continue;
        const pml_tensor *here = &p->tensors[t], *host = &p->tensors[w->host],
                         *back = &p->tensors[w->back];
        assert_true(w->offload < w->offloaded && w->offloaded < w->fetch && w->fetch < w->fetched);
        assert_true(host->host && !here->host && !back->host);
        assert_true(host->rows == here->rows && host->cols == here->cols && host->border == 0);
        assert_true(back->rows == here->rows && back->cols == here->cols &&
                    back->border == here->border && back->dtype == here->dtype);
        check_hands_off(p, t, w);
        int32_t layer = p->nodes[w->offload].layer;
        offloaded += !seen[layer];
        seen[layer] = true;
        assert_in_range(p->nodes[w->fetched].layer, layer, layer); /* its own backward waits */
        bytes += (size_t)(host->rows * host->cols) * pml_dtype_size(host->dtype);
        int32_t other = 0; /* layers that come back at the same time */
        for (int32_t l = 0; l < p->spec.layers; l++)
            for (int32_t u = 0; u < p->n_tensors; u++)
                if (all[u].fetch >= 0 && all[u].fetch <= w->fetched && all[u].fetched > w->fetch &&
                    p->nodes[all[u].fetch].layer == l) {
                    other++;
                    break;
                }
        assert_true(other <= most_on_the_way);
    }
    assert_int_equal(offloaded, layers);
    free(all);
    return bytes;
}

/* At every level, spread or one after the other: what is sent comes back in time, the arena holds
 * less, and the host block holds all of it. */
static void test_there_and_back(void **state)
{
    (void)state;
    static const struct {
        pml_plan_choices choices;
        int32_t seen;
    } cases[] = {
        {{.offload = PML_RECOMPUTE_NONE, .offload_layers = 2}, 2},
        {{.offload = PML_RECOMPUTE_NORMS, .offload_layers = 5}, 5},
        {{PML_RECOMPUTE_LAYER, 4, .offload = PML_RECOMPUTE_ATTENTION, .offload_layers = 2}, 2},
        {{PML_RECOMPUTE_LAYER, 6, .offload = PML_RECOMPUTE_LAYER, .offload_layers = 5}, 5}};
    for (int method = 0; method < 2; method++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            pml_train_config config = config_for((pml_method)method, PML_TARGET_ALL_LINEAR);
            pml_plan_choices without = cases[i].choices;
            without.offload_layers = 0;
            pml_program *p = with_offload(&config, cases[i].choices),
                        *all = with_offload(&config, without);
            pml_error err = PML_ERROR_INIT;
            size_t bytes = check_passages(p, cases[i].seen, 2);
            assert_true(p->host_bytes >= bytes && p->host_bytes < bytes + bytes / 8);
            assert_int_equal(all->host_bytes, 0);
            assert_int_equal(pml_program_check_places(p, &err), PML_OK);
            /* An offloaded layer may keep more than the level around it does. */
            if (cases[i].choices.recompute == cases[i].choices.offload)
                assert_true(p->arena < all->arena);
            pml_program_destroy(&p);
            pml_program_destroy(&all);
        }
}

static void test_refused(void **state)
{
    (void)state;
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    static const pml_plan_choices bad[] = {
        {.offload_layers = 6},                         /* not the last layer */
        {PML_RECOMPUTE_LAYER, 3, .offload_layers = 4}, /* of three */
        {.offload = PML_RECOMPUTE_COUNT, .offload_layers = 1},
        {.offload_layers = -1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        pml_program_options options = {.spec = &small,
                                       .config = &config,
                                       .limits = limits,
                                       .backend = pml_backend_cpu(),
                                       .choices = bad[i]};
        options.choices.head_chunk = 64;
        options.choices.pieces = 1;
        pml_program *p;
        pml_error err = PML_ERROR_INIT;
        assert_int_equal(pml_program_build(&options, &p, &err), PML_INVALID);
        assert_non_null(strstr(err.message, "offloaded"));
    }
}

/* Prices at which a link is worth something for these small shapes. */
static void price(const char *gbytes)
{
    char path[] = "/tmp/pml-rates-XXXXXX", text[512];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *file = fdopen(fd, "w");
    assert_non_null(file);
    snprintf(text, sizeof text,
             "{\"linear\": {\"gflops\": 100}, \"linear_bwd\": {\"gflops\": 100}, "
             "\"offload\": {\"gbytes\": %s, \"microseconds\": 1}, "
             "\"fetch\": {\"gbytes\": %s, \"microseconds\": 1}, "
             "\"await\": {\"microseconds\": 0}}",
             gbytes, gbytes);
    assert_true(fputs(text, file) >= 0 && fclose(file) == 0);
    assert_int_equal(setenv("PANTHERAML_RATES", path, 1), 0);
}

static void forget_price(void)
{
    assert_int_equal(unlink(getenv("PANTHERAML_RATES")), 0);
    assert_int_equal(unsetenv("PANTHERAML_RATES"), 0);
}

/* One document that cannot be cut. With a link that is fast enough a limit makes layers wait on the
 * host instead of making them again; with a slow one it does only where nothing else fits. What is
 * chosen fits, is priced with what it waits for, and is no slower than without. */
static void test_search(void **state)
{
    (void)state;
    const pml_batch_limits one = {512, 1, 500, 512, 0};
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    const pml_backend gpu = as_gpu();
    static const char *const links[] = {"100", "0.01"};
    for (int slow = 0; slow < 2; slow++) {
        pml_plan best, plan;
        pml_error err = PML_ERROR_INIT;
        int used = 0, only = 0;
        price(links[slow]);
        assert_int_equal(pml_plan_make(&small, &config, &one, &gpu, 0, &best, &err), PML_OK);
        assert_int_equal(best.choices.offload_layers, 0); /* nothing is won where all fits */
        assert_true(best.host == 0 && best.link == 0 && best.waited == 0);
        size_t available = best.total;
        while (pml_plan_make(&small, &config, &one, &gpu, available, &plan, &err) == PML_OK) {
            assert_true(plan.total <= available && plan.seconds >= best.seconds);
            assert_true((plan.host > 0) == (plan.choices.offload_layers > 0));
            assert_true(plan.waited <= plan.link && (plan.link > 0) == (plan.host > 0));
            used += plan.host > 0;
            pml_plan_choices without = plan.choices;
            without.offload_layers = 0;
            without.recompute = PML_RECOMPUTE_LAYER;
            without.recompute_layers = small.layers;
            without.head_chunk = 8;
            pml_plan least;
            assert_int_equal(pml_plan_given(&small, &config, &one, &gpu, &without, &least, &err),
                             PML_OK);
            bool alone = least.total > available; /* without, nothing fits any more */
            only += alone && plan.host > 0;
            if (slow && !alone)
                assert_int_equal(plan.host, 0);
            available = plan.total - plan.arena / 64;
        }
        assert_int_equal(err.code, PML_NO_MEMORY);
        assert_true(only > 0);
        assert_true(slow || used > only);
        forget_price();
    }
}

static int programs; /* that were built: each asks once what a micro-batch's head works in */

static size_t counting(pml_device *device, pml_op op, const pml_op_args *args)
{
    programs += op == PML_OP_head_loss && args->head_loss.dx.data != NULL;
    return pml_backend_cpu()->workspace(device, op, args);
}

/* A search builds each candidate once, and none that cannot be the best: at limits all the way down
 * a model as deep as 8B's. Without either it is 1456. */
static void test_few_programs(void **state)
{
    (void)state;
    pml_model_spec deep = small;
    deep.layers = 32;
    const pml_batch_limits rows = {512, 4, 500, 128, 0};
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    config.quant = PML_QUANT_NF4;
    pml_backend gpu = as_gpu();
    gpu.workspace = counting;
    pml_plan best, plan;
    pml_error err = PML_ERROR_INIT;
    int most = 0;
    price("100");
    assert_int_equal(pml_plan_make(&deep, &config, &rows, &gpu, 0, &best, &err), PML_OK);
    size_t available = best.total - best.arena / 5;
    for (;; available -= best.arena / 5) {
        programs = 0;
        if (pml_plan_make(&deep, &config, &rows, &gpu, available, &plan, &err) != PML_OK)
            break;
        most = programs > most ? programs : most;
    }
    forget_price();
    assert_in_range(most, 1, 800); /* about 600 */
}

/* On the CPU it would be the same memory twice. */
static void test_not_on_the_cpu(void **state)
{
    (void)state;
    const pml_batch_limits one = {512, 1, 500, 512, 0};
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    pml_plan plan;
    pml_error err = PML_ERROR_INIT;
    price("100");
    assert_int_equal(pml_plan_make(&small, &config, &one, pml_backend_cpu(), 0, &plan, &err),
                     PML_OK);
    for (size_t available = plan.total;
         pml_plan_make(&small, &config, &one, pml_backend_cpu(), available, &plan, &err) == PML_OK;
         available = plan.total - plan.arena / 64)
        assert_int_equal(plan.choices.offload_layers, 0);
    forget_price();
}

/* A program's text names what waits where. */
static void test_print(void **state)
{
    (void)state;
    const pml_backend gpu = as_gpu();
    pml_train_config config = config_for(PML_METHOD_LORA, PML_TARGET_ALL_LINEAR);
    const pml_plan_choices choices = {.head_chunk = 64, .pieces = 1, .offload_layers = 2};
    pml_plan plan;
    pml_error err = PML_ERROR_INIT;
    char *text;
    assert_int_equal(pml_plan_given(&small, &config, &limits, &gpu, &choices, &plan, &err), PML_OK);
    assert_int_equal(pml_plan_print_program(&small, &config, &plan, &gpu, &text, &err), PML_OK);
    assert_non_null(strstr(text, "\"offload_layers\":2"));
    assert_non_null(strstr(text, "gate_up 2, on the host"));
    assert_non_null(strstr(text, "fetch awaited"));
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_there_and_back), cmocka_unit_test(test_refused),
        cmocka_unit_test(test_search),         cmocka_unit_test(test_not_on_the_cpu),
        cmocka_unit_test(test_print),          cmocka_unit_test(test_few_programs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
