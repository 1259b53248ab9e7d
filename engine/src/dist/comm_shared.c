/* Collectives over shared memory.
 *
 *   memfd:  control | headers[2][world] | chunk set 0 | chunk set 1
 *   a chunk set:  rank 0's part | rank 1's part | … | the sums
 *
 * An all-reduce goes chunk by chunk: everybody copies its values in, barrier; rank r adds up the
 * r-th slice over the ranks in their order, barrier; everybody copies the sums out. The sets take
 * turns, so that nobody overwrites sums that a slower rank still reads: to write set s again one
 * has to pass the second barrier of the chunk in between, and the slower rank reaches that only
 * after its reading. The headers take turns for the same reason.
 *
 * Who is gone is asked of the kernel: each rank holds a lock on byte `rank` of the memfd through an
 * open file description of its own, and that lock ends with the process, however it ends. */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "comm_internal.h"

enum {
    PAGE = 4096,
    CONTROL_BYTES = 2 * PAGE,
    CHUNK_BYTES = 1 << 20,
    SPINS = 2000,                /* about 20 µs, less than two context switches */
    SLICE_NS = 200 * 1000 * 1000 /* between looks for ranks that are gone       */
};
static const uint64_t magic = 0x31304d4d4f434d50; /* "PMCOMM01" */

typedef struct control {
    uint64_t magic;
    int32_t world;
    _Atomic uint32_t aborted;
    _Alignas(64) _Atomic uint32_t arrived;
    _Alignas(64) _Atomic uint32_t generation; /* the futex: one more each time all have arrived */
    _Alignas(64) _Atomic uint32_t joined[PMLI_WORLD_MAX];
    _Alignas(64) _Atomic uint32_t reached[PMLI_WORLD_MAX]; /* barriers that each rank came to */
} control;
_Static_assert(sizeof(control) <= CONTROL_BYTES, "the control block has its place");
_Static_assert(sizeof(pml_header) == 128, "a header is two cache lines");

typedef struct shared {
    pml_comm base;
    int fd; /* our own open file description, holder of the lock */
    size_t bytes;
    unsigned char *memory;
    control *control;
    pml_header *headers;   /* [2][world] */
    unsigned char *chunks; /* [2][world + 1][CHUNK_BYTES] */
    unsigned turn_header, turn_chunk;
    _Atomic uint64_t left; /* barriers that this rank has left */
} shared;

static size_t header_bytes(int world)
{
    size_t n = 2 * (size_t)world * sizeof(pml_header);
    return (n + PAGE - 1) / PAGE * PAGE;
}

size_t pml_comm_shared_bytes(int world)
{
    if (world < 1 || world > PMLI_WORLD_MAX)
        return 0;
    return CONTROL_BYTES + header_bytes(world) + 2 * ((size_t)world + 1) * CHUNK_BYTES;
}

pml_status pml_comm_shared_create(int world, int *fd, pml_error *err)
{
    *fd = -1;
    size_t bytes = pml_comm_shared_bytes(world);
    if (bytes == 0)
        return PML_FAIL(err, PML_INVALID, "collectives are for 1 to %d workers, not %d",
                        PMLI_WORLD_MAX, world);
    int memory = memfd_create("pml-comm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memory < 0)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot make shared memory: %s", strerror(errno));
    control head = {.magic = magic, .world = world};
    if (ftruncate(memory, (off_t)bytes) != 0 ||
        pwrite(memory, &head, sizeof head, 0) != (ssize_t)sizeof head ||
        fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        int reason = errno;
        close(memory);
        return PML_FAIL(err, PML_NO_MEMORY, "cannot make %zu bytes of shared memory: %s", bytes,
                        strerror(reason));
    }
    *fd = memory;
    return PML_OK;
}

/* ---- waiting ---- */

static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
    return syscall(SYS_futex, (uint32_t *)word, op, value, timeout, NULL, 0);
}

/* The generation moves too, so that nobody goes to sleep on the one it has just read. */
static void raise_abort(control *c)
{
    atomic_store(&c->aborted, 1);
    atomic_fetch_add(&c->generation, 1);
    futex(&c->generation, FUTEX_WAKE, INT32_MAX, NULL);
}

static struct flock byte_of(int rank, short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
}

/* A rank that has joined and holds its lock no more; -1 when all are there. */
static int find_gone(const shared *s)
{
    for (int r = 0; r < s->base.world; r++) {
        struct flock lock = byte_of(r, F_WRLCK);
        if (r == s->base.rank || !atomic_load(&s->control->joined[r]))
            continue;
        if (fcntl(s->fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK)
            return r;
    }
    return -1;
}

static pml_status aborted(pml_error *err)
{
    return PML_FAIL(err, PML_PEER, "another worker is gone: the collectives were called off");
}

/* Until the generation is another one. */
static pml_status wait_for_all(shared *s, uint32_t generation, pml_error *err)
{
    control *c = s->control;
    for (int i = 0; i < SPINS && atomic_load(&c->generation) == generation; i++)
        atomic_signal_fence(memory_order_seq_cst);
    const struct timespec slice = {0, SLICE_NS};
    while (atomic_load(&c->generation) == generation) {
        if (futex(&c->generation, FUTEX_WAIT, generation, &slice) == 0 || errno != ETIMEDOUT)
            continue;
        int gone = find_gone(s);
        if (gone < 0)
            continue;
        raise_abort(c);
        return PML_FAIL(err, PML_PEER, "worker %d is gone", gone);
    }
    return PML_OK;
}

static pml_status barrier(pml_comm *comm, pml_error *err)
{
    shared *s = (shared *)comm;
    control *c = s->control;
    pml_status status = PML_OK;
    uint32_t generation = atomic_load(&c->generation);
    if (atomic_load(&c->aborted))
        return aborted(err);
    atomic_fetch_add(&c->reached[comm->rank], 1); /* before it counts: who waits sees it here */
    if (atomic_fetch_add(&c->arrived, 1) + 1 == (uint32_t)comm->world) {
        atomic_store(&c->arrived, 0);
        atomic_fetch_add(&c->generation, 1);
        futex(&c->generation, FUTEX_WAKE, INT32_MAX, NULL);
    } else {
        status = wait_for_all(s, generation, err);
    }
    atomic_fetch_add(&s->left, 1);
    if (status == PML_OK && atomic_load(&c->aborted))
        status = aborted(err);
    return status;
}

/* Who has come to fewer barriers holds up all that have come to more. */
static pml_comm_place where(const pml_comm *comm)
{
    const shared *s = (const shared *)comm;
    uint32_t mine = atomic_load(&s->control->reached[comm->rank]);
    pml_comm_place place = {mine + atomic_load(&s->left), -1};
    for (int r = 0; r < comm->world && place.waits_for < 0; r++)
        if ((int32_t)(atomic_load(&s->control->reached[r]) - mine) < 0)
            place.waits_for = r;
    return place;
}

/* ---- the collectives ---- */

static pml_status gather(pml_comm *comm, const pml_header *mine, pml_header *all, pml_error *err)
{
    shared *s = (shared *)comm;
    pml_header *set = s->headers + (size_t)(s->turn_header++ & 1) * (size_t)comm->world;
    set[comm->rank] = *mine;
    pml_status status = barrier(comm, err);
    if (status == PML_OK)
        memcpy(all, set, (size_t)comm->world * sizeof *all);
    return status;
}

static void sum_f32(void *out, const unsigned char *parts, int world, size_t from, size_t to)
{
    float *sum = out;
    for (size_t i = from; i < to; i++)
        sum[i] = ((const float *)(const void *)parts)[i];
    for (int r = 1; r < world; r++) {
        const float *part = (const void *)(parts + (size_t)r * CHUNK_BYTES);
        for (size_t i = from; i < to; i++)
            sum[i] += part[i];
    }
}

static void sum_f64(void *out, const unsigned char *parts, int world, size_t from, size_t to)
{
    double *sum = out;
    for (size_t i = from; i < to; i++)
        sum[i] = ((const double *)(const void *)parts)[i];
    for (int r = 1; r < world; r++) {
        const double *part = (const void *)(parts + (size_t)r * CHUNK_BYTES);
        for (size_t i = from; i < to; i++)
            sum[i] += part[i];
    }
}

typedef void (*sum_function)(void *out, const unsigned char *parts, int world, size_t from,
                             size_t to);

static pml_status allreduce(shared *s, unsigned char *values, size_t n, size_t size,
                            sum_function add, pml_error *err)
{
    size_t world = (size_t)s->base.world, rank = (size_t)s->base.rank;
    size_t most = CHUNK_BYTES / size;
    for (size_t done = 0; done < n;) {
        size_t count = n - done < most ? n - done : most;
        unsigned char *parts = s->chunks + (s->turn_chunk++ & 1) * (world + 1) * CHUNK_BYTES;
        unsigned char *sums = parts + world * CHUNK_BYTES;
        memcpy(parts + rank * CHUNK_BYTES, values + done * size, count * size);
        pml_status status = barrier(&s->base, err);
        if (status != PML_OK)
            return status;
        add(sums, parts, s->base.world, count * rank / world, count * (rank + 1) / world);
        status = barrier(&s->base, err);
        if (status != PML_OK)
            return status;
        memcpy(values + done * size, sums, count * size);
        done += count;
    }
    return PML_OK;
}

static pml_status allreduce_f32(pml_comm *comm, float *values, size_t n, pml_error *err)
{
    return allreduce((shared *)comm, (unsigned char *)values, n, sizeof *values, sum_f32, err);
}

static pml_status allreduce_f64(pml_comm *comm, double *values, size_t n, pml_error *err)
{
    return allreduce((shared *)comm, (unsigned char *)values, n, sizeof *values, sum_f64, err);
}

/* ---- joining and leaving ---- */

static void shared_destroy(pml_comm **comm)
{
    shared *s = (shared *)*comm;
    if (s->memory != NULL)
        munmap(s->memory, s->bytes);
    if (s->fd >= 0)
        close(s->fd);
    free(s);
}

static const pmli_comm_kind shared_kind = {shared_destroy, barrier,       gather,
                                           allreduce_f32,  allreduce_f64, where};

/* The same file under a description of its own: a lock belongs to a description, and the inherited
 * one is everybody's. */
static int reopen(int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

static pml_status join(shared *s, int fd, pml_error *err)
{
    int rank = s->base.rank, world = s->base.world;
    struct stat st;
    s->bytes = pml_comm_shared_bytes(world);
    if (fstat(fd, &st) != 0 || st.st_size != (off_t)s->bytes)
        return PML_FAIL(err, PML_INVALID, "descriptor %d is not the memory of %d workers", fd,
                        world);
    s->fd = reopen(fd);
    if (s->fd < 0)
        return PML_FAIL(err, PML_IO, "cannot open the shared memory: %s", strerror(errno));
    s->memory = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (s->memory == MAP_FAILED) {
        s->memory = NULL;
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map %zu bytes of shared memory: %s", s->bytes,
                        strerror(errno));
    }
    s->control = (control *)(void *)s->memory;
    s->headers = (pml_header *)(void *)(s->memory + CONTROL_BYTES);
    s->chunks = s->memory + CONTROL_BYTES + header_bytes(world);
    if (s->control->magic != magic || s->control->world != world)
        return PML_FAIL(err, PML_INVALID, "descriptor %d is not the memory of %d workers", fd,
                        world);
    struct flock lock = byte_of(rank, F_WRLCK);
    if (fcntl(s->fd, F_OFD_SETLK, &lock) != 0)
        return PML_FAIL(err, PML_BUSY, "there is a worker %d already", rank);
    atomic_store(&s->control->joined[rank], 1);
    return PML_OK;
}

pml_status pml_comm_shared(int fd, int rank, int world, pml_comm **comm, pml_error *err)
{
    *comm = NULL;
    if (world < 1 || world > PMLI_WORLD_MAX || rank < 0 || rank >= world)
        return PML_FAIL(err, PML_INVALID, "there is no rank %d of %d", rank, world);
    shared *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the collectives");
    s->base = (pml_comm){&shared_kind, rank, world};
    s->fd = -1;
    pml_status status = join(s, fd, err);
    *comm = &s->base;
    if (status != PML_OK)
        pml_comm_destroy(comm);
    return status;
}

pml_status pml_comm_shared_abort(int fd, pml_error *err)
{
    control *c = mmap(NULL, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (c == MAP_FAILED)
        return PML_FAIL(err, PML_IO, "cannot map the shared memory: %s", strerror(errno));
    raise_abort(c);
    munmap(c, CONTROL_BYTES);
    return PML_OK;
}
