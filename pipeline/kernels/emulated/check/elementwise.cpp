// Casts, sums and SwiGLU against float64, with sizes that leave a tail and with views that begin anywhere.

#include "check.h"

using namespace check;

namespace {

const size_t SIZES[] = {1, 3, 7, 2048, 2049, 4095, 9000, 9002};

// The nearest number of `digits` binary digits, ties to even, as long as it is a normal one.
double nearest(double value, int digits) {
    int exponent;
    double fraction = std::frexp(value, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, digits)), exponent - digits);
}

double sigma(double x) { return 1 / (1 + std::exp(-x)); }

// Gates and factors as training has them, and gates beyond what the exponential takes.
std::vector<float> gates(Random& random, size_t n) {
    std::vector<float> g = random.values(n, 12);
    for (size_t i = 0; i < n; i += 5) {
        g[i] = random.value() * 200;
    }
    return g;
}

}  // namespace

TEST(casts_round_to_nearest_even) {
    for (size_t n : SIZES) {
        for (size_t offset : {0, 1}) {
            std::vector<float> x = Random(n).values(n, 300);
            std::vector<double> expected;
            for (size_t i = 0; i < n; i++) {
                // Every third lies in the middle of two bf16.
                x[i] = i % 3 == 0 ? float(nearest(x[i], 9)) : x[i];
                expected.push_back(nearest(x[i], 8));
            }
            Values<float> in(x, offset), back = Values<float>::made(n, offset);
            Values<__nv_bfloat16> narrow = Values<__nv_bfloat16>::made(n, offset);
            launch("cast_f32_bf16", grid_for(n), block_for(n), 0, in, narrow, (long long)n);
            launch("cast_bf16_f32", grid_for(n), block_for(n), 0, narrow, back, (long long)n);
            near("f32 to bf16 and back", back.read(), expected, 0.0);

            // A half has 11 digits, three more than bf16.
            std::vector<__half> halves;
            std::vector<double> exact;
            for (size_t i = 0; i < n; i++) {
                exact.push_back(nearest(x[i], 11));
                halves.push_back(__float2half(x[i]));
                expected[i] = nearest(exact[i], 8);
            }
            Values<__half> half(halves, offset);
            launch("cast_f16_f32", grid_for(n), block_for(n), 0, half, back, (long long)n);
            near("f16 to f32", back.read(), exact, 0.0);
            launch("cast_f16_bf16", grid_for(n), block_for(n), 0, half, narrow, (long long)n);
            launch("cast_bf16_f32", grid_for(n), block_for(n), 0, narrow, back, (long long)n);
            near("f16 to bf16", back.read(), expected, 0.0);
        }
    }
}

TEST(add_adds) {
    for (size_t n : SIZES) {
        for (size_t offset : {0, 3}) {
            Random random(n);
            std::vector<float> x = random.values(n), y = random.values(n, 100), sum;
            for (size_t i = 0; i < n; i++) {
                sum.push_back(x[i] + y[i]);
            }
            Values<float> a(x), b(y, offset);
            launch("add", grid_for(n), block_for(n), 0, a, b, b, (long long)n);
            same("sums", b.read(), sum);
        }
    }
}

// The logistic function is within 4 units of the last place (exponential.rs), each product and sum within half a unit.
TEST(swiglu_goes_there_and_back) {
    for (size_t n : SIZES) {
        for (size_t offset : {0, 1}) {
            Random random(n + offset);
            std::vector<float> g = gates(random, n), u = random.values(n, 3), dy = random.values(n);
            std::vector<double> y, dg, du, y_allowed, dg_allowed, du_allowed;
            for (size_t i = 0; i < n; i++) {
                double s = sigma(g[i]), unit = 2 * ROUNDING, slope = 1 + g[i] * (1 - s), outer = std::fabs(double(dy[i]) * u[i] * s);
                // Below -87 the logistic function is taken as 0: what is lost is below 1e-37 times the factors.
                double lost = 1e-37 * std::fabs(g[i]) * 4;
                y.push_back(u[i] * (g[i] * s));
                y_allowed.push_back(5.01 * unit * std::fabs(y[i]) + lost);
                du.push_back(dy[i] * g[i] * s);
                du_allowed.push_back(5.01 * unit * std::fabs(du[i]) + lost);
                dg.push_back(double(dy[i]) * u[i] * s * slope);
                // 1 - s is off by 4 units of s and a rounding, g times that by as much; then the sum; then what `outer` is off by.
                double slope_allowed = unit * (std::fabs(g[i]) * (4 * s + 1) + std::fabs(slope));
                dg_allowed.push_back(1.01 * outer * (slope_allowed + 5.5 * unit * std::fabs(slope)) + lost * std::fabs(g[i]));
            }
            Values<float> dev_g(g, offset), dev_u(u, offset), dev_dy(dy, offset), out = Values<float>::made(n, offset);
            launch("swiglu_forward", grid_for(n), block_for(n), 0, dev_g, dev_u, out, (long long)n);
            near("y", out.read(), y, y_allowed);
            Values<__nv_bfloat16> rounded = Values<__nv_bfloat16>::made(n, offset), narrow = Values<__nv_bfloat16>::made(n, offset);
            launch("cast_f32_bf16", grid_for(n), block_for(n), 0, out, rounded, (long long)n);
            launch("swiglu_forward_bf16", grid_for(n), block_for(n), 0, dev_g, dev_u, narrow, (long long)n);
            same("y in bf16", bits(narrow.read()), bits(rounded.read()));
            Values<float> to_g = Values<float>::made(n, offset), to_u = Values<float>::made(n, offset);
            launch("swiglu_backward", grid_for(n), block_for(n), 0, dev_g, dev_u, dev_dy, to_g, to_u, (long long)n);
            near("dg", to_g.read(), dg, dg_allowed);
            near("du", to_u.read(), du, du_allowed);
        }
    }
}
