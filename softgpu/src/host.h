/* One software GPU host: the state that all processes share, and the rules that keep it true.
 *
 * A host is a directory:
 *   settings   what it was created with (text)
 *   state      the tables below, mapped by every process, guarded by one robust mutex
 *   processes  nothing in it; each process locks one byte, so that the kernel tells when it has died
 *   c<id>      one file for each chunk of device memory (see host_chunk.c)
 *
 * A process can be killed between any two instructions. So: what is recorded is written before what it
 * describes comes into being, sums are derived from the records (host_recount), and whoever finds a dead
 * owner tidies up.
 */
#ifndef SOFTGPU_HOST_H
#define SOFTGPU_HOST_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define HOST_MAGIC 0x3855504754464f53ull /* raise the digit when the layout of host_state changes */

enum {
    DEVICE_MAX = 16,
    PROCESS_MAX = 256,
    CHUNK_MAX = 65536,      /* an 80 GiB device in 2 MiB chunks is 40,960 */
    SHARED_EVENT_MAX = 128, /* events that several processes use (cuIpc) */
    EVENT_MAX = 64,         /* a reader that falls further behind misses the oldest */
    FAULT_MAX = 128, /* one for each call that a client uses, so that all can be counted at once */
    GROUP_MAX = 256,
    GROUP_DEPTH_MAX = 8,  /* a process's cgroup and its ancestors */
    GROUP_NAME_MAX = 256, /* the path of a container's cgroup holds a 64 digit id */
};

#define GIB (1ull << 30)
#define GRANULARITY (2ull << 20) /* of cuMemCreate, cuMemMap and large cuMemAlloc, as on all GPUs so far */
#define NO_LIMIT UINT64_MAX      /* NVML_DEVICE_MEMORY_LIMIT_MAX */

typedef enum { HOST_TO_DEVICE, DEVICE_TO_HOST, DIRECTION_COUNT } direction;

/* Calls whose duration is modelled. Order and names are those of call_names in host_cost.c. */
typedef enum {
    CALL_CONTEXT_CREATE,
    CALL_MEM_ALLOC,
    CALL_MEM_FREE,
    CALL_MEM_CREATE,
    CALL_MEM_MAP,
    CALL_MEM_SET_ACCESS,
    CALL_MEM_UNMAP,
    CALL_MEM_RELEASE,
    CALL_HOST_ALLOC,
    CALL_HOST_REGISTER,
    CALL_CHECKPOINT, /* to host memory */
    CALL_RESTORE,
    CALL_CHECKPOINT_MAP, /* to custom storage: mapping the target's memory into the caller */
    CALL_CHECKPOINT_COMPLETE,
    CALL_RESTORE_MAP,
    CALL_RESTORE_COMPLETE,
    CALL_CHECKPOINT_LOCK,
    CALL_CHECKPOINT_UNLOCK,
    CALL_COUNT
} call;

typedef struct {
    uint64_t call_ns; /* each call takes at least this */
    uint64_t gib_ns;  /* plus this for each GiB it touches */
} call_cost;

typedef struct {
    uint64_t bytes_per_s;   /* 0: as fast as this machine copies */
    uint64_t busy_until_ns; /* CLOCK_MONOTONIC; the engine's time is booked up to here */
    uint64_t moved_bytes;
} copy_engine;

typedef struct {
    char name[96];
    char uuid[48];
    uint8_t uuid_bytes[16];
    uint32_t compute_major, compute_minor, multiprocessor_count, architecture;
    uint32_t pci_bus, pci_device_id, pcie_generation, pcie_width;
    uint32_t temperature_c, power_mw, power_limit_mw;
    uint32_t utilization_gpu_percent, utilization_memory_percent;
    uint32_t is_hot;          /* it is slowed down because of its temperature */
    uint64_t ecc_error_count; /* that could not be corrected, since the host was made */
    uint64_t total_bytes;    /* as NVML reports it */
    uint64_t reserved_bytes; /* the driver's own part; total less this is what CUDA shows */
    uint64_t context_bytes;  /* what the first context of each process takes */
    uint64_t eviction_count; /* clients that the MPS server ended for the sake of others */
    uint64_t used_bytes;     /* all live chunks and contexts; with reserved_bytes never above total_bytes */
    uint64_t pageable_bytes_per_s;
    copy_engine engines[DIRECTION_COUNT];
    uint32_t is_lost;
    uint32_t is_mig;                 /* it is cut into instances, and takes no context itself */
    uint32_t mig_parent;             /* of an instance: the GPU that it is a part of, plus one; 0: a whole GPU */
    uint32_t mig_id, mig_slices;     /* of an instance: its number, and its part of the processors in sevenths */
} device;

/* CUprocessState: where a process stands in the checkpoint protocol. */
typedef enum {
    STATE_RUNNING,
    STATE_LOCKED,
    STATE_CHECKPOINTED,
    STATE_FAILED,
    STATE_CHECKPOINTING, /* the memory is mapped into a caller that copies it, or the copy is on its way */
    STATE_RESTORING,
} process_state;

/* A process's placement is one word, so that any change of it is whole: its process_state, and these bits. */
enum {
    PLACEMENT_STATE = 0xff,
    PLACEMENT_AWAY = 0x100,   /* its memory is not on any device, and counts nowhere */
    PLACEMENT_MAP = 0x200,    /* which of its two device maps holds */
    PLACEMENT_STORED = 0x400, /* its content went to custom storage, and must come back from there */
    PLACEMENT_ENDED = 0x800,  /* the MPS server ended it as a client; its memory is gone */
};

#define NOBODY (-1)
/* Devices are numbered twice: a process's ordinals never change, but a restore can move it to other devices.
 * What lies in a process's row goes by ordinal; see process_device. */
typedef struct {
    uint32_t is_used;
    int32_t pid;            /* in the process's own pid namespace; for others see process_pid */
    int32_t restore_thread; /* likewise */
    uint32_t placement;     /* see host_checkpoint.c */
    int32_t checkpointer;   /* the process that is in the midst of a step with this one, or NOBODY */
    uint32_t gate;          /* 1: calls wait, on this word; see host_gate.c */
    uint32_t active_calls, queued_ops;    /* what has passed the gate and is not done */
    uint32_t is_client;                   /* it called cuInit, so the driver knows it */
    uint64_t serial;                      /* of the process: rows are used again */
    uint64_t group_keys[GROUP_DEPTH_MAX]; /* the groups it belongs to, leaf first; 0 ends the list */
    uint64_t context_bytes[DEVICE_MAX];
    uint32_t poison[DEVICE_MAX]; /* what every call in a context there returns from now on; a CUresult */
    uint64_t charged_bytes[DEVICE_MAX]; /* the chunks it created and that still exist */
    uint8_t device_maps[2][DEVICE_MAX]; /* ordinal to device */
    char command[16];
    char group_name[GROUP_NAME_MAX];
} process_record;

#define CHUNK_UNOWNED (-1)
typedef struct {
    uint32_t is_used;
    uint32_t ordinal; /* the owner's number of the device */
    uint32_t device;  /* where it is once nobody owns it; see chunk_device */
    int32_t
        owner; /* the process that created it and is charged for it, or CHUNK_UNOWNED once that has died */
    uint32_t is_detached; /* the owner lives but let go of it: it exists only while somebody else holds it */
    uint32_t was_shared;  /* others can have it: somebody exported or opened it */
    uint64_t id;
    uint64_t bytes;
    uint64_t inode;
} chunk_record;

typedef struct {
    uint64_t key; /* see host_group.c; 0 means the row is free */
    char name[GROUP_NAME_MAX];
    uint64_t soft_bytes[DEVICE_MAX], hard_bytes[DEVICE_MAX];
} group_record;

typedef struct {
    uint64_t type, data;
    uint32_t device;
} event_record;

/* An event for several processes. It lives as long as one of them has it. */
typedef struct {
    uint32_t is_used;
    int32_t recorder; /* the process that recorded it last */
    uint64_t id;
    uint64_t recorded, completed;       /* as in an event of one process */
    uint32_t passes;                    /* changes with each completion, for those who wait on it */
    uint64_t holders[PROCESS_MAX / 64]; /* one bit for each process */
} shared_event;

/* What a faulty call does. Order and names are those of fault_names in host_fault.c. */
typedef enum {
    FAULT_CODE,    /* returns `value` and does nothing */
    FAULT_DELAY,   /* takes `value` nanoseconds longer */
    FAULT_HANG,    /* does not go on until the fault is cleared */
    FAULT_CORRUPT, /* copies, and one bit arrives flipped */
    FAULT_LIE,     /* a set limit is not set, a read one reads as none, used memory is halved */
    FAULT_STALE,   /* answers as it would have when the fault was set */
    FAULT_EMPTY,   /* succeeds with nothing in the answer */
    FAULT_UNKNOWN, /* lists processes without their bytes */
    FAULT_KIND_COUNT,
} fault_kind;

typedef struct {
    char function[64]; /* without a version suffix: cuMemCreate, nvmlDeviceGetMemoryInfo */
    int32_t after;     /* so many calls succeed first */
    int32_t times;     /* then so many fail; below zero: all */
    uint32_t kind;
    uint64_t value;
    uint32_t hit_count; /* calls that it struck */
    int32_t struck_pid; /* whose call was the last of them */
    uint64_t serial;
    uint64_t used_bytes[DEVICE_MAX]; /* when it was set, for FAULT_STALE */
} fault_record;

typedef struct {
    uint64_t magic;
    uint64_t bytes; /* of this structure: libraries of another build must not touch it */
    pthread_mutex_t mutex;
    uint32_t device_count, driver_version; /* devices: GPUs first, then instances of those that are cut */
    uint32_t gpu_count;
    uint32_t is_phantom; /* big copies take their time and move no bytes */
    uint32_t is_mps;     /* all clients go through one MPS server; see host_mps.c */
    uint32_t is_clean;   /* new memory reads as zero instead of as another's leavings */
    uint32_t fault_count, detached_count;
    uint64_t recovery_count; /* how often somebody died inside the lock */
    uint64_t last_chunk_id, last_shared_event_id, last_serial, last_fault_serial, event_count;
    uint32_t group_end;    /* no used group row at or above this index */
    uint32_t cgroup_count; /* limits set on cgroups; while 0, processes need not look up their own */
    uint32_t chunk_end;    /* no used chunk at or above this index */
    uint32_t chunk_next;   /* where to look for a free row first */
    char driver_text[32];
    call_cost costs[CALL_COUNT];
    device devices[DEVICE_MAX];
    process_record processes[PROCESS_MAX];
    group_record groups[GROUP_MAX];
    event_record events[EVENT_MAX];
    shared_event shared_events[SHARED_EVENT_MAX];
    fault_record faults[FAULT_MAX];
    chunk_record chunks[CHUNK_MAX];
} host_state;

/* host_state.c */
extern host_state *host;          /* NULL until host_attach succeeds; never unmapped after */
int host_attach(void);            /* 0, or -1 when SOFTGPU_DIR names no usable host */
const char *host_directory(void); /* valid after host_attach, or once SOFTGPU_DIR was read */
void host_path(char *path, size_t size, const char *name);
void host_lock(void);
void host_unlock(void);
void host_prepare_mutex(host_state *fresh); /* for the creator of a state file */

/* host_process.c (all but process_pid with the lock held) */
int process_attach(void);    /* opens the liveness file; called once by host_attach */
int process_enter(void);     /* this process's row, or -1 */
int process_pid(int index);  /* as the caller's pid namespace sees it; 0 unseen, -1 dead */
int process_of_pid(int pid); /* its row, or -1 */
void host_reap(void);        /* frees what only the dead held */
int process_device(const process_record *process, int ordinal);
int process_ordinal(const process_record *process, int device_index);
int process_is_away(const process_record *process);
uint64_t process_bytes(const process_record *process, int device_index); /* what it takes of a device now */
uint64_t process_own_bytes(const process_record *process, int device_index); /* the same, away or not */

/* host_gate.c (without the lock: it is passed at every call) */
void gate_enter(process_record *process); /* returns once the gate is open, and counts the call */
void gate_leave(process_record *process);
void gate_set(process_record *process); /* opens or closes it, as the process's state wants */
int gate_is_quiet(const process_record *process);

/* host_checkpoint.c (with the lock held) */
process_state checkpoint_state(const process_record *process);
int checkpoint_begin(process_record *process, process_state from, process_state to, int by); /* 0, or -1 */
void checkpoint_reach(process_record *process, process_state reached, int is_stored);
void checkpoint_release(process_record *process);                          /* the step is over */
int checkpoint_admits(process_record *process, const uint8_t *device_map); /* is there room for its return? */
void checkpoint_bring_back(process_record *process, const uint8_t *device_map, int by);
void checkpoint_fail(process_record *process);       /* the driver gives it up: STATE_FAILED */
void checkpoint_settle(process_record *process);     /* whoever was in the midst of a step with it is gone */
void checkpoint_end_client(process_record *process); /* for good: its memory counts nowhere any more */
int checkpoint_is_shared(int process_index);         /* does it share memory with others? */

/* host_mig.c */
int mig_parent(int device_index); /* the GPU that an instance is a part of; of a GPU itself */
int device_is_lost(int device_index);

/* host_chunk.c (with the lock held) */
int chunk_create(int ordinal, uint64_t bytes, int owner, int *descriptor); /* row, or a chunk_failure */
enum chunk_failure { CHUNK_NO_ROOM = -1, CHUNK_OS_ERROR = -2 };
enum { HOLDER_DESCRIPTOR = PROCESS_MAX }; /* an exported descriptor: no process yet */
int chunk_open(int index, int holder);    /* a new descriptor that keeps the chunk alive, or -1 */
void chunk_disown(chunk_record *chunk);   /* its owner is gone, others hold it */
int chunk_device(const chunk_record *chunk);
int chunk_is_on_device(const chunk_record *chunk);
int chunk_is_held_by(const chunk_record *chunk, int first_holder, int end_holder);
int chunk_of_descriptor(int descriptor); /* row, or -1 when it is not a live chunk of this host */
void chunk_let_go(int index, int owner); /* the caller has closed its descriptors of it */
void chunk_settle(int index);            /* frees it when nobody holds it, else leaves it to its holders */
int chunk_fits(int device_index, uint64_t bytes);
int chunk_reserve(int device_index, process_record *process,
                  uint64_t bytes); /* 1: so much may be taken now */

/* host_group.c (with the lock held) */
uint64_t group_key_of_path(const char *path); /* 0 when there is no such directory */
uint64_t group_key_of_name(const char *name);
void group_locate(process_record *process);  /* finds the groups of the calling process */
void group_refresh(process_record *process); /* the same, where a move to another cgroup could matter */
int group_admits(const process_record *process, int device_index, uint64_t bytes);
uint64_t group_used(uint64_t key, int device_index);
void group_recount(void);
group_record *group_find(uint64_t key);
group_record *group_nearest(const process_record *process, int device_index); /* that limits it; NULL: none */
int group_set(uint64_t key, const char *name, int device_index, uint64_t soft_bytes, uint64_t hard_bytes);

/* host_cost.c */
extern const char *const call_names[CALL_COUNT];
uint64_t clock_ns(void);
void sleep_until(uint64_t deadline_ns);                   /* may wake up some tens of microseconds late */
void pay(call kind, uint64_t started_ns, uint64_t bytes); /* returns when the call has lasted long enough */
void pay_for_size(call kind, uint64_t started_ns, uint64_t bytes); /* likewise, without its fixed part */

/* host_engine.c (takes the lock itself) */
uint64_t engine_book(int device_index, direction way, int is_pageable, uint64_t bytes, uint64_t earliest_ns);

/* host_check.c (with the lock held) */
typedef void (*check_report)(const char *text);
int host_check(check_report report,
               int is_quiet); /* how many rules do not hold; each is told in a sentence */

/* host_fault.c (takes the lock itself) */
extern const char *const fault_names[FAULT_KIND_COUNT];
int fault_code(const char *function); /* what this call must return instead of doing its work; 0: nothing */
int fault_strikes(const char *function, fault_kind kind, fault_record *struck); /* for kinds that change it */

/* host_shared_event.c: rows, with the lock held; what happens in a stream, without */
int shared_event_create(int process);                     /* its row, or -1 */
int shared_event_join(int row, uint64_t id, int process); /* 0, or -1 when there is none any more */
void shared_event_leave(int row, int process);
void shared_event_bury(const uint8_t *is_dead); /* what the dead left of them */
uint64_t shared_event_record(int row, int process);
void shared_event_complete(int row, uint64_t sequence);
void shared_event_await(int row, uint64_t sequence);
int shared_event_has_passed(int row, uint64_t sequence);

/* host_mps.c (with the lock held) */
int mps_make_room(process_record *process, int device_index, uint64_t bytes); /* 1: now there is room */
int mps_has_ended(const process_record *process);

/* host_xid.c (with the lock held) */
void xid_raise(int device_index, uint64_t number);
void xid_lose(int device_index, int is_lost);
int xid_strike(int device_index, uint64_t number, int process); /* what it does to contexts; -1: nothing */

uint64_t round_up(uint64_t value, uint64_t multiple);

#endif
