"""Converts logs to a local Minari dataset that every script trains on: tables, and HDF5 files as D4RL and robomimic
lay them out. What a file holds says which it is, and nothing in it is ever run.

A table, .csv or .parquet, has one row per step; the rows of an episode follow each other, in order, or --order names
the column of numbers, dates or times that sorts them: then they may lie anywhere in the file, and repeats, gaps and
steps back are counted. A row holds what was observed, the action taken on it, the reward that came of it, and whether
it ended the episode: `terminated` if the task did, `truncated` if a time limit did; an episode with neither is taken as
cut where its rows end. The columns of a vector share a prefix: those that are numbered (obs_0, obs_1, ...) go by
number, others stay in the table's order. Rows are counted from 1, without the header. What separates a CSV file's
columns, decimal commas, UTF-16 and gzip are found, and said.

D4RL's layout, .hdf5 or .h5, has arrays of N rows, episode after episode: observations [N, dim], actions [N, dim],
rewards [N], terminals [N], often timeouts [N] and next_observations [N, dim]. robomimic's has a group data/demo_0,
data/demo_1, ... for each episode of T rows: obs/<key> [T, dim], actions [T, dim], rewards [T], dones [T], often
next_obs/<key> [T, dim]. Its keys are put side by side, sorted or as --observation-keys has them, and a demo ends with
its first done. Rows are counted from 0. A file of D4RL's layout that has neither timeouts nor next_observations is
refused, unless --timeouts names an array that marks cuts, or says with '' that there are none.

What a step led to is the observation of the row after it. An episode's last row has none after it:

- If it is terminated, nothing is missing: no value is asked of what follows an end. The dataset repeats the row's own
  observation there, and models of the environment do not learn from it.
- If it is not, values would be asked of an observation that nobody knows. The row is then no transition: its
  observation says what the row before it led to, its action and reward are dropped. (An episode may so end in a row
  for its last observation, with anything or nothing for action and reward.)
- Columns next_obs_0, next_obs_1, ..., or the arrays above, say what each step led to; with them every row is a
  transition, but for a last one of a table's where they are blank. Where the next row does not go on from there, a
  table is refused, and an HDF5 file's episode is cut.

The environment in --env-id is the one that scripts evaluate in. It gives the bounds of actions; else a table's are the
data's own, and an HDF5 file's -1 and 1. Scores are 0 and 100 at the returns of --reference-returns, or else at D4RL's,
of its tasks: Hopper-v5 as an environment, hopper_medium-v2.hdf5 as a file.

Actions are amounts, or choices: --discrete-action names the column of what was chosen, whole numbers or words. Where
not everything may be chosen at any time, columns of 1 and 0 say what was legal, or one column lists it: policies then
never take anything else. --propensity names the column of the probability with which the action was taken, which
importance sampling needs.

Amounts become float32, as training has them; observations keep their digits. Time grows with the rows and, since Minari
stores each episode by itself, by some milliseconds for every episode.

Run: python -m benchmarks.import_logs logs.parquet --dataset-id my/logs-v0
     python -m benchmarks.import_logs hopper_medium-v2.hdf5 --dataset-id d4rl/hopper-medium-v2 --env-id Hopper-v5
"""

import math
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import tyro
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import validate_namespace
from minari.storage.datasets_root_dir import get_dataset_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from log_choices import is_whole
from log_hdf5 import Hdf5Options, read_hdf5_log
from log_steps import Log, describe_names, split_episodes
from log_tables import TableOptions, read_table_log
from reference_returns import find_reference_returns
from scratch import scratch_root

from common.command_line import BadInput, check, explain, launch, warn
from common.data import MASK, action_bounds, observation_names
from common.evaluation import make_environment


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """the logs: .csv or .tsv with a header, also with .gz; .parquet, .hdf5 or .h5"""
    dataset_id: str
    """Minari id of the dataset to write, such as my/logs-v0"""
    env_id: str | None = None
    """environment to evaluate in, of those installed; module:Id imports yours first; default: none"""
    reference_returns: tuple[float, float] | None = None
    """the returns of score 0 and of score 100; default: D4RL's, of its tasks"""
    action_low: tuple[float, ...] | None = None
    """lowest actions, one per number or one for all; default: the environment's, else the data's or -1"""
    action_high: tuple[float, ...] | None = None
    """highest actions, one per number or one for all; default: the environment's, else the data's or 1"""
    table: Annotated[TableOptions, tyro.conf.arg(name="")] = field(default_factory=TableOptions)
    hdf5: Annotated[Hdf5Options, tyro.conf.arg(name="")] = field(default_factory=Hdf5Options)


class Environment(NamedTuple):
    """Where policies are evaluated, as the dataset says it, and what bounds their actions there."""

    spec: EnvSpec
    bounds: tuple[np.ndarray, np.ndarray] | None  # lowest and highest, [action_dim] each; of what cannot be made, None


# --- Reading --------------------------------------------------------------------------------------------------------


def read_log(args: Args) -> Log:
    """The checked steps. Raises BadInput at the first thing that is wrong with the file, or with the options for it."""
    path = args.file
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    known = suffix in (".csv", ".tsv") or (path.suffix.lower() == suffix and suffix in (".parquet", ".hdf5", ".h5"))
    check(known, f"{path}: unknown suffix {path.suffix!r}: give .csv, .tsv, .csv.gz, .parquet, .hdf5 or .h5")
    found = "no regular file" if path.exists() else "no file"
    check(path.is_file(), f"{found} {path}: give the path of a .csv, .parquet, .hdf5 or .h5 file")
    if suffix in (".hdf5", ".h5"):
        check_no_options(args.table, f"for tables, which {path} is not")
        return read_hdf5_log(path, args.hdf5)
    check_no_options(args.hdf5, f"for HDF5 files, which {path} is not")
    return read_table_log(path, args.table)


def check_no_options(options: TableOptions | Hdf5Options, what: str) -> None:
    """Raises BadInput if one of them is given."""
    given = [name for name, value in vars(options).items() if value != getattr(type(options)(), name)]
    check(not given, f"{', '.join('--' + name.replace('_', '-') for name in given)}: {what}")


def find_environment(env_id: str, log: Log) -> Environment:
    """Raises BadInput if the environment is not installed, or not one for the log's observations and actions."""
    try:
        with warnings.catch_warnings(action="ignore"):
            environment = make_environment(env_id, users=True)
    except BadInput as reason:
        advice = "check the name, or leave it out and give it to the script that trains"
        check(env_id in gym.registry, f"--env-id {env_id}: {advice}: {reason}")
        print(f"no bounds of actions are known of it: {reason}")
        return Environment(find_spec(env_id), bounds=None)
    with explain(f"--env-id {env_id}"), environment:
        bounds = action_bounds(environment.action_space, log.discrete)
        found = len(observation_names(environment.observation_space)), len(bounds[0])
    masks = 0 if log.steps.legal is None else int(bounds[1][0] - bounds[0][0]) + 1
    expected = log.steps.observations.shape[1] + masks, 1 if log.discrete else len(log.actions)
    for what, size, own in zip(("observations", "actions"), found, expected, strict=True):
        check(
            size == own, f"--env-id {env_id} has {what} of size {size}, the file of size {own}: name another, or none"
        )
    return Environment(find_spec(env_id), bounds)


def name_of(env_id: str) -> str:
    """Without the module in front of it, which a dataset is not to name."""
    return env_id.rpartition(":")[2]


def find_spec(env_id: str) -> EnvSpec:
    """What Gymnasium has under the id; without its code where that is a function, which a dataset cannot name."""
    spec = gym.spec(name_of(env_id))
    return EnvSpec(spec.id, max_episode_steps=spec.max_episode_steps) if callable(spec.entry_point) else spec


def find_returns(args: Args, log: Log) -> tuple[float, float] | None:
    """The returns of score 0 and of score 100, as asked for, else D4RL's. Raises BadInput unless they are two."""
    if args.reference_returns is not None:
        low, high = args.reference_returns
        check(math.isfinite(high - low) and low < high, f"--reference-returns {low} {high}: give two, the lower first")
        return low, high
    return log.reference_returns if args.env_id is None else find_reference_returns(name_of(args.env_id))


# --- Writing --------------------------------------------------------------------------------------------------------


def check_id(dataset_id: str) -> None:
    """Raises BadInput unless `dataset_id` is a new Minari id."""
    try:
        namespace, _, _ = parse_dataset_id(dataset_id)
        if namespace is not None:
            validate_namespace(namespace)
    except (ValueError, TypeError):  # the latter for an id without version
        reason = explain_id(dataset_id)
        raise BadInput(f"--dataset-id {dataset_id}: no Minari id: {reason}: give one such as my/logs-v0") from None
    reserved = dataset_id.startswith("anchorl/")
    check(not reserved, f"--dataset-id {dataset_id}: anchorl/ is for built-in datasets: give another namespace")
    with explain("no datasets folder: point MINARI_DATASETS_PATH to one that can be written"):
        exists = get_dataset_path(dataset_id).exists()
    check(not exists, f"--dataset-id {dataset_id}: exists: take another id, such as the next version")


def explain_id(dataset_id: str) -> str:
    """Which of Minari's rules an id breaks: [namespace/]name-v<number>, a namespace of two characters or more."""
    strange = sorted(set(re.findall(r"[^-\w/]", dataset_id)))
    if strange:
        return (
            f"it has {', '.join(map(repr, strange))}, and may have letters, digits, _ and -, with / between namespaces"
        )
    if not re.search(r"-v\d+$", dataset_id):
        return "it has no version at its end"
    if len(dataset_id.rpartition("/")[0]) == 1:
        return "its namespace has one character, and needs two or more"
    return "it needs a name, and a namespace that neither begins nor ends with /"


def number_choices(log: Log, environment: Environment | None) -> tuple[Log, gym.spaces.Discrete]:
    """The choices are numbered from 0 or as the environment has them. Raises BadInput for those that it lacks."""
    if environment is None or environment.bounds is None:
        return log, gym.spaces.Discrete(len(log.actions))
    first, last = (int(bound[0]) for bound in environment.bounds)
    strange = [name for name in log.actions if not is_whole(name) or not first <= int(name) <= last]
    which = f"has actions {first} to {last}, the file {', '.join(strange)}"
    check(not strange, f"--env-id {environment.spec.id} {which}: give the environment's numbers, or no environment")
    numbers, legal = np.array([int(name) for name in log.actions]), log.steps.legal
    if legal is not None:
        legal = np.zeros((len(legal), last - first + 1), bool)
        legal[:, numbers - first] = log.steps.legal
    steps = log.steps._replace(actions=numbers[log.steps.actions], legal=legal)
    names = [str(number) for number in range(first, last + 1)]
    return log._replace(steps=steps, actions=names), gym.spaces.Discrete(len(names), start=first)


def action_space(args: Args, log: Log, environment: Environment | None, actions: np.ndarray) -> gym.spaces.Box:
    """Bounds [action_dim] as asked for, else as find_bounds has them, of actions [rows, action_dim]. Raises BadInput
    unless each low is below its high.
    """
    names = log.actions
    low, high = find_bounds(args, log, environment, actions)
    low = low if args.action_low is None else given_bounds("--action-low", args.action_low, names)
    high = high if args.action_high is None else given_bounds("--action-high", args.action_high, names)
    for name, lowest, highest in zip(names, low, high, strict=True):
        with np.errstate(over="ignore"):
            extent = highest - lowest
        problem = f"{name}: the bounds {lowest:g} and {highest:g} do not make a finite interval"
        check(bool(0 < extent < np.inf), f"{problem}: give --action-low and --action-high")
    warn_of_whole_numbers(names, actions)
    print("actions:", ", ".join(f"{name} from {a:.9g} to {b:.9g}" for name, a, b in zip(names, low, high, strict=True)))
    beyond = int(((actions < low) | (actions > high)).any(axis=1).sum())
    if beyond:
        print(f"{beyond} rows have actions beyond the bounds: the dataset keeps them, training clips them")
    return gym.spaces.Box(low, high, dtype=np.float32)


def find_bounds(
    args: Args, log: Log, environment: Environment | None, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The environment's [action_dim]; else -1 and 1 of a layout that has actions there, else the data's own.

    Raises BadInput if actions are beyond -1 and 1 where nothing else bounds them.
    """
    if environment is not None and environment.bounds is not None:
        return environment.bounds
    low, high = actions.min(axis=0), actions.max(axis=0)
    if log.unit_actions:
        beyond = (args.action_low is None and low.min() < -1.001) or (args.action_high is None and high.max() > 1.001)
        advice = "name an environment that bounds them with --env-id, or give --action-low and --action-high"
        check(not beyond, f"{args.file}: actions reach beyond [-1, 1], from {low.min():g} to {high.max():g}: {advice}")
        return -np.ones_like(low), np.ones_like(high)
    constant = low == high
    if args.action_low is None and args.action_high is None and constant.any():
        values = ", ".join(f"{log.actions[index]} is {low[index]:g}" for index in np.flatnonzero(constant))
        # an actuator that never moved still needs an interval around its value; a narrow one keeps policies near it
        margin = np.where(constant, np.maximum(np.abs(low), 1) * np.float32(1e-3), 0).astype(np.float32)
        low, high = low - margin, high + margin
        told = "its bounds are just around it, so that policies stay there (--action-low and --action-high set others)"
        warn(f"{values} in all rows, so that nothing is learned of it: {told}")
    return low, high


def warn_of_whole_numbers(names: list[str], actions: np.ndarray) -> None:
    """Says how whole numbers are read, in columns of few: they may be names of choices."""
    found = []
    for name, column in zip(names, actions.T, strict=True):
        values = np.unique(column)
        if 2 <= len(values) <= 20 and np.array_equal(values, values.round()):
            found.append(f"{name} ({', '.join(f'{value:g}' for value in values[:5])}{', ...' * (len(values) > 5)})")
    if found:
        reading = "they are read as amounts, and policies choose any number between"
        choices = "if one names choices, give --discrete-action with its name"
        warn(f"whole numbers alone in {', '.join(found)}: {reading}; {choices}")


def given_bounds(option: str, values: tuple[float, ...], names: list[str]) -> np.ndarray:
    """[len(names)]. Raises BadInput unless there is one number for all, or one for each."""
    fits = f"{option} has {len(values)} numbers: give one for all, or one for each of {', '.join(names)}"
    check(len(values) in (1, len(names)), fits)
    with np.errstate(over="ignore"):
        return np.broadcast_to(np.array(values, np.float32), len(names))


def write_dataset(
    args: Args,
    log: Log,
    buffers: list[EpisodeBuffer],
    actions: gym.spaces.Space,
    environment: Environment | None,
    returns: tuple[float, float] | None,
) -> None:
    """Writes the dataset, all of it or nothing. Raises CannotWrite."""
    observations, legal = log.steps.observations, log.steps.legal
    space: gym.Space = gym.spaces.Box(-np.inf, np.inf, observations.shape[1:], observations.dtype.type)
    if legal is not None:
        space = gym.spaces.Dict({MASK: gym.spaces.MultiBinary(len(log.actions)), "observation": space})
    masks = [] if legal is None else [f"{MASK}/{name}" for name in log.actions]
    names = f"observations {describe_names(log.observations)}; actions {', '.join(log.actions)}"
    with scratch_root(args.dataset_id, buffers):
        dataset = minari.create_dataset_from_buffers(
            args.dataset_id,
            buffers,
            eval_env=environment and environment.spec,
            observation_space=space,
            action_space=actions,
            description=f"imported from {args.file.name}: {names}",
        )
        dataset.storage.update_metadata({"observation_names": masks + log.observations, "action_names": log.actions})
        if returns is not None:  # which Minari would take with an environment alone
            low, high = returns
            dataset.storage.update_metadata({"ref_min_score": low, "ref_max_score": high})


def warn_of_lost_rewards(rewards: np.ndarray, kept: np.ndarray) -> None:
    """Warns where the rows that were dropped hold much of all reward, as where it comes at the end alone."""
    every, rest = np.nansum(np.abs(rewards)), np.abs(kept).sum()
    lost, dropped = every - rest, len(rewards) - len(kept)
    if lost > 0.1 * every and lost / dropped > 3 * rest / len(kept):
        todo = "mark the episodes that ended as terminated, or give the next observations or a row more, without reward"
        warn(f"the dropped rows hold {lost / every:.0%} of all reward, signs aside; if it is one: {todo}")


def warn_of_merged_rewards(rewards: np.ndarray) -> None:
    """Warns where float32 tells them apart by hundredths of their spread at best, as balances in place of gains."""
    spread, largest = np.std(rewards), np.abs(rewards).max()
    if 1e-9 * largest < spread < 1e-5 * largest:
        warn(f"rewards near {largest:.3g} differ by {spread:.3g}, which float32 hardly holds: subtract something")


def main(args: Args) -> None:
    check_id(args.dataset_id)
    log = read_log(args)
    environment = None if args.env_id is None else find_environment(args.env_id, log)
    space: gym.Space | None = None
    if log.discrete:
        amounts = args.action_low is None and args.action_high is None
        check(amounts, "--action-low and --action-high: are for amounts, not for --discrete-action")
        log, space = number_choices(log, environment)
    steps = log.steps
    returns = find_returns(args, log)
    if log.unused:
        print("not used:", ", ".join(log.unused))
    print("observations:", describe_names(log.observations))
    ended = steps.terminations | steps.truncations
    unmarked = int((~ended[steps.ends - 1]).sum())
    if unmarked:
        print(f"{unmarked} episodes end neither terminated nor truncated: taken as truncated")
    buffers = split_episodes(steps)
    num_steps = sum(map(len, buffers))
    check(num_steps > 0, f"{args.file}: no transition is left: every episode is one row, with no next observation")
    dropped = len(steps.rewards) - num_steps
    if dropped:
        print(f"dropped {dropped} rows: the last ones of episodes that did not terminate, with no next observation")
        warn_of_lost_rewards(steps.rewards, np.concatenate([buffer.rewards for buffer in buffers]))
    if len(buffers) < len(steps.ends):
        print(f"dropped {len(steps.ends) - len(buffers)} episodes with them: they had no other row")
    if space is None:
        space = action_space(args, log, environment, np.concatenate([buffer.actions for buffer in buffers]))
    else:
        print("actions:", ", ".join(log.actions))
    if returns is not None:
        print(f"scores: 0 for a return of {returns[0]:g}, 100 for {returns[1]:g}")
    elif environment is not None:
        print(f"no scores: D4RL has no reference returns for {args.env_id} (--reference-returns gives some)")
    warn_of_merged_rewards(np.concatenate([buffer.rewards for buffer in buffers]))
    write_dataset(args, log, buffers, space, environment, returns)
    if ":" in (args.env_id or ""):
        print(f"scripts need --env-id {args.env_id}, too: what a dataset names is not imported")
    print(f"for what to doubt in them: python -m benchmarks.inspect_dataset {args.dataset_id}")
    print(f"{args.dataset_id}: {num_steps} transitions in {len(buffers)} episodes")


if __name__ == "__main__":
    launch(main, Args)
