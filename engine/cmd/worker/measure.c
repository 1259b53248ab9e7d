/* What follows a run's own evaluations. */
#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loop.h"
#include "pml/base/hold.h"
#include "pml/base/path.h"
#include "pml/train/checkpoint.h"

/* As Hugging Face's EarlyStoppingCallback and Trainer: the best is the least of all, patience is
 * lost by each that is not below it by more than the threshold. */
void loop_measured(loop *l, double loss)
{
    pml_train_state *s = &l->state;
    bool first = s->best_step < 0, below = isfinite(loss) && (first || loss < s->best_loss);
    bool counts = below && (first || s->best_loss - loss > l->policy.early_threshold);
    s->not_better = counts ? 0 : s->not_better + 1;
    if (below) {
        s->best_loss = loss;
        s->best_step = s->step;
    }
    pml_schedule_measured(&s->schedule, &s->schedule_state, s->learning_rate, loss);
}

bool loop_out_of_patience(const loop *l)
{
    return l->policy.early_patience > 0 && l->state.not_better >= l->policy.early_patience;
}

/* Rank 0's disk before the others read it. What was written last may be a checkpoint that somebody
 * has asked for: its failure has been told, and is not the run's. */
static pml_status wait_for_disk(loop *l, pml_error *err)
{
    double ready = 1;
    if (l->saver != NULL)
        saver_wait(l->saver, NULL);
    return pml_comm_allreduce_f64(l->comm, &ready, 1, err);
}

static int is_checkpoint(const struct dirent *entry)
{
    return strncmp(entry->d_name, "step-", strlen("step-")) == 0;
}

/* "step-000412", or with somebody's name behind. */
static bool is_of_step(const char *name, int64_t step)
{
    char prefix[32];
    int n = snprintf(prefix, sizeof prefix, "step-%06lld", (long long)step);
    return strncmp(name, prefix, (size_t)n) == 0 && (name[n] == '\0' || name[n] == '-');
}

/* The folder of the best evaluation's weights. Its step is not enough: who has gone back and
 * trained again may have another one of that step, so it has to know of that evaluation itself; or
 * it was pruned when a better one came, and one with a name has them still. PML_NOT_FOUND: none. */
static pml_status find_best(const loop *l, char *path, size_t capacity, pml_error *err)
{
    char parent[PATH_MAX];
    struct dirent **found = NULL;
    int n = 0;
    const pml_train_state *s = &l->state;
    pml_status status = pml_path_join(parent, sizeof parent, l->folder, "checkpoints", err);
    if (status == PML_OK) /* in one order, so that all ranks take the same */
        status = pml_folder_list(parent, &found, is_checkpoint, alphasort, &n, err);
    bool goes_on = status == PML_OK;
    if (goes_on)
        status = PML_FAIL(err, PML_NOT_FOUND, "no checkpoint has its weights any more");
    for (int i = 0; i < n; i++) {
        int64_t step = -1;
        double loss = 0;
        pml_error why = PML_ERROR_INIT;
        if (goes_on && is_of_step(found[i]->d_name, s->best_step)) {
            pml_status seen = pml_path_join(path, capacity, parent, found[i]->d_name, &why);
            if (seen == PML_OK)
                seen = pml_checkpoint_best(path, &step, &loss, &why);
            bool fits = seen == PML_OK && step == s->best_step && loss == s->best_loss;
            goes_on = !fits && (seen == PML_OK || pml_checkpoint_is_unfit(seen));
            if (fits || !goes_on) {
                status = seen;
                *err = why;
            }
        }
        free(found[i]);
    }
    free(found);
    return status;
}

static pml_status take_best(loop *l, pml_error *err)
{
    char path[PATH_MAX];
    void *memory = NULL;
    pml_status status = find_best(l, path, sizeof path, err);
    if (status == PML_OK && l->keeper != NULL)
        status = keeper_room(l->keeper, &memory, err);
    return status == PML_OK ? l->kind->go_back(l->j, path, memory, err) : status;
}

/* Where there is no checkpoint with the best weights, the run ends with those of its last step:
 * what was trained is not thrown away for that, and it is said. */
pml_status loop_load_best(loop *l, pml_error *err)
{
    const pml_train_state *s = &l->state;
    pml_error why = PML_ERROR_INIT;
    char text[sizeof why.message + 200];
    double without[2] = {0, 1};
    if (!l->policy.load_best || s->best_step < 0 || s->best_step == s->step)
        return PML_OK;
    pml_status status = wait_for_disk(l, err);
    if (status != PML_OK)
        return pml_error_prefix(err, "load_best_model_at_end");
    status = take_best(l, &why);
    without[0] = pml_checkpoint_is_unfit(status);
    if (status == PML_OK || pml_checkpoint_is_unfit(status))
        status = pml_comm_allreduce_f64(l->comm, without, 2, &why);
    if (status == PML_OK && without[0] > 0 && without[0] < without[1])
        status = PML_FAIL(&why, PML_CORRUPT, "%g of %g workers cannot read the best checkpoint",
                          without[0], without[1]);
    if (status != PML_OK) {
        *err = why;
        return pml_error_prefix(err, "load_best_model_at_end");
    }
    l->has_best = without[0] == 0;
    snprintf(text, sizeof text, "the best evaluation was after step %lld (loss %.6g): %s%s",
             (long long)s->best_step, s->best_loss,
             l->has_best ? "its weights are loaded"
                         : "the run ends with the weights of its last step instead, as ",
             l->has_best ? "" : why.message);
    loop_say(l, l->has_best ? "info" : "warning", text);
    return PML_OK;
}

int64_t loop_weights_step(const loop *l)
{
    return l->has_best ? l->state.best_step : l->state.step;
}
