/* A model of 6 layers, batches for it, and its program with the CPU backend's workspace, no device.
 */
#ifndef TESTS_PLAN_SMALL_H
#define TESTS_PLAN_SMALL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "pml/plan/program.h"

static const pml_model_spec small = {.family = "llama",
                                     .vocab = 500,
                                     .hidden = 64,
                                     .layers = 6,
                                     .heads = 4,
                                     .kv_heads = 2,
                                     .head_dim = 16,
                                     .intermediate = 160,
                                     .max_positions = 512,
                                     .qkv_bias = true,
                                     .tied_head = true,
                                     .rms_eps = 1e-5F};
static const pml_batch_limits limits = {512, 8, 500, 128, 200};

static inline pml_train_config config_for(pml_method method, uint32_t targets)
{
    return (pml_train_config){.method = method,
                              .dtype = PML_F32,
                              .lora_rank = 8,
                              .lora_alpha = 16,
                              .lora_targets = targets,
                              .batch_size = 4,
                              .max_length = 128};
}

/* The CPU's program of a model, for these sizes and choices. */
static inline pml_program *built(const pml_model_spec *spec, const pml_train_config *config,
                                 const pml_batch_limits *of, pml_plan_choices choices)
{
    const pml_program_options options = {.spec = spec,
                                         .config = config,
                                         .limits = *of,
                                         .backend = pml_backend_cpu(),
                                         .choices = choices};
    pml_program *p;
    pml_error err = PML_ERROR_INIT;
    if (pml_program_build(&options, &p, &err) != PML_OK)
        fail_msg("%s", err.message);
    return p;
}

#endif
