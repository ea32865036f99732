// Absorbed attention over the latent cache, flash-decoding style (Dao et al., 2023): tasks of CHUNK tokens by HEADS
// heads, each with its own maxima and sums, merged in the order of the tokens. So no result depends on which thread
// does which task. The products of a task keep heads x tokens (or heads x columns of the latent) in registers.
#pragma once

#include "simd.h"

constexpr int CHUNK = 128;
constexpr int HEADS = 8;                         // many: each entry is then fetched from memory or L2 once
constexpr int TOKENS = MANY_REGISTERS ? 2 : 1;
constexpr int COLUMNS = MANY_REGISTERS ? 2 : 1;  // vectors of the latent
constexpr int AHEAD = 8;                         // tokens whose entries are fetched early

// What a chunk leaves per head: `mixed` of width R (padded), then the largest logit, then the sum of exponentials.
inline int64_t partial_width(int64_t rank) { return rank + PAD; }

// scores[h][first + t] = query h . entry t, for H heads and T tokens.
template <int H, int T>
void score_block(const float* query, const float* entries, int64_t width, float (*scores)[CHUNK], int first) {
    Vec total[H][T], entry[T];
    UNROLL for (int h = 0; h < H; h++) UNROLL for (int t = 0; t < T; t++) total[h][t] = Vec{};
    for (int64_t k = 0; k < width; k += WIDTH) {
        UNROLL for (int t = 0; t < T; t++) entry[t] = load(entries + (first + t) * width + k);
        UNROLL for (int t = AHEAD; t < AHEAD + T; t++) __builtin_prefetch(entries + (first + t) * width + k);
        UNROLL for (int h = 0; h < H; h++) {
            Vec part = load(query + h * width + k);
            UNROLL for (int t = 0; t < T; t++) total[h][t] = fma(part, entry[t], total[h][t]);
        }
    }
    float sums[H][T];
    sum_all(total, sums);
    UNROLL for (int h = 0; h < H; h++) UNROLL for (int t = 0; t < T; t++) scores[h][first + t] = sums[h][t];
}

// out[h][..C vectors] = sum over tokens of weights[h][t] * entry t. Meanwhile the next chunk is fetched.
template <int H, int C>
void mix_block(const float (*weights)[CHUNK], const float* entries, int64_t width, int count, float* out,
               int64_t step) {
    Vec total[H][C], entry[C];
    UNROLL for (int h = 0; h < H; h++) UNROLL for (int c = 0; c < C; c++) total[h][c] = Vec{};
    for (int t = 0; t < count; t++) {
        UNROLL for (int c = 0; c < C; c++) entry[c] = load(entries + t * width + c * WIDTH);
        UNROLL for (int c = 0; c < C; c++) __builtin_prefetch(entries + (CHUNK + t) * width + c * WIDTH, 0, 2);
        UNROLL for (int h = 0; h < H; h++)
            UNROLL for (int c = 0; c < C; c++) total[h][c] = fma(all(weights[h][t]), entry[c], total[h][c]);
    }
    UNROLL for (int h = 0; h < H; h++)
        UNROLL for (int c = 0; c < C; c++) store(out + h * step + c * WIDTH, total[h][c]);
}

// Replaces count logits by their exponentials, relative to the largest; leaves the largest and the sum in `out`. The
// rest of the last vector becomes -inf, whose exponential adds 0 to the sum.
inline void exponentials(float* logits, int count, float* out) {
    int64_t whole = padded(count);
    for (int64_t t = count; t < whole; t++) logits[t] = -__builtin_inff();
    Vec best = load(logits), total = {};
    for (int64_t t = WIDTH; t < whole; t += WIDTH) best = load(logits + t) > best ? load(logits + t) : best;
    float largest = best[0];
    for (int i = 1; i < WIDTH; i++) largest = best[i] > largest ? best[i] : largest;
    for (int64_t t = 0; t < whole; t++) logits[t] = fast_exp(logits[t] - largest);
    for (int64_t t = 0; t < whole; t += WIDTH) total += load(logits + t);
    out[0] = largest;
    out[1] = sum(total);
}

// One chunk of `count` entries [count, width], the first `rank` numbers of which are values, for H queries [H, width].
template <int H>
void attend_chunk(const float* query, const float* entries, int64_t width, int64_t rank, int count, float* partial) {
    alignas(4 * WIDTH) float scores[H][CHUNK];
    int t = 0;
    for (; t + TOKENS <= count; t += TOKENS) score_block<H, TOKENS>(query, entries, width, scores, t);
    for (; t < count; t++) score_block<H, 1>(query, entries, width, scores, t);
    int64_t step = partial_width(rank);
    for (int h = 0; h < H; h++) exponentials(scores[h], count, partial + h * step + rank);
    int64_t r = 0;
    for (; r + COLUMNS * WIDTH <= rank; r += COLUMNS * WIDTH)
        mix_block<H, COLUMNS>(scores, entries + r, width, count, partial + r, step);
    for (; r < rank; r += WIDTH) mix_block<H, 1>(scores, entries + r, width, count, partial + r, step);
}

// The same for any number of heads, in blocks of H, H/2, ... 1.
template <int H>
void attend_heads(const float* query, const float* entries, int64_t width, int64_t rank, int count, int64_t heads,
                  float* partial) {
    for (; heads >= H; heads -= H, query += H * width, partial += H * partial_width(rank))
        attend_chunk<H>(query, entries, width, rank, count, partial);
    if constexpr (H > 1) attend_heads<H / 2>(query, entries, width, rank, count, heads, partial);
}

// The chunks of one head, `stride` apart, merged and normalised to out[rank]. Each chunk's exponentials are relative to
// its own largest logit; the factors make them relative to the largest of all.
inline void merge_chunks(const float* partial, int64_t stride, int64_t chunks, int64_t rank, float* out) {
    float largest = partial[rank], total = 0;
    for (int64_t c = 1; c < chunks; c++)
        largest = partial[c * stride + rank] > largest ? partial[c * stride + rank] : largest;
    std::memset(out, 0, sizeof(float) * rank);
    for (int64_t c = 0; c < chunks; c++) {
        const float* from = partial + c * stride;
        float factor = fast_exp(from[rank] - largest);
        total += factor * from[rank + 1];
        for (int64_t r = 0; r < rank; r += WIDTH) store(out + r, fma(all(factor), load(from + r), load(out + r)));
    }
    for (int64_t r = 0; r < rank; r += WIDTH) store(out + r, load(out + r) / total);
}
