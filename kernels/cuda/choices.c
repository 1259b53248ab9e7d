#include "choices.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pml/base/file.h"
#include "pml/base/hold.h"
#include "pml/base/log.h"

enum {
    WORDS = PMLI_CHOICE_KEY + PMLI_CHOICE_WORDS,
    LINE = 17 * (WORDS + 1), /* 16 digits and a space or the line's end each */
    MOST_LINES = 4096        /* a model has some dozens of products */
};

struct pmli_choices {
    char path[PATH_MAX]; /* "": nowhere */
    pmli_choice *known;
    size_t count, capacity;
};

static uint64_t sum_of(const pmli_choice *c)
{
    const unsigned char *bytes = (const unsigned char *)c;
    uint64_t sum = 0xcbf29ce484222325U;
    for (size_t i = 0; i < sizeof *c; i++)
        sum = (sum ^ bytes[i]) * 0x100000001b3U;
    return sum;
}

static bool remember(pmli_choices *choices, const pmli_choice *c)
{
    if (choices->count == choices->capacity) {
        size_t capacity = choices->capacity == 0 ? 64 : 2 * choices->capacity;
        pmli_choice *grown = realloc(choices->known, capacity * sizeof *grown);
        if (grown == NULL)
            return false;
        choices->known = grown;
        choices->capacity = capacity;
    }
    choices->known[choices->count++] = *c;
    return true;
}

/* line: LINE characters, the last one the line's end. */
static bool parse(const char *line, pmli_choice *c)
{
    uint64_t words[WORDS + 1];
    for (int i = 0; i <= WORDS; i++, line += 17) {
        words[i] = 0;
        for (int d = 0; d < 16; d++) {
            const char *digits = "0123456789abcdef", *at = strchr(digits, line[d]);
            if (line[d] == '\0' || at == NULL)
                return false;
            words[i] = words[i] << 4 | (uint64_t)(at - digits);
        }
        if (line[16] != (i < WORDS ? ' ' : '\n'))
            return false;
    }
    memcpy(c, words, sizeof *c);
    return sum_of(c) == words[WORDS];
}

static void read_all(pmli_choices *choices)
{
    char line[LINE + 2];
    int fd, bad = 0, lines = 0;
    pml_error err = PML_ERROR_INIT;
    pml_status status = pml_open(choices->path, O_RDONLY | O_NOFOLLOW, &fd, &err);
    if (status == PML_NOT_FOUND)
        return;
    FILE *file = status == PML_OK ? fdopen(fd, "r") : NULL;
    if (file == NULL) {
        if (status == PML_OK)
            close(fd);
        pml_log(PML_LOG_WARNING, "%s; products are timed again",
                status == PML_OK ? "no memory for kept times" : err.message);
        return;
    }
    while (lines++ < MOST_LINES && fgets(line, sizeof line, file) != NULL) {
        pmli_choice c;
        if (strlen(line) != LINE || !parse(line, &c))
            bad++;
        else if (!remember(choices, &c))
            break;
    }
    if (bad > 0)
        pml_log(PML_LOG_WARNING, "%s: %d lines are not what was written and are left out",
                choices->path, bad);
    fclose(file);
}

pmli_choices *pmli_choices_new(const char *folder, const char *device, int driver, size_t library)
{
    char name[64];
    size_t n = 0;
    for (; device[n] != '\0' && n + 1 < sizeof name; n++)
        name[n] = isalnum((unsigned char)device[n]) ? device[n] : '-';
    name[n] = '\0';
    pmli_choices *choices = calloc(1, sizeof *choices);
    if (choices == NULL || folder == NULL)
        return choices;
    if (snprintf(choices->path, sizeof choices->path, "%s/products-%d-%s-%d-%zu.txt", folder,
                 PMLI_CHOICE_SET, name, driver, library) >= (int)sizeof choices->path) {
        choices->path[0] = '\0';
        pml_log(PML_LOG_WARNING, "timed products are not kept in %.200s", folder);
        return choices;
    }
    pml_error err = PML_ERROR_INIT;
    if (pml_folder_make(folder, &err) != PML_OK)
        pml_log(PML_LOG_WARNING, "timed products: %s", err.message);
    read_all(choices);
    return choices;
}

void pmli_choices_destroy(pmli_choices **choices)
{
    if (*choices == NULL)
        return;
    free((*choices)->known);
    free(*choices);
    *choices = NULL;
}

const uint64_t *pmli_choices_find(const pmli_choices *choices, const int64_t key[PMLI_CHOICE_KEY])
{
    for (size_t i = choices->count; i-- > 0;) /* the last word about a product counts */
        if (memcmp(choices->known[i].key, key, sizeof choices->known[i].key) == 0)
            return choices->known[i].algorithm;
    return NULL;
}

const uint64_t *pmli_choices_near(const pmli_choices *choices, const int64_t key[PMLI_CHOICE_KEY],
                                  int place, int64_t most)
{
    const pmli_choice *nearest = NULL;
    int64_t wanted[PMLI_CHOICE_KEY];
    memcpy(wanted, key, sizeof wanted);
    for (size_t i = choices->count; i-- > 0;) {
        const pmli_choice *c = &choices->known[i];
        int64_t there = c->key[place];
        if (there <= key[place] || there > most ||
            (nearest != NULL && there >= nearest->key[place]))
            continue;
        wanted[place] = there;
        if (memcmp(c->key, wanted, sizeof wanted) == 0)
            nearest = c;
    }
    return nearest != NULL ? nearest->algorithm : NULL;
}

/* A line more of the file. */
static void append(const pmli_choices *choices, const pmli_choice *choice)
{
    uint64_t words[WORDS + 1];
    char line[LINE + 1];
    memcpy(words, choice, sizeof *choice);
    words[WORDS] = sum_of(choice);
    for (int i = 0; i <= WORDS; i++)
        snprintf(line + (ptrdiff_t)17 * i, 18, "%016" PRIx64 "%c", words[i],
                 i < WORDS ? ' ' : '\n');
    int file;
    pml_error err = PML_ERROR_INIT;
    if (pml_open(choices->path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW, &file, &err) ==
            PML_OK &&
        write(file, line, LINE) != LINE)
        PML_FAIL(&err, PML_IO, "cannot write %s: %s", choices->path, strerror(errno));
    if (err.code != PML_OK)
        pml_log(PML_LOG_WARNING, "%s; the next process times this product again", err.message);
    if (file >= 0)
        close(file);
}

void pmli_choices_keep(pmli_choices *choices, const pmli_choice *choice)
{
    remember(choices, choice); /* else it is timed once more */
    if (choices->path[0] != '\0')
        append(choices, choice);
}
