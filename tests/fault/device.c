#include "device.h"

#include <stdlib.h>

#include "pml/base/clock.h"
#include "pml/base/file.h"

const char device[] = "fake-device";
static char folder[] = "/tmp/pml-reserve-XXXXXX";

int device_setup(void **state)
{
    (void)state;
    return mkdtemp(folder) == NULL || setenv("FAKE_DEVICES", folder, 1) != 0;
}

int device_teardown(void **state)
{
    (void)state;
    unsetenv("FAKE_DEVICES");
    return pml_tree_remove("/tmp", folder + 5, NULL) != PML_OK;
}

const char *device_folder(void)
{
    return folder;
}

harness *device_start(int workers, const char *mib, const char *extra)
{
    setenv("FAKE_RESERVE_MIB", mib, 1);
    harness *h = harness_new(workers, FOR_EVER, extra);
    if (!harness_start(h, NULL))
        fail_msg("%s", h->error);
    return h;
}

size_t device_reserved(const char *name, size_t *pending)
{
    size_t n;
    pml_reserved sum;
    pml_error err = PML_ERROR_INIT;
    if (pml_reservation_look(folder, name, NULL, 0, &n, &sum, &err) != PML_OK)
        fail_msg("%s", err.message);
    *pending = sum.pending / MIB;
    return sum.others / MIB;
}

void device_wait(const char *name, size_t mib)
{
    size_t pending;
    for (double end = pml_clock_monotonic() + 240; device_reserved(name, &pending) != mib;) {
        if (pml_clock_monotonic() > end)
            fail_msg("%zu MiB are still reserved", device_reserved(name, &pending));
        pml_clock_sleep(0.002);
    }
}

pml_reservation *device_reserve(const char *name, size_t mib)
{
    pml_error err = PML_ERROR_INIT;
    pml_reservation *r = NULL;
    const pml_reservation_options options = {.folder = folder,
                                             .device = name,
                                             .run = "/runs/other",
                                             .total = 4000 * MIB,
                                             .inherited = -1};
    if (pml_reservation_new(&options, &r, &err) != PML_OK ||
        pml_reservation_turn(r, 240, NULL, NULL, &err) != PML_OK ||
        pml_reservation_resize(r, mib * MIB, &err) != PML_OK)
        fail_msg("%s", err.message);
    pml_reservation_turn_end(r);
    return r;
}

const char *device_reason(harness *h)
{
    return pml_message_string(harness_event(h, 0, PML_EVENT_state, "state", "failed", NULL),
                              "reason");
}
