/* Events: a point in a stream, with the time at which the stream passed it. */
#include "cuda_driver.h"

#include <stdlib.h>
#include <string.h>

struct CUevent_st {
    unsigned flags;
    pthread_mutex_t mutex; /* guards all below */
    pthread_cond_t passed;
    int holders;        /* the client, and each queued operation */
    uint64_t recorded;  /* counts cuEventRecord */
    uint64_t completed; /* the highest of those that the stream has passed */
    uint64_t passed_ns;
    int shared; /* row of the host's table that takes the place of recorded and completed; -1: none */
};

static int shared_counts[SHARED_EVENT_MAX]; /* of this process's events for each row; under the host lock */

static void leave_shared(int row) {
    host_lock();
    if (!--shared_counts[row])
        shared_event_leave(row, own_process);
    host_unlock();
}

void event_let_go(CUevent event) {
    pthread_mutex_lock(&event->mutex);
    int is_last = --event->holders == 0;
    pthread_mutex_unlock(&event->mutex);
    if (!is_last)
        return;
    if (event->shared >= 0)
        leave_shared(event->shared);
    free(event);
}

void event_complete(CUevent event, uint64_t sequence) {
    if (event->shared >= 0) {
        shared_event_complete(event->shared, sequence);
        return;
    }
    pthread_mutex_lock(&event->mutex);
    if (sequence > event->completed) {
        event->completed = sequence;
        event->passed_ns = clock_ns();
    }
    pthread_cond_broadcast(&event->passed);
    pthread_mutex_unlock(&event->mutex);
}

void event_await(CUevent event, uint64_t sequence) {
    if (event->shared >= 0) {
        shared_event_await(event->shared, sequence);
        return;
    }
    pthread_mutex_lock(&event->mutex);
    while (event->completed < sequence)
        pthread_cond_wait(&event->passed, &event->mutex);
    pthread_mutex_unlock(&event->mutex);
}

/* The highest record so far. */
static uint64_t last_record(CUevent event) {
    if (event->shared >= 0)
        return __atomic_load_n(&host->shared_events[event->shared].recorded, __ATOMIC_ACQUIRE);
    pthread_mutex_lock(&event->mutex);
    uint64_t sequence = event->recorded;
    pthread_mutex_unlock(&event->mutex);
    return sequence;
}

static uint64_t hold(CUevent event, int is_record) {
    pthread_mutex_lock(&event->mutex);
    event->holders++;
    event->recorded += (uint64_t)is_record;
    pthread_mutex_unlock(&event->mutex);
    return event->shared >= 0 && is_record ? shared_event_record(event->shared, own_process)
                                           : last_record(event);
}

static CUevent new_event(unsigned flags) {
    CUevent created = calloc(1, sizeof *created);
    if (!created)
        return NULL;
    created->flags = flags;
    created->holders = 1;
    created->shared = -1;
    pthread_mutex_init(&created->mutex, NULL);
    pthread_cond_init(&created->passed, NULL);
    return created;
}

static int share(CUevent event) {
    host_lock();
    event->shared = shared_event_create(own_process);
    if (event->shared >= 0)
        shared_counts[event->shared] = 1;
    host_unlock();
    return event->shared < 0 ? -1 : 0;
}

CUDA_EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
    ENTER_WITH_CONTEXT();
    if (!event)
        return CUDA_ERROR_INVALID_VALUE;
    if (flags & CU_EVENT_INTERPROCESS && !(flags & CU_EVENT_DISABLE_TIMING))
        return CUDA_ERROR_INVALID_VALUE;
    CUevent created = new_event(flags);
    if (!created)
        return CUDA_ERROR_OPERATING_SYSTEM;
    if (flags & CU_EVENT_INTERPROCESS && share(created)) {
        free(created);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
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
    if (event->shared >= 0)
        return shared_event_has_passed(event->shared, last_record(event)) ? CUDA_SUCCESS
                                                                          : CUDA_ERROR_NOT_READY;
    pthread_mutex_lock(&event->mutex);
    int is_passed = event->completed == event->recorded;
    pthread_mutex_unlock(&event->mutex);
    return is_passed ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUDA_EXPORT CUresult cuEventSynchronize(CUevent event) {
    ENTER();
    if (!event)
        return CUDA_ERROR_INVALID_HANDLE;
    event_await(event, last_record(event));
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

/* ---- events across processes ---- */

#define TOKEN_MAGIC 0x54564553ull

typedef struct {
    uint64_t magic, row, id, name_space;
} token;

CUDA_EXPORT CUresult cuIpcGetEventHandle(CUipcEventHandle *exported, CUevent event) {
    ENTER();
    if (!exported || !event)
        return CUDA_ERROR_INVALID_VALUE;
    if (event->shared < 0)
        return CUDA_ERROR_INVALID_HANDLE; /* it was not made for that */
    token made = {TOKEN_MAGIC, (uint64_t)event->shared, host->shared_events[event->shared].id,
                  ipc_namespace()};
    memset(exported, 0, sizeof *exported);
    memcpy(exported, &made, sizeof made);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuIpcOpenEventHandle(CUevent *event, CUipcEventHandle exported) {
    ENTER_WITH_CONTEXT();
    token given;
    memcpy(&given, &exported, sizeof given);
    if (!event || given.magic != TOKEN_MAGIC || given.name_space != ipc_namespace())
        return CUDA_ERROR_INVALID_VALUE;
    CUevent opened = new_event(CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING);
    if (!opened)
        return CUDA_ERROR_OPERATING_SYSTEM;
    host_lock();
    int failed = shared_event_join((int)given.row, given.id, own_process);
    if (!failed)
        shared_counts[given.row]++;
    host_unlock();
    if (failed) {
        free(opened);
        return CUDA_ERROR_INVALID_VALUE;
    }
    opened->shared = (int)given.row;
    *event = opened;
    return CUDA_SUCCESS;
}
