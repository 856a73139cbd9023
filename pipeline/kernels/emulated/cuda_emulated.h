// CUDA C++ as far as potstill's kernels use it, for g++: put before a .cu file with -include, it lets a CPU run its kernels.
//
// Owns the language's words, vector types and EXPORT; the rest is in the headers below. What is not here does not compile, which is meant.
// Blocks run one after another and threads of a block in turn (fibres.h), so a data race shows only by chance.
#pragma once

#include <algorithm>
#include <cassert>
#include <climits>
#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstring>
// These use a word that is defined below for something of their own.
#include <memory>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDA_EMULATED 1

#include "fibres.h"
#include "kernels.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
// Shared memory is one place for all threads, and a block is over before the next begins.
#define __shared__ static __attribute__((unused))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
#define warpSize 32

#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::emulated::dynamic_shared())
// Makes a kernel known to the driver; stands after its definition.
#define EXPORT(name) static ::emulated::Registered emulated_##name(#name, name)

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }

#include "half_types.h"
#include "intrinsics.h"
