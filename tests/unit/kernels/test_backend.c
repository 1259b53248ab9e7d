/* The CPU backend around its ops: device, threads, memory, transfers. */
#include "kernels/fixture.h"

#include <sys/mman.h>
#include <unistd.h>

#include "pml_op/cpu.h"

static void test_open(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    assert_int_equal(cpu->abi, PML_BACKEND_ABI);
    assert_string_equal(cpu->name, "cpu");
    assert_null(cpu->op.allreduce);
    assert_null(cpu->graph_begin);
    pml_error err = PML_ERROR_INIT;
    pml_device *d = NULL;
    const int refused[] = {-1, 1000000};
    for (int i = 0; i < 2; i++) {
        pml_device_options options = {.threads = refused[i]};
        assert_int_equal(cpu->open(&options, &d, &err), PML_INVALID);
        assert_null(d);
    }
    cpu->close(&d); /* nothing there: nothing happens */
    pml_device_options all = {0};
    assert_int_equal(cpu->open(&all, &d, &err), PML_OK);
    pml_device_info info;
    assert_int_equal(cpu->info(d, &info, &err), PML_OK);
    assert_true(info.threads >= 1 && info.threads <= sysconf(_SC_NPROCESSORS_ONLN));
    assert_true(info.memory_total > 0 && info.memory_free <= info.memory_total);
    assert_true(strlen(info.name) > 0 && strlen(info.instructions) > 0);
    assert_ptr_equal(strstr(info.libraries, "OpenBLAS "), info.libraries);
    cpu->close(&d);
    assert_null(d);
}

static void test_alloc(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    pml_error err = PML_ERROR_INIT;
    void *base = NULL;
    const size_t sizes[] = {1, 4096, 4097, 5 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_int_equal(cpu->alloc(device, sizes[i], &base, &err), PML_OK);
        assert_int_equal((uintptr_t)base % 256, 0);
        for (size_t byte = 0; byte < sizes[i]; byte++)
            assert_int_equal(((unsigned char *)base)[byte], 0);
        memset(base, 1, sizes[i]);
        cpu->free(device, &base, sizes[i]);
        assert_null(base);
        cpu->free(device, &base, sizes[i]);
    }
    assert_int_equal(cpu->alloc(device, 0, &base, &err), PML_INVALID);
    assert_null(base);
    pml_device_info info;
    assert_int_equal(cpu->info(device, &info, &err), PML_OK);
    const size_t refused[] = {info.memory_total + 1, SIZE_MAX, SIZE_MAX - 4096, SIZE_MAX / 2};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(cpu->alloc(device, refused[i], &base, &err), PML_NO_MEMORY);
        assert_null(base);
    }
}

/* Every page is there after alloc: the resident set grows by the block at once. */
static void test_alloc_is_present(void **state)
{
    (void)state;
    enum { BYTES = 64 << 20 };
    long before, after, ignored;
    pml_error err = PML_ERROR_INIT;
    void *base = NULL;
    FILE *file = fopen("/proc/self/statm", "re");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%ld %ld", &ignored, &before), 2);
    assert_int_equal(pml_backend_cpu()->alloc(device, BYTES, &base, &err), PML_OK);
    assert_non_null(freopen("/proc/self/statm", "re", file));
    assert_int_equal(fscanf(file, "%ld %ld", &ignored, &after), 2);
    fclose(file);
    assert_true((after - before) * sysconf(_SC_PAGESIZE) >= BYTES - (1 << 20));
    pml_backend_cpu()->free(device, &base, BYTES);
}

static void test_transfers(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    pml_error err = PML_ERROR_INIT;
    char from[5] = "abcd", middle[5] = "", to[5] = "";
    assert_int_equal(cpu->upload(queue, middle, from, 5, &err), PML_OK);
    assert_int_equal(cpu->download(queue, to, middle, 5, &err), PML_OK);
    assert_int_equal(cpu->sync(queue, &err), PML_OK);
    assert_string_equal(to, "abcd");
    assert_int_equal(cpu->upload(queue, NULL, NULL, 0, &err), PML_OK);
    assert_int_equal(cpu->upload(queue, NULL, from, 1, &err), PML_INVALID);
    assert_int_equal(cpu->download(queue, to, NULL, 1, &err), PML_INVALID);
}

/* Rows of a file to rows that are longer, which keep their ends. */
static void test_rows_of_a_file(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    pml_error err = PML_ERROR_INIT;
    char to[13] = "............";
    int fd = memfd_create("rows", MFD_CLOEXEC);
    assert_int_equal(write(fd, "0123456789", 10), 10);
    pml_file_at from = {fd, 2, "rows"};
    assert_int_equal(cpu->upload_file(queue, to, 4, &from, 3, 2, &err), PML_OK);
    assert_int_equal(cpu->uploaded(queue, &err), PML_OK);
    assert_string_equal(to, "234.567.....");
    assert_int_equal(cpu->upload_file(queue, to + 8, 99, &from, 3, 1, &err), PML_OK);
    assert_string_equal(to, "234.567.234.");
    assert_int_equal(cpu->upload_file(queue, to, 2, &from, 2, 3, &err), PML_OK);
    assert_string_equal(to, "2345677.234.");
    assert_int_equal(cpu->upload_file(queue, to, 4, &from, 3, 3, &err), PML_CORRUPT);
    assert_non_null(strstr(err.message, "rows has no byte 10"));
    close(fd);
}

/* What is read by several threads, in many pieces, is the same bytes; a file's end within them is
 * told once, and memory in pieces is all there and clear. */
static void test_large_file(void **state)
{
    (void)state;
    enum { BYTES = 37 << 20, WIDTH = 1000, PITCH = 1003, ROWS = 3001 };
    const pml_backend *cpu = pml_backend_cpu();
    pml_error err = PML_ERROR_INIT;
    unsigned char *want = must_alloc(BYTES);
    void *memory = NULL;
    assert_int_equal(cpu->alloc(device, BYTES + 8, &memory, &err), PML_OK);
    unsigned char *to = memory;
    for (size_t i = 0; i < BYTES + 8; i++)
        assert_int_equal(to[i], 0);
    for (size_t i = 0; i < BYTES; i++)
        want[i] = (unsigned char)(random_bits() >> 56 | 1);
    int fd = memfd_create("large", MFD_CLOEXEC);
    assert_int_equal(write(fd, want, BYTES), BYTES);
    pml_file_at from = {fd, 0, "large"};
    assert_int_equal(cpu->upload_file(queue, to, BYTES, &from, BYTES, 1, &err), PML_OK);
    assert_memory_equal(to, want, BYTES);
    assert_int_equal(to[BYTES], 0);
    memset(to, 0, BYTES);
    from.at = 77;
    assert_int_equal(cpu->upload_file(queue, to, PITCH, &from, WIDTH, ROWS, &err), PML_OK);
    for (size_t row = 0; row < ROWS; row++) {
        assert_memory_equal(to + row * PITCH, want + 77 + row * WIDTH, WIDTH);
        for (size_t i = WIDTH; i < PITCH; i++)
            assert_int_equal(to[row * PITCH + i], 0);
    }
    assert_int_equal(cpu->upload_file(queue, to, BYTES, &from, BYTES, 1, &err), PML_CORRUPT);
    assert_non_null(strstr(err.message, "large has no byte 38797312"));
    close(fd);
    cpu->free(device, &memory, BYTES + 8);
    free(want);
}

/* A plan made without a device holds on this one. */
static void test_workspace_without_device(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    pml_op_args args = {.linear = {.x = {NULL, 100, 30, 30, PML_F32},
                                   .w = {NULL, 50, 30, 30, PML_F32},
                                   .y = {NULL, 100, 50, 50, PML_F32},
                                   .a = {NULL, 4, 30, 30, PML_F32},
                                   .b = {NULL, 50, 4, 4, PML_F32},
                                   .parts = 1,
                                   .part_cols = {50},
                                   .lora_parts = 1,
                                   .rank = 4}};
    size_t without_u = cpu->workspace(NULL, PML_OP_linear, &args);
    assert_int_equal(without_u, 100 * 4 * sizeof(float));
    assert_int_equal(cpu->workspace(device, PML_OP_linear, &args), without_u);
    args.linear.u = (pml_view){NULL, 100, 4, 4, PML_F32}; /* given: it has rows */
    assert_int_equal(cpu->workspace(NULL, PML_OP_linear, &args), 0);
    pml_op_args head = {.head_loss = {.x = {NULL, 100, 30, 30, PML_F32},
                                      .w = {NULL, 1000, 30, 30, PML_F32},
                                      .rows = {NULL, 1, 90, 90, PML_I32},
                                      .chunk = 16}};
    size_t chunk = cpu->workspace(NULL, PML_OP_head_loss, &head);
    assert_in_range(chunk, 16 * 1000 * 4, 16 * 1100 * 4);
    head.head_loss.chunk = 1000; /* no more than there are labelled rows */
    assert_in_range(cpu->workspace(NULL, PML_OP_head_loss, &head), 90 * 1000 * 4, 90 * 1100 * 4);
    assert_int_equal(cpu->workspace(NULL, PML_OP_COUNT, &head), 0);
}

/* A plan asks for the most rows a batch may have; a smaller batch must do with that. */
static void test_workspace_grows_with_rows(void **state)
{
    (void)state;
    const pml_backend *cpu = pml_backend_cpu();
    size_t most[3] = {0};
    for (int64_t rows = 1; rows <= 3000; rows++) {
        const pml_view x = {NULL, rows, 8, 8, PML_F32}, y = {NULL, rows, 6, 6, PML_F32};
        const pml_view w = {NULL, 6, 8, 8, PML_F32}, b = {NULL, 6, 2, 2, PML_F32};
        const pml_view a = {NULL, 2, 8, 8, PML_F32};
        pml_op_args norm = {.rmsnorm_bwd = {.x = x, .dweight = {NULL, 1, 8, 8, PML_F32}}};
        pml_op_args linear = {.linear_bwd = {.x = x,
                                             .dy = y,
                                             .w = w,
                                             .a = a,
                                             .b = b,
                                             .parts = 1,
                                             .part_cols = {6},
                                             .lora_parts = 1,
                                             .rank = 2}};
        pml_op_args head = {
            .head_loss = {.x = x, .w = w, .rows = {NULL, 1, rows, rows, PML_I32}, .chunk = 64}};
        const size_t bytes[3] = {cpu->workspace(NULL, PML_OP_rmsnorm_bwd, &norm),
                                 cpu->workspace(NULL, PML_OP_linear_bwd, &linear),
                                 cpu->workspace(NULL, PML_OP_head_loss, &head)};
        for (int i = 0; i < 3; i++) {
            assert_true(bytes[i] > 0 && bytes[i] >= most[i]);
            most[i] = bytes[i];
        }
    }
}

static void test_prepare_process_is_idle_when_told(void **state)
{
    (void)state;
    char name[] = "test", *argv[] = {name, NULL};
    assert_int_equal(setenv("OPENBLAS_CORETYPE", "Haswell", 1), 0);
    assert_int_equal(pml_cpu_prepare_process(1, argv), PML_OK); /* the user has chosen */
    assert_string_equal(getenv("OPENBLAS_CORETYPE"), "Haswell");
    assert_int_equal(pml_cpu_prepare_process(0, argv), PML_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_alloc),
        cmocka_unit_test(test_alloc_is_present),
        cmocka_unit_test(test_transfers),
        cmocka_unit_test(test_rows_of_a_file),
        cmocka_unit_test(test_large_file),
        cmocka_unit_test(test_workspace_without_device),
        cmocka_unit_test(test_workspace_grows_with_rows),
        cmocka_unit_test(test_prepare_process_is_idle_when_told),
    };
    return run_on_devices(tests);
}
