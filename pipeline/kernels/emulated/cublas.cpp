// cuBLAS as far as cudarc and candle-core call it: products of column-major matrices in f32, bf16 and f16 with f32 sums, each over rising
// k, and f64 with f64 sums. C = alpha op(A) op(B) + beta C; a beta of 0 means that C is not read.

#include "driver.h"

#include "cuda_emulated.h"
#include "memory.h"

#include <cstdint>
#include <vector>

using namespace emulated;

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15;

// cudaDataType_t and cublasComputeType_t.
constexpr int R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14;
constexpr int COMPUTE_16F = 64, COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77;

size_t bytes_of(int type) {
    return type == R_64F ? 8 : type == R_32F ? 4 : 2;
}

float load(const void* values, int type, size_t i) {
    switch (type) {
        case R_32F: return static_cast<const float*>(values)[i];
        case R_16F: return __half2float(static_cast<const __half*>(values)[i]);
        default: return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i]);
    }
}

void store(void* values, int type, size_t i, float value) {
    switch (type) {
        case R_32F: static_cast<float*>(values)[i] = value; break;
        case R_16F: static_cast<__half*>(values)[i] = __float2half_rn(value); break;
        default: static_cast<__nv_bfloat16*>(values)[i] = __float2bfloat16_rn(value);
    }
}

struct Matrix {
    const void* values;
    int type;
    // Rows and columns as op() leaves them; whether what is stored is the transpose; distance of stored columns.
    int rows, columns;
    bool transposed;
    long long stride;

    size_t index(int row, int column) const {
        return transposed ? size_t(row) * size_t(stride) + size_t(column) : size_t(column) * size_t(stride) + size_t(row);
    }
    // Elements from the first to the last.
    size_t span() const { return rows == 0 || columns == 0 ? 0 : index(rows - 1, columns - 1) + 1; }
    bool fits() const { return stride >= std::max(1, transposed ? columns : rows); }
};

// One product of a batch, with sums in T.
template <class T, class Load, class Store>
void multiply(const Matrix& a, const Matrix& b, const Matrix& c, T alpha, T beta, Load load, Store store) {
    std::vector<T> packed(size_t(a.rows) * a.columns), sums(a.rows);
    for (int k = 0; k < a.columns; k++) {
        for (int i = 0; i < a.rows; i++) {
            packed[size_t(k) * a.rows + i] = load(a, a.index(i, k));
        }
    }
    for (int j = 0; j < c.columns; j++) {
        std::fill(sums.begin(), sums.end(), T(0));
        for (int k = 0; k < a.columns; k++) {
            T factor = load(b, b.index(k, j));
            const T* column = packed.data() + size_t(k) * a.rows;
            for (int i = 0; i < a.rows; i++) {
                sums[i] += column[i] * factor;
            }
        }
        for (int i = 0; i < a.rows; i++) {
            size_t at = c.index(i, j);
            store(at, alpha * sums[i] + (beta == 0 ? T(0) : beta * load(c, at)));
        }
    }
}

int check(const char* name, const Matrix& matrix) {
    if (!matrix.fits()) {
        return refuse(INVALID_VALUE, "a product's %s of %d x %d has its columns %lld apart", name, matrix.rows, matrix.columns, matrix.stride);
    }
    if (!holds(matrix.values, matrix.span() * bytes_of(matrix.type))) {
        return refuse(INVALID_VALUE, "a product's %s at %p is not within one allocation", name, matrix.values);
    }
    return SUCCESS;
}

Matrix moved(const Matrix& matrix, long long elements, int times) {
    Matrix other = matrix;
    other.values = static_cast<const char*>(matrix.values) + elements * times * static_cast<long long>(bytes_of(matrix.type));
    return other;
}

struct Strides {
    long long a, b, c;
};

int product(const Matrix& a, const Matrix& b, const Matrix& c, const Strides& strides, int batch, const void* alpha, const void* beta,
            int compute) {
    Turn turn;
    bool wide = c.type == R_64F;
    // Scalars have the type of the sums.
    auto scalar = [&](const void* value) { return compute == COMPUTE_16F ? load(value, R_16F, 0) : load(value, R_32F, 0); };
    for (int i = 0; i < batch; i++) {
        Matrix ai = moved(a, strides.a, i), bi = moved(b, strides.b, i), ci = moved(c, strides.c, i);
        for (int code : {check("A", ai), check("B", bi), check("C", ci)}) {
            if (code != SUCCESS) {
                return code;
            }
        }
        void* out = const_cast<void*>(ci.values);
        if (wide) {
            multiply<double>(ai, bi, ci, *static_cast<const double*>(alpha), *static_cast<const double*>(beta),
                             [](const Matrix& m, size_t at) { return static_cast<const double*>(m.values)[at]; },
                             [&](size_t at, double value) { static_cast<double*>(out)[at] = value; });
        } else {
            multiply<float>(ai, bi, ci, scalar(alpha), scalar(beta), [](const Matrix& m, size_t at) { return load(m.values, m.type, at); },
                            [&](size_t at, float value) { store(out, ci.type, at, value); });
        }
    }
    return SUCCESS;
}

}  // namespace

API cublasCreate_v2(void** made) {
    static char handle;
    *made = &handle;
    return SUCCESS;
}
API cublasDestroy_v2(void*) { return SUCCESS; }
API cublasSetStream_v2(void*, void*) { return SUCCESS; }
API cublasSetMathMode(void*, int) { return SUCCESS; }
API cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }

API cublasGemmStridedBatchedEx(void*, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda,
                               long long stride_a, const void* b, int type_b, int ldb, long long stride_b, const void* beta, void* c,
                               int type_c, int ldc, long long stride_c, int batch, int compute, int) {
    auto half = [](int type) { return type == R_16F || type == R_16BF; };
    bool known = type_a == type_b && (type_c == type_a || type_c == R_32F) && (half(type_a) || type_a == R_32F);
    if (!known || (compute != COMPUTE_16F && (compute < COMPUTE_32F || compute > COMPUTE_32F_FAST_TF32))) {
        return refuse(NOT_SUPPORTED, "cublasGemm: types %d, %d, %d with sums of %d are not emulated", type_a, type_b, type_c, compute);
    }
    Matrix ma = {a, type_a, m, k, transa != 0, lda}, mb = {b, type_b, k, n, transb != 0, ldb}, mc = {c, type_c, m, n, false, ldc};
    return product(ma, mb, mc, {stride_a, stride_b, stride_c}, batch, alpha, beta, compute);
}

API cublasGemmEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda,
                 const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algorithm) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc, 0,
                                      1, compute, algorithm);
}

API cublasDgemmStridedBatched(void*, int transa, int transb, int m, int n, int k, const double* alpha, const double* a, int lda,
                              long long stride_a, const double* b, int ldb, long long stride_b, const double* beta, double* c, int ldc,
                              long long stride_c, int batch) {
    Matrix ma = {a, R_64F, m, k, transa != 0, lda}, mb = {b, R_64F, k, n, transb != 0, ldb}, mc = {c, R_64F, m, n, false, ldc};
    return product(ma, mb, mc, {stride_a, stride_b, stride_c}, batch, alpha, beta, R_64F);
}
