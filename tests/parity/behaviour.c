/* What a stepper does at the edges: sampling in pieces, numbers that are not finite, dropout, fresh
 * adapters, model folders that are not what config.json says.
 *
 *   behaviour FIXTURES */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml_op/cpu.h"
#include "session.h"

static char root[] = "/tmp/pml-behaviour-XXXXXX";
static const int32_t prompt[] = {5, 9, 33, 12, 60, 7, 41, 18, 29, 3, 55};
enum { PROMPT = sizeof prompt / sizeof *prompt, NEW = 12 };

/* A stepper without data, with room for so many tokens at a time. */
static pml_stepper *open_stepper(const pml_train_config *config, int32_t tokens)
{
    const pml_stepper_options options = {.config = config,
                                         .backend = pml_backend_cpu(),
                                         .threads = 1,
                                         .limits = {tokens, 4, tokens, tokens, 32}};
    pml_stepper *stepper;
    MUST(pml_stepper_new(&options, &stepper, err));
    return stepper;
}

static int32_t generate(pml_stepper *stepper, double temperature, uint64_t seed, int32_t *out)
{
    const pml_generate_options options = {.prompt = prompt,
                                          .n_prompt = PROMPT,
                                          .max_new_tokens = NEW,
                                          .temperature = temperature,
                                          .seed = seed};
    int32_t n;
    MUST(pml_stepper_generate(stepper, &options, out, &n, err));
    return n;
}

static bool stop_at_third(void *user, int32_t row, int32_t token)
{
    int *seen = user;
    (void)row, (void)token;
    return ++*seen < 3;
}

/* Prompts of 1 to 5 tokens, one behind another; their answers alone, and side by side. */
enum { SIDE_BY_SIDE = 11, SIDE_NEW = 3 };

typedef struct heard {
    int32_t tokens[SIDE_BY_SIDE][SIDE_NEW], n[SIDE_BY_SIDE];
    int32_t first; /* the row that is told to end after its first token, -1: none */
} heard;

static bool hear(void *user, int32_t row, int32_t token)
{
    heard *h = user;
    h->tokens[row][h->n[row]++] = token;
    return row != h->first;
}

/* More prompts than go at once, with gaps between them in the cache: each gets the tokens that it
 * gets alone, greedy and drawn, whatever ends beside it. */
static void check_rows(pml_stepper *s)
{
    int32_t tokens[SIDE_BY_SIDE * 5], lengths[SIDE_BY_SIDE], all = 0;
    for (int32_t row = 0; row < SIDE_BY_SIDE; row++) {
        lengths[row] = 1 + row % 5;
        for (int32_t i = 0; i < lengths[row]; i++)
            tokens[all++] = (7 * row + 3 * i) % 60;
    }
    for (int hot = 0; hot < 2; hot++) {
        int32_t out[SIDE_BY_SIDE * SIDE_NEW], n_out[SIDE_BY_SIDE], at = 0;
        heard h = {.first = 4};
        pml_generate_options options = {.prompt = tokens,
                                        .n_prompt = all,
                                        .lengths = lengths,
                                        .n_prompts = SIDE_BY_SIDE,
                                        .max_new_tokens = SIDE_NEW,
                                        .temperature = hot,
                                        .seed = 5,
                                        .on_token = hear,
                                        .user = &h};
        MUST(pml_stepper_generate(s, &options, out, n_out, err));
        for (int32_t row = 0; row < SIDE_BY_SIDE; at += lengths[row], row++) {
            int32_t alone[SIDE_NEW], n;
            const pml_generate_options one = {.prompt = tokens + at,
                                              .n_prompt = lengths[row],
                                              .max_new_tokens = SIDE_NEW,
                                              .temperature = hot,
                                              .seed = 5};
            MUST(pml_stepper_generate(s, &one, alone, &n, err));
            int32_t want = row == h.first ? 1 : n;
            size_t bytes = (size_t)want * sizeof *alone;
            check(n_out[row] == want && h.n[row] == want &&
                      memcmp(alone, out + (size_t)row * SIDE_NEW, bytes) == 0 &&
                      memcmp(alone, h.tokens[row], bytes) == 0,
                  "row %d of %d prompts side by side is not as alone", row, SIDE_BY_SIDE);
        }
    }
    pml_generate_options wrong = {.prompt = tokens,
                                  .n_prompt = all - 1,
                                  .lengths = lengths,
                                  .n_prompts = SIDE_BY_SIDE,
                                  .max_new_tokens = 1};
    int32_t out[SIDE_BY_SIDE], n_out[SIDE_BY_SIDE];
    check(pml_stepper_generate(s, &wrong, out, n_out, NULL) == PML_INVALID,
          "lengths that are not those of the prompts were taken");
}

/* The prompt in chunks of 1, 4 or all at once; hot sampling repeats itself for one seed only. */
static void check_sampling(const char *fixtures)
{
    static const int32_t chunks[] = {1, 4, 30};
    pml_train_config config;
    load_case(fixtures, "llama-tied-full", &config);
    int32_t greedy[3][NEW], n[3], hot[3][NEW];
    for (int i = 0; i < 3; i++) {
        pml_stepper *s = open_stepper(&config, chunks[i]);
        n[i] = generate(s, 0, 0, greedy[i]);
        check(n[i] == n[0] && memcmp(greedy[i], greedy[0], (size_t)n[0] * sizeof **greedy) == 0,
              "a prompt in chunks of %d continues differently", chunks[i]);
        pml_stepper_destroy(&s);
    }
    pml_stepper *s = open_stepper(&config, 30);
    int32_t a = generate(s, 1.5, 1, hot[0]), b = generate(s, 1.5, 1, hot[1]);
    check(a == b && memcmp(hot[0], hot[1], (size_t)a * sizeof **hot) == 0,
          "one seed gives two samples");
    int32_t c = generate(s, 1.5, 2, hot[2]);
    check(a != c || memcmp(hot[0], hot[2], (size_t)a * sizeof **hot) != 0,
          "two seeds give one sample");
    check_rows(s);
    int seen = 0;
    pml_generate_options options = {.prompt = prompt,
                                    .n_prompt = PROMPT,
                                    .max_new_tokens = NEW,
                                    .on_token = stop_at_third,
                                    .user = &seen};
    int32_t out[40], n_out;
    MUST(pml_stepper_generate(s, &options, out, &n_out, err));
    check(n_out == 3 && seen == 3, "a generation told to end gave %d tokens", n_out);
    options.max_new_tokens = 32 - PROMPT + 1;
    check(pml_stepper_generate(s, &options, out, &n_out, NULL) == PML_INVALID,
          "more tokens than planned were not refused");
    options =
        (pml_generate_options){.prompt = (const int32_t[]){67}, .n_prompt = 1, .max_new_tokens = 1};
    check(pml_stepper_generate(s, &options, out, &n_out, NULL) == PML_INVALID,
          "a token outside the vocabulary was not refused");
    pml_stepper_destroy(&s);
}

/* A weight that is not a number: the step is skipped, nothing moves, the next one is clean. */
static void check_not_finite(const char *fixtures)
{
    pml_train_config config;
    load_case(fixtures, "llama-untied-lora", &config);
    session s;
    session_open(&(session_options){.config = &config}, &s);
    float *before = session_read(&s, PML_STATE_VALUE);
    size_t n = pml_stepper_state_floats(s.stepper);
    float good = before[n / 2];
    before[n / 2] = NAN;
    MUST(pml_stepper_write(s.stepper, PML_STATE_VALUE, before, err));
    config.schedule.warmup_steps = s.config.schedule.warmup_steps = 0;
    pml_step_result result = session_step(&s, NULL);
    check(result.skipped && isnan(result.loss), "a loss that is not a number was not skipped");
    float *after = session_read(&s, PML_STATE_VALUE),
          *moments = session_read(&s, PML_STATE_EXP_AVG);
    check(memcmp(before, after, n * sizeof *after) == 0, "a skipped step moved the weights");
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += fabs((double)moments[i]);
    check(sum == 0, "a skipped step moved the moments");
    const int32_t prompt[] = {3, 4, 5};
    const pml_generate_options greedy = {.prompt = prompt, .n_prompt = 3, .max_new_tokens = 2};
    int32_t out[2], n_out;
    pml_error err = PML_ERROR_INIT;
    check(pml_stepper_generate(s.stepper, &greedy, out, &n_out, &err) == PML_INVALID &&
              n_out == 0 && strstr(err.message, "not a finite number") != NULL,
          "logits that are not numbers made a token");
    before[n / 2] = good;
    MUST(pml_stepper_write(s.stepper, PML_STATE_VALUE, before, err));
    result = session_step(&s, NULL);
    check(!result.skipped && isfinite(result.loss), "the step after a skipped one is not clean");
    check(pml_stepper_applied(s.stepper) == 1, "a skipped step counts as an update of Adam's");

    /* The same update, had the skipped one never been: Adam's t is 1 in both. */
    session other;
    session_open(&(session_options){.config = &config}, &other);
    other.config.schedule.warmup_steps = 0;
    other.cursor = pml_sampler_next(other.sampler, other.cursor);
    other.config.schedule = s.config.schedule;
    other.step = 1; /* of the schedule */
    session_step(&other, NULL);
    float *got = session_read(&s, PML_STATE_VALUE), *want = session_read(&other, PML_STATE_VALUE);
    check(memcmp(got, want, n * sizeof *got) == 0, "a skipped step changes the update after it");
    session_close(&other);
    free(got);
    free(want);
    free(before);
    free(after);
    free(moments);
    session_close(&s);
}

static float *values_after(const pml_train_config *config, int recompute, int64_t seek)
{
    session s;
    session_open(&(session_options){.config = config,
                                    .recompute = recompute > 0 ? PML_RECOMPUTE_LAYER : 0,
                                    .recompute_layers = recompute,
                                    .head_chunk = 16},
                 &s);
    pml_stepper_seek(s.stepper, seek, seek, 0);
    for (int i = 0; i < 2; i++)
        session_step(&s, NULL);
    float *values = session_read(&s, PML_STATE_VALUE);
    session_close(&s);
    return values;
}

/* Dropout: a function of seed and step, the same in a recompute, absent from evaluation. */
static void check_dropout(const char *fixtures)
{
    pml_train_config config, other;
    load_case(fixtures, "llama-untied-lora", &config);
    config.schedule.warmup_steps = 0;
    session s;
    session_open(&(session_options){.config = &config}, &s);
    size_t bytes = pml_stepper_state_floats(s.stepper) * sizeof(float);
    double plain = 0, dropped = 0;
    pml_batch batch;
    MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
    MUST(pml_stepper_evaluate(s.stepper, &batch, &plain, err));
    session_close(&s);
    float *without = values_after(&config, 0, 0);
    config.lora_dropout = 0.3;
    other = config;
    other.seed++;
    float *one = values_after(&config, 0, 0), *same = values_after(&config, 2, 0);
    float *later = values_after(&config, 0, 1), *seeded = values_after(&other, 0, 0);
    check(memcmp(one, without, bytes) != 0, "dropout changes nothing");
    check(memcmp(one, same, bytes) == 0, "dropout differs in a recompute");
    check(memcmp(one, later, bytes) != 0, "dropout does not follow the step");
    check(memcmp(one, seeded, bytes) != 0, "dropout does not follow the seed");
    session_open(&(session_options){.config = &config}, &s);
    MUST(pml_sampler_batch(s.sampler, s.cursor, 0, &batch, err));
    MUST(pml_stepper_evaluate(s.stepper, &batch, &dropped, err));
    check(plain == dropped, "evaluation drops");
    session_close(&s);
    float *all[] = {without, one, same, later, seeded};
    for (int i = 0; i < 5; i++)
        free(all[i]);
}

/* B is zero, A uniform within 1/sqrt(in) and a function of the seed. */
static void check_fresh_adapter(const char *fixtures)
{
    pml_train_config config;
    load_case(fixtures, "qwen2-tied-lora", &config);
    config.lora_init[0] = '\0';
    pml_stepper *s[3];
    float *values[3];
    for (int i = 0; i < 3; i++) {
        config.seed = i == 2 ? 43 : 42;
        s[i] = open_stepper(&config, 30);
        values[i] = malloc(pml_stepper_state_floats(s[i]) * sizeof(float));
        if (values[i] == NULL)
            abort();
        MUST(pml_stepper_read(s[i], PML_STATE_VALUE, values[i], err));
    }
    size_t bytes = pml_stepper_state_floats(s[0]) * sizeof(float);
    check(memcmp(values[0], values[1], bytes) == 0, "one seed gives two adapters");
    check(memcmp(values[0], values[2], bytes) != 0, "two seeds give one adapter");
    const float *at = values[0];
    for (int t = 0; t < pml_stepper_trainable_count(s[0]); t++) {
        const char *name;
        int64_t rows, cols;
        pml_stepper_trainable(s[0], t, &name, &rows, &cols, NULL);
        double bound = 1.0 / sqrt((double)cols), squares = 0, top = 0;
        for (int64_t e = 0; e < rows * cols; e++) {
            squares += (double)at[e] * at[e];
            top = fmax(top, fabs((double)at[e]));
        }
        double spread = sqrt(3 * squares / (double)(rows * cols)) / bound; /* uniform: 1 */
        if (strstr(name, "lora_B") != NULL)
            check(top == 0, "%s does not begin at zero", name);
        else
            check(top <= bound && spread > 0.8 && spread < 1.2, "%s: spread %.2f, top %.2f of %.2f",
                  name, spread, top, bound);
        at += rows * cols;
    }
    for (int i = 0; i < 3; i++) {
        pml_stepper_destroy(&s[i]);
        free(values[i]);
    }
}

static void copy_tensor(const pml_stored *from, pml_safetensors_writer *to)
{
    void *data = malloc(from->bytes);
    MUST(pml_stored_read(from, 0, from->bytes, data, err));
    MUST(pml_safetensors_writer_write(to, data, from->bytes, err));
    free(data);
}

typedef enum fault { NOTHING, MISSING, EXTRA, WRONG_SHAPE, REDUNDANT } fault;

/* Copy a model folder's tensors with one fault in them. */
static void write_faulty(const char *folder, const pml_safetensors *from, fault what)
{
    static const char victim[] = "model.layers.1.self_attn.k_proj.weight";
    char path[512];
    pml_safetensors_writer *w;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    MUST(pml_safetensors_writer_new(path, 0600, &w, err));
    for (int data = 0; data < 2; data++) {
        for (size_t i = 0; i < pml_safetensors_count(from); i++) {
            const pml_stored *t = pml_safetensors_at(from, i);
            int64_t shape[2] = {t->shape[0], t->shape[1]};
            bool hit = strcmp(t->name, victim) == 0;
            if (hit && what == MISSING)
                continue;
            if (hit && what == WRONG_SHAPE) {
                shape[0] = t->shape[1];
                shape[1] = t->shape[0];
            }
            if (data == 0)
                MUST(pml_safetensors_writer_add(w, t->name, t->dtype, shape, t->n_dims, err));
            else
                copy_tensor(t, w);
        }
        const int64_t one = 1;
        const float zero = 0;
        const char *name = what == EXTRA ? "model.layers.0.self_attn.q_norm.weight"
                                         : "model.layers.0.self_attn.rotary_emb.inv_freq";
        if (what != EXTRA && what != REDUNDANT)
            continue;
        if (data == 0)
            MUST(pml_safetensors_writer_add(w, name, PML_F32, &one, 1, err));
        else
            MUST(pml_safetensors_writer_write(w, &zero, sizeof zero, err));
    }
    MUST(pml_safetensors_writer_finish(w, err));
    pml_safetensors_writer_destroy(&w);
}

static void check_folders(const char *fixtures)
{
    static const struct {
        fault what;
        pml_status status;
        const char *told;
    } faults[] = {{NOTHING, PML_OK, ""},
                  {REDUNDANT, PML_OK, ""},
                  {MISSING, PML_NOT_FOUND, "model.layers.1.self_attn.k_proj.weight"},
                  {WRONG_SHAPE, PML_INVALID, "model.layers.1.self_attn.k_proj.weight"},
                  {EXTRA, PML_UNSUPPORTED, "model.layers.0.self_attn.q_norm.weight"}};
    pml_train_config config;
    load_case(fixtures, "llama-tied-full", &config);
    pml_safetensors *from;
    MUST(pml_safetensors_open_folder(config.model, &from, err));
    char path[PML_PATH_MAX + 32], *text;
    size_t size;
    snprintf(path, sizeof path, "%s/config.json", config.model);
    MUST(pml_file_read(path, 1 << 20, false, &text, &size, err));
    snprintf(path, sizeof path, "%s/config.json", root);
    MUST(pml_file_write(path, text, size, 0600, err));
    free(text);
    snprintf(config.model, sizeof config.model, "%s", root);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        const pml_stepper_options options = {.config = &config,
                                             .backend = pml_backend_cpu(),
                                             .threads = 1,
                                             .limits = {8, 1, 8, 8, 0}};
        pml_stepper *stepper;
        pml_error why = PML_ERROR_INIT;
        write_faulty(root, from, faults[i].what);
        pml_status status = pml_stepper_new(&options, &stepper, &why);
        check(status == faults[i].status, "model folder %zu: %s: %s", i, pml_status_name(status),
              why.message);
        check(strstr(why.message, faults[i].told) != NULL, "model folder %zu is told as: %s", i,
              why.message);
        check((stepper != NULL) == (status == PML_OK), "model folder %zu left a stepper", i);
        pml_stepper_destroy(&stepper);
    }
    pml_safetensors_close(&from);
}

/* ---- a file that somebody cuts short while it is loaded ---- */

static char cut_path[PML_PATH_MAX];

static pml_status cut_and_upload(pml_queue *queue, void *to, size_t pitch, const pml_file_at *from,
                                 size_t width, size_t rows, pml_error *err)
{
    if (truncate(cut_path, 3000) != 0)
        abort();
    return pml_backend_cpu()->upload_file(queue, to, pitch, from, width, rows, err);
}

/* Its tensors as they are, and a bitsandbytes folder. */
static void check_cut_short(const char *fixtures)
{
    static const char *const cases[] = {"llama-tied-full", "llama-nf4-lora"};
    pml_backend cutting = *pml_backend_cpu();
    cutting.upload_file = cut_and_upload;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_train_config config;
        pml_stepper *stepper;
        pml_error why = PML_ERROR_INIT;
        char path[PML_PATH_MAX + 32], *text;
        size_t size;
        static const char *const files[] = {"config.json", "model.safetensors"};
        load_case(fixtures, cases[i], &config);
        for (int f = 0; f < 2; f++) {
            snprintf(path, sizeof path, "%s/%s", config.model, files[f]);
            MUST(pml_file_read(path, 1 << 26, false, &text, &size, err));
            snprintf(cut_path, sizeof cut_path, "%s/%s", root, files[f]);
            MUST(pml_file_write(cut_path, text, size, 0600, err));
            free(text);
        }
        snprintf(config.model, sizeof config.model, "%s", root);
        const pml_stepper_options options = {
            .config = &config, .backend = &cutting, .threads = 1, .limits = {8, 1, 8, 8, 0}};
        pml_status status = pml_stepper_new(&options, &stepper, &why);
        check(status == PML_CORRUPT && stepper == NULL, "%s cut short: %s", cases[i],
              pml_status_name(status));
        check(strstr(why.message, "model.safetensors has no byte ") != NULL,
              "%s cut short is told as: %s", cases[i], why.message);
    }
}

static void check_refusals(const char *fixtures)
{
    pml_train_config config;
    pml_stepper *stepper;
    load_case(fixtures, "llama-untied-lora", &config);
    config.memory_limit = 1 << 20;
    pml_stepper_options options = {.config = &config,
                                   .backend = pml_backend_cpu(),
                                   .threads = 1,
                                   .limits = {30, 2, 30, 30, 0}};
    check(pml_stepper_new(&options, &stepper, NULL) == PML_NO_MEMORY, "1 MiB is enough");
    config.memory_limit = 0;
    config.lora_rank = 5;
    pml_error why = PML_ERROR_INIT;
    check(pml_stepper_new(&options, &stepper, &why) == PML_INVALID &&
              strstr(why.message, "r = 4") != NULL,
          "an adapter of another rank is told as: %s", why.message);
    config.lora_rank = 4;
    MUST(pml_stepper_new(&options, &stepper, err));
    static int32_t ids[40], positions[40], bounds[] = {0, 31}, rows[] = {0}, labels[] = {1};
    for (int32_t i = 0; i < 40; i++)
        positions[i] = i;
    pml_batch batch = {31, 1, 1, 31, ids, positions, bounds, rows, labels, NULL};
    check(pml_stepper_micro(stepper, &batch, NULL) == PML_INVALID,
          "a batch of more tokens than planned was taken");
    batch.n_tokens = batch.max_doc = bounds[1] = 20;
    ids[3] = 67;
    check(pml_stepper_micro(stepper, &batch, NULL) == PML_INVALID,
          "a token outside the vocabulary was taken");
    ids[3] = 66;
    MUST(pml_stepper_micro(stepper, &batch, err));
    pml_stepper_destroy(&stepper);
}

/* What was told to be read after the product that comes, and before that one; how often it was. */
static struct {
    const void *data[2];
    size_t bytes[2];
    int told, kept, broken;
    bool fresh; /* told of since the last product */
} ahead;

static void hear_ahead(pml_queue *queue, const void *data, size_t bytes)
{
    ahead.data[0] = ahead.data[1];
    ahead.bytes[0] = ahead.bytes[1];
    ahead.data[1] = data;
    ahead.bytes[1] = bytes;
    ahead.told++;
    ahead.fresh = true;
    pml_backend_cpu()->ahead(queue, data, bytes);
}

static pml_status linear_as_told(pml_queue *queue, const pml_linear_args *a, pml_error *e)
{
    const size_t bytes = (size_t)a->w.rows * (size_t)a->w.cols * pml_dtype_size(a->w.dtype);
    if (ahead.fresh && ahead.data[0] != NULL) {
        const bool same = ahead.data[0] == a->w.data && ahead.bytes[0] == bytes;
        ahead.kept += same;
        ahead.broken += !same;
    }
    ahead.fresh = false;
    return pml_backend_cpu()->op.linear(queue, a, e);
}

/* Of tokens after the prompt each product's weight is told before the product in front of it runs,
 * the first one's during the last of the token before; of a prompt none. */
static void check_ahead(const char *fixtures)
{
    pml_train_config config;
    load_case(fixtures, "llama-tied-full", &config);
    pml_backend backend = *pml_backend_cpu();
    backend.ahead = hear_ahead;
    backend.op.linear = linear_as_told;
    const pml_stepper_options options = {
        .config = &config, .backend = &backend, .threads = 2, .limits = {30, 4, 30, 30, 32}};
    pml_stepper *s;
    int32_t told[NEW], usual[NEW];
    MUST(pml_stepper_new(&options, &s, err));
    const int32_t n = generate(s, 0, 0, told);
    const int products = 4 * pml_stepper_spec(s)->layers + 1;
    check(ahead.told == (n - 1) * products && ahead.kept == ahead.told - 1 && ahead.broken == 0,
          "of %d weights read for %d tokens %d were told, %d were others", (n - 1) * products,
          n - 1, ahead.told, ahead.broken);
    pml_stepper_destroy(&s);
    s = open_stepper(&config, 30);
    check(generate(s, 0, 0, usual) == n && memcmp(told, usual, (size_t)n * sizeof *told) == 0,
          "what is fetched ahead changes tokens");
    pml_stepper_destroy(&s);
}

int main(int argc, char **argv)
{
    pml_cpu_prepare_process(argc, argv);
    if (argc != 2 || mkdtemp(root) == NULL) {
        fprintf(stderr, "usage: behaviour FIXTURES\n");
        return EXIT_FAILURE;
    }
    check_sampling(argv[1]);
    check_ahead(argv[1]);
    check_not_finite(argv[1]);
    check_dropout(argv[1]);
    check_fresh_adapter(argv[1]);
    check_folders(argv[1]);
    check_refusals(argv[1]);
    check_cut_short(argv[1]);
    MUST(pml_tree_remove("/tmp", root + strlen("/tmp/"), err));
    return summary();
}
