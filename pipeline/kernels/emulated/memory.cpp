#include "memory.h"

#include "kernels.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(pointer, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(pointer, bytes)
#endif

namespace emulated {

namespace {

// The driver's own alignment, and a margin that keeps it.
constexpr size_t ALIGN = 256;
constexpr unsigned char MARGIN_BYTE = 0xA5;

struct Allocation {
    unsigned char* begin;
    size_t bytes;
};

// By the address of the first byte.
std::map<uintptr_t, Allocation>& live() {
    // Never destroyed: a program frees what it holds while it ends, in any order.
    static auto* table = new std::map<uintptr_t, Allocation>;
    return *table;
}

size_t in_use;

bool whole(const Allocation& allocation) {
#if defined(__SANITIZE_ADDRESS__)
    // The sanitizer itself reports who touches a margin.
    return allocation.begin != nullptr;
#else
    static const auto margin = [] {
        std::array<unsigned char, ALIGN> bytes;
        bytes.fill(MARGIN_BYTE);
        return bytes;
    }();
    return memcmp(allocation.begin - ALIGN, margin.data(), ALIGN) == 0 &&
           memcmp(allocation.begin + allocation.bytes, margin.data(), ALIGN) == 0;
#endif
}

const Allocation* around(uintptr_t address) {
    auto after = live().upper_bound(address);
    return after == live().begin() ? nullptr : &std::prev(after)->second;
}

}  // namespace

void* allocate(size_t bytes) {
    if (bytes > DEVICE_BYTES - in_use) {
        return nullptr;
    }
    size_t padded = (bytes + 2 * ALIGN + ALIGN - 1) / ALIGN * ALIGN;
    auto* block = static_cast<unsigned char*>(aligned_alloc(ALIGN, padded));
    if (block == nullptr) {
        return nullptr;
    }
    unsigned char* begin = block + ALIGN;
    memset(block, MARGIN_BYTE, padded);
    memset(begin, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(block, ALIGN);
    ASAN_POISON_MEMORY_REGION(begin + bytes, padded - ALIGN - bytes);
    in_use += bytes;
    live()[reinterpret_cast<uintptr_t>(begin)] = {begin, bytes};
    return begin;
}

bool release(void* pointer) {
    auto found = live().find(reinterpret_cast<uintptr_t>(pointer));
    if (found == live().end()) {
        return false;
    }
    Allocation allocation = found->second;
    bool intact = whole(allocation);
    in_use -= allocation.bytes;
    live().erase(found);
    ASAN_UNPOISON_MEMORY_REGION(allocation.begin - ALIGN, allocation.bytes + 2 * ALIGN);
    free(allocation.begin - ALIGN);
    return intact;
}

bool holds(const void* pointer, size_t bytes) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    const Allocation* found = around(address);
    if (found == nullptr) {
        return false;
    }
    size_t offset = address - reinterpret_cast<uintptr_t>(found->begin);
    return offset <= found->bytes && bytes <= found->bytes - offset;
}

const void* damaged() {
    for (const auto& entry : live()) {
        if (!whole(entry.second)) {
            return entry.second.begin;
        }
    }
    return nullptr;
}

size_t allocated() {
    return in_use;
}

void check_argument(const char* kernel, unsigned argument, const void* pointer, size_t align) {
    if (pointer != nullptr && !holds(pointer, 0)) {
        fail("argument %u of %s, %p, points to no device memory", argument, kernel, pointer);
    }
    if (reinterpret_cast<uintptr_t>(pointer) % align != 0) {
        fail("argument %u of %s, %p, is not aligned to %zu bytes", argument, kernel, pointer, align);
    }
}

}  // namespace emulated
