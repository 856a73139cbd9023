// The part of the driver API that allocates, copies and fills. Every device address is looked up before it is touched.

#include "driver.h"
#include "memory.h"
#include "pinned.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

using namespace emulated;

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2;

using Address = unsigned long long;

void* at(Address address) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

// Moves bytes of which `to` and `from`, where they are not null, are device memory.
int move(const char* name, void* to, const void* from, size_t bytes, const void* to_device, const void* from_device) {
    Turn turn;
    for (const void* place : {to_device, from_device}) {
        if (bytes > 0 && place != nullptr && !holds(place, bytes)) {
            return refuse(INVALID_VALUE, "%s: %zu bytes at %p are not within one allocation", name, bytes, place);
        }
    }
    if (bytes > 0) {
        memmove(to, from, bytes);
    }
    return SUCCESS;
}

}  // namespace

API cuMemAlloc_v2(Address* made, size_t bytes) {
    Turn turn;
    if (bytes == 0) {
        return refuse(INVALID_VALUE, "an allocation of 0 bytes");
    }
    void* pointer = allocate(bytes);
    *made = reinterpret_cast<uintptr_t>(pointer);
    return pointer == nullptr ? OUT_OF_MEMORY : SUCCESS;
}
API cuMemAllocAsync(Address* made, size_t bytes, void*) { return cuMemAlloc_v2(made, bytes); }
API cuMemAllocFromPoolAsync(Address* made, size_t bytes, void*, void*) { return cuMemAlloc_v2(made, bytes); }

API cuMemFree_v2(Address address) {
    Turn turn;
    if (address != 0 && !release(at(address))) {
        return refuse(INVALID_VALUE, "cuMemFree: %p is no allocation, or something wrote beside it", at(address));
    }
    return SUCCESS;
}
API cuMemFreeAsync(Address address, void*) { return cuMemFree_v2(address); }

API cuMemHostAlloc(void** made, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> lock(device());
    *made = allocate_pinned(bytes);
    return *made == nullptr ? OUT_OF_MEMORY : SUCCESS;
}
API cuMemFreeHost(void* pointer) {
    std::lock_guard<std::mutex> lock(device());
    return release_pinned(pointer) ? SUCCESS : refuse(INVALID_VALUE, "cuMemFreeHost: %p is no pinned memory, or is being copied", pointer);
}

API cuMemGetInfo_v2(size_t* left, size_t* total) {
    Turn turn;
    *left = DEVICE_BYTES - allocated();
    *total = DEVICE_BYTES;
    return SUCCESS;
}

API cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) { return move("cuMemcpyHtoD", at(to), from, bytes, at(to), nullptr); }
API cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void*) {
    {
        Turn turn;
        if (bytes > 0 && pinned(from, bytes) && holds(at(to), bytes)) {
            copy_out(at(to), from, bytes);
            return SUCCESS;
        }
    }
    return cuMemcpyHtoD_v2(to, from, bytes);
}
API cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) { return move("cuMemcpyDtoH", to, at(from), bytes, nullptr, at(from)); }
API cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void*) {
    {
        Turn turn;
        if (bytes > 0 && pinned(to, bytes) && holds(at(from), bytes)) {
            copy_in(to, at(from), bytes);
            return SUCCESS;
        }
    }
    return cuMemcpyDtoH_v2(to, from, bytes);
}
API cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) {
    return move("cuMemcpyDtoD", at(to), at(from), bytes, at(to), at(from));
}
API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void*) { return cuMemcpyDtoD_v2(to, from, bytes); }
API cuMemcpyPeerAsync(Address to, void*, Address from, void*, size_t bytes, void*) { return cuMemcpyDtoD_v2(to, from, bytes); }

API cuMemsetD8_v2(Address to, unsigned char value, size_t bytes) {
    Turn turn;
    if (bytes > 0 && !holds(at(to), bytes)) {
        return refuse(INVALID_VALUE, "cuMemsetD8: %zu bytes at %p are not within one allocation", bytes, at(to));
    }
    if (bytes > 0) {
        memset(at(to), value, bytes);
    }
    return SUCCESS;
}
API cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void*) { return cuMemsetD8_v2(to, value, bytes); }
