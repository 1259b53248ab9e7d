/* Keys, the runtime folder and the connection file: how the processes of one user find a
 * coordinator and prove who they are. */
#ifndef PML_NET_CONNECTION_H
#define PML_NET_CONNECTION_H

#include <limits.h>
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

/* The runtime folder of a run folder (which must exist): $XDG_RUNTIME_DIR/pml/<16 hex>, or
 * /tmp/pml-<uid>/<16 hex> where that is unset, not ours, or too long for a socket path. The same
 * answer for every path to the run folder. Nothing is created. */
pml_status pml_runtime_path(const char *run_folder, char *path, size_t capacity, pml_error *err);

/* Make it, 0700. PML_DENIED when a part of it is a link, somebody else's, or open to others. */
pml_status pml_runtime_create(const char *run_folder, char *path, size_t capacity, pml_error *err);

/* Take the coordinator's lock, `folder`/lock. *fd holds it until it is closed or the process ends,
 * however it ends; it is not inherited. PML_BUSY: somebody has it. */
pml_status pml_runtime_lock(const char *folder, int *fd, pml_error *err);

/* Whether somebody holds it: PML_OK, else PML_PEER; PML_NOT_FOUND where there is no lock file. */
pml_status pml_runtime_locked(const char *folder, pml_error *err);

/* Write `folder`/connection.json: temporary name, 0600, O_EXCL|O_NOFOLLOW, fsync, rename. */
pml_status pml_connection_write(const char *folder, const pml_connection *connection,
                                pml_error *err);

/* Read a connection file. PML_NOT_FOUND: no coordinator has been there. PML_DENIED: not a regular
 * file of ours with mode 0600. PML_CORRUPT, PML_INVALID: its content. PML_PEER: its coordinator's
 * process is gone (left over). */
pml_status pml_connection_read(const char *path, pml_connection *connection, pml_error *err);

#ifdef __cplusplus
}
#endif
#endif
