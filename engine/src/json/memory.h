/* Whether Jansson was refused memory in this thread: it does not always say so itself, and may call
 * a text that it had no memory to read invalid. */
#ifndef PML_JSON_MEMORY_H
#define PML_JSON_MEMORY_H

#include <stdbool.h>

void pmli_memory_watch(void);   /* from here on */
bool pmli_memory_refused(void); /* since then   */

#endif
