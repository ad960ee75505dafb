"""Estimates from runs on several datasets, and their intervals. measurements/coverage.py measures how often these hold.

A sample [..., runs] has the values of an algorithm's runs on one dataset. Datasets are strata (Agarwal et al., "Deep RL
at the Edge of the Statistical Precipice", 2021, arXiv 2108.13264): the runs of each are drawn by themselves, and each
dataset weighs the same, however many its runs. A run is drawn whole, with all its episodes: their noise is part of what
runs differ by, and an interval that drew a run's episodes anew, too, would count it twice.

Of few runs the percentile bootstrap, which rliable has, promises too much. So a mean and an interquartile mean have
Student's t interval around them, with the bootstrap's standard error (Hesterberg, "What Teachers Should Know about the
Bootstrap", 2015, arXiv 1411.5279), and a share has one that is not of length 0 where the share is 0 or 1. From fewer
than five runs a mean has none: no bootstrap can reach 95 %, and Student's would rest on the runs being normal, which is
not to be seen in so few (Patterson et al., "Empirical Design in Reinforcement Learning", 2023, arXiv 2304.01315).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize.elementwise import find_root

FEWEST = 5  # runs of an algorithm on a dataset that have an interval
LEVEL = 0.95
Samples = list[np.ndarray]  # one for each dataset
Interval = tuple[np.ndarray, np.ndarray]


# --- Estimates ------------------------------------------------------------------------------------------------------


def mean(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([sample.mean(axis) for sample in samples], axis=0)


def pool(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """All samples in one, each repeated until they are of one length: a dataset with more runs weighs no more."""
    length = math.lcm(*(sample.shape[axis] for sample in samples))
    return np.concatenate([np.repeat(sample, length // sample.shape[axis], axis) for sample in samples], axis)


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half of all runs. Of fewer than four it leaves out none, and is the mean."""
    return stats.trim_mean(pool(*samples, axis=axis), 0.25, axis=axis)


def improvement(xs: Samples, ys: Samples) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2, averaged over datasets: Mann and Whitney's U by the number of pairs."""
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(xs, ys, strict=True)]
    return np.mean([((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)) for x, y in pairs], axis=0)


def profile(samples: Samples, levels: np.ndarray) -> np.ndarray:
    """The share of runs above each level [levels], averaged over datasets."""
    return np.mean([(sample[..., None, :] > levels[:, None]).mean(axis=-1) for sample in samples], axis=0)


# --- Intervals ------------------------------------------------------------------------------------------------------


def interval(samples: Samples, statistic: Callable[..., Any]) -> Interval:
    """Of statistic(*samples, axis), a mean or like one: estimate -+ t * standard error.

    The bootstrap's variance is (n - 1) / n of the right one. The degrees of freedom are Satterthwaite's: for the mean
    of one dataset this is the textbook's interval, but for the noise of 9,999 draws.
    """
    sizes = np.array([sample.shape[-1] for sample in samples])
    drawn = stats.bootstrap(samples, statistic, method="percentile", axis=-1, vectorized=True, batch=1000, rng=0)
    error = drawn.standard_error * math.sqrt(sizes.min() / (sizes.min() - 1))
    parts = np.stack([sample.var(axis=-1, ddof=1) / sample.shape[-1] for sample in samples], axis=-1)
    freedom = parts.sum(-1) ** 2 / np.maximum((parts**2 / (sizes - 1)).sum(-1), np.finfo(float).tiny)
    half = _student(freedom) * error
    estimate = statistic(*samples, axis=-1)
    return estimate - half, estimate + half


def improvement_interval(xs: Samples, ys: Samples) -> Interval:
    """Of `improvement`: Newcombe's ("Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic", part 2, 2006, Statistics in Medicine 25, method 5), for one dataset or the average of several.
    """
    sizes = [(x.shape[-1], y.shape[-1]) for x, y in zip(xs, ys, strict=True)]

    def variance(share: np.ndarray) -> np.ndarray:
        shape = (1 - share) / (2 - share) + share / (1 + share)
        parts = [share * (1 - share) * (1 + ((m + n) / 2 - 1) * shape) / (m * n) for m, n in sizes]
        return sum(parts) / len(parts) ** 2

    return _share_interval(improvement(xs, ys), variance, sum(m + n - 2 for m, n in sizes))


def profile_interval(samples: Samples, levels: np.ndarray) -> Interval:
    """Of `profile`, of each level by itself: Wilson's (1927)."""
    sizes = np.array([sample.shape[-1] for sample in samples])
    factor = (1 / sizes).sum() / len(sizes) ** 2
    return _share_interval(profile(samples, levels), lambda share: share * (1 - share) * factor, sum(sizes - 1))


def _share_interval(share: np.ndarray, variance: Callable[[np.ndarray], np.ndarray], freedom: float) -> Interval:
    """All true shares that are within t standard errors of `share`, each with the `variance` that it would imply.

    The sources have 1.96 where Student's t is here. With that, three runs that all beat three would put P(X > Y) above
    50 %, though of six equal runs one order in ten is as extreme. `variance` is the same at 1 - share. It takes all
    datasets to have the same share, which makes it larger than it is where they differ.
    """
    factor = _student(np.array(freedom)) ** 2

    def low(share: np.ndarray) -> np.ndarray:  # `share` itself solves the equation where it is 0 or 1
        ends = np.zeros_like(share), share * (1 - 1e-9)
        return find_root(lambda p, share: (share - p) ** 2 - factor * variance(p), ends, args=(share,)).x

    return low(share), 1 - low(1 - share)


def _student(freedom: np.ndarray) -> np.ndarray:
    """Student's t for LEVEL; a single run, without any freedom, is taken for two."""
    return stats.t.ppf((1 + LEVEL) / 2, np.maximum(freedom, 1))
