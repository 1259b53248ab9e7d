/* Recovery of the log: which of its bytes are whole lines, and what they tell. */
#ifndef PML_COORDINATOR_EVENTLOG_RECOVER_H
#define PML_COORDINATOR_EVENTLOG_RECOVER_H

#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"
#include "pml/json/messages.h"

typedef struct recovered {
    const char *path; /* for messages */
    void (*seen)(void *user, const pml_message *event);
    pml_status (*line)(void *user, int64_t end, pml_error *err); /* a whole line ends there */
    void *user;                                                  /* of line */
    void *seen_user;
    int64_t timeline;      /* of the last event, -1: none */
    int64_t step;          /* of the last step, 0: none */
    int64_t step_timeline; /* which that step is of */
    int64_t lines;         /* whole ones so far: the next text goes on behind them */
} recovered;

/* *whole: bytes of whole lines, from the beginning of the text. What follows them is torn, as
 * eventlog_open says, where the text ends with the file. Where it does not, it is a piece of more
 * than PML_LOG_TORN_MAX bytes: what follows is to be looked at again with what lies behind it, as
 * the beginning of the next piece; and if it is the beginning already, its line has no end. */
pml_status eventlog_recover(recovered *r, const char *text, size_t size, size_t *whole,
                            pml_error *err);

#endif
