// Matmuls of small matrices in cache, with an fp32 result C (m, n). The left matrix (m, k) and the
// right matrix (k, n) are views of an `operand` (rows that were gathered from a tensor, or scores),
// transposed or not. `single` multiplies in fp32, and `matrix_units.h` multiplies bf16 tiles.

#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "numbers.h"

constexpr long ROWS = 2 * LANES;  // columns of C at a time
constexpr int RUN = LANES / 2;    // rows whose sums are in registers, two vectors for each row

struct lanes {
  vector a, b;
};

// vector-aligned floats, so that no load crosses a cache line
struct aligned {
  std::vector<lanes> all;
  void resize(long n) { all.resize((n + ROWS - 1) / ROWS); }
  void clear(long n) { all.assign((n + ROWS - 1) / ROWS, lanes{}); }
  float* data() { return reinterpret_cast<float*>(all.data()); }
};

inline long padded(long n, long to) { return (n + to - 1) / to * to; }

inline vector one(const float* from) {
  vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline lanes read(const float* from) {
  lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class V>
inline void write(float* to, V x) {
  std::memcpy(to, &x, sizeof x);
}

// halves of x and y, interleaved: the first if AT is 0, the second if it is LANES / 2
template <int AT, size_t... I>
inline vector mixed(vector x, vector y, std::index_sequence<I...>) {
  return vector{(I % 2 ? y : x)[AT + I / 2]...};
}

// transposes LANES rows of LANES values; each stage interleaves the first half of the rows with the
// second half
inline void transpose(vector (&x)[LANES]) {
  constexpr std::make_index_sequence<LANES> lanes;
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 2) {
    vector y[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = mixed<0>(x[i], x[i + LANES / 2], lanes);
      y[2 * i + 1] = mixed<LANES / 2>(x[i], x[i + LANES / 2], lanes);
    }
    std::memcpy(x, y, sizeof y);
  }
}

// transposes an (m, n) matrix of 32-bit values, row stride `step`; m and n are multiples of LANES
inline void turn(const float* from, long step, long m, long n, float* to, long to_step) {
  for (long i = 0; i < m; i += LANES)
    for (long j = 0; j < n; j += LANES) {
      vector x[LANES];
      for (int r = 0; r < LANES; r++) x[r] = one(from + (i + r) * step + j);
      transpose(x);
      for (int r = 0; r < LANES; r++) write(to + (j + r) * to_step + i, x[r]);
    }
}

struct single {
  static constexpr long STRIP = 8;  // m is a multiple of it

  struct left {
    const float* at;
    long by_row, by_column;
  };
  using right = const float*;

  struct configured {};  // per-thread configuration, which fp32 does not need

  class operand {
    aligned own, columns;
    float* at = nullptr;
    long many = 0, wide = 0;

   public:
    // copies d values from row(i) for each of n rows; rows and columns are padded with zeros
    template <class Row>
    void gather(long n, long d, Row row) {
      many = padded(n, ROWS), wide = padded(d, ROWS);
      own.resize(many * wide);
      at = own.data();
      for (long i = 0; i < n; i++) {
        auto from = row(i);
        for (long j = 0; j < d; j++) at[i * wide + j] = load(from + j);
        std::fill(at + i * wide + d, at + (i + 1) * wide, 0.0f);
      }
      std::fill(at + n * wide, at + many * wide, 0.0f);
    }
    // uses scores (n, ROWS) in fp32 without a copy
    void take(float* scores, long n) { at = scores, many = n, wide = ROWS; }

    // prepare the views below
    void pair() {}
    void turn_left() {}
    void turn_right() {
      columns.resize(many * wide);
      turn(at, wide, many, wide, columns.data(), many);
    }

    left rows(long from) const { return {at + from * wide, wide, 1}; }
    left turned(long from) const { return {at + from * wide, 1, wide}; }
    right rows() const { return at; }
    right turned() { return columns.data(); }
  };

  // C = A B, or C + A B if ADD; RUN rows of ROWS values are summed at a time
  template <bool ADD>
  static void multiply(left x, right b, float* c, long m, long k, long n) {
    for (long at = 0; at < n; at += ROWS)
      for (long i = 0; i < m; i += RUN) {
        vector sums[RUN][2];
        float* to = c + i * n + at;
#pragma GCC unroll 16
        for (int r = 0; r < RUN; r++)
          for (int half = 0; half < 2; half++)
            sums[r][half] = ADD ? one(to + r * n + half * LANES) : vector{};
        const float *rows = x.at + i * x.by_row, *columns = b + at;
        for (long j = 0; j < k; j++, rows += x.by_column, columns += n) {
          vector y = one(columns), z = one(columns + LANES);
#pragma GCC unroll 16
          for (int r = 0; r < RUN; r++) {
            float f = rows[r * x.by_row];
            sums[r][0] += f * y;
            sums[r][1] += f * z;
          }
        }
#pragma GCC unroll 16
        for (int r = 0; r < RUN; r++) {
          write(to + r * n, sums[r][0]);
          write(to + r * n + LANES, sums[r][1]);
        }
      }
  }
};
