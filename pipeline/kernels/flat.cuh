// How kernels walk over memory: packs of neighbouring values, so that a thread moves 16 bytes at a time, and one value at a time where packs
// do not fit. Right for any grid and any block of whole warps; 256 threads and ceil(n / 2048) blocks keep an H200 busy.
#pragma once

#include "ptx.cuh"

// The largest block that any kernel must take: it leaves each thread 64 registers.
constexpr int LARGEST_BLOCK = 1024;

// N values side by side; what is larger than 16 bytes is moved 16 at a time.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    T v[N];
};

// A number of values as a type, for functions that are written once for packs and for single values.
template <int N>
struct Width {
    static constexpr int value = N;
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from, long long i) {
    return *reinterpret_cast<const Pack<T, N>*>(from + i);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, long long i, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to + i) = pack;
}

__device__ __forceinline__ void convert(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }
__device__ __forceinline__ void convert(float from, float& to) { to = from; }
__device__ __forceinline__ void convert(__half from, float& to) { to = __half2float(from); }
__device__ __forceinline__ void convert(__nv_bfloat16 from, float& to) { to = __bfloat162float(from); }
__device__ __forceinline__ void convert(__half from, __nv_bfloat16& to) { to = __float2bfloat16_rn(__half2float(from)); }

// Whether packs of 16 bytes may begin at each of these: views of tensors begin anywhere.
template <class... P>
__device__ __forceinline__ bool aligned(const P*... pointers) {
    return ((reinterpret_cast<unsigned long long>(pointers) | ...) & 15) == 0;
}

// f(Width<N>, i) for every pack of N values, i its first, spread over the grid; f(Width<1>, i) for what is left and without alignment.
template <int N, class F>
__device__ __forceinline__ void each(long long n, bool packs, F f) {
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, threads = (long long)gridDim.x * blockDim.x;
    long long packed = packs ? n / N : 0;
    for (long long i = thread; i < packed; i += threads) {
        f(Width<N>(), i * N);
    }
    for (long long i = packed * N + thread; i < n; i += threads) {
        f(Width<1>(), i);
    }
}

// The same for one row of `width` values that the block walks over alone; packs must fit the width.
template <int N, class F>
__device__ __forceinline__ void along(int width, bool packs, F f) {
    int packed = packs && width % N == 0 ? width : 0;
    for (int i = threadIdx.x * N; i < packed; i += blockDim.x * N) {
        f(Width<N>(), i);
    }
    for (int i = packed + threadIdx.x; i < width; i += blockDim.x) {
        f(Width<1>(), i);
    }
}
