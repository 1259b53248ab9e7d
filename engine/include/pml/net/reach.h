/* Reach: who can connect to an address, told from the address alone. A firewall may let fewer in; a
 * forwarded port or a tunnel may let more in. */
#ifndef PML_NET_REACH_H
#define PML_NET_REACH_H

#include <stdbool.h>

#include "pml/base/error.h"

typedef enum pml_reach {
    PML_REACH_NOBODY = 0,
    PML_REACH_LOOPBACK, /* every user of this machine, and whoever has a tunnel to it */
    PML_REACH_PRIVATE,  /* the networks that this machine is in                       */
    PML_REACH_EVERYONE  /* whoever can route to it, the internet too                  */
} pml_reach;

const char *pml_reach_name(pml_reach reach); /* "loopback" */

typedef struct pml_address {
    char host[64]; /* without brackets; "*" and "0.0.0.0": every address */
    long port;     /* 0: any that is free */
    bool six;
    pml_reach reach;
} pml_address;

/* "tcp://ADDRESS:PORT", the address in numbers (a name could mean another one tomorrow) or *, the
 * port up to 65534 (the next one is needed too) or *. PML_INVALID says what is wrong. */
pml_status pml_reach_parse(const char *bind, pml_address *address, pml_error *err);

#endif
