// LN(silu(gate) * value) and its gradients in float32, each row while it lies in the cache; gate.py calls it.
// Plain C with the vectors of GCC and Clang, which become what the processor has; no headers but libc's.

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

// `count` rows of n values, worked on in blocks; weight and bias have n. Each function uses what it needs. Whoever
// changes this changes the number in the functions' names, or gate.py would take an older build for this one.
struct rows {
    const float *gate, *value, *weight, *bias, *grad;
    float *out, *mean, *rstd;
    float *of_gate, *of_value, *of_weight, *of_bias;
    int64_t count, n, block;
    float eps;
};

// The next values of a row, zeros behind its end.
INLINE floats load(const float *from, int64_t left) {
    floats x = {0};
    if (left >= LANES)
        memcpy(&x, from, sizeof x);
    else
        memcpy(&x, from, 4 * left);
    return x;
}

INLINE void store(float *to, floats x, int64_t left) {
    if (left >= LANES)
        memcpy(to, &x, sizeof x);
    else
        memcpy(to, &x, 4 * left);
}

INLINE float total(floats x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

INLINE floats where(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

// exp(x) to two units in the last place, x held within +-87: Cody and Waite's reduction, the polynomial of Cephes.
INLINE floats exponential(floats x) {
    const floats zero = {0};
    x = where(x < -87.0f, zero - 87.0f, x);
    x = where(x > 87.0f, zero + 87.0f, x);
    floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: what is added loses its fraction
    floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
}

INLINE int64_t end(const struct rows *a, int64_t last) { return last * a->block < a->count ? last * a->block : a->count; }

INLINE void forward(const struct rows *a, int64_t first, int64_t last) {
    int64_t n = a->n;
    for (int64_t i = first * a->block; i < end(a, last); i++) {
        const float *gate = a->gate + i * n, *value = a->value + i * n;
        float *out = a->out + i * n;
        floats sum = {0}, squares = {0};
        for (int64_t j = 0; j < n; j += LANES) {
            floats g = load(gate + j, n - j);
            floats h = g / (exponential(-g) + 1.0f) * load(value + j, n - j);
            sum += h;
            store(out + j, h, n - j);
        }
        float mean = a->mean[i] = total(sum) / n;
        for (int64_t j = 0; j < n; j += LANES) {
            floats h = load(out + j, n - j) - mean;
            if (n - j < LANES) memset((char *)&h + 4 * (n - j), 0, 4 * (LANES - (n - j)));
            squares += h * h;
        }
        float variance = total(squares) / n;
        // Not finite where the squares overflowed, or nobody would hear of it.
        float rstd = a->rstd[i] = 1.0f / sqrtf(variance + a->eps) + (variance - variance);
        for (int64_t j = 0; j < n; j += LANES) {
            floats x = (load(out + j, n - j) - mean) * rstd;
            store(out + j, x * load(a->weight + j, n - j) + load(a->bias + j, n - j), n - j);
        }
    }
}

// The gradients of weight and bias are sums over rows: each `block` of rows adds to n values of its own.
INLINE void backward(const struct rows *a, int64_t first, int64_t last) {
    int64_t n = a->n;
    for (int64_t i = first * a->block; i < end(a, last); i++) {
        const float *gate = a->gate + i * n, *value = a->value + i * n, *grad = a->grad + i * n, *weight = a->weight;
        float *of_gate = a->of_gate + i * n, *of_value = a->of_value + i * n;
        float *of_weight = a->of_weight + i / a->block * n, *of_bias = a->of_bias + i / a->block * n;
        float mean = a->mean[i], rstd = a->rstd[i];
        floats sum = {0}, along = {0};
        for (int64_t j = 0; j < n; j += LANES) {
            int64_t left = n - j;
            floats g = load(gate + j, left), d = load(grad + j, left);
            floats s = 1.0f / (exponential(-g) + 1.0f), u = g * s;
            floats x = (u * load(value + j, left) - mean) * rstd, dx = d * load(weight + j, left);
            sum += dx;
            along += dx * x;
            store(of_weight + j, load(of_weight + j, left) + d * x, left);
            store(of_bias + j, load(of_bias + j, left) + d, left);
            store(of_gate + j, s, left);
            store(of_value + j, u, left);
        }
        float level = total(sum) / n, slope = total(along) / n;
        for (int64_t j = 0; j < n; j += LANES) {
            int64_t left = n - j;
            floats s = load(of_gate + j, left), u = load(of_value + j, left), v = load(value + j, left);
            floats x = (u * v - mean) * rstd;
            floats dh = (load(grad + j, left) * load(weight + j, left) - level - x * slope) * rstd;
            store(of_gate + j, dh * v * (s + u * (1.0f - s)), left);
            store(of_value + j, dh * u, left);
        }
    }
}

#if defined(__x86_64__) && !defined(NARROW)
#define WIDE __attribute__((target("avx2,fma")))
WIDE static void wide_forward(const struct rows *a, int64_t first, int64_t last) { forward(a, first, last); }
WIDE static void wide_backward(const struct rows *a, int64_t first, int64_t last) { backward(a, first, last); }
#define IS_WIDE (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define IS_WIDE 0
#define wide_forward forward
#define wide_backward backward
#endif

// Both work on the blocks from `first` to `last`, so that each thread may have its own.
void gated_norm_1(const struct rows *a, int64_t first, int64_t last) {
    if (IS_WIDE)
        wide_forward(a, first, last);
    else
        forward(a, first, last);
}

void gated_norm_backward_1(const struct rows *a, int64_t first, int64_t last) {
    if (IS_WIDE)
        wide_backward(a, first, last);
    else
        backward(a, first, last);
}
