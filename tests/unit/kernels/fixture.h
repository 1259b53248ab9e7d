/* How the op tests run an op: on the CPU backend, with every promise of pml_op/ops.h that holds for
 * all ops checked on the way. run_op
 *   - asks for the workspace without a device and gives exactly that much, filled with NaN;
 *   - fills outputs with NaN first, so what is not written shows;
 *   - demands that inputs, and the borders of outputs, are as before;
 *   - does it all twice and demands the same bits. */
#ifndef TESTS_KERNELS_FIXTURE_H
#define TESTS_KERNELS_FIXTURE_H

#include <ctype.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h> /* wants the ones above before it */

#include "pml_op/backend.h"

static pml_device *device;
static pml_queue *queue;

static inline int open_device(int threads)
{
    pml_device_options options = {.threads = threads};
    pml_error err = PML_ERROR_INIT;
    const pml_backend *cpu = pml_backend_cpu();
    if (cpu->open(&options, &device, &err) != PML_OK ||
        cpu->queue_new(device, &queue, &err) != PML_OK) {
        fprintf(stderr, "%s\n", err.message);
        return -1;
    }
    return 0;
}

static inline void close_device(void)
{
    pml_backend_cpu()->queue_destroy(&queue);
    pml_backend_cpu()->close(&device);
}

/* Numbers in [-1, 1) with 20 bits, so that sums of a few are exact in float: splitmix64. */
static uint64_t random_state = 1;

static inline uint64_t random_bits(void)
{
    uint64_t z = random_state += 0x9E3779B97F4A7C15U;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9U;
    z = (z ^ z >> 27) * 0x94D049BB133111EBU;
    return z ^ z >> 31;
}

static inline float random_float(void)
{
    return (float)(int64_t)(random_bits() >> 44) * 0x1p-19F - 1.0F;
}

/* Of a reference in double precision: one thread's own loops over what the test has just made.
 * Watched by a sanitizer they are nearly all that a test does, and no line of the engine is in
 * them. */
#define UNWATCHED __attribute__((no_sanitize("address", "undefined", "thread")))

static inline size_t span_bytes(const pml_view *v)
{
    if (v->data == NULL || v->rows == 0 || v->cols == 0)
        return 0;
    return (size_t)((v->rows - 1) * v->ld + v->cols) * pml_dtype_size(v->dtype);
}

static inline void *must_alloc(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL)
        abort();
    return memory;
}

/* Memory of exactly a view's span, so that a sanitizer sees the first byte beyond. */
static inline pml_view view_new(int64_t rows, int64_t cols, int64_t border, pml_dtype dtype)
{
    pml_view v = {NULL, rows, cols, cols + border, dtype};
    size_t count = rows > 0 && cols > 0 ? (size_t)((rows - 1) * v.ld + cols) : 0;
    v.data = must_alloc(count * pml_dtype_size(dtype));
    memset(v.data, 0x5A, count * pml_dtype_size(dtype));
    return v;
}

static inline pml_view random_view(int64_t rows, int64_t cols, int64_t border)
{
    pml_view v = view_new(rows, cols, border, PML_F32);
    size_t count = span_bytes(&v) / sizeof(float);
    for (size_t i = 0; i < count; i++)
        ((float *)v.data)[i] = random_float();
    return v;
}

static inline pml_view int_view(int64_t n, const int32_t *values)
{
    pml_view v = view_new(1, n, 0, PML_I32);
    if (n > 0)
        memcpy(v.data, values, (size_t)n * sizeof *values);
    return v;
}

static inline float *at(const pml_view *v, int64_t row, int64_t col)
{
    return (float *)v->data + row * v->ld + col;
}

/* The view's elements as float64, rows end to end. */
static inline double *doubles(const pml_view *v)
{
    double *out = must_alloc((size_t)(v->rows * v->cols) * sizeof *out);
    for (int64_t r = 0; r < v->rows; r++)
        for (int64_t c = 0; c < v->cols; c++)
            out[r * v->cols + c] = *at(v, r, c);
    return out;
}

static inline void free_views(pml_op op, pml_op_args *args)
{
    pml_view *views = pml_op_views(args);
    for (int i = 0; i < pml_op_describe(op)->n_views; i++) {
        for (int j = i + 1; j < pml_op_describe(op)->n_views; j++)
            if (views[j].data == views[i].data)
                views[j].data = NULL; /* operands that share memory */
        free(views[i].data);
        views[i].data = NULL;
    }
}

static inline bool is_input(char letter)
{
    return toupper(letter) == 'I';
}

static inline bool overlaps(const pml_view *a, const pml_view *b)
{
    const char *x = a->data, *y = b->data;
    return span_bytes(a) > 0 && span_bytes(b) > 0 && x < y + span_bytes(b) && y < x + span_bytes(a);
}

static inline void poison_output(const char *letters, pml_view *views, int count, int output)
{
    for (int i = 0; i < count; i++)
        if (i != output && toupper(letters[i]) != 'O' && overlaps(&views[i], &views[output]))
            return; /* in place: it is also an input */
    const pml_view *v = &views[output];
    size_t size = pml_dtype_size(v->dtype);
    for (int64_t r = 0; r < v->rows; r++)
        memset((char *)v->data + (size_t)(r * v->ld) * size, 0xFF, (size_t)v->cols * size);
}

static inline bool borders_equal(const pml_view *v, const void *before)
{
    size_t size = pml_dtype_size(v->dtype), gap = (size_t)(v->ld - v->cols) * size;
    for (int64_t r = 0; r + 1 < v->rows; r++) {
        size_t offset = (size_t)(r * v->ld + v->cols) * size;
        if (memcmp((const char *)v->data + offset, (const char *)before + offset, gap) != 0)
            return false;
    }
    return true;
}

static inline pml_status call_op(pml_op op, pml_op_args *args, pml_error *err)
{
    return pml_op_run(pml_backend_cpu(), op, queue, args, err);
}

/* Give args the workspace the backend asks for; the caller frees what is returned. */
static inline void *give_workspace(pml_op op, pml_op_args *args)
{
    const pml_op_info *info = pml_op_describe(op);
    for (int i = 0; i < info->n_views; i++) {
        if (toupper(info->signature[i]) != 'W')
            continue;
        size_t bytes = pml_backend_cpu()->workspace(NULL, op, args);
        if (bytes == 0)
            return NULL;
        void *memory = must_alloc(bytes);
        memset(memory, 0xFF, bytes);
        pml_op_views(args)[i] = pml_vector(memory, (int64_t)bytes, PML_U8);
        return memory;
    }
    return NULL;
}

static inline void run_op(pml_op op, pml_op_args *args)
{
    const pml_op_info *info = pml_op_describe(op);
    pml_view *views = pml_op_views(args);
    void *before[PML_OP_MAX_VIEWS] = {NULL}, *first[PML_OP_MAX_VIEWS] = {NULL};
    void *ws = give_workspace(op, args);
    for (int i = 0; i < info->n_views; i++)
        if (toupper(info->signature[i]) == 'O' && views[i].data != NULL)
            poison_output(info->signature, views, info->n_views, i);
    for (int i = 0; i < info->n_views; i++) {
        before[i] = must_alloc(span_bytes(&views[i]));
        first[i] = must_alloc(span_bytes(&views[i]));
        if (span_bytes(&views[i]) > 0)
            memcpy(before[i], views[i].data, span_bytes(&views[i]));
    }
    for (int pass = 0; pass < 2; pass++) {
        pml_error err = PML_ERROR_INIT;
        if (call_op(op, args, &err) != PML_OK)
            fail_msg("%s", err.message);
        for (int i = 0; i < info->n_views; i++) {
            size_t bytes = span_bytes(&views[i]);
            char letter = (char)toupper(info->signature[i]);
            if (bytes == 0 || letter == 'W')
                continue;
            bool shared = false;
            for (int j = 0; j < info->n_views; j++)
                shared |= j != i && overlaps(&views[i], &views[j]);
            if (letter == 'I' && !shared && memcmp(views[i].data, before[i], bytes) != 0)
                fail_msg("%s changed its input '%s'", info->name, info->operands[i]);
            if (letter != 'I' && !shared && !borders_equal(&views[i], before[i]))
                fail_msg("%s wrote outside '%s'", info->name, info->operands[i]);
            if (pass == 1 && memcmp(views[i].data, first[i], bytes) != 0)
                fail_msg("%s gives other bits the second time in '%s'", info->name,
                         info->operands[i]);
        }
        for (int i = 0; pass == 0 && i < info->n_views; i++) {
            if (span_bytes(&views[i]) > 0)
                memcpy(first[i], views[i].data, span_bytes(&views[i]));
        }
        for (int i = 0; pass == 0 && i < info->n_views; i++)
            if (span_bytes(&views[i]) > 0)
                memcpy(views[i].data, before[i], span_bytes(&views[i]));
    }
    for (int i = 0; i < info->n_views; i++) {
        free(before[i]);
        free(first[i]);
        if (toupper(info->signature[i]) == 'W')
            views[i] = (pml_view){0};
    }
    free(ws);
}

/* Everywhere |view - want| <= tolerance * (the largest |want|): errors of float32 are in proportion
 * to the numbers that were added, not to the sum that is left of them. */
static inline void expect_view(const char *what, const pml_view *v, const double *want,
                               double tolerance)
{
    double largest = 0;
    for (int64_t i = 0; i < v->rows * v->cols; i++)
        largest = fmax(largest, fabs(want[i]));
    for (int64_t r = 0; r < v->rows; r++)
        for (int64_t c = 0; c < v->cols; c++) {
            double got = *at(v, r, c), expected = want[r * v->cols + c];
            if (!(fabs(got - expected) <= tolerance * largest))
                fail_msg("%s[%lld,%lld] is %.9g, must be %.9g", what, (long long)r, (long long)c,
                         got, expected);
        }
}

/* A forward in float64 whose inputs can be wiggled: returns sum of outputs * dout. */
typedef double objective(void *context);

/* Slope of the objective along *x, by a central difference. */
static inline double slope(objective *f, void *context, double *x)
{
    const double middle = *x, step = 1e-5;
    *x = middle + step;
    double above = f(context);
    *x = middle - step;
    double below = f(context);
    *x = middle;
    return (above - below) / (2 * step);
}

/* The op's gradient `got` of x against slopes, at every element or at `samples` random ones.
 * `start` was in the gradient before the op added to it (NULL: zero). */
static inline void expect_gradient(const char *what, const pml_view *got, const double *start,
                                   objective *f, void *context, double *x, int samples,
                                   double tolerance)
{
    int64_t count = got->rows * got->cols;
    double largest = 0.1; /* gradients that cancel to nothing still carry rounding */
    for (int64_t i = 0; i < count; i++)
        largest = fmax(largest, fabs((double)*at(got, i / got->cols, i % got->cols)));
    bool all = count <= samples;
    for (int64_t s = 0; s < (all ? count : samples); s++) {
        int64_t i = all ? s : (int64_t)(random_bits() % (uint64_t)count);
        double value = *at(got, i / got->cols, i % got->cols);
        double want = slope(f, context, &x[i]) + (start != NULL ? start[i] : 0);
        if (!(fabs(value - want) <= tolerance * largest))
            fail_msg("%s[%lld] is %.9g, its slope is %.9g", what, (long long)i, value, want);
    }
}

/* Run a group on one thread and on three, more than the smallest machine has cores. */
static inline int run_groups(const struct CMUnitTest *tests, size_t count)
{
    int failed = 0;
    for (int threads = 1; threads <= 3; threads += 2) {
        if (open_device(threads) != 0)
            return 1;
        failed += _cmocka_run_group_tests(threads == 1 ? "1 thread" : "3 threads", tests, count,
                                          NULL, NULL);
        close_device();
    }
    return failed;
}

#define run_on_devices(tests) run_groups((tests), sizeof(tests) / sizeof *(tests))

#endif
