/* MANIFEST of a checkpoint folder: any bytes in the place of it, beside three files that are there.
 * What verifies names every one of them. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"
#include "pml/train/checkpoint.h"

unsigned fuzz_accepted;

static const char *const files[] = {"state.json", "optimizer.safetensors",
                                    "adapter_model.safetensors"};
static char folder[64], manifest[96];

static void put(const char *path, const void *data, size_t size)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    FUZZ_EXPECT(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    close(fd);
}

static void leave(void)
{
    char path[128];
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        unlink(path);
    }
    unlink(manifest);
    rmdir(folder);
}

/* In memory where there is such a place: a file is written for each input. */
static void enter(void)
{
    char path[128];
    snprintf(folder, sizeof folder, "%s/pml-fuzz-XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    FUZZ_EXPECT(mkdtemp(folder) != NULL);
    atexit(leave);
    snprintf(manifest, sizeof manifest, "%s/MANIFEST", folder);
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, files[i]);
        put(path, files[i], strlen(files[i]));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pml_error err = {0};
    if (folder[0] == '\0')
        enter();
    put(manifest, data, size);
    int64_t timeline;
    FUZZ_EXPECT(pml_checkpoint_timeline(folder, &timeline, &err) == PML_OK);
    FUZZ_EXPECT(timeline == INT64_MAX); /* state.json has none */
    pml_status status = pml_checkpoint_verify(folder, &err);
    FUZZ_EXPECT((status == PML_OK) == (err.message[0] == '\0'));
    if (status != PML_OK)
        return 0;
    fuzz_accepted++;
    for (size_t i = 0; i < 3; i++)
        FUZZ_EXPECT(memmem(data, size, files[i], strlen(files[i])) != NULL);
    return 0;
}
