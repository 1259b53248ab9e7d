#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/model/convert.h"
#include "pml/model/gguf.h"

enum { NESTING_MAX = 4 };

typedef struct pair {
    const char *key, *value;
    uint64_t key_length, value_length; /* of a string */
    uint32_t kind;
} pair;

struct pml_gguf {
    unsigned char *base;
    size_t size, at;
    pair *pairs;
    size_t n_pairs;
    pml_gguf_tensor *tensors;
    size_t n_tensors;
    char name[512];
};

/* ---- a cursor that never leaves the file ---- */

static pml_status cut_off(const pml_gguf *g, pml_error *err)
{
    return PML_FAIL(err, PML_CORRUPT, "%s ends in the middle of its header, at byte %zu", g->name,
                    g->at);
}

static pml_status take(pml_gguf *g, uint64_t bytes, const unsigned char **out, pml_error *err)
{
    if (bytes > g->size - g->at)
        return cut_off(g, err);
    *out = g->base + g->at;
    g->at += (size_t)bytes;
    return PML_OK;
}

static pml_status take_number(pml_gguf *g, int bytes, uint64_t *value, pml_error *err)
{
    const unsigned char *from = NULL;
    pml_status status = take(g, (uint64_t)bytes, &from, err);
    *value = 0;
    for (int i = 0; status == PML_OK && i < bytes; i++)
        *value |= (uint64_t)from[i] << (8 * i);
    return status;
}

static pml_status take_string(pml_gguf *g, const char **text, uint64_t *length, pml_error *err)
{
    const unsigned char *from = NULL;
    pml_status status = take_number(g, 8, length, err);
    if (status == PML_OK)
        status = take(g, *length, &from, err);
    *text = (const char *)from;
    return status;
}

/* ---- pairs ---- */

static int kind_bytes(uint64_t kind)
{
    static const unsigned char bytes[PMLI_KIND_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return kind < PMLI_KIND_COUNT ? bytes[kind] : 0;
}

static pml_status skip_value(pml_gguf *g, uint64_t kind, int depth, pair *p, pml_error *err);

static pml_status skip_array(pml_gguf *g, int depth, pml_error *err)
{
    uint64_t kind, count, bytes;
    pml_status status = take_number(g, 4, &kind, err);
    if (status == PML_OK)
        status = take_number(g, 8, &count, err);
    if (status != PML_OK)
        return status;
    if (depth == NESTING_MAX)
        return PML_FAIL(err, PML_CORRUPT, "%s: arrays within arrays, %d deep", g->name, depth);
    int size = kind_bytes(kind);
    if (size > 0) {
        const unsigned char *from;
        return __builtin_mul_overflow(count, (uint64_t)size, &bytes) ? cut_off(g, err)
                                                                     : take(g, bytes, &from, err);
    }
    for (uint64_t i = 0; status == PML_OK && i < count; i++)
        status = skip_value(g, kind, depth + 1, NULL, err);
    return status;
}

static pml_status skip_value(pml_gguf *g, uint64_t kind, int depth, pair *p, pml_error *err)
{
    const unsigned char *from = NULL;
    const char *text;
    uint64_t length;
    pml_status status;
    if (kind == PMLI_KIND_ARRAY)
        return skip_array(g, depth, err);
    if (kind == PMLI_KIND_STRING) {
        status = take_string(g, &text, &length, err);
        if (p != NULL && status == PML_OK) {
            p->value = text;
            p->value_length = length;
        }
        return status;
    }
    if (kind_bytes(kind) == 0)
        return PML_FAIL(err, PML_CORRUPT, "%s: a value of unknown type %llu", g->name,
                        (unsigned long long)kind);
    return take(g, (uint64_t)kind_bytes(kind), &from, err);
}

static pml_status read_pairs(pml_gguf *g, uint64_t count, pml_error *err)
{
    if (count > (g->size - g->at) / 13) /* the least a pair takes */
        return cut_off(g, err);
    g->pairs = calloc(count > 0 ? count : 1, sizeof *g->pairs);
    if (g->pairs == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the header of %s", g->name);
    pml_status status = PML_OK;
    for (uint64_t i = 0; status == PML_OK && i < count; i++) {
        pair *p = &g->pairs[g->n_pairs++];
        uint64_t kind = 0;
        status = take_string(g, &p->key, &p->key_length, err);
        if (status == PML_OK)
            status = take_number(g, 4, &kind, err);
        p->kind = (uint32_t)kind;
        if (status == PML_OK)
            status = skip_value(g, kind, 0, p, err);
    }
    return status;
}

/* ---- tensors ---- */

static pml_status read_record(pml_gguf *g, pml_gguf_tensor *t, uint64_t *offset, pml_error *err)
{
    const char *name = NULL;
    uint64_t length = 0, n_dims = 0, type = 0;
    pml_status status = take_string(g, &name, &length, err);
    if (status == PML_OK && (length == 0 || length >= sizeof t->name))
        return PML_FAIL(err, PML_CORRUPT, "%s: a tensor's name has %llu bytes", g->name,
                        (unsigned long long)length);
    if (status == PML_OK && memchr(name, '\0', (size_t)length) != NULL) /* ours would end there */
        return PML_FAIL(err, PML_CORRUPT, "%s: a tensor's name has a zero byte in it", g->name);
    if (status == PML_OK)
        memcpy(t->name, name, (size_t)length);
    if (status == PML_OK)
        status = take_number(g, 4, &n_dims, err);
    if (status == PML_OK && (n_dims < 1 || n_dims > PML_GGUF_MAX_DIMS))
        return PML_FAIL(err, PML_CORRUPT, "%s: tensor '%s' has %llu dimensions", g->name, t->name,
                        (unsigned long long)n_dims);
    t->n_dims = (int)n_dims;
    t->elements = 1;
    for (int i = 0; i < PML_GGUF_MAX_DIMS; i++) {
        t->size[i] = 1;
        if (status == PML_OK && i < t->n_dims)
            status = take_number(g, 8, &t->size[i], err);
        if (status == PML_OK &&
            (t->size[i] == 0 || __builtin_mul_overflow(t->elements, t->size[i], &t->elements)))
            return PML_FAIL(err, PML_CORRUPT, "%s: tensor '%s' has an impossible shape", g->name,
                            t->name);
    }
    if (status == PML_OK)
        status = take_number(g, 4, &type, err);
    if (status == PML_OK)
        status = take_number(g, 8, offset, err);
    t->type = (pml_gguf_type)type;
    return status;
}

static pml_status place(const pml_gguf *g, pml_gguf_tensor *t, size_t data, uint64_t offset,
                        pml_error *err)
{
    uint64_t row = pml_gguf_row_bytes(t->type, t->size[0]), end;
    if (row == 0)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "%s: tensor '%s' has type %d and rows of %llu; read are F32, F16, BF16, "
                        "Q8_0",
                        g->name, t->name, (int)t->type, (unsigned long long)t->size[0]);
    if (__builtin_mul_overflow(row, t->elements / t->size[0], &t->bytes) ||
        offset % PML_GGUF_ALIGN != 0 || __builtin_add_overflow(offset, t->bytes, &end) ||
        end > g->size - data)
        return PML_FAIL(err, PML_CORRUPT, "%s: tensor '%s' lies beyond the file's end", g->name,
                        t->name);
    t->data = g->base + data + offset;
    return PML_OK;
}

static pml_status read_tensors(pml_gguf *g, uint64_t count, pml_error *err)
{
    if (count > (g->size - g->at) / 33) /* the least a record takes */
        return cut_off(g, err);
    uint64_t *offsets = calloc(count > 0 ? count : 1, sizeof *offsets);
    g->tensors = calloc(count > 0 ? count : 1, sizeof *g->tensors);
    pml_status status = PML_OK;
    if (offsets == NULL || g->tensors == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for the header of %s", g->name);
    for (uint64_t i = 0; status == PML_OK && i < count; i++)
        status = read_record(g, &g->tensors[g->n_tensors++], &offsets[i], err);
    size_t data = (g->at + PML_GGUF_ALIGN - 1) / PML_GGUF_ALIGN * PML_GGUF_ALIGN;
    if (status == PML_OK && count > 0 && data > g->size)
        status = cut_off(g, err);
    for (uint64_t i = 0; status == PML_OK && i < count; i++)
        status = place(g, &g->tensors[i], data, offsets[i], err);
    free(offsets);
    return status;
}

/* ---- opening ---- */

static pml_status map_file(pml_gguf *g, const char *path, pml_error *err)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return PML_FAIL(err, errno == ENOENT ? PML_NOT_FOUND : PML_IO, "%s: %s", path,
                        strerror(errno));
    pml_status status = PML_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < PMLI_GGUF_HEADER) {
        status = PML_FAIL(err, PML_CORRUPT, "%s is no GGUF file: it is too short", path);
    } else {
        void *base = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (base == MAP_FAILED) {
            status = PML_FAIL(err, PML_IO, "cannot map %s: %s", path, strerror(errno));
        } else {
            g->base = base;
            g->size = (size_t)info.st_size;
        }
    }
    close(fd);
    return status;
}

static pml_status read_all(pml_gguf *g, pml_error *err)
{
    uint64_t version = 0, tensors = 0, pairs = 0;
    if (memcmp(g->base, "GGUF", 4) != 0)
        return PML_FAIL(err, PML_CORRUPT, "%s is no GGUF file", g->name);
    g->at = 4;
    pml_status status = take_number(g, 4, &version, err);
    if (status == PML_OK && version != PMLI_GGUF_VERSION)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s is GGUF of version %llu; read is 3", g->name,
                        (unsigned long long)version);
    if (status == PML_OK)
        status = take_number(g, 8, &tensors, err);
    if (status == PML_OK)
        status = take_number(g, 8, &pairs, err);
    if (status == PML_OK)
        status = read_pairs(g, pairs, err);
    return status == PML_OK ? read_tensors(g, tensors, err) : status;
}

pml_status pml_gguf_open(const char *path, pml_gguf **file, pml_error *err)
{
    *file = NULL;
    pml_gguf *g = calloc(1, sizeof *g);
    if (g == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to read %s", path);
    strncpy(g->name, path, sizeof g->name - 1);
    pml_status status = map_file(g, path, err);
    if (status == PML_OK)
        status = read_all(g, err);
    if (status != PML_OK) {
        pml_gguf_close(&g);
        return status;
    }
    *file = g;
    return PML_OK;
}

void pml_gguf_close(pml_gguf **file)
{
    if (*file == NULL)
        return;
    if ((*file)->base != NULL)
        munmap((*file)->base, (*file)->size);
    free((*file)->pairs);
    free((*file)->tensors);
    free(*file);
    *file = NULL;
}

size_t pml_gguf_count(const pml_gguf *file)
{
    return file->n_tensors;
}

const pml_gguf_tensor *pml_gguf_at(const pml_gguf *file, size_t index)
{
    return &file->tensors[index];
}

const pml_gguf_tensor *pml_gguf_find(const pml_gguf *file, const char *name)
{
    for (size_t i = 0; i < file->n_tensors; i++)
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    return NULL;
}

size_t pml_gguf_pairs(const pml_gguf *file)
{
    return file->n_pairs;
}

const char *pml_gguf_string(const pml_gguf *file, const char *key, size_t *length)
{
    size_t n = strlen(key);
    for (size_t i = 0; i < file->n_pairs; i++) {
        const pair *p = &file->pairs[i];
        if (p->kind == PMLI_KIND_STRING && p->key_length == n && memcmp(p->key, key, n) == 0) {
            *length = (size_t)p->value_length;
            return p->value;
        }
    }
    return NULL;
}

/* ---- numbers ---- */

static void unpack_q8(const unsigned char *from, uint64_t n, float *to)
{
    for (uint64_t b = 0; b < n / PML_GGUF_Q8_BLOCK; b++, from += PML_GGUF_Q8_BYTES) {
        uint16_t bits = (uint16_t)(from[0] | from[1] << 8);
        float scale = pml_f16_to_f32(bits);
        for (int i = 0; i < PML_GGUF_Q8_BLOCK; i++)
            to[b * PML_GGUF_Q8_BLOCK + (uint64_t)i] = scale * (float)(signed char)from[2 + i];
    }
}

pml_status pml_gguf_to_f32(const pml_gguf_tensor *t, uint64_t first, uint64_t n, float *to,
                           pml_error *err)
{
    uint64_t skip = pml_gguf_row_bytes(t->type, first);
    if (first > t->elements || n > t->elements - first || (first > 0 && skip == 0) ||
        (n > 0 && pml_gguf_row_bytes(t->type, n) == 0))
        return PML_FAIL(err, PML_INVALID, "'%s' has no elements %llu to %llu", t->name,
                        (unsigned long long)first, (unsigned long long)(first + n));
    const unsigned char *from = (const unsigned char *)t->data + skip;
    switch (t->type) {
    case PML_GGUF_F32:
        return pml_convert_to_f32(from, PML_F32, (size_t)n, to, err);
    case PML_GGUF_F16:
        return pml_convert_to_f32(from, PML_F16, (size_t)n, to, err);
    case PML_GGUF_BF16:
        return pml_convert_to_f32(from, PML_BF16, (size_t)n, to, err);
    case PML_GGUF_Q8_0:
        unpack_q8(from, n, to);
        return PML_OK;
    }
    return PML_FAIL(err, PML_UNSUPPORTED, "'%s' has type %d", t->name, (int)t->type);
}
