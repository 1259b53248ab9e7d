/* Checkpoints that somebody has asked for, and waits for: applied is when one is begun, so until
 * the log says that it is on disk, or why not, the workers owe it (docs/decisions/0136). */
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"
#include "pml/base/log.h"
#include "pml/base/table.h"

bool owed_has(const coordinator *c, int64_t command)
{
    for (size_t i = 0; i < c->n_owed; i++)
        if (c->owed[i].command == command)
            return true;
    return false;
}

/* By their steps, as workers take them. Takes args. */
static void add(coordinator *c, int64_t command, int64_t step, pml_message *args)
{
    owed *larger = args == NULL
                       ? NULL
                       : pml_table_room(c->owed, &c->owed_capacity, c->n_owed + 1, sizeof *larger);
    if (larger == NULL) {
        pml_message_destroy(&args);
        pml_log(PML_LOG_ERROR, "no memory to keep that a checkpoint is owed: the run ends");
        c->broken = PML_NO_MEMORY;
        return;
    }
    c->owed = larger;
    size_t at = c->n_owed++;
    for (; at > 0 && c->owed[at - 1].step > step; at--)
        c->owed[at] = c->owed[at - 1];
    c->owed[at] = (owed){command, step, args};
}

/* It may be on disk before all workers have said that it has begun. */
static void take_applied(coordinator *c, const pml_message *event)
{
    int64_t command = pml_message_int(event, "command");
    if (strcmp(pml_message_string(event, "verb"), "checkpoint") != 0 || command <= c->saved_for)
        return;
    add(c, command, pml_message_int(event, "step"),
        pml_message_has(event, "args") ? pml_message_part(event, "args", 0)
                                       : pml_message_new(PML_REQUEST_checkpoint));
}

static void take_answer(coordinator *c, const pml_message *event)
{
    if (!pml_message_has(event, "command"))
        return;
    int64_t command = pml_message_int(event, "command");
    size_t n = 0;
    c->saved_for = command > c->saved_for ? command : c->saved_for;
    for (size_t i = 0; i < c->n_owed; i++) {
        if (c->owed[i].command == command)
            pml_message_destroy(&c->owed[i].args);
        else
            c->owed[n++] = c->owed[i];
    }
    c->n_owed = n;
}

static void forget_all(coordinator *c)
{
    while (c->n_owed > 0)
        pml_message_destroy(&c->owed[--c->n_owed].args);
}

void owed_recover(coordinator *c, const pml_message *event)
{
    switch (pml_message_type_of(event)) {
    case PML_EVENT_state: /* who went back gave them up; older logs do not say so of each */
        if (pml_message_bool(event, "rewound"))
            forget_all(c);
        break;
    case PML_EVENT_applied:
        take_applied(c, event);
        break;
    case PML_EVENT_checkpoint:
        take_answer(c, event);
        break;
    case PML_EVENT_log:
        if (strcmp(pml_message_string(event, "level"), "error") == 0)
            take_answer(c, event);
        break;
    default:
        break;
    }
}

void owed_give_up(coordinator *c, const char *reason)
{
    while (c->n_owed > 0) {
        int64_t command = c->owed[0].command;
        pml_message *event = pml_message_new(PML_EVENT_log);
        pml_message_set_string(event, "level", "error");
        pml_message_set_string(event, "message", reason);
        pml_message_set_int(event, "command", command);
        emit(c, event, false); /* by which it is owed no more */
        if (owed_has(c, command))
            return; /* the log is broken, and the run ends */
    }
}

void owed_free(coordinator *c)
{
    forget_all(c);
    free(c->owed);
}
