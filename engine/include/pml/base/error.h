/* Status and error: how every fallible function of PantheraML answers.
 *
 * A function that can fail returns a pml_status and takes a pml_error, owned by the caller
 * and usually on its stack. On failure the error holds what happened and what to do about it,
 * and the place in the source where it began. Layers above may put words in front
 * (pml_error_prefix), never replace the origin. A NULL error is allowed and means "do not tell". */
#ifndef PML_BASE_ERROR_H
#define PML_BASE_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pml_status {
    PML_OK = 0,
    PML_INVALID,     /* the caller's or the user's input cannot be used                  */
    PML_NOT_FOUND,   /* a file, tensor, key or run that was named does not exist         */
    PML_UNSUPPORTED, /* understood, but not in this version or not on this device        */
    PML_NO_MEMORY,   /* host or device memory refused, or a plan does not fit            */
    PML_IO,          /* the operating system refused a read, a write or a rename         */
    PML_CORRUPT,     /* a file or message is damaged: hash, length or format mismatch    */
    PML_DENIED,      /* the key's role or the file's owner does not allow it             */
    PML_BUSY,        /* somebody else holds the lock, or the state does not allow it now */
    PML_TIMEOUT,     /* the deadline passed                                              */
    PML_PEER,        /* another worker, the coordinator or the device is gone            */
    PML_INTERNAL,    /* a fault of ours; please report                                   */
    PML_STATUS_COUNT
} pml_status;

typedef struct pml_error {
    pml_status code;
    int line;           /* line of origin, 0 when unknown        */
    const char *file;   /* static string, file of origin         */
    char message[1000]; /* UTF-8, NUL-terminated, never empty after a failure */
} pml_error;

#define PML_ERROR_INIT                                                                             \
    {                                                                                              \
        PML_OK, 0, "", ""                                                                          \
    }

/* "invalid", "not found", … : a short lower-case name, static. */
const char *pml_status_name(pml_status code);

/* What it is when the system refuses to reach a file: PML_NOT_FOUND only where it says that there
 * is none, PML_NO_MEMORY, else PML_IO. */
pml_status pml_status_of_errno(int code);

/* Fill err (if not NULL) and return code, so that a function can `return PML_FAIL(...)`.
 * The text is cut at the buffer's end on a whole UTF-8 character. */
pml_status pml_error_set(pml_error *err, pml_status code, const char *file, int line,
                         const char *format, ...) __attribute__((format(printf, 5, 6)));

#define PML_FAIL(err, code, ...) pml_error_set((err), (code), __FILE__, __LINE__, __VA_ARGS__)

/* Put "words: " before an error that is already set, and return its code unchanged. */
pml_status pml_error_prefix(pml_error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif
#endif
