/* The greedy way through the ranks of a hierarchical tensor, point by point what `_upwards` of htcompress/tensor/ranks.py
 * does: the same points in the same order.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t nodes;           /* in post-order: the root is the last */
    int64_t edges;           /* whose tails are summed up */
    int64_t fine;            /* an edge is raised by one part in so many */
    double offset;           /* of all bounds */
    const int64_t *edge;     /* (edges,): their nodes */
    const int64_t *children; /* (nodes, 2): of an inner node; of a leaf its mode, and -1 */
    const int64_t *full;     /* (nodes,): the highest rank */
    const int64_t *start;    /* (nodes + 1,): where a node's tails begin */
    const double *tails;     /* tails[start[t] + r]: the squared weight beyond rank r */
} Model;

typedef struct {
    int64_t most; /* points that there is room for */
    int64_t *ranks; /* (most, nodes) */
    int64_t *parameters;
    double *bounds;
} Points;

static double tail_of(const Model *m, int64_t t, int64_t rank)
{
    int64_t place = m->start[t] + rank;
    return place < m->start[t + 1] ? m->tails[place] : 0.0;
}

static double bound(const Model *m, const int64_t *ranks)
{
    double total = m->offset;
    for (int64_t k = 0; k < m->edges; k++)
        total += tail_of(m, m->edge[k], ranks[m->edge[k]]);
    return total;
}

static int64_t parameters(const Model *m, const int64_t *ranks)
{
    int64_t root = m->nodes - 1, left = m->children[2 * root], right = m->children[2 * root + 1], total = 0;
    int stored = 0;
    for (int64_t t = 0; t < root; t++) {
        const int64_t *below = m->children + 2 * t;
        int64_t size = below[1] < 0 ? below[0] : ranks[below[0]] * ranks[below[1]];
        if (size != ranks[t]) {
            total += size * ranks[t];
            stored |= t == left || t == right;
        }
    }
    if (ranks[left] != ranks[right] || !(stored || (ranks[left] == 1 && total)))
        total += ranks[left] * ranks[right];
    return total;
}

/* Raise what else must rise for ranks to be attainable; 0 where it cannot. */
static int repair(const Model *m, int64_t *ranks)
{
    int64_t root = m->nodes - 1, left = m->children[2 * root], right = m->children[2 * root + 1];
    for (int changed = 1; changed;) {
        changed = 0;
        if (ranks[left] != ranks[right]) {
            int64_t higher = ranks[left] > ranks[right] ? ranks[left] : ranks[right];
            ranks[left] = ranks[right] = higher;
            changed = 1;
        }
        for (int64_t t = 0; t < root; t++) {
            int64_t a = m->children[2 * t], b = m->children[2 * t + 1];
            if (b < 0)
                continue;
            const int64_t turns[3][3] = {{a, b, t}, {b, a, t}, {t, a, b}};
            for (int k = 0; k < 3; k++) {
                const int64_t *turn = turns[k];
                if (ranks[turn[0]] <= ranks[turn[1]] * ranks[turn[2]])
                    continue;
                int64_t best = -1;
                double gain = -1.0;
                for (int i = 1; i < 3; i++) {
                    int64_t u = turn[i];
                    if (ranks[u] >= m->full[u])
                        continue;
                    double own = tail_of(m, u, ranks[u]) - tail_of(m, u, ranks[u] + 1);
                    if (own > gain) {
                        best = u;
                        gain = own;
                    }
                }
                if (best < 0)
                    return 0;
                ranks[best]++;
                changed = 1;
            }
        }
    }
    return 1;
}

/* A point with ranks, unless it is one of those from `first` on; the number of points after it, -1: no room. */
static int64_t add(const Model *m, Points *points, int64_t first, int64_t count, const int64_t *ranks)
{
    size_t size = (size_t) m->nodes * sizeof *ranks;
    for (int64_t k = first; k < count; k++)
        if (!memcmp(points->ranks + k * m->nodes, ranks, size))
            return count;
    if (count == points->most)
        return -1;
    memcpy(points->ranks + count * m->nodes, ranks, size);
    points->parameters[count] = parameters(m, ranks);
    points->bounds[count] = bound(m, ranks);
    return count + 1;
}

static int64_t add_raised(const Model *m, Points *points, int64_t first, int64_t count, const int64_t *from, int64_t edge,
                          int64_t by)
{
    int64_t ranks[m->nodes];
    if (from[edge] >= m->full[edge])
        return count;
    memcpy(ranks, from, sizeof ranks);
    ranks[edge] = from[edge] + by < m->full[edge] ? from[edge] + by : m->full[edge];
    return repair(m, ranks) ? add(m, points, first, count, ranks) : count;
}

/* The moves from ranks, behind the points that there are; the number of points after them, -1: no room. */
static int64_t add_moves(const Model *m, Points *points, int64_t count, const int64_t *from)
{
    int64_t first = count;
    for (int64_t k = 0; k < m->edges && count >= 0; k++) {
        int64_t edge = m->edge[k], rank = from[edge];
        int64_t little = rank / m->fine > 1 ? rank / m->fine : 1, quarter = rank / 4 > 2 ? rank / 4 : 2;
        count = add_raised(m, points, first, count, from, edge, little);
        if (count >= 0)
            count = add_raised(m, points, first, count, from, edge, quarter);
        if (count >= 0 && m->full[edge] - rank <= 8)
            count = add_raised(m, points, first, count, from, edge, m->full[edge]);
    }
    for (int64_t t = 0; t < m->nodes && count >= 0; t++) {
        const int64_t family[3] = {m->children[2 * t], m->children[2 * t + 1], t};
        if (family[1] < 0)
            continue;
        for (int i = 0; i < 3; i++)
            for (int j = i + 1; j < 3 && count >= 0; j++) {
                int64_t ranks[m->nodes];
                if (from[family[i]] >= m->full[family[i]] || from[family[j]] >= m->full[family[j]])
                    continue;
                memcpy(ranks, from, sizeof ranks);
                ranks[family[i]]++;
                ranks[family[j]]++;
                if (repair(m, ranks))
                    count = add(m, points, first, count, ranks);
            }
    }
    return count;
}

/* From rank one, always the move that gains most per number; all points seen within so many parameters, the first
 * whatever it takes. Their number, or -1 where there is no room for them.
 *
 * last: which of them it ended at.
 * open: 1 where only the root's rank is left to rise from there.
 */
int64_t upwards(const Model *m, Points *points, double most_parameters, double most_bound, int64_t *last, int64_t *open)
{
    int64_t root = m->nodes - 1, left = m->children[2 * root], count = 0, current[m->nodes];
    for (int64_t t = 0; t < m->nodes; t++)
        current[t] = 1;
    count = add(m, points, 0, 0, current);
    *last = *open = 0;
    while (count > 0 && points->bounds[*last] > most_bound) {
        int64_t at = *last, best = -1, first = count;
        double best_rate = -INFINITY;
        *open = 1;
        for (int64_t k = 0; k < m->edges; k++)
            *open &= m->edge[k] == left || current[m->edge[k]] == m->full[m->edge[k]];
        if (*open)
            return count;
        int64_t end = add_moves(m, points, count, current);
        if (end < 0)
            return -1;
        /* Moves beyond what may be stored are passed over: those behind them move up. */
        for (int64_t k = first; k < end; k++) {
            if ((double) points->parameters[k] > most_parameters)
                continue;
            memmove(points->ranks + count * m->nodes, points->ranks + k * m->nodes, sizeof current);
            points->parameters[count] = points->parameters[k];
            points->bounds[count] = points->bounds[k];
            double gain = points->bounds[at] - points->bounds[count];
            int64_t cost = points->parameters[count] - points->parameters[at];
            double rate = cost > 0 ? gain / (double) cost : INFINITY;
            if ((gain > 0 || cost <= 0) && rate > best_rate) {
                best = count;
                best_rate = rate;
            }
            count++;
        }
        if (best < 0 || !memcmp(points->ranks + best * m->nodes, current, sizeof current))
            return count;
        *last = best;
        memcpy(current, points->ranks + best * m->nodes, sizeof current);
    }
    return count;
}
