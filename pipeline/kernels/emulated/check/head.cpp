// The kernels of head.cu beside a full sort and sums in f64.
#include "twins.h"

#include <algorithm>

using namespace check;

namespace {

// Weights are f32 exponentials within 2 units (2^-23 each), of exponents that are rounded once: at most 8 above a shift (2^-21 off), and
// where they lie far below, they hardly weigh.
constexpr double SUMS = 1e-6;

struct Rows {
    std::string name;
    int vocab, stride, k;
    bool rounded;
    std::vector<float> z;  // rows of `stride`, the first at an odd place
};

struct Results {
    std::vector<unsigned> ids;
    std::vector<float> values, max, rest_max;
    std::vector<double> total, rest, tempered;
    std::vector<long long> bad;
};

Results run(const Rows& rows, unsigned n, float factor) {
    auto f32 = Values<float>::made;
    auto f64 = Values<double>::made;
    Values<float> z(rows.z), values = f32(n * rows.k, 0), max = f32(n, 0), rest_max = f32(n, 0);
    Values<unsigned> ids = Values<unsigned>::made(n * rows.k);
    Values<double> total = f64(n, 0), rest = f64(n, 0), tempered = f64(n, 0);
    Values<long long> bad = Values<long long>::made(n);
    int rounded = rows.rounded;
    long long stride = rows.stride;
    launch("largest", {n}, {256}, 0, z, rows.vocab, stride, rows.k, rounded, ids, values, max, total, rest_max, rest, bad);
    launch("tempered_total", {n}, {256}, 0, z, rows.vocab, stride, rounded, max, factor, tempered);
    return {ids.read(), values.read(), max.read(), rest_max.read(), total.read(), rest.read(), tempered.read(), bad.read()};
}

void check_row(const Rows& rows, size_t row, const Results& found, float factor) {
    std::vector<float> z(&rows.z[row * rows.stride], &rows.z[row * rows.stride] + rows.vocab);
    if (rows.rounded)
        for (float& value : z) value = __bfloat162float(__float2bfloat16_rn(value));
    auto worst = std::find_if(z.begin(), z.end(), [](float value) { return !std::isfinite(value); });
    std::string name = rows.name + ", " + std::to_string(rows.k) + " of " + std::to_string(rows.vocab);
    close(name + ": bad", row, double(found.bad[row]), worst == z.end() ? -1 : double(worst - z.begin()), 0);
    if (worst != z.end()) {
        float given = rows.z[row * rows.stride + size_t(worst - z.begin())], kept = found.values[row * rows.k];
        EXPECT(memcmp(&given, &kept, 4) == 0, "%s: the bad value is %g, found %g", name.c_str(), given, kept);
        return;
    }
    std::vector<unsigned> order(z.size());
    for (size_t i = 0; i < z.size(); i++) order[i] = unsigned(i);
    std::stable_sort(order.begin(), order.end(), [&](unsigned a, unsigned b) { return z[a] > z[b]; });
    double most = z[order[0]], total = 0, tempered = 0, rest_most = most, rest = 0;
    for (float value : z) total += std::exp(value - most), tempered += std::exp((value - most) * double(factor));
    if (size_t(rows.k) < z.size()) rest_most = z[order[rows.k]];
    for (size_t i = size_t(rows.k); i < z.size(); i++) rest += std::exp(z[order[i]] - rest_most);
    for (int i = 0; i < rows.k; i++) {
        close(name + ": id", size_t(i), found.ids[row * rows.k + i], order[i], 0);
        close(name + ": value", size_t(i), found.values[row * rows.k + i], z[order[i]], 0);
    }
    close(name + ": max", row, found.max[row], most, 0);
    close(name + ": rest_max", row, found.rest_max[row], rest_most, 0);
    close(name + ": total", row, found.total[row], total, SUMS * total);
    close(name + ": rest", row, found.rest[row], rest, SUMS * rest);
    // Every exponent is a product more; where the factor is large, an exponent of 16 can weigh.
    close(name + ": tempered", row, found.tempered[row], tempered, SUMS * tempered);
}

void check_rows(const Rows& rows, unsigned n, float factor) {
    Results found = run(rows, n, factor), again = run(rows, n, factor);
    for (size_t row = 0; row < n; row++) check_row(rows, row, found, factor);
    bool bad = std::any_of(found.bad.begin(), found.bad.end(), [](long long id) { return id >= 0; });
    EXPECT(bad || (same_bits(found.total, again.total) && same_bits(found.rest, again.rest)), "%s: not the same again", rows.name.c_str());
}

using Make = float (*)(Dice&, int id, int vocab);

const std::pair<const char*, Make> KINDS[] = {
    {"normal", [](Dice& dice, int, int) { return float(3 * dice.normal()); }},
    {"few values", [](Dice& dice, int, int) { return float(int(dice.word() % 5) - 2) * (dice.word() % 2 == 0 ? 0.5f : -0.5f); }},
    {"zeros of either sign", [](Dice& dice, int, int) { return dice.word() % 2 == 0 ? 0.0f : -0.0f; }},
    {"rising", [](Dice&, int id, int vocab) { return float(id - vocab) * 1e-3f; }},
    {"falling", [](Dice&, int id, int) { return float(id) * -1e-3f; }},
    {"steep", [](Dice&, int id, int) { return float(id % 997) * 0.5f; }},
    {"one far above", [](Dice& dice, int id, int vocab) { return id == vocab / 2 ? 300.0f : float(dice.normal()); }},
    {"huge", [](Dice& dice, int, int) { return float(dice.normal() * 1e37); }},
};

}  // namespace

TEST(largest_and_sums_of_rows) {
    Dice dice(11);
    for (const auto& [name, make] : KINDS) {
        for (int vocab : {1, 2, 255, 1023, 1024, 1025, 3001, 9216, 20011}) {
            for (int k : {1, 7, 64, 255, 256}) {
                for (bool rounded : {false, true}) {
                    unsigned n = vocab < 2000 ? 2 : 1;
                    if (k > vocab || (rounded && vocab > 4000)) {
                        continue;
                    }
                    Rows rows = {name, vocab, vocab + int(dice.word() % 4), k, rounded, {}};
                    rows.z.resize(size_t(rows.stride) * n, 1e30f);
                    for (unsigned row = 0; row < n; row++) {
                        for (int id = 0; id < vocab; id++) {
                            rows.z[row * rows.stride + id] = make(dice, id, vocab);
                        }
                    }
                    check_rows(rows, n, dice.word() % 2 == 0 ? 0.5f : 1.25f);
                }
            }
        }
    }
}

TEST(rows_that_are_not_finite) {
    Dice dice(12);
    for (int vocab : {5, 1024, 5000}) {
        for (int trial = 0; trial < 12; trial++) {
            Rows rows = {"a bad value", vocab, vocab, std::min(vocab, 64), trial % 2 == 0, dice.normals(size_t(vocab))};
            size_t at = dice.word() % rows.z.size(), later = dice.word() % rows.z.size();
            rows.z[later] = NAN;
            // The third is finite as f32, and more than bf16 holds.
            rows.z[at] = trial % 4 == 0 ? NAN : trial % 4 == 1 ? INFINITY : trial % 4 == 2 ? 3.4e38f : -INFINITY;
            check_rows(rows, 1, 0.5f);
        }
    }
}
