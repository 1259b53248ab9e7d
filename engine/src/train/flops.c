/* Operations of a micro-batch that the model asks for: its matrix products and attention, forward
 * and backward, of the tokens that are there. Neither padding nor what is made again is counted, so
 * that the figure says how well the device is used for the model (MFU, as in Chowdhery et al.,
 * "PaLM", 2022, appendix B; a frozen layer has no product for its own gradient, and none is
 * counted). Of products in 8 bits half is counted: devices that have them multiply those twice as
 * fast, and the peak that the figure is a share of is that of 16 bits. */
#include "stepper_impl.h"

static double elements(pml_view v)
{
    return (double)v.rows * (double)v.cols;
}

/* Two products forward, four backward; the scores that it makes again are not counted. */
static void add_attention(pmli_flops *f, pml_view q, int32_t window, double products)
{
    if (window > 0) {
        f->window = window;
        f->windowed_pair += 2 * products * (double)q.cols;
    } else {
        f->pair += 2 * products * (double)q.cols;
    }
}

void pmli_count_flops(const pml_program *p, void *arena, pmli_flops *f)
{
    const pml_counts counts = pml_program_capacity(p, PML_SEGMENT_MICRO);
    *f = (pmli_flops){0};
    for (int32_t n = p->segments[PML_SEGMENT_MICRO].first; n < p->segments[PML_SEGMENT_MICRO].end;
         n++) {
        pml_op_args args;
        if (p->nodes[n].again)
            continue;
        pml_program_bind(p, &p->nodes[n], arena, &counts, &args);
        const double tokens = counts.tokens;
        switch (p->nodes[n].op) {
        case PML_OP_linear:
        case PML_OP_linear_bwd: {
            const pml_cost cost = pml_node_cost(p->nodes[n].op, &args);
            f->token += (cost.flops - cost.narrow / 2) / tokens;
            break;
        }
        case PML_OP_swiglu:
        case PML_OP_swiglu_bwd:
            f->token += pml_beside_flops(p->nodes[n].op, &args) / tokens;
            break;
        case PML_OP_attention:
            add_attention(f, args.attention.q, args.attention.window, 2);
            break;
        case PML_OP_attention_bwd:
            add_attention(f, args.attention_bwd.q, args.attention_bwd.window, 4);
            break;
        case PML_OP_head_loss:
            f->label += 2 * elements(args.head_loss.w) *
                        (1 + (args.head_loss.dx.data != NULL) + (args.head_loss.dw.data != NULL));
            break;
        default:
            break;
        }
    }
}

double pmli_flops_of(const pmli_flops *f, const pml_batch *batch)
{
    double pairs = 0, windowed = 0;
    for (int32_t d = 0; d < batch->n_docs; d++) {
        double length = batch->cu_seqlens[d + 1] - batch->cu_seqlens[d];
        double seen = length < f->window ? length : f->window;
        pairs += length * length / 2;
        windowed += seen * length - seen * seen / 2;
    }
    return f->token * batch->n_tokens + f->label * batch->n_labels + f->pair * pairs +
           f->windowed_pair * windowed;
}
