/* Messages on every channel. What is accepted can be printed, and what is printed is accepted. */
#include <string.h>

#include "fuzz.h"
#include "pml/json/messages.h"

unsigned fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char id[65];
    pml_message_find_id((const char *)data, size, id);
    FUZZ_EXPECT(memchr(id, '\0', sizeof id) != NULL);
    for (int channel = 0; channel < PML_CHANNEL_COUNT; channel++) {
        pml_error err = {0};
        pml_message *message = NULL, *again = NULL;
        pml_status status =
            pml_message_parse((pml_channel)channel, (const char *)data, size, &message, &err);
        FUZZ_EXPECT((status == PML_OK) == (message != NULL));
        if (status != PML_OK)
            continue;
        fuzz_accepted++;
        char *text = NULL;
        size_t length = 0;
        FUZZ_EXPECT(pml_message_print(message, &text, &length, &err) == PML_OK);
        FUZZ_EXPECT(pml_message_parse((pml_channel)channel, text, length, &again, &err) == PML_OK);
        free(text);
        pml_message_destroy(&again);
        pml_message_destroy(&message);
    }
    return 0;
}
