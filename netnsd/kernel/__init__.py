"""Everything that needs privilege: netlink, nftables, cgroups, mounts, starting processes."""
