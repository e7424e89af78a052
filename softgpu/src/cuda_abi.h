/* The part of the CUDA driver's binary interface that softgpu answers, declared by ourselves.
 *
 * Layouts and numbers are those that cuda-python 13 was built with (cuda/bindings/cydriver.pxd); no vendor
 * header is needed to build. Exported functions carry the names that the driver exports (with _v2 and so on),
 * because a client may look them up by name as well as through cuGetProcAddress.
 */
#ifndef SOFTGPU_CUDA_ABI_H
#define SOFTGPU_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

#include "cuda_results.h"

#define CUDA_EXPORT __attribute__((visibility("default")))

typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef unsigned long long CUmemGenericAllocationHandle;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmemPoolHandle_st *CUmemoryPool;
typedef struct CUIcheckpointOperation_st *CUcheckpointOperationHandle;
typedef void (*CUhostFn)(void *user_data);

typedef struct {
    unsigned char bytes[16];
} CUuuid;
typedef struct {
    unsigned char bytes[64];
} CUipcMemHandle;
typedef struct {
    unsigned char bytes[64];
} CUipcEventHandle;
typedef struct {
    int type;
    int id;
} CUmemLocation;
typedef struct {
    CUmemLocation location;
    int flags;
} CUmemAccessDesc;
typedef struct {
    int type;
    int requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct {
        unsigned char compressionType, gpuDirectRDMACapable;
        unsigned short usage;
        unsigned char reserved[4];
    } allocFlags;
} CUmemAllocationProp;
typedef struct {
    int allocType;
    int handleTypes;
    CUmemLocation location;
    void *win32SecurityAttributes;
    size_t maxSize;
    unsigned short usage;
    unsigned char reserved[54];
} CUmemPoolProps;

typedef struct {
    unsigned timeoutMs, reserved0;
    uint64_t reserved1[7];
} CUcheckpointLockArgs;
typedef struct {
    CUdeviceptr devPtr;
    size_t size;
    CUstream stream;
} CUcheckpointCustomStoragePerDeviceData;
typedef struct {
    CUcheckpointOperationHandle handle;
    CUcheckpointCustomStoragePerDeviceData *perDeviceData;
    unsigned deviceCount;
} CUcheckpointCustomStorageInfo;
typedef struct {
    CUcheckpointCustomStorageInfo **customStorageInfo_out;
    char reserved[56];
} CUcheckpointCheckpointArgs;
typedef struct {
    CUuuid oldUuid, newUuid;
} CUcheckpointGpuPair;
typedef struct {
    CUcheckpointGpuPair *gpuPairs;
    unsigned gpuPairsCount, padding0;
    CUcheckpointCustomStorageInfo **customStorageInfo_out;
    char reserved[40];
} CUcheckpointRestoreArgs;

_Static_assert(sizeof(CUcheckpointLockArgs) == 64, "CUcheckpointLockArgs is read from the client's memory");
_Static_assert(sizeof(CUcheckpointCheckpointArgs) == 64, "likewise");
_Static_assert(sizeof(CUcheckpointRestoreArgs) == 64, "likewise");
_Static_assert(sizeof(CUmemAccessDesc) == 12, "CUmemAccessDesc is an array element of the client");
_Static_assert(sizeof(CUmemAllocationProp) == 32, "CUmemAllocationProp is written into the client's memory");
_Static_assert(offsetof(CUmemPoolProps, maxSize) == 24, "CUmemPoolProps is read from the client's memory");

enum { CU_MEM_LOCATION_DEVICE = 1 };
enum { CU_MEM_ALLOCATION_PINNED = 1 };
enum { CU_MEM_HANDLE_POSIX_FD = 1 };
enum { CU_MEM_ACCESS_NONE = 0, CU_MEM_ACCESS_READ = 1, CU_MEM_ACCESS_READWRITE = 3 };
enum { CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2 };
enum { CU_STREAM_NON_BLOCKING = 1, CU_EVENT_DISABLE_TIMING = 2, CU_EVENT_INTERPROCESS = 4 };
enum { CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1 };
enum { CU_ENTRY_FOUND = 0, CU_ENTRY_UNKNOWN = 1, CU_ENTRY_TOO_OLD = 2 };

#endif
