/* A run in a temporary folder, with a real coordinator as our child and the fake worker behind it.
 */
#ifndef PML_TESTS_FAULT_HARNESS_H
#define PML_TESTS_FAULT_HARNESS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <cmocka.h>

#include "pml/json/messages.h"
#include "pml/net/client.h"

enum { HARNESS_WORKERS = 4, HARNESS_KEPT = 20000 };

typedef struct harness {
    char root[64], folder[96], runtime[256], connection_file[300];
    int workers, max_steps;
    pid_t coordinator; /* our child; -1: none */
    pid_t adopted;     /* another one that took over, 0: none */
    int descriptors;   /* that the coordinator may have, set before the start; 0: as many as we */
    char *prepare[6];  /* what the coordinator runs first, set before the start; NULL-ended */
    pml_client *client;
    pml_message *events[HARNESS_KEPT]; /* all that were received, in order */
    int n_events;
    int64_t last_seq; /* of the events received */
    int next_id;
    char error[1100]; /* why the coordinator did not start, "" = it did */
} harness;

/* Programs, from argv of the test; answers false (and says how) when they are not given. Whatever
 * is left of this test's runs when it ends, however it ends, is reaped (reap.h). */
bool harness_programs(int argc, char **argv);
/* What every process of a test's runs has in its environment; test: its process. */
void harness_entry(pid_t test, char entry[64]);

/* Whether nothing else runs beside this test, so that it may judge by the clock: PML_QUIET, as
 * tools/chaos/hang.py sets it. */
bool harness_is_quiet(void);
/* Seconds to wait for what takes at most `quiet` there; elsewhere it only has to come. */
double harness_bound(double quiet);

/* The coordinator's program. */
const char *harness_coordinator(void);

/* A folder with run.json; what a test before this one left because it failed is reaped. extra:
 * fields put in place of the defaults, e.g. "\"save_steps\":5"; NULL. A run of these tests does not
 * go on by itself, unless extra has "restart". Its coordinator stays for long when it is over: who
 * waits for that end by harness_wait, without a signal, calls harness_is_brief before the start. */
harness *harness_new(int workers, int max_steps, const char *extra);
void harness_is_brief(void);
/* Start the coordinator with these arguments behind the folder (NULL-terminated) and a client;
 * whether it is ready. */
bool harness_start(harness *h, ...);
/* The same with n arguments and without a client. */
bool harness_spawn(harness *h, char *const *more, int n);
void harness_connect(harness *h); /* a client, welcome received */
void harness_disconnect(harness *h);
/* Our coordinator is dead: wait for the one that takes over, and connect to it. */
void harness_adopt(harness *h);
/* Wait for the coordinator's end: its exit status, or 256 + signal. */
int harness_wait(harness *h);
/* Kill what is left, look into the logs for sanitizer reports, remove the folder. */
void harness_destroy(harness **h);

/* Send a request without id ("pause", "\"from\":1"); the answer, which is the caller's. */
pml_message *harness_ask(harness *h, const char *type, const char *fields);
/* The same under a given id. */
pml_message *harness_ask_as(harness *h, const char *id, const char *type, const char *fields);
/* A command that is accepted; its number. */
int64_t harness_command(harness *h, const char *verb, const char *fields);

/* The first event from index `from` on of this type where field (may be NULL) reads as value (a
 * word, or a number in decimal); waits for it. Its index is stored
 * in *index (may be NULL). Borrowed. */
const pml_message *harness_event(harness *h, int from, pml_message_type type, const char *field,
                                 const char *value, int *index);
/* Fetch what is in the log and has not been received. */
void harness_catch_up(harness *h);
/* Receive for so long. */
void harness_receive_for(harness *h, double seconds);
void harness_wait_state(harness *h, const char *state);

/* Process of a worker now, from `status`. */
pid_t harness_worker_pid(harness *h, int rank);
/* The same of one that is being started. One that ends soon after may not be seen. */
pid_t harness_wait_worker(harness *h, int rank);
bool process_is_there(pid_t pid);
/* On a quiet machine within so many seconds. */
void harness_wait_gone(pid_t pid, double seconds);
/* The run's coordinator, ours or the one that was adopted, is killed, and waited for. */
void harness_kill_coordinator(harness *h);

/* An empty file in the run folder, or none: what the fake worker looks at. */
void harness_mark(const harness *h, const char *name, bool there);

/* Wait until such a file is there, and take it away. */
void harness_wait_mark(harness *h, const char *name);

/* The whole of a file in the run folder; "" when it is not there. The caller frees it. */
char *harness_read(const harness *h, const char *name);

#endif
