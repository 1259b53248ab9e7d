#include "left.h"

#include "pml/base/clock.h"
#include "pml/train/slots.h"
#include "saver.h"

static pml_status save(saver *s, const pml_train_state *state, pml_error *err)
{
    const double end = pml_clock_monotonic() + SAVER_PATIENCE;
    for (;;) {
        pml_status status = saver_save(s, state, "", 0, err);
        if (status == PML_OK)
            status = saver_wait(s, err);
        if (status != PML_IO || pml_clock_monotonic() >= end)
            return status;
        pml_clock_sleep(1);
    }
}

static pml_status save_view(const job_kind *kind, const pml_message *start, const pml_message *run,
                            worker_link *link, const pml_slot_view *view, pml_error *err)
{
    static pml_train_state state; /* too large for comfort on a stack */
    const char *folder = pml_message_string(start, "folder");
    const job_setup setup = {.folder = folder,
                             .run = run,
                             .rank = (int)pml_message_int(start, "rank"),
                             .kept = view->state,
                             .payload = view->payload,
                             .payload_bytes = view->bytes};
    job *j = NULL;
    keeper *kept = NULL;
    saver *s = NULL;
    state = *view->state;
    state.timeline = pml_message_int(start, "timeline");
    pml_status status = kind->open_left(&setup, &j, err);
    if (status == PML_OK)
        status = keeper_of_left(view->payload, &kept, err);
    if (status == PML_OK)
        status = saver_new(kind, j, kept, link, folder, NULL, "", &s, err);
    if (status == PML_OK)
        status = save(s, &state, err);
    saver_destroy(&s);
    keeper_destroy(&kept);
    if (j != NULL)
        kind->close(&j);
    return status;
}

pml_status left_save(const job_kind *kind, const pml_message *start, const pml_message *run,
                     worker_link *link, int slots, pml_error *err)
{
    pml_slot_view view;
    pml_status status = pml_slots_map(slots, (int)pml_message_int(start, "slot"), &view, err);
    if (status != PML_OK)
        return status;
    int64_t step = view.state->step;
    link_set_step(link, step);
    status = save_view(kind, start, run, link, &view, err);
    pml_slots_unmap(&view);
    if (status != PML_OK)
        return status;
    pml_message *stopped = pml_message_new(PML_REPORT_turn);
    pml_message_set_string(stopped, "state", "stopped");
    pml_message_set_int(stopped, "step", step);
    link_report(link, stopped);
    return PML_OK;
}
