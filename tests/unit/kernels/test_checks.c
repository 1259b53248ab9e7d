/* Every op refuses operands that do not fit, naming itself and the operand, and runs none of them:
 * each operand of each op is damaged in turn, in each way it can be. */
#include "kernels/fixture.h"

enum { T = 6, H = 8, V = 10, L = 3, N = 4 };

/* A call that works, one for each op. */
static pml_op_args valid(pml_op op)
{
    static int32_t index[T] = {0, 1, 2, 3, 4, 5}, cu[3] = {0, 2, T};
    pml_op_args a;
    memset(&a, 0, sizeof a);
    switch (op) {
    case PML_OP_embed:
        a.embed = (pml_embed_args){int_view(T, index), random_view(V, H, 1), random_view(T, H, 0)};
        break;
    case PML_OP_embed_bwd:
        a.embed_bwd = (pml_embed_bwd_args){
            int_view(T, index), random_view(T, H, 0), random_view(V, H, 1), {0}};
        break;
    case PML_OP_rmsnorm:
        a.rmsnorm = (pml_rmsnorm_args){random_view(T, H, 0),
                                       random_view(T, H, 0),
                                       random_view(1, H, 0),
                                       random_view(T, H, 0),
                                       random_view(T, H, 0),
                                       random_view(1, T, 0),
                                       1e-5F};
        break;
    case PML_OP_rmsnorm_bwd:
        a.rmsnorm_bwd = (pml_rmsnorm_bwd_args){.dy = random_view(T, H, 0),
                                               .x = random_view(T, H, 0),
                                               .weight = random_view(1, H, 0),
                                               .rstd = random_view(1, T, 0),
                                               .dres = random_view(T, H, 0),
                                               .dx = random_view(T, H, 0),
                                               .rounded = random_view(T, H, 0),
                                               .dweight = random_view(1, H, 0)};
        break;
    case PML_OP_head_norm:
        a.head_norm = (pml_head_norm_args){random_view(T, 3 * H, 0),
                                           random_view(1, H, 0),
                                           random_view(1, H, 0),
                                           random_view(T, 3 * H, 0),
                                           random_view(T, 3, 0),
                                           2,
                                           1,
                                           H,
                                           1e-5F};
        break;
    case PML_OP_head_norm_bwd:
        a.head_norm_bwd = (pml_head_norm_bwd_args){.dy = random_view(T, 3 * H, 0),
                                                   .x = random_view(T, 3 * H, 0),
                                                   .q_weight = random_view(1, H, 0),
                                                   .k_weight = random_view(1, H, 0),
                                                   .rstd = random_view(T, 3, 0),
                                                   .dx = random_view(T, 3 * H, 0),
                                                   .dq_weight = random_view(1, H, 0),
                                                   .dk_weight = random_view(1, H, 0),
                                                   .heads = 2,
                                                   .kv_heads = 1,
                                                   .head_dim = H};
        break;
    case PML_OP_linear:
        a.linear = (pml_linear_args){.x = random_view(T, H, 0),
                                     .w = random_view(N + 2, H, 0),
                                     .bias = random_view(1, N + 2, 0),
                                     .a = random_view(3, H, 0),
                                     .b = random_view(N, 3, 0),
                                     .rng = view_new(1, 2, 0, PML_I64),
                                     .places = view_new(1, T, 0, PML_I64),
                                     .y = random_view(T, N + 2, 0),
                                     .u = random_view(T, 3, 0),
                                     .parts = 2,
                                     .part_cols = {2, N},
                                     .lora_parts = 2,
                                     .rank = 3,
                                     .lora_scale = {1, 1},
                                     .lora_dropout = 0.5F};
        break;
    case PML_OP_linear_bwd:
        a.linear_bwd = (pml_linear_bwd_args){.dy = random_view(T, N + 2, 0),
                                             .x = random_view(T, H, 0),
                                             .w = random_view(N + 2, H, 0),
                                             .a = random_view(3, H, 0),
                                             .b = random_view(N, 3, 0),
                                             .u = random_view(T, 3, 0),
                                             .rng = view_new(1, 2, 0, PML_I64),
                                             .places = view_new(1, T, 0, PML_I64),
                                             .dx = random_view(T, H, 0),
                                             .dw = random_view(N + 2, H, 0),
                                             .dbias = random_view(1, N + 2, 0),
                                             .da = random_view(3, H, 0),
                                             .db = random_view(N, 3, 0),
                                             .v = random_view(T, 3, 0),
                                             .parts = 2,
                                             .part_cols = {2, N},
                                             .lora_parts = 2,
                                             .rank = 3,
                                             .lora_scale = {1, 1},
                                             .lora_dropout = 0.5F};
        break;
    case PML_OP_rope:
        a.rope = (pml_rope_args){
            random_view(T, 2 * H, 0), int_view(T, index), random_view(T, H, 0), 2, H, 0};
        break;
    case PML_OP_attention:
        a.attention = (pml_attention_args){.q = random_view(T, 2 * H, 0),
                                           .k = random_view(T, H, 0),
                                           .v = random_view(T, H, 0),
                                           .cu_q = int_view(3, cu),
                                           .cu_k = int_view(3, cu),
                                           .o = random_view(T, 2 * H, 0),
                                           .lse = random_view(2, T, 0),
                                           .heads = 2,
                                           .kv_heads = 1,
                                           .head_dim = H,
                                           .max_q = 4,
                                           .scale = 1};
        break;
    case PML_OP_attention_bwd:
        a.attention_bwd = (pml_attention_bwd_args){.dout = random_view(T, 2 * H, 0),
                                                   .q = random_view(T, 2 * H, 0),
                                                   .k = random_view(T, H, 0),
                                                   .v = random_view(T, H, 0),
                                                   .o = random_view(T, 2 * H, 0),
                                                   .lse = random_view(2, T, 0),
                                                   .cu_q = int_view(3, cu),
                                                   .cu_k = int_view(3, cu),
                                                   .pos = int_view(T, index),
                                                   .table = random_view(T, H, 0),
                                                   .dq = random_view(T, 2 * H, 0),
                                                   .dk = random_view(T, H, 0),
                                                   .dv = random_view(T, H, 0),
                                                   .heads = 2,
                                                   .kv_heads = 1,
                                                   .head_dim = H,
                                                   .max_q = 4,
                                                   .scale = 1};
        break;
    case PML_OP_nf4_quantise:
        a.nf4_quantise = (pml_nf4_quantise_args){random_view(T, H, 0),
                                                 view_new(1, T * H / 2, 0, PML_U8),
                                                 view_new(1, 1, 0, PML_U8),
                                                 random_view(1, 1, 0),
                                                 random_view(1, 1, 0),
                                                 {0},
                                                 PML_NF4_GRID};
        break;
    case PML_OP_fp8_quantise:
        a.fp8_quantise = (pml_fp8_quantise_args){
            random_view(T, H, 0), view_new(T, H, 0, PML_U8), random_view(1, T, 0), {0}};
        break;
    case PML_OP_fp8_turn:
        a.fp8_turn = (pml_fp8_turn_args){view_new(T, H, 0, PML_U8), view_new(H, T, 0, PML_U8)};
        break;
    case PML_OP_nf4_dequantise:
        a.nf4_dequantise = (pml_nf4_dequantise_args){view_new(1, T * H / 2, 0, PML_U8),
                                                     view_new(1, 2, 0, PML_U8),
                                                     random_view(1, 2, 0),
                                                     random_view(1, 2, 0),
                                                     random_view(T, H, 0),
                                                     2,
                                                     {2, T - 2, 0}};
        break;
    case PML_OP_swiglu:
        a.swiglu = (pml_swiglu_args){.gate_up = random_view(T, 2 * H, 0),
                                     .h = random_view(T, H, 0),
                                     .a = random_view(3, H, 0),
                                     .u = random_view(T, 3, 0),
                                     .lora_scale = 1};
        break;
    case PML_OP_swiglu_bwd:
        a.swiglu_bwd = (pml_swiglu_bwd_args){.dh = random_view(T, H, 0),
                                             .gate_up = random_view(T, 2 * H, 0),
                                             .dgate_up = random_view(T, 2 * H, 0),
                                             .h = random_view(T, H, 0),
                                             .u = random_view(T, 3, 0),
                                             .b = random_view(H, 3, 0),
                                             .v = random_view(T, 3, 0),
                                             .db = random_view(H, 3, 0),
                                             .v_down = random_view(T, 2, 0),
                                             .da = random_view(2, H, 0),
                                             .lora_parts = 2,
                                             .rank = 3,
                                             .lora_scale = {1, 1}};
        break;
    case PML_OP_head_loss:
        a.head_loss = (pml_head_loss_args){.x = random_view(T, H, 0),
                                           .w = random_view(V, H, 0),
                                           .rows = int_view(L, index),
                                           .labels = int_view(L, index),
                                           .scale = random_view(1, 1, 0),
                                           .loss = random_view(1, L, 0),
                                           .dx = random_view(T, H, 0),
                                           .dw = random_view(V, H, 0),
                                           .chunk = 2};
        break;
    case PML_OP_sum:
    case PML_OP_sumsq:
        a.sum = (pml_sum_args){random_view(T, H, 0), view_new(1, 1, 0, PML_F64), {0}};
        *(double *)a.sum.total.data = 0;
        break;
    case PML_OP_fill:
        a.fill = (pml_fill_args){random_view(T, H, 0), 1};
        break;
    case PML_OP_copy:
        a.copy = (pml_copy_args){random_view(T, H, 0), random_view(T, H, 0)};
        break;
    case PML_OP_gather_rows:
        a.gather_rows =
            (pml_gather_rows_args){random_view(T, H, 0), int_view(L, index), random_view(L, H, 0)};
        break;
    case PML_OP_scatter_rows:
        a.scatter_rows =
            (pml_scatter_rows_args){random_view(L, H, 0), int_view(L, index), random_view(T, H, 0)};
        break;
    case PML_OP_clip_scale:
        a.clip_scale = (pml_clip_scale_args){.sumsq = view_new(1, 1, 0, PML_F64),
                                             .hyper = random_view(2, PML_HYPER_COUNT, 0),
                                             .norm = random_view(1, 1, 0),
                                             .loss = view_new(1, 1, 0, PML_F64)};
        *(double *)a.clip_scale.sumsq.data = *(double *)a.clip_scale.loss.data = 1;
        break;
    case PML_OP_adamw:
        a.adamw = (pml_adamw_args){random_view(1, T, 0),
                                   random_view(1, T, 0),
                                   random_view(1, T, 0),
                                   random_view(1, T, 0),
                                   random_view(1, PML_HYPER_COUNT, 0),
                                   random_view(1, T, 0)};
        break;
    case PML_OP_adamw_8bit:
        a.adamw_8bit = (pml_adamw_8bit_args){random_view(1, T, 0),
                                             random_view(1, T, 0),
                                             view_new(1, T, 0, PML_U8),
                                             view_new(1, T, 0, PML_U8),
                                             random_view(1, 1, 0),
                                             random_view(1, 1, 0),
                                             random_view(1, PML_HYPER_COUNT, 0),
                                             random_view(1, T, 0)};
        break;
    case PML_OP_sgd:
        a.sgd = (pml_sgd_args){random_view(1, T, 0), random_view(1, T, 0),
                               random_view(1, T, 0), random_view(1, PML_HYPER_COUNT, 0),
                               random_view(1, T, 0), 1};
        break;
    case PML_OP_offload:
        a.offload = (pml_offload_args){random_view(T, H, 0), random_view(T, H, 0)};
        break;
    case PML_OP_fetch:
        a.fetch = (pml_fetch_args){random_view(T, H, 0), random_view(T, H, 0)};
        break;
    case PML_OP_await:
        a.await = (pml_await_args){random_view(T, H, 0)};
        break;
    case PML_OP_allreduce:
    case PML_OP_COUNT:
        break;
    }
    return a;
}

static void expect_refusal(pml_op op, const pml_op_args *args, const char *how, const char *operand)
{
    const char *name = pml_op_describe(op)->name;
    pml_error err = PML_ERROR_INIT;
    pml_op_args copy = *args;
    pml_status status = call_op(op, &copy, &err);
    if (status != PML_INVALID)
        fail_msg("%s with '%s' %s answers %s", name, operand, how, pml_status_name(status));
    if (strncmp(err.message, name, strlen(name)) != 0 || strchr(err.message, '\'') == NULL)
        fail_msg("%s with '%s' %s says only: %s", name, operand, how, err.message);
}

/* The message speaks of this very operand. */
static void expect_name(pml_op op, const pml_op_args *args, const char *how, const char *operand)
{
    expect_refusal(op, args, how, operand);
    char quoted[40];
    pml_error err = PML_ERROR_INIT;
    pml_op_args copy = *args;
    call_op(op, &copy, &err);
    snprintf(quoted, sizeof quoted, "'%s'", operand);
    if (strstr(err.message, quoted) == NULL)
        fail_msg("'%s' is %s, but the message is: %s", operand, how, err.message);
}

/* fill and copy take any dtype, so changing one is no mistake in itself. */
static bool any_dtype(pml_op op, const char *operand)
{
    return op == PML_OP_fill || op == PML_OP_await ||
           ((op == PML_OP_copy || op == PML_OP_gather_rows || op == PML_OP_scatter_rows ||
             op == PML_OP_adamw || op == PML_OP_adamw_8bit || op == PML_OP_sgd) &&
            (strcmp(operand, "x") == 0 || strcmp(operand, "y") == 0 ||
             strcmp(operand, "copy") == 0));
}

/* Operands whose rows or columns stand alone: any number of them is right. */
static bool free_rows(pml_op op, const char *operand)
{
    static const struct {
        pml_op op;
        const char *operand;
    } some[] = {{PML_OP_embed, "table"},    {PML_OP_embed_bwd, "dtable"},
                {PML_OP_rope, "table"},     {PML_OP_attention_bwd, "table"},
                {PML_OP_sum, "x"},          {PML_OP_sumsq, "x"},
                {PML_OP_fill, "y"},         {PML_OP_gather_rows, "x"},
                {PML_OP_scatter_rows, "y"}, {PML_OP_clip_scale, "hyper"},
                {PML_OP_await, "x"}};
    for (size_t i = 0; i < sizeof some / sizeof *some; i++)
        if (some[i].op == op && strcmp(some[i].operand, operand) == 0)
            return true;
    return false;
}

static bool free_cols(pml_op op, const char *operand)
{
    return (op == PML_OP_sum || op == PML_OP_sumsq || op == PML_OP_fill || op == PML_OP_await) &&
           strcmp(operand, "total") != 0;
}

static void damage_operand(pml_op op, pml_op_args *args, int i)
{
    const pml_op_info *info = pml_op_describe(op);
    const char *name = info->operands[i];
    pml_view *v = &pml_op_views(args)[i], good = *v;
    if (isupper(info->signature[i])) {
        *v = (pml_view){0};
        expect_name(op, args, "missing", name);
        *v = good;
    }
    if (!any_dtype(op, name)) {
        v->dtype = good.dtype == PML_U8 ? PML_I32 : PML_U8;
        expect_name(op, args, "of the wrong dtype", name);
    }
    v->dtype = (pml_dtype)99;
    expect_name(op, args, "of no dtype", name);
    *v = good;
    v->ld = v->cols - 1;
    expect_name(op, args, "with rows that overlap", name);
    *v = good;
    if (good.dtype != PML_U8) {
        v->data = (char *)v->data + 1;
        expect_name(op, args, "misaligned", name);
    }
    *v = good;
    v->rows = -1;
    expect_refusal(op, args, "with a negative number of rows", name);
    *v = good;
    if (good.dtype != PML_U8) { /* a row of bytes can be as long as an address can say */
        v->ld = INT64_MAX / 2;
        expect_refusal(op, args, "beyond all memory", name);
    }
    *v = good;
    if (!free_rows(op, name)) {
        v->rows++;
        expect_refusal(op, args, "with a row too many", name);
        *v = good;
    }
    if (!free_cols(op, name)) {
        v->cols--;
        expect_refusal(op, args, "with a column too few", name);
        *v = good;
    }
}

static void test_every_operand(void **state)
{
    (void)state;
    for (int op = 0; op < PML_OP_allreduce; op++) {
        const pml_op_info *info = pml_op_describe((pml_op)op);
        pml_op_args args = valid((pml_op)op), kept = args;
        run_op((pml_op)op, &args); /* it does work as it is */
        args = kept;
        void *ws = give_workspace((pml_op)op, &args);
        for (int i = 0; i < info->n_views; i++) {
            if (pml_op_views(&args)[i].data == NULL)
                continue;
            if (toupper(info->signature[i]) != 'W') {
                damage_operand((pml_op)op, &args, i);
                continue;
            }
            pml_view *v = &pml_op_views(&args)[i], good = *v;
            *v = (pml_view){0};
            expect_name((pml_op)op, &args, "missing", "ws");
            *v = good;
            v->cols--;
            v->ld--;
            expect_name((pml_op)op, &args, "a byte short", "ws");
            *v = good;
        }
        free(ws);
        free_views((pml_op)op, &kept);
    }
}

#define REFUSED(op, field, value)                                                                  \
    do {                                                                                           \
        pml_op_args args = valid(PML_OP_##op), kept = args;                                        \
        void *ws = give_workspace(PML_OP_##op, &args);                                             \
        args.op.field = (value);                                                                   \
        pml_error err = PML_ERROR_INIT;                                                            \
        assert_int_equal(call_op(PML_OP_##op, &args, &err), PML_INVALID);                          \
        assert_ptr_equal(strstr(err.message, #op), err.message);                                   \
        free(ws);                                                                                  \
        free_views(PML_OP_##op, &kept);                                                            \
    } while (0)

static void test_attributes(void **state)
{
    (void)state;
    REFUSED(rope, heads, 0);
    REFUSED(rope, heads, 3);
    REFUSED(rope, head_dim, 7);
    REFUSED(rope, head_dim, -2);
    REFUSED(head_norm, heads, 0);
    REFUSED(head_norm, kv_heads, 2);
    REFUSED(head_norm, head_dim, 4);
    REFUSED(head_norm_bwd, kv_heads, 0);
    REFUSED(head_norm_bwd, head_dim, -H);
    REFUSED(attention, heads, 0);
    REFUSED(attention, kv_heads, 0);
    REFUSED(attention, kv_heads, 3);
    REFUSED(attention, head_dim, 0);
    REFUSED(attention, head_dim, 100000);
    REFUSED(attention, window, -1);
    REFUSED(attention_bwd, kv_heads, -1);
    REFUSED(attention_bwd, head_dim, 4);
    REFUSED(linear, parts, 0);
    REFUSED(linear, parts, 4);
    REFUSED(linear, parts, 1);
    REFUSED(linear, part_cols[0], 3);
    REFUSED(linear, part_cols[0], -2);
    REFUSED(linear, lora_parts, 4);
    REFUSED(linear, lora_parts, 1);
    REFUSED(linear, lora_parts, 0); /* a and b are there */
    REFUSED(linear, rank, 0);
    REFUSED(linear, rank, 2);
    REFUSED(linear, lora_dropout, 1.0F);
    REFUSED(linear, lora_dropout, -0.1F);
    REFUSED(linear_bwd, parts, -1);
    REFUSED(linear_bwd, rank, 4);
    REFUSED(linear_bwd, lora_parts, 0);
    REFUSED(linear_bwd, lora_dropout, NAN);
    REFUSED(head_loss, chunk, 0);
    REFUSED(nf4_quantise, grid, -1);
    REFUSED(nf4_quantise, x.ld, H + 1);
    REFUSED(nf4_dequantise, parts, 4);
    REFUSED(nf4_dequantise, part_rows[1], T - 1);
    REFUSED(nf4_dequantise, part_rows[0], 0);
    REFUSED(clip_scale, hyper.rows, 0);
}

/* A gradient that needs an operand says so when it is not there. */
static void test_operands_that_need_others(void **state)
{
    (void)state;
    REFUSED(linear_bwd, w.data, NULL);   /* dx */
    REFUSED(linear_bwd, x.data, NULL);   /* dw, da */
    REFUSED(linear_bwd, u.data, NULL);   /* db */
    REFUSED(linear_bwd, a.data, NULL);   /* lora_parts */
    REFUSED(linear_bwd, rng.data, NULL); /* dropout */
    REFUSED(linear_bwd, places.data, NULL);
    REFUSED(linear, places.data, NULL);
    REFUSED(sgd, m.data, NULL); /* nesterov */
    REFUSED(linear, b.data, NULL);
    REFUSED(linear, rng.data, NULL);
    REFUSED(rmsnorm, sum.data, NULL);
    REFUSED(attention_bwd, pos.data, NULL);
    REFUSED(attention_bwd, table.data, NULL);
}

/* Positions are of rows that are both queries and keys, in heads of two halves; without them the
 * same operands are right. */
static void test_positions_of_attention(void **state)
{
    (void)state;
    for (int odd = 0; odd < 2; odd++) {
        pml_op_args args = valid(PML_OP_attention_bwd), kept = args;
        pml_attention_bwd_args *a = &args.attention_bwd;
        int64_t keys = odd ? T : T - 1;
        int32_t dim = odd ? H - 1 : H;
        a->head_dim = dim;
        a->table.cols = dim;
        pml_view *queries[] = {&a->dout, &a->q, &a->o, &a->dq};
        for (int i = 0; i < 4; i++)
            queries[i]->cols = 2 * dim;
        pml_view *all[] = {&a->k, &a->v, &a->dk, &a->dv};
        for (int i = 0; i < 4; i++) {
            all[i]->rows = keys;
            all[i]->cols = dim;
        }
        ((int32_t *)a->cu_k.data)[2] = (int32_t)keys;
        expect_name(PML_OP_attention_bwd, &args, odd ? "in odd heads" : "for fewer keys", "pos");
        a->pos = a->table = (pml_view){0};
        pml_error err = PML_ERROR_INIT;
        assert_int_equal(call_op(PML_OP_attention_bwd, &args, &err), PML_OK);
        free_views(PML_OP_attention_bwd, &kept);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_operand),
        cmocka_unit_test(test_attributes),
        cmocka_unit_test(test_operands_that_need_others),
        cmocka_unit_test(test_positions_of_attention),
    };
    return run_on_devices(tests);
}
