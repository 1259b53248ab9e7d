/* Checkpoints of real steppers: what goes on from one is what was, bit for bit; what is damaged is
 * refused by name; what may go, goes.
 *
 *   checkpoint FIXTURES */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/json/json.h"
#include "pml/train/checkpoint.h"
#include "pml_op/cpu.h"
#include "session.h"

static char root[] = "/tmp/pml-checkpoint-XXXXXX";

static char *in_root(const char *name)
{
    static char paths[4][256];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

static pml_train_state state_of(session *s)
{
    pml_train_state state = {.step = s->step,
                             .applied = s->step,
                             .loss_scale = pml_stepper_loss_scale(s->stepper),
                             .cursor = s->cursor,
                             .timeline = 3,
                             .command = 7,
                             .learning_rate = s->config.learning_rate * (1.0 / 3.0),
                             .weight_decay = 0.1,
                             .max_grad_norm = 0.7,
                             .eval_steps = 11,
                             .save_steps = 12,
                             .lora_dropout = 0.25,
                             .accumulation = 3,
                             .schedule = s->config.schedule,
                             .schedule_state = {0.5, 1.25, 1, 2, 3, 4, 5, 6},
                             .best_loss = 1.0 / 7,
                             .best_step = 2,
                             .not_better = 4};
    MUST(pml_stepper_identity(s->stepper, state.identity, sizeof state.identity, err));
    return state;
}

/* The optimizers, schedules and dropouts that a resume must not disturb. */
typedef enum variant {
    ADAMW,
    MOMENTUM,
    NESTEROV,
    PLAIN_SGD,
    DROPOUT,
    EIGHT_BITS,
    VARIANTS
} variant;

/* With an adapter so wide that most of its tensors have 4096 elements, in blocks of 256 that they
 * do not fill. */
static void eight_bits(pml_train_config *config)
{
    config->optimizer = PML_OPTIMIZER_ADAMW_8BIT;
    if (config->method != PML_METHOD_LORA)
        return;
    config->lora_init[0] = '\0';
    for (int i = 0; i < config->n_lora_groups; i++) /* in one stack narrower ones end in gaps */
        config->lora_groups[i].rank *= 30;
    config->lora_rank = 121;
    config->lora_alpha = 16;
}

static void vary(pml_train_config *config, variant how)
{
    config->optimizer = PML_OPTIMIZER_ADAMW;
    config->momentum = 0;
    if (how == EIGHT_BITS)
        eight_bits(config);
    if (how == MOMENTUM || how == NESTEROV || how == PLAIN_SGD)
        config->optimizer = PML_OPTIMIZER_SGD;
    if (how == MOMENTUM || how == NESTEROV)
        config->momentum = 0.9;
    config->dampening = how == MOMENTUM ? 0.3 : 0;
    config->nesterov = how == NESTEROV;
    static const pml_schedule_type types[VARIANTS] = {[MOMENTUM] = PML_SCHEDULE_WARMUP_STABLE_DECAY,
                                                      [NESTEROV] = PML_SCHEDULE_INVERSE_SQRT,
                                                      [PLAIN_SGD] = PML_SCHEDULE_POLYNOMIAL,
                                                      [DROPOUT] =
                                                          PML_SCHEDULE_COSINE_WITH_RESTARTS};
    if (how != ADAMW)
        config->schedule = (pml_schedule){.type = types[how],
                                          .warmup_steps = config->schedule.warmup_steps,
                                          .learning_rate = config->learning_rate};
    if (how == MOMENTUM) {
        config->schedule.given = 1U << PML_KEYWORD_NUM_DECAY_STEPS;
        config->schedule.keyword[PML_KEYWORD_NUM_DECAY_STEPS] = 4;
    }
    if (how == DROPOUT && config->method == PML_METHOD_LORA)
        config->lora_dropout = 0.2;
}

/* What the optimizer keeps is the same bytes in both. */
static void check_kept(const char *folder, session *a, session *b)
{
    for (int state = PML_STATE_EXP_AVG; state < PML_STATE_COUNT; state++) {
        size_t bytes = pml_stepper_state_bytes(a->stepper, (pml_state)state);
        char *both = malloc(2 * bytes + 1);
        if (both == NULL)
            abort();
        if (bytes > 0) {
            MUST(pml_stepper_read(a->stepper, (pml_state)state, both, err));
            MUST(pml_stepper_read(b->stepper, (pml_state)state, both + bytes, err));
        }
        check(memcmp(both, both + bytes, bytes) == 0, "%s: the resumed run keeps another %d",
              folder, state);
        free(both);
    }
}

/* Four steps, checkpoint, four more; against: load into a new stepper, four more. */
static void check_resume(const char *fixtures, const char *name, variant how)
{
    static const size_t buffers[VARIANTS] = {3, 2, 2, 1, 3, 1};
    char folder[64];
    pml_train_config config;
    snprintf(folder, sizeof folder, how == ADAMW ? "%s" : "%s-%d", name, (int)how);
    load_case(fixtures, name, &config);
    vary(&config, how);
    session s, resumed;
    session_open(&(session_options){.config = &config}, &s);
    for (int i = 0; i < 4; i++)
        session_step(&s, NULL);
    pml_snapshot *snapshot, *loaded;
    pml_train_state state = state_of(&s);
    size_t bytes = 0;
    MUST(pml_snapshot_new(s.stepper, &config, &snapshot, err));
    MUST(pml_snapshot_take(snapshot, s.stepper, &state, err));
    for (int i = 0; i < 4; i++)
        session_step(&s, NULL);
    float *want = session_read(&s, PML_STATE_VALUE);
    MUST(pml_checkpoint_write(snapshot, in_root(folder), &bytes, err));
    check(bytes > buffers[how] * pml_stepper_state_floats(s.stepper) * sizeof(float),
          "%s: %zu bytes", folder, bytes);
    check(pml_checkpoint_write(snapshot, in_root(folder), NULL, NULL) == PML_BUSY,
          "%s: an existing folder was written over", folder);

    session_open(&(session_options){.config = &config}, &resumed);
    MUST(pml_snapshot_new(resumed.stepper, &config, &loaded, err));
    MUST(pml_checkpoint_load(in_root(folder), loaded, err));
    const pml_train_state *back = pml_snapshot_state(loaded);
    check(memcmp(back, &state, offsetof(pml_train_state, identity)) == 0 &&
              strcmp(back->identity, state.identity) == 0,
          "%s: the state read back differs", folder);
    MUST(pml_snapshot_restore(loaded, resumed.stepper, err));
    resumed.step = back->step;
    resumed.cursor = back->cursor;
    for (int i = 0; i < 4; i++)
        session_step(&resumed, NULL);
    float *got = session_read(&resumed, PML_STATE_VALUE);
    check(memcmp(got, want, pml_stepper_state_floats(s.stepper) * sizeof *got) == 0,
          "%s: the resumed run ends with other weights", folder);
    check_kept(folder, &s, &resumed);
    free(want);
    free(got);
    pml_snapshot_destroy(&loaded);
    pml_snapshot_destroy(&snapshot);
    session_close(&resumed);
    session_close(&s);
}

static char *manifest_of(const char *folder)
{
    char path[PML_PATH_MAX], *text;
    size_t size;
    snprintf(path, sizeof path, "%s/MANIFEST", folder);
    MUST(pml_file_read(path, 1 << 20, false, &text, &size, err));
    return text;
}

/* What a stepper has put, written without it: the same files. */
static void check_left(const char *fixtures, const char *name, variant how)
{
    pml_train_config config;
    load_case(fixtures, name, &config);
    vary(&config, how);
    session s;
    session_open(&(session_options){.config = &config}, &s);
    for (int i = 0; i < 2; i++)
        session_step(&s, NULL);
    static pml_train_state whole;
    pml_train_state state = state_of(&s);
    size_t bytes = pml_snapshot_bytes(s.stepper);
    void *memory = malloc(bytes);
    if (memory == NULL)
        abort();
    MUST(pml_snapshot_put(s.stepper, &state, &whole, memory, err));
    pml_snapshot *frames[2];
    char *manifests[2];
    MUST(pml_snapshot_frame(s.stepper, &config, &frames[0], err));
    session_close(&s);
    MUST(pml_snapshot_frame_left(&config, false, pml_backend_cpu(), &frames[1], err));
    for (int i = 0; i < 2; i++) {
        char folder[100];
        snprintf(folder, sizeof folder, "left-%s-%d-%d", name, (int)how, i);
        check(pml_snapshot_frame_bytes(frames[i]) == bytes, "%s: %zu bytes, not %zu", folder,
              pml_snapshot_frame_bytes(frames[i]), bytes);
        pml_snapshot_view(frames[i], &whole, memory);
        MUST(pml_checkpoint_write(frames[i], in_root(folder), NULL, err));
        manifests[i] = manifest_of(in_root(folder));
    }
    check(strcmp(manifests[0], manifests[1]) == 0, "%s-%d: written without a stepper it differs",
          name, (int)how);
    for (int i = 0; i < 2; i++) {
        free(manifests[i]);
        pml_snapshot_destroy(&frames[i]);
    }
    free(memory);
}

/* Of a run that left the width of its moments open, the plan's choice counts. */
static void check_left_width(const char *fixtures)
{
    size_t bytes[2];
    for (int narrow = 0; narrow < 2; narrow++) {
        pml_train_config config;
        pml_snapshot *frame, *chosen;
        load_case(fixtures, "llama-untied-lora", &config);
        eight_bits(&config);
        config.optimizer = PML_OPTIMIZER_ADAMW_AUTO;
        MUST(pml_snapshot_frame_left(&config, narrow, pml_backend_cpu(), &frame, err));
        config.optimizer = narrow ? PML_OPTIMIZER_ADAMW_8BIT : PML_OPTIMIZER_ADAMW;
        MUST(pml_snapshot_frame_left(&config, false, pml_backend_cpu(), &chosen, err));
        bytes[narrow] = pml_snapshot_frame_bytes(frame);
        check(bytes[narrow] == pml_snapshot_frame_bytes(chosen), "a width of moments is not kept");
        pml_snapshot_destroy(&frame);
        pml_snapshot_destroy(&chosen);
    }
    check(bytes[1] < bytes[0], "moments of 8 bits take %zu bytes, of 32 %zu", bytes[1], bytes[0]);
}

/* Moments of 8 bits lead where those of 32 lead, in a third of their memory; and they are not they.
 */
static void check_eight_bits(const char *fixtures)
{
    double loss[2];
    size_t kept[2];
    for (int i = 0; i < 2; i++) {
        pml_train_config config;
        session s;
        load_case(fixtures, "llama-untied-lora", &config);
        eight_bits(&config);
        config.optimizer = i == 0 ? PML_OPTIMIZER_ADAMW : PML_OPTIMIZER_ADAMW_8BIT;
        session_open(&(session_options){.config = &config}, &s);
        for (int64_t step = 0; step < config.max_steps; step++)
            loss[i] = session_step(&s, NULL).loss;
        kept[i] =
            pml_snapshot_bytes(s.stepper) - pml_stepper_state_bytes(s.stepper, PML_STATE_VALUE);
        session_close(&s);
    }
    check(loss[0] != loss[1] && fabs(loss[0] - loss[1]) < 2e-2 * loss[0],
          "8 bits: the last loss is %.6f, with 32 bits it is %.6f", loss[1], loss[0]);
    check(3 * kept[1] < kept[0], "8 bits: %zu bytes, with 32 bits %zu", kept[1], kept[0]);
}

/* A full checkpoint is a model folder: a run from it begins with its loss, and says float32. */
static void check_full_is_a_model(const char *fixtures)
{
    pml_train_config config, again;
    load_case(fixtures, "qwen2-untied-full", &config);
    again = config;
    snprintf(again.model, sizeof again.model, "%s", in_root("qwen2-untied-full"));
    session s, reloaded;
    session_open(&(session_options){.config = &config}, &s);
    session_open(&(session_options){.config = &again}, &reloaded);
    pml_snapshot *snapshot;
    MUST(pml_snapshot_new(s.stepper, &config, &snapshot, err));
    MUST(pml_checkpoint_load(again.model, snapshot, err));
    MUST(pml_snapshot_restore(snapshot, s.stepper, err));
    float *a = session_read(&s, PML_STATE_VALUE), *b = session_read(&reloaded, PML_STATE_VALUE);
    check(memcmp(a, b, pml_stepper_state_floats(s.stepper) * sizeof *a) == 0,
          "a full checkpoint does not load as a model");
    pml_json *document;
    char path[PML_PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/config.json", again.model);
    MUST(pml_json_load(path, &pml_json_file_limits, &document, err));
    check(strcmp(pml_json_as_string(pml_json_field(document, "dtype")), "float32") == 0,
          "config.json does not say float32");
    pml_json_destroy(&document);
    free(a);
    free(b);
    pml_snapshot_destroy(&snapshot);
    session_close(&s);
    session_close(&reloaded);
}

/* Change one byte in the middle of a file. */
static void damage(const char *folder, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r+b");
    if (file == NULL)
        abort();
    fseek(file, 0, SEEK_END);
    fseek(file, ftell(file) / 2, SEEK_SET);
    int byte = fgetc(file);
    fseek(file, -1, SEEK_CUR);
    fputc(byte ^ 1, file);
    fclose(file);
}

static void shorten(const char *folder, const char *name, off_t by)
{
    char path[512];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (stat(path, &info) != 0 || truncate(path, by < 0 ? 0 : info.st_size - by) != 0)
        abort();
}

typedef struct writer {
    session s;
    pml_snapshot *snapshot;
} writer;

static void write_step(writer *w, const char *folder)
{
    MUST(pml_checkpoint_write(w->snapshot, folder, NULL, err));
}

static void check_damage(writer *w)
{
    static const char *const files[] = {"adapter_model.safetensors", "adapter_config.json",
                                        "optimizer.safetensors", "state.json", "MANIFEST"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        for (int how = 0; how < 3; how++) {
            char *folder = in_root("damaged");
            pml_error err = PML_ERROR_INIT;
            write_step(w, folder);
            if (how == 0)
                damage(folder, files[i]);
            else
                shorten(folder, files[i], how == 1 ? 1 : -1);
            pml_status status = pml_checkpoint_load(folder, w->snapshot, &err);
            check(status == PML_CORRUPT, "damage %d of %s: %s", how, files[i],
                  pml_status_name(status));
            check(strcmp(files[i], "MANIFEST") == 0 || strstr(err.message, files[i]) != NULL,
                  "damage of %s is told as: %s", files[i], err.message);
            MUST(pml_tree_remove(root, "damaged", err));
        }
    char *folder = in_root("damaged"), path[512];
    write_step(w, folder);
    snprintf(path, sizeof path, "%s/optimizer.safetensors", folder);
    if (unlink(path) != 0)
        abort();
    check(pml_checkpoint_verify(folder, NULL) == PML_CORRUPT, "a missing file passes");
    /* A link in its place is refused, though what it leads to is what was written. */
    MUST(pml_tree_remove(root, "damaged", err));
    write_step(w, folder);
    if (rename(path, in_root("elsewhere")) != 0 || symlink(in_root("elsewhere"), path) != 0)
        abort();
    pml_error refused = PML_ERROR_INIT;
    check(pml_checkpoint_verify(folder, &refused) == PML_DENIED, "a link passes");
    check(strstr(refused.message, "optimizer.safetensors is a link") != NULL,
          "a link is told as: %s", refused.message);
    if (unlink(in_root("elsewhere")) != 0)
        abort();
    MUST(pml_tree_remove(root, "damaged", err));
    check(pml_checkpoint_verify(in_root("nowhere"), NULL) == PML_NOT_FOUND, "no folder passes");
}

static bool there(const char *name)
{
    struct stat info;
    return stat(in_root(name), &info) == 0;
}

static void check_prune(writer *w)
{
    char path[PML_PATH_MAX];
    int refused;
    const char *names[] = {"runs/step-000009", "runs/step-000010", "runs/step-000100",
                           "runs/step-001000", "runs/tried-1e-4"};
    MUST(pml_folder_make(in_root("runs"), err));
    check(pml_checkpoint_latest(in_root("runs"), path, sizeof path, &refused, NULL) ==
              PML_NOT_FOUND,
          "an empty folder has a latest checkpoint");
    for (int i = 0; i < 5; i++)
        write_step(w, in_root(names[i]));
    MUST(pml_folder_make(in_root("runs/.step-000011.tmp-1"), err));
    MUST(pml_checkpoint_latest(in_root("runs"), path, sizeof path, &refused, err));
    check(strstr(path, "step-001000") != NULL && refused == 0, "latest is %s", path);
    damage(in_root(names[3]), "state.json");
    damage(in_root(names[2]), "optimizer.safetensors");
    MUST(pml_checkpoint_latest(in_root("runs"), path, sizeof path, &refused, err));
    check(strstr(path, "step-000010") != NULL && refused == 2, "latest is %s", path);

    MUST(pml_checkpoint_prune(in_root("runs"), 0, -1, err));
    check(there(names[0]), "keep = 0 removed a checkpoint");
    check(!there("runs/.step-000011.tmp-1"), "the leftover of an interrupted write stays");
    MUST(pml_checkpoint_prune(in_root("runs"), 2, -1, err));
    check(!there(names[0]), "the oldest is still there");
    check(there(names[1]), "the last good one was removed");
    check(there(names[2]) && there(names[3]) && there(names[4]), "too much was removed");
    write_step(w, in_root("runs/step-002000"));
    write_step(w, in_root("runs/step-003000"));
    MUST(pml_checkpoint_prune(in_root("runs"), 2, 10, err));
    check(there(names[1]) && there("runs/step-003000"), "the best or the newest was removed");
    check(!there(names[2]) && !there(names[3]) && !there("runs/step-002000"),
          "the best does not count as one of the two");
    write_step(w, in_root("runs/step-004000"));
    MUST(pml_checkpoint_prune(in_root("runs"), 1, 10, err));
    check(there(names[1]) && there("runs/step-004000") && !there("runs/step-003000"),
          "keep = 1 is not the best and the newest");
}

static void check_other_adapter(writer *w, const char *fixtures)
{
    pml_train_config config;
    load_case(fixtures, "llama-biased-lora", &config);
    session s;
    session_open(&(session_options){.config = &config}, &s);
    check(pml_snapshot_restore(w->snapshot, s.stepper, NULL) == PML_INVALID,
          "a snapshot was restored into another adapter");
    pml_snapshot *snapshot;
    MUST(pml_snapshot_new(s.stepper, &config, &snapshot, err));
    check(pml_checkpoint_load(in_root("qwen2-tied-lora"), snapshot, NULL) != PML_OK,
          "a checkpoint was loaded into another adapter");
    pml_snapshot_destroy(&snapshot);
    session_close(&s);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    if (argc != 2 || mkdtemp(root) == NULL) {
        fprintf(stderr, "usage: checkpoint FIXTURES\n");
        return EXIT_FAILURE;
    }
    static const char *const cases[] = {"llama-tied-full", "llama-untied-lora", "qwen2-tied-lora",
                                        "qwen2-untied-full", "qwen3-mixed-lora"};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int how = 0; how < VARIANTS; how++) {
            check_resume(argv[1], cases[i], (variant)how);
            check_left(argv[1], cases[i], (variant)how);
        }
    check_left_width(argv[1]);
    check_eight_bits(argv[1]);
    check_full_is_a_model(argv[1]);
    pml_train_config config;
    load_case(argv[1], "qwen2-tied-lora", &config);
    writer w;
    session_open(&(session_options){.config = &config}, &w.s);
    MUST(pml_snapshot_new(w.s.stepper, &config, &w.snapshot, err));
    pml_train_state state = state_of(&w.s);
    MUST(pml_snapshot_take(w.snapshot, w.s.stepper, &state, err));
    check_other_adapter(&w, argv[1]);
    check_damage(&w);
    check_prune(&w);
    pml_snapshot_destroy(&w.snapshot);
    session_close(&w.s);
    MUST(pml_tree_remove("/tmp", root + strlen("/tmp/"), err));
    return summary();
}
