/* The fuzzer of a software GPU host: one parent that forks, kills and checks, and workers that do random
 * operations through the exported functions of both libraries.
 *
 * The parent never starts the driver: it sees the shared state through the library's own sources, and is not
 * what it checks. All of a worker's choices follow from the seed, its number and its incarnation. */
#ifndef SOFTGPU_FUZZ_H
#define SOFTGPU_FUZZ_H

#include <signal.h>
#include <stdint.h>
#include <sys/types.h>

enum { WORKER_MAX = 64, TOKEN_MAX = 32, OPERATION_MAX = 64 };

/* An injected failure returns this, which the driver itself never does: so it is told from a real one. */
#define INJECTED_CODE 802

typedef struct {
    uint32_t version; /* odd while a worker writes it: readers skip it */
    unsigned char bytes[64];
} token_slot;

/* What parent and workers share beside the host. */
typedef struct {
    uint64_t seed;
    int workers;
    uint64_t operation_count; /* all workers, in steps of a batch */
    int is_paused, is_finishing;
    int is_waiting[WORKER_MAX];        /* stands still between two operations */
    pid_t pids[WORKER_MAX];
    int is_stepping[WORKER_MAX];       /* counts its instructions, to die after one of them */
    uint64_t instructions;             /* of the last that counted: used where there is one at a time */
    int descriptor;                    /* of the witness's chunk, in the witness */
    uint64_t operations[WORKER_MAX];   /* of the incarnation that runs */
    const char *doing[WORKER_MAX];     /* the operation's name: all are one program, so it is one address */
    uint64_t counts[OPERATION_MAX];    /* of each kind that did what it was asked */
    uint64_t refusals[OPERATION_MAX];  /* out of memory, injected, device lost */
    int has_failed;
    char failure[512];
    token_slot tokens[TOKEN_MAX];
    int exchange[2]; /* a socket through which workers pass descriptors of memory */
} board;

extern board *shared;

typedef struct {
    uint64_t seed, operations;
    int workers;
    uint64_t kill_every, break_every, check_every; /* so many operations: the first two on average */
    const char *failing; /* the functions that fail, apart by commas; empty: any, and devices get lost */
} fuzz_options;

/* random.c */
typedef struct {
    uint64_t state;
} generator;
generator generator_of(uint64_t seed, uint64_t worker, uint64_t incarnation);
uint64_t next(generator *from);
uint64_t below(generator *from, uint64_t limit);
void fill_pattern(unsigned char *bytes, uint64_t tag, uint64_t count);

/* worker.c */
void worker_run(int number, uint64_t incarnation);
const char *operation_name(int kind); /* NULL behind the last */

/* run.c, steps.c, races.c, plant.c: each returns the exit status of the program */
int fuzz_run(const fuzz_options *options);
int steps_run(const char *only, int is_every_instruction, int stride);
int races_run(void);
int plant(const char *kind);
const char *plant_kind(int index);
int lose_wakeup(void);

/* trace.c */
typedef struct {
    int steps; /* the thread is killed after so many; 0: at once */
    int is_every_instruction; /* else only those that changed the shared state or entered the kernel */
    uint64_t from_chunk_id;   /* counting starts when the host's last chunk is another; 0: at once */
} trace_plan;
typedef struct {
    const unsigned char *address; /* of the instruction that comes next */
    uint64_t count;               /* the how many-th time that it comes next */
} place, visit;
enum { PLACE_MAX = 1 << 16, VISIT_MAX = 1 << 17 };
typedef struct {
    int count;
    place places[PLACE_MAX]; /* behind each step */
    visit visits[VISIT_MAX]; /* of all instructions: a hash table */
} place_list;
int trace_is_possible(void);
void trace_start(trace_plan plan); /* of the calling thread */
void trace_list(place_list *list, int is_every_instruction); /* lists the places instead of dying */
void trace_end(void);
int trace_await(place chosen, int last); /* gets that signal there; -1 when its code cannot be written to */

/* patience.c */
typedef struct {
    uint64_t looked_ns, used_ns;
    uint64_t ran_ns[WORKER_MAX], delayed_ns[WORKER_MAX]; /* of each since it started: on a processor, waiting for one */
} patience;
void patience_renew(patience *left);
int patience_is_over(patience *left, uint64_t allowed_ns); /* to be asked again and again */
void print_hang(void); /* what every worker does and waits for, as findings */
int try_patience(void); /* with a worker that hangs, and one that does not: the exit status */

/* check.c */
int check_host(int is_quiet, const char *when); /* findings; each is printed */
uint64_t used_bytes_of_host(void);
pid_t start_child(void); /* fork, and die with the parent */

#endif
