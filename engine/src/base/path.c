#include "pml/base/path.h"

#include <stdio.h>
#include <string.h>

pml_status pml_path_join(char *out, size_t capacity, const char *a, const char *b, pml_error *err)
{
    bool alone = a[0] == '\0' || b[0] == '/';
    bool slash = !alone && a[strlen(a) - 1] != '/';
    int n = snprintf(out, capacity, "%s%s%s", alone ? "" : a, slash ? "/" : "", b);
    if (n < 0 || (size_t)n >= capacity)
        return PML_FAIL(err, PML_INVALID, "the path %s/%s is longer than %zu bytes", a, b,
                        capacity - 1);
    return PML_OK;
}

pml_status pml_path_folder(char *out, size_t capacity, const char *path, pml_error *err)
{
    size_t n = (size_t)(pml_path_name(path) - path);
    const char *from = path;
    if (n == 0) {
        from = ".";
        n = 1;
    }
    while (n > 1 && from[n - 1] == '/')
        n--;
    if (n >= capacity)
        return PML_FAIL(err, PML_INVALID, "the path %s is longer than %zu bytes", path,
                        capacity - 1);
    memcpy(out, from, n);
    out[n] = '\0';
    return PML_OK;
}

const char *pml_path_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash == NULL ? path : slash + 1;
}

bool pml_path_is_below(const char *path)
{
    for (;;) {
        size_t n = strcspn(path, "/");
        if (n == 0 || (n == 1 && path[0] == '.') || (n == 2 && memcmp(path, "..", 2) == 0))
            return false;
        if (path[n] == '\0')
            return true;
        path += n + 1;
    }
}
