#include "fuzz.h"

static uint64_t mix(uint64_t value) { /* splitmix64's finaliser */
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ value >> 27) * 0x94d049bb133111ebull;
    return value ^ value >> 31;
}

generator generator_of(uint64_t seed, uint64_t worker, uint64_t incarnation) {
    return (generator){mix(seed + 1) ^ mix(worker + 0x1000) ^ mix(incarnation + 0x2000000)};
}

uint64_t next(generator *from) { return mix(from->state += 0x9e3779b97f4a7c15ull); }

uint64_t below(generator *from, uint64_t limit) { return next(from) % limit; }

/* Deterministic bytes of a tag, the same from any alignment of `count`. */
void fill_pattern(unsigned char *bytes, uint64_t tag, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        if (i % 8 == 0)
            tag = mix(tag + 1);
        bytes[i] = (unsigned char)(tag >> i % 8 * 8);
    }
}
