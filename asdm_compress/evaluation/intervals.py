"""Figures with their 95 % intervals: means, shares, medians and paired changes, by scipy's bootstrap.

Resamples of a handful of values hardly vary: of two, they lie between the two, which holds the mean every second time.
There the mean has Student's interval, which knows how little a handful tells, and the median that between two of the
values in order, or, of too few for that, Student's, as much wider as a median scatters more.

Every interval comes from the same seed, so that the same observations give the same interval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from scipy.stats import DegenerateDataWarning, binom, binomtest, bootstrap, ttest_1samp

from asdm_compress.evaluation.record import Estimate, IntervalMethod

RESAMPLES: Final = 2000
LEVEL: Final = 0.95
SEED: Final = 0
# Above it the corrections of BCa are below the interval's own noise, and its jackknife takes n² time.
_MANY: Final = 5000
FEW: Final = 10  # values, below which none are resampled
_CELLS: Final = 4_000_000  # of a batch of resamples


def exact(value: float) -> Estimate:
    """A figure that is counted, not sampled."""
    return Estimate(value=value, low=value, high=value, n=1, method="exact")


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of one value per image or pair."""
    array = np.asarray(values, dtype=float)
    if 2 <= len(array) < FEW and not (array == array[0]).all():
        found = ttest_1samp(array, 0.0).confidence_interval(LEVEL)
        return Estimate(
            value=float(array.mean()), low=float(found.low), high=float(found.high), n=len(array), method="t"
        )
    return _bootstrapped((array,), _mean)


def mean_difference(before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> Estimate:
    """The mean of `after - before` over pairs."""
    return mean(np.asarray(after, dtype=float) - np.asarray(before, dtype=float))


def share(flags: Sequence[bool] | np.ndarray) -> Estimate:
    """A share of images with its Wilson interval, which has a width at 0 and at 1 too, where a bootstrap has none."""
    flags = np.asarray(flags, dtype=bool)
    found = binomtest(int(flags.sum()), len(flags)).proportion_ci(LEVEL, method="wilson")
    return Estimate(value=float(flags.mean()), low=found.low, high=found.high, n=len(flags), method="wilson")


def share_difference(before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray) -> Estimate:
    """The difference of two shares of the same images.

    Where no image has changed there is nothing to resample: then as many changes to either side as Wilson's interval
    allows for none seen; and where all have, as few as it allows for all.
    """
    first, second = (np.asarray(flags, dtype=bool) for flags in (before, after))
    if (first == second).all():
        most = binomtest(0, len(first)).proportion_ci(LEVEL, method="wilson").high
        return Estimate(value=0.0, low=-most, high=most, n=len(first), method="wilson")
    if (first != second).all() and (first == first[0]).all():
        least = binomtest(len(first), len(first)).proportion_ci(LEVEL, method="wilson").low
        low, high = (-1.0, -least) if first[0] else (least, 1.0)
        return Estimate(value=-1.0 if first[0] else 1.0, low=low, high=high, n=len(first), method="wilson")
    return mean_difference(first, second)


def pooled_share(right: np.ndarray, of: np.ndarray) -> Estimate:
    """Σ right / Σ of over images (N,) of which each has several chances; images are resampled, n is their number."""
    right, of = right[of > 0], of[of > 0]
    if (right == of).all() or (right == 0).all():
        return share(right > 0)  # as if each image had one chance, which is the wider
    return _bootstrapped((right.astype(float), of.astype(float)), _pooled)


def pooled_difference(before: np.ndarray, after: np.ndarray, of: np.ndarray) -> Estimate:
    """The difference of two pooled shares of the same images."""
    kept = of > 0
    if (before[kept] == after[kept]).all():
        return share_difference(np.zeros(kept.sum()), np.zeros(kept.sum()))  # as if each image had one chance
    arrays = tuple(array[kept].astype(float) for array in (before, after, of))
    return _bootstrapped(arrays, _pooled_difference)


def median(values: Sequence[float]) -> Estimate:
    """The median of repeats."""
    array = np.sort(np.asarray(values, dtype=float))
    n = len(array)
    if not 2 <= n < FEW or array[0] == array[-1]:
        return _bootstrapped((array,), _median, "percentile")
    value = float(np.median(array))
    left_out = int(binom.ppf((1 - LEVEL) / 2, n, 0.5))  # at either end, at the most
    if left_out > 0:
        low, high = array[left_out - 1], array[n - left_out]
        return Estimate(value=value, low=float(low), high=float(high), n=n, method="order")
    found = ttest_1samp(array, 0.0).confidence_interval(LEVEL)
    half = (found.high - found.low) / 2 * (math.pi / 2) ** 0.5
    # Times and their ratios: with few that lie far apart a symmetric interval would go below nothing.
    low = max(value - half, 0.0) if array[0] >= 0 else value - half
    return Estimate(value=value, low=float(low), high=float(value + half), n=n, method="t")


def median_ratio(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The median of `after / before` over turns of a timing, which a slow moment of the machine meets alike."""
    return median(list(np.asarray(after, dtype=float) / np.asarray(before, dtype=float)))


def centred(value: float, resampled: np.ndarray, n: int, least: float | None = None) -> Estimate:
    """A figure with the spread of its resampled values around their own mean.

    A distance between sets grows when images repeat, as they do in a bootstrap: its resampled values say how much it
    varies, and not where it is. The interval is for the same number of images.
    """
    if n < 2 or len(resampled) < 2:
        return Estimate(value=value, low=None, high=None, n=n, method="none")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled - resampled.mean(), [tail, 1 - tail]) + value
    if least is not None:
        low, high = max(low, least), max(high, least)
    return Estimate(value=value, low=float(low), high=float(high), n=n, method="bootstrap-centred")


def resampling_weights(n: int, resamples: int) -> np.ndarray:
    """How often each of n images is in each resample: (resamples, n)."""
    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=resamples)


def _bootstrapped(data: tuple[np.ndarray, ...], statistic: Callable[..., Any], method: str = "BCa") -> Estimate:
    value, n = float(statistic(*data)), len(data[0])
    if n < 2:
        return Estimate(value=value, low=None, high=None, n=n, method="none")
    if all((array == array[0]).all() for array in data):
        return Estimate(value=value, low=value, high=value, n=n, method="bootstrap-percentile")
    tried = [method] if method == "percentile" or n > _MANY else ["BCa", "percentile"]
    for one in [*tried[:-1], "percentile"]:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateDataWarning)  # then the other method is taken
            found = bootstrap(
                data,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=RESAMPLES,
                batch=max(1, _CELLS // n),
                confidence_level=LEVEL,
                method=one,
                random_state=np.random.default_rng(SEED),
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    name: IntervalMethod = "bootstrap-bca" if one == "BCa" else "bootstrap-percentile"
    return Estimate(value=value, low=float(found.low), high=float(found.high), n=n, method=name)


def _mean(values: np.ndarray, axis: int = -1) -> Any:
    return np.mean(values, axis=axis)


def _median(values: np.ndarray, axis: int = -1) -> Any:
    return np.median(values, axis=axis)


def _pooled(right: np.ndarray, of: np.ndarray, axis: int = -1) -> Any:
    return right.sum(axis=axis) / of.sum(axis=axis)


def _pooled_difference(before: np.ndarray, after: np.ndarray, of: np.ndarray, axis: int = -1) -> Any:
    return (after.sum(axis=axis) - before.sum(axis=axis)) / of.sum(axis=axis)
