// The operations of the engine's forward pass; `ops/decoding.py` has their equations and shapes.
//
// They are batch-invariant: a token's results depend only on its own row, and so does the order of
// summation. Inputs and outputs are float or bfloat16 (raw 16 bits); sums are in fp32.

#include <vector>

#include "decoding.h"

namespace {

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
    dots<G, 1>(wide.data(), p->down + slot * p->rank * in, u.data(), r, in, r);
    if (G == 1) {
      y.resize(p->width);
      combined(u.data(), up, y.data(), out, r, p->width);
    } else {
      averages<G>(u.data(), one.data(), [&](long j) { return up + j * p->width; }, out, r, p->width,
                  width);
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
  dots<G, 2>(q, k, p, keys, d, keys);
  exponentials<G>(p, over, keys, scale, [&](long j) { return load(mask + j); });
  averages<G>(p, over, [&](long j) { return v + j * dv; }, out, keys, dv, dv);
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
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
