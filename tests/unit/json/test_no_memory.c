/* The k-th allocation refused, for every k, ours and Jansson's alike: reading, building, changing
 * and printing messages answers PML_NO_MEMORY, never that the text is damaged, and nothing stays.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "no_memory.h"
#include "pml/json/json.h"
#include "pml/json/messages.h"
#include "pml/json/sum.h"

static pml_status read_request(pml_error *err)
{
    static const char text[] =
        "{\"type\":\"set\",\"id\":\"a\\u00e4\",\"learning_rate\":0.5,\"eval_steps\":7}";
    pml_message *m = NULL, *copy = NULL;
    char *printed = NULL;
    size_t size;
    pml_status status = pml_message_parse(PML_CHANNEL_REQUEST, text, sizeof text - 1, &m, err);
    if (status != PML_OK)
        return status;
    copy = pml_message_copy(m);
    pml_message *order = pml_message_new(PML_ORDER_command);
    pml_message_set_int(order, "command", 3);
    pml_message_set_string(order, "verb", "set");
    pml_message_set_args(order, "args", copy);
    status = pml_message_print(order, &printed, &size, err);
    free(printed);
    pml_message_destroy(&order);
    pml_message_destroy(&copy);
    pml_message_destroy(&m);
    return status;
}

static pml_status build_answer(pml_error *err)
{
    char *printed = NULL;
    size_t size;
    pml_message *m = pml_message_new(PML_EVENT_workers);
    for (int r = 0; r < 3; r++) {
        pml_message *w = pml_message_new(PML_RECORD_worker);
        pml_message_set_int(w, "rank", r);
        pml_message_set_string(w, "device", "cpu\xff"); /* mended: one more copy */
        pml_message_set_int(w, "pid", 7);
        pml_message_set_string(w, "state", "running");
        pml_message_append(m, "workers", w);
    }
    pml_message_stamp(m, 4, 1.5, 0);
    pml_status status = pml_message_print(m, &printed, &size, err);
    if (status == PML_OK)
        status = pml_sum_add(&printed, &size, err);
    free(printed);
    pml_message_destroy(&m);
    return status;
}

static pml_status read_document(pml_error *err)
{
    /* Numbers and strings that end where Jansson's buffer is full, at 15 bytes and at 31, and one
     * byte later: there it must grow to know that they end. */
    static const char text[] = "{\"a\":[1,2.5,\"x\",{\"b\":null}],\"c\":{\"d\":true},"
                               "\"e\":[123456789012345,1234567890123456,true],"
                               "\"f\":[0.1234567890123456789012345678,\"0123456789abcdef\","
                               "0.12345678901234567890123456789,0.123456789012345678901234567890]}";
    pml_json *document = NULL;
    pml_status status =
        pml_json_parse(text, sizeof text - 1, "text", &pml_json_file_limits, &document, err);
    if (status == PML_OK)
        pml_json_destroy(&document);
    return status;
}

static pml_status everything(pml_error *err)
{
    pml_status status = read_request(err);
    if (status == PML_OK)
        status = build_answer(err);
    return status == PML_OK ? read_document(err) : status;
}

static void test_every_allocation(void **state)
{
    (void)state;
    every_allocation(everything, 150);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_allocation)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
