/* A device that refuses the memory that was planned: alone, and where others plan with it, too
 * (pml_memory_claim).
 *
 *   refused FIXTURES */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml_op/cpu.h"
#include "session.h"

static int refusals; /* so many come */

/* What a claim is asked, and says: a device that others plan with, too. */
static struct {
    size_t left[2]; /* what is there for the first plan, and for the second */
    int turns, asked, settled, gave_up;
    bool turn;
    size_t bytes[2], taken, wanted;
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
    played.taken = bytes;
    return PML_OK;
}

static const pml_memory_claim played_claim = {.begin = played_begin,
                                              .ask = played_ask,
                                              .settle = played_settle,
                                              .give_up = played_give_up,
                                              .taken = played_taken};

static pml_status refuse_first(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    check(!played.turn, "the others wait while the device is asked for memory");
    *base = NULL;
    if (refusals-- > 0)
        return PML_FAIL(err, PML_NO_MEMORY, "refused");
    return pml_backend_cpu()->alloc(device, bytes, base, err);
}

static void check_second_plan(const char *fixtures)
{
    pml_backend refusing = *pml_backend_cpu();
    refusing.alloc = refuse_first;
    pml_train_config config;
    pml_stepper *stepper;
    load_case(fixtures, "llama-untied-lora", &config);
    pml_stepper_options options = {
        .config = &config, .backend = &refusing, .threads = 1, .limits = {6000, 200, 6000, 30, 0}};
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
    enum { PLENTY = 1 << 30 };
    pml_backend refusing = *pml_backend_cpu();
    refusing.alloc = refuse_first;
    pml_train_config config;
    pml_stepper *stepper;
    load_case(fixtures, "llama-untied-lora", &config);
    pml_stepper_options options = {.config = &config,
                                   .backend = &refusing,
                                   .threads = 1,
                                   .limits = {6000, 200, 6000, 30, 0},
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

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    if (argc != 2) {
        fprintf(stderr, "usage: refused FIXTURES\n");
        return EXIT_FAILURE;
    }
    check_second_plan(argv[1]);
    check_second_plan_of_a_claim(argv[1]);
    return summary();
}
