/* GGUF, both ways: bytes that begin as such a file go to the reader; anything else is JSON pairs
 * for the writer, and what it accepts the reader must give back. */
#include <math.h>
#include <string.h>

#include "fuzz.h"
#include "pml/model/gguf.h"

unsigned fuzz_accepted;

/* Every tensor lies in the file: read it whole, as far as a test has patience. */
static void read_tensors(const pml_gguf *file)
{
    static float values[1 << 16];
    for (size_t i = 0; i < pml_gguf_count(file); i++) {
        const pml_gguf_tensor *t = pml_gguf_at(file, i);
        FUZZ_EXPECT(t->name[0] != '\0' && t->elements > 0 && t->bytes > 0);
        uint64_t n = t->size[0] < 1 << 16 ? t->size[0] : 0;
        pml_error err = {0};
        FUZZ_EXPECT(pml_gguf_to_f32(t, 0, n, values, &err) == PML_OK);
        FUZZ_EXPECT(pml_gguf_to_f32(t, t->elements, 1, values, &err) == PML_INVALID ||
                    pml_gguf_row_bytes(t->type, 1) == 0);
    }
}

static int read_bytes(const uint8_t *data, size_t size)
{
    char path[32];
    pml_gguf *file = NULL;
    pml_error err = {0};
    int fd = fuzz_file(data, size, path);
    if (pml_gguf_open(path, &file, &err) == PML_OK) {
        fuzz_accepted++;
        read_tensors(file);
    } else {
        FUZZ_EXPECT(err.message[0] != '\0' && file == NULL);
    }
    pml_gguf_close(&file);
    close(fd);
    return 0;
}

/* Two tensors: one of 40 floats, one of two blocks. */
static pml_status write_file(const char *path, const pml_json *pairs, pml_error *err)
{
    static const float numbers[40] = {1, -2, 3};
    static const unsigned char blocks[2 * PML_GGUF_Q8_BYTES] = {0, 0x3C, 5};
    const uint64_t sizes[2][2] = {{8, 5}, {64, 1}};
    pml_gguf_writer *w = NULL;
    pml_status status = pml_gguf_writer_new(path, 0600, &w, err);
    if (status == PML_OK)
        status = pml_gguf_writer_string(w, "general.architecture", "llama", err);
    if (status == PML_OK)
        status = pml_gguf_writer_pairs(w, pairs, err);
    if (status == PML_OK)
        status = pml_gguf_writer_add(w, "a", PML_GGUF_F32, sizes[0], 2, err);
    if (status == PML_OK)
        status = pml_gguf_writer_add(w, "b", PML_GGUF_Q8_0, sizes[1], 1, err);
    if (status == PML_OK)
        status = pml_gguf_writer_write(w, numbers, sizeof numbers, err);
    if (status == PML_OK)
        status = pml_gguf_writer_write(w, blocks, sizeof blocks, err);
    if (status == PML_OK)
        status = pml_gguf_writer_finish(w, err);
    pml_gguf_writer_destroy(&w);
    return status;
}

static void compare(const char *path, const pml_json *pairs)
{
    pml_gguf *file = NULL;
    pml_error err = {0};
    float values[40];
    FUZZ_EXPECT(pml_gguf_open(path, &file, &err) == PML_OK);
    FUZZ_EXPECT(pml_gguf_pairs(file) == pml_json_length(pairs) + 1);
    for (size_t i = 0; i < pml_json_length(pairs); i++) {
        const pml_json *pair = pml_json_item(pairs, i);
        const char *key = pml_json_as_string(pml_json_field(pair, "key"));
        const char *type = pml_json_as_string(pml_json_field(pair, "type"));
        const char *want = pml_json_as_string(pml_json_field(pair, "value"));
        size_t n = 0;
        if (strcmp(type, "string") != 0)
            continue;
        const char *got = pml_gguf_string(file, key, &n);
        FUZZ_EXPECT(got != NULL && n == strlen(want) && memcmp(got, want, n) == 0);
    }
    FUZZ_EXPECT(pml_gguf_count(file) == 2 && pml_gguf_find(file, "b") != NULL);
    FUZZ_EXPECT(pml_gguf_to_f32(pml_gguf_find(file, "a"), 0, 40, values, &err) == PML_OK);
    FUZZ_EXPECT(values[1] == -2 && values[39] == 0);
    FUZZ_EXPECT(pml_gguf_to_f32(pml_gguf_find(file, "b"), 0, 32, values, &err) == PML_OK);
    FUZZ_EXPECT(values[0] == 5 && values[1] == 0);
    read_tensors(file);
    pml_gguf_close(&file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char path[64];
    pml_json *pairs = NULL;
    pml_error err = {0};
    if (size >= 4 && memcmp(data, "GGUF", 4) == 0)
        return read_bytes(data, size);
    if (path[0] == '\0')
        snprintf(path, sizeof path, "/tmp/pml-fuzz-gguf-%ld", (long)getpid());
    if (pml_json_parse((const char *)data, size, "pairs", &pml_json_file_limits, &pairs, &err) !=
        PML_OK)
        return 0;
    if (write_file(path, pairs, &err) == PML_OK) {
        fuzz_accepted++;
        compare(path, pairs);
    } else {
        FUZZ_EXPECT(err.message[0] != '\0' && access(path, F_OK) != 0);
    }
    unlink(path);
    pml_json_destroy(&pairs);
    return 0;
}
