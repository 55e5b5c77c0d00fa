"""What Prometheus reads is well formed, has the names that are documented, and tells nobody's business."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from netnsd import wire
from netnsd.observability.metrics import Figures, Metrics

SLOTS = wire.Pool(name="slots", size=8, target=12, ready=5, claimed=100, missed=7, reason="no memory")
STOCKS = wire.Pool(name="templates", size=3, target=3, ready=2, claimed=1, missed=0, reason="")
FIGURES = Figures({"creating": 1, "running": 20, "stopped": 3, "removing": 0}, 33, 65000, [SLOTS, STOCKS], 4, 9, 2,
                  {"running": 30, "restarting": 1}, {"healthy": 7, "unhealthy": 2}, 55)
EXPECTED = {
    ("netnsd_environments", "creating"): 1, ("netnsd_environments", "running"): 20,
    ("netnsd_environments", "stopped"): 3, ("netnsd_environments", "removing"): 0,
    ("netnsd_services", "running"): 30, ("netnsd_services", "restarting"): 1,
    ("netnsd_service_health", "healthy"): 7, ("netnsd_service_health", "unhealthy"): 2,
    ("netnsd_service_restarts_total", ""): 55,
    ("netnsd_published_ports", ""): 33, ("netnsd_addresses_free", ""): 65000,
    ("netnsd_pool_size", "slots"): 8, ("netnsd_pool_size", "templates"): 3,
    ("netnsd_pool_target", "slots"): 12, ("netnsd_pool_target", "templates"): 3,
    ("netnsd_pool_ready", "slots"): 5, ("netnsd_pool_ready", "templates"): 2,
    ("netnsd_pool_claimed_total", "slots"): 100, ("netnsd_pool_claimed_total", "templates"): 1,
    ("netnsd_pool_missed_total", "slots"): 7, ("netnsd_pool_missed_total", "templates"): 0,
    ("netnsd_creations_under_way", ""): 4, ("netnsd_creations_waiting", ""): 9,
    ("netnsd_creations_refused_total", ""): 2,
}


def read(text: bytes) -> dict[tuple[str, str], float]:
    """Every sample, by its name and the value of its one label."""
    return {(sample.name, "".join(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text.decode()) for sample in family.samples}


def test_every_figure_is_there_and_no_other() -> None:
    assert read(Metrics(lambda: FIGURES).text()) == EXPECTED


def test_figures_are_of_the_moment_of_asking() -> None:
    moments = iter([FIGURES, replace(FIGURES, published_ports=34)])
    metrics = Metrics(lambda: next(moments))
    assert [read(metrics.text())["netnsd_published_ports", ""] for _ in range(2)] == [33, 34]


def test_nothing_is_taken_before_somebody_asks() -> None:
    def fail() -> Figures:
        raise AssertionError

    Metrics(fail)


def test_two_daemons_of_one_process_do_not_share_a_registry() -> None:
    first, second = Metrics(lambda: FIGURES), Metrics(lambda: replace(FIGURES, published_ports=0))
    assert read(first.text()) != read(second.text())


def test_names_units_and_kinds_are_as_the_conventions_want() -> None:
    text = Metrics(lambda: FIGURES).text().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert re.fullmatch(r"netnsd_[a-z_]+", family.name)
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert set(sample.labels) <= {"state", "pool"}
    assert text.endswith("\n")
    assert "python_info" not in text
    assert "process_" not in text


def test_reasons_are_no_labels() -> None:
    assert b"no memory" not in Metrics(lambda: FIGURES).text(), "a label per message would grow for ever"


def test_without_pools_the_rest_is_there() -> None:
    found = read(Metrics(lambda: replace(FIGURES, pools=[])).text())
    assert found == {key: value for key, value in EXPECTED.items() if not key[0].startswith("netnsd_pool")}


def test_pools_may_be_given_once() -> None:
    """An iterator of them is gone through once, though there are five families."""
    figures = replace(FIGURES, pools=iter([SLOTS, STOCKS]))
    assert read(Metrics(lambda: figures).text()) == EXPECTED


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30))
def test_any_text_in_a_label_comes_back(name: str) -> None:
    pool = wire.Pool(name=name, size=1, target=1, ready=1, claimed=1, missed=1, reason="")
    text = Metrics(lambda: replace(FIGURES, pools=[pool])).text()
    assert read(text)["netnsd_pool_size", name] == 1


@pytest.mark.parametrize("value", [0, 1, 1 << 40])
def test_large_numbers_are_exact(value: int) -> None:
    assert read(Metrics(lambda: replace(FIGURES, addresses_free=value)).text())["netnsd_addresses_free", ""] == value
