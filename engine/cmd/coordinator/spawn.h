/* A child process with exactly the descriptors it is given. */
#ifndef PML_COORDINATOR_SPAWN_H
#define PML_COORDINATOR_SPAWN_H

#include <stdbool.h>
#include <sys/types.h>

#include "pml/base/error.h"

enum { SPAWN_FDS = 6, SPAWN_END = -1, SPAWN_NULL = -2 };

typedef struct spawn {
    const char *const *argv; /* NULL at the end; argv[0] is the program, looked up in PATH */
    const char *log_path;    /* stderr, appended; 0600 */
    int out;                 /* stdout; -1: like stderr */
    int fds[SPAWN_FDS];      /* become 3, 4, …; SPAWN_NULL: /dev/null; SPAWN_END ends the list */
    bool dies_with_us;       /* SIGKILL when the coordinator is gone */
    pml_error unlogged;      /* out: why log_path is not open, whose words are lost then */
} spawn;

/* A log that cannot be opened (a full disk) does not keep a process from starting. */
pml_status spawn_process(spawn *s, pid_t *pid, pml_error *err);

#endif
