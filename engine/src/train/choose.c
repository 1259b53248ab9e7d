#include "choose.h"

#include <math.h>
#include <string.h>

#include "pml/base/philox.h"

size_t pmli_choose_scratch(int32_t vocab)
{
    return (size_t)vocab;
}

/* Once for each token that is there, however often it is. */
static void penalise(float *logits, const int32_t *said, int32_t n, double penalty, int32_t vocab,
                     int32_t *seen)
{
    memset(seen, 0, (size_t)vocab * sizeof *seen);
    for (int32_t i = 0; i < n; i++) {
        float *logit = &logits[said[i]];
        if (seen[said[i]]++ == 0)
            *logit = *logit < 0 ? *logit * (float)penalty : *logit / (float)penalty;
    }
}

/* a[0..n) holds token numbers as a heap with the smallest logit on top. */
static void sift_down(int32_t *heap, int32_t n, const float *logits)
{
    for (int32_t at = 0;;) {
        int32_t least = at;
        for (int32_t child = 2 * at + 1; child <= 2 * at + 2 && child < n; child++)
            if (logits[heap[child]] < logits[heap[least]])
                least = child;
        if (least == at)
            return;
        int32_t swapped = heap[at];
        heap[at] = heap[least];
        heap[least] = swapped;
        at = least;
    }
}

static void sift_up(int32_t *heap, int32_t at, const float *logits)
{
    while (at > 0 && logits[heap[at]] < logits[heap[(at - 1) / 2]]) {
        int32_t parent = (at - 1) / 2, swapped = heap[at];
        heap[at] = heap[parent];
        heap[parent] = swapped;
        at = parent;
    }
}

/* What is below the k-th largest goes; what equals it stays, as in transformers. */
static void keep_top_k(float *logits, int32_t vocab, int32_t k, int32_t *heap)
{
    if (k >= vocab)
        return;
    int32_t n = 0;
    for (int32_t token = 0; token < vocab; token++) {
        if (n < k) {
            heap[n] = token;
            sift_up(heap, n++, logits);
        } else if (logits[token] > logits[heap[0]]) {
            heap[0] = token;
            sift_down(heap, n, logits);
        }
    }
    float least = logits[heap[0]];
    for (int32_t token = 0; token < vocab; token++)
        if (logits[token] < least)
            logits[token] = -INFINITY;
}

static float greatest_logit(const float *logits, int32_t vocab)
{
    float top = -INFINITY;
    for (int32_t i = 0; i < vocab; i++)
        top = logits[i] > top ? logits[i] : top;
    return top;
}

/* From the least likely up, tokens go while they have no more than 1 - p of the probability between
 * them. Those with at most (1 - p) / vocab each go in any case, which leaves few to put in order.
 */
static void keep_top_p(float *logits, int32_t vocab, double p, int32_t *heap)
{
    double sum = 0, gone = 0, share = 1 - p;
    float top = greatest_logit(logits, vocab);
    for (int32_t i = 0; i < vocab; i++)
        sum += exp((double)logits[i] - top);
    int32_t n = 0;
    for (int32_t i = 0; i < vocab; i++) {
        double probability = exp((double)logits[i] - top) / sum;
        if (probability <= share / vocab) {
            gone += probability;
            logits[i] = -INFINITY;
        } else {
            heap[n] = i;
            sift_up(heap, n++, logits);
        }
    }
    while (n > 1) { /* the likeliest always stays */
        int32_t token = heap[0];
        gone += exp((double)logits[token] - top) / sum;
        if (gone > share)
            return;
        heap[0] = heap[--n];
        sift_down(heap, n, logits);
        logits[token] = -INFINITY;
    }
}

void pmli_process_logits(float *logits, int32_t vocab, const int32_t *said, int32_t n,
                         const pml_generate_options *o, int32_t *scratch)
{
    if (o->repetition_penalty > 0 && o->repetition_penalty != 1)
        penalise(logits, said, n, o->repetition_penalty, vocab, scratch);
    if (o->temperature <= 0)
        return;
    for (int32_t i = 0; i < vocab; i++)
        logits[i] = (float)(logits[i] / o->temperature);
    if (o->top_k > 0)
        keep_top_k(logits, vocab, o->top_k, scratch);
    if (o->top_p > 0 && o->top_p < 1)
        keep_top_p(logits, vocab, o->top_p, scratch);
}

int32_t pmli_greatest(const float *logits, int32_t n)
{
    /* The greatest of each lane first, which a compiler makes one instruction for all of them; then
     * the first that equals the greatest of those. */
    enum { LANES = 32 };
    float tops[LANES], top = -INFINITY;
    int32_t i = 0, best = 0;
    for (int lane = 0; lane < LANES; lane++)
        tops[lane] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            tops[lane] = logits[i + lane] > tops[lane] ? logits[i + lane] : tops[lane];
    for (int lane = 0; lane < LANES; lane++)
        top = tops[lane] > top ? tops[lane] : top;
    for (; i < n; i++)
        top = logits[i] > top ? logits[i] : top;
    for (int among = 0; best + LANES <= n; best += LANES) { /* blocks without it at once */
        for (int lane = 0; lane < LANES; lane++)
            among |= logits[best + lane] == top;
        if (among)
            break;
    }
    while (best < n && !(logits[best] == top)) /* nothing equals it where none is a number */
        best++;
    return best < n ? best : 0;
}

/* In the order of the numbers, as integers of two's complement; both zeros are one. */
static int16_t ordered(uint16_t bits)
{
    int16_t magnitude = (int16_t)(bits & 0x7fff), sign = (int16_t) - (bits >> 15);
    return (int16_t)((magnitude ^ sign) - sign);
}

int32_t pmli_greatest_narrow(const uint16_t *logits, int32_t n, pml_dtype dtype, bool *finite)
{
    enum { LANES = 64 };
    const int16_t infinite = dtype == PML_BF16 ? 0x7f80 : 0x7c00;
    int16_t tops[LANES], widest[LANES], top = INT16_MIN, wide = 0;
    int32_t i = 0, best = 0;
    for (int lane = 0; lane < LANES; lane++) {
        tops[lane] = INT16_MIN;
        widest[lane] = 0;
    }
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            int16_t key = ordered(logits[i + lane]);
            int16_t magnitude = (int16_t)(logits[i + lane] & 0x7fff);
            tops[lane] = key > tops[lane] ? key : tops[lane];
            widest[lane] = magnitude > widest[lane] ? magnitude : widest[lane];
        }
    for (int lane = 0; lane < LANES; lane++) {
        top = tops[lane] > top ? tops[lane] : top;
        wide = widest[lane] > wide ? widest[lane] : wide;
    }
    for (; i < n; i++) {
        int16_t key = ordered(logits[i]), magnitude = (int16_t)(logits[i] & 0x7fff);
        top = key > top ? key : top;
        wide = magnitude > wide ? magnitude : wide;
    }
    for (int among = 0; best + LANES <= n; best += LANES) {
        for (int lane = 0; lane < LANES; lane++)
            among |= ordered(logits[best + lane]) == top;
        if (among)
            break;
    }
    while (best < n && ordered(logits[best]) != top)
        best++;
    *finite = wide < infinite;
    return best;
}

bool pmli_is_greedy(const pml_generate_options *o)
{
    return o->temperature <= 0 && (o->repetition_penalty <= 0 || o->repetition_penalty == 1);
}

int32_t pmli_choose(float *logits, int32_t vocab, const int32_t *said, int32_t n,
                    const pml_generate_options *o, int32_t *scratch)
{
    pmli_process_logits(logits, vocab, said, n, o, scratch);
    int32_t likeliest = pmli_greatest(logits, vocab);
    if (o->temperature <= 0)
        return likeliest;
    double top = logits[likeliest], sum = 0;
    for (int32_t i = 0; i < vocab; i++)
        sum += exp(logits[i] - top);
    pml_philox random = pml_philox_at(o->seed, (uint64_t)n, PML_PURPOSE_SAMPLE, 0);
    double left = sum * (double)pml_uniform(random.word[0]);
    for (int32_t i = 0; i < vocab; i++) {
        left -= exp(logits[i] - top);
        if (left < 0)
            return i;
    }
    return likeliest; /* rounding left a sliver after the last token */
}
