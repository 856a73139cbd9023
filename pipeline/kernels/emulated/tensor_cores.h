// The tensor core and asynchronous copy instructions that ptx.cuh wraps, done by all lanes together. Layouts of fragments are those of the
// PTX manual (matrix fragments for mma.m16n8k16 with 16-bit floats; ldmatrix).
#pragma once

namespace emulated {

struct Fragments {
    float* d;
    const unsigned* a;
    const unsigned* b;
};

// The 16-bit element of a register pair: `half` 0 is the lower.
inline float bf16_of(unsigned pair, unsigned half) {
    return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000);
}

// d [16, 8] += a [16, 16] b [16, 8]. Products of bf16 are exact in f64; their sum is rounded to f32 once, which is within what the
// device's own (unspecified) order allows.
inline void mma_m16n8k16(void* const* lanes, unsigned) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < WARP; lane++) {
        const auto* mine = static_cast<const Fragments*>(lanes[lane]);
        unsigned group = lane / 4, pair = lane % 4 * 2;
        for (unsigned i = 0; i < 8; i++) {
            a[group + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] = bf16_of(mine->a[i / 2], i % 2);
        }
        for (unsigned i = 0; i < 4; i++) {
            b[pair + i / 2 * 8 + i % 2][group] = bf16_of(mine->b[i / 2], i % 2);
        }
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        auto* mine = static_cast<Fragments*>(lanes[lane]);
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            double sum = mine->d[i];
            for (unsigned k = 0; k < 16; k++) {
                sum += double(a[row][k]) * b[k][column];
            }
            mine->d[i] = float(sum);
        }
    }
}

// One lane's part of ldmatrix: the row it points at, and its registers.
struct Rows {
    const void* row;
    unsigned* registers;
};

// Four 8 x 8 matrices of 16-bit elements; lane l points at row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
void ldmatrix_x4(void* const* lanes, unsigned) {
    for (unsigned lane = 0; lane < WARP; lane++) {
        auto* mine = static_cast<Rows*>(lanes[lane]);
        for (unsigned matrix = 0; matrix < 4; matrix++) {
            unsigned value = 0;
            for (unsigned half = 0; half < 2; half++) {
                unsigned row = lane / 4, column = lane % 4 * 2 + half;
                if (TRANSPOSED) {
                    std::swap(row, column);
                }
                const auto* source = static_cast<const Rows*>(lanes[matrix * 8 + row]);
                value |= unsigned(static_cast<const unsigned short*>(source->row)[column]) << 16 * half;
            }
            mine->registers[matrix] = value;
        }
    }
}

}  // namespace emulated
