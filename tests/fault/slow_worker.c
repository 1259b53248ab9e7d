/* The real worker, as slow as a test needs it, however fast the machine is, and on a device whose
 * memory others have.
 *
 * PML_STAND, "5 10": its evaluation after each of these steps, where this process has made the
 * step, does not go beyond its first micro-batch while there is reason to go on. A stop that is
 * sent after such a step falls into the evaluation.
 *
 * PML_SLOW, a path: while there is a file, each step takes a twentieth of a second at least. What
 * is asked of a run then comes long before its end.
 *
 * PML_REFUSE, whatever it says: the device refuses the first memory that it is asked for.
 *
 * A file `crowded` in the run folder: while it is there, others have the device's memory. On a CPU
 * nobody else would have it. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml_op/cpu.h"
#include "worker.h"

static int64_t step; /* that was made last; 0: none by this process */

typedef struct question {
    bool (*goes_on)(void *user);
    void *user;
    int micro_batches;
} question;

static bool is_named(void)
{
    const char *at = getenv("PML_STAND");
    for (char *end; at != NULL; at = end) {
        long long named = strtoll(at, &end, 10);
        if (end == at)
            return false;
        if (named == step && step > 0)
            return true;
    }
    return false;
}

static bool slow_goes_on(void *user)
{
    question *q = user;
    bool stands = q->micro_batches++ == 1 && is_named();
    while (stands && q->goes_on(q->user))
        pml_clock_sleep(0.001);
    return q->goes_on(q->user);
}

static pml_status slow_evaluate(job *j, bool (*goes_on)(void *user), void *user, double *loss_sum,
                                double *labels, pml_error *err)
{
    question q = {.goes_on = goes_on, .user = user};
    return job_train.evaluate(j, slow_goes_on, &q, loss_sum, labels, err);
}

static pml_status slow_step(job *j, const pml_update *update, pml_step_result *result,
                            pml_error *err)
{
    const char *path = getenv("PML_SLOW");
    if (path != NULL && access(path, F_OK) == 0)
        pml_clock_sleep(0.05);
    step = update->step;
    return job_train.step(j, update, result, err);
}

static pml_status crowded_open(const job_setup *setup, job **j, job_facts *facts, pml_error *err)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/crowded", setup->folder);
    facts->crowded = access(path, F_OK) == 0;
    return facts->crowded ? PML_FAIL(err, PML_NO_MEMORY, "others have it")
                          : job_train.open(setup, j, facts, err);
}

static pml_status refuse_first(pml_device *device, size_t bytes, void **base, pml_error *err)
{
    static bool refused;
    *base = NULL;
    if (refused)
        return pml_backend_cpu()->alloc(device, bytes, base, err);
    refused = true;
    return PML_FAIL(err, PML_NO_MEMORY, "%zu MiB were asked for", bytes >> 20);
}

/* The linker's names: job.c's calls of the one come to the other (CMakeLists.txt). */
pml_status __real_pml_backend_named(const char *device, bool to_plan, const pml_backend **backend,
                                    int *index, pml_error *err);
pml_status __wrap_pml_backend_named(const char *device, bool to_plan, const pml_backend **backend,
                                    int *index, pml_error *err);

pml_status __wrap_pml_backend_named(const char *device, bool to_plan, const pml_backend **backend,
                                    int *index, pml_error *err)
{
    static pml_backend refusing;
    pml_status status = __real_pml_backend_named(device, to_plan, backend, index, err);
    if (status != PML_OK || getenv("PML_REFUSE") == NULL)
        return status;
    refusing = **backend;
    refusing.alloc = refuse_first;
    *backend = &refusing;
    return PML_OK;
}

int main(int argc, char **argv)
{
    static job_kind slow;
    slow = job_train;
    slow.open = crowded_open;
    slow.evaluate = slow_evaluate;
    slow.step = slow_step;
    if (pml_cpu_prepare_process(argc, argv) != PML_OK)
        fputs("pml-worker: OpenBLAS cannot be told which core this is; it may be slower\n", stderr);
    return worker_main(&slow);
}
