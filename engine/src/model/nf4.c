#include "pml/model/nf4.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/json/json.h"
#include "pml_op/ops.h"

enum { NAME_MAX_BYTES = 256, BLOCK = 64, NESTED = 256 };
#define STATE_SUFFIX ".quant_state.bitsandbytes__nf4"

static const char *const suffixes[] = {".absmax", ".nested_absmax", ".quant_map",
                                       ".nested_quant_map", STATE_SUFFIX};

static const pml_stored *beside(const pml_safetensors *file, const char *weight, const char *suffix)
{
    char name[NAME_MAX_BYTES];
    int n = snprintf(name, sizeof name, "%s%s", weight, suffix);
    return n > 0 && (size_t)n < sizeof name ? pml_safetensors_find(file, name) : NULL;
}

bool pml_nf4_is_stored(const pml_safetensors *file, const char *weight)
{
    return beside(file, weight, STATE_SUFFIX) != NULL;
}

bool pml_nf4_is_expected(const char *weight)
{
    static const char tail[] = "_proj.weight";
    size_t length = strlen(weight);
    return length >= sizeof tail - 1 && strcmp(weight + length - (sizeof tail - 1), tail) == 0;
}

bool pml_nf4_is_part(const pml_safetensors *file, const char *name)
{
    char weight[NAME_MAX_BYTES];
    size_t length = strlen(name);
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        size_t tail = strlen(suffixes[i]);
        if (length <= tail || length >= sizeof weight ||
            strcmp(name + length - tail, suffixes[i]) != 0)
            continue;
        memcpy(weight, name, length - tail);
        weight[length - tail] = '\0';
        if (pml_nf4_is_stored(file, weight))
            return true;
    }
    return false;
}

static pml_status differs(pml_json_at at, const char *field, const char *supported, pml_error *err)
{
    char shown[96];
    return PML_FAIL(err, PML_UNSUPPORTED, "%s: %s = %s is not in this version; supported: %s",
                    at.file, field,
                    pml_json_show(pml_json_field(at.value, field), shown, sizeof shown), supported);
}

/* The JSON of a quant_state against the shape that the model has. */
static pml_status read_state(pml_json_at at, int64_t rows, int64_t cols, float *offset,
                             pml_error *err)
{
    char type[16] = "";
    int64_t block = 0, nested = 0, sides[2] = {0, 0};
    double value = 0;
    const pml_json *shape = NULL;
    const pml_json_need need = PML_JSON_REQUIRED;
    pml_status status = pml_json_get_string(at, "quant_type", need, type, sizeof type, err);
    if (status == PML_OK && strcmp(type, "nf4") != 0)
        return differs(at, "quant_type", "nf4", err);
    if (status == PML_OK && !pml_json_has(at, "nested_blocksize"))
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "%s: bnb_4bit_use_double_quant=false is not in this version; quantise the "
                        "original model with quant=\"nf4\" instead",
                        at.file);
    if (status == PML_OK)
        status = pml_json_get_int(at, "blocksize", need, 1, 1 << 20, &block, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "nested_blocksize", need, 1, 1 << 20, &nested, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "nested_offset", need, -1e30, 1e30, &value, err);
    if (status == PML_OK)
        status = pml_json_get_array(at, "shape", need, &shape, err);
    if (status != PML_OK)
        return status;
    if (block != BLOCK)
        return differs(at, "blocksize", "64", err);
    if (nested != NESTED)
        return differs(at, "nested_blocksize", "256", err);
    bool fits =
        pml_json_length(shape) == 2 && pml_json_as_int(pml_json_item(shape, 0), &sides[0]) &&
        pml_json_as_int(pml_json_item(shape, 1), &sides[1]) && sides[0] == rows && sides[1] == cols;
    if (!fits)
        return PML_FAIL(err, PML_INVALID, "%s: the weight's shape must be [%lld,%lld]", at.file,
                        (long long)rows, (long long)cols);
    *offset = (float)value;
    return PML_OK;
}

static pml_status read_original(pml_json_at at, int64_t *rows, int64_t *cols, pml_dtype *dtype,
                                pml_error *err)
{
    static const struct {
        const char *name;
        pml_dtype dtype;
    } types[] = {{"float32", PML_F32}, {"bfloat16", PML_BF16}, {"float16", PML_F16}};
    const pml_json *shape = NULL;
    char type[16] = "";
    pml_status status = pml_json_get_array(at, "shape", PML_JSON_REQUIRED, &shape, err);
    if (status == PML_OK)
        status = pml_json_get_string(at, "dtype", PML_JSON_REQUIRED, type, sizeof type, err);
    if (status != PML_OK)
        return status;
    if (pml_json_length(shape) != 2 || !pml_json_as_int(pml_json_item(shape, 0), rows) ||
        !pml_json_as_int(pml_json_item(shape, 1), cols) || *rows < 1 || *cols < 1 ||
        *rows > INT32_MAX || *cols > INT32_MAX)
        return PML_FAIL(err, PML_INVALID, "%s: shape must be two positive numbers", at.file);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, type) == 0) {
            *dtype = types[i].dtype;
            return PML_OK;
        }
    return differs(at, "dtype", "float32, bfloat16, float16", err);
}

/* A quant_state's JSON. */
static pml_status parse_state(const pml_stored *state, const char *weight, pml_json **document,
                              pml_error *err)
{
    if (state == NULL || state->dtype != PML_U8 || state->bytes > pml_json_file_limits.bytes)
        return PML_FAIL(err, PML_CORRUPT, "'%s' has no quant_state of bytes", weight);
    char *text = malloc(state->bytes + 1); /* there may be none */
    if (text == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for '%s'", state->name);
    pml_status status = pml_stored_read(state, 0, state->bytes, text, err);
    if (status == PML_OK)
        status =
            pml_json_parse(text, state->bytes, state->name, &pml_json_file_limits, document, err);
    free(text);
    return status;
}

pml_status pml_nf4_original(const pml_safetensors *file, const char *weight, int64_t *rows,
                            int64_t *cols, pml_dtype *dtype, pml_error *err)
{
    const pml_stored *state = beside(file, weight, STATE_SUFFIX);
    pml_json *document = NULL;
    pml_status status = parse_state(state, weight, &document, err);
    if (status == PML_OK)
        status = read_original(pml_json_root(document, state->name), rows, cols, dtype, err);
    pml_json_destroy(&document);
    return status;
}

static pml_status need_part(const pml_stored *part, const char *weight, const char *what,
                            pml_dtype dtype, int64_t elements, pml_error *err)
{
    if (part == NULL)
        return PML_FAIL(err, PML_CORRUPT, "'%s' is quantised, but its %s is missing", weight, what);
    if (part->dtype != dtype || part->elements != elements)
        return PML_FAIL(err, PML_CORRUPT, "%s: '%s' is %lld elements of %s, must be %lld of %s",
                        part->path, part->name, (long long)part->elements, part->dtype_name,
                        (long long)elements, pml_dtype_name(dtype));
    return PML_OK;
}

/* The map a file brings, of n <= PML_DYNAMIC_CODES numbers, must be the one that every backend has
 * built in. Its makers' own differ in the last bits. */
static pml_status need_map(const pml_stored *part, const char *weight, const char *what,
                           const float *known, int64_t n, pml_error *err)
{
    float values[PML_DYNAMIC_CODES];
    pml_status status = need_part(part, weight, what, PML_F32, n, err);
    if (status == PML_OK)
        status = pml_stored_read(part, 0, (size_t)n * sizeof *values, values, err);
    for (int64_t i = 0; status == PML_OK && i < n; i++)
        if (!(fabsf(values[i] - known[i]) < 1e-6F))
            status =
                PML_FAIL(err, PML_UNSUPPORTED,
                         "%s: '%s' has %g at %lld where NF4 has %g; not in this version",
                         part->path, part->name, (double)values[i], (long long)i, (double)known[i]);
    return status;
}

static pml_status need_maps(const pml_safetensors *file, const char *weight, pml_error *err)
{
    float magnitudes[PML_DYNAMIC_CODES];
    pml_dynamic_map(true, magnitudes);
    pml_status status = need_map(beside(file, weight, ".quant_map"), weight, "quant_map",
                                 pml_nf4_values, PML_NF4_VALUES, err);
    return status == PML_OK ? need_map(beside(file, weight, ".nested_quant_map"), weight,
                                       "nested_quant_map", magnitudes, PML_DYNAMIC_CODES, err)
                            : status;
}

/* bnb_4bit_quant_storage names the dtype that the codes lie in: the bytes are the same. */
static pml_status need_codes(const pml_stored *codes, const char *weight, int64_t n, pml_error *err)
{
    if (codes != NULL && codes->bytes == (size_t)(n / 2 + n % 2))
        return PML_OK;
    return need_part(codes, weight, "tensor", PML_U8, n / 2 + n % 2, err);
}

pml_status pml_nf4_find(const pml_safetensors *file, const char *weight, int64_t rows, int64_t cols,
                        pml_nf4_stored *found, pml_error *err)
{
    const pml_stored *state = beside(file, weight, STATE_SUFFIX);
    pml_json *document = NULL;
    int64_t n = rows * cols, blocks = n / BLOCK + (n % BLOCK != 0);
    found->codes = pml_safetensors_find(file, weight);
    found->absmax = beside(file, weight, ".absmax");
    found->nested = beside(file, weight, ".nested_absmax");
    if (state == NULL && found->codes != NULL && found->codes->dtype != PML_U8)
        return PML_FAIL(err, PML_UNSUPPORTED,
                        "%s: '%s' was left whole in a folder of NF4 weights "
                        "(llm_int8_skip_modules), not in this version; supported: all projections "
                        "in NF4",
                        found->codes->path, weight);
    pml_status status = parse_state(state, weight, &document, err);
    if (status == PML_OK)
        status = read_state(pml_json_root(document, state->name), rows, cols, &found->offset, err);
    pml_json_destroy(&document);
    if (status == PML_OK)
        status = need_codes(found->codes, weight, n, err);
    if (status == PML_OK)
        status = need_maps(file, weight, err);
    if (status == PML_OK)
        status = need_part(found->absmax, weight, "absmax", PML_U8, blocks, err);
    if (status == PML_OK)
        status = need_part(found->nested, weight, "nested_absmax", PML_F32,
                           blocks / NESTED + (blocks % NESTED != 0), err);
    return status;
}
