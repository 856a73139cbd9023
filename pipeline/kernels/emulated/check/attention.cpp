// The attention kernels (attention.cu, attention_mma.cu) beside sums written out in f64, one query after another.
#include "twins.h"

#include <algorithm>

using namespace check;

namespace {

constexpr double UNIT = 0x1p-24;  // half a unit of f32, relative
constexpr double HALF = 0x1p-8;   // what rounding to bf16 changes at most, relative: half a unit of 8 bits, and its rounding in sums

struct Sizes {
    std::vector<int> lengths;
    int heads, kv_heads, d;
    int tokens() const {
        int all = 0;
        for (int length : lengths) all += length;
        return all;
    }
    std::string name() const {
        std::string text = std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads of " + std::to_string(d) + ", lengths";
        for (int length : lengths) text += " " + std::to_string(length);
        return text;
    }
};

struct Inputs {
    std::vector<float> q, k, v, dy;
};

// Values in f64, and for each what the sizes of its summands allow it to be off by: sums of magnitudes.
struct Twin {
    std::vector<double> o, lse, delta, dq, dk, dv;
    std::vector<double> o_size, dq_size, dk_size, dv_size;  // sum |weight| |factor|
    std::vector<double> dq_slack, dk_slack;                 // the same with |dp| + |delta| instead of |dp - delta|
    double most_score = 0;                                  // the greatest sum |q| |k| scale
};

Twin twin(const Sizes& sizes, const Inputs& in, double scale) {
    int tokens = sizes.tokens(), heads = sizes.heads, kv_heads = sizes.kv_heads, d = sizes.d, group = heads / kv_heads;
    size_t wide = size_t(tokens) * heads * d, narrow = size_t(tokens) * kv_heads * d, rows = size_t(tokens) * heads;
    Twin t;
    for (auto* x : {&t.o, &t.o_size, &t.dq, &t.dq_size, &t.dq_slack}) x->assign(wide, 0);
    for (auto* x : {&t.dk, &t.dk_size, &t.dk_slack, &t.dv, &t.dv_size}) x->assign(narrow, 0);
    t.lse.assign(rows, 0);
    t.delta.assign(rows, 0);
    int begin = 0;
    for (int length : sizes.lengths) {
        for (int head = 0; head < heads; head++)
            for (int i = begin; i < begin + length; i++) {
                size_t qi = (size_t(i) * heads + head) * d;
                std::vector<double> s, p;
                double most = -INFINITY, sum = 0;
                for (int j = begin; j <= i; j++) {
                    size_t kj = (size_t(j) * kv_heads + head / group) * d;
                    double dot = 0, size = 0;
                    for (int c = 0; c < d; c++) dot += double(in.q[qi + c]) * in.k[kj + c], size += std::fabs(double(in.q[qi + c]) * in.k[kj + c]);
                    s.push_back(dot * scale);
                    t.most_score = std::max(t.most_score, size * scale);
                    most = std::max(most, dot * scale);
                }
                for (double x : s) sum += std::exp(x - most);
                for (double x : s) p.push_back(std::exp(x - most) / sum);
                t.lse[size_t(head) * tokens + i] = most + std::log(sum);
                double delta = 0;
                for (int j = begin; j <= i; j++)
                    for (int c = 0; c < d; c++) {
                        double part = p[j - begin] * in.v[(size_t(j) * kv_heads + head / group) * d + c];
                        t.o[qi + c] += part;
                        t.o_size[qi + c] += std::fabs(part);
                    }
                for (int c = 0; c < d; c++) delta += t.o[qi + c] * in.dy[qi + c];
                t.delta[size_t(head) * tokens + i] = delta;
                for (int j = begin; j <= i; j++) {
                    size_t kj = (size_t(j) * kv_heads + head / group) * d;
                    double dp = 0, dp_size = 0;
                    for (int c = 0; c < d; c++) dp += double(in.dy[qi + c]) * in.v[kj + c], dp_size += std::fabs(double(in.dy[qi + c]) * in.v[kj + c]);
                    double weight = p[j - begin], ds = weight * (dp - delta) * scale, slack = weight * (dp_size + std::fabs(delta)) * scale;
                    for (int c = 0; c < d; c++) {
                        t.dq[qi + c] += ds * in.k[kj + c], t.dq_size[qi + c] += std::fabs(ds * in.k[kj + c]);
                        t.dq_slack[qi + c] += std::fabs(slack * in.k[kj + c]);
                        t.dk[kj + c] += ds * in.q[qi + c], t.dk_size[kj + c] += std::fabs(ds * in.q[qi + c]);
                        t.dk_slack[kj + c] += std::fabs(slack * in.q[qi + c]);
                        t.dv[kj + c] += weight * in.dy[qi + c], t.dv_size[kj + c] += std::fabs(weight * in.dy[qi + c]);
                    }
                }
            }
        begin += length;
    }
    return t;
}

// Tiles of 64 rows, the last of each conversation first, so that order is seen not to matter.
std::vector<unsigned> tiles(const Sizes& sizes, bool backwards) {
    std::vector<unsigned> all;
    unsigned begin = 0;
    for (int length : sizes.lengths) {
        for (int first = 0; first < length; first += 64) all.insert(all.end(), {begin, begin + length, begin + first});
        begin += unsigned(length);
    }
    std::vector<unsigned> turned;
    for (size_t i = all.size(); i > 0; i -= 3) turned.insert(turned.end(), &all[i - 3], &all[i - 3] + 3);
    return backwards ? turned : all;
}

struct Results {
    std::vector<float> o, lse, dq, dk, dv;
};

// What all kernels of a kind make of the inputs; the backward is given the twin's lse and delta.
Results run(const Sizes& sizes, const Inputs& in, const Twin& t, bool bf16, bool backwards) {
    int tokens = sizes.tokens(), heads = sizes.heads, kv_heads = sizes.kv_heads, d = sizes.d, wide = d <= 64 ? 64 : d <= 128 ? 128 : 256;
    float scale = float(1 / std::sqrt(double(d)));
    std::vector<unsigned> order = tiles(sizes, backwards);
    auto made = Values<float>::made;
    Values<float> q(in.q), k(in.k), v(in.v), dy(in.dy), o = made(in.q.size(), 0), lse = made(size_t(tokens) * heads, 0);
    Values<float> dq = made(in.q.size(), 0), dk = made(in.k.size(), 0), dv = made(in.v.size(), 0);
    Values<float> given_lse(std::vector<float>(t.lse.begin(), t.lse.end())), delta(std::vector<float>(t.delta.begin(), t.delta.end()));
    Values<unsigned> tile(order);
    Size by_head = {unsigned(order.size() / 3), unsigned(heads)}, by_kv = {unsigned(order.size() / 3), unsigned(kv_heads)};
    if (bf16) {
        unsigned bytes = 64 * unsigned(d) * 2;
        std::string end = "_bf16_" + std::to_string(d);
        launch(("attention_forward" + end).c_str(), by_head, {128}, 3 * bytes, q, k, v, tile, o, lse, tokens, heads, kv_heads, scale);
        launch(("attention_backward_q" + end).c_str(), by_head, {128}, 4 * bytes, q, k, v, dy, given_lse, delta, tile, dq, tokens, heads, kv_heads,
               scale);
        launch(("attention_backward_kv" + end).c_str(), by_kv, {128}, 4 * bytes, q, k, v, dy, given_lse, delta, tile, dk, dv, tokens, heads,
               kv_heads, scale);
    } else {
        unsigned row = unsigned(wide + 4) * 4, weights = 64 * 36 * 4;
        launch("attention_forward_f32", by_head, {256}, 128 * row + weights, q, k, v, tile, o, lse, tokens, heads, kv_heads, d, scale);
        launch("attention_backward_q_f32", by_head, {256}, 192 * row + weights, q, k, v, dy, given_lse, delta, tile, dq, tokens, heads, kv_heads, d,
               scale);
        launch("attention_backward_kv_f32", by_kv, {256}, 192 * row + 2 * weights, q, k, v, dy, given_lse, delta, tile, dk, dv, tokens, heads,
               kv_heads, d, scale);
    }
    return {o.read(), lse.read(), dq.read(), dk.read(), dv.read()};
}

float to_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

void check_sizes(const Sizes& sizes, bool bf16, uint64_t seed, double width) {
    Dice dice(seed);
    size_t tokens = size_t(sizes.tokens()), rows = tokens * sizes.heads, d = size_t(sizes.d);
    Inputs in = {dice.normals(rows * d, width), dice.normals(tokens * sizes.kv_heads * d, width), dice.normals(tokens * sizes.kv_heads * d),
                 dice.normals(rows * d)};
    Inputs seen = in;  // as the kernels see it
    if (bf16)
        for (auto* x : {&seen.q, &seen.k, &seen.v, &seen.dy})
            for (float& value : *x) value = to_bf16(value);
    Twin t = twin(sizes, seen, double(float(1 / std::sqrt(double(d)))));
    Results found = run(sizes, in, t, bf16, false);
    std::string name = (bf16 ? "bf16, " : "f32, ") + sizes.name();
    // A score is a sum of d products; roundings add like their root. P inherits a score's error, at the worst score of all; a sum
    // over n rows adds its own. bf16: P and dS are rounded once before they are factors.
    double score = UNIT * (std::sqrt(double(d)) + 2) * std::max(1.0, t.most_score), sum = UNIT * (std::sqrt(double(tokens)) + 8);
    double once = bf16 ? HALF : 0, o_off = once + score + sum;
    for (size_t i = 0; i < rows * d; i++) {
        close(name + ": o", i, found.o[i], t.o[i], o_off * t.o_size[i]);
        close(name + ": dq", i, found.dq[i], t.dq[i], once * t.dq_size[i] + (score + sum) * t.dq_slack[i]);
    }
    for (size_t i = 0; i < rows; i++) close(name + ": lse", i, found.lse[i], t.lse[i], score + sum + 2 * UNIT * std::fabs(t.lse[i]));
    for (size_t i = 0; i < tokens * sizes.kv_heads * d; i++) {
        close(name + ": dk", i, found.dk[i], t.dk[i], once * t.dk_size[i] + (score + sum) * t.dk_slack[i]);
        close(name + ": dv", i, found.dv[i], t.dv[i], (once + score + sum) * t.dv_size[i]);
    }

    // A conversation of NaNs and infinities, and another order of tiles, change no bit of the others.
    if (sizes.lengths.size() < 2) return;
    size_t from = size_t(sizes.lengths[0]), to = from + size_t(sizes.lengths[1]);
    for (auto* x : {&in.q, &in.k, &in.v, &in.dy}) {
        size_t width = x->size() / tokens;
        for (size_t i = from * width; i < to * width; i++) (*x)[i] = i % 3 == 0 ? INFINITY : NAN;
    }
    Results beside = run(sizes, in, t, bf16, true);
    auto others = [&](std::vector<float> a, std::vector<float> b) {
        size_t width = a.size() / tokens;
        for (size_t i = from * width; i < to * width; i++) a[i] = b[i] = 0;
        return same_bits(a, b);
    };
    EXPECT(others(beside.o, found.o), "%s", (name + ": o beside a bad conversation").c_str());
    EXPECT(others(beside.dq, found.dq), "%s", (name + ": dq beside a bad conversation").c_str());
    EXPECT(others(beside.dk, found.dk), "%s", (name + ": dk beside a bad conversation").c_str());
    EXPECT(others(beside.dv, found.dv), "%s", (name + ": dv beside a bad conversation").c_str());
    EXPECT(std::isnan(beside.o[from * sizes.heads * d]), "%s", (name + ": a bad conversation stays bad").c_str());
}

void check_delta(int tokens, int heads, int d) {
    Dice dice(5);
    size_t rows = size_t(tokens) * heads;
    std::vector<float> o = dice.normals(rows * d), dy = dice.normals(rows * d);
    Values<float> o_(o), dy_(dy), made = Values<float>::made(rows);
    launch("attention_delta", {unsigned((rows + 7) / 8)}, {256}, 0, o_, dy_, made, tokens, heads, d);
    std::vector<float> delta = made.read();
    for (int token = 0; token < tokens; token++)
        for (int head = 0; head < heads; head++) {
            double sum = 0, size = 0;
            size_t at = (size_t(token) * heads + head) * d;
            for (int c = 0; c < d; c++) sum += double(o[at + c]) * dy[at + c], size += std::fabs(double(o[at + c]) * dy[at + c]);
            // d / 32 sums in a lane, 5 over lanes.
            close("delta", at, delta[size_t(head) * tokens + token], sum, UNIT * (d / 32 + 6) * size);
        }
}

}  // namespace

const std::vector<int> ODD = {5, 1, 64, 63, 65}, LONGER = {130, 7, 200};

TEST(attention_in_f32) {
    for (int d : {8, 64, 72, 200, 256}) {
        check_sizes({ODD, 4, 2, d}, false, uint64_t(d), 1);
    }
    check_sizes({LONGER, 3, 1, 20}, false, 1, 1.5);
    check_sizes({LONGER, 1, 1, 128}, false, 2, 1);
    check_sizes({{1}, 1, 1, 1}, false, 3, 1);
}

TEST(attention_on_tensor_cores) {
    check_sizes({ODD, 4, 2, 64}, true, 64, 1);
    check_sizes({ODD, 2, 2, 128}, true, 128, 1);
    check_sizes({LONGER, 3, 1, 64}, true, 1, 1.5);
    check_sizes({LONGER, 2, 1, 128}, true, 2, 1);
    check_sizes({{1, 1, 1}, 2, 2, 128}, true, 3, 1);
}

TEST(attention_rows_of_dy_and_o) {
    for (int d : {1, 33, 64, 128}) {
        check_delta(7, 3, d);
    }
}
