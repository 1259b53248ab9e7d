/* Locked bytes of a device file, and its text: what reserve.c counts and changes. */
#ifndef PMLI_RESERVE_BYTES_H
#define PMLI_RESERVE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "pml/net/reserve.h"

/* Where regions of bytes begin, beyond any text. */
#define PMLI_TURN_AT     ((off_t)1 << 30)
#define PMLI_HOLDERS_AT  ((off_t)1 << 31)
#define PMLI_NAMED_AT    ((off_t)3 << 30)
#define PMLI_RESERVED_AT ((off_t)1 << 32)
#define PMLI_TAKEN_AT    ((off_t)1 << 33)

enum { PMLI_SPAN = 1 << 24 }; /* MiB that a region has: 16 TiB of memory */

/* Bytes [from, to) of a region that others than fd's description have locked: `each` is called
 * for each stretch, in no order. */
typedef void (*pmli_stretch)(void *user, size_t from, size_t to);
pml_status pmli_bytes_walk(int fd, off_t region, size_t from, size_t to, pmli_stretch each,
                           void *user, pml_error *err);
/* How many of them. */
pml_status pmli_bytes_count(int fd, off_t region, size_t *n, pml_error *err);

/* Lock, or unlock, without waiting. PML_BUSY: somebody has one of them. PML_UNSUPPORTED: there are
 * no such locks here. */
pml_status pmli_bytes_set(int fd, off_t region, size_t from, size_t to, bool locked,
                          pml_error *err);

/* The text of a place (holders' places and, one more, that of whose turn it is), for who has locked
 * the place itself. Only a text whose byte of PMLI_NAMED_AT is locked is true: what somebody who is
 * gone has left, or what a full disk did not take, is nobody's name. */
pml_status pmli_name_set(int fd, size_t place, size_t mib, int pid, const char *run,
                         pml_error *err);
void pmli_name_clear(int fd, size_t place);
/* False: nobody else has a name there. */
bool pmli_name_read(int fd, size_t place, pml_holder *holder);

#endif
