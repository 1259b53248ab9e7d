#include "pml/base/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pml/base/hold.h"

struct pml_hasher {
    crypto_generichash_state state; /* wants 64-byte alignment */
};

/* Picks the fastest implementation once; safe to call again and from any thread. */
static pml_status ready(pml_error *err)
{
    if (sodium_init() < 0)
        return PML_FAIL(err, PML_INTERNAL, "libsodium cannot be initialised");
    return PML_OK;
}

pml_status pml_hash_memory(const void *data, size_t size, uint8_t hash[PML_HASH_BYTES],
                           pml_error *err)
{
    pml_status status = ready(err);
    if (status != PML_OK)
        return status;
    if (crypto_generichash(hash, PML_HASH_BYTES, data, size, NULL, 0) != 0)
        return PML_FAIL(err, PML_INTERNAL, "libsodium cannot hash %zu bytes", size);
    return PML_OK;
}

static pml_status hash_descriptor(int fd, const char *path, void (*moved)(void *user), void *user,
                                  pml_hasher *hasher, pml_error *err)
{
    enum { CHUNK = 1 << 20 };
    char *chunk = malloc(CHUNK);
    if (chunk == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory to hash %s", path);
    pml_status status = PML_OK;
    while (status == PML_OK) {
        ssize_t n = read(fd, chunk, CHUNK);
        if (moved != NULL)
            moved(user);
        if (n == 0)
            break;
        if (n > 0)
            status = pml_hasher_update(hasher, chunk, (size_t)n, err);
        else if (errno != EINTR)
            status = PML_FAIL(err, PML_IO, "cannot read %s: %s", path, strerror(errno));
    }
    free(chunk);
    return status;
}

pml_status pml_hash_file(const char *path, bool follow, uint8_t hash[PML_HASH_BYTES],
                         pml_error *err)
{
    return pml_hash_file_watched(path, follow, NULL, NULL, hash, err);
}

pml_status pml_hash_file_watched(const char *path, bool follow, void (*moved)(void *user),
                                 void *user, uint8_t hash[PML_HASH_BYTES], pml_error *err)
{
    pml_hasher *hasher = NULL;
    struct stat info;
    int fd;
    pml_status status = pml_open(path, O_RDONLY | (follow ? 0 : O_NOFOLLOW), &fd, err);
    if (status != PML_OK)
        return status;
    if (fstat(fd, &info) != 0) {
        status = PML_FAIL(err, PML_IO, "cannot look at %s: %s", path, strerror(errno));
        goto done;
    }
    if (!S_ISREG(info.st_mode)) {
        status = PML_FAIL(err, PML_INVALID, "%s is not a regular file", path);
        goto done;
    }
    status = pml_hasher_new(&hasher, err);
    if (status == PML_OK)
        status = hash_descriptor(fd, path, moved, user, hasher, err);
    if (status == PML_OK)
        status = pml_hasher_finish(hasher, hash, err);
done:
    pml_hasher_destroy(&hasher);
    close(fd);
    return status;
}

void pml_hash_hex(const uint8_t *hash, size_t bytes, char *text)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < bytes; i++) {
        text[2 * i] = digits[hash[i] >> 4];
        text[2 * i + 1] = digits[hash[i] & 15];
    }
    text[2 * bytes] = '\0';
}

pml_status pml_hasher_new(pml_hasher **hasher, pml_error *err)
{
    pml_status status = ready(err);
    if (status != PML_OK)
        return status;
    pml_hasher *h = aligned_alloc(_Alignof(pml_hasher), sizeof *h);
    if (h == NULL)
        return PML_FAIL(err, PML_NO_MEMORY, "no memory for a hash");
    crypto_generichash_init(&h->state, NULL, 0, PML_HASH_BYTES);
    *hasher = h;
    return PML_OK;
}

pml_status pml_hasher_update(pml_hasher *hasher, const void *data, size_t size, pml_error *err)
{
    if (crypto_generichash_update(&hasher->state, data, size) != 0)
        return PML_FAIL(err, PML_INTERNAL, "libsodium cannot hash %zu more bytes", size);
    return PML_OK;
}

pml_status pml_hasher_finish(pml_hasher *hasher, uint8_t hash[PML_HASH_BYTES], pml_error *err)
{
    if (crypto_generichash_final(&hasher->state, hash, PML_HASH_BYTES) != 0)
        return PML_FAIL(err, PML_INTERNAL, "this hash was finished before");
    return PML_OK;
}

void pml_hasher_destroy(pml_hasher **hasher)
{
    free(*hasher);
    *hasher = NULL;
}
