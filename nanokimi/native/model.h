// What Python hands over: the packed model and one call. packed_model.py mirrors these structures.
#pragma once

#include "matmul.h"
#include "moe.h"

struct Mlp { Matrix w1, w2, w3; };  // w1, w3 [F, D]; w2 [D, F]; the experts' stacks have E times as many rows

struct Layer {
    const float *attention_norm, *q_norm, *kv_norm, *mlp_norm;
    Matrix wq_a, wq_b, wkv_a, wkv_b, wo;  // without query compression wq_b is wq, and wq_a is not read
    Mlp dense;                            // the MLP of a dense layer, or the shared experts; no rows: none
    Mlp experts;                          // no rows: a dense layer
    Matrix router;                        // fp32
    const float* balance_bias;
};

struct Model {
    int64_t format, slots, max_length, rows;  // format: index in WEIGHT_FORMATS of Python; rows: most tokens of a call
    int64_t dim, heads, nope, rope, value, rank, query_rank, dense_width, expert_width, layers;
    Routing routing;
    float norm_eps, latent_eps, softmax_scale;
    const float *embed, *cos, *sin, *norm;  // cos, sin [positions, P / 2]
    Matrix head;
    const Layer* layer;
    float* cache;  // [L, slots, max_length, entry_width]: normalised latent and rotated key, each padded
};

// n tokens, each at one of `positions` of its slot. A slot already holds everything before the first of its tokens. It
// may be given several tokens at once, since their entries are stored before any token attends to them.
struct Call {
    int64_t n;
    const int64_t *slots, *positions, *tokens;
    float* logits;  // [n, vocab]
    float* scratch;
};

inline int64_t entry_width(const Model& m) { return padded(m.rank) + padded(m.rope); }
