// Llama's layers and LM head over a few rows on a CPU. A row is one position of one prompt.
//
// What a row becomes depends on its own token and prefix alone: not on how many rows stand beside it, or which. Every sum
// is taken in one fixed order, in float32 (float64 for float64 models), whatever the number of rows and threads. So a pass
// over d+1 rows gives, bit for bit, what d+1 passes over one row give. Weights are read once for up to `MOST_ROWS` rows,
// from the model's own matrices, and widened in registers: the speed is that of the memory.
//
// Shapes: M rows, D hidden size, O rows of a matrix, I width inside the MLP, H query heads, G query heads for each of the
// key-value heads, K head dimension, C capacity of the cache.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

using at::vec::Vectorized;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A matrix is read once, four rows side by side, for so many rows of x: their sums and operands fit into the registers.
constexpr int SIDE_BY_SIDE = 4;
constexpr int MOST_ROWS = 6;
// It is fetched in the order in which it lies in memory, so many bytes ahead, into the second cache. Without that the four
// rows are four streams, which memory serves at half the speed.
constexpr int64_t BYTES_AHEAD = 16384;
constexpr int64_t CACHE_LINE = 64;
constexpr int SECOND_CACHE = 2;
// How many positions' queries read keys and values together.
constexpr int64_t TOGETHER = 4;

// Some elements of a row of weights, and how they are multiplied with as many of x. Types of 16 bits are widened into two
// vectors of float32.
template <typename T>
struct Chunk {
    using W = Wide<T>;
    using Operand = W;
    static constexpr int64_t lanes = Vectorized<W>::size();
    static constexpr int count = std::is_same_v<T, W> ? 1 : 2;
    static constexpr int64_t size = lanes * count;

    Vectorized<W> part[count];

    INLINE static Chunk load(const T* data) {
        if constexpr (count == 1) {
            return {{Vectorized<W>::loadu(data)}};
        } else {
            auto [first, second] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(data));
            return {{first, second}};
        }
    }

    INLINE void multiply_add(const Operand* x, Vectorized<W>& sum) const {
        for (int c = 0; c < count; ++c) {
            sum = at::vec::fmadd(part[c], Vectorized<W>::loadu(x + c * lanes), sum);
        }
    }
};

template <typename T>
struct Factors : Chunk<T> {
    INLINE static Factors load(const T* data) { return {Chunk<T>::load(data)}; }
};

#ifdef __AVX512BF16__
// Processors that multiply pairs of bfloat16 add them up in float32, at twice the rate; x is rounded to bfloat16 for it.
template <>
struct Factors<at::BFloat16> {
    using Operand = at::BFloat16;
    static constexpr int64_t size = 32;

    __m512bh pairs;

    INLINE static Factors load(const at::BFloat16* data) { return {(__m512bh)_mm512_loadu_si512(data)}; }

    INLINE void multiply_add(const Operand* x, Vectorized<float>& sum) const {
        sum = _mm512_dpbf16_ps(sum, pairs, (__m512bh)_mm512_loadu_si512(x));
    }
};
#endif

template <typename T>
using Operand = typename Factors<T>::Operand;

template <typename W>
INLINE W horizontal_sum(const Vectorized<W>& lanes) {
    return at::vec::vec_reduce_all<W>([](const auto& a, const auto& b) { return a + b; }, lanes);
}

// The horizontal sums of four vectors.
template <typename W>
INLINE void horizontal_sums(const Vectorized<W>* lanes, W* sums) {
    for (int r = 0; r < SIDE_BY_SIDE; ++r) {
        sums[r] = horizontal_sum(lanes[r]);
    }
}

#ifdef CPU_CAPABILITY_AVX512
template <>
INLINE void horizontal_sums(const Vectorized<float>* lanes, float* sums) {
    const auto in_pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const __m512d first = _mm512_castps_pd(in_pairs(lanes[0], lanes[1]));
    const __m512d second = _mm512_castps_pd(in_pairs(lanes[2], lanes[3]));
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
    const __m512 sum = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#endif

// Calls `function` with 0, 1, … N−1 as constants: only then does the compiler keep arrays of vectors in registers.
template <int... i, typename F>
INLINE void call_with(std::integer_sequence<int, i...>, F function) {
    (function(std::integral_constant<int, i>{}), ...);
}

template <int N, typename F>
INLINE void unrolled(F function) {
    call_with(std::make_integer_sequence<int, N>{}, function);
}

// Σ x·w for R ≤ 4 rows of weights and P rows of x: `sums[p][r]`. Each sum has lanes of its own, whatever R and P.
template <typename T, int R, int P>
void products(const T* weight, const Operand<T>* x, int64_t size, Wide<T> (*sums)[SIDE_BY_SIDE]) {
    using W = Wide<T>;
    constexpr int64_t step = Factors<T>::size;
    Vectorized<W> lanes[P][SIDE_BY_SIDE];
    unrolled<P * SIDE_BY_SIDE>([&](auto i) INLINE_LAMBDA { lanes[i / SIDE_BY_SIDE][i % SIDE_BY_SIDE] = Vectorized<W>(0); });
    const char* ahead = reinterpret_cast<const char*>(weight) + BYTES_AHEAD;
    int64_t k = 0;
    for (; k + step <= size; k += step) {
        constexpr int64_t lines = (R * step * sizeof(T) + CACHE_LINE - 1) / CACHE_LINE;
        unrolled<lines>([&](auto line) INLINE_LAMBDA { __builtin_prefetch(ahead + line * CACHE_LINE, 0, SECOND_CACHE); });
        ahead += lines * CACHE_LINE;
        Factors<T> weights[R];
        unrolled<R>([&](auto r) INLINE_LAMBDA { weights[r] = Factors<T>::load(weight + r * size + k); });
        unrolled<P * R>([&](auto i) INLINE_LAMBDA {
            weights[i % R].multiply_add(x + i / R * size + k, lanes[i / R][i % R]);
        });
    }
    unrolled<P>([&](auto p) INLINE_LAMBDA { horizontal_sums<W>(lanes[p], sums[p]); });
    for (; k < size; ++k) {
        for (int i = 0; i < P * R; ++i) {
            const W product = static_cast<W>(weight[i % R * size + k]) * static_cast<W>(x[i / R * size + k]);
            sums[i / R][i % R] += product;
        }
    }
}

// The same for P rows of x, which is known only now.
template <typename T, int R, int P = MOST_ROWS>
INLINE void products_of(int rows, const T* weight, const Operand<T>* x, int64_t size, Wide<T> (*sums)[SIDE_BY_SIDE]) {
    if (rows == P) {
        products<T, R, P>(weight, x, size, sums);
    } else if constexpr (P > 1) {
        products_of<T, R, P - 1>(rows, weight, x, size, sums);
    }
}

// x Wᵀ for the rows [first, last) of a matrix (O, D) and M rows of x; `store(o, m, sum)` takes each sum.
template <typename T, int R = SIDE_BY_SIDE, typename Store>
void multiply(const T* weight, const Operand<T>* x, int64_t M, int64_t D, int64_t first, int64_t last, Store store) {
    Wide<T> sums[MOST_ROWS][SIDE_BY_SIDE];
    int64_t o = first;
    for (; o + R <= last; o += R) {
        for (int64_t m = 0; m < M; m += MOST_ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(MOST_ROWS, M - m));
            products_of<T, R>(rows, weight + o * D, x + m * D, D, sums);
            for (int i = 0; i < rows * R; ++i) {
                store(o + i % R, m + i / R, sums[i / R][i % R]);
            }
        }
    }
    if constexpr (R > 1) {
        multiply<T, 1>(weight, x, M, D, o, last, store);
    }
}

// The share [first, last) of `count` things that a thread does; for matrices, whole groups of rows.
std::pair<int64_t, int64_t> share(int64_t count, int64_t group) {
    const int64_t groups = (count + group - 1) / group, threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return {std::min(count, groups * thread / threads * group), std::min(count, groups * (thread + 1) / threads * group)};
}

// Calls `vector` with the first index of every whole vector of `count` numbers, and `single` with the rest, one by one.
template <typename W, typename OnVector, typename OnSingle>
INLINE void each(int64_t count, OnVector vector, OnSingle single) {
    int64_t k = 0;
    for (; k + Vectorized<W>::size() <= count; k += Vectorized<W>::size()) {
        vector(k);
    }
    for (; k < count; ++k) {
        single(k);
    }
}

// The numbers in another type, rounded to the nearest.
template <typename W, typename To>
void convert(const W* from, int64_t count, To* to) {
    int64_t k = 0;
    if constexpr (std::is_same_v<W, float> && sizeof(To) == 2) {
        for (; k + Vectorized<To>::size() <= count; k += Vectorized<To>::size()) {
            const auto first = Vectorized<float>::loadu(from + k), second = Vectorized<float>::loadu(from + k + Vectorized<float>::size());
            at::vec::convert_from_float<To>(first, second).store(to + k);
        }
    }
    std::copy(from + k, from + count, to + k);
}

// Root-mean-square norm of one row; `normed_D` may be `hidden_D`.
template <typename T, typename W>
void normalize(const W* hidden_D, const T* weight_D, int64_t D, double epsilon, W* normed_D) {
    Vectorized<W> lanes(0);
    W rest = 0;
    each<W>(
        D,
        [&](int64_t k) {
            const auto x = Vectorized<W>::loadu(hidden_D + k);
            lanes = at::vec::fmadd(x, x, lanes);
        },
        [&](int64_t k) { rest += hidden_D[k] * hidden_D[k]; });
    const W mean = (horizontal_sum(lanes) + rest) / static_cast<W>(D);
    const W scale = 1 / std::sqrt(mean + static_cast<W>(epsilon));
    int64_t k = 0;
    for (; k + Chunk<T>::size <= D; k += Chunk<T>::size) {
        const auto weights = Chunk<T>::load(weight_D + k);
        for (int c = 0; c < Chunk<T>::count; ++c) {
            const int64_t first = k + c * Chunk<T>::lanes;
            (Vectorized<W>::loadu(hidden_D + first) * Vectorized<W>(scale) * weights.part[c]).store(normed_D + first);
        }
    }
    for (; k < D; ++k) {
        normed_D[k] = hidden_D[k] * scale * static_cast<W>(weight_D[k]);
    }
}

// x / (1 + e^−x)·y, into x.
template <typename W>
void gate(W* x, const W* y, int64_t count) {
    const Vectorized<W> one(1);
    const auto gated = [&](const Vectorized<W>& x, const Vectorized<W>& y) { return x / (one + x.neg().exp()) * y; };
    each<W>(
        count, [&](int64_t k) { gated(Vectorized<W>::loadu(x + k), Vectorized<W>::loadu(y + k)).store(x + k); },
        [&](int64_t k) {
            // As a vector too: other exponentials round otherwise, and where shares end depends on the threads.
            const auto result = gated(Vectorized<W>(x[k]), Vectorized<W>(y[k]));
            result.store(x + k, 1);
        });
}

}  // namespace

// One layer's matrices, as the model stores them, and its part of the cache, each (B, H/G, C, K).
struct Layer {
    const void *attention_norm, *heads, *attention_out, *mlp_norm, *gate_up, *mlp_out;
    void *keys, *values;
};

// A pass of some layers over B·T rows; positions (B, T), and rotary cosines and sines (C, K), by position.
struct Pass {
    int64_t batch, length, hidden_size, inner_size, query_heads, key_heads, head_dim, capacity, num_layers, threads;
    double epsilon, scale;
    const int64_t* positions;
    const void *cosines, *sines;
    const Layer* layers;
    const void* states;
    void* result;
};

namespace {

template <typename T>
class Run {
    using W = Wide<T>;

  public:
    explicit Run(const Pass& pass)
        : pass(pass),
          M(pass.batch * pass.length),
          D(pass.hidden_size),
          I(pass.inner_size),
          K(pass.head_dim),
          heads((pass.query_heads + 2 * pass.key_heads) * K),
          attended_size(pass.query_heads * K),
          most_visible(*std::max_element(pass.positions, pass.positions + M) + 1),
          states(new W[M * D]),
          projected(new W[M * heads]),
          attended(new Operand<T>[M * attended_size]),
          inner(new Operand<T>[M * I]) {}

    void operator()() {
        std::copy(typed(pass.states), typed(pass.states) + M * D, states.get());
#pragma omp parallel num_threads(static_cast<int>(pass.threads))
        {
            const std::unique_ptr<Operand<T>[]> normed(new Operand<T>[M * D]);
            const std::unique_ptr<W[]> scratch(new W[std::max(TOGETHER * pass.query_heads / pass.key_heads * scores_stride(), D)]);
            for (int64_t index = 0; index < pass.num_layers; ++index) {
                run_layer(pass.layers[index], normed.get(), scratch.get());
            }
        }
        std::copy(states.get(), states.get() + M * D, static_cast<T*>(pass.result));
    }

  private:
    // Between two barriers each thread writes what no other one reads or writes.
    void run_layer(const Layer& layer, Operand<T>* normed, W* scratch) {
        normalize_rows(layer.attention_norm, normed, scratch);
        auto [first_head, last_head] = share(heads, SIDE_BY_SIDE);
        multiply<T>(typed(layer.heads), normed, M, D, first_head, last_head,
                    [&](int64_t o, int64_t m, W sum) { projected[m * heads + o] = sum; });
#pragma omp barrier
        auto [first_task, last_task] = share(pass.batch * pass.key_heads, 1);
        for (int64_t task = first_task; task < last_task; ++task) {
            attend(layer, task / pass.key_heads, task % pass.key_heads, scratch);
        }
#pragma omp barrier
        auto [first_state, last_state] = share(D, SIDE_BY_SIDE);
        const auto add = [&](int64_t o, int64_t m, W sum) { states[m * D + o] += sum; };
        multiply<T>(typed(layer.attention_out), attended.get(), M, attended_size, first_state, last_state, add);
#pragma omp barrier
        normalize_rows(layer.mlp_norm, normed, scratch);
        auto [first_inner, last_inner] = share(I, SIDE_BY_SIDE);
        run_gates(typed(layer.gate_up), normed, first_inner, last_inner);
#pragma omp barrier
        // The state between two layers is in the model's own type, wherever the model is cut.
        multiply<T>(typed(layer.mlp_out), inner.get(), M, I, first_state, last_state,
                    [&](int64_t o, int64_t m, W sum) { states[m * D + o] = W(T(states[m * D + o] + sum)); });
#pragma omp barrier
    }

    void normalize_rows(const void* weight, Operand<T>* normed, W* scratch) const {
        for (int64_t m = 0; m < M; ++m) {
            normalize(states.get() + m * D, typed(weight), D, pass.epsilon, scratch);
            convert(scratch, D, normed + m * D);
        }
    }

    // silu(gate)·up for the columns [first, last).
    void run_gates(const T* gate_up, const Operand<T>* normed, int64_t first, int64_t last) {
        const int64_t width = last - first;
        const std::unique_ptr<W[]> gates(new W[M * width]), ups(new W[M * width]);
        multiply<T>(gate_up, normed, M, D, first, last,
                    [&](int64_t o, int64_t m, W sum) { gates[m * width + o - first] = sum; });
        multiply<T>(gate_up + I * D, normed, M, D, first, last,
                    [&](int64_t o, int64_t m, W sum) { ups[m * width + o - first] = sum; });
        gate(gates.get(), ups.get(), M * width);
        for (int64_t m = 0; m < M; ++m) {
            convert(gates.get() + m * width, width, inner.get() + m * I + first);
        }
    }

    // One key head of one prompt: cache its keys and values, then let its query heads attend, position by position.
    void attend(const Layer& layer, int64_t b, int64_t key_head, W* scores) {
        T* keys = static_cast<T*>(layer.keys) + (b * pass.key_heads + key_head) * pass.capacity * K;
        T* values = static_cast<T*>(layer.values) + (b * pass.key_heads + key_head) * pass.capacity * K;
        for (int64_t m = b * pass.length; m < (b + 1) * pass.length; ++m) {
            W* key = projected.get() + m * heads + (pass.query_heads + key_head) * K;
            const W* value = key + pass.key_heads * K;
            rotate(key, pass.positions[m]);
            convert(key, K, keys + pass.positions[m] * K);
            convert(value, K, values + pass.positions[m] * K);
        }
        for (int64_t m = b * pass.length; m < (b + 1) * pass.length; m += TOGETHER) {
            attend_at(m, std::min(TOGETHER, (b + 1) * pass.length - m), key_head, keys, values, scores);
        }
    }

    // The queries of a key head at a few positions; each of them is a row here.
    void attend_at(int64_t first, int64_t count, int64_t key_head, const T* keys, const T* values, W* scores) {
        const int64_t groups = pass.query_heads / pass.key_heads, rows = count * groups, stride = scores_stride();
        const std::unique_ptr<Operand<T>[]> queries(new Operand<T>[rows * K]);
        const std::unique_ptr<int64_t[]> visible(new int64_t[rows]);
        const std::unique_ptr<W[]> sums(new W[rows * K]);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t m = first + row / groups;
            W* query = projected.get() + m * heads + (key_head * groups + row % groups) * K;
            rotate(query, pass.positions[m]);
            convert(query, K, queries.get() + row * K);
            visible[row] = pass.positions[m] + 1;
        }
        const int64_t most_visible = *std::max_element(visible.get(), visible.get() + rows);
        multiply<T>(keys, queries.get(), rows, K, 0, most_visible, [&](int64_t j, int64_t row, W sum) {
            scores[row * stride + j] = sum * static_cast<W>(pass.scale);
        });
        for (int64_t row = 0; row < rows; ++row) {
            softmax(scores + row * stride, visible[row]);
        }
        for (int64_t row = 0; row < rows; row += SIDE_BY_SIDE) {
            const int beside = static_cast<int>(std::min<int64_t>(SIDE_BY_SIDE, rows - row));
            add_values<SIDE_BY_SIDE>(beside, values, scores + row * stride, &visible[row], sums.get() + row * K);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t m = first + row / groups, head = key_head * groups + row % groups;
            convert(sums.get() + row * K, K, attended.get() + m * attended_size + head * K);
        }
    }

    // In place, over the visible positions; in whole vectors, of which what lies beyond counts for nothing.
    void softmax(W* scores, int64_t visible) const {
        constexpr int64_t size = Vectorized<W>::size();
        const W most = *std::max_element(scores, scores + visible);
        Vectorized<W> lanes(0);
        for (int64_t j = 0; j < visible; j += size) {
            const auto power = (Vectorized<W>::loadu(scores + j) - Vectorized<W>(most)).exp();
            const auto seen = Vectorized<W>::set(Vectorized<W>(0), power, std::min(size, visible - j));
            seen.store(scores + j);
            lanes = lanes + seen;
        }
        const Vectorized<W> scale(1 / horizontal_sum(lanes));
        for (int64_t j = 0; j < visible; j += size) {
            (Vectorized<W>::loadu(scores + j) * scale).store(scores + j);
        }
    }

    template <int R>
    void add_values(int rows, const T* values, const W* scores, const int64_t* visible, W* sums) const {
        if (rows == R) {
            sum_values<R>(values, scores, visible, sums);
        } else if constexpr (R > 1) {
            add_values<R - 1>(rows, values, scores, visible, sums);
        }
    }

    // Σ score·value for R rows, each in the order of the positions and as far as it sees.
    template <int R>
    void sum_values(const T* values, const W* scores, const int64_t* visible, W* sums) const {
        using Part = Chunk<T>;
        const int64_t common = *std::min_element(visible, visible + R), stride = scores_stride();
        int64_t k = 0;
        for (; k + Part::size <= K; k += Part::size) {
            Vectorized<W> lanes[R][Part::count];
            unrolled<R * Part::count>([&](auto i) INLINE_LAMBDA { lanes[i % R][i / R] = Vectorized<W>(0); });
            const auto add = [&](int64_t j, const Part& value, auto r) INLINE_LAMBDA {
                const Vectorized<W> score(scores[r * stride + j]);
                unrolled<Part::count>([&](auto c) INLINE_LAMBDA {
                    lanes[r][c] = at::vec::fmadd(score, value.part[c], lanes[r][c]);
                });
            };
            for (int64_t j = 0; j < common; ++j) {
                const auto value = Part::load(values + j * K + k);
                unrolled<R>([&](auto r) INLINE_LAMBDA { add(j, value, r); });
            }
            unrolled<R>([&](auto r) INLINE_LAMBDA {
                for (int64_t j = common; j < visible[r]; ++j) {
                    add(j, Part::load(values + j * K + k), r);
                }
                unrolled<Part::count>([&](auto c) INLINE_LAMBDA { lanes[r][c].store(sums + r * K + k + c * Part::lanes); });
            });
        }
        for (; k < K; ++k) {
            for (int r = 0; r < R; ++r) {
                W sum = 0;
                for (int64_t j = 0; j < visible[r]; ++j) {
                    sum = std::fma(scores[r * stride + j], static_cast<W>(values[j * K + k]), sum);
                }
                sums[r * K + k] = sum;
            }
        }
    }

    // Rotary position embedding: each half of a head is the other's partner.
    void rotate(W* head_K, int64_t position) const {
        const W* cosines = static_cast<const W*>(pass.cosines) + position * K;
        const W* sines = static_cast<const W*>(pass.sines) + position * K;
        W* partners_K = head_K + K / 2;
        const auto turn = [&](auto x, auto partner, auto load, int64_t k) {
            return std::pair(x * load(cosines + k) - partner * load(sines + k),
                             partner * load(cosines + k + K / 2) + x * load(sines + k + K / 2));
        };
        each<W>(
            K / 2,
            [&](int64_t k) {
                const auto load = [](const W* data) { return Vectorized<W>::loadu(data); };
                const auto [x, partner] = turn(load(head_K + k), load(partners_K + k), load, k);
                x.store(head_K + k);
                partner.store(partners_K + k);
            },
            [&](int64_t k) {
                const auto load = [](const W* data) { return *data; };
                std::tie(head_K[k], partners_K[k]) = turn(head_K[k], partners_K[k], load, k);
            });
    }

    // Room for one row's scores.
    int64_t scores_stride() const { return most_visible + Vectorized<W>::size(); }

    static const T* typed(const void* data) { return static_cast<const T*>(data); }

    const Pass& pass;
    const int64_t M, D, I, K, heads, attended_size, most_visible;
    const std::unique_ptr<W[]> states, projected;
    const std::unique_ptr<Operand<T>[]> attended, inner;
};

// Logits (M, V) of hidden states (M, D): a norm, and the rows of an LM head.
template <typename T>
void read_head(const T* hidden, const T* norm, const T* head, T* logits, double epsilon, int64_t M, int64_t V, int64_t D,
               int64_t threads) {
    using W = Wide<T>;
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        const std::unique_ptr<W[]> states(new W[D]);
        const std::unique_ptr<Operand<T>[]> normed(new Operand<T>[M * D]);
        for (int64_t m = 0; m < M; ++m) {
            std::copy(hidden + m * D, hidden + (m + 1) * D, states.get());
            normalize(states.get(), norm, D, epsilon, states.get());
            convert(states.get(), D, normed.get() + m * D);
        }
        auto [first, last] = share(V, SIDE_BY_SIDE);
        multiply<T>(head, normed.get(), M, D, first, last, [&](int64_t o, int64_t m, W sum) { logits[m * V + o] = T(sum); });
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                                 \
    extern "C" void run_layers_##NAME(const Pass* pass) { Run<T>{*pass}(); }                                            \
    extern "C" void read_head_##NAME(const T* hidden, const T* norm, const T* head, T* logits, double epsilon, int64_t M, \
                                     int64_t V, int64_t D, int64_t threads) {                                           \
        read_head<T>(hidden, norm, head, logits, epsilon, M, V, D, threads);                                            \
    }

EXPORT(double, float64)
EXPORT(float, float32)
EXPORT(at::BFloat16, bfloat16)
EXPORT(at::Half, float16)
