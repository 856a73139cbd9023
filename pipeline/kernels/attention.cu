// Block-diagonal causal attention with grouped key/value heads, f32 throughout: the device's twin of pipeline/src/ops/attention.
// Any head size up to 256, on ordinary cores; attention_mma.cu is for bf16 factors and head sizes of 64 and 128.
//
//   q [T, heads, d], k and v [T, kv_heads, d], o and dy as q, lse and delta [heads * T] by head, then token.
//   tiles u32 [n, 3]: a conversation's begin and end, and the first of up to 64 of its rows (all counted in the pack). A block owns a
//   tile and a head, and writes its rows alone: no atomics, the same bits every time, and nothing of another conversation is read.
//   Heavy tiles first makes the grid end evenly; the order changes no bit. Within a conversation a value that is not finite may reach rows of
//   its tile that do not see it (the CPU keeps it from them): its loss is none either way.
//
//   forward      S = q kT * scale, masked; P = exp(S - max), max carried on from tile to tile; o = P v / sum P; lse = max + ln sum P
//   backward_q   P = exp(S - lse), dS = P o (dy vT - delta) * scale, dq = dS k
//   backward_kv  the same turned: rows are keys, and the queries that see them stream by, head after head of those that share the keys:
//                dv = sum PT dy, dk = sum dST q
//
// On paper (H200: 132 multiprocessors, 60 TFLOP/s of f32, 227 KB of shared memory a block, 64 Ki registers):
//   A block of 256 threads is a grid of 16 x 16; a thread owns 4 rows (of 64) by 2 columns (of 32) of S, and 4 rows by d/16 columns of o.
//   Of S, 4 dimensions cost it 6 reads of 16 bytes for 32 fused multiply-adds, of o 4 keys cost 4 + d/16 reads for d of them: at best a third
//   of peak, bound by shared memory. Rows are padded by 16 bytes, so that 8 rows lie in different banks.
//   shared memory at d = 64 / 128 / 256:  forward 43 / 75 / 139 KB,  backward 60 / 108 / 204 KB (q), 69 / 117 / 213 KB (kv)
//   registers 189 (forward), 198 (q), 243 (kv), which is what d = 256 takes: one block a multiprocessor. This is the path of parity.
// Time limit: 4 d (forward) and 14 d (backward, both) FLOP a seen pair at 20 TFLOP/s: a conversation of 1024 tokens, 12 heads of 128,
// 0.16 ms forward and 0.56 ms backward. attention_delta moves 8 d bytes for 2 d FLOP, at 4.8 TB/s.
//
// Launch: 256 threads; grid (tiles, heads), or (tiles, kv_heads) for backward_kv; for attention_delta ceil(T * heads / 8). Shared memory,
// D being d rounded up to 64, 128 or 256: (128 (D + 4) + 2304) floats forward, (192 (D + 4) + 2304) for q, (192 (D + 4) + 4608) for kv.
#include "exponential.cuh"
#include "ptx.cuh"

namespace attention {

constexpr int ROWS = 64;     // of a tile
constexpr int STREAMED = 32; // rows of the other side at a time
constexpr int THREADS = 256;
constexpr int ROW_SHARE = 4; // rows of a thread
constexpr int WEIGHTS = STREAMED + 4;  // floats of a row of P or dS in shared memory

// A row of D values in shared memory, padded.
template <int D> constexpr int WIDTH = D + 4;

struct Tile {
    int begin, end, first;
    __device__ Tile(const unsigned* tiles) {
        const unsigned* tile = tiles + 3 * blockIdx.x;
        begin = int(tile[0]), end = int(tile[1]), first = int(tile[2]);
    }
};

// Rows `row`.. of a head of x [T, heads, d] into `to` [rows][WIDTH], those from `end` on and columns from d on as zeros.
template <int D>
__device__ void load(float* to, const float* x, int rows, int row, int end, int heads, int head, int d) {
    for (int i = threadIdx.x; i < rows * D; i += THREADS) {
        int r = i / D, c = i % D;
        bool there = row + r < end && c < d;
        to[r * WIDTH<D> + c] = there ? x[((long long)(row + r) * heads + head) * d + c] : 0.0f;
    }
}

// The thread's part of a bT: rows 4 ty.. of a [64][WIDTH] with rows tx and tx + 16 of b [32][WIDTH].
template <int D>
__device__ __forceinline__ void product(float (&s)[ROW_SHARE][2], const float* a, const float* b, int tx, int ty) {
    for (int i = 0; i < ROW_SHARE; i++) s[i][0] = s[i][1] = 0.0f;
    a += ty * ROW_SHARE * WIDTH<D>;
    b += tx * WIDTH<D>;
#pragma unroll 4
    for (int c = 0; c < D; c += 4) {
        float4 b0 = *reinterpret_cast<const float4*>(b + c);
        float4 b1 = *reinterpret_cast<const float4*>(b + 16 * WIDTH<D> + c);
#pragma unroll
        for (int i = 0; i < ROW_SHARE; i++) {
            float4 x = *reinterpret_cast<const float4*>(a + i * WIDTH<D> + c);
            s[i][0] = fmaf(x.w, b0.w, fmaf(x.z, b0.z, fmaf(x.y, b0.y, fmaf(x.x, b0.x, s[i][0]))));
            s[i][1] = fmaf(x.w, b1.w, fmaf(x.z, b1.z, fmaf(x.y, b1.y, fmaf(x.x, b1.x, s[i][1]))));
        }
    }
}

// Adds to the thread's part of w b: rows 4 ty.. of w [64][WEIGHTS] with columns 4 tx + 64 j.. of b [32][WIDTH].
template <int D>
__device__ __forceinline__ void add_product(float (&sum)[ROW_SHARE][D / 16], const float* w, const float* b, int tx, int ty) {
    w += ty * ROW_SHARE * WEIGHTS;
    b += tx * 4;
#pragma unroll 2
    for (int k = 0; k < STREAMED; k += 4) {
        float weights[ROW_SHARE][4];
#pragma unroll
        for (int i = 0; i < ROW_SHARE; i++) {
            float4 x = *reinterpret_cast<const float4*>(w + i * WEIGHTS + k);
            weights[i][0] = x.x, weights[i][1] = x.y, weights[i][2] = x.z, weights[i][3] = x.w;
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int j = 0; j < D / 64; j++) {
                float4 y = *reinterpret_cast<const float4*>(b + (k + n) * WIDTH<D> + 64 * j);
#pragma unroll
                for (int i = 0; i < ROW_SHARE; i++) {
                    sum[i][4 * j] = fmaf(weights[i][n], y.x, sum[i][4 * j]);
                    sum[i][4 * j + 1] = fmaf(weights[i][n], y.y, sum[i][4 * j + 1]);
                    sum[i][4 * j + 2] = fmaf(weights[i][n], y.z, sum[i][4 * j + 2]);
                    sum[i][4 * j + 3] = fmaf(weights[i][n], y.w, sum[i][4 * j + 3]);
                }
            }
        }
    }
}

template <int D> __device__ __forceinline__ void clear(float (&sum)[ROW_SHARE][D / 16]) {
    for (int i = 0; i < ROW_SHARE; i++)
        for (int j = 0; j < D / 16; j++) sum[i][j] = 0.0f;
}

// The thread's part of a tile's result, divided by `divisor` of each row, into y [T, heads, d].
template <int D>
__device__ void store(float* y, const float (&sum)[ROW_SHARE][D / 16], const float (&divisor)[ROW_SHARE], Tile tile, int heads,
                      int head, int d, int tx, int ty) {
#pragma unroll
    for (int i = 0; i < ROW_SHARE; i++) {
        int row = tile.first + ty * ROW_SHARE + i;
        if (row >= tile.end) continue;
        float* to = y + ((long long)row * heads + head) * d;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            int c = tx * 4 + (j / 4) * 64 + j % 4;
            if (c < d) to[c] = sum[i][j] / divisor[i];
        }
    }
}

// Over the 16 threads that share rows: half a warp.
__device__ __forceinline__ float row_max(float x) {
    for (int other = 8; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, other));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
    for (int other = 8; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

template <int D>
__device__ void forward(float* shared, const float* q, const float* k, const float* v, Tile tile, float* o, float* lse, int tokens,
                        int heads, int kv_heads, int d, float scale) {
    float *queries = shared, *keys = queries + ROWS * WIDTH<D>, *values = keys + STREAMED * WIDTH<D>;
    float* weights = values + STREAMED * WIDTH<D>;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, head = blockIdx.y, kv = head / (heads / kv_heads);
    float sum[ROW_SHARE][D / 16], total[ROW_SHARE], largest[ROW_SHARE];
    clear<D>(sum);
    for (int i = 0; i < ROW_SHARE; i++) total[i] = 0.0f, largest[i] = -INFINITY;
    load<D>(queries, q, ROWS, tile.first, tile.end, heads, head, d);
    int seen = min(tile.first + ROWS, tile.end);
    for (int key = tile.begin; key < seen; key += STREAMED) {
        __syncthreads();
        load<D>(keys, k, STREAMED, key, tile.end, kv_heads, kv, d);
        load<D>(values, v, STREAMED, key, tile.end, kv_heads, kv, d);
        __syncthreads();
        float s[ROW_SHARE][2];
        product<D>(s, queries, keys, tx, ty);
#pragma unroll
        for (int i = 0; i < ROW_SHARE; i++) {
            int query = tile.first + ty * ROW_SHARE + i;
            if (key + tx > query) s[i][0] = -INFINITY;
            if (key + tx + 16 > query) s[i][1] = -INFINITY;
            float before = largest[i];
            largest[i] = row_max(fmaxf(before, fmaxf(s[i][0], s[i][1])));
            float kept = exp_nonpositive((before - largest[i]) * scale);
            float p0 = exp_nonpositive((s[i][0] - largest[i]) * scale), p1 = exp_nonpositive((s[i][1] - largest[i]) * scale);
            total[i] = total[i] * kept + row_sum(p0 + p1);
            for (int j = 0; j < D / 16; j++) sum[i][j] *= kept;
            weights[(ty * ROW_SHARE + i) * WEIGHTS + tx] = p0;
            weights[(ty * ROW_SHARE + i) * WEIGHTS + tx + 16] = p1;
        }
        __syncwarp();  // a warp reads only rows that it wrote
        add_product<D>(sum, weights, values, tx, ty);
    }
    store<D>(o, sum, total, tile, heads, head, d, tx, ty);
    for (int i = 0; i < ROW_SHARE; i++) {
        int row = tile.first + ty * ROW_SHARE + i;
        if (tx == 0 && row < tile.end) lse[(long long)head * tokens + row] = largest[i] * scale + logf(total[i]);
    }
}

template <int D>
__device__ void backward_q(float* shared, const float* q, const float* k, const float* v, const float* dy, const float* lse,
                           const float* delta, Tile tile, float* dq, int tokens, int heads, int kv_heads, int d, float scale) {
    float *queries = shared, *slopes = queries + ROWS * WIDTH<D>, *keys = slopes + ROWS * WIDTH<D>;
    float *values = keys + STREAMED * WIDTH<D>, *weights = values + STREAMED * WIDTH<D>;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, head = blockIdx.y, kv = head / (heads / kv_heads);
    float sum[ROW_SHARE][D / 16], one[ROW_SHARE], row_lse[ROW_SHARE], row_delta[ROW_SHARE];
    clear<D>(sum);
    for (int i = 0; i < ROW_SHARE; i++) {
        int row = tile.first + ty * ROW_SHARE + i;
        bool there = row < tile.end;
        one[i] = 1.0f;
        row_lse[i] = there ? lse[(long long)head * tokens + row] : INFINITY;
        row_delta[i] = there ? delta[(long long)head * tokens + row] : 0.0f;
    }
    load<D>(queries, q, ROWS, tile.first, tile.end, heads, head, d);
    load<D>(slopes, dy, ROWS, tile.first, tile.end, heads, head, d);
    int seen = min(tile.first + ROWS, tile.end);
    for (int key = tile.begin; key < seen; key += STREAMED) {
        __syncthreads();
        load<D>(keys, k, STREAMED, key, tile.end, kv_heads, kv, d);
        load<D>(values, v, STREAMED, key, tile.end, kv_heads, kv, d);
        __syncthreads();
        float s[ROW_SHARE][2], dp[ROW_SHARE][2];
        product<D>(s, queries, keys, tx, ty);
        product<D>(dp, slopes, values, tx, ty);
#pragma unroll
        for (int i = 0; i < ROW_SHARE; i++)
            for (int n = 0; n < 2; n++) {
                bool sees = key + tx + 16 * n <= tile.first + ty * ROW_SHARE + i;
                float p = exp_nonpositive(s[i][n] * scale - row_lse[i]);
                weights[(ty * ROW_SHARE + i) * WEIGHTS + tx + 16 * n] = sees ? p * (dp[i][n] - row_delta[i]) * scale : 0.0f;
            }
        __syncwarp();
        add_product<D>(sum, weights, keys, tx, ty);
    }
    store<D>(dq, sum, one, tile, heads, head, d, tx, ty);
}

template <int D>
__device__ void backward_kv(float* shared, const float* q, const float* k, const float* v, const float* dy, const float* lse,
                            const float* delta, Tile tile, float* dk, float* dv, int tokens, int heads, int kv_heads, int d,
                            float scale) {
    float *keys = shared, *values = keys + ROWS * WIDTH<D>, *queries = values + ROWS * WIDTH<D>;
    float *slopes = queries + STREAMED * WIDTH<D>, *p_weights = slopes + STREAMED * WIDTH<D>;
    float* ds_weights = p_weights + ROWS * WEIGHTS;
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, kv = blockIdx.y, group = heads / kv_heads;
    float k_sum[ROW_SHARE][D / 16], v_sum[ROW_SHARE][D / 16], one[ROW_SHARE];
    clear<D>(k_sum);
    clear<D>(v_sum);
    for (int i = 0; i < ROW_SHARE; i++) one[i] = 1.0f;
    load<D>(keys, k, ROWS, tile.first, tile.end, kv_heads, kv, d);
    load<D>(values, v, ROWS, tile.first, tile.end, kv_heads, kv, d);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int query = tile.first; query < tile.end; query += STREAMED) {
            __syncthreads();
            load<D>(queries, q, STREAMED, query, tile.end, heads, head, d);
            load<D>(slopes, dy, STREAMED, query, tile.end, heads, head, d);
            __syncthreads();
            float s[ROW_SHARE][2], dp[ROW_SHARE][2];
            product<D>(s, keys, queries, tx, ty);
            product<D>(dp, values, slopes, tx, ty);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int row = query + tx + 16 * n;
                bool there = row < tile.end;
                float row_lse = there ? lse[(long long)head * tokens + row] : INFINITY;
                float row_delta = there ? delta[(long long)head * tokens + row] : 0.0f;
#pragma unroll
                for (int i = 0; i < ROW_SHARE; i++) {
                    bool sees = there && tile.first + ty * ROW_SHARE + i <= row;
                    float p = sees ? exp_nonpositive(s[i][n] * scale - row_lse) : 0.0f;
                    int at = (ty * ROW_SHARE + i) * WEIGHTS + tx + 16 * n;
                    p_weights[at] = p;
                    ds_weights[at] = sees ? p * (dp[i][n] - row_delta) * scale : 0.0f;
                }
            }
            __syncwarp();
            add_product<D>(v_sum, p_weights, slopes, tx, ty);
            add_product<D>(k_sum, ds_weights, queries, tx, ty);
        }
    store<D>(dk, k_sum, one, tile, kv_heads, kv, d, tx, ty);
    store<D>(dv, v_sum, one, tile, kv_heads, kv, d, tx, ty);
}

}  // namespace attention

extern "C" __global__ void __launch_bounds__(256) attention_forward_f32(const float* q, const float* k, const float* v,
                                                                        const unsigned* tiles, float* o, float* lse, int tokens,
                                                                        int heads, int kv_heads, int d, float scale) {
    DYNAMIC_SHARED(float, shared);
    attention::Tile tile(tiles);
    if (d <= 64) attention::forward<64>(shared, q, k, v, tile, o, lse, tokens, heads, kv_heads, d, scale);
    else if (d <= 128) attention::forward<128>(shared, q, k, v, tile, o, lse, tokens, heads, kv_heads, d, scale);
    else attention::forward<256>(shared, q, k, v, tile, o, lse, tokens, heads, kv_heads, d, scale);
}
EXPORT(attention_forward_f32);

extern "C" __global__ void __launch_bounds__(256) attention_backward_q_f32(const float* q, const float* k, const float* v,
                                                                           const float* dy, const float* lse, const float* delta,
                                                                           const unsigned* tiles, float* dq, int tokens, int heads,
                                                                           int kv_heads, int d, float scale) {
    DYNAMIC_SHARED(float, shared);
    attention::Tile tile(tiles);
    if (d <= 64) attention::backward_q<64>(shared, q, k, v, dy, lse, delta, tile, dq, tokens, heads, kv_heads, d, scale);
    else if (d <= 128) attention::backward_q<128>(shared, q, k, v, dy, lse, delta, tile, dq, tokens, heads, kv_heads, d, scale);
    else attention::backward_q<256>(shared, q, k, v, dy, lse, delta, tile, dq, tokens, heads, kv_heads, d, scale);
}
EXPORT(attention_backward_q_f32);

extern "C" __global__ void __launch_bounds__(256) attention_backward_kv_f32(const float* q, const float* k, const float* v,
                                                                            const float* dy, const float* lse, const float* delta,
                                                                            const unsigned* tiles, float* dk, float* dv, int tokens,
                                                                            int heads, int kv_heads, int d, float scale) {
    DYNAMIC_SHARED(float, shared);
    attention::Tile tile(tiles);
    if (d <= 64) attention::backward_kv<64>(shared, q, k, v, dy, lse, delta, tile, dk, dv, tokens, heads, kv_heads, d, scale);
    else if (d <= 128) attention::backward_kv<128>(shared, q, k, v, dy, lse, delta, tile, dk, dv, tokens, heads, kv_heads, d, scale);
    else attention::backward_kv<256>(shared, q, k, v, dy, lse, delta, tile, dk, dv, tokens, heads, kv_heads, d, scale);
}
EXPORT(attention_backward_kv_f32);

// delta [heads * T] = dy . o of each token and head, both [T, heads, d]. A warp each.
extern "C" __global__ void __launch_bounds__(256) attention_delta(const float* o, const float* dy, float* delta, int tokens,
                                                                  int heads, int d) {
    long long pair = (long long)blockIdx.x * 8 + threadIdx.x / 32;  // token * heads + head
    if (pair >= (long long)tokens * heads) return;
    int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int c = lane; c < d; c += 32) sum = fmaf(o[pair * d + c], dy[pair * d + c], sum);
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (lane == 0) delta[(pair % heads) * tokens + pair / heads] = sum;
}
EXPORT(attention_delta);
