// The router's choice for each row, as nanokimi/model/moe.py makes it (DeepSeek-V3, section 2.1.2).
#pragma once

#include <algorithm>
#include <numeric>

#include "simd.h"

struct Routing {
    int64_t experts, chosen, groups, limited_groups, sigmoid, normalise;
    float route_scale;
};

// Turns `logits` [E] into scores: sigmoid, or softmax.
inline void to_scores(const Routing& r, float* logits) {
    float largest = *std::max_element(logits, logits + r.experts), total = 0;
    for (int64_t e = 0; e < r.experts; e++)
        total += logits[e] = r.sigmoid ? sigmoid(logits[e]) : fast_exp(logits[e] - largest);
    if (!r.sigmoid)
        for (int64_t e = 0; e < r.experts; e++) logits[e] /= total;
}

// Group-limited routing: the experts outside the best groups get -inf, so none of them is chosen.
inline void close_groups(const Routing& r, float* biased) {
    if (r.groups == r.limited_groups) return;
    int64_t size = r.experts / r.groups;
    for (int64_t closed = 0; closed < r.groups - r.limited_groups; closed++) {
        float worst = __builtin_inff();
        int64_t which = 0;
        for (int64_t g = 0; g < r.groups; g++) {
            float first = -__builtin_inff(), second = first;
            for (const float* p = biased + g * size; p < biased + (g + 1) * size; p++) {
                second = std::max(second, std::min(first, *p));
                first = std::max(first, *p);
            }
            float score = r.sigmoid ? first + second : first;
            if (first > -__builtin_inff() && score < worst) worst = score, which = g;
        }
        std::fill(biased + which * size, biased + (which + 1) * size, -__builtin_inff());
    }
}

// From logits [E] to the K chosen experts and their gate values; `biased` [E] is scratch.
inline void choose_experts(const Routing& r, const float* bias, float* logits, float* biased, int* experts,
                           float* gates) {
    to_scores(r, logits);
    for (int64_t e = 0; e < r.experts; e++) biased[e] = logits[e] + bias[e];
    close_groups(r, biased);
    float total = 1e-20f;
    for (int64_t k = 0; k < r.chosen; k++) {
        int64_t best = std::max_element(biased, biased + r.experts) - biased;
        biased[best] = -__builtin_inff();
        experts[k] = static_cast<int>(best);
        total += gates[k] = logits[best];
    }
    for (int64_t k = 0; k < r.chosen; k++) gates[k] *= (r.normalise ? 1.0f / total : 1.0f) * r.route_scale;
}

// Sorts the n*K choices by expert, stably: `order` holds their numbers, expert e's from starts[e] to starts[e + 1].
inline void sort_choices(const int* experts, int64_t choices, int64_t n_experts, int* starts, int* order) {
    std::fill(starts, starts + n_experts + 1, 0);
    for (int64_t i = 0; i < choices; i++) starts[experts[i] + 1]++;
    std::partial_sum(starts, starts + n_experts + 1, starts);
    for (int64_t i = choices - 1; i >= 0; i--) order[--starts[experts[i] + 1]] = static_cast<int>(i);
    for (int64_t e = 0; e < n_experts; e++) starts[e] = starts[e + 1];
    starts[n_experts] = static_cast<int>(choices);
}
