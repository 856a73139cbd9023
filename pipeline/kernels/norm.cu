// RMSNorm there and back. CPU definition: pipeline/src/ops/rms_norm.rs; the same steps, but the two sums (f64) are added in another order,
// which after their rounding to f32 shows about once in a hundred thousand rows.
//
// Launch: a block a row. A thread keeps its first 16 (backward: 12) values in registers; what a row has beyond comes from the caches the second
// time, so 512 threads suit a row of 5120. Time limit: bytes moved at 4.8 TB/s, for 4096 rows of 5120 values.
//   rms_norm_forward    8 bytes a value    35 us          rms_norm_backward    12    52 us
//   rms_norm_forward_bf16    6             26 us

#include "sums.cuh"

// Values of a row that a thread keeps, as many as its registers hold.
constexpr int KEPT = 16, KEPT_BACK = 12;

// One block's row, as thread `threadIdx.x` sees it: pack k of N values lies at (k * threads + threadIdx.x) * N.
template <int N>
__device__ __forceinline__ int place_of(int k) {
    return (k * (int)blockDim.x + (int)threadIdx.x) * N;
}

template <int N>
__device__ __forceinline__ void add_squares(const Pack<float, N>& x, double2& sum) {
    for (int j = 0; j < N; j++) {
        sum.x += double(x.v[j]) * double(x.v[j]);
    }
}

template <int N, class To>
__device__ __forceinline__ void forward_row(const float* x, const float* w, To* y, int width, double eps) {
    __shared__ double2 part[LARGEST_BLOCK / 32];
    Pack<float, N> kept[KEPT / N];
    double2 sum = make_double2(0, 0);
#pragma unroll
    for (int k = 0; k < KEPT / N; k++) {
        if (place_of<N>(k) < width) {
            kept[k] = load<N>(x, place_of<N>(k));
            add_squares(kept[k], sum);
        }
    }
    for (int k = KEPT / N; place_of<N>(k) < width; k++) {
        add_squares(load<N>(x, place_of<N>(k)), sum);
    }
    float r = float(1 / sqrt(block_sum(sum, part).x / width + eps));
    auto write = [=](int i, const Pack<float, N>& values) {
        Pack<float, N> weight = load<N>(w, i);
        Pack<To, N> out;
        for (int j = 0; j < N; j++) {
            convert(__fmul_rn(__fmul_rn(values.v[j], r), weight.v[j]), out.v[j]);
        }
        store(y, i, out);
    };
#pragma unroll
    for (int k = 0; k < KEPT / N; k++) {
        if (place_of<N>(k) < width) {
            write(place_of<N>(k), kept[k]);
        }
    }
    for (int k = KEPT / N; place_of<N>(k) < width; k++) {
        write(place_of<N>(k), load<N>(x, place_of<N>(k)));
    }
}

template <class To>
__device__ __forceinline__ void forward(const float* x, const float* w, To* y, int rows, int width, double eps) {
    long long begin = (long long)blockIdx.x * width;
    if (blockIdx.x >= rows) {
        return;
    }
    if (aligned(x, w, y) && width % 4 == 0) {
        forward_row<4>(x + begin, w, y + begin, width, eps);
    } else {
        forward_row<1>(x + begin, w, y + begin, width, eps);
    }
}

// y = w x r with r = 1 / sqrt(mean(x^2) + eps). y may be x where it is f32.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    rms_norm_forward(const float* x, const float* w, float* y, int rows, int width, double eps) {
    forward(x, w, y, rows, width, eps);
}
EXPORT(rms_norm_forward);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    rms_norm_forward_bf16(const float* x, const float* w, __nv_bfloat16* y, int rows, int width, double eps) {
    forward(x, w, y, rows, width, eps);
}
EXPORT(rms_norm_forward_bf16);

// Adds x^2 to the first and x w dy, rounded to f32 as on the CPU, to the second sum.
template <int N>
__device__ __forceinline__ void add_both(const Pack<float, N>& x, const float* w, int i, const Pack<float, N>& dy, double2& sum) {
    Pack<float, N> weight = load<N>(w, i);
    add_squares(x, sum);
    for (int j = 0; j < N; j++) {
        sum.y += double(__fmul_rn(__fmul_rn(x.v[j], weight.v[j]), dy.v[j]));
    }
}

template <int N>
__device__ __forceinline__ void backward_row(const float* x, const float* w, const float* dy, float* dx, int width, double eps) {
    __shared__ double2 part[LARGEST_BLOCK / 32];
    Pack<float, N> kept_x[KEPT_BACK / N], kept_dy[KEPT_BACK / N];
    double2 sum = make_double2(0, 0);
#pragma unroll
    for (int k = 0; k < KEPT_BACK / N; k++) {
        if (place_of<N>(k) < width) {
            kept_x[k] = load<N>(x, place_of<N>(k));
            kept_dy[k] = load<N>(dy, place_of<N>(k));
            add_both(kept_x[k], w, place_of<N>(k), kept_dy[k], sum);
        }
    }
    for (int k = KEPT_BACK / N; place_of<N>(k) < width; k++) {
        add_both(load<N>(x, place_of<N>(k)), w, place_of<N>(k), load<N>(dy, place_of<N>(k)), sum);
    }
    sum = block_sum(sum, part);
    float r = float(1 / sqrt(sum.x / width + eps));
    float shared = float(double(r) * double(r) * sum.y / width);
    auto write = [=](int i, Pack<float, N> values, const Pack<float, N>& out) {
        Pack<float, N> weight = load<N>(w, i);
        for (int j = 0; j < N; j++) {
            float own = __fmul_rn(weight.v[j], out.v[j]);
            values.v[j] = __fmul_rn(r, __fsub_rn(own, __fmul_rn(values.v[j], shared)));
        }
        store(dx, i, values);
    };
#pragma unroll
    for (int k = 0; k < KEPT_BACK / N; k++) {
        if (place_of<N>(k) < width) {
            write(place_of<N>(k), kept_x[k], kept_dy[k]);
        }
    }
    for (int k = KEPT_BACK / N; place_of<N>(k) < width; k++) {
        write(place_of<N>(k), load<N>(x, place_of<N>(k)), load<N>(dy, place_of<N>(k)));
    }
}

// dx = r (w dy - x r^2 mean(x w dy)). dx may be x or dy.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    rms_norm_backward(const float* x, const float* w, const float* dy, float* dx, int rows, int width, double eps) {
    long long begin = (long long)blockIdx.x * width;
    if (blockIdx.x >= rows) {
        return;
    }
    if (aligned(x, w, dy, dx) && width % 4 == 0) {
        backward_row<4>(x + begin, w, dy + begin, dx + begin, width, eps);
    } else {
        backward_row<1>(x + begin, w, dy + begin, dx + begin, width, eps);
    }
}
EXPORT(rms_norm_backward);
