/* Moving bytes, at the speed of the link.
 *
 * A copy goes piece by piece: find what stands behind both addresses, book the engine, move the bytes (unless
 * the host is a phantom), and wait until the engine would be done. */
#include "cuda_driver.h"

#include <stdlib.h>
#include <string.h>

#define REAL_PIECE_BYTES (4ull << 20)     /* small enough that several processes share the link evenly */
#define PHANTOM_PIECE_BYTES (32ull << 20) /* 0.6 ms at 53 GB/s: waking up more often would only burn CPU */
#define PATTERN_MAX_BYTES (1ull << 20)    /* of a fill: repeated when it is bigger */
#define RUN_AHEAD_NS 300000ull            /* sleeping for less than this costs more than it paces */

typedef struct {
    int handle; /* of device memory, pinned by one mapping while in use; 0 on the host */
    int is_pageable;
    uint64_t address, offset;
} place;

/* Finds what stands behind an address and shortens the piece to what is contiguous there. */
static CUresult find_place(uint64_t address, int access, uint64_t *bytes, place *found) {
    CUresult result = CUDA_SUCCESS;
    *found = (place){.address = address, .is_pageable = 1};
    driver_lock();
    const region *behind = region_at(&regions, address);
    if (behind && region_is_device(behind)) {
        if ((behind->access & access) != access)
            result = CUDA_ERROR_INVALID_VALUE;
        found->handle = behind->handle;
        found->is_pageable = 0;
        found->offset = address - behind->base;
    } else if (behind) {
        found->is_pageable = 0;
    } else if (region_at(&reservations, address)) {
        result = CUDA_ERROR_INVALID_VALUE; /* reserved, nothing mapped */
    }
    if (behind && behind->base + behind->bytes - address < *bytes)
        *bytes = behind->base + behind->bytes - address;
    if (result == CUDA_SUCCESS && found->handle)
        handle_record_of(found->handle)
            ->mappings++; /* a free in another thread must not close it under the copy */
    driver_unlock();
    return result;
}

static void leave_place(const place *left) {
    if (!left->handle)
        return;
    driver_lock();
    handle_unmap(left->handle);
    driver_unlock();
}

static chunk_file file_of(const place *at) {
    driver_lock();
    chunk_file file = handle_record_of(at->handle)->file;
    driver_unlock();
    return file;
}

static int move_on_device(const place *target, const place *source, uint64_t bytes) {
    chunk_file to = file_of(target), from = file_of(source);
    char *bounce = malloc(bytes);
    int failed = !bounce || chunk_file_read(&from, source->offset, bounce, bytes) ||
                 chunk_file_write(&to, target->offset, bounce, bytes);
    free(bounce);
    return failed;
}

static int move_piece(const place *target, const place *source, uint64_t bytes) {
    if (target->handle && source->handle)
        return move_on_device(target, source, bytes);
    if (target->handle) {
        chunk_file to = file_of(target);
        return chunk_file_write(&to, target->offset, (const void *)source->address, bytes);
    }
    if (source->handle) {
        chunk_file from = file_of(source);
        return chunk_file_read(&from, source->offset, (void *)target->address, bytes);
    }
    memcpy((void *)target->address, (const void *)source->address, bytes);
    return 0;
}

/* Copies inside a device or inside the host cross no link. */
static uint64_t book_piece(const place *target, const place *source, uint64_t bytes, uint64_t earliest_ns) {
    if (!target->handle == !source->handle)
        return 0;
    direction way = target->handle ? HOST_TO_DEVICE : DEVICE_TO_HOST;
    const place *on_device = target->handle ? target : source, *on_host = target->handle ? source : target;
    driver_lock();
    int index = driver_device(handle_record_of(on_device->handle)->device);
    driver_unlock();
    return engine_book(index, way, on_host->is_pageable, bytes, earliest_ns);
}

static CUresult copy_piece(uint64_t to, uint64_t from, uint64_t *bytes, int moves_bytes, uint64_t *end_ns) {
    place target, source;
    if (mps_has_ended(driver_process()))
        return CUDA_ERROR_MPS_CLIENT_TERMINATED;
    CUresult result = find_place(from, CU_MEM_ACCESS_READ, bytes, &source);
    if (result != CUDA_SUCCESS)
        return result;
    result = find_place(to, CU_MEM_ACCESS_READWRITE, bytes, &target);
    if (result == CUDA_SUCCESS) {
        uint64_t booked_ns = book_piece(&target, &source, *bytes, *end_ns);
        if (moves_bytes && move_piece(&target, &source, *bytes))
            result = CUDA_ERROR_OPERATING_SYSTEM;
        if (booked_ns)
            *end_ns = booked_ns;
        leave_place(&target);
    }
    leave_place(&source);
    return result;
}

CUresult copy_bytes(uint64_t target, uint64_t source, uint64_t bytes) {
    uint64_t end_ns = clock_ns();
    return copy_from(target, source, bytes, &end_ns);
}

CUresult copy_from(uint64_t target, uint64_t source, uint64_t bytes, uint64_t *end_ns) {
    int moves_bytes = !host->is_phantom || bytes <= PHANTOM_MIN_BYTES;
    uint64_t piece_limit = moves_bytes ? REAL_PIECE_BYTES : PHANTOM_PIECE_BYTES;
    while (bytes) {
        uint64_t piece = bytes < piece_limit ? bytes : piece_limit;
        CUresult result = copy_piece(target, source, &piece, moves_bytes, end_ns);
        if (result != CUDA_SUCCESS)
            return result;
        target += piece;
        source += piece;
        bytes -= piece;
        uint64_t now_ns = clock_ns();
        if (*end_ns > now_ns + (bytes ? RUN_AHEAD_NS : 0))
            sleep_until(*end_ns);
    }
    return CUDA_SUCCESS;
}

CUresult copy_corrupt(uint64_t target, uint64_t bytes) {
    char spoilt;
    uint64_t middle = target + bytes / 2;
    CUresult result = copy_bytes((uint64_t)&spoilt, middle, 1);
    spoilt ^= 1;
    return result == CUDA_SUCCESS ? copy_bytes(middle, (uint64_t)&spoilt, 1) : result;
}

/* What an asynchronous copy can be refused for at once; and whether it must be synchronous, for pageable
 * memory. */
CUresult copy_check(uint64_t target, uint64_t source, int *is_pageable) {
    uint64_t bytes = 1;
    place to, from;
    CUresult result = find_place(source, CU_MEM_ACCESS_READ, &bytes, &from);
    if (result != CUDA_SUCCESS)
        return result;
    result = find_place(target, CU_MEM_ACCESS_READWRITE, &bytes, &to);
    leave_place(&from);
    if (result != CUDA_SUCCESS)
        return result;
    leave_place(&to);
    *is_pageable = to.is_pageable || from.is_pageable;
    return CUDA_SUCCESS;
}

static int fill_piece(const place *target, const char *pattern, int is_zero, uint64_t bytes) {
    if (!target->handle) {
        memcpy((void *)target->address, pattern, bytes);
        return 0;
    }
    chunk_file to = file_of(target);
    return is_zero ? chunk_file_zero(&to, target->offset, bytes)
                   : chunk_file_write(&to, target->offset, pattern, bytes);
}

static int is_on_host(uint64_t address) {
    driver_lock();
    const region *behind = region_at(&regions, address);
    int on_host = !behind || !region_is_device(behind);
    driver_unlock();
    return on_host;
}

/* Filling takes no time: a device fills at terabytes per second. Zero is real in phantom mode too, because it
 * costs nothing and a scrub must be provable; other big fills of a phantom move no bytes. */
CUresult fill_bytes(uint64_t target, uint32_t value, int width, uint64_t count) {
    uint64_t bytes = count * (uint64_t)width;
    uint64_t pattern_bytes = bytes < PATTERN_MAX_BYTES ? bytes : PATTERN_MAX_BYTES;
    int is_zero = value == 0 && !is_on_host(target);
    if (host->is_phantom && value != 0 && bytes > PHANTOM_MIN_BYTES)
        return CUDA_SUCCESS;
    char *pattern = is_zero ? NULL : malloc(pattern_bytes);
    if (!is_zero && !pattern)
        return CUDA_ERROR_OPERATING_SYSTEM;
    for (uint64_t i = 0; !is_zero && i < pattern_bytes; i += (uint64_t)width)
        memcpy(pattern + i, &value, (size_t)width); /* little-endian, as all our targets are */
    CUresult result = CUDA_SUCCESS;
    while (bytes && result == CUDA_SUCCESS) {
        uint64_t piece = is_zero || bytes < pattern_bytes ? bytes : pattern_bytes;
        place at;
        result = find_place(target, CU_MEM_ACCESS_READWRITE, &piece, &at);
        if (result != CUDA_SUCCESS)
            break;
        if (fill_piece(&at, pattern, is_zero, piece))
            result = CUDA_ERROR_OPERATING_SYSTEM;
        leave_place(&at);
        target += piece;
        bytes -= piece;
    }
    free(pattern);
    return result;
}
