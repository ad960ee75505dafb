"""Makes Minari datasets of an environment in D4RL's sense, from the course of an online agent, algorithms/sac.py.

First the agent is trained, in a run folder of its own, where learning_curve.png shows its course. A command that was
stopped goes on when it is given again, and keeps the datasets that it has made; one with more --num-updates and another
--prefix goes on, too. Then, with S(policy) the return of a policy:

    random         uniformly random actions: score 0
    expert         the policy with the highest S of all evaluations: score 100
    medium         the policy of the first evaluation that reaches --medium, by default a third, of the way between them
    medium-replay  every transition that the agent had seen when it was medium, as `replay` was in D4RL's first version
    full-replay    every transition that the agent saw at all
    medium-expert  the episodes of medium and those of expert

Policies act as they learned to, by sampling. The reference scores are the mean returns of --reference-episodes episodes
of random actions and of the expert's mean action. Beside the data of medium and expert lies the policy that made them,
policy.pt: common.evaluation.load_policy gives its mean action, and the `actor` of that, sac.py's, samples. infos
of random, medium, expert and medium-expert holds "log_prob", the log-density of each action in the environment's units.
benchmarks.record does the like for a policy of any script.

Run: python -m benchmarks.collect --env-id Pendulum-v1 --num-updates 5000 --steps 20000
"""

import contextlib
import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "algorithms")]
import sac
from import_logs import find_spec
from scratch import scratch_root

from common.command_line import check, check_argument, explain, launch
from common.data import Batch, ReplayBuffer, action_bounds, observation_names
from common.evaluation import FINAL_SEED, Player, Policy, evaluate, load_file, load_policy, make_environment

TAKEN = "exists: delete it, or give another --prefix"
Quality = Literal["random", "medium", "medium-replay", "full-replay", "expert", "medium-expert"]


@dataclass
class Args:
    env_id: str
    """environment of Gymnasium's registry, with Box actions"""
    quality: tuple[Quality, ...] = ("random", "medium", "medium-replay", "full-replay", "expert", "medium-expert")
    """datasets to make"""
    prefix: str | None = None
    """datasets are called <prefix>/<quality>-v0; default: sac/<environment's name>"""
    num_updates: int = 100_000
    """steps of the agent's training, an update each; D4RL's took 1,000,000"""
    steps: int = 100_000
    """of each dataset but the replays, to the end of an episode; medium-expert has both halves"""
    medium: float = 1 / 3
    """where the medium policy is between random, 0, and expert, 1"""
    reference_episodes: int = 20
    """episodes behind each reference score"""
    seed: int = 0
    """of the agent and of the episodes"""
    run_dir: Path | None = None
    """the agent's run folder; default: runs/collect/<environment's name>-<seed>"""
    script: tyro.conf.Positional[tuple[str, ...]] = ()
    """after `--`: arguments of sac.py, where the agent is new"""

    def validate(self) -> None:
        for name in ("num_updates", "steps", "reference_episodes"):
            check_argument(self, name, getattr(self, name) >= 1, "must be at least 1")
        check_argument(self, "medium", 0 < self.medium < 1, "must be between 0 and 1")
        check_argument(self, "seed", 0 <= self.seed < 2**31, "must be in [0, 2^31)")
        own = [word for word in self.script if re.match("--(seed|env.id|run.dir|num.updates)(=|$)", word)]
        check(not own, f"{' '.join(own)} after --: collect has it, too; give it before --")


class Play(NamedTuple):
    """An environment, and how the actions of policies, in [-1, 1], become its own."""

    env_id: str
    environment: gym.Env
    low: np.ndarray  # [action_dim], as is high
    high: np.ndarray

    def scaled(self, action: np.ndarray) -> np.ndarray:
        """As common.evaluation.Policy does."""
        return np.clip((self.high + self.low) / 2 + (self.high - self.low) / 2 * action, self.low, self.high)


# of an observation and the last reward, or None: an action in the environment's units, and its log-density, or None
Act = Callable[[np.ndarray, float | None], tuple[np.ndarray, float | None]]


# --- Behaviour policies ---------------------------------------------------------------------------------------------


def random_behaviour(play: Play, seed: int) -> Act:
    rng = np.random.default_rng(seed)
    log_prob = -float(np.log(play.high - play.low).sum())
    return lambda observation, _: (rng.uniform(play.low, play.high).astype(np.float32), log_prob)


def sampling_behaviour(policy: Policy, seed: int) -> Act:
    """a = center + half_range a', a' ~ pi(.|s) of the policy's `actor`: the log-density loses the logarithm of every
    half range.
    """
    generator = torch.Generator().manual_seed(seed)
    actor: Any = policy.actor
    low, high = policy.action_range
    log_scale = float(((high - low) / 2).log().sum())
    drawn: list[float] = []

    def sample(observations: torch.Tensor) -> torch.Tensor:
        actions, log_prob = actor.sample(observations, torch.randn(1, len(low), generator=generator))
        drawn.append(float(log_prob))
        return actions

    @torch.no_grad()
    def act(observation: np.ndarray, _: float | None) -> tuple[np.ndarray, float]:
        return policy(observation[None], sample)[0], drawn.pop() - log_scale

    return act


def roll_out(act: Act, player: Player) -> EpisodeBuffer:
    """One episode; infos["log_prob"] [T + 1] has an entry per observation, and NaN at the last, where nobody acts. It
    is left out where actions have no density.
    """
    transitions: list[Batch] = []
    log_probs, number = list[Any](), len(player.lengths)
    while len(player.lengths) == number:
        action, log_prob = act(player.observation, transitions[-1].rewards if transitions else None)
        transitions.append(player.step(action))
        log_probs.append(log_prob)
    episode = Batch(*map(np.array, zip(*transitions, strict=True)))
    observations = np.concatenate([episode.observations, episode.next_observations[-1:]])
    infos = None if None in log_probs else {"log_prob": np.array([*log_probs, np.nan])}
    return whole_episode(observations, episode.actions, episode.rewards, bool(episode.terminations[-1]), infos)


def whole_episode(
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    terminated: bool,
    infos: dict[str, np.ndarray] | None = None,
) -> EpisodeBuffer:
    """T + 1 observations and T steps; what did not terminate was cut after its last step."""
    ends = np.zeros((2, len(rewards)), dtype=bool)
    ends[0 if terminated else 1, -1] = True
    return EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=ends[0],
        truncations=ends[1],
        infos=infos,
    )


def roll_outs(name: str, act: Act, player: Player, steps: int) -> list[EpisodeBuffer]:
    """Episodes of `steps` steps together, or a few more: the last one goes to its end."""
    episodes: list[EpisodeBuffer] = []
    with tqdm(total=steps, desc=name, mininterval=0.1 if sys.stderr.isatty() else 10) as progress:
        while progress.n < steps:
            episodes.append(roll_out(act, player))
            progress.update(len(episodes[-1]))
    return episodes


# --- The agent's course ---------------------------------------------------------------------------------------------


def train(args: Args, run_dir: Path) -> None:
    """Trains the agent, or goes on with it, in a process of its own. Its exit code, other than 0, becomes ours."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is made anew
        if json.loads((run_dir / "result.json").read_text())["num_updates"] >= args.num_updates and not args.script:
            return  # with arguments sac.py compares them with its run's, and has no more to do
    command = [sys.executable, sac.__file__, "--run-dir", str(run_dir), "--env-id", args.env_id]
    command += ["--num-updates", str(args.num_updates), "--seed", str(args.seed), "--keep-policies", *args.script]
    command += ["--resume"] if (run_dir / "checkpoint.pt").exists() else []
    with subprocess.Popen(command, start_new_session=True) as process:  # Ctrl-C reaches it through us alone
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()  # it ends its update and saves a checkpoint
            process.wait()
            raise
    if code:
        raise SystemExit(code)


class Agent(NamedTuple):
    """What the agent's run folder holds."""

    returns: dict[int, float]  # of the evaluation after each update
    transitions: Batch  # all that it saw, the random steps first
    episode_lengths: list[int]  # of the transitions, in order; the last one may be cut
    num_random: int  # steps before the first update
    folder: Path

    def policy(self, step: int) -> Policy:
        """As it was at the evaluation after update `step`."""
        return load_policy(self.folder / f"policy-{step}.pt")


def read_agent(run_dir: Path, play: Play, args: Args) -> Agent:
    """Raises BadInput if the folder holds the run of another script or environment, or has lost a part of its data."""
    unreadable = f"--run-dir {run_dir}: cannot read the agent's run"
    with explain(unreadable):
        saved = dict(json.loads((run_dir / "args.json").read_text()))
    expected = {"algorithm": "sac", "env_id": args.env_id, "seed": args.seed, "keep_policies": True}
    for name, value in expected.items():
        found = saved.get(name)
        check(found == value, f"--run-dir {run_dir}: {name} is {found!r} there, not {value!r}; name another folder")
    with explain(unreadable):
        checkpoint = load_file(run_dir / "checkpoint.pt")
        state = checkpoint["learner"]["player"]
        begun = sac.Args(env_id=args.env_id, seed=args.seed, random_steps=saved["random_steps"])
        count = len(state["added"])
        buffer = ReplayBuffer(sac.random_dataset(play.environment, begun), torch.device("cpu"), False, room=count)
        check(buffer.fingerprint == checkpoint["dataset_fingerprint"], "its random steps do not come out as they did")
        num_random = len(buffer.storage)
        Player(play.environment, buffer, args.seed, 1).load_state_dict(state)
        whole = count == checkpoint["step"] and bool(buffer.storage.isfinite().all())
        check(whole, "what the agent saw is damaged in it")
        lengths = [*buffer.episode_lengths.tolist(), *state["lengths"].tolist(), len(state["actions"])]
        transitions = buffer.take(torch.arange(len(buffer.storage)))
        with (run_dir / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["eval/return_mean"]]
        returns = {int(row["step"]): float(row["eval/return_mean"]) for row in rows}
        check(bool(returns), "metrics.csv has no evaluation")
    return Agent(returns, transitions, lengths, num_random, run_dir)


def replay_episodes(agent: Agent, num_steps: int, play: Play) -> list[EpisodeBuffer]:
    """The first `num_steps` steps that the agent saw, the last episode cut where they end."""
    columns = [column[:num_steps].numpy() for column in agent.transitions]
    episodes, end = [], 0
    for length in agent.episode_lengths:
        start, end = end, min(end + length, num_steps)
        if end > start:
            observations, actions, rewards, following, terminations = (column[start:end] for column in columns)
            observations = np.concatenate([observations, following[-1:]])
            episodes.append(whole_episode(observations, play.scaled(actions), rewards, bool(terminations[-1])))
    return episodes


def choose_medium(returns: dict[int, float], random: float, expert: float, medium: float) -> int:
    """The step of the first evaluation at `medium` of the way from random to expert. Raises BadInput if none is."""
    reached = [step for step, value in sorted(returns.items()) if value >= random + medium * (expert - random)]
    check(bool(reached), f"no evaluation reached {medium:.2f} of the expert's return: train longer")
    return reached[0]


# --- Main -----------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    args.validate()
    name = re.split("[:/]", args.env_id)[-1].rsplit("-v", 1)[0].lower()  # of module:namespace/name-v0
    run_dir = args.run_dir or Path("runs/collect") / f"{name}-{args.seed}"
    ids = valid_ids(args, f"sac/{name}")
    there = [dataset_id for dataset_id in ids.values() if get_dataset_path(dataset_id).exists()]
    check(not there or (run_dir / "checkpoint.pt").exists(), f"{' '.join(there)} {TAKEN}")  # else they may be its own
    environment = make_environment(args.env_id, users=True)
    play = Play(args.env_id, environment, *action_bounds(environment.action_space))
    observation_names(environment.observation_space)  # refuses images before anything is trained
    train(args, run_dir)
    agent = read_agent(run_dir, play, args)

    steps = {"expert": max(agent.returns, key=lambda step: agent.returns[step])}
    low, high = references = random_return(play, args), expert_return(agent.policy(steps["expert"]), args)
    check(low < high, f"random actions earn {low:.1f}, the agent's best policy {high:.1f}: give it more --num-updates")
    steps["medium"] = choose_medium(agent.returns, *references, args.medium)
    seen = {"medium-replay": steps["medium"], "full-replay": max(agent.returns)}
    medium = f"medium {agent.returns[steps['medium']]:.1f} (update {steps['medium']})"
    expert = f"expert {high:.1f} (update {steps['expert']})"
    print(f"{args.env_id}: random {low:.1f}, {expert}, {medium}; see {run_dir}/learning_curve.png", flush=True)

    @cache  # medium-expert takes the episodes of both
    def episodes(quality: str) -> list[EpisodeBuffer]:
        if quality in seen:
            return replay_episodes(agent, agent.num_random + seen[quality], play)
        if quality == "medium-expert":
            return episodes("medium") + episodes("expert")
        act = random_behaviour(play, args.seed)
        if quality != "random":
            act = sampling_behaviour(agent.policy(steps[quality]), args.seed)
        player = Player(environment, None, args.seed, 2, ["random", "medium", "expert"].index(quality))
        return roll_outs(quality, act, player, args.steps)

    sources = {"random": "uniformly random actions", "medium-expert": f"{medium} and {expert}"}
    sources |= {quality: f"all that SAC saw until update {step}" for quality, step in seen.items()}
    sources |= {quality: f"SAC, sampling, as it was after update {step}" for quality, step in steps.items()}
    scores = "Score 0 is random, 100 the expert's mean action."
    for quality, dataset_id in ids.items():
        size = "" if quality in seen else f", --steps {args.steps}"
        source = f"{sources[quality]}{size}; AnchoRL's algorithms/sac.py"
        if dataset_id in there:
            check(is_ours(dataset_id, f"{play.env_id}: {source}. {scores}", references), f"{dataset_id} {TAKEN}")
            print(f"{dataset_id}: {sources[quality]}; it is there already", flush=True)
            continue
        with scratch_root(dataset_id, episodes(quality)):
            write_dataset(dataset_id, episodes(quality), play, source, references, scores)
            if quality in steps:  # the policy that acted, beside its data
                shutil.copy(run_dir / f"policy-{steps[quality]}.pt", get_dataset_path(dataset_id) / "policy.pt")
        describe(dataset_id, episodes(quality), sources[quality], references)


def valid_ids(args: Args, default_prefix: str) -> dict[str, str]:
    """The id of each dataset to make. Raises BadInput if one is none."""
    ids: dict[str, str] = {quality: f"{args.prefix or default_prefix}/{quality}-v0" for quality in args.quality}
    for dataset_id in ids.values():
        with explain(f"--prefix {args.prefix}: {dataset_id} is no Minari id: take letters, digits, - and /"):
            parse_dataset_id(dataset_id)
        check(not dataset_id.startswith("anchorl/"), f"--prefix {args.prefix}: anchorl/ is for built-in datasets")
        with explain("no datasets folder: point MINARI_DATASETS_PATH to one that can be written"):
            get_dataset_path(dataset_id)
    return ids


def is_ours(dataset_id: str, *expected: Any) -> bool:
    """Whether an earlier command wrote it, of the same agent: with that description, and those reference scores."""
    with explain(f"{dataset_id} {TAKEN}"):
        found = MinariStorage.read_raw_metadata(get_dataset_path(dataset_id) / "data")
        return (found["description"], (found["ref_min_score"], found["ref_max_score"])) == expected


def random_return(play: Play, args: Args) -> float:
    act, player = random_behaviour(play, args.seed), Player(play.environment, None, args.seed, 3)
    return float(np.mean([roll_out(act, player).rewards.sum() for _ in range(args.reference_episodes)]))


def expert_return(policy: Policy, args: Args) -> float:
    """From states that the evaluations which chose this policy did not start from: its luck in those is no merit."""
    copies = min(args.reference_episodes, 10)
    environments = [make_environment(args.env_id, users=True) for _ in range(copies)]
    return float(evaluate(policy, environments, args.reference_episodes, FINAL_SEED)[0].mean())


def write_dataset(
    dataset_id: str,
    episodes: list[EpisodeBuffer],
    play: Play,
    source: str,
    references: tuple[float, float] | None,
    scores: str,
) -> None:
    environment, spec = play.environment, find_spec(play.env_id)
    if spec.entry_point is not None and environment.spec is not None:  # as it was made: of a dataset's own arguments
        made = environment.spec
        spec = dataclasses.replace(spec, kwargs=dict(made.kwargs), max_episode_steps=made.max_episode_steps)
    space, names = environment.observation_space, observation_names(environment.observation_space)
    vectors = isinstance(space, gym.spaces.Box) and len(space.shape) == 1  # others are flattened
    dataset = minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        env=None if spec.entry_point is None else spec,
        eval_env=spec,
        observation_space=space if vectors else gym.spaces.Box(-np.inf, np.inf, (len(names),), np.float64),
        action_space=environment.action_space,
        algorithm_name=source,
        author="AnchoRL",
        description=f"{play.env_id}: {source}. {scores}".strip(),
    )
    if references:  # Minari takes them with an environment alone that it can make
        dataset.storage.update_metadata({"ref_min_score": references[0], "ref_max_score": references[1]})
    dataset.storage.update_metadata({"observation_names": names})


def describe(
    dataset_id: str, episodes: list[EpisodeBuffer], source: str, references: tuple[float, float] | None
) -> None:
    average = float(np.mean([np.sum(episode.rewards) for episode in episodes]))
    low, high = references or (0.0, 1.0)
    score = f", score {100 * (average - low) / (high - low):.1f}" if references else ""
    size = f"{len(episodes)} episodes, {sum(map(len, episodes))} steps"
    print(f"{dataset_id}: {source}; {size}, return {average:.1f}{score}", flush=True)


if __name__ == "__main__":
    launch(main, Args)
