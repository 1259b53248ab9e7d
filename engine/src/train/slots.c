#include "pml/train/slots.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, SLOTS = 2, SETTLED = 0, STAGE = 1 /* where there is one */ };
static const uint64_t magic = 0x323053544f4c5350; /* "PSLOTS02" */

/* order 0: nothing whole is in the slot; else the higher one is the newer. */
typedef struct slot_head {
    _Atomic int64_t order;
    int64_t step;
} slot_head;

typedef struct header {
    uint64_t magic, bytes, staged;
    slot_head slots[SLOTS];
} header;
_Static_assert(sizeof(header) <= PAGE, "the header is one page");

struct pml_slots {
    int fd;
    size_t bytes; /* of a payload */
    header *header;
    int writing;          /* slot, -1: none */
    int last;             /* slot committed last by us, -1: none */
    atomic_int held;      /* slot, -1: none */
    char *mapping[SLOTS]; /* its state, and behind it its payload; of a stage the state alone */
    void *stage;          /* NULL: none */
};

static size_t up_to_page(size_t bytes)
{
    return (bytes + PAGE - 1) / PAGE * PAGE;
}

static size_t slot_bytes(size_t payload)
{
    return up_to_page(sizeof(pml_train_state)) + up_to_page(payload);
}

static off_t slot_at(size_t payload, int slot)
{
    return (off_t)(PAGE + (size_t)slot * slot_bytes(payload));
}

static off_t payload_at(size_t payload, int slot)
{
    return slot_at(payload, slot) + (off_t)up_to_page(sizeof(pml_train_state));
}

pml_status pml_slots_create(int *fd, pml_error *err)
{
    *fd = memfd_create("pml-slots", MFD_CLOEXEC);
    if (*fd < 0)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot make shared memory for snapshots: %s",
                        strerror(errno));
    return PML_OK;
}

/* NULL in *head where nobody has written yet. */
static pml_status map_header(int fd, header **head, pml_error *err)
{
    struct stat st;
    *head = NULL;
    if (fstat(fd, &st) != 0)
        return PML_FAIL(err, PML_IO, "the snapshots' memory: %s", strerror(errno));
    if (st.st_size < PAGE)
        return PML_OK;
    header *h = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map the snapshots' header: %s",
                        strerror(errno));
    size_t slots = 0, all = 0;
    bool sane = h->bytes < (SIZE_MAX >> 8) &&
                !__builtin_mul_overflow(slot_bytes(h->bytes), (size_t)SLOTS, &slots) &&
                !__builtin_add_overflow(slots, (size_t)PAGE, &all) && (off_t)all == st.st_size;
    if (h->magic == magic && sane) {
        *head = h;
        return PML_OK;
    }
    bool begun = h->magic == magic;
    munmap(h, PAGE);
    /* A writer that died before its magic has left nothing. */
    return begun ? PML_FAIL(err, PML_CORRUPT, "the snapshots' memory is damaged") : PML_OK;
}

static int newest(const header *h, int64_t most)
{
    int found = -1;
    for (int i = 0; i < SLOTS; i++) {
        int64_t order = atomic_load(&h->slots[i].order);
        if (order > 0 && h->slots[i].step <= most &&
            (found < 0 || order > atomic_load(&h->slots[found].order)))
            found = i;
    }
    return found;
}

/* Slot 1 as it is in the memfd into slot 0, which is nothing until its last byte is there. */
static pml_status settle_left(int fd, header *h, pml_error *err)
{
    const size_t bytes = slot_bytes(h->bytes);
    char *to = mmap(NULL, 2 * bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, PAGE);
    if (to == MAP_FAILED)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map a snapshot: %s", strerror(errno));
    int64_t order = atomic_load(&h->slots[STAGE].order);
    atomic_store(&h->slots[SETTLED].order, 0);
    memcpy(to, to + bytes, bytes);
    h->slots[SETTLED].step = h->slots[STAGE].step;
    atomic_store(&h->slots[SETTLED].order, order);
    munmap(to, 2 * bytes);
    return PML_OK;
}

pml_status pml_slots_choose(int fd, int64_t most, int *slot, int64_t *step, pml_error *err)
{
    header *h;
    *slot = -1;
    *step = 0;
    pml_status status = map_header(fd, &h, err);
    if (status != PML_OK || h == NULL)
        return status;
    *slot = newest(h, most);
    if (*slot == STAGE && h->staged) {
        status = settle_left(fd, h, err);
        *slot = status == PML_OK ? SETTLED : -1;
        if (status != PML_OK) { /* what is there stays as it is */
            munmap(h, PAGE);
            return status;
        }
    }
    for (int i = 0; i < SLOTS; i++)
        if (i != *slot)
            atomic_store(&h->slots[i].order, 0);
    if (*slot >= 0)
        *step = h->slots[*slot].step;
    munmap(h, PAGE);
    return PML_OK;
}

/* ---- writing ---- */

static pml_status prepare(pml_slots *s, pml_error *err)
{
    pml_status status = map_header(s->fd, &s->header, err);
    if (status != PML_OK)
        return status;
    if (s->header != NULL && s->header->bytes != s->bytes)
        return PML_FAIL(err, PML_INVALID, "the snapshots' memory is for %llu bytes, not %zu",
                        (unsigned long long)s->header->bytes, s->bytes);
    if (s->header != NULL) {
        s->header->staged = s->stage != NULL;
        return PML_OK;
    }
    size_t slots, all;
    if (s->bytes > (SIZE_MAX >> 8) ||
        __builtin_mul_overflow(slot_bytes(s->bytes), (size_t)SLOTS, &slots) ||
        __builtin_add_overflow(slots, (size_t)PAGE, &all))
        return PML_FAIL(err, PML_INVALID, "no snapshot has %zu bytes", s->bytes);
    if (ftruncate(s->fd, (off_t)all) != 0 || fallocate(s->fd, 0, 0, (off_t)all) != 0)
        return PML_FAIL(err, PML_NO_MEMORY, "no shared memory for two snapshots of %zu bytes: %s",
                        s->bytes, strerror(errno));
    s->header = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0);
    if (s->header == MAP_FAILED) {
        s->header = NULL;
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map the snapshots' header: %s",
                        strerror(errno));
    }
    *s->header = (header){.bytes = s->bytes, .staged = s->stage != NULL};
    atomic_thread_fence(memory_order_seq_cst);
    s->header->magic = magic;
    return PML_OK;
}

static bool is_stage(const pml_slots *s, int slot)
{
    return s->stage != NULL && slot == STAGE;
}

/* Of what s->mapping[slot] is the beginning of. */
static size_t mapped_bytes(const pml_slots *s, int slot)
{
    return is_stage(s, slot) ? up_to_page(sizeof(pml_train_state)) : slot_bytes(s->bytes);
}

static void *payload_of(const pml_slots *s, int slot)
{
    return is_stage(s, slot) ? s->stage : s->mapping[slot] + up_to_page(sizeof(pml_train_state));
}

static pml_status map_slot(pml_slots *s, int slot, pml_error *err)
{
    int protection = is_stage(s, slot) ? PROT_READ | PROT_WRITE : PROT_READ;
    void *mapping = mmap(NULL, mapped_bytes(s, slot), protection, MAP_SHARED | MAP_POPULATE, s->fd,
                         slot_at(s->bytes, slot));
    if (mapping == MAP_FAILED)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map a snapshot: %s", strerror(errno));
    s->mapping[slot] = mapping;
    if (is_stage(s, slot) &&
        mmap(s->stage, up_to_page(s->bytes), protection, MAP_SHARED | MAP_POPULATE | MAP_FIXED,
             s->fd, payload_at(s->bytes, slot)) == MAP_FAILED)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map the snapshots' stage: %s", strerror(errno));
    return PML_OK;
}

pml_status pml_slots_open(int fd, size_t bytes, void *stage, pml_slots **out, pml_error *err)
{
    *out = NULL;
    pml_slots *s = calloc(1, sizeof *s);
    if (s == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for the snapshots");
    *s = (pml_slots){
        .fd = fd, .bytes = bytes, .stage = stage, .writing = -1, .last = -1, .held = -1};
    if (stage != NULL) /* its own pages first: there need not be room for both */
        madvise(stage, up_to_page(bytes), MADV_DONTNEED);
    pml_status status = prepare(s, err);
    for (int i = 0; status == PML_OK && i < SLOTS; i++)
        status = map_slot(s, i, err);
    if (status != PML_OK)
        pml_slots_close(&s);
    *out = s;
    return status;
}

/* Nobody can write there any more; the pages stay. */
static void leave_writing(pml_slots *s)
{
    if (s->writing >= 0 && !is_stage(s, s->writing))
        mprotect(s->mapping[s->writing], slot_bytes(s->bytes), PROT_READ);
    s->writing = -1;
}

void pml_slots_close(pml_slots **out)
{
    pml_slots *s = *out;
    *out = NULL;
    if (s == NULL)
        return;
    for (int i = 0; i < SLOTS; i++)
        if (s->mapping[i] != NULL)
            munmap(s->mapping[i], mapped_bytes(s, i));
    if (s->stage != NULL) /* private memory again */
        mmap(s->stage, up_to_page(s->bytes), PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (s->header != NULL)
        munmap(s->header, PAGE);
    free(s);
}

/* What slot `slot` holds is about to change: it is nothing, and can be written. */
static pml_status open_slot(pml_slots *s, int slot, pml_error *err)
{
    if (!is_stage(s, slot) &&
        mprotect(s->mapping[slot], slot_bytes(s->bytes), PROT_READ | PROT_WRITE) != 0)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot open a snapshot: %s", strerror(errno));
    atomic_store(&s->header->slots[slot].order, 0);
    s->writing = slot;
    return PML_OK;
}

pml_status pml_slots_begin(pml_slots *s, void **payload, pml_error *err)
{
    leave_writing(s); /* one that was begun and never committed */
    int held = atomic_load(&s->held);
    int slot = s->stage != NULL                    ? STAGE
               : held >= 0                         ? 1 - held
               : newest(s->header, INT64_MAX) == 0 ? 1
                                                   : 0;
    *payload = payload_of(s, slot);
    return open_slot(s, slot, err);
}

void pml_slots_commit(pml_slots *s, const pml_train_state *state)
{
    slot_head *mine = &s->header->slots[s->writing];
    int64_t before = atomic_load(&s->header->slots[1 - s->writing].order);
    memcpy(s->mapping[s->writing], state, sizeof *state);
    mine->step = state->step;
    atomic_store(&mine->order, before + 1); /* after all of it: sequentially consistent */
    s->last = s->writing;
    leave_writing(s);
}

pml_status pml_slots_settle(pml_slots *s, pml_error *err)
{
    if (s->stage == NULL)
        return PML_OK;
    const pml_train_state *state = (const pml_train_state *)(const void *)s->mapping[STAGE];
    pml_status status = open_slot(s, SETTLED, err);
    if (status != PML_OK)
        return status;
    memcpy(payload_of(s, SETTLED), s->stage, s->bytes);
    pml_slots_commit(s, state);
    pml_slots_drop(s);
    return PML_OK;
}

void pml_slots_drop(pml_slots *s)
{
    if (s->stage == NULL)
        return;
    leave_writing(s);
    atomic_store(&s->header->slots[STAGE].order, 0);
}

bool pml_slots_room(const pml_slots *s)
{
    return s->stage == NULL || atomic_load(&s->held) < 0;
}

bool pml_slots_staged(const pml_slots *s)
{
    return s->stage != NULL;
}

void pml_slots_hold(pml_slots *s, const pml_train_state **state, const void **payload)
{
    *state = (const pml_train_state *)(const void *)s->mapping[s->last];
    *payload = payload_of(s, s->last);
    atomic_store(&s->held, s->last);
}

void pml_slots_release(pml_slots *s)
{
    atomic_store(&s->held, -1);
}

/* ---- reading ---- */

pml_status pml_slots_map(int fd, int slot, pml_slot_view *view, pml_error *err)
{
    header *h;
    *view = (pml_slot_view){0};
    pml_status status = map_header(fd, &h, err);
    if (status != PML_OK)
        return status;
    bool whole = h != NULL && slot >= 0 && slot < SLOTS && atomic_load(&h->slots[slot].order) > 0;
    size_t bytes = h != NULL ? h->bytes : 0;
    if (h != NULL)
        munmap(h, PAGE);
    if (!whole)
        return PML_FAIL(err, PML_NOT_FOUND, "there is no snapshot in slot %d", slot);
    size_t mapped = slot_bytes(bytes);
    void *mapping = mmap(NULL, mapped, PROT_READ, MAP_SHARED, fd, slot_at(bytes, slot));
    if (mapping == MAP_FAILED)
        return PML_FAIL(err, PML_NO_MEMORY, "cannot map a snapshot: %s", strerror(errno));
    *view = (pml_slot_view){.state = mapping,
                            .payload = (char *)mapping + up_to_page(sizeof(pml_train_state)),
                            .bytes = bytes,
                            .mapping = mapping,
                            .mapped = mapped};
    return PML_OK;
}

void pml_slots_unmap(pml_slot_view *view)
{
    if (view->mapping != NULL)
        munmap(view->mapping, view->mapped);
    *view = (pml_slot_view){0};
}
