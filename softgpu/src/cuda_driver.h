/* What one process knows of its own use of the software GPUs: contexts, addresses, handles, streams. */
#ifndef SOFTGPU_CUDA_DRIVER_H
#define SOFTGPU_CUDA_DRIVER_H

#include "chunk_file.h"
#include "cuda_abi.h"
#include "host.h"

struct CUctx_st {
    int device;
    int references; /* of a primary context; 0 is not active */
    int is_primary, is_destroyed;
    unsigned flags;
    uint64_t id;
};

/* cuda_init.c */
extern int own_process;              /* this process's row in the host's table */
extern pthread_mutex_t driver_mutex; /* guards regions, handles, contexts and the list of streams */
void driver_lock(void);
void driver_unlock(void);
uint64_t driver_new_id(void); /* with the driver lock held */
typedef struct {
    CUresult result;
    int is_counted;
} driver_call;
driver_call driver_enter(const char *function); /* the start of every call: may it go on, must it fail? */
void driver_leave(const driver_call *call);     /* its end, wherever it returns */
void driver_work_behind_the_gate(void);         /* this thread's calls never wait: it does queued work */
int driver_attach(void);                        /* the host, and a row in it for this process; 0 or -1 */
process_record *driver_process(void);           /* this process's row */
int driver_device(int ordinal);                 /* the host's number of a device */
CUresult driver_condition(void);    /* what an earlier failure of the device or of queued work means now */
void driver_fail(CUresult failure); /* queued work failed; every later call says so, as CUDA's errors stick */
int is_device(CUdevice candidate);

#define ENTER()                                                                          \
    __attribute__((cleanup(driver_leave))) driver_call entered = driver_enter(__func__); \
    if (entered.result != CUDA_SUCCESS)                                                  \
    return entered.result

#define ENTER_WITH_CONTEXT()                     \
    ENTER();                                     \
    if (!context_current())                      \
        return CUDA_ERROR_INVALID_CONTEXT;       \
    if (context_is_destroyed(context_current())) \
    return CUDA_ERROR_CONTEXT_IS_DESTROYED

/* cuda_context.c */
void context_setup(void);
CUcontext context_current(void);
int context_is_destroyed(CUcontext context);
CUcontext context_primary(int device); /* NULL while nobody in this process retains it */

/* cuda_region.c: ranges of addresses and what stands behind them (with the driver lock held). */
typedef enum {
    REGION_MAPPED,     /* cuMemMap */
    REGION_ALLOCATED,  /* cuMemAlloc */
    REGION_IPC,        /* cuIpcOpenMemHandle */
    REGION_STORAGE,    /* a process's memory while it goes to custom storage or comes back */
    REGION_HOST,       /* cuMemHostAlloc */
    REGION_REGISTERED, /* cuMemHostRegister */
    REGION_RESERVED,   /* cuMemAddressReserve; kept in a table of its own, for mappings lie inside */
} region_kind;

typedef struct {
    uint64_t base, bytes;
    uint64_t mapped_bytes; /* what munmap must be given; 0 when the addresses are not ours to unmap */
    region_kind kind;
    int handle; /* of device memory */
    int access; /* CU_MEM_ACCESS_* */
    unsigned flags;
    uint64_t id;
    int ipc_count;   /* how often cuIpcOpenMemHandle gave it */
    uint64_t ipc_id; /* of the chunk behind it */
    CUcontext context;
} region;

typedef struct {
    region *items; /* by base, never overlapping */
    int count, room;
} region_table;

extern region_table regions, reservations;
int region_is_device(const region *candidate);
region *region_at(region_table *table, uint64_t address); /* the one that holds the address, or NULL */
region *region_of_base(region_table *table, uint64_t base, region_kind kind);
int region_overlaps(region_table *table, uint64_t base, uint64_t bytes);
int region_insert(region_table *table, region added); /* 0, or -1 without memory */
void region_remove(region_table *table, region *removed);
void *reserve_addresses(uint64_t bytes, uint64_t alignment); /* touching them is a fault; NULL: none left */

/* cuda_handle.c: this process's holds on chunks (with the driver lock held, the host lock not). */
typedef struct {
    int chunk;      /* row in the host's table; -1: the entry is free */
    int device;     /* this process's ordinal */
    int references; /* what cuMemRelease gives back */
    int mappings;   /* regions, and copies in progress */
    uint32_t generation;
    chunk_file file;
    CUmemAllocationProp properties;
} handle_record;

CUresult handle_create(int device, uint64_t bytes, const CUmemAllocationProp *properties, int *handle);
CUresult handle_adopt(int chunk, int descriptor, int *handle); /* of a chunk opened from elsewhere */
handle_record *handle_record_of(int handle);
CUmemGenericAllocationHandle handle_value(int handle);
int handle_of_value(CUmemGenericAllocationHandle value); /* 0 when it is none */
uint64_t handle_unmap(int handle);   /* one mapping less; the bytes that this process so let go of for good */
uint64_t handle_release(int handle); /* one reference less; likewise */
void handles_close_after_fork(void);

/* cuda_copy.c */
#define PHANTOM_MIN_BYTES \
    65536ull /* copies up to this are real even in phantom mode: headers, tokens, canaries */
CUresult copy_check(uint64_t target, uint64_t source, int *is_pageable);
CUresult copy_bytes(uint64_t target, uint64_t source, uint64_t bytes);
/* Likewise, on a link that is this copy's from *end_ns on; sets *end_ns to when the link is done with it. */
CUresult copy_from(uint64_t target, uint64_t source, uint64_t bytes, uint64_t *end_ns);
CUresult copy_corrupt(uint64_t target, uint64_t bytes); /* flips one bit, as a fault wants it */
CUresult fill_bytes(uint64_t target, uint32_t value, int width, uint64_t count);

/* cuda_stream.c */
typedef enum { OP_COPY, OP_FILL, OP_RECORD, OP_WAIT, OP_CALL } op_kind;
typedef struct op {
    struct op *next;
    op_kind kind;
    uint64_t submitted_ns;
    uint64_t target, source, bytes;
    uint32_t value;
    int width, is_corrupt;
    CUevent event;
    uint64_t sequence;
    CUhostFn function;
    void *argument;
} op;
CUresult stream_submit(CUstream stream, op submitted);
CUresult stream_finish(CUstream stream); /* waits until it is empty */
void streams_finish(int including_non_blocking);
CUstream stream_create(CUcontext context); /* NULL without memory */
CUresult cuStreamDestroy_v2(CUstream stream);

/* cuda_event.c */
void event_complete(CUevent event, uint64_t sequence);
void event_await(CUevent event, uint64_t sequence);
void event_let_go(CUevent event);

/* cuda_ipc.c */
uint64_t ipc_namespace(void); /* tokens are good within one; 0 when it cannot be told */

/* cuda_checkpoint.c, cuda_storage.c: another process as the target of a checkpoint */
typedef struct {
    int index;       /* its row */
    uint64_t serial; /* tells it from a later process in the same row */
    process_record *process;
} target;
int target_is_there(const target *aimed); /* with the host lock held */
CUresult storage_begin(const target *aimed, process_state step, CUcheckpointCustomStorageInfo **info);
CUresult storage_check(const target *aimed, const uint8_t *device_map);

/* No address space holds more, and sums of two such sizes do not overflow. */
#define BYTES_MAX (1ull << 56)

/* cuda_mps.c */
void mps_read_limits(void);
uint64_t mps_left(int device); /* of this client's own limit; UINT64_MAX without one */

/* cuda_memory.c, cuda_entry.c */
CUresult allocation_free(region *allocated); /* with the driver lock held */
CUresult not_supported(void);

#endif
