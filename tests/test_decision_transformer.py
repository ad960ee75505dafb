"""Decision Transformer: returns-to-go, windows, causality and the memory, against calculations of their own."""

import numpy as np
import torch
from decision_transformer import Actor, Batch, HyperParameters, actor_loss, returns_to_go, windows

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
