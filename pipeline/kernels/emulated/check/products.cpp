// The emulated cuBLAS against float64: both transpositions of both factors, paddings between columns, batches, types.

#include "check.h"

using namespace check;

extern "C" int cublasGemmStridedBatchedEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a,
                                          int type_a, int lda, long long stride_a, const void* b, int type_b, int ldb, long long stride_b,
                                          const void* beta, void* c, int type_c, int ldc, long long stride_c, int batch, int compute,
                                          int algorithm);

namespace {

constexpr int R_32F = 0, R_16BF = 14, COMPUTE_32F = 68;

void* pointer(unsigned long long address) { return reinterpret_cast<void*>(uintptr_t(address)); }

}  // namespace

TEST(products_are_column_major) {
    const int m = 5, n = 3, k = 7, batch = 2;
    for (int transposed = 0; transposed < 4; transposed++) {
        int ta = transposed % 2, tb = transposed / 2, lda = (ta ? k : m) + 2, ldb = (tb ? n : k) + 1, ldc = m + 3;
        int size_a = lda * (ta ? m : k), size_b = ldb * (tb ? k : n), size_c = ldc * n;
        Random random(transposed);
        std::vector<float> a = random.values(size_a * batch), b = random.values(size_b * batch), c = random.values(size_c * batch);
        std::vector<__nv_bfloat16> narrow_a, narrow_b;
        for (float& v : a) {
            narrow_a.push_back(__float2bfloat16(v));
            v = __bfloat162float(narrow_a.back());
        }
        for (float& v : b) {
            narrow_b.push_back(__float2bfloat16(v));
            v = __bfloat162float(narrow_b.back());
        }
        for (float beta : {0.0f, 0.5f}) {
            const float alpha = 1.5f;
            std::vector<double> expected(c.begin(), c.end()), allowed(c.size(), 0.0);
            for (int i = 0; i < m * n * batch; i++) {
                int row = i % m, column = i / m % n, set = i / m / n, at = set * size_c + column * ldc + row;
                double sum = 0, sizes = 0;
                for (int l = 0; l < k; l++) {
                    double term = double(a[set * size_a + (ta ? row * lda + l : l * lda + row)]) *
                                  double(b[set * size_b + (tb ? l * ldb + column : column * ldb + l)]);
                    sum += term;
                    sizes += std::fabs(term);
                }
                expected[at] = alpha * sum + double(beta) * c[at];
                // k products and sums, and the scaling.
                allowed[at] = (2 * k + 3) * ROUNDING * (alpha * sizes + std::fabs(c[at]));
            }
            std::vector<float> start = c;
            for (int at = 0; beta == 0.0f && at < m; at++) {
                start[at] = NAN;
            }
            Values<float> wide_a(a), wide_b(b), out(start), out_of_bf16(start);
            Values<__nv_bfloat16> da(narrow_a), db(narrow_b);
            auto product = [&](const auto& left, const auto& right, int type, const Values<float>& to, int ldc) {
                return cublasGemmStridedBatchedEx(nullptr, ta, tb, m, n, k, &alpha, pointer(left.address()), type, lda, size_a,
                                                  pointer(right.address()), type, ldb, size_b, &beta, pointer(to.address()), R_32F, ldc, size_c,
                                                  batch, COMPUTE_32F, 0);
            };
            EXPECT(product(wide_a, wide_b, R_32F, out, ldc) == 0 && product(da, db, R_16BF, out_of_bf16, ldc) == 0, "product");
            near("f32", out.read(), expected, allowed);
            near("bf16", out_of_bf16.read(), expected, allowed);
            EXPECT(product(wide_a, wide_b, R_32F, out, m - 1) == 7, "columns that overlap");
            EXPECT(product(da, wide_b, R_32F, out, ldc) == 7, "a factor beyond its allocation");
        }
    }
}
