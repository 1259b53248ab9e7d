/* The event log's recovery: any bytes as they are, and the same lines each with the sum that it
 * should have, so that what lies behind the sums is reached too. What is kept is kept again. */
#include <string.h>

#include "eventlog_recover.h"
#include "fuzz.h"
#include "pml/json/sum.h"

unsigned fuzz_accepted;

typedef struct tally {
    int64_t lines, end;
} tally;

static pml_status count_line(void *user, int64_t end, pml_error *err)
{
    tally *t = user;
    (void)err;
    FUZZ_EXPECT(end > t->end);
    t->lines++;
    t->end = end;
    return PML_OK;
}

static void look(void *user, const pml_message *event)
{
    (void)user;
    FUZZ_EXPECT(pml_message_channel(pml_message_type_of(event)) == PML_CHANNEL_EVENT);
}

static pml_status recover(const char *text, size_t size, size_t *whole, tally *t)
{
    pml_error err = {0};
    recovered r = {
        .path = "events.jsonl", .seen = look, .line = count_line, .user = t, .timeline = -1};
    *t = (tally){0};
    pml_status status = eventlog_recover(&r, text, size, whole, &err);
    FUZZ_EXPECT(status == PML_OK || err.message[0] != '\0');
    return status;
}

static void twice(const char *text, size_t size)
{
    size_t whole = 0, again = 0;
    tally first, second;
    if (recover(text, size, &whole, &first) != PML_OK)
        return;
    FUZZ_EXPECT(whole <= size && (whole == 0 || text[whole - 1] == '\n'));
    FUZZ_EXPECT((size_t)first.end == whole);
    fuzz_accepted += first.lines > 0;
    FUZZ_EXPECT(recover(text, whole, &again, &second) == PML_OK);
    FUZZ_EXPECT(again == whole && second.lines == first.lines);
}

/* Each line that ends in } gets its sum; malloc'ed. */
static char *with_sums(const uint8_t *data, size_t size, size_t *length)
{
    char *out = malloc(size + (size + 1) * (PML_SUM_BYTES + 1) + 1);
    FUZZ_EXPECT(out != NULL);
    size_t n = 0;
    for (size_t at = 0; at < size;) {
        const uint8_t *end = memchr(data + at, '\n', size - at);
        size_t piece = end == NULL ? size - at : (size_t)(end - (data + at));
        char *line = malloc(piece + 1);
        FUZZ_EXPECT(line != NULL);
        memcpy(line, data + at, piece);
        line[piece] = '\0';
        size_t m = strlen(line);
        if (m > 2 && line[0] == '{' && line[m - 1] == '}')
            (void)pml_sum_add(&line, &m, NULL); /* refused: the line stays as it is */
        memcpy(out + n, line, m);
        n += m;
        free(line);
        if (end != NULL)
            out[n++] = '\n';
        at += piece + (end != NULL);
    }
    *length = n;
    out[n] = '\0';
    return out;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t n;
    char *copy = malloc(size + 1);
    FUZZ_EXPECT(copy != NULL);
    if (size > 0)
        memcpy(copy, data, size);
    copy[size] = '\0';
    twice(copy, size);
    free(copy);
    char *summed = with_sums(data, size, &n);
    twice(summed, n);
    free(summed);
    return 0;
}
