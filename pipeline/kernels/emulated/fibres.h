// The threads of one block as fibres: each has a stack of its own and runs until it must wait for others.
//
// Owns scheduling, barriers and what lanes of a warp do together. Knows neither kernels nor memory.
// What CUDA leaves undefined is refused here: a barrier that some threads of a block never reach, lanes of a mask that do not come.
#pragma once

#include <cstddef>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

// The most threads of a block, and the lanes of a warp.
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned WARP = 32;
// Bytes of shared memory that a block may have, when it asks for it and when it does not.
constexpr size_t MOST_SHARED = 227 << 10, PLAIN_SHARED = 48 << 10;

// Place of the running thread in its block, of its block in the grid, and both sizes.
struct Place {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
extern Place* place;

// The running thread's number in its block, x fastest.
unsigned thread_number();
// Dynamic shared memory of the running block.
unsigned char* dynamic_shared();

// __syncthreads: returns when every thread of the block has called it.
void barrier();

// What the lanes of `mask` do together: each leaves a pointer, the last to come calls `combine` once with all of them (null for
// lanes that are not in the mask), then all go on. All must give the same name and mask.
using Combine = void (*)(void* const* lanes, unsigned mask);
void together(const char* name, unsigned mask, void* mine, Combine combine);

// A kernel's body with its arguments bound.
struct Body {
    const char* name;
    void (*call)(const void* arguments);
    const void* arguments;
};

// Runs all blocks, one after another. Dynamic shared memory begins as NaNs in each.
void run(const Body& body, dim3 grid, dim3 block, size_t shared_bytes);

// Ends the process with one line on what the running kernel did wrong: after it no result means anything.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulated

#define threadIdx (::emulated::place->thread)
#define blockIdx (::emulated::place->block)
#define blockDim (::emulated::place->block_size)
#define gridDim (::emulated::place->grid_size)
