/* What the writer and the reader of GGUF share: the numbers of the format. */
#ifndef PMLI_GGUF_H
#define PMLI_GGUF_H

enum {
    PMLI_GGUF_VERSION = 3,
    PMLI_GGUF_HEADER = 24 /* magic, version, both counts */
};

/* Types of pairs. */
typedef enum pmli_gguf_kind {
    PMLI_KIND_U8 = 0,
    PMLI_KIND_I8,
    PMLI_KIND_U16,
    PMLI_KIND_I16,
    PMLI_KIND_U32,
    PMLI_KIND_I32,
    PMLI_KIND_F32,
    PMLI_KIND_BOOL,
    PMLI_KIND_STRING,
    PMLI_KIND_ARRAY,
    PMLI_KIND_U64,
    PMLI_KIND_I64,
    PMLI_KIND_F64,
    PMLI_KIND_COUNT
} pmli_gguf_kind;

#endif
