// The exponential and the logistic function of pipeline/src/ops/exponential.rs, step by step, so that they give its very bits. Their errors
// and the reasons for each constant are there.
#pragma once

#include "ptx.cuh"

// e^x for x <= 0 within 2 units in the last place, 0 for x < -87; NaN stays NaN.
__device__ __forceinline__ float exp_nonpositive(float x) {
    constexpr float ROUND = 12582912.0f, LOG2_E = 1.44269504f, LN_2_HIGH = 0.693359375f, LN_2_LOW = -2.12194440e-4f;
    float shifted = __fadd_rn(__fmul_rn(x, LOG2_E), ROUND);
    float n = __fsub_rn(shifted, ROUND);
    float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, LN_2_HIGH)), __fmul_rn(n, LN_2_LOW));
    constexpr float COEFFICIENTS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    float series = 1.0f / 5040;
#pragma unroll
    for (int i = 0; i < 7; i++) {
        series = __fadd_rn(__fmul_rn(series, r), COEFFICIENTS[i]);
    }
    float power = __uint_as_float((__float_as_uint(shifted) + 127) << 23);
    return x < -87.0f ? 0.0f : __fmul_rn(series, power);
}

// e^x of the same range and error with fused steps, 15 instructions and not 24, for sums: their terms are nobody's bits.
__device__ __forceinline__ float exp_fused(float x) {
    float shifted = fmaf(x, 1.44269504f, 12582912.0f);
    float n = shifted - 12582912.0f;
    float r = fmaf(n, 2.12194442e-4f, fmaf(n, -0.693359375f, x));
    float series = fmaf(1.0f / 5040.0f, r, 1.0f / 720.0f);
    series = fmaf(series, r, 1.0f / 120.0f);
    series = fmaf(series, r, 1.0f / 24.0f);
    series = fmaf(series, r, 1.0f / 6.0f);
    series = fmaf(series, r, 0.5f);
    series = fmaf(series, r, 1.0f);
    series = fmaf(series, r, 1.0f);
    float power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : series * power;
}

// 1 / (1 + e^-x) within 4 units in the last place.
__device__ __forceinline__ float sigmoid(float x) {
    float t = exp_nonpositive(-fabsf(x));
    return __fdiv_rn(x < 0 ? t : 1.0f, __fadd_rn(1.0f, t));
}

// 2^x by the device's own instruction, within 2 units in the last place; what is no normal f32 is 0. For softmax of bf16 factors.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef CUDA_EMULATED
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
