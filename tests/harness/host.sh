# Turns fresh namespaces into a disposable host, says so, and waits. When its standard input ends (the test closed it,
# or the test's process died in whatever way) it kills what lives on the host and removes its cgroups.
#
# In: HARNESS_CGROUP and DAEMON_CGROUP (absolute), PASSWD_LINES, GROUP_LINES, HOMES (uid:gid:path ...), RESOLV,
# TESTS (our directory).
set -eu

# One tmpfs for everything that a host keeps under /run: namespaces' names, sockets, homes, our own files.
# Without -n, mount would first make /run/mount on the machine.
mount -n -t tmpfs -o mode=755,nosuid netnsd-test /run
mkdir -p /run/netns /run/lock /run/harness /run/home /run/test
if [ -d /dev/shm ]; then mount -t tmpfs -o mode=1777,nosuid netnsd-test /dev/shm; fi

# Programs of the tests that run as users, who may not be able to enter the checkout.
mkdir -p /run/harness/code/tests
mount --bind "$TESTS" /run/harness/code/tests

# Some machines' /dev/null cannot be opened by unprivileged users.
mknod -m 666 /run/harness/null c 1 3
mount --bind /run/harness/null /dev/null

# The machine may have such groups by itself.
{ cat /etc/passwd; printf %s "$PASSWD_LINES"; } >/run/harness/passwd
{ sed -e '/^netnsd:/d' -e '/^netnsd-admin:/d' /etc/group; printf %s "$GROUP_LINES"; } >/run/harness/group
mount --bind /run/harness/passwd /etc/passwd
mount --bind /run/harness/group /etc/group
if [ -e /etc/resolv.conf ]; then
    printf %s "$RESOLV" >/run/harness/resolv.conf
    mount --bind /run/harness/resolv.conf /etc/resolv.conf
fi

for entry in $HOMES; do
    home=${entry##*:}
    mkdir -m 750 "$home"
    chown "${entry%:*}" "$home"
done

ip link set lo up
mkdir "$HARNESS_CGROUP"

echo ready
read -r _ || :

remove() {
    [ -d "$1" ] || return 0
    echo 1 >"$1/cgroup.kill" || :
    tries=0
    until find "$1" -depth -type d -exec rmdir {} + 2>/dev/null && [ ! -d "$1" ]; do
        tries=$((tries + 1))
        if [ "$tries" -gt 500 ]; then
            echo "still there after 5 s: $1, with processes $(tr '\n' ' ' <"$1/cgroup.procs")" >&2
            return 1
        fi
        sleep 0.01
    done
}
left=0
remove "$HARNESS_CGROUP" || left=1
remove "$DAEMON_CGROUP" || left=1
exit $left
