/* The bytes of one chunk of device memory, in one sparse file. */
#ifndef SOFTGPU_CHUNK_FILE_H
#define SOFTGPU_CHUNK_FILE_H

#include <stddef.h>
#include <stdint.h>

/* What fresh device memory reads as until it is written: not zero, so that memory handed on unscrubbed shows.
 */
#define DIRTY_BYTE 0xDB

typedef struct {
    uint64_t magic, id, bytes;
    uint32_t index; /* row in the host's chunk table */
    uint32_t reserved;
} chunk_footer;

/* One process's way to a chunk. */
typedef struct {
    int descriptor; /* holds the shared flock that keeps the chunk alive */
    uint64_t bytes;
    uint64_t *written; /* one bit for each 4 KiB page that was ever written; NULL when new memory is clean */
    size_t written_bytes;
} chunk_file;

int chunk_file_format(int descriptor, int index, uint64_t id, uint64_t bytes);
int chunk_file_identify(int descriptor, uint64_t file_bytes, chunk_footer *footer);
int chunk_file_open(chunk_file *file, int descriptor, uint64_t bytes,
                    int is_clean); /* takes the descriptor over */
void chunk_file_close(chunk_file *file);

/* All return 0, or -1 when the operating system refuses (a full /dev/shm, say). The range must lie in the
 * chunk. */
int chunk_file_read(const chunk_file *file, uint64_t offset, void *to, uint64_t bytes);
int chunk_file_write(const chunk_file *file, uint64_t offset, const void *from, uint64_t bytes);
int chunk_file_forget(const chunk_file *file); /* all of it is as fresh memory again */
int chunk_file_zero(const chunk_file *file, uint64_t offset, uint64_t bytes);

#endif
