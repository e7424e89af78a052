/* What a worker remembers of its own use of the host, to know what every call must answer. */
#ifndef SOFTGPU_FUZZ_WORKER_H
#define SOFTGPU_FUZZ_WORKER_H

#include "calls.h"
#include "fuzz.h"

enum {
    GPU_MAX = 2,
    BLOCK_MAX = 24,  /* of cuMemAlloc, pools and IPC */
    CHUNK_LIMIT = 24, /* of cuMemCreate and imports */
    RANGE_MAX = 8,
    RANGE_SLOTS = 8,
    STREAM_MAX = 3,
    EVENT_LIMIT = 3,
    BUFFER_BYTES = 32768,
};

#define MIB (1ull << 20)
#define STAMP_BYTES 64ull /* at the start of what is shared; never written again */

/* What is known of a piece of memory. Where it was never written it must read as DIRTY. */
typedef struct {
    int is_written; /* at least one byte beside the stamp */
    int is_known;   /* the cell below holds what was written last */
    int is_fill;    /* of one byte value, the tag */
    uint64_t offset, bytes, tag;
} content;

typedef struct {
    CUdeviceptr address; /* 0: the row is free */
    uint64_t bytes; /* 0: of another process, and not asked for yet */
    int device, is_ipc, is_shared;
    CUcontext context;
    content holds;
} block;

typedef struct {
    CUmemGenericAllocationHandle value; /* 0 once released; the row is free when nothing is mapped either */
    uint64_t bytes;
    int device, mappings, is_imported, is_shared;
    content holds;
} chunk;

typedef struct {
    CUdeviceptr base; /* 0: the row is free */
    int slots;
    int mapped[RANGE_SLOTS]; /* the chunk's row + 1; 0: nothing */
} range;

typedef struct {
    generator random;
    int number;
    pid_t process;
    uint64_t incarnation, operation;
    uint64_t answers; /* that calls gave so far */
    CUcontext primary[GPU_MAX], created;
    int pool_is_made, has_shared;
    CUmemoryPool pool;
    block blocks[BLOCK_MAX];
    chunk chunks[CHUNK_LIMIT];
    range ranges[RANGE_MAX];
    CUstream streams[STREAM_MAX];
    int is_pending[STREAM_MAX];
    CUevent events[EVENT_LIMIT];
    unsigned char *pinned, *registered, *scratch;
    int is_pinned, is_registered, host_calls;
    nvmlDevice gpus[GPU_MAX];
    event_set *watched;
} worker;

extern worker self;

uint64_t chance(uint64_t limit);
_Noreturn void fail(const char *form, ...);
void now_doing(const char *what);
int did(CUresult result); /* 1 when it succeeded; 0 when refused for a reason that may be; else the run fails */
int got_memory(CUresult result);         /* the same, where running out of memory is a good reason */
int refused(CUresult result, CUresult expected); /* it must be refused, with this */
int answered(nvmlReturn result);
void settle_streams(void);

/* memory.c */
void check_content(CUdeviceptr address, uint64_t bytes, content *holds);
void write_content(CUdeviceptr address, uint64_t bytes, content *holds);
void stamp(CUdeviceptr address);
void check_stamp(CUdeviceptr address);

typedef int (*operation)(void);
typedef struct {
    const char *name;
    operation run;
    int weight;
} operation_kind;

/* memory.c, physical.c, queue.c, watch.c, checkpoint.c: the operations; each returns 1 when it did what it was asked */
extern const operation_kind memory_operations[], physical_operations[], queue_operations[], watch_operations[],
    checkpoint_operations[];
int end_orderly(void); /* frees everything */
void forget_blocks_of(CUcontext context);
int free_block(block *freed);

#endif
