// __half and __nv_bfloat16: bits, and conversions that round to nearest even as the device's do. Arithmetic is left out: kernels compute
// in f32.
#pragma once

struct __nv_bfloat16 {
    unsigned short bits;
};

struct __half {
    unsigned short bits;
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

struct alignas(4) __half2 {
    __half x, y;
};

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __bfloat162float(__nv_bfloat16 value) {
    return __uint_as_float(unsigned(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return {0x7fff};
    }
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half value) {
    unsigned sign = unsigned(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 0x3ff;
    if (exponent == 31) {
        return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    }
    if (exponent == 0) {
        float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign != 0 ? -magnitude : magnitude;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        return {0x7fff};
    }
    // 65520 is halfway between the largest half and the next power of two, and even goes up.
    if (magnitude >= 0x477ff000) {
        return {static_cast<unsigned short>(sign | 0x7c00)};
    }
    // Below 2^-14 halves are multiples of 2^-24; adding 1/2, whose unit is 2^-24, rounds to one and leaves it in the low bits.
    if (magnitude < 0x38800000) {
        unsigned rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
        return {static_cast<unsigned short>(sign | rounded)};
    }
    unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23);
    return {static_cast<unsigned short>(sign | rounded >> 13)};
}

inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {__bfloat162float(value.x), __bfloat162float(value.y)}; }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
