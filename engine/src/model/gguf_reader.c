#include "gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/model/convert.h"
#include "pml/model/gguf.h"

enum { NESTING_MAX = 4, WINDOW = 1 << 16 };

/* No key, name or template is longer; arrays, where most of a header is, are not kept. */
enum { TEXT_MAX = 16 << 20 };

typedef struct pair {
    char *key, *value;                 /* ours; value: of a string */
    uint64_t key_length, value_length; /* not terminated */
    uint32_t kind;
} pair;

struct pml_gguf {
    int fd;
    uint64_t size, at;
    unsigned char *window; /* of the file, while its header is read */
    uint64_t window_at;
    size_t window_bytes;
    pair *pairs;
    size_t n_pairs;
    pml_gguf_tensor *tensors;
    size_t n_tensors;
    char name[512];
};

/* ---- a cursor that never leaves the file ---- */

static pml_status cut_off(const pml_gguf *g, pml_error *err)
{
    return PML_FAIL(err, PML_CORRUPT, "%s ends in the middle of its header, at byte %llu", g->name,
                    (unsigned long long)g->at);
}

static pml_status skip(pml_gguf *g, uint64_t bytes, pml_error *err)
{
    if (bytes > g->size - g->at)
        return cut_off(g, err);
    g->at += bytes;
    return PML_OK;
}

/* The next bytes, at most a window of them, which stay until more are taken. */
static pml_status take(pml_gguf *g, size_t bytes, const unsigned char **out, pml_error *err)
{
    const uint64_t from = g->at;
    pml_status status = skip(g, bytes, err);
    if (status != PML_OK)
        return status;
    if (from < g->window_at || g->at > g->window_at + g->window_bytes) {
        const pml_file_at place = {g->fd, from, g->name};
        g->window_at = from;
        g->window_bytes = g->size - from < WINDOW ? (size_t)(g->size - from) : WINDOW;
        status = pml_file_at_read(&place, g->window, g->window_bytes, err);
        if (status != PML_OK)
            g->window_bytes = 0;
    }
    *out = g->window + (from - g->window_at);
    return status;
}

static pml_status take_number(pml_gguf *g, int bytes, uint64_t *value, pml_error *err)
{
    const unsigned char *from = NULL;
    pml_status status = take(g, (size_t)bytes, &from, err);
    *value = 0;
    for (int i = 0; status == PML_OK && i < bytes; i++)
        *value |= (uint64_t)from[i] << (8 * i);
    return status;
}

/* The caller's to free. */
static pml_status take_string(pml_gguf *g, char **text, uint64_t *length, pml_error *err)
{
    *text = NULL;
    pml_status status = take_number(g, 8, length, err);
    const pml_file_at place = {g->fd, g->at, g->name};
    if (status == PML_OK)
        status = skip(g, *length, err);
    if (status == PML_OK && *length > TEXT_MAX)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s: a text of %llu bytes in its header", g->name,
                        (unsigned long long)*length);
    if (status != PML_OK)
        return status;
    *text = malloc(*length > 0 ? (size_t)*length : 1);
    if (*text == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the header of %s", g->name);
    return pml_file_at_read(&place, *text, (size_t)*length, err);
}

/* ---- pairs ---- */

static int kind_bytes(uint64_t kind)
{
    static const unsigned char bytes[PMLI_KIND_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return kind < PMLI_KIND_COUNT ? bytes[kind] : 0;
}

/* p: whose value a string is; NULL: an array's item. */
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
    if (size > 0)
        return __builtin_mul_overflow(count, (uint64_t)size, &bytes) ? cut_off(g, err)
                                                                     : skip(g, bytes, err);
    for (uint64_t i = 0; status == PML_OK && i < count; i++)
        status = skip_value(g, kind, depth + 1, NULL, err);
    return status;
}

static pml_status skip_value(pml_gguf *g, uint64_t kind, int depth, pair *p, pml_error *err)
{
    uint64_t length;
    if (kind == PMLI_KIND_ARRAY)
        return skip_array(g, depth, err);
    if (kind == PMLI_KIND_STRING && p != NULL)
        return take_string(g, &p->value, &p->value_length, err);
    if (kind == PMLI_KIND_STRING) {
        pml_status status = take_number(g, 8, &length, err);
        return status == PML_OK ? skip(g, length, err) : status;
    }
    if (kind_bytes(kind) == 0)
        return PML_FAIL(err, PML_CORRUPT, "%s: a value of unknown type %llu", g->name,
                        (unsigned long long)kind);
    return skip(g, (uint64_t)kind_bytes(kind), err);
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
    const unsigned char *name = NULL;
    uint64_t length = 0, n_dims = 0, type = 0;
    pml_status status = take_number(g, 8, &length, err);
    if (status == PML_OK && (length == 0 || length >= sizeof t->name))
        return PML_FAIL(err, PML_CORRUPT, "%s: a tensor's name has %llu bytes", g->name,
                        (unsigned long long)length);
    if (status == PML_OK)
        status = take(g, (size_t)length, &name, err);
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

static pml_status put_place(const pml_gguf *g, pml_gguf_tensor *t, uint64_t data, uint64_t offset,
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
    t->place = (pml_file_at){g->fd, data + offset, g->name};
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
    uint64_t data = (g->at + PML_GGUF_ALIGN - 1) / PML_GGUF_ALIGN * PML_GGUF_ALIGN;
    if (status == PML_OK && count > 0 && data > g->size)
        status = cut_off(g, err);
    for (uint64_t i = 0; status == PML_OK && i < count; i++)
        status = put_place(g, &g->tensors[i], data, offsets[i], err);
    free(offsets);
    return status;
}

/* ---- opening ---- */

static pml_status open_file(pml_gguf *g, const char *path, pml_error *err)
{
    struct stat info;
    g->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (g->fd < 0)
        return PML_FAIL(err, errno == ENOENT ? PML_NOT_FOUND : PML_IO, "%s: %s", path,
                        strerror(errno));
    if (fstat(g->fd, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size < PMLI_GGUF_HEADER)
        return PML_FAIL(err, PML_CORRUPT, "%s is no GGUF file: it is too short", path);
    g->size = (uint64_t)info.st_size;
    return PML_OK;
}

static pml_status read_all(pml_gguf *g, pml_error *err)
{
    uint64_t version = 0, tensors = 0, pairs = 0;
    const unsigned char *magic = NULL;
    pml_status status = take(g, 4, &magic, err);
    if (status == PML_OK && memcmp(magic, "GGUF", 4) != 0)
        return PML_FAIL(err, PML_CORRUPT, "%s is no GGUF file", g->name);
    if (status == PML_OK)
        status = take_number(g, 4, &version, err);
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
    g->fd = -1;
    g->window = malloc(WINDOW);
    pml_status status = g->window != NULL
                            ? open_file(g, path, err)
                            : PML_FAIL(err, PML_NO_MEMORY, "no memory to read %s", path);
    if (status == PML_OK)
        status = read_all(g, err);
    free(g->window);
    g->window = NULL;
    if (status != PML_OK) {
        pml_gguf_close(&g);
        return status;
    }
    *file = g;
    return PML_OK;
}

void pml_gguf_close(pml_gguf **file)
{
    pml_gguf *g = *file;
    if (g == NULL)
        return;
    if (g->fd >= 0)
        close(g->fd);
    for (size_t i = 0; i < g->n_pairs; i++) {
        free(g->pairs[i].key);
        free(g->pairs[i].value);
    }
    free(g->pairs);
    free(g->tensors);
    free(g);
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

static pml_status unpack(pml_gguf_type type, const unsigned char *from, uint64_t n, float *to,
                         pml_error *err)
{
    switch (type) {
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
    return PML_FAIL(err, PML_INTERNAL, "type %d of a tensor was let in", (int)type);
}

pml_status pml_gguf_to_f32(const pml_gguf_tensor *t, uint64_t first, uint64_t n, float *to,
                           pml_error *err)
{
    enum { AT_ONCE = 64 * PML_GGUF_Q8_BLOCK };
    unsigned char piece[AT_ONCE * sizeof(float)];
    const uint64_t skipped = pml_gguf_row_bytes(t->type, first);
    if (first > t->elements || n > t->elements - first || (first > 0 && skipped == 0) ||
        (n > 0 && pml_gguf_row_bytes(t->type, n) == 0))
        return PML_FAIL(err, PML_INVALID, "'%s' has no elements %llu to %llu", t->name,
                        (unsigned long long)first, (unsigned long long)(first + n));
    pml_status status = PML_OK;
    pml_file_at from = t->place;
    from.at += skipped;
    for (uint64_t done = 0; status == PML_OK && done < n; done += AT_ONCE) {
        const uint64_t part = n - done < AT_ONCE ? n - done : AT_ONCE;
        const size_t bytes = (size_t)pml_gguf_row_bytes(t->type, part);
        status = pml_file_at_read(&from, piece, bytes, err);
        if (status == PML_OK)
            status = unpack(t->type, piece, part, to + done, err);
        from.at += bytes;
    }
    return status;
}
