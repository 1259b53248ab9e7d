/* Whether what was exported is what was trained: both are loaded, one after the other, and answer
 * the same tokens. */
#ifndef PML_TRAIN_COMPARE_H
#define PML_TRAIN_COMPARE_H

#include <stdbool.h>

#include "pml/train/config.h"

typedef enum pml_exported {
    PML_EXPORTED_PEFT = 0,
    PML_EXPORTED_MERGED,
    PML_EXPORTED_GGUF
} pml_exported;

typedef struct pml_comparison {
    int32_t tokens;
    double difference; /* the largest |exported - trained| of a logit, by the largest |trained| */
    int32_t same_top;  /* of the tokens, those after which both think the same one likeliest */
} pml_comparison;

typedef struct pml_compare_options {
    int threads;
    bool (*enough)(
        void *asked); /* asked at each tensor and each token: whoever waits wants no
                       * more (Ctrl-C), and PML_TIMEOUT is what it comes to. NULL: never */
    void *asked;
} pml_compare_options;

/* config and checkpoint: the run and its step; path: what was exported. Takes the memory of one
 * loaded model at a time, as float32 (the trained one as the run has it); PML_NO_MEMORY when there
 * is not that much. */
pml_status pml_compare_export(const pml_train_config *config, const char *checkpoint,
                              pml_exported kind, const char *path,
                              const pml_compare_options *options, pml_comparison *result,
                              pml_error *err);

#endif
