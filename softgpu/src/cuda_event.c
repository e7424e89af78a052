/* Events: a point in a stream, with the time at which the stream passed it. */
#include "cuda_driver.h"

#include <stdlib.h>

struct CUevent_st {
    unsigned flags;
    pthread_mutex_t mutex; /* guards all below */
    pthread_cond_t passed;
    int holders;        /* the client, and each queued operation */
    uint64_t recorded;  /* counts cuEventRecord */
    uint64_t completed; /* the highest of those that the stream has passed */
    uint64_t passed_ns;
};

void event_let_go(CUevent event) {
    pthread_mutex_lock(&event->mutex);
    int is_last = --event->holders == 0;
    pthread_mutex_unlock(&event->mutex);
    if (is_last)
        free(event);
}

void event_complete(CUevent event, uint64_t sequence) {
    pthread_mutex_lock(&event->mutex);
    if (sequence > event->completed) {
        event->completed = sequence;
        event->passed_ns = clock_ns();
    }
    pthread_cond_broadcast(&event->passed);
    pthread_mutex_unlock(&event->mutex);
}

void event_await(CUevent event, uint64_t sequence) {
    pthread_mutex_lock(&event->mutex);
    while (event->completed < sequence)
        pthread_cond_wait(&event->passed, &event->mutex);
    pthread_mutex_unlock(&event->mutex);
}

static uint64_t hold(CUevent event, int is_record) {
    pthread_mutex_lock(&event->mutex);
    event->holders++;
    uint64_t sequence = event->recorded += (uint64_t)is_record;
    pthread_mutex_unlock(&event->mutex);
    return sequence;
}

CUDA_EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
    ENTER_WITH_CONTEXT();
    if (!event)
        return CUDA_ERROR_INVALID_VALUE;
    CUevent created = calloc(1, sizeof *created);
    if (!created)
        return CUDA_ERROR_OPERATING_SYSTEM;
    created->flags = flags;
    created->holders = 1;
    pthread_mutex_init(&created->mutex, NULL);
    pthread_cond_init(&created->passed, NULL);
    *event = created;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuEventDestroy_v2(CUevent event) {
    ENTER();
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    event_let_go(event);
    return CUDA_SUCCESS;
}

static CUresult submit(CUevent event, CUstream stream, op_kind kind) {
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    uint64_t sequence = hold(event, kind == OP_RECORD);
    CUresult result = stream_submit(stream, (op){.kind = kind, .event = event, .sequence = sequence});
    if (result != CUDA_SUCCESS)
        event_let_go(event);
    return result;
}

CUDA_EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
    ENTER_WITH_CONTEXT();
    return submit(event, stream, OP_RECORD);
}

CUDA_EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
    (void)flags;
    return cuEventRecord(event, stream);
}

CUDA_EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    ENTER_WITH_CONTEXT();
    (void)flags;
    return submit(event, stream, OP_WAIT);
}

CUDA_EXPORT CUresult cuEventQuery(CUevent event) {
    ENTER();
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&event->mutex);
    int is_passed = event->completed == event->recorded;
    pthread_mutex_unlock(&event->mutex);
    return is_passed ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUDA_EXPORT CUresult cuEventSynchronize(CUevent event) {
    ENTER();
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&event->mutex);
    uint64_t sequence = event->recorded;
    pthread_mutex_unlock(&event->mutex);
    event_await(event, sequence);
    return driver_condition();
}

CUDA_EXPORT CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent start, CUevent end) {
    ENTER();
    if (!milliseconds || !start || !end || !start->recorded || !end->recorded)
        return CUDA_ERROR_INVALID_HANDLE;
    if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return CUDA_ERROR_INVALID_HANDLE;
    if (cuEventQuery(start) != CUDA_SUCCESS || cuEventQuery(end) != CUDA_SUCCESS)
        return CUDA_ERROR_NOT_READY;
    *milliseconds = (float)((double)(int64_t)(end->passed_ns - start->passed_ns) / 1e6);
    return CUDA_SUCCESS;
}
