/* What cards can do by their data sheets. */
#include <string.h>

#include "pml_op/gauges.h"

/* NVIDIA's data sheets and architecture papers: dense bf16 (T4 and V100: fp16) products with
 * float32 sums, in TFLOP/s at boost clocks. Sheets that give only the figure with sparsity have
 * twice that. Names as the driver calls the cards; a longer one stands before those that begin it.
 */
static const struct {
    const char *begins;
    double tera;
} cards[] = {
    {"NVIDIA B200", 2250},                 /* DGX B200 data sheet: 4.5 PF with sparsity */
    {"NVIDIA H200 NVL", 835.5},            /* H200 data sheet: 1,671 with sparsity */
    {"NVIDIA H200", 989.5},                /* the same: 1,979 */
    {"NVIDIA H100 NVL", 835.5},            /* H100 data sheet */
    {"NVIDIA H100 PCIe", 756},             /* H100 paper, table 2 */
    {"NVIDIA H100 80GB HBM3", 989.4},      /* the same: SXM5 */
    {"NVIDIA A100", 312},                  /* A100 data sheet, every form */
    {"NVIDIA A30", 165},                   /* A30 data sheet */
    {"NVIDIA A40", 149.7},                 /* A40 data sheet */
    {"NVIDIA A10G", 0},                    /* none: not an A10, and has no sheet */
    {"NVIDIA A10", 125},                   /* A10 data sheet */
    {"NVIDIA L40S", 362.05},               /* L40S data sheet */
    {"NVIDIA L40", 181.05},                /* L40 data sheet */
    {"NVIDIA L4", 121},                    /* L4 data sheet: 242 with sparsity */
    {"NVIDIA RTX 6000 Ada", 364.2},        /* Ada paper: 728.5 with sparsity */
    {"NVIDIA GeForce RTX 4090 Laptop", 0}, /* none */
    {"NVIDIA GeForce RTX 4090 D", 0},      /* none */
    {"NVIDIA GeForce RTX 4090", 165.2},    /* Ada paper, table 2: fp32 sums */
    {"NVIDIA GeForce RTX 3090 Ti", 80},    /* Ada paper, table 2 */
    {"NVIDIA GeForce RTX 3090", 71},       /* GA102 paper, table 2 */
    {"Tesla V100-SXM2", 125},              /* V100 data sheet */
    {"Tesla V100-PCIE", 112},              /* the same */
    {"Tesla T4", 65},                      /* T4 data sheet */
};

double pml_peak_flops(const char *name)
{
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++)
        if (strncmp(name, cards[i].begins, strlen(cards[i].begins)) == 0)
            return 1e12 * cards[i].tera;
    return 0;
}
