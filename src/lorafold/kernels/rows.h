// Operations on rows, for training and the engine. A row's results depend only on that row; the
// order of summation depends neither on the number of rows nor on the number of threads.

#pragma once

#include "numbers.h"

constexpr long FEW = 1 << 15;  // elements that are too few for a second thread

// the block at `at` of n values, padded with `beyond`
template <class T>
inline pair block(const T* x, long at, long n, float beyond = 0) {
  if (at + BLOCK <= n) return load_block(x + at);
  T part[BLOCK];
  store_block(part, {vector{} + beyond, vector{} + beyond});
  std::memcpy(static_cast<void*>(part), x + at, (n - at) * sizeof(T));
  return load_block(part);
}

template <class T>
inline void put(T* x, long at, long n, pair y) {
  if (at + BLOCK <= n) return store_block(x + at, y);
  T part[BLOCK];
  store_block(part, y);
  std::memcpy(static_cast<void*>(x + at), part, (n - at) * sizeof(T));
}

// 1 / (1 + e^-x)
inline vector sigmoid(vector x) { return 1.0f / (1.0f + exponential(-x)); }

// z and its derivative, for activations x sigmoid(z(x))
struct silu {
  static vector z(vector x) { return x; }
  static vector slope(vector x) { return x - x + 1.0f; }
};

struct gelu_tanh {
  static constexpr float A = 1.5957691216f, B = 0.044715f;
  static vector z(vector x) { return A * (x + B * x * x * x); }
  static vector slope(vector x) { return A * (1.0f + 3.0f * B * x * x); }
};

template <class Act>
inline vector activated(vector x, vector up) {
  return x * sigmoid(Act::z(x)) * up;
}

// rows of length n; to_gate and to_up are the row strides of gate and up
template <class Act, class T>
void gated(const T* gate, const T* up, T* out, long rows, long n, long to_gate, long to_up,
           int threads) {
  long blocks = (n + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long k = 0; k < rows * blocks; k++) {
    long b = k / blocks, i = k % blocks * BLOCK;
    pair x = block(gate + b * to_gate, i, n), u = block(up + b * to_up, i, n);
    put(out + b * n, i, n, {activated<Act>(x.a, u.a), activated<Act>(x.b, u.b)});
  }
}

template <class T, class G, class O>
void rms_norm(const T* x, const G* gain, O* out, long rows, long n, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long b = 0; b < rows; b++) {
    const T* from = x + b * n;
    O* to = out + b * n;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < n; i++) squares += load(from + i) * load(from + i);
    float r = 1.0f / std::sqrt(squares / n + eps);
#pragma omp simd
    for (long i = 0; i < n; i++) store(to + i, load(from + i) * r * load(gain + i));
  }
}

// the strides of rows, heads and tokens in a tensor (rows, heads, tokens, d)
struct places {
  long row, head, token;
};

// rotates x by cos and sin (rows, tokens, d) with row stride `turn`, 0 if all rows share them; with
// `sign` -1, applies the transpose
template <class T>
void rotary(const T* x, const T* cos, const T* sin, T* out, long rows, long heads, long tokens,
            long d, places from, places to, long turn, float sign, int threads) {
  long half = d / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * tokens * d > FEW)
  for (long k = 0; k < rows * tokens; k++) {
    long b = k / tokens, t = k % tokens;
    const T *c = cos + b * turn + t * d, *s = sin + b * turn + t * d;
    for (long h = 0; h < heads; h++) {
      const T* in = x + b * from.row + h * from.head + t * from.token;
      T* y = out + b * to.row + h * to.head + t * to.token;
      // the sines by which a and e are multiplied
      const T *of_e = sign > 0 ? s : s + half, *of_a = sign > 0 ? s + half : s;
#pragma omp simd
      for (long i = 0; i < half; i++) {
        float a = load(in + i), e = load(in + half + i);
        store(y + i, a * load(c + i) - sign * e * load(of_e + i));
        store(y + half + i, e * load(c + half + i) + sign * a * load(of_a + i));
      }
    }
  }
}
