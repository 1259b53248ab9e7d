/* Schedules that follow the evaluations, and how a schedule is read from messages and kept in
 * state.json. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "schedule_impl.h"

bool pml_schedule_measures(const pml_schedule *s)
{
    return s->type == PML_SCHEDULE_REDUCE_LR_ON_PLATEAU || s->type == PML_SCHEDULE_GREEDY;
}

bool pml_schedule_same(const pml_schedule *a, const pml_schedule *b)
{
    if (a->type != b->type || a->warmup_steps != b->warmup_steps || a->given != b->given ||
        a->learning_rate != b->learning_rate)
        return false;
    for (int k = 0; k < PML_KEYWORD_COUNT; k++)
        if ((a->given >> k & 1) && a->keyword[k] != b->keyword[k])
            return false;
    return true;
}

void pml_schedule_begin(const pml_schedule *s, pml_schedule_state *state)
{
    *state = (pml_schedule_state){.factor = 1,
                                  .reset = (int64_t)pmli_keyword(s, PML_KEYWORD_RESET_START)};
}

static bool is_better(const pml_schedule *s, const pml_schedule_state *state, double metric)
{
    double threshold = pmli_keyword(s, PML_KEYWORD_THRESHOLD), best = state->best;
    bool greatest = pmli_keyword(s, PML_KEYWORD_MODE) != 0;
    bool absolute = pmli_keyword(s, PML_KEYWORD_THRESHOLD_MODE) != 0;
    if (state->measured == 0) /* anything but NaN is better than nothing */
        return greatest ? metric > -INFINITY : metric < INFINITY;
    if (greatest)
        return metric > (absolute ? best + threshold : best * (1 + threshold));
    return metric < (absolute ? best - threshold : best * (1 - threshold));
}

static void take_better(pml_schedule_state *state, double metric)
{
    state->best = metric;
    state->measured++;
    state->bad = 0;
}

/* One that is smaller by no more than eps is not taken. */
static void reduce(const pml_schedule *s, pml_schedule_state *state, double peak)
{
    double rate = peak * state->factor;
    double next =
        fmax(rate * pmli_keyword(s, PML_KEYWORD_FACTOR), pmli_keyword(s, PML_KEYWORD_MIN_LR));
    if (rate - next > pmli_keyword(s, PML_KEYWORD_EPS))
        state->factor = next / peak;
}

static void plateau(const pml_schedule *s, pml_schedule_state *state, double peak, double metric)
{
    if (is_better(s, state, metric))
        take_better(state, metric);
    else
        state->bad++;
    if (state->cooldown > 0) {
        state->cooldown--;
        state->bad = 0;
    }
    if (state->bad > (int64_t)pmli_keyword(s, PML_KEYWORD_PATIENCE)) {
        reduce(s, state, peak);
        state->cooldown = (int64_t)pmli_keyword(s, PML_KEYWORD_COOLDOWN);
        state->bad = 0;
    }
}

static void greedy_reduce(const pml_schedule *s, pml_schedule_state *state, double peak)
{
    reduce(s, state, peak);
    state->cooldown = (int64_t)pmli_keyword(s, PML_KEYWORD_COOLDOWN);
    state->bad = 0;
    if (peak * state->factor > pmli_keyword(s, PML_KEYWORD_MIN_LR) * (1 + 1e-12))
        return;                /* not at the bottom (but for rounding) */
    if (--state->reset <= 0) { /* long enough at the bottom: from the beginning */
        int64_t cooldown = state->cooldown;
        pml_schedule_begin(s, state);
        state->cooldown = cooldown; /* set again after the reset there too */
    }
}

static void greedy_increase(const pml_schedule *s, pml_schedule_state *state, double peak)
{
    double rate = peak * state->factor;
    double next =
        fmin(rate / pmli_keyword(s, PML_KEYWORD_FACTOR), pmli_keyword(s, PML_KEYWORD_MAX_LR));
    if (next - rate > pmli_keyword(s, PML_KEYWORD_EPS))
        state->factor = next / peak;
    state->reset = (int64_t)pmli_keyword(s, PML_KEYWORD_RESET_START);
    state->warmup = (int64_t)pmli_keyword(s, PML_KEYWORD_WARMUP);
    state->good = 0;
}

/* The mean of the last evaluations, summed as they came and went: the sum's rounding is part of it.
 * What is not finite stands for itself: it would never leave the sum. */
static double smoothed(const pml_schedule *s, pml_schedule_state *state, double metric)
{
    int32_t most = (int32_t)pmli_keyword(s, PML_KEYWORD_WINDOW_SIZE);
    if (!isfinite(metric))
        return metric;
    state->sum += metric;
    if (state->n_window < most) {
        state->window[state->n_window++] = metric;
    } else {
        state->sum -= state->window[0];
        memmove(state->window, state->window + 1, (size_t)(most - 1) * sizeof *state->window);
        state->window[most - 1] = metric;
    }
    return state->sum / state->n_window;
}

static void greedy(const pml_schedule *s, pml_schedule_state *state, double peak, double metric)
{
    if (pmli_keyword(s, PML_KEYWORD_SMOOTH) != 0)
        metric = smoothed(s, state, metric);
    int64_t patience = (int64_t)pmli_keyword(s, PML_KEYWORD_PATIENCE);
    if (state->cooldown > 0 || state->warmup > 0) {
        if (state->cooldown > 0)
            state->cooldown--;
        else
            state->warmup--;
        state->bad = state->good = 0;
        return;
    }
    if (is_better(s, state, metric)) {
        take_better(state, metric);
        state->good++;
    } else {
        state->bad++;
        state->good = 0;
    }
    if (state->good > patience)
        greedy_increase(s, state, peak);
    else if (state->bad > patience)
        greedy_reduce(s, state, peak);
}

void pml_schedule_measured(const pml_schedule *s, pml_schedule_state *state, double peak,
                           double metric)
{
    if (s->type == PML_SCHEDULE_REDUCE_LR_ON_PLATEAU)
        plateau(s, state, peak, metric);
    else if (s->type == PML_SCHEDULE_GREEDY)
        greedy(s, state, peak, metric);
}

/* ---- messages ---- */

/* Number of a word in a list; the table has let no other through. */
static double word_number(const char *words, const char *word)
{
    size_t length = strlen(word);
    for (int n = 0;; n++) {
        size_t here = strcspn(words, " ");
        if ((here == length && memcmp(words, word, length) == 0) || words[here] == '\0')
            return n;
        words += here + 1;
    }
}

void pml_schedule_set_keywords(pml_schedule *s, const pml_message *record)
{
    s->given = 0;
    for (int k = 0; record != NULL && k < PML_KEYWORD_COUNT; k++) {
        const pmli_keyword_info *info = &pmli_keywords[k];
        if (!pml_message_has(record, info->name))
            continue;
        s->given |= 1U << k;
        if (info->words == pmli_truth)
            s->keyword[k] = pml_message_bool(record, info->name);
        else if (info->words != NULL)
            s->keyword[k] = word_number(info->words, pml_message_string(record, info->name));
        else
            s->keyword[k] = pml_message_number(record, info->name);
    }
}

/* ---- state.json ---- */

enum { LONGEST_COUNT = 1 << 30 };

static const struct {
    const char *name;
    size_t offset;
} counts[] = {{"measured", offsetof(pml_schedule_state, measured)},
              {"bad", offsetof(pml_schedule_state, bad)},
              {"good", offsetof(pml_schedule_state, good)},
              {"cooldown", offsetof(pml_schedule_state, cooldown)},
              {"warmup", offsetof(pml_schedule_state, warmup)},
              {"reset", offsetof(pml_schedule_state, reset)}};
enum { COUNTS = sizeof counts / sizeof *counts };

void pml_schedule_write(pml_json_writer *w, const pml_schedule *s, const pml_schedule_state *state)
{
    pml_json_put_string(w, "type", pml_schedule_name(s->type));
    pml_json_put_int(w, "warmup_steps", s->warmup_steps);
    pml_json_put_double(w, "learning_rate", s->learning_rate);
    pml_json_begin_object(w, "keywords"); /* words by their number */
    for (int k = 0; k < PML_KEYWORD_COUNT; k++)
        if (s->given >> k & 1)
            pml_json_put_double(w, pmli_keywords[k].name, s->keyword[k]);
    pml_json_end(w);
    pml_json_put_double(w, "factor", state->factor);
    pml_json_put_double(w, "best", state->best);
    for (int i = 0; i < COUNTS; i++)
        pml_json_put_int(w, counts[i].name,
                         *(const int64_t *)(const void *)((const char *)state + counts[i].offset));
    if (state->n_window == 0)
        return;
    pml_json_put_double(w, "sum", state->sum);
    pml_json_begin_array(w, "window");
    for (int32_t i = 0; i < state->n_window; i++)
        pml_json_put_double(w, NULL, state->window[i]);
    pml_json_end(w);
}

static pml_status read_window(pml_json_at at, const pml_schedule *s, pml_schedule_state *state,
                              pml_error *err)
{
    const pml_json *window = NULL;
    const double most = pmli_keyword(s, PML_KEYWORD_WINDOW_SIZE);
    state->sum = 0;
    if (!(most >= 1 && most <= PML_SCHEDULE_WINDOW))
        return PML_FAIL(err, PML_INVALID, "%s: window_size must be from 1 to %d", at.file,
                        PML_SCHEDULE_WINDOW);
    pml_status status = pml_json_get_array(at, "window", PML_JSON_OPTIONAL, &window, err);
    if (status == PML_OK && window != NULL)
        status = pml_json_get_double(at, "sum", PML_JSON_REQUIRED, -1e300, 1e300, &state->sum, err);
    if (status != PML_OK)
        return status;
    state->n_window = (int32_t)pml_json_length(window);
    if (pml_json_length(window) > (size_t)most)
        return PML_FAIL(err, PML_INVALID, "%s: window is longer than window_size", at.file);
    for (int32_t i = 0; i < state->n_window; i++)
        if (!pml_json_as_double(pml_json_item(window, (size_t)i), &state->window[i]))
            return PML_FAIL(err, PML_INVALID, "%s: window must hold numbers", at.file);
    return PML_OK;
}

pml_status pml_schedule_read(pml_json_at at, pml_schedule *s, pml_schedule_state *state,
                             pml_error *err)
{
    const pml_json_need need = PML_JSON_REQUIRED;
    const double top = 1e300;
    char name[40];
    const pml_json *keywords = NULL;
    *s = (pml_schedule){0};
    pml_status status = pml_json_get_string(at, "type", need, name, sizeof name, err);
    if (status == PML_OK)
        status = pml_schedule_from_name(name, &s->type, err);
    if (status == PML_OK)
        status = pml_json_get_int(at, "warmup_steps", need, 0, INT64_MAX, &s->warmup_steps, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "learning_rate", need, 0, top, &s->learning_rate, err);
    if (status == PML_OK)
        status = pml_json_get_object(at, "keywords", need, &keywords, err);
    pml_json_at inside = {keywords, at.file, "schedule.keywords"};
    for (int k = 0; status == PML_OK && k < PML_KEYWORD_COUNT; k++)
        if (pml_json_has(inside, pmli_keywords[k].name)) {
            s->given |= 1U << k;
            status = pml_json_get_double(inside, pmli_keywords[k].name, need, -top, top,
                                         &s->keyword[k], err);
        }
    if (status == PML_OK)
        status = pml_json_get_double(at, "factor", need, 0, top, &state->factor, err);
    if (status == PML_OK)
        status = pml_json_get_double(at, "best", need, -top, top, &state->best, err);
    for (int i = 0; status == PML_OK && i < COUNTS; i++) {
        int64_t *count = (int64_t *)(void *)((char *)state + counts[i].offset);
        status = pml_json_get_int(at, counts[i].name, need, 0, LONGEST_COUNT, count, err);
    }
    return status == PML_OK ? read_window(at, s, state, err) : status;
}
