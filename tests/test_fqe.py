"""FQE's loss and bootstrap against NumPy on small numbers, a chain whose values are known, and its run folder."""

import csv
import json
import shutil

import fqe
import fqi
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SHORT,
    assert_one_line,
    assert_same,
    checkpoint,
    random_batch,
    random_episode,
    run_script,
    write_policy,
)
from torch import nn

from common.data import BUILT_IN_DISCRETE_ID, ReplayBuffer, load_dataset
from common.evaluation import Policy, evaluate, load_policy
from common.optim import Adam, compiled

CPU = torch.device("cpu")
SIZES = {"observation_space": gym.spaces.Box(-9, 9, (5,)), "action_space": gym.spaces.Box(-1, 1, (1,))}
CHOICES = SIZES | {"action_space": gym.spaces.Discrete(2, start=3)}  # 3 is to the left, 4 to the right


@pytest.fixture
def args():
    return fqe.Args(hidden_dims=(5, 4), num_members=3, policy_run_dir="run")


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    return fqe.build(3, 2, args, CPU, Adam)


def member_batch(num_members=3):
    """A batch for each member."""
    batches = [random_batch()._replace(rewards=torch.arange(8.0) + 10 * member) for member in range(num_members)]
    next_actions = torch.linspace(-1, 1, num_members * 16).view(-1, 8, 2)
    return fqe.Batch(*map(torch.stack, zip(*batches, strict=True)), next_actions)


def numpy_member(critic, member, observations, actions):
    x = np.concatenate([observations, actions], axis=1).astype(np.float64)
    for index, layer in enumerate(critic.layers):
        x = x @ layer.weight[member].detach().numpy() + layer.bias[member].detach().numpy()
        if index < len(critic.layers) - 1:
            mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
            x = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)
    return x[:, 0]


def write_choice(folder, observation_dim, preferences, first=0):
    """A run folder that holds a policy of fqi.py alone, which prefers the same of its actions everywhere."""
    actor = fqi.Actor(observation_dim, len(preferences), fqi.HyperParameters(hidden_dims=()))
    with torch.no_grad():
        actor.critic.net[0].weight.zero_()
        actor.critic.net[0].bias.copy_(torch.tensor(preferences))
    bounds = np.array([[first], [first + len(preferences) - 1]])
    folder.mkdir()
    with (folder / "policy.pt").open("wb") as file:
        origin = {"script": "fqi", "hyper_parameters": {"hidden_dims": ()}}
        Policy(actor, torch.ones(2, observation_dim), bounds, True, origin).save(file)
    return str(folder)


# --- Loss ---


def test_critic_loss(learner):
    """Every member has transitions, a target network and a target of its own."""
    with torch.no_grad():
        for parameter in learner.target_critic.parameters():  # so that it differs from the critic
            parameter.add_(torch.randn_like(parameter))
    batch = member_batch()
    loss, _ = fqe.critic_loss(learner, batch, gamma=0.9)
    expected = 0.0
    for member in range(3):
        parts = (part[member].numpy() for part in batch)
        observations, actions, rewards, next_observations, terminations, next_actions = parts
        next_q = numpy_member(learner.target_critic, member, next_observations, next_actions)
        target = rewards + 0.9 * np.where(terminations == 1, 0, next_q)
        expected += np.mean((target - numpy_member(learner.critic, member, observations, actions)) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_no_member_sees_anothers_data(learner):
    batch = member_batch()
    gradients = []
    for bonus in (0, 100):  # for the last member
        batch.rewards[2] += bonus
        learner.optimizer.zero_grad()
        fqe.critic_loss(learner, batch, gamma=0.9)[0].backward()
        gradients.append(learner.critic.layers[0].weight.grad)
    changed = (gradients[0] != gradients[1]).flatten(1).any(dim=1)
    assert changed.tolist() == [False, False, True]


def test_update_moves_the_targets_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    fqe.update(learner, member_batch(), 1, args)
    after, online = learner.target_critic.parameters(), learner.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        assert not torch.equal(target, old)
        torch.testing.assert_close(new, old + args.tau * (target - old))


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones():
    torch.set_default_dtype(torch.float64)
    try:
        finals = []
        for compile in (False, True):
            args = fqe.Args(hidden_dims=(16, 16), compile=compile, num_members=3)
            torch.manual_seed(0)
            learner = fqe.build(3, 2, args, CPU, Adam)
            train = compiled(fqe.update, learner, args)
            batch = fqe.Batch(*(part.double() for part in member_batch()))
            for step in range(1, 31):
                train(learner, batch, step, args)
            finals.append(list(learner.target_critic.parameters()))
    finally:
        torch.set_default_dtype(torch.float32)
    for eager, graph in zip(*finals, strict=True):
        torch.testing.assert_close(eager, graph, atol=1e-9, rtol=1e-7)


# --- Bootstrap and interval ---


@pytest.fixture
def uneven(make_dataset):
    """Five episodes of 1 to 5 steps; the observations tell episode and step."""
    episodes = []
    for number in range(5):
        length = number + 1
        observations = np.zeros((length + 1, 5), dtype=np.float32)
        observations[:, 0], observations[:, 1] = number, np.arange(length + 1)
        flags = np.arange(length) == number
        fields = {"rewards": np.ones(length), "terminations": ~flags & flags, "truncations": flags}
        episodes.append({"observations": observations, "actions": np.zeros((length, 1), dtype=np.float32)} | fields)
    return ReplayBuffer(load_dataset(make_dataset(episodes=episodes, **SIZES)), CPU, normalize_observations=False)


def test_members_sample_the_transitions_of_their_own_episodes_uniformly(uneven):
    torch.manual_seed(1)
    bootstrap = fqe.Bootstrap(uneven.episode_starts, uneven.episode_lengths, num_members=4)
    rows = bootstrap.sample(40_000)
    assert bootstrap.counts.sum(dim=1).tolist() == [5] * 4
    assert len({tuple(counts.tolist()) for counts in bootstrap.counts}) > 1
    for member in range(4):
        weights = torch.repeat_interleave(bootstrap.counts[member], uneven.episode_lengths)
        found = torch.bincount(rows[member], minlength=15) / 40_000
        torch.testing.assert_close(found.double(), weights / weights.sum(), atol=0.015, rtol=0)
        assert bool((found[weights == 0] == 0).all())


def test_estimates_are_means_over_each_members_initial_states(uneven):
    torch.manual_seed(0)
    critic = fqe.Critic(5, 1, fqe.HyperParameters(num_members=3, hidden_dims=(4,)))
    bootstrap = fqe.Bootstrap(uneven.episode_starts, uneven.episode_lengths, 3)
    observations = uneven.transitions.observations[uneven.episode_starts]
    actions = torch.linspace(-1, 1, 5).unsqueeze(1)
    found = fqe.estimates(critic, observations, actions, bootstrap.counts)
    for member in range(3):
        q = numpy_member(critic, member, observations.numpy(), actions.numpy())
        drawn = np.repeat(np.arange(5), bootstrap.counts[member].long().numpy())
        assert float(found[member]) == pytest.approx(q[drawn].mean(), rel=1e-5)


@pytest.mark.parametrize(("degrees", "tabulated"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (99, 1.984)])
def test_students_quantile(degrees, tabulated):
    assert fqe.student_quantile(0.975, degrees) == pytest.approx(tabulated, abs=6e-4)


@pytest.mark.parametrize("num_members", [2, 5])
def test_the_interval_covers_as_often_as_it_says(num_members):
    """Where the data's estimate is off the truth, 0, as far as the members are off that estimate."""
    torch.manual_seed(0)
    found = [fqe.interval(torch.randn(1) + torch.randn(num_members)) for _ in range(2000)]
    covered = [point["fqe/low"] <= 0 <= point["fqe/high"] for point in found]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_the_interval_by_hand():
    found = fqe.interval(torch.tensor([1.0, 2.0, 3.0]))  # std 1, t 4.303
    half_width = 4.303 * np.sqrt(4 / 3)
    assert list(found.values()) == pytest.approx([2, 2 - half_width, 2 + half_width], abs=1e-3)


# --- The policy ---


def test_the_policy_acts_in_the_buffers_units(pendulum):
    torch.manual_seed(0)
    actor = nn.Sequential(nn.Linear(3, 1), nn.Tanh())
    bounds = np.array([[-2.0], [2.0]], dtype=np.float32)
    policy = Policy(actor, torch.tensor([[1.0, 2, 3], [4.0, 5, 6]]), bounds, False, {})
    episode = next(pendulum.dataset.read_episodes())
    found = fqe.act(policy, pendulum.transitions.observations[: len(episode.rewards)], pendulum)
    np.testing.assert_allclose(2 * found.numpy(), policy(episode.observations), atol=1e-5)


def test_a_policy_of_discrete_actions_acts_in_the_buffers_units(cartpole):
    actor = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        actor.weight.copy_(torch.tensor([[0.0, 0, -1, -1], [0, 0, 1, 1]]))  # towards where the pole falls
    normalization = torch.tensor([[0.5, 0.1, 0.02, -0.2], [0.3, 2.0, 0.1, 3.0]])
    policy = Policy(actor, normalization, np.array([[0], [1]]), True, {})
    observations = np.concatenate([episode.observations for episode in cartpole.dataset.read_episodes()])
    expected = policy(observations)
    assert 0.2 < expected.mean() < 0.8
    found = fqe.act(policy, cartpole.transitions.observations, cartpole)
    assert found.sum(dim=1).eq(1).all()
    assert np.mean(found.argmax(dim=1).numpy() == expected) > 0.9999  # but where two are as good, to float32


def test_a_policy_takes_no_action_that_the_mask_forbids(make_dataset):
    """The last of three actions is preferred everywhere, and legal in every other state."""
    masks = np.tile(np.array([[1, 1, 0], [1, 0, 1]], np.int8), (16, 1))[:31]
    episodes = [random_episode(seed, observation_dim=1) for seed in range(2)]
    for episode in episodes:
        episode["observations"] = {"action_mask": masks, "x": episode["observations"]}
        episode["actions"] = np.zeros(30, dtype=np.int64)
    space = gym.spaces.Dict({"action_mask": gym.spaces.MultiBinary(3), "x": gym.spaces.Box(-np.inf, np.inf, (1,))})
    dataset_id = make_dataset(episodes=episodes, observation_space=space, action_space=gym.spaces.Discrete(3))
    buffer = ReplayBuffer(load_dataset(dataset_id, discrete=True), CPU)
    actor = fqi.Actor(4, 3, fqi.HyperParameters(hidden_dims=(), legal_actions=True))
    with torch.no_grad():
        actor.critic.net[0].weight.zero_()
        actor.critic.net[0].bias.copy_(torch.arange(3.0))
    policy = Policy(actor, buffer.normalization, np.array([[0], [2]]), True, {})
    found = fqe.act(policy, buffer.transitions.observations[:30], buffer)
    assert found.argmax(dim=1).tolist() == [1, 2] * 15


def test_the_copy_of_a_policy_is_the_policy(tmp_path):
    for algorithm in ("bc", "bcq"):
        run_script(algorithm, "--num-updates", "2", "--run-dir", str(tmp_path / algorithm), *SHORT)
        policy = load_policy(tmp_path / algorithm)
        (tmp_path / f"{algorithm}-copy").mkdir()
        with (tmp_path / f"{algorithm}-copy" / "policy.pt").open("wb") as file:
            policy.save(file)
        observations = np.random.default_rng(0).normal(size=(20, 3))
        np.testing.assert_array_equal(load_policy(tmp_path / f"{algorithm}-copy")(observations), policy(observations))


# --- A known answer ---

NUM_STATES, GAMMA = 5, 0.9


def chain_episode(rng):
    """Random steps on 0 to 4: -0.1 for each, and 1 for the one that reaches 4, which ends it; 12 steps at most."""
    state = int(rng.integers(NUM_STATES - 1))
    states, actions, rewards = [state], [], []
    while state < NUM_STATES - 1 and len(actions) < 12:
        action = int(rng.choice([-1, 1]))
        state = max(state + action, 0)
        states.append(state)
        actions.append([action])
        rewards.append(1.0 if state == NUM_STATES - 1 else -0.1)
    ended = np.arange(len(actions)) == len(actions) - 1
    return {
        "observations": np.eye(NUM_STATES, dtype=np.float32)[states],
        "actions": np.array(actions, dtype=np.float32),
        "rewards": np.array(rewards),
        "terminations": ended & (state == NUM_STATES - 1),
        "truncations": ended & (state < NUM_STATES - 1),
    }


def chain_value(right, state):
    """V^pi(state) of the policy that always steps right, or always left."""
    if not right:
        return -0.1 / (1 - GAMMA)  # for ever: a truncation is no end
    return sum(GAMMA**step * -0.1 for step in range(3 - state)) + GAMMA ** (3 - state)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("right", [True, False])
def test_the_value_of_a_policy_on_a_chain(right, discrete, make_dataset, tmp_path):
    rng = np.random.default_rng(0)
    episodes = [chain_episode(rng) for _ in range(200)]
    if discrete:
        choices = [{"actions": 3 + (episode["actions"][:, 0] > 0).astype(np.int64)} for episode in episodes]
        dataset_id = make_dataset(episodes=list(map(dict.__or__, episodes, choices)), **CHOICES)
        policy = write_choice(tmp_path / "policy", 5, [0.0, 1.0] if right else [1.0, 0.0], first=3)
    else:
        dataset_id = make_dataset(episodes=episodes, **SIZES)
        policy = write_policy(tmp_path / "policy", 5, 0.9999 if right else -0.9999, -1, 1)
    arguments = ["--dataset-id", dataset_id, "--policy-run-dir", policy, "--gamma", str(GAMMA), "--hidden-dims", "32"]
    arguments += ["--critic-learning-rate", "3e-3", "--num-updates", "1500", "--batch-size", "64"]
    run = run_script("fqe", *arguments, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    in_the_data = np.mean([chain_value(right, episode["observations"][0].argmax()) for episode in episodes])
    assert result["estimate"] == pytest.approx(in_the_data, abs=0.03)
    low, high = result["interval"]
    if right:  # the data's initial states are a sample: of all of them, the mean is
        assert low < np.mean([chain_value(right, state) for state in range(4)]) < high
    else:  # every state is worth the same
        assert high - low < 0.05
    assert len(set(result["member_estimates"])) == 5
    assert result["true_return_mean"] is None
    assert "no environment to compare with" in run.stdout
    assert "warning" not in run.stderr  # to have none is what FQE is for


# --- The built-in data ---

SMALL = ["--hidden-dims", "64", "64", "--eval-every", "100000", "--eval-episodes", "1"]
CLONING = ["--num-updates", "1000", "--learning-rate", "1e-3"]
TRAININGS = {  # from the worst policy to the best
    "random": ["--num-updates", "1"],
    "average": CLONING,
    "best": [*CLONING, "--top-fraction", "0.2"],
}
EVALUATION = ["--gamma", "0.98", "--num-members", "3", "--tau", "0.2", "--critic-learning-rate", "2e-3"]
EVALUATION += ["--num-updates", "600", "--batch-size", "128"]


def pendulum_returns(policy, observations, gamma, num_steps):
    """Discounted returns from each of the initial `observations`, by the equations that Pendulum-v1 documents."""
    cos, sin, speed = observations.T
    angle, returns = np.arctan2(sin, cos), np.zeros(len(observations))
    for step in range(num_steps):
        torque = policy(np.stack([np.cos(angle), np.sin(angle), speed], axis=1))[:, 0]
        from_upright = (angle + np.pi) % (2 * np.pi) - np.pi
        returns -= gamma**step * (from_upright**2 + 0.1 * speed**2 + 0.001 * torque**2)
        speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
        angle = angle + 0.05 * speed
    return returns


def test_policies_are_ranked_as_their_true_returns_are(tmp_path, pendulum):
    """From the data's own initial states. Short trainings; benchmarks/results/ has full ones, three seeds of each."""
    initial = np.stack([episode.observations[0] for episode in pendulum.dataset.read_episodes()])
    estimates, truths = [], []
    for name, arguments in TRAININGS.items():
        policy, folder = str(tmp_path / name), tmp_path / f"fqe-{name}"
        run = run_script("bc", *SMALL, *arguments, "--run-dir", policy)
        assert run.returncode == 0, run.stderr
        run = run_script("fqe", *SMALL, *EVALUATION, "--policy-run-dir", policy, "--run-dir", str(folder))
        assert run.returncode == 0, run.stderr
        estimates.append(json.loads((folder / "result.json").read_text())["estimate"])
        truths.append(pendulum_returns(load_policy(policy), initial, 0.98, 400).mean())
    assert truths == sorted(truths)
    assert estimates == sorted(estimates)
    np.testing.assert_allclose(estimates, truths, rtol=0.35)


def test_a_policy_of_discrete_actions(make_dataset, tmp_path):
    """Action 1 earns 2 at once, and the episode ends: the policy takes it, and is worth 2, where the data average 1."""
    rewards = [0.0, 2.0, 1.0]
    ends = {"terminations": np.ones(1, bool), "truncations": np.zeros(1, bool)}
    episodes = [
        random_episode(seed, 1, actions=np.array([seed % 3]), rewards=np.array([rewards[seed % 3]]), **ends)
        for seed in range(60)
    ]
    dataset_id = make_dataset("test/choices-v0", episodes, action_space=gym.spaces.Discrete(3))
    policy, few = (
        str(tmp_path / "policy"),
        ["--hidden-dims", "32", "--critic-learning-rate", "3e-3", "--tau", "0.5", "--gamma", "0.5"],
    )
    arguments = ["--dataset-id", dataset_id, "--num-updates", "300", *few]
    run = run_script("fqi", *arguments, "--run-dir", policy)
    assert run.returncode == 0, run.stderr
    run = run_script("fqe", *arguments, "--policy-run-dir", policy, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["estimate"] == pytest.approx(2.0, abs=0.1)
    arguments = ["--num-updates", "2", "--policy-run-dir", policy, "--run-dir", str(tmp_path / "other")]
    assert_one_line(
        run_script("fqe", *arguments), "the policy has discrete actions, anchorl/pendulum/mixed-v0 has cont"
    )


# --- The run folder ---


def test_run_folder(tmp_path, monkeypatch):
    seen, estimates = [], fqe.estimates
    monkeypatch.setattr(fqe, "estimates", lambda critic, *rest: (seen.append(critic), estimates(critic, *rest))[1])
    folder, policy = tmp_path / "run", write_policy(tmp_path / "policy")
    arguments = ["--policy-run-dir", policy, "--num-updates", "50", "--eval-every", "20", "--log-every", "10", *SHORT]
    run = run_script("fqe", *arguments, "--run-dir", str(folder), plot=True)
    assert run.returncode == 0, run.stderr
    expected = {"args.json", "metrics.csv", "checkpoint.pt", "policy.pt", "result.json", "learning_curve.png"}
    assert {path.name for path in folder.iterdir()} == expected | {".lock"}
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50]
    assert [bool(row["fqe/estimate"]) for row in rows] == [False, True, False, True, True]
    assert not any(name.startswith("eval/") for name in rows[0])
    result = json.loads((folder / "result.json").read_text())
    found = [result["interval"][0], result["estimate"], result["interval"][1]]
    assert found == pytest.approx([float(rows[-1][f"fqe/{name}"]) for name in ("low", "estimate", "high")])
    assert result["estimate"] == pytest.approx(np.mean(result["member_estimates"]))
    assert_same(checkpoint(folder)["learner"]["target_critic"], dict(seen[-1].state_dict()))
    environments = [gym.make("Pendulum-v1", max_episode_steps=688) for _ in range(2)]  # 0.99^688 < 0.001
    returns, _ = evaluate(load_policy(folder), environments, gamma=0.99)
    assert (result["true_return_mean"], result["true_return_std"]) == pytest.approx((returns.mean(), returns.std()))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert run.stderr.count("warning: --num-updates 50: ") == 1 and "ask for 6,000 or more" in run.stderr
    words = f"in the environment {returns.mean():.1f} (standard error {returns.std():.1f})"  # of two: std / sqrt(2 - 1)
    assert "estimate" in run.stdout and words in run.stdout


def test_discrete_actions_in_the_environment(tmp_path):
    """That pushes always to the right: the cart falls within some steps."""
    policy, folder = write_choice(tmp_path / "policy", 4, [0.0, 1.0]), tmp_path / "run"
    arguments = ["--dataset-id", BUILT_IN_DISCRETE_ID, "--policy-run-dir", policy, "--num-updates", "600", *SHORT]
    arguments += ["--gamma", "0.9", "--critic-learning-rate", "3e-3", "--tau", "0.1", "--run-dir", str(folder)]
    run = run_script("fqe", *arguments)
    assert run.returncode == 0, run.stderr
    result = json.loads((folder / "result.json").read_text())
    environments = [gym.make("CartPole-v1") for _ in range(2)]
    assert result["true_return_mean"] == pytest.approx(evaluate(load_policy(folder), environments, gamma=0.9)[0].mean())
    assert 5 < result["true_return_mean"] < 7  # of 10 that a pole would earn that never falls
    assert 4 < result["estimate"] < 8.5
    assert "warning" not in run.stderr


@pytest.mark.parametrize("discrete", [False, True])
def test_a_resumed_run_has_the_policy_it_started_with(discrete, tmp_path):
    """The folder that it came from may be gone by then."""
    policy = write_choice(tmp_path / "policy", 4, [0.0, 1.0]) if discrete else write_policy(tmp_path / "policy")
    arguments = ["--policy-run-dir", policy, *SHORT, "--log-every", "5"]
    arguments += ["--dataset-id", BUILT_IN_DISCRETE_ID] if discrete else []
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_script("fqe", "--num-updates", "20", *arguments, "--run-dir", str(whole)).returncode == 0
    assert run_script("fqe", "--num-updates", "10", *arguments, "--run-dir", str(stopped)).returncode == 0
    (tmp_path / "policy" / "policy.pt").unlink()
    run = run_script("fqe", "--resume", "--num-updates", "20", *arguments, "--run-dir", str(stopped))
    assert run.returncode == 0, run.stderr
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, stopped)]
    assert results[0]["member_estimates"] == results[1]["member_estimates"]
    run = run_script("fqe", *arguments, "--resume", "--run-dir", str(stopped), "--policy-run-dir", "other")
    assert_one_line(run, "policy_run_dir is .*, not other")
    again = ["--resume", "--num-updates", "30", *arguments, "--run-dir", str(stopped), "--policy-run-dir", f"{policy}/"]
    assert run_script("fqe", *again).returncode == 0  # as a shell completes it


def test_a_run_that_was_killed_before_it_copied_the_policy_can_be_resumed(tmp_path):
    arguments = ["--policy-run-dir", write_policy(tmp_path / "policy"), *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("fqe", "--num-updates", "10", *arguments).returncode == 0
    (tmp_path / "run" / "policy.pt").unlink()
    run = run_script("fqe", "--resume", "--num-updates", "20", *arguments)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "policy.pt").is_file()


def test_no_run_folder_names_a_script_that_is_run(tmp_path, monkeypatch):
    """To resume a run whose policy is of a user's own script, the script is named again."""
    monkeypatch.syspath_prepend(tmp_path)
    script = shutil.copy(ROOT / "algorithms" / "bc.py", tmp_path / "my_bc.py")
    few = ["--num-updates", "2", *SHORT, "--run-dir"]
    assert run_script("my_bc", *few, str(tmp_path / "policy")).returncode == 0
    arguments = ["--policy-run-dir", str(tmp_path / "policy"), "--policy-script", str(script)]
    run = run_script("fqe", *arguments, *few, str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    resume = [*arguments[:2], *SHORT, "--resume", "--num-updates", "4", "--run-dir", str(tmp_path / "run")]
    refused = run_script("fqe", *resume)
    assert_one_line(refused, r"error: --resume: no script .*my_bc.py: give its path \(--policy-script\)")
    shutil.move(script, tmp_path / "moved.py")  # it may be elsewhere by now
    run = run_script("fqe", *resume, "--policy-script", str(tmp_path / "moved.py"))
    assert run.returncode == 0, run.stderr


def test_discounted_returns():
    class Ones(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, **_):
            self.steps = 0
            return np.zeros(1), {}

        def step(self, _):
            self.steps += 1
            return np.zeros(1), 1.0, self.steps == 3, False, {}

    np.testing.assert_allclose(evaluate(lambda rows: rows, [Ones(), Ones()], gamma=0.5)[0], [1.75, 1.75])


def test_an_environment_that_is_not_installed_is_one_warning(make_dataset, datasets_path, tmp_path):
    path = datasets_path / (dataset_id := make_dataset(env="Pendulum-v1")) / "data" / "metadata.json"
    path.write_text(path.read_text().replace("Pendulum-v1", "NotInstalled-v0"))
    arguments = ["--policy-run-dir", write_policy(tmp_path / "policy"), "--gamma", "0.1", "--num-updates", "100"]
    arguments += [*SHORT, "--dataset-id", dataset_id, "--run-dir", str(tmp_path / "run")]
    run = run_script("fqe", *arguments)
    assert run.returncode == 0, run.stderr
    assert (
        run.stderr.count("warning") == 1
        and "the estimate is compared with nothing: environment 'NotInstalled-v0' is not installed" in run.stderr
    )
    assert "no environment to compare with" in run.stdout


# --- Bad input ---


def assert_refused(tmp_path, pattern, *arguments):
    assert_one_line(run_script("fqe", *arguments, "--run-dir", str(tmp_path / "run")), pattern)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("policy", "pattern"),
    [
        (None, "error: --policy-run-dir is needed"),
        ("none", "error: --policy-run-dir .*: no policy at "),
        ("junk", "error: --policy-run-dir .*: cannot read "),
        ("wide", r"error: --policy-run-dir .*: the policy has observation and action sizes \(7, 1\), .* has \(3, 1\)"),
        ("discrete", "error: --policy-run-dir .*: the policy has discrete actions"),
        ("range", "error: --policy-run-dir .*: the policy's range of actions is not that of anchorl/pendulum/mixed-v0"),
    ],
)
def test_a_policy_that_cannot_be_evaluated(policy, pattern, tmp_path):
    write_policy(tmp_path / "wide", observation_dim=7)
    write_policy(tmp_path / "range", high=1.0)
    write_choice(tmp_path / "discrete", 3, [0.0, 1.0])
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "policy.pt").write_bytes(b"junk")
    assert_refused(tmp_path, pattern, *([] if policy is None else ["--policy-run-dir", str(tmp_path / policy)]))


def test_a_policy_of_other_columns_than_the_data(make_dataset, datasets_path, tmp_path):
    def data(name, *names):
        dataset_id = make_dataset(f"test/{name}-v0")
        path = datasets_path / dataset_id / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | ({"observation_names": names} if names else {})))
        return ["--dataset-id", dataset_id, "--num-updates", "1", "--num-members", "2"]

    run = str(tmp_path / "run")
    assert run_script("bc", *data("one", "hot", "cold", "wet")[:4], "--run-dir", run).returncode == 0
    swapped = [*data("two", "cold", "hot", "wet"), "--policy-run-dir", run]
    assert_refused(
        tmp_path / "fqe",
        r"its observations are .'hot', 'cold', 'wet'., those of test/two-v0 .'cold', 'hot', 'wet'.",
        *swapped,
    )
    untold = [*data("three"), "--policy-run-dir", run, "--run-dir", str(tmp_path / "fqe")]
    assert run_script("fqe", *untold).returncode == 0


@pytest.mark.parametrize(
    ("policy", "pattern"),
    [
        ("continuous", "the policy has continuous actions, anchorl/cartpole/mixed-v0 has discrete actions"),
        ("three", "the policy's range of actions is not that of anchorl/cartpole/mixed-v0"),
        ("later", "the policy's range of actions is not that of anchorl/cartpole/mixed-v0"),
    ],
)
def test_a_policy_of_other_choices_than_the_data(policy, pattern, tmp_path):
    write_policy(tmp_path / "continuous", observation_dim=4)
    write_choice(tmp_path / "three", 4, [0.0, 1.0, 2.0])
    write_choice(tmp_path / "later", 4, [0.0, 1.0], first=1)
    arguments = ["--dataset-id", BUILT_IN_DISCRETE_ID, "--policy-run-dir", str(tmp_path / policy)]
    assert_refused(tmp_path, f"error: --policy-run-dir .*: {pattern}", *arguments)


def test_data_that_cannot_evaluate(make_dataset, tmp_path):
    arguments = ["--policy-run-dir", write_policy(tmp_path / "policy")]
    dataset_id = make_dataset(episodes=[random_episode(0)])
    assert_refused(tmp_path, f"error: {dataset_id} holds one episode", *arguments, "--dataset-id", dataset_id)
    arguments += ["--env-id", "MountainCarContinuous-v0"]
    assert_refused(tmp_path, "error: --env-id: MountainCarContinuous-v0 has", *arguments)
