#include "pml/net/reserve.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/path.h"
#include "reserve_bytes.h"
#include "reserve_map.h"

enum {
    MIB = 20,       /* as a shift */
    OWN_FROM = 512, /* see open_own */
    TURN_PLACE = PML_HOLDERS_MAX
};

static const double look_first = 1e-4, look_longest = 5e-3; /* seconds between looks for a turn */
static const double look_most = 0.5; /* what one counts at most: we may have been stopped, too */

struct pml_reservation {
    char folder[PATH_MAX], device[PML_DEVICE_NAME_MAX], run[PML_HOLDER_RUN_MAX];
    int held, own;
    size_t total; /* MiB */
    size_t place; /* PML_HOLDERS_MAX: all were taken, we have no name */
    bool turn;
    bool inherited;  /* `held` was somebody's before us */
    bool unread;     /* which bytes of the map are OURS is still to be found */
    pmli_map ours;   /* reserved by `held`; known, once `unread` is false */
    pmli_map others; /* reserved by others, and … */
    pmli_map taken;  /* … allocated by them, at the last look */
    pmli_map before; /* others' that was not taken when our turn began */
    pmli_map room;   /* free, while we look for some */
    size_t beyond;   /* MiB that others have reserved where a device of this size has none */
    char unnamed[300];
};

/* ---- the file ---- */

static bool is_device_name(const char *name)
{
    size_t n = strlen(name);
    for (size_t i = 0; i < n; i++)
        if (!isalnum((unsigned char)name[i]) && name[i] != '-')
            return false;
    return n > 0 && n < PML_DEVICE_NAME_MAX;
}

static pml_status open_file(const char *folder, const char *device, int flags, int *fd,
                            pml_error *err)
{
    struct stat st;
    *fd = -1;
    if (!is_device_name(device))
        return PML_FAIL(err, PML_INVALID, "\"%.60s\" is no name of a device", device);
    pml_status status = pml_file_open_regular(folder, device, flags, fd, err);
    if (status != PML_OK)
        return status;
    if (fstat(*fd, &st) != 0 || st.st_uid != geteuid() || (st.st_mode & 0077) != 0)
        status = PML_FAIL(err, PML_DENIED, "%s/%s is not yours alone; remove it", folder, device);
    if (status != PML_OK) {
        close(*fd);
        *fd = -1;
    }
    return status;
}

/* Descriptors of a process that is killed are closed in the order of their numbers, and what that
 * sets off is done in the opposite one: with a number above those of the driver's files, the bytes
 * that are taken are given up before the memory is free, not after. In between the memory is
 * counted as missing twice, and never as free twice. */
static pml_status open_own(pml_reservation *r, pml_error *err)
{
    int fd;
    pml_status status = open_file(r->folder, r->device, O_RDWR | O_CREAT, &fd, err);
    if (status != PML_OK)
        return status;
    r->own = fcntl(fd, F_DUPFD_CLOEXEC, OWN_FROM);
    if (r->own < 0) /* a limit below it: any number will do */
        r->own = fd;
    else
        close(fd);
    return PML_OK;
}

/* An inherited description counts when it is of the file that is there now. */
static pml_status open_held(pml_reservation *r, int inherited, pml_error *err)
{
    struct stat ours, theirs;
    if (inherited >= 0 && fstat(inherited, &theirs) == 0 && fstat(r->own, &ours) == 0 &&
        S_ISREG(theirs.st_mode) && theirs.st_dev == ours.st_dev && theirs.st_ino == ours.st_ino &&
        fcntl(inherited, F_SETFD, FD_CLOEXEC) == 0) {
        r->held = inherited;
        r->inherited = r->unread = true;
        return PML_OK;
    }
    if (inherited >= 0)
        close(inherited);
    return open_file(r->folder, r->device, O_RDWR | O_CREAT, &r->held, err);
}

/* ---- what is locked ---- */

static void mark(void *user, size_t from, size_t to)
{
    pmli_map_put(user, from, to, true);
}

static void mark_others(void *user, size_t from, size_t to)
{
    pml_reservation *r = user;
    mark(&r->others, from, to);
    r->beyond += to > r->total ? to - (from > r->total ? from : r->total) : 0;
}

static pml_status look(pml_reservation *r, pml_error *err)
{
    pmli_map_clear(&r->others);
    pmli_map_clear(&r->taken);
    r->beyond = 0;
    pml_status status =
        pmli_bytes_walk(r->held, PMLI_RESERVED_AT, 0, PMLI_SPAN, mark_others, r, err);
    return status == PML_OK
               ? pmli_bytes_walk(r->own, PMLI_TAKEN_AT, 0, r->total, mark, &r->taken, err)
               : status;
}

/* What was inherited: seen from `own`, `held` is another, and seen from `held` it is not. In our
 * turn, when nobody else reserves anything; what others give back meanwhile is not ours, so theirs
 * is looked for first. */
static pml_status find_ours(pml_reservation *r, pml_error *err)
{
    pmli_map_clear(&r->ours);
    pml_status status = look(r, err);
    if (status == PML_OK)
        status = pmli_bytes_walk(r->own, PMLI_RESERVED_AT, 0, r->total, mark, &r->ours, err);
    for (size_t w = 0; w < pmli_map_words(&r->ours); w++)
        r->ours.words[w] &= ~r->others.words[w];
    return status;
}

/* The driver is asked after this and before the next look: what others take, or give up, meanwhile
 * must not be counted as free by both. */
static pml_status look_before(pml_reservation *r, pml_error *err)
{
    pml_status status = r->unread ? find_ours(r, err) : look(r, err);
    r->unread = r->unread && status != PML_OK;
    for (size_t w = 0; w < pmli_map_words(&r->before); w++)
        r->before.words[w] = r->others.words[w] & ~r->taken.words[w];
    return status;
}

static size_t count_pending(const pml_reservation *r)
{
    size_t n = r->beyond;
    for (size_t w = 0; w < pmli_map_words(&r->others); w++)
        n += (size_t)__builtin_popcountll(r->others.words[w] &
                                          (~r->taken.words[w] | r->before.words[w]));
    return n;
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* n bytes that nobody has, from the lowest up. */
static pml_status reserve(pml_reservation *r, size_t n, pml_error *err)
{
    pml_status status = PML_OK;
    for (size_t w = 0; w < pmli_map_words(&r->room); w++)
        r->room.words[w] = r->others.words[w] | r->ours.words[w];
    for (size_t at = 0; n > 0 && status == PML_OK;) {
        size_t from = pmli_map_next(&r->room, at, false);
        size_t to = least(pmli_map_next(&r->room, from, true), from + n);
        if (from == to)
            return PML_FAIL(err, PML_INTERNAL, "%zu MiB were to be free and are not", n);
        status = pmli_bytes_set(r->held, PMLI_RESERVED_AT, from, to, true, err);
        if (status == PML_OK)
            pmli_map_put(&r->ours, from, to, true);
        n -= to - from;
        at = to;
    }
    return status;
}

/* n bytes of ours, from the highest down. */
static pml_status give_back(pml_reservation *r, size_t n, pml_error *err)
{
    pml_status status = PML_OK;
    while (n > 0 && status == PML_OK) {
        size_t to = pmli_map_end(&r->ours, r->total, true);
        size_t from = pmli_map_end(&r->ours, to, false);
        from = to - least(to - from, n);
        status = pmli_bytes_set(r->held, PMLI_RESERVED_AT, from, to, false, err);
        if (status == PML_OK)
            pmli_map_put(&r->ours, from, to, false);
        n -= to - from;
    }
    return status;
}

/* ---- names ---- */

/* The byte of a holder that `held` has already, else a free one. */
static void find_place(pml_reservation *r)
{
    uint64_t others_words[PML_HOLDERS_MAX / 64] = {0}, all_words[PML_HOLDERS_MAX / 64] = {0};
    pmli_map others = {others_words, PML_HOLDERS_MAX}, all = {all_words, PML_HOLDERS_MAX};
    r->place = PML_HOLDERS_MAX;
    if (pmli_bytes_walk(r->held, PMLI_HOLDERS_AT, 0, PML_HOLDERS_MAX, mark, &others, NULL) ||
        pmli_bytes_walk(r->own, PMLI_HOLDERS_AT, 0, PML_HOLDERS_MAX, mark, &all, NULL))
        return;
    for (size_t i = 0; i < PML_HOLDERS_MAX / 64; i++)
        all_words[i] &= ~others_words[i];
    r->place = pmli_map_next(&all, 0, true);
    for (size_t i = pmli_map_next(&others, 0, false);
         r->place == PML_HOLDERS_MAX && i < PML_HOLDERS_MAX;
         i = pmli_map_next(&others, i + 1, false))
        if (pmli_bytes_set(r->held, PMLI_HOLDERS_AT, i, i + 1, true, NULL) == PML_OK)
            r->place = i;
}

static void say_who(pml_reservation *r, size_t mib)
{
    pml_error why = PML_ERROR_INIT;
    if (r->place == PML_HOLDERS_MAX)
        find_place(r);
    r->unnamed[0] = '\0';
    if (r->place == PML_HOLDERS_MAX)
        snprintf(r->unnamed, sizeof r->unnamed, "%d others have reserved memory of this device",
                 PML_HOLDERS_MAX);
    else if (mib == 0) /* nothing to be asked for */
        pmli_name_clear(r->held, r->place);
    else if (pmli_name_set(r->held, r->place, mib, (int)getpid(), r->run, &why) != PML_OK)
        snprintf(r->unnamed, sizeof r->unnamed, "%.290s", why.message);
}

const char *pml_reservation_unnamed(const pml_reservation *r)
{
    return r->unnamed;
}

/* ---- a reservation's life ---- */

static pml_status make_maps(pml_reservation *r, pml_error *err)
{
    pmli_map *maps[] = {&r->ours, &r->others, &r->taken, &r->before, &r->room};
    for (size_t i = 0; i < sizeof maps / sizeof *maps; i++) {
        maps[i]->n = r->total;
        maps[i]->words = calloc(pmli_map_words(maps[i]) + 1, sizeof *maps[i]->words);
        if (maps[i]->words == NULL)
            return PML_FAIL(err, PML_NO_MEMORY, "no memory for a reservation");
    }
    return PML_OK;
}

pml_status pml_reservation_new(const pml_reservation_options *o, pml_reservation **out,
                               pml_error *err)
{
    pml_reservation *r = calloc(1, sizeof *r);
    *out = NULL;
    if (r == NULL) {
        if (o->inherited >= 0)
            close(o->inherited);
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a reservation");
    }
    *r = (pml_reservation){.held = -1, .own = -1, .place = PML_HOLDERS_MAX};
    r->total = o->total >> MIB < PMLI_SPAN ? o->total >> MIB : PMLI_SPAN;
    snprintf(r->folder, sizeof r->folder, "%s", o->folder);
    snprintf(r->device, sizeof r->device, "%s", o->device);
    snprintf(r->run, sizeof r->run, "%s", o->run);
    pml_status status = make_maps(r, err);
    if (status == PML_OK)
        status = open_own(r, err);
    if (status == PML_OK)
        status = open_held(r, o->inherited, err);
    else if (o->inherited >= 0)
        close(o->inherited);
    if (status == PML_OK)
        status = look(r, err); /* whether there are such locks */
    if (status != PML_OK)
        pml_reservation_destroy(&r);
    *out = r;
    return status;
}

void pml_reservation_destroy(pml_reservation **out)
{
    pml_reservation *r = *out;
    *out = NULL;
    if (r == NULL)
        return;
    if (r->held >= 0)
        close(r->held);
    if (r->own >= 0)
        close(r->own);
    pmli_map *maps[] = {&r->ours, &r->others, &r->taken, &r->before, &r->room};
    for (size_t i = 0; i < sizeof maps / sizeof *maps; i++)
        free(maps[i]->words);
    free(r);
}

int pml_reservation_descriptor(const pml_reservation *r)
{
    return r->held;
}

bool pml_reservation_inherited(const pml_reservation *r)
{
    return r->inherited;
}

void pml_reservation_touch(int descriptor)
{
    futimens(descriptor, NULL);
}

/* ---- turns ---- */

static pml_status nobody_ends(const pml_holder *who, double seconds, pml_error *err)
{
    const int digits = seconds < 1 ? 2 : 0;
    if (who->pid == 0)
        return PML_FAIL(err, PML_BUSY,
                        "another run has been planning with this GPU's memory for %.*f s: look "
                        "whether it is stopped, or take another device",
                        digits, seconds);
    return PML_FAIL(err, PML_BUSY,
                    "the run %s (process %d) has been planning with this GPU's memory for %.*f s: "
                    "look whether it is stopped, or take another device",
                    pml_path_name(who->run), who->pid, digits, seconds);
}

/* Whose turn it is; *waited begins anew with each that gets it: a long line is nobody's fault. */
static void look_who(const pml_reservation *r, pml_holder *who, double *waited)
{
    pml_holder found;
    pmli_name_read(r->own, TURN_PLACE, &found);
    if (found.pid != who->pid || strcmp(found.run, who->run) != 0)
        *waited = 0;
    *who = found;
}

static pml_status take_turn(pml_reservation *r, pml_error *err)
{
    pml_status status = pmli_bytes_set(r->own, PMLI_TURN_AT, 0, 1, true, err);
    if (status != PML_OK)
        return status;
    r->turn = true;
    /* Without it who waits for us in vain does not hear our name. */
    pmli_name_set(r->own, TURN_PLACE, 0, (int)getpid(), r->run, NULL);
    status = look_before(r, err);
    if (status != PML_OK)
        pml_reservation_turn_end(r);
    return status;
}

pml_status pml_reservation_turn(pml_reservation *r, double seconds, void (*tick)(void *user),
                                void *user, pml_error *err)
{
    pml_holder who = {0};
    double waited = 0, looked_at = pml_clock_monotonic();
    for (double pause = look_first;; pause = pause < look_longest ? 2 * pause : look_longest) {
        pml_error why = PML_ERROR_INIT;
        pml_status status = take_turn(r, &why);
        if (status != PML_BUSY) {
            if (status != PML_OK && err != NULL)
                *err = why;
            return status;
        }
        double now = pml_clock_monotonic(), passed = now - looked_at;
        looked_at = now;
        waited += passed < look_most ? passed : look_most;
        look_who(r, &who, &waited);
        if (waited >= seconds)
            return nobody_ends(&who, seconds, err);
        if (tick != NULL)
            tick(user);
        pml_clock_sleep(pause);
    }
}

void pml_reservation_turn_end(pml_reservation *r)
{
    if (r->turn) {
        pmli_name_clear(r->own, TURN_PLACE);
        pmli_bytes_set(r->own, PMLI_TURN_AT, 0, 1, false, NULL);
    }
    r->turn = false;
    pmli_map_clear(&r->before);
}

/* ---- reading and changing ---- */

pml_status pml_reservation_read(pml_reservation *r, pml_reserved *now, pml_error *err)
{
    *now = (pml_reserved){0};
    pml_status status = look(r, err);
    if (status != PML_OK)
        return status;
    now->ours = pmli_map_count(&r->ours) << MIB;
    now->others = (pmli_map_count(&r->others) + r->beyond) << MIB;
    now->pending = count_pending(r) << MIB;
    return PML_OK;
}

pml_status pml_reservation_resize(pml_reservation *r, size_t bytes, pml_error *err)
{
    size_t wanted = (bytes >> MIB) + ((bytes & (((size_t)1 << MIB) - 1)) != 0);
    pml_status status = look(r, err);
    if (status != PML_OK)
        return status;
    size_t ours = pmli_map_count(&r->ours), others = pmli_map_count(&r->others) + r->beyond;
    if (wanted > ours && (others > r->total || wanted > r->total - others))
        return PML_FAIL(err, PML_NO_MEMORY,
                        "of the device's %zu MiB other runs have reserved %zu, and %zu are wanted",
                        r->total, others, wanted);
    status = wanted > ours ? reserve(r, wanted - ours, err) : give_back(r, ours - wanted, err);
    if (status == PML_OK)
        say_who(r, wanted);
    return status;
}

pml_status pml_reservation_take(pml_reservation *r, size_t bytes, pml_error *err)
{
    size_t n = least(bytes >> MIB, pmli_map_count(&r->ours));
    pml_status status = pmli_bytes_set(r->own, PMLI_TAKEN_AT, 0, PMLI_SPAN, false, err);
    for (size_t at = 0; n > 0 && status == PML_OK;) {
        size_t from = pmli_map_next(&r->ours, at, true);
        at = least(pmli_map_next(&r->ours, from, false), from + n);
        status = pmli_bytes_set(r->own, PMLI_TAKEN_AT, from, at, true, err);
        n -= at - from;
    }
    return status;
}

/* ---- who has it ---- */

/* but: a run that is left out; NULL: none. */
static pml_status list(int fd, const char *but, pml_holder *holders, size_t capacity, size_t *n,
                       pml_error *err)
{
    for (size_t i = 0; i < PML_HOLDERS_MAX; i++) {
        pml_holder holder;
        struct flock rest = {.l_type = F_WRLCK,
                             .l_whence = SEEK_SET,
                             .l_start = PMLI_NAMED_AT + (off_t)i,
                             .l_len = (off_t)(PML_HOLDERS_MAX - i)};
        if (fcntl(fd, F_OFD_GETLK, &rest) != 0)
            return PML_FAIL(err, PML_IO, "cannot ask who has reserved memory: %s", strerror(errno));
        if (rest.l_type == F_UNLCK)
            break; /* nor any after it */
        if (!pmli_name_read(fd, i, &holder) || (but != NULL && strcmp(holder.run, but) == 0))
            continue;
        if (*n < capacity)
            holders[*n] = holder;
        ++*n;
    }
    return PML_OK;
}

pml_status pml_reservation_look(const char *folder, const char *device, pml_holder *holders,
                                size_t capacity, size_t *n, pml_reserved *sum, pml_error *err)
{
    int fd;
    size_t reserved = 0, taken = 0;
    *n = 0;
    if (sum != NULL)
        *sum = (pml_reserved){0};
    pml_status status = open_file(folder, device, O_RDONLY, &fd, err);
    if (status == PML_NOT_FOUND)
        return PML_OK;
    if (status != PML_OK)
        return status;
    status = list(fd, NULL, holders, capacity, n, err);
    if (status == PML_OK) /* taken first: what is taken meanwhile is pending, what ends is not */
        status = pmli_bytes_count(fd, PMLI_TAKEN_AT, &taken, err);
    if (status == PML_OK)
        status = pmli_bytes_count(fd, PMLI_RESERVED_AT, &reserved, err);
    if (status == PML_OK && sum != NULL)
        *sum = (pml_reserved){.others = reserved << MIB,
                              .pending = (reserved > taken ? reserved - taken : 0) << MIB};
    close(fd);
    return status;
}

void pml_reservation_words(const pml_reservation *r, char *words, size_t capacity)
{
    pml_holder holders[4]; /* as many as a sentence bears */
    size_t n = 0, used = 0, most = sizeof holders / sizeof *holders;
    words[0] = '\0';
    if (list(r->held, r->run, holders, most, &n, NULL) != PML_OK)
        return;
    for (size_t i = 0; i < n && i < most && used < capacity; i++) {
        int added = snprintf(words + used, capacity - used,
                             "%sthe run %.100s (process %d) has reserved %.1f GiB",
                             i > 0 ? ", " : "", pml_path_name(holders[i].run), holders[i].pid,
                             (double)holders[i].bytes / (1 << 30));
        used += added > 0 ? (size_t)added : 0;
    }
    if (n > most && used < capacity)
        snprintf(words + used, capacity - used, ", and %zu more", n - most);
}
