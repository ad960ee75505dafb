"""Logs in HDF5 files, as D4RL lays them out and as robomimic does. h5py reads their arrays of numbers, and no more."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from log_cells import NO, YES
from log_steps import Log, Steps, cut_gaps
from reference_returns import find_reference_returns

from common.command_line import BadInput, check, one_line, warn

D4RL = "observations", "actions", "rewards", "terminals"  # the arrays that a file must hold


@dataclass
class Hdf5Options:
    timeouts: str = "timeouts"
    """D4RL's files: array that is 1 where a limit cut an episode; '' says that no limit did"""
    observation_keys: tuple[str, ...] = ()
    """robomimic files: keys that make up the observation, in this order; default: all, sorted"""
    dones: Literal["terminated", "truncated"] = "terminated"
    """robomimic files: how an episode ends where `dones` is 1; truncated if it is a limit that cut the demos"""


def read_hdf5_log(path: Path, options: Hdf5Options) -> Log:
    """The checked steps of a file in either layout. Raises BadInput at the first thing that is wrong with it."""
    try:
        with h5py.File(path, "r") as file:
            demos = find_demos(file)
            if demos:
                check(options.timeouts == "timeouts", f"--timeouts is for D4RL's layout: {path} is in robomimic's")
                return read_robomimic(file, demos, options)
            lacking = ", ".join(name for name in D4RL if name not in file)
            known = f"for D4RL's it lacks {lacking}; for robomimic's, groups data/demo_0, data/demo_1 and so on"
            check(not lacking, f"{path} is in neither layout: {known}")
            named = "--observation-keys and --dones are for robomimic's layout"
            check(options == Hdf5Options(timeouts=options.timeouts), f"{named}: {path} is in D4RL's")
            return read_d4rl(file, options.timeouts)
    except BadInput:
        raise
    except Exception as error:  # of damaged files, h5py raises many kinds
        raise BadInput(f"cannot read {path} as HDF5: {one_line(error)}") from None


# --- Arrays ---------------------------------------------------------------------------------------------------------


def where(group: h5py.Group, name: str) -> str:
    """The file and an array's name in it, for messages."""
    return f"{group.file.filename}: {f'{group.name}/{name}'.lstrip('/')}"


def describe(item: Any) -> str:
    return f"an array of {item.dtype} and shape {item.shape}" if isinstance(item, h5py.Dataset) else "a group"


def vector_dim(item: Any, kinds: str = "biuf") -> int:
    """The dim of an array [rows, dim] of numbers, 1 for one [rows], 0 for anything else.

    `kinds` of numbers are NumPy's: booleans, whole numbers with and without sign, real numbers.
    """
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in kinds or item.ndim not in (1, 2):
        return 0
    return 1 if item.ndim == 1 else item.shape[1]


def read_numbers(group: h5py.Group, name: str, kinds: str = "biuf", spare: np.ndarray | None = None) -> np.ndarray:
    """[rows, dim], as the file has them. Raises BadInput unless they are vectors, and finite in float32 but in the rows
    that are `spare`, where what is not known may be NaN or infinite.
    """
    item = group[name]
    dim = vector_dim(item, kinds)
    check(dim > 0, f"{where(group, name)} must be vectors of real numbers, not {describe(item)}")
    values = item[:].reshape(len(item), dim)
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32, copy=False))
    if spare is not None and len(spare) == len(values):
        finite |= spare[:, None] & ~np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0].tolist()
        index = row if item.ndim == 1 else f"{row}, {column}"
        advice = "is not a finite number: repair it, or remove its episode"
        raise BadInput(f"{where(group, name)}[{index}] = {values[row, column]} {advice}")
    return values


def read_vectors(group: h5py.Group, name: str, kinds: str = "biuf", spare: np.ndarray | None = None) -> np.ndarray:
    """[rows, dim], float32 or, where the file has more digits, float64. Raises BadInput as read_numbers does."""
    values = read_numbers(group, name, kinds, spare)
    return values.astype(np.float32 if values.dtype.itemsize <= 2 else np.result_type(values, np.float32), copy=False)


def read_actions(group: h5py.Group) -> np.ndarray:
    """[rows, action_dim], float32. Raises BadInput as read_numbers does, and at whole numbers: discrete actions."""
    item = group["actions"]
    whole = isinstance(item, h5py.Dataset) and item.dtype.kind in "biu"
    advice = "if they are amounts, store them as floats; import_logs has no discrete actions yet"
    check(not whole, f"{where(group, 'actions')} must be vectors of real numbers, not {describe(item)}: {advice}")
    return read_vectors(group, "actions", "f").astype(np.float32, copy=False)


def read_scalars(group: h5py.Group, name: str) -> np.ndarray:
    """[rows], float64. Raises BadInput as read_numbers does, and unless there is one for each row."""
    values = read_numbers(group, name)
    check(values.shape[1] == 1, f"{where(group, name)} must be one number a row, not {describe(group[name])}")
    return values[:, 0].astype(np.float64)


def read_flags(group: h5py.Group, name: str) -> np.ndarray:
    """[rows] of true and false. Raises BadInput as read_scalars does, and unless they are 1 and 0, or such words."""
    item = group[name]
    if isinstance(item, h5py.Dataset) and h5py.check_string_dtype(item.dtype):
        check(item.shape in ((item.size,), (item.size, 1)), f"{where(group, name)} must be one word a row")
        values = np.char.lower(np.char.strip(item.asstr(errors="replace")[:].astype(str).reshape(-1)))
        yes, no = np.isin(values, YES), np.isin(values, NO)
    else:
        values = read_scalars(group, name)
        yes, no = values == 1, values == 0
    strange = np.unique(values[~(yes | no)])
    found = f"{', '.join(map(repr, strange[:5].tolist()))}{', ...' * (len(strange) > 5)}"
    check(len(strange) == 0, f"{where(group, name)} must be 0 and 1, or true and false, and holds {found}")
    return yes


def check_lengths(group: h5py.Group, arrays: dict[str, np.ndarray]) -> None:
    """Raises BadInput unless the arrays have as many rows as one another, and some."""
    lengths = {name: len(values) for name, values in arrays.items()}
    what = where(group, "").rstrip(": /")
    check(len(set(lengths.values())) == 1, f"{what}: the arrays do not match in length: {lengths}")
    check(min(lengths.values()) > 0, f"{what} is empty: its arrays have no rows")


def name_actions(actions: np.ndarray) -> list[str]:
    return [f"action_{index}" for index in range(actions.shape[1])]


# --- D4RL -----------------------------------------------------------------------------------------------------------


def read_d4rl(file: h5py.File, timeouts_name: str) -> Log:
    """Arrays of N rows, episode after episode: observations [N, dim], actions [N, dim], rewards [N], terminals [N],
    often timeouts [N] and next_observations [N, dim]. An episode ends with a terminal, a timeout or the file.
    """
    arrays = {
        "observations": read_vectors(file, "observations"),
        "actions": read_actions(file),
        "rewards": read_scalars(file, "rewards"),
        "terminals": read_flags(file, "terminals"),
    }
    observations, terminals = arrays["observations"], arrays["terminals"]
    check(
        timeouts_name not in arrays, f"--timeouts {timeouts_name}: is read as such already: name another array, or ''"
    )
    used = {*arrays, "next_observations", timeouts_name}
    if timeouts_name and timeouts_name in file:
        arrays[timeouts_name] = read_flags(file, timeouts_name)
    else:
        check_no_timeouts(file, timeouts_name, used, len(terminals))
    check_lengths(file, arrays)
    timeouts = arrays.get(timeouts_name, np.zeros_like(terminals))
    if "next_observations" in file:
        spare = terminals | timeouts | (np.arange(len(terminals)) == len(terminals) - 1)  # ends, which may lack them
        arrays["next_observations"] = read_vectors(file, "next_observations", spare=spare)
        check_lengths(file, arrays)
    following = arrays.get("next_observations")
    sizes = f"{where(file, 'next_observations')} are of another size than observations"
    check(following is None or following.shape == observations.shape, sizes)
    ends = np.union1d(np.flatnonzero(terminals | timeouts) + 1, len(terminals))
    steps = Steps(observations, arrays["actions"], arrays["rewards"], terminals, timeouts, following, ends)
    steps = cut_gaps(steps)
    if timeouts_name and not steps.truncations.any():
        warn_of_no_cuts(file, steps, used)
    return Log(
        steps,
        observations=[str(index) for index in range(observations.shape[1])],
        actions=name_actions(steps.actions),
        unused=find_unused_arrays(file, used, len(terminals)),
        unit_actions=True,
        reference_returns=find_reference_returns(Path(file.filename).name),
    )


def check_no_timeouts(file: h5py.File, name: str, used: set[str], num_rows: int) -> None:
    """Raises BadInput where a file without the array of timeouts does not say either what each step led to: then an
    episode that a limit cut would run on into the next one.
    """
    asked = name not in ("", "timeouts")
    check(not asked, f"--timeouts {name}: {file.filename} has no such array: {list_of_rows(file, used, num_rows)}")
    problem = "has no timeouts, so an episode that a limit cut would run on into the next one"
    advice = "name the array that marks such ends with --timeouts, or give --timeouts '' if every end is a terminal"
    known = name == "" or "next_observations" in file
    check(known, f"{file.filename} {problem}: {advice} ({list_of_rows(file, used, num_rows)})")


def warn_of_no_cuts(file: h5py.File, steps: Steps, used: set[str]) -> None:
    """Says so where nothing but terminals ends an episode, which a limit may have done without a mark."""
    longest = int(np.diff(steps.ends, prepend=0).max())
    what = f"no episode is cut by a limit: terminals alone end them, and the longest has {longest} rows"
    advice = "if one of these marks ends, name it with --timeouts"
    warn(f"{what}: {advice} ({list_of_rows(file, used, len(steps.rewards))}); --timeouts '' says that all is well")


def arrays_of_rows(file: h5py.File, used: set[str], num_rows: int) -> list[str]:
    """Names of the arrays, also in groups, that have something for each row, and are not used."""
    names: list[str] = []

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape and item.shape[0] == num_rows and name not in used:
            names.append(name)

    file.visititems(add)
    return sorted(names)


def list_of_rows(file: h5py.File, used: set[str], num_rows: int) -> str:
    names = arrays_of_rows(file, used, num_rows)
    return f"not used: {', '.join(names)}" if names else "no other array has its number of rows"


def find_unused_arrays(file: h5py.File, used: set[str], num_rows: int) -> list[str]:
    """Arrays that have something for each row by their own names, all else by that of its group."""
    names = arrays_of_rows(file, used, num_rows)
    tops = {name.split("/")[0] for name in [*names, *used]}
    return sorted([*names, *(name for name in file if name not in tops)])


# --- robomimic ------------------------------------------------------------------------------------------------------


def find_demos(file: h5py.File) -> list[h5py.Group]:
    """The groups data/demo_<number>, by number: demo_2 is before demo_10."""
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        return []
    names = [name for name in data if re.fullmatch(r"demo_\d+", name) and isinstance(data[name], h5py.Group)]
    return [data[name] for name in sorted(names, key=lambda name: int(name.removeprefix("demo_")))]


def read_robomimic(file: h5py.File, demos: list[h5py.Group], options: Hdf5Options) -> Log:
    """A group data/demo_<number> for each episode, of T rows: actions [T, dim], rewards [T], dones [T], obs/<key>
    [T, dim] and often next_obs/<key> [T, dim]. What follows a demo's first done is no part of the episode.
    `data.attrs["env_args"]`, text that says how to make an environment, is not read.
    """
    keys = find_keys(demos[0], options)
    groups = [name for name in ("obs", "next_obs") if name in demos[0]]
    dims = {"actions": vector_dim(demos[0].get("actions")), "rewards": 1, "dones": 1}
    dims |= {f"{group}/{key}": dim for group in groups for key, dim in keys.items()}
    check_alike(demos, dims)
    episodes = [read_demo(demo, groups, list(keys)) for demo in demos]
    arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    dones, none = arrays["dones"], np.zeros_like(arrays["dones"])
    print(f"{dones.sum()} of {len(demos)} demos are done at their end: taken as {options.dones} (--dones)")
    dropped = sum(len(demo["dones"]) for demo in demos) - len(dones)
    if dropped:
        print(f"dropped {dropped} rows: those after the first done of their demo")
    steps = Steps(
        observations=arrays["obs"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminations=dones if options.dones == "terminated" else none,
        truncations=dones if options.dones == "truncated" else none,
        next_observations=arrays.get("next_obs"),
        ends=np.cumsum([len(episode["dones"]) for episode in episodes]),
    )
    return Log(
        cut_gaps(steps),
        observations=[f"{key}/{index}" for key, dim in keys.items() for index in range(dim)],
        actions=name_actions(steps.actions),
        unused=find_unused(file, demos, dims),
        unit_actions=True,
    )


def find_keys(demo: h5py.Group, options: Hdf5Options) -> dict[str, int]:
    """The keys of the observation, in the order of its numbers, and how many each has. Raises BadInput if one is not
    there, or no vector.
    """
    group = demo.get("obs")
    found = sorted(group) if isinstance(group, h5py.Group) else []
    advice = "robomimic's scripts/dataset_states_to_obs.py makes them of a simulator's states"
    check(bool(found), f"{where(demo, 'obs')} holds no observations: {advice}")
    strangers = [key for key in options.observation_keys if key not in found]
    check(not strangers, f"--observation-keys: {where(demo, 'obs')} has {', '.join(found)}, not {', '.join(strangers)}")
    dims = {key: vector_dim(group[key]) for key in options.observation_keys or found}
    others = [f"{key} ({describe(group[key])})" for key, dim in dims.items() if dim == 0]
    vectors = " ".join(key for key in found if vector_dim(group[key]))
    advice = f"give --observation-keys {vectors}" if vectors else "images are not supported"
    what = f"observations must be vectors of numbers, not {', '.join(others)}"
    check(not others, f"{where(demo, 'obs')}: {what}: {advice}")
    return dims


def check_alike(demos: list[h5py.Group], dims: dict[str, int]) -> None:
    """Raises BadInput unless every demo has arrays of these names, with as many numbers a row."""
    for demo in demos:
        lacking = ", ".join(name for name in dims if name not in demo)
        check(not lacking, f"{where(demo, '').rstrip('/')} lacks {lacking}")
        for name, dim in dims.items():
            found = vector_dim(demo[name])
            first = f"that of {demos[0].name.lstrip('/')} has {dim}"
            check(found in (0, dim), f"{where(demo, name)} has {found} numbers a row, and {first}")


def read_demo(demo: h5py.Group, groups: list[str], keys: list[str]) -> dict[str, np.ndarray]:
    """A demo's arrays up to its first done, the keys of each of the `groups` side by side. Raises BadInput."""
    arrays = {
        "actions": read_actions(demo),
        "rewards": read_scalars(demo, "rewards"),
        "dones": read_flags(demo, "dones"),
    }
    parts = {f"{group}/{key}": read_vectors(demo, f"{group}/{key}") for group in groups for key in keys}
    check_lengths(demo, arrays | parts)
    for group in groups:
        arrays[group] = np.concatenate([parts[f"{group}/{key}"] for key in keys], axis=1)
    dones = arrays["dones"]
    rows = dones.argmax() + 1 if dones.any() else len(dones)
    return {name: values[:rows] for name, values in arrays.items()}


def find_unused(file: h5py.File, demos: list[h5py.Group], used: Iterable[str]) -> list[str]:
    """Names of what is in the file, or in one of the demos, and not used."""
    names = set()
    for demo in demos:
        for name, item in demo.items():
            group = name in ("obs", "next_obs") and isinstance(item, h5py.Group)
            names |= {f"{name}/{key}" for key in item} if group else {name}
    demo_names = {demo.name.split("/")[-1] for demo in demos}
    others = [f"data/{name}" for name in sorted(set(file["data"]) - demo_names)]
    return [*sorted(set(file) - {"data"}), *others, *(f"data/demo_*/{name}" for name in sorted(names - set(used)))]
