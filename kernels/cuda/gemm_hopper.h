/* Products of 16-bit matrices by our own kernel for sm_90a (device/gemm_hopper.cu): a candidate
 * beside cuBLASLt's, for those that fill the chip. */
#ifndef PMLI_CUDA_GEMM_HOPPER_H
#define PMLI_CUDA_GEMM_HOPPER_H

#include "gemm.h"

/* Whether it can do this product on this device, and is worth a trial there: c = a b, all of one
 * 16-bit dtype, nothing added, a as [m,k], b either way, n and every row's distance to the next in
 * whole packs of 16 bytes; a tile of 128 x 256 for each processor at least, but however small it is
 * with $PML_CUDA_OWN_PRODUCTS (tests). */
bool pmli_gemm_hopper_serves(const pml_device *device, const pmli_gemm *gemm);

/* $PML_CUDA_OWN_PRODUCTS: what can be done by this kernel is, without a trial. */
bool pmli_gemm_hopper_is_wanted(void);

/* Queue the product, one that it serves. */
pml_status pmli_gemm_hopper(pml_queue *queue, const pmli_gemm *gemm, pml_error *err);

/* Once a device; finds how many clusters it runs at once. */
pml_status pmli_gemm_hopper_prepare(pml_device *device, pml_error *err);

#endif
