/* state.json: a run's place and its settings as tuned. Doubles are printed so that they read back
 * bit for bit. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/file.h"
#include "pml/json/json.h"
#include "snapshot.h"

enum { FORMAT = 2, MOST_ACCUMULATION = 65536 };

pml_status pmli_state_write(const char *path, const pml_train_state *state, pml_error *err)
{
    pml_json_writer *w = NULL;
    char *text = NULL;
    size_t size;
    pml_status status = pml_json_writer_new(&w, err);
    if (status != PML_OK)
        return status;
    pml_json_put_int(w, "format", FORMAT);
    pml_json_put_int(w, "step", state->step);
    pml_json_put_int(w, "applied", state->applied);
    pml_json_put_int(w, "rope_length", state->rope_length);
    if (state->loss_scale.dynamic) {
        pml_json_begin_object(w, "loss_scale");
        pml_json_put_double(w, "value", state->loss_scale.value);
        pml_json_put_int(w, "finite", state->loss_scale.finite);
        pml_json_end(w);
    }
    pml_json_begin_object(w, "cursor");
    pml_json_put_int(w, "epoch", state->cursor.epoch);
    pml_json_put_int(w, "micro", state->cursor.micro);
    pml_json_end(w);
    pml_json_put_int(w, "timeline", state->timeline);
    pml_json_put_int(w, "command", state->command);
    pml_json_begin_object(w, "settings");
    pml_json_put_double(w, "learning_rate", state->learning_rate);
    pml_json_put_double(w, "weight_decay", state->weight_decay);
    pml_json_put_double(w, "max_grad_norm", state->max_grad_norm);
    pml_json_put_double(w, "lora_dropout", state->lora_dropout);
    pml_json_put_int(w, "gradient_accumulation_steps", state->accumulation);
    pml_json_put_int(w, "eval_steps", state->eval_steps);
    pml_json_put_int(w, "save_steps", state->save_steps);
    pml_json_end(w);
    pml_json_begin_object(w, "schedule");
    pml_schedule_write(w, &state->schedule, &state->schedule_state);
    pml_json_end(w);
    pml_json_begin_object(w, "best");
    pml_json_put_int(w, "step", state->best_step);
    pml_json_put_double(w, "loss", state->best_loss);
    pml_json_put_int(w, "not_better", state->not_better);
    pml_json_end(w);
    if (state->heeded)
        pml_json_put_bool(w, "heeded", true);
    if (state->owes_evaluation)
        pml_json_put_bool(w, "owes_evaluation", true);
    pml_json_put_string(w, "identity", state->identity);
    status = pml_json_writer_finish(w, 1, &text, &size, err);
    if (status == PML_OK)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    pml_json_writer_destroy(&w);
    return status;
}

static pml_status read_settings(pml_json_at at, pml_train_state *state, pml_error *err)
{
    const pml_json_need need = PML_JSON_REQUIRED;
    const double top = 1e300;
    pml_status status =
        pml_json_get_double(at, "learning_rate", need, 0, top, &state->learning_rate, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "weight_decay", need, 0, top, &state->weight_decay, err);
    if (status == PML_OK)
        status =
            pml_json_get_double(at, "max_grad_norm", need, -top, top, &state->max_grad_norm, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "lora_dropout", need, 0, 1, &state->lora_dropout, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "gradient_accumulation_steps", need, 1, MOST_ACCUMULATION,
                                  &state->accumulation, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "eval_steps", need, 0, INT64_MAX, &state->eval_steps, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "save_steps", need, 0, INT64_MAX, &state->save_steps, err);
    return status;
}

/* In checkpoints of float16 runs; of another dtype's there is nothing to restore. */
static pml_status read_scale(pml_json_at at, pml_loss_scale *scale, pml_error *err)
{
    const pml_json *object = NULL;
    pml_status status = pml_json_get_object(at, "loss_scale", PML_JSON_OPTIONAL, &object, err);
    *scale = (pml_loss_scale){.value = 1};
    if (status != PML_OK || object == NULL)
        return status;
    pml_json_at in = {object, at.file, "loss_scale"};
    scale->dynamic = true;
    /* A number that the device has as a float32, and a count that one may be added to. */
    status = pml_json_get_double(in, "value", PML_JSON_REQUIRED, 0, 0x1p127, &scale->value, err);
    return status == PML_OK ? pml_json_get_i32(in, "finite", PML_JSON_REQUIRED, 0,
                                               PML_LOSS_SCALE_INTERVAL, &scale->finite, err)
                            : status;
}

static pml_status read_best(pml_json_at at, pml_train_state *state, pml_error *err)
{
    const pml_json_need need = PML_JSON_REQUIRED;
    const double top = 1e300;
    pml_status status = pml_json_get_int(at, "step", need, -1, INT64_MAX, &state->best_step, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "loss", need, -top, top, &state->best_loss, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "not_better", need, 0, INT64_MAX, &state->not_better, err);
    return status;
}

static pml_status read_fields(const pml_json *document, const char *path, pml_train_state *state,
                              pml_error *err)
{
    const pml_json_need need = PML_JSON_REQUIRED;
    pml_json_at at = pml_json_root(document, path);
    const pml_json *cursor = NULL, *settings = NULL, *schedule = NULL, *best = NULL;
    int64_t format;
    pml_status status = pml_json_get_int(at, "format", need, FORMAT, FORMAT, &format, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "step", need, 0, INT64_MAX, &state->step, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "applied", need, 0, state->step, &state->applied, err);
    if (status == PML_OK) /* not in checkpoints from before there was dynamic rope */
        status = pml_json_get_i32(at, "rope_length", PML_JSON_OPTIONAL, 0, INT32_MAX,
                                  &state->rope_length, err);
    if (status == PML_OK) /* only where it is so */
        status = pml_json_get_bool(at, "heeded", PML_JSON_OPTIONAL, &state->heeded, err);
    if (status == PML_OK) /* likewise */
        status = pml_json_get_bool(at, "owes_evaluation", PML_JSON_OPTIONAL,
                                   &state->owes_evaluation, err);
    if (status == PML_OK)
        status = read_scale(at, &state->loss_scale, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "timeline", need, 0, INT64_MAX, &state->timeline, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "command", need, 0, INT64_MAX, &state->command, err);
    if (status == PML_OK)
        status =
            pml_json_get_string(at, "identity", need, state->identity, sizeof state->identity, err);
    if (status == PML_OK)
        status = pml_json_get_object(at, "cursor", need, &cursor, err);
    if (status == PML_OK)
        status = pml_json_get_object(at, "settings", need, &settings, err);
    if (status == PML_OK)
        status = pml_json_get_object(at, "schedule", need, &schedule, err);
    if (status == PML_OK)
        status = pml_json_get_object(at, "best", need, &best, err);
    if (status != PML_OK)
        return status;
    pml_json_at in_cursor = {cursor, path, "cursor"}, in_settings = {settings, path, "settings"};
    status = pml_json_get_int(in_cursor, "epoch", need, 0, INT64_MAX, &state->cursor.epoch, err);
    if (status == PML_OK)
        status =
            pml_json_get_int(in_cursor, "micro", need, 0, INT64_MAX, &state->cursor.micro, err);
    if (status == PML_OK)
        status = read_settings(in_settings, state, err);
    if (status == PML_OK)
        status = pml_schedule_read((pml_json_at){schedule, path, "schedule"}, &state->schedule,
                                   &state->schedule_state, err);
    return status == PML_OK ? read_best((pml_json_at){best, path, "best"}, state, err) : status;
}

pml_status pmli_state_read(const char *path, pml_train_state *state, pml_error *err)
{
    pml_json *document = NULL;
    pml_status status = pml_json_load(path, &pml_json_file_limits, &document, err);
    if (status != PML_OK)
        return status;
    pml_train_state read = {0};
    status = read_fields(document, path, &read, err);
    pml_json_destroy(&document);
    if (status == PML_OK)
        *state = read;
    return status;
}
