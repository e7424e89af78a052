/* The CUDA driver's result codes that softgpu returns or injects: number, name, text. */
#ifndef SOFTGPU_CUDA_RESULTS_H
#define SOFTGPU_CUDA_RESULTS_H

#define CUDA_RESULTS(ROW)                                                                                 \
    ROW(0, CUDA_SUCCESS, "no error")                                                                      \
    ROW(1, CUDA_ERROR_INVALID_VALUE, "invalid argument")                                                  \
    ROW(2, CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                                     \
    ROW(3, CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                            \
    ROW(46, CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable")           \
    ROW(100, CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                                  \
    ROW(101, CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                         \
    ROW(201, CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                                        \
    ROW(214, CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered")                         \
    ROW(220, CUDA_ERROR_NVLINK_UNCORRECTABLE, "uncorrectable NVLink error detected during the execution") \
    ROW(304, CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS")         \
    ROW(400, CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                                        \
    ROW(401, CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state")          \
    ROW(500, CUDA_ERROR_NOT_FOUND, "named symbol not found")                                              \
    ROW(600, CUDA_ERROR_NOT_READY, "device not ready")                                                    \
    ROW(700, CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                      \
    ROW(709, CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                                     \
    ROW(712, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,                                                   \
        "part or all of the requested memory range is already mapped")                                    \
    ROW(713, CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED,                                                       \
        "pointer does not correspond to a registered memory region")                                      \
    ROW(719, CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                                      \
    ROW(801, CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                                         \
    ROW(802, CUDA_ERROR_SYSTEM_NOT_READY, "system not yet initialized")                                   \
    ROW(810, CUDA_ERROR_MPS_CLIENT_TERMINATED, "MPS client terminated")                                   \
    ROW(999, CUDA_ERROR_UNKNOWN, "unknown error")

#define CUDA_RESULT_ENUM(number, name, text) name = number,
typedef enum { CUDA_RESULTS(CUDA_RESULT_ENUM) } CUresult;
#undef CUDA_RESULT_ENUM

#endif
