/* Files that are whole or not there, and folders that end with them.
 *
 * The assumption about the disk: what fsync has returned for survives a crash, rename within one
 * folder is atomic, and a rename is on disk once the folder has been fsynced. So a file is written
 *
 *   path.tmp-PID-N  ──write──►  fsync  ──rename──►  path  ──►  fsync(folder)
 *
 * and a reader sees the old content or the new, never a part. Messages of PML_IO name the path and
 * the system's reason. No function here follows a symbolic link in the last component of a path,
 * unless it says so, nor in any other below a folder that is held (hold.h): PML_DENIED names it.
 * All descriptors are close-on-exec. */
#ifndef PML_BASE_FILE_H
#define PML_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "pml/base/error.h"

/* Write a whole file as above; mode is exact (the umask does not apply). */
pml_status pml_file_write(const char *path, const void *data, size_t size, mode_t mode,
                          pml_error *err);

/* The same in pieces. Until commit the file of that name is as it was; destroy without commit
 * removes the temporary file. */
typedef struct pml_atomic_file pml_atomic_file;

/* new opens a temporary file beside path, write adds to it; PML_IO names the path and the system's
 * reason. The file is the caller's until commit or destroy. */
pml_status pml_atomic_file_new(const char *path, mode_t mode, pml_atomic_file **file,
                               pml_error *err);
pml_status pml_atomic_file_write(pml_atomic_file *file, const void *data, size_t size,
                                 pml_error *err);
/* What was written so far is on disk. A large file is put there in pieces: how far it has come can
 * be told then, and no single fsync holds up everybody else on that disk for long. */
pml_status pml_atomic_file_flush(pml_atomic_file *file, pml_error *err);
/* fsync, rename, fsync the folder. After it only destroy may be called. */
pml_status pml_atomic_file_commit(pml_atomic_file *file, pml_error *err);
void pml_atomic_file_destroy(pml_atomic_file **file);

/* write(2) until all is written. path is used in the message. */
pml_status pml_file_write_all(int fd, const void *data, size_t size, const char *path,
                              pml_error *err);

/* Read a whole regular file of at most `limit` bytes; *data is malloc'ed, has a NUL after the last
 * byte (not counted in *size), and is the caller's to free. PML_NOT_FOUND when there is none,
 * PML_INVALID when it is larger or not a regular file. follow: symbolic links too (a model folder
 * of the hub's cache consists of them), except below a folder that is held. */
pml_status pml_file_read(const char *path, size_t limit, bool follow, char **data, size_t *size,
                         pml_error *err);

/* open(2) folder/name, mode 0600 where flags create it, which must be a regular file and no link.
 * PML_DENIED names what is in its place, PML_NOT_FOUND: nothing is. *fd is -1 then. */
pml_status pml_file_open_regular(const char *folder, const char *name, int flags, int *fd,
                                 pml_error *err);

/* fsync a folder, so that the names in it are on disk. */
pml_status pml_folder_sync(const char *path, pml_error *err);

/* mkdir -p: the missing folders are made with mode 0700 and their names fsynced, those that exist
 * are left as they are.
 * PML_INVALID when something on the way is not a folder. */
pml_status pml_folder_make(const char *path, pml_error *err);
/* Bytes of the files in a folder, without those in folders below it; 0 where it cannot be read. */
size_t pml_folder_bytes(const char *path);

/* Remove `name`, a file or a whole tree, below the folder `root`; links are removed, not followed.
 * name is relative and has no "..": nothing outside root can be reached, even if somebody swaps a
 * folder for a link meanwhile. Nothing there is PML_OK. */
pml_status pml_tree_remove(const char *root, const char *name, pml_error *err);

#endif
