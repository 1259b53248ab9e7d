/* Requests made from the message table: whole and right ones, and bad ones by number. */
#ifndef PML_TESTS_BAD_REQUESTS_H
#define PML_TESTS_BAD_REQUESTS_H

#include <stddef.h>

#include "messages_table.h"

enum {
    BAD_ROOM = 1 << 18,
    BAD_FAULTS = 11 /* kinds of faults, in turn by the number */
};

typedef struct text {
    char bytes[BAD_ROOM];
    size_t n;
} text;

/* Behind what is there. */
void text_add(text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A value that the field can have. */
void good_value(text *t, const pmli_field *f);

/* Every request that the table has, but alive: their number, and which they are (message types). */
int requests_of_the_table(const int **types);

/* A request with one fault: a wrong type, range, depth, size, encoding, id, noise, a field too many
 * or too few, cut. The same one for a number in every process. */
void bad_request(text *t, int number);

#endif
