/* Learning-rate factors as transformers.get_scheduler defines them (optimization.py: the lambdas of
 * get_constant_schedule, get_linear_schedule_with_warmup, get_cosine_schedule_with_warmup with half
 * a cosine, get_constant_schedule_with_warmup). */
#include <math.h>
#include <string.h>

#include "pml/train/config.h"

static const char *const names[] = {"constant", "linear", "cosine", "constant_with_warmup"};
enum { SCHEDULES = sizeof names / sizeof *names, LONGEST_NAME = 32 };

static double at_least_one(int64_t n)
{
    return n > 1 ? (double)n : 1.0;
}

double pml_schedule_factor(pml_schedule schedule, int64_t step, int64_t warmup, int64_t total)
{
    if (schedule == PML_SCHEDULE_CONSTANT)
        return 1.0;
    if (step < warmup)
        return (double)step / at_least_one(warmup);
    double rest = at_least_one(total - warmup);
    if (schedule == PML_SCHEDULE_LINEAR)
        return fmax(0.0, (double)(total - step) / rest);
    if (schedule == PML_SCHEDULE_COSINE)
        return fmax(0.0, 0.5 * (1.0 + cos(M_PI * (double)(step - warmup) / rest)));
    return 1.0;
}

const char *pml_schedule_name(pml_schedule schedule)
{
    return (unsigned)schedule < SCHEDULES ? names[schedule] : "?";
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

pml_status pml_schedule_from_name(const char *name, pml_schedule *schedule, pml_error *err)
{
    int nearest = 0, least = LONGEST_NAME;
    for (int i = 0; i < SCHEDULES; i++) {
        int d = strlen(name) < LONGEST_NAME ? distance(name, names[i]) : LONGEST_NAME;
        if (d == 0) {
            *schedule = (pml_schedule)i;
            return PML_OK;
        }
        if (d < least) {
            least = d;
            nearest = i;
        }
    }
    return PML_FAIL(err, PML_INVALID,
                    "lr_scheduler_type '%.40s' is not known; did you mean '%s'? "
                    "(constant, linear, cosine, constant_with_warmup)",
                    name, names[nearest]);
}
