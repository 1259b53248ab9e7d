/* The CUDA backend's ops against the CPU reference, from one arena, eager and as a recorded graph.
 *
 *   arena:  | workspace, shared | case 0: x | w | y … | case 1: … |      one backend->alloc
 *
 * The whole arena starts as NaN; inputs are drawn into it. All ops run, the arena comes back and
 *   - every result is held against the reference on the same inputs in float32;
 *   - every byte that no op may write (inputs, borders, gaps) must be as it was;
 *   - the same ops replayed from a graph must leave the same bits, twice.
 *
 * Deterministic kernels, unless the program is called with --fast: then sums may come in any order,
 * and a replay need not leave the same bits.
 *
 *   --only TEXT   the cases that have this in their names
 *   --without TEXT  not those; up to eight times
 *   --part I/N    of these the I-th, the I+N-th…, for programs side by side; I counts from 0
 *   --threads N   the reference's; else one for each core that this program may use
 *   --eager       ops one by one only, no graphs
 *   --sparse      as --eager, and only inputs are in the arena: what else an op reads was never
 * written, which compute-sanitizer's initcheck tells (tests/gpu/sanitize)
 *   --starve      with --sparse: the first case lacks its first input, and initcheck must tell
 *
 * Prints a line a case and "N passed, N failed, N skipped": what a GPU has no numbers for, by name;
 * exit status 77 and "skipped" without a GPU. */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"

enum { SKIPPED = 77 };

enum { ROWS = 8192, FEW_ROWS = 64 }; /* of what is copied to the host and back */

#define CODE_WIDTH 0.05 /* between neighbours in 8 bits, of what they mean */

static bool report(session *s, bool good, const char *name, const char *words)
{
    printf("%s  %-58s %s\n", good ? "ok  " : "FAIL", name, words);
    good ? s->passed++ : s->failed++;
    return good;
}

static void run_all(session *s)
{
    for (int n = 0; n < s->cases.count; n++) {
        pml_error err = PML_ERROR_INIT;
        gpu_case *c = &s->cases.at[n];
        if (pml_op_run(s->gpu, c->op, s->queue, &c->args, &err) != PML_OK)
            session_stop(c->name, &err);
    }
}

static void come_back(session *s, unsigned char *image)
{
    MUST(s->gpu->download(s->queue, image, s->arena, s->size, err));
    MUST(s->gpu->sync(s->queue, err));
}

/* Every operand that an op reads, or every one that it writes, into the arena from an image of it
 * on the device or back: by our own kernel, which compute-sanitizer sees, and not in 400,000 copies
 * of a row. */
static void move_operands(session *s, const char *letters, unsigned char *image, bool in)
{
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case *c = &s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        for (int i = 0; i < info->n_views; i++) {
            pml_view v = pml_op_views(&c->args)[i], there = in_image(s, v, image);
            pml_op_args args = {.copy = {in ? there : v, in ? v : there}};
            bool starved = s->starve && in && n == 0 && i == 0;
            if (v.data != NULL && !starved && strchr(letters, toupper(info->signature[i])) != NULL)
                MUST(pml_op_run(s->gpu, PML_OP_copy, s->queue, &args, err));
        }
    }
}

/* Which operand an address of initcheck's belongs to. */
static void print_places(const session *s)
{
    printf("%p  workspace, %zu bytes\n", (void *)s->arena, s->cases.workspace);
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case c = s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c.op);
        for (int i = 0; i < info->n_views; i++) {
            const pml_view *v = &pml_op_views(&c.args)[i];
            if (v->data != NULL)
                printf("%p  %s of %s %s: [%lld,%lld], ld %lld\n", v->data, info->operands[i],
                       info->name, c.name, (long long)v->rows, (long long)v->cols,
                       (long long)v->ld);
        }
    }
}

static void run_sparse(session *s)
{
    void *image = NULL;
    print_places(s);
    MUST(s->gpu->alloc(s->device, s->size, &image, err));
    MUST(s->gpu->upload(s->queue, image, s->start, s->size, err));
    move_operands(s, "IU", image, true);
    run_all(s);
    move_operands(s, "OU", image, false);
    MUST(s->gpu->download(s->queue, s->eager, image, s->size, err));
    MUST(s->gpu->sync(s->queue, err));
    s->gpu->free(s->device, &image, s->size);
}

static void run_eager(session *s)
{
    MUST(s->gpu->upload(s->queue, s->arena, s->start, s->size, err));
    run_all(s);
    come_back(s, s->eager);
}

static void run_recorded(session *s)
{
    pml_graph *graph = NULL;
    size_t bytes = 0;

    MUST(s->gpu->graph_begin(s->queue, err));
    run_all(s);
    MUST(s->gpu->graph_end(s->queue, SIZE_MAX, &graph, &bytes, err));
    for (int times = 1; times <= 2; times++) {
        char words[80];
        MUST(s->gpu->upload(s->queue, s->arena, s->start, s->size, err));
        MUST(s->gpu->graph_launch(s->queue, graph, err));
        come_back(s, s->replay);
        size_t ws = s->cases.workspace;
        bool same = s->fast || memcmp(s->eager + ws, s->replay + ws, s->size - ws) == 0;
        snprintf(words, sizeof words, "%d ops in one graph (%.1f MiB), replay %d", s->cases.count,
                 (double)bytes / 0x1p20, times);
        report(s, same, "replay leaves the bits of eager ops", words);
    }
    s->gpu->graph_destroy(&graph);
}

/* Row `row` of v from column `first` on as it was before the op. */
static void put_back(session *s, pml_view v, int64_t row, int64_t first)
{
    size_t size = pml_dtype_size(v.dtype), at = (size_t)(row * v.ld + first) * size;
    memcpy((char *)in_image(s, v, s->replay).data + at, (char *)in_image(s, v, s->start).data + at,
           (size_t)(v.cols - first) * size);
}

/* Only what an op may write has changed: everything else is put back, then nothing may differ. */
static void expect_rest_untouched(session *s)
{
    memcpy(s->replay, s->eager, s->size);
    for (int n = 0; n < s->cases.count; n++) {
        gpu_case *c = &s->cases.at[n];
        const pml_op_info *info = pml_op_describe(c->op);
        for (int i = 0; i < info->n_views; i++) {
            pml_view v = pml_op_views(&c->args)[i], reach = cases_reach(c, i);
            char letter = (char)toupper(info->signature[i]);
            if (v.data == NULL || letter == 'W')
                continue;
            for (int64_t row = 0; row < reach.rows; row++)
                put_back(s, reach, row, letter == 'I' && !c->levelled && row < v.rows ? v.cols : 0);
        }
    }
    size_t ws = s->cases.workspace;
    report(s, memcmp(s->start + ws, s->replay + ws, s->size - ws) == 0,
           "nothing outside the outputs is written", "inputs, borders, gaps");
}

/* |got - want| / |want|, and where all that is wanted is zero the root mean square of what came in
 * the case's unit. NaN when either holds one. Both F32 without borders. */
static double distance(pml_view got, pml_view want, double unit)
{
    double difference = 0, reference = 0;
    const float *g = got.data, *w = want.data;
    for (int64_t i = 0; i < want.rows * want.cols; i++) {
        difference += ((double)g[i] - w[i]) * ((double)g[i] - w[i]);
        reference += (double)w[i] * w[i];
    }
    if (reference == 0)
        reference = unit * unit * (double)(want.rows * want.cols);
    return difference == 0 ? 0 : sqrt(difference / reference);
}

/* Bits in the operand's own dtype; rows are compared apart, borders are somebody else's. */
static bool same_bits(const session *s, pml_view got, pml_view want)
{
    size_t size = pml_dtype_size(got.dtype), row = (size_t)got.cols * size;
    pml_view rounded =
        pml_matrix(must_alloc(row * (size_t)got.rows), got.rows, got.cols, got.dtype);
    bool same = true;
    cpu_copy(s, want, rounded);
    for (size_t r = 0; r < (size_t)got.rows; r++)
        same = same && memcmp((char *)got.data + r * (size_t)got.ld * size,
                              (char *)rounded.data + r * row, row) == 0;
    free(rounded.data);
    return same;
}

static bool judge_output(const session *s, const gpu_case *c, int operand, pml_view got,
                         pml_view want, double *worst)
{
    double most = c->of_f32 > 0 && got.dtype == PML_F32 ? c->of_f32 : c->tolerance;
    if (most == 0 || operand == c->exact)
        return same_bits(s, got, want);
    if (got.dtype == PML_F64) {
        double error = fabs(*(double *)got.data - *(double *)want.data);
        *worst = fmax(*worst, error / fabs(*(double *)want.data));
        return *worst <= most;
    }
    pml_view wide = pml_matrix(must_alloc((size_t)(got.rows * got.cols) * sizeof(float)), got.rows,
                               got.cols, PML_F32);
    cpu_copy(s, got, wide);
    double error = distance(wide, want, c->unit);
    free(wide.data);
    *worst = fmax(*worst, error);
    return error <= most; /* false for NaN */
}

/* What codes in pieces mean, float32 without borders. */
static pml_view meaning(const gpu_case *c, pml_view codes, pml_view scales)
{
    pml_view out = pml_matrix(must_alloc((size_t)(codes.rows * codes.cols) * sizeof(float)),
                              codes.rows, codes.cols, PML_F32);
    int64_t part = codes.cols / c->in_pieces, a_part = pml_fp8_pieces(part);
    for (int64_t r = 0; r < codes.rows; r++)
        for (int64_t i = 0; i < codes.cols; i++) {
            int64_t piece = i / part * a_part + i % part / PML_FP8_PIECE;
            ((float *)out.data)[r * codes.cols + i] =
                pml_e4m3_value(((const uint8_t *)codes.data)[r * codes.ld + i]) *
                ((const float *)scales.data)[r * scales.ld + piece];
        }
    return out;
}

static bool judge_codes(const session *s, const gpu_case *c, const pml_view *got,
                        const pml_view *want, double *worst)
{
    pml_view g =
        meaning(c, in_image(s, got[c->codes], s->eager), in_image(s, got[c->scales], s->eager));
    pml_view w = meaning(c, want[c->codes], want[c->scales]);
    /* Of numbers that are off by the tolerance so many get the next code as the tolerance is of a
     * code's width, and are off by that width then. */
    double error = distance(g, w, c->unit), share = error * error / CODE_WIDTH;
    free(g.data);
    free(w.data);
    *worst = fmax(*worst, share);
    return share <= c->tolerance;
}

void judge(session *s, const gpu_case *c)
{
    const pml_op_info *info = pml_op_describe(c->op);
    pml_op_args twin, ours = c->args;
    char words[200] = "same bits";
    double worst = 0;
    bool good = true;
    twin_of(s, c, &twin);
    MUST(pml_op_run(s->cpu, c->op, s->cpu_queue, &twin, err));
    for (int i = 0; i < info->n_views; i++) {
        char letter = (char)toupper(info->signature[i]);
        pml_view got = pml_op_views(&ours)[i], want = pml_op_views(&twin)[i];
        if (got.data == NULL || letter == 'I' || letter == 'W')
            continue;
        bool in_pieces = c->in_pieces > 0 && (i == c->codes || i == c->scales);
        if (good &&
            (in_pieces ? !judge_codes(s, c, pml_op_views(&ours), pml_op_views(&twin), &worst)
                       : !judge_output(s, c, i, in_image(s, got, s->eager), want, &worst))) {
            good = false;
            snprintf(words, sizeof words, "operand '%s' is off, ", info->operands[i]);
        }
    }
    if (c->tolerance > 0)
        snprintf(words + (good ? 0 : strlen(words)), sizeof words - 100, "%.1e of %.0e", worst,
                 c->tolerance);
    else if (!good)
        snprintf(words + strlen(words), sizeof words - 100, "must be the same bits");
    report(s, good, c->name, words);
    free_views(c->op, &twin);
}

static void expect_refusal(session *s, const char *name, pml_status want, pml_status got,
                           const pml_error *err, const char *words)
{
    report(s, got == want && strstr(err->message, words) != NULL, name, err->message);
}

/* Of attention's positions and angles one alone, ones of other rows or heads, angles with a border,
 * and both where keys are not the queries' own. */
static void attention_refuses(session *s)
{
    enum { ROWS = 4, DIM = 64 };
    const pml_view some = pml_matrix(s->arena, ROWS, DIM, PML_BF16);
    const pml_view bounds = pml_vector(s->arena, 2, PML_I32);
    static const struct {
        const char *what, *operand;
        int32_t positions, angles, border, keys;
    } bad[] = {{"attention's positions without angles", "'table'", ROWS, 0, 0, ROWS},
               {"attention's angles without positions", "'pos'", 0, DIM, 0, ROWS},
               {"attention's positions of fewer rows", "'pos'", ROWS - 1, DIM, 0, ROWS},
               {"attention's angles of narrower heads", "'table'", ROWS, DIM - 2, 0, ROWS},
               {"attention's angles with a border", "'table'", ROWS, DIM, 8, ROWS},
               {"attention's positions with fewer keys", "'pos'", ROWS, DIM, 0, ROWS - 1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        pml_view keys = some;
        keys.rows = bad[i].keys;
        pml_op_args args = {
            .attention_bwd = {.dout = some,
                              .q = some,
                              .k = keys,
                              .v = keys,
                              .o = some,
                              .lse = pml_matrix(s->arena, 1, ROWS, PML_F32),
                              .cu_q = bounds,
                              .cu_k = bounds,
                              .dq = some,
                              .dk = keys,
                              .dv = keys,
                              .ws = pml_vector(s->arena, ROWS * sizeof(float), PML_U8),
                              .heads = 1,
                              .kv_heads = 1,
                              .head_dim = DIM,
                              .max_q = ROWS,
                              .scale = 1}};
        pml_error err = PML_ERROR_INIT;
        if (bad[i].positions > 0)
            args.attention_bwd.pos = pml_vector(s->arena, bad[i].positions, PML_I32);
        if (bad[i].angles > 0)
            args.attention_bwd.table = pml_matrix(s->arena, ROWS, bad[i].angles, PML_F32);
        args.attention_bwd.table.ld += bad[i].border;
        pml_status got = pml_op_run(s->gpu, PML_OP_attention_bwd, s->queue, &args, &err);
        expect_refusal(s, bad[i].what, PML_INVALID, got, &err, bad[i].operand);
    }
}

/* Of a norm's dtypes: a narrow weight beside rows in float32, rows of another 16 bits, and a narrow
 * weight whose gradient is asked for. */
static void norms_refuse(session *s)
{
    static const struct {
        const char *what, *words;
        pml_dtype x, weight;
    } bad[] = {{"a narrow weight beside rows in float32", "'weight'", PML_F32, PML_BF16},
               {"rows of another 16 bits", "x in F16 beside BF16", PML_F16, PML_BF16},
               {"a narrow weight with a gradient", "'weight' of BF16", PML_BF16, PML_BF16}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const pml_view dy = pml_matrix(s->arena, 2, 64, PML_BF16);
        const pml_view x = pml_matrix(s->arena, 2, 64, bad[i].x);
        const pml_view weight = pml_vector(s->arena, 64, bad[i].weight);
        const pml_view rstd = pml_vector(s->arena, 2, PML_F32);
        pml_op_args forward = {.rmsnorm = {.x = x, .weight = weight, .y = dy, .rstd = rstd}};
        pml_op_args back = {.rmsnorm_bwd = {.dy = dy,
                                            .x = x,
                                            .weight = weight,
                                            .rstd = rstd,
                                            .dx = dy,
                                            .dweight = pml_vector(s->arena, 64, PML_F32)}};
        pml_error err = PML_ERROR_INIT;
        back.rmsnorm_bwd.ws = pml_vector(s->arena, (int64_t)s->cases.workspace, PML_U8);
        pml_status got = pml_op_run(s->gpu, PML_OP_rmsnorm_bwd, s->queue, &back, &err);
        expect_refusal(s, bad[i].what, PML_INVALID, got, &err, bad[i].words);
        if (bad[i].x == PML_BF16) /* the forward makes no gradient */
            continue;
        got = pml_op_run(s->gpu, PML_OP_rmsnorm, s->queue, &forward, &err);
        expect_refusal(s, bad[i].what, PML_INVALID, got, &err, bad[i].words);
    }
}

/* What an op refuses, and that a recording which went wrong leaves a queue that works. */
static void refusals(session *s)
{
    pml_error err = PML_ERROR_INIT;
    pml_graph *graph = NULL;
    size_t bytes = 0;
    pml_op_args args = {.rmsnorm = {.x = shaped(2, 64, 0, PML_BF16),
                                    .weight = shaped(1, 63, 0, PML_BF16),
                                    .y = shaped(2, 64, 0, PML_BF16),
                                    .rstd = shaped(1, 2, 0, PML_F32)}};
    args.rmsnorm.x.data = args.rmsnorm.weight.data = args.rmsnorm.y.data = s->arena;
    args.rmsnorm.rstd.data = s->arena;
    pml_status got = pml_op_run(s->gpu, PML_OP_rmsnorm, s->queue, &args, &err);
    expect_refusal(s, "a wrong shape is refused by name", PML_INVALID, got, &err, "'weight'");

    attention_refuses(s);
    norms_refuse(s);

    got = pml_op_run(s->gpu, PML_OP_allreduce, s->queue, &args, &err);
    expect_refusal(s, "an op that is not there is refused by name", PML_UNSUPPORTED, got, &err,
                   "allreduce");

    MUST(s->gpu->graph_begin(s->queue, err));
    got = s->gpu->upload(s->queue, s->arena, s->start, 1, &err);
    expect_refusal(s, "an upload is not recorded", PML_BUSY, got, &err, "recorded");
    got = pml_op_run(s->gpu, PML_OP_rmsnorm, s->queue, &args, &err);
    expect_refusal(s, "an op that fails while recording says so", PML_INVALID, got, &err,
                   "'weight'");
    MUST(s->gpu->graph_end(s->queue, SIZE_MAX, &graph, &bytes, err));
    s->gpu->graph_destroy(&graph);
    got = s->gpu->graph_end(s->queue, SIZE_MAX, &graph, &bytes, &err);
    expect_refusal(s, "an end without a beginning", PML_INVALID, got, &err, "nothing");

    MUST(s->gpu->graph_begin(s->queue, err));
    MUST(pml_op_run(s->gpu, s->cases.at[0].op, s->queue, &s->cases.at[0].args, err));
    MUST(s->gpu->graph_end(s->queue, 1, &graph, &bytes, err));
    report(s, graph == NULL && bytes > 1, "no graph where it has no room", "of a byte");

    void *block = NULL;
    got = s->gpu->alloc(s->device, (size_t)1 << 60, &block, &err);
    expect_refusal(s, "more memory than there is", PML_NO_MEMORY, got, &err, "bytes on");
    MUST(s->gpu->sync(s->queue, err));
}

/* Beside other ops, and in a recording of them. */
static void copies(session *s)
{
    for (int way = 0; way < 3; way++) {
        char name[64], words[64];
        int64_t bad = copies_wrong(s->gpu, s->device, s->queue, s->sparse ? FEW_ROWS : ROWS, way);
        snprintf(name, sizeof name, "to the host and back, %s %d",
                 way == 0 ? "op by op" : "graph, replay", way);
        snprintf(words, sizeof words, "%lld elements wrong", (long long)bad);
        report(s, bad == 0, name, words);
    }
}

/* Where cuDNN is there it has a kernel for each case that it was asked for: what it refuses our own
 * kernels do, right and slowly. */
static void expect_none_refused(session *s)
{
    char lacks[PML_LACKS];
    pml_device_info info;
    MUST(s->gpu->info(s->device, &info, err));
    if (info.capability / 10 !=
        9) /* others may refuse: sm_80's and sm_120's backward with offsets */
        return;
    s->gpu->lacks(s->device, lacks);
    report(s, strncmp(lacks, "cuDNN ", 6) != 0, "cuDNN's attention", lacks);
}

/* A second device handle and queue beside the first: nothing is global that should not be. */
static void second_device(session *s)
{
    pml_device_options options = {0};
    pml_device *device = NULL;
    pml_queue *queue = NULL;
    MUST(s->gpu->open(&options, &device, err));
    MUST(s->gpu->queue_new(device, &queue, err));
    s->gpu->queue_destroy(&queue);
    s->gpu->close(&device);
    pml_error err = PML_ERROR_INIT;
    report(s, s->gpu->sync(s->queue, &err) == PML_OK && device == NULL && queue == NULL,
           "a second handle comes and goes", "");
}

/* What a GPU of these dtypes cannot do of a case; NULL: nothing. */
static const char *lacking(const gpu_case *c, unsigned dtypes)
{
    const pml_view *views = pml_op_views((pml_op_args *)(uintptr_t)&c->args);
    bool bf16 = false;
    for (int i = 0; i < pml_op_describe(c->op)->n_views; i++)
        bf16 = bf16 || (views[i].rows > 0 && views[i].dtype == PML_BF16);
    if (bf16 && (dtypes >> PML_BF16 & 1) == 0)
        return "no bfloat16";
    if ((c->e4m3 || c->op == PML_OP_fp8_quantise) && (dtypes >> PML_U8 & 1) == 0)
        return "no products of fp8";
    return NULL;
}

/* Each by its name, and why. */
static void skip_lacking(session *s, const pml_device_info *info)
{
    int kept = 0;
    unsigned dtypes;
    MUST(s->gpu->dtypes_of(0, &dtypes, err));
    for (int n = 0; n < s->cases.count; n++) {
        const char *why = lacking(&s->cases.at[n], dtypes);
        if (why != NULL) {
            printf("skip  %-58s %s on this GPU of %d.%d\n", s->cases.at[n].name, why,
                   info->capability / 10, info->capability % 10);
            s->skipped++;
        } else {
            s->cases.at[kept++] = s->cases.at[n];
        }
    }
    s->cases.count = kept;
}

static void set_up(session *s)
{
    pml_device_options options = {.threads = s->threads};
    pml_device_info info;
    s->cpu = pml_backend_cpu();
    MUST(s->cpu->open(&options, &s->cpu_device, err));
    MUST(s->cpu->queue_new(s->cpu_device, &s->cpu_queue, err));
    options.deterministic = !s->fast;
    MUST(s->gpu->open(&options, &s->device, err));
    MUST(s->gpu->queue_new(s->device, &s->queue, err));
    MUST(s->gpu->info(s->device, &info, err));
    printf("%s, kernels %s, %s, %zu of %zu MiB free\n", info.name, info.instructions,
           info.libraries, info.memory_free >> 20, info.memory_total >> 20);

    cases_of_forward(&s->cases);
    cases_of_training(&s->cases);
    cases_of_attention(&s->cases);
    cases_of_linear_bwd(&s->cases);
    cases_of_mlp(&s->cases);
    cases_of_fp8(&s->cases);
    cases_keep(&s->cases, &s->choice);
    skip_lacking(s, &info);
    if (s->cases.count == 0) {
        fprintf(stderr, "no case is named so\n");
        exit(1);
    }
    cases_place(&s->cases, s->gpu);
    s->size = s->cases.workspace + s->cases.operands;
    void *base = NULL;
    MUST(s->gpu->alloc(s->device, s->size, &base, err));
    s->arena = base;
    cases_rebase(&s->cases, s->arena);
    s->start = must_alloc(s->size);
    s->eager = must_alloc(s->size);
    s->replay = must_alloc(s->size);
    printf("%d op calls in an arena of %.1f MiB, %.1f of them shared workspace\n\n", s->cases.count,
           (double)s->size / 0x1p20, (double)s->cases.workspace / 0x1p20);
}

static void tear_down(session *s)
{
    void *base = s->arena;
    s->gpu->free(s->device, &base, s->size);
    s->gpu->queue_destroy(&s->queue);
    s->gpu->close(&s->device);
    s->cpu->queue_destroy(&s->cpu_queue);
    s->cpu->close(&s->cpu_device);
    free(s->start);
    free(s->eager);
    free(s->replay);
}

static void read_options(session *s, int argc, char **argv)
{
    bool good = true;
    int without = 0;
    for (int i = 1; i < argc && good; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--fast") == 0)
            s->fast = true;
        else if (strcmp(argv[i], "--eager") == 0)
            s->eagerly = true;
        else if (strcmp(argv[i], "--sparse") == 0)
            s->sparse = true;
        else if (strcmp(argv[i], "--starve") == 0)
            s->starve = true;
        else if (strcmp(argv[i], "--only") == 0 && more)
            s->choice.only = argv[++i];
        else if (strcmp(argv[i], "--without") == 0 && more && without < 8)
            s->choice.without[without++] = argv[++i];
        else if (strcmp(argv[i], "--threads") == 0 && more)
            good = sscanf(argv[++i], "%d", &s->threads) == 1 && s->threads > 0;
        else if (strcmp(argv[i], "--part") == 0 && more)
            good = sscanf(argv[++i], "%d/%d", &s->choice.part, &s->choice.parts) == 2 &&
                   s->choice.part >= 0 && s->choice.part < s->choice.parts;
        else
            good = false;
    }
    if (!good) {
        fprintf(stderr,
                "usage: %s [--fast] [--only TEXT] [--without TEXT]… "
                "[--part I/N] [--threads N] [--eager | --sparse [--starve]]\n",
                argv[0]);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    static session s;
    read_options(&s, argc, argv);
    pml_error err = PML_ERROR_INIT;
    pml_status status = pml_backend_cuda(&s.gpu, &err);
    if (status == PML_NOT_FOUND) {
        printf("gpu.ops skipped: %s\n", err.message);
        return SKIPPED;
    }
    if (status != PML_OK)
        session_stop("the CUDA backend", &err);
    set_up(&s);
    draw_start(&s);
    s.sparse ? run_sparse(&s) : run_eager(&s);
    if (!s.sparse && !s.eagerly)
        run_recorded(&s);
    if (!s.sparse)
        expect_rest_untouched(&s);
    for (int n = 0; n < s.cases.count; n++)
        judge(&s, &s.cases.at[n]);
    if (s.choice.only == NULL && s.choice.part == 0) {
        refusals(&s);
        second_device(&s);
    }
    if (s.fast)
        expect_none_refused(&s);
    if (s.fast && !s.sparse && !s.eagerly)
        attention_compiled_aside(&s);
    if (s.choice.part == 0)
        copies(&s);
    tear_down(&s);
    printf("\n%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped);
    return s.failed == 0 ? 0 : 1;
}
