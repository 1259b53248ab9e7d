#include "fields.h"

pml_status pmli_refuse(pml_json_at at, const char *field, const pml_json *value,
                       const char *supported, pml_error *err)
{
    char shown[128];
    return PML_FAIL(err, PML_UNSUPPORTED, "%s: %s%s%s = %s is not in this version; supported: %s",
                    at.file, at.path, at.path[0] != '\0' ? "." : "", field,
                    pml_json_show(value, shown, sizeof shown), supported);
}

bool pmli_is_off(const pml_json *value)
{
    bool flag;
    double number;
    switch (value == NULL ? PML_JSON_NULL : pml_json_kind_of(value)) {
    case PML_JSON_NULL:
        return true;
    case PML_JSON_BOOL:
        return pml_json_as_bool(value, &flag) && !flag;
    case PML_JSON_INT:
    case PML_JSON_REAL:
        return pml_json_as_double(value, &number) && number == 0;
    case PML_JSON_STRING:
        return pml_json_as_string(value)[0] == '\0';
    case PML_JSON_ARRAY:
        return pml_json_length(value) == 0;
    case PML_JSON_OBJECT: {
        void *cursor = NULL;
        const char *key;
        const pml_json *item;
        return !pml_json_next(value, &cursor, &key, &item);
    }
    }
    return false;
}

pml_status pmli_need_off(pml_json_at at, const char *field, pml_error *err)
{
    const pml_json *value = pml_json_field(at.value, field);
    return pmli_is_off(value) ? PML_OK : pmli_refuse(at, field, value, "absent, null or 0", err);
}

pml_status pmli_need_one(pml_json_at at, const char *field, pml_error *err)
{
    double value = 1;
    TRY(pml_json_get_double(at, field, PML_JSON_OPTIONAL, 0, 1e9, &value, err));
    return value == 1 ? PML_OK : pmli_refuse(at, field, pml_json_field(at.value, field), "1", err);
}
