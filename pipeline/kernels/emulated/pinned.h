// Copies from and to pinned memory, which nobody waits for. The device is through with one only when an event or a stream behind it was
// waited for: until then what is to come is no data, and where the host changes what is copied the process ends.
#pragma once

#include <cstddef>

namespace emulated {

// Memory that copies need not wait for; null when there is none.
void* allocate_pinned(size_t bytes);
// Whether `pointer` was such an allocation's begin, and no copy still uses it.
bool release_pinned(void* pointer);
// Whether `bytes` bytes from `pointer` lie in one such allocation.
bool pinned(const void* pointer, size_t bytes);

// Copies to the device, which has them at once; the host's bytes are compared when it is over.
void copy_out(void* to, const void* from, size_t bytes);
// Copies from the device as its bytes are now; the host has them when it is over.
void copy_in(void* to, const void* from, size_t bytes);

// How many copies were begun.
unsigned long long copies_begun();
// Whether one of the first `count` copies is not over.
bool copying(unsigned long long count);
// Has the first `count` copies be over.
void finish_copies(unsigned long long count);

}  // namespace emulated
