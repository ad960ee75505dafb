"""What is in a dataset, and what is wrong with it: a report in words and, with --out, a page of pictures.

Everything is in the data's own units and before any clipping or normalisation. Episodes of which nothing can be learned
are counted, and left out of the numbers. A duplicate is a transition whose observation, action and reward all equal
another's, bit for bit. Discrete actions are counted. Where an action_mask says which are legal, `legal` is the share of
the steps in which an action is, `taken then` of these the share that took it; the mask's own numbers are no
observations here. Of logged probabilities, infos["log_prob"], the report names the smallest. `discounted` is the return
of an episode, discounted by --gamma from its start on: where episodes differ much less in it than in `episode return`,
Q hardly tells good from bad at the start. The picture's states are projected on the two directions in which the
normalised observations vary most (principal components), and coloured by the discounted sum of the rewards that
followed in the same episode. Neither knows what would have come after its end.

Run: python -m benchmarks.inspect_dataset anchorl/pendulum/mixed-v0 --out data.png
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minari
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from inspect_actions import choice_lines, count_choices, count_legal, draw_choices, draw_vectors, vector_ranges
from inspect_problems import SMALLEST_STD, Data, find_problems
from scratch import replace

from common.command_line import BadInput, check, explain, launch
from common.data import MASK, Dataset, find_dataset, flatten_observations, load_dataset, observation_names
from common.data import Batch as Episode

PICTURED_STATES = 5_000


@dataclass
class Args:
    dataset_id: tyro.conf.Positional[str]
    """built-in id or Minari id (local first, else downloaded)"""
    out: Path | None = None
    """write the picture here, as PNG"""
    gamma: float = 0.99
    """discount of the returns from the start, and of those that colour the picture's states"""


# --- Reading --------------------------------------------------------------------------------------------------------


def open_dataset(dataset_id: str) -> Dataset:
    """As load_dataset does, but also where actions have no bounds: the report says what they could be."""
    try:
        return load_dataset(dataset_id, discrete=None)
    except BadInput as refusal:
        if "finite bounds" not in str(refusal):
            raise
        stored: Any = minari.MinariDataset(find_dataset(dataset_id))
        names, space = observation_names(stored.observation_space), stored.action_space
        if len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
            raise
    return Dataset(dataset_id, int(stored.total_steps), names, space.low, space.high, lambda: iter(()))


def read_episodes(dataset: Dataset) -> Iterator[tuple[Episode, np.ndarray, np.ndarray]]:
    """Each with its truncations and the log probabilities of its actions, [T]. Raises BadInput for a damaged file."""
    with explain(f"cannot read dataset {dataset.dataset_id}"):
        source = minari.MinariDataset(find_dataset(dataset.dataset_id))
        for stored in source.iterate_episodes():
            observations = flatten_observations(stored.observations, source.observation_space)
            fields = observations[:-1], stored.actions, stored.rewards, observations[1:], stored.terminations
            yield Episode(*fields), stored.truncations, log_probabilities(stored.infos, len(stored.rewards))


def log_probabilities(infos: Any, steps: int) -> np.ndarray:
    """Of an episode's actions [T], from infos["log_prob"] [T + 1]; nan where that is missing or something else."""
    stored = np.asarray((infos or {}).get("log_prob", np.nan))
    usable = stored.shape in ((steps,), (steps + 1,)) and np.issubdtype(stored.dtype, np.floating)
    return stored[:steps].astype(np.float64) if usable else np.full(steps, np.nan)


def refusal(episode: Episode, truncations: np.ndarray, dataset: Dataset) -> str | None:
    """Why nothing can be learned from this episode, or None; training refuses a dataset with such episodes."""
    steps, dim, actions = len(episode.rewards), len(dataset.observation_names), episode.actions
    action_shape = (steps,) if dataset.discrete else (steps, len(dataset.action_low))
    shapes = (steps, dim), action_shape, (steps,), (steps, dim), (steps,), (steps,)
    fields = episode._asdict() | {"truncations": truncations}
    for (name, values), shape in zip(fields.items(), shapes, strict=True):
        if np.shape(values) != shape:
            return f"{name} of shape {np.shape(values)} where its {steps} rewards ask for {shape}"
        finite = np.isfinite(values)
        if not finite.all():
            place = tuple(np.argwhere(~finite)[0])
            return f"{name} hold {values[place]} at step {place[0]}"
    if dataset.discrete and (wrong := (actions < 0) | (actions >= count_choices(dataset)) | (actions % 1 != 0)).any():
        low, step = dataset.action_low[0], int(np.argmax(wrong))
        rule = f"which is not a whole number from {low} to {dataset.action_high[0]}"
        return f"actions hold {low + actions[step]:g} at step {step}, {rule}"
    last = episode.next_observations[-1:, : count_legal(dataset)]  # what is legal after the last step
    if last.size and not episode.terminations[-1] and not (last == 1).any():
        return f"{MASK} forbids all after its last step, which ends nothing"
    return None if steps else "no steps"


def collect(dataset: Dataset) -> Data:
    """Raises BadInput if no episode is left to look at."""
    kept: list[tuple[np.ndarray, ...]] = []
    returns, refused = [], []
    for index, (episode, truncations, log_probs) in enumerate(read_episodes(dataset)):
        observations = np.asarray(episode.observations) * 1  # bool has no quantiles; training rounds them when near 0
        with explain(f"{dataset.dataset_id}, episode {index}"), np.errstate(over="ignore"):
            if dataset.discrete:
                episode = episode._replace(actions=np.asarray(episode.actions, np.float64) - dataset.action_low[0])
            # what is too large for training's float32 becomes infinite, and is refused
            episode = Episode(*(np.asarray(values, np.float32) for values in episode))
        if reason := refusal(episode, truncations, dataset):
            refused.append(f"episode {index}: {reason}")
            continue
        _, actions, rewards, following, terminations = episode
        returns.append(float(np.sum(rewards, dtype=np.float64)))
        actions = actions.astype(np.int64) if dataset.discrete else actions
        cut = following[-1:][terminations[-1:] == 0]
        kept.append((observations, actions, rewards, terminations > 0, np.asarray(truncations, bool), log_probs, cut))
    check(bool(kept), f"{dataset.dataset_id}: the dataset is empty" + "".join(f"; {line}" for line in refused[:1]))
    lengths = np.array([len(rewards) for _, _, rewards, *_ in kept])
    columns = (np.concatenate(column) for column in zip(*kept, strict=True))
    observations, actions, rewards, terminations, truncations, log_probs, cuts = columns
    ends = terminations, truncations
    return Data(observations, actions, rewards, *ends, lengths, np.array(returns), log_probs, cuts, refused)


# --- Measures -------------------------------------------------------------------------------------------------------


def count_duplicates(data: Data) -> int:
    """Transitions that could go without a loss: N less the number of different (observation, action, reward)."""
    rows = np.column_stack([data.observations, data.actions, data.rewards]) + np.float32(0)  # -0 and 0 are one number
    return len(rows) - len(np.unique(rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))))


def returns_to_go(data: Data, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma G_{t+1} inside each episode, 0 after its end: [N]."""
    ends, sums, following = set(data.ends.tolist()), np.empty(len(data.rewards)), 0.0
    rewards = data.rewards.tolist()
    for step in range(len(rewards) - 1, -1, -1):
        following = rewards[step] + (0.0 if step in ends else gamma * following)
        sums[step] = following
    return sums


def principal_components(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised states [n, dim] on their two widest directions, [n, 2], and the shares of the variance there, [2].

    With the singular value decomposition U S V^T of the centred states, the coordinates are U S.
    """
    left, singular, _ = np.linalg.svd(states - states.mean(axis=0), full_matrices=False)
    variance = singular**2 / max(float(np.sum(singular**2)), 1e-12)
    padding = max(0, 2 - len(singular))  # a single dimension has no second direction
    points = np.pad(left * singular, ((0, 0), (0, padding)))
    return points[:, :2], np.pad(variance, (0, padding))[:2]


# --- Report ---------------------------------------------------------------------------------------------------------


def spread(name: str, values: np.ndarray) -> str:
    numbers = values.mean(dtype=np.float64), values.std(dtype=np.float64), *np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return f"{name:<16}" + "".join(f"{number:>12.5g}" for number in numbers)


def ranges(data: Data, dataset: Dataset) -> Iterator[str]:
    """One line per dimension of observations, without a mask, and of actions that are vectors."""
    vectors = () if dataset.discrete else ("beyond", "at bound")
    header = "".join(f"{name:>12}" for name in ("lowest", "highest", "mean", "std", *vectors))
    yield f"{'dimension':<16}{header}" + ("  bounds" if vectors else "")
    yield from list(column_lines("observation", data.observations))[count_legal(dataset) :]
    if not dataset.discrete:
        for line, more in zip(column_lines("action", data.actions), vector_ranges(data.actions, dataset), strict=True):
            yield line + more


def column_lines(what: str, columns: np.ndarray) -> Iterator[str]:
    mean, std = columns.mean(axis=0, dtype=np.float64), columns.std(axis=0, dtype=np.float64)
    for index, row in enumerate(zip(columns.min(axis=0), columns.max(axis=0), mean, std, strict=True)):
        yield f"{what} {index}".ljust(16) + "".join(f"{number:>12.5g}" for number in row)


def propensities(data: Data, discrete: bool) -> str:
    """Of how many steps the probabilities of actions are logged, and the smallest."""
    logged = ~np.isnan(data.log_probs)
    smallest = float(np.min(data.log_probs[logged]))
    how_many = "each step" if logged.all() else f"{logged.sum():,} of the steps"
    value = f"{math.exp(smallest):.3g}" if discrete else f"{smallest:.5g} (log density)"
    return f"propensities: logged for {how_many}, the smallest {value}"


def report(data: Data, dataset: Dataset, gamma: float) -> Iterator[str]:
    """The lines of the text."""
    duplicates = count_duplicates(data)
    terminated, truncated = int(data.terminations.sum()), int(data.truncations.sum())
    what = f"{count_choices(dataset):,} actions" if dataset.discrete else f"actions of size {data.actions.shape[1]}"
    sizes = f"observations of size {data.observations.shape[1]}, {what}"
    yield f"{dataset.dataset_id}: {len(data.rewards):,} transitions in {len(data.lengths):,} episodes, {sizes}"
    yield f"environment: {dataset.env_id or 'none: training skips evaluation'}"
    scores = dataset.reference_returns
    yield f"returns of scores 0 and 100: {f'{scores[0]:.5g} and {scores[1]:.5g}' if scores else 'unknown'}"
    yield f"terminations: {terminated:,}; truncations: {truncated:,}; duplicate transitions: {duplicates:,}"
    if not np.isnan(data.log_probs).all():
        yield propensities(data, dataset.discrete)
    yield ""
    yield " " * 16 + "".join(f"{name:>12}" for name in ("mean", "std", "lowest", "25%", "median", "75%", "highest"))
    yield spread("episode length", data.lengths)
    yield spread("episode return", data.returns)
    yield spread(f"discounted {gamma:g}", returns_to_go(data, gamma)[data.ends - data.lengths + 1])
    yield spread("reward", data.rewards)
    yield ""
    yield from ranges(data, dataset)
    if dataset.discrete:
        yield ""
        yield from choice_lines(data.actions, data.observations, dataset)
    yield ""
    problems = list(find_problems(data, dataset, duplicates))
    yield f"problems found: {len(problems) or 'none'}"
    for number, (what, todo) in enumerate(problems, start=1):
        yield f"{number}. {what}"
        yield f"   -> {todo}"


def draw(data: Data, dataset: Dataset, gamma: float, path: Path) -> None:
    """The page of pictures, complete or not at all."""
    from matplotlib.figure import Figure  # slow to import, and not always needed

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{dataset.dataset_id}: {len(data.rewards):,} transitions, {len(data.lengths):,} episodes")
    (returns, lengths), (actions, states) = figure.subplots(2, 2)
    returns.hist(data.returns, bins=40)
    returns.axvline(data.returns.mean(), color="black", linestyle="--", linewidth=1, label="mean")
    returns.set(title="returns", xlabel="return of an episode, not discounted", ylabel="episodes")
    returns.legend()
    lengths.hist(data.lengths, bins=40, range=(0, 1.05 * data.lengths.max()))
    lengths.set(title="lengths", xlabel="steps of an episode", ylabel="episodes")
    if dataset.discrete:
        draw_choices(actions, data.actions, data.observations, dataset)
    else:
        draw_vectors(actions, figure, data.actions)

    rows = np.random.default_rng(0).permutation(len(data.rewards))[:PICTURED_STATES]
    std = data.observations.std(axis=0, dtype=np.float64) + SMALLEST_STD
    points, shares = principal_components(data.observations[rows] / std)
    colours = returns_to_go(data, gamma)[rows]
    dots = states.scatter(*points.T, c=colours, s=4, cmap="viridis", linewidths=0, rasterized=True)
    states.set(title=f"{len(rows):,} states", xlabel=f"first principal component, {shares[0]:.0%} of the variance")
    states.set(ylabel=f"second, {shares[1]:.0%}")
    figure.colorbar(dots, ax=states, label=f"return-to-go, discount {gamma:g}")
    replace(path, lambda file: figure.savefig(file, dpi=130, format="png"))


def main(args: Args) -> None:
    check(0 <= args.gamma <= 1, f"--gamma {args.gamma}: must be in [0, 1]")
    if args.out is not None:
        check(args.out.suffix.lower() == ".png", f"--out {args.out}: must end with .png")
        check(args.out.parent.is_dir(), f"--out {args.out}: there is no folder {args.out.parent}")
    dataset = open_dataset(args.dataset_id)
    data = collect(dataset)
    for line in report(data, dataset, args.gamma):
        print(line, flush=True)
    if args.out is not None:
        draw(data, dataset, args.gamma, args.out)
        print(f"\npicture: {args.out}", flush=True)


if __name__ == "__main__":
    launch(main, Args)
