/* The log against crashes that tear, bits that flip and pages that do not read. */
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "disk.h"
#include "eventlog.h"
#include "eventlog_recover.h"
#include "pml/base/hash.h"
#include "pml/json/sum.h"
#include "sample_log.h"
#include "scratch.h"

enum { LINES_MAX = 100 };

/* ---- torn ---- */

static void torn_at_every_byte(void **state)
{
    (void)state;
    char *text;
    size_t size, cut;
    sample_write(&text, &size);
    const char *from = text + size - 1;
    for (int lines = 0; lines < 3; from--)
        lines += from[-1] == '\n';
    for (size_t end = (size_t)(from - text); end <= size; end++) {
        int whole = 0;
        for (size_t i = 0; i < end; i++)
            whole += text[i] == '\n';
        put_file(scratch("events.jsonl"), text, end);
        eventlog *log = sample_open(&cut);
        assert_int_equal(sample_seen, whole);
        assert_int_equal(cut > 0, end > 0 && text[end - 1] != '\n');
        if (end % 16 != 0) {
            eventlog_close(&log);
            continue;
        }
        for (int i = whole; i < SAMPLE_EVENTS; i++)
            sample_put(log, i);
        EXPECT_OK(eventlog_flush(log, e));
        eventlog_close(&log);
        log = sample_open(&cut);
        assert_int_equal(sample_seen, SAMPLE_EVENTS);
        assert_int_equal(cut, 0);
        eventlog_close(&log);
    }
    free(text);
}

/* The run's lock is a file that somebody may take away. */
static void two_do_not_write_one_log(void **state)
{
    (void)state;
    eventlog *log, *another;
    size_t cut;
    unlink(scratch("events.jsonl"));
    EXPECT_OK(eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, e));
    sample_put(log, 0);
    EXPECT_OK(eventlog_flush(log, e));
    EXPECT_FAIL(PML_BUSY, "events.jsonl: this run has a coordinator already",
                eventlog_open(scratch_root, sample_ignore, NULL, &another, &cut, e));
    assert_null(another);
    eventlog_close(&log);
    log = sample_open(&cut);
    assert_int_equal(sample_seen, 1);
    eventlog_close(&log);
}

/* What a disk may have put behind a tear: something or nothing, other files' text, noise. */
static size_t garbage(int kind, const char *text, char out[300])
{
    size_t n = 1 + (size_t)random() % 299;
    for (size_t i = 0; i < n; i++)
        out[i] = (char)(kind == 0 ? 0 : kind == 1 ? random() % 255 + 1 : text[i + 90]);
    for (size_t i = 0; i < n && kind == 1; i++)
        out[i] = out[i] == '\n' ? ' ' : out[i];
    if (kind == 3)
        out[n / 2] = '\n';
    return n;
}

/* Garbage behind a tear is cut with it; where a line break in it ends a torn line that would have
 * been synced before anything was written behind it, that line is named, and nothing is cut. */
static void garbage_behind_a_tear(void **state)
{
    (void)state;
    char *text, *image;
    size_t size, cut;
    int cuts = 0, refused = 0;
    sample_write(&text, &size);
    image = malloc(size + 300);
    srandom(5);
    const char *from = text + size - 1;
    for (int lines = 0; lines < 3; from--)
        lines += from[-1] == '\n';
    for (size_t end = (size_t)(from - text); end <= size; end++) {
        size_t whole = 0, begin = 0, n = end;
        for (size_t i = 0; i < end; i++)
            if (text[i] == '\n')
                whole++, begin = i + 1;
        memcpy(image, text, end);
        n += garbage((int)(end % 4), text, image + end);
        put_file(scratch("events.jsonl"), image, n);
        const char *stop = memchr(image + begin, '\n', n - begin);
        bool synced = stop != NULL && stop + 1 < image + n &&
                      memmem(image + begin, (size_t)(stop - image) - begin, ",\"type\":\"state\",",
                             16) != NULL;
        eventlog *log = NULL;
        pml_error err = PML_ERROR_INIT;
        sample_seen = 0;
        pml_status status = eventlog_open(scratch_root, sample_expect, NULL, &log, &cut, &err);
        assert_int_equal(sample_seen, whole);
        assert_int_equal(status, synced ? PML_CORRUPT : PML_OK);
        if (synced) {
            char words[32], *after;
            snprintf(words, sizeof words, "line %zu:", whole + 1);
            assert_non_null(strstr(err.message, words));
            EXPECT_OK(pml_file_read(scratch("events.jsonl"), 1 << 20, false, &after, &n, e));
            assert_memory_equal(after, image, n);
            free(after);
            refused++;
        } else {
            assert_int_equal(cut, n - begin);
            eventlog_close(&log);
            cuts++;
        }
    }
    free(image);
    free(text);
    assert_true(cuts > 100 && refused > 5);
}

/* What was not synced may be there in any pages; all that was synced is. */
static void pages_out_of_order(void **state)
{
    (void)state;
    char *text, *image;
    size_t size, cut;
    sample_write(&text, &size);
    image = malloc(size);
    srandom(7);
    for (int round = 0; round < 300; round++) {
        /* The last durable line begins here, and what follows it: none of it is synced. */
        int unsynced = SAMPLE_EVENTS - 1 - (SAMPLE_EVENTS - 1) % 3, line = 0;
        size_t from = 0;
        while (line < unsynced)
            line += text[from++] == '\n';
        memcpy(image, text, size);
        for (size_t i = from; i < size; i += 64)
            if (random() % 3 == 0)
                memset(image + i, 0, size - i < 64 ? size - i : 64);
        put_file(scratch("events.jsonl"), image, size);
        eventlog *log = sample_open(&cut);
        assert_true(sample_seen >= unsynced);
        eventlog_close(&log);
    }
    free(image);
    free(text);
}

/* ---- flipped ---- */

/* Each of 2,000 flips is named, or cut where it can be a tear; what is given out is what was
 * written. */
static void every_flip_is_seen(void **state)
{
    (void)state;
    char *text;
    size_t size, cut;
    sample_write(&text, &size);
    srandom(11);
    int refused = 0, cuts = 0;
    for (int round = 0; round < 2000; round++) {
        size_t bit = (size_t)random() % (8 * size);
        int line = 1;
        for (size_t i = 0; i < bit / 8; i++)
            line += text[i] == '\n';
        text[bit / 8] ^= (char)(1 << bit % 8);
        put_file(scratch("events.jsonl"), text, size);
        text[bit / 8] ^= (char)(1 << bit % 8);
        eventlog *log = NULL;
        pml_error err = PML_ERROR_INIT;
        sample_seen = 0;
        pml_status status = eventlog_open(scratch_root, sample_expect, NULL, &log, &cut, &err);
        if (status == PML_OK) {
            assert_true(cut > 0 && eventlog_last(log) == line - 1);
            assert_true(line > SAMPLE_EVENTS - 4); /* behind it nothing was synced */
            cuts++;
            eventlog_close(&log);
            continue;
        }
        char words[32];
        snprintf(words, sizeof words, "line %d:", line);
        assert_int_equal(status, PML_CORRUPT);
        assert_non_null(strstr(err.message, words));
        char *after;
        size_t n;
        EXPECT_OK(pml_file_read(scratch("events.jsonl"), 1 << 20, false, &after, &n, e));
        assert_int_equal(n, size); /* nothing was cut from it */
        free(after);
        refused++;
    }
    free(text);
    assert_true(refused > 1500 && cuts > 0);
}

/* A run that has not saved for long has no durable event behind its steps, and its log was synced
 * all the same: damage far from the end is no tear. */
static void no_tear_is_long(void **state)
{
    (void)state;
    enum { MANY = 8000 };
    eventlog *log;
    size_t cut, size, line = 0;
    char *text;
    unlink(scratch("events.jsonl"));
    EXPECT_OK(eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, e));
    for (int i = 0; i < MANY; i++) /* as while the disk is full */
        sample_put(log, 3 * i + 1);
    disk_control *disk = disk_control_here();
    disk->n = 0;
    EXPECT_OK(eventlog_flush(log, e));
    const int64_t operations = disk->n;
    eventlog_close(&log);
    EXPECT_OK(pml_file_read(scratch("events.jsonl"), 64 << 20, false, &text, &size, e));
    assert_true(size > 4 * PML_LOG_TORN_MAX);
    assert_true(operations >= 2 * (int64_t)(size / PML_LOG_TORN_MAX)); /* a write and a sync each */

    const size_t places[] = {size / 9, size / 2, size - PML_LOG_TORN_MAX - 1000, size - 1000};
    for (int i = 0; i < 4; i++) {
        char words[32];
        pml_error err = PML_ERROR_INIT;
        line = 1;
        for (size_t k = 0; k < places[i]; k++)
            line += text[k] == '\n';
        text[places[i]] ^= 1;
        put_file(scratch("events.jsonl"), text, size);
        text[places[i]] ^= 1;
        pml_status status = eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, &err);
        snprintf(words, sizeof words, "line %zu:", line);
        if (i < 3) {
            assert_int_equal(status, PML_CORRUPT);
            assert_non_null(strstr(err.message, words));
        } else { /* here it may be one */
            assert_int_equal(status, PML_OK);
            assert_int_equal(eventlog_last(log), line - 1);
            eventlog_close(&log);
        }
    }
    free(text);
}

/* ---- in pieces ---- */

/* More than two of the pieces of a mebibyte that a log is read in; steps would do as well. */
static void write_long_log(char **text, size_t *size)
{
    eventlog *log;
    size_t cut;
    unlink(scratch("events.jsonl"));
    EXPECT_OK(eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, e));
    for (int i = 0; i < 8000; i++)
        sample_put(log, 3 * (i % 60) + 1);
    EXPECT_OK(eventlog_flush(log, e));
    eventlog_close(&log);
    EXPECT_OK(pml_file_read(scratch("events.jsonl"), 64 << 20, false, text, size, e));
    assert_true(*size > 2 << 20 && *size < 3 << 20);
}

static pml_status no_line(void *user, int64_t end, pml_error *err)
{
    (void)user, (void)end, (void)err;
    return PML_OK;
}

static void count_seen(void *user, const pml_message *event)
{
    (void)event;
    ++*(int64_t *)user;
}

/* What the file is found to be is what its bytes are found to be when they are looked at at once.
 */
static void expect_as_at_once(const char *text, size_t size)
{
    int64_t seen = 0, seen_at_once = 0;
    eventlog *log = NULL;
    size_t cut, whole;
    pml_error err = PML_ERROR_INIT, err_at_once = PML_ERROR_INIT;
    recovered r = {
        .path = "events.jsonl", .seen = count_seen, .line = no_line, .seen_user = &seen_at_once};
    pml_status status_at_once = eventlog_recover(&r, text, size, &whole, &err_at_once);
    put_file(scratch("events.jsonl"), text, size);
    pml_status status = eventlog_open(scratch_root, count_seen, &seen, &log, &cut, &err);
    assert_int_equal(status, status_at_once);
    assert_int_equal(seen, seen_at_once);
    if (status == PML_OK) {
        assert_int_equal(cut, size - whole);
        assert_int_equal(eventlog_last(log), r.lines);
        static char out[1 << 16];
        size_t n;
        int64_t next;
        EXPECT_OK(eventlog_read(log, r.lines, out, sizeof out, &n, &next, e));
        assert_memory_equal(out, text + whole - n - 1, n); /* so its place is known */
    } else {
        assert_string_equal(strstr(err.message, "events.jsonl"), err_at_once.message);
    }
    eventlog_close(&log);
}

/* Damaged and cut in each way around the places where one piece ends and the next begins, which
 * are a line at most before each mebibyte of the piece before. */
static void pieces_are_as_the_whole(void **state)
{
    (void)state;
    char *text, *image;
    size_t size;
    write_long_log(&text, &size);
    image = malloc(size);
    expect_as_at_once(text, size);
    for (size_t edge = 1 << 20; edge < size; edge += 1 << 20) {
        for (size_t at = edge - 1400; at < edge + 400; at += 199) {
            expect_as_at_once(text, at);
            for (int how = 0; how < 3; how++) {
                memcpy(image, text, size);
                char *newline = memchr(image + at, '\n', size - at);
                if (how == 0)
                    image[at] ^= 1;
                else
                    *newline = ' ';
                /* With little behind it, it may be a tear. */
                expect_as_at_once(image, how == 2 ? at + 1000 : size);
            }
        }
    }
    free(image);
    free(text);
}

/* What has no end for longer than anything was unsynced is damage. */
static void nothing_long_is_without_an_end(void **state)
{
    (void)state;
    static const size_t lengths[] = {PML_LOG_TORN_MAX, PML_LOG_TORN_MAX + 1, 3 << 20};
    char *text;
    size_t size, cut, n;
    sample_write(&text, &size);
    text = realloc(text, size + (3 << 20));
    memset(text + size, 0, 3 << 20); /* as a file system leaves that has made room for it */
    for (int i = 0; i < 3; i++) {
        char words[32], *after;
        eventlog *log = NULL;
        pml_error err = PML_ERROR_INIT;
        put_file(scratch("events.jsonl"), text, size + lengths[i]);
        pml_status status = eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, &err);
        assert_int_equal(status, i == 0 ? PML_OK : PML_CORRUPT);
        eventlog_close(&log);
        EXPECT_OK(pml_file_read(scratch("events.jsonl"), 8 << 20, false, &after, &n, e));
        assert_int_equal(n, i == 0 ? size : size + lengths[i]);
        free(after);
        snprintf(words, sizeof words, "line %d: no end", SAMPLE_EVENTS + 1);
        assert_true(i == 0 || strstr(err.message, words) != NULL);
    }
    free(text);
}

/* Wherever in it the disk does not give a page: an error with words, and the log as it was. */
static void what_the_disk_does_not_give_is_told(void **state)
{
    (void)state;
    char *text, *after;
    size_t size, cut, n_after;
    write_long_log(&text, &size);
    disk_control *disk = disk_control_here();
    snprintf(disk->read_of, sizeof disk->read_of, "/events.jsonl");
    disk->read_code = EIO;
    for (int64_t n = 1;; n++) {
        eventlog *log = NULL;
        pml_error err = PML_ERROR_INIT;
        disk->reads = 0;
        disk->read_to = n;
        disk->read_from = n;
        pml_status status = eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, &err);
        disk->read_from = 0;
        if (status == PML_OK) {
            eventlog_close(&log);
            assert_int_equal(n, 4); /* one of each piece has failed */
            break;
        }
        assert_int_equal(status, PML_IO);
        assert_non_null(strstr(err.message, scratch("events.jsonl")));
        assert_non_null(strstr(err.message, strerror(EIO)));
        EXPECT_OK(pml_file_read(scratch("events.jsonl"), 64 << 20, false, &after, &n_after, e));
        assert_int_equal(n_after, size);
        assert_memory_equal(after, text, size);
        free(after);
    }
    disk->read_of[0] = '\0';
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_do_not_write_one_log),
        cmocka_unit_test(torn_at_every_byte),
        cmocka_unit_test(garbage_behind_a_tear),
        cmocka_unit_test(pages_out_of_order),
        cmocka_unit_test(no_tear_is_long),
        cmocka_unit_test(every_flip_is_seen),
        cmocka_unit_test(pieces_are_as_the_whole),
        cmocka_unit_test(nothing_long_is_without_an_end),
        cmocka_unit_test(what_the_disk_does_not_give_is_told),
    };
    return cmocka_run_group_tests(tests, sample_scratch, scratch_teardown);
}
