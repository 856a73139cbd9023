// The kernel of loss.cu beside the losses as textbooks have them, and its gradient beside differences of those, all in long double.
#include "../../loss_settings.cuh"
#include "twins.h"

#include <algorithm>

using namespace check;

namespace {

using Real = long double;

// Sums over the vocabulary are of f32 exponentials: 2 units each, and a rounding of the exponent.
constexpr double SUMS = 1e-6;

struct Row {
    std::vector<float> z;
    unsigned label;
    std::vector<unsigned> ids;
    std::vector<float> logprobs;
    float tail, lse_t;
};

struct Losses {
    Real kd, ce;
    std::vector<Real> share;  // Q of each id: of the kept ones, and each other's part of the rest
};

Real log_sum(const std::vector<Real>& x) {
    Real most = -INFINITY, sum = 0;
    for (Real v : x) most = std::max(most, v);
    if (most == -INFINITY) return most;
    for (Real v : x) sum += expl(v - most);
    return most + logl(sum);
}

Real times(Real a, Real b) { return a == 0 ? 0 : a * b; }

Real textbook(const loss::Settings& s, const std::vector<Real>& ln_p, const std::vector<Real>& ln_q) {
    Real value = 0, a = s.parameter;
    auto kl = [](Real weight, Real ln_a, Real ln_b) { return times(weight, ln_a - ln_b); };
    for (size_t i = 0; i < ln_p.size(); i++) {
        Real p = expl(ln_p[i]), q = expl(ln_q[i]);
        switch (s.divergence) {
            case loss::FORWARD_KL: value += kl(p, ln_p[i], ln_q[i]); break;
            case loss::REVERSE_KL: value += kl(q, ln_q[i], std::max(ln_p[i], logl(1.401298464324817e-45L))); break;
            case loss::JSD: value += a * kl(p, ln_p[i], logl(a * p + (1 - a) * q)) + (1 - a) * kl(q, ln_q[i], logl(a * p + (1 - a) * q)); break;
            case loss::SKEWED_KL: value += kl(p, ln_p[i], logl(a * p + (1 - a) * q)); break;
            case loss::SKEWED_REVERSE_KL: value += kl(q, ln_q[i], logl((1 - a) * p + a * q)); break;
            default: value += fabsl(p - q) / 2;
        }
    }
    return value;
}

// Both losses of logits `z` in place of the row's own.
Losses losses(const Row& row, const std::vector<Real>& z, const loss::Settings& s, bool teacher) {
    Real t = s.temperature;
    std::vector<bool> kept(z.size());
    for (unsigned id : row.ids) kept[id] = true;
    std::vector<Real> others, others_at_t, s_kept, ln_p;
    for (size_t id = 0; id < z.size(); id++)
        if (!kept[id]) others.push_back(z[id]), others_at_t.push_back(z[id] / t);
    Losses found = {0, log_sum(z) - z[row.label], {}};
    bool apart = s.tail == loss::STUDENT_FULL || s.tail == loss::EXACT_TAIL || s.tail == loss::NONE;
    Real rest = apart ? log_sum(others_at_t) : log_sum(others) / t;
    for (unsigned id : row.ids) s_kept.push_back(z[id] / t);
    if (!teacher) {
        for (Real v : z) found.share.push_back(expl(v - z[row.label] - found.ce));
        return found;
    }
    std::vector<Real> ln_q = s_kept;
    if (s.tail != loss::RENORM) ln_q.push_back(rest);
    Real all = log_sum(ln_q);
    for (Real& v : ln_q) v -= all;
    for (float l : row.logprobs) ln_p.push_back(Real(l) / t);
    if (s.tail != loss::RENORM) {
        Real bucket = Real(row.tail) / t, left = -INFINITY;
        if (s.tail == loss::BUCKET || s.tail == loss::EXACT_TAIL) left = bucket;
        if (s.tail == loss::EXACT_TAIL && t != 1 && bucket != -INFINITY) {
            Real mass = expl(Real(row.lse_t)) - expl(log_sum(ln_p));
            if (mass > 0) left = t < 1 ? std::min(bucket, logl(mass)) : logl(mass);
        }
        ln_p.push_back(left);
    }
    all = s.tail != loss::NONE ? log_sum(ln_p) : t == 1 ? 0 : Real(row.lse_t);
    for (Real& v : ln_p) v -= all;
    found.kd = textbook(s, ln_p, ln_q);
    found.share.resize(z.size());
    for (size_t i = 0; i < row.ids.size(); i++) found.share[row.ids[i]] = expl(ln_q[i]);
    Real own = apart ? log_sum(others_at_t) : log_sum(others), factor = apart ? 1 / t : 1;
    for (size_t id = 0; id < z.size(); id++)
        if (!kept[id]) found.share[id] = s.tail == loss::RENORM ? 0 : expl(ln_q.back() + z[id] * factor - own);
    return found;
}

struct Results {
    std::vector<float> z;
    std::vector<__nv_bfloat16> copy;
    std::vector<double> kd, ce;
    std::vector<int> status;
};

// `rows` have one width. With `shift` nothing is aligned to more than a value.
Results run(const std::vector<Row>& rows, const loss::Settings& s, bool teacher, bool copied, size_t shift) {
    size_t n = rows.size(), vocab = rows[0].z.size();
    std::vector<float> z, logprobs, tails, lse_t;
    std::vector<unsigned> labels, offsets = {0}, ids;
    for (const Row& row : rows) {
        z.insert(z.end(), row.z.begin(), row.z.end());
        ids.insert(ids.end(), row.ids.begin(), row.ids.end());
        logprobs.insert(logprobs.end(), row.logprobs.begin(), row.logprobs.end());
        tails.push_back(row.tail), lse_t.push_back(row.lse_t), labels.push_back(row.label), offsets.push_back(unsigned(ids.size()));
    }
    Values<float> z_(z, shift), logprobs_(logprobs), tails_(tails), lse_t_(lse_t);
    Values<unsigned> labels_(labels), offsets_(offsets), ids_(ids);
    Values<__nv_bfloat16> copy = Values<__nv_bfloat16>::made(z.size(), shift);
    Values<double> kd = Values<double>::made(n), ce = Values<double>::made(n);
    Values<int> status = Values<int>::made(n);
    bool needs = (s.tail == loss::EXACT_TAIL || s.tail == loss::NONE) && s.temperature != 1;
    unsigned long long none = 0;
    launch("loss_rows", {unsigned(n)}, {256}, 0, z_, copied ? copy.address() : none, int(vocab), labels_, teacher ? offsets_.address() : none, ids_,
           logprobs_, tails_, needs ? lse_t_.address() : none, s, kd, ce, status);
    return {z_.read(), copy.read(), kd.read(), ce.read(), status.read()};
}

Row make_row(Dice& dice, int vocab, int kept, double width, double t) {
    Row row = {dice.normals(vocab, width), unsigned(dice.word() % vocab), {}, {}, 0, 0};
    std::vector<Real> teacher(vocab), stored;
    for (int id = 0; id < vocab; id++) teacher[id] = Real(row.z[id]) * 0.7L + Real(dice.normal());
    Real all = log_sum(teacher);
    std::vector<unsigned> order(vocab);
    for (int id = 0; id < vocab; id++) order[id] = unsigned(id), teacher[id] -= all;
    std::sort(order.begin(), order.end(), [&](unsigned a, unsigned b) { return teacher[a] > teacher[b]; });
    std::vector<Real> left, at_t;
    for (int i = 0; i < vocab; i++)
        if (i < kept) row.ids.push_back(order[i]), row.logprobs.push_back(float(teacher[order[i]]));
        else left.push_back(teacher[order[i]]);
    for (Real l : teacher) at_t.push_back(l / Real(t));
    row.tail = float(log_sum(left));
    row.lse_t = float(log_sum(at_t));
    return row;
}

void check_row(const std::string& name, const Row& row, const loss::Settings& s, bool teacher, const Results& found, size_t n, int step) {
    size_t vocab = row.z.size();
    std::vector<Real> z(row.z.begin(), row.z.end());
    Losses want = losses(row, z, s, teacher);
    close(name + ": status", n, found.status[n], 0, 0);
    double t = s.temperature, weight = s.scale * (s.kd_alpha * t + s.kd_ce_alpha);
    close(name + ": kd", n, found.kd[n], double(want.kd), SUMS / std::min(t, 1.0));
    close(name + ": ce", n, found.ce[n], double(want.ce), SUMS);
    double most = *std::max_element(row.z.begin(), row.z.end());
    for (size_t id = 0; id < vocab; id += size_t(step)) {
        if (std::isinf(row.z[id])) continue;
        // Five points: the error is h^4 / 30 of the fifth derivative, 3e-18, and roundings of 1e-19 / h.
        Real h = 1e-4L, kd = 0, ce = 0;
        for (auto [at, factor] : {std::pair(-2, 1), std::pair(-1, -8), std::pair(1, 8), std::pair(2, -1)}) {
            std::vector<Real> moved = z;
            moved[id] += at * h;
            Losses there = losses(row, moved, s, teacher);
            kd += factor * there.kd, ce += factor * there.ce;
        }
        Real pull = s.scale * s.kd_alpha * t * t * kd / (12 * h), push = s.scale * s.kd_ce_alpha * ce / (12 * h);
        // A difference of logits is rounded once, which in the exponential is an error of its own size.
        double relative = SUMS + 0x1p-23 * (most - row.z[id]) / std::min(t, 1.0);
        double allowed = relative * (double(fabsl(pull) + fabsl(push)) + weight * double(want.share[id]) / std::min(t, 1.0)) + 1e-12;
        close(name + ": gradient", id, found.z[n * vocab + id], double(pull + push), allowed);
    }
}

const char* DIVERGENCES[] = {"forward KL", "reverse KL", "JSD", "skewed KL", "skewed reverse KL", "total variation"};
const char* TAILS[] = {"bucket", "renorm", "student full", "exact tail", "none"};

bool allowed(const loss::Settings& s) {
    return (s.tail != loss::NONE || s.divergence == loss::FORWARD_KL) && (s.tail != loss::STUDENT_FULL || s.divergence != loss::REVERSE_KL);
}

void copy_is_rounded(const std::string& name, const Results& found) {
    bool same = true;
    for (size_t i = 0; i < found.z.size(); i++) same &= found.copy[i].bits == __float2bfloat16_rn(found.z[i]).bits;
    EXPECT(same, "%s", (name + ": the copy is the gradient as bf16").c_str());
}

}  // namespace

TEST(every_loss_and_its_gradient) {
    Dice dice(3);
    for (int divergence = 0; divergence < 6; divergence++)
        for (int tail = 0; tail < 5; tail++)
            for (double t : {1.0, 0.6, 2.5}) {
                loss::Settings s = {t, 1, 0.3, 0.25, divergence == loss::JSD ? 0.4 : 0.1, divergence, tail};
                if (!allowed(s)) continue;
                std::string name = std::string(DIVERGENCES[divergence]) + ", " + TAILS[tail] + ", T " + std::to_string(t).substr(0, 3);
                std::vector<Row> rows;
                for (int i = 0; i < 2; i++) rows.push_back(make_row(dice, 41, 1 + int(dice.word() % 9), 2, t));
                // A label among the kept ids, and one that is not.
                rows[0].label = rows[0].ids.back();
                while (std::count(rows[1].ids.begin(), rows[1].ids.end(), rows[1].label) > 0) rows[1].label = (rows[1].label + 1) % 41;
                Results found = run(rows, s, true, true, dice.word() % 4);
                for (size_t i = 0; i < rows.size(); i++) check_row(name, rows[i], s, true, found, i, 1);
                copy_is_rounded(name, found);
            }
}

// Widths on both sides of what a block takes at once, rows that are and are not aligned, all ids kept, none kept, no teacher.
TEST(losses_of_rows_of_every_width) {
    Dice dice(4);
    loss::Settings bucket = {1, 1, 0.5, 1, 0, loss::FORWARD_KL, loss::BUCKET}, exact = {2, 1, 0.5, 1, 0.1, loss::SKEWED_KL, loss::EXACT_TAIL};
    for (const auto& [vocab, kept] : {std::pair(1, 1), {2, 1}, {4, 0}, {64, 64}, {300, 256}, {1024, 64}, {4093, 200}, {4096, 256}, {9000, 64}, {9001, 64}})
        for (const loss::Settings& s : {bucket, exact})
            for (bool teacher : {true, false}) {
                std::string name = std::to_string(kept) + " of " + std::to_string(vocab) + (teacher ? "" : ", no teacher");
                std::vector<Row> rows = {make_row(dice, vocab, kept, 3, s.temperature), make_row(dice, vocab, kept, 1, s.temperature)};
                if (!teacher)
                    for (Row& row : rows) row.ids.clear(), row.logprobs.clear();
                if (vocab > 10 && std::count(rows[0].ids.begin(), rows[0].ids.end(), 5u) == 0) rows[0].z[5] = -INFINITY, rows[0].label = 6;
                // Where every id is kept there is no entry for the rest, whatever is stored for it.
                loss::Settings twin = s;
                if (kept == vocab && teacher) twin.tail = loss::RENORM, rows[0].tail = rows[1].tail = -3;
                Results found = run(rows, s, teacher, dice.word() % 2 == 0, vocab % 3 == 0 ? 1 : 0);
                for (size_t i = 0; i < rows.size(); i++) check_row(name, rows[i], twin, teacher, found, i, vocab < 100 ? 1 : vocab / 8);
            }
}

// Logits far apart: one that all but has everything, others that lie beyond what f32 can weigh; a teacher that is sure.
TEST(losses_of_logits_far_apart) {
    Dice dice(5);
    for (int divergence = 0; divergence < 6; divergence++)
        for (double t : {1.0, 0.5, 3.0}) {
            loss::Settings s = {t, 1, 1, 1, divergence == loss::JSD ? 0.5 : 0.1, divergence, loss::EXACT_TAIL};
            Row row = make_row(dice, 37, 5, 1, t);
            row.z[row.ids[2]] = 60;
            row.z[7] = 55, row.z[8] = -250;
            row.tail = -INFINITY;
            Results found = run({row}, s, true, false, 0);
            check_row(std::string("extremes, ") + DIVERGENCES[divergence], row, s, true, found, 0, 1);
        }
}

// Values stored in few bits, which leave more of Z_T than the tail can have (at T < 1), or nothing.
TEST(losses_of_a_teacher_in_few_bits) {
    Dice dice(7);
    for (double t : {0.5, 0.8, 2.0})
        for (float off : {-0.1f, 0.1f}) {
            loss::Settings s = {t, 1, 0, 1, 0, loss::FORWARD_KL, loss::EXACT_TAIL};
            Row row = make_row(dice, 40, 36, 2, t);
            for (float& l : row.logprobs) l += off;
            Results found = run({row}, s, true, false, 0);
            check_row("few bits", row, s, true, found, 0, 1);
        }
}

TEST(losses_of_rows_that_are_wrong) {
    Dice dice(6);
    loss::Settings s = {1, 1, 1, 1, 0, loss::FORWARD_KL, loss::BUCKET};
    Row good = make_row(dice, 50, 4, 1, 1), twice = good, empty = good;
    twice.ids[3] = twice.ids[0];
    empty.tail = -INFINITY;
    for (float& l : empty.logprobs) l = -INFINITY;
    Results found = run({good, twice, empty, good}, s, true, true, 0);
    EXPECT(found.status == std::vector<int>({0, loss::REPEATED_ID, loss::NO_MASS, 0}), "statuses of refused rows");
    EXPECT(std::equal(&found.z[0], &found.z[50], &found.z[150]) && found.kd[0] == found.kd[3], "rows beside refused ones");
    // A logit that is no number makes the row's losses and gradients none, and those of no other row.
    for (float bad : {NAN, INFINITY})
        for (bool kept : {false, true}) {
            Row spoilt = good;
            size_t at = spoilt.ids[1];
            while (!kept && std::count(spoilt.ids.begin(), spoilt.ids.end(), at) > 0) at = (at + 1) % 50;
            spoilt.z[at] = bad;
            found = run({good, spoilt, good}, s, true, true, 0);
            bool all = std::isnan(found.kd[1]) && std::isnan(found.ce[1]);
            for (size_t id = 50; id < 100; id++) all &= std::isnan(found.z[id]);
            EXPECT(all, "a bad logit shows everywhere in its row");
            EXPECT(std::isfinite(found.kd[2]) && std::equal(&found.z[0], &found.z[50], &found.z[100]), "a bad logit shows in another row");
        }
}
