// The matmuls of `products.h` with AMX: tiles of 16 rows of 64 bytes, bf16 factors, sums in fp32.
// The right matrix is read in pairs of rows, with the two values of a column next to each other
// (Intel's programming reference, "TDPBF16PS").

#pragma once

#include "products.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#define MATRIX_UNITS

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

struct matrix_units {
  static constexpr long STRIP = 32, TILE = 16;

  struct left {
    const bf16* at;
    long by_row;
  };
  using right = const float*;  // each is a pair of bf16

  // a Linux process must request the tiles
  static bool there() {
    constexpr long REQUEST = 0x1023, TILES = 18;
    static const bool given = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return given;
  }

  // configures the tiles during the lifetime of this object, and restores them afterwards
  class configured {
    alignas(64) char before[64];

   public:
    configured() {
      alignas(64) struct {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } own;
      _tile_storeconfig(before);
      _tile_loadconfig(&own);
    }
    ~configured() { _tile_loadconfig(before); }
  };

  // bf16 rows X (many, wide), pairs of rows, and both transposed in units of 32 bits
  class operand {
    aligned own, pairs, columns, pair_columns;
    long many = 0, wide = 0, apart = 0;

    bf16* at(long row) { return reinterpret_cast<bf16*>(own.data()) + row * wide; }

   public:
    template <class Row>
    void gather(long n, long d, Row row) {
      many = padded(n, ROWS), wide = padded(d, ROWS);
      own.resize(many * wide / 2);
      for (long i = 0; i < n; i++) {
        std::memcpy(at(i), row(i), d * sizeof(bf16));
        std::memset(at(i) + d, 0, (wide - d) * sizeof(bf16));
      }
      std::memset(at(n), 0, (many - n) * wide * sizeof(bf16));
    }
    void take(const float* scores, long n) {
      many = n, wide = ROWS;
      own.resize(many * wide / 2);
      for (long i = 0; i < n; i++) {
        lanes x = read(scores + i * ROWS);
        __m512bh y = _mm512_cvtne2ps_pbh(as<__m512>(x.b), as<__m512>(x.a));
        std::memcpy(at(i), &y, sizeof y);
      }
    }
    void pair() {
      alignas(64) static constexpr uint16_t FIRST[32] = {
          0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
      const __m512i first = _mm512_load_si512(FIRST),
                    second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
      pairs.resize(many * wide / 2);
      for (long i = 0; i < many; i += 2)
        for (long j = 0; j < wide; j += ROWS) {
          __m512i x = _mm512_load_si512(at(i) + j), y = _mm512_load_si512(at(i + 1) + j);
          float* to = pairs.data() + i / 2 * wide + j;
          _mm512_store_si512(to, _mm512_permutex2var_epi16(x, first, y));
          _mm512_store_si512(to + LANES, _mm512_permutex2var_epi16(x, second, y));
        }
    }
    // rows are padded by a cache line, because 16 rows at a power-of-two stride conflict
    void turn_left() {
      pair();
      apart = many / 2 + LANES;
      pair_columns.resize(wide * apart);
      turn(pairs.data(), wide, many / 2, wide, pair_columns.data(), apart);
    }
    void turn_right() {
      columns.resize(many * wide / 2);
      turn(own.data(), wide / 2, many, wide / 2, columns.data(), many);
    }

    left rows(long from) { return {at(from), wide}; }
    left turned(long from) {
      return {reinterpret_cast<const bf16*>(pair_columns.data()) + from, 2 * apart};
    }
    right rows() { return pairs.data(); }
    right turned() { return columns.data(); }
  };

  // k is a multiple of STRIP too
  template <bool ADD>
  static void multiply(left a, right b, float* c, long m, long k, long n) {
    const long step = 4 * n, row = 2 * a.by_row;
    for (long at = 0; at < n; at += 2 * TILE)
      for (long i = 0; i < m; i += 2 * TILE) {
        float *upper = c + i * n + at, *lower = upper + TILE * n;
        if (ADD) {
          _tile_loadd(0, upper, step);
          _tile_loadd(1, upper + TILE, step);
          _tile_loadd(2, lower, step);
          _tile_loadd(3, lower + TILE, step);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        const bf16* x = a.at + i * a.by_row;
        const float* y = b + at;
        for (long j = 0; j < k; j += 2 * TILE, x += 2 * TILE, y += TILE * n) {
          _tile_loadd(4, x, row);
          _tile_loadd(5, x + TILE * a.by_row, row);
          _tile_loadd(6, y, step);
          _tile_loadd(7, y + TILE, step);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, upper, step);
        _tile_stored(1, upper + TILE, step);
        _tile_stored(2, lower, step);
        _tile_stored(3, lower + TILE, step);
      }
  }
};

#endif
