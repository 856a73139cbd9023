// The device functions that kernels call: barriers, warps, atomics on whole numbers, bits, arithmetic with its rounding spelled out, and
// the fast functions (here as exact as the C library's, so no test may expect their error).
#pragma once

inline void __syncthreads() { ::emulated::barrier(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { ::emulated::fail("__trap"); }

namespace emulated {

// One lane's part of a shuffle or a vote.
template <class T>
struct Lane {
    T value;
    unsigned source;
    T result;
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
    Lane<T> mine = {value, source % WARP, value};
    together(name, mask, &mine, [](void* const* lanes, unsigned mask) {
        for (unsigned lane = 0; lane < WARP; lane++) {
            if ((mask >> lane & 1) == 0) {
                continue;
            }
            auto* reader = static_cast<Lane<T>*>(lanes[lane]);
            if ((mask >> reader->source & 1) == 0) {
                fail("a shuffle reads lane %u, which is not in its mask %08x", reader->source, mask);
            }
            reader->result = static_cast<Lane<T>*>(lanes[reader->source])->value;
        }
    });
    return mine.result;
}

inline unsigned lane() { return thread_number() % WARP; }

// Whether two lanes lie in the same stretch of `width` lanes.
inline bool same_stretch(unsigned a, unsigned b, unsigned width) { return a / width == b / width; }

// Folds every lane's value into one that all get.
template <class T, class F>
T fold(const char* name, unsigned mask, T value, F) {
    Lane<T> mine = {value, 0, value};
    together(name, mask, &mine, [](void* const* lanes, unsigned mask) {
        unsigned first = __builtin_ctz(mask);
        T sum = static_cast<Lane<T>*>(lanes[first])->value;
        for (unsigned lane = first + 1; lane < WARP; lane++) {
            if ((mask >> lane & 1) != 0) {
                sum = F::of(sum, static_cast<Lane<T>*>(lanes[lane])->value);
            }
        }
        for (unsigned lane = first; lane < WARP; lane++) {
            if ((mask >> lane & 1) != 0) {
                static_cast<Lane<T>*>(lanes[lane])->result = sum;
            }
        }
    });
    return mine.result;
}

struct Add { template <class T> static T of(T a, T b) { return a + b; } };
struct Least { template <class T> static T of(T a, T b) { return b < a ? b : a; } };
struct Most { template <class T> static T of(T a, T b) { return a < b ? b : a; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };

}  // namespace emulated

inline void __syncwarp(unsigned mask = 0xffffffff) {
    ::emulated::together("__syncwarp", mask, nullptr, [](void* const*, unsigned) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned lane = ::emulated::lane();
    return ::emulated::shuffle("__shfl_sync", mask, value, lane / width * width + unsigned(source) % width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
    unsigned lane = ::emulated::lane(), source = lane ^ unsigned(other);
    // As on the device: a lane of a later stretch is not read, one of an earlier stretch is.
    bool later = source / width > lane / width;
    return ::emulated::shuffle("__shfl_xor_sync", mask, value, later ? lane : source);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = ::emulated::lane();
    return ::emulated::shuffle("__shfl_down_sync", mask, value, ::emulated::same_stretch(lane, lane + delta, width) ? lane + delta : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = ::emulated::lane();
    // A difference below 0 wraps to a lane of no stretch.
    return ::emulated::shuffle("__shfl_up_sync", mask, value, ::emulated::same_stretch(lane, lane - delta, width) ? lane - delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, int holds) {
    return ::emulated::fold("__ballot_sync", mask, unsigned(holds != 0) << ::emulated::lane(), ::emulated::Or());
}
inline int __any_sync(unsigned mask, int holds) { return __ballot_sync(mask, holds) != 0; }
inline int __all_sync(unsigned mask, int holds) { return __ballot_sync(mask, holds) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) { return ::emulated::fold("__reduce_add_sync", mask, v, ::emulated::Add()); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) { return ::emulated::fold("__reduce_min_sync", mask, v, ::emulated::Least()); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) { return ::emulated::fold("__reduce_max_sync", mask, v, ::emulated::Most()); }

// The votes of a whole block.
inline int __syncthreads_count(int holds) {
    static int votes;
    if (::emulated::thread_number() == 0) {
        votes = 0;
    }
    __syncthreads();
    votes += holds != 0;
    __syncthreads();
    int all = votes;
    __syncthreads();
    return all;
}
inline int __syncthreads_or(int holds) { return __syncthreads_count(holds) != 0; }
inline int __syncthreads_and(int holds) { return __syncthreads_count(holds == 0) == 0; }

// Threads take turns only where they wait, so plain reads and writes are atomic.
template <class T>
T atomicExch(T* place, T value) { return std::exchange(*place, value); }
template <class T>
T atomicCAS(T* place, T expected, T value) {
    T old = *place;
    if (old == expected) {
        *place = value;
    }
    return old;
}
template <class T>
T atomicAdd(T* place, std::common_type_t<T> value) {
    static_assert(std::is_integral_v<T>, "floating-point sums must have a fixed order");
    return std::exchange(*place, T(*place + value));
}
template <class T>
T atomicMin(T* place, std::common_type_t<T> value) { return std::exchange(*place, std::min(*place, value)); }
template <class T>
T atomicMax(T* place, std::common_type_t<T> value) { return std::exchange(*place, std::max(*place, value)); }
template <class T>
T atomicOr(T* place, std::common_type_t<T> value) { return std::exchange(*place, T(*place | value)); }
template <class T>
T atomicAnd(T* place, std::common_type_t<T> value) { return std::exchange(*place, T(*place & value)); }

template <class T>
T __ldg(const T* place) { return *place; }
template <class T>
T __ldcs(const T* place) { return *place; }
template <class T>
T __ldcg(const T* place) { return *place; }
template <class T>
void __stcs(T* place, T value) { *place = value; }

inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline long long __double_as_longlong(double value) {
    long long bits;
    memcpy(&bits, &value, 8);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; i++) {
        unsigned pick = selector >> 4 * i & 15;
        unsigned byte = unsigned(bytes >> 8 * (pick & 7)) & 255;
        result |= ((pick & 8) == 0 ? byte : (byte & 128) != 0 ? 255u : 0u) << 8 * i;
    }
    return result;
}

// Built without contraction (build.sh), so a product and a sum are two roundings, as these names promise.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __exp10f(float a) { return powf(10, a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __saturatef(float a) { return a > 0 ? std::min(a, 1.0f) : 0.0f; }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline int __float2int_rn(float a) { return int(rintf(a)); }

// The device's min and max take any pair of numbers.
template <class A, class B>
auto min(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> {
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
auto max(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(b) : T(a);
}
