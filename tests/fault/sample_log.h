/* A log of SAMPLE_EVENTS events in scratch_root, and what it must hold: for the tests of torn,
 * flipped and failing logs. */
#ifndef TESTS_SAMPLE_LOG_H
#define TESTS_SAMPLE_LOG_H

#include <unistd.h>

#include "disk.h"
#include "eventlog.h"
#include "pml/json/sum.h"
#include "scratch.h"

enum { SAMPLE_EVENTS = 40 };

/* Every third event is durable; the others are steps of differing length. */
static inline pml_message *sample_event(int i, bool *durable)
{
    *durable = i % 3 == 0;
    pml_message *m = pml_message_new(*durable ? PML_EVENT_state : PML_EVENT_log);
    char text[300];
    snprintf(
        text, sizeof text, "event %d %.*s", i, i * 5,
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
    if (*durable) {
        pml_message_set_string(m, "state", "running");
        pml_message_set_int(m, "step", i);
        pml_message_set_string(m, "reason", text);
    } else {
        pml_message_set_string(m, "level", "info");
        pml_message_set_string(m, "message", text);
    }
    return m;
}

/* Append event i; it is on its way to the disk, and not there yet. */
static inline void sample_put(eventlog *log, int i)
{
    bool durable;
    pml_message *m = sample_event(i, &durable);
    EXPECT_OK(eventlog_append(log, m, 0, durable, e));
    pml_message_destroy(&m);
}

/* For eventlog_open. */
static inline void sample_ignore(void *user, const pml_message *event)
{
    (void)user, (void)event;
}

static int sample_seen;

/* Events of a prefix, each as it was written. */
static inline void sample_expect(void *user, const pml_message *event)
{
    (void)user;
    bool durable;
    int i = sample_seen++;
    pml_message *want = sample_event(i, &durable);
    const char *field = durable ? "reason" : "message";
    assert_int_equal(pml_message_int(event, "seq"), i + 1);
    assert_string_equal(pml_message_string(event, field), pml_message_string(want, field));
    pml_message_destroy(&want);
}

/* Open what is there, which must be a prefix of the sample. *cut: as eventlog_open says. */
static inline eventlog *sample_open(size_t *cut)
{
    eventlog *log;
    sample_seen = 0;
    EXPECT_OK(eventlog_open(scratch_root, sample_expect, NULL, &log, cut, e));
    assert_int_equal(eventlog_last(log), sample_seen);
    return log;
}

/* How many lines may be announced now; each must be the next one. */
static inline void sample_take(eventlog *log, int *announced)
{
    const char *text;
    size_t size;
    while (eventlog_next(log, &text, &size)) {
        char begin[32];
        int n = snprintf(begin, sizeof begin, "{\"seq\":%d,", ++*announced);
        assert_memory_equal(text, begin, (size_t)n);
        EXPECT_OK(pml_sum_check(text, size, e));
    }
    assert_int_equal(eventlog_last(log), *announced);
}

/* The whole sample as a file, and its bytes, to be freed. */
static inline void sample_write(char **text, size_t *size)
{
    eventlog *log;
    size_t cut;
    int announced = 0;
    unlink(scratch("events.jsonl"));
    EXPECT_OK(eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, e));
    for (int i = 0; i < SAMPLE_EVENTS; i++)
        sample_put(log, i);
    EXPECT_OK(eventlog_flush(log, e));
    sample_take(log, &announced);
    assert_int_equal(announced, SAMPLE_EVENTS);
    eventlog_close(&log);
    EXPECT_OK(pml_file_read(scratch("events.jsonl"), 1 << 20, false, text, size, e));
}

/* cmocka's set-up: a folder whose fsyncs are not carried out, as nothing here loses power. */
static inline int sample_scratch(void **state)
{
    int failed = scratch_setup(state);
    disk_control *disk = disk_control_here();
    snprintf(disk->prefix, sizeof disk->prefix, "%s", scratch_root);
    disk->lazy = 1;
    return failed;
}

#endif
