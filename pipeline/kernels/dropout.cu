// LoRA's dropout mask. CPU definition: pipeline/src/linear/dropout.rs; the very bits, of the mask and of the values.
//
// Launch: a block a row. Time limit: bytes moved at 4.8 TB/s, for 4096 rows of 5120 values.
//   dropout_apply    8 bytes a value    35 us          dropout_add    12    52 us
// The seven rounds are about 16 integer instructions a value, two thirds of what dropout_apply's bytes leave time for.

#include "flat.cuh"

// The four words of Philox4x32-7 for one counter.
__device__ __forceinline__ uint4 philox(uint4 c, unsigned long long key) {
    unsigned k0 = unsigned(key), k1 = unsigned(key >> 32);
#pragma unroll
    for (int round = 0; round < 7; round++) {
        unsigned long long first = 0xD2511F53ull * c.x, second = 0xCD9E8D57ull * c.z;
        c = make_uint4(unsigned(second >> 32) ^ c.y ^ k0, unsigned(second), unsigned(first >> 32) ^ c.w ^ k1, unsigned(first));
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// The block's row of M x, or added to what is in out. Word w of the block with counter 8 g + i belongs to column 32 g + 8 w + i: a thread
// makes one block of words and takes its four columns, eight neighbours take 32 bytes in a row of each of them.
template <bool ADD>
__device__ __forceinline__ void masked(const float* x, float* out, int width, unsigned long long key, unsigned threshold, float scale,
                                       unsigned long long row) {
    int blocks = (width + 31) / 32 * 8;
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) {
        int first = block / 8 * 32 + block % 8;
        // Read before the words are made, which takes about as long as the memory does.
        float from[4], to[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
            int column = first + 8 * w;
            from[w] = column < width ? x[column] : 0.0f;
            to[w] = ADD && column < width ? out[column] : 0.0f;
        }
        uint4 words = philox(make_uint4(block, unsigned(row), unsigned(row >> 32), 0), key);
        const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            int column = first + 8 * w;
            if (column < width) {
                float value = word[w] < threshold ? 0.0f : __fmul_rn(from[w], scale);
                out[column] = ADD ? __fadd_rn(to[w], value) : value;
            }
        }
    }
}

// out = M x. out may be x.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    dropout_apply(const float* x, float* out, int rows, int width, unsigned long long key, unsigned threshold, float scale,
                  unsigned long long first_row) {
    long long begin = (long long)blockIdx.x * width;
    if (blockIdx.x < rows) {
        masked<false>(x + begin, out + begin, width, key, threshold, scale, first_row + blockIdx.x);
    }
}
EXPORT(dropout_apply);

// out += M x.
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    dropout_add(const float* x, float* out, int rows, int width, unsigned long long key, unsigned threshold, float scale,
                unsigned long long first_row) {
    long long begin = (long long)blockIdx.x * width;
    if (blockIdx.x < rows) {
        masked<true>(x + begin, out + begin, width, key, threshold, scale, first_row + blockIdx.x);
    }
}
EXPORT(dropout_add);
