"""The report's estimates against hand calculations, and its intervals against SciPy's and textbooks' own."""

import itertools

import intervals
import numpy as np
import pytest
from scipy import stats


def test_the_mean_weighs_datasets_the_same():
    assert intervals.mean(np.array([1.0, 2.0, 3.0]), np.array([10.0])) == (2 + 10) / 2


def test_the_interquartile_mean_is_that_of_the_middle_half_of_all_runs():
    first, second = np.array([1.0, 100.0, 3.0, 4.0]), np.array([2.0, 5.0, -50.0, 6.0])
    assert intervals.iqm(first, second) == (2 + 3 + 4 + 5) / 4  # of -50 1 | 2 3 4 5 | 6 100


def test_the_interquartile_mean_weighs_datasets_the_same():
    """Four seeds beside two: each of the two counts twice."""
    four, two = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0])
    assert intervals.iqm(four, two) == (3 + 4 + 10 + 10) / 4  # of 1 2 | 3 4 10 10 | 20 20


def test_improvement_counts_pairs_within_each_dataset():
    x, y = [np.array([1.0, 3.0]), np.array([0.0, 0.0])], [np.array([2.0, 2.0, 0.0]), np.array([0.0, 1.0, 1.0])]
    first = (0 + 0 + 1 + 1 + 1 + 1) / 6
    second = (0.5 + 0 + 0 + 0.5 + 0 + 0) / 6
    assert intervals.improvement(x, y) == pytest.approx((first + second) / 2)


def test_a_profile_weighs_datasets_the_same():
    """Of two seeds of one, one is above 50, of three of the other none: a quarter, not one of five."""
    samples, levels = [np.array([40.0, 60.0]), np.array([10.0, 20.0, 30.0])], np.array([0.0, 10.0, 50.0, 60.0])
    np.testing.assert_allclose(intervals.profile(samples, levels), [1, (1 + 2 / 3) / 2, 0.25, 0])


@pytest.mark.parametrize("count", [5, 10])
def test_the_interval_of_one_datasets_mean_is_students(count):
    values = np.random.default_rng(count).normal(50, 10, count)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose(intervals.interval([values], intervals.mean), expected, atol=0.02 * np.ptp(expected))


@pytest.mark.parametrize(("spreads", "close"), [((2, 20), 0.05), ((20, 2), 0.01)])
def test_the_interval_over_two_datasets_is_welchs(spreads, close):
    """Of x and -y twice the mean is the difference of the means. y differs from x in size and spread. The bootstrap is
    corrected for the fewest runs, which is too much where those of the others spread more.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(50, spreads[0], 5), rng.normal(40, spreads[1], 9)
    expected = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
    found = 2 * np.array(intervals.interval([x, -y], intervals.mean))
    np.testing.assert_allclose(found, expected, atol=close * np.ptp(expected))


def test_datasets_are_drawn_each_by_itself():
    """Two datasets far from each other: drawn together, the mean of the two would swing by tens."""
    low, high = intervals.interval([np.arange(5.0), 100 + np.arange(5.0)], intervals.mean)
    assert 50 < low < 52 < high < 54


def test_of_equal_runs_the_interval_is_a_point():
    assert intervals.interval([np.full(5, 3.0)], intervals.mean) == (3, 3)


def test_many_samples_have_the_intervals_that_each_has_alone():
    rows = np.random.default_rng(0).normal(size=(4, 6))
    together = np.transpose(intervals.interval([rows], intervals.mean))
    np.testing.assert_allclose(together, [intervals.interval([row], intervals.mean) for row in rows])


def hanley_and_mcneil(share, m, n):
    """The variance of Mann and Whitney's U by mn, for exponential populations (1982)."""
    q1, q2 = share / (2 - share), 2 * share**2 / (1 + share)
    return (share * (1 - share) + (m - 1) * (q1 - share**2) + (n - 1) * (q2 - share**2)) / (m * n)


@pytest.mark.parametrize("wins", range(10))
def test_improvement_has_newcombes_interval(wins):
    """Its ends, but 0 and 1, are t standard errors from the estimate, by the variance at the ends."""
    y = np.array([1.0, 2.0, 3.0])
    x = next(
        np.array(x) for x in itertools.product([0.5, 1.5, 2.5, 3.5], repeat=3) if sum(x) == wins + 1.5
    )  # of y below
    assert intervals.improvement([x], [y]) == pytest.approx(wins / 9)
    low, high = intervals.improvement_interval([x], [y])
    assert 0 <= low <= wins / 9 <= high <= 1
    for end in (low, high):
        if 1e-6 < end < 1 - 1e-6:
            assert abs(wins / 9 - end) == pytest.approx(2.776 * np.sqrt(hanley_and_mcneil(end, 3, 3)), rel=1e-3)
    assert (low > 0) == (wins > 0) and (high < 1) == (wins < 9)


def test_a_few_runs_never_show_that_one_algorithm_beats_another():
    """As in Mann and Whitney's exact test: three that beat three have p = 0.1. Five that beat five do show it."""
    for count, shown in ((1, False), (2, False), (3, False), (5, True)):
        low, high = intervals.improvement_interval([10 + np.arange(count)], [np.arange(count)])
        assert high == 1 and (low > 0.5) == shown
        assert shown == (stats.mannwhitneyu(10 + np.arange(count), np.arange(count), method="exact").pvalue < 0.05)


def test_more_datasets_make_the_interval_of_improvement_shorter():
    x, y = np.array([1.0, 3.0, 5.0]), np.array([0.0, 2.0, 4.0])
    lengths = [np.ptp(intervals.improvement_interval([x] * count, [y] * count)) for count in (4, 16)]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.1)


@pytest.mark.parametrize("above", range(7))
def test_a_profile_has_wilsons_band(above):
    """Of six runs in two datasets, at the level whose normal quantile is Student's of 4 degrees of freedom."""
    samples = [np.repeat([0.0, 1.0], [6 - above, above])[half] for half in (slice(0, 3), slice(3, 6))]
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, 4)) - 1
    expected = stats.binomtest(above, 6).proportion_ci(level, method="wilson")
    found = intervals.profile_interval(samples, np.array([0.5]))
    np.testing.assert_allclose(np.ravel(found), expected, atol=1e-6)


def test_a_profile_of_few_runs_beside_many_is_no_surer_than_the_few_let_it():
    """Of two runs and six: the variance of the mean of the shares is that of six runs in one, (1 / 2 + 1 / 6) / 4."""
    samples = [np.array([0.0, 1.0]), np.repeat([0.0, 1.0], 3)]
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, 1 + 5)) - 1
    expected = stats.binomtest(3, 6).proportion_ci(level, method="wilson")
    np.testing.assert_allclose(np.ravel(intervals.profile_interval(samples, np.array([0.5]))), expected, atol=1e-6)


@pytest.mark.parametrize(("count", "percentile"), [(5, (0.80, 0.88)), (10, (0.86, 0.94))])
def test_of_normal_runs_95_percent_are_95_percent(count, percentile):
    """Where the percentile bootstrap is short of it."""
    samples = [np.random.default_rng(1).normal(7, 3, (1500, count))]
    low, high = intervals.interval(samples, intervals.mean)
    assert 0.93 < np.mean((low < 7) & (high > 7)) < 0.97
    low, high = stats.bootstrap(
        samples, intervals.mean, method="percentile", n_resamples=999, axis=-1, rng=0
    ).confidence_interval
    assert percentile[0] < np.mean((low < 7) & (high > 7)) < percentile[1]


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_intervals_of_improvement_hold_95_percent_even_of_three_seeds(shift):
    rng = np.random.default_rng(2)
    truth = stats.norm.cdf(shift / np.sqrt(2))
    for count in (3, 5):
        low, high = intervals.improvement_interval(
            [rng.normal(shift, 1, (2000, count))], [rng.normal(0, 1, (2000, count))]
        )
        assert np.mean((low <= truth) & (truth <= high)) > 0.94
