/* The real worker, which stands in the midst of its evaluations until somebody stops the run: one
 * that follows on a step of this process that PML_STAND names ("5 10") does not go beyond its first
 * micro-batch while there is reason to go on. So a stop that is sent after such a step falls into
 * the evaluation, however fast or slow the machine and whoever sends it are. */
#include <stdio.h>
#include <stdlib.h>

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

static bool standing_goes_on(void *user)
{
    question *q = user;
    bool stands = q->micro_batches++ == 1 && is_named();
    while (stands && q->goes_on(q->user))
        pml_clock_sleep(0.001);
    return q->goes_on(q->user);
}

static pml_status standing_evaluate(job *j, bool (*goes_on)(void *user), void *user,
                                    double *loss_sum, double *labels, pml_error *err)
{
    question q = {.goes_on = goes_on, .user = user};
    return job_train.evaluate(j, standing_goes_on, &q, loss_sum, labels, err);
}

static pml_status standing_step(job *j, const pml_update *update, pml_step_result *result,
                                pml_error *err)
{
    step = update->step;
    return job_train.step(j, update, result, err);
}

int main(int argc, char **argv)
{
    static job_kind standing;
    standing = job_train;
    standing.evaluate = standing_evaluate;
    standing.step = standing_step;
    if (pml_cpu_prepare_process(argc, argv) != PML_OK)
        fputs("pml-worker: OpenBLAS cannot be told which core this is; it may be slower\n", stderr);
    return worker_main(&standing);
}
