/* What the host hands to a kernel: one struct each, read by the C compiler and by the CUDA
 * compiler, so that the two cannot disagree. Built-in types only: run-time compilers have no
 * system headers. Leading dimensions count elements. */
#ifndef PMLI_CUDA_PARAMS_H
#define PMLI_CUDA_PARAMS_H

/* Units that a thread of rows.cu moves at a time. */
#define UNITS_A_THREAD 4

/* y[to(i),:] = x[from(i),:] for i < rows; an absent index means i itself; to(i) < 0: skipped. */
typedef struct pmli_rows_params {
    const void *x;
    void *y;
    const int *from, *to;
    long long rows, cols, ld_x, ld_y;
} pmli_rows_params;

typedef struct pmli_fill_params {
    void *y;
    long long rows, cols, ld_y;
    double value;
} pmli_fill_params;

typedef struct pmli_rmsnorm_params {
    const void *x, *add, *weight; /* add may be absent, and sum then is */
    void *sum, *y;
    float *rstd;
    long long rows, cols, ld_x, ld_add, ld_sum, ld_y;
    float eps;
} pmli_rmsnorm_params;

#endif
