#include "pml/train/loss_scale.h"

#include <math.h>

pml_loss_scale_search pml_loss_scale_search_begin(void)
{
    return (pml_loss_scale_search){PML_LOSS_SCALE_LEAST, PML_LOSS_SCALE_MOST + 1};
}

static int middle(const pml_loss_scale_search *search)
{
    return search->low + (search->high - search->low) / 2;
}

double pml_loss_scale_try(const pml_loss_scale_search *search)
{
    return search->high - search->low > 1 ? ldexp(1, middle(search)) : 0;
}

void pml_loss_scale_tried(pml_loss_scale_search *search, bool finite)
{
    *(finite ? &search->low : &search->high) = middle(search);
}

double pml_loss_scale_found(const pml_loss_scale_search *search)
{
    int start = search->low - PML_LOSS_SCALE_HEADROOM;
    return ldexp(1, start > PML_LOSS_SCALE_LEAST ? start : PML_LOSS_SCALE_LEAST);
}

bool pml_loss_scale_next(pml_loss_scale *scale, bool finite)
{
    if (!scale->dynamic)
        return false;
    if (!finite) {
        scale->finite = 0;
        if (scale->value <= ldexp(1, PML_LOSS_SCALE_LEAST))
            return false;
        scale->value /= 2;
        return true;
    }
    if (++scale->finite >= PML_LOSS_SCALE_INTERVAL) {
        scale->finite = 0;
        if (scale->value < ldexp(1, PML_LOSS_SCALE_MOST))
            scale->value *= 2;
    }
    return false;
}
