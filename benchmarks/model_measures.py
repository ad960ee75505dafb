"""The calculations of model_report.py, on plain tensors: what they measure, and where it fails, is written there."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Ends = Callable[[Tensor, Tensor], Tensor]  # of states [n, observation_dim] and logits [n]: which end the episode, [n]
SHARES = 0.9, 0.5  # of the truth, in the intervals
PIECE = 100  # starts at a time, whose samples fit a cache


class Model(NamedTuple):
    """The learned dynamics of a run."""

    everyone: Any  # all members
    elites: Any  # those that make the rollouts
    num_elites: int
    ends: Ends
    ending: str  # what `ends` is: the name of a rule, "learned" or "never"
    left_out: Tensor | None  # rows of the data that it was tested on; None: not known


class Starts(NamedTuple):
    """Rows of the data, and what is known of the steps after them."""

    rows: Tensor  # [n]
    left: Tensor  # [n], steps of the episode from here on
    terminated: Tensor  # [n], whether it terminates after them


class Forecast(NamedTuple):
    """What the samples say of one step: of the state and, in the last column, of the reward."""

    mean: Tensor  # [n, observation_dim + 1]
    intervals: dict[float, tuple[Tensor, Tensor]]  # low and high, both as the mean, by the share that should be inside
    ended: Tensor  # [n], share of the samples whose episode is over


# --- Rows of the data -----------------------------------------------------------------------------------------------


def rows_left_out(everyone: Any, data: Any, seed: int) -> Tensor | None:
    """The rows that fit_dynamics of mopo.py and its like holds out with this seed. None if the members' errors there
    are not those that the model has saved: then it was trained in another way.
    """
    count = len(data.rewards)
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: min(math.ceil(count / 5), 1000)]
    z = torch.cat([data.next_observations - data.observations, data.rewards[:, None]], dim=1)[rows]
    mean, _, _ = everyone.predict(data.observations[rows], data.actions[rows])
    unknown = (data.terminations[rows] == 1) & (z[:, :-1] == 0).all(dim=1)  # s' of these, as in training
    z[:, :-1].masked_fill_(unknown[:, None], math.nan)
    errors = ((mean - z) / everyone.z_scale[1]).square().nanmean(dim=(1, 2))
    same = torch.isclose(errors, everyone.holdout_error, rtol=0.01)
    return rows if bool(same.all()) else None


def find_starts(data: Any, lengths: Tensor, rows: Tensor, longest: int) -> Starts:
    """Those of the rows whose episode lasts for the `longest` steps, or terminates before."""
    last = data.terminations > 0
    last[lengths.cumsum(0)[lengths > 0] - 1] = True
    numbers = torch.arange(len(last))
    final = torch.where(last, numbers, len(last)).flip(0).cummin(0).values.flip(0)  # [N], the last row of its episode
    left, terminated = final - numbers + 1, data.terminations[final] > 0
    rows = rows[(left[rows] >= longest) | terminated[rows]]
    return Starts(rows, left[rows], terminated[rows])


# --- Forecasts ------------------------------------------------------------------------------------------------------


def interval(samples: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Ends [...] of the interval in the middle of samples [m, ...] that is to hold this share of further ones.

    One falls below the j-th smallest of m with probability j / (m + 1). So the lower end is the sample number
    (m + 1) (1 - share) / 2, between two of them where that is no whole number.
    """
    ordered = samples.sort(dim=0).values
    place = max((len(samples) + 1) * (1 - share) / 2 - 1, 0.0)  # counted from 0
    below, part = int(place), place % 1
    low, high = (torch.lerp(some[below], some[below + 1], part) for some in (ordered, ordered.flip(0)))
    return low, high


@torch.no_grad()
def forecast(model: Model, states: Tensor, actions: Tensor, steps: set[int], num_samples: int) -> dict[int, Forecast]:
    """Of each of the steps, from states [n, observation_dim] under actions [n, max(steps), action_dim]."""
    members, count, each = model.num_elites, len(states), math.ceil(num_samples / model.num_elites)
    states = states.repeat(each, 1).expand(members, -1, -1)  # [members, each * n, observation_dim]
    over = torch.zeros(states.shape[:2], dtype=torch.bool)
    found = {}
    for k in range(1, max(steps) + 1):
        chosen = actions[:, k - 1].repeat(each, 1).expand(members, -1, -1)
        mean, std, logits = model.elites.predict(states, chosen)
        z = mean + std * torch.randn_like(mean)
        states = states + z[..., :-1]
        over |= model.ends(states.flatten(0, 1), logits.flatten()).view_as(over)
        if k in steps:
            samples = torch.cat([states, z[..., -1:]], dim=2).view(members * each, count, -1)
            intervals = {share: interval(samples, share) for share in SHARES}
            found[k] = Forecast(samples.mean(dim=0), intervals, over.view(-1, count).float().mean(dim=0))
    return found


def join(pieces: list[Forecast]) -> Forecast:
    means, intervals, ended = zip(*pieces, strict=True)
    joined = {}
    for share in SHARES:
        low, high = map(torch.cat, zip(*(some[share] for some in intervals), strict=True))
        joined[share] = low, high
    return Forecast(torch.cat(means), joined, torch.cat(ended))


def forecast_from(model: Model, data: Any, starts: Starts, steps: set[int], num_samples: int) -> dict[int, Forecast]:
    """Of all starts, a piece at a time. After the last step of an episode its last action is repeated."""
    pieces = []
    for rows, left in zip(starts.rows.split(PIECE), starts.left.split(PIECE), strict=True):
        ahead = torch.minimum(torch.arange(max(steps)), left[:, None] - 1)  # [n, K]
        pieces.append(forecast(model, data.observations[rows], data.actions[rows[:, None] + ahead], steps, num_samples))
    return {k: join([piece[k] for piece in pieces]) for k in sorted(steps)}


# --- Errors ---------------------------------------------------------------------------------------------------------


def root_mean_square(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt())


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of [n] each: the correlation of their ranks. Without two different ones of each it is nan."""
    ranks = []
    for numbers in (x, y):  # equal ones share the mean of their ranks
        _, place, counts = numbers.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - counts / 2)[place])
    different = len(x) > 1 and bool(x.min() < x.max()) and bool(y.min() < y.max())
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1]) if different else math.nan
