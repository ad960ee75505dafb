"""RLPD's losses against NumPy on small numbers, what its batches are made of, and its steps in the environment."""

import copy
import itertools

import numpy as np
import pytest
import rlpd
import torch
from conftest import (
    assert_each_trains_its_own,
    assert_one_line,
    assert_same_runs,
    checkpoint,
    draws,
    numpy_sample,
    random_batch,
    run_script,
    sac_learner,
    sac_networks,
)

from common.data import ReplayBuffer, load_dataset
from common.evaluation import load_policy

CPU = torch.device("cpu")
DRAWN = torch.tensor([3, 1])


@pytest.fixture
def args():
    return rlpd.Args(hidden_dims=(6, 5), num_critics=4, gamma=0.9, updates_per_step=3)


@pytest.fixture
def learner(args):
    return sac_learner(rlpd, args)


def numpy_members(critic, observations, actions):
    """[members, batch], each member as a network of its own: the norm of a layer comes before its ReLU."""
    values = []
    for member in range(len(critic.layers[0].weight)):
        x = np.concatenate([observations, actions], axis=1).astype(np.float64)
        for index, layer in enumerate(critic.layers):
            x = x @ layer.weight[member].detach().numpy().astype(np.float64) + layer.bias[member].detach().numpy()
            if index < len(critic.norms):
                x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
                scale, shift = (each[member].detach().numpy() for each in critic.norms[index].parameters())
                x = np.maximum(x * scale + shift, 0)
        values.append(x[:, 0])
    return np.stack(values)


# --- Losses ---


@pytest.mark.parametrize("entropy_in_backup", [True, False])
def test_critic_loss(learner, args, entropy_in_backup):
    batch, noise = random_batch(), draws()[0]
    args.entropy_in_backup = entropy_in_backup
    next_observations = batch.next_observations.numpy()
    next_actions, log_prob = numpy_sample(learner.actor, next_observations, noise)
    next_qs = numpy_members(learner.target_critic, next_observations, next_actions)
    pair = next_qs[[1, 3]]
    assert len(set(pair.argmin(axis=0))) == 2 and not np.allclose(pair.min(axis=0), next_qs.min(axis=0))
    next_value = pair.min(axis=0) - (0.3 if entropy_in_backup else 0) * log_prob
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_value)
    q = numpy_members(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    loss, metrics = rlpd.critic_loss(learner, batch, noise, DRAWN, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)
    assert metrics["critic/q"].item() == pytest.approx(q.mean(), rel=1e-4)
    assert metrics["critic/target"].item() == pytest.approx(target.mean(), rel=1e-4)
    assert metrics["critic/disagreement"].item() == pytest.approx(q.std(axis=0, ddof=1).mean(), rel=1e-4)


def test_actor_and_temperature_losses(learner, args):
    """The actor believes the mean of all critics; the entropy aimed at is half of SAC's: -1 for two dimensions."""
    batch, noise = random_batch(), draws()[0]
    actions, log_prob = numpy_sample(learner.actor, batch.observations.numpy(), noise)
    q = numpy_members(learner.critic, batch.observations.numpy(), actions).mean(axis=0)
    of_the_actor, of_the_temperature = np.mean(0.3 * log_prob - q), np.mean(-0.3 * (log_prob - 1.0))
    ours = learner.actor.sample(batch.observations, noise)
    loss, _ = rlpd.actor_loss(learner.critic, torch.tensor(0.3), batch.observations, *ours)
    assert loss.item() == pytest.approx(of_the_actor, rel=1e-4)
    loss, _ = rlpd.policy_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(of_the_actor + of_the_temperature, rel=1e-4)
    args.target_entropy = -3.0
    loss, _ = rlpd.policy_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(of_the_actor + of_the_temperature + 0.3 * 2, rel=1e-4)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch, noise = random_batch(), draws()
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[1])
    losses = {
        "critic": rlpd.critic_loss(learner, batch, noise[0], DRAWN, args)[0],
        "actor": rlpd.actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)[0],
        "temperature": rlpd.temperature_loss(temperature, log_prob, -1.0)[0],
    }
    assert_each_trains_its_own(losses, sac_networks(learner))


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias[DRAWN] = 1000.0
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = rlpd.critic_loss(learner, step, draws()[0], DRAWN, args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Update ---


def test_the_actor_learns_every_few_updates_and_the_targets_follow_at_each(learner, args):
    for step in range(1, 7):
        before = copy.deepcopy(learner)
        metrics = rlpd.update(learner, random_batch(), step, args)
        moved = [
            not torch.equal(old, new)
            for old, new in zip(before.actor.parameters(), learner.actor.parameters(), strict=True)
        ]
        assert all(moved) if step % 3 == 0 else not any(moved)
        assert ("actor/loss" in metrics) == (step % 3 == 0)
        critics = before.target_critic, learner.target_critic, learner.critic
        for old, new, followed in zip(*(critic.parameters() for critic in critics), strict=True):
            torch.testing.assert_close(new, old + args.tau * (followed - old))


def test_the_actor_learns_from_noise_of_its_own_and_the_critics_as_they_are_after_their_step(
    learner, args, monkeypatch
):
    noise, batch = draws()[:, :, :2], random_batch()
    other = sac_learner(rlpd, args)  # the actor and the critics as they were
    monkeypatch.setattr(rlpd.torch, "randn", lambda *_, **__: noise)
    metrics = rlpd.update(learner, batch, 3, args)
    found = metrics["actor/loss"].item()
    losses = [
        rlpd.actor_loss(
            critic, torch.tensor(0.3), batch.observations, *other.actor.sample(batch.observations, noise[number])
        )[0].item()
        for critic, number in ((learner.critic, 1), (learner.critic, 0), (other.critic, 1))
    ]
    assert found == pytest.approx(losses[0], rel=1e-5)
    assert found != pytest.approx(losses[1], rel=1e-4) and found != pytest.approx(losses[2], rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_group_of_critics_is_drawn_as_often(learner, args, monkeypatch, count):
    """Of `count` critics of four, at each update others."""
    args.num_target_critics = count
    drawn, loss = [], rlpd.critic_loss
    monkeypatch.setattr(
        rlpd, "critic_loss", lambda *words: (drawn.append(tuple(sorted(words[3].tolist()))), loss(*words))[1]
    )
    for step in range(300):
        rlpd.update(learner, random_batch(2), 3 * step + 1, args)
    groups, counts = np.unique(drawn, axis=0, return_counts=True)
    assert groups.tolist() == [list(group) for group in itertools.combinations(range(4), count)]
    assert abs(counts - 300 / len(groups)).max() < 31  # four standard deviations


# --- Batches ---


def test_batches_have_their_share_of_the_data(datasets_path):
    buffer = ReplayBuffer(load_dataset("anchorl/pendulum/mixed-v0"), CPU, room=50)
    buffer.storage = buffer.with_room[: buffer.num_loaded + 50]
    rows = rlpd.draw_both(buffer, 4096, 0.25)
    data, played = rows[:1024], rows[1024:]
    assert data.max() < buffer.num_loaded and data.unique().numel() > 900
    assert torch.equal(played.unique(), torch.arange(buffer.num_loaded, buffer.num_loaded + 50))
    assert rlpd.draw_both(buffer, 100, 1.0).max() < buffer.num_loaded
    assert rlpd.draw_both(buffer, 100, 0.0).min() >= buffer.num_loaded


# --- Runs ---

FEW = ["--hidden-dims", "8", "--batch-size", "16", "--eval-episodes", "1", "--final-eval-episodes", "1"]
FEW += ["--num-critics", "3", "--updates-per-step", "4", "--random-steps", "205"]
FEW += ["--eval-every", "6", "--log-every", "6"]


def test_steps_come_before_their_updates_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """The first 205 are random, into the second episode; 10 updates have three more, before the 1st, 5th and 9th."""
    batches, loss = [], rlpd.critic_loss
    monkeypatch.setattr(rlpd, "critic_loss", lambda *words: (batches.append(words[1]), loss(*words))[1])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, more in ((whole, []), (cut, ["--num-updates", "6"]), (cut, ["--resume"])):
        run = run_script("rlpd", "--num-updates", "10", *FEW, *more, "--run-dir", str(folder))
        assert run.returncode == 0, run.stderr
        if "6" in more:
            assert len(checkpoint(folder)["learner"]["player"]["added"]) == 205 + 2
    assert_same_runs(whole, cut)
    player = checkpoint(whole)["learner"]["player"]
    assert len(player["added"]) == 205 + 3
    assert player["lengths"].tolist() == [200] and len(player["actions"]) == 8
    for batch in batches:  # the first half is the data's
        played = (batch.observations[:, None] == player["added"][:, :3]).all(dim=2).any(dim=1)
        assert played.tolist() == [False] * 8 + [True] * 8
    actions = player["added"][:, 3]
    best = load_policy(whole).act(player["added"][205:, :3])[:, 0]
    assert (best - actions[205:]).abs().mean() > 0.1  # played with the policy's noise
    assert -1 <= actions.min() < -0.97 and 0.97 < actions.max() <= 1 and actions[:205].std() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-critics", "1"], "--num-critics 1: must be at least 2"),
        (
            ["--num-target-critics", "4", "--num-critics", "3"],
            "--num-target-critics 4: must be at most --num-critics 3",
        ),
        (["--data-ratio", "1.5"], r"--data-ratio 1.5: must be in \[0, 1\]"),
        (["--random-steps", "0"], "--random-steps 0: must be at least 1"),
        (["--updates-per-step", "0"], "--updates-per-step 0: must be at least 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("rlpd", *arguments, "--run-dir", str(tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()


def test_data_without_an_environment_are_refused(make_dataset, tmp_path):
    words = ["--dataset-id", make_dataset(), "--reward-scale", "100", "--run-dir", str(tmp_path / "run")]
    assert_one_line(run_script("rlpd", *words), "names no environment")
    assert not (tmp_path / "run").exists()
