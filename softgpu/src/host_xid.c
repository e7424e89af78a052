/* Errors of a GPU: the XID event that NVML tells of, and what becomes of the contexts.
 *
 * Which contexts suffer is what NVIDIA's XID catalogue says; which CUDA result their calls then return is
 * documented for few of them, the others are marked. */
#include "cuda_results.h"
#include "host.h"

#define XID_EVENT 0x8ull
#define XID_LOST 79

typedef enum { ONE_PROCESS, WHOLE_DEVICE } scope;

static const struct {
    uint64_t number;
    scope suffers;
    CUresult result;
} effects[] = {
    {13, ONE_PROCESS, CUDA_ERROR_LAUNCH_FAILED},         /* graphics engine exception */
    {31, ONE_PROCESS, CUDA_ERROR_ILLEGAL_ADDRESS},       /* GPU memory page fault */
    {43, ONE_PROCESS, CUDA_ERROR_LAUNCH_FAILED},         /* GPU stopped processing; result unverified */
    {45, ONE_PROCESS, CUDA_ERROR_LAUNCH_FAILED},         /* preemptive cleanup; result unverified */
    {48, WHOLE_DEVICE, CUDA_ERROR_ECC_UNCORRECTABLE},    /* double bit ECC error */
    {74, WHOLE_DEVICE, CUDA_ERROR_NVLINK_UNCORRECTABLE}, /* NVLink error */
    {XID_LOST, WHOLE_DEVICE, CUDA_ERROR_UNKNOWN},        /* fallen off the bus; result unverified */
    {94, ONE_PROCESS, CUDA_ERROR_ECC_UNCORRECTABLE},     /* contained memory error */
    {95, WHOLE_DEVICE, CUDA_ERROR_ECC_UNCORRECTABLE},    /* uncontained memory error */
    {119, WHOLE_DEVICE, CUDA_ERROR_UNKNOWN},             /* GSP RPC timeout; result unverified */
    {120, WHOLE_DEVICE, CUDA_ERROR_UNKNOWN},             /* GSP error; result unverified */
};

void xid_raise(int device_index, uint64_t number) {
    host->events[host->event_count % EVENT_MAX] =
        (event_record){.type = XID_EVENT, .data = number, .device = (uint32_t)device_index};
    __atomic_store_n(&host->event_count, host->event_count + 1, __ATOMIC_RELEASE);
}

static void poison(process_record *process, int device_index, CUresult result) {
    if (process->is_used && process_own_bytes(process, device_index) && !process_is_away(process))
        __atomic_store_n(&process->poison[process_ordinal(process, device_index)], (uint32_t)result,
                         __ATOMIC_RELEASE);
}

/* Clients of one MPS server share a fate: a fatal error of one ends all of that device. What strikes a GPU
 * strikes its instances. */
static void poison_with_instances(process_record *process, int device_index, CUresult result) {
    for (int d = 0; d < (int)host->device_count; d++)
        if (d == device_index || mig_parent(d) == device_index)
            poison(process, d, result);
}

static void poison_all(int device_index, CUresult result) {
    for (int i = 0; i < PROCESS_MAX; i++)
        poison_with_instances(&host->processes[i], device_index, result);
}

/* Memory errors that cannot be corrected are counted as well. */
static int is_memory_error(uint64_t number) { return number == 48 || number == 94 || number == 95; }

int xid_strike(int device_index, uint64_t number, int process) {
    for (size_t i = 0; i < sizeof effects / sizeof *effects; i++) {
        if (effects[i].number != number)
            continue;
        if (number == XID_LOST)
            host->devices[device_index].is_lost = 1;
        if (effects[i].suffers == WHOLE_DEVICE || host->is_mps)
            poison_all(device_index, effects[i].result);
        else if (process >= 0)
            poison_with_instances(&host->processes[process], device_index, effects[i].result);
        else
            return -1;
        host->devices[device_index].ecc_error_count += (uint64_t)is_memory_error(number);
        return 0;
    }
    return -1;
}

/* What was there when it fell off is gone for good, also when the device comes back. */
void xid_lose(int device_index, int is_lost) {
    if (is_lost) {
        xid_raise(device_index, XID_LOST);
        xid_strike(device_index, XID_LOST, -1);
    }
    host->devices[device_index].is_lost = (uint32_t)is_lost;
}
