/* Connection files, and the addresses that share takes. */
#include <string.h>

#include "fuzz.h"
#include "pml/net/connection.h"
#include "pml/net/reach.h"

unsigned fuzz_accepted;

#define ENDS(array) (memchr((array), '\0', sizeof(array)) != NULL)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    pml_connection c;
    pml_error err = {0};
    pml_status status = pml_connection_parse((const char *)data, size, &c, &err);
    FUZZ_EXPECT((status == PML_OK) == (err.message[0] == '\0'));
    if (status == PML_OK) {
        fuzz_accepted++;
        FUZZ_EXPECT(ENDS(c.run) && ENDS(c.control) && ENDS(c.telemetry) && c.pid > 0);
        FUZZ_EXPECT(strlen(c.server_key) == PML_KEY_TEXT - 1);
        FUZZ_EXPECT(strlen(c.keys.public_key) == PML_KEY_TEXT - 1);
        FUZZ_EXPECT(c.role == PML_ROLE_VIEW || c.role == PML_ROLE_CONTROL);
    }
    char bind[300];
    pml_address address;
    snprintf(bind, sizeof bind, "%.*s", (int)(size < 299 ? size : 299), (const char *)data);
    if (pml_reach_parse(bind, &address, NULL) == PML_OK) {
        fuzz_accepted++;
        FUZZ_EXPECT(ENDS(address.host) && address.reach != PML_REACH_NOBODY);
        FUZZ_EXPECT(address.port >= 0 && address.port < 65535);
    }
    return 0;
}
