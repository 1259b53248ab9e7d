/* Inside of schedules: their keywords. */
#ifndef PML_TRAIN_SCHEDULE_IMPL_H
#define PML_TRAIN_SCHEDULE_IMPL_H

#include "pml/train/schedule.h"

typedef struct pmli_keyword_info {
    const char *name;
    double value;      /* the default of most types */
    const char *words; /* NULL: a number; else the words it may be, by number */
} pmli_keyword_info;

/* The words of a keyword that is true or false. */
extern const char pmli_truth[];
extern const pmli_keyword_info pmli_keywords[PML_KEYWORD_COUNT];

/* Of warmup_type and decay_type. */
enum { PMLI_RAMP_LINEAR = 0, PMLI_RAMP_COSINE, PMLI_RAMP_ONE_MINUS_SQRT };

/* As given, else the type's default. */
double pmli_keyword(const pml_schedule *s, pml_keyword keyword);

#endif
