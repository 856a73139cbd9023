// RMSNorm and rotary embedding against float64.

#include "check.h"

using namespace check;

namespace {

struct Norm {
    std::vector<double> y, dx, dx_allowed;
};

// Forward and backward as the formulas say, and what f32 steps may be off by going back.
Norm norm_of(const std::vector<float>& x, const std::vector<float>& w, const std::vector<float>& dy, double eps) {
    Norm norm;
    size_t width = w.size();
    for (size_t row = 0; row < x.size(); row += width) {
        double squares = 0, sum = 0, sum_of_sizes = 0;
        for (size_t i = 0; i < width; i++) {
            double term = double(x[row + i]) * w[i] * dy[row + i];
            squares += double(x[row + i]) * x[row + i];
            sum += term;
            sum_of_sizes += std::fabs(term);
        }
        double n = double(width), r = 1 / std::sqrt(squares / n + eps), shared = r * r * sum / n;
        // Two roundings of each term; r is rounded, twice a factor; shared is rounded.
        double shared_off = ROUNDING * (2 * sum_of_sizes * r * r / n + 3 * std::fabs(shared));
        for (size_t i = 0; i < width; i++) {
            double own = double(w[i]) * dy[row + i], x_i = x[row + i], back = r * (own - x_i * shared);
            norm.y.push_back(x_i * r * w[i]);
            norm.dx.push_back(back);
            // Both products, their difference, r and its product.
            double off = std::fabs(x_i) * shared_off + ROUNDING * (std::fabs(own) + std::fabs(x_i * shared));
            norm.dx_allowed.push_back(1.01 * (r * off + 3 * ROUNDING * std::fabs(back)));
        }
    }
    return norm;
}

}  // namespace

TEST(rms_norm_goes_there_and_back) {
    // Beyond 16 values a thread a row is read twice.
    for (int width : {1, 3, 64, 100, 1028, 5120, 8191, 8192, 9000, 9001}) {
        for (size_t offset : {0, 1}) {
            int rows = 3;
            double eps = 1e-6;
            Random random(width);
            std::vector<float> x = random.values(width * rows, 4), w = random.values(width), dy = random.values(width * rows);
            Norm expected = norm_of(x, w, dy, eps);
            Values<float> dev_x(x, offset), dev_w(w, offset), dev_dy(dy, offset), y = Values<float>::made(x.size(), offset);
            launch("rms_norm_forward", {unsigned(rows)}, block_for(width), 0, dev_x, dev_w, y, rows, width, eps);
            // r, and two products.
            near("y", y.read(), expected.y, 3.01 * ROUNDING);
            size_t n = x.size();
            Values<__nv_bfloat16> rounded = Values<__nv_bfloat16>::made(n, offset), narrow = Values<__nv_bfloat16>::made(n, offset);
            launch("cast_f32_bf16", grid_for(n), block_for(n), 0, y, rounded, (long long)n);
            launch("rms_norm_forward_bf16", {unsigned(rows)}, block_for(width), 0, dev_x, dev_w, narrow, rows, width, eps);
            same("y in bf16", bits(narrow.read()), bits(rounded.read()));
            launch("rms_norm_backward", {unsigned(rows)}, block_for(width), 0, dev_x, dev_w, dev_dy, dev_dy, rows, width, eps);
            near("dx", dev_dy.read(), expected.dx, expected.dx_allowed);
        }
    }
}

TEST(rope_turns_both_ways) {
    struct { int tokens, heads, half; } shapes[] = {{5, 3, 64}, {1, 1, 1}, {7, 5, 32}, {3, 2, 10}, {2, 9, 16}};
    for (auto [tokens, heads, half] : shapes) {
        for (float sign : {1.0f, -1.0f}) {
            Random random(half);
            std::vector<float> x = random.values(tokens * heads * half * 2, 5), cos, sin;
            for (int i = 0; i < tokens * half; i++) {
                float angle = random.value() * 100;
                cos.push_back(std::cos(angle));
                sin.push_back(std::sin(angle));
            }
            std::vector<double> y(x.size()), allowed(x.size());
            for (size_t i = 0; i < x.size(); i++) {
                size_t j = i % (2 * half), token = i / (2 * half) / heads, at = token * half + j % half;
                double partner = j < size_t(half) ? -double(x[i + half]) : double(x[i - half]);
                double own = double(x[i]) * cos[at], other = partner * sin[at] * sign;
                y[i] = own + other;
                allowed[i] = 1.01 * ROUNDING * (std::fabs(own) + std::fabs(other) + std::fabs(y[i]));
            }
            for (size_t offset : {0, 2}) {
                Values<float> dev_x(x, offset), c(cos), s(sin);
                launch("rope", {unsigned(tokens)}, block_for(half), 0, dev_x, c, s, sign, dev_x, tokens, heads, half);
                near("y", dev_x.read(), y, allowed);
            }
        }
    }
}
