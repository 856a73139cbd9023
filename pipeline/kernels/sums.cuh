// Sums over a block in f64, in a fixed order: the same bits every time.
#pragma once

#include "flat.cuh"

// Both sums over the block's threads, for every thread. `part` is shared memory for 32 values, free again when the call returns.
__device__ __forceinline__ double2 block_sum(double2 sum, double2* part) {
    for (int other = 16; other > 0; other /= 2) {
        sum.x += __shfl_xor_sync(0xffffffff, sum.x, other);
        sum.y += __shfl_xor_sync(0xffffffff, sum.y, other);
    }
    if (threadIdx.x % 32 == 0) {
        part[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = part[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; warp++) {
        sum.x += part[warp].x;
        sum.y += part[warp].y;
    }
    __syncthreads();
    return sum;
}
