/* Memory calls of one thread, counted: liballoc.so, linked or loaded by LD_PRELOAD, stands before
 * malloc and its relatives, free, and mmap and its relatives, of the whole process, and counts
 * those of the main thread between alloc_begin and alloc_end.
 *
 * libc's own calls of mmap (inside malloc, for a thread's stack) are not seen: what asks for them
 * is.
 */
#ifndef TESTS_SHIM_ALLOC_H
#define TESTS_SHIM_ALLOC_H

/* Of the calling thread's call on: each call counts. alloc_end stops the counting. */
void alloc_begin(void);
void alloc_end(void);

/* What was counted, as a line "allocations N frees N maps N", and behind it where the first of them
 * came from, a block of lines for each, to a new file. 0, or -1 with errno. */
int alloc_write(const char *path);

#endif
