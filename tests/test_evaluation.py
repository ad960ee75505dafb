"""Evaluation counts one episode per environment copy; a saved policy acts as the trained one did."""

import copy
import dataclasses
import importlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import bc
import bcq
import discrete_bcq
import discrete_cql
import discrete_iql
import fqi
import gymnasium as gym
import iql
import minari
import numpy as np
import pytest
import sac
import torch
from conftest import DISCRETE, REMEMBER, ROOT, SCRIPTS, SHORT, assert_one_line, random_episode, run_script, write_policy

from common.command_line import BadInput, Diverged
from common.data import ReplayBuffer, load_dataset
from common.evaluation import Policy, evaluate, load_policy, load_script, make_environments


class Countdown(gym.Env):
    """Copy i ends after 2 + (seed % 4) steps, each with reward 1, by termination or, for even seeds, by truncation."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    seeds: ClassVar[list[int]] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.even = 100, False  # an episode after the first would be long, and must not count
        if seed is not None:
            self.left, self.even = 2 + seed % 4, seed % 2 == 0
            self.seeds.append(seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(3, np.float32), 1.0, self.left == 0 and not self.even, self.left == 0 and self.even, {}


class Goal(gym.Env):
    """One step with a goal-conditioned observation."""

    observation_space = gym.spaces.Dict(
        {
            "observation": gym.spaces.Box(-9, 9, (2,), np.float32),
            "achieved_goal": gym.spaces.Box(-9, 9, (2,), np.float32),
            "desired_goal": gym.spaces.Box(-9, 9, (1,), np.float32),
        }
    )
    action_space = Countdown.action_space

    def reset(self, *, seed=None, options=None):
        ones = np.ones(2, np.float32)
        return {"observation": ones, "achieved_goal": 0 * ones, "desired_goal": 5 * ones[:1]}, {}

    def step(self, action):
        return self.reset()[0], 1.0, True, False, {}


@pytest.fixture(autouse=True)
def environments():
    gym.register("Countdown-v0", "test_evaluation:Countdown")
    gym.register("Goal-v0", "test_evaluation:Goal")
    yield
    del gym.registry["Countdown-v0"], gym.registry["Goal-v0"]


NORMALIZATION = torch.tensor([[0.5, 0.0, 1.0], [1.0, 2.0, 3.0]])


def make_policy(script, args, low=-2.0, high=2.0, seed=0):
    torch.manual_seed(seed)
    origin = {"script": script.__name__, "hyper_parameters": dataclasses.asdict(args)}
    bounds = np.array([[low], [high]], dtype=np.int64 if script.__name__ in DISCRETE else np.float32)
    actor = script.Actor(3, int(high - low) + 1 if bounds.dtype == np.int64 else 1, args)
    return Policy(actor, NORMALIZATION, bounds, bounds.dtype == np.int64, origin)


@pytest.fixture
def policy():
    return make_policy(iql, iql.HyperParameters(hidden_dims=(16, 16)))


@pytest.fixture(params=[iql, bcq, sac, bc], ids=lambda script: script.__name__)
def any_policy(request):
    more = {"vae_hidden_dims": (12,), "num_acting_actions": 7} if request.param is bcq else {}
    return make_policy(request.param, request.param.HyperParameters(hidden_dims=(16, 8), **more))


def test_it_gives_back_the_threads_that_it_found(monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    evaluate(lambda observations: np.zeros((len(observations), 1), np.float32), [Countdown()])
    assert counts == [1, 2]


def test_counts_exactly_one_episode_per_copy(make_dataset, policy):
    environments = make_environments(load_dataset(make_dataset(env="Countdown-v0")), 6)
    for _ in range(2):  # the same seeds each time
        Countdown.seeds.clear()
        returns, lengths = evaluate(policy, environments)
        assert (returns == lengths).all()
        assert Countdown.seeds == [10_000, 10_001, 10_002, 10_003, 10_004, 10_005]
        assert returns.tolist() == [2 + seed % 4 for seed in Countdown.seeds]


@pytest.mark.parametrize("count", [1, 6, 13])
def test_a_few_copies_play_many_episodes_one_after_the_other(make_dataset, policy, count):
    environments = make_environments(load_dataset(make_dataset(env="Countdown-v0")), 3)
    Countdown.seeds.clear()
    returns, lengths = evaluate(policy, environments, count, 500)
    assert sorted(Countdown.seeds) == list(range(500, 500 + count))
    assert returns.tolist() == lengths.tolist() == [2 + (500 + i) % 4 for i in range(count)]


def test_evaluation_is_the_episode_played_by_hand(make_dataset, policy):
    environments = make_environments(load_dataset(make_dataset(env="Pendulum-v1")), 2)
    returns, _ = evaluate(policy, environments)
    for index in range(2):
        env = gym.make("Pendulum-v1")
        observation, _ = env.reset(seed=10_000 + index)
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(policy(observation[None])[0])
            total, done = total + float(reward), terminated or truncated
        assert returns[index] == pytest.approx(total, rel=1e-4)


def test_policy_normalises_observations_and_scales_actions(policy):
    observations = np.array([[0.1, -0.7, 3.0], [0.0, 0.0, 0.0]], np.float32)
    normalised = (observations - [0.5, 0, 1]) / [1, 2, 3]
    with torch.no_grad():
        expected = 2 * policy.actor(torch.tensor(normalised, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(policy(observations), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"shape \[N, 3\], not \[3\]"):
        policy(observations[0])


def save(policy, folder):
    folder.mkdir(exist_ok=True)
    with (folder / "policy.pt").open("wb") as file:
        policy.save(file)
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39, -np.finfo(float).max])
def test_a_policy_refuses_an_observation_that_is_no_number(policy, value):
    """Nor one beyond float32, as a code of a missing value may be."""
    with pytest.raises(BadInput, match="not a finite number"):
        policy(np.array([[0.0, 0.0, 0.0], [0.0, value, 0.0]]))


def test_a_policy_takes_views_of_any_order(policy):
    observations = np.random.default_rng(0).normal(size=(5, 6))
    expected = policy(observations[::-1, ::-2].copy())
    for same in (observations[::-1, ::-2], np.asfortranarray(observations[::-1, ::-2])):
        np.testing.assert_array_equal(policy(same), expected)


def test_load_policy_equals_the_saved_one(any_policy, tmp_path):
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    first = load_policy(save(any_policy, tmp_path / "first"))
    second = load_policy(save(first, tmp_path / "second"))  # saved again
    for loaded in (first, second):
        np.testing.assert_array_equal(loaded(observations), any_policy(observations))
    assert type(first.actor).__module__ == f"script_{any_policy.origin['script']}"


def test_load_policy_needs_neither_run_nor_dataset(any_policy, tmp_path):
    save(any_policy, tmp_path)
    code = "import sys, numpy; from common.evaluation import *; print(load_policy(sys.argv[1])(numpy.zeros((1, 3))))"
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.strip(" []\n")) == pytest.approx(any_policy(np.zeros((1, 3)))[0, 0], rel=1e-5)


@pytest.mark.parametrize("script", [iql, sac], ids=lambda script: script.__name__)
def test_a_loaded_actor_samples_and_gives_densities(script, tmp_path):
    """Of a stochastic policy, the file holds the standard deviation, too."""
    policy = make_policy(script, script.HyperParameters(hidden_dims=(16,)))
    loaded = load_policy(save(policy, tmp_path))
    observations, noise = torch.randn(9, 3), torch.randn(9, 1)
    with torch.no_grad():
        (ours, log_prob), (theirs, expected) = (p.actor.sample(observations, noise) for p in (loaded, policy))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(log_prob, expected)
    assert not torch.allclose(ours, loaded.act(observations))


PREFERENCES = [(fqi, {}), (discrete_iql, {}), (discrete_cql, {"bc_weight": 2.0}), (discrete_bcq, {"threshold": 0.9})]


@pytest.fixture(params=PREFERENCES, ids=lambda param: param[0].__name__)
def discrete_policy(request):
    """Of four actions, numbered from 5."""
    script, more = request.param
    policy = make_policy(script, script.HyperParameters(hidden_dims=(16, 8), **more), 5, 8)
    with torch.no_grad():
        for weight in policy.actor.parameters():
            weight.mul_(3)  # so that actions, and those that are likely, differ from state to state
    return policy


def test_a_policy_of_discrete_actions_takes_the_highest_preference(discrete_policy):
    observations = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    actions = discrete_policy(observations)
    normalised = torch.tensor((observations - [0.5, 0, 1]) / [1, 2, 3], dtype=torch.float32)
    with torch.no_grad():
        preferences = discrete_policy.actor(normalised).numpy()
    assert (actions.dtype, actions.shape) == (np.int64, (200,))
    assert actions.tolist() == [5 + int(np.argmax(row)) for row in preferences]
    assert len(set(actions.tolist())) > 1


def test_a_policy_of_discrete_actions_goes_through_its_file(discrete_policy, tmp_path):
    observations = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    for folder in (tmp_path / "first", tmp_path / "second"):  # the second of what was loaded from the first
        loaded = load_policy(save(discrete_policy, folder))
        np.testing.assert_array_equal(loaded(observations), discrete_policy(observations))
        assert loaded.actor is not discrete_policy.actor
        discrete_policy = loaded


def test_discrete_evaluation_is_the_episode_played_by_hand(cartpole):
    torch.manual_seed(1)
    actor = fqi.Actor(4, 2, fqi.HyperParameters(hidden_dims=(16, 8)))
    bounds = cartpole.dataset.action_low, cartpole.dataset.action_high
    policy = Policy(actor, torch.tensor([[0.0] * 4, [1.0] * 4]), bounds, True, {})
    returns, _ = evaluate(policy, make_environments(cartpole.dataset, 2))
    for index in range(2):
        env = gym.make("CartPole-v1")
        observation, _ = env.reset(seed=10_000 + index)
        total, done = 0.0, False
        while not done:
            with torch.no_grad():
                action = int(actor(torch.tensor(observation)[None]).argmax())
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        assert returns[index] == total


@pytest.mark.parametrize(("n", "first"), [(3, 0), (2, 1)])
def test_environment_with_other_discrete_actions_is_refused(make_dataset, n, first):
    fields = {"actions": np.full(30, first), "observations": np.zeros((31, 4), np.float32)}
    spaces = {"action_space": gym.spaces.Discrete(n, start=first), "observation_space": gym.spaces.Box(-9, 9, (4,))}
    dataset = load_dataset(make_dataset(episodes=[random_episode(0, **fields)], **spaces), "CartPole-v1", discrete=True)
    message = rf"CartPole-v1 has .* Discrete\(2\), the data 4, \[{first}\] to \[{first + n - 1}\]"
    with pytest.raises(BadInput, match=message):
        make_environments(dataset, 1)


def test_load_policy_without_policy(tmp_path):
    with pytest.raises(BadInput, match="no policy at"):
        load_policy(tmp_path)
    (tmp_path / "policy.pt").write_bytes(b"junk")
    with pytest.raises(BadInput, match="cannot read"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actor": None}, "does not fit"),
        ({"normalization": torch.ones(1, 3)}, "cannot read"),
        ({"normalization": torch.full((2, 3), torch.nan)}, "its units are no numbers"),
        ({"normalization": "x"}, "cannot read"),
        ({"action_range": torch.tensor([True, False])}, "cannot read|does not fit"),
        ({"action_range": torch.full((2, 1), torch.nan)}, "its units are no numbers"),
        ({"hyper_parameters": []}, "does not fit"),
        ({"hyper_parameters": {"hidden_dims": "x"}}, "does not fit"),
        ({"examples": None}, "cannot read"),
    ],
)
def test_load_policy_refuses_wrong_entries(change, message, tmp_path):
    path = Path(write_policy(tmp_path / "run")) / "policy.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(BadInput, match=message):
        load_policy(path.parent)


def test_goal_conditioned_environments_are_flattened_as_their_data_is(make_dataset):
    space = Goal.observation_space
    parts = {name: np.zeros((4, *box.shape), np.float32) for name, box in space.items()}
    episodes = [random_episode(0, 3, observations=parts)]
    dataset = load_dataset(make_dataset(episodes=episodes, observation_space=space, env="Goal-v0"))
    seen = []

    def policy(observations):
        seen.append(observations)
        return np.zeros((1, 1), np.float32)

    assert evaluate(policy, make_environments(dataset, 1))[0].tolist() == [1]
    assert seen[0].tolist() == [[0, 0, 5, 1, 1]]


@pytest.mark.parametrize("env_id", [None, "NotInstalled-v0", "module:Env-v0"])
def test_no_environment(make_dataset, env_id):
    with pytest.raises(BadInput, match=r"names no environment|is not installed|cannot be made"):
        make_environments(load_dataset(make_dataset(), env_id), 2)


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward])
def test_an_environment_that_lacks_a_wrapper_of_the_data_s_is_none(make_dataset, wrapper, capsys):
    """The policy would be scored in another one."""
    wrapped = wrapper(gym.wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1")))
    dataset_id = make_dataset(env=wrapped.spec)
    with pytest.raises(BadInput, match=rf"Pendulum-v1 without {wrapper.__name__} is another \(--env-id takes"):
        make_environments(load_dataset(dataset_id), 1)
    assert len(make_environments(load_dataset(dataset_id, "Pendulum-v1"), 2)) == 2


class Shaped(gym.RewardWrapper, gym.utils.RecordConstructorArgs):
    """Whose name does not say what it changes."""

    def __init__(self, env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.RewardWrapper.__init__(self, env)

    def reward(self, reward):
        return float(reward) + 100


def test_a_wrapper_of_the_users_own_is_taken_for_one_that_changes_something(make_dataset):
    dataset_id = make_dataset(env=Shaped(gym.make("Pendulum-v1")).spec)
    with pytest.raises(BadInput, match=r"Pendulum-v1 without Shaped is another \(--env-id takes"):
        make_environments(load_dataset(dataset_id), 1)


@pytest.mark.parametrize("env", ["CartPole-v1", "Blackjack-v1"])
def test_data_of_another_kind_than_their_environment_are_trained_on_without_it(env, make_dataset, tmp_path):
    """As after a wrapper that makes numbers of choices."""
    run = run_script(
        "bc", "--dataset-id", make_dataset(env=env), "--num-updates", "2", "--run-dir", str(tmp_path / "r")
    )
    assert run.returncode == 0 and "actions must be vectors of real numbers (a Box), not Discrete(2)" in run.stderr
    assert "training goes on without evaluation" in run.stderr


def test_a_wrapper_that_only_watches_does_not_matter(make_dataset):
    dataset_id = make_dataset(env=gym.wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1")).spec)
    assert len(make_environments(load_dataset(dataset_id), 1)) == 1


def test_data_that_do_not_fit_their_environment_are_trained_on_without_it(make_dataset, tmp_path):
    data = make_dataset(env="MountainCarContinuous-v0")
    words = ["--dataset-id", data, "--num-updates", "2", "--run-dir", str(tmp_path / "run")]
    ran = run_script("bc", *words)
    told = "training goes on without evaluation: MountainCarContinuous-v0 has 2 observed numbers and actions Box(-1"
    assert ran.returncode == 0 and told in ran.stderr and "the data 3, [-2.] to [2.]\n" in ran.stderr
    words[-1] += "2"
    pattern = "error: --env-id: MountainCarContinuous-v0 has 2 observed numbers"
    assert_one_line(run_script("bc", *words, "--env-id", "MountainCarContinuous-v0"), pattern)


def test_other_bounds_of_actions_are_told(make_dataset, capsys):
    dataset_id = make_dataset(action_space=gym.spaces.Box(-1, 1, (1,)))
    make_environments(load_dataset(dataset_id, "Pendulum-v1"), 1)
    warning = (
        "warning: Pendulum-v1 has 3 observed numbers and actions Box(-2.0, 2.0, (1,), float32), the data 3, [-1.] to"
    )
    assert warning in capsys.readouterr().err
    make_environments(load_dataset(make_dataset("test/same-v0"), "Pendulum-v1"), 1)
    assert not capsys.readouterr().err


class Broken(Countdown):
    answers = "raise"

    def step(self, action):
        observation, reward, *others = super().step(action)
        if self.answers == "raise":
            raise RuntimeError("sensor lost")
        if self.answers == "four":
            return observation, reward, others[0], {}
        return observation, np.nan, *others


@pytest.mark.parametrize(
    ("answers", "reason"),
    [("raise", "sensor lost"), ("four", "a real number, not 'dict'"), ("nan", "it gave what is not finite")],
)
def test_an_environment_that_fails_in_an_evaluation_is_one_line(answers, reason):
    environment = Broken()
    environment.answers = answers
    with pytest.raises(BadInput, match=f"the environment failed at step 1 of an episode: .*{reason}"):
        evaluate(lambda observations: np.zeros((1, 1), np.float32), [environment])


def test_a_policy_s_action_that_is_not_finite_is_not_the_environment_s_fault():
    with pytest.raises(Diverged, match="the action at step 1 of an episode is not finite"):
        evaluate(lambda observations: np.full((1, 1), np.nan, np.float32), [Countdown()])


@pytest.mark.parametrize(("name", "text"), [("mine", "x = 1"), ("mine.py", "import nobodys"), ("mine.py", "x = (")])
def test_a_file_that_is_no_script_is_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=f"cannot load {tmp_path / name}: "):
        load_script("iql", tmp_path / name)


def test_environment_of_another_size_is_refused(make_dataset):
    with pytest.raises(BadInput, match="MountainCarContinuous-v0 has"):
        make_environments(load_dataset(make_dataset(), "MountainCarContinuous-v0"), 1)


def test_normalised_score(pendulum: ReplayBuffer):
    low, high = pendulum.dataset.reference_returns
    assert [pendulum.dataset.score(value) for value in (low, (low + high) / 2, high)] == pytest.approx([0, 50, 100])


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ("fqe", *REMEMBER)])
def test_a_policy_is_a_whole_module(name, tmp_path):
    """In tensors as in arrays; in double precision; exported for batches of any size; all of it in its state_dict."""
    script = importlib.import_module(name)
    args = script.HyperParameters(hidden_dims=(8,), **({"vae_hidden_dims": (8,)} if name in ("bcq", "bear") else {}))
    policy = load_policy(save(make_policy(script, args), tmp_path))
    observations = np.random.default_rng(0).normal(size=(5, 3))
    expected, inputs = policy(observations), torch.from_numpy(observations)
    np.testing.assert_allclose(policy(inputs).detach(), expected, atol=1e-6)
    double = copy.deepcopy(policy).double()
    assert all(value.dtype in (torch.float64, torch.int64) for value in double.state_dict().values())
    np.testing.assert_allclose(double(observations), expected, atol=1e-5)
    rows = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(action="ignore"):
        exported = torch.export.export(policy, (inputs,), dynamic_shapes=(rows,)).module()
    np.testing.assert_allclose(exported(inputs[:3]).detach(), expected[:3], atol=1e-6)
    other = make_policy(script, args, seed=1).eval()
    other.load_state_dict(policy.state_dict())
    np.testing.assert_array_equal(other(observations), expected)


def test_a_policy_in_tensors_refuses_what_is_no_number(policy):
    with pytest.raises(BadInput, match="not a finite number"):
        policy(torch.full((2, 3), torch.nan))


def test_the_names_of_observations_are_in_the_policy(tmp_path, make_dataset):
    dataset_id = make_dataset()
    for names, expected in (
        (None, ["0", "1", "2"]),
        (["age", "dose", "pulse"], ["age", "dose", "pulse"]),
        (["a"], ["0", "1", "2"]),
    ):
        if names:
            minari.load_dataset(dataset_id).storage.update_metadata({"observation_names": names})
        folder = tmp_path / str(names)
        run = run_script("bc", "--dataset-id", dataset_id, "--num-updates", "2", *SHORT, "--run-dir", str(folder))
        assert run.returncode == 0, run.stderr
        assert load_policy(folder).origin["observation_names"] == expected


class Remembers(torch.nn.Module):
    """Acts by the rewards of the episode so far, and notes what it is told."""

    def __init__(self):
        super().__init__()
        self.sums, self.told = {}, []

    def follow(self, episodes, rewards):
        self.episodes = episodes
        for episode, reward in zip(episodes, rewards, strict=True):
            self.sums[episode] = 0.0 if reward is None else self.sums[episode] + reward

    def forward(self, observations):
        self.told.append((list(self.episodes), [self.sums[episode] for episode in self.episodes]))
        return torch.zeros(len(observations), 1)


class Pays(gym.Env):
    """The first three episodes of a copy have 2, 4 and 6 steps, of a reward of 1, 2, ... each."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-2, 2, (1,))
    episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_number = self.episode + 1, 0
        return np.zeros(3), {}

    def step(self, action):
        self.step_number += 1
        return np.zeros(3), float(self.step_number), self.step_number == 2 * (self.episode + 1), False, {}


def test_a_policy_with_a_memory_is_told_what_its_rows_are():
    actor = Remembers()
    policy = Policy(
        actor, torch.tensor([[0.0] * 3, [1.0] * 3]).double(), (np.float32([-2]), np.float32([2])), False, {}
    )
    returns, lengths = evaluate(policy, [Pays(), Pays()], num_episodes=3)
    assert lengths.tolist() == [2, 2, 4] and returns.tolist() == [3, 3, 10]
    assert actor.told == [([0, 1], [0, 0]), ([0, 1], [1, 1]), ([2], [0]), ([2], [1]), ([2], [3]), ([2], [6])]
