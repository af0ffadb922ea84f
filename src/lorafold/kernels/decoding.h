// Sums over rows that the engine's operations share; a row's results depend only on that row.

#pragma once

#include <limits>

#include "numbers.h"

constexpr int GROUP = 4;  // query heads that are computed together

// converts to float, in the order of `load_block`
template <class T>
void widen(const T* x, float* y, long n) {
  long i = 0;
  for (; i + BLOCK <= n; i += BLOCK) store_block(y + i, load_block(x + i));
  for (; i < n; i++) y[i] = load(x + i);
}

// out_gj = x_g . m_j for G widened vectors x and R rows of M, all of length n; `step` is from out_g
// to the next
template <int G, int R, class T>
inline void dots_of(const float* x, const T* m, float* out, long step, long n) {
  pair sums[G][R] = {};
  long i = 0;
  for (; i + BLOCK <= n; i += BLOCK)
    for (int r = 0; r < R; r++) {
      prefetch(m + r * n + i);
      pair y = load_block(m + r * n + i);
      for (int g = 0; g < G; g++) {
        pair z = load_block(x + g * n + i);
        sums[g][r].a += z.a * y.a;
        sums[g][r].b += z.b * y.b;
      }
    }
  for (int g = 0; g < G; g++)
    for (int r = 0; r < R; r++) {
      float rest = 0;
      for (long k = i; k < n; k++) rest = std::fma(x[g * n + k], load(m + r * n + k), rest);
      out[g * step + r] = sum(sums[g][r].a + sums[g][r].b) + rest;
    }
}

template <int G, int R, class T>
void dots(const float* x, const T* m, float* out, long rows, long n, long step) {
  long j = 0;
  for (; j + R <= rows; j += R) dots_of<G, R>(x, m + j * n, out + j, step, n);
  for (; j < rows; j++) dots_of<G, 1>(x, m + j * n, out + j, step, n);
}

// out_g = scale_g sum_j a_gj m(j) for G outputs of length n, which are summed in registers and
// written with stride `step`
template <int G, class T, class Rows>
void averages(const float* a, const float* scale, Rows m, T* out, long rows, long n, long step) {
  long at = 0;
  for (; at + BLOCK <= n; at += BLOCK) {
    pair y[G] = {};
    for (long j = 0; j < rows; j++) {
      prefetch(m(j) + at);
      pair x = load_block(m(j) + at);
      for (int g = 0; g < G; g++) {
        y[g].a += a[g * rows + j] * x.a;
        y[g].b += a[g * rows + j] * x.b;
      }
    }
    for (int g = 0; g < G; g++)
      store_block(out + g * step + at, {scale[g] * y[g].a, scale[g] * y[g].b});
  }
  for (; at < n; at++)
    for (int g = 0; g < G; g++) {
      float y = 0;
      for (long j = 0; j < rows; j++) y = std::fma(a[g * rows + j], load(m(j) + at), y);
      store(out + g * step + at, scale[g] * y);
    }
}

// scores (G, keys) become exp(scale s + m - their largest); returns the reciprocals of their sums
template <int G, class Mask>
void exponentials(float* scores, float* over, long keys, float scale, Mask mask) {
  for (int g = 0; g < G; g++) {
    float *own = scores + g * keys, top = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : top)
    for (long j = 0; j < keys; j++) {
      own[j] = scale * own[j] + mask(j);
      top = own[j] > top ? own[j] : top;
    }
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < keys; j++) total += (own[j] = exponential(own[j] - top));
    over[g] = 1 / total;
  }
}
