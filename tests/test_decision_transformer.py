"""Decision Transformer: returns-to-go, windows, causality and the memory, against calculations of their own."""

import copy
import math

import numpy as np
import pytest
import torch
import watch
from conftest import assert_one_line, run_script
from decision_transformer import (
    Actor,
    Batch,
    Dropout,
    HyperParameters,
    actor_loss,
    build,
    returns_to_go,
    update,
    windows,
)
from trained_run import load_run

from common.command_line import BadInput, ExperimentArgs
from common.data import ReplayBuffer, hold_out
from common.evaluation import EVALUATION_SEED, evaluate, load_policy, make_environments
from common.optim import Adam

ARGS = HyperParameters(hidden_dims=(8, 8), num_heads=2, context_length=4, max_timestep=20)


def make_actor():
    torch.manual_seed(0)
    actor = Actor(3, 2, ARGS).eval()
    actor.target_return.fill_(7.0)
    actor.return_scale.fill_(5.0)
    return actor


def make_windows(rows):
    torch.manual_seed(1)
    lengths = torch.tensor([6, 2, 5])
    ends = lengths.cumsum(0).repeat_interleave(lengths)
    starts = ends - lengths.repeat_interleave(lengths)
    columns = torch.randn(13), torch.randn(13, 3), torch.rand(13, 2) * 2 - 1
    return columns, windows(rows, starts[rows], ends[rows], columns, 4)


def test_returns_to_go():
    rewards = np.random.default_rng(0).normal(size=9)
    expected = [rewards[t:end].sum() for start, end in ((0, 4), (4, 5), (5, 9)) for t in range(start, end)]
    found = returns_to_go(torch.tensor(rewards), torch.tensor([4, 1, 4]))
    np.testing.assert_allclose(found, expected)


def test_windows_are_padded_and_stay_in_their_episode():
    columns, batch = make_windows(torch.tensor([1, 4, 7, 12, 8]))
    expected = [[1, 2, 3, 4], [None, None, 4, 5], [None, None, None, 7], [None, None, None, 12], [8, 9, 10, 11]]
    first = [0, 0, 6, 8, 8]
    for i, steps in enumerate(expected):
        for j, step in enumerate(steps):
            assert batch.mask[i, j] == (step is not None)
            assert batch.timesteps[i, j] == (0 if step is None else step - first[i])
            for found, column in zip(batch[:3], columns, strict=True):
                assert torch.equal(found[i, j], column[step] if step is not None else 0 * column[0])


def test_the_future_and_padding_change_no_action():
    actor, (_, batch) = make_actor(), make_windows(torch.tensor([1, 4]))
    before = actor.predict(batch)
    later = batch._replace(actions=batch.actions.clone(), returns_to_go=batch.returns_to_go.clone())
    later.actions[:, 2:] += 1  # a_3 comes after what predicts it
    later.returns_to_go[:, 3] += 1
    torch.testing.assert_close(actor.predict(later)[:, :3], before[:, :3])
    assert not torch.allclose(actor.predict(later)[:, 3], before[:, 3])
    garbage = Batch(*(torch.where(batch.mask.view(2, 4, *[1] * (c.ndim - 2)), c, c + 3) for c in batch[:4]), batch.mask)
    torch.testing.assert_close(actor.predict(garbage)[batch.mask], before[batch.mask])


def normalised(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def linear(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def test_actions_are_those_of_a_transformer_in_numpy():
    """Token by token, and head by head."""
    actor, (_, batch) = make_actor(), make_windows(torch.tensor([1]))
    tokens = []
    for step in range(4):
        parts = (
            linear(batch.returns_to_go[0, step : step + 1].numpy() / 5.0, actor.embed_return),
            linear(batch.observations[0, step].numpy(), actor.embed_observation),
            linear(batch.actions[0, step].numpy(), actor.embed_action),
        )
        time = actor.embed_timestep.weight[batch.timesteps[0, step]].detach().numpy()
        tokens += [normalised(part + time, actor.norm) for part in parts]
    x = np.stack(tokens)
    for block in actor.blocks:
        query, key, value = np.split(linear(normalised(x, block.norm1), block.query_key_value), 3, axis=1)
        mixed = np.zeros_like(x)
        for i in range(len(x)):
            for head in (slice(0, 4), slice(4, 8)):
                weights = np.exp(key[: i + 1, head] @ query[i, head] / np.sqrt(4))
                mixed[i, head] = weights @ value[: i + 1, head] / weights.sum()
        x = x + linear(mixed, block.output)
        x = x + linear(np.maximum(linear(normalised(x, block.norm2), block.net[0]), 0), block.net[2])
    expected = np.tanh(linear(normalised(x[1::3], actor.last_norm), actor.head[0]))
    np.testing.assert_allclose(actor.predict(batch)[0].detach().numpy(), expected, atol=1e-5)


def test_embeddings_of_time_start_small():
    assert make_actor().embed_timestep.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("adam", [Adam, torch.optim.Adam])
@pytest.mark.parametrize("gradient_clip", [0.05, 100.0])
def test_an_update_is_adamws_after_a_warm_up(adam, gradient_clip, double_precision):
    """In double precision: keys' biases have no gradient, and Adam makes a whole step of its rounding."""
    _, batch = make_windows(torch.tensor([1, 4, 8]))
    args = HyperParameters(
        hidden_dims=(8,), dropout=0, learning_rate=1e-2, warmup_updates=2, weight_decay=0.5, gradient_clip=gradient_clip
    )
    learner = build(3, 2, args, adam=adam)
    reference = copy.deepcopy(learner.actor)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.5)
    for step, rate in ((1, 5e-3), (2, 1e-2), (3, 1e-2)):
        metrics = update(learner, batch, step, args)
        optimizer.zero_grad()
        actor_loss(reference, batch)[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), gradient_clip)
        assert (norm > gradient_clip) == (gradient_clip < 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert metrics["actor/gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
    for found, expected in zip(learner.actor.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_dropout_is_for_training_alone():
    actor, (_, batch) = make_actor(), make_windows(torch.tensor([1, 4]))
    assert torch.equal(actor.predict(batch), actor.predict(batch))
    actor.train()
    assert not torch.equal(actor.predict(batch), actor.predict(batch))


def test_dropout_empties_its_share_and_keeps_the_mean():
    """Of 200,000 numbers, each drawn alone: the share of zeros is 0.3 within five standard errors."""
    given = torch.arange(1.0, 200_001).view(2, -1)
    found = Dropout(0.3)(given)
    kept = found != 0
    torch.testing.assert_close(found[kept], given[kept] / 0.7)
    assert abs((~kept).double().mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 200_000)
    assert not torch.equal(kept[0], kept[1])


def test_dropout_of_embeddings_attention_and_what_blocks_add(monkeypatch):
    """Each alone: the action changes where it doubles what it is given, all others giving back what they are given."""
    actor, (_, batch) = make_actor(), make_windows(torch.tensor([1]))
    expected, given = actor.predict(batch), []
    for doubled in range(7):
        given.clear()

        def forward(module, x, doubled=doubled):
            given.append((module.p, x.shape[1:]))
            return 2 * x if len(given) == doubled + 1 else x

        monkeypatch.setattr(Dropout, "forward", forward)
        assert not torch.allclose(actor.predict(batch), expected)
    tokens, weights = (ARGS.dropout, (12, 8)), (ARGS.dropout, (2, 12, 12))
    assert given == [tokens, *[weights, tokens, tokens] * 2]


def test_loss_of_real_steps_alone():
    actor, (_, batch) = make_actor(), make_windows(torch.tensor([1, 4]))
    errors = (actor.predict(batch) - batch.actions).detach().numpy() ** 2
    expected = np.concatenate([errors[0], errors[1, 2:]]).mean()
    np.testing.assert_allclose(actor_loss(actor, batch)[0].item(), expected, rtol=1e-5)


def test_acting_sees_the_last_steps_and_forgets_at_a_new_episode():
    actor = make_actor()
    torch.manual_seed(2)
    states, rewards, actions = torch.randn(6, 3), [1.0, -2.0, 0.5, 3.0, 1.5], []
    with torch.no_grad():
        for t in range(6):
            actor.follow([4], [None if t == 0 else rewards[t - 1]])
            actions.append(actor(states[t : t + 1])[0])
        to_go = torch.tensor(7 - np.cumsum([0, *rewards])).float()
        taken = torch.stack(actions)
        for t, first in ((1, 0), (5, 2)):  # the second is cut to four steps
            part, steps = slice(first, t + 1), torch.arange(first, t + 1)
            mask = torch.ones_like(steps, dtype=torch.bool)
            context = Batch(*(c[None] for c in (to_go[part], states[part], taken[part], steps, mask)))
            torch.testing.assert_close(actor.predict(context)[0, -1], taken[t])
        alone = actor(states[:1])[0]
        actor.follow([4], [None])
        torch.testing.assert_close(actor(states[:1])[0], alone)
        assert not torch.allclose(actions[5], actor(states[5:])[0])


def test_each_row_has_the_history_of_its_episode():
    """Episodes of different lengths beside each other, in another order at each call, act as each alone does."""
    torch.manual_seed(3)
    states, together, alone = torch.randn(2, 3, 3), {}, {}
    with torch.no_grad():
        actor = make_actor()
        for rows, rewards, steps in (([0], [None], [0]), ([1, 0], [None, 2.0], [0, 1]), ([0, 1], [1.0, -1.0], [2, 1])):
            actor.follow(rows, rewards)
            for row, step, action in zip(rows, steps, actor(states[rows, steps]), strict=True):
                together[row, step] = action
        for row, rewards in ((0, [None, 2.0, 1.0]), (1, [None, -1.0])):
            for step, reward in enumerate(rewards):
                actor.follow([5], [reward])
                alone[row, step] = actor(states[row, step : step + 1])[0]
    for place, action in alone.items():
        torch.testing.assert_close(together[place], action)


def test_what_follow_is_told_must_fit():
    actor = make_actor()
    assert actor(torch.zeros(0, 3)).shape == (0, 2)
    with pytest.raises(ValueError, match="episode 1 has no step yet: its first reward is None"):
        actor.follow([1], [0.5])
    actor.follow([1, 2], [None, None])
    with pytest.raises(ValueError, match="follow was told of 2 episodes, and 3 observations came"):
        actor(torch.zeros(3, 3))


def test_steps_after_the_longest_episode_share_the_last_embedding():
    actor, (_, batch) = make_actor(), make_windows(torch.tensor([1]))
    actor.last_timestep.fill_(3)
    later = batch._replace(timesteps=batch.timesteps.clamp(max=3))
    assert not torch.equal(later.timesteps, batch.timesteps)
    assert torch.equal(actor.predict(later), actor.predict(batch))


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--hidden-dims", "8", "16"], r"--hidden-dims \(8, 16\): blocks must be of one width"),
        (["--hidden-dims", "8", "--num-heads", "3"], "--num-heads 3: must divide the blocks' width"),
        (["--dropout", "1"], r"--dropout 1.0: must be in \[0, 1\)"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: must not be negative"),
        (["--gradient-clip", "0"], "--gradient-clip 0.0: must be positive"),
        (["--return-scale", "0"], "--return-scale 0.0: must be positive"),
    ],
)
def test_bad_arguments_are_one_line(words, pattern):
    assert_one_line(run_script("decision_transformer", *words), pattern)


# --- Tools ---


WORDS = ["--hidden-dims", "8", "--context-length", "3", "--warmup-updates", "1", "--learning-rate", "1e-2"]
WORDS += ["--num-updates", "3", "--batch-size", "16", "--eval-episodes", "1", "--final-eval-episodes", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, pendulum):
    """The folder of a short run, with the default target and scale, without the data's best and worst episodes."""
    folder = tmp_path_factory.mktemp("decision_transformer") / "run"
    words = [*WORDS, "--validation-fraction", "0.2", "--validation-seed", "45", "--run-dir", str(folder)]
    done = run_script("decision_transformer", *words)
    assert done.returncode == 0, done.stderr
    return folder


def test_target_and_scale_are_those_of_the_data_that_are_learned_from(run, pendulum):
    args, actor = ExperimentArgs(validation_fraction=0.2, validation_seed=45), load_policy(run).actor
    kept = ReplayBuffer(hold_out(pendulum.dataset, args), torch.device("cpu"))
    (best, largest), of_all = [
        (part.episode_returns.max(), returns_to_go(part.transitions.rewards, part.episode_lengths).abs().max())
        for part in (kept, pendulum)
    ]
    assert best < of_all[0] and largest < of_all[1]
    assert actor.target_return.item() == pytest.approx(best.item(), rel=1e-6)
    assert actor.return_scale.item() == pytest.approx(largest.item(), rel=1e-6)
    assert actor.last_timestep == kept.episode_lengths.max() - 1
    assert math.isfinite(float((run / "metrics.csv").read_text().splitlines()[-1].split(",")[-1]))


def test_target_and_scale_can_be_given(tmp_path, pendulum):
    words = [*WORDS, "--num-updates", "1", "--target-return", "-300", "--return-scale", "500"]
    done = run_script("decision_transformer", *words, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    actor = load_policy(tmp_path / "run").actor
    assert actor.target_return == -300 and actor.return_scale == 500


def test_tools_that_ask_about_lone_states_refuse_it(run, tmp_path):
    pattern = r"its Actor needs its episode's history \(`follow`\), which only playing gives it"
    assert_one_line(run_script("fqe", "--policy-run-dir", str(run), "--run-dir", str(tmp_path / "fqe")), pattern)
    assert_one_line(run_script("ope", str(run), "--out", str(tmp_path / "ope.json")), pattern)
    with pytest.raises(BadInput, match=pattern):  # of shift_report and model_report
        load_run(run)
    exported = run_script("export", str(run), "--out", str(tmp_path / "policy.onnx"))
    assert_one_line(exported, "its Actor remembers what it did .*: act by load_policy")
    assert not list(tmp_path.iterdir())


def test_a_picture_shows_what_is_evaluated(run, pendulum, monkeypatch):
    monkeypatch.setattr(watch, "picture", lambda _: None)
    environment, policy = make_environments(pendulum.dataset, 1)[0], load_policy(run)
    expected = evaluate(policy, [environment])[0][0]
    observation = environment.reset(seed=EVALUATION_SEED)[0]
    _, total, ended = watch.play(environment, policy, observation, 300)
    assert ended and total == pytest.approx(expected, rel=1e-6)
    monkeypatch.delattr(type(policy.actor), "follow")  # every state is then a first one's: another policy
    observation = environment.reset(seed=EVALUATION_SEED)[0]
    assert watch.play(environment, policy, observation, 300)[1] != pytest.approx(expected, rel=1e-6)
