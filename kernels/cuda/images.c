#include "images.h"

#include <string.h>

/* Machine code runs on its own generation, from its own minor number on. */
static bool runs_on(const pmli_image *image, int capability)
{
    if (image->exact)
        return image->capability == capability;
    if (image->machine_code)
        return image->capability / 10 == capability / 10 && image->capability <= capability;
    return image->capability <= capability;
}

const pmli_image *pmli_image_for(const char *family, int capability)
{
    const pmli_image *best = NULL;
    for (size_t i = 0; i < pmli_image_count; i++) {
        const pmli_image *image = &pmli_images[i];
        if (strcmp(image->family, family) != 0 || !runs_on(image, capability))
            continue;
        bool better = best == NULL || (image->machine_code && !best->machine_code) ||
                      (image->machine_code == best->machine_code &&
                       (image->capability > best->capability ||
                        (image->capability == best->capability && image->exact)));
        if (better)
            best = image;
    }
    return best;
}
