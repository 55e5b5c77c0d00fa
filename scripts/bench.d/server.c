// A web server that is there a millisecond after its exec, so that what is measured around it is the environment and
// not the server: whatever a client sends, it is answered 200. One thread, epoll, keep-alive.
//
// usage: server PORT [ADDRESS], by default on all addresses. Ends by a signal only.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static const char ANSWER[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhere\n";

static void watch(int poller, int fd) {
    struct epoll_event wanted = {.events = EPOLLIN, .data = {.fd = fd}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &wanted) < 0) close(fd);
}

static int listener_at(const char *address, int port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int yes = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) err(1, "socket");
    if (inet_pton(AF_INET, address, &at.sin_addr) != 1) errx(2, "%s is no IPv4 address", address);
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) < 0 ||
        bind(fd, (struct sockaddr *)&at, sizeof at) < 0 || listen(fd, SOMAXCONN) < 0)
        err(1, "port %d", port);
    return fd;
}

// One read is one request: the bench's are small. A client that went away, or does not read, is dropped.
static void serve(int client) {
    char request[8192];
    if (recv(client, request, sizeof request, 0) > 0 &&
        send(client, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof ANSWER - 1)
        return;
    close(client);
}

int main(int argc, char **argv) {
    int port = argc > 1 ? atoi(argv[1]) : 0;
    if (argc > 3 || port < 1 || port > 65535) errx(2, "usage: server PORT [ADDRESS]");
    int listener = listener_at(argc > 2 ? argv[2] : "0.0.0.0", port), poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0) err(1, "epoll");
    watch(poller, listener);
    for (;;) {
        struct epoll_event found[32];
        int count = epoll_wait(poller, found, 32, -1);
        for (int i = 0; i < count; i++) {
            if (found[i].data.fd != listener) {
                serve(found[i].data.fd);
                continue;
            }
            int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
            if (client >= 0) watch(poller, client);
        }
    }
}
