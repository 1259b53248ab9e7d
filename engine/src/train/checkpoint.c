/* Checkpoint folders: written whole or not at all, verified before use. MANIFEST has the form of
 * `b2sum -l 256`, so that anybody can check a folder without us. */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/model/safetensors.h"
#include "snapshot.h"

enum { PIECE = 32 << 20 }; /* bytes that are put on disk together */

void pml_snapshot_watch(pml_snapshot *snapshot, pml_watch *watch)
{
    snapshot->watch = watch;
}

pml_status pmli_write_buffer(const pml_snapshot *s, int m, pml_safetensors_writer *file,
                             pml_error *err)
{
    const char *data = s->buffers[m];
    size_t bytes = s->bytes[m], total = 0;
    pml_status status = PML_OK;
    for (int i = 0; i < PMLI_SNAPSHOT_STATES; i++)
        total += s->bytes[i];
    for (size_t at = 0, piece; status == PML_OK && at < bytes; at += piece) {
        piece = bytes - at < PIECE ? bytes - at : PIECE;
        status = pml_safetensors_writer_write(file, data + at, piece, err);
        if (status == PML_OK && piece == PIECE) /* the last one goes with its file */
            status = pml_safetensors_writer_flush(file, err);
        if (status == PML_OK && s->watch != NULL)
            s->watch->moved(s->watch->user, s->watch->done += piece, total);
    }
    return status;
}

static pml_status write_optimizer(const pml_snapshot *s, const char *folder, pml_error *err)
{
    char path[PML_PATH_MAX], name[160];
    pml_safetensors_writer *w = NULL;
    pml_status status = pml_path_join(path, sizeof path, folder, PMLI_OPTIMIZER_FILE, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_new(path, 0600, &w, err);
    for (int m = 1; m < PMLI_SNAPSHOT_STATES; m++)
        for (int i = 0; status == PML_OK && s->buffers[m] != NULL && i < s->n_entries; i++) {
            pmli_stored_moment t = pmli_moment_of(s, m, i);
            if (t.bytes == 0)
                continue;
            snprintf(name, sizeof name, "%s%s", pmli_moment_prefix(s, m), s->entries[i].name);
            status = pml_safetensors_writer_add(w, name, t.dtype, t.shape, t.n_dims, err);
        }
    for (int m = 1; status == PML_OK && m < PMLI_SNAPSHOT_STATES; m++)
        if (s->buffers[m] != NULL)
            status = pmli_write_buffer(s, m, w, err);
    if (status == PML_OK)
        status = pml_safetensors_writer_finish(w, err);
    pml_safetensors_writer_destroy(&w);
    return status;
}

/* One line of MANIFEST for every file in the folder, in order of name. */
static pml_status write_manifest(const char *folder, pml_error *err)
{
    struct dirent **files = NULL;
    char path[PML_PATH_MAX], hex[PML_HASH_HEX];
    uint8_t hash[PML_HASH_BYTES];
    char *text = NULL;
    size_t size = 0;
    int n;
    pml_status status = pml_folder_list(folder, &files, NULL, alphasort, &n, err);
    if (status != PML_OK)
        return status;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL)
        status = PML_FAIL(err, PML_NO_MEMORY, "no host memory for MANIFEST");
    for (int i = 0; i < n; i++) {
        if (status == PML_OK && files[i]->d_name[0] != '.') {
            status = pml_path_join(path, sizeof path, folder, files[i]->d_name, err);
            if (status == PML_OK)
                status = pml_hash_file(path, false, hash, err);
            if (status == PML_OK) {
                pml_hash_hex(hash, sizeof hash, hex);
                fprintf(out, "%s  %s\n", hex, files[i]->d_name);
            }
        }
        free(files[i]);
    }
    free(files);
    if (out != NULL && fclose(out) != 0 && status == PML_OK)
        status = PML_FAIL(err, PML_NO_MEMORY, "no host memory for MANIFEST");
    if (status == PML_OK)
        status = pml_path_join(path, sizeof path, folder, PMLI_MANIFEST, err);
    if (status == PML_OK)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    return status;
}

static pml_status write_contents(const pml_snapshot *s, const char *folder, bool checkpoint,
                                 pml_error *err)
{
    char path[PML_PATH_MAX];
    pml_status status = pmli_write_tensors(s, folder, err);
    if (status != PML_OK || !checkpoint)
        return status;
    status = write_optimizer(s, folder, err);
    if (status == PML_OK)
        status = pml_path_join(path, sizeof path, folder, PMLI_STATE_FILE, err);
    if (status == PML_OK)
        status = pmli_state_write(path, &s->state, err);
    if (status == PML_OK)
        status = write_manifest(folder, err);
    return status;
}

static pml_status make_folder(const char *path, pml_error *err)
{
    pml_place place;
    pml_status status = pml_place_find(path, &place, err);
    if (status != PML_OK)
        return status;
    if (mkdirat(place.folder, place.name, 0700) != 0)
        status = PML_FAIL(err, PML_IO, "cannot make the folder %s: %s", path, strerror(errno));
    pml_place_leave(&place);
    return status;
}

/* parent/.NAME.tmp-PID ──rename──► parent/NAME, which must not exist. */
static pml_status write_folder(const pml_snapshot *s, const char *folder, bool checkpoint,
                               size_t *bytes, pml_error *err)
{
    char parent[PML_PATH_MAX], name[256], temporary[PML_PATH_MAX];
    pml_status status = pml_path_folder(parent, sizeof parent, folder, err);
    int length = snprintf(name, sizeof name, ".%s.tmp-%ld", pml_path_name(folder), (long)getpid());
    if (status == PML_OK && (size_t)length >= sizeof name)
        status = PML_FAIL(err, PML_INVALID, "%s: the folder's name is too long", folder);
    if (status == PML_OK)
        status = pml_path_join(temporary, sizeof temporary, parent, name, err);
    if (status == PML_OK)
        status = pml_tree_remove(parent, name, err); /* of an earlier attempt of this process */
    if (status == PML_OK)
        status = make_folder(temporary, err);
    if (status != PML_OK)
        return status;
    status = write_contents(s, temporary, checkpoint, err);
    if (status == PML_OK)
        status = pml_folder_sync(temporary, err);
    if (status == PML_OK) {
        status = pml_rename(temporary, folder, RENAME_NOREPLACE, err);
        if (status == PML_IO && errno == EEXIST)
            status = PML_FAIL(err, PML_BUSY, "%s is there already", folder);
    }
    if (status == PML_OK)
        status = pml_folder_sync(parent, err);
    else
        pml_tree_remove(parent, name, NULL); /* the first failure is what is told */
    if (bytes != NULL)
        *bytes = pml_folder_bytes(folder);
    return status;
}

pml_status pml_checkpoint_write(const pml_snapshot *snapshot, const char *folder, size_t *bytes,
                                pml_error *err)
{
    return write_folder(snapshot, folder, true, bytes, err);
}

pml_status pml_snapshot_export(const pml_snapshot *snapshot, const char *folder, pml_error *err)
{
    return write_folder(snapshot, folder, false, NULL, err);
}

static pml_status read_tensors(const pml_snapshot *s, const char *path, int from, int to,
                               pml_error *err)
{
    pml_safetensors *file = NULL;
    pml_status status = pml_safetensors_open(path, &file, err);
    for (int m = from; m < to; m++) {
        char *at = s->buffers[m];
        for (int i = 0; status == PML_OK && at != NULL && i < s->n_entries; i++) {
            pmli_stored_moment t = pmli_moment_of(s, m, i);
            const pml_stored *stored;
            char name[160];
            if (t.bytes == 0)
                continue;
            snprintf(name, sizeof name, "%s%s", pmli_moment_prefix(s, m), s->entries[i].name);
            status = pml_safetensors_need(file, name, t.shape[0], t.n_dims == 1 ? 0 : t.shape[1],
                                          &stored, err);
            if (status == PML_OK && stored->dtype != t.dtype)
                status = PML_FAIL(err, PML_INVALID, "%s: '%s' has dtype %s, not %s", path, name,
                                  stored->dtype_name, pml_dtype_name(t.dtype));
            if (status == PML_OK)
                status = pml_stored_read(stored, 0, t.bytes, at, err);
            at += t.bytes;
        }
    }
    pml_safetensors_close(&file);
    return status;
}

pml_status pml_checkpoint_load(const char *folder, pml_snapshot *s, pml_error *err)
{
    return pml_checkpoint_load_watched(folder, NULL, NULL, s, err);
}

static pml_status read_state(const char *folder, void (*moved)(void *user), void *user,
                             pml_train_state *state, pml_error *err)
{
    char path[PML_PATH_MAX];
    pml_status status = pml_checkpoint_verify_watched(folder, moved, user, err);
    if (status == PML_OK)
        status = pml_path_join(path, sizeof path, folder, PMLI_STATE_FILE, err);
    return status == PML_OK ? pmli_state_read(path, state, err) : status;
}

pml_status pml_checkpoint_load_watched(const char *folder, void (*moved)(void *user), void *user,
                                       pml_snapshot *s, pml_error *err)
{
    char values[PML_PATH_MAX], optimizer[PML_PATH_MAX];
    pml_status status = read_state(folder, moved, user, &s->state, err);
    if (status == PML_OK)
        status = pml_path_join(values, sizeof values, folder, pmli_tensor_file(s), err);
    if (status == PML_OK)
        status = pml_path_join(optimizer, sizeof optimizer, folder, PMLI_OPTIMIZER_FILE, err);
    if (status == PML_OK)
        status = read_tensors(s, values, 0, 1, err);
    if (status == PML_OK)
        status = read_tensors(s, optimizer, 1, PMLI_SNAPSHOT_STATES, err);
    return status;
}

pml_status pml_checkpoint_state(const char *folder, pml_train_state *state, pml_error *err)
{
    return read_state(folder, NULL, NULL, state, err);
}
