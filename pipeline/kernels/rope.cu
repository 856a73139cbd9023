// Rotary position embedding, half-split. CPU definition: pipeline/src/ops/rope.rs; the same bits.
//
// Launch: a block a token. Time limit: 8 bytes a value at 4.8 TB/s, for 4096 tokens of 40 heads of 128: 35 us. The angles
// (4 bytes a value of one head) are read once from memory and again for every head from the cache.

#include "flat.cuh"

// y [tokens, heads, 2 half] of x; sign 1 turns forward, -1 backward. y may be x.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    rope(const float* x, const float* cos, const float* sin, float sign, float* y, int tokens, int heads, int half) {
    long long token = blockIdx.x;
    if (token >= tokens) {
        return;
    }
    const float *c = cos + token * half, *s = sin + token * half, *from = x + token * heads * half * 2;
    float* to = y + token * heads * half * 2;
    auto turn = [=](auto width, int item) {
        constexpr int N = decltype(width)::value;
        int i = item * N % half, first = item * N / half * 2 * half + i;
        Pack<float, N> x0 = load<N>(from, first), x1 = load<N>(from, first + half), cosine = load<N>(c, i), sine = load<N>(s, i), y0, y1;
        for (int j = 0; j < N; j++) {
            float turned = __fmul_rn(sine.v[j], sign);
            y0.v[j] = __fsub_rn(__fmul_rn(x0.v[j], cosine.v[j]), __fmul_rn(x1.v[j], turned));
            y1.v[j] = __fadd_rn(__fmul_rn(x1.v[j], cosine.v[j]), __fmul_rn(x0.v[j], turned));
        }
        store(to, first, y0);
        store(to, first + half, y1);
    };
    if (aligned(x, cos, sin, y) && half % 4 == 0) {
        for (int item = threadIdx.x; item < heads * (half / 4); item += blockDim.x) {
            turn(Width<4>(), item);
        }
    } else {
        for (int item = threadIdx.x; item < heads * half; item += blockDim.x) {
            turn(Width<1>(), item);
        }
    }
}
EXPORT(rope);
