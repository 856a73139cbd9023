// The emulated device's memory: ordinary memory, with a margin on both sides of each allocation and a table of those that live.
#pragma once

#include <cstddef>

namespace emulated {

// What cuMemGetInfo reports and allocations stay within.
constexpr size_t DEVICE_BYTES = size_t(8) << 30;

// Null when there is not that much left. Begins as NaNs.
void* allocate(size_t bytes);
// Whether `pointer` was a live allocation's begin, and its margins were as they should be.
bool release(void* pointer);
// Whether `bytes` bytes from `pointer` lie in one live allocation.
bool holds(const void* pointer, size_t bytes);
// The first live allocation whose margins something wrote to, or null.
const void* damaged();
size_t allocated();

}  // namespace emulated
