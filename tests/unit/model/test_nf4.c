/* Tensors of a folder that bitsandbytes has quantised: what is taken, and what is refused by name.
 */
#include "scratch.h"

#include "pml/model/nf4.h"
#include "pml_op/ops.h"

enum { ROWS = 4, COLS = 50, CODES = ROWS * COLS / 2, BLOCKS = 4 }; /* the last block is partial */

/* What differs from a file as bitsandbytes writes it. */
typedef struct variant {
    pml_dtype storage;    /* of the codes: their bytes are the same in any */
    int64_t too_many;     /* elements of theirs */
    const char *state;    /* quant_state's JSON; NULL: NF4's */
    const char *left_out; /* a tensor that is missing */
    bool other_values;    /* quant_map of another kind of four bits */
} variant;

#define STATE(type, block, rest)                                                                   \
    "{\"quant_type\":\"" type "\",\"blocksize\":" block                                            \
    ",\"dtype\":\"bfloat16\",\"shape\":[4,50]" rest "}"
#define NESTED ",\"nested_blocksize\":256,\"nested_dtype\":\"float32\",\"nested_offset\":0.25"

static pml_safetensors *made(const variant *v)
{
    static unsigned char bytes[1024];
    float values[PML_NF4_VALUES], magnitudes[PML_DYNAMIC_CODES];
    memcpy(values, pml_nf4_values, sizeof values);
    pml_dynamic_map(true, magnitudes);
    if (v->other_values)
        values[3] += 0.01F;
    const char *state = v->state != NULL ? v->state : STATE("nf4", "64", NESTED);
    const int64_t width = (int64_t)pml_dtype_size(v->storage), length = (int64_t)strlen(state);
    const struct {
        const char *name;
        pml_dtype dtype;
        int64_t n;
        const void *data;
    } tensors[] = {{"w.nested_absmax", PML_F32, 1, bytes},
                   {"w.quant_map", PML_F32, PML_NF4_VALUES, values},
                   {"w.nested_quant_map", PML_F32, PML_DYNAMIC_CODES, magnitudes},
                   {"w", v->storage, CODES / width + v->too_many, bytes},
                   {"w.absmax", PML_U8, BLOCKS, bytes},
                   {"w.quant_state.bitsandbytes__nf4", PML_U8, length, state}};
    pml_safetensors_writer *writer = NULL;
    pml_safetensors *file = NULL;
    const char *path = scratch("quantised.safetensors");
    EXPECT_OK(pml_safetensors_writer_new(path, 0644, &writer, e));
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
            if (v->left_out != NULL && strcmp(v->left_out, tensors[i].name) == 0)
                continue;
            size_t size = (size_t)tensors[i].n * pml_dtype_size(tensors[i].dtype);
            if (pass == 0)
                EXPECT_OK(pml_safetensors_writer_add(writer, tensors[i].name, tensors[i].dtype,
                                                     &tensors[i].n, 1, e));
            else
                EXPECT_OK(pml_safetensors_writer_write(writer, tensors[i].data, size, e));
        }
    EXPECT_OK(pml_safetensors_writer_finish(writer, e));
    pml_safetensors_writer_destroy(&writer);
    EXPECT_OK(pml_safetensors_open(path, &file, e));
    return file;
}

static void test_what_is_taken(void **state)
{
    (void)state;
    static const variant cases[] = {
        {.storage = PML_U8}, {.storage = PML_BF16}, {.storage = PML_F32}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_safetensors *file = made(&cases[i]);
        pml_nf4_stored found;
        EXPECT_OK(pml_nf4_find(file, "w", ROWS, COLS, &found, e));
        assert_true(pml_nf4_is_stored(file, "w"));
        assert_int_equal(found.codes->bytes, CODES);
        assert_int_equal(found.absmax->elements, BLOCKS);
        assert_true(found.offset == 0.25F);
        EXPECT_FAIL(PML_INVALID, "[50,4]", pml_nf4_find(file, "w", COLS, ROWS, &found, e));
        int64_t rows, cols;
        pml_dtype dtype;
        EXPECT_OK(pml_nf4_original(file, "w", &rows, &cols, &dtype, e));
        assert_true(rows == ROWS && cols == COLS && dtype == PML_BF16);
        assert_true(pml_nf4_is_expected("model.layers.0.mlp.up_proj.weight"));
        assert_false(pml_nf4_is_expected("lm_head.weight"));
        assert_true(pml_nf4_is_part(file, "w.nested_quant_map"));
        assert_false(pml_nf4_is_part(file, "w"));
        pml_safetensors_close(&file);
    }
}

static void test_what_is_refused(void **state)
{
    (void)state;
    static const struct {
        variant v;
        pml_status code;
        const char *words;
    } cases[] = {
        {{.state = STATE("fp4", "64", NESTED)}, PML_UNSUPPORTED, "quant_type = \"fp4\""},
        {{.state = STATE("nf4", "128", NESTED)}, PML_UNSUPPORTED, "blocksize = 128"},
        {{.state = STATE("nf4", "64", "")}, PML_UNSUPPORTED, "bnb_4bit_use_double_quant=false"},
        {{.state = "{"}, PML_INVALID, "w.quant_state"},
        {{.left_out = "w.absmax"}, PML_CORRUPT, "absmax is missing"},
        {{.left_out = "w.quant_map"}, PML_CORRUPT, "quant_map is missing"},
        {{.left_out = "w"}, PML_CORRUPT, "tensor is missing"},
        {{.left_out = "w.quant_state.bitsandbytes__nf4", .storage = PML_U8},
         PML_CORRUPT,
         "no quant_state"},
        {{.left_out = "w.quant_state.bitsandbytes__nf4", .storage = PML_BF16},
         PML_UNSUPPORTED,
         "'w' was left whole"},
        {{.other_values = true}, PML_UNSUPPORTED, "'w.quant_map' has -0.384917 at 3"},
        {{.storage = PML_U8, .too_many = 1}, PML_CORRUPT, "'w' is 101 elements of U8, must be 100"},
        {{.storage = PML_BF16, .too_many = 1}, PML_CORRUPT, "'w' is 51 elements of BF16"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_safetensors *file = made(&cases[i].v);
        pml_nf4_stored found;
        EXPECT_FAIL(cases[i].code, cases[i].words, pml_nf4_find(file, "w", ROWS, COLS, &found, e));
        pml_safetensors_close(&file);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_is_taken),
        cmocka_unit_test(test_what_is_refused),
    };
    return cmocka_run_group_tests(tests, scratch_setup, scratch_teardown);
}
