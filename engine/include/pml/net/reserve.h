/* Reservation: device memory that a run has taken, or is about to take, known to all other runs of
 * this user before any of it is allocated.
 *
 *   /tmp/pml-<uid>/devices/<uuid>, of which only bytes are locked (open file description locks):
 *
 *      text  1 KiB a holder: "MIB PID RUN FOLDER", true while its byte of `named` is locked
 *      lock   turn      one byte: who asks for free memory, plans and reserves
 *             holders   a byte each: whose text it is
 *             named     a byte each, once the text is written
 *             reserved  a byte a MiB of the device, held by the run
 *             taken     the same bytes, once they are allocated, held by the process
 *
 * A byte has one holder, so the runs of a device never reserve more than it has. What is reserved
 * and not taken is missing from what others may plan with, though the driver calls it free:
 *
 *      what I may plan with  =  the driver's free memory - (others' reserved - others' taken)
 *
 * Two descriptions hold them. `held` has the reservation; the coordinator gets a copy and gives it
 * to the worker that replaces this one. `own` has the turn and what is taken, and ends with this
 * process: so memory of a worker that was killed is free to the driver, and reserved for its
 * successor. When the last process that has a description ends, however it ends, the kernel takes
 * its locks away. */
#ifndef PML_NET_RESERVE_H
#define PML_NET_RESERVE_H

#include <stdbool.h>
#include <stddef.h>

#include "pml/base/error.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PML_HOLDERS_MAX = 256,    /* that have a name; more may reserve */
    PML_HOLDER_RUN_MAX = 960, /* bytes of a run folder's name, with its NUL */
    PML_DEVICE_NAME_MAX = 64  /* of a device file's name */
};

typedef struct pml_reservation pml_reservation;

typedef struct pml_reservation_options {
    const char *folder; /* of device files, 0700 and ours */
    const char *device; /* its uuid: letters, digits and '-' */
    const char *run;    /* run folder, for who asks who has the memory */
    size_t total;       /* bytes of the device */
    int inherited;      /* descriptor of the reservation to go on with, which is taken over in any
                           case; -1, or what is no description of this device's file: a new one */
} pml_reservation_options;

/* Bytes, whole MiB. */
typedef struct pml_reserved {
    size_t ours;
    size_t others;  /* reserved by others */
    size_t pending; /* of it: not allocated, so that the driver calls it free */
} pml_reserved;

typedef struct pml_holder {
    size_t bytes;
    int pid;
    char run[PML_HOLDER_RUN_MAX];
} pml_holder;

/* Reserves nothing yet, beyond what was inherited. PML_UNSUPPORTED: the file system has no such
 * locks; PML_DENIED: the file is a link, or not ours alone; PML_IO: the system's reason. With any
 * of them there is no reservation, and the device can be used as it could without. */
pml_status pml_reservation_new(const pml_reservation_options *options, pml_reservation **r,
                               pml_error *err);
/* What it reserves stays for as long as another process has its descriptor. */
void pml_reservation_destroy(pml_reservation **r);

/* Of `held`: for who shall hold it, too. */
int pml_reservation_descriptor(const pml_reservation *r);
/* Whether that is the one which was inherited: whoever passed it on has it still. */
bool pml_reservation_inherited(const pml_reservation *r);

/* Our turn: nobody else asks and reserves until it ends. Waits at most so many seconds for one who
 * has it, those in which we were stopped ourselves not counted, and calls `tick` (may be NULL)
 * meanwhile. PML_BUSY names who has it. */
pml_status pml_reservation_turn(pml_reservation *r, double seconds, void (*tick)(void *user),
                                void *user, pml_error *err);
void pml_reservation_turn_end(pml_reservation *r);

/* For who has the turn, and asks the driver between its begin and read: so much of what others have
 * reserved was pending at one of the two. resize: PML_NO_MEMORY, with nothing changed, where the
 * device has not so much left that nobody has reserved. take: so many of ours are allocated now;
 * what was said before counts no more. It may be called at any time. */
pml_status pml_reservation_read(pml_reservation *r, pml_reserved *now, pml_error *err);
pml_status pml_reservation_resize(pml_reservation *r, size_t bytes, pml_error *err);
pml_status pml_reservation_take(pml_reservation *r, size_t bytes, pml_error *err);

/* Why others cannot be told who we are, though the reservation counts (a full disk); "": they can.
 */
const char *pml_reservation_unnamed(const pml_reservation *r);

/* Those that have reserved memory of a device, without being one of them and without a turn: at
 * most `capacity` of `n`. A device without a file has none. sum (may be NULL): ours is 0. */
pml_status pml_reservation_look(const char *folder, const char *device, pml_holder *holders,
                                size_t capacity, size_t *n, pml_reserved *sum, pml_error *err);
/* Those of other runs, as words: "the run a (process 12) has reserved 30.0 GiB, …"; "" when there
 * are none. */
void pml_reservation_words(const pml_reservation *r, char *words, size_t capacity);

/* Tell a cleaner of old files that it is in use. */
void pml_reservation_touch(int descriptor);

#ifdef __cplusplus
}
#endif
#endif
