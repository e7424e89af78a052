/* CUDA_MPS_PINNED_DEVICE_MEM_LIMIT: how much device memory one client may take, as "0=1G,1=512M".
 *
 * As reported of the real one: it counts what the client allocates, not its context; it shows as free memory
 * and not as the device's size; and one entry that cannot be used makes all of them void, without a word. */
#include "cuda_driver.h"

#include <stdlib.h>
#include <string.h>

static uint64_t limits[DEVICE_MAX]; /* 0: none */

/* "0=1G," to device and bytes; the rest of the text, or NULL. */
static const char *read_entry(const char *text, uint64_t *device, uint64_t *bytes) {
    char *end;
    *device = strtoull(text, &end, 10);
    if (end == text || *end != '=' || *device >= host->device_count)
        return NULL;
    const char *number = end + 1;
    *bytes = strtoull(number, &end, 10);
    if (end == number || (*end != 'G' && *end != 'M'))
        return NULL;
    *bytes <<= *end++ == 'G' ? 30 : 20;
    end += *end == 'B';
    return *end == ',' ? end + 1 : *end ? NULL : end;
}

void mps_read_limits(void) {
    const char *text = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
    while (host->is_mps && text && *text) {
        uint64_t device, bytes;
        text = read_entry(text, &device, &bytes);
        if (text)
            limits[device] = bytes;
        else
            memset(limits, 0, sizeof limits);
    }
}

uint64_t mps_left(int device) {
    uint64_t taken_bytes = driver_process()->charged_bytes[device];
    if (!limits[device])
        return UINT64_MAX;
    return taken_bytes < limits[device] ? limits[device] - taken_bytes : 0;
}
