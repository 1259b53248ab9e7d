#include "find_library.h"

#include <dlfcn.h>
#include <glob.h>
#include <limits.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OLDEST_MAJOR = 12 };

const pmli_library pmli_cublas_library = {"libcublasLt.so", "cublas", "nvidia-cublas", 0};
const pmli_library pmli_cudnn_library = {"libcudnn.so", "cudnn", "nvidia-cudnn", 9};
const pmli_library pmli_nvrtc_library = {"libnvrtc.so", "cuda_nvrtc", "nvidia-cuda-nvrtc", 0};
const pmli_library pmli_runtime_library = {"libcudart.so", "cuda_runtime", "nvidia-cuda-runtime",
                                           0};

static atomic_int cuda_there = PMLI_NEWEST_CUDA;

int pmli_cuda_there(void)
{
    return atomic_load(&cuda_there);
}

/* One search: what is looked for, and the last thing that was there but did not open. */
typedef struct search {
    const pmli_library *library;
    int major;
    void *handle;
    char refused[400];
} search;

static void note_refusal(search *s, const char *path)
{
    const char *why = dlerror();
    snprintf(s->refused, sizeof s->refused, "; %s did not open: %s", path,
             why != NULL ? why : "no reason given");
}

static bool try_path(search *s, const char *path)
{
    s->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (s->handle == NULL)
        note_refusal(s, path);
    return s->handle != NULL;
}

/* pattern: a glob of folders. Those without the file are no refusals. */
static bool try_folders(search *s, const char *pattern)
{
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s/%s.%d", pattern, s->library->stem, s->major) >=
        (int)sizeof path)
        return false;
    glob_t found;
    if (glob(path, 0, NULL, &found) != 0)
        return false;
    bool opened = false;
    for (size_t i = 0; i < found.gl_pathc && !opened; i++)
        opened = try_path(s, found.gl_pathv[i]);
    globfree(&found);
    return opened;
}

/* site: a site-packages folder, or a glob of some. From 13 on the wheels share one folder. */
static bool try_site(search *s, const char *site)
{
    char folder[PATH_MAX];
    int n = s->major >= 13 && s->library->soname == 0
                ? snprintf(folder, sizeof folder, "%s/nvidia/cu%d/lib", site, s->major)
                : snprintf(folder, sizeof folder, "%s/nvidia/%s/lib", site, s->library->wheel12);
    return n < (int)sizeof folder && try_folders(s, folder);
}

static bool try_prefix(search *s, const char *prefix)
{
    char site[PATH_MAX];
    if (prefix == NULL || prefix[0] == '\0')
        return false;
    if (snprintf(site, sizeof site, "%s/lib/python3*/site-packages", prefix) < (int)sizeof site &&
        try_site(s, site))
        return true;
    return snprintf(site, sizeof site, "%s/lib/python3*/dist-packages", prefix) <
               (int)sizeof site &&
           try_site(s, site);
}

/* Every folder above this shared object: one of them is site-packages when pip installed us. */
static bool try_around_us(search *s)
{
    static const char here;
    Dl_info info;
    char path[PATH_MAX];
    if (dladdr(&here, &info) == 0 || realpath(info.dli_fname, path) == NULL)
        return false;
    for (char *slash = strrchr(path, '/'); slash != NULL && slash != path;
         slash = strrchr(path, '/')) {
        *slash = '\0';
        if (try_site(s, path))
            return true;
    }
    return false;
}

/* The Python a shell would start. The folder is not resolved further: in a virtual environment
 * python3 is a link to an interpreter that has other packages. */
static bool try_python_on_path(search *s)
{
    const char *path = getenv("PATH");
    while (path != NULL && *path != '\0') {
        size_t n = strcspn(path, ":");
        char program[PATH_MAX], prefix[PATH_MAX];
        if (snprintf(program, sizeof program, "%.*s/python3", (int)n, path) < (int)sizeof program &&
            realpath(program, prefix) != NULL &&
            snprintf(prefix, sizeof prefix, "%.*s/..", (int)n, path) < (int)sizeof prefix)
            return try_prefix(s, prefix);
        path += n + (path[n] == ':');
    }
    return false;
}

static bool try_named(search *s, const char *folders)
{
    while (*folders != '\0') {
        size_t n = strcspn(folders, ":");
        char folder[PATH_MAX];
        if (n > 0 &&
            snprintf(folder, sizeof folder, "%.*s", (int)n, folders) < (int)sizeof folder &&
            try_folders(s, folder))
            return true;
        folders += n + (folders[n] == ':');
    }
    return false;
}

static bool try_system(search *s)
{
    char name[64], folder[64];
    snprintf(name, sizeof name, "%s.%d", s->library->stem, s->major);
    s->handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (s->handle != NULL)
        return true;
    snprintf(folder, sizeof folder, "/usr/local/cuda-%d*/lib64", s->major);
    return try_folders(s, folder) || try_folders(s, "/usr/local/cuda/lib64");
}

pml_status pmli_open_library(const pmli_library *library, int newest_major, void **handle,
                             pml_error *err)
{
    const char *named = getenv("PML_CUDA_LIBS");
    bool only_named = named != NULL && named[0] != '\0';
    search s = {.library = library};
    int oldest = library->soname > 0 ? library->soname : OLDEST_MAJOR;
    for (s.major = newest_major; s.major >= oldest; s.major--) {
        bool found = only_named ? try_named(&s, named)
                                : try_around_us(&s) || try_prefix(&s, getenv("VIRTUAL_ENV")) ||
                                      try_prefix(&s, getenv("CONDA_PREFIX")) ||
                                      try_python_on_path(&s) || try_system(&s);
        if (found) {
            if (library->soname == 0)
                atomic_store(&cuda_there, s.major);
            *handle = s.handle;
            return PML_OK;
        }
    }
    if (only_named)
        return PML_FAIL(err, PML_NOT_FOUND, "%s.%d is not in PML_CUDA_LIBS=%s%s", library->stem,
                        newest_major, named, s.refused);
    char package[64]; /* CUDA 12's wheels carry the major version in their name, cuDNN's always */
    int cuda = library->soname == 0 ? newest_major : pmli_cuda_there();
    snprintf(package, sizeof package, library->soname == 0 && cuda >= 13 ? "%s==%d.*" : "%s-cu%d",
             library->install, cuda);
    return PML_FAIL(err, PML_NOT_FOUND,
                    "%s.%d not found beside a Python or in the system; install it with "
                    "pip install '%s', or name its folder in PML_CUDA_LIBS%s",
                    library->stem, newest_major, package, s.refused);
}

pml_status pmli_find_library(int which, char *path, size_t capacity, pml_error *err)
{
    static const pmli_library *const all[] = {&pmli_cublas_library, &pmli_cudnn_library,
                                              &pmli_nvrtc_library, &pmli_runtime_library};
    if (which < 0 || which >= (int)(sizeof all / sizeof *all))
        return PML_FAIL(err, PML_INVALID, "there is no library of the number %d", which);
    void *handle = NULL;
    struct link_map *map = NULL;
    int newest = all[which]->soname > 0 ? PMLI_NEWEST_CUDNN : PMLI_NEWEST_CUDA;
    pml_status status = pmli_open_library(all[which], newest, &handle, err);
    if (status != PML_OK)
        return status;
    if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 ||
        snprintf(path, capacity, "%s", map->l_name) >= (int)capacity)
        return PML_FAIL(err, PML_INTERNAL, "%s was opened, and does not say where",
                        all[which]->stem);
    return PML_OK;
}
