/* Timed choices kept on disk, so that the next process begins with them. Only what was timed is
 * here: a product that goes by another one's choice (near) has none of its own.
 *
 *   <folder>/products-<set>-<GPU>-<driver>-<cuBLASLt>.txt, a line a product:
 *
 *   <key: hex> <algorithm: hex> <FNV-1a of both: hex>
 *
 * Another set of candidates, GPU, driver or library is another file: what was fastest there says
 * nothing here, and an algorithm's bytes hold for one version of cuBLASLt. Lines are appended by
 * one write each, so that processes may share a file; a line that is not what was written is left
 * out with a word in the log. Nothing here ever fails a run: without the file products are timed
 * again. */
#ifndef PMLI_CUDA_CHOICES_H
#define PMLI_CUDA_CHOICES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    PMLI_CHOICE_KEY = 16, /* 64-bit words */
    PMLI_CHOICE_WORDS = 8,
    PMLI_CHOICE_SET = 2 /* 1: cuBLASLt's; 2: our own kernel beside them */
};

typedef struct pmli_choice {
    int64_t key[PMLI_CHOICE_KEY];
    uint64_t algorithm[PMLI_CHOICE_WORDS];
} pmli_choice;

typedef struct pmli_choices pmli_choices;

/* Read what is kept for this device; folder is made where it is not. Where there is none (NULL), or
 * can be no such file (a word in the log), choices are known to this process alone. NULL: no
 * memory. */
pmli_choices *pmli_choices_new(const char *folder, const char *device, int driver, size_t library);
void pmli_choices_destroy(pmli_choices **choices);

/* NULL: not known. Valid until the next keep. */
const uint64_t *pmli_choices_find(const pmli_choices *choices, const int64_t key[PMLI_CHOICE_KEY]);

/* Of those whose key has more than `key` in one place, at most `most`, and is the same in all
 * others, the one with the least there. NULL: there is none. Valid until the next keep. */
const uint64_t *pmli_choices_near(const pmli_choices *choices, const int64_t key[PMLI_CHOICE_KEY],
                                  int place, int64_t most);

/* From now on, and for later processes where there is a file. */
void pmli_choices_keep(pmli_choices *choices, const pmli_choice *choice);

#endif
