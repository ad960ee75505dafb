"""BC's loss against NumPy, and its choice of the best episodes."""

import bc
import numpy as np
import pytest
import torch
from conftest import SHORT, numpy_mlp, random_batch, run_script

from common.optim import Adam

CPU = torch.device("cpu")


def test_actor_loss():
    torch.manual_seed(0)
    learner, batch = bc.build(3, 2, bc.Args(hidden_dims=(5, 4)), CPU, Adam), random_batch()
    loss, _ = bc.actor_loss(learner.actor, batch)
    actions = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    assert loss.item() == pytest.approx(np.mean((actions - batch.actions.numpy()) ** 2), rel=1e-5)


def test_the_rows_of_the_best_episodes():
    returns, lengths = torch.tensor([3.0, 9.0, -1.0, 7.0]), torch.tensor([2, 1, 3, 2])
    assert bc.best_rows(returns, lengths, 0.5).tolist() == [2, 6, 7]
    assert bc.best_rows(returns, lengths, 0.01).tolist() == [2]  # never none
    assert bc.best_rows(returns, lengths, 1.0).tolist() == list(range(8))
    lengths = torch.tensor([2, 4, 3, 2])  # two of four episodes would hold more than four of the eleven rows
    assert bc.best_rows(returns, lengths, 0.4).tolist() == [2, 3, 4, 5]
    assert bc.best_rows(returns, lengths, 0.5).tolist() == [2, 3, 4, 5, 9, 10]


def test_a_run_draws_from_the_best_episodes_alone(pendulum, tmp_path, monkeypatch):
    batches, actor_loss = [], bc.actor_loss

    def spy(actor, batch):
        batches.append(batch)
        return actor_loss(actor, batch)

    monkeypatch.setattr(bc, "actor_loss", spy)
    arguments = ["--num-updates", "3", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("bc", "--top-fraction", "0.1", *arguments).returncode == 0
    best = bc.best_rows(pendulum.episode_returns, pendulum.episode_lengths, 0.1)
    assert len(batches) == 3
    for batch in batches:
        assert torch.isin(batch.observations, pendulum.transitions.observations[best]).all()


class Caught(Exception):
    """What main gives to its Run."""


def test_the_best_of_held_out_rows_are_drawn_alike(tmp_path, monkeypatch):
    def catch(args, buffer, learner, update, make_batch):
        raise Caught(buffer.validation, make_batch)

    monkeypatch.setattr(bc, "Run", catch)
    with pytest.raises(Caught) as caught:
        bc.main(bc.Args(run_dir=tmp_path / "run", top_fraction=0.6, validation_fraction=0.033))
    held_out, make_batch = caught.value.args
    steps = len(held_out.storage)
    drawn = make_batch(held_out, held_out.draw(200 * steps)).observations
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert (steps, len(counts)) == (1000, 600) and counts.max() < 1.5 * counts.min()
