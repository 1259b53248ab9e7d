#include "states.h"

#include <stdio.h>
#include <stdlib.h>

const pml_message_type states_verbs[VERBS] = {
    PML_REQUEST_pause,      PML_REQUEST_resume,   PML_REQUEST_stop,  PML_REQUEST_set,
    PML_REQUEST_checkpoint, PML_REQUEST_evaluate, PML_REQUEST_sample};

typedef struct row {
    const char *state, *when;
    action actions[VERBS];
} row;

static const row rows[SITUATIONS] = {
#define ROW(name, state, when, pause, resume, stop, set, checkpoint, evaluate, sample)             \
    [IN_##name] = {state,                                                                          \
                   when,                                                                           \
                   {ACT_##pause, ACT_##resume, ACT_##stop, ACT_##set, ACT_##checkpoint,            \
                    ACT_##evaluate, ACT_##sample}},
#include "states.def"
#undef ROW
};

static const struct {
    const char *word, *meaning;
} words[] = {
    [ACT_QUEUE] = {"queue", "accepted; in force from the first step that is made"},
    [ACT_APPLY] = {"apply",
                   "accepted; at the next safe point, on all workers at the same step; one that "
                   "changes nothing (a pause of a paused run) is applied too"},
    [ACT_END] = {"end", "accepted, and the run is stopped at once: nothing is there to be saved"},
    [ACT_RELEASE] = {"release", "accepted; the workers end, and the run stays what it is"},
    [ACT_REFUSE] = {"refuse", "an error `busy` that says why; no event and no number"},
};

action states_action(situation in, pml_message_type verb)
{
    for (int v = 0; v < VERBS; v++)
        if (states_verbs[v] == verb)
            return rows[in].actions[v];
    return ACT_REFUSE;
}

const char *states_name(situation in)
{
    return rows[in].state;
}

char *states_document(void)
{
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL)
        return NULL;
    fputs("# States and commands\n\n"
          "Made from `engine/cmd/coordinator/states.def`, by which the coordinator acts. A command "
          "that is accepted may still\n"
          "be refused by the workers for what it asks (`evaluate` without held-out data, a prompt "
          "longer than planned), and an\n"
          "`evaluate` or `sample` is broken off by a stop that comes meanwhile: then a `refused` "
          "event says why. A repeated id gets its first answer in every state.\n\n"
          "| state | when |",
          out);
    for (int v = 0; v < VERBS; v++)
        fprintf(out, " %s |", pml_message_name(states_verbs[v]));
    fputs("\n|---|---|", out);
    for (int v = 0; v < VERBS; v++)
        fputs("---|", out);
    fputc('\n', out);
    for (int s = 0; s < SITUATIONS; s++) {
        fprintf(out, "| %s | %s |", rows[s].state, rows[s].when);
        for (int v = 0; v < VERBS; v++)
            fprintf(out, " %s |", words[rows[s].actions[v]].word);
        fputc('\n', out);
    }
    fputc('\n', out);
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        fprintf(out, "- **%s**: %s.\n", words[i].word, words[i].meaning);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}
