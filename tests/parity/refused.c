/* Memory that is refused though it was planned, the device's or the host's: alone, and where others
 * plan with the device, too (pml_memory_claim). And what is trained then is what is trained where
 * the second plan is the first.
 *
 *   refused [--cuda [--bf16]] FIXTURES
 *
 * A backend that has its first allocations refused stands before the real one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml_op/cpu.h"
#include "session.h"

enum { STEPS = 4 };

static const pml_backend *real;
static int device_index;
static int refusals;        /* of the device's memory: so many come */
static size_t host_refused; /* bytes of host memory that are refused, once; 0: none */

/* What a claim is asked, and says: a device that others plan with, too. */
static struct {
    size_t left[2]; /* what is there for the first plan, and for the second */
    int turns, asked, settled, gave_up;
    bool turn;
    size_t bytes[2], taken, wanted;
    int returned; /* how often what was taken is not any more */
} played;

static pml_status played_begin(void *user, pml_error *err)
{
    (void)user, (void)err;
    check(!played.turn, "a turn begins in a turn");
    played.turn = true;
    played.turns++;
    return PML_OK;
}

static pml_status played_ask(void *user, const pml_device_info *info, size_t *bytes, pml_error *err)
{
    (void)user, (void)info, (void)err;
    check(played.turn && played.asked < 2, "asked without a turn, or too often");
    *bytes = played.left[played.asked++];
    return PML_OK;
}

static pml_status played_settle(void *user, size_t bytes, pml_error *err)
{
    (void)user, (void)err;
    check(played.turn, "settled without a turn");
    played.turn = false;
    played.bytes[played.settled++] = bytes;
    return PML_OK;
}

static void played_give_up(void *user, size_t wanted, pml_error *err)
{
    (void)user;
    played.wanted = wanted;
    played.turn = false;
    played.gave_up++;
    pml_error_prefix(err, "others have it");
}

static pml_status played_taken(void *user, size_t bytes, pml_error *err)
{
    (void)user, (void)err;
    played.returned += bytes == 0 && played.taken > 0;
    played.taken = bytes;
    return PML_OK;
}

static const pml_memory_claim played_claim = {.begin = played_begin,
                                              .ask = played_ask,
                                              .settle = played_settle,
                                              .give_up = played_give_up,
                                              .taken = played_taken};

/* The device's own words: it is asked for more than it has. */
static pml_status refuse_first(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    check(!played.turn, "the others wait while the device is asked for memory");
    *base = NULL;
    if (refusals-- <= 0)
        return real->alloc(device, bytes, base, err);
    pml_device_info info;
    pml_status status = real->info(device, &info, err);
    return status == PML_OK ? real->alloc(device, info.memory_total + bytes, base, err) : status;
}

static pml_status refuse_host(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    *base = NULL;
    if (bytes != host_refused)
        return real->host_alloc(device, bytes, base, err);
    host_refused = 0;
    return PML_FAIL(err, PML_NO_MEMORY, "refused");
}

static pml_backend refusing_backend(void)
{
    pml_backend refusing = *real;
    refusing.alloc = refuse_first;
    refusing.host_alloc = refuse_host;
    return refusing;
}

/* Room for more than the fixtures have: a sixteenth of all that a process on a GPU takes is less
 * than a plan in pieces saves. */
static pml_batch_limits wide(void)
{
    const int32_t times = strcmp(real->name, "cpu") == 0 ? 1 : 10;
    return (pml_batch_limits){6000 * times, 200 * times, 6000 * times, 64, 0};
}

static void load(const char *fixtures, const char *name, pml_train_config *config)
{
    load_case(fixtures, name, config);
    config->dtype = session_dtype;
}

static void check_second_plan(const char *fixtures)
{
    const pml_backend refusing = refusing_backend();
    pml_train_config config;
    pml_stepper *stepper;
    load(fixtures, "llama-untied-lora", &config);
    pml_stepper_options options = {.config = &config,
                                   .backend = &refusing,
                                   .device_index = device_index,
                                   .threads = 1,
                                   .limits = wide()};
    MUST(pml_stepper_new(&options, &stepper, err));
    const size_t first = pml_stepper_plan(stepper)->total;
    check(pml_stepper_note(stepper)[0] == '\0', "a first plan has no note");
    pml_plan_choices chosen = pml_stepper_plan(stepper)->choices;
    pml_stepper_destroy(&stepper);

    refusals = 1;
    MUST(pml_stepper_new(&options, &stepper, err));
    const size_t second = pml_stepper_plan(stepper)->total;
    check(second < first - first / 16, "the second plan is smaller: %zu of %zu", second, first);
    check(strstr(pml_stepper_note(stepper), "refused") != NULL, "and it says so: %s",
          pml_stepper_note(stepper));
    pml_stepper_destroy(&stepper);

    refusals = 2;
    pml_error why = PML_ERROR_INIT;
    check(pml_stepper_new(&options, &stepper, &why) == PML_NO_MEMORY && stepper == NULL,
          "refused twice it is told: %s", why.message);
    refusals = 1;
    options.choices = chosen; /* of an earlier run, whose bits are to be repeated */
    check(pml_stepper_new(&options, &stepper, NULL) == PML_NO_MEMORY && refusals == 0,
          "a plan that is given is not changed");
    refusals = 0;
}

static void play(size_t first, size_t second, int refused)
{
    memset(&played, 0, sizeof played);
    played.left[0] = first;
    played.left[1] = second;
    refusals = refused;
}

/* The same where memory is reserved: what others see is the plan that counts in the end, or no
 * plan. */
static void check_second_plan_of_a_claim(const char *fixtures)
{
    static const size_t PLENTY = (size_t)1 << 34;
    const pml_backend refusing = refusing_backend();
    pml_train_config config;
    pml_stepper *stepper;
    load(fixtures, "llama-untied-lora", &config);
    pml_stepper_options options = {.config = &config,
                                   .backend = &refusing,
                                   .device_index = device_index,
                                   .threads = 1,
                                   .limits = wide(),
                                   .claim = &played_claim};
    play(PLENTY, PLENTY, 0);
    MUST(pml_stepper_new(&options, &stepper, err));
    const size_t first = pml_stepper_plan(stepper)->total, taken = played.taken;
    check(played.turns == 1 && played.settled == 1 && played.bytes[0] == first,
          "one plan settles what it takes");
    check(taken > 0 && taken <= first, "and the arena is told: %zu of %zu", taken, first);
    pml_stepper_destroy(&stepper);

    /* The driver refuses though as much is there: a sixteenth less. */
    play(PLENTY, PLENTY, 1);
    MUST(pml_stepper_new(&options, &stepper, err));
    const size_t less = pml_stepper_plan(stepper)->total;
    check(played.turns == 2 && played.settled == 2 && played.gave_up == 0, "two plans, two turns");
    check(played.bytes[0] == first && played.bytes[1] == less && less < first - first / 16,
          "the second one is settled: %zu after %zu", played.bytes[1], played.bytes[0]);
    check(played.taken < taken, "of which less is taken: %zu", played.taken);
    pml_stepper_destroy(&stepper);

    /* Others have more by then: what is left counts. */
    play(PLENTY, first - first / 8, 1);
    MUST(pml_stepper_new(&options, &stepper, err));
    check(played.bytes[1] <= first - first / 8 &&
              pml_stepper_plan(stepper)->available == first - first / 8,
          "a plan for what is left: %zu", played.bytes[1]);
    pml_stepper_destroy(&stepper);

    /* Nothing fits in what is left, and the driver refuses twice: others do not wait for us, and
     * what was reserved is given up. */
    pml_error why = PML_ERROR_INIT;
    play(PLENTY, 1 << 20, 1);
    check(pml_stepper_new(&options, &stepper, &why) == PML_NO_MEMORY && played.gave_up == 1 &&
              !played.turn && strstr(why.message, "nothing smaller will do") != NULL &&
              strstr(why.message, "others have it") != NULL && played.wanted > 1 << 20,
          "no second plan is told, and what one needs (%zu): %s", played.wanted, why.message);
    why = (pml_error)PML_ERROR_INIT;
    play(PLENTY, PLENTY, 2);
    check(pml_stepper_new(&options, &stepper, &why) == PML_NO_MEMORY && played.settled == 2 &&
              played.gave_up == 1 && played.taken == 0 && played.wanted == 0 &&
              strstr(why.message, "others have it") != NULL,
          "a second refusal is told: %s", why.message);
    refusals = 0;
}

/* ---- what is trained ---- */

typedef struct trained {
    pml_plan plan;
    pml_step_result results[STEPS];
    char note[160];
} trained;

static trained train(const pml_train_config *config, const pml_batch_limits *limits)
{
    trained t;
    session s;
    session_open(&(session_options){.config = config, .limits = limits}, &s);
    t.plan = *pml_stepper_plan(s.stepper);
    snprintf(t.note, sizeof t.note, "%s", pml_stepper_note(s.stepper));
    for (int i = 0; i < STEPS; i++)
        t.results[i] = session_step(&s, NULL);
    session_close(&s);
    return t;
}

static void check_same(const trained *refused, const trained *first, const char *what)
{
    check(strstr(refused->note, "refused") != NULL && first->note[0] == '\0',
          "%s: a refusal is told of the one and not of the other: '%s', '%s'", what, refused->note,
          first->note);
    check(memcmp(&refused->plan.choices, &first->plan.choices, sizeof first->plan.choices) == 0 &&
              refused->plan.total == first->plan.total,
          "%s: the second plan is the one that is made for so much (%zu, %zu bytes)", what,
          refused->plan.total, first->plan.total);
    for (int i = 0; i < STEPS; i++)
        check(refused->results[i].loss == first->results[i].loss &&
                  refused->results[i].grad_norm == first->results[i].grad_norm,
              "%s: step %d has loss %.9g and norm %.9g, not %.9g and %.9g", what, i + 1,
              refused->results[i].loss, refused->results[i].grad_norm, first->results[i].loss,
              first->results[i].grad_norm);
}

static void check_training(const char *fixtures)
{
    const pml_batch_limits limits = wide();
    pml_train_config config;
    load(fixtures, "llama-untied-lora", &config);
    refusals = 1;
    const trained refused = train(&config, &limits);
    refusals = 0;
    config.memory_limit = refused.plan.available;
    const trained first = train(&config, &limits);
    check_same(&refused, &first, "the device's memory");
}

/* ---- activations that were to wait on the host ---- */

/* Prices at which a link is worth something for a model so small. */
static void price(char *path)
{
    const int fd = mkstemp(path);
    FILE *file = fd >= 0 ? fdopen(fd, "w") : NULL;
    if (file == NULL ||
        fputs("{\"linear\": {\"gflops\": 1}, \"linear_bwd\": {\"gflops\": 1}, "
              "\"offload\": {\"gbytes\": 1000, \"microseconds\": 0}, "
              "\"fetch\": {\"gbytes\": 1000, \"microseconds\": 0}, "
              "\"await\": {\"microseconds\": 0}}",
              file) < 0 ||
        fclose(file) != 0 || setenv("PANTHERAML_RATES", path, 1) != 0)
        abort();
}

/* A limit at which layers wait on the host though something fits without, or (`only`) where nothing
 * does; 0: there is none. */
static size_t limit_of(const pml_train_config *config, const pml_batch_limits *limits,
                       const pml_backend *backend, bool only, pml_plan *plan)
{
    enum { MARGIN = 4 << 20 }; /* pml_plan_room's */
    pml_train_config without = *config;
    pml_model_spec spec;
    pml_plan other;
    without.no_offload = true;
    MUST(pml_model_spec_load(config->model, &spec, err));
    for (size_t limit = 0;
         pml_plan_make(&spec, config, limits, backend, pml_plan_room(limit), plan, NULL) == PML_OK;
         limit = plan->total - plan->arena / 64 + MARGIN) {
        if (plan->host == 0)
            continue;
        bool fits = pml_plan_make(&spec, &without, limits, backend, pml_plan_room(limit), &other,
                                  NULL) == PML_OK;
        if (fits != only)
            return limit;
    }
    return 0;
}

/* Others are told that the device's memory is free before it is, and what counts in the end. */
static void check_host_of_a_claim(pml_stepper_options *options, size_t host)
{
    pml_stepper *stepper;
    const size_t plenty = options->config->memory_limit;
    options->choices = (pml_plan_choices){0};
    options->claim = &played_claim;
    play(plenty, plenty, 0);
    host_refused = host;
    MUST(pml_stepper_new(options, &stepper, err));
    const pml_plan *plan = pml_stepper_plan(stepper);
    check(played.turns == 2 && played.settled == 2 && played.gave_up == 0 && plan->host == 0 &&
              played.bytes[1] == plan->total,
          "the second plan is settled: %zu, %zu bytes", played.bytes[1], plan->total);
    check(played.returned == 1 && played.taken == plan->arena,
          "and its arena is told, when the first one's is not taken any more: %zu, %zu bytes",
          played.taken, plan->arena);
    pml_stepper_destroy(&stepper);
}

static void check_host(const char *fixtures, pml_backend *refusing)
{
    const pml_batch_limits limits = {32768, 8, 512, 32768, 0}; /* no piece is smaller */
    pml_train_config config;
    pml_plan plan;
    load(fixtures, "qwen3-tied-full", &config);
    config.memory_limit = limit_of(&config, &limits, refusing, false, &plan);
    check(config.memory_limit > 0, "activations wait on the host within some limit");
    if (config.memory_limit == 0)
        return;
    const trained waiting = train(&config, &limits);
    check(waiting.plan.host == plan.host && waiting.note[0] == '\0', "and nobody refuses: %s",
          waiting.note);
    host_refused = plan.host;
    const trained refused = train(&config, &limits);
    check(host_refused == 0 && refused.plan.host == 0 &&
              strstr(refused.note, "page-locked") != NULL,
          "refused, nothing waits on the host: %s", refused.note);
    config.no_offload = true;
    const trained first = train(&config, &limits);
    check_same(&refused, &first, "the host's memory");
    config.no_offload = false;

    pml_stepper *stepper;
    pml_error why = PML_ERROR_INIT;
    pml_stepper_options options = {.config = &config,
                                   .backend = refusing,
                                   .device_index = device_index,
                                   .threads = 1,
                                   .limits = limits,
                                   .choices = waiting.plan.choices};
    host_refused = plan.host;
    check(pml_stepper_new(&options, &stepper, &why) == PML_NO_MEMORY && host_refused == 0 &&
              strstr(why.message, "to wait in host memory") != NULL,
          "a plan that is given is not changed: %s", why.message);
    check_host_of_a_claim(&options, plan.host);

    why = (pml_error)PML_ERROR_INIT;
    options.claim = NULL;
    options.choices = (pml_plan_choices){0};
    config.memory_limit = limit_of(&config, &limits, refusing, true, &plan);
    check(config.memory_limit > 0, "within another one nothing fits without");
    host_refused = plan.host;
    check(pml_stepper_new(&options, &stepper, &why) == PML_NO_MEMORY && host_refused == 0 &&
              strstr(why.message, "nothing without it will do") != NULL,
          "then it is told: %s", why.message);
    host_refused = 0;
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    for (int i = 1; i + 1 < argc; i++)
        session_option(argv[i]);
    if (argc < 2 || argv[argc - 1][0] == '-') {
        fprintf(stderr, "usage: refused [--cuda [--bf16]] FIXTURES\n");
        return EXIT_FAILURE;
    }
    if (session_is_skipped())
        return SESSION_SKIPPED;
    const char *fixtures = argv[argc - 1];
    MUST(pml_backend_named(session_device, false, &real, &device_index, err));
    check_second_plan(fixtures);
    check_second_plan_of_a_claim(fixtures);
    pml_backend refusing = refusing_backend();
    session_backend = &refusing;
    check_training(fixtures);
    refusing.name = "cuda"; /* on the CPU, too: where memory is the host's nothing waits there */
    char rates[] = "/tmp/pml-rates-XXXXXX";
    price(rates);
    check_host(fixtures, &refusing);
    unlink(rates);
    return summary();
}
