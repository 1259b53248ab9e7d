/* Reading config.json's fields: refusing by name what changes the mathematics. */
#ifndef PML_MODEL_FIELDS_H
#define PML_MODEL_FIELDS_H

#include "pml/json/json.h"
#include "pml/model/spec.h"

#define TRY(call)                                                                                  \
    do {                                                                                           \
        pml_status try_status = (call);                                                            \
        if (try_status != PML_OK)                                                                  \
            return try_status;                                                                     \
    } while (0)

enum { PMLI_POSITIONS_MAX = 1 << 28 };

/* PML_UNSUPPORTED with the field, its value and what would do. */
pml_status pmli_refuse(pml_json_at at, const char *field, const pml_json *value,
                       const char *supported, pml_error *err);

/* Absent, null, false, 0, "" and empty arrays and objects all mean "not used". */
bool pmli_is_off(const pml_json *value);
pml_status pmli_need_off(pml_json_at at, const char *field, pml_error *err);
pml_status pmli_need_one(pml_json_at at, const char *field, pml_error *err);

/* rope_theta, rope_scaling, rope_parameters → spec->rope. head_dim and max_positions have been
 * read. */
pml_status pmli_read_rope(pml_json_at at, pml_model_spec *spec, pml_error *err);

#endif
