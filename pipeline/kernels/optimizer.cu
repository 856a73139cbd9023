// AdamW and the sum behind gradient clipping. CPU definition: pipeline/src/train/optimizer.rs: every value in f64 from f32 state, rounded
// once, product by product, so an update has the same bits; the sum of squares is added in another order.
//
// Launch: adamw any grid and block, sum_squares ceil(n / 16384) blocks. Time limit: bytes moved at 4.8 TB/s, for the 69 million parameters
// of rank 16 on all projections of a 14B model.
//   adamw    28 bytes a value    0.4 ms          sum_squares    4    58 us          scale    8    0.12 ms
// f64 here is some 60 instructions a value, two thirds of what adamw's bytes leave time for where f64 runs at half of f32's rate.

#include "sums.cuh"

// The constants of optimizer.rs's Update: keep = 1 - rate * weight decay, correction1 = 1 - beta1^t, correction2 = 1 - beta2^t.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    adamw(float* w, const float* g, float* m, float* v, long long n, double beta1, double beta2, double eps, double keep, double rate,
          double correction1, double correction2) {
    each<4>(n, aligned(w, g, m, v), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        Pack<float, N> weight = load<N>(w, i), gradient = load<N>(g, i), mean = load<N>(m, i), square = load<N>(v, i);
        for (int j = 0; j < N; j++) {
            double g = double(gradient.v[j]), rest1 = __dsub_rn(1.0, beta1), rest2 = __dsub_rn(1.0, beta2);
            mean.v[j] = float(__dadd_rn(__dmul_rn(beta1, double(mean.v[j])), __dmul_rn(rest1, g)));
            square.v[j] = float(__dadd_rn(__dmul_rn(beta2, double(square.v[j])), __dmul_rn(__dmul_rn(rest2, g), g)));
            double root = __dadd_rn(__dsqrt_rn(__ddiv_rn(double(square.v[j]), correction2)), eps);
            double step = __ddiv_rn(__dmul_rn(rate, __ddiv_rn(double(mean.v[j]), correction1)), root);
            weight.v[j] = float(__dsub_rn(__dmul_rn(double(weight.v[j]), keep), step));
        }
        store(w, i, weight);
        store(m, i, mean);
        store(v, i, square);
    });
}
EXPORT(adamw);

// x *= factor, in f64, rounded once: what clipping does to gradients.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) scale(float* x, double factor, long long n) {
    each<4>(n, aligned(x), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        Pack<float, N> values = load<N>(x, i);
        for (int j = 0; j < N; j++) {
            values.v[j] = float(__dmul_rn(double(values.v[j]), factor));
        }
        store(x, i, values);
    });
}
EXPORT(scale);

// Values that a block adds up.
constexpr int SQUARES_PER_BLOCK = 16384;

// partial[b] = the sum of g^2 over values 16384 b and on.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) sum_squares(const float* g, double* partial, long long n) {
    __shared__ double2 part[LARGEST_BLOCK / 32];
    long long first = (long long)blockIdx.x * SQUARES_PER_BLOCK, left = n - first;
    double2 sum = make_double2(0, 0);
    auto add = [&](auto width, int i) {
        constexpr int N = decltype(width)::value;
        Pack<float, N> values = load<N>(g, first + i);
        for (int j = 0; j < N; j++) {
            sum.x += double(values.v[j]) * double(values.v[j]);
        }
    };
    along<4>(int(left < SQUARES_PER_BLOCK ? left : SQUARES_PER_BLOCK), aligned(g), add);
    sum = block_sum(sum, part);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum.x;
    }
}
EXPORT(sum_squares);
