/* Whether a checkpoint folder is what was written. Apart from the rest of checkpoints, so that the
 * coordinator can ask without carrying a stepper and its libraries. */
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/path.h"
#include "pml/json/json.h"
#include "snapshot.h"

enum { LARGEST_MANIFEST = 64 << 10, LINE = PML_HASH_HEX - 1 + 2 };

/* Names as we give them; a damaged one is not handed on to terminals. */
static bool is_plain(const char *name)
{
    while (*name > ' ' && *name <= '~')
        name++;
    return *name == '\0';
}

/* One line "HEX  NAME" of MANIFEST against the file it names. */
static pml_status verify_line(const char *folder, const char *line, void (*moved)(void *user),
                              void *user, pml_error *err)
{
    char path[PML_PATH_MAX], hex[PML_HASH_HEX];
    uint8_t hash[PML_HASH_BYTES];
    const char *name = line + LINE;
    if (strlen(line) <= LINE || line[LINE - 1] != ' ' || line[LINE - 2] != ' ' || !is_plain(name) ||
        !pml_path_is_below(name) || strchr(name, '/') != NULL)
        return PML_FAIL(err, PML_CORRUPT, "%s/" PMLI_MANIFEST " is damaged", folder);
    pml_status status = pml_path_join(path, sizeof path, folder, name, err);
    if (status == PML_OK)
        status = pml_hash_file_watched(path, false, moved, user, hash, err);
    if (status == PML_NOT_FOUND)
        return PML_FAIL(err, PML_CORRUPT, "%s is missing, MANIFEST lists it", path);
    if (status != PML_OK)
        return status;
    pml_hash_hex(hash, sizeof hash, hex);
    if (strncmp(hex, line, sizeof hex - 1) != 0)
        return PML_FAIL(err, PML_CORRUPT, "%s is not what was written (MANIFEST does not match)",
                        path);
    return PML_OK;
}

/* Files without which a folder is no checkpoint, as bits. */
static unsigned needed_file(const char *name)
{
    if (strcmp(name, PMLI_STATE_FILE) == 0)
        return 1;
    if (strcmp(name, PMLI_OPTIMIZER_FILE) == 0)
        return 2;
    return strcmp(name, "adapter_model.safetensors") == 0 || strcmp(name, "model.safetensors") == 0
               ? 4
               : 0;
}

pml_status pml_checkpoint_verify(const char *folder, pml_error *err)
{
    return pml_checkpoint_verify_watched(folder, NULL, NULL, err);
}

pml_status pml_checkpoint_verify_watched(const char *folder, void (*moved)(void *user), void *user,
                                         pml_error *err)
{
    char path[PML_PATH_MAX];
    char *text = NULL, *rest = NULL;
    size_t size;
    unsigned found = 0;
    pml_status status = pml_path_join(path, sizeof path, folder, PMLI_MANIFEST, err);
    if (status == PML_OK)
        status = pml_file_read(path, LARGEST_MANIFEST, false, &text, &size, err);
    if (status != PML_OK)
        return status;
    if (size == 0 || text[size - 1] != '\n' || strlen(text) != size)
        status = PML_FAIL(err, PML_CORRUPT, "%s is damaged", path);
    for (char *line = strtok_r(text, "\n", &rest); status == PML_OK && line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        status = verify_line(folder, line, moved, user, err);
        found |= status == PML_OK ? needed_file(line + LINE) : 0;
    }
    if (status == PML_OK && found != 7)
        status = PML_FAIL(err, PML_CORRUPT, "%s does not list a whole checkpoint", path);
    free(text);
    return status;
}

bool pml_checkpoint_is_unfit(pml_status status)
{
    return status == PML_CORRUPT || status == PML_INVALID || status == PML_NOT_FOUND ||
           status == PML_DENIED;
}

/* Whether state.json is what its line of MANIFEST says; both are small. */
static pml_status verify_state(const char *folder, pml_error *err)
{
    char path[PML_PATH_MAX];
    char *text = NULL, *rest = NULL;
    size_t size;
    bool found = false;
    pml_status status = pml_path_join(path, sizeof path, folder, PMLI_MANIFEST, err);
    if (status == PML_OK)
        status = pml_file_read(path, LARGEST_MANIFEST, false, &text, &size, err);
    if (status != PML_OK)
        return status;
    for (char *line = strtok_r(text, "\n", &rest); line != NULL && !found;
         line = strtok_r(NULL, "\n", &rest)) {
        found = strlen(line) > LINE && strcmp(line + LINE, PMLI_STATE_FILE) == 0;
        if (found)
            status = verify_line(folder, line, NULL, NULL, err);
    }
    if (!found)
        status = PML_FAIL(err, PML_CORRUPT, "%s does not list " PMLI_STATE_FILE, path);
    free(text);
    return status;
}

/* path is of PML_PATH_MAX bytes, and has to stay as long as what is read of the document. */
static pml_status load_state(const char *folder, char *path, pml_json **document, pml_error *err)
{
    pml_status status = verify_state(folder, err);
    if (status == PML_OK)
        status = pml_path_join(path, PML_PATH_MAX, folder, PMLI_STATE_FILE, err);
    return status == PML_OK ? pml_json_load(path, &pml_json_file_limits, document, err) : status;
}

pml_status pml_checkpoint_best(const char *folder, int64_t *step, double *loss, pml_error *err)
{
    char path[PML_PATH_MAX];
    const double top = 1e300;
    pml_json *document = NULL;
    const pml_json *best = NULL;
    pml_status status = load_state(folder, path, &document, err);
    if (status != PML_OK)
        return status;
    status =
        pml_json_get_object(pml_json_root(document, path), "best", PML_JSON_REQUIRED, &best, err);
    pml_json_at at = {best, path, "best"};
    if (status == PML_OK)
        status = pml_json_get_int(at, "step", PML_JSON_REQUIRED, -1, INT64_MAX, step, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "loss", PML_JSON_REQUIRED, -top, top, loss, err);
    pml_json_destroy(&document);
    return status;
}

static pml_status read_timeline(const char *folder, int64_t *timeline, pml_error *err)
{
    char path[PML_PATH_MAX];
    pml_json *document = NULL;
    pml_status status = load_state(folder, path, &document, err);
    if (status != PML_OK)
        return status;
    status = pml_json_get_int(pml_json_root(document, path), "timeline", PML_JSON_REQUIRED, 0,
                              INT64_MAX, timeline, err);
    pml_json_destroy(&document);
    return status;
}

pml_status pml_checkpoint_timeline(const char *folder, int64_t *timeline, pml_error *err)
{
    pml_error why = PML_ERROR_INIT;
    pml_status status = read_timeline(folder, timeline, &why);
    if (status == PML_OK)
        return PML_OK;
    *timeline = INT64_MAX;
    if (pml_checkpoint_is_unfit(status))
        return PML_OK;
    if (err != NULL)
        *err = why;
    return status;
}
