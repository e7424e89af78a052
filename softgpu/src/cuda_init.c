/* Starting the driver in this process, and the door every call goes through. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <string.h>
#include <sys/resource.h>

int own_process = -1;
pthread_mutex_t driver_mutex = PTHREAD_MUTEX_INITIALIZER;

static int is_ready, is_forked_child;
static int sticky_failure;
static uint64_t last_id = 1000;
static __thread int nesting; /* of calls that passed the gate */

void driver_lock(void) { pthread_mutex_lock(&driver_mutex); }
void driver_unlock(void) { pthread_mutex_unlock(&driver_mutex); }
uint64_t driver_new_id(void) { return ++last_id; }
process_record *driver_process(void) { return &host->processes[own_process]; }
int driver_device(int ordinal) { return process_device(driver_process(), ordinal); }
void driver_work_behind_the_gate(void) { nesting++; }
int is_device(CUdevice candidate) { return candidate >= 0 && candidate < (int)host->device_count; }

/* A forked child has no streams, no liveness lock and no right to its parent's memory: CUDA calls it
 * uninitialised. */
static void become_forked_child(void) {
    is_forked_child = 1;
    handles_close_after_fork();
}

/* Each handle is a descriptor, so a process with thousands of chunks needs thousands. */
static void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* With the driver lock held. */
int driver_attach(void) {
    if (own_process >= 0)
        return is_forked_child ? -1 : 0;
    if (host_attach())
        return -1;
    host_lock();
    own_process = process_enter();
    host_unlock();
    return own_process < 0 ? -1 : 0;
}

static CUresult start(void) {
    if (host_attach() || !host->device_count)
        return CUDA_ERROR_NO_DEVICE;
    if (driver_attach())
        return CUDA_ERROR_OPERATING_SYSTEM;
    host_lock();
    driver_process()->is_client = 1;
    host_unlock();
    raise_descriptor_limit();
    mps_read_limits();
    context_setup();
    pthread_atfork(NULL, NULL, become_forked_child);
    is_ready = 1;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuInit(unsigned flags) {
    if (flags)
        return CUDA_ERROR_INVALID_VALUE;
    if (is_forked_child)
        return CUDA_ERROR_NOT_INITIALIZED;
    driver_lock();
    CUresult result = is_ready ? CUDA_SUCCESS : start();
    driver_unlock();
    return result == CUDA_SUCCESS ? (CUresult)fault_code(__func__) : result;
}

/* A call within a call, or within queued work, is part of what already passed the gate. */
driver_call driver_enter(const char *function) {
    if (!is_ready || is_forked_child)
        return (driver_call){.result = CUDA_ERROR_NOT_INITIALIZED};
    if (!nesting++)
        gate_enter(driver_process());
    CUresult injected = (CUresult)fault_code(function);
    return (driver_call){.result = injected ? injected : driver_condition(), .is_counted = 1};
}

void driver_leave(const driver_call *call) {
    if (call->is_counted && !--nesting)
        gate_leave(driver_process());
}

CUresult driver_condition(void) {
    CUcontext context = context_current();
    if (context && device_is_lost(driver_device(context->device)))
        return CUDA_ERROR_UNKNOWN;
    uint32_t poison =
        context ? __atomic_load_n(&driver_process()->poison[context->device], __ATOMIC_ACQUIRE) : 0;
    if (poison)
        return (CUresult)poison;
    if (mps_has_ended(driver_process()))
        return CUDA_ERROR_MPS_CLIENT_TERMINATED;
    if (checkpoint_state(driver_process()) == STATE_FAILED)
        return CUDA_ERROR_UNKNOWN;
    return (CUresult)__atomic_load_n(&sticky_failure, __ATOMIC_ACQUIRE);
}

void driver_fail(CUresult failure) {
    if (failure == CUDA_ERROR_INVALID_VALUE)
        failure = CUDA_ERROR_ILLEGAL_ADDRESS; /* the arguments were good when the work was queued */
    if (failure != CUDA_SUCCESS)
        __atomic_store_n(&sticky_failure, failure, __ATOMIC_RELEASE);
}

CUDA_EXPORT CUresult cuDriverGetVersion(int *version) {
    if (!version)
        return CUDA_ERROR_INVALID_VALUE;
    if (host_attach())
        return CUDA_ERROR_NO_DEVICE;
    *version = (int)host->driver_version;
    return CUDA_SUCCESS;
}

#define RESULT_CASE_NAME(number, name, text) \
    case number: *string = #name; return CUDA_SUCCESS;
#define RESULT_CASE_TEXT(number, name, text) \
    case number: *string = text; return CUDA_SUCCESS;

CUDA_EXPORT CUresult cuGetErrorName(CUresult result, const char **string) {
    switch ((int)result) { CUDA_RESULTS(RESULT_CASE_NAME) }
    *string = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

CUDA_EXPORT CUresult cuGetErrorString(CUresult result, const char **string) {
    switch ((int)result) { CUDA_RESULTS(RESULT_CASE_TEXT) }
    *string = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}
