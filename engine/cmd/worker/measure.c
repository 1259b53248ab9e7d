/* What follows a run's own evaluations. */
#include <limits.h>
#include <math.h>
#include <stdio.h>

#include "loop.h"
#include "pml/base/path.h"

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

pml_status loop_load_best(loop *l, pml_error *err)
{
    const pml_train_state *s = &l->state;
    char path[PATH_MAX], name[64], text[192];
    if (!l->policy.load_best || s->best_step < 0 || s->best_step == s->step)
        return PML_OK;
    snprintf(name, sizeof name, "checkpoints/step-%06lld", (long long)s->best_step);
    pml_status status = pml_path_join(path, sizeof path, l->folder, name, err);
    if (status == PML_OK)
        status = wait_for_disk(l, err);
    void *memory = NULL;
    if (status == PML_OK && l->keeper != NULL)
        status = keeper_room(l->keeper, &memory, err);
    if (status == PML_OK)
        status = l->kind->go_back(l->j, path, memory, err);
    if (status != PML_OK)
        return pml_error_prefix(err, "load_best_model_at_end");
    l->has_best = true;
    snprintf(text, sizeof text,
             "the best evaluation was after step %lld (loss %.6g): its weights are loaded",
             (long long)s->best_step, s->best_loss);
    loop_say(l, "info", text);
    return PML_OK;
}
