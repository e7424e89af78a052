#ifndef SOFTGPU_FUZZ_STORAGE_H
#define SOFTGPU_FUZZ_STORAGE_H

#include "calls.h"

CUresult checkpoint_to(int pid, unsigned char *storage, uint64_t room);
CUresult restore_from(int pid, unsigned char *storage, CUcheckpointGpuPair *pairs, unsigned count);

#endif
