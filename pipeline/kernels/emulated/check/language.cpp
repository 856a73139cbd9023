// The emulation itself: barriers, warps, shared memory, half types, tensor cores.

#include "../../ptx.cuh"
#include "check.h"

using namespace check;

// Each block adds up its stretch of 4 · threads numbers by halving, in dynamic shared memory.
extern "C" __global__ void check_sum(const int* x, int* sums) {
    DYNAMIC_SHARED(int, part);
    __shared__ int last;
    int sum = 0;
    for (int i = 0; i < 4; i++) {
        sum += x[(blockIdx.x * 4 + i) * blockDim.x + threadIdx.x];
    }
    part[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            part[threadIdx.x] += part[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        last = part[0];
    }
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) {
        sums[blockIdx.x] = last;
    }
}
EXPORT(check_sum);

TEST(barriers_order_a_block) {
    const unsigned threads = 256, blocks = 3;
    std::vector<int> x(threads * blocks * 4), expected(blocks, 0);
    Random random(1);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = int(random.below(1000)) - 500;
        expected[i / (threads * 4)] += x[i];
    }
    Values<int> in(x), out = Values<int>::made(blocks);
    launch("check_sum", {blocks}, {threads}, threads * 4, in, out);
    same("sums", out.read(), expected);
}

extern "C" __global__ void check_warp(const float* x, float* y, unsigned* votes) {
    unsigned i = threadIdx.x + threadIdx.y * blockDim.x, lane = i % 32;
    float v = x[i];
    y[i] = __shfl_xor_sync(0xffffffff, v, 5);
    y[i + 128] = __shfl_down_sync(0xffffffff, v, 3, 8);
    y[i + 256] = __shfl_up_sync(0xffffffff, v, 2);
    y[i + 384] = __shfl_sync(0xffffffff, v, 7, 16);
    // The halves of a warp go different ways and meet among themselves.
    if (lane < 16) {
        y[i + 512] = __shfl_xor_sync(0x0000ffff, v, 1);
    } else {
        y[i + 512] = __shfl_xor_sync(0xffff0000, __shfl_xor_sync(0xffff0000, v, 8), 2);
    }
    __syncwarp();
    votes[i] = __ballot_sync(0xffffffff, v > 0);
}
EXPORT(check_warp);

TEST(lanes_exchange_as_the_manual_says) {
    std::vector<float> x = Random(2).values(128), y(128 * 5);
    std::vector<unsigned> votes(128, 0);
    for (unsigned i = 0; i < 128; i++) {
        unsigned lane = i % 32, warp = i - lane;
        y[i] = x[warp + (lane ^ 5)];
        y[i + 128] = x[lane % 8 + 3 < 8 ? i + 3 : i];
        y[i + 256] = x[lane >= 2 ? i - 2 : i];
        y[i + 384] = x[warp + lane / 16 * 16 + 7];
        y[i + 512] = x[warp + (lane < 16 ? lane ^ 1 : lane ^ 10)];
        for (unsigned other = 0; other < 32; other++) {
            votes[i] |= unsigned(x[warp + other] > 0) << other;
        }
    }
    Values<float> in(x), out = Values<float>::made(y.size());
    Values<unsigned> ballots = Values<unsigned>::made(128);
    launch("check_warp", {1}, {16, 8}, 0, in, out, ballots);
    same("shuffles", out.read(), y);
    same("ballots", ballots.read(), votes);
}

// c [16, 8] = a [16, 16] b [16, 8] with a and b by ldmatrix from shared memory, b transposed on the way.
extern "C" __global__ void check_mma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    __shared__ __align__(16) __nv_bfloat16 sa[16][16], sb[16][16];
    unsigned lane = threadIdx.x;
    for (unsigned i = lane; i < 256; i += 32) {
        sa[i / 16][i % 16] = a[i];
        sb[i / 16][i % 16] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : a[0];
    }
    __syncwarp();
    unsigned fa[4], fb[4];
    ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_transposed(fb, &sb[lane % 16][lane / 16 * 8]);
    unsigned lower[2] = {fb[0], fb[1]};
    float d[4] = {1, 1, 1, 1};
    mma_m16n8k16(d, fa, lower);
    for (unsigned i = 0; i < 4; i++) {
        c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}
EXPORT(check_mma);

TEST(a_tensor_core_multiplies) {
    Random random(3);
    std::vector<__nv_bfloat16> a(256), b(128);
    for (auto& v : a) {
        v = __float2bfloat16(random.value());
    }
    for (auto& v : b) {
        v = __float2bfloat16(random.value());
    }
    std::vector<double> expected(128, 1.0);
    for (int i = 0; i < 128; i++) {
        for (int k = 0; k < 16; k++) {
            expected[i] += double(__bfloat162float(a[i / 8 * 16 + k])) * double(__bfloat162float(b[k * 8 + i % 8]));
        }
    }
    Values<__nv_bfloat16> da(a), db(b);
    Values<float> c = Values<float>::made(128);
    launch("check_mma", {1}, {32}, 0, da, db, c);
    // One rounding of a sum below 17.
    near("product", c.read(), expected, ROUNDING);
}

TEST(halves_round_to_nearest_even) {
    for (unsigned bits = 0; bits < 0x10000; bits++) {
        auto half = __ushort_as_half((unsigned short)bits);
        float value = __half2float(half);
        unsigned back = __half_as_ushort(__float2half(value));
        EXPECT(back == bits || (std::isnan(value) && back == 0x7fff), "half %04x became %04x", bits, back);
        // By its definition, where there is no infinity or NaN.
        unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
        double exact = std::ldexp(double(exponent == 0 ? fraction : fraction + 1024), int(exponent == 0 ? 1 : exponent) - 25);
        EXPECT(exponent == 31 || double(std::fabs(value)) == exact, "half %04x is %g, expected %g", bits, double(value), exact);
        // The middle to the next one goes to the even one, what lies beyond it up.
        float next = __half2float(__ushort_as_half((unsigned short)(bits + 1)));
        if (exponent < 30 && bits < 0x8000) {
            float middle = float((double(value) + double(next)) / 2);
            unsigned even = bits % 2 == 0 ? bits : bits + 1;
            EXPECT(__half_as_ushort(__float2half(middle)) == even, "the middle after half %04x", bits);
            EXPECT(__half_as_ushort(__float2half(std::nextafter(middle, 1e9f))) == bits + 1, "beyond the middle after half %04x", bits);
            EXPECT(__half_as_ushort(__float2half(-std::nextafter(middle, 0.0f))) == (bits | 0x8000), "before the middle after half %04x", bits);
        }
    }
    EXPECT(__half_as_ushort(__float2half(65519.996f)) == 0x7bff && __half_as_ushort(__float2half(65520.0f)) == 0x7c00, "the largest half");
    EXPECT(__bfloat16_as_ushort(__float2bfloat16(1.00390625f)) == 0x3f80, "a tie goes to the even bf16");
    EXPECT(__bfloat16_as_ushort(__float2bfloat16(1.01171875f)) == 0x3f82, "a tie goes to the even bf16");
    EXPECT(__bfloat16_as_ushort(__float2bfloat16(3.4e38f)) == 0x7f80, "beyond the largest bf16");
}
