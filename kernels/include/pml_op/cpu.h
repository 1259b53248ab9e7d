/* What only the CPU backend has: getting a process ready for it, and asking for memory without a
 * device. */
#ifndef PML_OP_CPU_H
#define PML_OP_CPU_H

#include <stddef.h>

#include "pml/base/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* First thing in main() of a program that computes on the CPU.
 *
 * OpenBLAS picks its kernels while it is being loaded, and on some machines with AVX-512 it picks
 * AVX2 ones, at half the speed. It listens to OPENBLAS_CORETYPE only then, so when that variable is
 * unset, the machine has AVX-512 and the chosen core does not use it, this sets the variable and
 * executes the program again from /proc/self/exe: same pid, argv and inherited descriptors. It does
 * so at most once. Returns PML_OK when nothing had to be done; PML_UNSUPPORTED when the program
 * could not be executed again: it runs correctly, slower, and pml_backend.info names the core. */
pml_status pml_cpu_prepare_process(int argc, char **argv);

/* Bytes of this machine's memory, or of the tightest control group's limit: all of them, and what
 * can be taken now. What pml_backend.info of a CPU device says, without one. PML_IO without /proc.
 */
pml_status pml_cpu_memory(size_t *total, size_t *free, pml_error *err);

#ifdef __cplusplus
}
#endif
#endif
