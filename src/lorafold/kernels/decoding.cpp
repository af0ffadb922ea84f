// The operations of the engine's forward pass; `ops/decoding.py` has their equations and shapes.
//
// They are batch-invariant: a token's results depend only on its own row, and so does the order of
// summation. Inputs and outputs are float or bfloat16 (raw 16 bits); sums are in fp32.

#include <limits>
#include <vector>

#include "numbers.h"

namespace {

constexpr int GROUP = 4;  // query heads that are computed together

// converts to float, in the order of `load_block`
template <class T>
void widen(const T* x, float* y, long n) {
  long i = 0;
  for (; i + BLOCK <= n; i += BLOCK) store_block(y + i, load_block(x + i));
  for (; i < n; i++) y[i] = load(x + i);
}

// out_gj = x_g . m_j for G widened vectors x and R rows of M, all of length n
template <int G, int R, class T>
inline void dots_of(const float* x, const T* m, float* out, long rows, long n) {
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
      out[g * rows + r] = sum(sums[g][r].a + sums[g][r].b) + rest;
    }
}

template <int G, int R, class T>
void dots(const float* x, const T* m, float* out, long rows, long n) {
  long j = 0;
  for (; j + R <= rows; j += R) dots_of<G, R>(x, m + j * n, out + j, rows, n);
  for (; j < rows; j++) dots_of<G, 1>(x, m + j * n, out + j, rows, n);
}

// out = sum_j a_j m_j, of length n; M is read once and sequentially, and y is a buffer of length n
template <class T>
void combined(const float* a, const T* m, float* y, T* out, long rows, long n) {
  long blocks = n - n % BLOCK;
  std::memset(y, 0, n * sizeof(float));
  for (long j = 0; j < rows; j++, m += n) {
    for (long i = 0; i < blocks; i += BLOCK) {
      prefetch(m + i);
      pair x = load_block(m + i), z = load_block(y + i);
      store_block(y + i, {z.a + a[j] * x.a, z.b + a[j] * x.b});
    }
    for (long i = blocks; i < n; i++) y[i] = std::fma(a[j], load(m + i), y[i]);
  }
  for (long i = 0; i < blocks; i += BLOCK) store_block(out + i, load_block(y + i));
  for (long i = blocks; i < n; i++) store(out + i, y[i]);
}

// out_g = scale_g sum_j a_gj m_j for G outputs of length n, which are summed in registers and
// written with stride `step`
template <int G, class T>
void averages(const float* a, const float* scale, const T* m, T* out, long rows, long n,
              long step) {
  long at = 0;
  for (; at + BLOCK <= n; at += BLOCK) {
    pair y[G] = {};
    for (long j = 0; j < rows; j++) {
      prefetch(m + j * n + at);
      pair x = load_block(m + j * n + at);
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
      for (long j = 0; j < rows; j++) y = std::fma(a[g * rows + j], load(m + j * n + at), y);
      store(out + g * step + at, scale[g] * y);
    }
}

// the factors of one of the matrices that read the same x, as a row of an int64 table
template <class T>
struct part {
  const T *down, *up;
  const int64_t* ranks;  // of each row
  int64_t rank, width;
};

// the low-rank updates of all matrices for G rows of one slot
template <int G, class T>
void low_rank_rows(const T* x, const part<T>* parts, long many, int64_t slot, long row, T* out,
                   long in, long width) {
  std::vector<float> wide(G * in), u, y;
  const std::vector<float> one(G, 1);
  for (int g = 0; g < G; g++) widen(x + g * in, wide.data() + g * in, in);
  for (const part<T>* p = parts; p < parts + many; out += p->width, p++) {
    long r = p->ranks[row];
    const T* up = p->up + slot * p->rank * p->width;
    u.resize(G * r);
    dots<G, 1>(wide.data(), p->down + slot * p->rank * in, u.data(), r, in);
    if (G == 1) {
      y.resize(p->width);
      combined(u.data(), up, y.data(), out, r, p->width);
    } else {
      averages<G>(u.data(), one.data(), up, out, r, p->width, width);
    }
  }
}

template <class T>
void low_rank(const T* x, const part<T>* parts, long many, const int64_t* slots, T* out, long rows,
              long tokens, long in, long width, int threads) {
  // groups of up to GROUP consecutive rows of the same slot
  std::vector<long> starts;
  for (long b = 0; b < rows * tokens;) {
    starts.push_back(b);
    long n = 1;
    while (n < GROUP && b + n < rows * tokens && slots[(b + n) / tokens] == slots[b / tokens]) n++;
    b += n;
  }
  long runs = starts.size();
  starts.push_back(rows * tokens);
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * tokens > 1)
  for (long i = 0; i < runs; i++) {
    long b = starts[i], n = starts[i + 1] - b, row = b / tokens;
    auto compute = n == 1   ? low_rank_rows<1, T>
                   : n == 2 ? low_rank_rows<2, T>
                   : n == 3 ? low_rank_rows<3, T>
                            : low_rank_rows<GROUP, T>;
    compute(x + b * in, parts, many, slots[row], row, out + b * width, in, width);
  }
}

template <int G, class T>
void attend_heads(const float* q, const T* k, const T* v, const T* mask, T* out, float* p,
                  long keys, long d, long dv, float scale) {
  float over[G];
  dots<G, 2>(q, k, p, keys, d);
  for (int g = 0; g < G; g++) {
    float *own = p + g * keys, top = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : top)
    for (long j = 0; j < keys; j++) {
      own[j] = scale * own[j] + load(mask + j);
      top = own[j] > top ? own[j] : top;
    }
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < keys; j++) total += (own[j] = exponential(own[j] - top));
    over[g] = 1 / total;
  }
  averages<G>(p, over, v, out, keys, dv, dv);
}

template <class T>
void attend(const T* q, const T* k, const T* v, const T* mask, T* out, long rows, long heads,
            long tokens, long kv, long keys, long d, long dv, long q_row, long q_head, long q_token,
            long k_row, long k_head, long v_row, long v_head, long m_row, long m_token,
            float scale, int threads) {
  long group = heads / kv;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (rows * tokens > 1)
  for (long at = 0; at < rows * kv * tokens; at++) {
    long t = at % tokens, h = at / tokens % kv, b = at / tokens / kv, first = 0, last = keys;
    const T* m = mask + b * m_row + t * m_token;
    while (last > 0 && load(m + last - 1) == -INFINITY) last--;
    while (first < last && load(m + first) == -INFINITY) first++;
    const T* ks = k + b * k_row + h * k_head + first * d;
    const T* vs = v + b * v_row + h * v_head + first * dv;
    std::vector<float> p(GROUP * (last - first)), query(GROUP * d);
    for (long g = 0; g < group; g += GROUP) {
      long many = group - g < GROUP ? group - g : GROUP;
      for (long i = 0; i < many; i++)
        widen(q + b * q_row + (h * group + g + i) * q_head + t * q_token, query.data() + i * d, d);
      auto compute = many == 1   ? attend_heads<1, T>
                     : many == 2 ? attend_heads<2, T>
                     : many == 3 ? attend_heads<3, T>
                                 : attend_heads<GROUP, T>;
      T* own = out + ((b * tokens + t) * heads + h * group + g) * dv;
      compute(query.data(), ks, vs, m + first, own, p.data(), last - first, d, dv, scale);
    }
  }
}

template <class T>
void write(T* buffer, const T* x, const int64_t* slots, const int64_t* starts, long rows,
           long heads, long tokens, long d, long to_slot, long to_head, long row, long head,
           long token) {
  for (long b = 0; b < rows; b++)
    for (long h = 0; h < heads; h++)
      for (long t = 0; t < tokens; t++)
        std::memcpy(buffer + slots[b] * to_slot + h * to_head + (starts[b] + t) * d,
                    x + b * row + h * head + t * token, d * sizeof(T));
}

}  // namespace

// ctypes finds functions by name: low_rank_float32, low_rank_bfloat16, ...
#define EXPORT(T, NAME)                                                                            \
  extern "C" void low_rank_##NAME(const T* x, const part<T>* parts, long many,                     \
                                  const int64_t* slots, T* out, long rows, long tokens, long in,   \
                                  long width, int threads) {                                       \
    low_rank(x, parts, many, slots, out, rows, tokens, in, width, threads);                        \
  }                                                                                                \
  extern "C" void attend_##NAME(const T* q, const T* k, const T* v, const T* mask, T* out,         \
                                long rows, long heads, long tokens, long kv, long keys, long d,    \
                                long dv, long q_row, long q_head, long q_token, long k_row,        \
                                long k_head, long v_row, long v_head, long m_row, long m_token,    \
                                float scale, int threads) {                                        \
    attend(q, k, v, mask, out, rows, heads, tokens, kv, keys, d, dv, q_row, q_head, q_token,       \
           k_row, k_head, v_row, v_head, m_row, m_token, scale, threads);                          \
  }                                                                                                \
  extern "C" void write_##NAME(T* buffer, const T* x, const int64_t* slots, const int64_t* starts, \
                               long rows, long heads, long tokens, long d, long to_slot,           \
                               long to_head, long row, long head, long token) {                    \
    write(buffer, x, slots, starts, rows, heads, tokens, d, to_slot, to_head, row, head, token);   \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
