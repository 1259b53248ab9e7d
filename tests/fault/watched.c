#include "watched.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

disk_control *disk;
static const char *shim;
static char control_file[] = "/tmp/pml-disk-control-XXXXXX";

void watched_library(const char *path)
{
    shim = realpath(path, NULL); /* what is launched has another working folder */
}

void watch(const char *program, const harness *h)
{
    if (program == NULL) {
        unsetenv("LD_PRELOAD");
        return;
    }
    memset(disk, 0, sizeof *disk);
    snprintf(disk->prefix, sizeof disk->prefix, "%s", h->root);
    disk->lazy = 1;
    watch_again(program);
}

void watch_again(const char *program)
{
    setenv("PML_DISK", control_file, 1);
    setenv("PML_DISK_PROGRAM", program, 1);
    setenv("LD_PRELOAD", shim, 1);
}

int watched_begin(void **state)
{
    (void)state;
    int fd = mkstemp(control_file);
    if (fd < 0 || ftruncate(fd, sizeof *disk) != 0)
        return -1;
    disk = mmap(NULL, sizeof *disk, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return disk == MAP_FAILED ? -1 : 0;
}

int watched_end(void **state)
{
    (void)state;
    return unlink(control_file);
}
