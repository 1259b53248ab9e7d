/* GGUF, version 3: a model in one file, as llama.cpp and what is built on it read it.
 *
 *   "GGUF" | u32 3 | u64 tensors | u64 pairs | pairs | tensor records | pad to 32 | data
 *   pair:    string key | u32 type | value            (an array: u32 type | u64 count | items)
 *   record:  string name | u32 n | u64 size[n] | u32 type | u64 offset into the data
 *   string:  u64 length | bytes                       everything little-endian
 *
 * Sizes are innermost first, so [rows, cols] is written cols, rows. Each tensor begins at a
 * multiple of
 * 32. Source: ggml's docs/gguf.md. */
#ifndef PML_MODEL_GGUF_H
#define PML_MODEL_GGUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/base/file_at.h"
#include "pml/json/json.h"

typedef enum pml_gguf_type {
    PML_GGUF_F32 = 0,
    PML_GGUF_F16 = 1,
    PML_GGUF_Q8_0 = 8, /* blocks of 32: a float16 scale and 32 int8 */
    PML_GGUF_BF16 = 30
} pml_gguf_type;

enum { PML_GGUF_MAX_DIMS = 4, PML_GGUF_ALIGN = 32, PML_GGUF_Q8_BLOCK = 32, PML_GGUF_Q8_BYTES = 34 };

/* Bytes of a row of n elements; 0 for a type that is none of ours or a row that cuts a block. */
uint64_t pml_gguf_row_bytes(pml_gguf_type type, uint64_t n);

/* ---- writing ---- */

typedef struct pml_gguf_writer pml_gguf_writer;

/* Declare pairs and tensors, then write the tensors' data in the order they were declared. Nothing
 * is visible under `path` before finish has renamed it there. mode as chmod. */
pml_status pml_gguf_writer_new(const char *path, unsigned mode, pml_gguf_writer **writer,
                               pml_error *err);

/* Pairs from an array of objects {"key", "type", "value"}; type is one of u32 u64 i32 f32 bool
 * string, or i32s f32s strings for arrays. PML_INVALID names the key of one that does not fit its
 * type, or that is there twice. */
pml_status pml_gguf_writer_pairs(pml_gguf_writer *writer, const pml_json *pairs, pml_error *err);

/* One pair. */
pml_status pml_gguf_writer_u32(pml_gguf_writer *writer, const char *key, uint32_t value,
                               pml_error *err);
pml_status pml_gguf_writer_f32(pml_gguf_writer *writer, const char *key, float value,
                               pml_error *err);
pml_status pml_gguf_writer_string(pml_gguf_writer *writer, const char *key, const char *value,
                                  pml_error *err);

/* size: innermost first. */
pml_status pml_gguf_writer_add(pml_gguf_writer *writer, const char *name, pml_gguf_type type,
                               const uint64_t *size, int n_dims, pml_error *err);

/* The next bytes of data, in any pieces; what lies between two tensors is not the caller's care.
 * The first call writes the header: no pair and no tensor after it. */
pml_status pml_gguf_writer_write(pml_gguf_writer *writer, const void *data, size_t bytes,
                                 pml_error *err);

/* PML_INVALID when not every declared byte was written. Durable when it returns PML_OK. */
pml_status pml_gguf_writer_finish(pml_gguf_writer *writer, pml_error *err);
void pml_gguf_writer_destroy(pml_gguf_writer **writer);

/* ---- reading ---- */

typedef struct pml_gguf_tensor {
    char name[128];
    pml_gguf_type type;
    int n_dims;
    uint64_t size[PML_GGUF_MAX_DIMS]; /* innermost first, 1 beyond n_dims */
    uint64_t elements, bytes;
    pml_file_at place; /* its first byte; the file is open until close */
} pml_gguf_tensor;

typedef struct pml_gguf pml_gguf;

/* Open a file and check it whole: every length, type and place. PML_CORRUPT says what is wrong,
 * PML_UNSUPPORTED names another version, byte order or tensor type. Nothing is mapped. */
pml_status pml_gguf_open(const char *path, pml_gguf **file, pml_error *err);
void pml_gguf_close(pml_gguf **file);

/* Tensors: how many, by number, by name (NULL: there is none), each the file's until close; and
 * key-value pairs. */
size_t pml_gguf_count(const pml_gguf *file);
const pml_gguf_tensor *pml_gguf_at(const pml_gguf *file, size_t index); /* in the file's order */
const pml_gguf_tensor *pml_gguf_find(const pml_gguf *file, const char *name);
size_t pml_gguf_pairs(const pml_gguf *file);

/* The value of a string pair, not terminated; NULL when there is none of that key and kind. */
const char *pml_gguf_string(const pml_gguf *file, const char *key, size_t *length);

/* Elements [first, first + n) as float32; for Q8_0 both are multiples of 32. Errors of reading as
 * pml_file_at_read. */
pml_status pml_gguf_to_f32(const pml_gguf_tensor *tensor, uint64_t first, uint64_t n, float *to,
                           pml_error *err);

#endif
