/* Contexts. The first one of a process on a device costs device memory, as the real one does. */
#include "cuda_driver.h"

#include <stdlib.h>

enum { STACK_MAX = 32 };

static struct CUctx_st primaries[DEVICE_MAX];
static int context_counts[DEVICE_MAX]; /* live contexts of this process, primary and created */
static __thread CUcontext stack[STACK_MAX];
static __thread int depth;

void context_setup(void) {
    for (uint32_t i = 0; i < host->device_count; i++)
        primaries[i] = (struct CUctx_st){.device = (int)i, .is_primary = 1, .id = 100 + i};
}

CUcontext context_current(void) { return depth ? stack[depth - 1] : NULL; }
int context_is_destroyed(CUcontext context) {
    return __atomic_load_n(&context->is_destroyed, __ATOMIC_ACQUIRE);
}
CUcontext context_primary(int device) { return primaries[device].references > 0 ? &primaries[device] : NULL; }

/* With the driver lock held. */
static CUresult charge(int index) {
    if (device_is_lost(driver_device(index)) || host->devices[driver_device(index)].is_mig)
        return CUDA_ERROR_DEVICE_UNAVAILABLE;
    if (context_counts[index]++)
        return CUDA_SUCCESS;
    device *gpu = &host->devices[driver_device(index)];
    uint64_t started_ns = clock_ns(), bytes = gpu->context_bytes;
    host_lock();
    group_refresh(driver_process());
    int admitted = chunk_reserve(driver_device(index), driver_process(), bytes);
    if (admitted) {
        driver_process()->context_bytes[index] = bytes;
        gpu->used_bytes += bytes;
    }
    host_unlock();
    if (!admitted) {
        context_counts[index] = 0;
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    pay(CALL_CONTEXT_CREATE, started_ns, 0);
    return CUDA_SUCCESS;
}

/* With the driver lock held. Memory from cuMemAlloc goes with its context. */
static void dismantle(CUcontext context) {
    for (int i = regions.count - 1; i >= 0; i--)
        if (regions.items[i].kind == REGION_ALLOCATED && regions.items[i].context == context)
            allocation_free(&regions.items[i]);
    if (--context_counts[context->device])
        return;
    host_lock();
    process_record *process = driver_process();
    host->devices[driver_device(context->device)].used_bytes -= process->context_bytes[context->device];
    process->context_bytes[context->device] = 0;
    host_unlock();
}

CUDA_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice index) {
    ENTER();
    if (!context)
        return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    driver_lock();
    CUresult result = primaries[index].references ? CUDA_SUCCESS : charge(index);
    if (result == CUDA_SUCCESS) {
        primaries[index].references++;
        *context = &primaries[index];
    }
    driver_unlock();
    return result;
}

CUDA_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice index) {
    ENTER();
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    streams_finish(1);
    driver_lock();
    int was_active = primaries[index].references > 0;
    if (was_active && --primaries[index].references == 0)
        dismantle(&primaries[index]);
    driver_unlock();
    return was_active ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUDA_EXPORT CUresult cuDevicePrimaryCtxReset_v2(CUdevice index) {
    ENTER();
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    streams_finish(1);
    driver_lock();
    if (primaries[index].references)
        dismantle(&primaries[index]);
    primaries[index].references = 0;
    driver_unlock();
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice index, unsigned flags) {
    ENTER();
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    primaries[index].flags = flags;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice index, unsigned *flags, int *is_active) {
    ENTER();
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    if (flags)
        *flags = primaries[index].flags;
    if (is_active)
        *is_active = primaries[index].references > 0;
    return CUDA_SUCCESS;
}

static CUresult create(CUcontext *context, unsigned flags, CUdevice index) {
    if (!context)
        return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(index))
        return CUDA_ERROR_INVALID_DEVICE;
    if (depth == STACK_MAX)
        return CUDA_ERROR_INVALID_CONTEXT;
    CUcontext created = calloc(1, sizeof *created);
    if (!created)
        return CUDA_ERROR_OPERATING_SYSTEM;
    driver_lock();
    CUresult result = charge(index);
    *created = (struct CUctx_st){.device = index, .flags = flags, .id = driver_new_id()};
    driver_unlock();
    if (result != CUDA_SUCCESS) {
        free(created);
        return result;
    }
    stack[depth++] = *context = created;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxCreate_v2(CUcontext *context, unsigned flags, CUdevice index) {
    ENTER();
    return create(context, flags, index);
}

CUDA_EXPORT CUresult cuCtxCreate_v3(CUcontext *context, void *affinities, int count, unsigned flags,
                                    CUdevice index) {
    ENTER();
    (void)affinities, (void)count;
    return create(context, flags, index);
}

CUDA_EXPORT CUresult cuCtxCreate_v4(CUcontext *context, void *parameters, unsigned flags, CUdevice index) {
    ENTER();
    (void)parameters;
    return create(context, flags, index);
}

/* Its few bytes stay: it may be current in another thread, or stand deeper in a stack, and must be told
 * there. */
CUDA_EXPORT CUresult cuCtxDestroy_v2(CUcontext context) {
    ENTER();
    if (!context || context->is_primary)
        return CUDA_ERROR_INVALID_CONTEXT;
    streams_finish(1);
    driver_lock();
    int was_destroyed = context->is_destroyed;
    if (!was_destroyed)
        dismantle(context);
    __atomic_store_n(&context->is_destroyed, 1, __ATOMIC_RELEASE);
    driver_unlock();
    if (was_destroyed)
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (context_current() == context)
        depth--;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER();
    if (!context) {
        depth -= depth > 0;
        return CUDA_SUCCESS;
    }
    if (context_is_destroyed(context))
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (!depth)
        depth = 1;
    stack[depth - 1] = context;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER();
    if (!context)
        return CUDA_ERROR_INVALID_VALUE;
    *context = context_current();
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER();
    if (!context || depth == STACK_MAX)
        return CUDA_ERROR_INVALID_VALUE;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER_WITH_CONTEXT();
    depth--;
    if (context)
        *context = stack[depth];
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetDevice(CUdevice *index) {
    ENTER_WITH_CONTEXT();
    *index = context_current()->device;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetDevice_v2(CUdevice *index, CUcontext context) {
    ENTER();
    if (!context)
        context = context_current();
    if (!context)
        return CUDA_ERROR_INVALID_CONTEXT;
    *index = context->device;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetFlags(unsigned *flags) {
    ENTER_WITH_CONTEXT();
    *flags = context_current()->flags;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long *id) {
    ENTER();
    if (!context)
        context = context_current();
    if (!context)
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    *id = context->id;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version) {
    ENTER();
    (void)context;
    *version = 3020; /* what every driver since CUDA 3.2 answers */
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER_WITH_CONTEXT();
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuCtxSynchronize(void) {
    ENTER_WITH_CONTEXT();
    streams_finish(1);
    return driver_condition();
}

CUDA_EXPORT CUresult cuCtxSynchronize_v2(CUcontext context) {
    ENTER();
    (void)context;
    streams_finish(1);
    return driver_condition();
}
