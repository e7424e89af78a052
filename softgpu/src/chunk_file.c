/* Layout of a chunk's file: the data, sparse; from the next page a bitmap of the pages that were ever
 * written; at the very end a footer that says which chunk it is.
 *
 * The bitmap makes memory dirty without cost: a page whose bit is not set reads as DIRTY_BYTE, whatever the
 * file holds. A bit is set after its page was written, so a death in between leaves the page dirty, not half
 * written.
 */
#define _GNU_SOURCE
#include "chunk_file.h"
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ull
#define FOOTER_MAGIC 0x4b4e554843475347ull

static uint64_t bitmap_bytes(uint64_t bytes) { return round_up((bytes + PAGE - 1) / PAGE, 64) / 8; }
static uint64_t tail_offset(uint64_t bytes) { return round_up(bytes, PAGE); }
static uint64_t tail_bytes(uint64_t bytes) {
    return round_up(bitmap_bytes(bytes) + sizeof(chunk_footer), PAGE);
}

int chunk_file_format(int descriptor, int index, uint64_t id, uint64_t bytes) {
    chunk_footer footer = {.magic = FOOTER_MAGIC, .id = id, .bytes = bytes, .index = (uint32_t)index};
    uint64_t end = tail_offset(bytes) + tail_bytes(bytes);
    if (ftruncate(descriptor, (off_t)end))
        return -1;
    /* Now, because a full file system would otherwise show as SIGBUS when the mapped bitmap is touched. */
    if (posix_fallocate(descriptor, (off_t)tail_offset(bytes), (off_t)tail_bytes(bytes)))
        return -1;
    ssize_t done = pwrite(descriptor, &footer, sizeof footer, (off_t)(end - sizeof footer));
    return done == (ssize_t)sizeof footer ? 0 : -1;
}

int chunk_file_identify(int descriptor, uint64_t file_bytes, chunk_footer *footer) {
    if (file_bytes < sizeof *footer)
        return -1;
    ssize_t done = pread(descriptor, footer, sizeof *footer, (off_t)(file_bytes - sizeof *footer));
    return done == (ssize_t)sizeof *footer && footer->magic == FOOTER_MAGIC ? 0 : -1;
}

int chunk_file_open(chunk_file *file, int descriptor, uint64_t bytes, int is_clean) {
    *file = (chunk_file){.descriptor = descriptor, .bytes = bytes};
    if (is_clean)
        return 0;
    file->written_bytes = tail_bytes(bytes);
    void *mapped = mmap(NULL, file->written_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor,
                        (off_t)tail_offset(bytes));
    if (mapped == MAP_FAILED) {
        close(descriptor);
        return -1;
    }
    /* A mapping, too, keeps the open description and its lock: a forked child must not inherit it. */
    madvise(mapped, file->written_bytes, MADV_DONTFORK);
    file->written = mapped;
    return 0;
}

void chunk_file_close(chunk_file *file) {
    if (file->written)
        munmap(file->written, file->written_bytes);
    close(file->descriptor);
    *file = (chunk_file){.descriptor = -1};
}

static int is_written(const chunk_file *file, uint64_t page) {
    return !file->written || (__atomic_load_n(&file->written[page / 64], __ATOMIC_ACQUIRE) >> page % 64 & 1);
}

static void mark_written(const chunk_file *file, uint64_t first, uint64_t end) {
    for (uint64_t page = first; file->written && page < end;) {
        uint64_t count = 64 - page % 64 < end - page ? 64 - page % 64 : end - page;
        uint64_t mask = (count == 64 ? UINT64_MAX : (1ull << count) - 1) << page % 64;
        if ((__atomic_load_n(&file->written[page / 64], __ATOMIC_RELAXED) & mask) != mask)
            __atomic_fetch_or(&file->written[page / 64], mask, __ATOMIC_RELEASE);
        page += count;
    }
}

static int transfer(int descriptor, uint64_t offset, char *bytes, uint64_t count, int is_write) {
    while (count) {
        ssize_t done = is_write ? pwrite(descriptor, bytes, count, (off_t)offset)
                                : pread(descriptor, bytes, count, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return -1;
        bytes += done;
        offset += (uint64_t)done;
        count -= (uint64_t)done;
    }
    return 0;
}

int chunk_file_read(const chunk_file *file, uint64_t offset, void *to, uint64_t bytes) {
    char *target = to;
    while (bytes) {
        uint64_t page = offset / PAGE, end = offset + bytes, run_end;
        int written = is_written(file, page);
        do
            run_end = ++page * PAGE;
        while (run_end < end && is_written(file, page) == written);
        uint64_t count = (run_end < end ? run_end : end) - offset;
        if (!written)
            memset(target, DIRTY_BYTE, count);
        else if (transfer(file->descriptor, offset, target, count, 0))
            return -1;
        target += count;
        offset += count;
        bytes -= count;
    }
    return 0;
}

/* A page that is about to be written in part must first hold what it read as so far. Under the lock, because
 * two processes may each write their part of the same fresh page. */
static int materialise(const chunk_file *file, uint64_t page) {
    if (is_written(file, page))
        return 0;
    char dirty[PAGE];
    uint64_t left = file->bytes - page * PAGE;
    int failed = 0;
    memset(dirty, DIRTY_BYTE, sizeof dirty);
    host_lock();
    if (!is_written(file, page)) {
        failed = transfer(file->descriptor, page * PAGE, dirty, left < PAGE ? left : PAGE, 1);
        if (!failed)
            mark_written(file, page, page + 1);
    }
    host_unlock();
    return failed;
}

static int materialise_edges(const chunk_file *file, uint64_t offset, uint64_t bytes) {
    uint64_t end = offset + bytes;
    if (offset % PAGE && materialise(file, offset / PAGE))
        return -1;
    return end % PAGE ? materialise(file, end / PAGE) : 0;
}

int chunk_file_write(const chunk_file *file, uint64_t offset, const void *from, uint64_t bytes) {
    if (materialise_edges(file, offset, bytes) ||
        transfer(file->descriptor, offset, (char *)(uintptr_t)from, bytes, 1))
        return -1;
    mark_written(file, offset / PAGE, (offset + bytes + PAGE - 1) / PAGE);
    return 0;
}

/* Whole pages become holes: scrubbing a device costs no host memory, and gives some back. */
int chunk_file_zero(const chunk_file *file, uint64_t offset, uint64_t bytes) {
    if (materialise_edges(file, offset, bytes))
        return -1;
    if (fallocate(file->descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes))
        return -1;
    mark_written(file, offset / PAGE, (offset + bytes + PAGE - 1) / PAGE);
    return 0;
}

/* The marks first: what is punched without them would read as zero, not as fresh. */
int chunk_file_forget(const chunk_file *file) {
    for (uint64_t word = 0; file->written && word < bitmap_bytes(file->bytes) / sizeof *file->written; word++)
        __atomic_store_n(&file->written[word], 0, __ATOMIC_RELEASE);
    return fallocate(file->descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)file->bytes);
}
