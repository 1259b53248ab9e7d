/* A ring of pointers that grows: what waits to be sent, and what waits to be received. Not locked.
 */
#ifndef PML_NET_QUEUE_H
#define PML_NET_QUEUE_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct pmli_queue {
    void **items;
    size_t first, n, capacity;
} pmli_queue;

/* False without memory; the item is then still the caller's. */
static inline bool pmli_queue_push(pmli_queue *q, void *item)
{
    if (q->n == q->capacity) {
        size_t capacity = q->capacity == 0 ? 64 : 2 * q->capacity;
        void **items = calloc(capacity, sizeof *items);
        if (items == NULL)
            return false;
        for (size_t i = 0; i < q->n; i++)
            items[i] = q->items[(q->first + i) % q->capacity];
        free(q->items);
        q->items = items;
        q->first = 0;
        q->capacity = capacity;
    }
    q->items[(q->first + q->n++) % q->capacity] = item;
    return true;
}

static inline void *pmli_queue_front(const pmli_queue *q)
{
    return q->n == 0 ? NULL : q->items[q->first];
}

static inline void *pmli_queue_pop(pmli_queue *q)
{
    if (q->n == 0)
        return NULL;
    void *item = q->items[q->first];
    q->first = (q->first + 1) % q->capacity;
    q->n--;
    return item;
}

/* Frees the items too. */
static inline void pmli_queue_clear(pmli_queue *q)
{
    for (void *item = pmli_queue_pop(q); item != NULL; item = pmli_queue_pop(q))
        free(item);
    free(q->items);
    memset(q, 0, sizeof *q);
}

#endif
