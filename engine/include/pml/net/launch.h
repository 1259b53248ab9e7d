/* Launch: start a coordinator that outlives us. */
#ifndef PML_NET_LAUNCH_H
#define PML_NET_LAUNCH_H

#include <stdbool.h>
#include <stddef.h>

#include "pml/base/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pml_launch {
    const char *program;    /* pml-coordinator, absolute; pml-worker lies beside it               */
    const char *run_folder; /* with its run.json                                                  */
    const char *resume;     /* NULL: a new run; "": from the newest whole checkpoint; else this
                               one, by its folder's name ("step-000412")                          */
    int recover;            /* in the place of one that died: from the newest whole checkpoint,
                               and only as often as the run allows                                */
    int accept_changes;     /* go on though something that decides bits has changed               */
    const char *const *prepare; /* what makes the token shards where they are missing, NULL-ended;
                                   NULL: nothing. Never read from the run folder, which may be
                                   somebody else's                                            */
    int timeout_ms; /* without a sign of life, until the sockets are there; 0 = 20,000    */
    bool (*enough)(void *asked); /* asked ten times a second: whoever waits wants no more (Ctrl-C);
                                    NULL: waits to the end                                     */
    void *asked;                 /* what it is given                                           */
} pml_launch;

/* Start `program` in its own session, with closed descriptors, standard input /dev/null, output and
 * errors in log/coordinator.log; in its own systemd scope where the user has a manager (so that a
 * logout does not take it along), else by a double fork. Returns when its sockets are there:
 * `connection_file` is the path to give to pml_client_open.
 * An error of its start comes back with its own code and words; PML_BUSY means that the run has a
 * coordinator already (connection_file is filled in then too: attach). Blocks up to timeout_ms,
 * and longer while the coordinator shows that it comes on (hashing a checkpoint);
 * release the GIL. PML_TIMEOUT also where `enough` said so: the coordinator starts nevertheless.
 * Safe in a process with threads. */
pml_status pml_launch_coordinator(const pml_launch *launch, char *connection_file, size_t capacity,
                                  pml_error *err);

#ifdef __cplusplus
}
#endif
#endif
