/* BLAKE2b hashes (RFC 7693) of memory, of files, of streams. Used for MANIFESTs and identities: a
 * hash tells damage, it does not prove who wrote something. */
#ifndef PML_BASE_HASH_H
#define PML_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pml/base/error.h"

enum { PML_HASH_BYTES = 32, PML_HASH_HEX = 2 * PML_HASH_BYTES + 1 };

/* BLAKE2b-256 of size bytes. */
pml_status pml_hash_memory(const void *data, size_t size, uint8_t hash[PML_HASH_BYTES],
                           pml_error *err);

/* BLAKE2b-256 of a regular file's content. A symbolic link in its place is followed where `follow`
 * says so, except below a folder that is held (hold.h), else refused (PML_DENIED). */
pml_status pml_hash_file(const char *path, bool follow, uint8_t hash[PML_HASH_BYTES],
                         pml_error *err);

/* The same, for files that take long: `moved` (may be NULL) is called with each megabyte read. */
pml_status pml_hash_file_watched(const char *path, bool follow, void (*moved)(void *user),
                                 void *user, uint8_t hash[PML_HASH_BYTES], pml_error *err);

/* bytes of hash as lower-case hex digits with a NUL: text has room for 2 * bytes + 1. */
void pml_hash_hex(const uint8_t *hash, size_t bytes, char *text);

/* A stream: new, update as often as needed, finish once. */
typedef struct pml_hasher pml_hasher;

/* PML_NO_MEMORY, and PML_INTERNAL where the library refuses: no data is wrong to it. */
pml_status pml_hasher_new(pml_hasher **hasher, pml_error *err);
pml_status pml_hasher_update(pml_hasher *hasher, const void *data, size_t size, pml_error *err);
pml_status pml_hasher_finish(pml_hasher *hasher, uint8_t hash[PML_HASH_BYTES], pml_error *err);
void pml_hasher_destroy(pml_hasher **hasher);

#endif
