/* A process that kills itself at a chosen instruction.
 *
 * The processor's trap flag raises SIGTRAP after each instruction of the thread that set it; the handler runs
 * between two instructions, with whatever lock the thread holds. Counting that way is slow, so a place that was
 * found once (an address, and how often it was reached before) is reached again by a breakpoint in the process's
 * own copy of the code. */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../src/host.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HOT_CHUNKS = 32, HOT_PROCESSES = 8, HOT_GROUPS = 8, HOT_EVENTS = 4 };

static uint64_t add_words(uint64_t hash, const void *start, const void *end) {
    for (const uint64_t *word = start; word < (const uint64_t *)end; word++)
        hash = (hash ^ *word) * 0x9e3779b97f4a7c15ull;
    return hash;
}

/* Of the parts of the shared state that a few processes use. */
static uint64_t hash_of_state(void) {
    uint64_t hash = add_words(1, host, &host->devices[host->device_count]);
    hash = add_words(hash, host->processes, &host->processes[HOT_PROCESSES]);
    hash = add_words(hash, host->groups, &host->groups[HOT_GROUPS]);
    hash = add_words(hash, host->shared_events, &host->shared_events[HOT_EVENTS]);
    return add_words(hash, host->chunks, &host->chunks[HOT_CHUNKS]);
}

#if defined __x86_64__

#include <sys/syscall.h>
#include <ucontext.h>

#define TRAP_FLAG 0x100ll
#define BREAKPOINT 0xcc

static struct {
    pid_t process, thread;
    trace_plan plan;
    uint64_t hash;
    int steps_left, is_counting;
    int last; /* the signal that the thread gets at its place */
    uint64_t places_before; /* how often the breakpoint's place was reached */
    unsigned char covered;  /* what the breakpoint stands for */
    place_list *list;
} traced;

static void die(void) { kill(traced.process, traced.last); }

static int has_entered_kernel(const unsigned char *next_instruction) {
    return next_instruction[-2] == 0x0f && next_instruction[-1] == 0x05; /* syscall */
}

static int is_step(const unsigned char *next_instruction) {
    if (traced.plan.is_every_instruction)
        return 1;
    uint64_t now = hash_of_state();
    int is_other = now != traced.hash || has_entered_kernel(next_instruction);
    traced.hash = now;
    return is_other;
}

static uint64_t count_visit(const unsigned char *address) {
    place_list *list = traced.list;
    uint64_t slot = (uint64_t)address * 0x9e3779b97f4a7c15ull >> 32;
    for (;; slot++) {
        visit *known = &list->visits[slot % VISIT_MAX];
        if (known->address && known->address != address)
            continue;
        known->address = address;
        return ++known->count;
    }
}

static void note_place(const unsigned char *next_instruction) {
    place_list *list = traced.list;
    uint64_t count = count_visit(next_instruction);
    if (is_step(next_instruction) && list->count < PLACE_MAX)
        list->places[list->count++] = (place){next_instruction, count};
}

/* While a thread is started, the C library blocks all signals, and a blocked SIGTRAP is fatal: so the traced
 * thread changes no mask. */
static const unsigned char *keep_unblocked(greg_t *registers) {
    unsigned char *instruction = (unsigned char *)registers[REG_RIP];
    if (instruction[0] != 0x0f || instruction[1] != 0x05 || registers[REG_RAX] != SYS_rt_sigprocmask)
        return instruction;
    if (registers[REG_RDX])
        memset((void *)registers[REG_RDX], 0, sizeof(uint64_t)); /* what was blocked before */
    registers[REG_RAX] = 0;
    registers[REG_RIP] += 2;
    return instruction + 2;
}

static void on_step(int number, siginfo_t *information, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)number, (void)information;
    if (gettid() != traced.thread) { /* the flag is inherited */
        registers[REG_EFL] &= ~TRAP_FLAG;
        return;
    }
    const unsigned char *next_instruction = keep_unblocked(registers);
    shared->instructions++;
    if (traced.list) {
        note_place(next_instruction);
        return;
    }
    if (!traced.is_counting)
        traced.is_counting = host->last_chunk_id != traced.plan.from_chunk_id;
    if (traced.is_counting && is_step(next_instruction) && --traced.steps_left <= 0)
        die();
}

static void set_trap_flag(void) { __asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc"); }
static void clear_trap_flag(void) {
    __asm__ volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
}

static void handle_traps_with(void (*handler)(int, siginfo_t *, void *)) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGTRAP, &action, NULL);
}

int trace_is_possible(void) { return 1; }

void trace_start(trace_plan plan) {
    memset(&traced, 0, sizeof traced);
    traced.process = getpid();
    traced.thread = gettid();
    traced.last = SIGKILL;
    traced.plan = plan;
    traced.steps_left = plan.steps;
    traced.is_counting = !plan.from_chunk_id;
    traced.hash = hash_of_state();
    shared->instructions = 0;
    if (plan.steps == 0)
        die();
    handle_traps_with(on_step);
    set_trap_flag();
}

void trace_list(place_list *list, int is_every_instruction) {
    memset(&traced, 0, sizeof traced);
    traced.thread = gettid();
    traced.plan.is_every_instruction = is_every_instruction;
    traced.hash = hash_of_state();
    traced.list = list;
    shared->instructions = 0;
    handle_traps_with(on_step);
    set_trap_flag();
}

void trace_end(void) { clear_trap_flag(); }

/* ---- breakpoints ---- */

static place awaited;

/* The instruction under the breakpoint must run between two visits: uncover it, do it as one step, cover it. */
static void on_breakpoint(int number, siginfo_t *information, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned char *code = (unsigned char *)awaited.address;
    (void)number, (void)information;
    if (registers[REG_EFL] & TRAP_FLAG) {
        *code = BREAKPOINT;
        registers[REG_EFL] &= ~TRAP_FLAG;
        return;
    }
    if (++traced.places_before == awaited.count)
        die();
    *code = traced.covered;
    registers[REG_RIP] = (greg_t)(uintptr_t)code;
    registers[REG_EFL] |= TRAP_FLAG;
}

int trace_await(place chosen, int last) {
    long page = sysconf(_SC_PAGESIZE);
    void *start = (void *)((uintptr_t)chosen.address / (uintptr_t)page * (uintptr_t)page);
    memset(&traced, 0, sizeof traced);
    traced.process = getpid();
    traced.last = last;
    awaited = chosen;
    if (mprotect(start, (size_t)page, PROT_READ | PROT_WRITE | PROT_EXEC))
        return -1;
    handle_traps_with(on_breakpoint);
    traced.covered = *chosen.address;
    *(unsigned char *)chosen.address = BREAKPOINT;
    return 0;
}

#else

int trace_is_possible(void) { return 0; }
void trace_start(trace_plan plan) { (void)plan, (void)hash_of_state; }
void trace_list(place_list *list, int is_every_instruction) { (void)list, (void)is_every_instruction; }
void trace_end(void) {}
int trace_await(place chosen, int last) {
    (void)chosen, (void)last;
    return -1;
}

#endif
