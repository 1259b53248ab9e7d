/* What NVML says, as it is told, and what it does not say, as missing: against a driver of our own
 * (tests/shim/nvml.c), whose answers this test writes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h> /* wants the ones above before it */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml_op/gauges.h"

static char path[] = "/tmp/pml-nvml-XXXXXX";

static void driver_says(const char *text)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static pml_reading read_part(const char *part)
{
    pml_gauges *gauges = NULL;
    pml_reading r;
    pml_error err = PML_ERROR_INIT;
    if (pml_gauges_new("0000:0f:00.0", part, &gauges, &err) != PML_OK)
        fail_msg("%s", err.message);
    pml_gauges_read(gauges, &r);
    pml_gauges_destroy(&gauges);
    assert_null(gauges);
    return r;
}

static pml_reading read_now(void)
{
    return read_part(NULL);
}

static void expect(const pml_reading *r, pml_gauge gauge, double value)
{
    if (r->missing[gauge] != NULL)
        fail_msg("%s is missing: %s", pml_gauge_name(gauge), r->missing[gauge]);
    if (r->value[gauge] < value * (1 - 1e-12) || r->value[gauge] > value * (1 + 1e-12))
        fail_msg("%s is %g, not %g", pml_gauge_name(gauge), r->value[gauge], value);
}

static void expect_missing(const pml_reading *r, pml_gauge gauge, const char *words)
{
    if (r->missing[gauge] == NULL)
        fail_msg("%s is there: %g", pml_gauge_name(gauge), r->value[gauge]);
    if (strstr(r->missing[gauge], words) == NULL)
        fail_msg("%s: '%s' does not say '%s'", pml_gauge_name(gauge), r->missing[gauge], words);
    assert_true(r->value[gauge] == 0);
}

static void all_gauges(void **state)
{
    (void)state;
    driver_says("utilisation 97\ntotal 150e9\nreserved 1e9\nused 60e9\nprocesses 1\n"
                "process 0 50e9\nprocess 1 7e9\ndraws 1 7e9\ndraws 2 2e9\ntemperature 64\n"
                "milliwatts 690500\nlimit 700000\nclock 1755\nclock_most 1980\nmemory_clock 3201\n"
                "throttle 5\n");
    pml_reading r = read_now();
    expect(&r, PML_GAUGE_utilisation, 0.97);
    expect(&r, PML_GAUGE_memory_total, 150e9);
    expect(&r, PML_GAUGE_memory_used, 60e9);
    expect(&r, PML_GAUGE_memory_ours, 50e9);
    expect(&r, PML_GAUGE_memory_others, 9e9); /* one that computes and draws counts once */
    expect(&r, PML_GAUGE_temperature, 64);
    expect(&r, PML_GAUGE_power, 690.5);
    expect(&r, PML_GAUGE_power_limit, 700);
    expect(&r, PML_GAUGE_clock, 1755);
    expect(&r, PML_GAUGE_clock_most, 1980);
    expect(&r, PML_GAUGE_memory_clock, 3201);
    expect(&r, PML_GAUGE_throttle, 5); /* idle, which is no reason, and the power cap */
    assert_string_equal(pml_throttle_reason(&r, 0), "power cap");
    assert_null(pml_throttle_reason(&r, 1));
}

static void what_a_card_has_not(void **state)
{
    (void)state;
    driver_says("utilisation 3\ntotal -3\ntemperature 40\nmilliwatts -3\nlimit -4\nclock -15\n"
                "processes 1\nprocess 0 -1\nprocess 7 1e9\nthrottle 0\n");
    pml_reading r = read_now();
    expect(&r, PML_GAUGE_utilisation, 0.03);
    expect(&r, PML_GAUGE_temperature, 40);
    expect_missing(&r, PML_GAUGE_memory_total, "does not support");
    expect_missing(&r, PML_GAUGE_memory_used, "does not support");
    expect_missing(&r, PML_GAUGE_power, "does not support");
    expect_missing(&r, PML_GAUGE_power_limit, "does not permit");
    expect_missing(&r, PML_GAUGE_clock, "lost");
    expect_missing(&r, PML_GAUGE_clock_most, "does not support");
    expect_missing(&r, PML_GAUGE_memory_ours, "does not say it");
    expect(&r, PML_GAUGE_memory_others, 1e9);
    assert_null(pml_throttle_reason(&r, 0));
}

/* In a container the driver lists other ids: then nothing is known of whose memory it is. */
static void a_process_that_is_not_listed(void **state)
{
    (void)state;
    driver_says("processes 1\nprocess 1 5e9\n");
    pml_reading r = read_now();
    expect_missing(&r, PML_GAUGE_memory_ours, "does not list");
    expect_missing(&r, PML_GAUGE_memory_others, "does not list");
    driver_says("");
    r = read_now();
    expect_missing(&r, PML_GAUGE_memory_ours, "does not support");
    expect_missing(&r, PML_GAUGE_throttle, "does not support");
    assert_null(pml_throttle_reason(&r, 0));
}

/* What a divided card has and what its part has are two things; the part's counts, or none. */
static void a_divided_card(void **state)
{
    (void)state;
    static const char uuid[] = "3f2a0c00-0000-4000-8000-00000000000a";
    static const char card[] = "total 150e9\nreserved 1e9\nused 140e9\nprocesses 1\nprocess 0 9e9\n"
                               "process 1 130e9\ntemperature 64\n";
    char text[400];
    snprintf(text, sizeof text,
             "%smig 1\npart_total 20e9\npart_reserved 1e8\npart_used 5e9\n"
             "part_process 0 4e9\npart_process 7 5e8\n",
             card);
    driver_says(text);
    pml_reading r = read_part(uuid);
    expect(&r, PML_GAUGE_memory_total, 20e9);
    expect(&r, PML_GAUGE_memory_used, 5e9);
    expect(&r, PML_GAUGE_memory_ours, 4e9);
    expect(&r, PML_GAUGE_memory_others, 5e8);
    expect(&r, PML_GAUGE_temperature, 64);
    const char *unknown[] = {NULL, "00000000-0000-0000-0000-000000000000"};
    for (int i = 0; i < 2; i++) { /* no part is asked for, and one that NVML does not find */
        r = read_part(unknown[i]);
        for (int gauge = PML_GAUGE_memory_total; gauge <= PML_GAUGE_memory_others; gauge++)
            expect_missing(&r, (pml_gauge)gauge, "the card is divided (MIG)");
        expect(&r, PML_GAUGE_temperature, 64);
    }
    snprintf(text, sizeof text, "%smig 0\n", card);
    driver_says(text);
    r = read_part(uuid);
    expect(&r, PML_GAUGE_memory_used, 140e9);
}

static void energy(void **state)
{
    (void)state;
    pml_gauges *gauges = NULL;
    pml_error err = PML_ERROR_INIT;
    double joules = -1;
    driver_says("millijoules 5000000000125\n"); /* more than 32 bits hold */
    assert_int_equal(pml_gauges_new("0000:0f:00.0", NULL, &gauges, &err), PML_OK);
    assert_int_equal(pml_gauges_energy(gauges, &joules, &err), PML_OK);
    assert_true(joules > 5000000000.1249 && joules < 5000000000.1251);
    driver_says("millijoules -4\n");
    assert_int_equal(pml_gauges_energy(gauges, &joules, &err), PML_UNSUPPORTED);
    assert_non_null(strstr(err.message, "does not permit"));
    pml_gauges_destroy(&gauges);
}

static void too_many_processes(void **state)
{
    (void)state;
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs("processes 1\n", file);
    for (int i = 0; i < 400; i++)
        fprintf(file, "process %d 1e6\n", i);
    assert_int_equal(fclose(file), 0);
    pml_reading r = read_now();
    expect_missing(&r, PML_GAUGE_memory_ours, "more processes");
    expect_missing(&r, PML_GAUGE_memory_others, "more processes");
}

static void no_such_gpu(void **state)
{
    (void)state;
    pml_gauges *gauges = NULL;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pml_gauges_new("0000:ff:00.0", NULL, &gauges, &err), PML_NOT_FOUND);
    assert_null(gauges);
    assert_non_null(strstr(err.message, "0000:ff:00.0"));
    assert_non_null(strstr(err.message, "Not Found"));
}

static void peaks_of_cards(void **state)
{
    (void)state;
    assert_true(pml_peak_flops("NVIDIA H200") == 989.5e12);
    assert_true(pml_peak_flops("NVIDIA H200 NVL") == 835.5e12);
    assert_true(pml_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12);
    assert_true(pml_peak_flops("NVIDIA A10") == 125e12);
    assert_true(pml_peak_flops("NVIDIA A10G") == 0); /* it begins like another one */
    assert_true(pml_peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU") == 0);
    assert_true(pml_peak_flops("Some other card") == 0);
    assert_true(pml_peak_flops("") == 0);
}

static int make_file(void **state)
{
    (void)state;
    int fd = mkstemp(path);
    return fd < 0 || close(fd) != 0 ? -1 : setenv("FAKE_NVML", path, 1);
}

static int remove_file(void **state)
{
    (void)state;
    return unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_gauges),
        cmocka_unit_test(what_a_card_has_not),
        cmocka_unit_test(a_process_that_is_not_listed),
        cmocka_unit_test(a_divided_card),
        cmocka_unit_test(energy),
        cmocka_unit_test(too_many_processes),
        cmocka_unit_test(no_such_gpu),
        cmocka_unit_test(peaks_of_cards),
    };
    return cmocka_run_group_tests(tests, make_file, remove_file);
}
