"""OPE's estimators on a small MDP whose values are known, its losses against NumPy, and its numbers end to end."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import ope
import pytest
import torch
from conftest import SHORT, assert_one_line, random_episode, run_script, write_policy

from common.command_line import BadInput
from common.data import load_dataset

# --- A small MDP ---

GAMMA = 0.9
NEXT = np.array([[[0.1, 0.6, 0.3], [0.5, 0.1, 0.4]], [[0.3, 0.2, 0.5], [0.1, 0.8, 0.1]], [[0.6, 0.2, 0.2]] * 2])
REWARDS = np.array([[1.0, -1.0], [0.5, 2.0], [3.0, -2.0]])  # [states, actions]
ENDS = np.array([[0.25, 0.4], [0.3, 0.35], [0.35, 0.25]])  # the chance of a termination
FIRST = np.array([0.6, 0.3, 0.1])  # the chance of each initial state
TARGET = np.array([0, 1, 0])  # the action that pi takes in each state
BEHAVIOUR = np.array([[0.9, 0.1], [0.3, 0.7], [0.75, 0.25]])
WRONG = np.array([[0.7, 0.3], [0.05, 0.95], [0.95, 0.05]])
PI = np.eye(2)[TARGET]


def exact(policy, steps=None):
    """Q and V of action probabilities; `steps` counts the rewards alone that come before a cut."""
    go_on = NEXT * (1 - ENDS)[:, :, None]
    v, q = np.zeros(3), REWARDS
    if steps is None:
        v = np.linalg.solve(np.eye(3) - GAMMA * np.einsum("sa,sax->sx", policy, go_on), (policy * REWARDS).sum(axis=1))
        return REWARDS + GAMMA * go_on @ v, v
    for _ in range(steps):
        q = REWARDS + GAMMA * go_on @ v
        v = (policy * q).sum(axis=1)
    return q, v


Q, V = exact(PI)
VALUE = FIRST @ V


def simulate(episodes, steps, seed=0):
    """States [E, T + 1], actions, terminations, and whether a step is of the episode, [E, T], under BEHAVIOUR."""
    rng = np.random.default_rng(seed)
    states, actions = np.zeros((episodes, steps + 1), int), np.zeros((episodes, steps), int)
    terminations, lived = np.zeros((episodes, steps), bool), np.zeros((episodes, steps), bool)
    states[:, 0] = rng.choice(3, episodes, p=FIRST)
    alive = np.ones(episodes, bool)
    for step in range(steps):
        s = states[:, step]
        lived[:, step] = alive
        a = actions[:, step] = rng.random(episodes) > BEHAVIOUR[s, 0]
        terminations[:, step] = alive & (rng.random(episodes) < ENDS[s, a.astype(int)])
        further = NEXT[s, a.astype(int)].cumsum(axis=1)
        states[:, step + 1] = (rng.random((episodes, 1)) > further).sum(axis=1).clip(max=2)
        alive = alive & ~terminations[:, step]
    return states, actions, terminations, lived


def tables(simulated, behaviour=BEHAVIOUR, q=Q, v=V):
    """What the estimators take."""
    states, actions, terminations, lived = simulated
    s = states[:, :-1]
    with np.errstate(divide="ignore"):
        ratios = np.where(lived, np.log(PI[s, actions]) - np.log(behaviour[s, actions]), 0)
    follows = np.concatenate([np.ones_like(lived[:, :1]), lived & ~terminations], axis=1)  # s_t has a value
    known = {"rewards": REWARDS[s, actions] * lived, "q": q[s, actions] * lived, "v": v[states] * follows}
    return {name: torch.from_numpy(each) for name, each in known.items()} | {
        "rho": ope.cumulative_ratios(torch.from_numpy(ratios)),
        "gamma": GAMMA,
    }


def estimates(known):
    """is, wis and wdr."""
    ones = torch.ones(1, len(known["rho"]), dtype=torch.float64)
    plain = {name: known[name] for name in ("rho", "rewards", "gamma")}
    found = ope.is_estimate(ones, **plain), ope.wis_estimate(ones, **plain), ope.wdr_estimate(ones, **known)
    return np.array([float(each) for each in found])


@pytest.fixture(scope="module")
def ended():
    """Episodes that all terminate."""
    simulated = simulate(20_000, 80)
    assert simulated[2].any(axis=1).all()
    return simulated


def test_is_is_unbiased(ended):
    known = tables(ended)
    each = (known["rho"] * known["rewards"]).numpy() @ GAMMA ** np.arange(80)
    found = estimates(known)[0]
    assert found == pytest.approx(each.mean())
    assert abs(found - VALUE) < 4 * each.std() / np.sqrt(len(each))
    assert abs(FIRST @ exact(BEHAVIOUR)[1] - VALUE) > 10 * each.std() / np.sqrt(len(each))  # it is not the data's


def test_wis_and_wdr_come_to_the_value(ended):
    _, wis, wdr = estimates(tables(ended))
    assert wis == pytest.approx(VALUE, abs=0.1)
    assert wdr == pytest.approx(VALUE, abs=0.05)


def test_wdr_needs_either_q_or_the_propensities(ended):
    found = estimates(tables(ended, WRONG))
    assert found[2] == pytest.approx(VALUE, abs=0.05)
    assert (abs(found[:2] - VALUE) > 0.3).all()  # is and wis have nothing else
    q = Q + 2 * REWARDS - 3
    wrong = {"q": q, "v": (PI * q).sum(axis=1)}
    assert estimates(tables(ended, **wrong))[2] == pytest.approx(VALUE, abs=0.15)
    assert abs(estimates(tables(ended, WRONG, **wrong))[2] - VALUE) > 0.3  # neither


def test_errors_shrink_with_more_episodes():
    errors = []
    for episodes in (50, 800):
        found = [estimates(tables(simulate(episodes, 60, seed))) for seed in range(40)]
        errors.append(abs(np.array(found) - VALUE).mean(axis=0))
    assert (errors[1] < errors[0] / 2).all()  # by the square root of 16 in the limit


def test_beyond_a_cut_wdr_knows_what_is_does_not():
    steps = 3
    simulated = simulate(20_000, steps)
    known = tables(simulated)
    each = (known["rho"] * known["rewards"]).numpy() @ GAMMA ** np.arange(steps)
    before = FIRST @ exact(PI, steps)[1]
    assert VALUE - before > 0.5
    found = estimates(known)
    assert abs(found[0] - before) < 4 * each.std() / np.sqrt(len(each))
    assert found[1] == pytest.approx(before, abs=0.1)
    assert found[2] == pytest.approx(VALUE, abs=0.05)


# --- By hand ---


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_ended_episodes_keep_their_last_weight():
    log_ratios = double([math.log(2), 0, 0], [math.log(2), math.log(3), -math.inf], [-math.inf, 0, 0])
    torch.testing.assert_close(ope.cumulative_ratios(log_ratios), double([2, 2, 2], [2, 6, 0], [0, 0, 0]))


def test_weights_are_of_each_step_and_of_all_episodes():
    """The first episode ends after a step. Its weight still divides the second step's."""
    known = {"rho": double([1, 1], [3, 1]), "rewards": double([4, 0], [0, 2]), "gamma": 0.5}
    assert ope.wis_estimate(double([1, 1]), **known).tolist() == [4 / 4 + 0.5 * 2 / 2]  # survivors alone: 0.5 * 2
    assert ope.wis_estimate(double([1, 1]), **known).item() != pytest.approx((4 * 1 + 1 * 0.5 * 2) / 2)  # last weights
    assert ope.is_estimate(double([1, 1]), **known).tolist() == [(4 + 0.5 * 2) / 2]
    corrections = {"q": double([1, 0], [2, 3]), "v": double([5, 0, 0], [6, 7, 8])}
    by_hand = (5 + 6) / 2 + (1 * 3 + 3 * -2) / 4 + 0.5 * (3 * 7 / 4 + 1 * -1 / 2) + 0.25 * 1 * 8 / 2
    assert ope.wdr_estimate(double([1, 1]), **known, **corrections).item() == pytest.approx(by_hand)


def test_counts_are_copies():
    known = tables(simulate(3, 4, seed=1), behaviour=WRONG)
    known["rho"] = torch.rand(3, 4, dtype=torch.float64) + 0.1
    copied = {name: each if name == "gamma" else each[[0, 0, 2]] for name, each in known.items()}
    counts = double([2, 0, 1])
    plain = {name: known[name] for name in ("rho", "rewards", "gamma")}
    found = ope.is_estimate(counts, **plain), ope.wis_estimate(counts, **plain), ope.wdr_estimate(counts, **known)
    assert [float(each) for each in found] == pytest.approx(estimates(copied))
    assert ope.mean_estimate(counts, known["rewards"][:, 0]).item() == pytest.approx(
        float(copied["rewards"][:, 0].mean())
    )


def test_no_weight_at_all_gives_nothing():
    assert ope.weigh(double([1, 1]), double([0, 1], [0, 3]), double([5, 2], [6, 4])).tolist() == [[0, 3.5]]


def test_effective_sample_size():
    assert ope.effective_sample_size(double(2, 2, 0, 2)) == pytest.approx(3)
    assert ope.effective_sample_size(double(1, 3)) == pytest.approx(16 / 10)
    assert ope.effective_sample_size(double(1e200, 3e200)) == pytest.approx(1.6)  # whose squares overflow
    assert ope.effective_sample_size(double(0, 0)) == 0


def test_bootstrap_draws_as_many_episodes():
    torch.manual_seed(0)
    counts = ope.bootstrap(7, 2000)
    assert (counts.sum(dim=1) == 7).all() and counts.dtype == torch.float64
    assert counts.mean(dim=0).numpy() == pytest.approx(np.ones(7), abs=0.1)
    assert counts.var().item() == pytest.approx(6 / 7, abs=0.05)  # of a binomial


def test_summary():
    found = ope.summary(double(1, 3), torch.arange(101, dtype=torch.float64))
    expected = {"estimate": 2, "low": 2.5, "high": 97.5, "std": np.arange(101).std(ddof=1), "seeds": [1, 3]}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)
    assert "seeds" not in ope.summary(double(1), torch.arange(3, dtype=torch.float64))


# --- Losses ---


def numpy_ensemble(network, *inputs):
    """[members, batch, output_dim] of inputs [members or 1, batch, dim]"""
    outputs = []
    for member in range(network.members):
        x = np.concatenate([each[member % len(each)] for each in inputs], axis=1).astype(np.float64)
        for index, layer in enumerate(network.layers):
            x = x @ layer.weight[member].detach().numpy() + layer.bias[member].detach().numpy()
            if index < len(network.layers) - 1:
                mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
                x = np.maximum((x - mean) / np.sqrt(variance + 1e-5), 0)
        outputs.append(x)
    return np.stack(outputs)


def random_batch():
    """Eight transitions for each of two members: observations of 3 numbers, actions of 2."""
    torch.manual_seed(0)
    terminations = (torch.arange(16) % 3 == 0).float().view(2, 8)
    return ope.Batch(torch.randn(2, 8, 3), torch.randn(2, 8, 2), torch.randn(2, 8), torch.randn(2, 8, 3), terminations)


@pytest.mark.parametrize("conservative", [0.0, 0.7])
def test_critic_loss(conservative):
    batch = random_batch()
    critic, target_critic = (ope.Ensemble(2, 5, (5, 4), 1) for _ in range(2))
    pi = torch.randn(2, 8, 2), torch.randn(2, 8, 2)
    args = ope.HyperParameters(conservative=conservative)
    loss = ope.critic_loss(critic, target_critic, batch, pi, 0.9, args)
    observations, actions, rewards, next_observations, terminations = (each.numpy() for each in batch)
    next_q = numpy_ensemble(target_critic, next_observations, pi[1].numpy())[..., 0]
    target = 0.1 * rewards + 0.9 * np.where(terminations == 1, 0, next_q)
    q = numpy_ensemble(critic, observations, actions)[..., 0]
    penalty = numpy_ensemble(critic, observations, pi[0].numpy())[..., 0] - q
    expected = ((target - q) ** 2).mean(axis=1).sum() + conservative * penalty.mean(axis=1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in target_critic.parameters())


def test_log_beta():
    batch = random_batch().take(torch.tensor(0))._replace(actions=torch.eye(2)[torch.arange(8) % 2])
    behaviour = ope.Ensemble(1, 3, (5,), 2)
    logits = numpy_ensemble(behaviour, batch.observations.numpy()[None])[0]
    for temperature in (1.0, 0.4):
        powers = np.exp(logits / temperature)
        expected = np.log(powers[np.arange(8), np.arange(8) % 2] / powers.sum(axis=1))
        found = ope.log_beta(behaviour(batch.observations)[0], batch.actions, temperature)
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)


def test_dynamics_loss():
    """Where an end repeats s, as logs may that have no s', nothing is learned of s'; elsewhere s' = s is known."""
    batch = random_batch()
    for row in (0, 1):  # the first terminates, the second does not
        batch.next_observations[0, row] = batch.observations[0, row]
    dynamics, scale = ope.Ensemble(2, 5, (5, 4), 5), torch.tensor([0.5, 1, 2])
    loss = ope.dynamics_loss(dynamics, batch, scale)
    observations, actions, rewards, next_observations, terminations = (each.numpy() for each in batch)
    outputs = numpy_ensemble(dynamics, observations, actions)
    errors = (((observations + outputs[..., :3] - next_observations) / scale.numpy()) ** 2).mean(axis=-1)
    errors[0, 0] = 0
    ends = 1 / (1 + np.exp(-outputs[..., 4]))
    entropy = -np.log(np.where(terminations == 1, ends, 1 - ends))
    expected = (errors + (outputs[..., 3] - rewards) ** 2 + entropy).mean(axis=1).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# --- Fitting ---


def small(**changes):
    sizes = {"hidden_dims": (32,), "learning_rate": 3e-3, "tau": 0.2, "num_updates": 600, "batch_size": 128}
    return ope.HyperParameters(**(sizes | {"num_members": 2} | changes))


@pytest.fixture(scope="module")
def logged():
    """2,000 episodes of at most six steps: their transitions, starts, lengths, and tables."""
    simulated = states, actions, terminations, lived = simulate(2000, 6, seed=3)
    one_hots = torch.eye(3)[torch.from_numpy(states)]
    kept = torch.from_numpy(lived)
    rewards = torch.from_numpy(REWARDS[states[:, :-1], actions]).float()
    columns = one_hots[:, :-1], torch.eye(2)[torch.from_numpy(actions)], rewards, one_hots[:, 1:]
    batch = ope.Batch(*(column[kept] for column in (*columns, torch.from_numpy(terminations).float())))
    lengths = kept.sum(dim=1)
    buffer = SimpleNamespace(episode_starts=lengths.cumsum(0) - lengths, episode_lengths=lengths)
    return simulated, batch, buffer


def policy_actions(batch):
    """pi(s) and pi(s'), one-hot."""
    target = torch.eye(2)[torch.from_numpy(TARGET)]
    return batch.observations @ target, batch.next_observations @ target


def fitted_values(batch, args):
    """(1 - gamma) Q by the members' mean, [states, actions]."""
    torch.manual_seed(0)
    critic = ope.fit_critic(batch, policy_actions(batch), torch.arange(len(batch.rewards)), GAMMA, args)
    pairs = torch.eye(3).repeat_interleave(2, dim=0), torch.eye(2).repeat(3, 1)
    return ope.q_of(critic, *pairs).mean(dim=0).view(3, 2).numpy() / (1 - GAMMA)


def test_fqe_comes_to_the_value_and_the_penalty_below_it(logged):
    found = fitted_values(logged[1], small())
    np.testing.assert_allclose(found, Q, atol=0.6)
    assert FIRST @ found[np.arange(3), TARGET] == pytest.approx(VALUE, abs=0.3)
    lower = fitted_values(logged[1], small(conservative=0.1))
    assert (lower[np.arange(3), TARGET] < found[np.arange(3), TARGET] - 0.1).all()


def test_the_data_have_a_value_beyond_their_cuts(logged):
    simulated, batch, buffer = logged
    counts = ope.bootstrap(2000, 200)
    evidence = ope.Evidence(buffer, batch, 1.0, tables(simulated)["rewards"], None, counts, GAMMA)
    torch.manual_seed(0)
    found = ope.judge_data(evidence, small())
    states, _, terminations, _ = simulated
    starts = np.bincount(states[:, 0], minlength=3) / 2000
    assert found["fqe"]["estimate"] == pytest.approx(starts @ exact(BEHAVIOUR)[1], abs=0.3)
    assert found["return"]["estimate"] == pytest.approx(
        (evidence.rewards.numpy() @ GAMMA ** np.arange(6)).mean(), rel=1e-6
    )
    assert found["return"]["low"] < FIRST @ exact(BEHAVIOUR, 6)[1] < found["return"]["high"]
    assert found["beyond"] == pytest.approx((~terminations.any(axis=1)).mean() * GAMMA**6)


def test_fit_behaviour_finds_the_probabilities(logged):
    _, batch, buffer = logged
    torch.manual_seed(0)
    held_out = (torch.arange(2000) % 5 == 0).repeat_interleave(buffer.episode_lengths)
    log_probs, told = ope.fit_behaviour(batch, held_out, small(num_updates=200))
    states, actions = batch.observations.argmax(dim=1), batch.actions.argmax(dim=1)
    np.testing.assert_allclose(log_probs.exp().numpy(), BEHAVIOUR[states, actions], atol=0.05)
    assert told["log_likelihood"] == pytest.approx(log_probs[held_out].mean().item(), abs=1e-5)
    frequencies = batch.actions[held_out].mean(dim=0).numpy()
    assert told["of_frequencies"] == pytest.approx((frequencies * np.log(frequencies)).sum(), abs=1e-5)
    assert told["log_likelihood"] > told["of_frequencies"]


# --- End to end ---

CARTPOLE = "anchorl/cartpole/mixed-v0"
TINY = ["--hidden-dims", "8", "--num-members", "2", "--num-updates", "20", "--batch-size", "32", "--draws", "50"]


def train(folder, algorithm="discrete_cql", *arguments):
    run = run_script(algorithm, "--num-updates", "2", "--run-dir", str(folder), *SHORT, *arguments)
    assert run.returncode == 0, run.stderr
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs: "cql", "held" (with episodes held out), "other" (another gamma), and "bc" of another dataset."""
    folder = tmp_path_factory.mktemp("runs")
    on = ["--dataset-id", CARTPOLE]
    made = {"cql": train(folder / "cql", "discrete_cql", *on, "--keep-policies", "--eval-every", "1")}
    made["held"] = train(folder / "held", "discrete_cql", *on, "--validation-fraction", "0.2")
    made["other"] = train(folder / "other", "discrete_cql", *on, "--gamma", "0.9")
    made["bc"] = train(folder / "bc", "bc")
    return made


def judged(tmp_path, *arguments):
    run = run_script("ope", *arguments, *TINY, "--out", str(tmp_path / "ope.json"))
    assert run.returncode == 0, run.stderr
    return json.loads((tmp_path / "ope.json").read_text()), run


def test_discrete_actions(folders, tmp_path):
    kept = f"{folders['cql']}/policy-1.pt"
    result, run = judged(tmp_path, folders["cql"], kept, "--least-effective", "0", "--gamma", "0.9")
    assert list(result["policies"]) == [folders["cql"], kept] and result["beta"] == "fitted"
    assert result["gamma"] == 0.9 and {"return", "fqe", "beyond"} == set(result["data"])
    for found in result["policies"].values():
        assert set(found) == {"fqe", "model", "ess", "is", "wis", "wdr"}
        for name in set(found) - {"ess"}:
            assert found[name]["low"] <= found[name]["high"] and math.isfinite(found[name]["estimate"])
            assert ("seeds" in found[name]) == (name in ("fqe", "model", "wdr"))
    assert "--num-updates 20: fqe will know the near future alone" in run.stderr
    result, _ = judged(tmp_path, folders["cql"], "--least-effective", "1e9")
    assert result["gamma"] == 0.99
    assert set(result["policies"][folders["cql"]]) == {"fqe", "model", "ess"}


def test_continuous_actions_have_fqe_and_model_alone(folders, tmp_path):
    result, _ = judged(tmp_path, folders["bc"])
    assert result["beta"] == "none" and set(result["policies"][folders["bc"]]) == {"fqe", "model"}


def test_held_out_episodes(folders, tmp_path):
    result, _ = judged(tmp_path, folders["held"], "--held-out", "--gamma", "0.9")
    learned, _ = judged(tmp_path, folders["held"], "--gamma", "0.9")
    assert result["episodes"] == round(0.2 * (result["episodes"] + learned["episodes"]))


def test_what_does_not_compare_is_one_line(folders, tmp_path):
    policy, out = write_policy(tmp_path / "policy", 5), ["--out", str(tmp_path / "ope.json"), *TINY]
    shutil.copy(f"{folders['bc']}/args.json", policy)
    cases = {
        "name the runs whose policies are to be evaluated": [],
        "dataset_id is .* policies compare on the same episodes": [folders["cql"], folders["bc"]],
        r"gamma is 0.99 in .* 0.9 in .*: give --gamma": [folders["cql"], folders["other"]],
        "its observations or actions are not": [policy],
        "--held-out: the runs held no episodes out": [folders["cql"], "--held-out"],
        "--gamma 1.5: must be in": [folders["cql"], "--gamma", "1.5"],
        "--draws 1: must be at least 2": [folders["cql"], "--draws", "1"],
        "--num-members 1: must be at least 2": [folders["cql"], "--num-members", "1"],
        "--conservative -1.0: must be at least 0": [folders["cql"], "--conservative", "-1"],
    }
    for pattern, given in cases.items():
        assert_one_line(run_script("ope", *out, *given), pattern)
    result, _ = judged(tmp_path, folders["cql"], folders["other"], "--gamma", "0.95")
    assert result["gamma"] == 0.95 and len(result["policies"]) == 2


@pytest.mark.parametrize("missing", [False, True])
def test_logged_probabilities(missing, make_dataset, tmp_path):
    episodes = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        log_probs = np.log(np.full(6, 0.5))
        log_probs[2 if missing and seed == 3 else 5] = np.nan  # the last is of no action
        fields = {"observations": rng.normal(size=(6, 3)).astype(np.float32), "actions": np.arange(5) % 2}
        fields |= {"rewards": rng.normal(size=5), "terminations": np.arange(5) == 4, "truncations": np.zeros(5, bool)}
        episodes.append(fields | {"infos": {"log_prob": log_probs}})
    dataset_id = make_dataset(episodes=episodes, action_space=gym.spaces.Discrete(2))
    folder = train(tmp_path / "run", "discrete_cql", "--dataset-id", dataset_id)
    if missing:
        run = run_script("ope", folder, *TINY, "--out", str(tmp_path / "ope.json"))
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert "1 of 30 logged probabilities are missing, 0 or above 1: give all of them, or none" in run.stderr
    else:
        result, run = judged(tmp_path, folder, "--least-effective", "0")
        assert result["beta"] == "logged" and "6 episodes are few" in run.stderr
        buffer = SimpleNamespace(dataset_id=dataset_id, kept=None)
        assert ope.logged_probabilities(buffer).tolist() == pytest.approx([np.log(0.5)] * 30)
        assert load_dataset(dataset_id, discrete=True).discrete


@pytest.mark.parametrize("shape", [(6, 1), (5,)])
def test_logged_probabilities_of_another_shape(shape, make_dataset):
    episode = random_episode(0, 5, actions=np.arange(5) % 2)
    dataset_id = make_dataset(
        episodes=[episode | {"infos": {"log_prob": np.full(shape, -0.5)}}], action_space=gym.spaces.Discrete(2)
    )
    with pytest.raises(BadInput, match="test/data-v0: cannot read the infos' log_prob: "):
        ope.logged_probabilities(SimpleNamespace(dataset_id=dataset_id, kept=None))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"dataset_id": None}, "args.json lacks dataset_id: give the folder of a run on a dataset"),
        ({"dataset_fingerprint": None}, "args.json lacks dataset_fingerprint: "),
        ({"gamma": "high"}, "cannot read .*args.json: could not convert string"),
    ],
)
def test_a_run_that_does_not_say_what_it_learned_from(changes, pattern, folders, tmp_path):
    folder = shutil.copytree(folders["cql"], tmp_path / "run")
    (folder / "args.json").write_text(json.dumps(json.loads((folder / "args.json").read_text()) | changes))
    assert_one_line(run_script("ope", str(folder), *TINY, "--out", str(tmp_path / "ope.json")), pattern)


@pytest.mark.parametrize(("count", "length", "pattern"), [(1, 30, "holds one episode"), (30, 1, "one step and cut")])
def test_too_little_to_judge_by(count, length, pattern, make_dataset, tmp_path):
    """Of actions that are known: what comes first is said."""
    fields = {"actions": np.zeros(length, dtype=np.int64), "infos": {"log_prob": np.full(length + 1, -0.5)}}
    episodes = [random_episode(seed, length, **fields) for seed in range(count)]
    dataset_id = make_dataset(episodes=episodes, action_space=gym.spaces.Discrete(2))
    folder = train(tmp_path / "run", "discrete_cql", "--dataset-id", dataset_id)
    run = run_script("ope", folder, *TINY, "--out", str(tmp_path / "ope.json"))
    assert run.returncode == 2 and re.search(f"error: .*{pattern}", run.stderr.splitlines()[-1]), run.stderr
