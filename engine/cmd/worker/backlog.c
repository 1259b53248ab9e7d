#include "backlog.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pml/base/file.h"
#include "pml/base/path.h"

typedef struct entry {
    struct entry *next;
    int64_t number;
    size_t size;
    char text[];
} entry;

struct backlog {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    entry *first, **last;
    int64_t heard;
    bool woken;
};

pml_status backlog_new(backlog **out, pml_error *err)
{
    backlog *b = *out = calloc(1, sizeof *b);
    if (b == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the backlog of reports");
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->changed, &clock);
    pthread_condattr_destroy(&clock);
    b->last = &b->first;
    return PML_OK;
}

static void drop_first(backlog *b)
{
    entry *e = b->first;
    b->first = e->next;
    if (b->first == NULL)
        b->last = &b->first;
    free(e);
}

void backlog_destroy(backlog **out)
{
    backlog *b = *out;
    *out = NULL;
    if (b == NULL)
        return;
    while (b->first != NULL)
        drop_first(b);
    pthread_cond_destroy(&b->changed);
    pthread_mutex_destroy(&b->mutex);
    free(b);
}

pml_status backlog_keep(backlog *b, int64_t number, const char *text, size_t size, pml_error *err)
{
    entry *e = malloc(sizeof *e + size);
    if (e == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to keep a report");
    *e = (entry){.number = number, .size = size};
    memcpy(e->text, text, size);
    pthread_mutex_lock(&b->mutex);
    *b->last = e;
    b->last = &e->next;
    pthread_mutex_unlock(&b->mutex);
    return PML_OK;
}

void backlog_heard(backlog *b, int64_t number)
{
    pthread_mutex_lock(&b->mutex);
    while (b->first != NULL && b->first->number <= number)
        drop_first(b);
    b->heard = number > b->heard ? number : b->heard;
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->mutex);
}

bool backlog_wait(backlog *b, int64_t number, double seconds)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += (time_t)seconds;
    end.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (end.tv_nsec >= 1000000000) {
        end.tv_nsec -= 1000000000;
        end.tv_sec++;
    }
    pthread_mutex_lock(&b->mutex);
    int rc = 0;
    while (b->heard < number && !b->woken && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&b->changed, &b->mutex, &end);
    bool heard = b->heard >= number;
    pthread_mutex_unlock(&b->mutex);
    return heard;
}

void backlog_wake(backlog *b)
{
    pthread_mutex_lock(&b->mutex);
    b->woken = true;
    pthread_cond_broadcast(&b->changed);
    pthread_mutex_unlock(&b->mutex);
}

pml_status backlog_write(backlog *b, const char *folder, pml_error *err)
{
    char path[PATH_MAX], *text = NULL;
    size_t size = 0;
    pml_status status = pml_path_join(path, sizeof path, folder, "handover.jsonl", err);
    if (status != PML_OK)
        return status;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to hand over the reports");
    pthread_mutex_lock(&b->mutex);
    for (const entry *e = b->first; e != NULL; e = e->next) {
        fwrite(e->text, 1, e->size, out);
        fputc('\n', out);
    }
    pthread_mutex_unlock(&b->mutex);
    if (fclose(out) != 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory to hand over the reports");
    if (status == PML_OK && size > 0)
        status = pml_file_write(path, text, size, 0600, err);
    free(text);
    return status;
}
