/* config.json's rotary embedding → pml_rope_spec, read as transformers reads it. */
#include <math.h>
#include <string.h>

#include "fields.h"

/* One beside the object wins over the one inside it, as in transformers. */
static pml_status read_original(pml_json_at at, pml_json_at root, pml_model_spec *s, pml_error *err)
{
    int32_t *original = &s->rope.original_max_positions;
    *original = s->max_positions;
    TRY(pml_json_get_i32(at, "original_max_position_embeddings", PML_JSON_OPTIONAL, 1,
                         PMLI_POSITIONS_MAX, original, err));
    return pml_json_get_i32(root, "original_max_position_embeddings", PML_JSON_OPTIONAL, 1,
                            PMLI_POSITIONS_MAX, original, err);
}

static pml_status read_factor(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    return pml_json_get_double(at, "factor", PML_JSON_REQUIRED, 1e-6, 1e6, &s->rope.factor, err);
}

static pml_status read_llama3(pml_json_at at, pml_json_at root, pml_model_spec *s, pml_error *err)
{
    pml_rope_spec *rope = &s->rope;
    TRY(read_factor(at, s, err));
    TRY(pml_json_get_double(at, "low_freq_factor", PML_JSON_REQUIRED, 1e-6, 1e6,
                            &rope->low_freq_factor, err));
    TRY(pml_json_get_double(at, "high_freq_factor", PML_JSON_REQUIRED, 1e-6, 1e6,
                            &rope->high_freq_factor, err));
    if (rope->high_freq_factor <= rope->low_freq_factor)
        return PML_FAIL(err, PML_INVALID,
                        "%s: %s.high_freq_factor = %g must be greater than low_freq_factor = %g",
                        at.file, at.path, rope->high_freq_factor, rope->low_freq_factor);
    return read_original(at, root, s, err);
}

static double magnitude(double scale, double weight)
{
    return scale <= 1 ? 1.0 : 0.1 * weight * log(scale) + 1.0;
}

/* Peng et al., "YaRN", 2023. mscale and mscale_all_dim count only together and only where
 * attention_factor is not given; 0 counts as not given everywhere but in attention_factor. */
static pml_status read_yarn(pml_json_at at, pml_json_at root, pml_model_spec *s, pml_error *err)
{
    pml_rope_spec *rope = &s->rope;
    const pml_json *factor = pml_json_field(at.value, "factor");
    double mscale = 0, mscale_all = 0;
    TRY(read_original(at, root, s, err));
    if (factor != NULL && pml_json_kind_of(factor) == PML_JSON_NULL)
        rope->factor = (double)s->max_positions / rope->original_max_positions;
    else
        TRY(read_factor(at, s, err));
    TRY(pml_json_get_double(at, "mscale", PML_JSON_OPTIONAL, 0, 1e6, &mscale, err));
    TRY(pml_json_get_double(at, "mscale_all_dim", PML_JSON_OPTIONAL, 0, 1e6, &mscale_all, err));
    bool both = mscale != 0 && mscale_all != 0;
    rope->attention_factor =
        both ? magnitude(rope->factor, mscale) / magnitude(rope->factor, mscale_all)
             : magnitude(rope->factor, 1);
    TRY(pml_json_get_double(at, "attention_factor", PML_JSON_OPTIONAL, 0, 1e6,
                            &rope->attention_factor, err));
    TRY(pml_json_get_double(at, "beta_fast", PML_JSON_OPTIONAL, 0, 1e9, &rope->beta_fast, err));
    TRY(pml_json_get_double(at, "beta_slow", PML_JSON_OPTIONAL, 0, 1e9, &rope->beta_slow, err));
    rope->beta_fast = rope->beta_fast == 0 ? 32 : rope->beta_fast;
    rope->beta_slow = rope->beta_slow == 0 ? 1 : rope->beta_slow;
    rope->truncate = true;
    return pml_json_get_bool(at, "truncate", PML_JSON_OPTIONAL, &rope->truncate, err);
}

/* {"sliding_attention": {…}}: other angles in some layers. */
static pml_status refuse_nested(pml_json_at rope, pml_error *err)
{
    void *cursor = NULL;
    const char *key;
    const pml_json *value;
    while (pml_json_next(rope.value, &cursor, &key, &value))
        if (pml_json_kind_of(value) == PML_JSON_OBJECT)
            return pmli_refuse(rope, key, value, "one set of rope parameters for all layers", err);
    return PML_OK;
}

static pml_status read_type(pml_json_at rope, pml_json_at root, pml_model_spec *s, pml_error *err)
{
    const char *field = pml_json_has(rope, "rope_type") ? "rope_type" : "type";
    char type[32] = "default";
    if (pml_json_has(rope, field) &&
        pml_json_kind_of(pml_json_field(rope.value, field)) != PML_JSON_STRING)
        return PML_FAIL(err, PML_INVALID, "%s: %s.%s must be a string", rope.file, rope.path,
                        field);
    TRY(pml_json_get_string(rope, field, PML_JSON_OPTIONAL, type, sizeof type, err));
    static const struct {
        const char *name;
        pml_rope_type type;
    } types[] = {{"default", PML_ROPE_DEFAULT},
                 {"linear", PML_ROPE_LINEAR},
                 {"dynamic", PML_ROPE_DYNAMIC},
                 {"llama3", PML_ROPE_LLAMA3},
                 {"yarn", PML_ROPE_YARN}};
    size_t i = 0, n = sizeof types / sizeof *types;
    while (i < n && strcmp(types[i].name, type) != 0)
        i++;
    if (i == n)
        return pmli_refuse(rope, field, pml_json_field(rope.value, field),
                           "default, linear, dynamic, llama3, yarn", err);
    s->rope.type = types[i].type;
    switch (s->rope.type) {
    case PML_ROPE_DEFAULT:
        return PML_OK;
    case PML_ROPE_LLAMA3:
        return read_llama3(rope, root, s, err);
    case PML_ROPE_YARN:
        return read_yarn(rope, root, s, err);
    case PML_ROPE_DYNAMIC:
        if (s->head_dim == 2) /* its exponent is dim / (dim - 2) */
            return PML_FAIL(err, PML_INVALID, "%s: dynamic rope needs a head_dim above 2",
                            rope.file);
        break;
    case PML_ROPE_LINEAR:
        break;
    }
    return read_factor(rope, s, err);
}

/* Two ways of saying the same: rope_theta beside rope_scaling {"rope_type" or "type", …}, and
 * (transformers 5) rope_parameters with both inside. */
pml_status pmli_read_rope(pml_json_at at, pml_model_spec *s, pml_error *err)
{
    s->rope = (pml_rope_spec){.theta = 10000.0};
    TRY(pml_json_get_double(at, "rope_theta", PML_JSON_OPTIONAL, 1, 1e12, &s->rope.theta, err));
    TRY(pmli_need_one(at, "partial_rotary_factor", err));
    const char *where =
        !pmli_is_off(pml_json_field(at.value, "rope_scaling")) ? "rope_scaling" : "rope_parameters";
    const pml_json *inside = NULL;
    TRY(pml_json_get_object(at, where, PML_JSON_OPTIONAL, &inside, err));
    if (pmli_is_off(inside))
        return PML_OK;
    pml_json_at rope = {inside, at.file, where};
    TRY(pml_json_get_double(rope, "rope_theta", PML_JSON_OPTIONAL, 1, 1e12, &s->rope.theta, err));
    TRY(pmli_need_one(rope, "partial_rotary_factor", err));
    TRY(refuse_nested(rope, err));
    return read_type(rope, at, s, err);
}
