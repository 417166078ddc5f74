"""Intervals of figures: they cover what they say, also of a handful of values."""

from __future__ import annotations

import numpy as np
import pytest

from asdm_compress.evaluation import intervals


def test_intervals_cover_what_they_should():
    """Of 300 samples of a known distribution nearly 95 % of the intervals hold its mean, and its share."""
    rng = np.random.default_rng(0)
    means = [intervals.mean(rng.gamma(2, size=40)) for _ in range(60)]
    shares = [intervals.share(rng.random(40) < 0.2) for _ in range(300)]
    assert 50 <= sum(one.low <= 2 <= one.high for one in means) <= 60
    assert 0.9 <= np.mean([one.low <= 0.2 <= one.high for one in shares]) <= 0.99


@pytest.mark.parametrize("few", [2, 4, 5, 8])
def test_intervals_of_a_handful_cover_what_they_should(few):
    """A bootstrap's would hold the mean of two values every second time."""
    rng = np.random.default_rng(few)
    means = [intervals.mean(rng.normal(20, 3, size=few)) for _ in range(400)]
    assert {one.method for one in means} == {"t"}
    assert 0.92 <= np.mean([one.low <= 20 <= one.high for one in means]) <= 0.98
    medians = [intervals.median(rng.normal(20, 3, size=few + 1)) for _ in range(400)]
    assert {one.method for one in medians} == {
        "t" if few + 1 < 6 else "order" if few + 1 < 10 else "bootstrap-percentile"
    }
    assert np.mean([one.low <= 20 <= one.high for one in medians]) >= 0.91


def test_no_time_is_under_nothing():
    found = intervals.median([1.0, 3.0])
    assert (found.low, found.method) == (0.0, "t")
    assert found.high > 3


def test_intervals_of_too_little_and_of_nothing_new():
    assert intervals.mean([3.0]).method == "none"
    assert (intervals.mean([2.0, 2.0]).low, intervals.mean([2.0, 2.0]).high) == (2, 2)
    everything = intervals.share([True] * 8)
    assert everything.value == 1
    assert everything.high == pytest.approx(1)
    assert 0.5 < everything.low < 0.8  # a bootstrap would have said 1
    same = intervals.share_difference([True, False] * 8, [True, False] * 8)
    assert same.value == 0
    assert same.high == -same.low > 0.1
    worse = intervals.share_difference([True] * 16, [False] * 16)
    assert worse.value == worse.low == -1
    assert -0.95 < worse.high < -0.5
    better = intervals.share_difference([False] * 16, [True] * 16)
    assert (better.low, better.high) == (-worse.high, 1)
    right, of = np.array([1, 2, 0, 3]), np.array([2, 2, 0, 3])
    assert intervals.pooled_share(right, of).value == pytest.approx(6 / 7)
    assert intervals.pooled_share(right, of).n == 3


def test_paired_differences_are_surer_than_unpaired_ones():
    rng = np.random.default_rng(1)
    before = rng.normal(10, 3, size=50)
    after = before + rng.normal(0.5, 0.1, size=50)
    paired = intervals.mean_difference(before, after)
    assert 0.4 < paired.low < paired.value < paired.high < 0.6
    assert intervals.median_ratio(list(before), list(after)).n == 50
