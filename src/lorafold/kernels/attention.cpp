// Attention within documents, forward and backward; `lorafold.ops.attention` has its equation.
//
// An item is the queries of one document that attend to one key head, or a part of these queries,
// so that the keys are copied once for all query heads of their group. The rows of an item are its
// queries, ordered by token. They are processed ROWS at a time: the scores S^T (keys, ROWS) stay in
// cache, with one vector lane for each query, so that the softmax over the keys needs no sums
// across lanes. The forward pass processes KEYS keys at a time with an online softmax (Milakov and
// Gimelshein 2018, arXiv 1805.02867). Inputs and outputs are float or bfloat16, and intermediate
// values are fp32, except the bfloat16 factors of AMX matmuls.

#include <algorithm>
#include <limits>
#include <vector>

#include "matrix_units.h"

namespace {

constexpr long KEYS = 256;    // keys whose scores are in memory at a time in the forward pass
constexpr float LARGE = 3e38f;  // larger than any score

// the number of query tokens and of keys before the document, the index of its first own key, and
// its number of keys
struct document {
  int64_t at, key_at, start, length;
};

// rows [begin, end) of the queries of a document that attend to key head `head`
struct item {
  document doc;
  long head, begin, end;
};

// the number of documents, query heads and key heads, the sizes of a key and a value, the number
// of parts into which the rows of a key head are divided, the number of tokens with keys, and the
// token of each key (null if key i is token i)
struct sizes {
  long many, heads, kv, d, dv, parts, tokens;
  const int64_t* token_of;
  float window, scale, cap;

  long group() const { return heads / kv; }
  long items() const { return many * kv * parts; }

  item at(const document* docs, long i) const {
    const document& doc = docs[i / (kv * parts)];
    long rows = (doc.length - doc.start) * group(), each = padded((rows + parts - 1) / parts, ROWS);
    long begin = std::min(rows, i % parts * each);
    return {doc, i / parts % kv, begin, std::min(rows, begin + each)};
  }
};

// 1 / x, or 0 for the sum of a padding row
inline vector reciprocal(vector x) { return x > 0.0f ? 1.0f / x : vector{}; }

// x in the lanes whose queries, at these positions, see the key; -infinity in the others
inline vector hidden(vector x, float key, vector place, float window) {
  vector none = vector{} - std::numeric_limits<float>::infinity();
  return (place >= key) & (place - key < window) ? x : none;
}

// cap tanh(x / cap)
inline vector capped(vector x, float cap) {
  vector e = exponential(x * (2.0f / cap));
  return cap * (1.0f - 2.0f / (e + 1.0f));
}

// ROWS queries of an item, starting at row `first`, their positions in the document, and the keys
// that they see, starting at a multiple of `strip`
struct tile {
  long first, rows, from, keys;
  float low, high;
  lanes places;

  tile(const item& own, long first, const sizes& n, long strip)
      : first(first), rows(std::min(ROWS, own.end - first)) {
    float place[ROWS];
    for (long i = 0; i < ROWS; i++) place[i] = own.doc.start + (first + i) / n.group();
    low = place[0], high = place[rows - 1];
    places = read(place);
    from = n.window < low ? static_cast<long>(low) - static_cast<long>(n.window) + 1 : 0;
    from -= from % strip;
    keys = static_cast<long>(high) + 1 - from;
  }
};

// the state of an online softmax of ROWS queries: the largest score, the sum of
// e^(score - largest), and this sum weighted by the gradients of the probabilities
struct seen {
  lanes top = {vector{} - LARGE, vector{} - LARGE}, total = {}, along = {};
};

// turns the products S^T (keys, ROWS) of the keys starting at `from` into probabilities that are
// not yet divided by their sums; g (keys, ROWS) are the gradients of the probabilities, or null.
// Returns the factors by which the weights of earlier keys change.
lanes softmax(float* s, const float* g, long keys, long from, const tile& t, const sizes& n,
              seen& so) {
  lanes top = so.top, total = {}, along = {};
  for (long j = 0; j < keys; j++) {
    lanes x = read(s + j * ROWS);
    x = {n.scale * x.a, n.scale * x.b};
    if (n.cap > 0) x = {capped(x.a, n.cap), capped(x.b, n.cap)};
    float key = from + j;
    if (key > t.low || t.high - key >= n.window)
      x = {hidden(x.a, key, t.places.a, n.window), hidden(x.b, key, t.places.b, n.window)};
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

// rows of a tensor: `group` rows for each token, with stride `head`
template <class T>
struct rows_of {
  T* from;
  long token, head = 0, group = 1, first = 0;
  T* operator()(long i) const {
    return from + (first + i) / group * token + (first + i) % group * head;
  }
};

// the rows of a tile's queries in a tensor (tokens, heads, d) with these strides
template <class T>
rows_of<T> queries(T* x, const item& own, const tile& t, const sizes& n, long token, long head) {
  return {x + own.doc.at * token + own.head * n.group() * head, token, head, n.group(), t.first};
}

// the rows of a document's keys or values
template <class T>
struct keys_of {
  T* from;
  long token;
  const int64_t* token_of;
  T* operator()(long i) const { return from + (token_of ? token_of[i] : i) * token; }
};

template <class T>
keys_of<T> keys(T* x, const item& own, const sizes& n, long token, long head) {
  x += own.head * head;
  if (n.token_of) return {x, token, n.token_of + own.doc.key_at};
  return {x + own.doc.key_at * token, token, nullptr};
}

template <class T>
struct matrices {
  const T *q, *k, *v;
  long q_token, q_head, k_token, k_head, v_token, v_head;
};

// the memory of one thread; `s` and `gs` have a row of ROWS queries for each key
template <class By>
struct memory {
  typename By::operand k, v, q, g, p, gp;
  aligned s, gs, slope, sums, rows, gk, gv;

  // writes `factor` times the sums (d, ROWS), transposed, to the rows of a tile
  template <class Row>
  void put(long d, long rows_there, lanes factor, Row row) {
    long wide = padded(d, ROWS);
    for (long j = 0; j < d; j++) {
      lanes x = read(sums.data() + j * ROWS);
      write(sums.data() + j * ROWS, lanes{factor.a * x.a, factor.b * x.b});
    }
    rows.resize(ROWS * wide);
    turn(sums.data(), ROWS, wide, ROWS, rows.data(), wide);
    for (long i = 0; i < rows_there; i++) {
      auto to = row(i);
      for (long j = 0; j < d; j++) store(to + j, rows.data()[i * wide + j]);
    }
  }
};

template <class By, class T>
void forward(const matrices<T>& m, const item& own, const sizes& n, T* out, memory<By>& x) {
  long wide = padded(n.d, By::STRIP), of_v = padded(n.dv, ROWS), length = own.doc.length;
  x.k.gather(length, n.d, keys(m.k, own, n, m.k_token, m.k_head));
  x.v.gather(length, n.dv, keys(m.v, own, n, m.v_token, m.v_head));
  x.v.turn_left();
  x.s.resize(std::min(padded(length, ROWS), KEYS) * ROWS);
  float* s = x.s.data();
  for (long first = own.begin; first < own.end; first += ROWS) {
    tile t(own, first, n, By::STRIP);
    x.q.gather(t.rows, n.d, queries(m.q, own, t, n, m.q_token, m.q_head));
    x.q.turn_right();
    x.sums.clear(of_v * ROWS);
    seen so;
    for (long from = t.from; from < t.from + t.keys; from += KEYS) {
      long keys = std::min(KEYS, t.from + t.keys - from), all = padded(keys, By::STRIP);
      By::template multiply<false>(x.k.rows(from), x.q.turned(), s, all, wide, ROWS);
      lanes kept = softmax(s, nullptr, keys, from, t, n, so);
      std::fill(s + keys * ROWS, s + all * ROWS, 0.0f);
      for (long j = 0; from > t.from && j < of_v; j++) {
        lanes y = read(x.sums.data() + j * ROWS);
        write(x.sums.data() + j * ROWS, lanes{kept.a * y.a, kept.b * y.b});
      }
      x.p.take(s, all);
      x.p.pair();
      By::template multiply<true>(x.v.turned(from), x.p.rows(), x.sums.data(), of_v, all, ROWS);
    }
    x.put(n.dv, t.rows, {1.0f / so.total.a, 1.0f / so.total.b},
          queries(out, own, t, n, n.heads * n.dv, n.dv));
  }
}

// to_k and to_v have a row for each key of this item, and are not shared with other items
template <class By, class T>
void backward(const matrices<T>& m, const T* g, const item& own, const sizes& n, T* to_q,
              float* to_k, float* to_v, memory<By>& x) {
  long wide = padded(n.d, ROWS), of_v = padded(n.dv, ROWS), length = own.doc.length,
       most = padded(length, ROWS);
  x.k.gather(length, n.d, keys(m.k, own, n, m.k_token, m.k_head));
  x.k.turn_left();
  x.v.gather(length, n.dv, keys(m.v, own, n, m.v_token, m.v_head));
  x.s.resize(most * ROWS);
  x.gs.resize(most * ROWS);
  x.slope.resize(n.cap > 0 ? most * ROWS : 0);
  x.sums.resize(wide * ROWS);
  x.gk.clear(most * wide);
  x.gv.clear(most * of_v);
  float *s = x.s.data(), *gs = x.gs.data(), *slope = x.slope.data();
  for (long first = own.begin; first < own.end; first += ROWS) {
    tile t(own, first, n, By::STRIP);
    long keys = padded(t.keys, By::STRIP);
    x.q.gather(t.rows, n.d, queries(m.q, own, t, n, m.q_token, m.q_head));
    x.g.gather(t.rows, n.dv, queries(g, own, t, n, n.heads * n.dv, n.dv));
    x.q.turn_right();
    x.g.turn_right();
    By::template multiply<false>(x.k.rows(t.from), x.q.turned(), s, keys, wide, ROWS);
    By::template multiply<false>(x.v.rows(t.from), x.g.turned(), gs, keys, of_v, ROWS);
    for (long j = 0; n.cap > 0 && j < t.keys; j++) {
      lanes y = read(s + j * ROWS);
      y = {capped(n.scale * y.a, n.cap) / n.cap, capped(n.scale * y.b, n.cap) / n.cap};
      write(slope + j * ROWS, lanes{1.0f - y.a * y.a, 1.0f - y.b * y.b});
    }
    seen so;
    softmax(s, gs, t.keys, t.from, t, n, so);
    lanes over = {reciprocal(so.total.a), reciprocal(so.total.b)};
    lanes along = {over.a * so.along.a, over.b * so.along.b};
    for (long j = 0; j < t.keys; j++) {
      lanes p = read(s + j * ROWS), y = read(gs + j * ROWS);
      p = {p.a * over.a, p.b * over.b};
      y = {n.scale * p.a * (y.a - along.a), n.scale * p.b * (y.b - along.b)};
      if (n.cap > 0) {
        lanes z = read(slope + j * ROWS);
        y = {y.a * z.a, y.b * z.b};
      }
      write(s + j * ROWS, p);
      write(gs + j * ROWS, y);
    }
    std::fill(s + t.keys * ROWS, s + keys * ROWS, 0.0f);
    std::fill(gs + t.keys * ROWS, gs + keys * ROWS, 0.0f);
    x.p.take(s, keys);
    x.gp.take(gs, keys);
    x.gp.pair();
    x.q.pair();
    x.g.pair();
    By::template multiply<true>(x.p.rows(0), x.g.rows(), x.gv.data() + t.from * of_v, keys, ROWS,
                                of_v);
    By::template multiply<true>(x.gp.rows(0), x.q.rows(), x.gk.data() + t.from * wide, keys, ROWS,
                                wide);
    By::template multiply<false>(x.k.turned(t.from), x.gp.rows(), x.sums.data(), wide, keys, ROWS);
    x.put(n.d, t.rows, {vector{} + 1.0f, vector{} + 1.0f},
          queries(to_q, own, t, n, n.heads * n.d, n.d));
  }
  for (long i = 0; i < length; i++) {
    long row = i * n.kv * n.parts;
    std::memcpy(to_k + row * n.d, x.gk.data() + i * wide, n.d * sizeof(float));
    std::memcpy(to_v + row * n.dv, x.gv.data() + i * of_v, n.dv * sizeof(float));
  }
}

// the keys grouped by token: token i has the keys[begin[i]], ..., keys[begin[i + 1] - 1]
struct places {
  std::vector<long> begin, keys;

  places(const int64_t* token_of, long tokens, long all) : begin(tokens + 2), keys(all) {
    for (long i = 0; i < all; i++) begin[(token_of ? token_of[i] : i) + 2]++;
    for (long i = 2; i < tokens + 2; i++) begin[i] += begin[i - 1];
    for (long i = 0; i < all; i++) keys[begin[(token_of ? token_of[i] : i) + 1]++] = i;
  }
};

// sums the gradients of a token's keys, each (kv heads, parts, d), to (kv heads, d)
template <class T>
void add_up(const float* of_keys, const places& of, long token, T* out, const sizes& n, long d,
            float* sums) {
  for (long h = 0; h < n.kv; h++) {
    std::fill(sums, sums + d, 0.0f);
    for (long i = of.begin[token]; i < of.begin[token + 1]; i++)
      for (long part = 0; part < n.parts; part++) {
        const float* row = of_keys + ((of.keys[i] * n.kv + h) * n.parts + part) * d;
        for (long j = 0; j < d; j++) sums[j] += row[j];
      }
    for (long j = 0; j < d; j++) store(out + (token * n.kv + h) * d + j, sums[j]);
  }
}

template <class By, class T>
void attend(const matrices<T>& m, T* out, const document* docs, const sizes& n, int threads) {
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] typename By::configured tiles;
    memory<By> own;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < n.items(); i++) forward(m, n.at(docs, i), n, out, own);
  }
}

// of_k and of_v (keys, kv heads, parts, ...) are buffers for the gradients of each item
template <class By, class T>
void attend_backward(const matrices<T>& m, const T* g, T* to_q, T* to_k, T* to_v, float* of_k,
                     float* of_v, const document* docs, const sizes& n, int threads) {
  const places of(n.token_of, n.tokens, docs[n.many - 1].key_at + docs[n.many - 1].length);
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] typename By::configured tiles;
    memory<By> own;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < n.items(); i++) {
      item it = n.at(docs, i);
      long at = it.doc.key_at * n.kv * n.parts + i % (n.kv * n.parts);
      backward(m, g, it, n, to_q, of_k + at * n.d, of_v + at * n.dv, own);
    }
    own.s.resize(std::max(n.d, n.dv));
#pragma omp for schedule(static)
    for (long i = 0; i < n.tokens; i++) {
      add_up(of_k, of, i, to_k, n, n.d, own.s.data());
      add_up(of_v, of, i, to_v, n, n.dv, own.s.data());
    }
  }
}

// calls with AMX if it is available and T is bf16, otherwise with fp32 matmuls
template <class T, class Call>
void multiplied(Call call) {
#ifdef MATRIX_UNITS
  if constexpr (std::is_same_v<T, bf16>)
    if (matrix_units::there()) return call(matrix_units{});
#endif
  call(single{});
}

}  // namespace

// ctypes finds functions by name: attend_float32, attend_bfloat16, ...
#define SIZES                                                                                      \
  const document *docs, long many, long heads, long kv, long d, long dv, long parts, long tokens,  \
      const int64_t *token_of, const int64_t *by, float window, float scale, float cap, int threads
#define EXPORT(T, NAME)                                                                            \
  extern "C" void attend_##NAME(const T* q, const T* k, const T* v, T* out, SIZES) {               \
    matrices<T> m = {q, k, v, by[0], by[1], by[2], by[3], by[4], by[5]};                           \
    sizes n = {many, heads, kv, d, dv, parts, tokens, token_of, window, scale, cap};               \
    multiplied<T>([&](auto how) { attend<decltype(how)>(m, out, docs, n, threads); });             \
  }                                                                                                \
  extern "C" void attend_backward_##NAME(const T* g, const T* q, const T* k, const T* v, T* to_q,  \
                                         T* to_k, T* to_v, float* of_k, float* of_v, SIZES) {      \
    matrices<T> m = {q, k, v, by[0], by[1], by[2], by[3], by[4], by[5]};                           \
    sizes n = {many, heads, kv, d, dv, parts, tokens, token_of, window, scale, cap};               \
    multiplied<T>([&](auto how) {                                                                  \
      attend_backward<decltype(how)>(m, g, to_q, to_k, to_v, of_k, of_v, docs, n, threads);        \
    });                                                                                            \
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
