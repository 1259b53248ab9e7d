/* Learning-rate factors as transformers.get_scheduler defines them (optimization.py 5.23: the
 * lambdas of its get_*_schedule functions), and the names and keywords they go by. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "schedule_impl.h"

static const char *const names[PML_SCHEDULE_COUNT] = {
    [PML_SCHEDULE_CONSTANT] = "constant",
    [PML_SCHEDULE_LINEAR] = "linear",
    [PML_SCHEDULE_COSINE] = "cosine",
    [PML_SCHEDULE_COSINE_WITH_RESTARTS] = "cosine_with_restarts",
    [PML_SCHEDULE_POLYNOMIAL] = "polynomial",
    [PML_SCHEDULE_CONSTANT_WITH_WARMUP] = "constant_with_warmup",
    [PML_SCHEDULE_INVERSE_SQRT] = "inverse_sqrt",
    [PML_SCHEDULE_REDUCE_LR_ON_PLATEAU] = "reduce_lr_on_plateau",
    [PML_SCHEDULE_COSINE_WITH_MIN_LR] = "cosine_with_min_lr",
    [PML_SCHEDULE_COSINE_WARMUP_WITH_MIN_LR] = "cosine_warmup_with_min_lr",
    [PML_SCHEDULE_WARMUP_STABLE_DECAY] = "warmup_stable_decay",
    [PML_SCHEDULE_GREEDY] = "greedy",
};
enum { LONGEST_NAME = 32 };

/* ---- keywords ---- */

#define BIT(name) (1U << PML_KEYWORD_##name)
enum {
    CYCLES = BIT(NUM_CYCLES),
    MINIMUM = BIT(MIN_LR) | BIT(MIN_LR_RATE),
    MEASURED = BIT(MODE) | BIT(FACTOR) | BIT(PATIENCE) | BIT(THRESHOLD) | BIT(THRESHOLD_MODE) |
               BIT(COOLDOWN) | BIT(MIN_LR) | BIT(EPS)
};

/* What each type takes. */
static const uint32_t takes[PML_SCHEDULE_COUNT] = {
    [PML_SCHEDULE_COSINE] = CYCLES,
    [PML_SCHEDULE_COSINE_WITH_RESTARTS] = CYCLES,
    [PML_SCHEDULE_POLYNOMIAL] = BIT(LR_END) | BIT(POWER),
    [PML_SCHEDULE_INVERSE_SQRT] = BIT(TIMESCALE),
    [PML_SCHEDULE_REDUCE_LR_ON_PLATEAU] = MEASURED,
    [PML_SCHEDULE_COSINE_WITH_MIN_LR] = CYCLES | MINIMUM,
    [PML_SCHEDULE_COSINE_WARMUP_WITH_MIN_LR] = CYCLES | MINIMUM | BIT(WARMUP_LR_RATE),
    [PML_SCHEDULE_WARMUP_STABLE_DECAY] = CYCLES | BIT(NUM_DECAY_STEPS) | BIT(NUM_STABLE_STEPS) |
                                         BIT(WARMUP_TYPE) | BIT(DECAY_TYPE) | BIT(MIN_LR_RATIO),
    [PML_SCHEDULE_GREEDY] =
        MEASURED | BIT(WARMUP) | BIT(MAX_LR) | BIT(RESET_START) | BIT(SMOOTH) | BIT(WINDOW_SIZE),
};

const char pmli_truth[] = "false true";
const pmli_keyword_info pmli_keywords[PML_KEYWORD_COUNT] = {
    [PML_KEYWORD_NUM_CYCLES] = {"num_cycles", 0.5, NULL},
    [PML_KEYWORD_POWER] = {"power", 1, NULL},
    [PML_KEYWORD_LR_END] = {"lr_end", 1e-7, NULL},
    [PML_KEYWORD_TIMESCALE] = {"timescale", 0, NULL}, /* 0: warmup_steps, or 10,000 */
    [PML_KEYWORD_MIN_LR] = {"min_lr", 0, NULL},
    [PML_KEYWORD_MIN_LR_RATE] = {"min_lr_rate", 0, NULL},
    [PML_KEYWORD_WARMUP_LR_RATE] = {"warmup_lr_rate", 0, NULL},
    [PML_KEYWORD_NUM_DECAY_STEPS] = {"num_decay_steps", 0, NULL},
    [PML_KEYWORD_NUM_STABLE_STEPS] = {"num_stable_steps", 0, NULL},
    [PML_KEYWORD_WARMUP_TYPE] = {"warmup_type", PMLI_RAMP_LINEAR, "linear cosine 1-sqrt"},
    [PML_KEYWORD_DECAY_TYPE] = {"decay_type", PMLI_RAMP_COSINE, "linear cosine 1-sqrt"},
    [PML_KEYWORD_MIN_LR_RATIO] = {"min_lr_ratio", 0, NULL},
    [PML_KEYWORD_MODE] = {"mode", 0, "min max"},
    [PML_KEYWORD_FACTOR] = {"factor", 0.1, NULL},
    [PML_KEYWORD_PATIENCE] = {"patience", 10, NULL},
    [PML_KEYWORD_THRESHOLD] = {"threshold", 1e-4, NULL},
    [PML_KEYWORD_THRESHOLD_MODE] = {"threshold_mode", 0, "rel abs"},
    [PML_KEYWORD_COOLDOWN] = {"cooldown", 0, NULL},
    [PML_KEYWORD_WARMUP] = {"warmup", 0, NULL},
    [PML_KEYWORD_MAX_LR] = {"max_lr", 1, NULL},
    [PML_KEYWORD_EPS] = {"eps", 1e-8, NULL},
    [PML_KEYWORD_RESET_START] = {"reset_start", 500, NULL},
    [PML_KEYWORD_SMOOTH] = {"smooth", 0, pmli_truth},
    [PML_KEYWORD_WINDOW_SIZE] = {"window_size", 50, NULL},
};

/* Where a type's default is not its keyword's. */
static double default_of(pml_schedule_type type, pml_keyword keyword)
{
    static const struct {
        pml_schedule_type type;
        pml_keyword keyword;
        double value;
    } others[] = {{PML_SCHEDULE_COSINE_WITH_RESTARTS, PML_KEYWORD_NUM_CYCLES, 1},
                  {PML_SCHEDULE_GREEDY, PML_KEYWORD_FACTOR, 0.95},
                  {PML_SCHEDULE_GREEDY, PML_KEYWORD_THRESHOLD, 1e-6},
                  {PML_SCHEDULE_GREEDY, PML_KEYWORD_THRESHOLD_MODE, 1},
                  {PML_SCHEDULE_GREEDY, PML_KEYWORD_MIN_LR, 1e-3}};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (others[i].type == type && others[i].keyword == keyword)
            return others[i].value;
    return pmli_keywords[keyword].value;
}

double pmli_keyword(const pml_schedule *s, pml_keyword keyword)
{
    return s->given >> keyword & 1 ? s->keyword[keyword] : default_of(s->type, keyword);
}

/* "a, b", or "none". */
static const char *show_keywords(pml_schedule_type type, char *out, size_t capacity)
{
    size_t used = 0;
    snprintf(out, capacity, "none");
    for (int k = 0; k < PML_KEYWORD_COUNT && used < capacity; k++)
        if (takes[type] >> k & 1)
            used += (size_t)snprintf(out + used, capacity - used, "%s%s", used > 0 ? ", " : "",
                                     pmli_keywords[k].name);
    return out;
}

pml_status pml_schedule_check(const pml_schedule *s, pml_error *err)
{
    char known[256];
    if ((unsigned)s->type >= PML_SCHEDULE_COUNT)
        return PML_FAIL(err, PML_INVALID, "lr_scheduler_type %d is not known", (int)s->type);
    for (int k = 0; k < PML_KEYWORD_COUNT; k++)
        if ((s->given & ~takes[s->type]) >> k & 1)
            return PML_FAIL(err, PML_INVALID,
                            "lr_scheduler_kwargs: %s has no keyword %s; it has %s", names[s->type],
                            pmli_keywords[k].name, show_keywords(s->type, known, sizeof known));
    bool minimum = s->type == PML_SCHEDULE_COSINE_WITH_MIN_LR ||
                   s->type == PML_SCHEDULE_COSINE_WARMUP_WITH_MIN_LR;
    uint32_t which = s->given & MINIMUM;
    if (minimum && (which == 0 || which == MINIMUM))
        return PML_FAIL(err, PML_INVALID,
                        "lr_scheduler_kwargs: %s needs one of min_lr and min_lr_rate",
                        names[s->type]);
    if (s->type == PML_SCHEDULE_POLYNOMIAL &&
        !(pmli_keyword(s, PML_KEYWORD_LR_END) < s->learning_rate))
        return PML_FAIL(err, PML_INVALID,
                        "lr_scheduler_kwargs: lr_end (%g) must be below learning_rate (%g)",
                        pmli_keyword(s, PML_KEYWORD_LR_END), s->learning_rate);
    if (s->type == PML_SCHEDULE_WARMUP_STABLE_DECAY && !(s->given & BIT(NUM_DECAY_STEPS)))
        return PML_FAIL(err, PML_INVALID,
                        "lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps");
    if (pml_schedule_measures(s) && !(pmli_keyword(s, PML_KEYWORD_FACTOR) < 1))
        return PML_FAIL(err, PML_INVALID, "lr_scheduler_kwargs: factor must be below 1, it is %g",
                        pmli_keyword(s, PML_KEYWORD_FACTOR));
    return PML_OK;
}

/* ---- factors ---- */

static double at_least_one(double n)
{
    return n > 1 ? n : 1.0;
}

static double wave(const pml_schedule *s, double progress)
{
    return 0.5 * (1.0 + cos(M_PI * pmli_keyword(s, PML_KEYWORD_NUM_CYCLES) * 2.0 * progress));
}

static double restarts(const pml_schedule *s, double progress)
{
    if (progress >= 1.0)
        return 0.0;
    return fmax(
        0.0,
        0.5 * (1.0 + cos(M_PI * fmod(pmli_keyword(s, PML_KEYWORD_NUM_CYCLES) * progress, 1.0))));
}

static double polynomial(const pml_schedule *s, double step, double total)
{
    double end = pmli_keyword(s, PML_KEYWORD_LR_END), warmup = (double)s->warmup_steps;
    if (step > total || total <= warmup) /* transformers divides by zero where they are equal */
        return end / s->learning_rate;
    double remaining = 1 - (step - warmup) / (total - warmup);
    double decay = (s->learning_rate - end) * pow(remaining, pmli_keyword(s, PML_KEYWORD_POWER));
    return (decay + end) / s->learning_rate;
}

static double inverse_sqrt(const pml_schedule *s, double step)
{
    double timescale = pmli_keyword(s, PML_KEYWORD_TIMESCALE), warmup = (double)s->warmup_steps;
    if (timescale == 0)
        timescale = warmup > 0 ? warmup : 10000;
    return 1.0 / sqrt((step + timescale - warmup) / timescale);
}

/* Of cosine_with_min_lr: what the wave falls to. */
static double floor_of(const pml_schedule *s)
{
    return s->given & BIT(MIN_LR) ? pmli_keyword(s, PML_KEYWORD_MIN_LR) / s->learning_rate
                                  : pmli_keyword(s, PML_KEYWORD_MIN_LR_RATE);
}

static double above_floor(double factor, double lowest)
{
    return fmax(0.0, factor * (1 - lowest) + lowest);
}

/* Its steps count from one, so that the first of a warmup is not lost. */
static double warmup_with_floor(const pml_schedule *s, double step, double total)
{
    double warmup = (double)s->warmup_steps;
    if (step < warmup && !(s->given & BIT(WARMUP_LR_RATE)))
        return (step + 1.0) / at_least_one(warmup);
    double first = pmli_keyword(s, PML_KEYWORD_WARMUP_LR_RATE);
    if (step < warmup)
        return first + (1.0 - first) * step / at_least_one(warmup - 1);
    return above_floor(wave(s, (step - warmup + 1.0) / at_least_one(total - warmup)), floor_of(s));
}

static double rising(double kind, double progress)
{
    if (kind == PMLI_RAMP_LINEAR)
        return progress;
    return kind == PMLI_RAMP_COSINE ? 0.5 * (1.0 - cos(M_PI * progress))
                                    : 1.0 - sqrt(1.0 - progress);
}

static double stable_decay(const pml_schedule *s, double step, double total)
{
    double warmup = (double)s->warmup_steps, decay = pmli_keyword(s, PML_KEYWORD_NUM_DECAY_STEPS);
    double lowest = pmli_keyword(s, PML_KEYWORD_MIN_LR_RATIO);
    double stable = s->given & BIT(NUM_STABLE_STEPS) ? pmli_keyword(s, PML_KEYWORD_NUM_STABLE_STEPS)
                                                     : total - warmup - decay;
    if (step < warmup)
        return above_floor(
            rising(pmli_keyword(s, PML_KEYWORD_WARMUP_TYPE), step / at_least_one(warmup)), lowest);
    if (step < warmup + stable)
        return 1.0;
    if (step >= warmup + stable + decay)
        return lowest;
    double progress = (step - warmup - stable) / at_least_one(decay);
    double kind = pmli_keyword(s, PML_KEYWORD_DECAY_TYPE);
    double factor = kind == PMLI_RAMP_LINEAR   ? 1.0 - progress
                    : kind == PMLI_RAMP_COSINE ? wave(s, progress)
                                               : 1.0 - sqrt(progress);
    return above_floor(factor, lowest);
}

double pml_schedule_factor(const pml_schedule *s, int64_t at, int64_t of)
{
    double step = (double)at, total = (double)of, warmup = (double)s->warmup_steps;
    double progress = (step - warmup) / at_least_one(total - warmup);
    if (s->type == PML_SCHEDULE_CONSTANT || pml_schedule_measures(s))
        return 1.0;
    if (s->type == PML_SCHEDULE_COSINE_WARMUP_WITH_MIN_LR)
        return warmup_with_floor(s, step, total);
    if (s->type == PML_SCHEDULE_WARMUP_STABLE_DECAY)
        return stable_decay(s, step, total);
    if (step < warmup)
        return step / at_least_one(warmup);
    switch (s->type) {
    case PML_SCHEDULE_LINEAR:
        return fmax(0.0, (total - step) / at_least_one(total - warmup));
    case PML_SCHEDULE_COSINE:
        return fmax(0.0, wave(s, progress));
    case PML_SCHEDULE_COSINE_WITH_RESTARTS:
        return restarts(s, progress);
    case PML_SCHEDULE_POLYNOMIAL:
        return polynomial(s, step, total);
    case PML_SCHEDULE_INVERSE_SQRT:
        return inverse_sqrt(s, step);
    case PML_SCHEDULE_COSINE_WITH_MIN_LR:
        return above_floor(wave(s, progress), floor_of(s));
    default: /* constant_with_warmup */
        return 1.0;
    }
}

/* ---- names ---- */

const char *pml_schedule_name(pml_schedule_type type)
{
    return (unsigned)type < PML_SCHEDULE_COUNT ? names[type] : "?";
}

/* Levenshtein's distance, both words shorter than LONGEST_NAME. */
static int distance(const char *a, const char *b)
{
    int row[LONGEST_NAME + 1];
    int n = (int)strlen(b);
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; a[i - 1] != '\0'; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int best = diagonal + (a[i - 1] != b[j - 1]);
            best = row[j] + 1 < best ? row[j] + 1 : best;
            best = row[j - 1] + 1 < best ? row[j - 1] + 1 : best;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[n];
}

pml_status pml_schedule_from_name(const char *name, pml_schedule_type *type, pml_error *err)
{
    int nearest = 0, least = LONGEST_NAME;
    char all[256] = "";
    for (int i = 0; i < PML_SCHEDULE_COUNT; i++) {
        int d = strlen(name) < LONGEST_NAME ? distance(name, names[i]) : LONGEST_NAME;
        if (d == 0) {
            *type = (pml_schedule_type)i;
            return PML_OK;
        }
        if (d < least) {
            least = d;
            nearest = i;
        }
        size_t n = strlen(all);
        snprintf(all + n, sizeof all - n, "%s%s", n > 0 ? ", " : "", names[i]);
    }
    return PML_FAIL(err, PML_INVALID,
                    "lr_scheduler_type '%.40s' is not known; did you mean '%s'? (%s)", name,
                    names[nearest], all);
}
