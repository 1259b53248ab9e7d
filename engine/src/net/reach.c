/* Who can reach an address that we listen on. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pml/net/reach.h"

const char *pml_reach_name(pml_reach reach)
{
    static const char *const names[] = {"nobody", "loopback", "private", "everyone"};
    return names[reach];
}

/* RFC 1918, RFC 3927 (link-local), RFC 6598 (carrier-grade NAT, also of overlay networks). */
static pml_reach reach_of_4(uint32_t a)
{
    static const struct {
        uint32_t prefix;
        int bits;
    } private[] = {
        {0x0a000000, 8}, {0xac100000, 12}, {0xc0a80000, 16}, {0xa9fe0000, 16}, {0x64400000, 10}};
    if (a >> 24 == 127)
        return PML_REACH_LOOPBACK;
    for (size_t i = 0; i < sizeof private / sizeof private[0]; i++)
        if ((a ^ private[i].prefix) >> (32 - private[i].bits) == 0)
            return PML_REACH_PRIVATE;
    return PML_REACH_EVERYONE;
}

/* RFC 4291 (link-local) and RFC 4193 (unique local). */
static pml_reach reach_of_6(const struct in6_addr *a)
{
    if (IN6_IS_ADDR_LOOPBACK(a))
        return PML_REACH_LOOPBACK;
    if (IN6_IS_ADDR_V4MAPPED(a))
        return reach_of_4((uint32_t)a->s6_addr[12] << 24 | (uint32_t)a->s6_addr[13] << 16 |
                          (uint32_t)a->s6_addr[14] << 8 | a->s6_addr[15]);
    if (IN6_IS_ADDR_LINKLOCAL(a) || (a->s6_addr[0] & 0xfe) == 0xfc)
        return PML_REACH_PRIVATE;
    return PML_REACH_EVERYONE;
}

pml_status pml_reach_parse(const char *bind, pml_address *address, pml_error *err)
{
    static const char prefix[] = "tcp://";
    const char *host = bind + sizeof prefix - 1, *colon = strrchr(bind, ':');
    struct in_addr four;
    struct in6_addr six;
    memset(address, 0, sizeof *address);
    if (strncmp(bind, prefix, sizeof prefix - 1) != 0 || colon == NULL || colon <= host)
        return PML_FAIL(err, PML_INVALID, "bind must be tcp://ADDRESS:PORT, it is \"%.200s\"",
                        bind);
    bool brackets = host[0] == '[' && colon[-1] == ']';
    int n = snprintf(address->host, sizeof address->host, "%.*s",
                     (int)(colon - host) - 2 * brackets, host + brackets);
    char *end;
    address->port = strcmp(colon + 1, "*") == 0 ? 0 : strtol(colon + 1, &end, 10);
    bool number = strcmp(colon + 1, "*") == 0 || (colon[1] >= '0' && colon[1] <= '9' && *end == 0);
    if (!number || address->port < 0 || address->port > 65534)
        return PML_FAIL(
            err, PML_INVALID,
            "the port is a number up to 65534, or * for any that is free; not \"%.32s\"",
            colon + 1);
    address->six = inet_pton(AF_INET6, address->host, &six) == 1;
    if (n < 0 || n >= (int)sizeof address->host)
        address->reach = PML_REACH_NOBODY;
    else if (strcmp(address->host, "*") == 0)
        address->reach = PML_REACH_EVERYONE;
    else if (inet_pton(AF_INET, address->host, &four) == 1)
        address->reach = four.s_addr == 0 ? PML_REACH_EVERYONE : reach_of_4(ntohl(four.s_addr));
    else if (address->six)
        address->reach = reach_of_6(&six);
    if (address->reach == PML_REACH_NOBODY)
        return PML_FAIL(err, PML_INVALID,
                        "\"%.64s\" is no address of this machine in numbers (127.0.0.1, 10.0.0.5, "
                        "[::1], 0.0.0.0 = all of them)",
                        address->host);
    return PML_OK;
}
