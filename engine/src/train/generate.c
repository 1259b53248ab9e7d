/* Continuing a prompt with the live weights: the prompt goes through in chunks, each new token as a
 * chunk of one, against the cached keys and values of what came before. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "choose.h"
#include "pml/model/convert.h"
#include "stepper_impl.h"

/* n numbers that came as bfloat16: from the last on, each is read before its place is written. */
static void widen_in_place(float *numbers, int32_t n)
{
    for (int32_t i = n - 1; i >= 0; i--) {
        uint16_t bits;
        memcpy(&bits, (char *)numbers + (size_t)i * sizeof bits, sizeof bits);
        numbers[i] = pml_bf16_to_f32(bits);
    }
}

/* Run tokens[0..n) at positions start.. and fetch the logits of the last. */
static pml_status run_chunk(pml_stepper *s, const int32_t *tokens, int32_t n, int32_t start,
                            pml_error *err)
{
    const pml_program *p = s->program;
    const pml_dtype dtype = p->tensors[p->logits].dtype;
    pml_status status = s->backend->sync(s->queue, err);
    if (status != PML_OK)
        return status;
    int32_t *ids = s->staged, *positions = ids + n, *bounds = positions + n;
    int32_t *key_bounds = bounds + 2, *last = key_bounds + 2;
    for (int32_t i = 0; i < n; i++) {
        ids[i] = tokens[i];
        positions[i] = start + i;
    }
    bounds[0] = key_bounds[0] = 0;
    bounds[1] = n;
    key_bounds[1] = start + n;
    last[0] = n - 1;
    const struct {
        int32_t tensor;
        const int32_t *from;
        size_t n;
    } inputs[] = {{p->ids, ids, (size_t)n},
                  {p->positions_in, positions, (size_t)n},
                  {p->bounds, bounds, 2},
                  {p->key_bounds, key_bounds, 2},
                  {p->last_row, last, 1}};
    for (size_t i = 0; status == PML_OK && i < sizeof inputs / sizeof *inputs; i++)
        status = pmli_upload(s, inputs[i].tensor, inputs[i].from, inputs[i].n * sizeof *ids, err);
    const pml_counts counts = {
        .tokens = n, .docs = 1, .labels = 1, .keys = start + n, .max_doc = n};
    if (status == PML_OK)
        status = pmli_run_segment(s, PML_SEGMENT_GENERATE, &counts, err);
    if (status == PML_OK)
        status = s->backend->download(s->queue, s->logits, pml_program_data(p, p->logits, s->arena),
                                      (size_t)s->spec.vocab * pml_dtype_size(dtype), err);
    if (status == PML_OK)
        status = s->backend->sync(s->queue, err);
    if (status == PML_OK && dtype == PML_BF16)
        widen_in_place(s->logits, s->spec.vocab);
    return status;
}

/* No token is the greatest of numbers that are none: a diverged model says so, not token 0. */
static pml_status check_logits(const pml_stepper *s, int32_t position, pml_error *err)
{
    for (int32_t i = 0; i < s->spec.vocab; i++)
        if (!isfinite(s->logits[i]))
            return PML_FAIL(err, PML_INVALID,
                            "sampling at position %d: the model's output for token %d is %g, not a "
                            "finite number; its weights may have diverged",
                            position, i, (double)s->logits[i]);
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

static pml_status check_prompt(const pml_stepper *s, const pml_generate_options *o, pml_error *err)
{
    if (o->n_prompt < 1 || o->max_new_tokens < 1)
        return PML_FAIL(err, PML_INVALID,
                        "sampling needs a prompt of at least one token and max_new_tokens >= 1");
    if (!isfinite(o->temperature) || o->temperature < 0)
        return PML_FAIL(err, PML_INVALID, "temperature must be 0 or more, it is %g",
                        o->temperature);
    if (o->top_k < 0 || !(o->top_p >= 0 && o->top_p <= 1))
        return PML_FAIL(err, PML_INVALID, "top_k must be 1 or more and top_p in (0, 1]");
    if (!isfinite(o->repetition_penalty) || o->repetition_penalty < 0)
        return PML_FAIL(err, PML_INVALID, "repetition_penalty must be positive, it is %g",
                        o->repetition_penalty);
    pml_status status = check_windows(&s->spec, err);
    if (status != PML_OK)
        return status;
    int64_t length = (int64_t)o->n_prompt + o->max_new_tokens;
    if (length > s->program->limits.generate_length)
        return PML_FAIL(err, PML_INVALID,
                        "%d prompt tokens and %d new ones are more than the %d that were planned "
                        "for sampling (generate_length)",
                        o->n_prompt, o->max_new_tokens, s->program->limits.generate_length);
    for (int32_t i = 0; i < o->n_prompt; i++)
        if (o->prompt[i] < 0 || o->prompt[i] >= s->spec.vocab)
            return PML_FAIL(err, PML_INVALID, "prompt token %d is %d, outside the vocabulary of %d",
                            i, o->prompt[i], s->spec.vocab);
    return PML_OK;
}

pml_status pml_stepper_generate(pml_stepper *s, const pml_generate_options *o, int32_t *out,
                                int32_t *n_out, pml_error *err)
{
    *n_out = 0;
    pml_status status = check_prompt(s, o, err);
    int32_t chunk = s->program->generate_chunk;
    if (status == PML_OK)
        memcpy(s->said, o->prompt, (size_t)o->n_prompt * sizeof *s->said);
    if (status == PML_OK)
        status = pmli_rope_fit(s, o->n_prompt, err);
    for (int32_t at = 0; status == PML_OK && at < o->n_prompt; at += chunk) {
        int32_t n = o->n_prompt - at < chunk ? o->n_prompt - at : chunk;
        status = run_chunk(s, o->prompt + at, n, at, err);
    }
    while (status == PML_OK) {
        int32_t position = o->n_prompt + *n_out;
        status = check_logits(s, position, err);
        if (status != PML_OK)
            break;
        int32_t token = pmli_choose(s->logits, s->spec.vocab, s->said, position, o, s->chosen);
        s->said[position] = out[(*n_out)++] = token;
        bool go_on = o->on_token == NULL || o->on_token(o->user, token);
        if (!go_on || ends(&s->spec, token) || *n_out == o->max_new_tokens)
            break;
        status = pmli_rope_fit(s, position + 1, err);
        if (status == PML_OK)
            status = run_chunk(s, &token, 1, position, err);
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
        status = run_chunk(s, &tokens[i], 1, i, err);
        memcpy(out + (size_t)i * (size_t)s->spec.vocab, s->logits,
               (size_t)s->spec.vocab * sizeof *out);
    }
    return status;
}
