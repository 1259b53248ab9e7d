/* What a GPU's driver says, from the worker's thread that reads it to the log: with a driver that
 * answers, one that does not know everything, one that never comes back, and none. */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/clock.h"

static char answers[] = "/tmp/pml-gpu-XXXXXX";
static const char *driver; /* folder of libnvidia-ml.so.1 */

static void driver_says(const char *text)
{
    FILE *file = fopen(answers, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static harness *start(int workers, const char *libraries, const char *card)
{
    setenv("FAKE_STEP_MS", "10", 1);
    setenv("FAKE_GPU", card, 1);
    setenv("FAKE_FLOPS", "1e12", 1);
    setenv("FAKE_NVML", answers, 1);
    setenv("LD_LIBRARY_PATH", libraries, 1);
    harness *h = harness_new(workers, 1000000, NULL);
    if (!harness_start(h, NULL))
        fail_msg("%s", h->error);
    return h;
}

static void finish(harness *h)
{
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    harness_destroy(&h);
}

/* The first record of this rank's GPU that a step tells of, the caller's. */
static pml_message *told(harness *h, int rank)
{
    int event = 0;
    for (double end = pml_clock_monotonic() + 240; pml_clock_monotonic() < end;) {
        for (; event < h->n_events; event++)
            for (size_t i = 0; i < pml_message_count(h->events[event], "gpus"); i++) {
                pml_message *gpu = pml_message_part(h->events[event], "gpus", i);
                if (pml_message_int(gpu, "rank") == rank)
                    return gpu;
                pml_message_destroy(&gpu);
            }
        harness_receive_for(h, 0.05);
    }
    fail_msg("no step tells of a GPU");
    return NULL;
}

static void readings_of_every_rank(void **state)
{
    (void)state;
    driver_says("utilisation 97\ntotal 150e9\nreserved 1e9\nused 60e9\nprocesses 1\n"
                "process 0 50e9\nprocess 1 7e9\ntemperature 64\nmilliwatts 690500\nlimit 700000\n"
                "clock 1755\nclock_most 1980\nmemory_clock 3201\nthrottle 36\n");
    harness *h = start(2, driver, "NVIDIA H200");
    for (int rank = 0; rank < 2; rank++) {
        pml_message *gpu = told(h, rank);
        assert_int_equal(pml_message_int(gpu, "rank"), rank);
        assert_string_equal(pml_message_string(gpu, "name"), "NVIDIA H200");
        assert_true(pml_message_number(gpu, "utilisation") == 0.97);
        assert_true(pml_message_int(gpu, "memory_used") == 60000000000);
        assert_true(pml_message_int(gpu, "memory_ours") == 50000000000);
        assert_true(pml_message_int(gpu, "memory_others") == 7000000000);
        assert_true(pml_message_number(gpu, "power") > 690.4);
        assert_int_equal(pml_message_int(gpu, "clock"), 1755);
        assert_string_equal(pml_message_string(gpu, "throttle"), "power cap, temperature");
        assert_true(pml_message_number(gpu, "peak_flops") == 989.5e12);
        assert_true(pml_message_has(gpu, "age"));
        assert_false(pml_message_has(gpu, "missing"));
        assert_false(pml_message_has(gpu, "trouble"));
        pml_message_destroy(&gpu);
    }
    /* 1e12 operations in 10 ms and a little are 100 TFLOP/s at most. */
    const pml_message *step = harness_event(h, 0, PML_EVENT_step, "step", "2", NULL);
    double mfu = pml_message_number(step, "mfu");
    double seconds = pml_message_number(step, "seconds");
    assert_true(mfu > 0 && mfu <= 1e14 / 989.5e12);
    assert_true(mfu * seconds > 0.999 * 1e12 / 989.5e12 && mfu * seconds < 1.001 * 1e12 / 989.5e12);
    finish(h);
}

static void what_is_not_known_is_said(void **state)
{
    (void)state;
    driver_says("temperature 40\nmilliwatts -4\n");
    harness *h = start(1, driver, "Some other card");
    pml_message *gpu = told(h, 0);
    assert_true(pml_message_number(gpu, "temperature") == 40);
    assert_false(pml_message_has(gpu, "power"));
    assert_false(pml_message_has(gpu, "utilisation"));
    assert_false(pml_message_has(gpu, "throttle"));
    const char *missing = pml_message_string(gpu, "missing");
    assert_non_null(strstr(missing, "power: the driver does not permit it"));
    assert_non_null(strstr(missing, "utilisation: this GPU does not support it"));
    assert_false(pml_message_has(gpu, "peak_flops")); /* no table has it, and none is made up */
    assert_false(pml_message_has(gpu, "mfu"));
    pml_message_destroy(&gpu);
    assert_false(pml_message_has(harness_event(h, 0, PML_EVENT_step, "step", "2", NULL), "mfu"));
    finish(h);
}

/* Neither the steps nor the beats wait for it, and the worker ends all the same. */
static void a_driver_that_does_not_come_back(void **state)
{
    (void)state;
    driver_says("temperature 40\nsleep 100000\n");
    harness *h = start(1, driver, "NVIDIA H200");
    const pml_message *step = harness_event(h, 0, PML_EVENT_step, "step", "200", NULL);
    assert_true(pml_message_has(step, "mfu")); /* that is ours */
    for (int i = 0; i < h->n_events; i++)      /* and nothing was read */
        assert_int_equal(pml_message_count(h->events[i], "gpus"), 0);
    pid_t worker = harness_worker_pid(h, 0);
    finish(h);
    harness_wait_gone(worker, 5);
}

static void without_nvml(void **state)
{
    (void)state;
    driver_says("");
    harness *h = start(1, "/nowhere", "NVIDIA H200");
    const pml_message *log = harness_event(h, 0, PML_EVENT_log, "level", "warning", NULL);
    assert_non_null(strstr(pml_message_string(log, "message"), "libnvidia-ml.so.1"));
    pml_message *gpu = told(h, 0);
    assert_non_null(strstr(pml_message_string(gpu, "trouble"), "libnvidia-ml.so.1"));
    assert_false(pml_message_has(gpu, "temperature"));
    assert_false(pml_message_has(gpu, "missing"));
    pml_message_destroy(&gpu);
    finish(h);
}

static int make_file(void **state)
{
    (void)state;
    int fd = mkstemp(answers);
    return fd < 0 ? -1 : close(fd);
}

static int remove_file(void **state)
{
    (void)state;
    return unlink(answers);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(readings_of_every_rank),
        cmocka_unit_test(what_is_not_known_is_said),
        cmocka_unit_test(a_driver_that_does_not_come_back),
        cmocka_unit_test(without_nvml),
    };
    if (argc < 4 || !harness_programs(argc, argv))
        return EXIT_FAILURE;
    driver = argv[3];
    return cmocka_run_group_tests(tests, make_file, remove_file);
}
