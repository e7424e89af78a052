/* What an address is: cuPointerGetAttribute. */
#include "cuda_driver.h"

#include <string.h>

enum { /* CUpointer_attribute */
       ATTRIBUTE_CONTEXT = 1,
       ATTRIBUTE_MEMORY_TYPE = 2,
       ATTRIBUTE_DEVICE_POINTER = 3,
       ATTRIBUTE_HOST_POINTER = 4,
       ATTRIBUTE_BUFFER_ID = 7,
       ATTRIBUTE_IS_MANAGED = 8,
       ATTRIBUTE_DEVICE_ORDINAL = 9,
       ATTRIBUTE_IS_IPC_CAPABLE = 10,
       ATTRIBUTE_RANGE_START = 11,
       ATTRIBUTE_RANGE_BYTES = 12,
       ATTRIBUTE_IS_MAPPED = 13,
       ATTRIBUTE_POOL = 17,
};

typedef struct {
    region found;
    int is_known, is_device, device;
} pointer_facts;

static pointer_facts facts_of(uint64_t address) {
    pointer_facts facts = {.device = -1};
    driver_lock();
    const region *found = region_at(&regions, address);
    if (found) {
        facts.found = *found;
        facts.is_known = 1;
        facts.is_device = region_is_device(found);
        if (facts.is_device)
            facts.device = handle_record_of(found->handle)->device;
        else if (found->context)
            facts.device = found->context->device;
    }
    driver_unlock();
    return facts;
}

static CUresult answer(void *value, int attribute, uint64_t address, const pointer_facts *facts) {
    uint64_t wide = 0;
    size_t size = sizeof(uint64_t);
    switch (attribute) {
    case ATTRIBUTE_CONTEXT: wide = (uint64_t)facts->found.context; break;
    case ATTRIBUTE_MEMORY_TYPE:
        wide = facts->is_device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        size = sizeof(unsigned);
        break;
    case ATTRIBUTE_DEVICE_POINTER: wide = address; break;
    case ATTRIBUTE_HOST_POINTER:
        if (facts->is_device)
            return CUDA_ERROR_INVALID_VALUE;
        wide = address;
        break;
    case ATTRIBUTE_BUFFER_ID: wide = facts->found.id; break;
    case ATTRIBUTE_IS_MANAGED: size = sizeof(unsigned); break;
    case ATTRIBUTE_DEVICE_ORDINAL:
        wide = (uint64_t)(int64_t)facts->device;
        size = sizeof(int);
        break;
    case ATTRIBUTE_IS_IPC_CAPABLE:
        wide = facts->found.kind == REGION_ALLOCATED;
        size = sizeof(unsigned);
        break;
    case ATTRIBUTE_RANGE_START: wide = facts->found.base; break;
    case ATTRIBUTE_RANGE_BYTES: wide = facts->found.bytes; break;
    case ATTRIBUTE_IS_MAPPED:
        wide = (uint64_t)facts->is_known;
        size = sizeof(unsigned);
        break;
    case ATTRIBUTE_POOL: break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    memcpy(value, &wide, size); /* little-endian, as all our targets are */
    return CUDA_SUCCESS;
}

/* These have an answer for any address. */
static int needs_known(int attribute) {
    return attribute != ATTRIBUTE_IS_MAPPED && attribute != ATTRIBUTE_DEVICE_ORDINAL &&
           attribute != ATTRIBUTE_IS_MANAGED;
}

CUDA_EXPORT CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
    ENTER();
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    pointer_facts facts = facts_of(address);
    if (!facts.is_known && needs_known(attribute))
        return CUDA_ERROR_INVALID_VALUE;
    return answer(value, attribute, address, &facts);
}

/* Unlike the single form, this one succeeds on foreign addresses and says "nothing": 0, and device -2. */
CUDA_EXPORT CUresult cuPointerGetAttributes(unsigned count, const int *attributes, void **values,
                                            CUdeviceptr address) {
    ENTER();
    pointer_facts facts = facts_of(address);
    if (!facts.is_known)
        facts.device = -2;
    for (unsigned i = 0; i < count; i++) {
        if (!facts.is_known && attributes[i] == ATTRIBUTE_MEMORY_TYPE) {
            memset(values[i], 0, sizeof(unsigned));
            continue;
        }
        CUresult result = answer(values[i], attributes[i], address, &facts);
        if (result != CUDA_SUCCESS)
            return result;
    }
    return CUDA_SUCCESS;
}
