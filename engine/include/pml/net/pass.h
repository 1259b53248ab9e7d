/* Descriptors that go from one process to another, over a lease (a socket pair of datagrams). */
#ifndef PML_NET_PASS_H
#define PML_NET_PASS_H

#include <stddef.h>
#include <sys/types.h>

#include "pml/base/error.h"

/* Without waiting. What is under way lives as the descriptor does, also when the sender ends. */
pml_status pml_pass_send(int socket, int descriptor, pml_error *err);

/* The next datagram, without waiting: as recv. *descriptor is the one that came with it, the
 * caller's and close-on-exec; -1: none, and the text is somebody's words; PML_PASS_LOST: one came,
 * and this process has no room for it. */
enum { PML_PASS_LOST = -2 };
ssize_t pml_pass_receive(int socket, char *text, size_t capacity, int *descriptor);

#endif
