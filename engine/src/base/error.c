#include "pml/base/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *pml_status_name(pml_status code)
{
    static const char *const names[PML_STATUS_COUNT] = {
        "ok",      "invalid", "not found", "unsupported", "no memory", "io",
        "corrupt", "denied",  "busy",      "timeout",     "peer",      "internal"};
    if ((unsigned)code >= PML_STATUS_COUNT)
        return "unknown";
    return names[code];
}

pml_status pml_status_of_errno(int code)
{
    if (code == ENOENT || code == ENOTDIR)
        return PML_NOT_FOUND;
    return code == ENOMEM ? PML_NO_MEMORY : PML_IO;
}

/* vsnprintf may have cut a multi-byte character in half; step back over its pieces. */
static void cut_on_character(char *text, size_t capacity)
{
    size_t n = strlen(text);
    if (n + 1 < capacity || n == 0)
        return;
    size_t start = n;
    while (start > 0 && ((unsigned char)text[start - 1] & 0xC0) == 0x80)
        start--;
    if (start == 0)
        return;
    unsigned char lead = (unsigned char)text[start - 1];
    size_t want = lead < 0x80 ? 1 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (n - (start - 1) < want)
        text[start - 1] = '\0';
}

pml_status pml_error_set(pml_error *err, pml_status code, const char *file, int line,
                         const char *format, ...)
{
    if (err == NULL)
        return code;
    err->code = code;
    err->file = file;
    err->line = line;
    va_list args;
    va_start(args, format);
    int written = vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    if (written <= 0)
        snprintf(err->message, sizeof err->message, "%s", pml_status_name(code));
    cut_on_character(err->message, sizeof err->message);
    return code;
}

pml_status pml_error_prefix(pml_error *err, const char *format, ...)
{
    if (err == NULL)
        return PML_INTERNAL;
    char words[sizeof err->message];
    va_list args;
    va_start(args, format);
    int written = vsnprintf(words, sizeof words, format, args);
    va_end(args);
    if (written <= 0)
        return err->code;
    char whole[2 * sizeof err->message + 4];
    snprintf(whole, sizeof whole, "%s: %s", words, err->message);
    memcpy(err->message, whole, sizeof err->message - 1);
    err->message[sizeof err->message - 1] = '\0';
    cut_on_character(err->message, sizeof err->message);
    return err->code;
}
