#include "eventlog_recover.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/sum.h"

static const char *after(const char *text, const char *end, const char *words)
{
    size_t n = strlen(words);
    return (size_t)(end - text) >= n && memcmp(text, words, n) == 0 ? text + n : NULL;
}

/* The digits at `at`; a line of a file has no zero behind it that would end them. */
static int64_t number(const char *at, const char *end)
{
    int64_t value = 0;
    for (; at < end && *at >= '0' && *at <= '9' && value < INT64_MAX / 10 - 1; at++)
        value = value * 10 + (*at - '0');
    return value;
}

/* Our own lines begin with seq, time and timeline; most are steps, which are told apart here
 * without parsing them. */
static bool is_bulk(const char *line, const char *end, int64_t seq, recovered *r)
{
    char begin[48];
    snprintf(begin, sizeof begin, "{\"seq\":%lld,\"time\":", (long long)seq);
    const char *at = after(line, end, begin);
    at = at == NULL ? NULL : memchr(at, ',', (size_t)(end - at));
    at = at == NULL ? NULL : after(at, end, ",\"timeline\":");
    if (at == NULL)
        return false;
    int64_t timeline = number(at, end);
    at = memchr(at, ',', (size_t)(end - at));
    const char *step = at == NULL ? NULL : after(at, end, ",\"type\":\"step\",\"step\":");
    if (at == NULL || (step == NULL && after(at, end, ",\"type\":\"progress\",") == NULL))
        return false;
    r->timeline = timeline;
    if (step != NULL) {
        r->step = number(step, end);
        r->step_timeline = timeline;
    }
    return true;
}

/* A whole line is what was written, and the event that belongs here. PML_CORRUPT otherwise; other
 * failures say nothing of it. */
static pml_status take_line(recovered *r, int64_t seq, const char *line, const char *end,
                            pml_error *err)
{
    pml_status status = pml_sum_check(line, (size_t)(end - line), err);
    if (status == PML_OK && is_bulk(line, end, seq, r))
        return PML_OK;
    pml_message *event = NULL;
    if (status == PML_OK)
        status = pml_message_parse(PML_CHANNEL_EVENT, line, (size_t)(end - line), &event, err);
    if (status == PML_NO_MEMORY || status == PML_INTERNAL) /* no word on the line */
        return status;
    if (status == PML_OK && pml_message_int(event, "seq") != seq)
        status =
            PML_FAIL(err, PML_CORRUPT, "its seq is %lld", (long long)pml_message_int(event, "seq"));
    if (status == PML_OK) {
        r->timeline = pml_message_int(event, "timeline");
        if (pml_message_type_of(event) == PML_EVENT_step) {
            r->step = pml_message_int(event, "step");
            r->step_timeline = r->timeline;
        }
        r->seen(r->seen_user, event);
        pml_message_destroy(&event);
        return PML_OK;
    }
    pml_message_destroy(&event);
    pml_error_prefix(err, "%s, line %lld", r->path, (long long)seq);
    return err == NULL ? PML_CORRUPT : (err->code = PML_CORRUPT);
}

/* Events that are synced before anything follows them. Damaged or not: nothing but such an event
 * has these bytes, as quotation marks inside of strings are escaped. */
static bool is_durable(const char *line, const char *end)
{
    static const char *const types[] = {",\"type\":\"state\",", ",\"type\":\"applied\",",
                                        ",\"type\":\"refused\",", ",\"type\":\"checkpoint\",",
                                        ",\"type\":\"restart\","};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (memmem(line, (size_t)(end - line), types[i], strlen(types[i])) != NULL)
            return true;
    return false;
}

/* Whether `text`, which begins with a damaged line, can be what a power cut left: pages that were
 * not synced yet reach the disk in any order. A durable event with something behind it was synced,
 * and all before it with it; and what is far from the end was, too. So there the damage came later.
 */
static bool is_torn(const char *text, size_t size)
{
    const char *end = text + size;
    if (size > PML_LOG_TORN_MAX)
        return false;
    for (const char *line = text; line < end;) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        if (stop == NULL)
            return true;
        if (is_durable(line, stop) && stop + 1 < end)
            return false;
        line = stop + 1;
    }
    return true;
}

pml_status eventlog_recover(recovered *r, const char *text, size_t size, size_t *whole,
                            pml_error *err)
{
    pml_status status = PML_OK;
    *whole = 0;
    while (status == PML_OK && *whole < size) {
        const char *line = text + *whole;
        const char *end = memchr(line, '\n', size - *whole);
        if (end == NULL)
            return PML_OK;
        status = take_line(r, r->lines + 1, line, end, err);
        if (status == PML_CORRUPT && is_torn(line, size - *whole))
            return PML_OK;
        if (status == PML_OK) {
            *whole = (size_t)(end + 1 - text);
            r->lines++;
            status = r->line(r->user, (int64_t)*whole, err);
        }
    }
    return status;
}
