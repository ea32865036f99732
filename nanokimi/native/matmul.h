// Products of a packed matrix with a few vectors. The weights are read once. Each dot product has one accumulator of
// WIDTH lanes that runs along the row, so a result depends neither on its neighbours, nor on the batch or the threads.
#pragma once

#include "simd.h"
#include "team.h"

// [rows, cols] of weights, cols a multiple of PAD; `scale` holds one factor per row, or is null.
struct Matrix {
    const void* data;
    const float* scale;
    int64_t rows, cols;
};

// Vectors of activations: number j lies at base + stride * (index ? index[j] : j).
struct Inputs {
    const float* base;
    int64_t stride;
    const int* index;
    const float* operator[](int64_t j) const { return base + stride * (index ? index[j] : j); }
};

constexpr int ROWS = 4;                        // rows of weights in flight
constexpr int BATCH = MANY_REGISTERS ? 4 : 2;  // vectors that share a loaded weight
constexpr int CACHE_LINE = 64;                 // bytes

template <class T>
Matrix part(const Matrix& w, int64_t first, int64_t rows) {
    return {static_cast<const T*>(w.data) + first * w.cols, w.scale ? w.scale + first : nullptr, rows, w.cols};
}

// Dot products of R rows with N inputs. With FETCH they also prefetch the next R rows, because the hardware's own
// prefetcher follows several short streams badly.
template <bool FETCH, int R, int N, class T>
[[gnu::noinline]] void dot_block(const T* w, int64_t cols, const float* const (&x)[N], float (&out)[R][N]) {
    constexpr int BYTES = R * WIDTH * static_cast<int>(sizeof(T));  // of weights per turn
    const char* next = reinterpret_cast<const char*>(w + R * cols);
    Vec total[R][N];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) total[r][j] = Vec{};
    for (int64_t k = 0; k < cols; k += WIDTH, next += BYTES) {
        if (FETCH) UNROLL for (int i = 0; i < BYTES; i += CACHE_LINE) __builtin_prefetch(next + i);
        UNROLL for (int r = 0; r < R; r++) {
            Vec weight = load(w + r * cols + k);
            UNROLL for (int j = 0; j < N; j++) total[r][j] = fma(weight, load(x[j] + k), total[r][j]);
        }
    }
    sum_all(total, out);
}

// sink(row, j, value) for R rows from `row` on and inputs j to j + N.
template <bool FETCH, int R, int N, class T, class Sink>
inline void multiply_block(const Matrix& w, int64_t row, const Inputs& x, int64_t j, Sink sink) {
    const float* in[N];
    float out[R][N];
    for (int i = 0; i < N; i++) in[i] = x[j + i];
    dot_block<FETCH, R, N>(static_cast<const T*>(w.data) + row * w.cols, w.cols, in, out);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) sink(row + r, j + i, w.scale ? out[r][i] * w.scale[row + r] : out[r][i]);
}

// R rows with all n inputs. The first inputs bring the rows from memory; the others find them in the nearest cache.
template <int R, class T, class Sink>
void multiply_rows(const Matrix& w, int64_t row, const Inputs& x, int64_t n, Sink sink) {
    int64_t j = n < BATCH ? 1 : BATCH;
    if (n < BATCH) multiply_block<true, R, 1, T>(w, row, x, 0, sink);
    else multiply_block<true, R, BATCH, T>(w, row, x, 0, sink);
    for (; j + BATCH <= n; j += BATCH) multiply_block<false, R, BATCH, T>(w, row, x, j, sink);
    for (; j < n; j++) multiply_block<false, R, 1, T>(w, row, x, j, sink);
}

// This thread's rows of w times each of n inputs. The caller lets the threads meet before results are read.
template <class T, class Sink>
void multiply(const Team& team, const Matrix& w, const Inputs& x, int64_t n, Sink sink) {
    auto [row, last] = team.share(w.rows, ROWS);
    for (; row + ROWS <= last; row += ROWS) multiply_rows<ROWS, T>(w, row, x, n, sink);
    for (; row < last; row++) multiply_rows<1, T>(w, row, x, n, sink);
}

// out[0 .. PAD) of x W for one block of columns: the product with the transposed matrix, without storing that one.
template <class T>
void multiply_transposed_block(const Matrix& w, int64_t column, const float* x, float* out) {
    Vec total[PAD / WIDTH];
    UNROLL for (Vec& part : total) part = Vec{};
    for (int64_t row = 0; row < w.rows; row++) {
        const T* weights = static_cast<const T*>(w.data) + row * w.cols + column;
        Vec factor = all(w.scale ? x[row] * w.scale[row] : x[row]);
        UNROLL for (int i = 0; i < PAD / WIDTH; i++) total[i] = fma(factor, load(weights + i * WIDTH), total[i]);
    }
    UNROLL for (int i = 0; i < PAD / WIDTH; i++) store(out + i * WIDTH, total[i]);
}

// x / rms(x) * weight over n numbers (Zhang and Sennrich, 2019).
inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < n; i++) total += x[i] * x[i];
    float factor = 1.0f / __builtin_sqrtf(total / n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}
