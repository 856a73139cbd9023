// What a cache keeps of rows of logits: the k largest entries of each, and sums over all and over the others. The device's twin of
// pipeline/src/ops/{largest,weights,capture}.rs.
//
// A block walks a row once, 1024 values at a time, with candidates for the k largest in shared memory:
//
//   z ──► z > bound ? ──yes──► candidates (value, id) ──full──► sorted; the first k stay, the k-th is the new bound
//             │ no                                                 │ the others
//             └──────────────► rest: running f64 sum of exp ◄──────┘
//
// All candidates have smaller ids than what comes later, so a later value equal to the bound has lost already: ties go to the smaller id.
// The rest is summed, never subtracted. How many candidates there are after each step depends on the row alone, and sorting makes their order
// irrelevant; so every sum has one order, whatever the threads did.
//
// On paper (H200, 4.8 TB/s, 132 multiprocessors): a row of 152,064 logits is 608 KB, 0.127 us of the device's memory. About 23 instructions a
// value make 0.12 us of its cores: both in balance. A row has about k ln(V / 1024) candidates after the first 1024 values; with a sort
// whenever there are 256 more than k, that is 4 (k = 64) to 9 (k = 256) sorts of 512 and one of 1024, each about 2 us of one block, while six
// blocks of a multiprocessor take turns: a row takes a block 100 us. A row that rises all the way sorts at each step: about ten times as long,
// and right. Shared memory 16.5 KB, 256 threads, 40 registers: six blocks, each with 8 KB of the row under way.
//
// The host makes a Row (capture.rs) of it so, in f64, with total, rest and the k values of a row:
//   bad >= 0                    BadLogit of that id and value 0, which is that logit as it was given; everything else means nothing
//   ln W = ln total             log-probability of an id: min(z - max - ln W, 0) as f32; with logits kept, of z - f32(max + ln W)
//   ids                         sorted again by falling f32 log-probability, ties by rising id, unless logits are kept; then the selection's cut
//   tail                        rest_max - max + ln(rest + sum exp(z - rest_max) over those of the k that the cut left out) - ln W, as f32, at
//                               most 0; -inf where the sum is 0 or exp(max of the rest - max) is 0 in f64. Left-out ones of the k are largest,
//                               so rest_max becomes the first of them where there are any
//   ln sum p^(1/T)              ln(tempered_total) - ln W / T
// Draws (sampled, hybrid) walk the row's blocks of 128 on the CPU.
#include "logits.cuh"

namespace head {

constexpr int STEP = 4 * logits::THREADS;  // values between two looks at the candidates
constexpr int ROOM = 2 * STEP;
constexpr int MOST = 256;

// Keys fall as values fall and, among equal values, as ids rise. 0 and -0 are equal.
__device__ __forceinline__ unsigned long long key_of(float z, unsigned id) {
    unsigned bits = __float_as_uint(z + 0.0f);
    bits ^= bits >> 31 != 0 ? 0xffffffffu : 0x80000000u;
    return (unsigned long long)bits << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ float value_of(unsigned long long key) {
    unsigned bits = unsigned(key >> 32);
    return __uint_as_float(bits ^ (bits >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ unsigned id_of(unsigned long long key) { return 0xffffffffu - unsigned(key); }

// A logit as it counts: with `rounded` as bf16 holds it.
__device__ __forceinline__ float counted(float z, int rounded) {
    return rounded != 0 ? __bfloat162float(__float2bfloat16_rn(z)) : z;
}

// The thread's four values of the step from `base` on, 256 ids apart, so that a warp reads 32 in a row wherever the row begins; beyond the
// row -inf. Which values meet in a thread, and so every sum, is the same for a row at any address.
__device__ __forceinline__ int place(int base, int i) { return base + i * logits::THREADS + int(threadIdx.x); }
__device__ __forceinline__ void take(float (&values)[4], const float* row, int base, int vocab) {
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = place(base, i) < vocab ? row[place(base, i)] : -INFINITY;
}

// Sorts n keys by falling value (bitonic); places up to the next power of two are overwritten by 0.
__device__ void sort(unsigned long long* keys, int n) {
    int size = 1;
    while (size < n) size *= 2;
    for (int i = n + threadIdx.x; i < size; i += logits::THREADS) keys[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
        for (int gap = run / 2; gap > 0; gap /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += logits::THREADS) {
                int low = 2 * i - (i & (gap - 1)), high = low + gap;
                unsigned long long a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
            }
            __syncthreads();
        }
}

}  // namespace head

// Grid rows; 256 threads; k from 1 to 256 and at most vocab. Row r begins at z + r * stride. `rounded`: logits count as bf16 holds them.
// ids and values [rows, k], by falling value, ties by rising id; max, total = sum exp(z - max), rest_max the largest value and
// rest = sum exp(z - rest_max) of those not among the k (rest_max = max and rest = 0 where there are none); bad: the first id whose logit is
// not finite, or -1. Of a row that has one, value 0 is that logit as it was given, and nothing else means anything.
extern "C" __global__ void __launch_bounds__(256, 4) largest(const float* z, int vocab, long long stride, int k, int rounded,
                                                             unsigned* ids, float* values, float* max, double* total,
                                                             float* rest_max, double* rest, long long* bad) {
    __shared__ unsigned long long keys[head::ROOM];
    __shared__ double partials[logits::WARPS];
    __shared__ int count, first_bad;
    const float* row = z + (long long)blockIdx.x * stride;
    if (threadIdx.x == 0) count = 0, first_bad = vocab;
    __syncthreads();
    logits::Tally tally;
    float bound = -INFINITY;
    float now[4], next[4], after[4];
    head::take(next, row, 0, vocab);
    head::take(after, row, head::STEP, vocab);
    for (int base = 0; base < vocab; base += head::STEP) {
#pragma unroll
        for (int i = 0; i < 4; i++) now[i] = next[i], next[i] = after[i];
        head::take(after, row, base + 2 * head::STEP, vocab);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int id = head::place(base, i);
            if (id >= vocab) break;
            float value = head::counted(now[i], rounded);
            if ((__float_as_uint(value) & 0x7f800000u) == 0x7f800000u) atomicMin(&first_bad, id);
            if (value > bound) keys[atomicAdd(&count, 1)] = head::key_of(value, unsigned(id));
            else tally.add<false>(value, 1.0f);
        }
        __syncthreads();
        int found = count;
        __syncthreads();
        // There is room for a whole step more.
        if (found <= k + head::MOST && base + head::STEP < vocab) continue;
        head::sort(keys, found);
        for (int i = k + threadIdx.x; i < found; i += logits::THREADS) tally.add<false>(head::value_of(keys[i]), 1.0f);
        if (found >= k) bound = head::value_of(keys[k - 1]);
        if (threadIdx.x == 0) count = min(found, k);
        __syncthreads();
    }
    float top = head::value_of(keys[0]);
    double others = logits::largest(double(tally.most), partials);
    double shift = others == -INFINITY ? double(top) : others;
    double sum = logits::sum(tally.seen_from(tally.sum, shift, 1.0), partials), kept = 0.0;
    if (int(threadIdx.x) < k) {
        kept = double(exp_nonpositive(head::value_of(keys[threadIdx.x]) - top));
        ids[(long long)blockIdx.x * k + threadIdx.x] = head::id_of(keys[threadIdx.x]);
        values[(long long)blockIdx.x * k + threadIdx.x] = head::value_of(keys[threadIdx.x]);
    }
    kept = logits::sum(kept, partials);
    if (threadIdx.x == 0) {
        if (first_bad < vocab) values[(long long)blockIdx.x * k] = row[first_bad];
        max[blockIdx.x] = top;
        rest_max[blockIdx.x] = float(shift);
        rest[blockIdx.x] = sum;
        total[blockIdx.x] = kept + sum * exp(shift - double(top));
        bad[blockIdx.x] = first_bad < vocab ? first_bad : -1;
    }
}
EXPORT(largest);

// sum exp((z - max) * factor) over each row. Grid rows; 256 threads; max as `largest` gave it. Bound by memory: 608 KB a row.
extern "C" __global__ void __launch_bounds__(256) tempered_total(const float* z, int vocab, long long stride, int rounded,
                                                                 const float* max, float factor, double* total) {
    __shared__ double partials[logits::WARPS];
    const float* row = z + (long long)blockIdx.x * stride;
    float top = max[blockIdx.x];
    double sum = 0.0;
#pragma unroll 8
    for (int id = threadIdx.x; id < vocab; id += logits::THREADS) sum += double(exp_fused((head::counted(row[id], rounded) - top) * factor));
    sum = logits::sum(sum, partials);
    if (threadIdx.x == 0) total[blockIdx.x] = sum;
}
EXPORT(tempered_total);
