#include "pml/model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/base/table.h"
#include "pml/json/json.h"

/* Header: 100 MB is the limit of the format's own library. The JSON of a header has three levels:
 * the object, a tensor, its shape. */
static const pml_json_limits header_limits = {100 * 1000 * 1000, 4};
static const pml_json_limits index_limits = {100 * 1000 * 1000, 8};

enum { SHARDS_MAX = 4096 };

/* One open file. Names and metadata point into its parsed header, which therefore stays. */
typedef struct opened {
    char *path;
    int fd;
    uint64_t size, begin; /* of the file; where its data section begins */
    pml_json *header;
} opened;

struct pml_safetensors {
    opened *files;
    size_t n_files, files_capacity;
    pml_stored *tensors; /* in order of name */
    size_t n_tensors, tensors_capacity;
};

/* Bits of an element; 0 for a dtype whose size we do not know. */
static unsigned dtype_bits(const char *name)
{
    static const struct {
        const char *name;
        unsigned bits;
    } known[] = {{"F64", 64},        {"F32", 32},        {"F16", 16},    {"BF16", 16},
                 {"I64", 64},        {"I32", 32},        {"I16", 16},    {"I8", 8},
                 {"U64", 64},        {"U32", 32},        {"U16", 16},    {"U8", 8},
                 {"BOOL", 8},        {"F8_E4M3", 8},     {"F8_E5M2", 8}, {"F8_E8M0", 8},
                 {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6},
                 {"F4", 4},          {"C64", 64}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i].name, name) == 0)
            return known[i].bits;
    return 0;
}

/* ---- one tensor's entry ---- */

static pml_status read_shape(const opened *file, const pml_json *entry, pml_stored *t,
                             pml_error *err)
{
    const pml_json *shape = pml_json_field(entry, "shape");
    size_t n = pml_json_length(shape);
    if (pml_json_kind_of(shape) != PML_JSON_ARRAY)
        return PML_FAIL(err, PML_CORRUPT, "%s: tensor %s has no shape", file->path, t->name);
    if (n > PML_STORED_MAX_DIMS)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s: tensor %s has %zu dimensions, at most %d",
                        file->path, t->name, n, PML_STORED_MAX_DIMS);
    t->n_dims = (int)n;
    t->elements = 1;
    for (size_t i = 0; i < n; i++) {
        int64_t dim;
        if (!pml_json_as_int(pml_json_item(shape, i), &dim) || dim < 0 ||
            __builtin_mul_overflow(t->elements, dim, &t->elements))
            return PML_FAIL(err, PML_CORRUPT, "%s: tensor %s has an impossible shape", file->path,
                            t->name);
        t->shape[i] = dim;
    }
    return PML_OK;
}

static pml_status read_dtype(const opened *file, const pml_json *entry, pml_stored *t,
                             pml_error *err)
{
    t->dtype_name = pml_json_as_string(pml_json_field(entry, "dtype"));
    if (t->dtype_name == NULL)
        return PML_FAIL(err, PML_CORRUPT, "%s: tensor %s has no dtype", file->path, t->name);
    t->dtype = pml_dtype_from_name(t->dtype_name);
    unsigned bits = dtype_bits(t->dtype_name);
    if (bits == 0)
        return PML_FAIL(err, PML_UNSUPPORTED, "%s: tensor %s has the unknown dtype \"%.40s\"",
                        file->path, t->name, t->dtype_name);
    uint64_t total;
    if (__builtin_mul_overflow((uint64_t)t->elements, (uint64_t)bits, &total) || total % 8 != 0)
        return PML_FAIL(err, PML_CORRUPT, "%s: tensor %s has an impossible size", file->path,
                        t->name);
    t->bytes = (size_t)(total / 8);
    return PML_OK;
}

static pml_status read_entry(const opened *file, const char *name, const pml_json *entry,
                             pml_stored *t, pml_error *err)
{
    const uint64_t space = file->size - file->begin;
    *t = (pml_stored){.name = name, .path = file->path};
    if (pml_json_kind_of(entry) != PML_JSON_OBJECT)
        return PML_FAIL(err, PML_CORRUPT, "%s: header entry %.200s is not an object", file->path,
                        name);
    pml_status status = read_shape(file, entry, t, err);
    if (status == PML_OK)
        status = read_dtype(file, entry, t, err);
    if (status != PML_OK)
        return status;

    const pml_json *offsets = pml_json_field(entry, "data_offsets");
    int64_t first, last;
    if (pml_json_length(offsets) != 2 || !pml_json_as_int(pml_json_item(offsets, 0), &first) ||
        !pml_json_as_int(pml_json_item(offsets, 1), &last))
        return PML_FAIL(err, PML_CORRUPT, "%s: tensor %s has no data_offsets", file->path, name);
    if (first < 0 || last < first || (uint64_t)last > space)
        return PML_FAIL(
            err, PML_CORRUPT,
            "%s: tensor %s lies outside the file (bytes %lld to %lld of %llu); the file "
            "is cut short or damaged, fetch it again",
            file->path, name, (long long)first, (long long)last, (unsigned long long)space);
    if ((uint64_t)(last - first) != t->bytes)
        return PML_FAIL(err, PML_CORRUPT,
                        "%s: tensor %s has %lld bytes where its shape and dtype need %zu",
                        file->path, name, (long long)(last - first), t->bytes);
    t->fd = file->fd;
    t->at = file->begin + (uint64_t)first;
    return PML_OK;
}

/* ---- one file ---- */

static int by_place(const void *a, const void *b)
{
    const pml_stored *x = a, *y = b;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty tensors first */
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const pml_stored *)a)->name, ((const pml_stored *)b)->name);
}

/* The tensors tile the data section: no hole, no overlap, nothing after the last. */
static pml_status check_tiling(const opened *file, pml_stored *tensors, size_t n, pml_error *err)
{
    qsort(tensors, n, sizeof *tensors, by_place);
    uint64_t at = file->begin;
    for (size_t i = 0; i < n; i++) {
        if (tensors[i].at != at)
            return PML_FAIL(err, PML_CORRUPT, "%s: %s before tensor %s", file->path,
                            tensors[i].at < at ? "overlapping data" : "a hole", tensors[i].name);
        at += tensors[i].bytes;
    }
    if (at != file->size)
        return PML_FAIL(err, PML_CORRUPT, "%s: %llu bytes after the last tensor, %s", file->path,
                        (unsigned long long)(file->size - at), tensors[n - 1].name);
    return PML_OK;
}

static pml_status check_metadata(const opened *file, const pml_json *metadata, pml_error *err)
{
    const char *key;
    const pml_json *value;
    void *cursor = NULL;
    if (metadata == NULL)
        return PML_OK;
    if (pml_json_kind_of(metadata) != PML_JSON_OBJECT)
        return PML_FAIL(err, PML_CORRUPT, "%s: __metadata__ is not an object", file->path);
    while (pml_json_next(metadata, &cursor, &key, &value))
        if (pml_json_as_string(value) == NULL)
            return PML_FAIL(err, PML_CORRUPT, "%s: __metadata__.%.200s is not a string", file->path,
                            key);
    return PML_OK;
}

static pml_status open_file(const char *path, opened *file, pml_error *err)
{
    struct stat info;
    int fd;
    pml_status status = pml_open(path, O_RDONLY, &fd, err);
    if (status != PML_OK)
        return errno != EMFILE ? status
                               : PML_FAIL(err, status,
                                          "cannot open %s: %s; a folder's shards are open "
                                          "together: raise ulimit -n",
                                          path, strerror(EMFILE));
    if (fstat(fd, &info) != 0) {
        status = PML_FAIL(err, PML_IO, "cannot look at %s: %s", path, strerror(errno));
    } else if (!S_ISREG(info.st_mode)) {
        status = PML_FAIL(err, PML_INVALID, "%s is not a regular file", path);
    } else if (info.st_size < 10) { /* length and "{}" */
        status = PML_FAIL(err, PML_CORRUPT, "%s: %lld bytes are too few for a safetensors file",
                          path, (long long)info.st_size);
    } else {
        *file = (opened){.fd = fd, .size = (uint64_t)info.st_size};
    }
    if (status != PML_OK)
        close(fd);
    return status;
}

static void close_file(opened *file)
{
    close(file->fd);
    pml_json_destroy(&file->header);
    free(file->path);
}

static uint64_t load_u64(const unsigned char *bytes)
{
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | bytes[i];
    return value;
}

static pml_status read_header(opened *file, pml_error *err)
{
    pml_file_at from = {file->fd, 0, file->path};
    unsigned char length[9];
    pml_status status = pml_file_at_read(&from, length, sizeof length, err);
    if (status != PML_OK)
        return status;
    uint64_t n = load_u64(length);
    if (n > header_limits.bytes || n > file->size - 8)
        return PML_FAIL(err, PML_CORRUPT,
                        "%s: a header of %llu bytes cannot be in a file of %llu; it is cut short, "
                        "damaged, or not a safetensors file",
                        file->path, (unsigned long long)n, (unsigned long long)file->size);
    if (length[8] != '{')
        return PML_FAIL(err, PML_CORRUPT, "%s is not a safetensors file", file->path);
    char *text = malloc((size_t)n + 1); /* n may be 0 */
    if (text == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the header of %s", file->path);
    from.at = 8;
    file->begin = 8 + n;
    status = pml_file_at_read(&from, text, (size_t)n, err);
    if (status == PML_OK)
        status = pml_json_parse(text, (size_t)n, file->path, &header_limits, &file->header, err);
    free(text);
    if (status == PML_INVALID && err != NULL)
        err->code = PML_CORRUPT;
    return status == PML_INVALID ? PML_CORRUPT : status;
}

/* Room for n more tensors. */
static pml_status reserve_tensors(pml_safetensors *st, size_t n, pml_error *err)
{
    if (n == 0)
        return PML_OK;
    pml_stored *wider =
        pml_table_room(st->tensors, &st->tensors_capacity, st->n_tensors + n, sizeof *wider);
    if (wider == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the names of %zu tensors", n);
    st->tensors = wider;
    return PML_OK;
}

static pml_status add_tensors(pml_safetensors *st, opened *file, pml_error *err)
{
    const char *key;
    const pml_json *value;
    void *cursor = NULL;
    size_t first = st->n_tensors;
    while (pml_json_next(file->header, &cursor, &key, &value)) {
        pml_status status;
        if (strcmp(key, "__metadata__") == 0) {
            status = check_metadata(file, value, err);
        } else {
            status = reserve_tensors(st, 1, err);
            if (status == PML_OK)
                status = read_entry(file, key, value, &st->tensors[st->n_tensors], err);
            st->n_tensors += status == PML_OK;
        }
        if (status != PML_OK)
            return status;
    }
    if (st->n_tensors == first) /* nothing to sort; qsort wants an array */
        return file->begin == file->size
                   ? PML_OK
                   : PML_FAIL(err, PML_CORRUPT, "%s: data without tensors", file->path);
    return check_tiling(file, st->tensors + first, st->n_tensors - first, err);
}

/* Open path, check it, add its tensors (in order of place). */
static pml_status add_file(pml_safetensors *st, const char *path, pml_error *err)
{
    opened *wider = pml_table_room(st->files, &st->files_capacity, st->n_files + 1, sizeof *wider);
    if (wider == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to open %s", path);
    st->files = wider;
    opened *file = &st->files[st->n_files];
    pml_status status = open_file(path, file, err);
    if (status != PML_OK)
        return status;
    st->n_files++;
    file->path = strdup(path);
    if (file->path == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to open %s", path);
    status = read_header(file, err);
    if (status == PML_OK)
        status = add_tensors(st, file, err);
    return status;
}

static pml_status new_empty(pml_safetensors **file, pml_error *err)
{
    *file = calloc(1, sizeof **file);
    return *file != NULL ? PML_OK : PML_FAIL(err, PML_NO_MEMORY, "no memory for tensors");
}

static pml_status sort_names(pml_safetensors *st, pml_error *err)
{
    if (st->n_tensors > 1)
        qsort(st->tensors, st->n_tensors, sizeof *st->tensors, by_name);
    for (size_t i = 1; i < st->n_tensors; i++)
        if (strcmp(st->tensors[i - 1].name, st->tensors[i].name) == 0)
            return PML_FAIL(err, PML_CORRUPT, "tensor %s is in both %s and %s", st->tensors[i].name,
                            st->tensors[i - 1].path, st->tensors[i].path);
    return PML_OK;
}

pml_status pml_safetensors_open(const char *path, pml_safetensors **file, pml_error *err)
{
    pml_safetensors *st = NULL;
    pml_status status = new_empty(&st, err);
    if (status == PML_OK)
        status = add_file(st, path, err);
    if (status == PML_OK)
        status = sort_names(st, err);
    if (status != PML_OK) {
        pml_safetensors_close(&st);
        return status;
    }
    *file = st;
    return PML_OK;
}

/* ---- folders ---- */

/* Open every file the index names, once. */
static pml_status add_indexed(pml_safetensors *st, const char *folder, const char *index_path,
                              const pml_json *map, pml_error *err)
{
    const char *name;
    const pml_json *value;
    void *cursor = NULL;
    while (pml_json_next(map, &cursor, &name, &value)) {
        const char *shard = pml_json_as_string(value);
        if (shard == NULL || !pml_path_is_below(shard) || strchr(shard, '/') != NULL)
            return PML_FAIL(err, PML_CORRUPT, "%s: weight_map.%.200s is not the name of a file",
                            index_path, name);
        bool open = false;
        for (size_t i = 0; i < st->n_files && !open; i++)
            open = strcmp(pml_path_name(st->files[i].path), shard) == 0;
        if (open)
            continue;
        if (st->n_files == SHARDS_MAX)
            return PML_FAIL(err, PML_CORRUPT, "%s names more than %d files", index_path,
                            SHARDS_MAX);
        char path[PATH_MAX];
        pml_status status = pml_path_join(path, sizeof path, folder, shard, err);
        if (status == PML_OK)
            status = add_file(st, path, err);
        if (status == PML_NOT_FOUND)
            return PML_FAIL(err, PML_NOT_FOUND,
                            "%s is missing, %s names it; the download is not complete", path,
                            index_path);
        if (status != PML_OK)
            return status;
    }
    return PML_OK;
}

/* Index and shards name the same tensors in the same places. */
static pml_status check_index(const pml_safetensors *st, const char *index_path,
                              const pml_json *map, pml_error *err)
{
    const char *name;
    const pml_json *value;
    void *cursor = NULL;
    size_t n = 0;
    for (; pml_json_next(map, &cursor, &name, &value); n++) {
        const pml_stored *t = pml_safetensors_find(st, name);
        const char *shard = pml_json_as_string(value);
        if (t == NULL || strcmp(pml_path_name(t->path), shard) != 0)
            return PML_FAIL(err, PML_CORRUPT, "%s: tensor %.200s is not in %.200s", index_path,
                            name, shard);
    }
    for (size_t i = 0; n != st->n_tensors && i < st->n_tensors; i++)
        if (pml_json_field(map, st->tensors[i].name) == NULL)
            return PML_FAIL(err, PML_CORRUPT, "%s does not name tensor %s of %s", index_path,
                            st->tensors[i].name, st->tensors[i].path);
    return PML_OK;
}

static pml_status open_index(const char *folder, const char *index_path, pml_safetensors *st,
                             pml_error *err)
{
    pml_json *index = NULL;
    const pml_json *map;
    pml_status status = pml_json_load(index_path, &index_limits, &index, err);
    if (status == PML_OK)
        status = pml_json_get_object(pml_json_root(index, index_path), "weight_map",
                                     PML_JSON_REQUIRED, &map, err);
    if (status == PML_OK)
        status = add_indexed(st, folder, index_path, map, err);
    if (status == PML_OK)
        status = sort_names(st, err);
    if (status == PML_OK)
        status = check_index(st, index_path, map, err);
    pml_json_destroy(&index);
    return status;
}

static bool exists(const char *folder, const char *name)
{
    char path[PATH_MAX];
    return pml_path_join(path, sizeof path, folder, name, NULL) == PML_OK &&
           access(path, F_OK) == 0;
}

static pml_status nothing_there(const char *folder, pml_error *err)
{
    if (access(folder, F_OK) != 0)
        return PML_FAIL(err, PML_NOT_FOUND, "there is no folder %s", folder);
    bool bin =
        exists(folder, "pytorch_model.bin") || exists(folder, "pytorch_model.bin.index.json");
    return PML_FAIL(err, PML_NOT_FOUND,
                    "%s has neither model.safetensors nor model.safetensors.index.json%s", folder,
                    bin ? "; its weights are pickles (.bin), which are not read: convert them to "
                          "safetensors first"
                        : "");
}

pml_status pml_safetensors_open_folder(const char *folder, pml_safetensors **file, pml_error *err)
{
    char path[PATH_MAX];
    pml_status status = pml_path_join(path, sizeof path, folder, "model.safetensors", err);
    if (status != PML_OK)
        return status;
    if (access(path, F_OK) == 0)
        return pml_safetensors_open(path, file, err);
    status = pml_path_join(path, sizeof path, folder, "model.safetensors.index.json", err);
    if (status != PML_OK)
        return status;
    if (access(path, F_OK) != 0)
        return nothing_there(folder, err);

    pml_safetensors *st = NULL;
    status = new_empty(&st, err);
    if (status == PML_OK)
        status = open_index(folder, path, st, err);
    if (status != PML_OK) {
        pml_safetensors_close(&st);
        return status;
    }
    *file = st;
    return PML_OK;
}

void pml_safetensors_close(pml_safetensors **file)
{
    pml_safetensors *st = *file;
    if (st == NULL)
        return;
    for (size_t i = 0; i < st->n_files; i++)
        close_file(&st->files[i]);
    free(st->files);
    free(st->tensors);
    free(st);
    *file = NULL;
}

/* ---- looking things up ---- */

size_t pml_safetensors_count(const pml_safetensors *file)
{
    return file->n_tensors;
}

const pml_stored *pml_safetensors_at(const pml_safetensors *file, size_t index)
{
    return &file->tensors[index];
}

const pml_stored *pml_safetensors_find(const pml_safetensors *file, const char *name)
{
    pml_stored key = {.name = name};
    if (file->n_tensors == 0)
        return NULL;
    return bsearch(&key, file->tensors, file->n_tensors, sizeof key, by_name);
}

static bool is_shape(const pml_stored *t, int64_t rows, int64_t cols)
{
    if (cols == 0)
        return t->n_dims == 1 && t->shape[0] == rows;
    return t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols;
}

static const char *show_shape(const int64_t *shape, int n, char *out, size_t capacity)
{
    size_t used = 0;
    out[0] = '\0';
    for (int i = 0; i < n && used < capacity; i++)
        used += (size_t)snprintf(out + used, capacity - used, "%s%lld", i > 0 ? ", " : "",
                                 (long long)shape[i]);
    return out;
}

pml_status pml_safetensors_need(const pml_safetensors *file, const char *name, int64_t rows,
                                int64_t cols, const pml_stored **tensor, pml_error *err)
{
    const pml_stored *t = pml_safetensors_find(file, name);
    const char *where = file->n_files > 0 ? file->files[0].path : "";
    if (t == NULL)
        return PML_FAIL(err, PML_NOT_FOUND, "there is no tensor %s in %s%s", name, where,
                        file->n_files > 1 ? " or the files beside it" : "");
    if (!is_shape(t, rows, cols)) {
        char found[120], wanted[120];
        int64_t shape[2] = {rows, cols};
        return PML_FAIL(err, PML_INVALID, "%s: tensor %s has shape [%s], the model needs [%s]",
                        t->path, name, show_shape(t->shape, t->n_dims, found, sizeof found),
                        show_shape(shape, cols == 0 ? 1 : 2, wanted, sizeof wanted));
    }
    *tensor = t;
    return PML_OK;
}

pml_status pml_stored_read(const pml_stored *tensor, size_t skip, size_t bytes, void *to,
                           pml_error *err)
{
    const pml_file_at from = pml_stored_at(tensor, skip);
    if (skip > tensor->bytes || bytes > tensor->bytes - skip)
        return PML_FAIL(err, PML_INTERNAL, "%s: bytes %zu to %zu of '%s', which has %zu",
                        tensor->path, skip, skip + bytes, tensor->name, tensor->bytes);
    return pml_file_at_read(&from, to, bytes, err);
}

const char *pml_safetensors_metadata(const pml_safetensors *file, const char *key)
{
    for (size_t i = 0; i < file->n_files; i++) {
        const pml_json *metadata = pml_json_field(file->files[i].header, "__metadata__");
        const char *value = pml_json_as_string(pml_json_field(metadata, key));
        if (value != NULL)
            return value;
    }
    return NULL;
}

uint64_t pml_safetensors_bytes(const pml_safetensors *file)
{
    uint64_t total = 0;
    for (size_t i = 0; i < file->n_files; i++)
        total += file->files[i].size;
    return total;
}
