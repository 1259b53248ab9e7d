/* Checkpoints of real steppers on disks that fail: whatever operation fails, what is there under a
 * checkpoint's name is whole, what was there before stays, and the next attempt succeeds. Flipped
 * bits: none is loaded.
 *
 *   disk FIXTURES */
#include "disk.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/train/checkpoint.h"
#include "pml_op/cpu.h"
#include "session.h"

static char root[] = "/tmp/pml-disk-XXXXXX";
static const int codes[] = {ENOSPC, EIO, EROFS, EDQUOT};

static char *in_root(const char *name)
{
    static char paths[4][400];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

static void set_faults(int64_t from, int64_t to, int code, bool half)
{
    disk_control *disk = disk_control_here();
    disk->from = disk->n = 0;
    disk->to = to;
    disk->code = code;
    disk->half = half;
    disk->from = from;
}

/* Operations of a write that succeeds. */
static int64_t count_operations(const pml_snapshot *snapshot, const char *folder)
{
    set_faults(0, 0, 0, false);
    MUST(pml_checkpoint_write(snapshot, folder, NULL, err));
    return disk_control_here()->n;
}

static bool is_there(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0;
}

/* Names in a folder that begin with a dot and are not . or .. */
static int leftovers(const char *folder)
{
    int n = 0;
    DIR *dir = opendir(folder);
    for (struct dirent *e = readdir(dir); e != NULL; e = readdir(dir))
        n += e->d_name[0] == '.' && strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(dir);
    return n;
}

/* The n-th operation fails, or all from it on. */
static void write_on_failing_disk(const pml_snapshot *snapshot, int64_t n, int code, bool stays,
                                  bool half)
{
    char *next = in_root("c/step-000002");
    pml_error err = PML_ERROR_INIT;
    set_faults(n, stays ? INT64_MAX : n, code, half);
    pml_status status = pml_checkpoint_write(snapshot, next, NULL, &err);
    char failed_at[600];
    snprintf(failed_at, sizeof failed_at, "%s", disk_control_here()->last);
    set_faults(0, 0, 0, false);
    bool only_closing = status == PML_OK && half; /* the other half was written by the next call */
    if (!only_closing) {
        check(status == PML_IO, "operation %lld (%s): %s", (long long)n, failed_at,
              pml_status_name(status));
        check(strstr(err.message, strerror(code)) != NULL && strstr(err.message, root) != NULL,
              "operation %lld (%s) is told as: %s", (long long)n, failed_at, err.message);
    }
    check(!is_there(next) || pml_checkpoint_verify(next, &err) == PML_OK,
          "operation %lld (%s) left half a checkpoint: %s", (long long)n, failed_at, err.message);
    check(pml_checkpoint_verify(in_root("c/step-000001"), &err) == PML_OK,
          "operation %lld (%s) hurt the one before: %s", (long long)n, failed_at, err.message);
    if (!is_there(next))
        MUST(pml_checkpoint_write(snapshot, next, NULL, err));
    MUST(pml_checkpoint_verify(next, err));
    check(leftovers(in_root("c")) == 0, "operation %lld (%s) left something behind", (long long)n,
          failed_at);
    MUST(pml_tree_remove(root, "c/step-000002", err));
}

static void check_writes(const pml_snapshot *snapshot, const char *what)
{
    MUST(pml_folder_make(in_root("c"), err));
    int64_t operations = count_operations(snapshot, in_root("c/step-000001"));
    check(operations > 30, "only %lld operations are counted", (long long)operations);
    for (size_t c = 0; c < sizeof codes / sizeof codes[0]; c++)
        for (int64_t n = 1; n <= operations; n++) {
            write_on_failing_disk(snapshot, n, codes[c], false, false);
            if (c < 2) {
                write_on_failing_disk(snapshot, n, codes[c], true, false);
                write_on_failing_disk(snapshot, n, codes[c], true, true);
            }
        }
    printf("%s: each of %lld operations failed\n", what, (long long)operations);
    MUST(pml_tree_remove(root, "c", err));
}

/* Whichever removal fails: the newest whole one is never among what goes. */
static void check_prune(const pml_snapshot *snapshot)
{
    char path[PML_PATH_MAX];
    for (int64_t n = 1, operations = 1; n <= operations; n++) {
        MUST(pml_folder_make(in_root("p"), err));
        for (int i = 1; i <= 4; i++) {
            char name[32];
            snprintf(name, sizeof name, "p/step-%06d", i);
            MUST(pml_checkpoint_write(snapshot, in_root(name), NULL, err));
        }
        char *damaged = in_root("p/step-000004/state.json");
        MUST(pml_file_write(damaged, "{}", 2, 0600, err));
        set_faults(n, n, EIO, false);
        pml_error err = PML_ERROR_INIT;
        pml_status status = pml_checkpoint_prune(in_root("p"), 1, -1, &err);
        bool reached = disk_control_here()->n >= n;
        operations = reached ? n + 1 : n;
        set_faults(0, 0, 0, false);
        check(status == (reached ? PML_IO : PML_OK), "removal %lld: %s", (long long)n,
              pml_status_name(status));
        MUST(pml_checkpoint_latest(in_root("p"), path, sizeof path, NULL, err));
        check(strstr(path, "step-000003") != NULL, "latest is %s after removal %lld failed", path,
              (long long)n);
        MUST(pml_checkpoint_prune(in_root("p"), 1, -1, err));
        MUST(pml_checkpoint_latest(in_root("p"), path, sizeof path, NULL, err));
        MUST(pml_tree_remove(root, "p", err));
        check(n < 1000, "the removals have no end");
    }
    /* None is whole, perhaps only now: then nothing goes. */
    MUST(pml_folder_make(in_root("p"), err));
    for (int i = 1; i <= 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "p/step-%06d", i);
        MUST(pml_checkpoint_write(snapshot, in_root(name), NULL, err));
        snprintf(name, sizeof name, "p/step-%06d/state.json", i);
        if (chmod(in_root(name), 0) != 0 || unlink(in_root(name)) != 0)
            abort();
    }
    check(pml_checkpoint_prune(in_root("p"), 1, -1, NULL) == PML_CORRUPT, "it is not said");
    check(is_there(in_root("p/step-000001")), "the oldest has gone");
    MUST(pml_tree_remove(root, "p", err));
}

/* A later timeline is newer, though it has fewer steps: who went back and trained again. */
static void check_order(pml_snapshot *snapshot, session *s, pml_train_state state)
{
    char path[PML_PATH_MAX];
    MUST(pml_folder_make(in_root("o"), err));
    for (int i = 0; i < 3; i++) {
        static const char *const names[] = {"o/step-000200", "o/step-001000", "o/step-000150"};
        state.timeline = i == 2;
        MUST(pml_snapshot_take(snapshot, s->stepper, &state, err));
        MUST(pml_checkpoint_write(snapshot, in_root(names[i]), NULL, err));
    }
    MUST(pml_checkpoint_prune(in_root("o"), 1, -1, err));
    MUST(pml_checkpoint_latest(in_root("o"), path, sizeof path, NULL, err));
    check(strstr(path, "step-000150") != NULL && !is_there(in_root("o/step-001000")),
          "latest is %s after going back", path);
    MUST(pml_tree_remove(root, "o", err));
}

/* A whole state.json is believed about its timeline, one with a 1 that became a 0 is not: the
 * newest checkpoint would look old, and nobody would look at it. */
static void check_timeline(pml_snapshot *snapshot, session *s, pml_train_state state)
{
    static const char before[] = "\"timeline\": 1";
    char path[PML_PATH_MAX], *text;
    size_t size;
    state.timeline = 1;
    MUST(pml_snapshot_take(snapshot, s->stepper, &state, err));
    MUST(pml_checkpoint_write(snapshot, in_root("t"), NULL, err));
    int64_t timeline;
    MUST(pml_checkpoint_timeline(in_root("t"), &timeline, err));
    check(timeline == 1, "a whole one's timeline is not read");
    snprintf(path, sizeof path, "%s", in_root("t/state.json"));
    MUST(pml_file_read(path, 1 << 20, false, &text, &size, err));
    char *at = strstr(text, before);
    FILE *file = fopen(path, "r+b");
    if (at == NULL || file == NULL)
        abort();
    at[sizeof before - 2] = '0';
    if (fwrite(text, 1, size, file) != size || fclose(file) != 0)
        abort();
    free(text);
    MUST(pml_checkpoint_timeline(in_root("t"), &timeline, err));
    check(timeline == INT64_MAX, "a damaged timeline is believed");
    MUST(pml_tree_remove(root, "t", err));
}

/* The n-th read below the folder fails, or all (n 0). */
static void set_read_faults(const char *of, int64_t n, int code)
{
    disk_control *disk = disk_control_here();
    disk->read_from = disk->reads = 0;
    snprintf(disk->read_of, sizeof disk->read_of, "%s", of);
    disk->read_to = n == 0 ? INT64_MAX : n;
    disk->read_code = code;
    disk->read_from = of[0] == '\0' ? 0 : n == 0 ? 1 : n;
}

/* Whatever cannot be read just now, and whyever: no older one is called the newest, and the newest
 * is not among what goes, though an older one has more steps. */
static void check_reads(pml_snapshot *snapshot, session *s, pml_train_state state)
{
    static const int read_codes[] = {EIO, EMFILE, ENOMEM};
    char path[PML_PATH_MAX];
    int64_t reads = 1;
    for (int64_t n = 1; n <= reads; n++) {
        pml_error err = PML_ERROR_INIT;
        int code = read_codes[n % 3];
        MUST(pml_folder_make(in_root("r"), err));
        for (int i = 0; i < 3; i++) {
            static const char *const names[] = {"r/step-000100", "r/step-000200", "r/step-000150"};
            state.timeline = i == 2;
            MUST(pml_snapshot_take(snapshot, s->stepper, &state, err));
            MUST(pml_checkpoint_write(snapshot, in_root(names[i]), NULL, err));
        }
        set_read_faults("/r/", n, code);
        pml_status status = pml_checkpoint_latest(in_root("r"), path, sizeof path, NULL, &err);
        bool reached = disk_control_here()->reads >= n;
        set_read_faults("", 0, 0);
        if (status == PML_OK)
            check(!reached && strstr(path, "step-000150") != NULL,
                  "read %lld failed, and the latest is %s", (long long)n, path);
        else
            check(status == PML_IO && strstr(err.message, strerror(code)) != NULL,
                  "read %lld failed: %s %s", (long long)n, pml_status_name(status), err.message);
        set_read_faults("/r/", n, code);
        status = pml_checkpoint_prune(in_root("r"), 1, -1, &err);
        reached = reached || disk_control_here()->reads >= n;
        set_read_faults("", 0, 0);
        check(status == PML_OK || strstr(err.message, strerror(code)) != NULL,
              "read %lld failed: %s %s", (long long)n, pml_status_name(status), err.message);
        MUST(pml_checkpoint_verify(in_root("r/step-000150"), err));
        MUST(pml_checkpoint_prune(in_root("r"), 1, -1, err));
        MUST(pml_checkpoint_latest(in_root("r"), path, sizeof path, NULL, err));
        check(strstr(path, "step-000150") != NULL && !is_there(in_root("r/step-000200")),
              "latest is %s after read %lld failed", path, (long long)n);
        MUST(pml_tree_remove(root, "r", err));
        reads = reached ? n + 1 : n;
        check(n < 1000, "the reads have no end");
    }
    check(reads > 20, "only %lld reads are counted", (long long)reads);
}

/* Whether it can be shown anywhere: what is damaged is not handed on to terminals. */
static bool is_plain(const char *text)
{
    while (*text >= ' ' && *text <= '~')
        text++;
    return *text == '\0';
}

/* One bit of one file, anywhere. */
static void check_flips(pml_snapshot *snapshot, int rounds)
{
    char name[300], path[600];
    MUST(pml_checkpoint_write(snapshot, in_root("f"), NULL, err));
    const char *files[16];
    int n = 0;
    DIR *dir = opendir(in_root("f"));
    for (struct dirent *e = readdir(dir); e != NULL && n < 16; e = readdir(dir))
        if (e->d_name[0] != '.')
            files[n++] = strdup(e->d_name);
    closedir(dir);
    srandom(3);
    for (int round = 0; round < rounds; round++) {
        snprintf(name, sizeof name, "f/%s", files[random() % n]);
        snprintf(path, sizeof path, "%s", in_root(name));
        char *text;
        size_t size;
        MUST(pml_file_read(path, 1 << 28, false, &text, &size, err));
        size_t bit = (size_t)random() % (8 * size);
        pml_error err = PML_ERROR_INIT;
        for (int twice = 0; twice < 2; twice++) {
            text[bit / 8] ^= (char)(1 << bit % 8);
            FILE *file = fopen(path, "r+b");
            if (file == NULL || fwrite(text, 1, size, file) != size || fclose(file) != 0)
                abort();
            pml_status status = pml_checkpoint_load(in_root("f"), snapshot, &err);
            check(status == (twice ? PML_OK : PML_CORRUPT), "bit %zu of %s: %s %s", bit, name,
                  pml_status_name(status), err.message);
            check(is_plain(err.message), "bit %zu of %s is in what is said of it", bit, name);
        }
        free(text);
    }
    for (int i = 0; i < n; i++)
        free((char *)files[i]);
    MUST(pml_tree_remove(root, "f", err));
}

static void check_case(const char *fixtures, const char *name)
{
    pml_train_config config;
    session s;
    pml_snapshot *snapshot;
    load_case(fixtures, name, &config);
    session_open(&(session_options){.config = &config}, &s);
    session_step(&s, NULL);
    pml_train_state state = {
        .step = 1, .applied = 1, .cursor = s.cursor, .learning_rate = 1e-3, .accumulation = 1};
    MUST(pml_stepper_identity(s.stepper, state.identity, sizeof state.identity, err));
    MUST(pml_snapshot_new(s.stepper, &config, &snapshot, err));
    MUST(pml_snapshot_take(snapshot, s.stepper, &state, err));
    check_writes(snapshot, name);
    check_flips(snapshot, 500);
    if (config.method == PML_METHOD_LORA) {
        check_prune(snapshot);
        check_order(snapshot, &s, state);
        check_timeline(snapshot, &s, state);
        check_reads(snapshot, &s, state);
    }
    pml_snapshot_destroy(&snapshot);
    session_close(&s);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    if (argc != 2 || mkdtemp(root) == NULL) {
        fprintf(stderr, "usage: disk FIXTURES\n");
        return EXIT_FAILURE;
    }
    disk_control *disk = disk_control_here();
    snprintf(disk->prefix, sizeof disk->prefix, "%s", root);
    disk->lazy = 1;
    check_case(argv[1], "qwen2-tied-lora");
    check_case(argv[1], "llama-tied-full");
    MUST(pml_tree_remove("/tmp", root + strlen("/tmp/"), err));
    return summary();
}
