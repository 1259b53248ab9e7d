/* Drives a fuzz target without a fuzzer: every seed as it is, cut at every length, and then
 * ROUNDS mutations of each, the same in every run. It finds less than libFuzzer does, and it runs
 * in every build, under every sanitizer, in a second.
 *
 *   fuzz_x FOLDER [ROUNDS]
 *
 * A seed must be accepted, or it tests nothing; found-… are inputs that broke something once, and
 * need not be. */
#include <dirent.h>
#include <string.h>

#include "fuzz.h"

enum { MAX_SEED = 1 << 16, ROOM = MAX_SEED + 64 };

static uint64_t state = 0x9E3779B97F4A7C15U;

static uint32_t pick(uint32_t below) /* xorshift64*; below > 0 */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545F4914F6CDD1DU) >> 33) % below;
}

/* One small damage, of the kinds that parsers trip over. Returns the new size. */
static size_t mutate(uint8_t *b, size_t n)
{
    static const char *const words[] = {"-1",  "1e999", "9223372036854775808",
                                        "0",   "{",     "[",
                                        "\"",  "null",  "\\u0000",
                                        "}",   "]",     ",",
                                        "NaN", "true",  "18446744073709551615"};
    size_t at = n > 0 ? pick((uint32_t)n) : 0;
    switch (pick(5)) {
    case 0: /* one bit */
        if (n > 0)
            b[at] ^= (uint8_t)(1U << pick(8));
        return n;
    case 1: /* one byte */
        if (n > 0)
            b[at] = (uint8_t)pick(256);
        return n;
    case 2: { /* a piece goes */
        size_t gone = n > 0 ? 1 + pick((uint32_t)(n - at < 16 ? n - at : 16)) : 0;
        memmove(b + at, b + at + gone, n - at - gone);
        return n - gone;
    }
    case 3: { /* a piece comes twice */
        size_t more = n - at < 32 ? n - at : 32;
        if (n + more > ROOM)
            return n;
        memmove(b + at + more, b + at, n - at);
        return n + more;
    }
    default: { /* a word over what stands there */
        const char *word = words[pick(sizeof words / sizeof *words)];
        size_t length = strlen(word);
        if (at + length > ROOM)
            return n;
        memcpy(b + at, word, length);
        return at + length > n ? at + length : n;
    }
    }
}

/* A copy of exactly n bytes, so that a read past the end is seen. */
static void once(const uint8_t *b, size_t n)
{
    uint8_t *copy = malloc(n + (n == 0));
    FUZZ_EXPECT(copy != NULL);
    if (n > 0)
        memcpy(copy, b, n);
    LLVMFuzzerTestOneInput(copy, n);
    free(copy);
}

static void drive(const uint8_t *seed, size_t n, long rounds)
{
    static uint8_t work[ROOM];
    for (size_t cut = n <= 4096 ? 0 : n - 4096; cut <= n; cut++)
        once(seed, cut);
    for (long round = 0; round < rounds; round++) {
        memcpy(work, seed, n);
        size_t size = n;
        for (uint32_t k = 1 + pick(4); k > 0; k--)
            size = mutate(work, size);
        once(work, size);
    }
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s FOLDER [ROUNDS]\n", argv[0]);
        return 2;
    }
    long rounds = argc > 2 ? strtol(argv[2], NULL, 10) : 2000;
    DIR *folder = opendir(argv[1]);
    if (folder == NULL) {
        perror(argv[1]);
        return 2;
    }
    static uint8_t seed[MAX_SEED];
    int seeds = 0, stale = 0;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "rb");
        if (file == NULL)
            continue;
        size_t n = fread(seed, 1, sizeof seed, file);
        fclose(file);
        unsigned before = fuzz_accepted;
        once(seed, n);
        if (fuzz_accepted == before && strncmp(entry->d_name, "found-", 6) != 0) {
            fprintf(stderr, "%s: the seed is refused; it tests nothing\n", path);
            stale++;
        }
        drive(seed, n, rounds);
        seeds++;
    }
    closedir(folder);
    printf("%d seeds, %ld mutations each\n", seeds, rounds);
    return seeds > 0 && stale == 0 ? 0 : 2; /* nothing tried is not a pass */
}
