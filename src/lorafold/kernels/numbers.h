// Values in the kernels: float or bfloat16 (raw 16 bits) in memory, and fp32 in registers, in the
// compiler's vector types, which it maps to the processor's vector instructions.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// the floats of one register, because gcc keeps vectors of several registers in memory
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 2 * LANES, AHEAD = 4096;  // AHEAD: bytes

struct bf16 {
  uint16_t bits;
};

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

template <class To, class From>
inline To as(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// BLOCK values in two vectors; for bfloat16, the values at even and at odd indices
struct pair {
  vector a, b;
};

inline pair load_block(const float* from) {
  pair x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline pair load_block(const bf16* from) {
  words two;
  std::memcpy(&two, from, sizeof two);
  return {as<vector>(two << 16), as<vector>(two & 0xffff0000u)};
}

inline words rounded(vector x) {
  words bits = as<words>(x), even = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : even;
}

inline void store_block(float* to, pair x) { std::memcpy(to, &x, sizeof x); }

inline void store_block(bf16* to, pair x) {
  words two = (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000u);
  std::memcpy(to, &two, sizeof two);
}

// the hardware prefetcher stops at each page boundary
template <class T>
inline void prefetch(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + AHEAD);
}

inline float load(const float* from) { return *from; }

inline float load(const bf16* from) { return as<float>(static_cast<uint32_t>(from->bits) << 16); }

inline void store(float* to, float x) { *to = x; }

inline void store(bf16* to, float x) {
  uint32_t bits = as<uint32_t>(x), even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : even);
}

// reduces a vector with op, first its two halves
template <class Op>
inline float over(vector x, Op op) {
  float y[LANES];
  std::memcpy(y, &x, sizeof x);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) y[i] = op(y[i], y[i + n]);
  return y[0];
}

inline float sum(vector x) {
  return over(x, [](float a, float b) { return a + b; });
}

// e^x to 2e-7 relative, for x between -87 and 87; other x are clamped
template <class V, class W>
inline V exponential_of(V x) {
  constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: a sum with it has an integer in its low bits
  V t = x * 1.442695041f, least = V{} - 126.0f;
  t = t < least ? least : t > -least ? -least : t;
  V shifted = t + SHIFT, f = (t - (shifted - SHIFT)) * 0.693147181f;
  V p = f * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * as<V>((as<W>(shifted) + 127u) << 23);
}

inline float exponential(float x) { return exponential_of<float, uint32_t>(x); }
inline vector exponential(vector x) { return exponential_of<vector, words>(x); }

// e^x, but 0 below -87
inline vector weight_of(vector x) { return x < -87.0f ? vector{} : exponential(x); }

inline vector larger(vector x, vector y) { return x > y ? x : y; }
