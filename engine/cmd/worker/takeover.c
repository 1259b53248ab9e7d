#include "takeover.h"

#include <limits.h>

#include "pml/base/log.h"
#include "pml/net/connection.h"
#include "pml/net/launch.h"

void take_over(const pml_message *start)
{
    char file[PATH_MAX];
    const char *program = pml_message_string(start, "coordinator");
    const char *folder = pml_message_string(start, "folder");
    if (program[0] == '\0')
        return;
    if (pml_runtime_find(folder, file, sizeof file, NULL) == PML_OK)
        return; /* another worker, or a person, was quicker */
    pml_error err = PML_ERROR_INIT;
    const pml_launch launch = {.program = program, .run_folder = folder, .recover = 1};
    pml_status status = pml_launch_coordinator(&launch, file, sizeof file, &err);
    if (status != PML_OK && status != PML_BUSY)
        pml_log(PML_LOG_ERROR, "cannot start another coordinator: %s", err.message);
    else
        pml_log(PML_LOG_INFO, "%s", status == PML_OK ? "another coordinator goes on" : err.message);
}
