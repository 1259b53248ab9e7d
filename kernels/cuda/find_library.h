/* Where CUDA's libraries may be: they are not ours to ship, and every installation has them
 * somewhere else. Looked through in this order, and the first that opens is taken:
 *
 *   1. the folders of $PML_CUDA_LIBS (with ':' between them); when it is set, nothing else
 *   2. the NVIDIA packages of a Python: <site-packages>/nvidia/<package>/lib, for the site-packages
 *      this object lies in, those of $VIRTUAL_ENV and $CONDA_PREFIX, and of python3 on the PATH
 *      (a PyTorch installed by pip brings the same packages)
 *   3. what the system's loader finds by name, then the usual folders of a CUDA installation */
#ifndef PMLI_CUDA_FIND_LIBRARY_H
#define PMLI_CUDA_FIND_LIBRARY_H

#include <stddef.h>

#include "pml/base/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pmli_library {
    const char *stem;    /* "libcublasLt.so" */
    const char *wheel12; /* folder under nvidia/ in CUDA 12 wheels: "cublas" */
    const char *install; /* what to install, for the message, without CUDA's: "nvidia-cublas" */
    int soname;          /* major version in the file's name where it is not CUDA's (cuDNN: 9), and
                            then the folder is the same for every CUDA; 0: CUDA's */
} pmli_library;

/* Those that are used here: matrix products, attention, and what attention needs beside it: its
 * compiler, and a runtime of which it asks what chip it is on. */
extern const pmli_library pmli_cublas_library, pmli_cudnn_library, pmli_nvrtc_library,
    pmli_runtime_library;

/* The newest CUDA whose libraries this was written for; what is called is the same from 12 on. */
enum { PMLI_NEWEST_CUDA = 13, PMLI_NEWEST_CUDNN = 9 };

/* CUDA's version in the name of the library that was opened last; before, PMLI_NEWEST_CUDA. What is
 * installed for cuDNN must be of the same one: its packages for 12 and 13 have the same files. */
int pmli_cuda_there(void);

/* As pml_backend.library. */
pml_status pmli_find_library(int which, char *path, size_t capacity, pml_error *err);

/* Open <stem>.<major> for the newest CUDA major version that is not above newest_major, 12 at
 * least. The handle is never closed. PML_NOT_FOUND says where was looked and what to install. */
pml_status pmli_open_library(const pmli_library *library, int newest_major, void **handle,
                             pml_error *err);

#ifdef __cplusplus
}
#endif
#endif
