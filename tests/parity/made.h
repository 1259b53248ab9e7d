/* A model that is made on the spot: where a case wants other sizes than the fixtures have. */
#ifndef TESTS_PARITY_MADE_H
#define TESTS_PARITY_MADE_H

/* A Llama whose projections come in units of 16, as products of 8 bits want them (hidden 64,
 * intermediate 128, four heads of head_dim, two of keys, two layers, 67 ids), into an empty folder.
 * head_dim: 16 to 128. */
void make_model_in_units(const char *folder, int head_dim);

#endif
