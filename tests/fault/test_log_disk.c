/* The log on a disk that does not take it. */
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "disk.h"
#include "sample_log.h"
#include "scratch.h"

static const int codes[] = {ENOSPC, EIO, EROFS, EDQUOT};

static void clear_faults(void)
{
    disk_control *disk = disk_control_here();
    disk->from = disk->to = disk->n = 0;
    disk->half = 0;
}

static void set_faults(int64_t from, int64_t to, int code, bool half)
{
    disk_control *disk = disk_control_here();
    clear_faults();
    disk->to = to;
    disk->code = code;
    disk->half = half;
    disk->from = from;
}

/* After a failed fsync what was not synced may be gone: so it is. */
static void lose_unsynced(off_t synced)
{
    if (strncmp(disk_control_here()->last, "fdatasync", 9) != 0)
        return;
    disk_control_here()->last[0] = '\0';
    int64_t from = disk_control_here()->from;
    disk_control_here()->from = 0;
    int fd = open(scratch("events.jsonl"), O_WRONLY | O_CLOEXEC);
    off_t end = lseek(fd, 0, SEEK_END);
    static const char zeros[8192];
    for (off_t at = synced; at < end; at += (off_t)sizeof zeros)
        assert_true(pwrite(fd, zeros, (size_t)(end - at < 8192 ? end - at : 8192), at) > 0);
    close(fd);
    disk_control_here()->from = from;
}

static off_t log_bytes(void)
{
    struct stat st;
    assert_int_equal(stat(scratch("events.jsonl"), &st), 0);
    return st.st_size;
}

/* All events through a disk that fails from the n-th operation on for `length`; whether there were
 * so many. */
static bool survives(int64_t n, int64_t length, int code, bool half)
{
    eventlog *log;
    size_t cut, bytes;
    int announced = 0;
    bool failed = false;
    off_t synced = 0;
    unlink(scratch("events.jsonl"));
    EXPECT_OK(eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, e));
    set_faults(n, n + length - 1, code, half);
    for (int i = 0; i < SAMPLE_EVENTS; i++) {
        pml_error err = PML_ERROR_INIT;
        sample_put(log, i);
        pml_status status = eventlog_flush(log, &err);
        sample_take(log, &announced);
        if (status == PML_OK) {
            assert_int_equal(announced, i + 1);
            assert_int_equal(eventlog_waiting(log, &bytes), 0);
            if (i % 3 == 0)
                synced = log_bytes();
            continue;
        }
        failed = true;
        assert_int_equal(status, PML_IO);
        assert_non_null(strstr(err.message, "events.jsonl"));
        assert_non_null(strstr(err.message, strerror(code)));
        lose_unsynced(synced);
        /* What has been announced is there to be read again, whatever the disk does. */
        static char out[1 << 16];
        size_t size;
        int64_t next = 1;
        while (next <= announced) {
            EXPECT_OK(eventlog_read(log, next, out, sizeof out, &size, &next, e));
            char begin[24];
            int k = snprintf(begin, sizeof begin, "{\"seq\":");
            assert_memory_equal(out, begin, (size_t)k);
        }
    }
    bool reached = disk_control_here()->n >= n;
    assert_true(half ? reached || !failed : reached == failed); /* half a write is made good */
    clear_faults();
    EXPECT_OK(eventlog_flush(log, e));
    sample_take(log, &announced);
    assert_int_equal(announced, SAMPLE_EVENTS);
    eventlog_close(&log);
    log = sample_open(&cut);
    assert_int_equal(sample_seen, SAMPLE_EVENTS);
    assert_int_equal(cut, 0);
    eventlog_close(&log);
    return reached;
}

static void every_operation_fails_once(void **state)
{
    (void)state;
    int walked = 0;
    for (size_t c = 0; c < sizeof codes / sizeof codes[0]; c++)
        for (int half = 0; half < 2; half++)
            for (int64_t n = 1; survives(n, 1, codes[c], half != 0); n++)
                walked++;
    assert_true(walked > 8 * SAMPLE_EVENTS);
    print_message("%d operations made to fail, once each\n", walked);
}

static void a_full_disk_gets_room_again(void **state)
{
    (void)state;
    for (size_t c = 0; c < sizeof codes / sizeof codes[0]; c++)
        for (int64_t n = 1; n < SAMPLE_EVENTS; n++)
            assert_true(survives(n, 5 + n % 17, codes[c], n % 2 == 0));
}

/* A log that cannot be opened says which file and why, and is as it was. */
static void opening_fails_by_name(void **state)
{
    (void)state;
    char *text;
    size_t size, cut, n_after;
    sample_write(&text, &size);
    for (int64_t n = 1;; n++) {
        put_file(scratch("events.jsonl"), text, size - 5); /* torn: it has to be cut */
        set_faults(n, n, EIO, false);
        eventlog *log = NULL;
        pml_error err = PML_ERROR_INIT;
        pml_status status = eventlog_open(scratch_root, sample_ignore, NULL, &log, &cut, &err);
        clear_faults();
        if (status == PML_OK) {
            eventlog_close(&log);
            assert_true(n > 3); /* open, ftruncate and fsync have failed */
            break;
        }
        assert_int_equal(status, PML_IO);
        assert_non_null(strstr(err.message, scratch_root));
        assert_non_null(strstr(err.message, strerror(EIO)));
        char *after;
        EXPECT_OK(pml_file_read(scratch("events.jsonl"), 1 << 20, false, &after, &n_after, e));
        assert_memory_equal(after, text, n_after);
        free(after);
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_operation_fails_once),
        cmocka_unit_test(a_full_disk_gets_room_again),
        cmocka_unit_test(opening_fails_by_name),
    };
    return cmocka_run_group_tests(tests, sample_scratch, scratch_teardown);
}
