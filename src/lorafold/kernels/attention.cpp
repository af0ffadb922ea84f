// Attention inside documents, forward and backward; `lorafold.ops.attention` has its equation.
//
// An item is one head of queries of one document, so that items share no output. Of an item, ROWS
// queries at a time meet the keys that they see: their scores S^T (keys, ROWS) stay in cache, a lane
// of a vector for each query, so that the softmax over the keys needs no sums across lanes. The
// forward takes KEYS of them at a time and keeps a running softmax (Milakov and Gimelshein 2018,
// arXiv 1805.02867). Inputs and outputs are float or bfloat16, all that lies between is fp32.

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "numbers.h"

namespace {

struct lanes {
  vector a, b;
};

constexpr long ROWS = 2 * LANES, STRIP = 8;
constexpr int RUN = LANES / 2;  // rows whose sums are in registers: there are twice LANES
constexpr long KEYS = 512;      // of which the scores exist at a time in the forward
constexpr float LARGE = 3e38f;  // no score

// tokens of queries and of keys before the document, its first own key, its keys
struct document {
  int64_t at, key_at, start, length;
};

// numbers that begin at a whole vector, so that no load of one crosses two lines of the cache
struct aligned {
  std::vector<lanes> all;
  void resize(long n) { all.resize((n + ROWS - 1) / ROWS); }
  void clear(long n) { all.assign((n + ROWS - 1) / ROWS, lanes{}); }
  float* data() { return reinterpret_cast<float*>(all.data()); }
  float& operator[](long i) { return data()[i]; }
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

// C (m, n) = A B, or C + A B, of A (m, k) the element i, j at i * by_row + j * by_column, B (k, n)
// row by row; m is a multiple of STRIP, n of ROWS. RUN rows of ROWS numbers are summed at a time.
template <bool ADD>
void multiply(const float* a, long by_row, long by_column, const float* b, float* c, long m, long k,
              long n) {
  for (long at = 0; at < n; at += ROWS)
    for (long i = 0; i < m; i += RUN) {
      vector sums[RUN][2];
      float* to = c + i * n + at;
#pragma GCC unroll 16
      for (int r = 0; r < RUN; r++)
        for (int half = 0; half < 2; half++)
          sums[r][half] = ADD ? one(to + r * n + half * LANES) : vector{};
      const float *rows = a + i * by_row, *columns = b + at;
      for (long j = 0; j < k; j++, rows += by_column, columns += n) {
        vector x = one(columns), y = one(columns + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < RUN; r++) {
          float f = rows[r * by_row];
          sums[r][0] += f * x;
          sums[r][1] += f * y;
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < RUN; r++) {
        write(to + r * n, sums[r][0]);
        write(to + r * n + LANES, sums[r][1]);
      }
    }
}

// rows of d numbers, `step` apart, as `most` rows of `wide` numbers in fp32, filled up with zeros
template <class T>
void gather(const T* from, long step, long rows, long d, aligned& to, long most, long wide) {
  to.resize(most * wide);
  for (long i = 0; i < rows; i++) {
    float* row = to.data() + i * wide;
    for (long j = 0; j < d; j++) row[j] = load(from + i * step + j);
    std::fill(row + d, row + wide, 0.0f);
  }
  std::fill(to.data() + rows * wide, to.data() + most * wide, 0.0f);
}

// halves of x and y, interleaved: the first if AT is 0, the second if it is LANES / 2
template <int AT, size_t... I>
inline vector mixed(vector x, vector y, std::index_sequence<I...>) {
  return vector{(I % 2 ? y : x)[AT + I / 2]...};
}

// LANES rows of LANES numbers become columns: each stage mixes the first half of the rows with the
// second
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

// ROWS rows of `wide` numbers as columns
void turn(const float* from, long wide, aligned& to) {
  to.resize(wide * ROWS);
  for (long i = 0; i < ROWS; i += LANES)
    for (long j = 0; j < wide; j += LANES) {
      vector x[LANES];
      for (int r = 0; r < LANES; r++) x[r] = one(from + (i + r) * wide + j);
      transpose(x);
      for (int r = 0; r < LANES; r++) write(to.data() + (j + r) * ROWS + i, x[r]);
    }
}

// 1 / x, and 0 for the sum of a query that is none
inline vector reciprocal(vector x) { return x > 0.0f ? 1.0f / x : vector{}; }

// the lanes of the places of queries first, first + 1, ... that see the key
inline vector hidden(vector x, float key, vector place, float window) {
  vector none = vector{} - std::numeric_limits<float>::infinity();
  return (place >= key) & (place - key < window) ? x : none;
}

inline vector places(float first) {
  vector x;
  for (int i = 0; i < LANES; i++) x[i] = first + i;
  return x;
}

// cap tanh(x / cap)
inline vector capped(vector x, float cap) {
  vector e = exponential(x * (2.0f / cap));
  return cap * (1.0f - 2.0f / (e + 1.0f));
}

// what the softmax of ROWS queries has seen: the largest score, the sum of e^(score - largest), and
// that sum weighted by the gradients of the probabilities
struct seen {
  lanes top = {vector{} - LARGE, vector{} - LARGE}, total = {}, along = {};
};

// products S^T (keys, ROWS) of keys `from`, ... become probabilities that are not divided by their
// sums yet; g (keys, ROWS) are their gradients, if there are any. Returns what becomes of the
// weight of the keys before, for queries that saw some.
lanes softmax(float* s, const float* g, long keys, long from, long first, float window,
              float scale, float cap, seen& so) {
  vector at = places(first), after = places(first + LANES);
  lanes top = so.top, total = {}, along = {};
  for (long j = 0; j < keys; j++) {
    lanes x = read(s + j * ROWS);
    x = {scale * x.a, scale * x.b};
    if (cap > 0) x = {capped(x.a, cap), capped(x.b, cap)};
    // a query before the last key, or one whose window may end after the first
    if (from + j > first || first + ROWS - from - j > window)
      x = {hidden(x.a, from + j, at, window), hidden(x.b, from + j, after, window)};
    write(s + j * ROWS, x);
    top = {larger(top.a, x.a), larger(top.b, x.b)};
  }
  for (long j = 0; j < keys; j++) {
    lanes x = read(s + j * ROWS);
    x = {weight_of(x.a - top.a), weight_of(x.b - top.b)};
    write(s + j * ROWS, x);
    total = {total.a + x.a, total.b + x.b};
    if (g) {
      lanes y = read(g + j * ROWS);
      along = {along.a + x.a * y.a, along.b + x.b * y.b};
    }
  }
  lanes kept = {weight_of(so.top.a - top.a), weight_of(so.top.b - top.b)};
  so = {top, {kept.a * so.total.a + total.a, kept.b * so.total.b + total.b}, along};
  return kept;
}

// the queries `first`, ... of a document and the keys that they see
struct tile {
  long first, rows, from, keys;

  tile(const document& doc, long first, float window)
      : first(first), rows(std::min(ROWS, doc.length - first)) {
    from = window < first ? first - static_cast<long>(window) + 1 : 0;
    from -= from % STRIP;
    keys = first + rows - from;
  }
};

template <class T>
struct matrices {
  const T *q, *k, *v;
  long q_token, q_head, k_token, k_head, v_token, v_head;
};

// memory of one thread, in fp32; `s` and `gs` have a row of ROWS queries for each key
struct memory {
  aligned k, v, s, gs, slope, q, g, q_rows, g_rows, out, gk, gv;
};

template <class T>
void forward(const matrices<T>& m, const document& doc, long h, long group, long heads, long d,
             long dv, float window, float scale, float cap, T* out, memory& x) {
  long wide = padded(d, ROWS), of_v = padded(dv, ROWS), most = padded(doc.length, STRIP);
  const T *k = m.k + doc.key_at * m.k_token + h / group * m.k_head,
          *v = m.v + doc.key_at * m.v_token + h / group * m.v_head;
  gather(k, m.k_token, doc.length, d, x.k, most, wide);
  gather(v, m.v_token, doc.length, dv, x.v, most, of_v);
  x.s.resize(std::min(most, KEYS) * ROWS);
  for (long first = doc.start; first < doc.length; first += ROWS) {
    tile t(doc, first, window);
    long token = doc.at + first - doc.start;
    gather(m.q + token * m.q_token + h * m.q_head, m.q_token, t.rows, d, x.q_rows, ROWS, wide);
    turn(x.q_rows.data(), wide, x.q);
    x.out.clear(ROWS * of_v);
    seen so;
    float factor[ROWS];
    for (long from = t.from; from < t.from + t.keys; from += KEYS) {
      long keys = std::min(KEYS, t.from + t.keys - from);
      multiply<false>(x.k.data() + from * wide, wide, 1, x.q.data(), x.s.data(),
                      padded(keys, STRIP), d, ROWS);
      write(factor, softmax(x.s.data(), nullptr, keys, from, first, window, scale, cap, so));
      for (long i = 0; i < ROWS; i++)
        for (long j = 0; j < of_v; j++) x.out[i * of_v + j] *= factor[i];
      multiply<true>(x.s.data(), 1, ROWS, x.v.data() + from * of_v, x.out.data(), ROWS, keys, of_v);
    }
    write(factor, lanes{1.0f / so.total.a, 1.0f / so.total.b});
    for (long i = 0; i < t.rows; i++) {
      T* to = out + ((token + i) * heads + h) * dv;
      for (long j = 0; j < dv; j++) store(to + j, factor[i] * x.out[i * of_v + j]);
    }
  }
}

// to_k and to_v (length, ...) are of this head alone
template <class T>
void backward(const matrices<T>& m, const T* g, const document& doc, long h, long group,
              long heads, long d, long dv, float window, float scale, float cap, T* to_q,
              float* to_k, float* to_v, memory& x) {
  long wide = padded(d, ROWS), of_v = padded(dv, ROWS), most = padded(doc.length, STRIP);
  const T *k = m.k + doc.key_at * m.k_token + h / group * m.k_head,
          *v = m.v + doc.key_at * m.v_token + h / group * m.v_head;
  gather(k, m.k_token, doc.length, d, x.k, most, wide);
  gather(v, m.v_token, doc.length, dv, x.v, most, of_v);
  x.s.resize(most * ROWS);
  x.gs.resize(most * ROWS);
  x.slope.resize(cap > 0 ? most * ROWS : 0);
  x.out.resize(ROWS * wide);
  x.gk.clear(most * wide);
  x.gv.clear(most * of_v);
  float *s = x.s.data(), *gs = x.gs.data(), *slope = x.slope.data();
  for (long first = doc.start; first < doc.length; first += ROWS) {
    tile t(doc, first, window);
    long token = doc.at + first - doc.start, keys = padded(t.keys, STRIP);
    const T *q = m.q + token * m.q_token + h * m.q_head, *gi = g + (token * heads + h) * dv;
    gather(q, m.q_token, t.rows, d, x.q_rows, ROWS, wide);
    gather(gi, heads * dv, t.rows, dv, x.g_rows, ROWS, of_v);
    turn(x.q_rows.data(), wide, x.q);
    turn(x.g_rows.data(), of_v, x.g);
    multiply<false>(x.k.data() + t.from * wide, wide, 1, x.q.data(), s, keys, d, ROWS);
    multiply<false>(x.v.data() + t.from * of_v, of_v, 1, x.g.data(), gs, keys, dv, ROWS);
    for (long j = 0; cap > 0 && j < t.keys; j++) {
      lanes y = read(s + j * ROWS);
      y = {capped(scale * y.a, cap) / cap, capped(scale * y.b, cap) / cap};
      write(slope + j * ROWS, lanes{1.0f - y.a * y.a, 1.0f - y.b * y.b});
    }
    seen so;
    softmax(s, gs, t.keys, t.from, first, window, scale, cap, so);
    lanes over = {reciprocal(so.total.a), reciprocal(so.total.b)};
    lanes along = {over.a * so.along.a, over.b * so.along.b};
    for (long j = 0; j < t.keys; j++) {
      lanes p = read(s + j * ROWS), y = read(gs + j * ROWS);
      p = {p.a * over.a, p.b * over.b};
      y = {scale * p.a * (y.a - along.a), scale * p.b * (y.b - along.b)};
      if (cap > 0) {
        lanes z = read(slope + j * ROWS);
        y = {y.a * z.a, y.b * z.b};
      }
      write(s + j * ROWS, p);
      write(gs + j * ROWS, y);
    }
    std::fill(s + t.keys * ROWS, s + keys * ROWS, 0.0f);
    std::fill(gs + t.keys * ROWS, gs + keys * ROWS, 0.0f);
    multiply<true>(s, ROWS, 1, x.g_rows.data(), x.gv.data() + t.from * of_v, keys, ROWS, of_v);
    multiply<true>(gs, ROWS, 1, x.q_rows.data(), x.gk.data() + t.from * wide, keys, ROWS, wide);
    multiply<false>(gs, 1, ROWS, x.k.data() + t.from * wide, x.out.data(), ROWS, t.keys, wide);
    for (long i = 0; i < t.rows; i++) {
      T* to = to_q + ((token + i) * heads + h) * d;
      for (long j = 0; j < d; j++) store(to + j, x.out[i * wide + j]);
    }
  }
  for (long i = 0; i < doc.length; i++) {
    std::memcpy(to_k + i * d, x.gk.data() + i * wide, d * sizeof(float));
    std::memcpy(to_v + i * dv, x.gv.data() + i * of_v, dv * sizeof(float));
  }
}

// the gradients of a group's heads, each (length, d), added up to (length, kv heads, d)
template <class T>
void add_up(float* parts, T* out, long length, long group, long step, long d) {
  for (long i = 0; i < length; i++) {
    float* row = parts + i * d;
    for (long g = 1; g < group; g++)
      for (long j = 0; j < d; j++) row[j] += parts[(g * length + i) * d + j];
    for (long j = 0; j < d; j++) store(out + i * step + j, row[j]);
  }
}

template <class T>
void attend(const T* q, const T* k, const T* v, T* out, const document* docs, long many, long heads,
            long kv, long d, long dv, const int64_t* strides, float window, float scale, float cap,
            int threads) {
  matrices<T> m = {q, k, v, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]};
#pragma omp parallel num_threads(threads)
  {
    memory own;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < many * heads; i++)
      forward(m, docs[i / heads], i % heads, heads / kv, heads, d, dv, window, scale, cap, out,
              own);
  }
}

// of_k and of_v (keys, heads, ...) are memory for the gradients of each head of queries
template <class T>
void attend_backward(const T* g, const T* q, const T* k, const T* v, T* to_q, T* to_k, T* to_v,
                     float* of_k, float* of_v, const document* docs, long many, long heads, long kv,
                     long d, long dv, const int64_t* strides, float window, float scale, float cap,
                     int threads) {
  matrices<T> m = {q, k, v, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]};
  long group = heads / kv;
#pragma omp parallel num_threads(threads)
  {
    memory own;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < many * heads; i++) {
      const document& doc = docs[i / heads];
      long h = i % heads, at = doc.key_at * heads + h * doc.length;
      backward(m, g, doc, h, group, heads, d, dv, window, scale, cap, to_q, of_k + at * d,
               of_v + at * dv, own);
    }
#pragma omp for schedule(static)
    for (long i = 0; i < many * kv; i++) {
      const document& doc = docs[i / kv];
      long h = i % kv, at = doc.key_at * heads + h * group * doc.length;
      add_up(of_k + at * d, to_k + (doc.key_at * kv + h) * d, doc.length, group, kv * d, d);
      add_up(of_v + at * dv, to_v + (doc.key_at * kv + h) * dv, doc.length, group, kv * dv, dv);
    }
  }
}

}  // namespace

// ctypes finds functions by name: attend_float32, attend_bfloat16, ...
#define EXPORT(T, NAME)                                                                            \
  extern "C" void attend_##NAME(const T* q, const T* k, const T* v, T* out, const document* docs,  \
                                long many, long heads, long kv, long d, long dv,                   \
                                const int64_t* strides, float window, float scale, float cap,      \
                                int threads) {                                                     \
    attend(q, k, v, out, docs, many, heads, kv, d, dv, strides, window, scale, cap, threads);      \
  }                                                                                                \
  extern "C" void attend_backward_##NAME(                                                          \
      const T* g, const T* q, const T* k, const T* v, T* to_q, T* to_k, T* to_v, float* of_k,      \
      float* of_v, const document* docs, long many, long heads, long kv, long d, long dv,          \
      const int64_t* strides, float window, float scale, float cap, int threads) {                 \
    attend_backward(g, q, k, v, to_q, to_k, to_v, of_k, of_v, docs, many, heads, kv, d, dv,        \
                    strides, window, scale, cap, threads);                                         \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
