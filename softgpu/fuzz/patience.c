/* When does a worker hang, and where?
 *
 * Time counts only while the workers could have used it: not while one of them wanted a processor and got none
 * (the kernel tells how long that was), and not while this process itself slept through a look. So a busy machine
 * is no hang, and a worker that sleeps or turns in circles is one. */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../src/host.h"

#include <dirent.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LINE = 256 };
#define LOOK_NS 1000000000ull

/* The first line of a file of a thread; empty when there is none, or it may not be read. */
static void read_line(pid_t process, const char *thread, const char *name, char line[LINE]) {
    char path[320];
    snprintf(path, sizeof path, "/proc/%d/task/%s/%s", process, thread, name);
    FILE *file = fopen(path, "re");
    line[0] = 0;
    if (!file)
        return;
    if (!fgets(line, LINE, file))
        line[0] = 0;
    line[strcspn(line, "\n")] = 0;
    fclose(file);
}

/* What is done with each thread of a process. */
typedef void (*thread_visit)(pid_t process, const char *thread, void *context);

static void visit_threads(pid_t process, thread_visit act, void *context) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/task", process);
    DIR *threads = opendir(path);
    for (const struct dirent *entry; threads && (entry = readdir(threads)) != NULL;)
        if (entry->d_name[0] != '.')
            act(process, entry->d_name, context);
    if (threads)
        closedir(threads);
}

/* ---- when ---- */

/* Of all threads of a process since they started; the delay of one that waits now is told once it runs. */
typedef struct {
    uint64_t ran_ns, delayed_ns;
    int is_runnable;
} usage;

static void add_usage(pid_t process, const char *thread, void *context) {
    usage *sum = context;
    char line[LINE];
    unsigned long long ran_ns = 0, delayed_ns = 0;
    read_line(process, thread, "schedstat", line);
    if (sscanf(line, "%llu %llu", &ran_ns, &delayed_ns) != 2)
        return;
    sum->ran_ns += ran_ns;
    sum->delayed_ns += delayed_ns;
    read_line(process, thread, "stat", line);
    const char *behind_name = strrchr(line, ')');
    sum->is_runnable |= behind_name && behind_name[2] == 'R';
}

/* How long the most delayed worker that is in an operation waited for a processor since the last look. */
static uint64_t starved_ns(patience *left, uint64_t passed_ns) {
    uint64_t most_ns = 0;
    for (int i = 0; i < shared->workers; i++) {
        pid_t process = shared->pids[i];
        usage now = {0};
        if (process && !__atomic_load_n(&shared->is_waiting[i], __ATOMIC_ACQUIRE))
            visit_threads(process, add_usage, &now);
        uint64_t delay_ns = now.delayed_ns > left->delayed_ns[i] ? now.delayed_ns - left->delayed_ns[i] : 0;
        if (now.is_runnable && now.ran_ns == left->ran_ns[i] && delay_ns < passed_ns)
            delay_ns = passed_ns;
        most_ns = delay_ns > most_ns ? delay_ns : most_ns;
        left->delayed_ns[i] = now.delayed_ns;
        left->ran_ns[i] = now.ran_ns;
    }
    return most_ns;
}

void patience_renew(patience *left) {
    memset(left, 0, sizeof *left);
    left->looked_ns = clock_ns();
}

int patience_is_over(patience *left, uint64_t allowed_ns) {
    uint64_t passed_ns = clock_ns() - left->looked_ns;
    if (passed_ns < LOOK_NS)
        return 0;
    uint64_t missed_ns = starved_ns(left, passed_ns);
    left->looked_ns += passed_ns;
    left->used_ns += passed_ns < 2 * LOOK_NS ? passed_ns : 2 * LOOK_NS;
    left->used_ns -= missed_ns < left->used_ns ? missed_ns : left->used_ns; /* a delay can be that of earlier looks */
    return left->used_ns > allowed_ns;
}

/* ---- where ---- */

static void print_lock(void) {
    int word = __atomic_load_n(&host->mutex.__data.__lock, __ATOMIC_ACQUIRE);
    int owner = word & FUTEX_TID_MASK;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d", owner);
    printf("FOUND hang: the host's lock is %s", owner ? "held" : "free");
    if (owner)
        printf(" by thread %d, which is %s", owner, access(path, F_OK) ? "gone" : "there");
    printf("%s%s; %llu recoveries\n", word & (int)FUTEX_WAITERS ? ", awaited" : "",
           word & (int)FUTEX_OWNER_DIED ? ", its owner died" : "", (unsigned long long)host->recovery_count);
}

static void print_thread(pid_t process, const char *thread, void *context) {
    char place[LINE], call[LINE], state[LINE];
    (void)context;
    read_line(process, thread, "wchan", place);
    read_line(process, thread, "syscall", call);
    read_line(process, thread, "stat", state);
    const char *behind_name = strrchr(state, ')');
    printf("FOUND hang:   thread %s: state%.2s, in %s, system call %s\n", thread, behind_name ? behind_name + 1 : " ?",
           place, call);
}

static void print_row(int p) {
    const process_record *row = &host->processes[p];
    printf("FOUND hang:   row %d (%s): state %d, gate %s, %u calls, %u queued", p,
           process_pid(p) < 0 ? "dead" : "alive", checkpoint_state(row), row->gate ? "shut" : "open",
           row->active_calls, row->queued_ops);
    if (row->checkpointer != NOBODY)
        printf(", in a step of row %d (%s)", row->checkpointer, process_pid(row->checkpointer) < 0 ? "dead" : "alive");
    printf("\n");
}

void print_hang(void) {
    print_lock();
    for (int i = 0; i < shared->workers; i++) {
        if (!shared->pids[i])
            continue;
        printf("FOUND hang: worker %d, process %d, %s: %s\n", i, shared->pids[i],
               shared->is_waiting[i] ? "stands still after" : "in the midst of", shared->doing[i]);
        for (int p = 0; p < PROCESS_MAX; p++)
            if (host->processes[p].is_used && host->processes[p].pid == shared->pids[i])
                print_row(p);
        visit_threads(shared->pids[i], print_thread, NULL);
    }
    fflush(stdout);
}

/* ---- is that so? ---- */

enum { RIVALS = 3 };
#define ALLOWED_NS 1500000000ull
#define SLEEPER_NS 20000000000ull /* on a busy machine; else two or three seconds */
#define STARVED_NS 6000000000ull

/* A worker that sleeps for ever, or that wants a processor all the time; all of these on one. */
static pid_t start_one(int is_sleeper, int niceness) {
    cpu_set_t allowed, one;
    pid_t child = start_child();
    if (child)
        return child;
    CPU_ZERO(&one);
    for (int i = CPU_SETSIZE - 1; !sched_getaffinity(0, sizeof allowed, &allowed) && i >= 0; i--)
        if (CPU_ISSET(i, &allowed)) {
            CPU_SET(i, &one);
            sched_setaffinity(0, sizeof one, &one);
            break;
        }
    if (nice(niceness) == -1)
        _exit(4);
    for (volatile uint64_t turns = 0;; turns++)
        if (is_sleeper)
            pause();
}

static int is_given_up_within(uint64_t limit_ns) {
    patience left;
    uint64_t end_ns = clock_ns() + limit_ns;
    patience_renew(&left);
    while (clock_ns() < end_ns) {
        if (patience_is_over(&left, ALLOWED_NS))
            return 1;
        usleep(50000);
    }
    return 0;
}

static void end_one(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

int try_patience(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 2;
    shared->workers = 1;
    shared->doing[0] = "sleep";
    shared->pids[0] = start_one(1, 0);
    int sleeper = is_given_up_within(SLEEPER_NS);
    print_hang();
    end_one(shared->pids[0]);
    pid_t rivals[RIVALS];
    for (int i = 0; i < RIVALS; i++)
        rivals[i] = start_one(0, 0);
    shared->pids[0] = start_one(0, 19);
    int starved = is_given_up_within(STARVED_NS);
    end_one(shared->pids[0]);
    for (int i = 0; i < RIVALS; i++)
        end_one(rivals[i]);
    printf("a sleeping worker %s, a starved one %s\n", sleeper ? "hangs" : "does not hang",
           starved ? "hangs" : "does not hang");
    return sleeper && !starved ? 0 : 1;
}
