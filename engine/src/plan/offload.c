/* What a layer keeps for its backward, waiting in host memory while other layers run.
 *
 * A pass over the finished nodes of a micro-batch: it finds the tensors that a forward writes and
 * the backward of an offloaded layer reads, sends each to the host as soon as it is whole, and
 * gives the backward another tensor, that is fetched before. So it knows no layer's inside, and
 * whatever a level of recompute keeps is what is sent.
 *
 *   forward    layer 3 ──offload──► layer 4, 5 …                      await │ layer 6, offload …
 *   backward   … layer 5: fetch 3 ──► layer 4 …              await │ layer 3
 *
 * The memory that is sent from is given away at the await before the next layer's sending: one
 * layer is on its way at a time. What comes back is asked for two layers ahead, one where the layer
 * above is offloaded too: one layer in use, one on its way. */
#include <stdlib.h>
#include <string.h>

#include "build.h"

int32_t pml_offload_span(const pml_plan_choices *c, int32_t layers)
{
    return c->recompute_layers > 0 && c->recompute_layers < layers ? c->recompute_layers
                                                                   : layers - 1;
}

/* Evenly: the link has as long for each. */
bool pmli_is_offloaded(const pml_plan_choices *c, int32_t layer, int32_t layers)
{
    int64_t span = pml_offload_span(c, layers), n = c->offload_layers;
    return layer < span && (layer + 1) * n / span > layer * n / span;
}

int32_t pmli_level_of(const pml_plan_choices *c, int32_t layer, int32_t layers)
{
    if (pmli_is_offloaded(c, layer, layers))
        return c->offload;
    return layer < c->recompute_layers || c->recompute == 0 ? c->recompute : c->recompute - 1;
}

typedef struct moved {
    int32_t tensor, layer;
    int32_t whole;      /* the forward's node that writes it last */
    int32_t read;       /* the backward's first node that reads it */
    int32_t host, back; /* where it waits, and the tensor that it comes back to */
} moved;

enum { NOBODY = -2, SEVERAL = -3 }; /* layers that read a tensor; -1 is outside of all layers */

typedef struct pass {
    pmli_builder *b;
    int32_t first, middle, end;
    pml_node *nodes; /* as they were */
    moved *moved;    /* in order of their last write */
    int32_t n_moved;
    int32_t *back; /* of each tensor what the backward reads in its place, -1: itself */
} pass;

static bool writes(const pml_node *node, int operand)
{
    char kind = pml_op_describe(node->op)->signature[operand] | 0x20; /* lower case */
    return kind == 'o' || kind == 'u';
}

static int by_whole(const void *left, const void *right)
{
    const moved *a = left, *b = right;
    if (a->whole != b->whole)
        return a->whole < b->whole ? -1 : 1;
    return a->tensor < b->tensor ? -1 : a->tensor > b->tensor;
}

/* Fills in who writes and reads what, and keeps what is to be moved. */
static void find(pass *s)
{
    const pml_program *p = s->b->program;
    const int32_t layers = p->spec.layers;
    for (int32_t t = 0; t < p->n_tensors; t++)
        s->moved[t] = (moved){.tensor = t, .layer = NOBODY, .whole = -1, .read = -1};
    for (int32_t n = s->first; n < s->end; n++) {
        const pml_node *node = &s->nodes[n];
        for (int v = 0; v < pml_op_describe(node->op)->n_views; v++) {
            int32_t t = node->operands[v].tensor;
            if (t < 0 || p->tensors[t].persistent)
                continue;
            moved *m = &s->moved[t];
            if (n < s->middle) {
                m->whole = writes(node, v) ? n : m->whole;
                continue;
            }
            m->read = m->read < 0 ? n : m->read;
            m->layer = m->layer == NOBODY || m->layer == node->layer ? node->layer : SEVERAL;
        }
    }
    for (int32_t t = 0; t < p->n_tensors; t++) {
        const moved *m = &s->moved[t];
        if (m->whole >= 0 && m->layer >= 0 && pmli_is_offloaded(&p->choices, m->layer, layers))
            s->moved[s->n_moved++] = *m;
    }
    qsort(s->moved, (size_t)s->n_moved, sizeof *s->moved, by_whole);
}

/* Where each waits, and what it comes back to: the same shape, and the border that an op wants. */
static void make_tensors(pass *s)
{
    memset(s->back, -1, (size_t)s->b->program->n_tensors * sizeof *s->back);
    for (int32_t i = 0; i < s->n_moved; i++) {
        moved *m = &s->moved[i];
        const pml_tensor t = s->b->program->tensors[m->tensor];
        const pmli_shape shape = {t.dtype, t.row_extent, t.rows, t.col_extent, t.cols};
        m->host = pmli_persistent(s->b, shape, PML_CAUSE_ACTIVATIONS, "%s, on the host", t.name);
        m->back = pmli_transient(s->b, shape, PML_CAUSE_ACTIVATIONS, "%s, back", t.name);
        if (s->b->status != PML_OK)
            return;
        s->back[m->tensor] = m->back;
        s->b->program->tensors[m->host].host = true;
        pmli_border(s->b, m->back, t.border, t.below);
    }
}

static void append(pass *s, const pml_node *node)
{
    pml_node *end = pmli_node(s->b, node->op, node->layer, node->label);
    if (end != NULL)
        *end = *node;
}

static void carry(pass *s, const moved *m, pml_op op, int32_t from, int32_t to)
{
    pml_node *node = pmli_node(s->b, op, m->layer, op == PML_OP_offload ? "offload" : "fetch");
    pmli_operand(node, 0, from);
    pmli_operand(node, 1, to);
    pmli_node_done(s->b, node);
}

static void await(pass *s, const moved *m, const char *label, int32_t tensor)
{
    pml_node *node = pmli_node(s->b, PML_OP_await, m->layer, label);
    pmli_operand(node, 0, tensor);
    pmli_node_done(s->b, node);
}

/* All of one layer have been sent, and their memory is free. */
static void await_sent(pass *s, int32_t layer)
{
    for (int32_t i = 0; i < s->n_moved; i++)
        if (s->moved[i].layer == layer)
            await(s, &s->moved[i], "offload awaited", s->moved[i].tensor);
}

static void forward(pass *s)
{
    int32_t on_its_way = NOBODY, next = 0;
    for (int32_t n = s->first; n < s->middle; n++) {
        append(s, &s->nodes[n]);
        for (; next < s->n_moved && s->moved[next].whole == n; next++) {
            const moved *m = &s->moved[next];
            if (m->layer != on_its_way)
                await_sent(s, on_its_way);
            on_its_way = m->layer;
            carry(s, m, PML_OP_offload, m->tensor, m->host);
        }
    }
    await_sent(s, on_its_way);
}

/* Before which layer's backward a layer's tensors are asked for. */
static int32_t asked_at(const pass *s, int32_t layer)
{
    const pml_program *p = s->b->program;
    int32_t layers = p->spec.layers;
    bool near = layer + 2 >= layers || pmli_is_offloaded(&p->choices, layer + 1, layers);
    return layer + (near ? 1 : 2);
}

static int by_read(const void *left, const void *right)
{
    const moved *a = left, *b = right;
    if (a->layer != b->layer)
        return a->layer > b->layer ? -1 : 1;
    if (a->read != b->read)
        return a->read < b->read ? -1 : 1;
    return a->tensor < b->tensor ? -1 : a->tensor > b->tensor;
}

/* The backward comes to a layer: its own are there, the next are asked for. */
static void enter(pass *s, int32_t layer)
{
    for (int32_t i = 0; i < s->n_moved; i++)
        if (s->moved[i].layer == layer)
            await(s, &s->moved[i], "fetch awaited", s->moved[i].back);
    for (int32_t i = 0; i < s->n_moved; i++)
        if (s->moved[i].layer < layer && asked_at(s, s->moved[i].layer) == layer)
            carry(s, &s->moved[i], PML_OP_fetch, s->moved[i].host, s->moved[i].back);
}

static void backward(pass *s)
{
    int32_t layer = -1;
    qsort(s->moved, (size_t)s->n_moved, sizeof *s->moved, by_read);
    for (int32_t n = s->middle; n < s->end; n++) {
        pml_node *node = &s->nodes[n];
        if (node->layer >= 0 && node->layer != layer)
            enter(s, node->layer);
        layer = node->layer >= 0 ? node->layer : layer;
        for (int v = 0; v < PML_OP_MAX_VIEWS; v++) {
            pml_operand *o = &node->operands[v];
            if (o->tensor >= 0 && s->back[o->tensor] >= 0)
                o->tensor = s->back[o->tensor];
        }
        append(s, node);
    }
}

void pmli_offload(pmli_builder *b, int32_t first, int32_t middle)
{
    pml_program *p = b->program;
    if (b->status != PML_OK || p->choices.offload_layers == 0)
        return;
    pass s = {.b = b, .first = first, .middle = middle, .end = p->n_nodes};
    const size_t bytes = (size_t)p->n_nodes * sizeof *s.nodes;
    s.nodes = malloc(bytes);
    s.moved = calloc((size_t)p->n_tensors, sizeof *s.moved);
    s.back = calloc((size_t)p->n_tensors, sizeof *s.back);
    if (s.nodes == NULL || s.moved == NULL || s.back == NULL) {
        b->status = PML_FAIL(b->err, PML_NO_MEMORY, "no host memory for the step program");
        goto cleanup;
    }
    memcpy(s.nodes, p->nodes, bytes);
    find(&s);
    make_tensors(&s);
    p->n_nodes = first;
    forward(&s);
    backward(&s);
cleanup:
    free(s.nodes);
    free(s.moved);
    free(s.back);
}
