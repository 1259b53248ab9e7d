#include "pml/data/batch.h"

static pml_status check_tokens(const pml_batch *b, int32_t vocab, int32_t max_positions,
                               pml_error *err)
{
    for (int32_t t = 0; t < b->n_tokens; t++) {
        if (b->ids[t] < 0 || b->ids[t] >= vocab)
            return PML_FAIL(err, PML_INVALID, "token %d of the batch has id %d, the vocabulary %d",
                            (int)t, (int)b->ids[t], (int)vocab);
        if (b->positions[t] < 0 || b->positions[t] >= max_positions)
            return PML_FAIL(err, PML_INVALID,
                            "token %d of the batch has position %d, the model knows %d; set "
                            "max_length to at most that",
                            (int)t, (int)b->positions[t], (int)max_positions);
    }
    return PML_OK;
}

static pml_status check_documents(const pml_batch *b, pml_error *err)
{
    if (b->cu_seqlens[0] != 0 || b->cu_seqlens[b->n_docs] != b->n_tokens)
        return PML_FAIL(err, PML_INVALID, "the batch's documents do not span its tokens");
    for (int32_t d = 0; d < b->n_docs; d++) {
        int64_t n = (int64_t)b->cu_seqlens[d + 1] - b->cu_seqlens[d];
        if (n < 0 || n > b->max_doc)
            return PML_FAIL(err, PML_INVALID, "document %d of the batch has %lld tokens, not 0..%d",
                            (int)d, (long long)n, (int)b->max_doc);
    }
    return PML_OK;
}

static pml_status check_labels(const pml_batch *b, int32_t vocab, pml_error *err)
{
    int32_t previous = -1;
    for (int32_t i = 0; i < b->n_labels; i++) {
        if (b->label_rows[i] <= previous || b->label_rows[i] >= b->n_tokens)
            return PML_FAIL(err, PML_INVALID, "label %d of the batch is at row %d, after row %d",
                            (int)i, (int)b->label_rows[i], (int)previous);
        if (b->labels[i] < 0 || b->labels[i] >= vocab)
            return PML_FAIL(err, PML_INVALID, "label %d of the batch is %d, the vocabulary %d",
                            (int)i, (int)b->labels[i], (int)vocab);
        previous = b->label_rows[i];
    }
    return PML_OK;
}

pml_status pml_batch_check(const pml_batch *batch, int32_t vocab, int32_t max_positions,
                           pml_error *err)
{
    if (batch->n_tokens < 0 || batch->n_docs < 0 || batch->n_labels < 0)
        return PML_FAIL(err, PML_INVALID, "a batch of %d tokens, %d documents, %d labels",
                        (int)batch->n_tokens, (int)batch->n_docs, (int)batch->n_labels);
    pml_status status = check_documents(batch, err);
    if (status == PML_OK)
        status = check_tokens(batch, vocab, max_positions, err);
    if (status == PML_OK)
        status = check_labels(batch, vocab, err);
    return status;
}
