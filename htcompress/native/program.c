/* The time steps of a recurrent layer whose recurrent matrix is a product of two thin factors, or whole; and products of
 * a few long vectors with a few others. All in float32, on one thread.
 *
 * Of a layer, which has one direction, matrices are given in tiles: of a matrix (inner, outer) all rows of TILE columns,
 * then those of the next TILE, so that what is read lies behind each other. The outer size of each is a multiple of
 * TILE; what pads it is zero.
 */
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define TILE (2 * WIDTH)

typedef float lanes __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#define READ(place) (*(const lanes *) (place))
#define WRITE(place) (*(lanes *) (place))

typedef struct {
    int64_t steps, batch, hidden;
    int64_t rank;         /* 0: the recurrent matrix is whole */
    int64_t reduced_size; /* the rank, padded */
    int64_t rows;         /* of the gates, padded */
    int64_t stride;       /* between rows of `out` */
    int64_t backwards;
    const float *entering; /* (steps, batch, rows): W_ih x and what biases can be added to it */
    const float *columns;  /* (hidden, reduced_size) in tiles; NULL: none */
    const float *matrix;   /* (rank or hidden, rows) in tiles */
    const float *bias;     /* (rows,): the hidden part's own; NULL: none */
    float *h, *c;          /* (batch, hidden): the states, before and after */
    float *out;            /* (steps, batch) rows of `hidden` */
    float *reduced;        /* (batch, reduced_size), to work in */
    float *gates;          /* (batch, rows), to work in */
} Layer;

int tile(void) { return TILE; }

/* 2^t by a polynomial on [-1/2, 1/2] and the exponent's bits: to about 1e-7 of its value. Not finite where t is not. */
static inline float power_of_two(float t)
{
    union { int32_t bits; float value; } scale;
    t = t < -126.0f ? -126.0f : t;
    t = t > 126.0f ? 126.0f : t;
    float whole = (t + 12582912.0f) - 12582912.0f, part = t - whole;
    float p = 1.5252734e-5f;
    p = p * part + 1.5403530e-4f;
    p = p * part + 1.3333558e-3f;
    p = p * part + 9.6181291e-3f;
    p = p * part + 5.5504109e-2f;
    p = p * part + 2.4022651e-1f;
    p = p * part + 6.9314718e-1f;
    p = p * part + 1.0f;
    scale.bits = ((int32_t) whole + 127) << 23;
    return p * scale.value;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_two(-1.44269504f * x)); }

static inline float hyperbolic_tangent(float x)
{
    /* Near zero the series: there the other loses the digits. */
    float square = x * x;
    float p = 2.1869489e-2f;
    p = p * square - 5.3968254e-2f;
    p = p * square + 1.3333333e-1f;
    p = p * square - 3.3333333e-1f;
    float near = x + x * square * p, far = 2.0f / (1.0f + power_of_two(-2.88539008f * x)) - 1.0f;
    return square < 0.0625f ? near : far;
}

static inline float rectified(float x) { return x < 0.0f ? 0.0f : x; }

/* out (batch, outer) = in (batch, inner) times a matrix in tiles, plus `added`: rows so far apart, or one for all. */
static void product(int64_t batch, int64_t inner, int64_t outer, const float *in, int64_t in_stride, const float *matrix,
                    const float *added, int64_t added_stride, float *out)
{
    for (int64_t n = 0; n < outer; n += TILE) {
        const float *tile = matrix + n * inner;
        int64_t b = 0;
        for (; b + 4 <= batch; b += 4) {
            const float *x = in + b * in_stride, *y = x + in_stride, *z = y + in_stride, *w = z + in_stride;
            lanes sums[8] = {{0}};
            if (added)
                for (int r = 0; r < 4; r++) {
                    sums[2 * r] = READ(added + (b + r) * added_stride + n);
                    sums[2 * r + 1] = READ(added + (b + r) * added_stride + n + WIDTH);
                }
            for (int64_t k = 0; k < inner; k++) {
                lanes left = READ(tile + k * TILE), right = READ(tile + k * TILE + WIDTH);
                sums[0] += x[k] * left;
                sums[1] += x[k] * right;
                sums[2] += y[k] * left;
                sums[3] += y[k] * right;
                sums[4] += z[k] * left;
                sums[5] += z[k] * right;
                sums[6] += w[k] * left;
                sums[7] += w[k] * right;
            }
            for (int r = 0; r < 4; r++) {
                WRITE(out + (b + r) * outer + n) = sums[2 * r];
                WRITE(out + (b + r) * outer + n + WIDTH) = sums[2 * r + 1];
            }
        }
        for (; b < batch; b++) {
            const float *x = in + b * in_stride;
            lanes sums[8] = {{0}};
            int64_t k = 0;
            if (added) {
                sums[0] = READ(added + b * added_stride + n);
                sums[1] = READ(added + b * added_stride + n + WIDTH);
            }
            /* Four sums beside each other, for an addition waits for the one before it. */
            for (; k + 4 <= inner; k += 4)
                for (int r = 0; r < 4; r++) {
                    sums[2 * r] += x[k + r] * READ(tile + (k + r) * TILE);
                    sums[2 * r + 1] += x[k + r] * READ(tile + (k + r) * TILE + WIDTH);
                }
            for (; k < inner; k++) {
                sums[0] += x[k] * READ(tile + k * TILE);
                sums[1] += x[k] * READ(tile + k * TILE + WIDTH);
            }
            WRITE(out + b * outer + n) = (sums[0] + sums[2]) + (sums[4] + sums[6]);
            WRITE(out + b * outer + n + WIDTH) = (sums[1] + sums[3]) + (sums[5] + sums[7]);
        }
    }
}

/* gates = W_hh h, plus what is added to it. */
static inline void recurrent(const Layer *l, const float *added, int64_t added_stride)
{
    const float *in = l->h;
    int64_t inner = l->hidden, stride = l->hidden;
    if (l->columns) {
        product(l->batch, l->hidden, l->reduced_size, l->h, l->hidden, l->columns, 0, 0, l->reduced);
        in = l->reduced;
        inner = l->rank;
        stride = l->reduced_size;
    }
    product(l->batch, inner, l->rows, in, stride, l->matrix, added, added_stride, l->gates);
}

/* The elementwise part of a step, for one sequence: of what has entered, which only a GRU reads, the gates, and the
 * states, of which only an LSTM has c. */
static inline void lstm_step(int64_t n, const float *restrict x, const float *restrict gates, float *restrict h,
                             float *restrict c, float *restrict out)
{
    (void) x;
    const float *restrict i = gates, *restrict f = i + n, *restrict g = f + n, *restrict o = g + n;
    for (int64_t k = 0; k < n; k++) {
        float cell = sigmoid(f[k]) * c[k] + sigmoid(i[k]) * hyperbolic_tangent(g[k]);
        float state = sigmoid(o[k]) * hyperbolic_tangent(cell);
        c[k] = cell;
        h[k] = state;
        out[k] = state;
    }
}

static inline void gru_step(int64_t n, const float *restrict x, const float *restrict gates, float *restrict h,
                            float *restrict c, float *restrict out)
{
    (void) c;
    const float *restrict r = gates, *restrict z = r + n, *restrict m = z + n;
    for (int64_t k = 0; k < n; k++) {
        float fresh = hyperbolic_tangent(x[2 * n + k] + sigmoid(x[k] + r[k]) * m[k]);
        float state = fresh + sigmoid(x[n + k] + z[k]) * (h[k] - fresh);
        h[k] = state;
        out[k] = state;
    }
}

static inline void rnn_tanh_step(int64_t n, const float *restrict x, const float *restrict gates, float *restrict h,
                                 float *restrict c, float *restrict out)
{
    (void) x, (void) c;
    for (int64_t k = 0; k < n; k++)
        h[k] = out[k] = hyperbolic_tangent(gates[k]);
}

static inline void rnn_relu_step(int64_t n, const float *restrict x, const float *restrict gates, float *restrict h,
                                 float *restrict c, float *restrict out)
{
    (void) x, (void) c;
    for (int64_t k = 0; k < n; k++)
        h[k] = out[k] = rectified(gates[k]);
}

/* All steps. Where `apart`, what enters meets the hidden part in the step, which has a bias of its own; else before it. */
#define RECURRENCE(name, step, apart)                                                                              \
    void name(const Layer *l)                                                                                      \
    {                                                                                                              \
        for (int64_t s = 0; s < l->steps; s++) {                                                                   \
            int64_t t = l->backwards ? l->steps - 1 - s : s;                                                       \
            const float *entering = l->entering + t * l->batch * l->rows;                                          \
            recurrent(l, (apart) ? l->bias : entering, (apart) ? 0 : l->rows);                                     \
            for (int64_t b = 0; b < l->batch; b++)                                                                 \
                step(l->hidden, entering + b * l->rows, l->gates + b * l->rows, l->h + b * l->hidden,              \
                     l->c ? l->c + b * l->hidden : 0, l->out + (t * l->batch + b) * l->stride);                    \
        }                                                                                                          \
    }

RECURRENCE(lstm, lstm_step, 0)
RECURRENCE(gru, gru_step, 1)
RECURRENCE(rnn_tanh, rnn_tanh_step, 0)
RECURRENCE(rnn_relu, rnn_relu_step, 0)

#define DOWN 6
#define BLOCK 4096 /* of the long axis: what is read of it again and again stays near */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out (vectors, rank) = x (vectors, inputs) times a factor (inputs, rank), whose rows are `stride` apart. */
void thin_product(int64_t vectors, int64_t inputs, int64_t rank, int64_t stride, const float *x, const float *factor,
                  float *out)
{
    for (int64_t k = 0; k < vectors * rank; k++)
        out[k] = 0;
    for (int64_t start = 0; start < inputs; start += BLOCK) {
        int64_t end = least(start + BLOCK, inputs);
        for (int64_t r = 0; r < rank; r += WIDTH) {
            /* Lanes beyond the rank read the next row, and are not stored; behind the last row there is none. */
            int64_t beyond = r + WIDTH > rank ? (r + WIDTH - rank + stride - 1) / stride : 0;
            int64_t whole = least(end, inputs - beyond), size = least(WIDTH, rank - r);
            for (int64_t v = 0; v < vectors; v += DOWN) {
                /* Where there are no more vectors, the last is multiplied again, for nothing. */
                const float *p[DOWN];
                lanes even[DOWN] = {{0}}, odd[DOWN] = {{0}};
                for (int i = 0; i < DOWN; i++)
                    p[i] = x + least(v + i, vectors - 1) * inputs;
                int64_t k = start;
                for (; k + 2 <= whole; k += 2) {
                    lanes left = READ(factor + k * stride + r), right = READ(factor + (k + 1) * stride + r);
                    for (int i = 0; i < DOWN; i++) {
                        even[i] += p[i][k] * left;
                        odd[i] += p[i][k + 1] * right;
                    }
                }
                for (int i = 0; i < DOWN && v + i < vectors; i++) {
                    lanes sum = even[i] + odd[i];
                    for (int64_t j = 0; j < size; j++) {
                        float all = sum[j];
                        for (int64_t last = k; last < end; last++)
                            all += p[i][last] * factor[last * stride + r + j];
                        out[(v + i) * rank + r + j] += all;
                    }
                }
            }
        }
    }
}
