#include "pml/train/compare.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "choose.h"
#include "pml/base/philox.h"
#include "pml/train/gguf.h"
#include "pml/train/stepper.h"

enum { TOKENS = 24 };

/* The smallest training configuration that is one: nothing will be trained. */
static pml_train_config idle(const char *model)
{
    pml_train_config c = {.method = PML_METHOD_LORA,
                          .dtype = PML_F32,
                          .lora_rank = 1,
                          .lora_alpha = 1,
                          .lora_targets = PML_TARGET_Q,
                          .max_steps = 1,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .epsilon = 1e-8,
                          .batch_size = 1,
                          .accumulation = 1,
                          .max_length = TOKENS};
    snprintf(c.model, sizeof c.model, "%s", model);
    return c;
}

/* As the run has it, with an adapter of a folder. */
static pml_train_config with_adapter(const pml_train_config *run, const char *folder)
{
    pml_train_config c = *run;
    c.max_length = TOKENS;
    c.batch_size = c.accumulation = 1;
    c.max_steps = 1;
    c.memory_limit = 0;
    snprintf(c.lora_init, sizeof c.lora_init, "%s", folder);
    return c;
}

/* gguf: a file that takes the place of the weights, of a model as spec has it; NULL: none. */
static pml_status answer(const pml_train_config *config, const char *gguf,
                         const pml_model_spec *spec, const pml_compare_options *how,
                         const int32_t *tokens, float **logits, int32_t *vocab, pml_error *err)
{
    const pml_stepper_options options = {.config = config,
                                         .backend = pml_backend_cpu(),
                                         .threads = how->threads,
                                         .enough = how->enough,
                                         .asked = how->asked,
                                         .spec = gguf != NULL ? spec : NULL,
                                         .limits = {.tokens = TOKENS,
                                                    .docs = 1,
                                                    .labels = 1,
                                                    .max_doc = TOKENS,
                                                    .generate_length = TOKENS}};
    pml_stepper *s = NULL;
    pml_status status = pml_stepper_new(&options, &s, err);
    if (status == PML_OK && gguf != NULL)
        status = pml_gguf_load(s, gguf, err);
    if (status == PML_OK) {
        *vocab = pml_stepper_spec(s)->vocab;
        *logits = malloc(TOKENS * (size_t)*vocab * sizeof **logits);
        if (*logits == NULL)
            status = PML_FAIL(err, PML_NO_MEMORY, "no memory to compare logits");
    }
    if (status == PML_OK)
        status = pml_stepper_logits(s, tokens, TOKENS, *logits, err);
    pml_stepper_destroy(&s);
    return status;
}

static void measure(const float *trained, const float *exported, int32_t vocab,
                    pml_comparison *result)
{
    double apart = 0, largest = 0;
    result->tokens = TOKENS;
    for (size_t i = 0; i < TOKENS * (size_t)vocab; i++) {
        double d = fabs((double)exported[i] - trained[i]);
        apart = d > apart || isnan(d) ? d : apart;
        largest = fmax(largest, fabs((double)trained[i]));
    }
    for (size_t t = 0; t < TOKENS; t++)
        result->same_top += pmli_greatest(trained + t * (size_t)vocab, vocab) ==
                            pmli_greatest(exported + t * (size_t)vocab, vocab);
    result->difference = largest > 0 ? apart / largest : apart;
}

pml_status pml_compare_export(const pml_train_config *run, const char *checkpoint,
                              pml_exported kind, const char *path,
                              const pml_compare_options *options, pml_comparison *result,
                              pml_error *err)
{
    *result = (pml_comparison){0};
    int32_t tokens[TOKENS], vocab = 0, other = 0;
    float *trained = NULL, *exported = NULL;
    bool lora = run->method == PML_METHOD_LORA;
    pml_model_spec spec;
    pml_status status = pml_model_spec_load(run->model, &spec, err);
    if (status != PML_OK)
        return status;
    spec.nf4 = false; /* as it was merged */
    spec.tied_head = spec.tied_head && !(lora && pml_saved_unties(run->lora_saved));
    for (int i = 0; i < TOKENS; i++)
        tokens[i] = (int32_t)(pml_philox_at(1, (uint64_t)i, PML_PURPOSE_SAMPLE, 0).word[0] %
                              (uint32_t)spec.vocab);
    pml_train_config live = lora ? with_adapter(run, checkpoint) : idle(checkpoint);
    pml_train_config saved = kind == PML_EXPORTED_PEFT     ? with_adapter(run, path)
                             : kind == PML_EXPORTED_MERGED ? idle(path)
                                                           : idle(run->model);
    status = answer(&live, NULL, NULL, options, tokens, &trained, &vocab, err);
    if (status == PML_OK) {
        status = answer(&saved, kind == PML_EXPORTED_GGUF ? path : NULL, &spec, options, tokens,
                        &exported, &other, err);
        if (status != PML_OK)
            pml_error_prefix(err, "reading the export back");
    }
    if (status == PML_OK && other != vocab)
        status = PML_FAIL(err, PML_INTERNAL, "the export has a vocabulary of %d, the run %d", other,
                          vocab);
    if (status == PML_OK)
        measure(trained, exported, vocab, result);
    free(trained);
    free(exported);
    return status;
}
