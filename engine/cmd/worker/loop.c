#include "loop.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/base/log.h"

enum { FLAG_LOST = 1 }; /* in the header: somebody's coordinator is gone */

/* ---- telling: facts here, the messages on the link's thread ---- */

typedef struct said {
    char level[12]; /* of a log event, or the state of a turn */
    int64_t step;
    char text[1000];
} said;

static pml_message *write_turn(const void *facts)
{
    const said *t = facts;
    pml_message *m = pml_message_new(PML_REPORT_turn);
    pml_message_set_string(m, "state", t->level);
    pml_message_set_int(m, "step", t->step);
    if (t->text[0] != '\0')
        pml_message_set_string(m, "reason", t->text);
    return m;
}

static void turn(loop *l, const char *state, const char *reason)
{
    said t = {.step = l->state.step};
    snprintf(t.level, sizeof t.level, "%s", state);
    snprintf(t.text, sizeof t.text, "%s", reason);
    link_post(l->link, write_turn, &t, sizeof t);
}

static pml_message *write_log(const void *facts)
{
    const said *t = facts;
    pml_message *event = pml_message_new(PML_EVENT_log);
    pml_message_set_string(event, "level", t->level);
    pml_message_set_string(event, "message", t->text);
    return link_wrap(event);
}

static void say(loop *l, const char *level, const char *text)
{
    said t = {.step = l->state.step};
    snprintf(t.level, sizeof t.level, "%s", level);
    snprintf(t.text, sizeof t.text, "%s", text);
    link_post(l->link, write_log, &t, sizeof t);
}

void loop_say(loop *l, const char *level, const char *text)
{
    if (l->rank == 0)
        say(l, level, text);
}

/* A snapshot, if it is time or at_once. Not of the best weights as if they were the last step's;
 * nor of a later step while the best checkpoint is written: it can only be written again from its
 * own, and the run is to end with it. */
static pml_status keep(loop *l, bool at_once, pml_error *err)
{
    if (l->keeper == NULL || l->has_best)
        return PML_OK;
    if (l->policy.save_best && saver_is_writing(l->saver, l->state.best_step))
        return PML_OK;
    return keeper_keep(l->keeper, &l->state, at_once, err);
}

/* ---- safe points ---- */

/* All commands up to `limit`, in order: every rank applies the same ones here. */
static pml_status apply_up_to(loop *l, int64_t limit, pml_error *err)
{
    order o;
    pml_status status = PML_OK;
    while (status == PML_OK && !l->stopping && orders_next(link_orders(l->link), limit, &o)) {
        status = loop_apply(l, &o, err);
        link_discard(l->link, &o);
    }
    return status;
}

/* Settings of an earlier timeline come back at their steps, and a checkpoint that it owes. */
static pml_status apply_agains(loop *l, int64_t step, pml_error *err)
{
    order o;
    pml_status status = PML_OK;
    while (status == PML_OK && orders_next_again(link_orders(l->link), step, &o)) {
        status = loop_apply(l, &o, err);
        link_discard(l->link, &o);
        if (o.verb == PML_REQUEST_checkpoint)
            loop_say(l, "info", "a checkpoint that was asked for is written again");
        else if (!l->finished)
            loop_say(l, "info", "a setting of the log is in force again");
    }
    return status;
}

/* Commands one by one as they are committed, until one of them ends the standing. No collective
 * decides here: every rank gets the same commits in the same order, and leaves after the same one.
 */
static pml_status stand(loop *l, pml_error *err)
{
    pml_status status = keep(l, true, err);
    phase before = pulse_enter(link_pulse(l->link), PHASE_STANDING);
    while (status == PML_OK && (l->paused || l->finished) && !l->stopping) {
        order o;
        /* What stands for long is not to be without a snapshot because of one moment. */
        bool lacks = l->paused && l->keeper != NULL && keeper_lacks(l->keeper, &l->state);
        if (lacks)
            orders_wait_for(link_orders(l->link), 1);
        else
            orders_wait(link_orders(l->link));
        if (link_lost(l->link)) {
            l->stopping = true;
        } else if (orders_next(link_orders(l->link), orders_committed(link_orders(l->link)), &o)) {
            status = loop_apply(l, &o, err);
            link_discard(l->link, &o);
            /* As in agree: an evaluation whose peers are gone with the coordinator changed nothing,
             * so what stands here is saved. */
            if (status == PML_PEER && link_lost(l->link)) {
                l->stopping = true;
                status = PML_OK;
            }
        } else if (lacks && keeper_can(l->keeper)) {
            pulse_enter(link_pulse(l->link), PHASE_SAVING); /* what stands may take for ever */
            status = keep(l, true, err);
            pulse_enter(link_pulse(l->link), PHASE_STANDING);
        }
    }
    pulse_enter(link_pulse(l->link), before);
    return status;
}

static pml_status pause_here(loop *l, const char *reason, pml_error *err)
{
    turn(l, "paused", reason);
    pml_status status = stand(l, err);
    if (status == PML_OK && !l->stopping)
        turn(l, "running", "");
    return status;
}

/* ---- a step ---- */

typedef struct step_facts {
    int64_t step, tokens, labels;
    double loss, learning_rate, grad_norm, seconds, epoch, mfu, loss_scale;
    bool skipped;
} step_facts;

static pml_message *write_step(const void *facts)
{
    const step_facts *f = facts;
    pml_message *event = pml_message_new(PML_EVENT_step);
    pml_message_set_int(event, "step", f->step);
    pml_message_set_number(event, "loss", f->loss);
    pml_message_set_number(event, "learning_rate", f->learning_rate);
    pml_message_set_number(event, "grad_norm", f->grad_norm);
    pml_message_set_int(event, "tokens", f->tokens);
    pml_message_set_int(event, "labels", f->labels);
    pml_message_set_number(event, "seconds", f->seconds);
    pml_message_set_number(event, "tokens_per_second",
                           f->seconds > 0 ? (double)f->tokens / f->seconds : 0);
    pml_message_set_number(event, "epoch", f->epoch);
    if (f->loss_scale > 0)
        pml_message_set_number(event, "loss_scale", f->loss_scale);
    if (f->mfu > 0)
        pml_message_set_number(event, "mfu", f->mfu);
    if (f->skipped)
        pml_message_set_bool(event, "skipped", true);
    return link_wrap(event);
}

static void report_step(loop *l, const pml_header *h, const pml_update *u, const pml_step_result *r)
{
    double mfu = l->gpu != NULL ? gpu_watch_step(l->gpu, r->flops, l->last_seconds) : 0;
    if (l->rank != 0)
        return;
    const step_facts f = {.step = u->step,
                          .tokens = h->tokens,
                          .labels = h->labels,
                          .loss = r->loss,
                          .learning_rate = u->learning_rate,
                          .grad_norm = r->grad_norm,
                          .seconds = l->last_seconds,
                          .epoch = l->kind->epoch(l->j),
                          .mfu = mfu,
                          .loss_scale = r->loss_scale,
                          .skipped = r->skipped};
    link_post(l->link, write_step, &f, sizeof f);
}

static bool due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

static bool ends_epoch(const loop *l)
{
    double epoch = l->kind->epoch(l->j);
    return epoch == floor(epoch);
}

/* Whether the step just made asks for an evaluation; the last one always does. It is in the state
 * from the step on, so a snapshot or a checkpoint that is taken before it is made has it. */
static bool asks_for_evaluation(const loop *l)
{
    const pml_train_state *s = &l->state;
    return l->has_eval && (due(s->step, s->eval_steps) || s->step >= l->max_steps ||
                           (l->policy.eval_epochs && ends_epoch(l)));
}

/* After the step: what its number asks for. */
static pml_status follow_up(loop *l, pml_error *err)
{
    const pml_train_state *s = &l->state;
    pml_status status = s->owes_evaluation ? loop_evaluate(l, 0, err) : PML_OK;
    if (s->owes_evaluation) /* the run ends here: what follows on an evaluation is owed, too */
        return status;
    bool best = l->policy.save_best && s->best_step == s->step;
    if (status == PML_OK && l->saver != NULL &&
        (due(s->step, s->save_steps) || (l->policy.save_epochs && ends_epoch(l)) || best))
        status = saver_save(l->saver, s, "", 0, err);
    return status == PML_OK ? keep(l, false, err) : status;
}

/* What float16 may have to do with a step that is not finite. */
static const char *float16_note(const pml_step_result *r)
{
    return r->loss_scale == 0   ? ""
           : !isfinite(r->loss) ? " in float16, which ends at 65,504 (dtype=\"float32\" goes on)"
                                : " at the smallest loss scale";
}

/* A NaN has a sign, which says nothing and is printed. */
static double shown(double x)
{
    return isnan(x) ? fabs(x) : x;
}

/* The same numbers on every rank, so all of them stand at this step; what can be done about it. */
static void not_finite(const loop *l, const pml_update *u, const pml_step_result *r, char *text,
                       size_t size)
{
    const char *saved = l->saver != NULL ? saver_last(l->saver) : "";
    snprintf(text, size,
             "step %lld is not finite (loss %g, gradient norm %g)%s: nothing was updated%s%s%s%s",
             (long long)u->step, shown(r->loss), shown(r->grad_norm), float16_note(r),
             l->skip_nonfinite ? "" : ", paused; resume() leaves this batch out and goes on",
             saved[0] != '\0' ? "; the last checkpoint is " : "", saved,
             saved[0] != '\0' ? " (stop(), then resume(checkpoint=…) goes back to it)" : "");
}

/* A step that float16 could not hold is no reason to stop: the next one has half the scale. */
static void tell_scale(loop *l, const pml_update *u, const pml_step_result *r)
{
    char text[200];
    if (r->overflow) {
        snprintf(
            text, sizeof text,
            "the gradient of step %lld was too large for float16: nothing was updated, and the "
            "loss scale goes from %g to %g",
            (long long)u->step, r->loss_scale, r->loss_scale / 2);
        loop_say(l, "warning", text);
    } else if (r->loss_scale > 0 && l->loss_scale == 0) {
        snprintf(text, sizeof text, "float16: step %lld has a loss scale of %g", (long long)u->step,
                 r->loss_scale);
        loop_say(l, "info", text);
    } else if (r->loss_scale > l->loss_scale) {
        snprintf(text, sizeof text, "the loss scale is %g from step %lld on", r->loss_scale,
                 (long long)u->step);
        loop_say(l, "info", text);
    }
    l->loss_scale = r->overflow ? r->loss_scale / 2 : r->loss_scale;
}

/* What a library was asked for while steps were made already, and did not do: slower code of our
 * own does, and nobody would see it. Once, by each rank, as what was known at the start. */
static void tell_lack(loop *l)
{
    char text[PML_LACKS] = "";
    if (l->told_lack)
        return;
    l->kind->lacks(l->j, text);
    l->told_lack = text[0] != '\0';
    if (l->told_lack)
        say(l, "warning", text);
}

static pml_status make_step(loop *l, const pml_header *h, double begin, pml_error *err)
{
    pml_step_result result = {0};
    pml_update u = {.step = l->state.step + 1,
                    .learning_rate = l->state.learning_rate * l->kind->factor(l->j, &l->state),
                    .weight_decay = l->state.weight_decay,
                    .max_grad_norm = l->state.max_grad_norm,
                    .labels = h->labels};
    if (l->rank == 0)
        timing_before(&l->timing, l->kind, l->j, l->link);
    pml_status status = l->kind->step(l->j, &u, &result, err);
    if (status != PML_OK)
        return status;
    l->state.step = u.step;
    l->state.heeded = false;
    l->state.owes_evaluation = asks_for_evaluation(l);
    link_set_step(l->link, u.step);
    l->last_seconds = pml_clock_monotonic() - begin;
    pulse_step(link_pulse(l->link), l->last_seconds);
    report_step(l, h, &u, &result);
    if (l->rank == 0)
        status = timing_after(&l->timing, l->kind, l->j, l->link, u.step, h->tokens,
                              l->last_seconds, err);
    if (status != PML_OK)
        return status;
    tell_lack(l);
    char text[480];
    if (h->labels == 0) { /* rows whose labels are all -100, or were cut off */
        snprintf(text, sizeof text,
                 "no token of step %lld has a label: it has no loss and its gradient is zero; "
                 "momentum and weight decay were applied",
                 (long long)u.step);
        loop_say(l, "warning", text);
    }
    tell_scale(l, &u, &result);
    if (result.skipped && !result.overflow) {
        not_finite(l, &u, &result, text, sizeof text);
        loop_say(l, "warning", text);
        l->paused = !l->skip_nonfinite;
        if (l->paused) { /* the pause of the log that may be among them is this one */
            status = apply_agains(l, u.step + 1, err);
            l->state.heeded = true;
        }
        if (status == PML_OK && l->paused && !l->stopping)
            status = pause_here(l, text, err);
        if (status != PML_OK || l->stopping)
            return status;
    }
    return follow_up(l, err);
}

/* The header agrees on what comes: how many labels there are in all, which commands are in force,
 * and whether somebody has lost the coordinator. */
static pml_status agree(loop *l, pml_header *h, pml_error *err)
{
    bool lost = link_lost(l->link);
    *h = (pml_header){.committed = orders_committed(link_orders(l->link)),
                      .step = l->state.step + 1,
                      .flags = lost ? FLAG_LOST : 0,
                      .seconds = l->last_seconds};
    pml_share mine = l->kind->share(l->j);
    h->labels = mine.labels;
    h->tokens = mine.tokens;
    pml_status status = pml_comm_header(l->comm, h, err);
    /* Between steps everything is whole: one whose peers are gone with the coordinator saves too.
     */
    if (status == PML_PEER && (lost || link_lost(l->link))) {
        h->flags |= FLAG_LOST;
        status = PML_OK;
    }
    if (status == PML_OK && (h->flags & FLAG_LOST) != 0)
        l->stopping = true;
    return status;
}

/* What was committed is in force from here on. */
static pml_status heed(loop *l, pml_header *h, pml_error *err)
{
    pml_status status = agree(l, h, err);
    if (status == PML_OK && !l->stopping) {
        status = apply_agains(l, l->state.step + 1, err);
        l->state.heeded = true; /* before the commands: one of them may be a checkpoint */
    }
    if (status == PML_OK && !l->stopping)
        status = apply_up_to(l, h->committed, err);
    return status;
}

static pml_status one_round(loop *l, pml_error *err)
{
    double begin = pml_clock_monotonic();
    pml_header h;
    int64_t accumulation = l->state.accumulation;
    pml_status status = heed(l, &h, err);
    if (status != PML_OK || l->stopping)
        return status;
    if (l->paused)
        return pause_here(l, "", err);
    if (l->state.accumulation != accumulation)
        return PML_OK; /* another batch: its labels are counted by the next header */
    return make_step(l, &h, begin, err);
}

/* ---- from go to the end ---- */

static pml_status save_once(loop *l, pml_error *err)
{
    phase before = pulse_enter(link_pulse(l->link), PHASE_SAVING);
    pml_status status = saver_save(l->saver, &l->state, "", 0, err);
    status = status == PML_OK ? saver_wait(l->saver, err) : status;
    pulse_enter(link_pulse(l->link), before);
    return status;
}

/* "" when all steps are made. */
static const char *why_finished(const loop *l)
{
    if (l->state.step >= l->max_steps)
        return "";
    return "early stopping: the evaluations did not get better";
}

/* What the last steps made is only in memory: where the disk does not take it, it is tried again
 * each second, for as long as the run has reason to stay, and SAVER_PATIENCE once it has not.
 * Commands are served meanwhile, as every other rank stands and serves them. */
static pml_status save_last(loop *l, pml_error *err)
{
    if (l->saver == NULL)
        return PML_OK;
    double end = 0;
    pml_status status = save_once(l, err);
    while (status == PML_IO) {
        double now = pml_clock_monotonic();
        l->stopping = l->stopping || link_lost(l->link);
        if (l->stopping && end == 0)
            end = now + SAVER_PATIENCE;
        if (l->stopping && now >= end)
            return status;
        phase before = pulse_enter(link_pulse(l->link), PHASE_STANDING);
        orders_wait_for(link_orders(l->link), 1);
        pulse_enter(link_pulse(l->link), before);
        status = apply_up_to(l, orders_committed(link_orders(l->link)), err);
        if (status == PML_OK)
            status = save_once(l, err);
    }
    return status;
}

static pml_status finish(loop *l, bool trained, pml_error *err)
{
    if (l->state.owes_evaluation)
        return PML_OK;  /* broken off: it is stopped, and not finished */
    l->finished = true; /* from here on all ranks take commands as they come */
    pml_status status = trained ? save_last(l, err) : PML_OK;
    if (status == PML_OK)
        status = apply_agains(l, INT64_MAX, err); /* no step comes that would */
    if (status == PML_OK)
        status = loop_load_best(l, err);
    if (status != PML_OK)
        return status;
    turn(l, "finished", why_finished(l));
    status = stand(l, err);
    if (status == PML_OK && l->saver != NULL)
        saver_wait(l->saver, NULL); /* of one that was asked for since: an event has told it */
    return status;
}

pml_status loop_run(loop *l, pml_error *err)
{
    int64_t first = l->state.step;
    l->loaded_step = first;
    l->loaded_command = l->state.heeded ? l->state.command : 0;
    link_set_step(l->link, first);
    pulse_enter(link_pulse(l->link), PHASE_STEPPING);
    pml_status status = keep(l, true, err);
    if (status == PML_OK && first < l->max_steps && !loop_out_of_patience(l))
        turn(l, "running", "");
    if (status == PML_OK && first == 0 && l->has_eval) /* what training has to beat */
        status = loop_evaluate(l, 0, err);
    l->state.owes_evaluation = l->state.owes_evaluation && l->has_eval;
    /* The last step of those before may not be over yet. */
    bool trained = l->state.owes_evaluation || (l->unfollowed && first > 0);
    if (status == PML_OK && trained)
        status = follow_up(l, err);
    while (status == PML_OK && !l->stopping && l->state.step < l->max_steps &&
           !loop_out_of_patience(l))
        status = one_round(l, err);
    if (status != PML_OK)
        return status;
    if (!l->stopping)
        status = finish(l, trained || l->state.step > first, err);
    if (status != PML_OK || l->finished)
        return status;
    pml_header h;
    if (!l->stopping) /* the last evaluation was broken off: what for is heard here */
        status = heed(l, &h, err);
    if (status == PML_OK)
        status = save_last(l, err);
    if (status == PML_OK)
        turn(l, "stopped", link_lost(l->link) ? "the coordinator is gone" : "");
    return status;
}
