"""BC's loss against NumPy, and its choice of the best episodes."""

import bc
import numpy as np
import pytest
import torch
from conftest import numpy_mlp, random_batch

CPU = torch.device("cpu")


def test_actor_loss():
    torch.manual_seed(0)
    learner, batch = bc.build(3, 2, bc.Args(hidden_dims=(5, 4)), CPU), random_batch()
    loss, _ = bc.actor_loss(learner, batch)
    actions = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    assert loss.item() == pytest.approx(np.mean((actions - batch.actions.numpy()) ** 2), rel=1e-5)


def test_best_episodes():
    returns = torch.tensor([3.0, 9.0, -1.0, 7.0])
    assert bc.best_episodes(returns, 0.5).tolist() == [False, True, False, True]
    assert bc.best_episodes(returns, 0.01).tolist() == [False, True, False, False]  # never none
