"""The steps of a log, whatever file they come from, and the episodes that Minari makes of them."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from minari.data_collector import EpisodeBuffer

from common.data import MASK


class Steps(NamedTuple):
    """The rows of a log, of which each is a step; an episode's rows follow each other."""

    observations: np.ndarray  # [rows, observation_dim], float64 or, if the file has no more digits, float32
    actions: np.ndarray  # [rows, action_dim], float32; of choices [rows], int64, counted from 0
    rewards: np.ndarray  # [rows]
    terminations: np.ndarray  # [rows], as are truncations; true where an episode ends so
    truncations: np.ndarray
    next_observations: np.ndarray | None  # [rows, observation_dim], likewise; not finite where an end's is not known
    ends: np.ndarray  # [episodes], where each episode's rows end
    legal: np.ndarray | None = None  # [rows, choices], bool
    log_probabilities: np.ndarray | None = None  # [rows], of the actions; of vectors, log densities


class Log(NamedTuple):
    """What a file holds."""

    steps: Steps
    observations: list[str]  # a name for each number of an observation
    actions: list[str]  # a name for each number of an action, or for each choice
    unused: list[str]  # what else the file holds
    unit_actions: bool = False  # they should be in [-1, 1], wherever the file's lowest and highest are
    discrete: bool = False  # actions are choices
    reference_returns: tuple[float, float] | None = None  # of score 0 and score 100, for what the file's name says


def describe_names(names: list[str]) -> str:
    """Names as they are; key/0, key/1, ... as key (2); plain numbers by their count."""
    if all(name.isdecimal() for name in names):
        return f"{len(names)} numbers, as the file has them"
    parts = (name.rpartition("/") for name in names)
    keys = [key if key and index.isdecimal() else f"{key}{slash}{index}" for key, slash, index in parts]
    return ", ".join(key if key in names else f"{key} ({count})" for key, count in Counter(keys).items())


def find_gaps(steps: Steps) -> np.ndarray:
    """Rows [gaps], within episodes, whose next observation is not the next row's observation: to four digits, and to
    a hundredth of the column's spread, as a pressure of 101,325 changes by little. A constant column tells none.
    """
    if steps.next_observations is None:
        return np.empty(0, int)
    following, next_rows = steps.next_observations[:-1], steps.observations[1:]
    unequal = (following != next_rows).any(axis=1)
    unequal[steps.ends[:-1] - 1] = False
    rows = np.flatnonzero(unequal)
    size, spread = np.abs(next_rows[rows]), steps.observations.std(axis=0, dtype=np.float64)
    fine = np.where(spread > 1e-6 * size, 1e-2 * spread + 2e-7 * size, np.inf)  # at least what float32 rounds
    reach = 1e-6 + np.minimum(1e-4 * size, fine)
    return rows[~(np.abs(following[rows] - next_rows[rows]) <= reach).all(axis=1)]


def cut_gaps(steps: Steps) -> Steps:
    """The steps with an episode's end, a truncation, at each gap: an episode's next observations are its own rows'."""
    gaps = find_gaps(steps)
    if len(gaps) == 0:
        return steps
    print(
        f"{len(gaps)} cuts inside episodes, each after a row whose next observation is not the next row's observation"
    )
    truncations = steps.truncations.copy()
    truncations[gaps] = True
    return steps._replace(truncations=truncations, ends=np.union1d(steps.ends, gaps + 1))


def split_episodes(steps: Steps) -> list[EpisodeBuffer]:
    """The episodes as Minari has them, with one observation more than steps; those of no transition are left out."""
    buffers, start = [], 0
    for end in steps.ends.tolist():
        observations, last, legal = steps.observations[start:end], end - 1, None
        if steps.next_observations is not None and np.isfinite(steps.next_observations[last]).all():
            observations = np.concatenate([observations, steps.next_observations[last:end]])
        elif steps.terminations[last]:
            observations = np.concatenate([observations, observations[-1:]])  # no value is asked of it
        else:
            end = last  # the last row's observation is all that is known of what the row before led to
        rows = slice(start, end)
        if end > start:
            truncations = steps.truncations[rows].copy()
            truncations[-1] |= not steps.terminations[end - 1]
            if steps.legal is not None:
                legal = steps.legal[np.minimum(np.arange(start, end + 1), last)]  # the last row's, once more at an end
            buffers.append(
                EpisodeBuffer(
                    observations=observations if legal is None else {MASK: legal, "observation": observations},
                    infos=None
                    if steps.log_probabilities is None
                    else {"log_prob": np.append(steps.log_probabilities[rows], np.nan)},
                    actions=steps.actions[rows],
                    rewards=steps.rewards[rows],
                    terminations=steps.terminations[rows],
                    truncations=truncations,
                )
            )
        start = last + 1
    return buffers
