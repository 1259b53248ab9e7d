/* Safetensors: named tensors in one file.
 *
 *   u64 n | header: n bytes of JSON, padded with spaces | data
 *           {"__metadata__": {"k": "v"},
 *            "name": {"dtype": "F32", "shape": [2,3], "data_offsets": [0, 24]}, …}
 *
 * Offsets count from the data's beginning; tensors lie end to end, without holes or overlap, and
 * their last byte is the file's last. All of that is checked before the first tensor is given out.
 * A damaged file is PML_CORRUPT and the message names file and tensor.
 *
 * Nothing is mapped: data is read when it is wanted (pml_stored_read), or a backend is given its
 * place in the file. A file that is replaced by rename stays readable; one that another process
 * cuts short in place, or that its disk does not give, is an error of that reading, which names
 * file and byte. */
#ifndef PML_MODEL_SAFETENSORS_H
#define PML_MODEL_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/base/file_at.h"
#include "pml/base/view.h"

enum { PML_STORED_MAX_DIMS = 8 };

/* One tensor as it lies in a file. */
typedef struct pml_stored {
    const char *name;
    const char *dtype_name; /* as the file says: "BF16", "F8_E4M3" */
    pml_dtype dtype;        /* PML_DTYPE_COUNT when it is none of ours */
    int n_dims;
    int64_t shape[PML_STORED_MAX_DIMS];
    int64_t elements;
    size_t bytes;
    const char *path; /* the file it lies in … */
    int fd;           /* … open until the reader is closed … */
    uint64_t at;      /* … and its first byte there; a multiple of nothing */
} pml_stored;

/* Where its bytes from `skip` on lie. */
static inline pml_file_at pml_stored_at(const pml_stored *tensor, size_t skip)
{
    pml_file_at place = {tensor->fd, tensor->at + skip, tensor->path};
    return place;
}

/* `bytes` of its data from byte `skip` on. Errors as pml_file_at_read. */
pml_status pml_stored_read(const pml_stored *tensor, size_t skip, size_t bytes, void *to,
                           pml_error *err);

/* ---- reading ---- */

typedef struct pml_safetensors pml_safetensors;

/* One file. */
pml_status pml_safetensors_open(const char *path, pml_safetensors **file, pml_error *err);

/* A model folder: model.safetensors, or the shards that model.safetensors.index.json names. A
 * tensor that the index and its shard do not agree on is PML_CORRUPT; a folder that holds only
 * .bin or .gguf files is told so. */
pml_status pml_safetensors_open_folder(const char *folder, pml_safetensors **file, pml_error *err);

void pml_safetensors_close(pml_safetensors **file);

/* Tensors of the file, or of all of the folder's shards. */
size_t pml_safetensors_count(const pml_safetensors *file);

/* index < count, in order of name. */
const pml_stored *pml_safetensors_at(const pml_safetensors *file, size_t index);

/* NULL when there is none of that name. Binary search. */
const pml_stored *pml_safetensors_find(const pml_safetensors *file, const char *name);

/* The tensor of that name and shape, else PML_NOT_FOUND or PML_INVALID that says what was found.
 * cols = 0 asks for a vector of `rows` elements. */
pml_status pml_safetensors_need(const pml_safetensors *file, const char *name, int64_t rows,
                                int64_t cols, const pml_stored **tensor, pml_error *err);

/* __metadata__'s value; NULL when absent. With shards: the first file's that has it. */
const char *pml_safetensors_metadata(const pml_safetensors *file, const char *key);

/* The file's length in bytes (sum over shards). */
uint64_t pml_safetensors_bytes(const pml_safetensors *file);

/* ---- writing ---- */

typedef struct pml_safetensors_writer pml_safetensors_writer;

/* Declare metadata and tensors, then write their data in the order they were declared. Nothing is
 * visible under `path` before finish has renamed it there (pml/base/file.h). mode as chmod.
 * transformers and PEFT want the metadata {"format": "pt"}. */
pml_status pml_safetensors_writer_new(const char *path, unsigned mode,
                                      pml_safetensors_writer **writer, pml_error *err);

/* A pair of the header's __metadata__, before the first tensor is written. */
pml_status pml_safetensors_writer_metadata(pml_safetensors_writer *writer, const char *key,
                                           const char *value, pml_error *err);

/* Declare wide dtypes first: each tensor then begins at a multiple of its element's size (the data
 * begins at a multiple of 64). */
pml_status pml_safetensors_writer_add(pml_safetensors_writer *writer, const char *name,
                                      pml_dtype dtype, const int64_t *shape, int n_dims,
                                      pml_error *err);

/* The next bytes of data, in any pieces. The first call writes the header: no more add after it. */
pml_status pml_safetensors_writer_write(pml_safetensors_writer *writer, const void *data,
                                        size_t bytes, pml_error *err);

/* What was written so far is on disk (pml_atomic_file_flush). */
pml_status pml_safetensors_writer_flush(pml_safetensors_writer *writer, pml_error *err);

/* PML_INVALID when not every declared byte was written. Durable when it returns PML_OK. */
pml_status pml_safetensors_writer_finish(pml_safetensors_writer *writer, pml_error *err);

/* Without finish: as if nothing had been written. */
void pml_safetensors_writer_destroy(pml_safetensors_writer **writer);

#endif
