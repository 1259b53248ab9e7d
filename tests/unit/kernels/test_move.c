/* fill, copy with conversion, gather_rows, scatter_rows. */
#include "kernels/fixture.h"

static void check_fill(pml_dtype dtype, double value, const void *element)
{
    size_t size = pml_dtype_size(dtype);
    const int64_t shapes[][3] = {{1, 1, 0}, {7, 5, 3}, {1, 130001, 0}, {0, 4, 0}, {300, 700, 1}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        pml_op_args args = {.fill = {.y = view_new(shapes[s][0], shapes[s][1], shapes[s][2], dtype),
                                     .value = value}};
        run_op(PML_OP_fill, &args);
        pml_view *y = &args.fill.y;
        for (int64_t r = 0; r < y->rows; r++)
            for (int64_t c = 0; c < y->cols; c++)
                assert_memory_equal((char *)y->data + (size_t)(r * y->ld + c) * size, element,
                                    size);
        free_views(PML_OP_fill, &args);
    }
}

static void test_fill(void **state)
{
    (void)state;
    check_fill(PML_F32, 0, (float[]){0});
    check_fill(PML_F32, 0.1, (float[]){0.1F});
    check_fill(PML_F32, -INFINITY, (float[]){-INFINITY});
    check_fill(PML_F64, 0.1, (double[]){0.1});
    check_fill(PML_BF16, -1.5, (uint16_t[]){0xBFC0});
    check_fill(PML_F16, 2.5, (uint16_t[]){0x4100});
    check_fill(PML_I32, -7, (int32_t[]){-7});
    check_fill(PML_I64, 0x1p62, (int64_t[]){(int64_t)1 << 62});
    check_fill(PML_U8, 255, (uint8_t[]){255});
}

static void test_fill_with_what_does_not_fit(void **state)
{
    (void)state;
    const struct {
        pml_dtype dtype;
        double value;
    } cases[] = {{PML_U8, 256},     {PML_U8, -1},         {PML_U8, 1.5},
                 {PML_I32, 0x1p31}, {PML_I32, NAN},       {PML_I64, 0x1p63},
                 {PML_I64, 0.5},    {PML_I32, -0x1.8p31}, {PML_I64, INFINITY}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        pml_op_args args = {
            .fill = {.y = view_new(2, 2, 0, cases[i].dtype), .value = cases[i].value}};
        pml_error err = PML_ERROR_INIT;
        assert_int_equal(call_op(PML_OP_fill, &args, &err), PML_INVALID);
        assert_non_null(strstr(err.message, "'y'"));
        free_views(PML_OP_fill, &args);
    }
}

/* Round to nearest even by search among all values of a 16-bit format: slow and obvious. */
static double value_of(uint16_t bits, pml_dtype dtype)
{
    int exponent_bits = dtype == PML_BF16 ? 8 : 5, mantissa_bits = 15 - exponent_bits;
    int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
    int mantissa = bits & ((1 << mantissa_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
    double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1)
        return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

static bool nearest(float x, uint16_t got, pml_dtype dtype)
{
    if (isnan(x))
        return isnan(value_of(got, dtype));
    if ((signbit(x) != 0) != (got >> 15))
        return false;
    uint16_t size = got & 0x7fff, infinity = dtype == PML_BF16 ? 0x7f80 : 0x7c00;
    double target = fabs((double)x);
    if (isinf(target))
        return size == infinity;
    /* Infinity stands for the value that would come after the largest. */
    double step =
        value_of((uint16_t)(infinity - 1), dtype) - value_of((uint16_t)(infinity - 2), dtype);
    double last = value_of((uint16_t)(infinity - 1), dtype) + step;
    double here = size == infinity ? last : value_of(size, dtype);
    double below = size > 0 ? value_of((uint16_t)(size - 1), dtype) : -1;
    double above = size + 1 >= infinity ? last : value_of((uint16_t)(size + 1), dtype);
    bool even = size % 2 == 0;
    double down = (here + below) / 2, up = (here + above) / 2;
    if (size > 0 && (even ? target < down : target <= down))
        return false;
    return size == infinity || (even ? target <= up : target < up);
}

static void check_to_half(pml_dtype dtype)
{
    enum { N = 20000 };
    pml_op_args args = {
        .copy = {.x = view_new(N / 10, 10, 3, PML_F32), .y = view_new(N / 10, 10, 1, dtype)}};
    pml_copy_args *a = &args.copy;
    const float special[] = {0,
                             -0.0F,
                             INFINITY,
                             -INFINITY,
                             NAN,
                             65504,
                             65519.99F,
                             65520,
                             65536,
                             0x1p-14F,
                             0x1p-24F,
                             0x1p-25F,
                             0x1.8p-25F,
                             0x1.8p-24F,
                             -0x1p-26F,
                             0x1.ffcp-15F,
                             0x1.ffep-15F,
                             0x1.fffp-15F,
                             1.00048828125F,
                             3.3895314e38F,
                             3.4e38F,
                             1e-40F,
                             0x1.01p0F,
                             0x1.03p0F};
    const int specials = sizeof special / sizeof *special;
    for (int i = 0; i < N; i++) {
        uint32_t bits = (uint32_t)random_bits();
        if (i % 2 == 0 && dtype == PML_F16) /* half of them within F16's range */
            bits = (bits & 0x807fffff) | (100 + bits % 45) << 23;
        float x;
        memcpy(&x, &bits, sizeof x);
        *at(&a->x, i / 10, i % 10) = i < specials ? special[i] : x;
    }
    run_op(PML_OP_copy, &args);
    for (int i = 0; i < N; i++) {
        uint16_t got = ((uint16_t *)a->y.data)[i / 10 * a->y.ld + i % 10];
        float x = *at(&a->x, i / 10, i % 10);
        if (!nearest(x, got, dtype))
            fail_msg("%a became %04x of %s", (double)x, got, pml_dtype_name(dtype));
    }
    free_views(PML_OP_copy, &args);
}

/* Every 16-bit value widens to exactly itself. */
static void check_from_half(pml_dtype dtype)
{
    pml_op_args args = {
        .copy = {.x = view_new(256, 256, 0, dtype), .y = view_new(256, 256, 2, PML_F32)}};
    for (int i = 0; i < 65536; i++)
        ((uint16_t *)args.copy.x.data)[i] = (uint16_t)i;
    run_op(PML_OP_copy, &args);
    for (int i = 0; i < 65536; i++) {
        double got = *at(&args.copy.y, i / 256, i % 256), want = value_of((uint16_t)i, dtype);
        assert_true(isnan(want) ? isnan(got) : got == want && (signbit(got) != 0) == (i >> 15));
    }
    free_views(PML_OP_copy, &args);
}

static void test_copy_converts(void **state)
{
    (void)state;
    check_to_half(PML_BF16);
    check_to_half(PML_F16);
    check_from_half(PML_BF16);
    check_from_half(PML_F16);
}

/* BF16 to F16 and back goes through the values, not the bits. */
static void test_copy_between_halves(void **state)
{
    (void)state;
    pml_op_args args = {
        .copy = {.x = view_new(1, 3, 0, PML_BF16), .y = view_new(1, 3, 0, PML_F16)}};
    memcpy(args.copy.x.data, (uint16_t[]){0x3F80, 0xC000, 0x7F80}, 6);
    run_op(PML_OP_copy, &args);
    assert_memory_equal(args.copy.y.data, ((uint16_t[]){0x3C00, 0xC000, 0x7C00}), 6);
    free_views(PML_OP_copy, &args);
}

static void check_copy(pml_dtype dtype, int64_t rows, int64_t cols)
{
    size_t size = pml_dtype_size(dtype);
    pml_op_args args = {
        .copy = {.x = view_new(rows, cols, 3, dtype), .y = view_new(rows, cols, 1, dtype)}};
    unsigned char *bytes = args.copy.x.data;
    for (size_t i = 0; i < span_bytes(&args.copy.x); i++)
        bytes[i] = (unsigned char)random_bits();
    run_op(PML_OP_copy, &args);
    for (int64_t r = 0; r < rows; r++)
        assert_memory_equal((char *)args.copy.y.data + (size_t)(r * args.copy.y.ld) * size,
                            bytes + (size_t)(r * args.copy.x.ld) * size, (size_t)cols * size);
    free_views(PML_OP_copy, &args);
}

static void test_copy(void **state)
{
    (void)state;
    for (int dtype = 0; dtype < PML_DTYPE_COUNT; dtype++) {
        check_copy((pml_dtype)dtype, 1, 1);
        check_copy((pml_dtype)dtype, 130, 7);
        check_copy((pml_dtype)dtype, 1, 100003);
    }
    pml_op_args args = {.copy = {.x = view_new(2, 2, 0, PML_I32), .y = view_new(2, 2, 0, PML_F32)}};
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(call_op(PML_OP_copy, &args, &err), PML_INVALID);
    free_views(PML_OP_copy, &args);
}

static void test_gather_and_scatter(void **state)
{
    (void)state;
    const int32_t picked[] = {4, 0, 4, 2}, places[] = {3, -1, 0, 5};
    pml_op_args gather = {.gather_rows = {.x = random_view(5, 9, 2),
                                          .index = int_view(4, picked),
                                          .y = view_new(4, 9, 3, PML_F32)}};
    run_op(PML_OP_gather_rows, &gather);
    pml_op_args scatter = {.scatter_rows = {.x = gather.gather_rows.y,
                                            .index = int_view(4, places),
                                            .y = random_view(6, 9, 1)}};
    pml_view *x = &gather.gather_rows.x, *y = &scatter.scatter_rows.y;
    double *want = doubles(y);
    run_op(PML_OP_scatter_rows, &scatter);
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < 9; c++) {
            assert_true(*at(&gather.gather_rows.y, i, c) == *at(x, picked[i], c));
            if (places[i] >= 0)
                want[places[i] * 9 + c] = *at(x, picked[i], c);
        }
    expect_view("y", y, want, 0);
    free(want);
    gather.gather_rows.y.data = NULL;
    free_views(PML_OP_gather_rows, &gather);
    free_views(PML_OP_scatter_rows, &scatter);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fill),          cmocka_unit_test(test_fill_with_what_does_not_fit),
        cmocka_unit_test(test_copy_converts), cmocka_unit_test(test_copy_between_halves),
        cmocka_unit_test(test_copy),          cmocka_unit_test(test_gather_and_scatter),
    };
    return run_on_devices(tests);
}
