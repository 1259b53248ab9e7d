/* The C++ library that sdpa.cc is linked with statically asks for arc4random, which only C
 * libraries of 2022 and later have; with one of its own the object opens on older systems, too.
 * Seen by nobody outside of it (exports.map). */
#include <stdint.h>
#include <sys/random.h>

uint32_t arc4random(void);

uint32_t arc4random(void)
{
    uint32_t word = 0;
    while (getrandom(&word, sizeof word, 0) != (ssize_t)sizeof word)
        ; /* interrupted: so few bytes come whole or not at all */
    return word;
}
