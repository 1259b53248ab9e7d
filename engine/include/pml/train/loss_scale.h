/* Loss scale: what the gradient of the loss is multiplied by, so that float16 holds it.
 *
 *   2^-24 ······· 2^-14 ═══════════════ 2^16        float16: subnormal ···, full precision ═══
 *                   gradients of the sum of losses, times the scale
 *
 * A power of two, which changes no digit: with float32 in place of float16 the same weights come
 * out, bit for bit. It is undone in float32, where the mean over tokens is taken (PML_HYPER_MEAN).
 *
 * It is found before the first update by trying (pml_loss_scale_try): the largest that the first
 * micro-batch bears, less some head-room. From then on the rule is that of torch.amp.GradScaler
 * (Micikevicius et al., "Mixed Precision Training", 2018): half of it after a gradient that is not
 * finite, whose update is left out, and twice it after so many finite ones in a row. The same on
 * every worker, because the norm that it follows is. Plain data: nothing to release. */
#ifndef PML_TRAIN_LOSS_SCALE_H
#define PML_TRAIN_LOSS_SCALE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct pml_loss_scale {
    double value;    /* in force; 0: to be found */
    int32_t finite;  /* updates in a row since it last changed */
    int32_t dynamic; /* 0: it stays at 1, and cannot be why a gradient is not finite */
} pml_loss_scale;

enum {
    PML_LOSS_SCALE_LEAST = -8, /* 2^-8: below, more is lost to underflow than a scale can save */
    PML_LOSS_SCALE_MOST = 15,  /* 2^15: at 2^16 the gradient of a logit overflows by itself */
    PML_LOSS_SCALE_HEADROOM =
        2, /* doublings between what the first micro-batch bears and the start */
    PML_LOSS_SCALE_INTERVAL = 2000 /* finite updates after which it is doubled, as in torch */
};

/* The search: exponents in (low, high) are open, low is known to do (or nothing lower is tried),
 * high not to. */
typedef struct pml_loss_scale_search {
    int low, high;
} pml_loss_scale_search;

/* All that there may be. */
pml_loss_scale_search pml_loss_scale_search_begin(void);
/* The scale to try next; 0: the search is over. */
double pml_loss_scale_try(const pml_loss_scale_search *search);
/* Whether gradients were finite with it. */
void pml_loss_scale_tried(pml_loss_scale_search *search, bool finite);
/* What training starts with. */
double pml_loss_scale_found(const pml_loss_scale_search *search);

/* After an update, or one that was left out. True: the gradient was too large for the scale, which
 * is smaller now; false: all is well, or no smaller scale can help. */
bool pml_loss_scale_next(pml_loss_scale *scale, bool finite);

#endif
