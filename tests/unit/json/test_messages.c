/* The message table: what it lets in, what it names when it does not, and its printed form. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../document.h"
#include "pml/json/messages.h"

static pml_status parse(pml_channel channel, const char *text, pml_message **m, pml_error *err)
{
    return pml_message_parse(channel, text, strlen(text), m, err);
}

/* The text is refused with this code and with these words in the message. */
static void refused(pml_channel channel, const char *text, pml_status code, const char *words)
{
    pml_error err = PML_ERROR_INIT;
    pml_message *m = NULL;
    assert_int_equal(parse(channel, text, &m, &err), code);
    assert_null(m);
    if (strstr(err.message, words) == NULL)
        fail_msg("\"%s\" is not in \"%s\"", words, err.message);
}

static void reads_what_it_accepts(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    assert_int_equal(parse(PML_CHANNEL_REQUEST,
                           "{\"type\":\"sample\",\"id\":\"a-1\",\"input_ids\":[1,2,3],"
                           "\"max_new_tokens\":8,\"temperature\":0,\"seed\":7}",
                           &m, &err),
                     PML_OK);
    assert_int_equal(pml_message_type_of(m), PML_REQUEST_sample);
    assert_int_equal(pml_message_count(m, "input_ids"), 3);
    assert_int_equal(pml_message_int_at(m, "input_ids", 2), 3);
    assert_int_equal(pml_message_int(m, "max_new_tokens"), 8);
    assert_string_equal(pml_message_string(m, "id"), "a-1");
    assert_false(pml_message_has(m, "name"));
    assert_string_equal(pml_message_string(m, "name"), "");
    pml_message_destroy(&m);
    assert_null(m);
}

static void names_what_is_wrong(void **state)
{
    (void)state;
    refused(PML_CHANNEL_REQUEST, "", PML_CORRUPT, "not JSON");
    refused(PML_CHANNEL_REQUEST, "[]", PML_CORRUPT, "one JSON object");
    refused(PML_CHANNEL_REQUEST, "{\"id\":\"1\"}", PML_INVALID, "type is missing");
    refused(PML_CHANNEL_REQUEST, "{\"type\":3,\"id\":\"1\"}", PML_INVALID, "type must be");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"reboot\",\"id\":\"1\"}", PML_INVALID, "reboot");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"welcome\",\"id\":\"1\"}", PML_INVALID, "welcome");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"pause\"}", PML_INVALID, "pause.id is missing");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"pause\",\"id\":\"\"}", PML_INVALID, "pause.id");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"pause\",\"id\":\"1\",\"id\":\"2\"}", PML_CORRUPT,
            "duplicate");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"pause\",\"id\":\"1\",\"now\":true}", PML_INVALID,
            "no field \"now\"");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"set\",\"id\":\"1\"}", PML_INVALID, "at least one");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"set\",\"id\":\"1\",\"learning_rate\":\"x\"}",
            PML_INVALID, "set.learning_rate must be a number, it is a string");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"set\",\"id\":\"1\",\"learning_rate\":-1}",
            PML_INVALID, "set.learning_rate must be between 0");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"set\",\"id\":\"1\",\"learning_rate\":\"NaN\"}",
            PML_INVALID, "set.learning_rate");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"set\",\"id\":\"1\",\"save_steps\":1.5}", PML_INVALID,
            "set.save_steps must be an integer");
    refused(PML_CHANNEL_REQUEST,
            "{\"type\":\"sample\",\"id\":\"1\",\"input_ids\":[1,-2],\"max_new_tokens\":1,"
            "\"temperature\":0,\"seed\":1}",
            PML_INVALID, "sample.input_ids[1]");
    refused(PML_CHANNEL_REQUEST,
            "{\"type\":\"sample\",\"id\":\"1\",\"input_ids\":[],\"max_new_tokens\":1,"
            "\"temperature\":0,\"seed\":1}",
            PML_INVALID, "sample.input_ids must have 1");
    refused(PML_CHANNEL_REPORT,
            "{\"type\":\"report\",\"rank\":0,\"event\":{\"type\":\"eval\",\"step\":1}}",
            PML_INVALID, "eval.loss is missing");
    refused(PML_CHANNEL_ORDER,
            "{\"type\":\"command\",\"command\":1,\"verb\":\"set\",\"args\":{\"lr\":1}}",
            PML_INVALID, "no field \"lr\"; it has learning_rate, ");
    refused(PML_CHANNEL_ORDER, "{\"type\":\"command\",\"command\":1,\"verb\":\"fly\",\"args\":{}}",
            PML_INVALID, "command.verb must be one of");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"pause\",\"id\":\"\xff\"}", PML_CORRUPT, "decode");
    refused(PML_CHANNEL_REQUEST, "{\"type\":\"pause\",\"id\":\"a\\u0000b\"}", PML_CORRUPT, "not");
}

static void bounds_size_and_depth(void **state)
{
    (void)state;
    char deep[200] = "{\"type\":\"pause\",\"id\":";
    for (int i = 0; i < PML_MESSAGE_DEPTH; i++)
        strcat(deep, "[");
    refused(PML_CHANNEL_REQUEST, deep, PML_CORRUPT, "levels");

    /* As deep as allowed, brackets inside strings not counted. */
    char text[400] = "{\"format\":1,\"data\":";
    for (int i = 1; i < PML_MESSAGE_DEPTH; i++)
        strcat(text, "{\"[[{{\":");
    strcat(text, "1");
    for (int i = 1; i < PML_MESSAGE_DEPTH; i++)
        strcat(text, "}");
    strcat(text, "}");
    pml_error err = PML_ERROR_INIT;
    pml_message *m;
    assert_int_equal(pml_message_parse_as(PML_FILE_run, text, strlen(text), &m, &err),
                     PML_INVALID); /* well-formed, and a run lacks its name */
    assert_non_null(strstr(err.message, "run.name is missing"));

    size_t n = PML_MESSAGE_MAX + 1;
    char *large = malloc(n + 1);
    assert_non_null(large);
    memset(large, ' ', n);
    large[n] = '\0';
    memcpy(large, "{\"type\":\"pause\",\"id\":\"1\"}", 25);
    refused(PML_CHANNEL_REQUEST, large, PML_CORRUPT, "at most 65536 bytes");
    assert_int_equal(pml_message_parse(PML_CHANNEL_REQUEST, large, n - 1, &m, &err), PML_OK);
    pml_message_destroy(&m);
    free(large);
}

static void prints_what_it_reads(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    pml_message *m = pml_message_new(PML_EVENT_step);
    pml_message_set_int(m, "step", 7);
    pml_message_set_number(m, "loss", NAN);
    pml_message_set_number(m, "learning_rate", 0.1);
    pml_message_set_number(m, "grad_norm", INFINITY);
    pml_message_set_int(m, "tokens", 12);
    pml_message_set_int(m, "labels", 11);
    pml_message_set_number(m, "seconds", 0.25);
    pml_message_set_number(m, "tokens_per_second", 48);
    pml_message_set_number(m, "epoch", 0.5);
    pml_message_stamp(m, 3, 1000.5, 2);
    char *text;
    size_t size;
    assert_int_equal(pml_message_print(m, &text, &size, &err), PML_OK);
    pml_message_destroy(&m);
    assert_memory_equal(text, "{\"seq\":3,\"time\":1000.5,\"timeline\":2,\"type\":\"step\"", 48);

    assert_int_equal(pml_message_parse(PML_CHANNEL_EVENT, text, size, &m, &err), PML_OK);
    free(text);
    assert_true(isnan(pml_message_number(m, "loss")));
    assert_true(isinf(pml_message_number(m, "grad_norm")));
    assert_true(pml_message_number(m, "learning_rate") == 0.1);
    pml_message_destroy(&m);
}

static void refuses_to_print_what_it_would_not_read(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    char *text;
    size_t size;
    pml_message *m = pml_message_new(PML_ANSWER_accepted);
    pml_message_set_string(m, "id", "a");
    assert_int_equal(pml_message_print(m, &text, &size, &err), PML_INTERNAL);
    assert_non_null(strstr(err.message, "accepted.command is missing"));
    pml_message_set_int(m, "command", 0);
    assert_int_equal(pml_message_print(m, &text, &size, &err), PML_INTERNAL);
    pml_message_set_int(m, "command", 1);
    assert_int_equal(pml_message_print(m, &text, &size, &err), PML_OK);
    assert_string_equal(text, "{\"type\":\"accepted\",\"id\":\"a\",\"command\":1}");
    free(text);
    pml_message_destroy(&m);
    assert_int_equal(pml_message_print(NULL, &text, &size, &err), PML_NO_MEMORY);
}

static void carries_arguments_and_parts(void **state)
{
    (void)state;
    pml_error err = PML_ERROR_INIT;
    pml_message *request;
    assert_int_equal(parse(PML_CHANNEL_REQUEST,
                           "{\"type\":\"set\",\"id\":\"q\",\"learning_rate\":0.5}", &request, &err),
                     PML_OK);
    pml_message *order = pml_message_new(PML_ORDER_command);
    pml_message_set_int(order, "command", 4);
    pml_message_set_string(order, "verb", "set");
    pml_message_set_args(order, "args", request);
    pml_message_destroy(&request);
    char *text;
    size_t size;
    assert_int_equal(pml_message_print(order, &text, &size, &err), PML_OK);
    assert_string_equal(text, "{\"type\":\"command\",\"command\":4,\"verb\":\"set\","
                              "\"args\":{\"learning_rate\":0.5}}");
    free(text);
    pml_message *args = pml_message_part(order, "args", 0);
    assert_int_equal(pml_message_type_of(args), PML_REQUEST_set);
    assert_true(pml_message_number(args, "learning_rate") == 0.5);
    pml_message_destroy(&args);
    assert_null(pml_message_part(order, "verb", 0));
    pml_message_destroy(&order);
}

static void finds_the_id_of_a_wrong_request(void **state)
{
    (void)state;
    char id[65];
    const char *wrong = "{\"type\":\"fly\",\"id\":\"k7\"}";
    pml_message_find_id(wrong, strlen(wrong), id);
    assert_string_equal(id, "k7");
    pml_message_find_id("{", 1, id);
    assert_string_equal(id, "?");
}

static void tells_what_differs(void **state)
{
    (void)state;
    pml_message *a = pml_message_new(PML_FILE_run), *b = pml_message_new(PML_FILE_run);
    char text[128];
    pml_message_set_json(a, "identity", "{\"threads\":2,\"isa\":\"avx2\"}");
    pml_message_set_json(b, "identity", "{\"threads\":2,\"isa\":\"avx2\"}");
    pml_message_differs(a, "identity", b, "identity", text, sizeof text);
    assert_string_equal(text, "");
    pml_message_set_json(b, "identity", "{\"threads\":4,\"isa\":\"avx2\"}");
    pml_message_differs(a, "identity", b, "identity", text, sizeof text);
    assert_string_equal(text, "threads: 2, now 4");
    pml_message_destroy(&a);
    pml_message_destroy(&b);
}

static void roles_are_as_promised(void **state)
{
    (void)state;
    for (int i = 0; i < PML_MESSAGE_COUNT; i++) {
        pml_message_type type = (pml_message_type)i;
        unsigned roles = pml_message_roles(type);
        switch (pml_message_channel(type)) {
        case PML_CHANNEL_REQUEST: /* a viewer changes nothing */
            assert_true((roles & PML_ROLE_CONTROL) != 0);
            assert_int_equal((roles & PML_ROLE_VIEW) != 0,
                             type == PML_REQUEST_hello || type == PML_REQUEST_status ||
                                 type == PML_REQUEST_replay || type == PML_REQUEST_alive ||
                                 type == PML_REQUEST_configuration);
            break;
        case PML_CHANNEL_REPORT:
            assert_int_equal(roles, PML_ROLE_WORKER);
            break;
        default:
            assert_int_equal(roles, PML_ROLE_NOBODY);
        }
    }
}

/* A FIELD belongs to the MESSAGE above it, so the name it repeats must be that one. */
static void fields_stand_under_their_message(void **state)
{
    (void)state;
    static const struct {
        const char *message, *field;
    } rows[] = {
#define MESSAGE(name, channel, roles, sentence)                      {#name, NULL},
#define FIELD(message, name, kind, need, low, high, extra, sentence) {#message, #name},
#include "pml/json/messages.def"
#undef MESSAGE
#undef FIELD
    };
    const char *above = "";
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (rows[i].field == NULL)
            above = rows[i].message;
        assert_string_equal(rows[i].message, above);
    }
}

static const char path[] = SOURCE_DIR "/docs/messages.md";

static void document_is_current(void **state)
{
    (void)state;
    document_check(path, pml_message_document());
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--write") == 0)
        return document_write(path, pml_message_document());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_what_it_accepts),
        cmocka_unit_test(names_what_is_wrong),
        cmocka_unit_test(bounds_size_and_depth),
        cmocka_unit_test(prints_what_it_reads),
        cmocka_unit_test(refuses_to_print_what_it_would_not_read),
        cmocka_unit_test(carries_arguments_and_parts),
        cmocka_unit_test(finds_the_id_of_a_wrong_request),
        cmocka_unit_test(tells_what_differs),
        cmocka_unit_test(roles_are_as_promised),
        cmocka_unit_test(fields_stand_under_their_message),
        cmocka_unit_test(document_is_current),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
