/* Bytes of an open file, read to where they are wanted.
 *
 * A mapping would do the same without a copy, but its pages count as the process's memory, cost a
 * fault each, and a file that is cut short or a disk that fails kills whoever reads them (SIGBUS).
 * Here all three are an error that names the file and the byte. */
#ifndef PML_BASE_FILE_AT_H
#define PML_BASE_FILE_AT_H

#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

/* A place in a file. The descriptor is a regular file's, open for reading; it and the path, which
 * is for messages, are the owner's and outlive whoever is given this. */
typedef struct pml_file_at {
    int fd;
    uint64_t at; /* bytes from the file's begin */
    const char *path;
} pml_file_at;

/* Read `bytes` from there. Moves no file position: any number of threads may read one descriptor.
 * PML_CORRUPT: the file ends before; PML_IO: the system's reason. */
pml_status pml_file_at_read(const pml_file_at *from, void *to, size_t bytes, pml_error *err);

#endif
