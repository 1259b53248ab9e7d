/* Fields of an object by name, type and range, with messages that say where. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "pml/json/json.h"

pml_json_at pml_json_root(const pml_json *document, const char *file)
{
    return (pml_json_at){document, file, ""};
}

bool pml_json_has(pml_json_at at, const char *field)
{
    return pml_json_kind_of(pml_json_field(at.value, field)) != PML_JSON_NULL;
}

/* *found = the field's value, NULL when it is absent or null. */
static pml_status look_up(pml_json_at at, const char *field, pml_json_need need,
                          const pml_json **found, pml_error *err)
{
    const pml_json *value = pml_json_field(at.value, field);
    *found = pml_json_kind_of(value) == PML_JSON_NULL ? NULL : value;
    if (*found == NULL && need == PML_JSON_REQUIRED)
        return PML_FAIL(err, PML_INVALID, "%s: %s%s%s is missing", at.file, at.path,
                        at.path[0] != '\0' ? "." : "", field);
    return PML_OK;
}

static pml_status refuse(pml_json_at at, const char *field, const char *wanted,
                         const pml_json *value, pml_error *err)
{
    char shown[120];
    return PML_FAIL(err, PML_INVALID, "%s: %s%s%s must be %s, it is %s", at.file, at.path,
                    at.path[0] != '\0' ? "." : "", field, wanted,
                    pml_json_show(value, shown, sizeof shown));
}

pml_status pml_json_get_int(pml_json_at at, const char *field, pml_json_need need, int64_t lo,
                            int64_t hi, int64_t *out, pml_error *err)
{
    const pml_json *value;
    pml_status status = look_up(at, field, need, &value, err);
    if (status != PML_OK || value == NULL)
        return status;
    int64_t number;
    if (pml_json_as_int(value, &number) && number >= lo && number <= hi) {
        *out = number;
        return PML_OK;
    }
    char wanted[96];
    snprintf(wanted, sizeof wanted, "an integer from %lld to %lld", (long long)lo, (long long)hi);
    return refuse(at, field, wanted, value, err);
}

pml_status pml_json_get_i32(pml_json_at at, const char *field, pml_json_need need, int32_t lo,
                            int32_t hi, int32_t *out, pml_error *err)
{
    int64_t number = *out;
    pml_status status = pml_json_get_int(at, field, need, lo, hi, &number, err);
    if (status == PML_OK)
        *out = (int32_t)number;
    return status;
}

pml_status pml_json_get_double(pml_json_at at, const char *field, pml_json_need need, double lo,
                               double hi, double *out, pml_error *err)
{
    const pml_json *value;
    pml_status status = look_up(at, field, need, &value, err);
    if (status != PML_OK || value == NULL)
        return status;
    double number;
    if (pml_json_as_double(value, &number)) {
        bool any = isinf(lo) && isinf(hi);
        if (isnan(number) ? any : number >= lo && number <= hi) {
            *out = number;
            return PML_OK;
        }
    }
    char wanted[96];
    snprintf(wanted, sizeof wanted, "a number from %g to %g", lo, hi);
    return refuse(at, field, wanted, value, err);
}

pml_status pml_json_get_bool(pml_json_at at, const char *field, pml_json_need need, bool *out,
                             pml_error *err)
{
    const pml_json *value;
    pml_status status = look_up(at, field, need, &value, err);
    if (status != PML_OK || value == NULL)
        return status;
    if (!pml_json_as_bool(value, out))
        return refuse(at, field, "true or false", value, err);
    return PML_OK;
}

pml_status pml_json_get_string(pml_json_at at, const char *field, pml_json_need need, char *out,
                               size_t capacity, pml_error *err)
{
    const pml_json *value;
    pml_status status = look_up(at, field, need, &value, err);
    if (status != PML_OK || value == NULL)
        return status;
    const char *text = pml_json_as_string(value);
    size_t n = text != NULL ? strlen(text) : 0;
    if (text == NULL || n >= capacity) {
        char wanted[96];
        snprintf(wanted, sizeof wanted, "a string of at most %zu bytes", capacity - 1);
        return refuse(at, field, wanted, value, err);
    }
    memcpy(out, text, n + 1);
    return PML_OK;
}

static pml_status get_kind(pml_json_at at, const char *field, pml_json_need need,
                           pml_json_kind kind, const pml_json **out, pml_error *err)
{
    const pml_json *value;
    pml_status status = look_up(at, field, need, &value, err);
    if (status != PML_OK)
        return status;
    if (value != NULL && pml_json_kind_of(value) != kind)
        return refuse(at, field, pml_json_kind_name(kind), value, err);
    *out = value;
    return PML_OK;
}

pml_status pml_json_get_object(pml_json_at at, const char *field, pml_json_need need,
                               const pml_json **out, pml_error *err)
{
    return get_kind(at, field, need, PML_JSON_OBJECT, out, err);
}

pml_status pml_json_get_array(pml_json_at at, const char *field, pml_json_need need,
                              const pml_json **out, pml_error *err)
{
    return get_kind(at, field, need, PML_JSON_ARRAY, out, err);
}
