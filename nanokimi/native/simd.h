// Vectors of floats as wide as the machine's registers, and weights of every format widened to them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
constexpr bool MANY_REGISTERS = false;
#else
constexpr int WIDTH = 4;
constexpr bool MANY_REGISTERS = true;  // NEON has 32
#endif
// Short loops over arrays of vectors are unrolled: only then does the compiler keep the arrays in registers.
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
// Rows of matrices, activations and cache are padded with zeros to a multiple of PAD floats. So loops over vectors have
// no remainder, and every row begins at a cache line of 64 bytes.
constexpr int PAD = 16;
static_assert(PAD % WIDTH == 0, "padded rows hold whole vectors");

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef float VecAt __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));  // need not be aligned to vectors

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

inline Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }

inline void store(float* p, Vec v) { *reinterpret_cast<VecAt*>(p) = v; }

inline Vec all(float x) { return x - Vec{}; }

// a * b + c, rounded once if the machine can do that. Nothing else is fused: see FLAGS in build.py.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// bf16 is the upper half of an fp32.
#if defined(__AVX512F__)
inline __m256i bits256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Vec load(const bf16* p) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits256(p)), 16); }
inline Vec load(const fp16* p) { return (Vec)_mm512_cvtph_ps(bits256(p)); }
inline Vec load(const int8_t* p) {
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline __m128i bits128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Vec load(const bf16* p) { return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits128(p)), 16); }
inline Vec load(const fp16* p) { return (Vec)_mm256_cvtph_ps(bits128(p)); }
inline Vec load(const int8_t* p) {
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
inline Vec load(const bf16* p) {
    typedef uint16_t Bits __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(4 * WIDTH)));
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const Bits*>(p), Wide) << 16);
}
inline float widened(uint16_t half) {  // shifted to the place of an fp32; the product corrects the exponent's bias
    uint32_t bits = (half & 0x8000u) << 16 | (half & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value * 0x1p112f;
}
inline Vec load(const fp16* p) {
    Vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = widened(p[i].bits);
    return v;
}
inline Vec load(const int8_t* p) {
    typedef int8_t Bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
    typedef int32_t Wide __attribute__((vector_size(4 * WIDTH)));
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Wide), Vec);
}
#endif

// The sum of all lanes, always in the same order, so that a result does not depend on which function asked for it.
inline float sum(Vec v) {
#if defined(__AVX__)
#if defined(__AVX512F__)
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
#else
    __m256 y = v;
#endif
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
template <int HALF>
constexpr int folded_lane(int i) {
    return (i < WIDTH / 2 ? 0 : WIDTH) + i % (WIDTH / 2) / HALF * 2 * HALF + i % HALF;
}

// Adds the halves of every group of 2 HALF lanes; those of a come first.
template <int HALF, int... I>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, folded_lane<HALF>(I)...) +
           __builtin_shufflevector(a, b, (folded_lane<HALF>(I) + HALF)...);
}

// The sum of each of WIDTH vectors, each in the order of sum(): a third of the instructions.
template <int N>
inline Vec sums(const Vec (&v)[N]) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        Vec halves[N / 2];
        UNROLL for (int i = 0; i < N / 2; i++)
            halves[i] = fold<N / 2>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, WIDTH>{});
        return sums(halves);
    }
}
#endif

// out = the sums of R N vectors.
template <int R, int N>
inline void sum_all(const Vec (&v)[R][N], float (&out)[R][N]) {
#ifdef SHUFFLES
    if constexpr (R * N == WIDTH) return store(out[0], sums(reinterpret_cast<const Vec(&)[R * N]>(v)));
#endif
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) out[r][j] = sum(v[r][j]);
}

// exp to within 2 units of the last place; 0 below the normal numbers. Branch-free, so that loops over it vectorise.
// Range reduction and polynomial as in Cephes' expf.
inline float fast_exp(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = __builtin_fmaf(bounded, 1.44269504f, 12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number
    float n = shifted - 12582912.0f;
    float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, bounded));
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
