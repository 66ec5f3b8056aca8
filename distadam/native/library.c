/* One pass over memory on the CPU: add the ranks' gradients, scale, load -> update -> store.
 *
 * Plain C without Python's or torch's headers, called through ctypes (distadam/native/__init__.py): one binary serves
 * every Python and every torch. Compiled with -ffp-contract=off, so that each operation rounds by itself; where a fused
 * multiply-add is meant, it is written. Numbers pass through blocks of 256 elements that stay in the first-level cache,
 * so loading, the rule and storing are separate loops, each vectorised, and storages combine freely.
 *
 * What the numbers mean is said elsewhere, and these lines follow it:
 *   rules        torch's fused operations, bit for bit (checked when the library is first used: kernels/compiled.py);
 *                RMSprop: distadam/rules/rmsprop.py
 *   split, stochastic weights    distadam/precision/rounding.py
 *   8-bit moments                distadam/precision/blockwise.py
 *   random bits                  distadam/precision/counters.py
 *   order of sums over ranks     distadam/comm/tree.py
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__ELF__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* Raised with every change that Python sees; a library of another version is not used. */
enum { VERSION = 3 };

/* DEPTH: of a tree over 2^31 ranks; LONG: bytes of a sum that does not stay in a cache */
enum { BLOCK = 256, DEPTH = 32, MAX_STATES = 3, MAX_MULTIPLIERS = 2, LONG = 1 << 20 };

enum type { FLOAT, BFLOAT16, HALF, EIGHT_BIT };
enum weights { OWN, MASTER, SPLIT, STOCHASTIC, ROUNDED };
enum rule { NONE = -1, ADAM, SGD, RMSPROP }; /* NONE: sum the squares, update nothing */
enum flag { MAXIMIZE = 1, DECOUPLED = 2, AMSGRAD = 4, NESTEROV = 8, FIRST = 16, CENTERED = 32, DECAYS = 64, MOMENTUM = 128 };

/* Random bits: the key and first lane of every 256 elements of the shard; see counters.py. */
struct counters {
    const uint32_t *keys;
    const uint32_t *lanes;
};

struct state {
    void *values;
    float *scales; /* EIGHT_BIT only */
    struct counters counters;
    int32_t type;
    int32_t levels;
};

/* All pointers are to the first element of the shard, those of sources to element `origin` of it. */
struct update {
    const void *const *sources; /* the gradient on every rank, by rank */
    void *param;
    void *extra; /* MASTER: float; SPLIT: the low halves */
    double *squares; /* not NULL: the sum of squares of the summed gradient is added to it */
    struct counters counters;
    struct state states[MAX_STATES];
    int64_t origin;
    int32_t num_sources, source_type;
    int32_t weights, param_type;
    int32_t rule, flags, num_states, num_multipliers;
    uint32_t step;
    float num_ranks, loss_scale; /* divided by unless 0 */
    float multipliers[MAX_MULTIPLIERS];
    float lr, decay, eps; /* decay: of AdamW 1 - lr weight_decay, else weight_decay */
    float beta1, gain1, beta2, gain2; /* SGD: momentum, 1 - dampening; RMSprop: momentum, -, alpha, 1 - alpha */
    float correction; /* ADAM: sqrt(1 - beta2^step) */
};

/* Bits ------------------------------------------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

INLINE float of_half(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    uint32_t u = bits_of(float_of(magnitude) * 0x1p112f);
    u = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : u;
    return float_of(u | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t to_half(float x) {
    uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
    float scaled = (float_of(magnitude) * 0x1p112f) * 0x1p-110f; /* overflows to infinity where a half does */
    uint32_t bias = (u << 1) & 0xff000000;
    bias = bias < 0x71000000 ? 0x71000000 : bias;
    uint32_t sum = bits_of(float_of((bias >> 1) + 0x07800000) + scaled);
    uint32_t half = ((sum >> 13) & 0x7c00) + (sum & 0xfff);
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(u >> 16 & 0x8000) | (uint16_t)half;
}

INLINE void widen(const void *from, int type, float *restrict to, int n) {
    const uint16_t *restrict halves = from;
    if (type == FLOAT)
        memcpy(to, from, (size_t)n * 4);
    else if (type == BFLOAT16)
        for (int i = 0; i < n; i++) to[i] = float_of((uint32_t)halves[i] << 16);
    else
        for (int i = 0; i < n; i++) to[i] = of_half(halves[i]);
}

INLINE void narrow(const float *restrict from, void *to, int type, int n) {
    uint16_t *restrict halves = to;
    if (type == FLOAT)
        memcpy(to, from, (size_t)n * 4);
    else if (type == BFLOAT16)
        for (int i = 0; i < n; i++) halves[i] = to_bfloat16(from[i]);
    else
        for (int i = 0; i < n; i++) halves[i] = to_half(from[i]);
}

/* Random bits ------------------------------------------------------------------------------------------------------ */

INLINE uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352d;
    x ^= x >> 15;
    x *= 0x846ca68b;
    return x ^ x >> 16;
}

INLINE void draw(const struct counters *counters, int64_t at, uint32_t step, uint16_t *restrict out, int n) {
    uint32_t offset = mix((counters->keys[at / BLOCK] ^ step) + 0x9e3779b9u);
    uint16_t first = (uint16_t)(counters->lanes[at / BLOCK] + offset);
    for (int i = 0; i < n; i++) {
        uint16_t x = (uint16_t)(first + i);
        x = (uint16_t)((x ^ x >> 7) * 0x2993u);
        x = (uint16_t)((x ^ x >> 5) * 0xe877u);
        x = (uint16_t)((x ^ x >> 9) * 0x0235u);
        out[i] = (uint16_t)(x ^ x >> 10);
    }
}

/* 8-bit moments ---------------------------------------------------------------------------------------------------- */

INLINE int32_t base_of(float scale, int32_t levels) {
    int32_t base = (int32_t)(bits_of(scale) >> 20 & 2047) - levels;
    return base < 0 ? 0 : base;
}

/* What floats have in their upper halves is 16 times a level, so loops count in 16 bits: twice as many at a time. */
INLINE void decode(const uint8_t *restrict codes, float scale, int32_t levels, float *restrict out) {
    const uint16_t base = (uint16_t)base_of(scale, levels);
    uint16_t high[BLOCK];
    if (levels == 127)
        for (int i = 0; i < BLOCK; i++) {
            uint16_t level = codes[i] & 0x7f, sign = (uint16_t)((codes[i] & 0x80) << 8);
            uint16_t magnitude = (uint16_t)((level + base) << 4);
            high[i] = sign | (level == 0 ? 0 : magnitude);
        }
    else
        for (int i = 0; i < BLOCK; i++) high[i] = (uint16_t)((codes[i] + base) << 4);
    if (scale != scale)
        for (int i = 0; i < BLOCK; i++) high[i] = 0x7fc0;
    for (int i = 0; i < BLOCK; i++) out[i] = float_of((uint32_t)high[i] << 16);
}

INLINE void encode(const float *restrict in, const uint16_t *restrict random, int32_t levels, uint8_t *restrict codes,
                   float *scale) {
    int32_t y[BLOCK], largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint32_t magnitude = bits_of(in[i]) & 0x7fffffff;
        magnitude = magnitude > 0x7fc00000 ? 0x7fc00000 : magnitude;
        y[i] = (int32_t)((magnitude + ((uint32_t)random[i] << 4)) >> 20);
        largest = y[i] > largest ? y[i] : largest;
    }
    uint32_t units = 0;
    if (largest > 2032)
        units = 0x7fc;
    else if (largest > 0)
        units = (uint32_t)((largest + 7) & ~7) < 256 ? 256 : (uint32_t)((largest + 7) & ~7);
    *scale = float_of(units << 20);
    int32_t base = base_of(*scale, levels);
    for (int i = 0; i < BLOCK; i++) {
        int32_t code = y[i] - base;
        y[i] = code < 0 ? 0 : code;
    }
    if (levels == 127)
        for (int i = 0; i < BLOCK; i++) codes[i] = (uint8_t)((uint32_t)y[i] | (bits_of(in[i]) >> 24 & 0x80));
    else
        for (int i = 0; i < BLOCK; i++) codes[i] = (uint8_t)y[i];
}

/* The sum over ranks ----------------------------------------------------------------------------------------------- */

INLINE void add(float *restrict to, const float *restrict x, int n) {
    for (int i = 0; i < n; i++) to[i] += x[i];
}

/* Add n elements, from element `at` on, of every rank's buffer in the order of a binary tree over ranks whose left
 * halves are powers of two: like the carries of a binary counter. Floats are taken four or two ranks at a time. */
INLINE void tree_sum(const void *const *sources, int num_sources, int type, int64_t at, float *restrict out, int n) {
    float stack[DEPTH][BLOCK];
    int sizes[DEPTH], top = 0, size;
    for (int rank = 0; rank < num_sources; rank += size) {
        const float *const *x = (const float *const *)sources + rank;
        size = type != FLOAT ? 1 : num_sources - rank >= 4 ? 4 : num_sources - rank >= 2 ? 2 : 1;
        float *restrict sum = size == num_sources ? out : stack[top];
        if (size == 4)
            for (int i = 0; i < n; i++) sum[i] = (x[0][at + i] + x[1][at + i]) + (x[2][at + i] + x[3][at + i]);
        else if (size == 2)
            for (int i = 0; i < n; i++) sum[i] = x[0][at + i] + x[1][at + i];
        else
            widen((const char *)sources[rank] + at * (type == FLOAT ? 4 : 2), type, sum, n);
        if (size == num_sources) return;
        sizes[top++] = size;
        while (top > 1 && sizes[top - 1] == sizes[top - 2]) {
            add(stack[top - 2], stack[top - 1], n);
            sizes[--top - 1] *= 2;
        }
    }
    for (; top > 1; top--) add(stack[top - 2], stack[top - 1], n);
    memcpy(out, stack[0], (size_t)n * 4);
}

/* float32 sums of 8 squares over 64 elements, added up in double: the same for every cut at 64. */
INLINE double squares(const float *restrict x, int n) {
    double lanes[8] = {0};
    for (int start = 0; start < n; start += 64) {
        float sums[8] = {0};
        for (int i = 0; i < 8; i++)
            for (int lane = 0; lane < 8; lane++) sums[lane] += x[start + 8 * i + lane] * x[start + 8 * i + lane];
        for (int lane = 0; lane < 8; lane++) lanes[lane] += (double)sums[lane];
    }
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/* Rules ------------------------------------------------------------------------------------------------------------ */

INLINE void scale(const struct update *u, float *restrict g, int n) {
    if (u->num_ranks != 0)
        for (int i = 0; i < n; i++) g[i] /= u->num_ranks;
    for (int k = 0; k < u->num_multipliers; k++)
        for (int i = 0; i < n; i++) g[i] *= u->multipliers[k];
    if (u->loss_scale != 0)
        for (int i = 0; i < n; i++) g[i] /= u->loss_scale;
    if (u->flags & MAXIMIZE)
        for (int i = 0; i < n; i++) g[i] = -g[i];
}

/* Where a rule that reads the ranks' gradients in place finds those of a block, 1, 2 or 4: it adds them up (`sum` is left
 * with that) and multiplies as it goes. `share` is one over the number of ranks. */
struct gradient {
    const float *parts[4];
    float *sum;
    float share, multipliers[MAX_MULTIPLIERS];
};

INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }

/* One loop, so that the square root and the divisions of some elements overlap the loads of others. The last five
 * arguments are constants where it is called. */
INLINE void adam_loop(const struct update *u, float *restrict w, const struct gradient *gradient, float *restrict m,
                      float *restrict v, float *restrict most, int n, int num_parts, int near, int decays, int decoupled,
                      int amsgrad) {
    const float *restrict a = gradient->parts[0], *restrict b = gradient->parts[1];
    const float *restrict c = gradient->parts[2], *restrict d = gradient->parts[3];
    float *restrict sum = gradient->sum;
    const float share = gradient->share, first = gradient->multipliers[0], second = gradient->multipliers[1];
    const float lr = -u->lr, decay = u->decay, eps = u->eps, correction = u->correction;
    const float weight = near ? u->gain1 : u->gain1 - 1.0f, beta2 = u->beta2, gain2 = u->gain2;
    for (int i = 0; i < n; i++) {
        float g = a[i], x = w[i];
        if (num_parts > 1) {
            g = num_parts == 2 ? g + b[i] : (g + b[i]) + (c[i] + d[i]);
            sum[i] = g;
        }
        g = g * share * first * second;
        if (decays && decoupled) x *= decay;
        if (decays && !decoupled) g = __builtin_fmaf(x, decay, g);
        float mean = __builtin_fmaf(weight, g - m[i], near ? m[i] : g);
        float square = __builtin_fmaf(gain2 * g, g, v[i] * beta2);
        m[i] = mean;
        v[i] = square;
        if (amsgrad) most[i] = square = larger(most[i], square);
        w[i] = x + lr * mean / (sqrtf(square) / correction + eps);
    }
}

INLINE void adam(const struct update *u, float *w, const struct gradient *g, int num_parts, float *m, float *v,
                 float *most, int n) {
    const int near = fabsf(u->gain1) < 0.5f, decays = u->flags & DECAYS, decoupled = (u->flags & DECOUPLED) != 0;
#define LOOP(PARTS, NEAR, DECAYS, DECOUPLED, AMSGRAD) adam_loop(u, w, g, m, v, most, n, PARTS, NEAR, DECAYS, DECOUPLED, AMSGRAD)
#define LOOPS(PARTS) \
    if (!near || u->flags & AMSGRAD) \
        LOOP(PARTS, near, decays, decoupled, u->flags & AMSGRAD); \
    else if (!decays) \
        LOOP(PARTS, 1, 0, 0, 0); \
    else if (decoupled) \
        LOOP(PARTS, 1, 1, 1, 0); \
    else \
        LOOP(PARTS, 1, 1, 0, 0);
    if (num_parts == 1) {
        LOOPS(1)
    } else if (num_parts == 2) {
        LOOPS(2)
    } else {
        LOOPS(4)
    }
#undef LOOPS
#undef LOOP
}

INLINE void sgd(const struct update *u, float *restrict w, float *restrict g, float *restrict buffer, int n) {
    const float lr = -u->lr, decay = u->decay, momentum = u->beta1, gain = u->gain1;
    const float *restrict direction = g;
    if (u->flags & DECAYS)
        for (int i = 0; i < n; i++) g[i] = __builtin_fmaf(w[i], decay, g[i]);
    if (u->flags & MOMENTUM) {
        if (u->flags & FIRST)
            memcpy(buffer, g, (size_t)n * 4);
        else
            for (int i = 0; i < n; i++) buffer[i] = __builtin_fmaf(g[i], gain, buffer[i] * momentum);
        if (u->flags & NESTEROV)
            for (int i = 0; i < n; i++) g[i] = __builtin_fmaf(buffer[i], momentum, g[i]);
        else
            direction = buffer;
    }
    for (int i = 0; i < n; i++) w[i] = __builtin_fmaf(direction[i], lr, w[i]);
}

INLINE void rmsprop(const struct update *u, float *restrict w, float *restrict g, float *restrict v, float *restrict buffer,
                    float *restrict average, int n) {
    const float lr = -u->lr, decay = u->decay, eps = u->eps, momentum = u->beta1, alpha = u->beta2, gain = u->gain2;
    float x[BLOCK];
    if (u->flags & DECAYS)
        for (int i = 0; i < n; i++) g[i] += w[i] * decay;
    for (int i = 0; i < n; i++) v[i] = v[i] * alpha + gain * g[i] * g[i];
    if (u->flags & CENTERED)
        for (int i = 0; i < n; i++) {
            average[i] = average[i] * alpha + gain * g[i];
            x[i] = v[i] - average[i] * average[i];
        }
    else
        memcpy(x, v, (size_t)n * 4);
    for (int i = 0; i < n; i++) x[i] = 1.0f / (1.0f / sqrtf(x[i])) + eps;
    if (u->flags & MOMENTUM)
        for (int i = 0; i < n; i++) {
            buffer[i] = buffer[i] * momentum + g[i] / x[i];
            w[i] += lr * buffer[i];
        }
    else
        for (int i = 0; i < n; i++) w[i] += lr * g[i] / x[i];
}

/* Load -> update -> store ------------------------------------------------------------------------------------------ */

INLINE void load_weights(const struct update *u, int64_t at, float *restrict w, int n) {
    const uint16_t *restrict param = (const uint16_t *)u->param + at;
    if (u->weights == SPLIT) {
        const int16_t *restrict low = (const int16_t *)u->extra + at;
        for (int i = 0; i < n; i++) w[i] = float_of(((uint32_t)param[i] << 16) + (uint32_t)(int32_t)low[i]);
    } else
        widen(param, u->param_type, w, n);
}

INLINE void store_weights(const struct update *u, int64_t at, const float *restrict w, int n) {
    uint16_t *restrict param = (uint16_t *)u->param + at;
    if (u->weights == SPLIT) {
        int16_t *restrict low = (int16_t *)u->extra + at;
        for (int i = 0; i < n; i++) {
            uint32_t b = bits_of(w[i]);
            uint32_t quiet = (b >> 16 & 0x8000) | 0x7fc0;
            param[i] = (b & 0x7fffffff) > 0x7f800000 ? (uint16_t)quiet : (uint16_t)((b + 0x8000) >> 16);
            low[i] = (int16_t)(uint16_t)b;
        }
    } else if (u->weights == STOCHASTIC) {
        uint16_t random[BLOCK];
        draw(&u->counters, at, u->step, random, n);
        for (int i = 0; i < n; i++) {
            uint32_t b = bits_of(w[i]), magnitude = b & 0x7fffffff;
            uint32_t high = (b + random[i]) >> 16;
            high = (high & 0x7f80) == 0x7f80 ? (b >> 16 & 0x8000) | 0x7f7f : high;
            uint32_t kept = magnitude > 0x7f800000 ? (b >> 16) | 0x0040 : b >> 16;
            param[i] = (uint16_t)(magnitude >= 0x7f800000 ? kept : high);
        }
    } else
        narrow(w, param, u->param_type, n);
}

INLINE void load_state(const struct state *s, int64_t at, float *restrict x, int n) {
    if (s->type == EIGHT_BIT)
        decode((const uint8_t *)s->values + at, s->scales[at / BLOCK], s->levels, x);
    else
        widen((const uint16_t *)s->values + at, s->type, x, n);
}

INLINE void store_state(const struct state *s, int64_t at, uint32_t step, const float *restrict x, int n) {
    if (s->type == EIGHT_BIT) {
        uint16_t random[BLOCK];
        draw(&s->counters, at, step, random, n);
        encode(x, random, s->levels, (uint8_t *)s->values + at, s->scales + at / BLOCK);
    } else
        narrow(x, (uint16_t *)s->values + at, s->type, n);
}

/* Whether the rule can read the ranks' gradients where they lie. Multiplying is as good as dividing, bit for bit, where
 * the number of ranks is a power of two (or 0: not divided by). */
INLINE int reads_ranks(const struct update *u) {
    int few = u->num_sources == 1 || u->num_sources == 2 || u->num_sources == 4;
    int halves = (bits_of(u->num_ranks) & 0x7fffff) == 0;
    return u->rule == ADAM && u->source_type == FLOAT && few && halves && u->loss_scale == 0 && !(u->flags & MAXIMIZE);
}

INLINE double update_block(const struct update *u, int64_t at, int n, int in_place) {
    float sum[BLOCK], weight[BLOCK], state[MAX_STATES][BLOCK];
    float *w = weight, *s[MAX_STATES] = {state[0], state[1], state[2]};
    struct gradient read = {.parts = {sum}, .sum = sum, .share = 1, .multipliers = {1, 1}};
    double total = 0;
    if (in_place) {
        for (int k = 0; k < u->num_sources; k++) read.parts[k] = (const float *)u->sources[k] + (at - u->origin);
        if (u->num_ranks != 0) read.share = 1 / u->num_ranks;
        for (int k = 0; k < u->num_multipliers; k++) read.multipliers[k] = u->multipliers[k];
    } else {
        tree_sum(u->sources, u->num_sources, u->source_type, at - u->origin, sum, n);
        if (u->squares) total = squares(sum, n);
        if (u->rule == NONE) return total;
        scale(u, sum, n);
    }
    if (u->weights == OWN)
        w = (float *)u->param + at;
    else if (u->weights == MASTER)
        w = (float *)u->extra + at;
    else
        load_weights(u, at, w, n);
    for (int k = 0; k < u->num_states; k++)
        if (u->states[k].type == FLOAT)
            s[k] = (float *)u->states[k].values + at;
        else
            load_state(&u->states[k], at, s[k], n);
    if (u->rule == ADAM)
        adam(u, w, &read, in_place ? u->num_sources : 1, s[0], s[1], s[2], n);
    else if (u->rule == SGD)
        sgd(u, w, sum, s[0], n);
    else if (u->flags & MOMENTUM)
        rmsprop(u, w, sum, s[0], s[1], s[2], n);
    else
        rmsprop(u, w, sum, s[0], NULL, s[1], n);
    if (in_place && u->squares) total = squares(u->num_sources == 1 ? read.parts[0] : sum, n);
    if (u->weights == MASTER)
        narrow(w, (uint16_t *)u->param + at, u->param_type, n);
    else if (u->weights != OWN)
        store_weights(u, at, w, n);
    for (int k = 0; k < u->num_states; k++)
        if (u->states[k].type != FLOAT) store_state(&u->states[k], at, u->step, s[k], n);
    return total;
}

API int32_t distadam_version(void) { return VERSION * 65536 + (int32_t)sizeof(struct update); }

/* Update elements [start, end) of the shard, multiples of 64 (of 256 where there are blocks or random bits). */
API CLONES void distadam_update(const struct update *u, int64_t start, int64_t end) {
    const int in_place = reads_ranks(u);
    double total = 0;
    for (int64_t at = start; at < end; at += BLOCK) {
        int n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        total += update_block(u, at, n, in_place);
    }
    if (u->squares) *u->squares += total;
}

/* Write past the cache; the caller ends with `written`. */
INLINE void stream(void *to, const void *from, int64_t nbytes) {
#if defined(__SSE2__)
    char *out = to;
    const char *in = from;
    int64_t at = (int64_t)(-(uintptr_t)out & 63);
    at = at < nbytes ? at : nbytes;
    memcpy(out, in, (size_t)at);
    for (; at + 64 <= nbytes; at += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)(in + at)), b = _mm_loadu_si128((const __m128i *)(in + at + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(in + at + 32)), d = _mm_loadu_si128((const __m128i *)(in + at + 48));
        _mm_stream_si128((__m128i *)(out + at), a);
        _mm_stream_si128((__m128i *)(out + at + 16), b);
        _mm_stream_si128((__m128i *)(out + at + 32), c);
        _mm_stream_si128((__m128i *)(out + at + 48), d);
    }
    memcpy(out + at, in + at, (size_t)(nbytes - at));
#else
    memcpy(to, from, (size_t)nbytes);
#endif
}

INLINE void written(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Add n elements of every rank's buffer; `out` is float and may be one of the buffers. A long sum goes past the cache:
 * it is read much later, by the update. */
API CLONES void distadam_sum(const void *const *sources, int32_t num_sources, int32_t type, float *out, int64_t n) {
    float sum[BLOCK];
    for (int64_t at = 0; at < n; at += BLOCK) {
        int count = n - at < BLOCK ? (int)(n - at) : BLOCK;
        tree_sum(sources, num_sources, type, at, sum, count);
        if (n * 4 >= LONG)
            stream(out + at, sum, (int64_t)count * 4);
        else
            memcpy(out + at, sum, (size_t)count * 4);
    }
    written();
}

/* Copy past the cache: what is written is read much later, by another rank. */
API void distadam_copy(void *to, const void *from, int64_t nbytes) {
    stream(to, from, nbytes);
    written();
}
