// What the passes over rows of logits share (head.cu, loss.cu): reductions over a block in a fixed order, and running sums of exponentials
// that need no maximum beforehand.
#pragma once

#include "exponential.cuh"

namespace logits {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// The sum over a block, the same for all its threads: lanes by halves, then warps in order. `partials` are WARPS places of shared memory.
__device__ __forceinline__ double sum(double x, double* partials) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = x;
    __syncthreads();
    double all = 0.0;
    for (int warp = 0; warp < WARPS; warp++) all += partials[warp];
    __syncthreads();
    return all;
}

// The largest over a block; NaN is passed over.
__device__ __forceinline__ double largest(double x, double* partials) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, other));
    if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = x;
    __syncthreads();
    double all = -INFINITY;
    for (int warp = 0; warp < WARPS; warp++) all = fmax(all, partials[warp]);
    __syncthreads();
    return all;
}

// Called and not spread out: it stands in loops that next to never need it.
__device__ __noinline__ double exponential_f64(double x) { return exp(x); }

// A thread's sums of exp(z - shift) and, where asked for, of exp((z - shift) * factor), and its largest z. The shift is some earlier z,
// renewed when a z lies more than 8 above it (by less, z - shift is rounded as little as the exponential is; a row of logits does that to a
// thread once or twice). Sums are f64.
struct Tally {
    float shift = -3.40282347e38f, limit = -3.40282347e38f, most = -INFINITY;
    double sum = 0.0, tempered = 0.0;

    // -inf weighs nothing; a NaN makes the sums NaN.
    template <bool TEMPERED> __device__ __forceinline__ void add(float z, float factor) {
        if (z > limit) renew(z, TEMPERED ? factor : 1.0f);
        most = fmaxf(most, z);
        sum += double(exp_fused(z - shift));
        if (TEMPERED) tempered += double(exp_fused((z - shift) * factor));
    }

    __device__ __forceinline__ void renew(float z, float factor) {
        double down = double(shift) - double(z);
        // Where the sums are 0 and nothing was added yet, they stay 0.
        sum *= exponential_f64(down);
        tempered *= exponential_f64(down * double(factor));
        shift = z;
        limit = z + 8.0f / fmaxf(1.0f, factor);
    }

    // A sum of this thread's in terms of the block's largest value; where that is -inf there are only zeros and NaNs to add.
    __device__ double seen_from(double value, double largest, double factor) const {
        return largest == -INFINITY ? value : value * exp((double(shift) - largest) * factor);
    }
};

}  // namespace logits
