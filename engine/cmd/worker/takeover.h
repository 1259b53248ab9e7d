/* Takeover: a worker whose coordinator is gone starts another one. */
#ifndef PML_WORKER_TAKEOVER_H
#define PML_WORKER_TAKEOVER_H

#include <sys/types.h>

#include "pml/json/messages.h"

/* start: our start message, which names the program; dead: the process that sent it. Every worker
 * that ends tries; the run's lock lets one of the new coordinators through, and that one waits
 * until the last of us is gone. */
void take_over(const pml_message *start, pid_t dead);

#endif
