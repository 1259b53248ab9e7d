#include "pml/json/sum.h"

#include <stdlib.h>
#include <string.h>

#include "pml/base/hash.h"

static const char before[] = ",\"sum\":\"", after[] = "\"}";

enum { DIGITS = 16, BEFORE = sizeof before - 1, AFTER = sizeof after - 1 };

_Static_assert(BEFORE + DIGITS + AFTER - 1 == PML_SUM_BYTES, "the brace was there before");

static pml_status digits_of(const char *text, size_t size, char digits[DIGITS + 1], pml_error *err)
{
    uint8_t hash[PML_HASH_BYTES];
    pml_status status = pml_hash_memory(text, size, hash, err);
    if (status == PML_OK)
        pml_hash_hex(hash, DIGITS / 2, digits);
    return status;
}

pml_status pml_sum_add(char **text, size_t *size, pml_error *err)
{
    char digits[DIGITS + 1];
    size_t body = *size - 1;
    if (*size < 2 || (*text)[body] != '}' || (*text)[body - 1] == '{')
        return PML_FAIL(err, PML_INTERNAL, "only an object with a field can carry a sum");
    pml_status status = digits_of(*text, body, digits, err);
    if (status != PML_OK)
        return status;
    char *longer = realloc(*text, body + BEFORE + DIGITS + AFTER + 1);
    if (longer == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a sum");
    memcpy(longer + body, before, BEFORE);
    memcpy(longer + body + BEFORE, digits, DIGITS);
    memcpy(longer + body + BEFORE + DIGITS, after, AFTER + 1);
    *text = longer;
    *size = body + BEFORE + DIGITS + AFTER;
    return PML_OK;
}

pml_status pml_sum_check(const char *text, size_t size, pml_error *err)
{
    char digits[DIGITS + 1];
    while (size > 0 && strchr(" \t\r\n", text[size - 1]) != NULL && text[size - 1] != '\0')
        size--;
    if (size < BEFORE + DIGITS + AFTER || memcmp(text + size - AFTER, after, AFTER) != 0 ||
        memcmp(text + size - AFTER - DIGITS - BEFORE, before, BEFORE) != 0)
        return PML_FAIL(err, PML_NOT_FOUND, "it carries no sum");
    size_t body = size - AFTER - DIGITS - BEFORE;
    pml_status status = digits_of(text, body, digits, err);
    if (status == PML_OK && memcmp(text + body + BEFORE, digits, DIGITS) != 0)
        status = PML_FAIL(err, PML_CORRUPT, "it is not what was written (its sum does not match)");
    return status;
}
