/* Two sorted tables of address ranges: reservations, and what is usable (mappings, allocations, pinned
 * memory). */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

region_table regions, reservations;

int region_is_device(const region *candidate) {
    return candidate->kind == REGION_MAPPED || candidate->kind == REGION_ALLOCATED ||
           candidate->kind == REGION_IPC || candidate->kind == REGION_STORAGE;
}

/* Index of the first region whose base is above the address. */
static int first_above(const region_table *table, uint64_t address) {
    int low = 0, high = table->count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (table->items[middle].base <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

region *region_at(region_table *table, uint64_t address) {
    int above = first_above(table, address);
    if (!above)
        return NULL;
    region *candidate = &table->items[above - 1];
    return address - candidate->base < candidate->bytes ? candidate : NULL;
}

region *region_of_base(region_table *table, uint64_t base, region_kind kind) {
    region *candidate = region_at(table, base);
    return candidate && candidate->base == base && candidate->kind == kind ? candidate : NULL;
}

int region_overlaps(region_table *table, uint64_t base, uint64_t bytes) {
    int above = first_above(table, base);
    if (above < table->count && table->items[above].base - base < bytes)
        return 1;
    return region_at(table, base) != NULL;
}

int region_insert(region_table *table, region added) {
    if (table->count == table->room) {
        int room = table->room ? table->room * 2 : 64;
        region *items = realloc(table->items, (size_t)room * sizeof *items);
        if (!items)
            return -1;
        table->items = items;
        table->room = room;
    }
    int at = first_above(table, added.base);
    memmove(&table->items[at + 1], &table->items[at], (size_t)(table->count - at) * sizeof added);
    added.id = driver_new_id();
    table->items[at] = added;
    table->count++;
    return 0;
}

void region_remove(region_table *table, region *removed) {
    int at = (int)(removed - table->items);
    memmove(removed, removed + 1, (size_t)(table->count - at - 1) * sizeof *removed);
    table->count--;
}

/* PROT_NONE: the CPU that touches a device pointer faults, as on real hardware. */
void *reserve_addresses(uint64_t bytes, uint64_t alignment) {
    uint64_t mapped = bytes + alignment;
    char *start = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    char *aligned = (char *)round_up((uint64_t)start, alignment);
    if (aligned > start)
        munmap(start, (size_t)(aligned - start));
    if (start + mapped > aligned + bytes)
        munmap(aligned + bytes, (size_t)(start + mapped - aligned - bytes));
    return aligned;
}
