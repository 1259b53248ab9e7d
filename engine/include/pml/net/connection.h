/* Keys, the runtime folder and the connection file: how the processes of one user find a
 * coordinator and prove who they are. */
#ifndef PML_NET_CONNECTION_H
#define PML_NET_CONNECTION_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>

#include "pml/base/error.h"
#include "pml/json/messages.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    PML_KEY_TEXT = 41,        /* a Curve25519 key in Z85, with its NUL                       */
    PML_ENDPOINT_MAX = 256,   /* "ipc://" and a path                                         */
    PML_SOCKET_PATH_MAX = 107 /* what a Unix socket address has room for                    */
};

typedef struct pml_keypair {
    char public_key[PML_KEY_TEXT], secret_key[PML_KEY_TEXT];
} pml_keypair;

/* A new key pair from the system's random numbers. */
pml_status pml_keypair_new(pml_keypair *keys, pml_error *err);
/* Overwrite the secret half. */
void pml_keypair_forget(pml_keypair *keys);

typedef struct pml_connection {
    int pid;            /* of the coordinator */
    char run[PATH_MAX]; /* run folder, absolute */
    char control[PML_ENDPOINT_MAX], telemetry[PML_ENDPOINT_MAX];
    char server_key[PML_KEY_TEXT];
    pml_role role;
    pml_keypair keys; /* of the client */
} pml_connection;

/* Where a coordinator that we started would keep the sockets of a run folder (which must exist):
 * $XDG_RUNTIME_DIR/pml/<16 hex>, or /tmp/pml-<uid>/<16 hex> where that is unset, not ours, or too
 * long for a socket path. The same answer for every path to the run folder, but not for every
 * environment: where one is, pml_runtime_find says. Nothing is created. */
pml_status pml_runtime_path(const char *run_folder, char *path, size_t capacity, pml_error *err);

/* Become the run's one coordinator: take its lock, remove what an earlier one left, make the
 * runtime folder (0700) and say in the lock where it is. *lock holds it until it is closed or the
 * process ends, however it ends; it is not inherited. PML_BUSY: somebody has it, or the log, which
 * whoever writes it has locked. PML_DENIED: a part of the folder's path is a link, somebody else's,
 * or open to others.
 *
 * The lock is `run_folder`/lock; where that file system has no locks, /tmp/pml-<uid>/<16 hex>/lock.
 */
pml_status pml_runtime_take(const char *run_folder, char *path, size_t capacity, int *lock,
                            pml_error *err);

/* The holder looks whether `lock` is still the file that it holds, and its runtime folder there,
 * and puts right what is not: cleaners of /tmp take the folder, a logout all of $XDG_RUNTIME_DIR,
 * hands the lock. `path` is where the folder is then; what was in it is the caller's to make again.
 * PML_BUSY: somebody else has taken the lock meanwhile. PML_DENIED: the folder is not ours alone
 * any more: nothing may be made in it. */
pml_status pml_runtime_keep(const char *run_folder, char *path, size_t capacity, int *lock,
                            pml_error *err);

/* The runtime folder of the run's coordinator, whatever environment it was started in.
 * PML_NOT_FOUND: there has never been one; PML_PEER: it has ended; PML_BUSY: it is just starting,
 * or on another machine; PML_DENIED: the folder that the lock names is not ours alone. */
pml_status pml_runtime_find(const char *run_folder, char *path, size_t capacity, pml_error *err);

/* Where device files are (pml/net/reserve.h), /tmp/pml-<uid>/devices; made, 0700. PML_DENIED as for
 * pml_runtime_take. */
pml_status pml_runtime_devices(char *path, size_t capacity, pml_error *err);

/* The holder's end: remove the runtime folder, then let go of the lock. */
void pml_runtime_leave(const char *path, int *lock);

/* Workers hold one byte each of `run_folder`/workers, so that a coordinator knows whether those of
 * the one before are still there. The lock lives in the open file *fd, which a worker inherits: it
 * ends with the last process that has it. PML_BUSY: there is a worker of that rank. */
pml_status pml_runtime_worker_lock(const char *run_folder, int rank, int *fd, pml_error *err);
/* In the worker: write our process id beside the lock. */
pml_status pml_runtime_worker_sign(int fd, int rank, pml_error *err);
/* Whether any worker is there: PML_OK, else PML_PEER; PML_NOT_FOUND where none has ever been. A
 * file system without locks cannot say: PML_PEER. PML_IO, PML_NO_MEMORY: it cannot be found out
 * now. */
pml_status pml_runtime_workers(const char *run_folder, pml_error *err);
/* SIGKILL to those that are there and run a program of the name that `program` (a path) has, by
 * process descriptor: a process id that has come to be somebody else's is not signalled, nor is our
 * own. PML_DENIED: the file is a hard link, which may be any file of ours; nobody is. PML_IO: one
 * of them could not be looked at for want of a descriptor or of memory, and lives. */
pml_status pml_runtime_workers_kill(const char *run_folder, const char *program, pml_error *err);
/* Whether one of them was stopped (SIGSTOP): it neither saves nor ends. */
bool pml_runtime_workers_stopped(const char *run_folder);

/* Write `folder`/connection.json: temporary name, 0600, O_EXCL|O_NOFOLLOW, fsync, rename. */
pml_status pml_connection_write(const char *folder, const pml_connection *connection,
                                pml_error *err);

/* Read a connection file. PML_NOT_FOUND: no coordinator has been there. PML_DENIED: not a regular
 * file of ours with mode 0600. PML_CORRUPT, PML_INVALID: its content. PML_PEER: its coordinator is
 * gone (left over), PML_BUSY: another is taking its place, which only a file of this machine (ipc)
 * can tell. */
pml_status pml_connection_read(const char *path, pml_connection *connection, pml_error *err);

/* The content of a connection file, however it came. Whether anybody is there is not asked. */
pml_status pml_connection_parse(const char *text, size_t size, pml_connection *connection,
                                pml_error *err);

/* The connection file of the run's coordinator; errors of pml_runtime_find and, but for
 * PML_NOT_FOUND, of pml_connection_read. PML_BUSY: it is a moment before the file is there;
 * PML_DENIED: it is another run's. */
pml_status pml_connection_find(const char *run_folder, char *path, size_t capacity, pml_error *err);

#ifdef __cplusplus
}
#endif
#endif
