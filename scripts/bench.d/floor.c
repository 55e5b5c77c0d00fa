// The least that the kernel must be asked for one environment without a server, asked from C with nothing around it:
// a network namespace that is pinned by a bind mount on tmpfs, a veth pair whose peer is born in it, the host's end up
// and isolated on a bridge, and inside loopback, link, address and default route.
//
// usage: floor COUNT [PAUSE_MS], in network and mount namespaces that are thrown away afterwards; the pause, in
// milliseconds, is made before each and not counted. Prints JSON, in microseconds:
// {"create": [one number per environment], "delete": all of them at once, by their group, per environment}
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define BRIDGE 500
#define FIRST_LINK 20000
#define MARK 77
#define PINS "/run/netns"
#define OWN "/proc/thread-self/ns/net"

// -- one batch of netlink messages ------------------------------------------------------------------------------

struct batch {
    _Alignas(4) char data[4096];
    size_t length;
    size_t message; // where the last message begins
    unsigned count;
};

static void *append(struct batch *b, const void *bytes, size_t size) {
    size_t padded = (size + 3) & ~(size_t)3;
    if (b->length + padded > sizeof b->data) errx(1, "a batch is too small");
    void *at = memset(b->data + b->length, 0, padded);
    if (bytes) memcpy(at, bytes, size);
    b->length += padded;
    ((struct nlmsghdr *)(b->data + b->message))->nlmsg_len = (uint32_t)(b->length - b->message);
    return at;
}

static void begin(struct batch *b, uint16_t type, uint16_t flags, const void *payload, size_t size) {
    struct nlmsghdr header = {.nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags, .nlmsg_seq = ++b->count};
    b->message = b->length;
    append(b, &header, sizeof header);
    append(b, payload, size);
}

static void put(struct batch *b, uint16_t type, const void *value, size_t size) {
    struct rtattr header = {.rta_type = type, .rta_len = (uint16_t)RTA_LENGTH(size)};
    append(b, &header, sizeof header);
    append(b, value, size);
}

static void put_u32(struct batch *b, uint16_t type, uint32_t value) { put(b, type, &value, sizeof value); }
static void put_name(struct batch *b, uint16_t type, const char *name) { put(b, type, name, strlen(name) + 1); }

// Nested attributes: the offset that open_nest returns goes to close_nest.
static size_t open_nest(struct batch *b, uint16_t type) {
    size_t at = b->length;
    put(b, type, NULL, 0);
    return at;
}

static void close_nest(struct batch *b, size_t at) { ((struct rtattr *)(b->data + at))->rta_len = (uint16_t)(b->length - at); }

static int route_socket(void) {
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};
    int yes = 1, fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0) err(1, "netlink");
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &yes, sizeof yes);
    return fd;
}

// Send a batch, wait for the acknowledgement of each of its messages, and empty it.
static void commit(struct batch *b, int fd, const char *what) {
    if (send(fd, b->data, b->length, 0) < 0) err(1, "%s", what);
    for (unsigned acknowledged = 0; acknowledged < b->count;) {
        _Alignas(4) char answer[8192];
        ssize_t got = recv(fd, answer, sizeof answer, 0);
        if (got < 0) err(1, "%s", what);
        unsigned left = (unsigned)got;
        for (struct nlmsghdr *m = (struct nlmsghdr *)answer; NLMSG_OK(m, left); m = NLMSG_NEXT(m, left)) {
            if (m->nlmsg_type != NLMSG_ERROR) continue;
            int code = ((struct nlmsgerr *)NLMSG_DATA(m))->error;
            if (code) errx(1, "%s: message %u: %s", what, m->nlmsg_seq, strerror(-code));
            acknowledged++;
        }
    }
    memset(b, 0, sizeof *b);
}

// -- what is asked ----------------------------------------------------------------------------------------------

static uint32_t address_of(int index) { return htonl(0x0ac80000u + 2 + (uint32_t)index); } // 10.200.0.2 ...
static uint32_t gateway(void) { return htonl(0x0ac80001u); }

static void add_bridge(struct batch *b, int fd) {
    struct ifinfomsg up = {.ifi_index = BRIDGE, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
    struct ifaddrmsg address = {.ifa_family = AF_INET, .ifa_prefixlen = 16, .ifa_index = BRIDGE};
    uint8_t mac[] = {0x02, 0xf0, 0, 0, 0, 1}, no = 0;
    uint32_t ip = gateway();
    begin(b, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &up, sizeof up);
    put_name(b, IFLA_IFNAME, "floor0");
    put(b, IFLA_ADDRESS, mac, sizeof mac);
    put_u32(b, IFLA_MTU, 1500);
    size_t info = open_nest(b, IFLA_LINKINFO);
    put_name(b, IFLA_INFO_KIND, "bridge");
    size_t data = open_nest(b, IFLA_INFO_DATA);
    put(b, IFLA_BR_MCAST_SNOOPING, &no, sizeof no);
    close_nest(b, data);
    close_nest(b, info);
    begin(b, RTM_NEWADDR, NLM_F_CREATE, &address, sizeof address);
    put(b, IFA_LOCAL, &ip, sizeof ip);
    commit(b, fd, "bridge");
}

static void add_link(struct batch *b, int fd, int index, int namespace_fd) {
    struct ifinfomsg link = {.ifi_index = FIRST_LINK + index, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
    struct ifinfomsg peer = {.ifi_index = 2}, port = {.ifi_index = FIRST_LINK + index};
    uint8_t outer[] = {0x02, 0xf1, 0, 0, (uint8_t)(index >> 8), (uint8_t)index}, yes = 1;
    uint8_t inner[] = {0x02, 0xf2, 0, 0, (uint8_t)(index >> 8), (uint8_t)index};
    char name[IFNAMSIZ];
    snprintf(name, sizeof name, "fl%d", index);
    begin(b, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &link, sizeof link);
    put_name(b, IFLA_IFNAME, name);
    put(b, IFLA_ADDRESS, outer, sizeof outer);
    put_u32(b, IFLA_MASTER, BRIDGE);
    put_u32(b, IFLA_GROUP, MARK);
    size_t info = open_nest(b, IFLA_LINKINFO);
    put_name(b, IFLA_INFO_KIND, "veth");
    size_t data = open_nest(b, IFLA_INFO_DATA), other = b->length;
    put(b, VETH_INFO_PEER, &peer, sizeof peer);
    put_name(b, IFLA_IFNAME, "eth0");
    put(b, IFLA_ADDRESS, inner, sizeof inner);
    put_u32(b, IFLA_NET_NS_FD, (uint32_t)namespace_fd);
    close_nest(b, other);
    close_nest(b, data);
    close_nest(b, info);
    begin(b, RTM_NEWLINK, 0, &port, sizeof port);
    info = open_nest(b, IFLA_LINKINFO);
    put_name(b, IFLA_INFO_SLAVE_KIND, "bridge");
    data = open_nest(b, IFLA_INFO_SLAVE_DATA);
    put(b, IFLA_BRPORT_ISOLATED, &yes, sizeof yes);
    close_nest(b, data);
    close_nest(b, info);
    commit(b, fd, "link");
}

static void set_up_inside(struct batch *b, int fd, int index) {
    struct ifinfomsg loopback = {.ifi_index = 1, .ifi_flags = IFF_UP, .ifi_change = IFF_UP}, eth0 = loopback;
    struct ifaddrmsg address = {.ifa_family = AF_INET, .ifa_prefixlen = 32, .ifa_index = 2};
    struct rtmsg route = {.rtm_family = AF_INET, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC,
                          .rtm_type = RTN_UNICAST, .rtm_flags = RTNH_F_ONLINK};
    uint32_t ip = address_of(index), via = gateway();
    eth0.ifi_index = 2;
    begin(b, RTM_NEWLINK, 0, &loopback, sizeof loopback);
    begin(b, RTM_NEWLINK, 0, &eth0, sizeof eth0);
    begin(b, RTM_NEWADDR, NLM_F_CREATE, &address, sizeof address);
    put(b, IFA_LOCAL, &ip, sizeof ip);
    begin(b, RTM_NEWROUTE, NLM_F_CREATE, &route, sizeof route);
    put(b, RTA_GATEWAY, &via, sizeof via);
    put_u32(b, RTA_OIF, 2);
    commit(b, fd, "inside");
}

static void create(struct batch *b, int host, int index) {
    char pin[64];
    snprintf(pin, sizeof pin, PINS "/fl%d", index);
    if (unshare(CLONE_NEWNET) < 0) err(1, "unshare");
    int file = open(pin, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    if (file < 0 || close(file) < 0 || mount(OWN, pin, NULL, MS_BIND, NULL) < 0) err(1, "pin");
    int own = open(OWN, O_RDONLY | O_CLOEXEC);
    if (own < 0) err(1, "own namespace");
    add_link(b, host, index, own);
    close(own);
    int inside = route_socket();
    set_up_inside(b, inside, index);
    close(inside);
}

static double microseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

int main(int argc, char **argv) {
    int count = argc > 1 ? atoi(argv[1]) : 0, pause_ms = argc > 2 ? atoi(argv[2]) : 0;
    if (argc > 3 || count < 1 || count > 1000 || pause_ms < 0)
        errx(2, "usage: floor COUNT [PAUSE_MS], COUNT from 1 to 1000, the ports that a bridge takes");
    static struct batch b;
    int home = open(OWN, O_RDONLY | O_CLOEXEC), host = route_socket();
    mkdir(PINS, 0755);
    if (mount("floor", PINS, "tmpfs", 0, NULL) < 0) err(1, "tmpfs on " PINS);
    add_bridge(&b, host);
    printf("{\"create\": [");
    for (int i = 0; i < count; i++) {
        if (pause_ms) usleep(1000 * (useconds_t)pause_ms);
        double start = microseconds();
        create(&b, host, i);
        printf("%s%.1f", i ? ", " : "", microseconds() - start);
    }
    if (setns(home, CLONE_NEWNET) < 0) err(1, "setns");
    struct ifinfomsg all = {0};
    double start = microseconds();
    begin(&b, RTM_DELLINK, 0, &all, sizeof all);
    put_u32(&b, IFLA_GROUP, MARK);
    commit(&b, host, "delete");
    for (int i = 0; i < count; i++) {
        char pin[64];
        snprintf(pin, sizeof pin, PINS "/fl%d", i);
        if (umount2(pin, MNT_DETACH) < 0 || unlink(pin) < 0) err(1, "unpin");
    }
    printf("], \"delete\": %.1f}\n", (microseconds() - start) / count);
    return 0;
}
