// Whole rows from one place to another: embeddings, scored positions out of a pack and their gradients back, biases. CPU definitions:
// pipeline/src/model/decoder.rs (embedding), candle's index_select, a loop over rows; the same bits.
//
// Launch: a block for each of the n rows that move. That every number is a row of the table is checked before.
// Time limit: bytes moved at 4.8 TB/s, for 4096 rows of 5120 values.
//   gather_rows       8 bytes a value     35 us        embed_f32              8 bytes a value    35 us
//   scatter_rows     12                   52           embed_bf16, embed_f16  6                  26
//   broadcast_rows    4                   17

#include "flat.cuh"

// y[i] = row for every i.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    broadcast_rows(const float* __restrict__ row, float* __restrict__ y, int rows, int width) {
    float* to = y + (long long)blockIdx.x * width;
    if (blockIdx.x < rows) {
        along<4>(width, aligned(row, y), [=](auto packed, int i) { store(to, i, load<decltype(packed)::value>(row, i)); });
    }
}
EXPORT(broadcast_rows);

// y[rows[i]] += x[i]; the rows are distinct, so no two blocks write to one.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    scatter_rows(const float* __restrict__ x, const unsigned* __restrict__ rows, float* __restrict__ y, int n, int width) {
    if (blockIdx.x >= n) {
        return;
    }
    const float* from = x + (long long)blockIdx.x * width;
    float* to = y + (long long)rows[blockIdx.x] * width;
    along<4>(width, aligned(x, y), [=](auto packed, int i) {
        constexpr int N = decltype(packed)::value;
        Pack<float, N> sum = load<N>(to, i), more = load<N>(from, i);
        for (int j = 0; j < N; j++) {
            sum.v[j] += more.v[j];
        }
        store(to, i, sum);
    });
}
EXPORT(scatter_rows);

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// y[i] = table[rows[i]], in f32; packs of 16 bytes of the table.
template <class T>
__device__ __forceinline__ void gather(const T* __restrict__ table, const unsigned* __restrict__ rows, float* __restrict__ y, int n, int width) {
    if (blockIdx.x >= n) {
        return;
    }
    const T* from = table + (long long)rows[blockIdx.x] * width;
    float* to = y + (long long)blockIdx.x * width;
    along<16 / sizeof(T)>(width, aligned(table, y), [=](auto packed, int i) {
        constexpr int N = decltype(packed)::value;
        Pack<T, N> values = load<N>(from, i);
        Pack<float, N> wide;
        for (int j = 0; j < N; j++) {
            wide.v[j] = widened(values.v[j]);
        }
        store(to, i, wide);
    });
}

extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) gather_rows(const float* x, const unsigned* rows, float* y, int n, int width) {
    gather(x, rows, y, n, width);
}
EXPORT(gather_rows);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) embed_f32(const float* table, const unsigned* ids, float* y, int n, int width) {
    gather(table, ids, y, n, width);
}
EXPORT(embed_f32);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) embed_bf16(const __nv_bfloat16* table, const unsigned* ids, float* y, int n, int width) {
    gather(table, ids, y, n, width);
}
EXPORT(embed_bf16);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK) embed_f16(const __half* table, const unsigned* ids, float* y, int n, int width) {
    gather(table, ids, y, n, width);
}
EXPORT(embed_f16);
