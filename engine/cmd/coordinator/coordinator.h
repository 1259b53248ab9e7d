/* The coordinator of one run: what its files share.
 *
 *   main.c      the loop, the end           start.c     arguments and what the loop needs
 *   clients.c   requests and answers
 *   sharing.c   keys that were given out, and the doors on a network
 *   commands.c  the one order of commands: accept → send → acknowledge → commit → applied
 *   states.c    what a command does in each state: the table
 *   workers.c   starting workers, their ends       reports.c   what they say
 *   prepare.c   the data preparation that may run first
 *   resume.c    which checkpoint to go on from, and what to apply again
 *   watch.c     which worker hangs or is silent
 *   recover.c   going on after a worker died or hung      handover.c  after a coordinator died
 *   eventlog.c  the log     journal.c  on the way to it    spawn.c  child processes
 *   upkeep.c    what others may take away under us
 *
 * One thread. What is not in the log is not announced; journal.c says what happens meanwhile. */
#ifndef PML_COORDINATOR_H
#define PML_COORDINATOR_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "eventlog.h"
#include "pml/base/hold.h"
#include "pml/json/messages.h"
#include "pml/net/hub.h"

typedef enum run_state {
    RUN_STARTING = 0,
    RUN_RUNNING,
    RUN_PAUSED,
    RUN_FINISHED,
    RUN_STOPPED,
    RUN_FAILED
} run_state;

typedef struct worker {
    int rank;
    const char *device;         /* borrowed from run.json's message */
    pid_t pid;                  /* 0: not there */
    int lease;                  /* our end of the socket pair */
    int reserved;               /* its device's memory, for who replaces it; -1: none */
    bool inherits;              /* and it is what the worker was started with, not its own */
    char state[12];             /* as in record worker */
    int turns[RUN_STOPPED + 1]; /* how often it has said each of the run's states */
    pml_keypair keys;
    pml_peer peer;
    bool joined, ready, asked_to_end;
    int exit_status; /* as waitpid gave it */
    int64_t step, max_steps, rss;
    size_t acked;        /* commands before this index are acknowledged, or were never sent */
    int64_t heard, told; /* its last report in the log, and the last that it knows of */
    bool sync;           /* it asked for the log to be on disk */
    char phase[12];      /* as its last beat says, with idle, limit and longest */
    double idle, limit, longest;
    int waits_for;   /* likewise: the rank that it waits for, -1: nobody */
    bool told_since; /* of what it has done after that beat */
    double heard_at; /* when the last beat came, or it was started: by coordinator.attended */
    double back_at;  /* when one came after a silence (0: none did), likewise */
    double cpu, beat_at;
    pml_message *plan, *identity; /* identity: the ready report that holds it */
    pml_message *gpu;             /* of its last beat; NULL: its device is none */
} worker;

/* A message holds so many readings of GPUs beside all else. */
enum { GPUS_TOLD = 64 };

/* So much of a complaint is kept, to be known again. */
enum { COMPLAINT_MAX = 1000 };

typedef struct command {
    int64_t number;
    pml_message_type verb; /* a request */
    char id[65];
    uint64_t digest;      /* of verb and arguments */
    pml_message *request; /* until it is finished */
    bool committed;
    int reports;        /* applied or refused, of `world` */
    int64_t first_said; /* number of rank 0's; 0: not yet */
    int64_t step;
    char refusal[512]; /* "" = nobody refused */
} command;

/* A key that was let in by share. */
typedef struct shared_key {
    char public_key[PML_KEY_TEXT], name[65];
    pml_role role;
    int tag;           /* of messages that are sent with it */
    double crowded_at; /* when the log was told that it has too many viewers; 0: never */
} shared_key;

/* What was turned away at the doors, as the log was told of it last. */
typedef struct doorbook {
    pml_refusals told;
    double at; /* 0: never */
} doorbook;

/* A set that the log holds, or a resume with `nonfinite`: for recovery. */
typedef struct tuned {
    int64_t step, command;
    pml_message *args;
} tuned;

/* A checkpoint command that was applied, and of which the log has no end. */
typedef struct owed {
    int64_t command, step; /* as in applied */
    pml_message *args;
} owed;

/* How much a failure says of its cause: that another is gone is only a consequence; who ended with
 * a status has said why, and the word may come after the end. */
typedef enum failure_weight { FAILURE_CONSEQUENCE, FAILURE_WORDLESS, FAILURE_CAUSE } failure_weight;

typedef struct failure {
    bool seen;
    failure_weight weight;
    char cause[12]; /* of event restart; "": a worker said it, and it would come again … */
    bool crowded;   /* … as long as others have its device's memory */
    pml_status code;
    int rank; /* -1: none */
    char reason[1000];
    double seen_at; /* by coordinator.attended; for a while a better cause may come */
} failure;

/* A restart on its way: the workers are being ended, or it waits. */
typedef struct recovery {
    bool under_way;
    bool waits; /* for memory, not after a death: to be tried again as it was */
    bool saves; /* no more: a worker writes the snapshot that there is, and the run stops */
    char cause[12], reason[1000];
    int rank;
    double delay, at; /* seconds; not before, monotonic */
} recovery;

/* A run that goes on by itself could not read from where, and not for that one's sake. */
typedef struct rereading {
    int tries; /* that failed, one after the other */
    double at; /* not before, monotonic */
} rereading;

typedef struct coordinator {
    /* arguments */
    char folder[PATH_MAX];
    bool resume, recover, named, accept_changes;
    char wanted[256];     /* the checkpoint named on the command line, "" = newest */
    char checkpoint[512]; /* relative, "" = from the start */

    struct {
        const char *name;   /* the checkpoint that is being checked, NULL: none */
        size_t done, total; /* bytes */
        double begun, told; /* told: when viewers were told how far it is */
    } checking;

    int ready_fd;      /* whoever started us waits there, -1: nobody does (any more) */
    double touched_at; /* when it had a sign of life */

    char runtime[PATH_MAX];
    int lock, signals;
    pml_hold *hold; /* of the run folder */
    pml_message *run;
    pml_hub *hub;
    eventlog *log;

    run_state state;
    char reason[1000];
    int64_t step, max_steps, timeline;
    double state_since, last_request, last_alive, beat_at, trimmed_at;
    double grace;
    int64_t bad_messages, bad_roles, hurried;

    shared_key *shared;
    size_t n_shared;
    int next_tag;
    doorbook turned_away;
    char bound[136]; /* as it was asked for */
    pml_reach reach; /* of the network doors, PML_REACH_NOBODY: closed */

    worker *workers;
    char said[RUN_STOPPED + 1][512]; /* the reason that worker 0 gave with each state */
    int world, comm;                 /* comm: the memfd of the collectives, -1: none */
    int slots, slot;       /* the memfd of the snapshots; the one to go on from, -1: none */
    bool ready;            /* all workers are, and get commands */
    size_t go_after;       /* commands that must be committed before `go` */
    bool went;             /* `go` was sent to the workers that are there */
    bool begun;            /* ever: there may be something to save */
    double memory_used_at; /* when workers_use_memory has something to do again */
    double gpus_at;        /* when a step told of the GPUs; 0: not yet */
    int64_t memory_step, memory_rss;
    failure failure;

    command *commands; /* all of them, in order; number = first + index */
    size_t n_commands, command_capacity, first_open, next_commit;
    size_t n_logged; /* of them: in the log when it was opened, so of a coordinator before us */
    int64_t next_number;

    /* What the log says, as far as going on needs it. */
    tuned *tuned; /* in the order of their steps */
    size_t n_tuned, tuned_capacity;
    struct {
        pml_message_type verb; /* PML_REQUEST_pause or _stop; PML_MESSAGE_COUNT: the run goes */
        int64_t step;          /* where it stands, as in applied */
        char reason[1200];     /* of a pause that nobody asked for; "" */
    } standing;
    char newest[512];   /* checkpoint of this timeline's past, relative; "" = none */
    int64_t saved_step; /* of the last one without a name that counts as there, -1: none */
    char logged_state[12];
    int64_t logged_in;          /* its timeline, -1: there is none */
    int64_t began_at, began_in; /* step that the log's last timeline begins behind; its number */
    int64_t measured;           /* step of the last evaluation that nobody asked for, -1: none */
    int64_t saved_for; /* the last command whose checkpoint, or its failure, the log has, 0: none */
    owed *owed;        /* in the order of their steps */
    size_t n_owed, owed_capacity;

    recovery recovery;
    rereading rereading;
    size_t handed_over;             /* lines of handover.jsonl that are in the log */
    int64_t restarts, restarted_in; /* by itself; timeline of the last one */
    int64_t furthest;               /* step, before the last one */
    bool waited;                    /* by the log, which we opened: the last one has waited since */
    int futile;                     /* restarts that came no further than the one before */
    int crowded;                    /* times, one after the other, that others had the memory */
    double looked_at, hurry_at;
    double attended; /* seconds that we were there to look after workers: see watch.c */
    bool waiting;    /* for the workers of the coordinator before */
    double waiting_since, moving_at; /* by `attended`; moving: none of them was stopped then */

    pid_t prepare;
    char **prepare_argv; /* of the command line, NULL-ended; NULL: nothing */
    int prepare_out;
    size_t prepare_n;
    char prepare_line[8192];
    double prepare_logged;
    char prepare_error[1000];
    pml_status prepare_code;

    bool leaving; /* a signal asked us to go: no grace */
    bool ending;  /* workers were released; we go when they are gone */
    double ending_since;
    pml_status broken; /* no memory for an event, or a log that contradicts itself: the run ends */

    /* journal.c: while the disk does not take the log. trouble "" = it does. */
    char trouble[1400], trouble_cause[1000];
    double trouble_since, trouble_tried;
    double retry_seconds; /* between two attempts */
    size_t trouble_lines, held_max;

    struct {
        bool removed; /* the log's file is gone: said once */
        double looked_at;
        char folder[PATH_MAX]; /* where the connection file says that it is */
        /* What cannot be put right, as it was said; "": nothing. */
        char about_log[COMPLAINT_MAX], about_doors[COMPLAINT_MAX];
    } upkeep;

    int64_t held_pause;   /* number of our pause command, 0: none */
    bool asks_itself;     /* the command that is to be accepted is ours */
    double run_unwritten; /* run.json lacks the identity: when it was tried last, 0: it does not */
} coordinator;

extern const char *const run_state_names[];

/* ---- main.c ---- */

/* Log an event, then publish it; takes the event. Steps and the like need not be durable. */
void emit(coordinator *c, pml_message *event, bool durable);
void emit_log(coordinator *c, const char *level, int rank, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
void set_state(coordinator *c, run_state state, pml_status code, int rank, const char *reason);
bool run_is_over(const coordinator *c); /* finished, stopped or failed */
/* `starting`, also when it was that before. */
void begin_state(coordinator *c, const char *reason);
/* The workers, or first the data. */
pml_status begin_work(coordinator *c, pml_error *err);

/* For a loop that is busy elsewhere for long: signs of life, and answers to who asks. */
void keep_in_touch(coordinator *c);

/* ---- start.c ---- */
pml_status parse_arguments(coordinator *c, int argc, char **argv, pml_error *err);
pml_status set_up(coordinator *c, pml_error *err);
/* Where the run was left, and where it goes on. Nobody else is at its folder any more. */
pml_status take_up(coordinator *c, pml_error *err);
/* Once: that the sockets are there (err NULL), or why not. */
void say_ready(coordinator *c, const pml_error *err);
/* The connection file, with a new control key. */
pml_status write_connection(coordinator *c, pml_error *err);

/* ---- upkeep.c ---- */
void upkeep_tick(coordinator *c, double now);

/* ---- journal.c ---- */

/* Write what waits, publish what is in the log. */
void journal_write(coordinator *c);
void journal_tick(coordinator *c, double now);
bool journal_is_full(const coordinator *c); /* no more commands, save stop */
/* A run that is over stays for what its log lacks. */
bool journal_keeps_us(const coordinator *c, double now);
void journal_end(coordinator *c); /* a last try */

/* ---- clients.c ---- */
void handle_request(coordinator *c, const pml_inbound *in);
void answer_error(coordinator *c, const pml_inbound *in, const char *id, const pml_error *err);

void answer(coordinator *c, const pml_inbound *in, pml_message *m); /* takes m */

/* ---- sharing.c ---- */
void handle_share(coordinator *c, const pml_inbound *in, const pml_message *request);
void handle_unshare(coordinator *c, const pml_inbound *in, const pml_message *request);
/* Record sharing; NULL while nothing listens on a network. */
pml_message *sharing_record(const coordinator *c);
/* A viewer came that is one too many with its key, or with all: *err is for it. Logged, at most
 * once a minute for each key. */
void sharing_crowded(coordinator *c, const pml_inbound *in, pml_error *err);
/* Logs what else was turned away at the doors, at most once a minute. */
void sharing_tick(coordinator *c, double now);

/* ---- commands.c ---- */

/* Every event of the log passes here at the start. */
void commands_recover(coordinator *c, const pml_message *event);
/* Number, log, answer (in may be NULL: our own) and send on a command that is allowed now. */
pml_status command_accept(coordinator *c, const pml_message *request, int64_t *number,
                          pml_error *err);
void command_acked(coordinator *c, worker *w, int64_t number);
/* By the worker's report of the number `report`. */
void command_reported(coordinator *c, const worker *w, int64_t report, int64_t number, int64_t step,
                      const char *refusal);
/* The first of rank 0's reports whose command other ranks have not reported on yet: what it says is
 * not in the log, and may have to be handed over. INT64_MAX: none. */
int64_t commands_half_reported(const coordinator *c);
/* What a worker that has just become ready must know. */
void commands_catch_up(coordinator *c, worker *w);
void commands_refuse_open(coordinator *c, const char *reason);
/* Those that were open in the log when we opened it; what we have accepted since is not lost. */
void commands_refuse_lost(coordinator *c);
/* The run goes on from a snapshot that rank 0 took behind the command `last`: what it had reported
 * of those, and other ranks had not yet, is in the weights, and so in the log; done again, it would
 * be done twice, at two steps. */
void commands_kept(coordinator *c, int64_t last);
/* What is open goes to new workers from the beginning. */
void commands_rewind(coordinator *c);
bool commands_stop_open(const coordinator *c);
/* A stop that is open has its effect, though no worker carried it out. */
void commands_apply_stop(coordinator *c);
/* The end of an open command, as rank 0 reported it to a coordinator that did not live to log it.
 */
void commands_hand_over(coordinator *c, int64_t number, int64_t step, const char *refusal);
void commands_free(coordinator *c);

/* ---- workers.c ---- */
/* The path of the program that workers_start starts. */
pml_status workers_program(char *path, size_t capacity, pml_error *err);
pml_status workers_start(coordinator *c, pml_error *err);
/* One alone, which writes the snapshot in c->slot as a checkpoint, reports `stopped` and ends. */
pml_status workers_save_left(coordinator *c, pml_error *err);
void worker_set_state(worker *w, const char *state);
/* Without an order a worker would wait for ever, or do something else than the others: one to which
 * it cannot be sent is replaced, as one that died. */
void worker_order(coordinator *c, worker *w, const pml_message *order);
/* What it may miss, or is told again. False, and logged: it could not be sent. */
bool worker_tell(coordinator *c, worker *w, const pml_message *word);
void workers_publish(coordinator *c);
/* Nobody is there, or to come, who needs the devices' memory. */
void workers_give_memory_back(coordinator *c);
/* Now and then: that its files are in use. */
void workers_use_memory(coordinator *c, double now);
/* A process has ended; pid is ours. */
void worker_ended(coordinator *c, worker *w, int status);
bool workers_gone(const coordinator *c);
void workers_kill(coordinator *c, int signal);
void workers_release(coordinator *c); /* close the leases */
/* Remember a cause; the first of the greatest weight counts, once it is decided. */
void fail_later(coordinator *c, pml_status code, int rank, const char *reason);
/* The same, of a worker that finds its device's memory with others. */
void fail_crowded(coordinator *c, pml_status code, const worker *w, const char *reason);
bool fail_is_decided(const coordinator *c);
void fail_now(coordinator *c);
/* The same for a worker that ended without a word, hung or fell silent (cause of event restart). */
void fail_worker(coordinator *c, const worker *w, const char *cause, const char *reason);
/* Those that are gone, their keys and their collectives: ready for workers_start. */
void workers_forget(coordinator *c);
pml_message *worker_record(const worker *w);
void workers_free(coordinator *c);

/* ---- reports.c ---- */
/* Sends `go` once all that was accepted before the workers were ready is committed. */
void go_when_committed(coordinator *c);
void handle_report(coordinator *c, const pml_inbound *in);
/* What a worker said over its lease of why it ends. That it says as a report, too, which has to
 * pass our sockets' thread and so may come after its end. */
void hear_last_word(coordinator *c, worker *w);
/* Tell workers which of their reports are in the log. */
void workers_acknowledge(coordinator *c);

/* ---- prepare.c ---- */
pml_status prepare_start(coordinator *c, pml_error *err);
void prepare_read(coordinator *c);
void prepare_ended(coordinator *c, int status);

/* ---- resume.c ---- */
pml_status resume_choose(coordinator *c, pml_error *err);
/* Whether a checkpoint is being checked for so long that people want to know; what to tell them. */
bool resume_is_checking(const coordinator *c, char *words, size_t capacity);
/* The newest whole one of this run's past into c->checkpoint, "" when there is none; c->step. */
pml_status resume_choose_newest(coordinator *c, pml_error *err);
/* The step of the newest checkpoint that was announced, 0: there is none. */
int64_t resume_newest_step(const coordinator *c);
/* Whether the log has a checkpoint without a name of that step, as what follows on it asks for. */
bool resume_is_saved(const coordinator *c, int64_t step);
/* Every event passes here, from the log and as it is logged. */
void resume_recover(coordinator *c, const pml_message *event);
/* `again` orders for a worker that stands at step. */
void resume_apply_again(coordinator *c, worker *w);
pml_status resume_check_identity(coordinator *c, const pml_message *ready, pml_error *err);
/* The identity into run.json, where the disk did not take it before. */
void resume_write_run_again(coordinator *c, double now);
void resume_free(coordinator *c);

/* ---- owed.c: what the log says of checkpoints that were asked for ---- */
void owed_recover(coordinator *c, const pml_message *event);
bool owed_has(const coordinator *c, int64_t command);
/* None of them will come: the log says so of each. */
void owed_give_up(coordinator *c, const char *reason);
void owed_free(coordinator *c);

/* ---- watch.c ---- */

/* Call the one by its name that hangs or is silent, if there is one. */
void watch_tick(coordinator *c, double now);
/* Seconds since `then`, of which we were there: what we slept through is held against nobody. */
double watch_since(const coordinator *c, double then);
/* A beat of it came. */
void watch_heard(const coordinator *c, worker *w);
/* Whether what a worker has to say of its end may come still: it has been there for less than
 * `seconds` since a silence, or nothing is heard of it and not for so long yet that it would be
 * called silent. */
bool watch_may_speak(const coordinator *c, const worker *w, double seconds);

/* ---- recover.c ---- */

/* Whether a failure is one that may be gone when it is tried again, and the run wants that. */
bool recover_wanted(const coordinator *c, const failure *f);
/* End the workers, to start them again; or the run, where a stop waited for one that hangs. False:
 * it has gone on often enough. */
bool recover_begin(coordinator *c, const failure *f);
/* Whether a failure is one to wait out: a run that goes on by itself finds that others have its
 * device's memory, or plan with it. What a person starts is refused instead. */
bool recover_waits(const coordinator *c, const failure *f);
/* End the workers, to try again in a while, for as long as it takes. */
void recover_wait(coordinator *c, const failure *f);
/* The worker that saved what others had left has done so. */
void recover_saved(coordinator *c);
/* What it is about to fail of, if that worker did not save: f says what is lost, too. True: it
 * ended without a word, and the run has stopped. */
bool recover_lost_saver(coordinator *c, failure *f);
/* Take over from a coordinator that died. */
void recover_lost_coordinator(coordinator *c);
/* Whether a run that goes on by itself shall try again, at c->rereading.at, what has failed so: the
 * system refused to read, or had no memory. Otherwise it has tried often enough (*err says so), or
 * it would fail again. Each row of tries ends with recover_has_read. */
bool recover_reads_again(coordinator *c, pml_status status, pml_error *err);
void recover_has_read(coordinator *c);
/* A person or a signal wants the run to end. */
bool stop_is_asked(const coordinator *c);
/* Deadlines, and the restart when it is due. */
void recover_tick(coordinator *c, double now);
void recover_recover(coordinator *c, const pml_message *event);

/* ---- handover.c ---- */

#define HANDOVER_WORDS "the workers of the coordinator before are saving what they have"
/* Whether workers of the coordinator before are still there: saving, most likely. PML_IO,
 * PML_NO_MEMORY: it cannot be found out just now; they are not to be taken for ended. */
pml_status handover_workers(const coordinator *c, bool *there, pml_error *err);
void handover_recover(coordinator *c, const pml_message *event);
/* Log what that coordinator did not live to log, and refuse what it left open. */
pml_status handover_take(coordinator *c, pml_error *err);
/* While c->waiting: whether it is over. Fails as handover_workers. */
pml_status handover_tick(coordinator *c, bool *over, pml_error *err);

#endif
