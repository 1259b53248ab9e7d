/* Keys that were given out, and the doors on a network. Neither is logged as a command nor survives
 * the coordinator: another one has other keys, and listens nowhere until it is asked to. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator.h"
#include "pml/base/clock.h"

/* A stranger who knocks all day must not fill the log. */
static const double told_again = 60; /* seconds */
/* A client of ours that leaves before it is in breaks a handshake off, too: so few are no news. */
enum { HANDSHAKES_TOLD = 20 };

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
    shared_key key = {.role = PML_ROLE_VIEW, .tag = c->next_tag};
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
    pml_status status = pml_hub_allow(c->hub, public_key, key.role, key.tag, err);
    if (status == PML_OK) {
        c->shared[c->n_shared++] = key;
        c->next_tag++;
    }
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

/* ---- what is turned away ---- */

void sharing_crowded(coordinator *c, const pml_inbound *in, pml_error *err)
{
    const pml_crowd *crowd = &in->crowd;
    double now = pml_clock_monotonic();
    PML_FAIL(err, PML_BUSY, "%d viewers are connected%s, as many as there may be: %s",
             crowd->viewers, crowd->any_key ? "" : " with this key",
             crowd->any_key ? "attach again when one of them has gone"
                            : "close one of them, or ask whoever shared the run for another key");
    for (size_t i = 0; i < c->n_shared; i++) {
        shared_key *key = &c->shared[i];
        if (key->tag != in->tag || (key->crowded_at > 0 && now - key->crowded_at < told_again))
            continue;
        key->crowded_at = now;
        emit_log(
            c, "warning", -1,
            "a viewer with the key%s%s was turned away: %d viewers are connected%s, as many as "
            "there may be; %s",
            key->name[0] == '\0' ? "" : " for ", key->name, crowd->viewers,
            crowd->any_key ? "" : " with it",
            crowd->any_key ? "who is not needed can be closed, or a key be revoked"
                           : "another key that is shared lets in more");
    }
}

/* Each kind with its number, if there were any. */
static size_t put_count(char *words, size_t n, size_t capacity, int64_t count, const char *of)
{
    if (count <= 0 || n >= capacity)
        return n;
    return n + (size_t)snprintf(words + n, capacity - n, "%s%lld %s", n == 0 ? "" : ", ",
                                (long long)count, of);
}

void sharing_tick(coordinator *c, double now)
{
    doorbook *book = &c->turned_away;
    pml_refusals is = pml_hub_refusals(c->hub), was = book->told;
    int64_t strangers = is.connections - is.viewers - (was.connections - was.viewers);
    int64_t handshakes = is.handshakes - was.handshakes;
    char words[400] = "";
    if (c->waiting || (book->at > 0 && now - book->at < told_again))
        return;
    size_t n = put_count(words, 0, sizeof words, is.keys - was.keys,
                         "with a key that is not, or no longer, on the list");
    if (handshakes >= HANDSHAKES_TOLD)
        n = put_count(words, n, sizeof words, handshakes,
                      "that said nothing, or did not speak the protocol");
    n = put_count(words, n, sizeof words, strangers, "because there were too many");
    n = put_count(words, n, sizeof words, is.turned_out - was.turned_out,
                  "because of what came from there");
    if (n == 0)
        return;
    book->told = is;
    book->at = now;
    emit_log(c, "warning", -1, "connections turned away at the doors: %s", words);
}
