// How kernels walk over memory: packs of neighbouring values, so that a thread moves 16 bytes at a time, blocks of a fixed number of
// values, and one value at a time where packs do not fit.
#pragma once

#include "ptx.cuh"

// Threads of a block, of every kernel that does not say otherwise; and values that a block of a flat kernel takes: launch
// ceil(n / PER_BLOCK) blocks.
constexpr int THREADS = 256;
constexpr int PER_BLOCK = 4096;

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

// Whether packs of 16 bytes may begin at each of these: views of tensors begin anywhere.
template <class... P>
__device__ __forceinline__ bool aligned(const P*... pointers) {
    return ((reinterpret_cast<unsigned long long>(pointers) | ...) & 15) == 0;
}

// f(Width<N>, i) for the block's packs of N values, i their first; f(Width<1>, i) for single values in the last block and without alignment.
template <int N, class F>
__device__ __forceinline__ void each(long long n, bool packs, F f) {
    long long first = (long long)blockIdx.x * PER_BLOCK;
    if (packs && first + PER_BLOCK <= n) {
#pragma unroll
        for (int k = 0; k < PER_BLOCK / (THREADS * N); k++) {
            f(Width<N>(), first + (k * THREADS + (int)threadIdx.x) * N);
        }
        return;
    }
    for (int k = 0; k < PER_BLOCK / THREADS; k++) {
        long long i = first + k * THREADS + threadIdx.x;
        if (i < n) {
            f(Width<1>(), i);
        }
    }
}

// The same for one row of `width` values that the whole block walks over: f(Width, i) with i within the row.
template <int N, class F>
__device__ __forceinline__ void along(int width, bool packs, F f) {
    if (packs && width % N == 0) {
        for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
            f(Width<N>(), i);
        }
        return;
    }
    for (int i = threadIdx.x; i < width; i += THREADS) {
        f(Width<1>(), i);
    }
}
