/* Streams: a queue and a worker thread each. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <stdlib.h>
#include <sys/prctl.h>

struct CUstream_st {
    struct CUstream_st *next;
    CUcontext context;
    unsigned flags;
    int priority;
    int is_default; /* the legacy stream of its context's device */
    uint64_t id;
    int holders; /* under the driver lock; the last one frees it */
    pthread_t worker;
    pthread_mutex_t mutex; /* guards all below */
    pthread_cond_t work, idle;
    op *head, *tail;
    int is_busy, is_stopping;
    uint64_t done_ns; /* of the worker alone: when its last operation was over */
};

#define LAST_SPECIAL 2 /* 0 and 1 are the legacy stream, 2 the per-thread one, which softgpu treats alike */

static CUstream streams;
static CUstream defaults[DEVICE_MAX];

/* A copy that was queued behind another takes the link when that is done with it: that this thread woke up a
 * little later must not cost link time. */
static void run_copy(CUstream stream, const op *running) {
    uint64_t end_ns = stream->done_ns > running->submitted_ns ? stream->done_ns : running->submitted_ns;
    driver_fail(copy_from(running->target, running->source, running->bytes, &end_ns));
    if (running->is_corrupt)
        driver_fail(copy_corrupt(running->target, running->bytes));
    stream->done_ns = end_ns;
}

static void run(CUstream stream, const op *running) {
    switch (running->kind) {
    case OP_COPY: run_copy(stream, running); return;
    case OP_FILL:
        driver_fail(fill_bytes(running->target, running->value, running->width, running->bytes));
        break;
    case OP_RECORD:
        event_complete(running->event, running->sequence);
        event_let_go(running->event);
        return;
    case OP_WAIT:
        event_await(running->event, running->sequence);
        event_let_go(running->event);
        break;
    case OP_CALL: running->function(running->argument); break;
    }
    stream->done_ns = clock_ns();
}

static op *take(CUstream stream) {
    pthread_mutex_lock(&stream->mutex);
    while (!stream->head && !stream->is_stopping)
        pthread_cond_wait(&stream->work, &stream->mutex);
    op *taken = stream->head;
    if (taken) {
        stream->head = taken->next;
        stream->is_busy = 1;
    }
    if (!stream->head)
        stream->tail = NULL;
    pthread_mutex_unlock(&stream->mutex);
    return taken;
}

static void *work(void *argument) {
    CUstream stream = argument;
    driver_work_behind_the_gate();
    prctl(PR_SET_TIMERSLACK, 1000ul); /* wake up when the copy ends, not up to 50 us later */
    for (op *taken; (taken = take(stream)) != NULL; free(taken)) {
        run(stream, taken);
        pthread_mutex_lock(&stream->mutex);
        stream->is_busy = 0;
        __atomic_fetch_sub(&driver_process()->queued_ops, 1, __ATOMIC_SEQ_CST);
        if (!stream->head)
            pthread_cond_broadcast(&stream->idle);
        pthread_mutex_unlock(&stream->mutex);
    }
    return NULL;
}

/* With the driver lock held. */
static CUstream create(CUcontext context, unsigned flags, int priority) {
    CUstream stream = calloc(1, sizeof *stream);
    if (!stream)
        return NULL;
    *stream = (struct CUstream_st){.context = context, .flags = flags, .priority = priority, .holders = 1};
    stream->id = driver_new_id();
    pthread_mutex_init(&stream->mutex, NULL);
    pthread_cond_init(&stream->work, NULL);
    pthread_cond_init(&stream->idle, NULL);
    if (pthread_create(&stream->worker, NULL, work, stream)) {
        free(stream);
        return NULL;
    }
    stream->next = streams;
    streams = stream;
    return stream;
}

/* The stream that a client's handle means; NULL without a context to tell which default stream. */
static CUstream resolve(CUstream handle) {
    if ((uintptr_t)handle > LAST_SPECIAL)
        return handle;
    CUcontext context = context_current();
    if (!context)
        return NULL;
    driver_lock();
    CUstream *of_device = &defaults[context->device];
    if (!*of_device) {
        *of_device = create(context, 0, 0);
        if (*of_device)
            (*of_device)->is_default = 1;
    }
    driver_unlock();
    return *of_device;
}

static void let_go(CUstream stream) {
    driver_lock();
    int is_last = --stream->holders == 0;
    driver_unlock();
    if (is_last)
        free(stream);
}

static void drain(CUstream stream) {
    pthread_mutex_lock(&stream->mutex);
    while (stream->head || stream->is_busy)
        pthread_cond_wait(&stream->idle, &stream->mutex);
    pthread_mutex_unlock(&stream->mutex);
}

/* Holds them first: another thread may destroy one meanwhile. */
void streams_finish(int including_non_blocking) {
    int count = 0;
    driver_lock();
    for (CUstream stream = streams; stream; stream = stream->next)
        count++;
    CUstream *held = malloc(((size_t)count + 1) * sizeof *held);
    count = 0;
    for (CUstream stream = streams; held && stream; stream = stream->next) {
        if (!including_non_blocking && stream->flags & CU_STREAM_NON_BLOCKING)
            continue;
        stream->holders++;
        held[count++] = stream;
    }
    driver_unlock();
    for (int i = 0; i < count; i++) {
        drain(held[i]);
        let_go(held[i]);
    }
    free(held);
}

CUresult stream_submit(CUstream handle, op submitted) {
    CUstream stream = resolve(handle);
    op *queued = malloc(sizeof *queued);
    if (!stream || !queued) {
        free(queued);
        return stream ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_ERROR_INVALID_CONTEXT;
    }
    *queued = submitted;
    queued->next = NULL;
    queued->submitted_ns = clock_ns();
    __atomic_fetch_add(&driver_process()->queued_ops, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&stream->mutex);
    if (stream->tail)
        stream->tail->next = queued;
    else
        stream->head = queued;
    stream->tail = queued;
    pthread_cond_signal(&stream->work);
    pthread_mutex_unlock(&stream->mutex);
    return CUDA_SUCCESS;
}

CUresult stream_finish(CUstream handle) {
    CUstream stream = resolve(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (stream->is_default)
        streams_finish(0); /* the legacy stream waits for all blocking ones */
    drain(stream);
    return driver_condition();
}

CUstream stream_create(CUcontext context) {
    driver_lock();
    CUstream created = create(context, CU_STREAM_NON_BLOCKING, 0);
    driver_unlock();
    return created;
}

CUDA_EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
    ENTER_WITH_CONTEXT();
    if (!stream)
        return CUDA_ERROR_INVALID_VALUE;
    driver_lock();
    *stream = create(context_current(), flags, priority);
    driver_unlock();
    return *stream ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

CUDA_EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    return cuStreamCreateWithPriority(stream, flags, 0);
}

CUDA_EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER();
    if ((uintptr_t)stream <= LAST_SPECIAL)
        return CUDA_ERROR_INVALID_HANDLE;
    driver_lock();
    for (CUstream *link = &streams; *link; link = &(*link)->next) {
        if (*link != stream)
            continue;
        *link = stream->next;
        break;
    }
    driver_unlock();
    pthread_mutex_lock(&stream->mutex);
    stream->is_stopping = 1; /* after what is queued */
    pthread_cond_signal(&stream->work);
    pthread_mutex_unlock(&stream->mutex);
    pthread_join(stream->worker, NULL);
    let_go(stream);
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuStreamSynchronize(CUstream stream) {
    ENTER_WITH_CONTEXT();
    return stream_finish(stream);
}

CUDA_EXPORT CUresult cuStreamQuery(CUstream handle) {
    ENTER_WITH_CONTEXT();
    CUstream stream = resolve(handle);
    if (!stream)
        return CUDA_ERROR_OPERATING_SYSTEM;
    pthread_mutex_lock(&stream->mutex);
    int has_work = stream->head || stream->is_busy;
    pthread_mutex_unlock(&stream->mutex);
    return has_work ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

/* The plain questions, all of one form. */
#define STREAM_QUESTION(function, type, answer)                   \
    CUDA_EXPORT CUresult function(CUstream handle, type *value) { \
        ENTER_WITH_CONTEXT();                                     \
        CUstream stream = resolve(handle);                        \
        if (!stream || !value)                                    \
            return CUDA_ERROR_INVALID_VALUE;                      \
        *value = stream->answer;                                  \
        return CUDA_SUCCESS;                                      \
    }

STREAM_QUESTION(cuStreamGetFlags, unsigned, flags)
STREAM_QUESTION(cuStreamGetPriority, int, priority)
STREAM_QUESTION(cuStreamGetId, unsigned long long, id)
STREAM_QUESTION(cuStreamGetCtx, CUcontext, context)
STREAM_QUESTION(cuStreamGetDevice, CUdevice, context->device)

CUDA_EXPORT CUresult cuStreamGetCtx_v2(CUstream stream, CUcontext *context, void **green_context) {
    if (green_context)
        *green_context = NULL;
    return cuStreamGetCtx(stream, context);
}

CUDA_EXPORT CUresult cuStreamIsCapturing(CUstream stream, int *status) {
    ENTER();
    (void)stream;
    *status = 0;
    return CUDA_SUCCESS;
}

CUDA_EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void *argument) {
    ENTER_WITH_CONTEXT();
    if (!function)
        return CUDA_ERROR_INVALID_VALUE;
    return stream_submit(stream, (op){.kind = OP_CALL, .function = function, .argument = argument});
}

CUDA_EXPORT CUresult cuLaunchHostFunc_v2(CUstream stream, CUhostFn function, void *argument,
                                         unsigned sync_mode) {
    (void)sync_mode;
    return cuLaunchHostFunc(stream, function, argument);
}
