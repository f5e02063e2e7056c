/* The fused inner loop of elementwise chains.
 *
 * One call walks over a run of elements of one tensor: it reads the same elements of every source with pread into buffers that stay in
 * cache, makes the task vectors in float32, runs a short program of operations over tiles of the stack, and either writes the result
 * with pwrite or adds up a statistic. Nothing of a tensor's size is ever held. The Python side is engine/kernels.py.
 *
 * Bits: sums run over tasks in order and over elements in a fixed pattern of lanes, products and sums are never contracted
 * (-ffp-contract=off), so every instruction set, window and number of threads gives the same result, and the torch path agrees.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What the Python side expects of operations and their arguments; raise both together. */
const int thetau_form = 3;

#define TILE 512
#define CHUNK 32768 /* a multiple of TILE */
#define LANES 16
#define GROUP 4 /* rows of a Gram matrix at a time */
#define BUCKETS 4096 /* of a row's magnitudes, at most */
#define BUCKETED 16384 /* longer rows have too many entries for them */
#define OCTAVES (8u << 23) /* below the largest magnitude; what is smaller is in one bucket */
#define MOVES 8 /* an entry, in the buckets: more than that, and sorting by bytes is faster */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=sapphirerapids", "arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

enum { F32 = 0, BF16 = 1, F16 = 2 };
enum { OP_DROP = 1, OP_TRIM = 2, OP_ELECT = 3, OP_DISENTANGLE = 4, OP_SUM = 5, OP_MEAN = 6, OP_DISJOINT = 7, OP_SCALE = 8, OP_BAND = 9, OP_WEIGH = 10, OP_RANK_DROP = 11, OP_CLIP = 12 };
enum { STAT_NONE = 0, STAT_UPPER = 1, STAT_LOWER = 2, STAT_GRAM = 3, STAT_INSIDE = 4 };

typedef struct {
    int32_t code;
    float value;            /* ELECT: sign of cancelled entries; SCALE: factor; CLIP: bound; DISJOINT: least divisor, or 0 */
    const float *by_task;   /* DROP, WEIGH: factor; TRIM: cut; SUM: weight; DISJOINT: weight, or none; DISENTANGLE: coefficient;
                               BAND: lower then upper cut; RANK_DROP: factor by rank, of all tasks or of each */
    const int32_t *keys;    /* DROP: two keys and the threshold, by task; DISENTANGLE: alive, by task;
                               RANK_DROP: elements of a row, how far one task's numbers by rank lie from the next one's (0: all share them),
                               two keys by task, threshold by rank */
} Op;

typedef struct {
    int32_t sources, tasks, ops, statistic;
    const int32_t *fds, *dtypes;
    const int64_t *offsets; /* of the run's first element in each file, in bytes */
    const int32_t *model, *base; /* by task: source of the model, and of its base or -1 */
    const Op *program;
    int64_t first, count;   /* first element's index in the tensor; elements of the run */
    int32_t ground;         /* source that the result is added to, or -1 */
    int32_t out_fd, out_dtype;
    int64_t out_offset;
    double *squares;        /* tasks, then the ground: sums of squares, added to */
    int64_t *counts;        /* UPPER: tasks x 32768; LOWER, INSIDE: tasks x cuts x bins * 65536 */
    int64_t *above;         /* INSIDE: tasks x cuts, entries beyond the bins */
    const int32_t *upper;   /* LOWER, INSIDE: the first bin, by task and cut */
    int64_t cuts, bins;     /* LOWER, INSIDE: cuts of each task; bins looked into at each cut */
    double *gram;           /* GRAM: tasks x tasks, upper triangle, added to */
    int32_t failed;         /* out: the source that could not be read, or -1 for the output */
    int32_t error;          /* out: errno, or 0 where a file ended early */
    int64_t overflow;       /* out: results that are not finite in the output's dtype */
} Run;

static inline size_t width(int dtype) { return dtype == F32 ? 4 : 2; }

CLONES static void load(float *restrict out, const void *restrict raw, int dtype, int n) {
    if (dtype == F32) {
        memcpy(out, raw, (size_t)n * 4);
    } else if (dtype == BF16) {
        const uint16_t *in = raw;
        uint32_t *bits = (uint32_t *)out;
        for (int i = 0; i < n; i++) bits[i] = (uint32_t)in[i] << 16;
    } else {
        const _Float16 *in = raw;
        for (int i = 0; i < n; i++) out[i] = (float)in[i];
    }
}

/* Round to nearest even; returns how many results are not finite. */
CLONES static int64_t store(void *restrict raw, const float *restrict in, int dtype, int n) {
    int32_t lost = 0;
    const uint32_t *bits = (const uint32_t *)in;
    if (dtype == F32) {
        memcpy(raw, in, (size_t)n * 4);
        for (int i = 0; i < n; i++) lost += (bits[i] & 0x7f800000u) == 0x7f800000u;
    } else if (dtype == BF16) {
        uint16_t *out = raw;
        for (int i = 0; i < n; i++) {
            uint32_t x = bits[i];
            uint32_t rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
            uint32_t quiet = (x >> 16) | 0x40u; /* a NaN stays one */
            out[i] = (uint16_t)((x & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
            lost += (out[i] & 0x7f80u) == 0x7f80u;
        }
    } else {
        _Float16 *out = raw;
        for (int i = 0; i < n; i++) {
            out[i] = (_Float16)in[i];
            lost += !(fabsf((float)out[i]) < INFINITY);
        }
    }
    return lost;
}

CLONES static void subtract(float *restrict tau, const float *restrict base, int n) {
    for (int i = 0; i < n; i++) tau[i] -= base[i];
}

CLONES static double squares(const float *restrict x, int n) {
    double lanes[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)x[i + l] * (double)x[i + l];
    for (int l = 0; i < n; i++, l++) lanes[l] += (double)x[i] * (double)x[i];
    double total = 0;
    for (int l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

CLONES static void widen(double *restrict out, const float *restrict x, int n) {
    for (int i = 0; i < n; i++) out[i] = x[i];
}

/* Inner products of one row with each of GROUP rows, which lie TILE apart: the row is read once for all of them. */
CLONES static void dots(double *restrict out, const double *restrict x, const double *restrict y, int n) {
    double lanes[GROUP][LANES] = {{0}};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < GROUP; r++)
            for (int l = 0; l < LANES; l++) lanes[r][l] += x[i + l] * y[(size_t)r * TILE + i + l];
    for (int l = 0; i < n; i++, l++)
        for (int r = 0; r < GROUP; r++) lanes[r][l] += x[i] * y[(size_t)r * TILE + i];
    for (int r = 0; r < GROUP; r++) {
        double total = 0;
        for (int l = 0; l < LANES; l++) total += lanes[r][l];
        out[r] += total;
    }
}

static inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

/* random.py, element by element; the upper half of the index is in the keys. */
CLONES static void drop(float *restrict tau, uint32_t index, uint32_t k0, uint32_t k1, uint32_t threshold, float factor, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits = mix(mix((index + (uint32_t)i) ^ k0) ^ k1) & 0x7fffffffu;
        tau[i] = bits < threshold ? 0.0f : tau[i] * factor;
    }
}

CLONES static void trim(float *restrict tau, float low, float high, int n) {
    for (int i = 0; i < n; i++) {
        float magnitude = fabsf(tau[i]);
        tau[i] = (magnitude < low) | (magnitude > high) ? 0.0f : tau[i];
    }
}

CLONES static void sum_tasks(float *restrict total, const float *restrict stack, int tasks, int n) {
    memcpy(total, stack, (size_t)n * 4);
    for (int k = 1; k < tasks; k++) {
        const float *row = stack + (size_t)k * TILE;
        for (int i = 0; i < n; i++) total[i] += row[i];
    }
}

CLONES static void weigh_tasks(float *restrict total, const float *restrict stack, const float *weights, int tasks, int n) {
    for (int i = 0; i < n; i++) total[i] = stack[i] * weights[0];
    for (int k = 1; k < tasks; k++) {
        const float *row = stack + (size_t)k * TILE;
        float weight = weights[k];
        for (int i = 0; i < n; i++) total[i] += row[i] * weight;
    }
}

/* Keep the entries whose sign is that of the sum; `cancelled` stands in where the sum is zero. */
CLONES static void elect(float *restrict stack, float *restrict total, float cancelled, int tasks, int n) {
    sum_tasks(total, stack, tasks, n);
    for (int i = 0; i < n; i++) {
        float sign = (float)((total[i] > 0) - (total[i] < 0));
        total[i] = sign == 0.0f ? cancelled : sign;
    }
    for (int k = 0; k < tasks; k++) {
        float *row = stack + (size_t)k * TILE;
        for (int i = 0; i < n; i++) row[i] = row[i] * total[i] > 0.0f ? row[i] : 0.0f;
    }
}

CLONES static void disentangle(float *restrict stack, float *restrict delta, const float *weights, const int32_t *alive, int tasks, int n) {
    weigh_tasks(delta, stack, weights, tasks, n);
    for (int k = 0; k < tasks; k++)
        if (alive[k]) subtract(stack + (size_t)k * TILE, delta, n);
}

CLONES static void disjoint_mean(float *restrict total, float *restrict count, const float *restrict stack, int tasks, int n) {
    sum_tasks(total, stack, tasks, n);
    for (int i = 0; i < n; i++) count[i] = 0.0f;
    for (int k = 0; k < tasks; k++) {
        const float *row = stack + (size_t)k * TILE;
        for (int i = 0; i < n; i++) count[i] += row[i] != 0.0f ? 1.0f : 0.0f;
    }
    for (int i = 0; i < n; i++) total[i] = total[i] / (count[i] < 1.0f ? 1.0f : count[i]);
}

/* The rows are weighted already; weights that add up to 0 are not divided by, nor those below `least`, if it is above 0. */
CLONES static void weighted_disjoint_mean(float *restrict total, float *restrict divisor, const float *restrict stack, const float *weights, float least, int tasks,
                                          int n) {
    sum_tasks(total, stack, tasks, n);
    for (int i = 0; i < n; i++) divisor[i] = 0.0f;
    for (int k = 0; k < tasks; k++) {
        const float *row = stack + (size_t)k * TILE;
        float weight = weights[k];
        for (int i = 0; i < n; i++) divisor[i] += row[i] != 0.0f ? weight : 0.0f;
    }
    if (least > 0.0f)
        for (int i = 0; i < n; i++) divisor[i] = divisor[i] < least ? least : divisor[i];
    for (int i = 0; i < n; i++) total[i] = total[i] / (divisor[i] == 0.0f ? 1.0f : divisor[i]);
}

CLONES static void scale(float *restrict x, float factor, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] * factor;
}

CLONES static void clip(float *restrict x, float bound, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] < -bound ? -bound : x[i] > bound ? bound : x[i];
}

CLONES static void divide(float *restrict x, float divisor, int n) {
    for (int i = 0; i < n; i++) x[i] = x[i] / divisor;
}

CLONES static void add(float *restrict x, const float *restrict y, int n) {
    for (int i = 0; i < n; i++) x[i] = y[i] + x[i];
}

CLONES static void draw(uint32_t *restrict drawn, uint32_t index, uint32_t k0, uint32_t k1, int n) {
    for (int i = 0; i < n; i++) drawn[i] = mix(mix((index + (uint32_t)i) ^ k0) ^ k1) & 0x7fffffffu;
}

/* The bits that not all magnitudes have in common. */
CLONES static uint32_t differing(const uint32_t *restrict bits, int n) {
    uint32_t any = 0, all = 0x7fffffffu;
    for (int i = 0; i < n; i++) any |= bits[i] & 0x7fffffffu, all &= bits[i];
    return any & ~all;
}

/* The smallest and the largest magnitude of a row but for zeros; the smallest is 0x80000000 where all are zeros. */
CLONES static void extremes(const uint32_t *restrict bits, uint32_t *least, uint32_t *most, int n) {
    uint32_t low = 0xffffffffu, high = 0;
    for (int i = 0; i < n; i++) {
        uint32_t size = bits[i] & 0x7fffffffu, below = size - 1u; /* that of a zero is the largest of all */
        low = below < low ? below : low, high = size > high ? size : high;
    }
    *least = low == 0xffffffffu ? 0x80000000u : low + 1u, *most = high;
}

/* Bucket 0 for zeros, 1 for what is no larger than `low`, and then one for every 2^shift steps of a magnitude. */
CLONES static void into_buckets(const uint32_t *restrict bits, uint16_t *restrict bucket, uint32_t low, int shift, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t size = bits[i] & 0x7fffffffu, over = size > low ? size - low : 0u;
        bucket[i] = (uint16_t)((over >> shift) + (size != 0u));
    }
}

/* Pairs of magnitude and place in order, for rows whose magnitudes are spread as most are: one counting pass over the eight octaves below
 * the largest, about as many buckets as entries, and insertion inside them. Gives 0 where that takes more than `MOVES` moves an entry;
 * then equal magnitudes are still by position. */
static int by_buckets(const uint32_t *bits, uint64_t *a, uint16_t *bucket, int n) {
    uint32_t starts[BUCKETS + 2], low, high, sum = 0;
    int size = 6, shift = 0;
    extremes(bits, &low, &high, n);
    if (low < 0x80000000u && high - low > OCTAVES) low = high - OCTAVES;
    while (1 << size < n && 1 << size < BUCKETS) size++;
    while (low < high && (high - low) >> shift >= 1u << size) shift++;
    into_buckets(bits, bucket, low, shift, n);
    memset(starts, 0, sizeof(uint32_t) * ((1u << size) + 2));
    for (int i = 0; i < n; i++) starts[bucket[i]]++;
    for (int v = 0; v < (1 << size) + 2; v++) {
        uint32_t count = starts[v];
        starts[v] = sum, sum += count;
    }
    for (int i = 0; i < n; i++) a[starts[bucket[i]]++] = (uint64_t)(bits[i] & 0x7fffffffu) << 32 | (uint32_t)i;
    int64_t left = (int64_t)MOVES * n;
    for (int i = 1; i < n; i++) {
        uint64_t pair = a[i];
        int at = i;
        for (; at > 0 && a[at - 1] > pair; at--) a[at] = a[at - 1];
        a[at] = pair;
        left -= i - at;
        if (left < 0) return 0;
    }
    return 1;
}

/* The same for any row: a stable radix sort by bytes, passing over those in which no two magnitudes differ. Gives where the pairs are. */
static uint64_t *by_bytes(uint32_t mask, uint64_t *a, uint64_t *b, int n) {
    for (int shift = 0; shift < 32; shift += 8) {
        if (!(mask >> shift & 255u)) continue;
        uint32_t even[256] = {0}, odd[256] = {0}, sum = 0;
        int i = 0;
        for (; i + 2 <= n; i += 2) even[a[i] >> (32 + shift) & 255u]++, odd[a[i + 1] >> (32 + shift) & 255u]++;
        if (i < n) even[a[i] >> (32 + shift) & 255u]++;
        for (int v = 0; v < 256; v++) {
            uint32_t count = even[v] + odd[v];
            even[v] = sum, sum += count;
        }
        for (i = 0; i < n; i++) b[even[a[i] >> (32 + shift) & 255u]++] = a[i];
        uint64_t *other = a;
        a = b, b = other;
    }
    return a;
}

/* Ranks of one row by magnitude, smallest first and equal ones by position. `a` and `b` hold n pairs of magnitude and place each, `drawn`
 * n numbers. Then what stays of each entry is multiplied by its rank's factor. */
static void rank_drop(float *row, uint64_t *a, uint64_t *b, uint32_t *drawn, uint32_t index, const int32_t *keys, const int32_t *thresholds,
                      const float *factors, int n) {
    const uint32_t *bits = (const uint32_t *)row;
    draw(drawn, index, (uint32_t)keys[0], (uint32_t)keys[1], n);
    int bucketed = n <= BUCKETED;
    if (!bucketed || !by_buckets(bits, a, (uint16_t *)b, n)) {
        if (!bucketed)
            for (int i = 0; i < n; i++) a[i] = (uint64_t)(bits[i] & 0x7fffffffu) << 32 | (uint32_t)i;
        a = by_bytes(differing(bits, n), a, b, n);
    }
    for (int rank = 0; rank < n; rank++) {
        uint32_t place = (uint32_t)a[rank];
        uint32_t stays = 0u - (uint32_t)(drawn[place] >= (uint32_t)thresholds[rank]); /* no branch: nobody could guess it */
        union { float value; uint32_t bits; } kept = {row[place] * factors[rank]};
        kept.bits &= stays;
        row[place] = kept.value;
    }
}

/* Neighbours often fall into one bin: two sets of bins, so that a count need not wait for the one before it. */
static void count_upper(int64_t *restrict bins, uint32_t *restrict other, const float *tau, int n) {
    const uint32_t *bits = (const uint32_t *)tau;
    int i = 0;
    for (; i + 2 <= n; i += 2) {
        bins[(bits[i] & 0x7fffffffu) >> 16]++;
        other[(bits[i + 1] & 0x7fffffffu) >> 16]++;
    }
    if (i < n) bins[(bits[i] & 0x7fffffffu) >> 16]++;
}

/* Groups without an entry in the bins are passed over by a comparison that vectorises; the others are gathered without a branch.
   Returns how many entries lie beyond the bins. */
CLONES static int64_t count_lower(int64_t *restrict bins, const float *restrict tau, uint32_t upper, uint32_t spread, int n) {
    const uint32_t *bits = (const uint32_t *)tau;
    uint32_t found[TILE];
    uint32_t low = upper << 16, span = spread << 16;
    int32_t above = 0, top = (int32_t)(low + span);
    int count = 0;
    for (int i = 0; i < n; i++) above += (int32_t)(bits[i] & 0x7fffffffu) >= top;
    for (int i = 0; i < n; i += LANES) {
        int m = n - i < LANES ? n - i : LANES;
        uint32_t hit = m < LANES;
        if (m == LANES)
            for (int l = 0; l < LANES; l++) hit |= (bits[i + l] & 0x7fffffffu) - low < span;
        if (hit)
            for (int l = 0; l < m; l++) {
                found[count] = (bits[i + l] & 0x7fffffffu) - low;
                count += found[count] < span;
            }
    }
    for (int i = 0; i < count; i++) bins[found[i]]++;
    return above;
}

static int read_all(int fd, char *to, size_t count, int64_t at) {
    while (count) {
        ssize_t got = pread(fd, to, count, at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return got < 0 ? errno : -1;
        to += got, count -= (size_t)got, at += got;
    }
    return 0;
}

static int write_all(int fd, const char *from, size_t count, int64_t at) {
    while (count) {
        ssize_t put = pwrite(fd, from, count, at);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return errno;
        from += put, count -= (size_t)put, at += put;
    }
    return 0;
}

static void run_tile(Run *run, int from, int to, float *stack, float *total, float *spare, int64_t element, int n) {
    for (int o = from; o < to; o++) {
        const Op *op = &run->program[o];
        switch (op->code) {
        case OP_DROP:
            for (int k = 0; k < run->tasks; k++) {
                const int32_t *key = op->keys + 3 * k;
                drop(stack + (size_t)k * TILE, (uint32_t)(element & 0x7fffffff), (uint32_t)key[0], (uint32_t)key[1], (uint32_t)key[2], op->by_task[k], n);
            }
            break;
        case OP_TRIM:
            for (int k = 0; k < run->tasks; k++) trim(stack + (size_t)k * TILE, op->by_task[k], INFINITY, n);
            break;
        case OP_BAND:
            for (int k = 0; k < run->tasks; k++) trim(stack + (size_t)k * TILE, op->by_task[k], op->by_task[run->tasks + k], n);
            break;
        case OP_ELECT: elect(stack, total, op->value, run->tasks, n); break;
        case OP_DISENTANGLE: disentangle(stack, total, op->by_task, op->keys, run->tasks, n); break;
        case OP_SUM: weigh_tasks(total, stack, op->by_task, run->tasks, n); break;
        case OP_MEAN: sum_tasks(total, stack, run->tasks, n), divide(total, (float)run->tasks, n); break;
        case OP_DISJOINT:
            if (op->by_task) weighted_disjoint_mean(total, spare, stack, op->by_task, op->value, run->tasks, n);
            else disjoint_mean(total, spare, stack, run->tasks, n);
            break;
        case OP_SCALE: scale(total, op->value, n); break;
        case OP_CLIP:
            for (int k = 0; k < run->tasks; k++) clip(stack + (size_t)k * TILE, op->value, n);
            break;
        case OP_WEIGH:
            for (int k = 0; k < run->tasks; k++) scale(stack + (size_t)k * TILE, op->by_task[k], n);
            break;
        }
    }
}

/* The upper triangle, in groups of rows; the last group of a row reaches into rows of zeros, and its products are dropped. */
static void add_gram(Run *run, double *wide, const float *stack, int n) {
    int tasks = run->tasks;
    for (int k = 0; k < tasks; k++) widen(wide + (size_t)k * TILE, stack + (size_t)k * TILE, n);
    for (int k = 0; k < tasks; k++)
        for (int j = k; j < tasks; j += GROUP) {
            double found[GROUP] = {0};
            dots(found, wide + (size_t)k * TILE, wide + (size_t)j * TILE, n);
            for (int r = 0; r < GROUP && j + r < tasks; r++) run->gram[k * tasks + j + r] += found[r];
        }
}

static void add_statistic(Run *run, uint32_t *other, double *wide, const float *stack, int n) {
    if (run->statistic == STAT_GRAM) add_gram(run, wide, stack, n);
    for (int k = 0; k < run->tasks; k++) {
        const float *row = stack + (size_t)k * TILE;
        if (run->statistic == STAT_UPPER) count_upper(run->counts + (int64_t)k * 32768, other + (size_t)k * 32768, row, n);
        if (run->statistic == STAT_LOWER || run->statistic == STAT_INSIDE)
            for (int64_t c = k * run->cuts; c < (k + 1) * run->cuts; c++) {
                int64_t above = count_lower(run->counts + c * run->bins * 65536, row, (uint32_t)run->upper[c], (uint32_t)run->bins, n);
                if (run->above) run->above[c] += above;
            }
    }
}

/* The task vectors of a tile, from the values of its sources. */
static void make_stack(Run *run, float *stack, const float *values, int n) {
    for (int k = 0; k < run->tasks; k++) {
        float *row = stack + (size_t)TILE * k;
        memcpy(row, values + TILE * run->model[k], (size_t)n * 4);
        if (run->base[k] >= 0) subtract(row, values + TILE * run->base[k], n);
        if (run->squares) run->squares[k] += squares(row, n);
    }
    if (run->squares && run->ground >= 0) run->squares[run->tasks] += squares(values + TILE * run->ground, n);
}

int thetau_run(Run *run) {
    int ranked = 0; /* the operation that needs whole rows; chunks are then made of these */
    while (ranked < run->ops && run->program[ranked].code != OP_RANK_DROP) ranked++;
    const Op *by_rows = ranked < run->ops ? &run->program[ranked] : NULL;
    int row = by_rows ? by_rows->keys[0] : 1;
    int chunk = row > CHUNK ? row : CHUNK / row * row;
    size_t wide = (size_t)chunk * 4 + 64 - (size_t)chunk * 4 % 64;
    char *raw = aligned_alloc(64, wide * (size_t)(run->sources + 1));
    float *tiles = aligned_alloc(64, sizeof(float) * TILE * (size_t)(run->sources + run->tasks + 2));
    float *whole = by_rows ? malloc(sizeof(float) * (size_t)chunk * (size_t)run->tasks) : NULL;
    uint64_t *pairs = by_rows ? malloc((2 * sizeof(uint64_t) + sizeof(uint32_t)) * (size_t)row) : NULL;
    uint32_t *other = run->statistic == STAT_UPPER ? calloc((size_t)run->tasks * 32768, sizeof(uint32_t)) : NULL;
    double *wider = run->statistic == STAT_GRAM ? calloc((size_t)(run->tasks + GROUP) * TILE, sizeof(double)) : NULL;
    int status = 0;
    run->error = 0, run->failed = -1, run->overflow = 0;
    if (!raw || !tiles || (by_rows && (!whole || !pairs)) || (run->statistic == STAT_UPPER && !other) || (run->statistic == STAT_GRAM && !wider)) {
        run->error = ENOMEM, status = 1;
        goto end;
    }
    float *values = tiles, *stack = values + TILE * run->sources, *total = stack + TILE * run->tasks, *spare = total + TILE;
    char *result = raw + wide * (size_t)run->sources;
    for (int64_t done = 0; done < run->count; done += chunk) {
        int n = run->count - done < chunk ? (int)(run->count - done) : chunk;
        for (int s = 0; s < run->sources; s++) {
            size_t w = width(run->dtypes[s]);
            int failed = read_all(run->fds[s], raw + wide * (size_t)s, w * (size_t)n, run->offsets[s] + done * (int64_t)w);
            if (failed) {
                run->failed = s, run->error = failed < 0 ? 0 : failed, status = 1;
                goto end;
            }
        }
        if (by_rows) {
            for (int t = 0; t < n; t += TILE) {
                int m = n - t < TILE ? n - t : TILE;
                for (int s = 0; s < run->sources; s++)
                    load(values + TILE * s, raw + wide * (size_t)s + width(run->dtypes[s]) * (size_t)t, run->dtypes[s], m);
                make_stack(run, stack, values, m);
                run_tile(run, 0, ranked, stack, total, spare, run->first + done + t, m);
                for (int k = 0; k < run->tasks; k++) memcpy(whole + (size_t)chunk * k + t, stack + (size_t)TILE * k, (size_t)m * 4);
            }
            for (int k = 0; k < run->tasks; k++)
                for (int r = 0; r < n; r += row)
                    rank_drop(whole + (size_t)chunk * k + r, pairs, pairs + row, (uint32_t *)(pairs + 2 * row), (uint32_t)((run->first + done + r) & 0x7fffffff),
                              by_rows->keys + 2 + 2 * k, by_rows->keys + 2 + 2 * run->tasks + (size_t)k * (size_t)by_rows->keys[1],
                              by_rows->by_task + (size_t)k * (size_t)by_rows->keys[1], row);
        }
        for (int t = 0; t < n; t += TILE) {
            int m = n - t < TILE ? n - t : TILE;
            if (by_rows) {
                for (int k = 0; k < run->tasks; k++) memcpy(stack + (size_t)TILE * k, whole + (size_t)chunk * k + t, (size_t)m * 4);
                if (run->ground >= 0)
                    load(values + TILE * run->ground, raw + wide * (size_t)run->ground + width(run->dtypes[run->ground]) * (size_t)t, run->dtypes[run->ground], m);
            } else {
                for (int s = 0; s < run->sources; s++)
                    load(values + TILE * s, raw + wide * (size_t)s + width(run->dtypes[s]) * (size_t)t, run->dtypes[s], m);
                make_stack(run, stack, values, m);
            }
            run_tile(run, by_rows ? ranked + 1 : 0, run->ops, stack, total, spare, run->first + done + t, m);
            if (run->statistic != STAT_NONE) {
                add_statistic(run, other, wider, stack, m);
            } else {
                if (run->ground >= 0) add(total, values + TILE * run->ground, m);
                run->overflow += store(result + width(run->out_dtype) * (size_t)t, total, run->out_dtype, m);
            }
        }
        if (run->statistic == STAT_NONE) {
            size_t w = width(run->out_dtype);
            int failed = write_all(run->out_fd, result, w * (size_t)n, run->out_offset + done * (int64_t)w);
            if (failed) {
                run->error = failed, status = 1;
                goto end;
            }
        }
    }
    if (other) /* a run has fewer elements than a bin can count */
        for (int64_t bin = 0; bin < (int64_t)run->tasks * 32768; bin++) run->counts[bin] += other[bin];
end:
    free(other);
    free(wider);
    free(raw);
    free(tiles);
    free(whole);
    free(pairs);
    return status;
}

/* The module holds no Python function: ctypes calls `thetau_run`, which lets go of the interpreter's lock. */
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", "The fused inner loop; see kernels.c.", -1, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&module); }
