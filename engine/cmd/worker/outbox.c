#include "outbox.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { LETTERS = 64 };

typedef struct letter {
    outbox_writer write;  /* NULL: there is a message already, or none */
    pml_message *message; /* to be sent, or with `discard` only destroyed */
    bool discard;
    int64_t *number; /* of somebody who waits for it */
    _Alignas(max_align_t) char facts[OUTBOX_FACTS];
} letter;

struct outbox {
    outbox_sender send;
    void *user;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t filled, gone;
    bool ending;
    int64_t put, sent; /* letters so far; put - sent of them are in the ring */
    letter letters[LETTERS];
};

/* The letter stays in its place until it has gone, so that nobody writes over it meanwhile. */
static void deal_with(outbox *o, letter *l)
{
    if (l->write != NULL)
        l->message = l->write(l->facts);
    if (l->discard)
        pml_message_destroy(&l->message);
    else
        o->send(o->user, l->message, l->number);
}

static void *run(void *argument)
{
    outbox *o = argument;
    pthread_mutex_lock(&o->mutex);
    for (;;) {
        while (o->sent == o->put && !o->ending)
            pthread_cond_wait(&o->filled, &o->mutex);
        if (o->sent == o->put)
            break;
        letter *next = &o->letters[o->sent % LETTERS];
        pthread_mutex_unlock(&o->mutex);
        deal_with(o, next);
        pthread_mutex_lock(&o->mutex);
        o->sent++;
        pthread_cond_broadcast(&o->gone);
    }
    pthread_mutex_unlock(&o->mutex);
    return NULL;
}

pml_status outbox_new(outbox_sender send, void *user, outbox **out, pml_error *err)
{
    outbox *o = *out = calloc(1, sizeof *o);
    if (o == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the reports' thread");
    o->send = send;
    o->user = user;
    pthread_mutex_init(&o->mutex, NULL);
    pthread_cond_init(&o->filled, NULL);
    pthread_cond_init(&o->gone, NULL);
    if (pthread_create(&o->thread, NULL, run, o) == 0)
        return PML_OK;
    free(o);
    *out = NULL;
    return PML_FAIL(err, PML_NO_MEMORY, "cannot start the reports' thread");
}

void outbox_destroy(outbox **out)
{
    outbox *o = *out;
    *out = NULL;
    if (o == NULL)
        return;
    pthread_mutex_lock(&o->mutex);
    o->ending = true;
    pthread_cond_signal(&o->filled);
    pthread_mutex_unlock(&o->mutex);
    pthread_join(o->thread, NULL);
    pthread_cond_destroy(&o->gone);
    pthread_cond_destroy(&o->filled);
    pthread_mutex_destroy(&o->mutex);
    free(o);
}

/* The next free letter, empty; the mutex is held. */
static letter *free_letter(outbox *o)
{
    while (o->put - o->sent == LETTERS)
        pthread_cond_wait(&o->gone, &o->mutex);
    letter *l = &o->letters[o->put % LETTERS];
    l->write = NULL;
    l->message = NULL;
    l->discard = false;
    l->number = NULL;
    return l;
}

/* It is filled; the mutex is held. Gives its turn. */
static int64_t close_letter(outbox *o)
{
    pthread_cond_signal(&o->filled);
    return ++o->put;
}

static void wait_for(outbox *o, int64_t turn)
{
    while (o->sent < turn)
        pthread_cond_wait(&o->gone, &o->mutex);
}

void outbox_put(outbox *o, outbox_writer write, const void *facts, size_t bytes)
{
    pthread_mutex_lock(&o->mutex);
    letter *l = free_letter(o);
    l->write = write;
    memcpy(l->facts, facts, bytes);
    close_letter(o);
    pthread_mutex_unlock(&o->mutex);
}

void outbox_send(outbox *o, pml_message *report)
{
    pthread_mutex_lock(&o->mutex);
    free_letter(o)->message = report;
    close_letter(o);
    pthread_mutex_unlock(&o->mutex);
}

void outbox_discard(outbox *o, pml_message *message)
{
    if (message == NULL)
        return;
    pthread_mutex_lock(&o->mutex);
    letter *l = free_letter(o);
    l->message = message;
    l->discard = true;
    close_letter(o);
    pthread_mutex_unlock(&o->mutex);
}

int64_t outbox_flush(outbox *o, pml_message *report)
{
    int64_t number = 0;
    pthread_mutex_lock(&o->mutex);
    letter *l = free_letter(o);
    l->message = report;
    l->number = &number;
    wait_for(o, close_letter(o));
    pthread_mutex_unlock(&o->mutex);
    return number;
}

void outbox_drain(outbox *o)
{
    pthread_mutex_lock(&o->mutex);
    wait_for(o, o->put);
    pthread_mutex_unlock(&o->mutex);
}
