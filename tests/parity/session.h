/* A run in one process: sampler and stepper over a fixture's folder. */
#ifndef TESTS_PARITY_SESSION_H
#define TESTS_PARITY_SESSION_H

#include "pml/data/sampler.h"
#include "pml/model/safetensors.h"
#include "pml/train/config.h"
#include "pml/train/stepper.h"

typedef struct session {
    pml_train_config config;
    pml_shard *shard;
    pml_sampler *sampler;
    pml_stepper *stepper;
    pml_cursor cursor;
    int64_t step; /* updates done */
} session;

/* "nf4", "fp8"; anything else is none. */
pml_quant quant_named(const char *name);
/* Settings of fixtures/<name>/case.json, paths filled in. Ends the program when it cannot. */
void load_case(const char *fixtures, const char *name, pml_train_config *config);

/* What sessions are opened on; "cpu" and float32 unless a program says otherwise. */
extern const char *session_device;
extern pml_dtype session_dtype;
/* Stands before that device's own; NULL: nothing does. */
extern const pml_backend *session_backend;
/* swiglu works for the adapters beside it, where the backend would not. */
extern bool session_beside;
/* "--bf16", "--fp16", "--beside", or a device as "--cuda". */
void session_option(const char *option);
/* The device is not there or has no such dtype: says so, and the program ends with SESSION_SKIPPED.
 */
enum { SESSION_SKIPPED = 77 };
bool session_is_skipped(void);
/* Whether a device that is there multiplies it: pml_backend's dtypes_of. */
bool session_has(pml_dtype dtype);

typedef struct session_options {
    const pml_train_config *config;
    pml_comm *comm;
    /* As pml_plan_choices; head_chunk 0: the planner's, pieces 0: one. */
    int recompute, recompute_layers, head_chunk, pieces, unpacked, offload, offload_layers;
    bool unpacked_as_given;         /* as pml_stepper_options */
    const pml_batch_limits *limits; /* NULL: what the fixture's batches need */
    int threads;
} session_options;

/* Ends the program with the message when something fails: a fixture must load. */
void session_open(const session_options *options, session *s);
void session_close(session *s);

/* All micro-batches of the next step; returns the labels of all ranks in it. */
int64_t session_micros(session *s, pml_comm *comm);

/* micros and update. */
pml_step_result session_step(session *s, pml_comm *comm);

/* malloc'ed copy of one state buffer. */
float *session_read(session *s, pml_state state);

/* sqrt(sum (a - b)^2) / sqrt(sum b^2), 0 for two zero vectors. */
double relative_distance(const float *a, const float *b, size_t n);

/* Count and report one check; n of both at the end. */
void check(bool good, const char *format, ...) __attribute__((format(printf, 2, 3)));
int summary(void);

#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error must_error = PML_ERROR_INIT;                                                     \
        pml_error *err = &must_error;                                                              \
        if ((call) != PML_OK)                                                                      \
            give_up(__FILE__, __LINE__, err);                                                      \
    } while (0)
void give_up(const char *file, int line, const pml_error *err) __attribute__((noreturn));

#endif
