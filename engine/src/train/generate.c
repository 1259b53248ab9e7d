/* Continuing prompts with the live weights: each prompt goes through in chunks, then the new tokens
 * of all of them together, a row each, against the cached keys and values of what came before.
 *
 *   cache   | prompt 0, its answer   | prompt 1, its answer | free |
 *   keys      in use so far ... gap    in use so far ... gap
 *
 * A gap is a document without queries, so attention needs to know nothing of this. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "choose.h"
#include "pml/model/convert.h"
#include "stepper_impl.h"

/* One call of GENERATE: tokens of one or more rows, as its inputs have them. */
typedef struct chunk {
    int32_t *ids, *positions, *places, *bounds, *key_bounds, *last;
    pml_counts counts; /* labels: rows */
} chunk;

/* A prompt and its answer: its place in the cache begins at `start`, and has `length` tokens. */
typedef struct row {
    int32_t number, start, length, token;
    bool over;
} row;

/* n numbers that came in 16 bits into the second half of their room: from the first on, each block
 * is read before its place is written. */
static void widen_in_place(float *numbers, int64_t n, pml_dtype dtype)
{
    enum { BLOCK = 1024 };
    const char *from = (const char *)numbers + (size_t)n * sizeof(uint16_t);
    uint16_t bits[BLOCK];
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t count = n - i < BLOCK ? n - i : BLOCK;
        memcpy(bits, from + (size_t)i * sizeof *bits, (size_t)count * sizeof *bits);
        for (int64_t j = 0; dtype == PML_BF16 && j < count; j++)
            numbers[i + j] = pml_bf16_to_f32(bits[j]);
        for (int64_t j = 0; dtype != PML_BF16 && j < count; j++)
            numbers[i + j] = pml_f16_to_f32(bits[j]);
    }
}

/* ---- a chunk ---- */

/* An empty chunk in the staged memory, which the queue must have read. */
static pml_status begin_chunk(pml_stepper *s, chunk *c, pml_error *err)
{
    int32_t most = s->program->generate_chunk, slots = 2 * s->program->generate_rows;
    *c = (chunk){.ids = s->staged};
    c->positions = c->ids + most;
    c->places = c->positions + most;
    c->bounds = c->places + most;
    c->key_bounds = c->bounds + slots + 1;
    c->last = c->key_bounds + slots + 1;
    pml_status status = s->backend->sync(s->queue, err);
    c->bounds[0] = c->key_bounds[0] = 0;
    return status;
}

static void end_slot(chunk *c, int32_t keys)
{
    c->counts.docs++;
    c->bounds[c->counts.docs] = c->counts.tokens;
    c->key_bounds[c->counts.docs] = c->counts.keys = keys;
}

/* n more tokens of the row whose cache begins at `start` and has `length` of them. Rows come in the
 * order of their starts. */
static void put(chunk *c, int32_t start, int32_t length, const int32_t *tokens, int32_t n)
{
    if (c->counts.keys < start)
        end_slot(c, start);
    for (int32_t i = 0; i < n; i++) {
        int32_t at = c->counts.tokens++;
        c->ids[at] = tokens[i];
        c->positions[at] = length + i;
        c->places[at] = start + length + i;
    }
    end_slot(c, start + length + n);
    c->last[c->counts.labels++] = c->counts.tokens - 1;
    c->counts.max_doc = n > c->counts.max_doc ? n : c->counts.max_doc;
}

/* A token of each row, in a size that serves all lengths: empty slots behind the last, and as many
 * keys as the cache has, of which attention reads those within a document's bounds. */
static void pad(const pml_stepper *s, chunk *c)
{
    const int32_t keys = c->counts.keys;
    while (c->counts.docs < 2 * c->counts.tokens)
        end_slot(c, keys);
    c->counts.keys = s->program->limits.generate_length;
}

/* The logits of row i of so many as they came in 16 bits: behind the room that widening takes. */
static const uint16_t *narrow_row(const pml_stepper *s, int32_t rows, int32_t i)
{
    const int64_t vocab = s->spec.vocab;
    return (const uint16_t *)(s->logits + rows * vocab) - (rows - i) * vocab;
}

/* Run it, and fetch the logits of each row's last token: as float32, or as they are where nobody
 * computes with them. */
static pml_status run_chunk(pml_stepper *s, chunk *c, bool as_they_are, pml_error *err)
{
    const pml_program *p = s->program;
    if (c->counts.tokens == c->counts.labels)
        pad(s, c);
    const pml_dtype dtype = p->tensors[p->logits].dtype;
    const pml_counts *n = &c->counts;
    const struct {
        int32_t tensor;
        const int32_t *from;
        int32_t n;
    } inputs[] = {{p->ids, c->ids, n->tokens},
                  {p->positions_in, c->positions, n->tokens},
                  {p->cache_rows, c->places, n->tokens},
                  {p->bounds, c->bounds, n->docs + 1},
                  {p->key_bounds, c->key_bounds, n->docs + 1},
                  {p->last_row, c->last, n->labels}};
    pml_status status = PML_OK;
    for (size_t i = 0; status == PML_OK && i < sizeof inputs / sizeof *inputs; i++)
        status = pmli_upload(s, inputs[i].tensor, inputs[i].from,
                             (size_t)inputs[i].n * sizeof *c->ids, err);
    /* Prompts come in all sizes; tokens after them in a few, and one after the other. */
    if (status == PML_OK)
        status = n->tokens == n->labels ? pmli_run_recorded(s, PML_SEGMENT_GENERATE, n, err)
                                        : pmli_run_segment(s, PML_SEGMENT_GENERATE, n, err);
    const int64_t numbers = (int64_t)n->labels * s->spec.vocab;
    const size_t bytes = (size_t)numbers * pml_dtype_size(dtype);
    if (status == PML_OK)
        status = s->backend->download(
            s->queue, (char *)s->logits + ((size_t)numbers * sizeof *s->logits - bytes),
            pml_program_data(p, p->logits, s->arena), bytes, err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status == PML_OK && dtype != PML_F32 && !as_they_are)
        widen_in_place(s->logits, numbers, dtype);
    return status;
}

static pml_status run_alone(pml_stepper *s, int32_t start, int32_t length, const int32_t *tokens,
                            int32_t n, bool as_they_are, pml_error *err)
{
    chunk c;
    pml_status status = begin_chunk(s, &c, err);
    if (status != PML_OK)
        return status;
    put(&c, start, length, tokens, n);
    return run_chunk(s, &c, as_they_are, err);
}

/* ---- what was asked for ---- */

/* No token is the greatest of numbers that are none: a diverged model says so, not token 0. */
static pml_status check_logits(const float *logits, int32_t vocab, int32_t position, pml_error *err)
{
    const uint32_t exponent = 0x7f800000; /* all ones: infinite, or no number */
    uint32_t bad = 0;
    for (int32_t i = 0; i < vocab; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], sizeof bits);
        bad |= (bits & exponent) == exponent;
    }
    for (int32_t i = 0; bad != 0 && i < vocab; i++)
        if (!isfinite(logits[i]))
            return PML_FAIL(err, PML_INVALID,
                            "sampling at position %d: the model's output for token %d is %g, not a "
                            "finite number; its weights may have diverged",
                            position, i, (double)logits[i]);
    return PML_OK;
}

static bool ends(const pml_model_spec *spec, int32_t token)
{
    for (int32_t i = 0; i < spec->n_eos; i++)
        if (spec->eos[i] == token)
            return true;
    return false;
}

/* transformers' cache takes a window of one token for none at all (DynamicSlidingWindowLayer keeps
 * the last `-window + 1 = -0`, which is all): generate() lets a new token see everything, the mask
 * that the model was trained with only itself. There is no right answer to be equal to. */
static pml_status check_windows(const pml_model_spec *spec, pml_error *err)
{
    for (int32_t l = 0; l < spec->layers; l++)
        if (pml_layer_window(spec, l) == 1)
            return PML_FAIL(err, PML_INVALID,
                            "sliding_window is 1: transformers samples from such a model through a "
                            "cache that has no window, against the mask it was trained with; "
                            "sampling from it is refused, training is not");
    return PML_OK;
}

static int32_t prompts(const pml_generate_options *o)
{
    return o->lengths == NULL ? 1 : o->n_prompts;
}

static int32_t length_of(const pml_generate_options *o, int32_t i)
{
    return o->lengths == NULL ? o->n_prompt : o->lengths[i];
}

static pml_status check_prompt(const pml_stepper *s, const pml_generate_options *o, pml_error *err)
{
    pml_status status = check_windows(&s->spec, err);
    if (status != PML_OK)
        return status;
    int64_t in_all = 0;
    for (int32_t i = 0; i < prompts(o); i++) {
        int32_t n = length_of(o, i);
        int64_t length = (int64_t)n + o->max_new_tokens;
        if (n < 1 || o->max_new_tokens < 1)
            return PML_FAIL(
                err, PML_INVALID,
                "sampling needs a prompt of at least one token and max_new_tokens >= 1");
        if (length > s->program->limits.generate_length)
            return PML_FAIL(err, PML_INVALID,
                            "%d prompt tokens and %d new ones are more than the %d that were "
                            "planned for sampling (generate_length)",
                            n, o->max_new_tokens, s->program->limits.generate_length);
        in_all += n;
    }
    if (in_all != o->n_prompt || in_all == 0)
        return PML_FAIL(err, PML_INVALID, "prompts of %lld tokens in all, and %d of them are given",
                        (long long)in_all, o->n_prompt);
    if (!isfinite(o->temperature) || o->temperature < 0)
        return PML_FAIL(err, PML_INVALID, "temperature must be 0 or more, it is %g",
                        o->temperature);
    if (o->top_k < 0 || !(o->top_p >= 0 && o->top_p <= 1))
        return PML_FAIL(err, PML_INVALID, "top_k must be 1 or more and top_p in (0, 1]");
    if (!isfinite(o->repetition_penalty) || o->repetition_penalty < 0)
        return PML_FAIL(err, PML_INVALID, "repetition_penalty must be positive, it is %g",
                        o->repetition_penalty);
    for (int32_t i = 0; i < o->n_prompt; i++)
        if (o->prompt[i] < 0 || o->prompt[i] >= s->spec.vocab)
            return PML_FAIL(err, PML_INVALID, "prompt token %d is %d, outside the vocabulary of %d",
                            i, o->prompt[i], s->spec.vocab);
    return PML_OK;
}

/* ---- rows ---- */

/* The next token of a row from its logits, the i-th of `rows`. */
static pml_status next_token(pml_stepper *s, const pml_generate_options *o, const row *r,
                             int32_t rows, int32_t i, int32_t *token, pml_error *err)
{
    const int32_t vocab = s->spec.vocab;
    const pml_dtype dtype = s->program->tensors[s->program->logits].dtype;
    float *logits = s->logits + (size_t)i * (size_t)vocab;
    if (dtype != PML_F32 && pmli_is_greedy(o)) {
        bool finite;
        *token = pmli_greatest_narrow(narrow_row(s, rows, i), vocab, dtype, &finite);
        if (finite)
            return PML_OK;
        widen_in_place(s->logits, (int64_t)rows * vocab, dtype); /* to say which */
    }
    pml_status status = check_logits(logits, vocab, r->length, err);
    if (status == PML_OK)
        *token = pmli_choose(logits, vocab, s->said + r->start, r->length, o, s->chosen);
    return status;
}

/* It is chosen and told to whoever listens. */
static pml_status choose(pml_stepper *s, const pml_generate_options *o, row *r, int32_t rows,
                         int32_t i, int32_t *out, int32_t *n_out, pml_error *err)
{
    int32_t *said = s->said + r->start;
    pml_status status = next_token(s, o, r, rows, i, &r->token, err);
    if (status != PML_OK)
        return status;
    said[r->length] = r->token;
    out[(size_t)r->number * (size_t)o->max_new_tokens + (size_t)n_out[r->number]++] = r->token;
    bool go_on = o->on_token == NULL || o->on_token(o->user, r->number, r->token);
    r->over = !go_on || ends(&s->spec, r->token) || n_out[r->number] == o->max_new_tokens;
    return PML_OK;
}

/* A prompt goes through; the first token of its answer. */
static pml_status begin_row(pml_stepper *s, const pml_generate_options *o, row *r,
                            const int32_t *prompt, int32_t n, int32_t *out, int32_t *n_out,
                            pml_error *err)
{
    int32_t most = s->program->generate_chunk;
    memcpy(s->said + r->start, prompt, (size_t)n * sizeof *prompt);
    pml_status status = pmli_rope_fit(s, n, err);
    while (status == PML_OK && r->length < n) {
        int32_t part = n - r->length < most ? n - r->length : most;
        status =
            run_alone(s, r->start, r->length, prompt + r->length, part, pmli_is_greedy(o), err);
        r->length += part;
    }
    return status == PML_OK ? choose(s, o, r, 1, 0, out, n_out, err) : status;
}

/* One more token of every row that is not over; *busy: there was one. */
static pml_status advance(pml_stepper *s, const pml_generate_options *o, row *rows, int32_t n,
                          int32_t *out, int32_t *n_out, bool *busy, pml_error *err)
{
    row *running[PML_GENERATE_ROWS];
    int32_t count = 0;
    chunk c;
    pml_status status = begin_chunk(s, &c, err);
    for (int32_t i = 0; status == PML_OK && i < n; i++) {
        if (rows[i].over)
            continue;
        status = pmli_rope_fit(s, rows[i].length + 1, err);
        put(&c, rows[i].start, rows[i].length, &rows[i].token, 1);
        rows[i].length++;
        running[count++] = &rows[i];
    }
    *busy = count > 0;
    if (status == PML_OK && count > 0)
        status = run_chunk(s, &c, pmli_is_greedy(o), err);
    for (int32_t i = 0; status == PML_OK && i < count; i++)
        status = choose(s, o, running[i], count, i, out, n_out, err);
    return status;
}

/* As many prompts from `next` on as the cache holds. The angles of dynamic rope follow one row's
 * length, so there it is one. */
static int32_t take_rows(const pml_stepper *s, const pml_generate_options *o, int32_t next,
                         row *rows)
{
    const pml_program *p = s->program;
    int32_t most = s->spec.rope.type == PML_ROPE_DYNAMIC ? 1 : p->generate_rows;
    int32_t n = 0;
    int64_t used = 0;
    while (n < most && next + n < prompts(o)) {
        int64_t room = (int64_t)length_of(o, next + n) + o->max_new_tokens;
        if (used + room > p->limits.generate_length)
            break;
        rows[n] = (row){.number = next + n, .start = (int32_t)used};
        used += room;
        n++;
    }
    return n;
}

pml_status pml_stepper_generate(pml_stepper *s, const pml_generate_options *o, int32_t *out,
                                int32_t *n_out, pml_error *err)
{
    row rows[PML_GENERATE_ROWS];
    const int32_t *prompt = o->prompt;
    memset(n_out, 0, (size_t)(prompts(o) > 0 ? prompts(o) : 0) * sizeof *n_out);
    pml_status status = check_prompt(s, o, err);
    for (int32_t next = 0, n; status == PML_OK && next < prompts(o); next += n) {
        n = take_rows(s, o, next, rows);
        for (int32_t i = 0; status == PML_OK && i < n; i++) {
            int32_t length = length_of(o, next + i);
            status = begin_row(s, o, &rows[i], prompt, length, out, n_out, err);
            prompt += length;
        }
        for (bool busy = true; status == PML_OK && busy;)
            status = advance(s, o, rows, n, out, n_out, &busy, err);
    }
    return status;
}

pml_status pml_stepper_logits(pml_stepper *s, const int32_t *tokens, int32_t n, float *out,
                              pml_error *err)
{
    if (n < 1 || n > s->program->limits.generate_length)
        return PML_FAIL(err, PML_INVALID, "logits of %d tokens: 1 to %d were planned for", n,
                        s->program->limits.generate_length);
    pml_status status = PML_OK;
    for (int32_t i = 0; status == PML_OK && i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= s->spec.vocab)
            return PML_FAIL(err, PML_INVALID, "token %d is %d, outside the vocabulary of %d", i,
                            tokens[i], s->spec.vocab);
        status = pmli_go_on(s, err);
        if (status == PML_OK)
            status = run_alone(s, 0, i, &tokens[i], 1, false, err);
        memcpy(out + (size_t)i * (size_t)s->spec.vocab, s->logits,
               (size_t)s->spec.vocab * sizeof *out);
    }
    return status;
}
