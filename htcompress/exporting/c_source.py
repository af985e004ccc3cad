"""What a recurrent layer in C consists of, whatever its weights are: C99 without allocation."""

HEADER = """\
/* {title}
 * Made by htcompress from {source}. C99; needs math.h and no memory but the caller's.
 *
 * All arrays are row-major. States are kept by the caller and begin with zeros; they are those of
 * layer 0 forward, layer 0 backward, layer 1 forward, ...
 */
#ifndef {guard}_H
#define {guard}_H

#define {guard}_INPUTS {inputs}    /* numbers of a step that goes in */
#define {guard}_OUTPUTS {outputs}   /* numbers of a step that comes out */
#define {guard}_STATE {state}     /* numbers of h, and of c where there is one */
#define {guard}_NUMBERS {numbers}   /* floats that {name}_decode() writes */
#define {guard}_WORK(steps) ({scratch} + (steps) * {per_step})   /* floats of working memory */

/* Write the numbers of all cores into a buffer once; from then on they are read there, which is faster.
 * Without it, or after {name}_decode(0), each is decoded where it is used. */
void {name}_decode(float *buffer);

/* A whole sequence: x is steps x INPUTS, out steps x OUTPUTS; h and c (may be 0 where there is none) go in and out. */
void {name}_sequence(const float *x, int steps, float *h, float *c, float *out, float *work);
{step}
#endif
"""

STEP = """
/* One step: x is INPUTS, out OUTPUTS; working memory as for one step. */
void {name}_step(const float *x, float *h, float *c, float *out, float *work);
"""

TYPES = """\
#include <math.h>
#include <stdint.h>
#include "{name}.h"

/* A core: numbers as they are (32 bits), in half precision (16), or codes of 2 to 8 bits with a scale for every `row`
 * of them: (code + 1/2 - 2^(bits-1)) * scale. `at` is its place in the buffer of
 * {name}_decode(). */
typedef struct {{ const void *data; const float *scales; int32_t row, count, at; int bits; }} core_t;

/* One product of what lies in the working memory at a with core b, summed over what they share: loops of (size, stride
 * of a, of b, of the result), the innermost last. */
typedef struct {{ int32_t a, b, out, size; const int32_t *loops; int count; }} product_t;

/* A matrix times a vector, product by product; the vector lies at the beginning of the working memory. */
typedef struct {{ const product_t *products; int count; int32_t columns, result; }} matrix_t;

"""

RUNTIME = """\
static const float *decoded;

static float half(uint16_t bits) {
    int exponent = (bits >> 10) & 31;
    float fraction = (float)(bits & 1023) / 1024.0f;
    float value = exponent ? ldexpf(1.0f + fraction, exponent - 15) : ldexpf(fraction, -14);
    return bits & 0x8000 ? -value : value;
}

static float coded(const core_t *c, int32_t i) {
    if (c->bits == 32) return ((const float *)c->data)[i];
    if (c->bits == 16) return half(((const uint16_t *)c->data)[i]);
    const uint8_t *bytes = (const uint8_t *)c->data;
    int64_t first = (int64_t)i * c->bits;
    unsigned word = bytes[first >> 3], shift = (unsigned)(first & 7);
    if (shift + (unsigned)c->bits > 8u) word |= (unsigned)bytes[(first >> 3) + 1] << 8;
    word = (word >> shift) & ((1u << c->bits) - 1u);
    return ((float)word + 0.5f - (float)(1 << (c->bits - 1))) * c->scales[c->row == c->count ? 0 : i / c->row];
}

static float number(const core_t *c, int32_t i) {
    return decoded ? decoded[c->at + i] : coded(c, i);
}

/* Where the numbers of a core lie; 0 where they are decoded one by one. */
static const float *plain(int32_t k) {
    if (decoded) return decoded + cores[k].at;
    return cores[k].bits == 32 ? (const float *)cores[k].data : 0;
}

/* The innermost loop of a product. */
static void inner(const product_t *p, const int32_t *l, int32_t a, int32_t b, int32_t o, float *work) {
    const float *left = work + p->a, *right = plain(p->b);
    float *made = work + p->out + o, sum = 0.0f;
    if (right && l[3] == 0) {
        for (int32_t i = 0; i < l[0]; i++) sum += left[a + i * l[1]] * right[b + i * l[2]];
        *made += sum;
    } else if (right) {
        for (int32_t i = 0; i < l[0]; i++) made[i * l[3]] += left[a + i * l[1]] * right[b + i * l[2]];
    } else if (l[2] == 0) {
        float once = coded(&cores[p->b], b);
        for (int32_t i = 0; i < l[0]; i++) made[i * l[3]] += left[a + i * l[1]] * once;
    } else {
        for (int32_t i = 0; i < l[0]; i++) made[i * l[3]] += left[a + i * l[1]] * coded(&cores[p->b], b + i * l[2]);
    }
}

static void product(const product_t *p, float *work) {
    int32_t index[LOOPS] = {0}, a = 0, b = 0, o = 0;
    const int32_t *last = p->loops + 4 * (p->count - 1);
    for (int32_t i = 0; i < p->size; i++) work[p->out + i] = 0.0f;
    for (;;) {
        inner(p, last, a, b, o, work);
        int k = p->count - 2;
        for (; k >= 0; k--) {
            const int32_t *l = p->loops + 4 * k;
            a += l[1]; b += l[2]; o += l[3];
            if (++index[k] < l[0]) break;
            a -= l[0] * l[1]; b -= l[0] * l[2]; o -= l[0] * l[3];
            index[k] = 0;
        }
        if (k < 0) return;
    }
}

static const float *times(const matrix_t *m, float *work) {
    for (int i = 0; i < m->count; i++) product(&m->products[i], work);
    return work + m->result;
}

#if KIND == LSTM || KIND == GRU
static float sigmoid(float x) {
    return x >= 0.0f ? 1.0f / (1.0f + expf(-x)) : expf(x) / (1.0f + expf(x));
}
#endif

typedef struct {
    int ih, hh, joint, bias, bias_hn, inputs, extra;
    const uint16_t *order;
    const int8_t *exponents;
} direction_t;
"""

BODY = """
/* What enters the gates of one direction, added to z, rows in the order of the units: of x (and the biases) and h, of
 * which one may be left out. Only one joint matrix takes both. */
static void entering(const direction_t *d, const float *x, const float *h, float *z, float *work) {
    const matrix_t *m = &matrices[d->joint >= 0 ? d->joint : h ? d->hh : d->ih];
    for (int32_t i = 0; i < m->columns; i++) work[i] = 0.0f;
    int at = d->joint >= 0 ? d->inputs : 0;
    if (x) for (int i = 0; i < d->inputs; i++) work[i] = d->exponents ? ldexpf(x[i], d->exponents[i]) : x[i];
    if (h) for (int u = 0; u < UNITS; u++) work[at + (d->order ? d->order[u] : u)] = h[u];
    if (d->joint >= 0) {
        if (x && d->extra > 0) work[d->inputs + UNITS] = 1.0f;
        if (h && d->extra > 1) work[d->inputs + UNITS + 1] = 1.0f;
    }
    const float *y = times(m, work);
    for (int g = 0; g < GATES; g++)
        for (int u = 0; u < UNITS; u++) z[g * UNITS + u] += y[g * UNITS + (d->order ? d->order[u] : u)];
}

static void step(const direction_t *d, const float *x, float *h, float *c, float *work) {
    float *zx = work + GATED, *zh = work + GATED + GATES * UNITS;
    for (int i = 0; i < GATES * UNITS; i++) {
        zx[i] = d->bias >= 0 ? number(&cores[d->bias], i) : 0.0f;
        zh[i] = 0.0f;
    }
    /* A GRU keeps apart what comes of the state. */
    if (d->joint >= 0 && KIND != GRU) {
        entering(d, x, h, zx, work);
    } else {
        entering(d, x, 0, zx, work);
        entering(d, 0, h, zh, work);
    }
    for (int u = 0; u < UNITS; u++) {
#if KIND == LSTM
        float i = sigmoid(zx[u] + zh[u]), f = sigmoid(zx[UNITS + u] + zh[UNITS + u]);
        float g = tanhf(zx[2 * UNITS + u] + zh[2 * UNITS + u]), o = sigmoid(zx[3 * UNITS + u] + zh[3 * UNITS + u]);
        c[u] = f * c[u] + i * g;
        h[u] = o * tanhf(c[u]);
#elif KIND == GRU
        float r = sigmoid(zx[u] + zh[u]), z = sigmoid(zx[UNITS + u] + zh[UNITS + u]);
        float hn = zh[2 * UNITS + u] + (d->bias_hn >= 0 ? number(&cores[d->bias_hn], u) : 0.0f);
        float n = tanhf(zx[2 * UNITS + u] + r * hn);
        h[u] = (1.0f - z) * n + z * h[u];
#elif KIND == TANH
        h[u] = tanhf(zx[u] + zh[u]);
#else
        float s = zx[u] + zh[u];
        h[u] = s > 0.0f ? s : 0.0f;
#endif
    }
    (void)c;
}

void NAME_sequence(const float *x, int steps, float *h, float *c, float *out, float *work) {
    float *between[2] = {work + SCRATCH, work + SCRATCH + (int32_t)steps * WIDTH};
    const float *given = x;
    for (int layer = 0; layer < LAYERS; layer++) {
        float *made = layer == LAYERS - 1 ? out : between[layer % 2];
        for (int k = 0; k < DIRECTIONS; k++) {
            int index = layer * DIRECTIONS + k;
            const direction_t *d = &directions[index];
            float *hk = h + index * UNITS, *ck = c ? c + index * UNITS : 0;
            for (int t = 0; t < steps; t++) {
                int at = k ? steps - 1 - t : t;
                step(d, given + (int32_t)at * d->inputs, hk, ck, work);
                for (int u = 0; u < UNITS; u++) made[(int32_t)at * WIDTH + k * UNITS + u] = hk[u];
            }
        }
        given = made;
    }
}

void NAME_decode(float *buffer) {
    decoded = 0;
    if (!buffer) return;
    for (int k = 0; k < CORES; k++)
        for (int32_t i = 0; i < cores[k].count; i++) buffer[cores[k].at + i] = coded(&cores[k], i);
    decoded = buffer;
}
"""

ONE_STEP = """
void NAME_step(const float *x, float *h, float *c, float *out, float *work) {
    NAME_sequence(x, 1, h, c, out, work);
}
"""

TEST = """\
/* A sequence and what torch answers; prints the largest difference, and ends with 1 where it is beyond 1e-5. */
#include <math.h>
#include <stdio.h>
#include "{name}.h"

#define STEPS {steps}
static const float x[STEPS * {guard}_INPUTS] = {{{x}}};
static const float wanted[STEPS * {guard}_OUTPUTS] = {{{wanted}}};
static float out[STEPS * {guard}_OUTPUTS], h[{guard}_STATE], c[{guard}_STATE];
static float work[{guard}_WORK(STEPS)], buffer[{guard}_NUMBERS];

static float run(void) {{
    float worst = 0.0f;
    for (int i = 0; i < {guard}_STATE; i++) h[i] = c[i] = 0.0f;
    {name}_sequence(x, STEPS, h, c, out, work);
    for (int i = 0; i < STEPS * {guard}_OUTPUTS; i++) {{
        float apart = fabsf(out[i] - wanted[i]);
        if (!(apart <= worst)) worst = apart;
    }}
    return worst;
}}

int main(void) {{
    float first = run();
    {name}_decode(buffer);
    float second = run();
    printf("largest difference %g, decoded once %g\\n", (double)first, (double)second);
    return first <= 1e-5f && second <= 1e-5f ? 0 : 1;
}}
"""
