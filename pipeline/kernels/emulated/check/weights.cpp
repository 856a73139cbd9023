// Packed weights against the sentences at the head of awq.rs and nf4.rs.

#include "check.h"

using namespace check;

namespace {

std::vector<float> widened(const std::vector<__nv_bfloat16>& values) {
    std::vector<float> wide;
    for (auto value : values) {
        wide.push_back(__bfloat162float(value));
    }
    return wide;
}

std::vector<float> rounded(const std::vector<float>& values) {
    std::vector<float> narrow;
    for (float value : values) {
        narrow.push_back(__bfloat162float(__float2bfloat16(value)));
    }
    return narrow;
}

// Bits 4i .. 4i+3 of word c are output column 8c + ORDER[i].
unsigned nibble(const std::vector<unsigned>& words, size_t row, size_t outputs, size_t column) {
    static const unsigned ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    unsigned i = 0;
    while (ORDER[i] != column % 8) {
        i++;
    }
    return words[row * (outputs / 8) + column / 8] >> 4 * i & 15;
}

}  // namespace

TEST(awq_unpacks_exactly) {
    struct { int inputs, outputs, group; } shapes[] = {{128, 64, 128}, {12, 8, 4}, {30, 24, 5}, {9, 2056, 3}, {256, 40, 32}};
    for (auto [inputs, outputs, group] : shapes) {
        for (size_t offset : {0, 1}) {
            Random random(inputs);
            std::vector<unsigned> q, z;
            std::vector<__half> scales;
            for (int i = 0; i < inputs * outputs / 8; i++) {
                q.push_back(random.word());
            }
            for (int i = 0; i < inputs / group * outputs; i++) {
                scales.push_back(__float2half(random.value() * 0.1f));
            }
            for (int i = 0; i < inputs / group * outputs / 8; i++) {
                z.push_back(random.word());
            }
            std::vector<float> expected;
            for (int i = 0; i < inputs; i++) {
                for (int o = 0; o < outputs; o++) {
                    int difference = int(nibble(q, i, outputs, o)) - int(nibble(z, i / group, outputs, o));
                    expected.push_back(difference * __half2float(scales[i / group * outputs + o]));
                }
            }
            Values<unsigned> words(q), zeros(z);
            Values<__half> factors(scales, offset);
            Values<float> w = Values<float>::made(expected.size(), offset);
            Values<__nv_bfloat16> narrow = Values<__nv_bfloat16>::made(expected.size(), offset);
            Size grid = grid_for(inputs + offset), block = block_for(inputs + offset);
            launch("awq_unpack_f32", grid, block, 0, words, zeros, factors, w, inputs, outputs, group);
            near("f32", w.read(), std::vector<double>(expected.begin(), expected.end()), 0.0);
            launch("awq_unpack_bf16", grid, block, 0, words, zeros, factors, narrow, inputs, outputs, group);
            near("bf16", widened(narrow.read()), [&] { auto r = rounded(expected); return std::vector<double>(r.begin(), r.end()); }(), 0.0);
        }
    }
}

TEST(nf4_unpacks_as_its_formula_says) {
    static const float LEVELS[16] = {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                                     0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f};
    // The last has more than 256 blocks of 64.
    for (size_t n : {1, 63, 64, 65, 4096, 4097, 20001}) {
        for (size_t offset : {0, 3}) {
            Random random(n);
            std::vector<unsigned char> codes((n + 1) / 2), absmax((n + 63) / 64);
            for (auto& byte : codes) {
                byte = (unsigned char)random.word();
            }
            for (auto& byte : absmax) {
                byte = (unsigned char)random.word();
            }
            std::vector<float> map = random.values(256), nested = random.values((absmax.size() + 255) / 256);
            float offset_of_maxima = 0.7f;
            std::vector<double> expected, allowed, allowed_bf16;
            for (size_t i = 0; i < n; i++) {
                unsigned code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
                double product = double(map[absmax[i / 64]]) * nested[i / 64 / 256], scale = product + double(offset_of_maxima);
                expected.push_back(LEVELS[code] * scale);
                // A rounding of the product, one of the sum, one of the value; bf16 rounds once more, 2^-8 at most.
                double off = std::fabs(LEVELS[code]) * (std::fabs(product) + std::fabs(scale)) + std::fabs(expected[i]);
                allowed.push_back(1.01 * ROUNDING * off);
                allowed_bf16.push_back(allowed[i] + 0x1.01p-8 * std::fabs(expected[i]));
            }
            Values<unsigned char> c(codes, offset), a(absmax);
            Values<float> m(map), s(nested), w = Values<float>::made(n, offset);
            Values<__nv_bfloat16> narrow = Values<__nv_bfloat16>::made(n, offset);
            Size grid = grid_for(n + offset / 3), block = block_for(n + offset / 3);
            launch("nf4_unpack_f32", grid, block, 0, c, a, s, offset_of_maxima, m, w, (long long)n);
            near("f32", w.read(), expected, allowed);
            launch("nf4_unpack_bf16", grid, block, 0, c, a, s, offset_of_maxima, m, narrow, (long long)n);
            std::vector<float> bf16 = widened(narrow.read());
            near("bf16", bf16, expected, allowed_bf16);
            same("bf16 of f32", bf16, rounded(w.read()));
        }
    }
}
