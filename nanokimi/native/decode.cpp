// One step of the whole network for a few rows, in one parallel region: the weights of the active parameters and the
// latent cache are read once. Letters as in nanokimi/model/layers.py; n rows, each a token, mostly of its own sequence.
//
// Phases end with team.meet(); within one, threads write disjoint parts of what the next one reads. Vectors lie in
// scratch with rows padded to PAD. The padding of weights is zero, so the padding of activations may hold any finite
// number.

#include "attention.h"
#include "model.h"

namespace {

// Where the activations lie in the one block of working memory. The threads share them; only `normed` is each thread's
// own.
struct Scratch {
    float *x, *q_latent, *kv, *q, *absorbed, *partial, *mixed, *values, *hidden, *up, *logits, *biased, *gates;
    float *expert_hidden, *normed;
    int *experts, *starts, *order, *order_rows;
    int64_t norm_width, size;  // size in floats

    Scratch(const Model& m, float* base, int64_t threads) : size(0) {
        auto take = [&](int64_t rows, int64_t width) {
            float* at = base + size;
            size += rows * padded(width);
            return at;
        };
        const Routing& r = m.routing;
        int64_t n = m.rows, choices = n * r.chosen, chunks = (m.max_length + CHUNK - 1) / CHUNK;
        norm_width = padded(std::max(m.dim, m.query_rank));
        x = take(n, m.dim);
        q_latent = take(n, m.query_rank);
        kv = take(n, m.rank + m.rope);
        q = take(n, m.heads * (m.nope + m.rope));
        absorbed = take(n * m.heads, entry_width(m));
        partial = take(n * chunks * m.heads, partial_width(padded(m.rank)));
        mixed = take(n * m.heads, m.rank);
        values = take(n, m.heads * m.value);
        hidden = take(n, m.dense_width);
        expert_hidden = take(choices, m.expert_width);
        up = take(1, std::max(n * padded(m.dense_width), choices * padded(m.expert_width)));
        logits = take(n, r.experts);
        biased = take(1, r.experts);
        gates = take(1, choices);
        experts = reinterpret_cast<int*>(take(1, choices));
        order = reinterpret_cast<int*>(take(1, choices));
        order_rows = reinterpret_cast<int*>(take(1, choices));
        starts = reinterpret_cast<int*>(take(1, r.experts + 1));
        normed = take(threads * n, norm_width);
    }
};

inline void rotate(const float* x, const float* cos, const float* sin, int64_t pairs, float scale, float* out) {
    for (int64_t i = 0; i < pairs; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        out[2 * i] = (even * cos[i] - odd * sin[i]) * scale;
        out[2 * i + 1] = (even * sin[i] + odd * cos[i]) * scale;
    }
}

template <class T>
struct Step {
    const Model& m;
    const Call& call;
    const Scratch& s;
    const Team& team;
    float* normed = s.normed + team.rank * m.rows * s.norm_width;
    int64_t n = call.n, entry = entry_width(m), rank = padded(m.rank);

    void run() {
        auto [first, last] = team.share(n);
        for (int64_t j = first; j < last; j++)
            std::copy_n(m.embed + call.tokens[j] * m.dim, m.dim, s.x + j * padded(m.dim));
        for (int64_t l = 0; l < m.layers; l++) {
            team.meet();
            attention(m.layer[l], m.cache + l * m.slots * m.max_length * entry);
            team.meet();
            mlp(m.layer[l]);
        }
        team.meet();
        float* logits = call.logits;
        int64_t vocab = m.head.rows;
        multiply<T>(team, m.head, normalised(s.x, m.norm, m.norm_eps, m.dim), n,
                    [=](int64_t row, int64_t j, float v) { logits[j * vocab + row] = v; });
    }

    // Every thread normalises all rows for itself: that is quicker than to wait for the others.
    Inputs normalised(const float* rows, const float* weight, float eps, int64_t width) const {
        for (int64_t j = 0; j < n; j++)
            rms_norm(rows + j * padded(width), weight, eps, width, normed + j * s.norm_width);
        return {normed, s.norm_width, nullptr};
    }

    void project(const Matrix& w, const Inputs& x, float* out, int64_t stride) const {
        multiply<T>(team, w, x, n, [=](int64_t row, int64_t j, float v) { out[j * stride + row] = v; });
    }

    void add_to_residual(const Matrix& w, const Inputs& x) const {
        float* out = s.x;
        int64_t stride = padded(m.dim);
        multiply<T>(team, w, x, n, [=](int64_t row, int64_t j, float v) { out[j * stride + row] += v; });
    }

    // ---- attention: docs/model.md, "The decoding form"

    void attention(const Layer& layer, float* cache) const {
        Inputs x = normalised(s.x, layer.attention_norm, m.norm_eps, m.dim);
        int64_t q_width = padded(m.heads * (m.nope + m.rope));
        if (m.query_rank) project(layer.wq_a, x, s.q_latent, padded(m.query_rank));
        else project(layer.wq_b, x, s.q, q_width);
        project(layer.wkv_a, x, s.kv, padded(m.rank + m.rope));
        team.meet();
        if (m.query_rank) {
            Inputs latent = normalised(s.q_latent, layer.q_norm, m.latent_eps, m.query_rank);
            project(layer.wq_b, latent, s.q, q_width);
        }
        append_entries(layer, cache);
        team.meet();
        absorb_queries(layer);
        team.meet();
        attend(cache);
        team.meet();
        merge();
        team.meet();
        for (int64_t h = 0; h < m.heads; h++) {
            Matrix w_v = part<T>(layer.wkv_b, h * (m.nope + m.value) + m.nope, m.value);
            project(w_v, {s.mixed + h * rank, m.heads * rank, nullptr}, s.values + h * m.value, values_width());
        }
        team.meet();
        add_to_residual(layer.wo, {s.values, values_width(), nullptr});
    }

    int64_t values_width() const { return padded(m.heads * m.value); }

    float* cache_row(float* cache, int64_t j) const { return cache + call.slots[j] * m.max_length * entry; }

    int64_t length(int64_t j) const { return call.positions[j] + 1; }

    int64_t chunks(int64_t j) const { return (length(j) + CHUNK - 1) / CHUNK; }

    void append_entries(const Layer& layer, float* cache) const {
        auto [first, last] = team.share(n);
        for (int64_t j = first; j < last; j++) {
            const float* kv = s.kv + j * padded(m.rank + m.rope);
            float* out = cache_row(cache, j) + call.positions[j] * entry;
            int64_t angles = call.positions[j] * (m.rope / 2);
            rms_norm(kv, layer.kv_norm, m.latent_eps, m.rank, out);
            rotate(kv + m.rank, m.cos + angles, m.sin + angles, m.rope / 2, 1.0f, out + rank);
        }
    }

    // Moves the queries into the latent space, [n, H, entry_width], and multiplies them by the softmax scale.
    void absorb_queries(const Layer& layer) const {
        int64_t blocks = rank / PAD, head = m.nope + m.rope;
        auto [task, last] = team.share(m.heads * blocks);
        for (; task < last; task++) {
            int64_t h = task / blocks, column = task % blocks * PAD;
            Matrix w_k = part<T>(layer.wkv_b, h * (m.nope + m.value), m.nope);
            for (int64_t j = 0; j < n; j++) {
                const float* q = s.q + j * padded(m.heads * head) + h * head;
                float* out = s.absorbed + (j * m.heads + h) * entry;
                multiply_transposed_block<T>(w_k, column, q, out + column);
                for (int64_t i = column; i < column + PAD; i++) out[i] *= m.softmax_scale;
                int64_t angles = call.positions[j] * (m.rope / 2);
                if (column == 0)
                    rotate(q + m.nope, m.cos + angles, m.sin + angles, m.rope / 2, m.softmax_scale, out + rank);
            }
        }
    }

    void attend(float* cache) const {
        int64_t blocks = (m.heads + HEADS - 1) / HEADS, step = partial_width(rank), total = 0, task = 0, offset = 0;
        for (int64_t j = 0; j < n; j++) total += chunks(j) * blocks;
        auto [first, last] = team.share(total);
        for (int64_t j = 0; j < n; offset += chunks(j++))
            for (int64_t c = 0; c < chunks(j); c++)
                for (int64_t h = 0; h < m.heads; h += HEADS, task++)
                    if (first <= task && task < last)
                        attend_heads<HEADS>(s.absorbed + (j * m.heads + h) * entry,
                                            cache_row(cache, j) + c * CHUNK * entry, entry, rank,
                                            static_cast<int>(std::min<int64_t>(CHUNK, length(j) - c * CHUNK)),
                                            std::min<int64_t>(HEADS, m.heads - h),
                                            s.partial + ((offset + c) * m.heads + h) * step);
    }

    void merge() const {
        auto [first, last] = team.share(n * m.heads);
        int64_t step = partial_width(rank), offset = 0;
        for (int64_t j = 0; j < n; offset += chunks(j++))
            for (int64_t h = 0; h < m.heads; h++)
                if (int64_t task = j * m.heads + h; first <= task && task < last)
                    merge_chunks(s.partial + (offset * m.heads + h) * step, m.heads * step, chunks(j), rank,
                                 s.mixed + task * rank);
    }

    // ---- dense MLP, shared and routed experts

    void mlp(const Layer& layer) const {
        Inputs x = normalised(s.x, layer.mlp_norm, m.norm_eps, m.dim);
        int64_t width = padded(m.dense_width);
        swiglu(layer.dense.w1, layer.dense.w3, x, n, s.hidden, width, nullptr);
        if (layer.experts.w1.rows) {
            float* logits = s.logits;
            int64_t stride = padded(m.routing.experts);
            multiply<float>(team, layer.router, x, n,
                            [=](int64_t row, int64_t j, float v) { logits[j * stride + row] = v; });
            team.meet();
            if (team.rank == 0) route(layer);  // too little work to share
            team.meet();
            experts_up(layer.experts);
        }
        team.meet();
        add_to_residual(layer.dense.w2, {s.hidden, width, nullptr});
        if (layer.experts.w1.rows) experts_down(layer.experts);
    }

    // out[index[j]] = silu(w1 x) * w3 x (Shazeer, 2020), [.., F]; each thread makes its own rows of F.
    void swiglu(const Matrix& w1, const Matrix& w3, const Inputs& x, int64_t count, float* out, int64_t stride,
                const int* index) const {
        float* up = s.up;
        auto at = [=](int64_t j) { return (index ? index[j] : j) * stride; };
        multiply<T>(team, w1, x, count, [=](int64_t row, int64_t j, float v) { out[at(j) + row] = v; });
        multiply<T>(team, w3, x, count, [=](int64_t row, int64_t j, float v) { up[at(j) + row] = v; });
        auto [first, last] = team.share(w1.rows, ROWS);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = at(j) + first; i < at(j) + last; i++) out[i] = out[i] * sigmoid(out[i]) * up[i];
    }

    void route(const Layer& layer) const {
        const Routing& r = m.routing;
        for (int64_t j = 0; j < n; j++)
            choose_experts(r, layer.balance_bias, s.logits + j * padded(r.experts), s.biased, s.experts + j * r.chosen,
                           s.gates + j * r.chosen);
        sort_choices(s.experts, n * r.chosen, r.experts, s.starts, s.order);
        for (int64_t i = 0; i < n * r.chosen; i++) s.order_rows[i] = s.order[i] / static_cast<int>(r.chosen);
    }

    void experts_up(const Mlp& w) const {
        int64_t width = m.expert_width;
        for (int64_t e = 0; e < m.routing.experts; e++) {
            int first = s.starts[e], count = s.starts[e + 1] - first;
            if (count)
                swiglu(part<T>(w.w1, e * width, width), part<T>(w.w3, e * width, width),
                       {normed, s.norm_width, s.order_rows + first}, count, s.expert_hidden, padded(width),
                       s.order + first);
        }
    }

    // A row's experts are added in the order of their numbers, whatever the other rows chose.
    void experts_down(const Mlp& w) const {
        float *out = s.x, *gates = s.gates;
        int64_t stride = padded(m.dim);
        for (int64_t e = 0; e < m.routing.experts; e++) {
            int first = s.starts[e], count = s.starts[e + 1] - first;
            const int *order = s.order + first, *rows = s.order_rows + first;
            if (count)
                multiply<T>(team, part<T>(w.w2, e * m.dim, m.dim), {s.expert_hidden, padded(m.expert_width), order},
                            count, [=](int64_t row, int64_t j, float v) {
                                out[rows[j] * stride + row] += gates[order[j]] * v;
                            });
        }
    }
};

template <class T>
void run(const Model& m, const Call& call, int threads) {
    Scratch scratch(m, call.scratch, threads);
    run_team(threads, [&](Team team) { Step<T>{m, call, scratch, team}.run(); });
}

}  // namespace

extern "C" int64_t nanokimi_scratch_floats(const Model* model, int threads) {
    return Scratch(*model, nullptr, threads).size;
}

extern "C" void nanokimi_step(const Model* model, const Call* call, int threads) {
    using Run = void (*)(const Model&, const Call&, int);
    static const Run formats[] = {run<float>, run<bf16>, run<fp16>, run<int8_t>};
    formats[model->format](*model, *call, threads);
}
