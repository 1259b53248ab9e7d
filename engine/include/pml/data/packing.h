/* Packing: which rows share a bin of `capacity` tokens. Best fit decreasing: rows from long to
 * short (a tie: in file order), each into the fullest bin that still has room, else into a new one.
 * Uses at most 11/9 of the fewest possible bins, + 4 (Johnson, 1973).
 *
 *   rows   | window 0, 65,536 rows | window 1 | …        packed one by one: no bin spans two
 *
 * What it takes beside its result is bounded by the window, and a bin's rows lie near each other in
 * the file, so that rows drawn in file order stay roughly in it. The price is a few bins a window
 * that are not full. */
#ifndef PML_DATA_PACKING_H
#define PML_DATA_PACKING_H

#include <stdint.h>

#include "pml/base/error.h"

enum { PML_PACK_WINDOW = 1 << 16 };

/* length [n], each 1..capacity. bin_of_row [n] is filled; bins are numbered by their first row in
 * file order. Close to O(n) time. */
pml_status pml_pack(const int32_t *length, int64_t n, int32_t capacity, int64_t *bin_of_row,
                    int64_t *n_bins, pml_error *err);

#endif
