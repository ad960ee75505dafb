"""How often 95 % intervals hold the true number: those of benchmarks/intervals.py, which the report has, beside others.

Scores are drawn from three populations: normal; `failing`, where three runs in ten end near 20 and the others near 90;
and `skewed`, with a long tail of bad runs. In `episodes` runs differ by a standard deviation of 10, and the episodes of
one by 30. The report shows no interval of a mean from fewer than five seeds: here is what it would be worth.

Run: python -m benchmarks.measurements.coverage
"""

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
import intervals
from intervals import Interval, Samples

from common.command_line import check, launch

CHUNK = 100  # simulations at a time
DRAWS = 999  # of the bootstraps that ours are compared with


@dataclass
class Args:
    seeds: tuple[int, ...] = (3, 5, 10)
    """runs of an algorithm on a dataset"""
    datasets: int = 4
    """how many there are where there are several"""
    simulations: int = 2000
    """of each case; a multiple of 100"""
    num_episodes: int = 50
    """of a run"""
    seed: int = 0
    """of the random numbers"""


Draw = Callable[..., np.ndarray]
POPULATIONS: dict[str, Draw] = {
    "normal": lambda rng, *shape: rng.normal(60, 15, shape),
    "failing": lambda rng, *shape: np.where(rng.random(shape) < 0.3, 20, 90) + rng.normal(0, 5, shape),
    "skewed": lambda rng, *shape: 100 - rng.lognormal(np.log(20), 0.8, shape),
}


def scipys(samples: Samples, statistic: Callable, method: str = "percentile") -> Interval:
    """SciPy's bootstrap as it is; its percentile interval is what rliable has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BCa has no answer where all numbers are the same
        result = stats.bootstrap(samples, statistic, method=method, n_resamples=DRAWS, batch=CHUNK, axis=-1, rng=0)
    return result.confidence_interval


def of_means(samples: Samples, statistic: Callable) -> dict[str, Interval]:
    found = {"ours": intervals.interval(samples, statistic), "percentile": scipys(samples, statistic)}
    return found | ({"BCa": scipys(samples, statistic, "BCa")} if len(samples) == 1 else {})


def of_episodes(returns: np.ndarray, rng: np.random.Generator) -> dict[str, Interval]:
    """Of the mean of returns [simulations, runs, episodes], with whole runs, with their episodes drawn anew as well,
    and with all episodes as one sample, as if each were a run.
    """
    count, length = returns.shape[1:]
    runs, episodes = rng.integers(count, size=(DRAWS, count, 1)), rng.integers(length, size=(DRAWS, count, length))
    nested = np.array([returns[:, run, own].mean(axis=(1, 2)) for run, own in zip(runs, episodes, strict=True)])
    half = stats.t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1)) * nested.std(axis=0, ddof=1)
    estimate, pooled = returns.mean(axis=(1, 2)), returns.reshape(len(returns), -1)
    return {
        "ours, whole runs": intervals.interval([returns.mean(axis=2)], intervals.mean),
        "episodes anew, too": (estimate - half, estimate + half),
        "episodes as runs": scipys([pooled], intervals.mean),
    }


def of_improvement(xs: Samples, ys: Samples) -> dict[str, Interval]:
    def share(*samples: np.ndarray, axis: int) -> np.ndarray:
        return intervals.improvement(list(samples[: len(xs)]), list(samples[len(xs) :]))

    return {"ours": intervals.improvement_interval(xs, ys), "percentile": scipys(xs + ys, share)}


def of_profile(samples: Samples, levels: np.ndarray) -> dict[str, Interval]:
    def share(*samples: np.ndarray, axis: int) -> np.ndarray:
        return intervals.profile(list(samples), levels)[..., 0]

    low, high = intervals.profile_interval(samples, levels)
    return {"ours": (low[..., 0], high[..., 0]), "percentile": scipys(samples, share)}


def measure(args: Args, name: str, truth: float, simulate: Callable[[int], dict[str, Interval]]) -> None:
    """Prints, for each interval that `simulate` gives from so many seeds, how often it holds the truth, and how long it
    is.
    """
    cells = defaultdict(list)
    for seeds in args.seeds:
        held, lengths = defaultdict(list), defaultdict(list)
        for _ in range(args.simulations // CHUNK):
            for method, (low, high) in simulate(seeds).items():
                held[method].append(np.mean((low <= truth) & (truth <= high)))
                lengths[method].append(np.mean(high - low))
        for method in held:
            cells[method].append(f"{100 * np.mean(held[method]):5.1f} {np.mean(lengths[method]):7.2f}")
    for method, columns in cells.items():
        print(f"{name:<42}{method:<20}{'   '.join(columns)}", flush=True)


def main(args: Args) -> None:
    check(min(args.seeds, default=0) >= 2, "--seeds: must be at least 2, for fewer have no interval")
    whole = args.simulations >= CHUNK and args.simulations % CHUNK == 0
    check(whole, f"--simulations {args.simulations}: must be a multiple of {CHUNK}")
    check(min(args.datasets, args.num_episodes) >= 1, "--datasets and --num-episodes: must be at least 1")
    rng = np.random.default_rng(args.seed)
    print(
        f"95 % intervals: % of {args.simulations} simulations (seed {args.seed}) that hold the truth, and mean length"
    )
    print(f"{'':<62}{'   '.join(f'{seeds:>7} seeds' for seeds in args.seeds)}")

    for population, draw in POPULATIONS.items():
        many = draw(rng, 1_000_000)
        for count, statistic in ((1, intervals.mean), (args.datasets, intervals.mean), (args.datasets, intervals.iqm)):

            def means(seeds: int, draw: Draw = draw, count: int = count, of: Callable = statistic) -> dict:
                return of_means([draw(rng, CHUNK, seeds) for _ in range(count)], of)

            measure(args, f"{statistic.__name__}, datasets: {count}, {population}", float(statistic(many)), means)

    def episodes(seeds: int) -> dict[str, Interval]:
        runs = rng.normal(0, 10, (CHUNK, seeds, 1))
        return of_episodes(runs + rng.normal(0, 30, (CHUNK, seeds, args.num_episodes)), rng)

    measure(args, f"mean, episodes: {args.num_episodes}", 0.0, episodes)

    shifts = [[shift] * count for count in (1, args.datasets) for shift in (0.0, 1.0, 2.0)]
    shifts.append([float(index) for index in range(args.datasets)])
    for shift in shifts:  # of each dataset, in standard deviations of normal scores

        def wins(seeds: int, shift: list[float] = shift) -> dict[str, Interval]:
            return of_improvement(
                [rng.normal(by, 1, (CHUNK, seeds)) for by in shift], [rng.normal(0, 1, (CHUNK, seeds)) for _ in shift]
            )

        shares = stats.norm.cdf(np.array(shift) / np.sqrt(2))
        name = f"P(X > Y) = {shares.mean():.2f}, datasets: {len(shift)}{', unlike' * (len(set(shift)) > 1)}"
        measure(args, name, float(shares.mean()), wins)

    for truth in (0.5, 0.9):

        def profiles(seeds: int, truth: float = truth) -> dict[str, Interval]:
            return of_profile([rng.random((CHUNK, seeds)) for _ in range(args.datasets)], np.array([1 - truth]))

        measure(args, f"profile at {truth:.1f}, datasets: {args.datasets}", truth, profiles)


if __name__ == "__main__":
    launch(main, Args)
