#include "bad_requests.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { DEEP = 5000 };

static uint64_t chance = 0x9E3779B97F4A7C15U;

static uint32_t pick(uint32_t below) /* xorshift64*; below > 0 */
{
    chance ^= chance >> 12;
    chance ^= chance << 25;
    chance ^= chance >> 27;
    return (uint32_t)((chance * 0x2545F4914F6CDD1DU) >> 33) % below;
}

/* ---- text ---- */

static void add_bytes(text *t, const void *bytes, size_t n)
{
    assert_true(t->n + n <= BAD_ROOM);
    memcpy(t->bytes + t->n, bytes, n);
    t->n += n;
}

void text_add(text *t, const char *format, ...)
{
    char piece[1000];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(piece, sizeof piece, format, args);
    va_end(args);
    assert_true(n >= 0 && n < (int)sizeof piece);
    add_bytes(t, piece, (size_t)n);
}

static void repeat(text *t, const char *piece, size_t times)
{
    for (size_t i = 0; i < times; i++)
        add_bytes(t, piece, strlen(piece));
}

/* ---- values ---- */

void good_value(text *t, const pmli_field *f)
{
    double value = f->low > 1 ? f->low : f->high < 1 ? f->high : 1;
    switch (f->kind) {
    case PMLI_BOOL:
        text_add(t, "true");
        break;
    case PMLI_INT:
    case PMLI_NUMBER:
    case PMLI_FLOAT:
        text_add(t, "%.0f", value);
        break;
    case PMLI_ENUM:
        text_add(t, "\"%.*s\"", (int)strcspn(f->extra, " "), f->extra);
        break;
    case PMLI_STRING:
        text_add(t, "\"");
        repeat(t, "a", f->low < 1 ? 1 : (size_t)f->low);
        text_add(t, "\"");
        break;
    case PMLI_INTS:
        text_add(t, "[1]");
        break;
    case PMLI_RECORD: /* the required fields of the record */
        text_add(t, "{");
        for (const pmli_field *g = pmli_types[pmli_type_find(PML_CHANNEL_RECORD, f->extra)].fields;
             g->name != NULL; g++)
            if (g->required) {
                text_add(t, "%s\"%s\":", t->bytes[t->n - 1] == '{' ? "" : ",", g->name);
                good_value(t, g);
            }
        text_add(t, "}");
        break;
    default:
        fail_msg("no request has a field of kind %d", (int)f->kind);
    }
}

/* A value that the field cannot have: of another kind, or just outside its range. */
static void bad_value(text *t, const pmli_field *f)
{
    static const char *const others[] = {
        "null", "[[]]", "{\"a\":1}", "[null]", "[\"a\",{}]", "[1.5]", "[-1]", "[2147483648]",
    };
    bool number = f->kind == PMLI_INT || f->kind == PMLI_NUMBER || f->kind == PMLI_FLOAT;
    switch (pick(6)) {
    case 0: /* far or just outside */
        if (number)
            text_add(t, "%.17g", pick(2) ? f->high * 2 + 1 : f->low - 1);
        else if (f->kind == PMLI_STRING || f->kind == PMLI_ENUM) {
            text_add(t, "\"");
            repeat(t, "a", (size_t)f->high + 1);
            text_add(t, "\"");
        } else {
            text_add(t, "[");
            repeat(t, "1,", (size_t)f->high);
            text_add(t, "1]");
        }
        break;
    case 1: /* numbers that are none, or too large for one */
        text_add(t, "%s",
                 number ? (const char *[]){"\"NaN\"", "\"Infinity\"", "\"1\"", "true"}[pick(4)]
                        : "1.5");
        break;
    case 2:
        text_add(t, "%s", f->kind == PMLI_INT ? "9223372036854775807" : "false");
        break;
    default:
        text_add(t, "%s", others[pick(sizeof others / sizeof others[0])]);
    }
}

/* A value of this field that is no JSON, or not one that we read. */
static void broken_value(text *t)
{
    static const char *const pieces[] = {
        "\"\xff\xfe\"", "\"\xc3\"",    "\"\xed\xa0\x80\"",
        "\"\\ud800\"",  "\"\\u0000\"", "\"\xf4\x90\x80\x80\"",
        "\"\xc0\x80\"", "NaN",         "-",
        "1e999",        "'a'",         "\"\n\"",
        "01",           "+1",          "0x1",
        "\"\\x\"",      "Infinity",    "1.",
    };
    text_add(t, "%s", pieces[pick(sizeof pieces / sizeof pieces[0])]);
}

/* ---- requests ---- */

static int requests[PML_MESSAGE_COUNT], n_requests;

static void find_requests(void)
{
    n_requests = 0;
    for (int i = 0; i < PML_MESSAGE_COUNT; i++)
        if (pmli_types[i].channel == PML_CHANNEL_REQUEST && i != PML_REQUEST_alive)
            requests[n_requests++] = i;
}

static size_t fields_of(const pmli_type *type)
{
    size_t n = 0;
    while (type->fields[n].name != NULL)
        n++;
    return n;
}

typedef enum fault {
    FAULT_VALUE,
    FAULT_BROKEN,
    FAULT_MISSING,
    FAULT_UNKNOWN,
    FAULT_TWICE,
    FAULT_DEEP,
    FAULT_CUT,
    FAULT_TYPE,
    FAULT_ID,
    FAULT_LONG,
    FAULT_NOISE,
} fault;
_Static_assert(FAULT_NOISE + 1 == BAD_FAULTS, "a number is given to each fault");

/* One request with one fault; a field is hit where the fault is one of a field. */
static void make(text *t, const pmli_type *type, fault what, int number)
{
    size_t n = fields_of(type), hit = n == 0 ? 0 : pick((uint32_t)n);
    if (n == 0 && (what == FAULT_VALUE || what == FAULT_BROKEN || what == FAULT_MISSING))
        what = FAULT_UNKNOWN;
    t->n = 0;
    text_add(t, "{\"type\":\"");
    if (what == FAULT_TYPE)
        text_add(t, "%s",
                 (const char *[]){"applied", "step", "joined", "go", "commit", "shared", "Stop",
                                  "stop ", "", "welcome", "run"}[pick(11)]);
    else
        text_add(t, "%s", type->name);
    text_add(t, "\",\"id\":");
    if (what == FAULT_ID)
        text_add(t, "%s", (const char *[]){"1", "\"\"", "null", "[]", "{\"id\":\"x\"}"}[pick(5)]);
    else
        text_add(t, "\"bad-%d\"", number);
    for (size_t i = 0; i < n; i++) {
        const pmli_field *f = &type->fields[i];
        if (what == FAULT_MISSING && (f->required || type == &pmli_types[PML_REQUEST_set]))
            continue;
        text_add(t, ",\"%s\":", f->name);
        if (i == hit && what == FAULT_VALUE)
            bad_value(t, f);
        else if (i == hit && what == FAULT_BROKEN)
            broken_value(t);
        else
            good_value(t, f);
    }
    bool lacks = what != FAULT_MISSING;
    for (size_t i = 0; i < n; i++)
        lacks = lacks || type->fields[i].required;
    if (what == FAULT_UNKNOWN || (!lacks && type != &pmli_types[PML_REQUEST_set]))
        text_add(t, ",\"%s\":1",
                 (const char *[]){"x", "command", "Type", "id ", "__proto__"}[pick(5)]);
    if (what == FAULT_TWICE)
        text_add(t, ",\"type\":\"%s\"", type->name);
    if (what == FAULT_DEEP) {
        size_t levels = pick(2) ? 16 : DEEP;
        text_add(t, ",\"x\":");
        repeat(t, "[", levels);
        repeat(t, "]", levels);
    }
    if (what == FAULT_LONG) {
        text_add(t, ",\"x\":\"");
        repeat(t, "a", PML_REQUEST_MAX - t->n + pick(PML_MESSAGE_MAX - PML_REQUEST_MAX - 8));
        text_add(t, "\"");
    }
    text_add(t, "}");
    if (what == FAULT_CUT)
        t->n = 1 + pick((uint32_t)t->n - 1);
    if (what == FAULT_NOISE)
        for (uint32_t i = 0; i < 40; i++) /* enough that something breaks */
            t->bytes[pick((uint32_t)t->n)] = (char)pick(256);
}

int requests_of_the_table(const int **types)
{
    if (n_requests == 0)
        find_requests();
    *types = requests;
    return n_requests;
}

void bad_request(text *t, int number)
{
    const int *types;
    uint32_t n = (uint32_t)requests_of_the_table(&types);
    chance = 0x9E3779B97F4A7C15U * (2 * (uint64_t)number + 1);
    for (int i = 0; i < 4; i++)
        (void)pick(2);
    make(t, &pmli_types[types[pick(n)]], (fault)(number % BAD_FAULTS), number);
}
