#include <sodium.h>
#include <zmq.h>

#include "pml/net/connection.h"

pml_status pml_keypair_new(pml_keypair *keys, pml_error *err)
{
    if (zmq_curve_keypair(keys->public_key, keys->secret_key) != 0)
        return PML_FAIL(err, PML_UNSUPPORTED, "libzmq cannot make keys: %s (built without CURVE?)",
                        zmq_strerror(zmq_errno()));
    return PML_OK;
}

void pml_keypair_forget(pml_keypair *keys)
{
    sodium_memzero(keys->secret_key, sizeof keys->secret_key);
}
