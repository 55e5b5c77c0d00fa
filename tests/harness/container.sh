# Boots systemd in a container whose files are the machine's own, below a layer in memory. Says nothing: systemd-nspawn
# tells NOTIFY_SOCKET of the container's init and of its readiness. When standard input ends (the test closed it, or the
# test's process died in whatever way), kills the container and removes its cgroup.
#
# Started in a mount namespace of its own. In: CGROUP (a name below the mount of cgroup v2), NOTIFY_SOCKET, MACHINE_ID,
# PASSWD_LINES, GROUP_LINES, CHECKOUT and WHEELS (directories that the container sees, at /srv/).
set -eu

# Over the machine's /run, so that neither systemd-nspawn nor anything in the container leaves a trace there.
mount -n -t tmpfs -o mode=755,size=2G netnsd-test /run
# Where the machine has v1 controllers as well, systemd-nspawn would also make groups in v1's hierarchy of names.
mount -n -t cgroup2 none /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$CGROUP" /run/c/upper /run/c/work /run/c/root
mount -n -t overlay -o lowerdir=/,upperdir=/run/c/upper,workdir=/run/c/work netnsd-test /run/c/root
root=/run/c/root

# A host that nothing was set up on: none of the machine's services, and no netnsd.
rm -rf "$root"/etc/systemd/system "$root"/etc/rc[0-9S].d "$root"/opt/netnsd "$root"/etc/netnsd "$root"/var/lib/netnsd \
    "$root"/usr/local/bin/netnsd "$root"/usr/local/bin/netnsdctl
mkdir -p "$root/etc/systemd/system" "$root/srv/checkout" "$root/srv/wheels"
for unit in console-getty.service systemd-logind.service systemd-tmpfiles-clean.timer systemd-update-utmp.service; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done
: >"$root/etc/fstab"
echo "$MACHINE_ID" >"$root/etc/machine-id" # without one it were a first boot, at which every service is enabled
printf %s "$PASSWD_LINES" >>"$root/etc/passwd"
{ sed -e '/^netnsd:/d' -e '/^netnsd-admin:/d' /etc/group; printf %s "$GROUP_LINES"; } >"$root/etc/group"
sed -i -e '/^netnsd:/d' -e '/^netnsd-admin:/d' "$root/etc/gshadow"

# shellcheck disable=SC2093  # in the background
(
    echo 0 >"/sys/fs/cgroup/$CGROUP/cgroup.procs"
    exec env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn --quiet --directory="$root" --machine=netnsd-test \
        --register=no --keep-unit --boot --notify-ready=yes --private-network --link-journal=no --console=read-only \
        --bind-ro="$CHECKOUT:/srv/checkout" --bind-ro="$WHEELS:/srv/wheels" -- systemd.unit=multi-user.target </dev/null
) &
read -r _ || :

unset NOTIFY_SOCKET
echo 1 >"/sys/fs/cgroup/$CGROUP/cgroup.kill"
tries=0
until find "/sys/fs/cgroup/$CGROUP" -depth -type d -exec rmdir {} + 2>/dev/null && [ ! -d "/sys/fs/cgroup/$CGROUP" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 500 ]; then
        echo "still there after 5 s: $CGROUP" >&2
        exit 1
    fi
    sleep 0.01
done
wait || : # it was killed
