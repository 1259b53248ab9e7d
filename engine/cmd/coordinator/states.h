/* States and commands: the table of states.def as data. */
#ifndef PML_COORDINATOR_STATES_H
#define PML_COORDINATOR_STATES_H

#include "pml/json/messages.h"

typedef enum situation {
#define ROW(name, state, when, pause, resume, stop, set, checkpoint, evaluate, sample) IN_##name,
#include "states.def"
#undef ROW
    SITUATIONS
} situation;

typedef enum action { ACT_QUEUE = 0, ACT_APPLY, ACT_END, ACT_RELEASE, ACT_REFUSE } action;

enum { VERBS = 7 };

/* The verbs in the table's order. */
extern const pml_message_type states_verbs[VERBS];

/* What becomes of a command. */
action states_action(situation in, pml_message_type verb);
const char *states_name(situation in); /* as clients see it */

/* docs/states.md; malloc'ed, NULL without memory. */
char *states_document(void);

#endif
