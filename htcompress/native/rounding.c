/* Babai's nearest plane in a metric that is a Kronecker product, tile by tile, in float64 on one thread. It comes to what
 * `_tiled` of htcompress/storage/feedback.py does, but for rounding.
 */
#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 8
#elif defined(__AVX__)
#define WIDTH 4
#else
#define WIDTH 2
#endif

/* Rows and columns of a tile, there as well; a strip of it has so many columns, and so many rows of that are summed up
 * at a time. */
#define TILE 32
#define STRIP (2 * WIDTH)
#define DOWN 4

typedef double lanes __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));

#define READ(place) (*(const lanes *) (place))
#define WRITE(place) (*(lanes *) (place))

/* sums (TILE, TILE) += a left matrix (TILE, size), whose number (i, k) is left[i * down + k * along], times a right one
 * (size, TILE), whose rows are `stride` apart. */
static void add_product(double *sums, const double *left, int64_t down, int64_t along, int64_t size,
                        const double *right, int64_t stride)
{
    for (int j = 0; j < TILE; j += STRIP) {
        for (int i = 0; i < TILE; i += DOWN) {
            lanes first[DOWN], second[DOWN];
            for (int d = 0; d < DOWN; d++) {
                first[d] = READ(sums + (i + d) * TILE + j);
                second[d] = READ(sums + (i + d) * TILE + j + WIDTH);
            }
            for (int64_t k = 0; k < size; k++) {
                lanes a = READ(right + k * stride + j), b = READ(right + k * stride + j + WIDTH);
                for (int d = 0; d < DOWN; d++) {
                    double by = left[(i + d) * down + k * along];
                    first[d] += by * a;
                    second[d] += by * b;
                }
            }
            for (int d = 0; d < DOWN; d++) {
                WRITE(sums + (i + d) * TILE + j) = first[d];
                WRITE(sums + (i + d) * TILE + j + WIDTH) = second[d];
            }
        }
    }
}

/* Errors of a matrix (m, n), whose sizes are multiples of TILE.
 *
 * units: (m,), the step of each row; zero: all of it becomes zero.
 * half: levels are -half + 1/2, ..., half - 1/2, in steps.
 * rows, cols: (m, m) and (n, n), unit lower triangular, of the metric.
 * errors, passed: (m, n) each, E and E L_cols of what is decided; the former is what is asked for.
 */
void nearest_plane(int64_t m, int64_t n, double half, const double *values, const double *units, const double *rows,
                   const double *cols, double *errors, double *passed)
{
    for (int64_t top = m - TILE; top >= 0; top -= TILE) {
        for (int64_t left = n - TILE; left >= 0; left -= TILE) {
            double beside[TILE * TILE] = {0}, below[TILE * TILE] = {0};
            int64_t right = left + TILE, end = top + TILE;
            add_product(beside, errors + top * n + right, n, 1, n - right, cols + right * n + left, n);
            add_product(below, rows + end * m + top, 1, m, m - end, passed + end * n + left, n);
            for (int i = TILE - 1; i >= 0; i--) {
                double *error = errors + (top + i) * n + left, *here = passed + (top + i) * n + left;
                double *more = beside + i * TILE, *under = below + i * TILE;
                const double *value = values + (top + i) * n + left;
                double unit = units[top + i], inverse = unit != 0.0 ? 1.0 / unit : 0.0;
                for (int d = i + 1; d < TILE; d++) {
                    double by = rows[(top + d) * m + top + i];
                    const double *there = passed + (top + d) * n + left;
                    for (int j = 0; j < TILE; j++)
                        under[j] += by * there[j];
                }
                for (int j = TILE - 1; j >= 0; j--) {
                    double level = floor((value[j] + more[j] + under[j]) * inverse);
                    level = level < -half ? -half : level;
                    level = level > half - 1 ? half - 1 : level;
                    double made = value[j] - (level + 0.5) * unit;
                    const double *factor = cols + (left + j) * n + left;
                    error[j] = made;
                    here[j] = made + more[j];
                    for (int k = 0; k < j; k++)
                        more[k] += made * factor[k];
                }
            }
        }
    }
}
