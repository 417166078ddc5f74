from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asdm_compress.core.errors import AsdmError
from asdm_compress.core.units import RESOURCES, Limit, format_count, format_duration, parse_budget, within


@given(resource=st.sampled_from(RESOURCES), share=st.integers(1, 100))
def test_relative_budgets_mean_shares_of_the_teacher(resource, share):
    (limit,) = parse_budget([f"{resource}={share}%"])
    assert limit.relative
    assert limit.absolute(200.0) == pytest.approx(2 * share)


@pytest.mark.parametrize(
    ("text", "resource", "value"),
    [
        ("latency=180ms", "latency", 0.18),
        ("latency=1.5s", "latency", 1.5),
        ("macs=280G", "macs", 280e9),
        ("params=450M", "params", 450e6),
        ("params=0.58B", "params", 580e6),
        (" PARAMS = 12k ", "params", 12e3),
    ],
)
def test_absolute_budgets(text, resource, value):
    (limit,) = parse_budget([text])
    assert (limit.resource, limit.relative) == (resource, False)
    assert limit.value == pytest.approx(value)


@given(
    resource=st.sampled_from(RESOURCES),
    value=st.one_of(st.integers(1, 10**13), st.floats(1e-4, 1e3)),
    relative=st.booleans(),
)
def test_limits_are_printed_as_they_are_read(resource, value, relative):
    limit = Limit(resource, max(1e-4, value % 1), True) if relative else Limit(resource, float(value), False)
    (again,) = parse_budget([str(limit)])
    assert (again.resource, again.relative) == (limit.resource, limit.relative)
    assert again.value == pytest.approx(limit.value, rel=1e-6)


def test_several_budgets_come_separately_or_with_commas():
    assert parse_budget(["latency=0.7x,params=0.6x"]) == parse_budget(["latency=0.7x", "params=0.6x"])


@pytest.mark.parametrize(
    "text",
    ["", "latency", "latency=", "latency=fast", "latency=0.7", "latency=0x", "latency=1.2x", "memory=1G", "macs=-5G",
     "macs=3ms", "latency=0.5x,latency=0.6x", "params=nan"],
)  # fmt: skip
def test_what_does_not_parse_is_refused_with_examples(text):
    with pytest.raises(AsdmError) as caught:
        parse_budget([text])
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_every_limit_counts():
    teacher = {"latency": 1.0, "macs": 100.0, "params": 10.0}
    limits = (Limit("macs", 0.5, True), Limit("params", 6.0, False))
    assert within({"latency": 9.0, "macs": 50.0, "params": 6.0}, teacher, limits)
    assert not within({"latency": 9.0, "macs": 50.1, "params": 6.0}, teacher, limits)
    assert not within({"latency": 9.0, "macs": 50.0, "params": 6.1}, teacher, limits)


def test_counts_are_printed_with_their_scale():
    assert [format_count(v) for v in (12, 1234, 859_520_964, 401.64e9)] == ["12", "1.23 k", "860 M", "402 G"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(90, "90 s"), (720, "12 min"), (61_440, "17 h 4 min"), (260_000, "3.0 days")]
)
def test_long_waits_are_said_in_what_people_count(seconds, said):
    assert format_duration(seconds) == said
