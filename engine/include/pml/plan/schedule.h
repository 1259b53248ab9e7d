/* Schedule of the learning rate, as transformers.get_scheduler has them by name and keyword. The
 * struct stands here with the rest of the configuration; what it does is in pml/train/schedule.h.
 */
#ifndef PML_PLAN_SCHEDULE_H
#define PML_PLAN_SCHEDULE_H

#include <stdint.h>

typedef enum pml_schedule_type {
    PML_SCHEDULE_CONSTANT = 0,
    PML_SCHEDULE_LINEAR,
    PML_SCHEDULE_COSINE,
    PML_SCHEDULE_COSINE_WITH_RESTARTS,
    PML_SCHEDULE_POLYNOMIAL,
    PML_SCHEDULE_CONSTANT_WITH_WARMUP,
    PML_SCHEDULE_INVERSE_SQRT,
    PML_SCHEDULE_REDUCE_LR_ON_PLATEAU, /* driven by evaluations, as is greedy */
    PML_SCHEDULE_COSINE_WITH_MIN_LR,
    PML_SCHEDULE_COSINE_WARMUP_WITH_MIN_LR,
    PML_SCHEDULE_WARMUP_STABLE_DECAY,
    PML_SCHEDULE_GREEDY,
    PML_SCHEDULE_COUNT
} pml_schedule_type;

/* lr_scheduler_kwargs. X(ENUM, name) */
#define PML_SCHEDULE_KEYWORDS(X)                                                                   \
    X(NUM_CYCLES, num_cycles)                                                                      \
    X(POWER, power)                                                                                \
    X(LR_END, lr_end)                                                                              \
    X(TIMESCALE, timescale)                                                                        \
    X(MIN_LR, min_lr)                                                                              \
    X(MIN_LR_RATE, min_lr_rate)                                                                    \
    X(WARMUP_LR_RATE, warmup_lr_rate)                                                              \
    X(NUM_DECAY_STEPS, num_decay_steps)                                                            \
    X(NUM_STABLE_STEPS, num_stable_steps)                                                          \
    X(WARMUP_TYPE, warmup_type)                                                                    \
    X(DECAY_TYPE, decay_type)                                                                      \
    X(MIN_LR_RATIO, min_lr_ratio)                                                                  \
    X(MODE, mode)                                                                                  \
    X(FACTOR, factor)                                                                              \
    X(PATIENCE, patience)                                                                          \
    X(THRESHOLD, threshold)                                                                        \
    X(THRESHOLD_MODE, threshold_mode)                                                              \
    X(COOLDOWN, cooldown)                                                                          \
    X(WARMUP, warmup)                                                                              \
    X(MAX_LR, max_lr)                                                                              \
    X(EPS, eps)                                                                                    \
    X(RESET_START, reset_start)                                                                    \
    X(SMOOTH, smooth)                                                                              \
    X(WINDOW_SIZE, window_size)

typedef enum pml_keyword {
#define PML_KEYWORD_ENUM(NAME, name) PML_KEYWORD_##NAME,
    PML_SCHEDULE_KEYWORDS(PML_KEYWORD_ENUM) PML_KEYWORD_COUNT
#undef PML_KEYWORD_ENUM
} pml_keyword;

typedef struct pml_schedule {
    pml_schedule_type type;
    int64_t warmup_steps;
    double
        learning_rate; /* that it begins from: lr_end, min_lr and max_lr are rates, not factors */
    uint32_t given;    /* keywords, as bits; the others have their default */
    double keyword[PML_KEYWORD_COUNT]; /* a word as its number in its list */
} pml_schedule;

enum { PML_SCHEDULE_WINDOW = 512 /* the largest window_size */ };

/* How a schedule that evaluations drive stands; factor is 1 for the others. */
typedef struct pml_schedule_state {
    double factor; /* current rate / peak */
    double best;
    int64_t measured, bad, good, cooldown, warmup, reset; /* evaluations */
    double window[PML_SCHEDULE_WINDOW], sum; /* of greedy that is smooth: the last losses, oldest */
    int32_t n_window;                        /* first, and their sum as it came about */
} pml_schedule_state;

#endif
