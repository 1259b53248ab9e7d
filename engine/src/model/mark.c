/* A model folder's mark: what training, quantising or merging changes, without reading all of it.
 *
 * Whoever makes other weights changes nearly every number of nearly every tensor, so the first page
 * of each tells. A time of change would not: a copy has another one, and the same weights. */
#include "pml/model/mark.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/path.h"
#include "pml/model/safetensors.h"

enum { PAGE = 4096, LARGEST_CONFIG = 1 << 20 };

static pml_status add_tensor(pml_hasher *hasher, const pml_stored *t, pml_error *err)
{
    unsigned char page[PAGE];
    size_t bytes = t->bytes < PAGE ? t->bytes : PAGE;
    pml_status status = pml_hasher_update(hasher, t->name, strlen(t->name) + 1, err);
    if (status == PML_OK)
        status = pml_hasher_update(hasher, t->dtype_name, strlen(t->dtype_name) + 1, err);
    if (status == PML_OK)
        status = pml_hasher_update(hasher, t->shape, (size_t)t->n_dims * sizeof t->shape[0], err);
    if (status == PML_OK)
        status = pml_stored_read(t, 0, bytes, page, err);
    if (status == PML_OK)
        status = pml_hasher_update(hasher, page, bytes, err);
    return status;
}

static pml_status add_config(pml_hasher *hasher, const char *folder, pml_error *err)
{
    char path[PATH_MAX], *text = NULL;
    size_t size = 0;
    pml_status status = pml_path_join(path, sizeof path, folder, "config.json", err);
    if (status == PML_OK)
        status = pml_file_read(path, LARGEST_CONFIG, true, &text, &size, err);
    if (status == PML_OK)
        status = pml_hasher_update(hasher, text, size, err);
    free(text);
    return status;
}

pml_status pml_model_mark(const char *folder, char mark[PML_MARK_HEX], pml_error *err)
{
    uint8_t hash[PML_HASH_BYTES];
    pml_safetensors *file = NULL;
    pml_hasher *hasher = NULL;
    pml_status status = pml_safetensors_open_folder(folder, &file, err);
    if (status == PML_OK)
        status = pml_hasher_new(&hasher, err);
    if (status == PML_OK)
        status = add_config(hasher, folder, err);
    for (size_t i = 0; status == PML_OK && i < pml_safetensors_count(file); i++)
        status = add_tensor(hasher, pml_safetensors_at(file, i), err);
    if (status == PML_OK)
        status = pml_hasher_finish(hasher, hash, err);
    if (status == PML_OK)
        pml_hash_hex(hash, PML_MARK_BYTES, mark);
    pml_hasher_destroy(&hasher);
    pml_safetensors_close(&file);
    return status;
}
