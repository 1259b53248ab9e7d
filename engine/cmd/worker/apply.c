/* What each command does at a safe point. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loop.h"
#include "pml/base/clock.h"
#include "pml/base/log.h"

enum { CHUNK_TOKENS = 32 };
static const double chunk_seconds = 0.1, logged_seconds = 2;

typedef struct outcome {
    int64_t command, step;
    char reason[sizeof((pml_error *)0)->message]; /* of a refusal */
} outcome;

static pml_message *write_outcome(const void *facts)
{
    const outcome *o = facts;
    bool refused = o->reason[0] != '\0';
    pml_message *m = pml_message_new(refused ? PML_REPORT_refused : PML_REPORT_applied);
    pml_message_set_int(m, "command", o->command);
    pml_message_set_int(m, "step", o->step);
    if (refused)
        pml_message_set_string(m, "reason", o->reason);
    return m;
}

/* reason "": it was applied. */
static void report_outcome(loop *l, int64_t command, const char *reason)
{
    outcome o = {.command = command, .step = l->state.step + 1};
    snprintf(o.reason, sizeof o.reason, "%s", reason);
    link_post(l->link, write_outcome, &o, sizeof o);
}

/* A new schedule is taken as if it had been from the first step, with the peak there is now; its
 * own rates (min_lr, lr_end) mean what they say. */
static pml_status set_schedule(pml_train_state *s, const pml_message *args, const pml_message *keys,
                               pml_error *err)
{
    bool type = pml_message_has(args, "lr_scheduler_type");
    if (pml_message_has(args, "warmup_steps"))
        s->schedule.warmup_steps = pml_message_int(args, "warmup_steps");
    if (!type && keys == NULL)
        return PML_OK;
    pml_schedule_set_keywords(&s->schedule, keys);
    double given = pml_message_number(args, "learning_rate"); /* 0: it is not */
    if (given > 0 || s->learning_rate > 0) /* of a peak of 0 nothing is a share */
        s->schedule.learning_rate = given > 0 ? given : s->learning_rate;
    pml_status status = PML_OK;
    if (type)
        status = pml_schedule_from_name(pml_message_string(args, "lr_scheduler_type"),
                                        &s->schedule.type, err);
    if (status == PML_OK)
        status = pml_schedule_check(&s->schedule, err);
    pml_schedule_begin(&s->schedule, &s->schedule_state);
    return status;
}

/* The rate of this step under a new schedule from such a peak. */
static double rate_from(loop *l, pml_train_state *s, double peak)
{
    s->schedule.learning_rate = peak;
    return peak * l->kind->factor(l->j, s);
}

/* A rate that is set is the current one; the peak of the schedule follows. Where the schedule
 * stands at 0 (the first step of a warmup), the value is the peak. A new schedule may have rates of
 * its own (min_lr, lr_end), of which it then is a share: its rate is a line over the peak, and two
 * points give it. (Below what its own rates leave there is no such peak.) */
static void set_rate(loop *l, pml_train_state *s, double rate, bool anew)
{
    const double same = 1e-12;
    double factor = l->kind->factor(l->j, s);
    double peak = factor > 0 ? rate / factor : rate;
    if (anew && rate > 0) {
        double once = rate_from(l, s, rate), slope = (rate_from(l, s, 2 * rate) - once) / rate;
        double there = slope > 0 ? (rate - (once - slope * rate)) / slope : 0;
        double off = fabs(rate_from(l, s, peak) - rate);
        if (fabs(once - rate) <= same * rate) /* it stands at its peak, to the bit */
            peak = rate;
        else if (there > 0 && fabs(rate_from(l, s, there) - rate) < off)
            peak = there;
        s->schedule.learning_rate = peak;
    }
    s->learning_rate = peak;
}

/* All of it, or nothing with the reason. */
static pml_status apply_set(loop *l, const order *o, pml_error *err)
{
    const pml_message *args = o->args;
    static pml_train_state changed; /* too large for comfort on a stack */
    pml_train_state *s = &changed;
    changed = l->state;
    pml_status status = set_schedule(s, args, o->keywords, err);
    if (status != PML_OK)
        return status;
    if (pml_schedule_measures(&s->schedule) && !l->has_eval)
        return PML_FAIL(err, PML_INVALID, "%s follows evaluations, and this run has no eval_data",
                        pml_schedule_name(s->schedule.type));
    if (pml_message_has(args, "learning_rate"))
        set_rate(l, s, pml_message_number(args, "learning_rate"),
                 pml_message_has(args, "lr_scheduler_type") || o->keywords != NULL);
    if (pml_message_has(args, "lora_dropout"))
        s->lora_dropout = pml_message_number(args, "lora_dropout");
    if (pml_message_has(args, "gradient_accumulation_steps"))
        s->accumulation = pml_message_int(args, "gradient_accumulation_steps");
    if (pml_message_has(args, "weight_decay"))
        s->weight_decay = pml_message_number(args, "weight_decay");
    if (pml_message_has(args, "max_grad_norm"))
        s->max_grad_norm = pml_message_number(args, "max_grad_norm");
    if (pml_message_has(args, "eval_steps"))
        s->eval_steps = pml_message_int(args, "eval_steps");
    if (pml_message_has(args, "save_steps"))
        s->save_steps = pml_message_int(args, "save_steps");
    if (l->kind->tune != NULL)
        status = l->kind->tune(l->j, s, err);
    if (status == PML_OK)
        l->state = changed;
    return status;
}

bool loop_has_reason(const loop *l)
{
    return !link_lost(l->link) && !orders_stops(link_orders(l->link));
}

static pml_status broken_off(const loop *l, const char *what, pml_error *err)
{
    return PML_FAIL(err, PML_INVALID, "broken off: %s while it %s",
                    link_lost(l->link) ? "the coordinator ended" : "the run was stopped", what);
}

/* ---- sampling ---- */

/* Tokens of one prompt's answer on their way to whoever reads it. */
typedef struct answer {
    int32_t tokens[CHUNK_TOKENS];
    size_t n;
    double sent_at;
} answer;

typedef struct stream {
    loop *l;
    int64_t command;
    answer *answers; /* one for each prompt */
    bool broken_off;
} stream;

static void send_chunk(stream *s, int32_t row, bool done)
{
    answer *a = &s->answers[row];
    pml_message *event = pml_message_new(PML_EVENT_sample);
    pml_message_set_int(event, "command", s->command);
    pml_message_set_int(event, "step", loop_weights_step(s->l));
    if (row > 0)
        pml_message_set_int(event, "row", row);
    pml_message_set_ints(event, "token_ids", a->tokens, a->n);
    pml_message_set_bool(event, "done", done);
    link_event(s->l->link, event);
    a->n = 0;
    a->sent_at = pml_clock_monotonic();
}

static bool on_token(void *user, int32_t row, int32_t token)
{
    stream *s = user;
    answer *a = &s->answers[row];
    pulse_tick(link_pulse(s->l->link));
    a->tokens[a->n++] = token;
    if (a->n == CHUNK_TOKENS || pml_clock_monotonic() - a->sent_at >= chunk_seconds)
        send_chunk(s, row, false);
    s->broken_off = s->broken_off || !loop_has_reason(s->l);
    return !s->broken_off && !orders_is_enough(link_orders(s->l->link), s->command, row);
}

static void warn_of_long_sample(loop *l, const pml_generate_options *o)
{
    int32_t longest = 0;
    for (int32_t i = 0; i < o->n_prompts; i++)
        longest = o->lengths[i] > longest ? o->lengths[i] : longest;
    if (l->positions == 0 || longest + o->max_new_tokens <= l->positions)
        return;
    char text[192];
    snprintf(text, sizeof text,
             "sample of %d prompt tokens and up to %d new ones goes beyond the model's "
             "max_position_embeddings=%d",
             longest, o->max_new_tokens, l->positions);
    pml_message *event = pml_message_new(PML_EVENT_log);
    pml_message_set_string(event, "level", "warning");
    pml_message_set_string(event, "message", text);
    link_event(l->link, event);
}

/* The numbers of a request; absent: one, `otherwise`. The caller frees them. */
static int32_t *numbers(const pml_message *args, const char *name, int32_t otherwise, size_t *n)
{
    bool given = pml_message_has(args, name);
    *n = given ? pml_message_count(args, name) : 1;
    int32_t *found = calloc(*n, sizeof *found);
    for (size_t i = 0; found != NULL && i < *n; i++)
        found[i] = given ? (int32_t)pml_message_int_at(args, name, i) : otherwise;
    return found;
}

static pml_status sample(loop *l, int64_t command, const pml_message *args, pml_error *err)
{
    size_t tokens, prompts;
    int32_t *prompt = numbers(args, "input_ids", 0, &tokens);
    int32_t *lengths = numbers(args, "lengths", (int32_t)tokens, &prompts);
    stream s = {.l = l, .command = command, .answers = calloc(prompts, sizeof *s.answers)};
    pml_status status = PML_OK;
    if (prompt == NULL || lengths == NULL || s.answers == NULL) {
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for a prompt of %zu tokens", tokens);
        goto cleanup;
    }
    for (size_t i = 0; i < prompts; i++)
        s.answers[i].sent_at = pml_clock_monotonic();
    pml_generate_options options = {
        .prompt = prompt,
        .n_prompt = (int32_t)tokens,
        .lengths = lengths,
        .n_prompts = (int32_t)prompts,
        .max_new_tokens = (int32_t)pml_message_int(args, "max_new_tokens"),
        .temperature = pml_message_number(args, "temperature"),
        .top_k = (int32_t)pml_message_int(args, "top_k"),
        .top_p = pml_message_has(args, "top_p") ? pml_message_number(args, "top_p") : 1,
        .repetition_penalty = pml_message_has(args, "repetition_penalty")
                                  ? pml_message_number(args, "repetition_penalty")
                                  : 1,
        .seed = (uint64_t)pml_message_int(args, "seed"),
        .on_token = on_token,
        .user = &s,
    };
    phase before = pulse_enter(link_pulse(l->link), PHASE_SAMPLING);
    status = l->kind->sample(l->j, &options, err);
    pulse_enter(link_pulse(l->link), before);
    if (status == PML_OK && s.broken_off)
        status = broken_off(l, "sampled", err);
    if (status == PML_OK)
        warn_of_long_sample(l, &options);
    for (size_t i = 0; status == PML_OK && i < prompts; i++)
        send_chunk(&s, (int32_t)i, true);
cleanup:
    free(prompt);
    free(lengths);
    free(s.answers);
    return status;
}

/* ---- evaluation ---- */

typedef struct asked {
    const loop *l;
    bool broken_off;
} asked;

static bool goes_on(void *user)
{
    asked *a = user;
    a->broken_off = a->broken_off || !loop_has_reason(a->l);
    return !a->broken_off;
}

/* One that was broken off measured nothing. Asked for, it is refused; the run's own is owed still,
 * and made when the run goes on, before the next step, as if it had never been begun. */
static pml_status owe(const loop *l, int64_t command, pml_error *err)
{
    return command > 0 ? broken_off(l, "evaluated", err) : PML_OK;
}

pml_status loop_evaluate(loop *l, int64_t command, pml_error *err)
{
    double sums[3] = {0, 0, 0}, begin = pml_clock_monotonic();
    asked a = {.l = l};
    phase before = pulse_enter(link_pulse(l->link), PHASE_EVALUATING);
    pml_status status = l->kind->evaluate(l->j, goes_on, &a, &sums[0], &sums[1], err);
    sums[2] =
        a.broken_off; /* by one is by all of them: what they had to stop for differs in time */
    if (status == PML_OK)
        status = pml_comm_allreduce_f64(l->comm, sums, 3, err);
    pulse_enter(link_pulse(l->link), before);
    if (status == PML_PEER && link_lost(l->link)) { /* the others are gone with the coordinator */
        sums[2] = 1;
        status = PML_OK;
    }
    if (status != PML_OK)
        return status;
    if (sums[2] > 0)
        return owe(l, command, err);
    if (command == 0)
        l->state.owes_evaluation = false;
    if (command == 0 && l->state.step > 0)
        loop_measured(l, sums[1] > 0 ? sums[0] / sums[1] : NAN);
    if (l->rank != 0)
        return PML_OK;
    pml_message *event = pml_message_new(PML_EVENT_eval);
    pml_message_set_int(event, "step", loop_weights_step(l));
    pml_message_set_number(event, "loss", sums[1] > 0 ? sums[0] / sums[1] : 0);
    pml_message_set_int(event, "labels", (int64_t)sums[1]);
    pml_message_set_number(event, "seconds", pml_clock_monotonic() - begin);
    if (command > 0)
        pml_message_set_int(event, "command", command);
    link_event(l->link, event);
    /* A snapshot that has it may be gone on from: then the log had better have it, too. */
    if (command == 0 && !link_logged(l->link, logged_seconds))
        pml_log(PML_LOG_WARNING, "the log is behind the evaluation of step %lld",
                (long long)l->state.step);
    return PML_OK;
}

/* ---- the switch ---- */

/* PML_INVALID and PML_UNSUPPORTED are the asker's affair, the rest is ours. */
static bool only_refused(pml_status status)
{
    return status == PML_INVALID || status == PML_UNSUPPORTED || status == PML_NOT_FOUND;
}

static void set_nonfinite(loop *l, const pml_message *args)
{
    if (pml_message_has(args, "nonfinite"))
        l->skip_nonfinite = strcmp(pml_message_string(args, "nonfinite"), "skip") == 0;
}

/* command: who waits for it. */
static pml_status save_asked(const loop *l, const order *o, int64_t command, pml_error *err)
{
    const char *name = pml_message_string(o->args, "name");
    return l->saver == NULL ? PML_OK : saver_save(l->saver, &l->state, name, command, err);
}

static pml_status carry_out(loop *l, const order *o, pml_error *err)
{
    pml_status status;
    switch (o->verb) {
    case PML_REQUEST_pause:
    case PML_REQUEST_resume:
        if (l->finished)
            return PML_FAIL(err, PML_INVALID, "the run is finished");
        l->paused = o->verb == PML_REQUEST_pause;
        set_nonfinite(l, o->args);
        orders_supersede(link_orders(l->link), o->args);
        return PML_OK;
    case PML_REQUEST_stop:
        l->stopping = true;
        return PML_OK;
    case PML_REQUEST_set:
        if (l->finished)
            return PML_FAIL(err, PML_INVALID, "the run is finished");
        status = apply_set(l, o, err);
        if (status == PML_OK)
            orders_supersede(link_orders(l->link), o->args);
        return status;
    case PML_REQUEST_checkpoint:
        if (l->has_best)
            return PML_FAIL(err, PML_INVALID,
                            "the run is finished and has the weights of its best checkpoint, "
                            "step-%06lld",
                            (long long)l->state.best_step);
        return save_asked(l, o, o->number, err);
    case PML_REQUEST_evaluate:
        return l->has_eval ? loop_evaluate(l, o->number, err)
                           : PML_FAIL(err, PML_INVALID, "this run has no eval_data");
    case PML_REQUEST_sample:
        return l->rank == 0 ? sample(l, o->number, o->args, err) : PML_OK;
    default:
        return PML_FAIL(err, PML_INTERNAL, "no such command: %s", pml_message_name(o->verb));
    }
}

/* Of an earlier timeline: nobody waits for a report. What was applied once can be applied again;
 * where it cannot (the file was changed by hand), the run had better stop than train with other
 * settings than its log has. */
static pml_status apply_again(loop *l, const order *o, pml_error *err)
{
    if (o->verb == PML_REQUEST_checkpoint) /* it was applied once, and not written */
        return save_asked(l, o, o->answers, err);
    if (l->finished) /* no step comes for which anything else could hold */
        return PML_OK;
    if (o->verb == PML_REQUEST_set) {
        if (o->step == l->loaded_step + 1 && o->answers <= l->loaded_command)
            return PML_OK; /* what was loaded stood there, and has it */
        pml_status status = apply_set(l, o, err);
        if (status == PML_OK && o->answers > l->state.command)
            l->state.command = o->answers;
        return status == PML_OK ? PML_OK : pml_error_prefix(err, "a setting of the log");
    }
    if (o->verb == PML_REQUEST_resume) /* of the standing the log's last word comes by itself */
        set_nonfinite(l, o->args);
    else if (o->verb == PML_REQUEST_pause)
        l->paused = true;
    else
        l->stopping = true;
    return PML_OK;
}

pml_status loop_apply(loop *l, const order *o, pml_error *err)
{
    if (o->number == 0)
        return apply_again(l, o, err);
    pml_status status = carry_out(l, o, err);
    if (status == PML_OK)
        report_outcome(l, o->number, "");
    else if (only_refused(status))
        report_outcome(l, o->number, err->message);
    else
        return status;
    l->state.command = o->number;
    return PML_OK;
}
