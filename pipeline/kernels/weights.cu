// Packed weights unpacked for a product. CPU definitions: pipeline/src/linear/awq.rs and nf4.rs; f32 has their very bits, bf16 the same
// numbers rounded once.
//
// Launch: any grid and block; a thread of awq_unpack_* takes 64 values at a time. Time limit: bytes moved at
// 4.8 TB/s, for a weight of 5120 x 13824 (70.8 million values).
//   awq_unpack_bf16, groups of 128    2.52 bytes a value    37 us          awq_unpack_f32    4.52    67 us
//   nf4_unpack_bf16                   2.52                  37             nf4_unpack_f32    4.52    67
// outputs must be a multiple of 8, inputs of group; what the parts hold is checked before.

#include "flat.cuh"

// Inputs that a thread unpacks one below the other with one load of zero points and scales.
constexpr int AWQ_ROWS = 8;

// A code as a float less a zero point as `negative`: the code is put into the lowest bits of 2^23, whose unit is 1, and 2^23 + zero point is
// taken away. An instruction less than a conversion, and those are slow.
__device__ __forceinline__ float code_less_zero(unsigned word, int shift, float zero) {
    return __uint_as_float(0x4b000000u | (word >> shift & 15)) - zero;
}

// Column j of a word's eight sits in nibble j / 2 + 4 (j % 2).
__device__ __forceinline__ int shift_of(int j) { return 4 * (j / 2 + 4 * (j % 2)); }

__device__ __forceinline__ void round_to(float from, float& to) { to = from; }
__device__ __forceinline__ void round_to(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }

// A thread takes one word of AWQ_ROWS inputs; neighbours take neighbouring words, so a warp reads 128 and writes 512 or 1024 bytes in a row.
template <class T>
__device__ __forceinline__ void awq_unpack(const unsigned* __restrict__ qweight, const unsigned* __restrict__ qzeros,
                                           const __half* __restrict__ scales, T* __restrict__ w, int inputs, int outputs, int group) {
    int words = outputs / 8;
    bool packs = aligned(scales, w);
    long long items = (long long)((inputs + AWQ_ROWS - 1) / AWQ_ROWS) * words, threads = (long long)gridDim.x * blockDim.x;
    for (long long item = (long long)blockIdx.x * blockDim.x + threadIdx.x; item < items; item += threads) {
        int first = int(item / words) * AWQ_ROWS, c = int(item % words);
        // All words are asked for before the first is used.
        unsigned word[AWQ_ROWS];
#pragma unroll
        for (int k = 0; k < AWQ_ROWS; k++) {
            word[k] = first + k < inputs ? qweight[(long long)(first + k) * words + c] : 0;
        }
        float zero[8] = {}, scale[8] = {};
#pragma unroll
        for (int k = 0; k < AWQ_ROWS; k++) {
            int i = first + k;
            if (i >= inputs) {
                break;
            }
            if (k == 0 || i % group == 0) {
                int row = i / group;
                unsigned zeros = qzeros[(long long)row * words + c];
                long long at = (long long)row * outputs + 8 * c;
                Pack<__half, 8> halves;
                if (packs) {
                    halves = load<8>(scales, at);
                } else {
                    for (int j = 0; j < 8; j++) {
                        halves.v[j] = scales[at + j];
                    }
                }
                for (int j = 0; j < 8; j++) {
                    zero[j] = 8388608.0f + float(zeros >> shift_of(j) & 15);
                    scale[j] = __half2float(halves.v[j]);
                }
            }
            Pack<T, 8> values;
            for (int j = 0; j < 8; j++) {
                round_to(code_less_zero(word[k], shift_of(j), zero[j]) * scale[j], values.v[j]);
            }
            long long at = (long long)i * outputs + 8 * c;
            if (packs) {
                store(w, at, values);
            } else {
                for (int j = 0; j < 8; j++) {
                    w[at + j] = values.v[j];
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    awq_unpack_bf16(const unsigned* qweight, const unsigned* qzeros, const __half* scales, __nv_bfloat16* w, int inputs, int outputs, int group) {
    awq_unpack(qweight, qzeros, scales, w, inputs, outputs, group);
}
EXPORT(awq_unpack_bf16);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    awq_unpack_f32(const unsigned* qweight, const unsigned* qzeros, const __half* scales, float* w, int inputs, int outputs, int group) {
    awq_unpack(qweight, qzeros, scales, w, inputs, outputs, group);
}
EXPORT(awq_unpack_f32);

// nf4.rs LEVELS.
__constant__ float NF4_LEVELS[16] = {-1.0f,          -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                                     -0.091050036f,  0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                                     0.44070983f,    0.562617f,    0.72295684f,  1.0f};

// A thread takes eight values, which lie in one block of 64: four bytes of codes, one scale.
template <class T>
__device__ __forceinline__ void nf4_unpack(const unsigned char* __restrict__ codes, const unsigned char* __restrict__ absmax,
                                           const float* __restrict__ nested, float offset, const float* __restrict__ map256,
                                           T* __restrict__ w, long long n) {
    // In shared memory each lane may read another level in the same cycle; constant memory would serve one level after the other.
    __shared__ float levels[16];
    if (threadIdx.x < 16) {
        levels[threadIdx.x] = NF4_LEVELS[threadIdx.x];
    }
    __syncthreads();
    each<8>(n, aligned(codes, w), [=](auto width, long long i) {
        constexpr int N = decltype(width)::value;
        long long block = i / 64;
        float scale = __fadd_rn(__fmul_rn(map256[absmax[block]], nested[block / 256]), offset);
        Pack<unsigned char, (N + 1) / 2> bytes = load<(N + 1) / 2>(codes, i / 2);
        Pack<T, N> values;
        for (int j = 0; j < N; j++) {
            // The first of two codes is in the high nibble.
            int code = (i + j) % 2 == 0 ? bytes.v[j / 2] >> 4 : bytes.v[j / 2] & 15;
            round_to(__fmul_rn(levels[code], scale), values.v[j]);
        }
        store(w, i, values);
    });
}

extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    nf4_unpack_bf16(const unsigned char* codes, const unsigned char* absmax, const float* nested, float offset, const float* map256,
                    __nv_bfloat16* w, long long n) {
    nf4_unpack(codes, absmax, nested, offset, map256, w, n);
}
EXPORT(nf4_unpack_bf16);
extern "C" __global__ void __launch_bounds__(LARGEST_BLOCK)
    nf4_unpack_f32(const unsigned char* codes, const unsigned char* absmax, const float* nested, float offset, const float* map256, float* w,
                   long long n) {
    nf4_unpack(codes, absmax, nested, offset, map256, w, n);
}
EXPORT(nf4_unpack_f32);
