"""What inspect_dataset.py says of actions: of vectors, whose entries have bounds, and of choices, which are counted."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from common.data import MASK, Dataset

AT_BOUND = 1e-3  # of the action's range: so close to its end counts as at it
RARE = 0.01  # of the steps: a choice taken less often is hardly known
MOST_LISTED = 100  # choices, in text and picture

Problems = Iterator[tuple[str, str]]  # what is the matter, what to do


def names(what: str, mask: np.ndarray, known: list[str]) -> str:
    """The dimensions in a mask, with their names where the data say them: "observation 3 (speed), 7"."""
    told = {number: f"{number} ({name})" for number, name in enumerate(known) if name != str(number)}
    return f"{what} {listed([told.get(number, number) for number in np.flatnonzero(mask).tolist()])}"


def listed(found: list[Any]) -> str:
    return f"{', '.join(map(str, found[:10]))}{', ...' if len(found) > 10 else ''}"


# --- Vectors --------------------------------------------------------------------------------------------------------


def share_beyond(actions: np.ndarray, dataset: Dataset, edge: float = -1e-6) -> np.ndarray:
    """Share of the actions beyond their bounds or, of their range, closer to them than `edge`: [action_dim]."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = dataset.action_low, dataset.action_high
        edge = np.nan_to_num(edge * (high - low), posinf=0, neginf=0)
        return ((actions < low + edge) | (actions > high - edge)).mean(axis=0)


def vector_ranges(actions: np.ndarray, dataset: Dataset) -> list[str]:
    """What stands behind the range of each entry: how much is beyond and at the bounds, and what these are."""
    shares = zip(share_beyond(actions, dataset), share_beyond(actions, dataset, AT_BOUND), strict=True)
    bounds = zip(dataset.action_low, dataset.action_high, strict=True)
    rows = zip(shares, bounds, strict=True)
    return [f"{beyond:>12.2%}{at:>12.2%}  {low:.5g} to {high:.5g}" for (beyond, at), (low, high) in rows]


def vector_problems(actions: np.ndarray, dataset: Dataset) -> Problems:
    low, high = actions.min(axis=0), actions.max(axis=0)
    beyond = share_beyond(actions, dataset)
    if beyond.any():
        todo = "training clips them, as environments do; if the bounds are wrong, correct the action_space"
        which = names("action", beyond > 0, dataset.action_names)
        yield f"{which}: up to {beyond.max():.2%} of the values are out of bounds", todo
    if (low == high).any():
        todo = "an actuator that never moves teaches nothing: leave it out, and hold it there when acting"
        yield f"{names('action', low == high, dataset.action_names)}: always the same value", todo
    with np.errstate(over="ignore", invalid="ignore"):
        extent = dataset.action_high - dataset.action_low
        narrow = (high - low < 0.1 * extent) & (low < high) & np.isfinite(extent)
    if narrow.any():
        todo = "check units and bounds: training scales actions by the bounds, and sees hardly any motion"
        yield f"{names('action', narrow, dataset.action_names)}: less than a tenth of the range is used", todo


def draw_vectors(axes: Any, figure: Any, actions: np.ndarray) -> None:
    """How often each value of each dimension is taken: a line for each, or a row of an image where they are many."""
    low, high = actions.min(axis=0), actions.max(axis=0)
    if len(low) <= 4:
        for index in range(len(low)):
            axes.hist(actions[:, index].astype(float), bins=50, histtype="step", density=True, label=f"action {index}")
        axes.set(title="actions", xlabel="value", ylabel="density")
        axes.legend()
        return
    from matplotlib.colors import PowerNorm

    width = np.where(high > low, high - low, 1)
    counts = [np.histogram(column, bins=50, range=(0, 1))[0] for column in ((actions - low) / width).T]
    shares, extent = np.array(counts) / len(actions), (0, 1, len(low) - 0.5, -0.5)
    image = axes.imshow(shares, aspect="auto", extent=extent, cmap="magma", norm=PowerNorm(0.5))
    axes.set(title="actions", xlabel="from the lowest value to the highest", ylabel="dimension")
    figure.colorbar(image, ax=axes, label="share of the steps")


# --- Choices --------------------------------------------------------------------------------------------------------

# They are numbered from 0 as here, from action_low as the dataset has them. There are C.


def count_choices(dataset: Dataset) -> int:
    return int(dataset.action_high[0] - dataset.action_low[0]) + 1 if dataset.discrete else 0


def count_legal(dataset: Dataset) -> int:
    """How many numbers at the start of an observation say which choices are legal, as training counts them: C or 0."""
    count = sum(name.startswith(f"{MASK}/") for name in dataset.observation_names)
    return count if count == count_choices(dataset) else 0


def label(dataset: Dataset, choice: int) -> str:
    """The number that the dataset has, and the name if it has one."""
    number, known = str(dataset.action_low[0] + choice), dataset.action_names
    name = known[choice] if len(known) == count_choices(dataset) else number
    return number if name == number else f"{number} {name}"


def choices_of(dataset: Dataset, mask: np.ndarray) -> str:
    """Those in a mask [C]: "action 0 left, 2 right"."""
    return f"action {listed([label(dataset, choice) for choice in np.flatnonzero(mask).tolist()])}"


def count_taken(actions: np.ndarray, dataset: Dataset) -> np.ndarray:
    """How often each choice was taken, [C]."""
    return np.bincount(actions, minlength=count_choices(dataset))


def legal_steps(observations: np.ndarray, dataset: Dataset) -> np.ndarray:
    """In how many steps each choice was legal, [C]: in all, where there is no mask."""
    if num_legal := count_legal(dataset):
        return (observations[:, :num_legal] > 0.5).sum(axis=0)
    return np.full(count_choices(dataset), len(observations))


def choice_lines(actions: np.ndarray, observations: np.ndarray, dataset: Dataset) -> Iterator[str]:
    """A line per choice, of the most frequent where they are many."""
    taken, legal = count_taken(actions, dataset), legal_steps(observations, dataset)
    shown = np.sort(np.argsort(-taken, kind="stable")[:MOST_LISTED]).tolist()
    labels = [label(dataset, choice) for choice in shown]
    width = max(16, *(len(name) + 2 for name in labels))
    with_mask = count_legal(dataset) > 0
    yield f"{'action':<{width}}{'steps':>12}{'share':>12}" + (f"{'legal':>12}{'taken then':>12}" if with_mask else "")
    for choice, name in zip(shown, labels, strict=True):
        line = f"{name:<{width}}{taken[choice]:>12,}{taken[choice] / len(actions):>12.2%}"
        if with_mask:
            line += f"{legal[choice] / len(actions):>12.2%}{taken[choice] / max(legal[choice], 1):>12.2%}"
        yield line
    if (rest := len(taken) - len(shown)) > 0:
        yield f"and {rest:,} others, taken in {1 - taken[shown].sum() / len(actions):.2%} of the steps"
    if with_mask:
        yield f"legal actions: {legal.sum() / len(actions):.2f} of {len(taken)} in a state on average"


def choice_problems(actions: np.ndarray, observations: np.ndarray, dataset: Dataset) -> Problems:
    taken, legal = count_taken(actions, dataset), legal_steps(observations, dataset)
    num_legal = count_legal(dataset)
    if num_legal and (forbidden := int((observations[np.arange(len(actions)), actions] != 1).sum())):
        todo = "repair the mask: 1 for each action that could be taken, also for the one that was"
        yield f"training refuses the dataset: {MASK} forbids the action that was taken in {forbidden:,} steps", todo
    if taken.max() == len(actions):
        yield f"{choices_of(dataset, taken > 0)}: always taken", "nothing can be learned of others: log them, too"
        return
    which = "legal, and " if num_legal else ""
    if ((taken == 0) & (legal > 0)).any():
        todo = "what it is worth is a guess: prefer discrete_bcq, discrete_cql or discrete_iql, or log it, too"
        yield f"{choices_of(dataset, (taken == 0) & (legal > 0))}: {which}never taken", todo
    if (legal == 0).any():
        yield f"{choices_of(dataset, legal == 0)}: never legal", "leave it out, unless its time is still to come"
    rare = (taken > 0) & (taken < RARE * legal)
    if rare.any():
        steps = f"{RARE:.0%} of the steps" + (" in which it is legal" if num_legal else "")
        todo = "what it is worth is known from few steps only: doubt policies that often take it"
        yield f"{choices_of(dataset, rare)}: taken in fewer than {steps}", todo


def draw_choices(axes: Any, actions: np.ndarray, observations: np.ndarray, dataset: Dataset) -> None:
    """A bar per choice, of the most frequent where they are many; behind it how often it is legal, if a mask says."""
    taken, legal = count_taken(actions, dataset), legal_steps(observations, dataset)
    shown = np.sort(np.argsort(-taken, kind="stable")[:MOST_LISTED])
    places = np.arange(len(shown))
    if count_legal(dataset):
        axes.barh(places, legal[shown] / len(actions), color="lightgray", label="legal")
    axes.barh(places, taken[shown] / len(actions), height=0.6, label="taken")
    axes.set(title="actions", xlabel="share of the steps", ylabel="action")
    labels = [label(dataset, choice) for choice in shown.tolist()]
    axes.set_yticks(places, labels, fontsize=9 if len(shown) < 25 else 4, parse_math=False)  # a name may hold a $
    axes.invert_yaxis()
    if count_legal(dataset):
        axes.legend()
