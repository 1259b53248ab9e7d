#include "zap.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <zmq.h>

#include "pml/base/table.h"

enum { KEY_BYTES = 32, FRAME_MAX = 256, REQUEST_FRAMES = 7, KEYS_MAX = 2048 };

typedef struct entry {
    uint8_t key[KEY_BYTES];
    pml_role role;
    int tag;
} entry;

struct pmli_zap {
    void *socket;
    int stop; /* eventfd */
    pthread_t thread;
    bool running;
    pthread_mutex_t mutex;
    entry *entries;
    size_t n, capacity;
};

/* The frames of one request: version, request id, domain, address, identity, mechanism, key. */
typedef struct request {
    size_t n;
    size_t size[REQUEST_FRAMES];
    uint8_t frame[REQUEST_FRAMES][FRAME_MAX];
} request;

static bool frame_is(const request *r, int index, const char *text)
{
    return r->size[index] == strlen(text) && memcmp(r->frame[index], text, r->size[index]) == 0;
}

static const entry *find(const pmli_zap *zap, const uint8_t *key)
{
    for (size_t i = 0; i < zap->n; i++)
        if (memcmp(zap->entries[i].key, key, KEY_BYTES) == 0)
            return &zap->entries[i];
    return NULL;
}

static bool allowed(pmli_zap *zap, const request *r)
{
    if (r->n != REQUEST_FRAMES || !frame_is(r, 0, "1.0") || !frame_is(r, 5, "CURVE") ||
        r->size[6] != KEY_BYTES)
        return false;
    unsigned roles = frame_is(r, 2, PMLI_ZAP_CLIENTS)   ? PML_ROLE_CONTROL | PML_ROLE_VIEW
                     : frame_is(r, 2, PMLI_ZAP_WORKERS) ? PML_ROLE_WORKER
                                                        : 0;
    pthread_mutex_lock(&zap->mutex);
    const entry *e = find(zap, r->frame[6]);
    bool yes = e != NULL && (e->role & roles) != 0;
    pthread_mutex_unlock(&zap->mutex);
    return yes;
}

/* All frames of one message, those too many or too long cut; false when there is none. */
static bool read_request(void *socket, request *r)
{
    memset(r, 0, sizeof *r);
    for (;;) {
        uint8_t spare[FRAME_MAX];
        uint8_t *into = r->n < REQUEST_FRAMES ? r->frame[r->n] : spare;
        int size = zmq_recv(socket, into, FRAME_MAX, ZMQ_DONTWAIT);
        if (size < 0)
            return false;
        if (r->n < REQUEST_FRAMES)
            r->size[r->n] = size > FRAME_MAX ? FRAME_MAX : (size_t)size;
        r->n++;
        int more = 0;
        size_t length = sizeof more;
        if (zmq_getsockopt(socket, ZMQ_RCVMORE, &more, &length) != 0 || !more)
            return true;
    }
}

static void answer(void *socket, const request *r, bool yes)
{
    char user[PML_KEY_TEXT] = "";
    if (yes)
        zmq_z85_encode(user, r->frame[6], KEY_BYTES);
    const char *code = yes ? "200" : "400", *words = yes ? "OK" : "this key is not on the list";
    zmq_send(socket, "1.0", 3, ZMQ_SNDMORE);
    zmq_send(socket, r->frame[1], r->size[1], ZMQ_SNDMORE);
    zmq_send(socket, code, 3, ZMQ_SNDMORE);
    zmq_send(socket, words, strlen(words), ZMQ_SNDMORE);
    zmq_send(socket, user, strlen(user), ZMQ_SNDMORE);
    zmq_send(socket, "", 0, 0);
}

static void *serve(void *argument)
{
    pmli_zap *zap = argument;
    for (;;) {
        zmq_pollitem_t items[] = {{zap->socket, 0, ZMQ_POLLIN, 0},
                                  {NULL, zap->stop, ZMQ_POLLIN, 0}};
        if (zmq_poll(items, 2, -1) < 0 && zmq_errno() != EINTR)
            break;
        if (items[1].revents != 0)
            break;
        request r;
        while (read_request(zap->socket, &r))
            answer(zap->socket, &r, allowed(zap, &r));
    }
    return NULL;
}

/* Signals are the program's business, not this thread's. */
static int start_quiet(pthread_t *thread, void *(*run)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

pml_status pmli_zap_new(void *context, pmli_zap **out, pml_error *err)
{
    pml_status status = PML_OK;
    *out = NULL;
    pmli_zap *zap = calloc(1, sizeof *zap);
    if (zap == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the list of keys");
    pthread_mutex_init(&zap->mutex, NULL);
    zap->stop = eventfd(0, EFD_CLOEXEC);
    zap->socket = zmq_socket(context, ZMQ_REP);
    int linger = 0;
    if (zap->stop < 0 || zap->socket == NULL ||
        zmq_setsockopt(zap->socket, ZMQ_LINGER, &linger, sizeof linger) != 0 ||
        zmq_bind(zap->socket, "inproc://zeromq.zap.01") != 0)
        status =
            PML_FAIL(err, PML_INTERNAL, "cannot guard the sockets: %s", zmq_strerror(zmq_errno()));
    else if (start_quiet(&zap->thread, serve, zap) != 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "cannot start the thread that guards the sockets");
    else
        zap->running = true;
    if (status != PML_OK)
        pmli_zap_destroy(&zap);
    *out = zap;
    return status;
}

void pmli_zap_destroy(pmli_zap **out)
{
    pmli_zap *zap = *out;
    if (zap == NULL)
        return;
    *out = NULL;
    if (zap->running) {
        eventfd_write(zap->stop, 1);
        pthread_join(zap->thread, NULL);
    }
    if (zap->socket != NULL)
        zmq_close(zap->socket);
    if (zap->stop >= 0)
        close(zap->stop);
    pthread_mutex_destroy(&zap->mutex);
    free(zap->entries);
    free(zap);
}

pml_status pmli_zap_allow(pmli_zap *zap, const char *public_key, pml_role role, int tag,
                          pml_error *err)
{
    entry e = {.role = role, .tag = tag};
    if (strlen(public_key) != PML_KEY_TEXT - 1 || zmq_z85_decode(e.key, public_key) == NULL)
        return PML_FAIL(err, PML_INVALID, "a key has %d characters of Z85", PML_KEY_TEXT - 1);
    pml_status status = PML_OK;
    pthread_mutex_lock(&zap->mutex);
    const entry *known = find(zap, e.key);
    if (known != NULL && (known->role != role || known->tag != tag))
        status = PML_FAIL(err, PML_INVALID, "this key is on the list, for another role");
    else if (known == NULL && zap->n == KEYS_MAX)
        status = PML_FAIL(err, PML_BUSY, "there are %d keys already: revoke some", KEYS_MAX);
    if (status == PML_OK && known == NULL) {
        entry *larger = pml_table_room(zap->entries, &zap->capacity, zap->n + 1, sizeof *larger);
        if (larger != NULL) {
            zap->entries = larger;
            zap->entries[zap->n++] = e;
        } else {
            status = PML_FAIL(err, PML_NO_MEMORY, "no memory for one more key");
        }
    }
    pthread_mutex_unlock(&zap->mutex);
    return status;
}

pml_status pmli_zap_revoke(pmli_zap *zap, const char *public_key, pml_error *err)
{
    uint8_t key[KEY_BYTES];
    if (strlen(public_key) != PML_KEY_TEXT - 1 || zmq_z85_decode(key, public_key) == NULL)
        return PML_FAIL(err, PML_INVALID, "a key has %d characters of Z85", PML_KEY_TEXT - 1);
    pthread_mutex_lock(&zap->mutex);
    const entry *e = find(zap, key);
    if (e != NULL)
        zap->entries[e - zap->entries] = zap->entries[--zap->n];
    pthread_mutex_unlock(&zap->mutex);
    return e != NULL ? PML_OK : PML_FAIL(err, PML_NOT_FOUND, "there is no such key");
}

pml_role pmli_zap_role(pmli_zap *zap, const char *public_key, int *tag)
{
    uint8_t key[KEY_BYTES];
    *tag = -1;
    if (public_key == NULL || strlen(public_key) != PML_KEY_TEXT - 1 ||
        zmq_z85_decode(key, public_key) == NULL)
        return PML_ROLE_NOBODY;
    pthread_mutex_lock(&zap->mutex);
    const entry *e = find(zap, key);
    pml_role role = e == NULL ? PML_ROLE_NOBODY : e->role;
    if (e != NULL)
        *tag = e->tag;
    pthread_mutex_unlock(&zap->mutex);
    return role;
}
