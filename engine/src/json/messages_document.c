/* docs/messages.md, from the table. */
#include "messages_table.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const channel_titles[PML_CHANNEL_COUNT] = {
    [PML_CHANNEL_REQUEST] = "Requests: client to coordinator",
    [PML_CHANNEL_ANSWER] = "Answers: coordinator to client",
    [PML_CHANNEL_EVENT] = "Events: logged and published",
    [PML_CHANNEL_SIGNAL] = "Signals: published only",
    [PML_CHANNEL_ORDER] = "Orders: coordinator to worker",
    [PML_CHANNEL_REPORT] = "Reports: worker to coordinator",
    [PML_CHANNEL_LINE] = "Lines: standard output of data preparation",
    [PML_CHANNEL_FILE] = "Files",
    [PML_CHANNEL_RECORD] = "Records: parts of the others",
};

static void print_kind(FILE *out, const pmli_field *f)
{
    switch (f->kind) {
    case PMLI_BOOL:
        fputs("bool", out);
        break;
    case PMLI_INT:
        fprintf(out, "integer %.16g … %.16g", f->low, f->high);
        break;
    case PMLI_NUMBER:
        fprintf(out, "number %.16g … %.16g", f->low, f->high);
        break;
    case PMLI_FLOAT:
        fprintf(out, "number %.16g … %.16g, or NaN, Infinity, -Infinity as strings", f->low,
                f->high);
        break;
    case PMLI_STRING:
        fprintf(out, "string, %.16g to %.16g bytes", f->low, f->high);
        break;
    case PMLI_ENUM:
        fprintf(out, "one of %s", f->extra);
        break;
    case PMLI_INTS:
        fprintf(out, "%.16g to %.16g integers ≥ 0", f->low, f->high);
        break;
    case PMLI_STRINGS:
        fprintf(out, "%.16g to %.16g strings%s%s", f->low, f->high, *f->extra ? " of " : "",
                f->extra);
        break;
    case PMLI_RECORD:
        fprintf(out, "record %s", f->extra);
        break;
    case PMLI_RECORDS:
        fprintf(out, "%.16g to %.16g records %s", f->low, f->high, f->extra);
        break;
    case PMLI_OBJECT:
        fputs("object", out);
        break;
    case PMLI_EVENT:
        fputs("event without its stamp", out);
        break;
    case PMLI_EVENTS:
        fputs("events", out);
        break;
    case PMLI_ARGS:
        fputs("the fields of the request `verb`", out);
        break;
    case PMLI_KIND_COUNT:
        break;
    }
}

static void print_message(FILE *out, const pmli_type *t)
{
    fprintf(out, "\n### %s\n\n%s", t->name, t->sentence);
    if (t->channel == PML_CHANNEL_REQUEST)
        fprintf(out, " Role: %s.", (t->roles & PML_ROLE_VIEW) != 0 ? "control or view" : "control");
    fputs("\n", out);
    if (t->fields->name != NULL)
        fputs("\n| field | type | |\n|---|---|---|\n", out);
    for (const pmli_field *f = t->fields; f->name != NULL; f++) {
        fprintf(out, "| `%s`%s | ", f->name, f->required ? "" : "?");
        print_kind(out, f);
        fprintf(out, " | %s |\n", f->sentence);
    }
}

char *pml_message_document(void)
{
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL)
        return NULL;
    fprintf(
        out,
        "# Messages\n\n"
        "Printed from `engine/include/pml/json/messages.def` by `test_json_messages --write`; do "
        "not edit.\n[protocol.md](protocol.md) says in which order they are sent.\n\n"
        "A message has at most %d bytes (an event %d, a request %d) and %d levels. Requests and\n"
        "answers carry `type` and the fields of the record envelope, events `type` and those of\n"
        "the record stamp; the other channels `type`, files and records not even that. A `?`\n"
        "marks a field that may be absent.\n",
        PML_MESSAGE_MAX, PML_EVENT_MAX, PML_REQUEST_MAX, PML_MESSAGE_DEPTH);
    for (int channel = 0; channel < PML_CHANNEL_COUNT; channel++) {
        fprintf(out, "\n## %s\n", channel_titles[channel]);
        for (int i = 0; i < PML_MESSAGE_COUNT; i++)
            if (pmli_types[i].channel == (pml_channel)channel)
                print_message(out, &pmli_types[i]);
    }
    bool failed = ferror(out) != 0;
    if (fclose(out) != 0 || failed) {
        free(text);
        return NULL;
    }
    return text;
}
