"""record.py: what a trained policy does becomes a dataset, with the densities of what it drew; all or nothing."""

import json
import math
import shutil

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from collect import roll_out
from conftest import assert_one_line, numpy_mlp, numpy_sample, run_script
from gymnasium.envs.classic_control import PendulumEnv
from record import noisy_behaviour

from common.data import load_dataset
from common.evaluation import Player, load_policy, make_environment, make_environments

SMALL = ["--num-updates", "3", "--hidden-dims", "16", "--eval-episodes", "1", "--final-eval-episodes", "1"]
GRAVITY = gym.spec("Pendulum-v1").to_json().replace('"kwargs": {}', '"kwargs": {"g": 5.0}')


@pytest.fixture(scope="module")
def runs(tmp_path_factory, datasets_path):
    """A function that gives the folder of a short run of a script."""
    root = tmp_path_factory.mktemp("runs")

    def run(algorithm, *words):
        if not (root / algorithm).exists():
            ran = run_script(algorithm, *SMALL, "--run-dir", str(root / algorithm), *words)
            assert ran.returncode == 0, ran.stderr
        return root / algorithm

    yield run
    shutil.rmtree(datasets_path / "recorded", ignore_errors=True)


def record(folder, name, *words):
    words = ["--policy-run-dir", str(folder), "--dataset-id", f"recorded/{name}-v0", "--steps", "250", *words]
    return run_script("record", *words)


def episodes_of(name):
    return list(minari.load_dataset(f"recorded/{name}-v0").iterate_episodes())


def test_without_noise_it_does_what_is_evaluated(runs, datasets_path):
    folder = runs("iql")  # which could sample
    ran = record(folder, "plain")
    assert ran.returncode == 0, ran.stderr
    assert "policy of AnchoRL's iql.py, without noise; 2 episodes, 400 steps, return -" in ran.stdout
    policy, episodes = load_policy(folder), episodes_of("plain")
    for episode in episodes:
        assert len(episode.rewards) == 200 and episode.truncations[-1] and not episode.terminations.any()
        np.testing.assert_allclose(episode.actions, policy(episode.observations[:-1]), atol=1e-5)
        assert "log_prob" not in (episode.infos or {})
    assert not np.array_equal(episodes[0].observations[0], episodes[1].observations[0])
    new, old = load_dataset("recorded/plain-v0"), load_dataset("anchorl/pendulum/mixed-v0")
    assert new.env_id == "Pendulum-v1" and new.reference_returns == old.reference_returns
    states = np.random.default_rng(0).normal(size=(5, 3))
    beside = load_policy(datasets_path / "recorded" / "plain-v0")
    np.testing.assert_array_equal(beside(states), policy(states))


def gaussian(actor, states, noise):
    """Actions that are drawn, and their log-densities, in [-1, 1]."""
    std = np.exp(actor.log_std.detach().numpy())
    drawn = np.tanh(numpy_mlp(actor.net, states)) + std * noise
    return drawn, (-0.5 * noise**2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(axis=1)


@pytest.mark.parametrize("algorithm", ["iql", "cql", "sac"])
def test_log_probabilities_are_of_what_was_drawn(algorithm, runs):
    """In the environment's units; actions beyond the bounds, which a tanh never draws, are cut."""
    folder = runs(algorithm, *({"cql": ["--num-samples", "2"], "sac": ["--random-steps", "200"]}.get(algorithm, [])))
    ran = record(folder, algorithm, "--sample", "--seed", "3")
    assert ran.returncode == 0, ran.stderr
    assert f"policy of AnchoRL's {algorithm}.py, sampling" in ran.stdout
    policy, generator = load_policy(folder), torch.Generator().manual_seed(3)
    mean, std = policy.normalization.numpy()
    assert (std == 1).all() == (algorithm == "sac")
    for episode in episodes_of(algorithm):
        states = (episode.observations[:-1] - mean) / std
        noise = torch.cat([torch.randn(1, 1, generator=generator) for _ in range(200)])
        if algorithm == "iql":
            actions, log_prob = gaussian(policy.actor, states, noise.numpy())
            assert (np.abs(actions) > 1).sum() > 20
        else:
            actions, log_prob = numpy_sample(policy.actor, states, noise)
        np.testing.assert_allclose(episode.actions, np.clip(2 * actions, -2, 2), atol=1e-4)
        np.testing.assert_allclose(episode.infos["log_prob"][:-1], log_prob - math.log(2), atol=1e-3)
        assert np.isnan(episode.infos["log_prob"][-1])


def test_noise_is_on_the_policys_actions(runs):
    """In half ranges; actions beyond the bounds are cut, and their log-densities are those of what was drawn."""
    folder = runs("td3_bc")
    ran = record(folder, "noise", "--noise", "0.5", "--seed", "3")
    assert ran.returncode == 0, ran.stderr
    assert "policy of AnchoRL's td3_bc.py, noise 0.5" in ran.stdout
    policy, generator = load_policy(folder), torch.Generator().manual_seed(3)
    with make_environment("Pendulum-v1") as environment:
        start = Player(environment, None, 3).observation  # the episodes are of the seed, too
    np.testing.assert_array_equal(episodes_of("noise")[0].observations[0], start)
    for episode in episodes_of("noise"):
        noise = torch.cat([torch.randn(1, 1, generator=generator) for _ in range(200)]).numpy()
        drawn = policy(episode.observations[:-1]) + 2 * 0.5 * noise  # Pendulum's torque is from -2 to 2
        assert (np.abs(drawn) > 2).any()
        np.testing.assert_allclose(episode.actions, np.clip(drawn, -2, 2), atol=1e-4)
        log_prob = -0.5 * noise[:, 0] ** 2 - 0.5 * math.log(2 * math.pi)  # of a normal with standard deviation 1
        np.testing.assert_allclose(episode.infos["log_prob"][:-1], log_prob, atol=1e-4)


def test_the_environment_is_the_datas_own(runs, make_dataset, tmp_path):
    """Made with the arguments that the dataset names, which the new one names, too."""
    data = make_dataset(eval_env=gym.envs.registration.EnvSpec.from_json(GRAVITY))
    ran = run_script("td3_bc", *SMALL, "--dataset-id", data, "--run-dir", str(tmp_path / "run"))
    assert ran.returncode == 0, ran.stderr
    ran = record(tmp_path / "run", "gravity")
    assert ran.returncode == 0 and "score" not in ran.stdout, ran.stderr
    dataset = load_dataset("recorded/gravity-v0")
    assert dataset.env_spec["kwargs"] == {"g": 5.0} and dataset.reference_returns is None
    (environment,) = make_environments(dataset, 1)
    episode = episodes_of("gravity")[0]
    environment.reset(seed=0)
    cos, sin, speed = episode.observations[0]
    environment.unwrapped.state = np.array([math.atan2(sin, cos), speed])
    observation, *_ = environment.step(episode.actions[0])
    np.testing.assert_allclose(observation, episode.observations[1], atol=1e-5)


def test_a_policy_that_was_kept(runs, tmp_path):
    folder = runs("td3_bc")
    shutil.copy(folder / "policy.pt", folder / "policy-2.pt")
    ran = record(folder / "policy-2.pt", "kept", "--steps", "10")
    assert ran.returncode == 0 and "policy-2 of AnchoRL's td3_bc.py" in ran.stdout, ran.stderr


def test_a_policy_with_a_memory_is_told_of_starts_and_rewards():
    class Remembering:
        def __init__(self):
            self.actor, self.told, self.action_range = self, [], torch.tensor([[-2.0], [2.0]])

        def follow(self, episodes, rewards):
            self.told.append((episodes, rewards))

        def __call__(self, observations):
            return observations[:, :1]

    policy = Remembering()
    with make_environment("Pendulum-v1") as environment:
        player = Player(environment, None, 0)
        episodes = [roll_out(noisy_behaviour(policy, 0, 0), player) for _ in range(2)]
    rewards = [reward for episode in episodes for reward in [None, *episode.rewards[:-1]]]
    assert policy.told == [([0], [reward]) for reward in rewards] and episodes[0].infos is None
    np.testing.assert_array_equal(episodes[1].actions, episodes[1].observations[:-1, :1])


class Breaking(PendulumEnv):
    def step(self, action):
        raise RuntimeError("a joint is broken")


def test_an_environment_that_fails_is_one_line_and_leaves_nothing(runs, datasets_path):
    gym.register("Breaking-v0", Breaking, max_episode_steps=5)
    ran = record(runs("td3_bc"), "broken", "--env-id", "Breaking-v0")
    gym.registry.pop("Breaking-v0")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.splitlines()[-1].endswith("the environment failed at step 1 of an episode: a joint is broken")
    assert not (datasets_path / "recorded" / "broken-v0").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sample"], "^error: --sample: the actor of td3_bc.py has no sample: take --noise$"),
        (["--noise", "-1"], r"--noise -1.0: must be in \[0, 10\]"),
        (["--noise", "0.1", "--sample"], "--noise 0.1: --sample has noise of its own"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must be in"),
        (["--dataset-id", "no id"], "--dataset-id no id: no Minari id"),
        (["--dataset-id", "anchorl/mine-v0"], "anchorl/ is for built-in datasets"),
        (["--policy-run-dir", "nowhere"], "^error: --policy-run-dir nowhere: no policy at nowhere/policy.pt"),
        (["--env-id", "MountainCarContinuous-v0"], "the policy has 3 observed numbers|has 2 observed numbers"),
        (["--env-id", "NoSuch-v0"], "environment 'NoSuch-v0'"),
    ],
)
def test_bad_input_is_one_line(words, message, runs):
    assert_one_line(record(runs("td3_bc"), "bad", *words), message)


def test_other_policies_and_runs_are_refused(runs, tmp_path):
    discrete = runs("fqi", "--dataset-id", "anchorl/cartpole/mixed-v0")
    assert_one_line(record(discrete, "bad"), "the policy's actions are numbers, and must be vectors")
    folder = shutil.copytree(runs("td3_bc"), tmp_path / "run")
    saved = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(saved | {"env_id": "mine:Mine-v0"}))
    assert_one_line(record(folder, "bad"), "give --env-id mine:Mine-v0 again, or another one: its module would be run")
    (folder / "args.json").write_text("{}")
    assert_one_line(record(folder, "bad"), "cannot read .*args.json: 'dataset_id'")
    (folder / "args.json").unlink()
    assert_one_line(record(folder, "bad"), "cannot read .*args.json")


def test_an_environment_of_other_bounds_is_refused(runs):
    class Strong(PendulumEnv):
        def __init__(self):
            super().__init__()
            self.action_space = gym.spaces.Box(-3, 3, (1,))

    gym.register("Strong-v0", Strong, max_episode_steps=5)
    ran = record(runs("td3_bc"), "bad", "--env-id", "Strong-v0")
    gym.registry.pop("Strong-v0")
    assert ran.returncode == 2 and "warning: Strong-v0 has 3 observed numbers and actions Box(-3.0, 3.0" in ran.stderr
    assert "the policy's range of actions is not that of Strong-v0" in ran.stderr.splitlines()[-1]
