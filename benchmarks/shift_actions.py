"""What actions are to shift_report.py: vectors in [-1, 1], of each entry its bin, or choices, one-hot vectors [n, C] of
C choices. Masses [n, parts, bins] have a part for each entry of a vector, or one for a choice, whose bins are the C.
"""

from typing import Any

import torch
import torch.nn.functional as F
from shift_measures import NUM_BINS, bin_of
from torch import Tensor
from trained_run import Trained

NUM_DRAWS = 256  # actions of an actor with a distribution, at each state


def bins_of(run: Trained, actions: Tensor) -> Tensor:
    """[n, parts] of actions [n, action_dim], or of one-hot vectors."""
    return actions.argmax(dim=1, keepdim=True) if run.buffer.num_actions else bin_of(actions)


def count_bins(run: Trained) -> int:
    return run.buffer.num_actions or NUM_BINS


def legal(run: Trained, observations: Tensor) -> Tensor:
    """Which choices may be taken, by the mask at the start of an observation, if there is one: [n, C], 1 or 0 each."""
    if not run.buffer.num_legal:
        return torch.ones(len(observations), run.buffer.num_actions)
    return (observations[:, : run.buffer.num_legal] > 0.5).float()


def draw_random(run: Trained, observations: Tensor) -> Tensor:
    """An action for each state, uniformly: of [-1, 1] in each entry, or of the choices that are legal there."""
    if run.buffer.num_actions:
        return run.vectors(legal(run, observations).multinomial(1).squeeze(1))
    return torch.rand(len(observations), run.buffer.action_dim) * 2 - 1


def masses_of_random(run: Trained, observations: Tensor) -> Tensor:
    """Those of the distribution from which `draw_random` draws, [n, parts, bins]."""
    if not run.buffer.num_actions:
        return torch.full((len(observations), run.buffer.action_dim, NUM_BINS), 1 / NUM_BINS)
    choices = legal(run, observations)
    return (choices / choices.sum(dim=1, keepdim=True))[:, None]


def masses_of_policy(run: Trained, observations: Tensor, actions: Tensor) -> Tensor:
    """Those of the actor's own distribution, [n, parts, bins]. Without one, they are 1 where its `actions` are."""
    masses = choice_masses if run.buffer.num_actions else vector_masses
    return masses(run.policy.actor, observations, actions)


def choice_masses(actor: Any, observations: Tensor, choices: Tensor) -> Tensor:
    """exp(log_prob) of each choice in turn: of any actor that has it."""
    if not hasattr(actor, "log_prob"):
        return choices[:, None]
    numbers = torch.arange(choices.shape[1])
    masses = [actor.log_prob(observations, number.expand(len(observations))).exp() for number in numbers]
    return torch.stack(masses, dim=1)[:, None]


def vector_masses(actor: Any, observations: Tensor, actions: Tensor) -> Tensor:
    """A mass is the share of draws in the bin, so that any actor will do that has `sample`. In each dimension, the
    draws' noise takes NUM_DRAWS quantiles of the standard normal in random order. Where an entry of the action rises
    with its own noise and depends on no other, as in every script here, no mass is off by more than 1 / NUM_DRAWS.
    """
    if not hasattr(actor, "sample"):
        return F.one_hot(bin_of(actions), NUM_BINS).float()
    quantiles = torch.special.ndtri((torch.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS)
    shuffled = torch.rand(NUM_DRAWS, actions.shape[1], generator=torch.Generator().manual_seed(0)).argsort(dim=0)
    noise = quantiles[shuffled]  # [draws, action_dim]
    masses = torch.zeros(*actions.shape, NUM_BINS)
    for row in noise:
        drawn, _ = actor.sample(observations, row.expand_as(actions))
        masses += F.one_hot(bin_of(drawn), NUM_BINS) / NUM_DRAWS
    return masses
