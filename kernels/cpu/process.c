/* The re-execution that gives OpenBLAS its AVX-512 kernels. See pml_op/cpu.h. */
#include "pml_op/cpu.h"

#include <cblas.h>
#include <stdbool.h>
#include <stdlib.h>
#include <strings.h>
#include <unistd.h>

static bool machine_has_avx512(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
#else
    return false;
#endif
}

static bool core_uses_avx512(const char *core)
{
    static const char *const cores[] = {"SkylakeX", "Cooperlake", "SapphireRapids"};
    for (size_t i = 0; i < sizeof cores / sizeof *cores; i++)
        if (strcasecmp(core, cores[i]) == 0)
            return true;
    return false;
}

pml_status pml_cpu_prepare_process(int argc, char **argv)
{
    if (argc < 1 || getenv("OPENBLAS_CORETYPE") != NULL || !machine_has_avx512() ||
        core_uses_avx512(openblas_get_corename()))
        return PML_OK;
    if (setenv("OPENBLAS_CORETYPE", "SkylakeX", 0) != 0)
        return PML_UNSUPPORTED;
    execv("/proc/self/exe", argv);
    /* Still here: no /proc, or not allowed. A child must not inherit a claim that is not true. */
    unsetenv("OPENBLAS_CORETYPE");
    return PML_UNSUPPORTED;
}
