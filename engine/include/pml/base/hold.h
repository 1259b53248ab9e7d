/* How a path is reached: as the system does it, or, below a folder that is held, strictly.
 *
 * A run's folder may be from somebody else, or somebody else may be able to write in it. What is
 * below it is ours to read and to write only if it really is below it: a link in the place of a
 * folder or file would lead us elsewhere, and looking first and opening then leaves a moment in
 * between. So who works in such a folder holds it: every path below it is then taken apart, and
 * each part opened relative to the one before, from the descriptor that is held, none of them a
 * link. That is so for all functions of this header, of file.h and of hash.h, and for all that
 * call them, in every thread: no caller can forget it. Other paths (models, data, a user's own
 * folders above the one that is held) may be and hold links, as the hub's cache does. */
#ifndef PML_BASE_HOLD_H
#define PML_BASE_HOLD_H

#include <dirent.h>
#include <stdbool.h>

#include "pml/base/error.h"

typedef struct pml_hold pml_hold;

/* Holds `folder`, which may itself be reached by links, until it is destroyed. What counts as below
 * it is told by the text of paths: they begin with `folder` as it is given here and a slash, and
 * one that is `folder` means the folder itself, wherever it has been moved. */
pml_status pml_hold_new(const char *folder, pml_hold **hold, pml_error *err);
void pml_hold_destroy(pml_hold **hold);

/* Where the folder that is held under this name is now: it may have been moved. One that is not
 * held is where it was. PML_NOT_FOUND: it was removed, or is out of sight, as from a container. */
pml_status pml_hold_where(const char *folder, char *path, size_t capacity, pml_error *err);

/* A folder that was removed has been made anew by us, who hold it (pml_folder_make): it is that
 * from then on. One that somebody else made there is another run's. */
void pml_hold_made(const char *path);

/* Where the last part of a path is: for those calls of the system whose names end in "at". Such a
 * call must not follow a link where `held`. */
typedef struct pml_place {
    int folder;       /* a descriptor, or AT_FDCWD */
    const char *name; /* in it; points into the path, "." for the folder that is held itself */
    bool held;
} pml_place;

/* PML_DENIED names the link on the way, PML_NOT_FOUND a folder that is not there. */
pml_status pml_place_find(const char *path, pml_place *place, pml_error *err);
void pml_place_leave(pml_place *place); /* errno stays */

/* open(2), close-on-exec, and without waiting for the other end of a pipe; mode 0600 where flags
 * create something. PML_DENIED: a link in its place is not to be followed, PML_NOT_FOUND: there is
 * nothing; then *fd is -1 and errno the system's. */
pml_status pml_open(const char *path, int flags, int *fd, pml_error *err);

/* renameat2(2); errno is the system's where it fails. */
pml_status pml_rename(const char *from, const char *to, unsigned flags, pml_error *err);

/* Whether something has that name, be it a link that leads nowhere. */
bool pml_is_there(const char *path);

/* scandir(3) of a folder, *n names; none where it fails. */
pml_status pml_folder_list(const char *path, struct dirent ***list,
                           int (*wanted)(const struct dirent *entry),
                           int (*order)(const struct dirent **a, const struct dirent **b), int *n,
                           pml_error *err);

/* Remove what is wanted of a folder, with all below it; stops at the first that stays. */
pml_status pml_folder_clear(const char *path, int (*wanted)(const struct dirent *entry),
                            pml_error *err);

#endif
