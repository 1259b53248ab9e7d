#include "step_frozen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/base/clock.h"
#include "pml/train/profile.h"
#include "stepper_impl.h"

/* WARM: op by op, recorded, and once replayed. */
enum { STEPS = 5, WARM = 3, PAIRS_MOST = 50, MOST_ROWS = 1 << 14, LABELS_MOST = 256 };

#define COUNT(list) ((int)(sizeof(list) / sizeof *(list)))

static void drop(pml_node *node, const int *operands, int count)
{
    for (int i = 0; i < count; i++)
        node->operands[operands[i]].tensor = -1;
}

/* The node as it would stand in a model without adapters. */
static void take_out(pml_node *node)
{
    static const int of_linear[] = {PML_OPERAND(linear, a), PML_OPERAND(linear, b),
                                    PML_OPERAND(linear, rng), PML_OPERAND(linear, places),
                                    PML_OPERAND(linear, u)};
    static const int of_backward[] = {PML_OPERAND(linear_bwd, a),      PML_OPERAND(linear_bwd, b),
                                      PML_OPERAND(linear_bwd, u),      PML_OPERAND(linear_bwd, rng),
                                      PML_OPERAND(linear_bwd, places), PML_OPERAND(linear_bwd, da),
                                      PML_OPERAND(linear_bwd, db),     PML_OPERAND(linear_bwd, v)};
    static const int x_of_backward[] = {PML_OPERAND(linear_bwd, x)};
    static const int of_swiglu[] = {PML_OPERAND(swiglu, a), PML_OPERAND(swiglu, u)};
    static const int of_swiglu_bwd[] = {
        PML_OPERAND(swiglu_bwd, u),  PML_OPERAND(swiglu_bwd, b),      PML_OPERAND(swiglu_bwd, v),
        PML_OPERAND(swiglu_bwd, db), PML_OPERAND(swiglu_bwd, v_down), PML_OPERAND(swiglu_bwd, da)};
    static const int h_of_swiglu_bwd[] = {PML_OPERAND(swiglu_bwd, h)};
    bool trains = false;
    switch (node->op) {
    case PML_OP_linear:
        drop(node, of_linear, COUNT(of_linear));
        node->args.linear.lora_parts = 0;
        node->args.linear.border = node->args.linear.u_made = 0;
        node->args.linear.lora_dropout = 0;
        return;
    case PML_OP_linear_bwd:
        trains = node->operands[PML_OPERAND(linear_bwd, dw)].tensor >= 0; /* dw reads x */
        drop(node, of_backward, COUNT(of_backward));
        drop(node, x_of_backward, trains ? 0 : 1);
        node->args.linear_bwd.lora_parts = node->args.linear_bwd.kept = 0;
        node->args.linear_bwd.border = 0;
        node->args.linear_bwd.lora_dropout = 0;
        return;
    case PML_OP_swiglu:
        drop(node, of_swiglu, COUNT(of_swiglu));
        return;
    case PML_OP_swiglu_bwd:
        drop(node, of_swiglu_bwd, COUNT(of_swiglu_bwd));
        drop(node, h_of_swiglu_bwd, 1); /* dw of down is trained or its adapter, never both */
        node->args.swiglu_bwd.lora_parts = 0;
        return;
    default:
        return;
    }
}

/* One part of the comparison: these nodes are the program's from now on. */
static double part(pml_stepper *s, const pml_node *nodes, void (*step)(void *user), void *user)
{
    memcpy(s->program->nodes, nodes, (size_t)s->program->n_nodes * sizeof *nodes);
    pmli_drop_recorded(s);
    for (int i = 0; i < WARM; i++)
        step(user);
    double begin = pml_clock_monotonic();
    for (int i = 0; i < STEPS; i++)
        step(user);
    return (pml_clock_monotonic() - begin) / STEPS;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, by_value);
    return count % 2 == 1 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

/* What ops of one label took. */
typedef struct line {
    const char *label;
    double with, without;
} line;

static int by_difference(const void *a, const void *b)
{
    double x = ((const line *)a)->with - ((const line *)a)->without;
    double y = ((const line *)b)->with - ((const line *)b)->without;
    return (x < y) - (x > y);
}

/* Its line; the last one takes what there is no line for. */
static line *line_of(line *lines, int *n, const char *label)
{
    int i = 0;
    while (i < *n && i < LABELS_MOST - 1 && strcmp(lines[i].label, label) != 0)
        i++;
    if (i == *n)
        lines[(*n)++].label = label;
    return &lines[i];
}

/* One step of the program as it stands, op by op, into its lines; seconds of all linear layers. */
static pml_status time_ops(pml_stepper *s, const pml_batch *batch, line *lines, int *n_lines,
                           bool with, double *linears, pml_error *err)
{
    static pml_profile_row rows[MOST_ROWS];
    int n = 0;
    pml_status status = pml_stepper_profile(s, batch, rows, MOST_ROWS, &n, err);
    if (status == PML_OK) /* the second is warm */
        status = pml_stepper_profile(s, batch, rows, MOST_ROWS, &n, err);
    *linears = 0;
    for (int i = 0; status == PML_OK && i < n; i++) {
        line *l = line_of(lines, n_lines, rows[i].label);
        *(with ? &l->with : &l->without) += rows[i].seconds;
        *linears +=
            rows[i].op == PML_OP_linear || rows[i].op == PML_OP_linear_bwd ? rows[i].seconds : 0;
    }
    return status;
}

/* Where they cost: what differs most, op by op between events. */
static void print_lines(line *lines, int n)
{
    qsort(lines, (size_t)n, sizeof *lines, by_difference);
    printf("%-28s %10s %10s %10s\n", "op by op", "with, ms", "without", "more");
    for (int i = 0; i < n; i++)
        if (lines[i].with - lines[i].without > 1e-5 || lines[i].without - lines[i].with > 1e-5)
            printf("%-28s %10.3f %10.3f %10.3f\n", lines[i].label, lines[i].with * 1e3,
                   lines[i].without * 1e3, (lines[i].with - lines[i].without) * 1e3);
}

pml_status step_frozen_compare(pml_stepper *s, int pairs, const pml_batch *batch,
                               void (*step)(void *user), void *user, pml_error *err)
{
    static line lines[LABELS_MOST];
    int n_lines = 0;
    double whole[PAIRS_MOST + 1], frozen[PAIRS_MOST], extra[PAIRS_MOST], linears = 0, adapted = 0;
    size_t bytes = (size_t)s->program->n_nodes * sizeof(pml_node);
    if (pairs < 1 || pairs > PAIRS_MOST)
        return PML_FAIL(err, PML_INVALID, "%d pairs: 1 to %d", pairs, PAIRS_MOST);
    pml_node *with = malloc(bytes), *without = malloc(bytes);
    pml_status status = PML_OK;
    if (with == NULL || without == NULL) {
        status = PML_FAIL(err, PML_NO_MEMORY, "no memory for two programs");
        goto cleanup;
    }
    memcpy(with, s->program->nodes, bytes);
    memcpy(without, s->program->nodes, bytes);
    for (int32_t i = 0; i < s->program->n_nodes; i++)
        take_out(&without[i]);
    whole[0] = part(s, with, step, user);
    status = time_ops(s, batch, lines, &n_lines, true, &adapted, err);
    if (status != PML_OK)
        goto cleanup;
    for (int i = 0; i < pairs; i++) {
        frozen[i] = part(s, without, step, user);
        if (i == 0)
            status = time_ops(s, batch, lines, &n_lines, false, &linears, err);
        if (status != PML_OK)
            goto cleanup;
        whole[i + 1] = part(s, with, step, user);
        extra[i] = (whole[i] + whole[i + 1]) / 2 - frozen[i];
    }
    double alone = median(frozen, pairs), more = median(extra, pairs);
    print_lines(lines, n_lines);
    printf("adapters: %.3f ms a step with, %.3f without, %d pairs of %d steps: %.3f ms (%.3f to "
           "%.3f), %.2f %% of the step without, %.2f %% of its linear layers' %.3f ms\n",
           median(whole, pairs + 1) * 1e3, alone * 1e3, pairs, STEPS, more * 1e3, extra[0] * 1e3,
           extra[pairs - 1] * 1e3, 100 * more / alone, 100 * more / linears, linears * 1e3);
cleanup:
    if (with != NULL)
        memcpy(s->program->nodes, with, bytes);
    pmli_drop_recorded(s);
    free(without);
    free(with);
    return status;
}
