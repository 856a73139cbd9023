// Rows that move, the dropout mask, the optimiser.

#include "check.h"

using namespace check;

namespace {

const int WIDTHS[] = {1, 5, 8, 100, 1023, 1024, 2056};

// `n` distinct numbers below `all`.
std::vector<unsigned> distinct(Random& random, unsigned n, unsigned all) {
    std::vector<unsigned> numbers(all);
    for (unsigned i = 0; i < all; i++) {
        numbers[i] = i;
    }
    for (unsigned i = 0; i < n; i++) {
        std::swap(numbers[i], numbers[i + random.below(all - i)]);
    }
    numbers.resize(n);
    return numbers;
}

template <class T>
void embeds(const char* kernel, const std::vector<T>& table, const std::vector<unsigned>& ids, int width, size_t offset, float (*wide)(T)) {
    std::vector<float> expected;
    for (unsigned id : ids) {
        for (int i = 0; i < width; i++) {
            expected.push_back(wide(table[size_t(id) * width + i]));
        }
    }
    Values<T> dev(table, offset);
    Values<unsigned> rows(ids);
    Values<float> y = Values<float>::made(expected.size());
    launch(kernel, {unsigned(ids.size())}, block_for(width), 0, dev, rows, y, int(ids.size()), width);
    same(kernel, y.read(), expected);
}

}  // namespace

TEST(rows_move) {
    for (int width : WIDTHS) {
        for (size_t offset : {0, 1}) {
            Random random(width);
            const unsigned all = 11, n = 6;
            std::vector<float> table = random.values(all * width), x = random.values(n * width), row = random.values(width);
            std::vector<unsigned> ids = distinct(random, n, all);
            std::vector<__nv_bfloat16> bf16;
            std::vector<__half> f16;
            for (float value : table) {
                bf16.push_back(__float2bfloat16(value));
                f16.push_back(__float2half(value));
            }
            embeds<float>("gather_rows", table, ids, width, offset, [](float v) { return v; });
            embeds<float>("embed_f32", table, ids, width, offset, [](float v) { return v; });
            embeds<__nv_bfloat16>("embed_bf16", bf16, ids, width, offset, __bfloat162float);
            embeds<__half>("embed_f16", f16, ids, width, offset, __half2float);

            std::vector<float> sum = table, many;
            for (unsigned i = 0; i < n; i++) {
                for (int j = 0; j < width; j++) {
                    sum[size_t(ids[i]) * width + j] += x[i * width + j];
                    many.push_back(row[j]);
                }
            }
            Values<float> from(x, offset), to(table), one(row, offset), y = Values<float>::made(many.size());
            Values<unsigned> numbers(ids);
            launch("scatter_rows", {n}, block_for(width), 0, from, numbers, to, int(n), width);
            same("scatter_rows", to.read(), sum);
            launch("broadcast_rows", {n}, block_for(width), 0, one, y, int(n), width);
            same("broadcast_rows", y.read(), many);
        }
    }
}

namespace {

// Philox4x32 as published: rounds of two products, halves crossed, keys raised between rounds.
void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t x[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
    for (int round = 0; round < 7; round++) {
        uint64_t p0 = uint64_t(0xD2511F53) * x[0], p1 = uint64_t(0xCD9E8D57) * x[2];
        uint32_t next[4] = {uint32_t(p1 >> 32) ^ x[1] ^ k[0], uint32_t(p1), uint32_t(p0 >> 32) ^ x[3] ^ k[1], uint32_t(p0)};
        memcpy(x, next, sizeof x);
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    memcpy(out, x, sizeof x);
}

// As the head of dropout.rs says which word belongs to a place.
uint32_t word_at(uint64_t key, uint64_t row, unsigned column) {
    const uint32_t counter[4] = {column / 32 * 8 + column % 8, uint32_t(row), uint32_t(row >> 32), 0};
    const uint32_t keys[2] = {uint32_t(key), uint32_t(key >> 32)};
    uint32_t words[4];
    philox(counter, keys, words);
    return words[column / 8 % 4];
}

}  // namespace

TEST(dropout_draws_philox_with_seven_rounds) {
    // The known answers that Philox's authors publish; the first is also what the kernel draws for key 0, row 0, columns 0, 8, 16, 24.
    const uint32_t counters[3][4] = {{0, 0, 0, 0}, {~0u, ~0u, ~0u, ~0u}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}};
    const uint32_t keys[3][2] = {{0, 0}, {~0u, ~0u}, {0xa4093822, 0x299f31d0}};
    const uint32_t answers[3][4] = {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
                                    {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
                                    {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}};
    for (int i = 0; i < 3; i++) {
        uint32_t words[4];
        philox(counters[i], keys[i], words);
        EXPECT(memcmp(words, answers[i], sizeof words) == 0, "the twin's answer %d", i);
    }
    for (int w = 0; w < 4; w++) {
        for (uint32_t more : {0, 1}) {
            Values<float> x(std::vector<float>(32, 1.0f)), out = Values<float>::made(32);
            launch("dropout_apply", {1}, {256}, 0, x, out, 1, 32, 0ull, unsigned(answers[0][w] + more), 2.0f, 0ull);
            float found = out.read()[8 * w];
            EXPECT(found == (more == 1 ? 0.0f : 2.0f), "column %d: %g", 8 * w, double(found));
        }
    }
}

TEST(dropout_has_its_definition_s_bits) {
    // The second mask leaves almost all out and has rows beyond 2^32.
    struct { unsigned long long key; unsigned threshold; float scale; unsigned long long first_row; } masks[] = {
        {0x0123456789abcdefull, 1288490189u, float(1 / 0.7), 5}, {~0ull, 0xfff00000u, 4096.0f, (7ull << 32) - 1}};
    for (auto [key, threshold, scale, first_row] : masks) {
        for (int width : WIDTHS) {
            const int rows = 3;
            std::vector<float> x = Random(width).values(rows * width), apply, before = Random(width + 1).values(rows * width), sum;
            // What is left out is 0 whatever it was, and adding 0 to -0 gives 0.
            x[0] = NAN;
            before[width / 2] = -0.0f;
            for (int i = 0; i < rows * width; i++) {
                float kept = word_at(key, first_row + i / width, i % width) < threshold ? 0.0f : x[i] * scale;
                apply.push_back(kept);
                sum.push_back(before[i] + kept);
            }
            if (std::isnan(apply[0])) {
                x[0] = apply[0] = 0.0f;
                sum[0] = before[0] + 0.0f;
            }
            Values<float> in(x, 1), out = Values<float>::made(x.size()), to(before);
            launch("dropout_apply", {rows}, block_for(width), 0, in, out, rows, width, key, threshold, scale, first_row);
            same("dropout_apply", out.read(), apply);
            launch("dropout_add", {rows}, block_for(width), 0, in, to, rows, width, key, threshold, scale, first_row);
            same("dropout_add", to.read(), sum);
        }
    }
}

TEST(adamw_has_its_definition_s_bits) {
    for (size_t n : {1, 4096, 4098, 4100}) {
        for (double clip : {1.0, 0.37}) {
            Random random(n);
            std::vector<float> w = random.values(n), g = random.values(n, 0.01f), m = random.values(n, 0.01f), v = random.values(n, 1e-4f);
            const double lr = 2e-4, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.01;
            const double correction1 = 1 - std::pow(beta1, 3), correction2 = 1 - std::pow(beta2, 3);
            for (float& square : v) {
                square = std::fabs(square);
            }
            Values<float> dev_w(w), dev_g(g, 1), dev_m(m), dev_v(v);
            for (size_t i = 0; i < n; i++) {
                double gradient = clip == 1.0 ? g[i] : float(g[i] * clip);
                m[i] = float(beta1 * m[i] + (1 - beta1) * gradient);
                v[i] = float(beta2 * v[i] + (1 - beta2) * gradient * gradient);
                double root = std::sqrt(v[i] / correction2) + eps;
                w[i] = float(w[i] * (1 - lr * decay) - lr * (m[i] / correction1) / root);
            }
            if (clip != 1.0) {
                launch("scale", grid_for(n), block_for(n), 0, dev_g, clip, (long long)n);
            }
            launch("adamw", grid_for(n), block_for(n), 0, dev_w, dev_g, dev_m, dev_v, (long long)n, beta1, beta2, eps, 1 - lr * decay, lr,
                   correction1, correction2);
            same("w", dev_w.read(), w);
            same("m", dev_m.read(), m);
            same("v", dev_v.read(), v);
        }
    }
}

TEST(squares_are_summed_in_a_fixed_order) {
    for (size_t n : {1, 1000, 16384, 16385, 40001}) {
        for (size_t offset : {0, 1}) {
            std::vector<float> g = Random(n).values(n);
            std::vector<double> expected((n + 16383) / 16384, 0.0);
            for (size_t i = 0; i < n; i++) {
                expected[i / 16384] += double(g[i]) * g[i];
            }
            Values<float> in(g, offset);
            Values<double> partial = Values<double>::made(expected.size()), again = Values<double>::made(expected.size());
            launch("sum_squares", {unsigned(expected.size())}, block_for(n), 0, in, partial, (long long)n);
            launch("sum_squares", {unsigned(expected.size())}, block_for(n), 0, in, again, (long long)n);
            // A rounding of 2^-53 for each sum at most.
            near("sums", partial.read(), expected, 16384 * 0x1p-53);
            same("sums again", again.read(), partial.read());
        }
    }
}
