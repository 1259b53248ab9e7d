#include "orders.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pml/base/table.h"
#include "pml/train/run.h"

enum { ENOUGH_KEPT = 64 };

typedef struct queue {
    order *items;
    size_t first, n, capacity;
} queue;

struct orders {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    queue commands, agains;
    int64_t committed, taken;
    struct {
        int64_t command, row; /* row -1: all of them */
    } enough[ENOUGH_KEPT];    /* the latest ones */
    size_t enough_next;
    bool ended;
};

pml_status orders_new(orders **out, pml_error *err)
{
    *out = NULL;
    orders *o = calloc(1, sizeof *o);
    if (o == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for orders");
    pthread_mutex_init(&o->mutex, NULL);
    pthread_condattr_t clock; /* of deadlines: one that nobody sets */
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&o->changed, &clock);
    pthread_condattr_destroy(&clock);
    *out = o;
    return PML_OK;
}

static void free_queue(queue *q)
{
    for (size_t i = q->first; i < q->n; i++) {
        pml_message_destroy(&q->items[i].args);
        pml_message_destroy(&q->items[i].keywords);
    }
    free(q->items);
}

void orders_destroy(orders **out)
{
    orders *o = *out;
    if (o == NULL)
        return;
    *out = NULL;
    free_queue(&o->commands);
    free_queue(&o->agains);
    pthread_cond_destroy(&o->changed);
    pthread_mutex_destroy(&o->mutex);
    free(o);
}

/* ---- from the coordinator ---- */

static bool push(queue *q, const order *one)
{
    if (q->first > 0 && q->n == q->capacity) {
        memmove(q->items, q->items + q->first, (q->n - q->first) * sizeof *q->items);
        q->n -= q->first;
        q->first = 0;
    }
    order *larger = pml_table_room(q->items, &q->capacity, q->n + 1, sizeof *larger);
    if (larger == NULL)
        return false;
    q->items = larger;
    q->items[q->n++] = *one;
    return true;
}

static bool put(orders *o, queue *q, const order *one)
{
    pthread_mutex_lock(&o->mutex);
    bool kept = push(q, one);
    pthread_mutex_unlock(&o->mutex);
    return kept;
}

bool orders_put(orders *o, const order *one)
{
    return put(o, &o->commands, one);
}

bool orders_put_again(orders *o, const order *one)
{
    return put(o, &o->agains, one);
}

void orders_commit(orders *o, int64_t number)
{
    pthread_mutex_lock(&o->mutex);
    if (number > o->committed)
        o->committed = number;
    pthread_cond_broadcast(&o->changed);
    pthread_mutex_unlock(&o->mutex);
}

void orders_enough(orders *o, int64_t command, int64_t row)
{
    pthread_mutex_lock(&o->mutex);
    o->enough[o->enough_next % ENOUGH_KEPT].command = command;
    o->enough[o->enough_next++ % ENOUGH_KEPT].row = row;
    pthread_mutex_unlock(&o->mutex);
}

void orders_end(orders *o)
{
    pthread_mutex_lock(&o->mutex);
    o->ended = true;
    pthread_cond_broadcast(&o->changed);
    pthread_mutex_unlock(&o->mutex);
}

/* ---- for the training thread ---- */

int64_t orders_committed(orders *o)
{
    pthread_mutex_lock(&o->mutex);
    int64_t committed = o->committed;
    pthread_mutex_unlock(&o->mutex);
    return committed;
}

bool orders_is_enough(orders *o, int64_t command, int64_t row)
{
    bool found = false;
    pthread_mutex_lock(&o->mutex);
    for (size_t i = 0; i < ENOUGH_KEPT; i++)
        found = found || (o->enough[i].command == command &&
                          (o->enough[i].row < 0 || o->enough[i].row == row));
    pthread_mutex_unlock(&o->mutex);
    return found;
}

bool orders_stops(orders *o)
{
    bool found = false;
    pthread_mutex_lock(&o->mutex);
    const queue *q = &o->commands;
    for (size_t i = q->first; i < q->n && q->items[i].number <= o->committed; i++)
        found = found || q->items[i].verb == PML_REQUEST_stop;
    pthread_mutex_unlock(&o->mutex);
    return found;
}

static bool pop_if(queue *q, bool ready, order *one)
{
    if (!ready)
        return false;
    *one = q->items[q->first++];
    if (q->first == q->n)
        q->first = q->n = 0;
    return true;
}

bool orders_next(orders *o, int64_t limit, order *one)
{
    pthread_mutex_lock(&o->mutex);
    queue *q = &o->commands;
    bool found = pop_if(q, q->first < q->n && q->items[q->first].number <= limit, one);
    if (found)
        o->taken = one->number;
    pthread_mutex_unlock(&o->mutex);
    return found;
}

bool orders_next_again(orders *o, int64_t step, order *one)
{
    pthread_mutex_lock(&o->mutex);
    queue *q = &o->agains;
    bool found = pop_if(q, q->first < q->n && q->items[q->first].step <= step, one);
    pthread_mutex_unlock(&o->mutex);
    return found;
}

void orders_supersede(orders *o, const pml_message *args)
{
    pthread_mutex_lock(&o->mutex);
    for (size_t i = o->agains.first; i < o->agains.n; i++) {
        order *one = &o->agains.items[i];
        pml_run_supersede(one->args, args);
        if (!pml_message_has(one->args, "lr_scheduler_kwargs"))
            pml_message_destroy(&one->keywords);
    }
    pthread_mutex_unlock(&o->mutex);
}

void orders_wait(orders *o)
{
    pthread_mutex_lock(&o->mutex);
    while (o->committed <= o->taken && !o->ended)
        pthread_cond_wait(&o->changed, &o->mutex);
    pthread_mutex_unlock(&o->mutex);
}

void orders_wait_for(orders *o, int seconds)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += seconds;
    pthread_mutex_lock(&o->mutex);
    while (o->committed <= o->taken &&
           pthread_cond_timedwait(&o->changed, &o->mutex, &end) != ETIMEDOUT)
        continue;
    pthread_mutex_unlock(&o->mutex);
}
