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
    X(rmsnorm)                                                                                     \
    X(rmsnorm_bwd)                                                                                 \
    X(columns)                                                                                     \
    X(elementwise)                                                                                 \
    X(embed)                                                                                       \
    X(dropout)                                                                                     \
    X(masked)                                                                                      \
    X(border)                                                                                      \
    X(gemm_hopper)                                                                                 \
    X(low_rank)                                                                                    \
    X(pass)                                                                                        \
    X(mlp)                                                                                         \
    X(few_rows)                                                                                    \
    X(loss)                                                                                        \
    X(update)                                                                                      \
    X(adamw_8bit)                                                                                  \
    X(attention_any)                                                                               \
    X(attention_fwd)                                                                               \
    X(attention_bwd)                                                                               \
    X(attention_hopper)                                                                            \
    X(attention_hopper_q)                                                                          \
    X(attention_hopper_plan)                                                                       \
    X(sdpa)                                                                                        \
    X(head_norm)                                                                                   \
    X(nf4)                                                                                         \
    X(nf4_quantise)                                                                                \
    X(fp8)

/* One kernel for each dtype the GPU computes on, in the order of pml_dtype: the host adds the dtype
 * to the first one's number. */
#define PMLI_TYPED(X, family, kernel)                                                              \
    X(family, kernel##_f32)                                                                        \
    X(family, kernel##_bf16)                                                                       \
    X(family, kernel##_f16)

/* The same, each followed by its form for whole 16-byte packs. */
#define PMLI_TYPED_WIDE(X, family, kernel)                                                         \
    X(family, kernel##_f32)                                                                        \
    X(family, kernel##_f32_wide)                                                                   \
    X(family, kernel##_bf16)                                                                       \
    X(family, kernel##_bf16_wide)                                                                  \
    X(family, kernel##_f16)                                                                        \
    X(family, kernel##_f16_wide)

/* For rows of a norm: any, then those that 1, 2 or 4 packs a thread hold in registers. */
#define PMLI_ROWS(X, family, kernel)                                                               \
    X(family, kernel)                                                                              \
    X(family, kernel##_x1)                                                                         \
    X(family, kernel##_x2)                                                                         \
    X(family, kernel##_x4)
#define PMLI_TYPED_ROWS(X, family, kernel)                                                         \
    PMLI_ROWS(X, family, kernel##_f32)                                                             \
    PMLI_ROWS(X, family, kernel##_bf16)                                                            \
    PMLI_ROWS(X, family, kernel##_f16)

/* One for at most so many rows of x. */
#define PMLI_OF_ROWS(X, family, kernel)                                                            \
    X(family, kernel##_1)                                                                          \
    X(family, kernel##_2)                                                                          \
    X(family, kernel##_4)                                                                          \
    X(family, kernel##_8)

/* For one to three groups of ranks, each under its mask, and for two under one. */
#define PMLI_OF_GROUPS(X, family, kernel, suffix)                                                  \
    X(family, kernel##_1_##suffix)                                                                 \
    X(family, kernel##_2_##suffix)                                                                 \
    X(family, kernel##_3_##suffix)                                                                 \
    X(family, kernel##_one_##suffix)
#define PMLI_MASKED(X, suffix)                                                                     \
    PMLI_OF_GROUPS(X, masked, masked_down, suffix)                                                 \
    PMLI_OF_GROUPS(X, masked, masked_both, suffix)                                                 \
    X(masked, masked_dx_1_##suffix)                                                                \
    X(masked, masked_dx_one_##suffix)                                                              \
    X(masked, masked_da_1_##suffix)                                                                \
    X(masked, masked_da_one_##suffix)

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
    PMLI_TYPED_ROWS(X, rmsnorm, rmsnorm)                                                           \
    PMLI_ROWS(X, rmsnorm, rmsnorm_trained_bf16)                                                    \
    PMLI_ROWS(X, rmsnorm, rmsnorm_trained_f16)                                                     \
    PMLI_ROWS(X, rmsnorm, rmsnorm_begins_bf16)                                                     \
    PMLI_ROWS(X, rmsnorm, rmsnorm_begins_f16)                                                      \
    PMLI_TYPED_ROWS(X, rmsnorm_bwd, rmsnorm_bwd)                                                   \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_f16_to_f32)                                              \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_trained_bf16)                                            \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_trained_f16)                                             \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_trained_f16_to_f32)                                      \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_begins_bf16)                                             \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_begins_f16)                                              \
    PMLI_ROWS(X, rmsnorm_bwd, rmsnorm_bwd_begins_f16_to_f32)                                       \
    PMLI_TYPED(X, rmsnorm_bwd, rmsnorm_bwd_weight)                                                 \
    X(rmsnorm_bwd, rmsnorm_bwd_weight_f16_to_f32)                                                  \
    X(rmsnorm_bwd, rmsnorm_bwd_weight_begins_bf16)                                                 \
    X(rmsnorm_bwd, rmsnorm_bwd_weight_begins_f16)                                                  \
    X(rmsnorm_bwd, rmsnorm_bwd_weight_begins_f16_to_f32)                                           \
    PMLI_TYPED(X, columns, column_parts)                                                           \
    X(columns, column_parts_bf16_by_f32)                                                           \
    X(columns, column_parts_f16_by_f32)                                                            \
    X(columns, add_parts)                                                                          \
    PMLI_TYPED_WIDE(X, elementwise, rope)                                                          \
    PMLI_TYPED_WIDE(X, elementwise, swiglu)                                                        \
    PMLI_TYPED_WIDE(X, elementwise, swiglu_bwd)                                                    \
    X(embed, embed_sort)                                                                           \
    X(embed, embed_rank)                                                                           \
    PMLI_TYPED_WIDE(X, embed, embed_bwd)                                                           \
    X(embed, embed_parts)                                                                          \
    X(embed, embed_parts_wide)                                                                     \
    PMLI_TYPED_WIDE(X, dropout, dropout)                                                           \
    PMLI_MASKED(X, bf16)                                                                           \
    PMLI_MASKED(X, f16)                                                                            \
    PMLI_TYPED_WIDE(X, border, border)                                                             \
    X(gemm_hopper, gemm_hopper_eight_nt_bf16)                                                      \
    X(gemm_hopper, gemm_hopper_eight_nt_f16)                                                       \
    X(gemm_hopper, gemm_hopper_eight_nn_bf16)                                                      \
    X(gemm_hopper, gemm_hopper_eight_nn_f16)                                                       \
    X(gemm_hopper, gemm_hopper_two_nt_bf16)                                                        \
    X(gemm_hopper, gemm_hopper_two_nt_f16)                                                         \
    X(gemm_hopper, gemm_hopper_two_nn_bf16)                                                        \
    X(gemm_hopper, gemm_hopper_two_nn_f16)                                                         \
    X(low_rank, low_rank_bf16)                                                                     \
    X(low_rank, low_rank_f16)                                                                      \
    X(low_rank, low_rank_sum_bf16)                                                                 \
    X(low_rank, low_rank_sum_f16)                                                                  \
    X(pass, pass_back_bf16)                                                                        \
    X(pass, pass_back_f16)                                                                         \
    X(pass, pass_back_sum_bf16)                                                                    \
    X(pass, pass_back_sum_f16)                                                                     \
    X(mlp, mlp_bf16)                                                                               \
    X(mlp, mlp_f16)                                                                                \
    X(mlp, mlp_codes_bf16)                                                                         \
    X(mlp, mlp_codes_f16)                                                                          \
    X(mlp, mlp_sum_bf16)                                                                           \
    X(mlp, mlp_sum_f16)                                                                            \
    X(mlp, mlp_bwd_bf16)                                                                           \
    X(mlp, mlp_bwd_f16)                                                                            \
    X(mlp, mlp_bwd_codes_bf16)                                                                     \
    X(mlp, mlp_bwd_codes_f16)                                                                      \
    X(mlp, mlp_bwd_sum_bf16)                                                                       \
    X(mlp, mlp_bwd_sum_f16)                                                                        \
    PMLI_OF_ROWS(X, few_rows, few_u_bf16)                                                          \
    PMLI_OF_ROWS(X, few_rows, few_u_f16)                                                           \
    PMLI_OF_ROWS(X, few_rows, few_y_bf16)                                                          \
    PMLI_OF_ROWS(X, few_rows, few_y_f16)                                                           \
    PMLI_TYPED(X, loss, cross_entropy)                                                             \
    X(loss, cross_entropy_held_bf16)                                                               \
    X(loss, cross_entropy_held_f16)                                                                \
    X(update, sum_parts)                                                                           \
    X(update, sumsq_parts)                                                                         \
    X(update, sum_total)                                                                           \
    X(update, clip_scale)                                                                          \
    PMLI_TYPED(X, update, sgd)                                                                     \
    PMLI_TYPED_WIDE(X, update, adamw)                                                              \
    PMLI_TYPED(X, adamw_8bit, adamw_8bit)                                                          \
    PMLI_TYPED(X, attention_any, attend)                                                           \
    PMLI_TYPED(X, attention_any, attend_few)                                                       \
    PMLI_TYPED(X, attention_any, attend_dots)                                                      \
    PMLI_TYPED(X, attention_any, attend_bwd_q)                                                     \
    PMLI_TYPED(X, attention_any, attend_bwd_kv)                                                    \
    X(attention_fwd, attend_64_bf16)                                                               \
    X(attention_fwd, attend_64_f16)                                                                \
    X(attention_fwd, attend_128_bf16)                                                              \
    X(attention_fwd, attend_128_f16)                                                               \
    X(attention_bwd, attend_bwd_kv_64_bf16)                                                        \
    X(attention_bwd, attend_bwd_kv_64_f16)                                                         \
    X(attention_bwd, attend_bwd_kv_128_bf16)                                                       \
    X(attention_bwd, attend_bwd_kv_128_f16)                                                        \
    X(attention_bwd, attend_bwd_q_64_bf16)                                                         \
    X(attention_bwd, attend_bwd_q_64_f16)                                                          \
    X(attention_bwd, attend_bwd_q_128_bf16)                                                        \
    X(attention_bwd, attend_bwd_q_128_f16)                                                         \
    X(attention_hopper_plan, attend_hopper_begin)                                                  \
    X(attention_hopper_plan, attend_hopper_end)                                                    \
    X(attention_hopper, attend_hopper_bwd)                                                         \
    X(attention_hopper, attend_hopper_bwd_kv)                                                      \
    X(attention_hopper_q, attend_hopper_bwd_q)                                                     \
    X(sdpa, sdpa_offsets)                                                                          \
    X(sdpa, sdpa_lse)                                                                              \
    X(sdpa, sdpa_packed)                                                                           \
    X(sdpa, sdpa_stats)                                                                            \
    PMLI_TYPED_WIDE(X, head_norm, head_norm)                                                       \
    PMLI_TYPED_WIDE(X, head_norm, head_norm_bwd)                                                   \
    X(head_norm, head_norm_trained_bf16)                                                           \
    X(head_norm, head_norm_trained_bf16_wide)                                                      \
    X(head_norm, head_norm_trained_f16)                                                            \
    X(head_norm, head_norm_trained_f16_wide)                                                       \
    X(head_norm, head_norm_bwd_trained_bf16)                                                       \
    X(head_norm, head_norm_bwd_trained_bf16_wide)                                                  \
    X(head_norm, head_norm_bwd_trained_f16)                                                        \
    X(head_norm, head_norm_bwd_trained_f16_wide)                                                   \
    PMLI_TYPED(X, head_norm, head_norm_bwd_weight)                                                 \
    PMLI_TYPED(X, head_norm, head_norm_parts)                                                      \
    PMLI_TYPED(X, nf4, nf4)                                                                        \
    PMLI_TYPED(X, nf4_quantise, nf4_codes)                                                         \
    X(nf4_quantise, nf4_rows)                                                                      \
    X(nf4_quantise, nf4_mean)                                                                      \
    X(nf4_quantise, nf4_scales)                                                                    \
    PMLI_TYPED_WIDE(X, fp8, fp8_rows)                                                              \
    PMLI_TYPED(X, fp8, fp8_pieces)                                                                 \
    PMLI_TYPED(X, fp8, fp8_level)                                                                  \
    PMLI_TYPED(X, fp8, fp8_weight)                                                                 \
    PMLI_TYPED(X, fp8, fp8_largest)                                                                \
    PMLI_TYPED(X, fp8, fp8_border)                                                                 \
    X(fp8, fp8_transpose)                                                                          \
    PMLI_TYPED(X, fp8, fp8_scales)

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
extern const char pmli_images_compiler[]; /* "NVRTC 12.9": named where a driver refuses them */

/* The image of `family` that suits a device best, NULL when none does. */
const pmli_image *pmli_image_for(const char *family, int capability);

#endif
