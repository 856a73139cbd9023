// What every file of checks needs: device memory, launches through the driver's own calls, and comparisons that say what they found.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

extern "C" {
int cuMemAlloc_v2(unsigned long long* made, size_t bytes);
int cuMemFree_v2(unsigned long long address);
int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t bytes);
int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t bytes);
int cuModuleLoadData(void** made, const void* image);
int cuModuleGetFunction(void** found, void* module, const char* name);
int cuFuncSetAttribute(void* function, int attribute, int value);
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** arguments, void** extra);
}

namespace check {

struct Test {
    const char* name;
    void (*run)();
};
std::vector<Test>& tests();

struct Added {
    Added(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

#define TEST(name)                                        \
    static void name();                                   \
    static const ::check::Added added_##name(#name, name); \
    static void name()

// Ends the run with one line unless `holds`.
#define EXPECT(holds, ...) ((holds) ? void() : ::check::failed(__FILE__, __LINE__, __VA_ARGS__))
[[noreturn]] void failed(const char* file, int line, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Values on the device, `offset` elements into their allocation: views of tensors begin anywhere.
template <class T>
class Values {
  public:
    explicit Values(const std::vector<T>& values, size_t offset = 0) : size_(values.size()), offset_(offset) {
        EXPECT(cuMemAlloc_v2(&begin_, (size_ + offset + (size_ + offset == 0)) * sizeof(T)) == 0, "no memory");
        EXPECT(cuMemcpyHtoD_v2(address(), values.data(), size_ * sizeof(T)) == 0, "copy to the device");
    }
    // As the device leaves new memory: NaNs.
    static Values made(size_t size, size_t offset = 0) {
        std::vector<T> values(size);
        memset(static_cast<void*>(values.data()), 0xff, size * sizeof(T));
        return Values(values, offset);
    }
    Values(const Values&) = delete;
    ~Values() { EXPECT(cuMemFree_v2(begin_) == 0, "free"); }

    unsigned long long address() const { return begin_ + offset_ * sizeof(T); }
    std::vector<T> read() const {
        std::vector<T> values(size_);
        EXPECT(cuMemcpyDtoH_v2(values.data(), address(), size_ * sizeof(T)) == 0, "copy from the device");
        return values;
    }

  private:
    unsigned long long begin_ = 0;
    size_t size_, offset_;
};

template <class T>
unsigned long long argument(const Values<T>& values) { return values.address(); }
template <class T>
T argument(const T& value) { return value; }

struct Size {
    unsigned x = 1, y = 1, z = 1;
};

// Launches that a flat kernel over n values must be right for, by turns: as many blocks as keep a device busy, too few, and the largest.
inline Size grid_for(size_t n) { return {n % 3 == 0 ? unsigned((n + 2047) / 2048) : n % 3 == 1 ? 1 : 2}; }
inline Size block_for(size_t n) { return {n % 3 == 0 ? 256u : n % 3 == 1 ? 96 : 1024}; }

// Launches a kernel; gives the driver's code. Scalars must have the very types of the kernel's parameters, as with the real driver.
template <class... A>
int try_launch(const char* name, Size grid, Size block, unsigned shared, const A&... arguments) {
    void *module, *function;
    EXPECT(cuModuleLoadData(&module, "") == 0, "module");
    EXPECT(cuModuleGetFunction(&function, module, name) == 0, "no kernel %s", name);
    if (shared > 48 << 10) {
        EXPECT(cuFuncSetAttribute(function, 8, int(shared)) == 0, "shared memory");
    }
    auto bound = std::make_tuple(argument(arguments)...);
    return std::apply(
        [&](auto&... each) {
            void* pointers[] = {&each..., nullptr};
            return cuLaunchKernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, nullptr, pointers, nullptr);
        },
        bound);
}

template <class... A>
void launch(const char* name, Size grid, Size block, unsigned shared, const A&... arguments) {
    int code = try_launch(name, grid, block, shared, arguments...);
    EXPECT(code == 0, "%s: error %d", name, code);
}

// Numbers in [-1, 1), the same on every machine: a 64-bit linear congruence, its upper half.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
    uint32_t word() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state_ >> 32);
    }
    float value() { return float(int32_t(word())) * 0x1p-31f; }
    unsigned below(unsigned n) { return unsigned(uint64_t(word()) * n >> 32); }
    std::vector<float> values(size_t n, float scale = 1) {
        std::vector<float> made(n);
        for (float& v : made) {
            v = value() * scale;
        }
        return made;
    }

  private:
    uint64_t state_;
};

// Every value must lie within what is allowed of the expected one; a NaN never does.
template <class T>
void near(const char* what, const std::vector<T>& found, const std::vector<double>& expected, const std::vector<double>& allowed) {
    EXPECT(found.size() == expected.size(), "%s: %zu values, expected %zu", what, found.size(), expected.size());
    for (size_t i = 0; i < found.size(); i++) {
        EXPECT(std::fabs(double(found[i]) - expected[i]) <= allowed[i], "%s: value %zu of %zu: found %.9g, expected %.9g within %.2g", what, i,
               found.size(), double(found[i]), expected[i], allowed[i]);
    }
}

// The same with a part of each expected value.
template <class T>
void near(const char* what, const std::vector<T>& found, const std::vector<double>& expected, double relative) {
    std::vector<double> allowed;
    for (double value : expected) {
        allowed.push_back(relative * std::fabs(value));
    }
    near(what, found, expected, allowed);
}

// Half of an f32's unit, relative: what one rounding costs at most.
constexpr double ROUNDING = 0x1p-24;

inline std::vector<unsigned short> bits(const std::vector<__nv_bfloat16>& values) {
    std::vector<unsigned short> all;
    for (__nv_bfloat16 value : values) {
        all.push_back(__bfloat16_as_ushort(value));
    }
    return all;
}

// Every value must have the expected bits.
template <class T>
void same(const char* what, const std::vector<T>& found, const std::vector<T>& expected) {
    EXPECT(found.size() == expected.size(), "%s: %zu values, expected %zu", what, found.size(), expected.size());
    for (size_t i = 0; i < found.size(); i++) {
        EXPECT(memcmp(&found[i], &expected[i], sizeof(T)) == 0, "%s: value %zu of %zu: found %.9g, expected %.9g", what, i, found.size(),
               double(found[i]), double(expected[i]));
    }
}

}  // namespace check
