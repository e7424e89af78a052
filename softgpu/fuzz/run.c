/* The parent of a random run: starts workers, kills them, breaks things, and checks the host between. */
#define _GNU_SOURCE
#include "worker.h"

#include "../src/host.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

board *shared;

enum { LOST_OPERATIONS = 300 };
#define PATIENCE_NS 60000000000ull
#define LOST_NS 50000000ull
#define ALL_LOCKED_NS 300000000ull

static struct {
    pid_t pids[WORKER_MAX];
    uint64_t lives[WORKER_MAX];
    uint64_t kills, stepped_kills, orderly_ends, epochs, findings, faults, losses;
    generator random;
    uint64_t operations_of_the_dead;
} run;

static void start_worker(int number) {
    shared->is_waiting[number] = 0;
    shared->is_stepping[number] = 0;
    pid_t child = start_child();
    if (!child) {
        worker_run(number, run.lives[number]);
        _exit(0);
    }
    run.pids[number] = shared->pids[number] = child;
    run.lives[number]++;
}

static void bury(int number, int status) {
    run.pids[number] = shared->pids[number] = 0;
    run.operations_of_the_dead += shared->operations[number];
    shared->operations[number] = 0;
    int is_stepped = WIFSIGNALED(status) && shared->is_stepping[number];
    run.stepped_kills += is_stepped;
    /* Where the C library blocks all signals (starting a thread), the kernel answers a step with a fatal SIGTRAP. */
    int is_killed = WIFSIGNALED(status) &&
                    (WTERMSIG(status) == SIGKILL || (is_stepped && WTERMSIG(status) == SIGTRAP));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        run.orderly_ends++;
    } else if (!is_killed) {
        if (!__atomic_exchange_n(&shared->has_failed, 1, __ATOMIC_ACQ_REL))
            snprintf(shared->failure, sizeof shared->failure, "worker %d, life %llu: ended with status 0x%x", number,
                     (unsigned long long)run.lives[number] - 1, (unsigned)status);
    }
}

static void kill_worker(int number) {
    int status;
    kill(run.pids[number], SIGKILL);
    while (waitpid(run.pids[number], &status, __WALL) < 0 && errno == EINTR) {
    }
    bury(number, status);
}

/* Takes note of all that have ended. */
static void look_after_workers(int is_restarting, int workers) {
    for (int i = 0; i < workers; i++) {
        int status;
        if (run.pids[i] && waitpid(run.pids[i], &status, WNOHANG) > 0)
            bury(i, status);
        if (!run.pids[i] && is_restarting)
            start_worker(i);
    }
}

static const process_record *row_of(pid_t pid) {
    for (int p = 0; p < PROCESS_MAX; p++)
        if (host->processes[p].is_used && host->processes[p].pid == pid)
            return &host->processes[p];
    return NULL;
}

/* Locked or checkpointed, its next call waits until somebody lets it go on; failed, all its calls fail. */
static int cannot_go_on(int number) {
    const process_record *row = run.pids[number] ? row_of(run.pids[number]) : NULL;
    return row && checkpoint_state(row) != STATE_RUNNING;
}

static void kill_failed(int workers) {
    for (int i = 0; i < workers; i++) {
        const process_record *row = run.pids[i] ? row_of(run.pids[i]) : NULL;
        if (row && checkpoint_state(row) == STATE_FAILED)
            kill_worker(i);
    }
}

/* While the others stand still, nobody would let it go on. */
static void kill_locked(int workers) {
    for (int i = 0; i < workers; i++)
        if (!shared->is_waiting[i] && cannot_go_on(i))
            kill_worker(i);
}

static int are_all_waiting(int workers) {
    for (int i = 0; i < workers; i++)
        if (run.pids[i] && !__atomic_load_n(&shared->is_waiting[i], __ATOMIC_ACQUIRE))
            return 0;
    return 1;
}

static void set_failure(const char *text) {
    if (!__atomic_exchange_n(&shared->has_failed, 1, __ATOMIC_ACQ_REL))
        snprintf(shared->failure, sizeof shared->failure, "%s", text);
}

static void set_hang(const char *text) {
    print_hang();
    set_failure(text);
}

static void return_lost_devices(void) {
    for (uint32_t d = 0; d < host->device_count; d++)
        host->devices[d].is_lost = 0;
}

static void mend_devices(void) {
    host_lock();
    return_lost_devices();
    memset(host->faults, 0, sizeof host->faults);
    host->fault_count = 0;
    host_unlock();
}

/* All stand still between two operations: every rule must hold, the strict ones too. */
static void epoch(int workers) {
    char when[64];
    snprintf(when, sizeof when, "after epoch %llu", (unsigned long long)++run.epochs);
    mend_devices();
    __atomic_store_n(&shared->is_paused, 1, __ATOMIC_RELEASE);
    patience left;
    patience_renew(&left);
    for (int round = 0; !are_all_waiting(workers) && !shared->has_failed; round++) {
        look_after_workers(0, workers);
        if (round % 500 == 499)
            kill_locked(workers);
        usleep(200);
        if (patience_is_over(&left, PATIENCE_NS))
            set_hang("a worker hangs: it does not come to the end of its operation");
    }
    if (!shared->has_failed)
        run.findings += (uint64_t)check_host(1, when);
    __atomic_store_n(&shared->is_paused, 0, __ATOMIC_RELEASE);
}

static const char *const breakable[] = {"cuMemAlloc",
                                        "cuMemFree",
                                        "cuMemCreate",
                                        "cuMemMap",
                                        "cuMemUnmap",
                                        "cuMemRelease",
                                        "cuMemcpyHtoD",
                                        "cuMemGetAddressRange",
                                        "cuIpcOpenMemHandle",
                                        "cuIpcCloseMemHandle",
                                        "cuCtxCreate",
                                        "cuCtxPopCurrent",
                                        "cuStreamQuery",
                                        "nvmlDeviceGetMemoryInfo",
                                        "cuMemSetAccess",
                                        "cuCheckpointProcessCheckpoint",
                                        "cuCheckpointProcessRestore",
                                        "cuDevicePrimaryCtxRetain",
                                        "cuMemExportToShareableHandle"};

enum { BROKEN_MAX = 16 }; /* calls that are faulty at once; a seed's run depends on it */

/* One of those that the options name, apart by commas; without any, one of those above. */
static void choose_breakable(const char *named, char *chosen, size_t size) {
    uint64_t count = 1;
    for (const char *at = named; *at; at++)
        count += *at == ',';
    for (uint64_t left = below(&run.random, count); left; left--)
        named = strchr(named, ',') + 1;
    snprintf(chosen, size, "%.*s", (int)strcspn(named, ","), named);
    if (!*chosen)
        snprintf(chosen, size, "%s", breakable[below(&run.random, sizeof breakable / sizeof *breakable)]);
}

/* Where the options name functions, only they fail, and no device is lost. */
static void break_something(const char *named) {
    generator *random = &run.random;
    host_lock();
    if (!*named && below(random, 4) == 0) {
        device *gpu = &host->devices[below(random, host->device_count)];
        gpu->is_lost = 1;
        run.losses++;
    } else {
        fault_record *fault = &host->faults[below(random, BROKEN_MAX)];
        host->fault_count += !fault->function[0];
        fault->after = (int32_t)below(random, *named ? 5 : 50);
        fault->times = 1 + (int32_t)below(random, 3);
        fault->kind = FAULT_CODE;
        fault->value = INJECTED_CODE;
        choose_breakable(named, fault->function, sizeof fault->function);
        run.faults++;
    }
    host->events[host->event_count % EVENT_MAX] =
        (event_record){.type = 8, .data = 79, .device = (uint32_t)below(random, host->device_count)};
    __atomic_store_n(&host->event_count, host->event_count + 1, __ATOMIC_RELEASE);
    host_unlock();
}

static uint64_t operations_so_far(int workers) {
    uint64_t sum = run.operations_of_the_dead;
    for (int i = 0; i < workers; i++)
        sum += __atomic_load_n(&shared->operations[i], __ATOMIC_RELAXED);
    return sum;
}

static void drain_exchange(void) {
    close(shared->exchange[0]);
    close(shared->exchange[1]);
}

/* Half of them end in order, the others are killed; then nothing may be left. */
static void finish(int workers) {
    mend_devices();
    for (int i = 0; i < workers; i += 2)
        if (run.pids[i])
            kill_worker(i);
    __atomic_store_n(&shared->is_finishing, 1, __ATOMIC_RELEASE);
    patience left;
    patience_renew(&left);
    for (int count = 1, round = 0; count; round++) {
        count = 0;
        look_after_workers(0, workers);
        if (round % 200 == 199)
            kill_locked(workers);
        for (int i = 0; i < workers; i++)
            count += run.pids[i] != 0;
        if (count && patience_is_over(&left, PATIENCE_NS))
            set_hang("a worker hangs: it does not end");
        if (shared->has_failed)
            break;
        usleep(500);
    }
    for (int i = 0; i < workers; i++)
        if (run.pids[i])
            kill_worker(i);
    drain_exchange();
    run.findings += (uint64_t)check_host(1, "at the end");
    if (used_bytes_of_host()) {
        printf("FOUND at the end: %llu bytes are still in use\n", (unsigned long long)used_bytes_of_host());
        run.findings++;
    }
}

static void report(const fuzz_options *options, double duration_s) {
    printf("RESULT {\"seed\": %llu, \"workers\": %d, \"operations\": %llu, \"duration_s\": %.3f, "
           "\"random_kills\": %llu, \"stepped_kills\": %llu, \"orderly_ends\": %llu, \"recoveries\": %llu, "
           "\"epochs\": %llu, \"faults\": %llu, \"losses\": %llu, \"findings\": %llu, \"failure\": \"%s\"",
           (unsigned long long)options->seed, options->workers,
           (unsigned long long)operations_so_far(options->workers), duration_s, (unsigned long long)run.kills,
           (unsigned long long)run.stepped_kills, (unsigned long long)run.orderly_ends,
           (unsigned long long)host->recovery_count, (unsigned long long)run.epochs,
           (unsigned long long)run.faults, (unsigned long long)run.losses, (unsigned long long)run.findings,
           shared->failure);
    printf(", \"kinds\": {");
    for (int k = 0; operation_name(k); k++)
        printf("%s\"%s\": [%llu, %llu]", k ? ", " : "", operation_name(k), (unsigned long long)shared->counts[k],
               (unsigned long long)shared->refusals[k]);
    printf("}}\n");
}

static int make_board(const fuzz_options *options) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, shared->exchange))
        return -1;
    shared->seed = options->seed;
    shared->workers = options->workers;
    run.random = generator_of(options->seed, WORKER_MAX, 0);
    return 0;
}

static void drive(const fuzz_options *options) {
    uint64_t next_kill = options->kill_every, next_epoch = options->check_every, next_break = options->break_every;
    uint64_t next_return = 0, return_ns = 0;
    uint64_t progress_ns = clock_ns(), seen = 0;
    patience left;
    patience_renew(&left);
    while (!shared->has_failed && !run.findings) {
        look_after_workers(1, options->workers);
        uint64_t done = operations_so_far(options->workers);
        if (done != seen) {
            seen = done;
            progress_ns = clock_ns();
            patience_renew(&left);
        } else if (patience_is_over(&left, PATIENCE_NS)) {
            set_hang("nothing moves any more");
        } else if (clock_ns() > progress_ns + ALL_LOCKED_NS) {
            kill_locked(options->workers); /* they locked each other, or their lockers are dead */
        }
        if (done >= options->operations)
            return;
        if (done >= next_kill) {
            int victim = (int)below(&run.random, (uint64_t)options->workers);
            if (run.pids[victim]) {
                kill_worker(victim);
                run.kills++;
            }
            next_kill = done + below(&run.random, 2 * options->kill_every);
        }
        kill_failed(options->workers);
        if (done >= next_break) {
            break_something(options->failing);
            next_break = done + below(&run.random, 2 * options->break_every);
            next_return = done + LOST_OPERATIONS;
            return_ns = clock_ns() + LOST_NS;
        }
        if (next_return && (done >= next_return || clock_ns() >= return_ns)) { /* all may wait for it */
            return_lost_devices();
            next_return = 0;
        }
        if (done >= next_epoch) {
            epoch(options->workers);
            next_epoch = done + options->check_every;
            printf("PROGRESS %llu\n", (unsigned long long)done);
            fflush(stdout);
        }
        usleep(300);
    }
}

int fuzz_run(const fuzz_options *options) {
    if (make_board(options)) {
        perror("softgpu-fuzz");
        return 2;
    }
    uint64_t started_ns = clock_ns();
    drive(options);
    if (!shared->has_failed && !run.findings) {
        epoch(options->workers);
        finish(options->workers);
    }
    for (int i = 0; i < options->workers; i++)
        if (run.pids[i])
            kill_worker(i);
    report(options, (double)(clock_ns() - started_ns) / 1e9);
    return shared->has_failed || run.findings ? 1 : 0;
}
