#include "offenders.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

static const double first_away = 1, forgotten_after = 600; /* seconds */

bool pmli_origin_of(int fd, pmli_origin *origin)
{
    union {
        struct sockaddr any;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
        struct sockaddr_un local;
    } a;
    socklen_t size = sizeof a;
    memset(origin, 0, sizeof *origin);
    if (getpeername(fd, &a.any, &size) != 0)
        return false;
    if (a.any.sa_family == AF_INET) {
        origin->bytes[0] = 4;
        memcpy(&origin->bytes[1], &a.four.sin_addr, 4);
    } else if (a.any.sa_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&a.six.sin6_addr)) {
        origin->bytes[0] = 4;
        memcpy(&origin->bytes[1], &a.six.sin6_addr.s6_addr[12], 4);
    } else if (a.any.sa_family == AF_INET6) {
        origin->bytes[0] = 6;
        memcpy(&origin->bytes[1], a.six.sin6_addr.s6_addr, 8);
    } else {
        struct ucred who;
        size = sizeof who;
        if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0)
            return false;
        origin->bytes[0] = 1;
        memcpy(&origin->bytes[1], &who.pid, sizeof who.pid);
    }
    return true;
}

static pmli_offender *find(const pmli_offenders *offenders, const pmli_origin *origin)
{
    for (int i = 0; i < offenders->n; i++)
        if (memcmp(&offenders->all[i].origin, origin, sizeof *origin) == 0)
            return (pmli_offender *)&offenders->all[i];
    return NULL;
}

/* Its place; when all are taken, that of the one which was last to blame the longest ago. */
static pmli_offender *place_of(pmli_offenders *offenders, const pmli_origin *origin, double now)
{
    pmli_offender *o = find(offenders, origin);
    if (o == NULL && offenders->n < PMLI_ORIGINS) {
        o = &offenders->all[offenders->n++];
    } else if (o == NULL) {
        o = &offenders->all[0];
        for (int i = 1; i < PMLI_ORIGINS; i++)
            if (offenders->all[i].refilled_at < o->refilled_at)
                o = &offenders->all[i];
    } else if (now - o->refilled_at < forgotten_after) {
        return o;
    }
    *o = (pmli_offender){.origin = *origin, .left = PMLI_FORGIVEN, .refilled_at = now};
    return o;
}

static void send_away(pmli_offender *o, double now)
{
    if (now < o->until) /* for what is under way still it is not sent away twice */
        return;
    o->away = o->away == 0 ? first_away : 2 * o->away;
    if (o->away > PMLI_AWAY_MAX)
        o->away = PMLI_AWAY_MAX;
    o->until = now + o->away;
}

pmli_verdict pmli_offenders_blame(pmli_offenders *offenders, const pmli_origin *origin, double now)
{
    pmli_offender *o = place_of(offenders, origin, now);
    o->left += (now - o->refilled_at) * PMLI_FORGIVEN_RATE;
    if (o->left > PMLI_FORGIVEN)
        o->left = PMLI_FORGIVEN;
    o->refilled_at = now;
    if (o->left < 1) {
        send_away(o, now);
        return PMLI_TURNED_OUT;
    }
    o->left--;
    return o->left < 1 ? PMLI_LAST_WORD : PMLI_LET_BE;
}

void pmli_offenders_turn_out(pmli_offenders *offenders, const pmli_origin *origin, double now)
{
    pmli_offender *o = place_of(offenders, origin, now);
    o->left = 0;
    o->refilled_at = now;
    send_away(o, now);
}

bool pmli_offenders_away(const pmli_offenders *offenders, const pmli_origin *origin, double now)
{
    const pmli_offender *o = find(offenders, origin);
    return o != NULL && now < o->until;
}
