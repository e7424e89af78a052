/* Multi-instance GPUs: each instance is a device of its own, with its part of the memory; its GPU takes no
 * context any more. Instances are made with the host and stay: what making them costs is not modelled. */
#include "host.h"

int mig_parent(int device_index) {
    uint32_t parent = host->devices[device_index].mig_parent;
    return parent ? (int)parent - 1 : device_index;
}

/* An instance goes with its GPU. */
int device_is_lost(int device_index) { return host->devices[mig_parent(device_index)].is_lost != 0; }
