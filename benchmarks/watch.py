"""A trained policy as a moving picture: an episode of it, alone or beside one of the data.

The policy plays in the evaluation environment of the run's dataset, or in the one that SAC learned in. With
--beside-data, the data's episode of median return is shown beside it, and the policy starts where that episode did. Its
recorded observations are put back into the environment as poses (Pendulum, CartPole, and MuJoCo's environments whose
observations are positions and velocities).

Pendulum and CartPole are drawn by pygame (`pip install -e '.[watch]'`); MuJoCo needs a GL backend, which the variable
MUJOCO_GL names: without a screen egl, unless it says osmesa.

Run: python -m benchmarks.watch runs/first --out policy.gif --beside-data
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from scratch import replace
from trained_run import given_or_own

from common.command_line import BadInput, check, explain, launch, one_line
from common.data import Batch as Episode
from common.data import Dataset, load_dataset
from common.evaluation import EVALUATION_SEED, Policy, answer, load_policy, make_environments

FRAMES_PER_SECOND = 25


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """folder of a run"""
    out: Path = Path("policy.gif")
    """the picture to write, .gif"""
    script: Path | None = None
    """path of the script that trained the policy, if it is not in algorithms/"""
    env_id: str | None = None
    """environment to play in; default: that of the run"""
    beside_data: bool = False
    """show an episode of the data, too, and let the policy start where it did"""
    seed: int = 0
    """of the first state, without --beside-data; evaluations take 0 to 9"""
    max_steps: int = 300
    """steps to show at most"""
    height: int = 240
    """of the picture, in pixels"""


def main(args: Args) -> None:
    for name in ("max_steps", "height"):
        check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    check(args.seed >= 0, f"--seed {args.seed}: must not be negative")
    check(args.out.suffix.lower() == ".gif", f"--out {args.out}: must end with .gif")
    check(args.out.parent.is_dir(), f"--out {args.out}: there is no folder {args.out.parent}")
    policy, dataset, name = read_run(args)
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame's: it draws without a screen, too
    (environment,) = make_environments(dataset, 1, render_mode="rgb_array")
    with environment:
        step_seconds = 1 / (environment.metadata.get("render_fps") or FRAMES_PER_SECOND)
        every = max(1, round(1 / FRAMES_PER_SECOND / step_seconds))  # a picture needs no more frames than eyes see
        follow(environment)
        panels = []
        observation = reset(environment, args.seed)
        if args.beside_data:
            episode = median_episode(dataset)
            frames = list(replay(environment, episode, args.max_steps))
            panels.append(
                captioned(frames[::every], f"data: {episode.rewards[: args.max_steps].sum():.0f}", args.height)
            )
            reset(environment, args.seed)
            observation = episode.observations[0]
            set_pose(environment)(observation)
        frames, total, ended = play(environment, policy, observation, args.max_steps)
        panels.append(captioned(frames[::every], f"{name}: {total:.0f}", args.height))
    save(panels, args.out, round(1000 * every * step_seconds))
    rest = "" if ended else f" in its first {args.max_steps} steps"
    print(f"{name} on {dataset.dataset_id}: return {total:.1f}{rest}, {args.out}")


def read_run(args: Args) -> tuple[Policy, Dataset, str]:
    """The policy, its dataset (of SAC, an empty one) and the algorithm's name. Raises BadInput."""
    policy = load_policy(args.run_dir, args.script)
    folder = args.run_dir.parent if args.run_dir.suffix == ".pt" else args.run_dir
    with explain(f"cannot read {folder / 'args.json'}"):
        saved = json.loads((folder / "args.json").read_text())
        dataset_id, own, name = saved["dataset_id"], saved.get("env_id"), saved["algorithm"]
        texts = all(isinstance(text, str) for text in (dataset_id, own or "", name))
        check(texts, "dataset_id, env_id and algorithm must be texts")
    env_id = given_or_own(args.env_id, own)
    if dataset_id == own:  # SAC and MBPO learn from no dataset: the environment's id stands for it
        check(not args.beside_data, f"--beside-data: {args.run_dir} is a run of {name}, which learns from no dataset")
        names, (low, high) = [*map(str, range(policy.normalization.shape[1]))], policy.action_range.numpy()
        dataset = Dataset(dataset_id, 0, names, low, high, lambda: iter(()), env_id, discrete=policy.discrete)
    else:
        dataset = load_dataset(dataset_id, env_id, discrete=policy.discrete)
    return policy, dataset, str(name)


def median_episode(dataset: Dataset) -> Episode:
    """The episode whose return is the median of all."""
    returns = [float(episode.rewards.sum()) for episode in dataset.read_episodes()]
    middle = int(np.argsort(returns)[len(returns) // 2])
    return next(episode for number, episode in enumerate(dataset.read_episodes()) if number == middle)


def set_pose(environment: gym.Env) -> Callable[[np.ndarray], None]:
    """A function that puts an observation back into the environment. Raises BadInput where that is not known."""
    unwrapped: Any = environment.unwrapped

    def pendulum(observation: np.ndarray) -> None:
        cos, sin, speed = observation
        unwrapped.state, unwrapped.last_u = np.array([np.arctan2(sin, cos), speed], np.float64), None

    def cartpole(observation: np.ndarray) -> None:
        unwrapped.state = np.array(observation, np.float64)

    def mujoco(observation: np.ndarray) -> None:
        """The positions that such observations leave out are those of the place in the plane: the camera follows."""
        num_hidden = unwrapped.model.nq + unwrapped.model.nv - len(observation)
        positions, speeds = np.split(np.concatenate([np.zeros(num_hidden), observation]), [unwrapped.model.nq])
        unwrapped.set_state(positions, speeds)

    known = {"Pendulum": pendulum, "CartPole": cartpole}
    known |= dict.fromkeys(("Hopper", "HalfCheetah", "Walker2d", "Swimmer"), mujoco)
    name = str(environment.spec and environment.spec.id).split("-")[0]
    check(name in known, f"--beside-data: there is no way from an observation of {name} to its pose; leave it out")
    return known[name]


def follow(environment: gym.Env) -> None:
    """MuJoCo's robots walk out of the picture, unless it is of the camera that their models call `track`."""
    unwrapped: Any = environment.unwrapped
    if hasattr(unwrapped, "mujoco_renderer"):
        names = [unwrapped.model.camera(number).name for number in range(unwrapped.model.ncam)]
        if "track" in names:
            unwrapped.mujoco_renderer.camera_id = names.index("track")


def reset(environment: gym.Env, seed: int) -> np.ndarray:
    return answer(environment, 0, EVALUATION_SEED + seed)[0]


def replay(environment: gym.Env, episode: Episode, max_steps: int) -> Iterator[Image.Image]:
    """Pictures of what the data observed, one a step."""
    pose = set_pose(environment)
    for observation in episode.observations[:max_steps]:
        pose(observation)
        yield picture(environment)


def play(
    environment: gym.Env, policy: Policy, observation: np.ndarray, max_steps: int
) -> tuple[list[Image.Image], float, bool]:
    """Pictures of the policy, one a step, the sum of its rewards, and whether the episode has ended."""
    frames, total, last = [], 0.0, None
    tell = getattr(policy.actor, "follow", lambda episodes, rewards: None)  # an actor with a memory
    for step in range(1, max_steps + 1):
        frames.append(picture(environment))
        tell([0], [last])
        observation, last, terminated, truncated = answer(environment, step, policy(observation[None])[0])
        total += last
        if terminated or truncated:
            return frames, total, True
    return frames, total, False


def picture(environment: gym.Env) -> Image.Image:
    try:
        return Image.fromarray(np.asarray(environment.render()))
    except Exception as error:  # GL backends fail in ways of their own
        name = environment.spec and environment.spec.id
        todo = "pip install -e '.[watch]', or for MuJoCo set MUJOCO_GL to a backend that is installed: egl or osmesa"
        todo = "it has no pictures (render_mode rgb_array)" if isinstance(error, NotImplementedError) else todo
        raise BadInput(f"{name} cannot be drawn here ({one_line(error)}): {todo}") from None


def captioned(frames: list[Image.Image], caption: str, height: int) -> list[Image.Image]:
    """The frames at the given height, with a line of text at the top."""
    small = [frame.resize((max(1, round(frame.width * height / frame.height)), height)) for frame in frames]
    for frame in small:
        ImageDraw.Draw(frame).text((6, 4), caption, fill="black", stroke_width=2, stroke_fill="white")
    return small


def save(panels: list[list[Image.Image]], path: Path, milliseconds: int) -> None:
    """One moving picture of all panels side by side; the shorter ones end with a still."""
    frames = []
    for index in range(max(map(len, panels))):
        row = [panel[min(index, len(panel) - 1)] for panel in panels]
        frame = Image.new("RGB", (sum(part.width for part in row), row[0].height))
        for position, part in enumerate(row):
            frame.paste(part, (sum(before.width for before in row[:position]), 0))
        frames.append(frame.quantize(64))
    how: dict[str, Any] = {"format": "GIF", "save_all": True, "append_images": frames[1:], "loop": 0}
    replace(path, lambda file: frames[0].save(file, duration=milliseconds, **how))


if __name__ == "__main__":
    launch(main, Args)
