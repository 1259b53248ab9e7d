/* Whether Jansson was refused memory in this thread: it does not always say so itself, and may call
 * a text that it had no memory to read invalid. */
#ifndef PML_JSON_MEMORY_H
#define PML_JSON_MEMORY_H

#include <jansson.h>
#include <stdbool.h>

void pmli_memory_watch(void);   /* from here on */
bool pmli_memory_refused(void); /* since then   */

/* json_loadb, watched. NULL with *starved where memory was refused; without it the text is wrong,
 * and *why (may be NULL) says how. */
json_t *pmli_json_read(const char *text, size_t size, json_error_t *why, bool *starved);

#endif
