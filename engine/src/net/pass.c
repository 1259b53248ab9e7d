#include "pml/net/pass.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Room for one descriptor, aligned as its head is. */
typedef union control {
    struct cmsghdr head;
    char bytes[CMSG_SPACE(sizeof(int))];
} control;

pml_status pml_pass_send(int socket, int descriptor, pml_error *err)
{
    char word = 'K'; /* a datagram must not be empty: that is the end of a socket */
    control c = {0};
    struct iovec text = {&word, sizeof word};
    struct msghdr message = {.msg_iov = &text,
                             .msg_iovlen = 1,
                             .msg_control = c.bytes,
                             .msg_controllen = sizeof c.bytes};
    c.head.cmsg_level = SOL_SOCKET;
    c.head.cmsg_type = SCM_RIGHTS;
    c.head.cmsg_len = CMSG_LEN(sizeof descriptor);
    memcpy(CMSG_DATA(&c.head), &descriptor, sizeof descriptor);
    if (sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) != sizeof word)
        return PML_FAIL(err, PML_IO, "cannot pass a descriptor on: %s", strerror(errno));
    return PML_OK;
}

ssize_t pml_pass_receive(int socket, char *text, size_t capacity, int *descriptor)
{
    control c = {0};
    struct iovec into = {text, capacity};
    struct msghdr message = {.msg_iov = &into,
                             .msg_iovlen = 1,
                             .msg_control = c.bytes,
                             .msg_controllen = sizeof c.bytes};
    *descriptor = -1;
    ssize_t n = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *head = n < 0 ? NULL : CMSG_FIRSTHDR(&message);
    if (head != NULL && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
        head->cmsg_len == CMSG_LEN(sizeof *descriptor))
        memcpy(descriptor, CMSG_DATA(head), sizeof *descriptor);
    else if (n >= 0 && (message.msg_flags & MSG_CTRUNC) != 0)
        *descriptor = PML_PASS_LOST;
    return n;
}
