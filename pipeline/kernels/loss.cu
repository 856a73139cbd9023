// The training loss of rows of logits and its gradient in their place: the device's twin of pipeline/src/loss/{row,coarse,divergence,
// exponential}.rs, where the formulas stand; names here are theirs.
//
//   z [V] ─┬─ kept ids ─► K logits, f64 ───────┐                       g_i = dL / d ln Q_i, f64
//          └─ the others ─► sum exp, f64 ──────┴─► ln Q ─ divergence ──► dz of the kept: weight (g_i - Q_i sum g) + ce (q_i - [label])
//   targets ─────────────────────────────────────► ln P ─┘              dz of the others: two multiples of exp(z - largest) at most
//
// The order of one row, by one block: kept logits are read out and -inf left in their places; first pass: sums over the others; coarse
// distributions, a thread an entry; second pass: every other logit is overwritten; last: the kept ones and the label.
// Exponentials of the second pass are those of ops/exponential.rs to the bit; sums are as exact, but not the same bits as the CPU's.
//
// On paper (H200, 4.8 TB/s, 132 multiprocessors): a row of 152,064 logits is read twice and written once, 1.8 MB, 0.38 us of the device's
// memory (with a bf16 copy 2.1 MB, 0.44 us). About 21 (first pass) and 27 instructions a value (second) are 0.25 us of its cores, in the shadow
// of the memory. The coarse part is some ten reductions of at most 257 values, about 5 us of one block of the 50 us that a row takes it while
// the multiprocessor's others stream. A tail formed at T costs one more exponential each pass. Shared memory 9.3 KB, 256 threads.
#include "logits.cuh"
#include "loss_settings.cuh"

namespace loss {

constexpr int MOST_KEPT = 256;
constexpr int SHARE = 16;  // values of a thread at a time: four loads of 16 bytes under way

// A row's others, as row.rs has them; `tempered` means nothing unless the tail is formed at T.
struct Split {
    double largest, sum, tempered;
    bool apart;

    __device__ double rest() const { return largest + log(sum); }
    __device__ double rest_at(double t) const { return apart ? largest / t + log(tempered) : rest() / t; }
};

__device__ __forceinline__ bool is_nan(double x) { return x != x; }

__device__ __forceinline__ double weighted(double weight, double value) { return weight == 0.0 ? 0.0 : weight * value; }

// a (ln a - ln b) - a + b.
__device__ double excess(double a, double ln_a, double b, double ln_b) {
    if (a == 0.0) return b;
    double x = ln_b - ln_a;
    if (fabs(x) >= 0.1) return b - a - a * x;
    double series = 1.0;
    for (int n = 12; n >= 3; n--) series = 1.0 + x / double(n) * series;
    return a * 0.5 * x * x * series;
}

// ln(e^a + e^b).
__device__ double mixture(double a, double b) {
    double high = a >= b ? a : b, low = a >= b ? b : a;
    return high == -INFINITY ? high : high + log1p(exp(low - high));
}

// One entry's part of the divergence, and its slope.
__device__ double entry(int kind, double parameter, double ln_p, double ln_q, double& slope) {
    double p = exp(ln_p), q = exp(ln_q);
    switch (kind) {
        case FORWARD_KL:
            slope = -p;
            return excess(p, ln_p, q, ln_q);
        case REVERSE_KL:
            ln_p = fmax(ln_p, -103.27892990343185);
            slope = weighted(q, ln_q - ln_p + 1.0);
            return excess(q, ln_q, exp(ln_p), ln_p);
        case JSD: {
            double beta = parameter, m = beta * p + (1.0 - beta) * q, ln_m = mixture(ln_p + log(beta), ln_q + log1p(-beta));
            slope = (1.0 - beta) * weighted(q, ln_q - ln_m);
            return beta * excess(p, ln_p, m, ln_m) + (1.0 - beta) * excess(q, ln_q, m, ln_m);
        }
        case SKEWED_KL: {
            double own = ln_q + log1p(-parameter), ln_m = mixture(ln_p + log(parameter), own);
            slope = -weighted(p, exp(own - ln_m));
            return excess(p, ln_p, parameter * p + (1.0 - parameter) * q, ln_m);
        }
        case SKEWED_REVERSE_KL: {
            double own = ln_q + log(parameter), ln_m = mixture(ln_p + log1p(-parameter), own);
            slope = weighted(q, ln_q - ln_m + 1.0 - exp(own - ln_m));
            return excess(q, ln_q, (1.0 - parameter) * p + parameter * q, ln_m);
        }
        default: {
            double above = q - p;
            slope = 0.5 * q * (above > 0.0 ? 1.0 : above < 0.0 ? -1.0 : above);
            return 0.5 * fabs(above);
        }
    }
}

// ln sum exp of n values in shared memory, the same for all threads; NaN where one is, -inf of none.
__device__ double log_sum_exp(const double* values, int n, double* partials) {
    double most = -INFINITY, sum = 0.0;
    for (int i = threadIdx.x; i < n; i += logits::THREADS) most = fmax(most, values[i]);
    most = logits::largest(most, partials);
    for (int i = threadIdx.x; i < n; i += logits::THREADS) {
        // Among nothing but -inf and NaN the difference would be NaN for either.
        if (most == -INFINITY) sum += is_nan(values[i]) ? values[i] : 0.0;
        else sum += exp(values[i] - most);
    }
    sum = logits::sum(sum, partials);
    return most == -INFINITY ? (is_nan(sum) ? sum : most) : most + log(sum);
}

__device__ double log_sum_exp(double a, double b) {
    double most = fmax(a, b);
    if (most == -INFINITY) return is_nan(a) || is_nan(b) ? double(NAN) : most;
    return most + log(exp(a - most) + exp(b - most));
}

// The thread's values of a row from `start` on: four by four where the row allows it.
template <bool WIDE> __device__ __forceinline__ int place(int start, int i) {
    return WIDE ? start + i / 4 * 4 * logits::THREADS + 4 * int(threadIdx.x) + i % 4 : start + i * logits::THREADS + int(threadIdx.x);
}
template <bool WIDE> __device__ __forceinline__ void take(float (&values)[SHARE], const float* z, int start, int vocab) {
#pragma unroll
    for (int i = 0; i < SHARE; i += WIDE ? 4 : 1) {
        int at = place<WIDE>(start, i);
        if (WIDE) {
            float4 four = at < vocab ? *reinterpret_cast<const float4*>(z + at) : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        } else {
            values[i] = at < vocab ? z[at] : -INFINITY;
        }
    }
}
template <bool WIDE> __device__ __forceinline__ void put(const float (&values)[SHARE], float* z, __nv_bfloat16* copy, int start, int vocab) {
#pragma unroll
    for (int i = 0; i < SHARE; i += WIDE ? 4 : 1) {
        int at = place<WIDE>(start, i);
        if (at >= vocab) continue;
        if (WIDE) {
            *reinterpret_cast<float4*>(z + at) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
            if (copy != nullptr) {
                __nv_bfloat162* to = reinterpret_cast<__nv_bfloat162*>(copy + at);
                to[0] = __floats2bfloat162_rn(values[i], values[i + 1]);
                to[1] = __floats2bfloat162_rn(values[i + 2], values[i + 3]);
            }
        } else {
            z[at] = values[i];
            if (copy != nullptr) copy[at] = __float2bfloat16_rn(values[i]);
        }
    }
}

// First pass: the sums over what is left of the row.
template <bool WIDE, bool APART> __device__ Split split(const float* z, int vocab, float factor, double* partials) {
    logits::Tally tally;
    for (int start = 0; start < vocab; start += SHARE * logits::THREADS) {
        float values[SHARE];
        take<WIDE>(values, z, start, vocab);
#pragma unroll
        for (int i = 0; i < SHARE; i++) tally.add<APART>(values[i], factor);
    }
    Split split;
    split.apart = APART;
    split.largest = logits::largest(double(tally.most), partials);
    split.sum = logits::sum(tally.seen_from(tally.sum, split.largest, 1.0), partials);
    split.tempered = APART ? logits::sum(tally.seen_from(tally.tempered, split.largest, double(factor)), partials) : 0.0;
    return split;
}

// Second pass: weight * exp(z - largest) + tempered * exp((z - largest) * factor) in every place.
template <bool WIDE>
__device__ void replace(float* z, __nv_bfloat16* copy, int vocab, float largest, float weight, float tempered, float factor) {
    for (int start = 0; start < vocab; start += SHARE * logits::THREADS) {
        float values[SHARE];
        take<WIDE>(values, z, start, vocab);
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            float below = __fadd_rn(values[i], -largest), plain, at_t;
            if (tempered == 0.0f) {
                values[i] = __fmul_rn(weight, exp_nonpositive(below));
            } else {
                at_t = __fmul_rn(tempered, exp_nonpositive(__fmul_rn(below, factor)));
                plain = weight == 0.0f ? 0.0f : __fmul_rn(weight, exp_nonpositive(below));
                values[i] = weight == 0.0f ? at_t : __fadd_rn(plain, at_t);
            }
        }
        put<WIDE>(values, z, copy, start, vocab);
    }
}

// The same number in every place.
__device__ void fill(float* z, __nv_bfloat16* copy, int vocab, float value) {
    for (int id = threadIdx.x; id < vocab; id += logits::THREADS) {
        z[id] = value;
        if (copy != nullptr) copy[id] = __float2bfloat16_rn(value);
    }
}

// ln of the rest at T: what the kept entries leave of Z_T, as coarse.rs bounds it.
__device__ double left_at(double t, double kept, double lse_t, double bucket) {
    if (kept >= lse_t || bucket == -INFINITY) return bucket;
    double left = lse_t + log(-expm1(kept - lse_t));
    return t < 1.0 ? fmin(left, bucket) : left;
}

// What a block keeps in shared memory.
struct Shared {
    double kept[MOST_KEPT], ln_p[MOST_KEPT + 1], ln_q[MOST_KEPT + 1], pull[MOST_KEPT + 1], partials[logits::WARPS], label_logit;
    unsigned ids[MOST_KEPT];
    int label_place;
};

// ln P of the teacher into `shared`, n = K entries and, with `rest`, one more. Whether there is any probability.
__device__ bool teacher(Shared& shared, int kept, bool rest, const float* logprobs, float tail, const float* lse_t, const Settings& s) {
    double t = s.temperature;
    bool needs = (s.tail == EXACT_TAIL || s.tail == NONE) && t != 1.0;
    for (int i = threadIdx.x; i < kept; i += logits::THREADS) shared.ln_p[i] = double(logprobs[i]) / t;
    __syncthreads();
    if (rest) {
        double entry = -INFINITY;
        if (s.tail == BUCKET || s.tail == EXACT_TAIL) entry = double(tail) / t;
        if (s.tail == EXACT_TAIL && needs && lse_t != nullptr)
            entry = left_at(t, log_sum_exp(shared.ln_p, kept, shared.partials), double(*lse_t), double(tail) / t);
        if (threadIdx.x == 0) shared.ln_p[kept] = entry;
        __syncthreads();
    }
    int n = kept + (rest ? 1 : 0);
    double all = log_sum_exp(shared.ln_p, n, shared.partials);
    if (all == -INFINITY) return false;
    if (s.tail == NONE) all = !needs ? 0.0 : lse_t != nullptr ? double(*lse_t) : double(NAN);
    for (int i = threadIdx.x; i < n; i += logits::THREADS) shared.ln_p[i] -= all;
    return true;
}

// The divergence of the row; `shared.pull` becomes its pull on the n coarse logits, with weight, T and scale.
__device__ double divergence(Shared& shared, const Split& split, int kept, bool rest, const Settings& s) {
    double t = s.temperature;
    int n = kept + (rest ? 1 : 0);
    for (int i = threadIdx.x; i < n; i += logits::THREADS) shared.ln_q[i] = i < kept ? shared.kept[i] / t : split.rest_at(t);
    __syncthreads();
    double all = log_sum_exp(shared.ln_q, n, shared.partials), value = 0.0, total = 0.0;
    for (int i = threadIdx.x; i < n; i += logits::THREADS) {
        double ln_p = shared.ln_p[i], ln_q = shared.ln_q[i] - all, slope;
        if (s.tail == NONE) {
            slope = -exp(ln_p);
            value += weighted(exp(ln_p), ln_p - ln_q);
        } else {
            value += entry(s.divergence, s.parameter, ln_p, ln_q, slope);
        }
        total += slope;
        shared.ln_q[i] = ln_q;
        shared.pull[i] = slope;
    }
    value = logits::sum(value, shared.partials);
    total = logits::sum(total, shared.partials);
    double weight = s.scale * s.kd_alpha * t;
    for (int i = threadIdx.x; i < n; i += logits::THREADS) shared.pull[i] = weight * (shared.pull[i] - exp(shared.ln_q[i]) * total);
    __syncthreads();
    return value;
}

// Reads kept and label logits out of the row and leaves -inf in the places of the kept. Whether an id stands there twice.
__device__ bool take_kept(Shared& shared, float* z, int kept, unsigned label, const unsigned* ids) {
    if (threadIdx.x == 0) shared.label_logit = double(z[label]), shared.label_place = -1;
    for (int i = threadIdx.x; i < kept; i += logits::THREADS) {
        shared.ids[i] = ids[i];
        shared.kept[i] = double(z[ids[i]]);
    }
    __syncthreads();
    int repeated = 0;
    for (int i = threadIdx.x; i < kept; i += logits::THREADS) {
        unsigned id = shared.ids[i];
        for (int j = 0; j < i; j++) repeated |= shared.ids[j] == id;
        if (id == label) shared.label_place = i;
        z[id] = -INFINITY;
    }
    return __syncthreads_or(repeated) != 0;
}

// Writes the gradients of the kept ids and of the label over what the second pass left there.
__device__ void finish(const Shared& shared, const Split& split, float* z, __nv_bfloat16* copy, int kept, unsigned label, double lse,
                       double pull, bool teacher, const Settings& s) {
    double weight = s.scale * s.kd_ce_alpha;
    for (int i = threadIdx.x; i <= kept; i += logits::THREADS) {
        bool is_label = i == kept;
        if (!is_label && i == shared.label_place) continue;
        double gradient;
        if (!is_label) {
            gradient = weight * exp(shared.kept[i] - lse) + shared.pull[i];
        } else {
            gradient = weight * expm1(shared.label_logit - lse);
            double below = shared.label_logit - split.largest;
            if (shared.label_place >= 0) gradient += teacher ? shared.pull[shared.label_place] : 0.0;
            else if (pull != 0.0) gradient += split.apart ? pull / split.tempered * exp(below / s.temperature) : pull / split.sum * exp(below);
        }
        unsigned id = is_label ? label : shared.ids[i];
        z[id] = float(gradient);
        if (copy != nullptr) copy[id] = __float2bfloat16_rn(float(gradient));
    }
}

template <bool WIDE>
__device__ void row(Shared& shared, float* z, __nv_bfloat16* copy, int vocab, unsigned label, bool has_teacher, int kept,
                    const unsigned* ids, const float* logprobs, float tail, const float* lse_t, const Settings& s, double* kd, double* ce,
                    int* status) {
    if (take_kept(shared, z, kept, label, ids)) {
        if (threadIdx.x == 0) *status = REPEATED_ID;
        return;
    }
    bool apart = has_teacher && s.temperature != 1.0 && (s.tail == STUDENT_FULL || s.tail == EXACT_TAIL || s.tail == NONE);
    float factor = float(1.0 / s.temperature);
    Split others = apart ? split<WIDE, true>(z, vocab, factor, shared.partials) : split<WIDE, false>(z, vocab, factor, shared.partials);
    double lse = log_sum_exp(log_sum_exp(shared.kept, kept, shared.partials), others.rest()), value = 0.0, pull = 0.0;
    if (has_teacher) {
        bool rest = s.tail != RENORM && kept != vocab;
        if (!teacher(shared, kept, rest, logprobs, tail, lse_t, s)) {
            if (threadIdx.x == 0) *status = NO_MASS;
            return;
        }
        value = divergence(shared, others, kept, rest, s);
        pull = rest ? shared.pull[kept] : 0.0;
    }
    if (others.largest == -INFINITY) {
        fill(z, copy, vocab, is_nan(others.sum) ? NAN : 0.0f);
    } else {
        double weight = s.scale * s.kd_ce_alpha * exp(others.largest - lse);
        double tempered = apart ? pull / others.tempered : 0.0;
        if (!apart) weight += pull / others.sum;
        replace<WIDE>(z, copy, vocab, float(others.largest), float(weight), float(tempered), factor);
    }
    __syncthreads();
    finish(shared, others, z, copy, kept, label, lse, pull, has_teacher, s);
    if (threadIdx.x == 0) *kd = value, *ce = lse - shared.label_logit, *status = FINE;
}

}  // namespace loss

// Grid rows; 256 threads. z [n, vocab] becomes d(total * scale) / dz; `copy` the same as bf16, or null. labels [n]. Row r keeps ids and
// logprobs offsets[r] .. offsets[r + 1], at most 256, and tails[r]; offsets is null where there is no teacher. lse_t [n] or null.
// kd and ce [n] in nats, unweighted; status [n]: 0, 1 (the teacher has no probability), 2 (an id twice); other than 0 the row means nothing.
// Labels, ids and values were checked by the host.
extern "C" __global__ void __launch_bounds__(256, 3) loss_rows(float* z, __nv_bfloat16* copy, int vocab, const unsigned* labels,
                                                               const unsigned* offsets, const unsigned* ids, const float* logprobs,
                                                               const float* tails, const float* lse_t, loss::Settings settings,
                                                               double* kd, double* ce, int* status) {
    __shared__ loss::Shared shared;
    long long n = blockIdx.x, first = n * vocab;
    bool teacher = offsets != nullptr;
    unsigned start = teacher ? offsets[n] : 0;
    int kept = teacher ? int(offsets[n + 1] - start) : 0;
    const float* own_lse_t = lse_t != nullptr ? lse_t + n : nullptr;
    __nv_bfloat16* own_copy = copy != nullptr ? copy + first : nullptr;
    bool wide = vocab % 4 == 0 && (reinterpret_cast<unsigned long long>(z) & 15) == 0 && (reinterpret_cast<unsigned long long>(copy) & 7) == 0;
    if (wide)
        loss::row<true>(shared, z + first, own_copy, vocab, labels[n], teacher, kept, ids + start, logprobs + start, teacher ? tails[n] : 0.0f,
                        own_lse_t, settings, kd + n, ce + n, status + n);
    else
        loss::row<false>(shared, z + first, own_copy, vocab, labels[n], teacher, kept, ids + start, logprobs + start, teacher ? tails[n] : 0.0f,
                         own_lse_t, settings, kd + n, ce + n, status + n);
}
EXPORT(loss_rows);
