/* A run of the op tests (test_ops.c): both backends, the cases in one arena, and its images on the
 * host; drawing what goes in, and the same calls for the CPU. What fails that no test is about ends
 * the program. */
#ifndef TESTS_GPU_SESSION_H
#define TESTS_GPU_SESSION_H

#include "cases.h"

typedef struct session {
    const pml_backend *gpu, *cpu;
    pml_device *device, *cpu_device;
    pml_queue *queue, *cpu_queue;
    gpu_cases cases;
    size_t size;                           /* of the arena */
    unsigned char *arena;                  /* on the device */
    unsigned char *start, *eager, *replay; /* its images on the host */
    int passed, failed, skipped;
    int threads; /* of the CPU; 0: one a core */
    bool fast, eagerly, sparse, starve;
    gpu_choice choice;
} session;

/* What cannot fail for a reason that a test is about. */
#define MUST(call)                                                                                 \
    do {                                                                                           \
        pml_error err_ = PML_ERROR_INIT, *err = &err_;                                             \
        if ((call) != PML_OK)                                                                      \
            session_stop(#call, err);                                                              \
    } while (0)

void session_stop(const char *what, const pml_error *err) __attribute__((noreturn));
void *must_alloc(size_t bytes);

/* The place of a device address in an image of the arena. */
pml_view in_image(const session *s, pml_view v, unsigned char *image);

/* By the CPU backend, on the host. */
void cpu_copy(const session *s, pml_view from, pml_view to);

/* Fill s->start: NaN everywhere, and inputs drawn into it. */
void draw_start(session *s);

/* The same call for the CPU: operands of their own, floats as F32 (exact for the narrower ones),
 * with what s->start holds of them; free_views frees them. */
void twin_of(const session *s, const gpu_case *c, pml_op_args *twin);
void free_views(pml_op op, pml_op_args *args);

/* Hold what s->eager has of a case against the reference, and print a line. */
void judge(session *s, const gpu_case *c);

/* Attention while another thread compiles it, and when that is done, two cases of those that there
 * are; on a device of its own without fixed orders of sums. */
void attention_compiled_aside(session *s);

#endif
