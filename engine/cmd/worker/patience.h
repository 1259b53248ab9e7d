/* Patience: how long a run waits for the turn on its next device, when others wait for those that
 * it holds. */
#ifndef PML_WORKER_PATIENCE_H
#define PML_WORKER_PATIENCE_H

/* Of `patience` seconds, which are for who holds no turn, those for who holds the turns of `held`
 * of its devices: less with each, or who waits for one of them would lose theirs first and call us
 * stopped; and a sixth at least, as somebody may plan on the last device, too. */
double patience_with(double patience, int held, int devices);

#endif
