"""What inspect_dataset.py says is wrong with a dataset, and what to do."""

from typing import NamedTuple

import numpy as np
from inspect_actions import Problems, choice_problems, count_legal, names, vector_problems

from common.data import Dataset

OUTLIER = 20  # times the width from the 1st to the 99th percentile, beyond either: no tail reaches so far
SMALLEST_STD = 1e-3  # what training's normalisation adds to the standard deviation


class Data(NamedTuple):
    """All steps of the episodes that can be used, and what is wrong with the others."""

    observations: np.ndarray  # [N, observation_dim], as the dataset has them; vectors and rewards in float32
    actions: np.ndarray  # [N, action_dim]; of discrete ones [N], int64, counted from 0
    rewards: np.ndarray  # [N]
    terminations: np.ndarray  # [N]
    truncations: np.ndarray  # [N]
    lengths: np.ndarray  # [E]
    returns: np.ndarray  # [E]
    log_probs: np.ndarray  # [N], of the actions; nan where they are not logged
    cuts: np.ndarray  # [C, observation_dim], the last next observations of the episodes that did not terminate
    refused: list[str]  # why, one line for each episode left out

    @property
    def ends(self) -> np.ndarray:
        """The last step of each episode, [E]."""
        return self.lengths.cumsum() - 1


def outliers(columns: np.ndarray, codes: bool = False) -> np.ndarray:
    """Which columns [N, dim] hold a value far beyond the rest's tails: [dim]. The rest is all or, of `codes`, which may
    be many of a column's values, also what is left without the one, two and three lowest and highest values.
    Percentiles of 100,000 rows at most.
    """
    found = []
    for column in columns.T:
        least, most, some = column.min(), column.max(), column[:: 1 + len(column) // 100_000]
        rests = [some]
        while codes and len(rests) < 4 and len(some := some[(some > some.min()) & (some < some.max())]) >= 100:
            rests.append(some)
            if len(np.unique(some)) < 20:  # a few levels have no tails
                break
        tails = [np.quantile(rest, [0.01, 0.99]) for rest in rests]
        found.append(any(0 < OUTLIER * (high - low) < max(low - least, most - high) for low, high in tails))
    return np.array(found)


def find_problems(data: Data, dataset: Dataset, duplicates: int) -> Problems:
    """What to know before training on the data; what stops training comes first."""
    yield from _refusals(data, dataset)
    yield from _endings(data)
    yield from _cuts(data, count_legal(dataset))
    if dataset.discrete:
        yield from choice_problems(data.actions, data.observations, dataset)
    else:
        yield from vector_problems(data.actions, dataset)
    yield from _values(data, dataset)
    if duplicates:
        todo = "expected where states and actions are few; else data was added twice: remove it"
        share = duplicates / len(data.rewards)
        yield f"{duplicates:,} of the transitions ({share:.1%}) are duplicates of others", todo


def _refusals(data: Data, dataset: Dataset) -> Problems:
    refuses = "training refuses the dataset"
    if data.refused:
        what = f"{len(data.refused):,} episodes cannot be used, the first being {data.refused[0]}"
        yield what, "repair these episodes or remove them (Minari: filter_episodes) before training"
    if len(data.rewards) > dataset.num_steps:
        what = f"{refuses}: {len(data.rewards):,} steps, of which its metadata says {dataset.num_steps:,}"
        yield what, "write it again with Minari's create_dataset_from_buffers"
    with np.errstate(over="ignore"):
        bounded = np.isfinite(dataset.action_high - dataset.action_low) & (dataset.action_low < dataset.action_high)
    if not dataset.discrete and not bounded.all():
        low, high = ([float(f"{bound:.4g}") for bound in find(data.actions, axis=0)] for find in (np.min, np.max))
        todo = f"write it again with an action_space of what the actuators can do; the data fill Box({low}, {high})"
        yield f"{refuses}: {names('action', ~bounded, dataset.action_names)} without finite bounds", todo


def _endings(data: Data) -> Problems:
    terminated, truncated = data.terminations[data.ends], data.truncations[data.ends]
    shortest, longest = int(data.lengths.min()), int(data.lengths.max())
    if inner := int(np.delete(data.terminations | data.truncations, data.ends).sum()):
        todo = "split the episodes there: nothing may be learned across an end"
        yield f"{inner:,} steps inside episodes are marked as an end", todo
    if neither := int((~terminated & ~truncated).sum()):
        todo = "mark terminations where the task ended them; training takes all of them as truncated"
        yield f"{neither:,} episodes end without being terminated or truncated", todo
    if terminated.all() and shortest == longest and len(data.lengths) > 1:
        todo = "if that is a time limit, mark truncations: Q would learn that nothing comes after it"
        yield f"every episode is terminated after exactly {longest:,} steps", todo
    late, before = (int((terminated & (data.lengths == length)).sum()) for length in (longest, longest - 1))
    if shortest < longest and late >= max(3, 0.05 * len(data.lengths)) and late > 2 * before:  # no tail that runs out
        todo = "if that is a time limit, mark truncations: Q would learn that nothing comes after it"
        yield (
            f"{late:,} of {len(data.lengths):,} episodes are terminated after exactly {longest:,} steps, the most",
            todo,
        )
    if truncated.any() and (terminated | ~truncated).all():
        todo = "if these are time limits, do not mark them as terminations: Q would learn that nothing comes after them"
        yield f"all {truncated.sum():,} truncated episodes are terminated, too", todo
    if not data.terminations.any() and shortest < longest:
        todo = "if the task ends episodes (a robot falls), mark terminations: Q would see past its end"
        yield f"no episode is terminated, yet their lengths differ ({shortest:,} to {longest:,})", todo
    single = int(((data.lengths == 1) & terminated).sum())
    if 0.01 * len(data.lengths) < single < len(data.lengths):
        todo = "if an end repeats (a reached goal stays), cut episodes at the first: these look like the best"
        yield f"{single:,} of {len(data.lengths):,} episodes are a single step that terminates", todo
    if len(data.lengths) == 1:
        yield "there is one episode only", "mark where episodes end, if the log holds several"


def _cuts(data: Data, num_legal: int) -> Problems:
    """What follows the last step of an episode that was cut: a value is learned of it, as of any other state."""
    seen, cuts = data.observations[:, num_legal:], data.cuts[:, num_legal:]
    varied = np.ptp(seen.astype(cuts.dtype), axis=0) > 0
    if len(cuts) < 2 or not varied.any():
        return
    far = outliers(np.concatenate([seen, cuts]), codes=True) & ~outliers(seen, codes=True)
    if far.any() or (cuts == cuts[0])[:, varied].all():
        todo = "a filler there is taken for a state: leave the last step of such episodes out, or say what came"
        yield f"after the last steps of the {len(cuts):,} cut episodes come observations unlike all others", todo
    cut = np.flatnonzero(~data.terminations[data.ends])
    followed = cut < len(data.lengths) - 1
    starts = data.observations[(data.ends - data.lengths + 1)[cut[followed] + 1]].astype(cuts.dtype)
    shifted = int((data.cuts[followed] == starts).all(axis=1).sum())
    if shifted > 1 and 2 * shifted > len(starts) and len(np.unique(starts, axis=0)) > 1:
        todo = "right where one log was cut into pieces; else they were shifted across the ends: leave them blank there"
        yield f"after {shifted:,} of {len(cuts):,} cuts comes the next episode's first observation", todo


def _values(data: Data, dataset: Dataset) -> Problems:
    measured = np.arange(data.observations.shape[1]) >= count_legal(dataset)  # no mask
    constant = measured & (data.observations.min(axis=0) == data.observations.max(axis=0))
    small = measured & ~constant & (data.observations.std(axis=0, dtype=np.float64) < SMALLEST_STD)
    if constant.any():
        todo = "training sees 0 there: leave it out, or keep in mind that other values were never learned"
        yield f"{names('observation', constant, dataset.observation_names)}: always the same value", todo
    if small.any():
        todo = f"normalisation divides by the standard deviation + {SMALLEST_STD}: give it in a smaller unit"
        yield f"{names('observation', small, dataset.observation_names)}: standard deviation below {SMALLEST_STD}", todo
    if (far := measured & outliers(data.observations, codes=True)).any():
        todo = "look for codes of missing values (-9999) and broken sensors: they spoil the normalisation"
        yield f"{names('observation', far, dataset.observation_names)}: values far beyond all others", todo
    if not dataset.discrete and dataset.env_id is None and (far := outliers(data.actions, codes=True)).any():
        todo = "look for codes of missing values: where no environment gives bounds, they set the scale of all actions"
        yield f"{names('action', far, dataset.action_names)}: values far beyond all others", todo
    if outliers(data.rewards[:, None]).any():
        yield "rewards: values far beyond all others", "check that they are meant: they decide what Q learns"
    span = np.ptp(data.returns)
    if span and not 30 < span < 30_000:  # as training warns
        todo = "--reward-scale return-range makes it 1,000, for which learning rates and weights of losses are made"
        yield f"from the worst to the best return it is {span:.3g}", todo
    if data.rewards.min() == data.rewards.max():
        todo = "only the lengths of episodes can tell good from bad; if they do not, imitate (bc.py)"
        yield f"every reward is {data.rewards[0]:.6g}", todo
