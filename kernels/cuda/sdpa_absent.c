/* Without cudnn-frontend's headers at build time: our own kernels do all attention. */
#include "sdpa.h"

pml_status pmli_sdpa_new(pmli_sdpa **sdpa, pml_error *err)
{
    *sdpa = NULL;
    return PML_FAIL(err, PML_NOT_FOUND, "this build has no cuDNN attention");
}

void pmli_sdpa_destroy(pmli_sdpa **sdpa)
{
    *sdpa = NULL;
}

size_t pmli_sdpa_version(const pmli_sdpa *sdpa)
{
    (void)sdpa;
    return 0;
}

pml_status pmli_sdpa_run(pmli_sdpa *sdpa, void *stream, const pmli_sdpa_call *call, bool waits,
                         bool *done, pml_error *err)
{
    (void)sdpa, (void)stream, (void)call, (void)waits, (void)err;
    *done = false;
    return PML_OK;
}

pml_status pmli_sdpa_compile(pmli_sdpa *sdpa, const pmli_sdpa_call *call, bool *done,
                             pml_error *err)
{
    return pmli_sdpa_run(sdpa, NULL, call, true, done, err);
}

void pmli_sdpa_refused(pmli_sdpa *sdpa, char why[PMLI_SDPA_REFUSED], bool *some)
{
    (void)sdpa;
    why[0] = '\0';
    *some = false;
}

void pmli_sdpa_ahead(pmli_sdpa *sdpa, bool on)
{
    (void)sdpa, (void)on;
}
