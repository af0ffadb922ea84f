// Products of rows with packed matrices, for any number of rows: each weight is read once for MOST
// rows. The order of summation is that of the inputs, so a row's result depends on no other row.
//
// A matrix (out, in) is packed in strips of `width` outputs: fp32 as (out / width, in, width), bf16
// as (out / width, in / 2, width, 2), the order of `vdpbf16ps` and of AMX's tiles.

#pragma once

#include "rows.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr long TILE = 16;             // outputs whose sums share a vector, or two of 8 lanes
constexpr int PARTS = TILE / LANES;   // vectors of a tile
constexpr int MOST = LANES / 2;       // rows at a time
constexpr int SUMS = LANES == 16 ? 16 : 8;  // registers for sums

// inputs are rounded to bf16 where the processor multiplies pairs of bf16
template <class T>
struct input {
  using type = float;
};
#ifdef __AVX512BF16__
template <>
struct input<bf16> {
  using type = bf16;
};
#endif
template <class T>
using inputs = typename input<T>::type;

template <class V>
inline V read(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void add(vector& sum, const float* x, const float* w) { sum += *x * read<vector>(w); }

inline void add(vector& sum, const float* x, const bf16* w) {
  words two = read<words>(w);
  sum += x[0] * as<vector>(two << 16);
  sum += x[1] * as<vector>(two & 0xffff0000u);
}

#ifdef __AVX512BF16__
inline void add(vector& sum, const bf16* x, const bf16* w) {
  __m512i two = _mm512_set1_epi32(read<int>(x));
  const __m512bh weights = as<__m512bh>(read<words>(w));
  sum = as<vector>(_mm512_dpbf16_ps(as<__m512>(sum), weights, as<__m512bh>(two)));
}
#endif

// y (R, TILE J) = x W^T for R rows of length k, or y + x W^T if ADD
template <int R, int J, bool ADD, class T>
void tiles(const inputs<T>* x, long to_x, const T* w, long width, long k, float* y, long to_y) {
  constexpr long EACH = 4 / sizeof(T);  // inputs whose weights share a vector
  vector sums[R][J][PARTS];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++)
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; p++)
        sums[r][j][p] = ADD ? read<vector>(y + r * to_y + j * TILE + p * LANES) : vector{};
  for (long i = 0; i < k; i += EACH, w += width * EACH, x += EACH) {
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) {
      prefetch(w + j * TILE * EACH);
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          add(sums[r][j][p], x + r * to_x, w + (j * TILE + p * LANES) * EACH);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < J; j++)
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; p++)
        std::memcpy(y + r * to_y + j * TILE + p * LANES, &sums[r][j][p], sizeof(vector));
}

// the same for `columns` outputs, a multiple of TILE
template <int R, bool ADD, class T>
void strip(const inputs<T>* x, long to_x, const T* w, long width, long columns, long k, float* y,
           long to_y) {
  constexpr long EACH = 4 / sizeof(T);
  constexpr int WIDE = SUMS / (R * PARTS), J = WIDE >= 4 ? 4 : WIDE >= 2 ? 2 : 1;
  long c = 0;
  for (; c + J * TILE <= columns; c += J * TILE)
    tiles<R, J, ADD>(x, to_x, w + c * EACH, width, k, y + c, to_y);
  for (; c < columns; c += TILE)
    tiles<R, 1, ADD>(x, to_x, w + c * EACH, width, k, y + c, to_y);
}

// the same for any number of rows
template <bool ADD, class T>
void strips(const inputs<T>* x, long to_x, long rows, const T* w, long width, long columns, long k,
            float* y, long to_y) {
  using one = void (*)(const inputs<T>*, long, const T*, long, long, long, float*, long);
  static constexpr one BY_ROWS[] = {
      strip<1, ADD, T>, strip<2, ADD, T>, strip<3, ADD, T>, strip<4, ADD, T>,
#ifdef __AVX512F__
      strip<5, ADD, T>, strip<6, ADD, T>, strip<7, ADD, T>, strip<8, ADD, T>,
#endif
  };
  for (long r = 0; r < rows; r += MOST) {
    long n = rows - r < MOST ? rows - r : MOST;
    BY_ROWS[n - 1](x + r * to_x, to_x, w, width, columns, k, y + r * to_y, to_y);
  }
}
