/* A disk that fails or is watched: libdisk.so, linked or loaded by LD_PRELOAD, stands before the
 * system calls that change files.
 *
 *   PML_DISK=FILE           a struct disk_control, which the test maps too and changes while we
 * run; without it, disk_control_here() is this process's own PML_DISK_PROGRAM=NAME   only in the
 * program of that name PML_DISK_RECORD=FILE    every change below PML_DISK_PREFIX is appended
 * (tools/chaos/power.py) PML_DISK_STRIKE=FILE    where it is there, a recorded coordinator takes it
 * away and gets SIGKILL, right behind a change: the record has all that it did
 *
 * Counted are open with O_CREAT or for writing, write, pwrite, ftruncate, fsync, fdatasync, fchmod,
 * close of a file that was written, mkdir, rename, renameat2, unlink and unlinkat below `prefix`.
 *
 * Counted on their own (`reads`) are open that makes nothing, of files and of folders, read and
 * pread, where the path below `prefix` has `read_of` in it. */
#ifndef TESTS_SHIM_DISK_H
#define TESTS_SHIM_DISK_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct disk_control {
    char prefix[512];     /* real path of what is watched; "" = nothing */
    _Atomic int64_t n;    /* operations so far: 1, 2, … */
    _Atomic int64_t from; /* those from `from` to `to` fail; 0: none */
    _Atomic int64_t to;
    _Atomic int32_t code; /* errno */
    _Atomic int32_t half; /* a failing write takes half of its bytes first, as a full disk does */
    _Atomic int32_t lazy; /* fsync and fdatasync below prefix do nothing: no test cuts the power */
    _Atomic int32_t read_ms;                   /* a read of a tensor file takes so long */
    char read_of[64];                          /* "" = reads are not counted */
    _Atomic int64_t reads, read_from, read_to; /* as n, from and to */
    _Atomic int32_t read_code;
    char last[600]; /* what failed last: "write PATH" */
} disk_control;

disk_control *disk_control_here(void);

#endif
