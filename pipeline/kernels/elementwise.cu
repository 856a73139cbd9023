// Casts, sums and SwiGLU. CPU definitions: half's conversions (to nearest even), pipeline/src/ops/swiglu.rs; the same bits.
//
// Launch: any grid and block. Time limit: bytes moved at 4.8 TB/s.
//   cast to 16 bits, from 16 bits    6 bytes a value     1.25 ns per 1000
//   add, swiglu_forward             12                   2.5
//   swiglu_forward_bf16             10                   2.1
//   swiglu_backward                 20                   4.2
// SwiGLU's exponential and quotient are about 40 instructions a value, below what the bytes leave time for.

#include "exponential.cuh"
#include "flat.cuh"

template <class From, class To>
__device__ __forceinline__ void cast(const From* __restrict__ x, To* __restrict__ y, long long n) {
    each<8>(n, aligned(x, y), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        Pack<From, N> from = load<N>(x, i);
        Pack<To, N> to;
        for (int k = 0; k < N; k++) {
            convert(from.v[k], to.v[k]);
        }
        store(y, i, to);
    });
}

extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) cast_f32_bf16(const float* x, __nv_bfloat16* y, long long n) { cast(x, y, n); }
EXPORT(cast_f32_bf16);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) cast_f16_bf16(const __half* x, __nv_bfloat16* y, long long n) { cast(x, y, n); }
EXPORT(cast_f16_bf16);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) cast_bf16_f32(const __nv_bfloat16* x, float* y, long long n) { cast(x, y, n); }
EXPORT(cast_bf16_f32);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) cast_f16_f32(const __half* x, float* y, long long n) { cast(x, y, n); }
EXPORT(cast_f16_f32);

// sum may be x or y.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) add(const float* x, const float* y, float* sum, long long n) {
    each<4>(n, aligned(x, y, sum), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        Pack<float, N> a = load<N>(x, i), b = load<N>(y, i);
        for (int k = 0; k < N; k++) {
            a.v[k] += b.v[k];
        }
        store(sum, i, a);
    });
}
EXPORT(add);

template <class To>
__device__ __forceinline__ void swiglu(const float* g, const float* u, To* y, long long n) {
    each<4>(n, aligned(g, u, y), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        Pack<float, N> gate = load<N>(g, i), up = load<N>(u, i);
        Pack<To, N> product;
        for (int k = 0; k < N; k++) {
            convert(__fmul_rn(up.v[k], __fmul_rn(gate.v[k], sigmoid(gate.v[k]))), product.v[k]);
        }
        store(y, i, product);
    });
}

// y = u (g sigmoid(g)); y may be g or u where it is f32.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) swiglu_forward(const float* g, const float* u, float* y, long long n) {
    swiglu(g, u, y, n);
}
EXPORT(swiglu_forward);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) swiglu_forward_bf16(const float* g, const float* u, __nv_bfloat16* y, long long n) {
    swiglu(g, u, y, n);
}
EXPORT(swiglu_forward_bf16);

// With s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    swiglu_backward(const float* g, const float* u, const float* dy, float* dg, float* du, long long n) {
    each<4>(n, aligned(g, u, dy, dg, du), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        Pack<float, N> gate = load<N>(g, i), up = load<N>(u, i), out = load<N>(dy, i);
        for (int k = 0; k < N; k++) {
            float g = gate.v[k], u = up.v[k], d = out.v[k], s = sigmoid(g);
            gate.v[k] = __fmul_rn(__fmul_rn(__fmul_rn(d, u), s), __fadd_rn(1.0f, __fmul_rn(g, __fsub_rn(1.0f, s))));
            up.v[k] = __fmul_rn(__fmul_rn(d, g), s);
        }
        store(dg, i, gate);
        store(du, i, up);
    });
}
EXPORT(swiglu_backward);
