"""Configuration: what is wrong is named, by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from netnsd.daemon import config
from netnsd.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_file_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "none")


def load(tmp_path: Path, text: str, **environ: str) -> config.Config:
    path = tmp_path / "netnsd.toml"
    path.write_text(text)
    return config.load(path, environ)


def test_defaults_are_good() -> None:
    made = config.load(None, {"PATH": "/bin", "NETNSD_SOCKET": "/x"})
    assert made == config.Config()
    assert (made.published_range, made.plan.prefix_length, made.socket_permissions) == ((20000, 29999), 24, 0o660)


def test_a_file_and_variables_which_win(tmp_path: Path) -> None:
    text = '[network]\nsupernet = "10.50.0.0/16"\nmtu = 1400\n[daemon]\ngrace_seconds = 3\n'
    made = load(tmp_path, text, NETNSD_NETWORK_MTU="9000", NETNSD_DAEMON_GRACE_SECONDS="1.5",
                NETNSD_SERVICES_ALLOW_SETUID="false")
    assert (made.network.supernet, made.network.mtu, made.daemon.grace_seconds) == ("10.50.0.0/16", 9000, 1.5)
    assert made.services.allow_setuid is False


@pytest.mark.parametrize(("text", "named"), [
    ("typo = 1", ["'typo'"]), ("[network]\nsupernett = 1", ["'supernett'", "[network]"]),
    ("[nework]\nmtu = 1", ["'nework'"]), ('[network]\nmtu = "1500"', ["mtu", "[network]"]),
    ("[network]\nmtu = 1500.5", ["mtu"]), ("network = 1", ["network"]), ('[daemon]\nlog_level = "loud"', ["log_level"]),
    ("[services]\nallow_setuid = 1", ["allow_setuid"]), ("[network", []), ("a = 1\na = 2", []), ("\0", []),
])
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, text: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "netnsd.toml") in caught.value.message
    assert all(word in caught.value.message for word in named), caught.value.message
    assert caught.value.hint


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "nowhere", {})
    with pytest.raises(ConfigError, match="directory"):
        config.load(tmp_path, {})
    (tmp_path / "latin").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="latin"):
        config.load(tmp_path / "latin", {})


@pytest.mark.parametrize("variable", ["NETNSD_TYPO", "NETNSD_NETWORK", "NETNSD_NETWORK_", "NETNSD_NETWORK_TYPO",
                                      "NETNSD_"])
def test_an_unknown_variable_is_named(variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        config.load(None, {variable: "1"})


@pytest.mark.parametrize(("variable", "value"), [("NETNSD_NETWORK_MTU", "x"), ("NETNSD_NETWORK_MTU", ""),
                                                 ("NETNSD_SERVICES_ALLOW_SETUID", "perhaps")])
def test_a_bad_value_of_a_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, {variable: value})
    assert variable.lower().rpartition("_")[2] in caught.value.message


def test_a_variable_does_not_loosen_the_files_types(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mtu"):
        load(tmp_path, '[network]\nmtu = "1500"', NETNSD_NETWORK_FLOWS="100")


@pytest.mark.parametrize(("section", "key", "least", "most"), [
    ("network", "mtu", 576, 65535), ("network", "flows", 16, 1 << 20), ("network", "bridge_ports", 1, 1000),
    ("services", "log_bytes", 1 << 16, 1 << 40), ("daemon", "grace_seconds", 0, 600),
    ("daemon", "connections_per_user", 1, 10_000), ("api", "requests_burst", 1, 100_000),
    ("quota", "environments", 0, 1 << 50),
    ("quota", "ports", 0, 1 << 50), ("quota", "memory", 0, 1 << 50), ("quota", "creations_per_minute", 0, 1 << 50),
    ("resources", "pids", 1, 4194304), ("resources", "memory", 4 << 20, 1 << 50),
    ("resources", "bandwidth", 64_000, 32_000_000_000)])
def test_numbers_have_limits(tmp_path: Path, section: str, key: str, least: int, most: int) -> None:
    for value in (least, most):
        assert getattr(getattr(load(tmp_path, f"[{section}]\n{key} = {value}"), section), key) == value
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError, match=key):
            load(tmp_path, f"[{section}]\n{key} = {value}")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-inf"])
@pytest.mark.parametrize("section", ["quota", "resources"])
def test_processors_are_a_number(tmp_path: Path, section: str, value: str) -> None:
    assert getattr(load(tmp_path, f"[{section}]\ncpu = 1.5"), section).cpu == 1.5
    with pytest.raises(ConfigError, match="cpu"):
        load(tmp_path, f"[{section}]\ncpu = {value}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_grace_is_a_number_of_seconds(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="grace_seconds"):
        load(tmp_path, f"[daemon]\ngrace_seconds = {value}")


@pytest.mark.parametrize("value", ["", "20000", "20000-", "-20000", "30000-20000", "1023-2000", "60000-65536", "a-b",
                                   "20000 - 20010", "20000-20010\\n", "٢0000-20010", "20000-20010-20020"])
def test_bad_port_ranges(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"\[ports\] range"):
        load(tmp_path, f'[ports]\nrange = "{value}"')


@pytest.mark.parametrize("overlap", [-1, 0])
def test_a_range_may_touch_the_kernels_own_and_not_overlap_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: int
) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for low, high in ((first - 100, first + overlap), (last - overlap, min(last + 100, 65535))):
        if high > 65535 or low > high or low < 1024:
            continue
        if overlap < 0:
            assert load(tmp_path, f'[ports]\nrange = "{low}-{high}"').published_range == (low, high)
        else:
            with pytest.raises(ConfigError, match="ip_local_port_range"):
                load(tmp_path, f'[ports]\nrange = "{low}-{high}"')


@pytest.mark.parametrize("value", ["", "10.0.0.1/16", "10.0.0.0", "10.0.0.0/25", "10.0.0.0/33", "fd00::/64", "x"])
def test_bad_supernets(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="supernet"):
        load(tmp_path, f'[network]\nsupernet = "{value}"')


@pytest.mark.parametrize(("key", "value"), [("socket_mode", "0999"), ("socket_mode", "660 "), ("socket_mode", "rw"),
                                            ("socket_mode", "10660"), ("cgroup", ""), ("cgroup", "/"),
                                            ("cgroup", "a/../b"),
                                            ("cgroup", "/a"), ("cgroup", "a//b")])
def test_bad_settings_of_the_daemon(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load(tmp_path, f'[daemon]\n{key} = "{value}"')


@pytest.mark.parametrize(("listen", "where"), [
    ("127.0.0.1:7070", "127.0.0.1"), ("127.9.9.9:1", "127.9.9.9"), ("[::1]:65535", "::1")])
def test_the_api_listens_on_loopback_without_tls(tmp_path: Path, listen: str, where: str) -> None:
    address = load(tmp_path, f'[api]\nlisten = "{listen}"').api_address
    assert address is not None
    assert (str(address[0]), address[1]) == (where, int(listen.rpartition(":")[2]))


@pytest.mark.parametrize("listen", ["0.0.0.0:7070", "192.0.2.1:7070", "[::]:7070", "[2001:db8::1]:7070",
                                    "[::ffff:127.0.0.1]:7070"])
@pytest.mark.parametrize("given", ["", "tls_key", "tls_certificate"])
def test_elsewhere_the_api_needs_tls_whole(tmp_path: Path, listen: str, given: str) -> None:
    text = f'[api]\nlisten = "{listen}"\n'
    missing = "tls_key" if given == "tls_certificate" else "tls_certificate"
    with pytest.raises(ConfigError, match=rf"\[api\] {missing}"):
        load(tmp_path, text + (f'{given} = "/x"' if given else ""))
    assert load(tmp_path, text + 'tls_key = "/x"\ntls_certificate = "/y"').api_address is not None


@pytest.mark.parametrize("listen", ["", "7070", ":7070", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536",
                                    "localhost:7070", "::1:7070", "[::1]", "[fe80::1%eth0]:7070", "127.0.0.1:7070\\n",
                                    "127.0.0.256:7070", "[127.0.0.1]:7070x", "127.0.0.1:٧", "10.203.0.1:7070"])  # noqa: RUF001
def test_where_the_api_cannot_listen_is_named(tmp_path: Path, listen: str) -> None:
    tls = 'tls_key = "/x"\ntls_certificate = "/y"'
    with pytest.raises(ConfigError, match=r"\[api\] listen"):
        load(tmp_path, f'[api]\nlisten = "{listen}"\n{tls}')


def test_half_of_tls_is_named_without_an_address_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[api\] tls_key"):
        load(tmp_path, '[api]\ntls_certificate = "/x"')
    assert load(tmp_path, "").api_address is None
