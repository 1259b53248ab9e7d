/* Reaping: what a test started ends with it, however it ends.
 *
 * A run outlives whoever started it, on purpose: its coordinator is a session of its own, and
 * workers that lose theirs start another one. So a test that fails in the middle, or is killed at
 * its time limit, would leave processes that run for ever. All of them have the environment that
 * the test gave them; by one entry in it they are found, whoever is their parent now. */
#ifndef PML_TESTS_FAULT_REAP_H
#define PML_TESTS_FAULT_REAP_H

#include <stdbool.h>

/* How many processes of this user have the entry ("NAME=value") in their environment. This one is
 * not among them: the entry counts for what was exec'd with it. */
int reap_count(const char *entry);

/* Kill them, and those that they start meanwhile, until there is none; how many were killed. */
int reap(const char *entry);

/* A process that stands aside (no child of ours, another session) and does so once we have ended
 * in whatever way. False: there is none, errno says why. */
bool reap_at_end(const char *entry);

#endif
