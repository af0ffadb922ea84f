// Operators of training steps; the operations of `lorafold.ops` that `registry.py` lists for
// `training.py` have their equations and shapes.
//
// Inputs and outputs are float or bfloat16; intermediate values are fp32, rounded once. Rows are
// divided among threads, so results do not depend on the number of threads.

#include <algorithm>
#include <limits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "rows.h"

namespace {

inline float largest(vector x) {
  return over(x, [](float a, float b) { return std::max(a, b); });
}

// x becomes the gradient of the gate, and u the gradient of up
template <class Act>
inline void gated_gradients(vector g, vector& x, vector& u) {
  vector s = sigmoid(Act::z(x)), y = g * x * s;
  x = g * u * s * (1.0f + x * (1.0f - s) * Act::slope(x));
  u = y;
}

template <class Act, class T>
void gated_backward(const T* g, const T* gate, const T* up, T* to_gate, T* to_up, long n,
                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > FEW)
  for (long i = 0; i < n; i += BLOCK) {
    pair gi = block(g, i, n), x = block(gate, i, n), u = block(up, i, n);
    gated_gradients<Act>(gi.a, x.a, u.a);
    gated_gradients<Act>(gi.b, x.b, u.b);
    put(to_gate, i, n, x);
    put(to_up, i, n, u);
  }
}

template <class T>
void rms_norm_backward(const T* g, const T* x, const float* gain, T* out, long rows, long n,
                       float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long b = 0; b < rows; b++) {
    const T *gb = g + b * n, *xb = x + b * n;
    T* to = out + b * n;
    float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
    for (long i = 0; i < n; i++) {
      float xi = load(xb + i);
      squares += xi * xi;
      along += xi * gain[i] * load(gb + i);
    }
    float r = 1.0f / std::sqrt(squares / n + eps), of_x = along * r * r * r / n;
#pragma omp simd
    for (long i = 0; i < n; i++) store(to + i, r * gain[i] * load(gb + i) - of_x * load(xb + i));
  }
}

// y times the gains plus the offsets, rounded like `core.rounding.dithered`
void scale(const bf16* y, const float* g, const float* c, bf16* out, long rows, long n,
           int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long b = 0; b < rows; b++) {
    const bf16* from = y + b * n;
    bf16* to = out + b * n;
#pragma omp simd
    for (long j = 0; j < n; j++) {
      uint32_t bits = as<uint32_t>(load(from + j) * g[j] + c[j]);
      to[j].bits = static_cast<uint16_t>((bits + (((bits >> 16) * 0x9e37u) & 0xffffu)) >> 16);
    }
  }
}

constexpr long ROWS = 64;  // rows that one thread sums

// the gradients of y, of the gains and of the offsets, from the gradient z of the output
void scale_backward(const bf16* z, const bf16* y, const float* g, bf16* to_y, float* to_g,
                    float* to_c, long rows, long n, int threads) {
  long parts = (rows + ROWS - 1) / ROWS;
  std::vector<float> sums(2 * n * parts);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long part = 0; part < parts; part++) {
    float *of_g = sums.data() + 2 * n * part, *of_c = of_g + n;
    for (long b = part * ROWS; b < std::min(rows, (part + 1) * ROWS); b++) {
      const bf16 *zb = z + b * n, *yb = y + b * n;
      bf16* to = to_y + b * n;
#pragma omp simd
      for (long j = 0; j < n; j++) {
        float zj = load(zb + j);
        of_g[j] += zj * load(yb + j);
        of_c[j] += zj;
        store(to + j, zj * g[j]);
      }
    }
  }
  std::fill(to_g, to_g + n, 0.0f);
  std::fill(to_c, to_c + n, 0.0f);
  for (long part = 0; part < parts; part++) {
    const float* own = sums.data() + 2 * n * part;
    for (long j = 0; j < n; j++) {
      to_g[j] += own[j];
      to_c[j] += own[n + j];
    }
  }
}

// turns scores (rows, n) into probabilities, after multiplying by scale and adding the rows of the
// mask, which have stride `step` and are used in turn
template <class T>
void softmax(T* scores, const T* mask, long rows, long masks, long step, long n, float scale,
             int threads) {
  constexpr float NONE = -std::numeric_limits<float>::infinity();
#pragma omp parallel num_threads(threads) if (rows * n > FEW)
  {
    std::vector<float> buffer(n + BLOCK);
    float* e = buffer.data();
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) {
      T* row = scores + i * n;
      const T* own = mask + i % masks * step;
      vector tops = vector{} + NONE, total = {};
      for (long j = 0; j < n; j += BLOCK) {
        pair s = block(row, j, n), m = block(own, j, n, NONE);
        s = {scale * s.a + m.a, scale * s.b + m.b};
        store_block(e + j, s);
        tops = larger(tops, larger(s.a, s.b));
      }
      float top = largest(tops);
      for (long j = 0; j < n; j += BLOCK) {
        pair s = load_block(e + j);
        s = {weight_of(s.a - top), weight_of(s.b - top)};
        store_block(e + j, s);
        total += s.a + s.b;
      }
      float over = 1.0f / sum(total);
      for (long j = 0; j < n; j += BLOCK) {
        pair s = load_block(e + j);
        put(row, j, n, {over * s.a, over * s.b});
      }
    }
  }
}

// turns the gradient g of the probabilities into the gradient of the products q k
template <class T>
void softmax_backward(T* g, const T* p, long rows, long n, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long i = 0; i < rows; i++) {
    T* gi = g + i * n;
    const T* pi = p + i * n;
    vector total = {};
    for (long j = 0; j < n; j += BLOCK) {
      pair x = block(gi, j, n), y = block(pi, j, n);
      total += x.a * y.a + x.b * y.b;
    }
    float mean = sum(total);
    for (long j = 0; j < n; j += BLOCK) {
      pair x = block(gi, j, n), y = block(pi, j, n);
      put(gi, j, n, {scale * y.a * (x.a - mean), scale * y.b * (x.b - mean)});
    }
  }
}

// writes the losses; with `gradient`, replaces the logits z (rows, n) by their gradient
template <class T>
void cross_entropy(T* z, const int64_t* targets, float* losses, long rows, long n, float scale,
                   float cap, bool gradient, int threads) {
  constexpr float NONE = -std::numeric_limits<float>::infinity();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < rows; i++) {
    T* row = z + i * n;
    vector tops = vector{} + NONE, total = {};
    for (long j = 0; j < n; j += BLOCK) {
      pair x = block(row, j, n, NONE);
      tops = larger(tops, larger(x.a, x.b));
    }
    float top = largest(tops), at = load(row + targets[i]);
    for (long j = 0; j < n; j += BLOCK) {
      pair x = block(row, j, n, NONE);
      total += exponential(x.a - top) + exponential(x.b - top);
    }
    float whole = sum(total), over = scale / whole;
    losses[i] = top + std::log(whole) - at;
    if (!gradient) continue;
    // the cap's derivative is 1 - (z / cap)^2
    float curve = cap > 0 ? 1.0f / (cap * cap) : 0.0f;
    for (long j = 0; j < n; j += BLOCK) {
      pair x = block(row, j, n);
      put(row, j, n, {over * exponential(x.a - top) * (1.0f - curve * x.a * x.a),
                      over * exponential(x.b - top) * (1.0f - curve * x.b * x.b)});
    }
    store(row + targets[i], (over * exponential(at - top) - scale) * (1.0f - curve * at * at));
  }
}

template <class T>
void empty(T* x, const int32_t* places, long many) {
  for (long i = 0; i < many; i++) x[places[i]] = T{};
}

// Philox4x32-10 (Salmon et al. 2011): the calls at a time, and the elements that they decide
constexpr int CALLS = 4, ELEMENTS = 8 * CALLS;
constexpr uint32_t FACTORS[] = {0xd2511f53u, 0xcd9e8d57u}, STEPS[] = {0x9e3779b9u, 0xbb67ae85u};

// one bit for each element that the calls starting at `call` decide, set if the element's 16 random
// bits are below `limit`, which is not 0
#ifdef __AVX2__
inline uint32_t decide(uint32_t call, uint64_t name, uint32_t site, uint64_t key, uint32_t limit) {
  auto all = [](uint32_t word) { return _mm256_set1_epi64x(word); };
  // a call's word is the low half of a lane; the high half is ignored
  __m256i a = _mm256_add_epi64(all(call), _mm256_set_epi64x(3, 2, 1, 0)), b = all(name),
          c = all(name >> 32), d = all(site);
  uint32_t k = key, m = key >> 32;
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    __m256i x = _mm256_mul_epu32(a, all(FACTORS[0])), y = _mm256_mul_epu32(c, all(FACTORS[1]));
    a = _mm256_srli_epi64(y, 32) ^ b ^ all(k);
    c = _mm256_srli_epi64(x, 32) ^ d ^ all(m);
    b = y;
    d = x;
    k += STEPS[0];
    m += STEPS[1];
  }
  __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa),
          cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xaa),
          most = _mm256_set1_epi16(static_cast<int16_t>(limit - 1)), none = _mm256_setzero_si256(),
          even = _mm256_subs_epu16(_mm256_unpacklo_epi64(ab, cd), most),
          odd = _mm256_subs_epu16(_mm256_unpackhi_epi64(ab, cd), most);
  return _mm256_movemask_epi8(
      _mm256_packs_epi16(_mm256_cmpeq_epi16(even, none), _mm256_cmpeq_epi16(odd, none)));
}
#else
inline uint32_t decide(uint32_t call, uint64_t name, uint32_t site, uint64_t key, uint32_t limit) {
  uint32_t words[4][CALLS], bits = 0;
  for (int i = 0; i < CALLS; i++) {
    uint32_t a = call + i, b = name, c = name >> 32, d = site, k = key, m = key >> 32;
    for (int round = 0; round < 10; round++) {
      uint64_t x = uint64_t{FACTORS[0]} * a, y = uint64_t{FACTORS[1]} * c;
      a = static_cast<uint32_t>(y >> 32) ^ b ^ k;
      b = static_cast<uint32_t>(y);
      c = static_cast<uint32_t>(x >> 32) ^ d ^ m;
      d = static_cast<uint32_t>(x);
      k += STEPS[0];
      m += STEPS[1];
    }
    words[0][i] = a, words[1][i] = b, words[2][i] = c, words[3][i] = d;
  }
  for (int k = 0; k < ELEMENTS; k++)
    bits |= uint32_t{(words[k / 2 % 4][k / 8] >> 16 * (k % 2) & 0xffffu) < limit} << k;
  return bits;
}
#endif

constexpr int SURE = 6;  // indices that are always written, because that is faster

// writes the indices of the dropped elements of a row of length n that begins at `start`, and up to
// SURE arbitrary indices after them; returns the number of dropped elements
inline long places_of(int32_t* out, long start, long n, uint64_t name, uint32_t site, uint64_t key,
                      uint32_t limit) {
  constexpr uint64_t LAST = uint64_t{1} << 63;
  long many = 0;
  for (long at = 0; at < n; at += 2 * ELEMENTS) {
    uint64_t bits = decide(at / 8, name, site, key, limit), others = 0;
    if (n - at > ELEMENTS) others = decide(at / 8 + CALLS, name, site, key, limit);
    bits |= others << ELEMENTS;
    if (n - at < 2 * ELEMENTS) bits &= (uint64_t{1} << (n - at)) - 1;
    int32_t *own = out + many, first = static_cast<int32_t>(start + at);
    many += __builtin_popcountll(bits);
    for (int k = 0; k < SURE; k++, bits &= bits - 1) own[k] = first + __builtin_ctzll(bits | LAST);
    for (int k = SURE; bits; k++, bits &= bits - 1) own[k] = first + __builtin_ctzll(bits);
  }
  return many;
}

constexpr long STRETCH = 1 << 14;  // elements that a thread samples at a time

}  // namespace

// writes the dropped indices of rows of length n to `out`, which has room for all elements; returns
// their number
extern "C" long dropped_places(int32_t* out, const uint64_t* names, long rows, long n,
                               uint32_t limit, uint64_t key, uint32_t site, int threads) {
  long step = std::max(1L, STRETCH / n), parts = (rows + step - 1) / step, many = 0;
  std::vector<long> found(parts);
#pragma omp parallel num_threads(threads) if (rows * n > FEW)
  {
    std::vector<int32_t> own(step * n + SURE);
#pragma omp for schedule(static)
    for (long i = 0; i < parts; i++) {
      for (long b = i * step; b < std::min(rows, (i + 1) * step); b++)
        found[i] += places_of(own.data() + found[i], b * n, n, names[b], site, key, limit);
      std::memcpy(out + i * step * n, own.data(), found[i] * sizeof(int32_t));
    }
  }
  for (long i = 0; i < parts; many += found[i++])
    std::memmove(out + many, out + i * step * n, found[i] * sizeof(int32_t));
  return many;
}

extern "C" void scale_bfloat16(const bf16* y, const float* g, const float* c, bf16* out, long rows,
                               long n, int threads) {
  scale(y, g, c, out, rows, n, threads);
}

extern "C" void scale_backward_bfloat16(const bf16* z, const bf16* y, const float* g, bf16* to_y,
                                        float* to_g, float* to_c, long rows, long n, int threads) {
  scale_backward(z, y, g, to_y, to_g, to_c, rows, n, threads);
}

// ctypes finds functions by name: rms_norm_float32, rms_norm_bfloat16, ...
#define EXPORT(T, NAME)                                                                            \
  extern "C" void gated_silu_##NAME(const T* gate, const T* up, T* out, long rows,                 \
                                    long n, long to_gate, long to_up, int threads) {               \
    gated<silu>(gate, up, out, rows, n, to_gate, to_up, threads);                                  \
  }                                                                                                \
  extern "C" void gated_gelu_tanh_##NAME(const T* gate, const T* up, T* out, long rows,            \
                                         long n, long to_gate, long to_up, int threads) {          \
    gated<gelu_tanh>(gate, up, out, rows, n, to_gate, to_up, threads);                             \
  }                                                                                                \
  extern "C" void gated_silu_backward_##NAME(const T* g, const T* gate, const T* up, T* to_gate,   \
                                             T* to_up, long n, int threads) {                      \
    gated_backward<silu>(g, gate, up, to_gate, to_up, n, threads);                                 \
  }                                                                                                \
  extern "C" void gated_gelu_tanh_backward_##NAME(const T* g, const T* gate, const T* up,          \
                                                  T* to_gate, T* to_up, long n, int threads) {     \
    gated_backward<gelu_tanh>(g, gate, up, to_gate, to_up, n, threads);                            \
  }                                                                                                \
  extern "C" void rms_norm_##NAME(const T* x, const void* gain, int wide, T* out, long rows,       \
                                  long n, float eps, int threads) {                                \
    if (wide) rms_norm(x, static_cast<const float*>(gain), out, rows, n, eps, threads);            \
    else rms_norm(x, static_cast<const T*>(gain), out, rows, n, eps, threads);                     \
  }                                                                                                \
  extern "C" void rms_norm_backward_##NAME(const T* g, const T* x, const float* gain, T* out,      \
                                           long rows, long n, float eps, int threads) {            \
    rms_norm_backward(g, x, gain, out, rows, n, eps, threads);                                     \
  }                                                                                                \
  extern "C" void rotary_##NAME(const T* x, const T* cos, const T* sin, T* out, long rows,         \
                                long heads, long tokens, long d, long x_row, long x_head,          \
                                long x_token, long to_row, long to_head, long to_token, long turn, \
                                float sign, int threads) {                                         \
    rotary(x, cos, sin, out, rows, heads, tokens, d, places{x_row, x_head, x_token},               \
           places{to_row, to_head, to_token}, turn, sign, threads);                                \
  }                                                                                                \
  extern "C" void softmax_##NAME(T* scores, const T* mask, long rows, long masks, long step,       \
                                 long n, float scale, int threads) {                               \
    softmax(scores, mask, rows, masks, step, n, scale, threads);                                   \
  }                                                                                                \
  extern "C" void softmax_backward_##NAME(T* g, const T* p, long rows, long n, float scale,        \
                                          int threads) {                                           \
    softmax_backward(g, p, rows, n, scale, threads);                                               \
  }                                                                                                \
  extern "C" void cross_entropy_##NAME(T* z, const int64_t* targets, float* losses, long rows,     \
                                       long n, float scale, float cap, int gradient,               \
                                       int threads) {                                              \
    cross_entropy(z, targets, losses, rows, n, scale, cap, gradient, threads);                     \
  }                                                                                                \
  extern "C" void empty_##NAME(T* x, const int32_t* places, long many) {                           \
    empty(x, places, many);                                                                        \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
