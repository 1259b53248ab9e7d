#include "history.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_learns.h"

int history_restarts(harness *h)
{
    int n = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++)
        n += pml_message_type_of(h->events[i]) == PML_EVENT_restart;
    return n;
}

int64_t history_check(harness *h)
{
    int64_t step = 0;
    harness_catch_up(h);
    for (int i = 0; i < h->n_events; i++) {
        const pml_message *m = h->events[i];
        if (pml_message_type_of(m) == PML_EVENT_restart)
            assert_true(pml_message_int(m, "step") <= step);
        if (pml_message_type_of(m) == PML_EVENT_restart)
            step = pml_message_int(m, "step");
        if (pml_message_type_of(m) != PML_EVENT_step)
            continue;
        if (pml_message_int(m, "step") != ++step)
            fail_msg("step %lld follows %lld", (long long)pml_message_int(m, "step"),
                     (long long)step - 1);
    }
    return step;
}

unsigned long long history_learnt(const harness *h, int64_t step)
{
    char name[64];
    snprintf(name, sizeof name, "checkpoints/step-%06lld/state.json", (long long)step);
    char *text = harness_read(h, name), *at = strstr(text, "\"learnt\":");
    assert_non_null(at);
    unsigned long long number = strtoull(at + 9, NULL, 10);
    free(text);
    return number;
}

void history_reach(harness *h, int64_t step)
{
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)step);
    harness_event(h, 0, PML_EVENT_step, "step", number, NULL);
}

unsigned long long history_undisturbed(int64_t steps)
{
    uint64_t number = 0;
    for (int64_t k = 1; k <= steps; k++) /* what harness_new sets, times the fake's factor */
        number = fake_learns(number, k, 0.001 * 0.5, 0);
    return number;
}

const pml_message *history_restart(harness *h, int n)
{
    char attempt[16];
    snprintf(attempt, sizeof attempt, "%d", n);
    return harness_event(h, 0, PML_EVENT_restart, "attempt", attempt, NULL);
}

const pml_message *history_applied(harness *h, int64_t command)
{
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)command);
    return harness_event(h, 0, PML_EVENT_applied, "command", number, NULL);
}

int64_t history_stop(harness *h)
{
    harness_command(h, "stop", "");
    harness_wait_state(h, "stopped");
    pml_message *m = harness_ask(h, "status", "");
    int64_t step = pml_message_int(m, "step");
    pml_message_destroy(&m);
    return step;
}
