// For checks against twins that are compared value by value: normal chance, comparisons that name their place.
#pragma once

#include "check.h"

namespace check {

// Numbers as Random's, and normal ones.
class Dice : public Random {
  public:
    using Random::Random;
    double normal() {
        double radius = std::sqrt(-2 * std::log((word() + 0.5) * 0x1p-32));
        return radius * std::cos(6.283185307179586 * word() * 0x1p-32);
    }
    std::vector<float> normals(size_t n, double width = 1) {
        std::vector<float> made(n);
        for (float& v : made) {
            v = float(width * normal());
        }
        return made;
    }
};

// `found` must lie within `allowed` of `expected`; a NaN never does.
inline void close(const std::string& what, size_t at, double found, double expected, double allowed) {
    EXPECT(found == expected || std::fabs(found - expected) <= allowed, "%s: value %zu: found %.9g, expected %.9g within %.2g", what.c_str(), at,
           found, expected, allowed);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace check
