/* A worker without a model: the real worker's logic over a job that counts.
 *
 *   FAKE_STEP_MS       milliseconds of a step (2)
 *   FAKE_NAN_STEP      loss of this step is not a number
 *   FAKE_NAN_FROM      nor that of any from this one on
 *   FAKE_FAIL_STEP     this step fails
 *   FAKE_LATE_MS       milliseconds from then until the last rank says so; the others have left
 *   FAKE_MUTE          and what it reports from then on never arrives
 *   FAKE_LOAD_MS       milliseconds of loading, and for as long as the run folder has a file `slow`
 *   FAKE_SAVE_MS       milliseconds of writing a checkpoint, and while there is a file `held`: then
 *                      it makes one `holding`
 *   FAKE_EVAL_STEPS    steps between evaluations (0); a snapshot that owes one makes a file `owing`
 *   FAKE_WAIT_STEP     ranks stand in this step while there is a file `wait`
 *   FAKE_HANG_STEP     a rank does not come back from this step, once in the run's life:
 *   FAKE_HANG_RANK     this one (the last)
 *   FAKE_MUTE_TUNED    what the last rank reports from its first `set` on never arrives, once in
 *                      the run's life; a snapshot that is taken behind a command makes a file
 *                      `kept`
 *
 *   FAKE_GPU           its device is a GPU of that name, whose driver is tests/shim/nvml.c
 *   FAKE_FLOPS         operations of a step
 *   FAKE_LACKS         what that GPU lacks
 *   FAKE_LACKS_STEP    step in which that is found out (before the first one)
 *   FAKE_RESERVE_MIB   what its plan takes of a device of 4,000 MiB that is all free to its driver
 *   FAKE_REFUSED       while the run folder has a file `refused`: memory is missing when the device
 *                      is `open`ed, or for the `plan`, or the plan is too `large` for the device
 *   FAKE_DEVICES       folder of device files
 *   FAKE_PATIENCE      seconds that it waits for its turn to plan (a minute)
 *   FAKE_EACH          each rank has such a device of its own; rank 0 stays before its turn while
 *                      the run folder has a file `stuck`
 *
 * An evaluation lasts while the run folder has a file `examined`, and makes one `examining` then.
 * A step all-reduces, so ranks hold each other up as real ones do. Each rank appends what it has
 * used, one line a step, to used-RANK.txt in the run folder: the oracle for "on all workers at one
 * step". */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "claim.h"
#include "fake_learns.h"
#include "pml/base/clock.h"
#include "pml/base/file.h"
#include "pml/base/hash.h"
#include "pml/base/path.h"
#include "worker.h"

enum { STAGE_BYTES = 4096 };

struct job {
    pml_comm *comm;
    claim *memory;
    int rank, world;
    pml_train_state tuned; /* as of the last set */
    FILE *used;
    char hung[4096]; /* path of the mark */
    char held[4096], wait[4096], examined[4096], examining[4096], kept[4096], holding[4096],
        owing[4096];
    int64_t step, max_steps;
    uint64_t learnt;
    unsigned char *stage; /* of one worker alone: what a step leaves nothing of as it was */
    void (*tick)(void *user);
    void *user;
};

static double number(const char *name, double otherwise)
{
    const char *text = getenv(name);
    return text == NULL ? otherwise : atof(text);
}

/* state.json of the fake: one line. */
static pml_status restore(job *j, const char *checkpoint, pml_train_state *state, pml_error *err)
{
    char path[4096];
    pml_status status = pml_path_join(path, sizeof path, checkpoint, "state.json", err);
    FILE *file = status == PML_OK ? fopen(path, "r") : NULL;
    long long step;
    if (file == NULL)
        return PML_FAIL(err, PML_NOT_FOUND, "%s: %s", path, strerror(errno));
    unsigned long long learnt = 0;
    int owes;
    int n = fscanf(
        file,
        "{\"step\":%lld,\"learning_rate\":%lf,\"weight_decay\":%lf,\"owes\":%d,\"learnt\":%llu",
        &step, &state->learning_rate, &state->weight_decay, &owes, &learnt);
    fclose(file);
    state->step = step;
    state->owes_evaluation = n == 5 && owes != 0;
    j->learnt = learnt;
    return n == 5 ? PML_OK : PML_FAIL(err, PML_CORRUPT, "%s is damaged", path);
}

/* ---- a device's memory ---- */

enum { DEVICE_MIB = 4000, CONTEXT_MIB = 530 };

static pml_status fake_identity(int index, pml_device_identity *identity, pml_error *err)
{
    (void)err;
    *identity =
        (pml_device_identity){.memory_total = (size_t)DEVICE_MIB << 20, .bus = "0000:0f:00.0"};
    if (getenv("FAKE_EACH") != NULL) /* in another order than ranks */
        snprintf(identity->uuid, sizeof identity->uuid, "%d0-fake-device", 9 - index);
    else
        snprintf(identity->uuid, sizeof identity->uuid, "fake-device");
    return PML_OK;
}

/* As pml_stepper_new does. Of what others have taken the driver knows nothing: what is left is less
 * only because it is reserved. */
static pml_status reserve(job *j, const job_setup *setup, job_facts *facts, pml_error *err)
{
    static const pml_backend backend = {.name = "fake", .identity_of = fake_identity};
    const claim_options options = {.backend = &backend,
                                   .index = setup->rank,
                                   .device = "fake",
                                   .run = setup->folder,
                                   .devices = getenv("FAKE_DEVICES"),
                                   .inherited = setup->reserved,
                                   .comm = setup->comm,
                                   .patience = number("FAKE_PATIENCE", 0),
                                   .crowded = &facts->crowded,
                                   .keep = setup->keep,
                                   .tick = setup->tick,
                                   .user = setup->user};
    const pml_device_info info = {.memory_total = (size_t)DEVICE_MIB << 20,
                                  .memory_free = (size_t)(DEVICE_MIB - CONTEXT_MIB) << 20,
                                  .held = (size_t)CONTEXT_MIB << 20};
    size_t wanted = (size_t)number("FAKE_RESERVE_MIB", 0) << 20, left;
    pml_status status = claim_new(&options, &j->memory, err);
    if (status != PML_OK)
        return status;
    const pml_memory_claim *claim = claim_of_stepper(j->memory);
    char path[4096];
    snprintf(path, sizeof path, "%.4000s/stuck", setup->folder);
    while (getenv("FAKE_EACH") != NULL && j->rank == 0 && access(path, F_OK) == 0) {
        pml_clock_sleep(0.005);
        setup->tick(setup->user);
    }
    snprintf(path, sizeof path, "%.4000s/refused", setup->folder);
    const char *refused = access(path, F_OK) == 0 ? getenv("FAKE_REFUSED") : NULL;
    wanted = refused != NULL && strcmp(refused, "large") == 0 ? (size_t)5000 << 20 : wanted;
    if (refused != NULL && strcmp(refused, "open") == 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "made to find no memory");
    if (status == PML_OK)
        status = claim->begin(claim->user, err);
    if (status == PML_OK)
        status = claim->ask(claim->user, &info, &left, err);
    if (status == PML_OK && refused != NULL && strcmp(refused, "plan") == 0)
        status = PML_FAIL(err, PML_NO_MEMORY, "made to find no memory");
    if (status != PML_OK)
        claim->give_up(claim->user, 0, err);
    if (status == PML_OK)
        status = claim->settle(claim->user, wanted, err);
    if (status == PML_OK)
        status = claim->taken(claim->user, wanted - info.held, err);
    snprintf(facts->unreserved, sizeof facts->unreserved, "%s", claim_trouble(j->memory));
    return status;
}

static void fake_lacks(job *j, char lacks[PML_LACKS])
{
    const char *what = getenv("FAKE_LACKS");
    bool known = getenv("FAKE_GPU") != NULL && j->step >= (int64_t)number("FAKE_LACKS_STEP", 0);
    snprintf(lacks, PML_LACKS, "%s", what != NULL && known ? what : "");
}

static pml_status fake_open(const job_setup *setup, job **out, job_facts *facts, pml_error *err)
{
    char path[4096];
    job *j = calloc(1, sizeof *j);
    *out = j;
    if (j == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory");
    *j = (job){.comm = setup->comm,
               .rank = setup->rank,
               .world = setup->world,
               .max_steps = pml_message_int(setup->run, "max_steps")};
    snprintf(path, sizeof path, "%.4000s/used-%d.txt", setup->folder, setup->rank);
    snprintf(j->hung, sizeof j->hung, "%.4000s/hung", setup->folder);
    snprintf(j->held, sizeof j->held, "%.4000s/held", setup->folder);
    snprintf(j->holding, sizeof j->holding, "%.4000s/holding", setup->folder);
    snprintf(j->owing, sizeof j->owing, "%.4000s/owing", setup->folder);
    snprintf(j->wait, sizeof j->wait, "%.4000s/wait", setup->folder);
    snprintf(j->examined, sizeof j->examined, "%.4000s/examined", setup->folder);
    snprintf(j->examining, sizeof j->examining, "%.4000s/examining", setup->folder);
    snprintf(j->kept, sizeof j->kept, "%.4000s/kept", setup->folder);
    j->used = fopen(path, "a");
    if (j->used == NULL)
        return PML_FAIL(err, PML_IO, "%s: %s", path, strerror(errno));
    setup->progress(setup->user, "loading", 0.5);
    snprintf(path, sizeof path, "%.4000s/slow", setup->folder);
    pml_clock_sleep(number("FAKE_LOAD_MS", 0) / 1e3);
    while (access(path, F_OK) == 0) {
        pml_clock_sleep(0.005);
        setup->tick(setup->user);
    }
    if (getenv("FAKE_RESERVE_MIB") != NULL) {
        pml_status reserved = reserve(j, setup, facts, err);
        if (reserved != PML_OK)
            return reserved;
    }
    facts->max_steps = j->max_steps;
    facts->has_eval = pml_message_string(setup->run, "eval_data")[0] != '\0';
    facts->policy.eval_epochs =
        strcmp(pml_message_string(setup->run, "eval_strategy"), "epoch") == 0;
    facts->policy.save_best = strcmp(pml_message_string(setup->run, "save_strategy"), "best") == 0;
    facts->available = 1 << 20;
    facts->plan.by_cause[PML_CAUSE_WEIGHTS] = 1000;
    facts->plan.choices.pieces = 1;
    facts->state.learning_rate = pml_message_number(setup->run, "learning_rate");
    facts->state.save_steps = pml_message_int(setup->run, "save_steps");
    facts->state.eval_steps = (int64_t)number("FAKE_EVAL_STEPS", 0);
    facts->state.best_step = -1;
    snprintf(facts->state.identity, sizeof facts->state.identity, "{\"threads\":%d}",
             (int)number("FAKE_THREADS", 1));
    pml_status status = PML_OK;
    if (setup->checkpoint[0] != '\0')
        status = restore(j, setup->checkpoint, &facts->state, err);
    const char *gpu = getenv("FAKE_GPU");
    if (gpu != NULL) {
        snprintf(facts->device, sizeof facts->device, "%s", gpu);
        snprintf(facts->bus, sizeof facts->bus, "0000:0f:00.0");
        fake_lacks(j, facts->lacks);
    }
    facts->payload_bytes = sizeof j->learnt;
    facts->slots = true;
    if (status == PML_OK && j->world == 1) {
        facts->stage = j->stage = aligned_alloc(STAGE_BYTES, STAGE_BYTES);
        if (j->stage == NULL)
            return PML_FAIL(err, PML_NO_MEMORY, "no memory");
    }
    if (setup->kept != NULL) {
        facts->state = *setup->kept;
        memcpy(&j->learnt, setup->payload, sizeof j->learnt);
    }
    j->tick = setup->tick;
    j->user = setup->user;
    j->step = facts->state.step;
    j->tuned = facts->state;
    return status;
}

static pml_status fake_open_left(const job_setup *setup, job **out, pml_error *err)
{
    job *j = *out = calloc(1, sizeof *j);
    if (j == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory");
    snprintf(j->held, sizeof j->held, "%.4000s/held", setup->folder);
    return setup->payload_bytes == sizeof j->learnt
               ? PML_OK
               : PML_FAIL(err, PML_INVALID, "%zu bytes", setup->payload_bytes);
}

static void fake_close(job **j)
{
    if ((*j)->used != NULL)
        fclose((*j)->used);
    claim_destroy(&(*j)->memory);
    free((*j)->stage);
    free(*j);
    *j = NULL;
}

static pml_share fake_share(job *j)
{
    return (pml_share){.labels = 10 + j->rank, .tokens = 20};
}

static double fake_epoch(const job *j)
{
    return (double)j->step / 100;
}

static double fake_factor(const job *j, const pml_train_state *state)
{
    (void)j, (void)state;
    return 0.5;
}

/* Of the run, not of this process. */
static bool is_first_time(const job *j)
{
    int mark = open(j->hung, O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (mark < 0)
        return false;
    close(mark);
    return true;
}

static void hang_once(const job *j, int64_t step)
{
    if (step != (int64_t)number("FAKE_HANG_STEP", -1) ||
        j->rank != (int)number("FAKE_HANG_RANK", j->world - 1) || !is_first_time(j))
        return;
    for (;;)
        pause();
}

/* As where the threads that carry reports get no processor: our sockets are shut, but the lease,
 * and what comes over a later connection is not heard as ours. */
static void fall_mute(void)
{
    enum { DESCRIPTORS = 256 };
    for (int fd = 0; fd < DESCRIPTORS; fd++) {
        int type;
        socklen_t size = sizeof type;
        if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM)
            shutdown(fd, SHUT_RDWR);
    }
}

static pml_status fake_step(job *j, const pml_update *u, pml_step_result *result, pml_error *err)
{
    pml_clock_sleep(number("FAKE_STEP_MS", 2) / 1e3);
    if (u->step == (int64_t)number("FAKE_FAIL_STEP", -1) && j->rank == j->world - 1) {
        if (number("FAKE_MUTE", 0) != 0)
            fall_mute();
        double late = number("FAKE_LATE_MS", 0); /* as one that is starved on its way out */
        if (late > 0)
            (void)pml_comm_shared_abort(COMM_FD, NULL);
        pml_clock_sleep(late / 1e3);
        return PML_FAIL(err, PML_NO_MEMORY, "made to fail at step %lld", (long long)u->step);
    }
    if (j->stage != NULL)
        memset(j->stage, (int)(u->step & 0xff), STAGE_BYTES);
    hang_once(j, u->step);
    while (u->step == (int64_t)number("FAKE_WAIT_STEP", -1) && access(j->wait, F_OK) == 0) {
        pml_clock_sleep(0.005);
        j->tick(j->user);
    }
    double sum = 1;
    pml_status status = pml_comm_allreduce_f64(j->comm, &sum, 1, err);
    if (status != PML_OK)
        return status;
    if (sum != j->world)
        return PML_FAIL(err, PML_INTERNAL, "%d workers sum to %g", j->world, sum);
    fprintf(j->used, "%lld %.17g %.17g %.17g %.17g %lld %s %lld\n", (long long)u->step,
            u->learning_rate, u->weight_decay, u->max_grad_norm, j->tuned.lora_dropout,
            (long long)j->tuned.accumulation, pml_schedule_name(j->tuned.schedule.type),
            (long long)j->tuned.schedule.warmup_steps);
    fflush(j->used);
    j->tick(j->user);
    j->learnt = fake_learns(j->learnt, u->step, u->learning_rate, u->weight_decay);
    bool bad = u->step == (int64_t)number("FAKE_NAN_STEP", -1) ||
               (double)u->step >= number("FAKE_NAN_FROM", HUGE_VAL);
    const double begin = number("FAKE_SCALE", 0); /* float16: too large in the steps 3 to 5 */
    bool overflow = begin > 0 && u->step >= 3 && u->step <= 5;
    double halved = u->step < 3 ? 0 : (double)(u->step > 6 ? 3 : u->step - 3);
    *result = (pml_step_result){.loss = bad ? (double)NAN : 1.0 / (double)u->step,
                                .grad_norm = overflow ? (double)INFINITY : 1,
                                .skipped = bad || overflow,
                                .overflow = overflow,
                                .loss_scale = ldexp(begin, -(int)halved),
                                .flops = number("FAKE_FLOPS", 0)};
    j->step = u->step;
    return PML_OK;
}

static pml_status fake_tune(job *j, const pml_train_state *state, pml_error *err)
{
    (void)err;
    j->tuned = *state;
    if (number("FAKE_MUTE_TUNED", 0) != 0 && j->step > 0 && j->rank == j->world - 1 &&
        is_first_time(j))
        fall_mute();
    return PML_OK;
}

static pml_status fake_evaluate(job *j, bool (*goes_on)(void *user), void *user, double *loss_sum,
                                double *labels, pml_error *err)
{
    while (goes_on(user) && access(j->examined, F_OK) == 0) {
        if (access(j->examining, F_OK) != 0) {
            pml_status status = pml_file_write(j->examining, "examining", 9, 0600, err);
            if (status != PML_OK)
                return status;
        }
        pml_clock_sleep(0.005);
        j->tick(j->user);
    }
    *loss_sum = 3.0 * (j->rank + 1);
    *labels = j->rank + 1;
    return PML_OK;
}

static pml_status fake_sample(job *j, const pml_generate_options *o, pml_error *err)
{
    (void)j;
    if (o->n_prompt + o->max_new_tokens > 1000)
        return PML_FAIL(err, PML_INVALID, "%d tokens are more than the planned 1000",
                        o->n_prompt + o->max_new_tokens);
    const int32_t *prompt = o->prompt;
    for (int32_t row = 0; row < o->n_prompts; prompt += o->lengths[row], row++)
        for (int32_t i = 0; i < o->max_new_tokens; i++)
            if (!o->on_token(o->user, row, prompt[0] + i))
                break;
    return PML_OK;
}

/* What it has learnt: one number that depends on every step and every setting used. */
static pml_status fake_put(job *j, const pml_train_state *state, pml_train_state *whole,
                           void *memory, pml_error *err)
{
    *whole = *state;
    memcpy(memory, &j->learnt, sizeof j->learnt);
    pml_status status = PML_OK;
    if (number("FAKE_MUTE_TUNED", 0) != 0 && state->command > 0)
        status = pml_file_write(j->kept, "", 0, 0600, err);
    if (status == PML_OK && state->owes_evaluation)
        status = pml_file_write(j->owing, "", 0, 0600, err);
    return status;
}

/* One file and its line of MANIFEST. */
static pml_status put_file(const char *folder, const char *name, const char *text, char *manifest,
                           size_t capacity, pml_error *err)
{
    char path[4400], hex[PML_HASH_HEX];
    uint8_t hash[PML_HASH_BYTES];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    pml_status status = pml_file_write(path, text, strlen(text), 0600, err);
    if (status == PML_OK && manifest != NULL)
        status = pml_hash_memory(text, strlen(text), hash, err);
    if (status != PML_OK || manifest == NULL)
        return status;
    pml_hash_hex(hash, PML_HASH_BYTES, hex);
    size_t n = strlen(manifest);
    snprintf(manifest + n, capacity - n, "%s  %s\n", hex, name);
    return PML_OK;
}

/* A folder that the reader of real checkpoints takes for whole. */
static pml_status fake_write(job *j, const pml_train_state *whole, const void *memory,
                             const char *folder, pml_watch *watch, size_t *bytes, pml_error *err)
{
    uint64_t learnt;
    memcpy(&learnt, memory, sizeof learnt);
    char temporary[4200], text[256], manifest[1000] = "";
    snprintf(temporary, sizeof temporary, "%.4000s.part", folder);
    *bytes = (size_t)snprintf(text, sizeof text,
                              "{\"step\":%lld,\"learning_rate\":%.17g,\"weight_decay\":%.17g,"
                              "\"owes\":%d,\"learnt\":%llu}",
                              (long long)whole->step, whole->learning_rate, whole->weight_decay,
                              whole->owes_evaluation, (unsigned long long)learnt);
    enum { PIECES = 8, MIB = 1 << 20 };
    for (int i = 1; i <= PIECES; i++) {
        pml_clock_sleep(number("FAKE_SAVE_MS", 0) / 1e3 / PIECES);
        watch->moved(watch->user, (size_t)i * 16 * MIB, (size_t)PIECES * 16 * MIB);
    }
    pml_status status = PML_OK;
    if (j->holding[0] != '\0' && access(j->held, F_OK) == 0)
        status = pml_file_write(j->holding, "", 0, 0600, err);
    while (access(j->held, F_OK) == 0)
        pml_clock_sleep(0.005);
    if (status == PML_OK)
        status = pml_folder_make(temporary, err);
    const char *const files[] = {"adapter_model.safetensors", "optimizer.safetensors",
                                 "state.json"};
    for (int i = 0; i < 3 && status == PML_OK; i++)
        status =
            put_file(temporary, files[i], i == 2 ? text : "fake", manifest, sizeof manifest, err);
    if (status == PML_OK)
        status = put_file(temporary, "MANIFEST", manifest, NULL, 0, err);
    if (status == PML_OK && rename(temporary, folder) != 0)
        status = PML_FAIL(err, PML_IO, "%s: %s", folder, strerror(errno));
    return status;
}

static pml_status fake_prune(job *j, const char *parent, int64_t best, pml_error *err)
{
    (void)j, (void)parent, (void)best, (void)err;
    return PML_OK;
}

static const job_kind fake = {
    .open = fake_open,
    .open_left = fake_open_left,
    .close = fake_close,
    .share = fake_share,
    .epoch = fake_epoch,
    .factor = fake_factor,
    .step = fake_step,
    .tune = fake_tune,
    .evaluate = fake_evaluate,
    .sample = fake_sample,
    .lacks = fake_lacks,
    .put = fake_put,
    .write = fake_write,
    .prune = fake_prune,
};

int main(void)
{
    return worker_main(&fake);
}
