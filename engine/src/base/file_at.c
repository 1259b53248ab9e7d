#include "pml/base/file_at.h"

#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

pml_status pml_file_at_read(const pml_file_at *from, void *to, size_t bytes, pml_error *err)
{
    size_t done = 0;
    while (done < bytes) {
        uint64_t at = from->at + done;
        ssize_t n = pread(from->fd, (char *)to + done, bytes - done, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return PML_FAIL(err, PML_IO, "cannot read %s at byte %llu: %s", from->path,
                            (unsigned long long)at, strerror(errno));
        if (n == 0)
            return PML_FAIL(err, PML_CORRUPT,
                            "%s has no byte %llu, and %zu were to be read from there on: it has "
                            "been cut short meanwhile",
                            from->path, (unsigned long long)at, bytes - done);
        done += (size_t)n;
    }
    return PML_OK;
}
