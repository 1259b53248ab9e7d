/* The answer to "may this key come in?": a thread behind libzmq's inproc://zeromq.zap.01 (ZAP, RFC
 * 27). One for each context; it must be there before the sockets. */
#ifndef PML_NET_ZAP_H
#define PML_NET_ZAP_H

#include "pml/net/connection.h"

typedef struct pmli_zap pmli_zap;

/* Domains of the sockets, and the roles they let in. */
#define PMLI_ZAP_CLIENTS "clients" /* control, view */
#define PMLI_ZAP_WORKERS "workers" /* worker        */

/* Answers libzmq's questions who may come in, on a thread of its own, for all sockets of context,
 * which outlives it. PML_NO_MEMORY or PML_INTERNAL where its thread or socket cannot be had. */
pml_status pmli_zap_new(void *context, pmli_zap **zap, pml_error *err);
void pmli_zap_destroy(pmli_zap **zap);

/* Thread-safe. PML_INVALID: not a key, or on the list for another role; PML_BUSY: the list is full.
 */
pml_status pmli_zap_allow(pmli_zap *zap, const char *public_key, pml_role role, int tag,
                          pml_error *err);
/* Take a key off the list; PML_NOT_FOUND. */
pml_status pmli_zap_revoke(pmli_zap *zap, const char *public_key, pml_error *err);
/* The role of a key in Z85; PML_ROLE_NOBODY when it is not on the list. */
pml_role pmli_zap_role(pmli_zap *zap, const char *public_key, int *tag);

#endif
