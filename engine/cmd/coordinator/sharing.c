/* Keys that were given out, and the doors on a network. Neither is logged as a command nor survives
 * the coordinator: another one has other keys, and listens nowhere until it is asked to. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"

pml_message *sharing_record(const coordinator *c)
{
    if (c->reach == PML_REACH_NOBODY)
        return NULL;
    pml_message *m = pml_message_new(PML_RECORD_sharing);
    pml_message_set_string(m, "control", pml_hub_network(c->hub, PML_DOOR_CONTROL));
    pml_message_set_string(m, "telemetry", pml_hub_network(c->hub, PML_DOOR_TELEMETRY));
    pml_message_set_string(m, "reach", pml_reach_name(c->reach));
    pml_message_set_int(m, "keys", (int64_t)c->n_shared);
    return m;
}

static shared_key *find_key(coordinator *c, const char *public_key)
{
    for (size_t i = 0; i < c->n_shared; i++)
        if (strcmp(c->shared[i].public_key, public_key) == 0)
            return &c->shared[i];
    return NULL;
}

static pml_status let_in(coordinator *c, const pml_message *request, pml_error *err)
{
    const char *public_key = pml_message_string(request, "public_key");
    shared_key key = {.role = PML_ROLE_VIEW};
    if (strcmp(pml_message_string(request, "role"), "control") == 0)
        key.role = PML_ROLE_CONTROL;
    snprintf(key.public_key, sizeof key.public_key, "%s", public_key);
    snprintf(key.name, sizeof key.name, "%s", pml_message_string(request, "name"));
    const shared_key *known = find_key(c, public_key);
    if (known != NULL && known->role == key.role)
        return PML_OK;
    if (known == NULL && pml_hub_knows(c->hub, public_key))
        return PML_FAIL(err, PML_INVALID, "this key is the run's own; make a new one to share");
    shared_key *larger = reallocarray(c->shared, c->n_shared + 1, sizeof *larger);
    if (larger == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for one more key");
    c->shared = larger;
    pml_status status = pml_hub_allow(c->hub, public_key, key.role, -1, err);
    if (status == PML_OK)
        c->shared[c->n_shared++] = key;
    return status;
}

/* "tcp://0.0.0.0:4000 for a view key (class): everyone who can route to this machine can connect"
 */
static void log_shared(coordinator *c, const pml_message *request)
{
    static const char *const who[] = {
        [PML_REACH_LOOPBACK] = "every user of this machine can connect, and whoever has a tunnel",
        [PML_REACH_PRIVATE] = "everyone in this machine's own networks can connect",
        [PML_REACH_EVERYONE] = "everyone who can route to this machine can connect",
    };
    const char *name = pml_message_string(request, "name");
    emit_log(c, c->reach == PML_REACH_EVERYONE ? "warning" : "info", -1,
             "shared at %s with a %s key%s%s: %s, and gets in with the key only",
             pml_hub_network(c->hub, PML_DOOR_CONTROL), pml_message_string(request, "role"),
             name[0] == '\0' ? "" : " for ", name, who[c->reach]);
}

void handle_share(coordinator *c, const pml_inbound *in, const pml_message *request)
{
    pml_error err = PML_ERROR_INIT;
    const char *bind = pml_message_string(request, "bind"), *id = pml_message_string(request, "id");
    bool again = find_key(c, pml_message_string(request, "public_key")) != NULL;
    bool open = c->reach != PML_REACH_NOBODY, same = open && strcmp(bind, c->bound) == 0;
    pml_status status = same ? PML_OK : pml_hub_listen(c->hub, bind, &c->reach, &err);
    if (status == PML_OK)
        snprintf(c->bound, sizeof c->bound, "%s", bind);
    if (status == PML_OK)
        status = let_in(c, request, &err);
    if (status != PML_OK && !open && c->reach != PML_REACH_NOBODY) { /* as it was before */
        pml_hub_unlisten(c->hub);
        c->reach = PML_REACH_NOBODY;
    }
    if (status != PML_OK) {
        answer_error(c, in, id, &err);
        return;
    }
    if (!again)
        log_shared(c, request);
    pml_message *m = pml_message_new(PML_ANSWER_shared);
    pml_message_set_string(m, "id", id);
    pml_message_set_part(m, "sharing", sharing_record(c));
    pml_message_set_string(m, "server_key", pml_hub_server_key(c->hub));
    answer(c, in, m);
}

void handle_unshare(coordinator *c, const pml_inbound *in, const pml_message *request)
{
    pml_error err = PML_ERROR_INIT;
    const char *only = pml_message_string(request, "public_key"),
               *id = pml_message_string(request, "id");
    if (only[0] != '\0' && find_key(c, only) == NULL) {
        PML_FAIL(&err, PML_NOT_FOUND, "no such key was given out");
        answer_error(c, in, id, &err);
        return;
    }
    int64_t revoked = 0;
    for (size_t i = c->n_shared; i > 0; i--) {
        if (only[0] != '\0' && strcmp(c->shared[i - 1].public_key, only) != 0)
            continue;
        if (pml_hub_revoke(c->hub, c->shared[i - 1].public_key, &err) == PML_OK)
            revoked++;
        c->shared[i - 1] = c->shared[--c->n_shared];
    }
    if (only[0] == '\0' && c->reach != PML_REACH_NOBODY) {
        pml_hub_unlisten(c->hub);
        c->reach = PML_REACH_NOBODY;
    }
    if (revoked > 0)
        emit_log(c, "info", -1, "%lld shared key%s revoked%s", (long long)revoked,
                 revoked == 1 ? "" : "s",
                 c->reach == PML_REACH_NOBODY ? "; nothing listens on a network any more" : "");
    pml_message *m = pml_message_new(PML_ANSWER_unshared);
    pml_message_set_string(m, "id", id);
    pml_message_set_int(m, "keys", revoked);
    answer(c, in, m);
}
