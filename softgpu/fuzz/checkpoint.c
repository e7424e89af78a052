/* Locking, checkpointing and restoring other workers, which may be killed in the midst of it, as may this one. */
#include "storage.h"
#include "worker.h"

static int some_peer(void) {
    pid_t pid = __atomic_load_n(&shared->pids[chance((uint64_t)shared->workers)], __ATOMIC_ACQUIRE);
    return pid == self.process ? 0 : pid;
}

/* The target died, is not there yet, or another worker was quicker. */
static int went_away(CUresult result) {
    self.answers++;
    return result == CUDA_ERROR_INVALID_VALUE || result == CUDA_ERROR_NOT_INITIALIZED ||
           result == CUDA_ERROR_ILLEGAL_STATE || result == CUDA_ERROR_NOT_READY;
}

static int lock(int pid) {
    CUcheckpointLockArgs arguments = {.timeoutMs = 1 + (unsigned)chance(5)};
    CUresult result = cuCheckpointProcessLock(pid, &arguments);
    return went_away(result) ? 0 : did(result);
}

static int unlock(int pid) {
    CUresult result = cuCheckpointProcessUnlock(pid, NULL);
    return went_away(result) ? 0 : did(result);
}

static int checkpoint(int pid) {
    CUresult result = cuCheckpointProcessCheckpoint(pid, NULL);
    return went_away(result) || result == CUDA_ERROR_NOT_SUPPORTED /* it shares memory */ ? 0 : did(result);
}

static int restore(int pid) {
    CUcheckpointGpuPair pairs[GPU_MAX];
    CUcheckpointRestoreArgs arguments = {.gpuPairs = pairs, .gpuPairsCount = chance(2) ? GPU_MAX : 0};
    for (int d = 0; d < GPU_MAX; d++)
        if (!did(cuDeviceGetUuid_v2(&pairs[d].oldUuid, d)) ||
            !did(cuDeviceGetUuid_v2(&pairs[d].newUuid, GPU_MAX - 1 - d)))
            return 0;
    CUresult result = cuCheckpointProcessRestore(pid, &arguments);
    return went_away(result) ? 0 : got_memory(result);
}

/* One step, from wherever it stands: so the work of a worker that was killed is taken up by another. */
static int move_a_peer(void) {
    int pid = some_peer(), state = STATE_RUNNING;
    if (!pid)
        return 0;
    CUresult result = cuCheckpointProcessGetState(pid, &state);
    if (went_away(result) || !did(result))
        return 0;
    switch (state) {
    case STATE_RUNNING: return lock(pid) && checkpoint(pid) && restore(pid) && unlock(pid);
    case STATE_LOCKED: return chance(2) ? unlock(pid) : checkpoint(pid);
    case STATE_CHECKPOINTED: return restore(pid) && unlock(pid);
    default: return 0;
    }
}

const operation_kind checkpoint_operations[] = {
    {"move a peer", move_a_peer, 4},
    {0},
};
