// A step of a planned decoder (`engine/plan.py`): all layers over all tokens of a batch, with
// activations in fp32 and keys and values in blocks. A token's results depend only on its sequence.

#include <algorithm>
#include <new>
#include <vector>

#include "decoding.h"
#include "tiles.h"

namespace {

constexpr long KEYS = 32;  // of a block
constexpr long RANK = 64;  // the largest rank

// one of the concatenated matrices of a product
struct part {
  int64_t at, out, width, index;
};

// an adapter's update of a part: y = gain (y + up down x) + shift, each of them or null
template <class T>
struct update {
  const T *down, *up;  // (rank, in) and (out, rank), packed
  int64_t rank;        // a multiple of TILE
  const float *gain, *shift;
};

template <class T>
struct matrix {
  const T* weight;
  const float* bias;
  int64_t out, in, width, many;
  const part* parts;
};

template <class T>
struct layer {
  const float *before_attention, *after_attention, *before_mlp, *after_mlp, *of_query, *of_key;
  matrix<T> qkv, output, gate_up, down;
  T *keys, *values;         // (blocks, kv, KEYS, d)
  const float *cos, *sin;   // (positions, rotated), or null
  int64_t window;           // 0: none
};

template <class T>
struct decoder {
  int64_t many, hidden, heads, kv, d, rotated, mlp, activation, query_norm, key_norm;
  double eps, scale, scaling;  // of embeddings, of attention
  const layer<T>* layers;
  const T* embedding;
  const float* norm;
  matrix<T> head;
};

template <class T>
struct batch {
  int64_t tokens, outputs, to_table;
  const int64_t *ids, *positions, *sequence;
  const update<T>* const* adapters;  // of each token, null for the base
  const int64_t* wanted;             // tokens whose logits are returned
  const int64_t* tables;             // (sequences, to_table), indices of blocks
};

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

inline void narrow(float* to, vector x) { std::memcpy(to, &x, sizeof x); }
inline void narrow(bf16* to, vector x) {
  halves h = __builtin_convertvector(rounded(x) >> 16, halves);
  std::memcpy(to, &h, sizeof h);
}

template <class From, class To>
void convert(const From* x, To* y, long n) {
#pragma omp simd
  for (long i = 0; i < n; i++) store(y + i, load(x + i));
}

// y (rows, out) = x W^T + b, then the updates of each row's adapter
template <class T>
void product(const inputs<T>* x, const update<T>* const* adapters, long rows, const matrix<T>& m,
             float* y, int threads) {
  auto all = m.bias ? strips<true, T> : strips<false, T>;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long at = 0; at < m.out; at += m.width) {
    if (m.bias)
      for (long r = 0; r < rows; r++)
        std::memcpy(y + r * m.out + at, m.bias + at, m.width * sizeof(float));
    all(x, m.in, rows, m.weight + at * m.in, m.width, m.width, m.in, y + at, m.out);
  }
  if (!m.many) return;
  std::vector<long> starts;  // of up to MOST consecutive rows with one adapter
  for (long r = 0, n; r < rows; r += n) {
    for (n = 1; n < MOST && r + n < rows && adapters[r + n] == adapters[r];) n++;
    if (adapters[r]) starts.push_back(r), starts.push_back(n);
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long i = 0; i < (long)starts.size() / 2 * m.many; i++) {
    const part& p = m.parts[i % m.many];
    long r = starts[i / m.many * 2], n = starts[i / m.many * 2 + 1];
    const update<T>& a = adapters[r][p.index];
    float* to = y + r * m.out + p.at;
    if (a.rank) {
      alignas(64) float u[MOST * RANK];
      alignas(64) inputs<T> v[MOST * RANK];
      strips<false, T>(x + r * m.in, m.in, n, a.down, a.rank, a.rank, m.in, u, a.rank);
      convert(u, v, n * a.rank);
      for (long c = 0; c < p.out; c += p.width)
        strips<true, T>(v, a.rank, n, a.up + c * a.rank, p.width, p.width, a.rank, to + c, m.out);
    }
    for (long k = 0; k < n && (a.gain || a.shift); k++)
      for (long c = 0; c < p.out; c++) {
        float& at = to[k * m.out + c];
        at = at * (a.gain ? a.gain[c] : 1) + (a.shift ? a.shift[c] : 0);
      }
  }
}

// out (G, d) = softmax(scaling q k^T) v over a sequence's keys from `first` to `last`
template <int G, class T>
void attend(const float* q, const layer<T>& l, const int64_t* table, long head, long kv, long first,
            long last, long d, float scaling, T* out) {
  thread_local std::vector<float> scores;
  long keys = last - first;
  scores.resize(G * keys);
  float *p = scores.data(), over[G];
  auto row = [&](const T* of, long at) {
    return of + ((table[at / KEYS] * kv + head) * KEYS + at % KEYS) * d;
  };
  for (long at = first, n; at < last; at += n) {
    n = std::min(KEYS - at % KEYS, last - at);
    dots<G, 2>(q, row(l.keys, at), p + at - first, n, d, keys);
  }
  exponentials<G>(p, over, keys, scaling, [](long) { return 0.0f; });
  averages<G>(p, over, [&](long j) { return row(l.values, first + j); }, out, keys, d, d);
}

// queries and keys in place: norms, rotation; keys and values go to their blocks
template <class T>
void place(const decoder<T>& m, const layer<T>& l, const batch<T>& b, long t, float* y) {
  long d = m.d, at = b.positions[t], of = m.heads * d;
  float *q = y, *k = y + of, *v = k + m.kv * d;
  if (l.of_query)
    rms_norm(q, l.of_query, q, of / m.query_norm, m.query_norm, m.eps, 1);
  if (l.of_key)
    rms_norm(k, l.of_key, k, m.kv * d / m.key_norm, m.key_norm, m.eps, 1);
  if (l.cos) {
    places heads{0, d, 0};
    const float *cos = l.cos + at * m.rotated, *sin = l.sin + at * m.rotated;
    rotary(q, cos, sin, q, 1, m.heads, 1, m.rotated, heads, heads, 0, 1, 1);
    rotary(k, cos, sin, k, 1, m.kv, 1, m.rotated, heads, heads, 0, 1, 1);
  }
  const int64_t* table = b.tables + b.sequence[t] * b.to_table;
  for (long h = 0; h < m.kv; h++) {
    long to = ((table[at / KEYS] * m.kv + h) * KEYS + at % KEYS) * d;
    convert(k + h * d, l.keys + to, d);
    convert(v + h * d, l.values + to, d);
  }
}

template <class T>
void attention(const decoder<T>& m, const layer<T>& l, const batch<T>& b, const float* y, long wide,
               T* out, int threads) {
  long d = m.d, group = m.heads / m.kv;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long i = 0; i < b.tokens * m.kv; i++) {
    long t = i / m.kv, h = i % m.kv, last = b.positions[t] + 1;
    long first = l.window && last > l.window ? last - l.window : 0;
    const int64_t* table = b.tables + b.sequence[t] * b.to_table;
    for (long g = 0; g < group; g += GROUP) {
      long many = group - g < GROUP ? group - g : GROUP, head = h * group + g;
      std::vector<T> rounded(many * d);
      std::vector<float> q(GROUP * d);
      convert(y + t * wide + head * d, rounded.data(), many * d);
      for (long j = 0; j < many; j++) widen(rounded.data() + j * d, q.data() + j * d, d);
      auto compute = many == 1   ? attend<1, T>
                     : many == 2 ? attend<2, T>
                     : many == 3 ? attend<3, T>
                                 : attend<GROUP, T>;
      compute(q.data(), l, table, h, m.kv, first, last, d, m.scaling,
              out + (t * m.heads + head) * d);
    }
  }
}

// x (rows, n) = act(gate) up, for y (rows, 2 n) of gates and ups
template <class Act, class X>
void gate(const float* y, X* x, long rows, long n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > FEW)
  for (long r = 0; r < rows; r++)
    for (long i = 0; i < n; i += LANES) {
      const float* from = y + r * 2 * n + i;
      narrow(x + r * n + i, activated<Act>(read<vector>(from), read<vector>(from + n)));
    }
}

// h += y, normalized if there is a gain
void onto(float* h, float* y, const float* gain, const long rows, long n, float eps, int threads) {
  if (gain) rms_norm(y, gain, y, rows, n, eps, threads);
  for (long i = 0; i < rows * n; i++) h[i] += y[i];
}

template <class X>
void norm(const float* h, const float* gain, X* x, long rows, long n, float eps, int threads) {
  if (gain)
    rms_norm(h, gain, x, rows, n, eps, threads);
  else
    convert(h, x, rows * n);
}

// logits (outputs, head.out); stops between layers if *stop is set
template <class T>
int step(const decoder<T>& m, const batch<T>& b, float* logits, const volatile int* stop,
         int threads) {
  using X = inputs<T>;
  long n = b.tokens, wide = (m.heads + 2 * m.kv) * m.d, most = 2 * m.mlp > wide ? 2 * m.mlp : wide;
  std::vector<float> h(n * m.hidden), y(n * most);
  std::vector<X> x(n * std::max({m.hidden, m.mlp, m.heads * m.d}));
  std::vector<T> mixed(n * m.heads * m.d);
  for (long t = 0; t < n; t++)
    for (long i = 0; i < m.hidden; i++)
      h[t * m.hidden + i] = m.scale * load(m.embedding + b.ids[t] * m.hidden + i);
  for (const layer<T>* l = m.layers; l < m.layers + m.many; l++) {
    if (*stop) return 1;
    norm(h.data(), l->before_attention, x.data(), n, m.hidden, m.eps, threads);
    product(x.data(), b.adapters, n, l->qkv, y.data(), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (n * wide > FEW)
    for (long t = 0; t < n; t++) place(m, *l, b, t, y.data() + t * wide);
    attention(m, *l, b, y.data(), wide, mixed.data(), threads);
    convert(mixed.data(), x.data(), n * m.heads * m.d);
    product(x.data(), b.adapters, n, l->output, y.data(), threads);
    onto(h.data(), y.data(), l->after_attention, n, m.hidden, m.eps, threads);
    norm(h.data(), l->before_mlp, x.data(), n, m.hidden, m.eps, threads);
    product(x.data(), b.adapters, n, l->gate_up, y.data(), threads);
    auto act = m.activation ? gate<gelu_tanh, X> : gate<silu, X>;
    act(y.data(), x.data(), n, m.mlp, threads);
    product(x.data(), b.adapters, n, l->down, y.data(), threads);
    onto(h.data(), y.data(), l->after_mlp, n, m.hidden, m.eps, threads);
  }
  std::vector<const update<T>*> adapters(b.outputs);
  for (long o = 0; o < b.outputs; o++) {
    adapters[o] = b.adapters[b.wanted[o]];
    norm(h.data() + b.wanted[o] * m.hidden, m.norm, x.data() + o * m.hidden, 1, m.hidden, m.eps, 1);
  }
  product(x.data(), adapters.data(), b.outputs, m.head, logits, threads);
  return 0;
}

template <class T>
int guarded(const decoder<T>* m, const batch<T>* b, float* logits, const int* stop, int threads) {
  try {
    return step(*m, *b, logits, stop, threads);
  } catch (const std::bad_alloc&) {
    return 2;
  }
}

}  // namespace

extern "C" int step_float32(const decoder<float>* m, const batch<float>* b, float* logits,
                            const int* stop, int threads) {
  return guarded(m, b, logits, stop, threads);
}

extern "C" int step_bfloat16(const decoder<bf16>* m, const batch<bf16>* b, float* logits,
                             const int* stop, int threads) {
  return guarded(m, b, logits, stop, threads);
}
