/* Who can reach an address, and what is no address. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "pml/net/reach.h"

static void addresses_are_told_apart(void **state)
{
    (void)state;
    static const struct {
        const char *bind;
        pml_reach reach;
        long port;
    } rows[] = {
        {"tcp://127.0.0.1:4000", PML_REACH_LOOPBACK, 4000},
        {"tcp://127.255.255.255:1", PML_REACH_LOOPBACK, 1},
        {"tcp://[::1]:*", PML_REACH_LOOPBACK, 0},
        {"tcp://[::ffff:127.0.0.1]:5", PML_REACH_LOOPBACK, 5},
        {"tcp://10.1.2.3:65534", PML_REACH_PRIVATE, 65534},
        {"tcp://172.16.0.1:5", PML_REACH_PRIVATE, 5},
        {"tcp://172.31.255.1:5", PML_REACH_PRIVATE, 5},
        {"tcp://192.168.1.5:5", PML_REACH_PRIVATE, 5},
        {"tcp://169.254.1.1:5", PML_REACH_PRIVATE, 5},
        {"tcp://100.64.0.1:5", PML_REACH_PRIVATE, 5},
        {"tcp://100.127.0.1:5", PML_REACH_PRIVATE, 5},
        {"tcp://[fe80::1]:5", PML_REACH_PRIVATE, 5},
        {"tcp://[fd00::1]:5", PML_REACH_PRIVATE, 5},
        {"tcp://11.1.2.3:5", PML_REACH_EVERYONE, 5},
        {"tcp://172.32.0.1:5", PML_REACH_EVERYONE, 5},
        {"tcp://192.169.1.5:5", PML_REACH_EVERYONE, 5},
        {"tcp://100.128.0.1:5", PML_REACH_EVERYONE, 5},
        {"tcp://8.8.8.8:5", PML_REACH_EVERYONE, 5},
        {"tcp://[2001:db8::1]:5", PML_REACH_EVERYONE, 5},
        {"tcp://[::ffff:8.8.8.8]:5", PML_REACH_EVERYONE, 5},
        {"tcp://[::]:5", PML_REACH_EVERYONE, 5},
        {"tcp://0.0.0.0:*", PML_REACH_EVERYONE, 0},
        {"tcp://*:5", PML_REACH_EVERYONE, 5},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        pml_address a;
        pml_error err = PML_ERROR_INIT;
        if (pml_reach_parse(rows[i].bind, &a, &err) != PML_OK)
            fail_msg("%s: %s", rows[i].bind, err.message);
        if (a.reach != rows[i].reach)
            fail_msg("%s: %s", rows[i].bind, pml_reach_name(a.reach));
        assert_int_equal(a.port, rows[i].port);
    }
}

static void what_is_no_address_is_refused(void **state)
{
    (void)state;
    static const char *const binds[] = {
        "",
        "tcp://",
        "tcp://:5",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:65535",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:5x",
        "tcp://127.0.0.1: 5",
        "tcp://localhost:5",
        "tcp://eth0:5",
        "ipc:///tmp/x:5",
        "udp://127.0.0.1:5",
        "127.0.0.1:5",
        "tcp://127.1:5",
        "tcp://127.0.0.1;10.0.0.1:5",
        "tcp://[127.0.0.1:5",
        "tcp://[]:5",
        "tcp://1.2.3.4.5:5",
        "tcp://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa:5",
    };
    for (size_t i = 0; i < sizeof binds / sizeof binds[0]; i++) {
        pml_address a;
        if (pml_reach_parse(binds[i], &a, NULL) != PML_INVALID)
            fail_msg("\"%s\" was taken", binds[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(addresses_are_told_apart),
        cmocka_unit_test(what_is_no_address_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
