// The CUDA driver API as far as cudarc and candle-core call it: devices, contexts, streams, events, modules and launches. Everything is
// done when the call returns, but for copies from and to pinned memory (pinned.h) and sums over several ranks (nccl.cpp), which streams and
// events are waited for; what copies and allocates is in transfers.cpp.
// Codes are the driver's own (cuda.h).

#include "driver.h"

#include "fibres.h"
#include "kernels.h"
#include "memory.h"
#include "pinned.h"

#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <unistd.h>

namespace emulated {

std::mutex& device() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

std::shared_ptr<Collective>& last_collective() {
    static thread_local std::shared_ptr<Collective> last;
    return last;
}

static void wait_for(const std::shared_ptr<Collective>& collective) {
    while (collective && collective->launched && !collective->over) {
        usleep(50);
    }
}

void settle() {
    wait_for(last_collective());
}

int refuse(int code, const char* format, ...) {
    fprintf(stderr, "emulated GPU: ");
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, " (error %d)\n", code);
    return code;
}

static std::map<std::string, Kernel*>& kernels() {
    static auto* table = new std::map<std::string, Kernel*>;
    return *table;
}

void add_kernel(Kernel* kernel) {
    kernels()[kernel->name] = kernel;
}

Kernel* find_kernel(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : found->second;
}

}  // namespace emulated

using namespace emulated;

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700;

// CUfunction_attribute.
constexpr int MAX_THREADS_PER_BLOCK = 0, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, PREFERRED_SHARED_MEMORY_CARVEOUT = 9;

// Handles only have to differ from null.
char context, stream, module_handle, pool;
thread_local void* current_context;

struct Event {
    std::chrono::steady_clock::time_point recorded;
    // How many copies it comes after.
    unsigned long long copies;
    // Whether it was found not to be there yet, as a real one may.
    bool asked;
    // The sum over several ranks that it comes after, if any.
    std::shared_ptr<Collective> after;
};

// Copies are over in the order they were begun in, on whatever stream: more than is promised, and what is waited for is over in any case.
int wait_for_copies(unsigned long long count) {
    std::lock_guard<std::mutex> lock(device());
    finish_copies(count);
    return SUCCESS;
}

}  // namespace

API cuInit(unsigned) { return SUCCESS; }

API cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

API cuDeviceGetCount(int* count) {
    *count = 1;
    return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

API cuDeviceGetName(char* name, int bytes, int) {
    snprintf(name, size_t(bytes), "Emulated GPU");
    return SUCCESS;
}

API cuDeviceGetUuid_v2(char* uuid, int) {
    memcpy(uuid, "emulated-gpu-000", 16);
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = DEVICE_BYTES;
    return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int) {
    // What a device of compute capability 8.0 offers, with the shared memory of 9.0: kernels are held to the larger of both elsewhere.
    static const std::map<int, int> values = {
        {1, MOST_THREADS}, {2, 1024}, {3, 1024}, {4, 64},                // threads of a block, by direction
        {5, 0x7fffffff}, {6, 65535}, {7, 65535},                         // blocks of a grid, by direction
        {8, PLAIN_SHARED}, {81, 228 << 10}, {97, MOST_SHARED},           // shared memory: block, multiprocessor, block on request
        {10, WARP}, {12, 65536}, {16, 4}, {39, 2048}, {38, 1 << 20},     // warp, registers, multiprocessors, their threads, L2 cache
        {75, 8}, {76, 0},                                                // compute capability
        {41, 1}, {83, 0}, {95, 0}, {115, 1},                             // one address space; no managed memory, no cooperation; pools
    };
    auto found = values.find(attribute);
    if (found == values.end()) {
        return refuse(INVALID_VALUE, "cuDeviceGetAttribute: attribute %d is not known", attribute);
    }
    *value = found->second;
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** made, int) {
    *made = &context;
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxDestroy_v2(void*) { return SUCCESS; }
API cuCtxSetCurrent(void* wanted) {
    current_context = wanted;
    return SUCCESS;
}
API cuCtxGetCurrent(void** found) {
    *found = current_context;
    return SUCCESS;
}
API cuCtxSynchronize() {
    settle();
    return wait_for_copies(copies_begun());
}
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return SUCCESS;
}

API cuStreamCreate(void** made, unsigned) {
    *made = &stream;
    return SUCCESS;
}
API cuStreamCreateWithPriority(void** made, unsigned flags, int) { return cuStreamCreate(made, flags); }
API cuStreamDestroy_v2(void*) { return SUCCESS; }
API cuStreamSynchronize(void*) {
    settle();
    return wait_for_copies(copies_begun());
}
API cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }
API cuStreamIsCapturing(void*, int* capturing) {
    *capturing = 0;
    return SUCCESS;
}

API cuEventCreate(void** made, unsigned) {
    *made = new Event{};
    return SUCCESS;
}
API cuEventDestroy_v2(void* event) {
    delete static_cast<Event*>(event);
    return SUCCESS;
}
API cuEventRecord(void* event, void*) {
    auto last = last_collective();
    if (last && !last->launched) {
        return refuse(INVALID_VALUE, "an event is recorded before NCCL has launched what it is to wait for (ncclInProgress)");
    }
    std::lock_guard<std::mutex> lock(device());
    *static_cast<Event*>(event) = {std::chrono::steady_clock::now(), copies_begun(), false, last};
    return SUCCESS;
}
API cuEventQuery(void* event) {
    auto& asked = *static_cast<Event*>(event);
    if (asked.after && !asked.after->over) {
        return NOT_READY;
    }
    {
        std::lock_guard<std::mutex> lock(device());
        if (copying(asked.copies) && !asked.asked) {
            asked.asked = true;
            return NOT_READY;
        }
    }
    return wait_for_copies(asked.copies);
}
API cuEventSynchronize(void* event) {
    wait_for(static_cast<Event*>(event)->after);
    return wait_for_copies(static_cast<Event*>(event)->copies);
}
API cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
    std::chrono::duration<float, std::milli> time = static_cast<Event*>(to)->recorded - static_cast<Event*>(from)->recorded;
    *milliseconds = time.count();
    return SUCCESS;
}

API cuDeviceGetDefaultMemPool(void** found, int) {
    *found = &pool;
    return SUCCESS;
}
API cuDeviceGetMemPool(void** found, int device) { return cuDeviceGetDefaultMemPool(found, device); }
API cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
API cuMemPoolGetAttribute(void*, int attribute, unsigned long long* value) {
    constexpr int RESERVED = 5, USED = 7;
    if (attribute != RESERVED && attribute != USED) {
        return refuse(INVALID_VALUE, "cuMemPoolGetAttribute: attribute %d is not emulated", attribute);
    }
    // Nothing that was freed is kept.
    *value = allocated();
    return SUCCESS;
}
API cuMemPoolTrimTo(void*, size_t) { return SUCCESS; }

// Whatever image is given, the kernels are those that this library was built with.
API cuModuleLoadData(void** made, const void* image) {
    *made = &module_handle;
    return image == nullptr ? INVALID_VALUE : SUCCESS;
}
API cuModuleLoad(void**, const char* file) { return refuse(NOT_FOUND, "cuModuleLoad: %s: only images in memory are emulated", file); }
API cuModuleUnload(void*) { return SUCCESS; }
API cuModuleGetFunction(void** found, void*, const char* name) {
    *found = find_kernel(name);
    return *found == nullptr ? refuse(NOT_FOUND, "no kernel is called %s", name) : SUCCESS;
}

API cuFuncGetAttribute(int* value, int attribute, void* function) {
    const auto* kernel = static_cast<Kernel*>(function);
    // Static and constant memory, stack, registers and versions are the compiler's business and not known here.
    if (attribute != MAX_THREADS_PER_BLOCK && attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        return refuse(INVALID_VALUE, "cuFuncGetAttribute: %s: attribute %d is not emulated", kernel->name, attribute);
    }
    *value = attribute == MAX_THREADS_PER_BLOCK ? int(MOST_THREADS) : int(kernel->most_shared);
    return SUCCESS;
}

API cuFuncSetAttribute(void* function, int attribute, int value) {
    auto* kernel = static_cast<Kernel*>(function);
    if (attribute == PREFERRED_SHARED_MEMORY_CARVEOUT) {
        return SUCCESS;
    }
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || size_t(value) > MOST_SHARED) {
        return refuse(INVALID_VALUE, "cuFuncSetAttribute: %s: attribute %d of %d is not possible", kernel->name, attribute, value);
    }
    kernel->most_shared = std::max(PLAIN_SHARED, size_t(value));
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared) {
    *blocks = int(std::min(2048 / size_t(threads), shared == 0 ? 32 : (MOST_SHARED + 1024) / (shared + 1024)));
    return SUCCESS;
}

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void*,
                   void** arguments, void** extra) {
    Turn turn;
    auto* kernel = static_cast<Kernel*>(function);
    uint64_t threads = uint64_t(bx) * by * bz;
    bool grid_fits = gx > 0 && gy > 0 && gz > 0 && gx <= 0x7fffffff && gy <= 65535 && gz <= 65535;
    bool block_fits = threads > 0 && threads <= MOST_THREADS && bx <= 1024 && by <= 1024 && bz <= 64;
    if (!grid_fits || !block_fits || extra != nullptr) {
        return refuse(INVALID_VALUE, "%s: a grid of %u x %u x %u blocks of %u x %u x %u threads", kernel->name, gx, gy, gz, bx, by, bz);
    }
    if (shared > kernel->most_shared) {
        return refuse(INVALID_VALUE, "%s: %u bytes of shared memory, %zu allowed", kernel->name, shared, kernel->most_shared);
    }
    kernel->launch(*kernel, arguments, {gx, gy, gz}, {bx, by, bz}, shared);
    if (const void* begin = damaged()) {
        return refuse(ILLEGAL_ADDRESS, "%s wrote before or after the allocation at %p", kernel->name, begin);
    }
    return SUCCESS;
}

API cuGetErrorName(int code, const char** name) {
    static const std::map<int, const char*> names = {
        {SUCCESS, "CUDA_SUCCESS"},       {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {NOT_READY, "CUDA_ERROR_NOT_READY"},
        {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    };
    auto found = names.find(code);
    *name = found == names.end() ? "an error that the emulation does not know" : found->second;
    return SUCCESS;
}
API cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }
