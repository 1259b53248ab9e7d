/* Log: one line on stderr for each thing worth knowing, `time level program[pid] message`.
 *
 *   2026-11-21T05:13:07.412Z info worker-0[4711] loaded 291 tensors, 942 MiB
 *
 * A line is one write(2), so that lines of several threads and processes never mix. Nothing is
 * allocated; a message longer than the line buffer is cut. Control characters become spaces, so
 * that text from users and models cannot forge a line. */
#ifndef PML_BASE_LOG_H
#define PML_BASE_LOG_H

typedef enum pml_log_level {
    PML_LOG_DEBUG = 0,
    PML_LOG_INFO,
    PML_LOG_WARNING,
    PML_LOG_ERROR
} pml_log_level;

/* Name of this program in each line (copied, cut at 31 bytes) and the least level written.
 * Before the first call: "pml" and info. Call it before threads start. */
void pml_log_init(const char *program, pml_log_level least);

/* One line, cut at its longest, with time, program and level; lines below the least level are not
 * written. From any thread. */
void pml_log(pml_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
