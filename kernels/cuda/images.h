/* Device code: every kernel by name, and the compiled images that hold them.
 *
 *   device/<family>.cu ──compiler, once for each target──► images ──tools/cuda/embed.py──►
 * embedded.c
 *
 * At open, each family's best image for the device is loaded: machine code (a cubin) of the
 * device's own generation, else PTX, which the driver compiles (and caches). */
#ifndef PMLI_CUDA_IMAGES_H
#define PMLI_CUDA_IMAGES_H

#include <stdbool.h>
#include <stddef.h>

/* X(family): the files device/<family>.cu. */
#define PMLI_FAMILIES(X)                                                                           \
    X(rows)                                                                                        \
    X(rmsnorm)

/* X(family, kernel): the functions in them. */
#define PMLI_KERNELS(X)                                                                            \
    X(rows, copy_1)                                                                                \
    X(rows, copy_2)                                                                                \
    X(rows, copy_4)                                                                                \
    X(rows, copy_8)                                                                                \
    X(rows, copy_16)                                                                               \
    X(rows, f32_to_bf16)                                                                           \
    X(rows, f32_to_bf16_x4)                                                                        \
    X(rows, f32_to_f16)                                                                            \
    X(rows, f32_to_f16_x4)                                                                         \
    X(rows, bf16_to_f32)                                                                           \
    X(rows, bf16_to_f32_x4)                                                                        \
    X(rows, bf16_to_f16)                                                                           \
    X(rows, bf16_to_f16_x4)                                                                        \
    X(rows, f16_to_f32)                                                                            \
    X(rows, f16_to_f32_x4)                                                                         \
    X(rows, f16_to_bf16)                                                                           \
    X(rows, f16_to_bf16_x4)                                                                        \
    X(rows, fill_f32)                                                                              \
    X(rows, fill_f32_wide)                                                                         \
    X(rows, fill_bf16)                                                                             \
    X(rows, fill_bf16_wide)                                                                        \
    X(rows, fill_f16)                                                                              \
    X(rows, fill_f16_wide)                                                                         \
    X(rows, fill_f64)                                                                              \
    X(rows, fill_f64_wide)                                                                         \
    X(rows, fill_i32)                                                                              \
    X(rows, fill_i32_wide)                                                                         \
    X(rows, fill_i64)                                                                              \
    X(rows, fill_i64_wide)                                                                         \
    X(rows, fill_u8)                                                                               \
    X(rows, fill_u8_wide)                                                                          \
    X(rmsnorm, rmsnorm_f32)                                                                        \
    X(rmsnorm, rmsnorm_f32_x1)                                                                     \
    X(rmsnorm, rmsnorm_f32_x2)                                                                     \
    X(rmsnorm, rmsnorm_f32_x4)                                                                     \
    X(rmsnorm, rmsnorm_bf16)                                                                       \
    X(rmsnorm, rmsnorm_bf16_x1)                                                                    \
    X(rmsnorm, rmsnorm_bf16_x2)                                                                    \
    X(rmsnorm, rmsnorm_bf16_x4)                                                                    \
    X(rmsnorm, rmsnorm_f16)                                                                        \
    X(rmsnorm, rmsnorm_f16_x1)                                                                     \
    X(rmsnorm, rmsnorm_f16_x2)                                                                     \
    X(rmsnorm, rmsnorm_f16_x4)

typedef enum pmli_family {
#define PMLI_ENUM(family) PMLI_FAMILY_##family,
    PMLI_FAMILIES(PMLI_ENUM)
#undef PMLI_ENUM
        PMLI_FAMILY_COUNT
} pmli_family;

typedef enum pmli_kernel {
#define PMLI_ENUM(family, kernel) PMLI_##kernel,
    PMLI_KERNELS(PMLI_ENUM)
#undef PMLI_ENUM
        PMLI_KERNEL_COUNT
} pmli_kernel;

typedef struct pmli_image {
    const char *family;
    const char *target; /* as the compiler's option: "sm_90a", "compute_75" */
    int capability;     /* 90 for 9.0 */
    bool exact;         /* uses instructions of that one capability ("90a") */
    bool machine_code;  /* a cubin; else PTX */
    const unsigned char *data;
} pmli_image;

extern const pmli_image pmli_images[]; /* generated */
extern const size_t pmli_image_count;
extern const char pmli_images_compiler[]; /* "nvcc 13.0": named where a driver refuses them */

/* The image of `family` that suits a device best, NULL when none does. */
const pmli_image *pmli_image_for(const char *family, int capability);

#endif
