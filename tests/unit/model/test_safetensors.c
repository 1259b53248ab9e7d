#include "scratch.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "pml/model/safetensors.h"

/* A file from a header's text and so many bytes of data (0, 1, 2, …). Returns its path. */
static const char *made(const char *name, const char *header, size_t data)
{
    static unsigned char bytes[4096];
    const char *path = scratch(name);
    size_t n = strlen(header);
    assert_true(8 + n + data <= sizeof bytes);
    for (int i = 0; i < 8; i++)
        bytes[i] = (unsigned char)((uint64_t)n >> (8 * i));
    memcpy(bytes + 8, header, n);
    for (size_t i = 0; i < data; i++)
        bytes[8 + n + i] = (unsigned char)i;
    put_file(path, bytes, 8 + n + data);
    return path;
}

static void refuse(pml_status code, const char *header, size_t data, const char *words)
{
    pml_safetensors *file = NULL;
    const char *path = made("refused", header, data);
    EXPECT_FAIL(code, words, pml_safetensors_open(path, &file, e));
    EXPECT_FAIL(code, path, pml_safetensors_open(path, &file, e)); /* by name */
    assert_null(file);
}

static void test_reads_what_is_there(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    const char *path = made("good",
                            "{\"__metadata__\":{\"format\":\"pt\"},"
                            "\"b\":{\"dtype\":\"F8_E4M3\",\"shape\":[2],\"data_offsets\":[24,26]},"
                            "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                            "\"none\":{\"dtype\":\"I64\",\"shape\":[0,5],\"data_offsets\":[24,24]},"
                            "\"one\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[26,27]}}   ",
                            27);
    EXPECT_OK(pml_safetensors_open(path, &file, e));
    assert_int_equal(pml_safetensors_count(file), 4);
    assert_string_equal(pml_safetensors_at(file, 0)->name, "a");
    assert_string_equal(pml_safetensors_metadata(file, "format"), "pt");
    assert_null(pml_safetensors_metadata(file, "other"));

    const pml_stored *t = pml_safetensors_find(file, "a");
    assert_non_null(t);
    assert_int_equal(t->dtype, PML_F32);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->elements, 6);
    assert_int_equal(t->bytes, 24);
    unsigned char byte;
    EXPECT_OK(pml_stored_read(t, 5, 1, &byte, e));
    assert_int_equal(byte, 5);
    assert_string_equal(t->path, path);
    t = pml_safetensors_find(file, "b");
    assert_int_equal(t->dtype, PML_DTYPE_COUNT);
    assert_string_equal(t->dtype_name, "F8_E4M3");
    EXPECT_OK(pml_stored_read(t, 0, 1, &byte, e));
    assert_int_equal(byte, 24);
    assert_int_equal(pml_safetensors_find(file, "none")->bytes, 0);
    assert_int_equal(pml_safetensors_find(file, "one")->elements, 1);
    assert_null(pml_safetensors_find(file, "c"));

    EXPECT_OK(pml_safetensors_need(file, "a", 2, 3, &t, e));
    EXPECT_FAIL(PML_INVALID, "a has shape [2, 3], the model needs [3, 2]",
                pml_safetensors_need(file, "a", 3, 2, &t, e));
    EXPECT_FAIL(PML_INVALID, "the model needs [6]", pml_safetensors_need(file, "a", 6, 0, &t, e));
    EXPECT_FAIL(PML_NOT_FOUND, "no tensor c", pml_safetensors_need(file, "c", 1, 0, &t, e));
    pml_safetensors_close(&file);
    assert_null(file);
    pml_safetensors_close(&file);
}

/* Pages of files and shared memory in this process. */
static long shared_pages(void)
{
    char text[128] = "";
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_true(fread(text, 1, sizeof text - 1, f) > 0);
    fclose(f);
    long whole, resident, shared = -1;
    assert_int_equal(sscanf(text, "%ld %ld %ld", &whole, &resident, &shared), 3);
    return shared;
}

/* Read into the caller's memory: no page of the file becomes this process's. Cut short meanwhile,
 * it is an error that says where. */
static void test_reads_without_mapping(void **state)
{
    (void)state;
    enum { N = 4 << 20 };
    static const char header[] =
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[4194304],\"data_offsets\":[0,4194304]}}";
    size_t begin = 8 + sizeof header - 1;
    unsigned char *bytes = calloc(2, begin + N), *to = bytes + begin + N;
    assert_non_null(bytes);
    bytes[0] = sizeof header - 1;
    memcpy(bytes + 8, header, sizeof header - 1);
    for (size_t i = 0; i < N; i++)
        bytes[begin + i] = (unsigned char)(i / 4096 + i);
    const char *path = scratch("pages");
    put_file(path, bytes, begin + N);

    pml_safetensors *file = NULL;
    EXPECT_OK(pml_safetensors_open(path, &file, e));
    const pml_stored *t = pml_safetensors_find(file, "a");
    long page = sysconf(_SC_PAGESIZE), before = shared_pages();
    EXPECT_OK(pml_stored_read(t, 0, N, to, e));
    assert_memory_equal(to, bytes + begin, N);
    assert_true(shared_pages() - before <= N / page / 8);
    EXPECT_OK(pml_stored_read(t, 70001, 5, to, e));
    assert_memory_equal(to, bytes + begin + 70001, 5);
    EXPECT_FAIL(PML_INTERNAL, "which has", pml_stored_read(t, N - 1, 2, to, e));
    EXPECT_FAIL(PML_INTERNAL, "which has", pml_stored_read(t, N + 1, 0, to, e));

    char words[64];
    snprintf(words, sizeof words, "pages has no byte %zu", begin + 1000);
    assert_int_equal(truncate(path, (off_t)(begin + 1000)), 0);
    EXPECT_FAIL(PML_CORRUPT, words, pml_stored_read(t, 0, N, to, e));
    EXPECT_FAIL(PML_CORRUPT, "pages has no byte", pml_stored_read(t, N - 1, 1, to, e));
    EXPECT_OK(pml_stored_read(t, 0, 1000, to, e));
    pml_safetensors_close(&file);
    free(bytes);
}

static void test_refuses_damage_by_name(void **state)
{
    (void)state;
    const struct {
        const char *entry;
        size_t data;
        const char *words;
    } cases[] = {
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}", 7, "outside the file"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}", 9, "after the last tensor"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}", 12, "a hole"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}", 4, "need 8"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}", 8, "outside"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}", 8, "outside"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}", 8, "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{}}", 8, "data_offsets"},
        {"{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]}", 8,
         "outside"},
        {"{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,0]}", 0, "shape"},
        {"{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}", 4, "shape"},
        {"{\"dtype\":\"F32\",\"shape\":7,\"data_offsets\":[0,4]}", 4, "shape"},
        {"{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}", 0,
         "shape"},
        {"{\"dtype\":\"F64\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}", 0, "size"},
        {"{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}", 1, "size"},
        {"{\"shape\":[1],\"data_offsets\":[0,4]}", 4, "dtype"},
        {"[]", 0, "not an object"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char header[512];
        snprintf(header, sizeof header, "{\"weight\":%s}", cases[i].entry);
        refuse(PML_CORRUPT, header, cases[i].data, cases[i].words);
        refuse(PML_CORRUPT, header, cases[i].data, "weight");
    }
    refuse(PML_UNSUPPORTED, "{\"w\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
           "F99");
    refuse(PML_UNSUPPORTED,
           "{\"w\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1,
           "9 dimensions");
    refuse(PML_CORRUPT,
           "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
           "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}",
           6, "overlap");
    refuse(PML_CORRUPT, "{\"__metadata__\":{\"k\":1}}", 0, "__metadata__");
    refuse(PML_CORRUPT, "{\"__metadata__\":[]}", 0, "__metadata__");
    refuse(PML_CORRUPT, "{}", 3, "data without tensors");
    refuse(PML_CORRUPT, "[[[[[[[[[[]]]]]]]]]]", 0, "not a safetensors file");
    refuse(PML_CORRUPT, "{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}", 1, "JSON");
}

static void test_refuses_lengths(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    put_file(scratch("short"), "\2\0\0\0\0\0\0\0{", 9);
    EXPECT_FAIL(PML_CORRUPT, "too few", pml_safetensors_open(scratch("short"), &file, e));
    put_file(scratch("huge"), "\377\377\377\377\377\377\377\377{}", 10);
    EXPECT_FAIL(PML_CORRUPT, "cannot be in a file",
                pml_safetensors_open(scratch("huge"), &file, e));
    put_file(scratch("past"), "\3\0\0\0\0\0\0\0{}", 10);
    EXPECT_FAIL(PML_CORRUPT, "cannot be in a file",
                pml_safetensors_open(scratch("past"), &file, e));
    EXPECT_FAIL(PML_NOT_FOUND, "none", pml_safetensors_open(scratch("none"), &file, e));
    EXPECT_FAIL(PML_INVALID, "regular", pml_safetensors_open(scratch_root, &file, e));
    put_file(scratch("least"), "\2\0\0\0\0\0\0\0{}", 10);
    EXPECT_OK(pml_safetensors_open(scratch("least"), &file, e));
    assert_int_equal(pml_safetensors_count(file), 0);
    assert_null(pml_safetensors_find(file, "x"));
    pml_safetensors_close(&file);
}

/* ---- written files ---- */

static const float values[6] = {1, -2, 3.5F, -0.0F, 1e30F, 1e-40F};

static void write_file(const char *path, const char *first, const char *second)
{
    pml_safetensors_writer *writer = NULL;
    int64_t matrix[] = {2, 3}, vector[] = {3};
    EXPECT_OK(pml_safetensors_writer_new(path, 0600, &writer, e));
    EXPECT_OK(pml_safetensors_writer_metadata(writer, "format", "pt", e));
    EXPECT_OK(pml_safetensors_writer_add(writer, first, PML_F32, matrix, 2, e));
    EXPECT_OK(pml_safetensors_writer_add(writer, second, PML_U8, vector, 1, e));
    EXPECT_OK(pml_safetensors_writer_write(writer, values, 10, e)); /* in odd pieces */
    EXPECT_OK(pml_safetensors_writer_write(writer, (const char *)values + 10, 14, e));
    EXPECT_OK(pml_safetensors_writer_write(writer, "abc", 3, e));
    EXPECT_OK(pml_safetensors_writer_finish(writer, e));
    pml_safetensors_writer_destroy(&writer);
    assert_null(writer);
}

static void test_writer_round_trip(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    const pml_stored *t;
    write_file(scratch("written"), "m", "v");
    EXPECT_OK(pml_safetensors_open(scratch("written"), &file, e));
    EXPECT_OK(pml_safetensors_need(file, "m", 2, 3, &t, e));
    char data[sizeof values];
    EXPECT_OK(pml_stored_read(t, 0, sizeof values, data, e));
    assert_memory_equal(data, values, sizeof values);
    assert_int_equal(t->at % 64, 0);
    EXPECT_OK(pml_safetensors_need(file, "v", 3, 0, &t, e));
    EXPECT_OK(pml_stored_read(t, 0, 3, data, e));
    assert_memory_equal(data, "abc", 3);
    assert_string_equal(pml_safetensors_metadata(file, "format"), "pt");
    pml_safetensors_close(&file);
}

static void test_writer_keeps_its_promises(void **state)
{
    (void)state;
    pml_safetensors_writer *writer = NULL;
    int64_t shape[] = {4}, bad[] = {-1};
    put_text(scratch("kept"), "old");
    EXPECT_OK(pml_safetensors_writer_new(scratch("kept"), 0600, &writer, e));
    EXPECT_OK(pml_safetensors_writer_add(writer, "x", PML_U8, shape, 1, e));
    EXPECT_FAIL(PML_INVALID, "taken", pml_safetensors_writer_add(writer, "x", PML_U8, shape, 1, e));
    EXPECT_FAIL(PML_INVALID, "taken",
                pml_safetensors_writer_add(writer, "__metadata__", PML_U8, shape, 1, e));
    EXPECT_FAIL(PML_INVALID, "impossible",
                pml_safetensors_writer_add(writer, "y", PML_U8, bad, 1, e));
    EXPECT_FAIL(PML_INVALID, "dimensions",
                pml_safetensors_writer_add(writer, "y", PML_DTYPE_COUNT, shape, 1, e));
    EXPECT_FAIL(PML_INVALID, "more data", pml_safetensors_writer_write(writer, "12345", 5, e));
    EXPECT_OK(pml_safetensors_writer_write(writer, "123", 3, e));
    EXPECT_FAIL(PML_INVALID, "before the first data",
                pml_safetensors_writer_add(writer, "y", PML_U8, shape, 1, e));
    EXPECT_FAIL(PML_INVALID, "before the first data",
                pml_safetensors_writer_metadata(writer, "k", "v", e));
    EXPECT_FAIL(PML_INVALID, "3 written", pml_safetensors_writer_finish(writer, e));
    pml_safetensors_writer_destroy(&writer);

    char *text = NULL;
    size_t size;
    EXPECT_OK(pml_file_read(scratch("kept"), 100, false, &text, &size, e));
    assert_string_equal(text, "old"); /* as if nothing had been written */
    free(text);
}

/* The bytes as a file in memory: thousands of them would keep a disk busy. */
static const char *in_memory(int fd, const char *bytes, size_t size)
{
    static char path[32];
    assert_int_equal(ftruncate(fd, 0), 0);
    assert_int_equal(pwrite(fd, bytes, size, 0), size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return path;
}

/* Every bit of the header flipped, and every length cut: answered, never a crash, and what is
 * accepted stays inside the file. */
static void test_survives_every_flipped_bit(void **state)
{
    (void)state;
    char *bytes = NULL;
    size_t size;
    int fd = memfd_create("flipped", MFD_CLOEXEC);
    assert_true(fd >= 0);
    write_file(scratch("flip"), "m", "v");
    EXPECT_OK(pml_file_read(scratch("flip"), 100000, false, &bytes, &size, e));
    size_t header = size - 27;
    int refused = 0;
    for (size_t bit = 0; bit < 8 * header; bit++) {
        pml_safetensors *file = NULL;
        pml_error err = PML_ERROR_INIT;
        bytes[bit / 8] ^= (char)(1 << bit % 8);
        const char *path = in_memory(fd, bytes, size);
        bytes[bit / 8] ^= (char)(1 << bit % 8);
        if (pml_safetensors_open(path, &file, &err) != PML_OK) {
            assert_true(err.code == PML_CORRUPT || err.code == PML_UNSUPPORTED);
            assert_non_null(strstr(err.message, path));
            refused++;
            continue;
        }
        size_t total = 0;
        for (size_t i = 0; i < pml_safetensors_count(file); i++)
            total += pml_safetensors_at(file, i)->bytes;
        assert_int_equal(total, 27);
        pml_safetensors_close(&file);
    }
    assert_true(refused > 500);
    for (size_t cut = 0; cut < size; cut++) {
        pml_safetensors *file = NULL;
        const char *path = in_memory(fd, bytes, cut);
        EXPECT_FAIL(PML_CORRUPT, path, pml_safetensors_open(path, &file, e));
    }
    free(bytes);
    close(fd);
}

/* ---- folders ---- */

static void put_index(const char *folder, const char *map)
{
    char text[512], name[64];
    snprintf(text, sizeof text, "{\"metadata\":{\"total_size\":54},\"weight_map\":%s}", map);
    snprintf(name, sizeof name, "%s/model.safetensors.index.json", folder);
    put_text(scratch(name), text);
}

static void test_sharded_folder(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    EXPECT_OK(pml_folder_make(scratch("shards"), e));
    write_file(scratch("shards/one.safetensors"), "a", "c");
    write_file(scratch("shards/two.safetensors"), "b", "d");
    put_index("shards", "{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\","
                        "\"c\":\"one.safetensors\",\"d\":\"two.safetensors\"}");
    EXPECT_OK(pml_safetensors_open_folder(scratch("shards"), &file, e));
    assert_int_equal(pml_safetensors_count(file), 4);
    static const char *const order[] = {"a", "b", "c", "d"};
    for (size_t i = 0; i < 4; i++)
        assert_string_equal(pml_safetensors_at(file, i)->name, order[i]);
    assert_non_null(strstr(pml_safetensors_find(file, "d")->path, "two.safetensors"));
    pml_safetensors_close(&file);
}

/* No descriptor is left for the second shard: said, and the first is closed again. */
static void test_shards_beyond_the_limit_of_files(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    struct rlimit before, few;
    const int next = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_true(next >= 0 && getrlimit(RLIMIT_NOFILE, &before) == 0);
    close(next);
    few = before;
    few.rlim_cur = (rlim_t)next + 1;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    EXPECT_FAIL(PML_IO, "raise ulimit -n",
                pml_safetensors_open_folder(scratch("shards"), &file, e));
    assert_null(file);
    const int again = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(again, next);
    close(again);
}

static void refuse_index(pml_status code, const char *map, const char *words)
{
    pml_safetensors *file = NULL;
    put_index("shards", map);
    EXPECT_FAIL(code, words, pml_safetensors_open_folder(scratch("shards"), &file, e));
    assert_null(file);
}

static void test_index_and_shards_must_agree(void **state)
{
    (void)state;
    pml_safetensors *file = NULL;
    refuse_index(PML_NOT_FOUND, "{\"a\":\"three.safetensors\"}", "three.safetensors is missing");
    refuse_index(PML_CORRUPT, "{\"a\":\"one.safetensors\"}", "does not name tensor c");
    refuse_index(PML_CORRUPT,
                 "{\"a\":\"one.safetensors\",\"c\":\"one.safetensors\",\"x\":\"one."
                 "safetensors\"}",
                 "tensor x is not in one");
    refuse_index(PML_CORRUPT, "{\"a\":\"../one.safetensors\"}", "not the name of a file");
    refuse_index(PML_CORRUPT, "{\"a\":\"/etc/passwd\"}", "not the name of a file");
    refuse_index(PML_CORRUPT, "{\"a\":7}", "not the name of a file");
    refuse_index(PML_INVALID, "7", "weight_map must be an object");
    write_file(scratch("shards/two.safetensors"), "a", "d");
    refuse_index(PML_CORRUPT, "{\"a\":\"one.safetensors\",\"d\":\"two.safetensors\"}",
                 "is in both");

    EXPECT_OK(pml_folder_make(scratch("bin"), e));
    EXPECT_FAIL(PML_NOT_FOUND, "neither", pml_safetensors_open_folder(scratch("bin"), &file, e));
    put_text(scratch("bin/pytorch_model.bin"), "");
    EXPECT_FAIL(PML_NOT_FOUND, "pickles", pml_safetensors_open_folder(scratch("bin"), &file, e));
    EXPECT_FAIL(PML_NOT_FOUND, "no folder", pml_safetensors_open_folder(scratch("no"), &file, e));
    write_file(scratch("bin/model.safetensors"), "a", "b");
    EXPECT_OK(pml_safetensors_open_folder(scratch("bin"), &file, e));
    assert_int_equal(pml_safetensors_count(file), 2);
    pml_safetensors_close(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reads_what_is_there),
        cmocka_unit_test(test_reads_without_mapping),
        cmocka_unit_test(test_refuses_damage_by_name),
        cmocka_unit_test(test_refuses_lengths),
        cmocka_unit_test(test_writer_round_trip),
        cmocka_unit_test(test_writer_keeps_its_promises),
        cmocka_unit_test(test_survives_every_flipped_bit),
        cmocka_unit_test(test_sharded_folder),
        cmocka_unit_test(test_shards_beyond_the_limit_of_files),
        cmocka_unit_test(test_index_and_shards_must_agree),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
