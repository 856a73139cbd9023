// What every kernel file needs: the language (CUDA's own headers, or the emulation's, which is put in front of everything), and the few
// instructions that only PTX has, each as one function. The CPU's versions of those are in emulated/tensor_cores.h.
#pragma once

#ifdef CUDA_EMULATED

#include "emulated/tensor_cores.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A kernel's name for the emulated driver; a compiler for GPUs finds names by itself.
#define EXPORT(name)
// Dynamic shared memory of a block as `type* name`.
#define DYNAMIC_SHARED(type, name)                                   \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)

#endif

// d [16, 8] f32 += a [16, 16] b [16, 8], both bf16, spread over the lanes of a warp.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef CUDA_EMULATED
    emulated::Fragments mine = {d, a, b};
    emulated::together("mma", 0xffffffff, &mine, emulated::mma_m16n8k16);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l points at row l % 8 (16 bytes, aligned) of matrix l / 8; register i
// gets elements 2 (l % 4) and the next of row l / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#ifdef CUDA_EMULATED
    emulated::Rows mine = {row, r};
    emulated::together("ldmatrix", 0xffffffff, &mine, emulated::ldmatrix_x4<false>);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
#ifdef CUDA_EMULATED
    emulated::Rows mine = {row, r};
    emulated::together("ldmatrix.trans", 0xffffffff, &mine, emulated::ldmatrix_x4<true>);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}
