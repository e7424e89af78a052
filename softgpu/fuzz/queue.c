/* Streams, events, and copies that wait in them. */
#include "worker.h"

#include <string.h>
#include <unistd.h>

static int has_context(void) {
    CUcontext now = NULL;
    return cuCtxGetCurrent(&now) == CUDA_SUCCESS && now;
}

/* What is queued must be over before the memory that it uses is freed. A refusal comes before or after the wait,
 * so it is asked again. */
void settle_streams(void) {
    for (int i = 0; i < STREAM_MAX; i++) {
        if (!self.streams[i] || !self.is_pending[i])
            continue;
        while (cuStreamQuery(self.streams[i]) != CUDA_SUCCESS) {
            CUresult result = cuStreamSynchronize(self.streams[i]);
            CUcontext any = self.primary[0] ? self.primary[0] : self.primary[1];
            if (result == CUDA_ERROR_INVALID_CONTEXT && !any)
                break; /* nothing is left that a stream could use */
            if (result == CUDA_ERROR_INVALID_CONTEXT)
                cuCtxSetCurrent(any);
            else if (result != CUDA_SUCCESS)
                usleep(200); /* until a lost device is back */
        }
        self.is_pending[i] = 0;
    }
}

static int make_or_end_stream(void) {
    int i = (int)chance(STREAM_MAX);
    if (!has_context())
        return 0;
    if (!self.streams[i])
        return did(cuStreamCreate(&self.streams[i], chance(2) ? CU_STREAM_NON_BLOCKING : 0));
    if (!did(cuStreamDestroy_v2(self.streams[i]))) /* ends after what is queued */
        return 0;
    self.streams[i] = NULL;
    self.is_pending[i] = 0;
    return 1;
}

static int make_or_end_event(void) {
    int i = (int)chance(EVENT_LIMIT);
    if (!has_context())
        return 0;
    if (!self.events[i])
        return did(cuEventCreate(&self.events[i], 0));
    if (!did(cuEventDestroy_v2(self.events[i])))
        return 0;
    self.events[i] = NULL;
    return 1;
}

static block *own_block(uint64_t bytes) {
    block *candidate = &self.blocks[chance(BLOCK_MAX)];
    return candidate->address && !candidate->is_ipc && candidate->bytes >= bytes + STAMP_BYTES ? candidate : NULL;
}

static void count_call(void *argument) { __atomic_fetch_add((int *)argument, 1, __ATOMIC_RELAXED); }

/* In and out again through one stream; sometimes left waiting there. */
static int copy_in_stream(void) {
    int s = (int)chance(STREAM_MAX);
    uint64_t bytes = 1 + chance(BUFFER_BYTES / 2 - 1);
    block *row = own_block(bytes);
    if (!row || !self.streams[s] || !self.is_pinned || !has_context())
        return 0;
    settle_streams(); /* of the pinned memory's last user */
    unsigned char *out = self.pinned + BUFFER_BYTES / 2;
    uint64_t tag = next(&self.random), offset = STAMP_BYTES + chance(row->bytes - STAMP_BYTES - bytes + 1);
    fill_pattern(self.pinned, tag, bytes);
    memset(out, 0, bytes);
    self.is_pending[s] = 1;
    row->holds = (content){.is_written = 1, .offset = offset, .bytes = bytes, .tag = tag};
    if (!did(cuMemcpyHtoDAsync_v2(row->address + offset, self.pinned, bytes, self.streams[s])))
        return 0;
    if (chance(3) == 0)
        return 1;
    CUresult back = cuMemcpyDtoHAsync_v2(out, row->address + offset, bytes, self.streams[s]);
    CUresult over = cuStreamSynchronize(self.streams[s]);
    if (!did(back) || !did(over))
        return 0;
    if (memcmp(out, self.pinned, bytes))
        fail("a stream brought other bytes back");
    row->holds.is_known = 1;
    return 1;
}

static int fill_in_stream(void) {
    int s = (int)chance(STREAM_MAX);
    uint64_t bytes = 1 + chance(BUFFER_BYTES / 2 - 1);
    block *row = own_block(bytes);
    if (!row || !self.streams[s] || !has_context())
        return 0;
    settle_streams();
    self.is_pending[s] = 1;
    row->holds = (content){.is_written = 1, .is_fill = 1, .offset = STAMP_BYTES, .bytes = bytes, .tag = chance(256)};
    CUresult queued =
        cuMemsetD8Async(row->address + STAMP_BYTES, (unsigned char)row->holds.tag, bytes, self.streams[s]);
    CUresult over = cuStreamSynchronize(self.streams[s]);
    row->holds.is_known = did(queued) & did(over);
    return row->holds.is_known;
}

static int call_in_stream(void) {
    int s = (int)chance(STREAM_MAX);
    if (!self.streams[s] || !has_context())
        return 0;
    int before = __atomic_load_n(&self.host_calls, __ATOMIC_RELAXED);
    settle_streams();
    self.is_pending[s] = 1;
    if (!did(cuLaunchHostFunc(self.streams[s], count_call, &self.host_calls)))
        return 0;
    if (!did(cuStreamSynchronize(self.streams[s])))
        return 0;
    if (__atomic_load_n(&self.host_calls, __ATOMIC_RELAXED) == before)
        fail("a stream was over before its host function ran");
    return 1;
}

static int pass_event(void) {
    int s = (int)chance(STREAM_MAX), other = (int)chance(STREAM_MAX), e = (int)chance(EVENT_LIMIT);
    if (!self.streams[s] || !self.streams[other] || !self.events[e] || !has_context())
        return 0;
    self.is_pending[s] = self.is_pending[other] = 1;
    if (!did(cuEventRecord(self.events[e], self.streams[s])))
        return 0;
    if (!did(cuStreamWaitEvent(self.streams[other], self.events[e], 0)))
        return 0;
    if (!did(cuStreamSynchronize(self.streams[other])))
        return 0;
    CUresult passed = cuEventQuery(self.events[e]);
    return did(passed) && did(cuEventSynchronize(self.events[e]));
}

static int synchronise(void) { return has_context() && did(cuCtxSynchronize()); }

const operation_kind queue_operations[] = {
    {"make or end a stream", make_or_end_stream, 10},
    {"make or end an event", make_or_end_event, 10},
    {"copy in a stream", copy_in_stream, 120},
    {"fill in a stream", fill_in_stream, 60},
    {"call in a stream", call_in_stream, 8},
    {"pass an event", pass_event, 30},
    {"synchronise", synchronise, 5},
    {0},
};
