// Attention on tensor cores for head sizes of 64 and 128: arguments, tiles and formulas as in attention.cu, whose f32 results (and so those
// of pipeline/src/ops/attention) it meets within what bf16 factors cost: 2^-8 relative on q, k, v, dy, P and dS. Sums, softmax, lse and
// everything in memory are f32; factors are rounded on their way into shared memory.
//
//   A block is 4 warps; each owns 16 of a tile's 64 rows. In the accumulators of S = q kT a lane holds just what it needs of P as the left
//   factor of P v (fragments of m16n8k16), so P never leaves registers. backward_kv is the same with keys as rows: ST = k qT gives PT and dST.
//
//           S [16 x 64] = q [16 x D] kT       o [16 x D] += P [16 x 64] v                 one warp, one tile of keys
//   tile of 64 rows in shared memory: chunks of 16 bytes, chunk c of row r at c ^ (r % 8), so that 8 rows of one chunk lie in all 32 banks
//
// On paper (H200: 132 multiprocessors, 990 TFLOP/s of bf16 of which mma.sync reaches about 60 %, 4.8 TB/s, L2 about 5.5 TB/s):
//   a tile of keys costs 64 D 4 FLOP x 64 and reads 2 x 64 D f32 from L2: 32 FLOP a byte, so L2 bounds the forward at about 170 TFLOP/s;
//   no faster than half of what bf16 in memory would allow, and a small part of a step (attention is 3 % of the FLOP of a 1.5B model at
//   1024 tokens). Loads are not overlapped within a block; the other blocks of a multiprocessor do that.
//   backward_q has 48 and backward_kv 64 FLOP for each byte of a tile that streams by.
//   shared memory at D = 64 / 128: forward 24 / 48 KB, backward 32 / 64 KB
//   registers at D = 64 / 128: forward 100 / 137, backward_q 126 / 200, backward_kv 128 / 244, none spilled; so 4 blocks a multiprocessor at
//   D = 64, and 3 (forward) or 2 at 128. Keys (or queries) go by 32 in the backward, which is what keeps it in registers.
// Time limit: 4 D and 14 D FLOP a seen pair, at 170 TFLOP/s: a conversation of 1024 tokens, 12 heads of 128, 19 us and 67 us; such a grid of
// 192 tiles does not fill the chip twice, so expect half of that rate below some thousands of tokens.
//
// Launch: 128 threads; grid (tiles, heads), or (tiles, kv_heads) for backward_kv; shared memory of 3 (forward) or 4 tiles of 64 D bf16.
// Tensors begin at a multiple of 16 bytes.
#include "exponential.cuh"
#include "ptx.cuh"

namespace attention_mma {

constexpr int ROWS = 64, THREADS = 128;
constexpr float LOG2_E = 1.44269504f;

// Where chunk `chunk` (8 values) of a row begins in a tile.
template <int D> __device__ __forceinline__ int place(int row, int chunk) { return row * D + ((chunk ^ (row & 7)) << 3); }

__device__ __forceinline__ unsigned pair(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return unsigned(__bfloat16_as_ushort(both.x)) | unsigned(__bfloat16_as_ushort(both.y)) << 16;
}

// Rows `row`.. of a head of x [T, heads, D] as a tile of bf16; zeros from `end` on.
template <int D> __device__ __forceinline__ void load(__nv_bfloat16* tile, const float* x, int row, int end, int heads, int head) {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * D / 4; i += THREADS) {
        int r = i / (D / 4), quad = i % (D / 4);
        uint2 words = make_uint2(0, 0);
        if (row + r < end) {
            const float* from = x + ((long long)(row + r) * heads + head) * D + quad * 4;
            float4 values = *reinterpret_cast<const float4*>(from);
            words = make_uint2(pair(values.x, values.y), pair(values.z, values.w));
        }
        *reinterpret_cast<uint2*>(tile + place<D>(r, quad / 2) + quad % 2 * 4) = words;
    }
}

// s [16 x 8 N] = rows `a_row`.. of a times rows `b_row`.. of b, turned.
template <int D, int N>
__device__ __forceinline__ void product(float (&s)[N][4], const __nv_bfloat16* a, int a_row, const __nv_bfloat16* b, int b_row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < N; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned left[4], right[4];
        ldmatrix_x4(left, a + place<D>(a_row + lane % 16, 2 * step + lane / 16));
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            ldmatrix_x4(right, b + place<D>(b_row + 16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
            mma_m16n8k16(s[2 * j], left, {right[0], right[1]});
            mma_m16n8k16(s[2 * j + 1], left, {right[2], right[3]});
        }
    }
}

// sum [16 x D] += w [16 x 8 N] times rows `row`.. of b.
template <int D, int N>
__device__ __forceinline__ void add_product(float (&sum)[D / 8][4], const float (&w)[N][4], const __nv_bfloat16* b, int row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < N / 2; step++) {
        const float(&low)[4] = w[2 * step], (&high)[4] = w[2 * step + 1];
        unsigned left[4] = {pair(low[0], low[1]), pair(low[2], low[3]), pair(high[0], high[1]), pair(high[2], high[3])}, right[4];
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            ldmatrix_x4_transposed(right, b + place<D>(row + 16 * step + lane % 16, 2 * j + lane / 16));
            mma_m16n8k16(sum[2 * j], left, {right[0], right[1]});
            mma_m16n8k16(sum[2 * j + 1], left, {right[2], right[3]});
        }
    }
}

template <int D> __device__ __forceinline__ void clear(float (&sum)[D / 8][4]) {
#pragma unroll
    for (int j = 0; j < D / 8; j++) sum[j][0] = sum[j][1] = sum[j][2] = sum[j][3] = 0.0f;
}

// The warp's rows `row`.. times `factor` of each half, below `end`, into y [T, heads, D].
template <int D>
__device__ __forceinline__ void store(float* y, const float (&sum)[D / 8][4], const float (&factor)[2], int row, int end, int heads, int head) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int to = row + lane / 4 + 8 * half;
        if (to >= end) continue;
        float* place = y + ((long long)to * heads + head) * D + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            *reinterpret_cast<float2*>(place + 8 * j) = make_float2(sum[j][2 * half] * factor[half], sum[j][2 * half + 1] * factor[half]);
    }
}

// Over the 4 lanes that share rows.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int D>
__device__ __forceinline__ void forward(__nv_bfloat16* shared, const float* q, const float* k, const float* v, const unsigned* tiles,
                                        float* o, float* lse, int tokens, int heads, int kv_heads, float scale) {
    __nv_bfloat16 *queries = shared, *keys = queries + ROWS * D, *values = keys + ROWS * D;
    int begin = int(tiles[3 * blockIdx.x]), end = int(tiles[3 * blockIdx.x + 1]), first = int(tiles[3 * blockIdx.x + 2]);
    int head = blockIdx.y, kv = head / (heads / kv_heads), lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    float sum[D / 8][4], total[2] = {0.0f, 0.0f}, largest[2] = {-INFINITY, -INFINITY}, factor = scale * LOG2_E;
    clear<D>(sum);
    load<D>(queries, q, first, end, heads, head);
    int seen = min(first + ROWS, end);
    for (int key = begin; key < seen; key += ROWS) {
        __syncthreads();
        load<D>(keys, k, key, end, kv_heads, kv);
        load<D>(values, v, key, end, kv_heads, kv);
        __syncthreads();
        float s[8][4];
        product<D>(s, queries, own, keys, 0);
        int query = first + own + lane / 4;
        if (key + ROWS - 1 > first + own) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (key + 8 * j + lane % 4 * 2 + i % 2 > query + i / 2 * 8) s[j][i] = -INFINITY;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = largest[half];
#pragma unroll
            for (int j = 0; j < 8; j++) highest = fmaxf(highest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            highest = row_max(highest);
            float kept = power_of_two((largest[half] - highest) * factor), top = highest * factor, part = 0.0f;
            largest[half] = highest;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[j][i] = power_of_two(fmaf(s[j][i], factor, -top));
                    part += s[j][i];
                }
            total[half] = fmaf(total[half], kept, part);
#pragma unroll
            for (int j = 0; j < D / 8; j++) sum[j][2 * half] *= kept, sum[j][2 * half + 1] *= kept;
        }
        add_product<D>(sum, s, values, 0);
    }
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = row_sum(total[half]);
        int row = first + own + lane / 4 + 8 * half;
        share[half] = 1.0f / all;
        if (lane % 4 == 0 && row < end) lse[(long long)head * tokens + row] = largest[half] * scale + logf(all);
    }
    store<D>(o, sum, share, first + own, end, heads, head);
}

template <int D>
__device__ __forceinline__ void backward_q(__nv_bfloat16* shared, const float* q, const float* k, const float* v, const float* dy,
                                           const float* lse, const float* delta, const unsigned* tiles, float* dq, int tokens, int heads,
                                           int kv_heads, float scale) {
    constexpr int N = 4;  // 32 keys at a time, which leaves registers for dq
    __nv_bfloat16 *queries = shared, *slopes = queries + ROWS * D, *keys = slopes + ROWS * D, *values = keys + ROWS * D;
    int begin = int(tiles[3 * blockIdx.x]), end = int(tiles[3 * blockIdx.x + 1]), first = int(tiles[3 * blockIdx.x + 2]);
    int head = blockIdx.y, kv = head / (heads / kv_heads), lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    float sum[D / 8][4], top[2], row_delta[2], factor = scale * LOG2_E;
    clear<D>(sum);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + own + lane / 4 + 8 * half;
        top[half] = row < end ? lse[(long long)head * tokens + row] * LOG2_E : INFINITY;
        row_delta[half] = row < end ? delta[(long long)head * tokens + row] : 0.0f;
    }
    load<D>(queries, q, first, end, heads, head);
    load<D>(slopes, dy, first, end, heads, head);
    int seen = min(first + ROWS, end);
    for (int key = begin; key < seen; key += ROWS) {
        __syncthreads();
        load<D>(keys, k, key, end, kv_heads, kv);
        load<D>(values, v, key, end, kv_heads, kv);
        __syncthreads();
        for (int part = 0; part < ROWS; part += 8 * N) {
            if (key + part > first + own + 15) break;  // the warp's queries see none of these keys
            float s[N][4], dp[N][4];
            product<D>(s, queries, own, keys, part);
            product<D>(dp, slopes, own, values, part);
            int query = first + own + lane / 4;
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    bool sees = key + part + 8 * j + lane % 4 * 2 + i % 2 <= query + i / 2 * 8;
                    float p = power_of_two(fmaf(s[j][i], factor, -top[i / 2]));
                    s[j][i] = sees ? p * (dp[j][i] - row_delta[i / 2]) : 0.0f;
                }
            add_product<D>(sum, s, keys, part);
        }
    }
    float scales[2] = {scale, scale};
    store<D>(dq, sum, scales, first + own, end, heads, head);
}

template <int D>
__device__ __forceinline__ void backward_kv(__nv_bfloat16* shared, const float* q, const float* k, const float* v, const float* dy,
                                            const float* lse, const float* delta, const unsigned* tiles, float* dk, float* dv, int tokens,
                                            int heads, int kv_heads, float scale) {
    constexpr int N = 4;  // 32 queries at a time
    __shared__ float tops[ROWS], deltas[ROWS];
    __nv_bfloat16 *keys = shared, *values = keys + ROWS * D, *queries = values + ROWS * D, *slopes = queries + ROWS * D;
    int end = int(tiles[3 * blockIdx.x + 1]), first = int(tiles[3 * blockIdx.x + 2]);
    int kv = blockIdx.y, group = heads / kv_heads, lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    float k_sum[D / 8][4], v_sum[D / 8][4], factor = scale * LOG2_E;
    clear<D>(k_sum);
    clear<D>(v_sum);
    load<D>(keys, k, first, end, kv_heads, kv);
    load<D>(values, v, first, end, kv_heads, kv);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int query = first; query < end; query += ROWS) {
            __syncthreads();
            load<D>(queries, q, query, end, heads, head);
            load<D>(slopes, dy, query, end, heads, head);
            if (threadIdx.x < ROWS) {
                int row = query + threadIdx.x;
                tops[threadIdx.x] = row < end ? lse[(long long)head * tokens + row] * LOG2_E : INFINITY;
                deltas[threadIdx.x] = row < end ? delta[(long long)head * tokens + row] : 0.0f;
            }
            __syncthreads();
            for (int part = 0; part < ROWS; part += 8 * N) {
                if (query + part + 8 * N - 1 < first + own) continue;  // none of these queries sees the warp's keys
                float p[N][4], ds[N][4];
                product<D>(p, keys, own, queries, part);
                product<D>(ds, values, own, slopes, part);
                int key = first + own + lane / 4;
#pragma unroll
                for (int j = 0; j < N; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int column = part + 8 * j + lane % 4 * 2 + i % 2;
                        bool sees = key + i / 2 * 8 <= query + column && query + column < end;
                        float weight = sees ? power_of_two(fmaf(p[j][i], factor, -tops[column])) : 0.0f;
                        p[j][i] = weight;
                        ds[j][i] = sees ? weight * (ds[j][i] - deltas[column]) : 0.0f;
                    }
                add_product<D>(v_sum, p, slopes, part);
                add_product<D>(k_sum, ds, queries, part);
            }
        }
    float scales[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
    store<D>(dk, k_sum, scales, first + own, end, kv_heads, kv);
    store<D>(dv, v_sum, ones, first + own, end, kv_heads, kv);
}

}  // namespace attention_mma

#define ATTENTION_KERNELS(D)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) attention_forward_bf16_##D(                                                         \
        const float* q, const float* k, const float* v, const unsigned* tiles, float* o, float* lse, int tokens, int heads,               \
        int kv_heads, float scale) {                                                                                                      \
        DYNAMIC_SHARED(__nv_bfloat16, shared);                                                                                            \
        attention_mma::forward<D>(shared, q, k, v, tiles, o, lse, tokens, heads, kv_heads, scale);                                        \
    }                                                                                                                                     \
    EXPORT(attention_forward_bf16_##D);                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) attention_backward_q_bf16_##D(                                                      \
        const float* q, const float* k, const float* v, const float* dy, const float* lse, const float* delta, const unsigned* tiles,     \
        float* dq, int tokens, int heads, int kv_heads, float scale) {                                                                    \
        DYNAMIC_SHARED(__nv_bfloat16, shared);                                                                                            \
        attention_mma::backward_q<D>(shared, q, k, v, dy, lse, delta, tiles, dq, tokens, heads, kv_heads, scale);                         \
    }                                                                                                                                     \
    EXPORT(attention_backward_q_bf16_##D);                                                                                                \
    extern "C" __global__ void __launch_bounds__(128) attention_backward_kv_bf16_##D(                                                     \
        const float* q, const float* k, const float* v, const float* dy, const float* lse, const float* delta, const unsigned* tiles,     \
        float* dk, float* dv, int tokens, int heads, int kv_heads, float scale) {                                                         \
        DYNAMIC_SHARED(__nv_bfloat16, shared);                                                                                            \
        attention_mma::backward_kv<D>(shared, q, k, v, dy, lse, delta, tiles, dk, dv, tokens, heads, kv_heads, scale);                    \
    }                                                                                                                                     \
    EXPORT(attention_backward_kv_bf16_##D);

ATTENTION_KERNELS(64)
ATTENTION_KERNELS(128)
