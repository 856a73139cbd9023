#include "pinned.h"

#include "kernels.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <vector>

namespace emulated {

namespace {

// What the host finds where a copy's bytes are not there yet.
constexpr unsigned char NOT_YET = 0xA5;

struct Copy {
    unsigned long long number;
    unsigned char* host;
    // What the host's bytes are, or will be.
    std::vector<unsigned char> bytes;
    bool to_host;
};

// Never destroyed: a program frees what it holds while it ends, in any order.
std::map<uintptr_t, size_t>& live() {
    static auto* table = new std::map<uintptr_t, size_t>;
    return *table;
}
std::list<Copy>& under_way() {
    static auto* list = new std::list<Copy>;
    return *list;
}

unsigned long long begun;

unsigned char* bytes_of(const void* pointer) {
    return static_cast<unsigned char*>(const_cast<void*>(pointer));
}

}  // namespace

void* allocate_pinned(size_t bytes) {
    void* pointer = malloc(bytes);
    if (pointer != nullptr) {
        live()[reinterpret_cast<uintptr_t>(pointer)] = bytes;
    }
    return pointer;
}

bool release_pinned(void* pointer) {
    auto found = live().find(reinterpret_cast<uintptr_t>(pointer));
    if (found == live().end()) {
        return false;
    }
    const unsigned char *begin = bytes_of(pointer), *end = begin + found->second;
    for (const Copy& copy : under_way()) {
        if (copy.host >= begin && copy.host < end) {
            return false;
        }
    }
    live().erase(found);
    free(pointer);
    return true;
}

bool pinned(const void* pointer, size_t bytes) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    auto after = live().upper_bound(address);
    if (after == live().begin()) {
        return false;
    }
    auto [begin, size] = *std::prev(after);
    return address - begin <= size && bytes <= size - (address - begin);
}

void copy_out(void* to, const void* from, size_t bytes) {
    memcpy(to, from, bytes);
    unsigned char* host = bytes_of(from);
    under_way().push_back({++begun, host, std::vector<unsigned char>(host, host + bytes), false});
}

void copy_in(void* to, const void* from, size_t bytes) {
    const unsigned char* device = bytes_of(from);
    under_way().push_back({++begun, bytes_of(to), std::vector<unsigned char>(device, device + bytes), true});
    memset(to, NOT_YET, bytes);
}

unsigned long long copies_begun() {
    return begun;
}

bool copying(unsigned long long count) {
    return !under_way().empty() && under_way().front().number <= count;
}

void finish_copies(unsigned long long count) {
    while (copying(count)) {
        Copy& copy = under_way().front();
        size_t size = copy.bytes.size();
        if (copy.to_host) {
            std::vector<unsigned char> untouched(size, NOT_YET);
            if (memcmp(copy.host, untouched.data(), size) != 0) {
                fail("%zu bytes at %p in the host's memory were written while the device copied there", size, copy.host);
            }
            memcpy(copy.host, copy.bytes.data(), size);
        } else if (memcmp(copy.host, copy.bytes.data(), size) != 0) {
            fail("%zu bytes at %p in the host's memory were changed while the device copied them", size, copy.host);
        }
        under_way().pop_front();
    }
}

}  // namespace emulated
