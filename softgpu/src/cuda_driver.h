/* What one process knows of its own use of the software GPUs: contexts, addresses, handles, streams. */
#ifndef SOFTGPU_CUDA_DRIVER_H
#define SOFTGPU_CUDA_DRIVER_H

#include "chunk_file.h"
#include "cuda_abi.h"
#include "host.h"

struct CUctx_st {
    int device;
    int references; /* of a primary context; 0 is not active */
    int is_primary;
    unsigned flags;
    uint64_t id;
};

/* cuda_init.c */
extern int own_process;              /* this process's row in the host's table */
extern pthread_mutex_t driver_mutex; /* guards regions, handles, contexts and the list of streams */
void driver_lock(void);
void driver_unlock(void);
uint64_t driver_new_id(void); /* with the driver lock held */
CUresult
driver_enter(const char *function); /* the start of every call: is the driver usable, must it fail? */
CUresult driver_condition(void);    /* what an earlier failure of the device or of queued work means now */
void driver_fail(CUresult failure); /* queued work failed; every later call says so, as CUDA's errors stick */
int is_device(CUdevice candidate);

#define ENTER()                                    \
    do {                                           \
        CUresult entered = driver_enter(__func__); \
        if (entered != CUDA_SUCCESS)               \
            return entered;                        \
    } while (0)

#define ENTER_WITH_CONTEXT()                   \
    do {                                       \
        ENTER();                               \
        if (!context_current())                \
            return CUDA_ERROR_INVALID_CONTEXT; \
    } while (0)

/* cuda_context.c */
void context_setup(void);
CUcontext context_current(void);

/* cuda_region.c: ranges of addresses and what stands behind them (with the driver lock held). */
typedef enum {
    REGION_MAPPED,     /* cuMemMap */
    REGION_ALLOCATED,  /* cuMemAlloc */
    REGION_IPC,        /* cuIpcOpenMemHandle */
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
    int chunk; /* row in the host's table; -1: the entry is free */
    int device;
    int references; /* what cuMemRelease gives back */
    int mappings;   /* regions, and copies in progress */
    uint32_t generation;
    chunk_file file;
    CUmemAllocationProp properties;
} handle_record;

CUresult handle_create(int device_index, uint64_t bytes, const CUmemAllocationProp *properties, int *handle);
CUresult handle_adopt(int chunk, int descriptor, int *handle); /* of a chunk opened from elsewhere */
handle_record *handle_record_of(int handle);
CUmemGenericAllocationHandle handle_value(int handle);
int handle_of_value(CUmemGenericAllocationHandle value); /* 0 when it is none */
void handle_unmap(int handle);                           /* one mapping less */
void handle_release(int handle);                         /* one reference less */
void handles_close_after_fork(void);

/* cuda_copy.c */
#define PHANTOM_MIN_BYTES \
    65536ull /* copies up to this are real even in phantom mode: headers, tokens, canaries */
CUresult copy_check(uint64_t target, uint64_t source, int *is_pageable);
CUresult copy_bytes(uint64_t target, uint64_t source, uint64_t bytes);
CUresult fill_bytes(uint64_t target, uint32_t value, int width, uint64_t count);

/* cuda_stream.c */
typedef enum { OP_COPY, OP_FILL, OP_RECORD, OP_WAIT, OP_CALL } op_kind;
typedef struct op {
    struct op *next;
    op_kind kind;
    uint64_t target, source, bytes;
    uint32_t value;
    int width;
    CUevent event;
    uint64_t sequence;
    CUhostFn function;
    void *argument;
} op;
CUresult stream_submit(CUstream stream, op submitted);
CUresult stream_finish(CUstream stream); /* waits until it is empty */
void streams_finish(int including_non_blocking);

/* cuda_event.c */
void event_complete(CUevent event, uint64_t sequence);
void event_await(CUevent event, uint64_t sequence);
void event_let_go(CUevent event);

/* cuda_memory.c, cuda_entry.c */
CUresult allocation_free(region *allocated); /* with the driver lock held */
CUresult not_supported(void);

#endif
