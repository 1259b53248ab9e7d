/* What a run's lock says of its holder beside the folder (runtime.c). */
#ifndef PML_NET_RUNTIME_H
#define PML_NET_RUNTIME_H

#include "pml/net/connection.h"

/* pml_runtime_find, and the process that holds the lock, by the number that it has for itself. */
pml_status pmli_runtime_holder(const char *run_folder, char *path, size_t capacity, int *pid,
                               pml_error *err);

#endif
