/* AdamW with moments in 8 bits against bitsandbytes (tools/fixtures/make_adamw_8bit.py): the same
 * codes from the same state. Here and not with the kernels, because a fixture is read by the
 * model's reader. */
#include "kernels/fixture.h"

#include "pml/model/safetensors.h"

enum { UPDATES = 3, OPERANDS = 6, ZERO = 127, BLOCK = PML_ADAMW_8BIT_BLOCK };

static pml_safetensors *open_fixture(void)
{
    pml_safetensors *file = NULL;
    pml_error err = PML_ERROR_INIT;
    if (pml_safetensors_open(SOURCE_DIR "/tests/unit/plan/fixtures/adamw-8bit.safetensors", &file,
                             &err) != PML_OK)
        fail_msg("%s", err.message);
    return file;
}

/* A copy of a tensor as an operand. */
static pml_view named(const pml_safetensors *file, const char *key)
{
    const pml_stored *t = pml_safetensors_find(file, key);
    assert_non_null(t);
    pml_view v = view_new(1, t->elements, 0, t->dtype);
    pml_error err = PML_ERROR_INIT;
    if (pml_stored_read(t, 0, t->bytes, v.data, &err) != PML_OK)
        fail_msg("%s", err.message);
    return v;
}

static pml_view tensor(const pml_safetensors *file, const char *what, int k, const char *name)
{
    char key[64];
    snprintf(key, sizeof key, "%s%d%s", what, k, name);
    return named(file, key);
}

static pml_view hyper_of(const pml_safetensors *file, int k)
{
    pml_view given = tensor(file, "hyper.", k, ""), v = view_new(1, PML_HYPER_COUNT, 0, PML_F32);
    const float *h = given.data;
    float hyper[PML_HYPER_COUNT] = {
        [PML_HYPER_LR] = h[0],         [PML_HYPER_WEIGHT_DECAY] = h[1],
        [PML_HYPER_BIAS1] = h[2],      [PML_HYPER_BIAS2] = h[3],
        [PML_HYPER_EPS] = 1e-8F,       [PML_HYPER_ONE_MINUS_BETA1] = 0.1F,
        [PML_HYPER_GRAD_SCALE] = h[4], [PML_HYPER_ONE_MINUS_BETA2] = 1e-3F};
    memcpy(v.data, hyper, sizeof hyper);
    free(given.data);
    return v;
}

/* Our code where bitsandbytes' PyTorch form has `theirs`: they differ for a negative m next to 0,
 * whose sign that form forgets and its CUDA kernel does not. */
static bool same_code(uint8_t ours, uint8_t theirs, float m)
{
    return ours == theirs || (theirs == ZERO && ours == ZERO - 1 && m < 0);
}

static void test_update(void **state)
{
    (void)state;
    static const char *const names[OPERANDS] = {".p", NULL, ".m", ".v", ".m_largest", ".v_largest"};
    pml_safetensors *file = open_fixture();
    int64_t apart = 0, kept_sign = 0;
    pml_view map = named(file, "m_map");
    for (int k = 0; k < UPDATES; k++) {
        pml_op_args args = {0};
        pml_view *views = pml_op_views(&args), want[OPERANDS];
        pml_adamw_8bit_args *a = &args.adamw_8bit;
        for (int i = 0; i < OPERANDS; i++) {
            views[i] = i == 1 ? tensor(file, "g.", k, "") : tensor(file, "state.", k, names[i]);
            want[i] = i == 1 ? (pml_view){0} : tensor(file, "state.", k + 1, names[i]);
        }
        a->hyper = hyper_of(file, k);
        pml_view before = tensor(file, "state.", k, ".m"),
                 was = tensor(file, "state.", k, ".m_largest");
        const uint8_t *codes = before.data;
        run_op(PML_OP_adamw_8bit, &args);
        const uint8_t *m = a->m.data, *v = a->v.data, *their_m = want[2].data,
                      *their_v = want[3].data;
        for (int64_t i = 0; i < a->p.cols; i++) {
            float p = *at(&a->p, 0, i), their_p = *at(&want[0], 0, i);
            if (fabsf(p - their_p) > 3e-7F * fmaxf(fabsf(their_p), 1e-2F))
                fail_msg("update %d: p[%d] is %.9g, bitsandbytes has %.9g", k, (int)i, (double)p,
                         (double)their_p);
            float exact = *at(&map, 0, codes[i]) * *at(&was, 0, i / BLOCK);
            exact =
                0.9F * exact + 0.1F * *at(&a->g, 0, i) * *at(&a->hyper, 0, PML_HYPER_GRAD_SCALE);
            apart += !same_code(m[i], their_m[i], exact) + (v[i] != their_v[i]);
            kept_sign += m[i] != their_m[i];
        }
        for (int side = 4; side < OPERANDS; side++)
            for (int64_t block = 0; block < want[side].cols; block++) {
                float ours = *at(&views[side], 0, block), theirs = *at(&want[side], 0, block);
                bool zeros = ours == 0 && theirs == 1; /* of a block of zeros it says 1 */
                assert_true(zeros || fabsf(ours - theirs) <= 2e-7F * theirs);
            }
        for (int i = 0; i < OPERANDS; i++)
            free(want[i].data);
        free(before.data);
        free(was.data);
        free_views(PML_OP_adamw_8bit, &args);
    }
    assert_int_equal(apart, 0);
    assert_true(kept_sign > 0); /* the rule was met */
    free(map.data);
    pml_safetensors_close(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_update)};
    return run_on_devices(tests);
}
