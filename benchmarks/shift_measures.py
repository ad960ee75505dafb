"""The calculations of shift_report.py, on plain tensors: what each measures, and where it fails, is written there."""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BINS = 15  # of each action dimension, over [-1, 1]


# --- Neighbours -----------------------------------------------------------------------------------------------------


def nearest(points: Tensor, references: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` references [R, dim] nearest to each of the points [n, dim], or all if there are no more.

    Their Euclidean distances, the nearest first, and their rows: [n, count] each.
    """
    count = min(count, len(references))
    mode = "donot_use_mm_for_euclid_dist"  # else a point that is a reference can lie apart from it
    distances_of = partial(torch.cdist, x2=references, compute_mode=mode)
    found = [distances_of(some).topk(count, largest=False) for some in points.split(256)]
    return torch.cat([distances for distances, _ in found]), torch.cat([rows for _, rows in found])


def coverage(values: Tensor, scale: Tensor, level: float = 0.95) -> float:
    """Share of the values that are at most the `level` quantile of the scale, [any] each."""
    return float((values <= scale.quantile(level)).float().mean())


# --- Behaviour ------------------------------------------------------------------------------------------------------

# Masses [n, parts, bins] are those of an action's parts: of each entry of a vector, or of a choice as a whole.


def bin_edges() -> Tensor:
    return torch.linspace(-1, 1, NUM_BINS + 1)


def bin_of(actions: Tensor) -> Tensor:
    """The bin of each action [..., action_dim] in [-1, 1], of the same shape."""
    return torch.bucketize(actions.contiguous(), bin_edges()[1:-1])


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """sum_j sum_b p_jb log(p_jb / q_jb), of products of [n, parts, bins]: [n]."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=1e-30))).sum(dim=(1, 2))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """1/2 sum_b |p_jb - q_jb|, averaged over the action's parts j: [n]."""
    return 0.5 * (p - q).abs().sum(dim=2).mean(dim=1)


def surprise(behaviour: Tensor, bins: Tensor) -> Tensor:
    """-sum_j log behaviour_j(b_j), from masses [n, parts, bins] and bins b [n, parts]: [n]."""
    chosen = behaviour.gather(2, bins[..., None]).squeeze(2)
    return -chosen.clamp(min=1e-30).log().sum(dim=1)


def mlp(input_dim: int, output_dim: int, width: int = 128) -> nn.Sequential:
    layers = nn.Linear(input_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, output_dim)
    return nn.Sequential(*layers)


def fit_behaviour(states: Tensor, bins: Tensor, num_bins: int, num_updates: int) -> nn.Module:
    """A network from states [N, dim] to the masses [n, parts, num_bins] that the data's actions, in the bins
    [N, parts], have there, by maximum likelihood: each part on its own, given the state.
    """
    parts = bins.shape[1]
    net = nn.Sequential(mlp(states.shape[1], parts * num_bins), nn.Unflatten(1, (parts, num_bins)))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(num_updates):
        rows = torch.randint(len(states), (512,))
        loss = F.cross_entropy(net(states[rows]).flatten(0, 1), bins[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nn.Sequential(net, nn.Softmax(dim=2)).requires_grad_(False)


# --- Density ratio --------------------------------------------------------------------------------------------------


def fit_classifier(zeros: Tensor, ones: Tensor, num_updates: int) -> nn.Module:
    """A network from points [n, dim] to the logit [n] that they are of the ones, both kinds being as frequent. So it
    is the logarithm of the ratio of their densities, d_ones / d_zeros.
    """
    net = nn.Sequential(mlp(zeros.shape[1], 1), nn.Flatten(0))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    labels = torch.arange(512) % 2
    for _ in range(num_updates):
        rows = [points[torch.randint(len(points), (256,))] for points in (zeros, ones)]
        loss = F.binary_cross_entropy_with_logits(net(torch.stack(rows, dim=1).flatten(0, 1)), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def accuracy(logits_of_zeros: Tensor, logits_of_ones: Tensor) -> float:
    """Share that is told apart rightly, both kinds counting the same: 0.5 is chance."""
    return float(((logits_of_zeros < 0).float().mean() + (logits_of_ones >= 0).float().mean()) / 2)


def effective_share(logits: Tensor) -> float:
    """(sum w)^2 / (n sum w^2) min(1, mean w) with the weights w = exp(logit) of n data.

    The first factor is the share of the data that carries the weight. The mean of w is 1, and what it falls short of 1
    by is the share of the ones that are where no data is.
    """
    w = logits.double().exp()
    return float(w.sum().square() / (len(w) * w.square().sum()) * w.mean().clamp(max=1))


# --- Returns --------------------------------------------------------------------------------------------------------


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} of one episode's rewards [T], 0 after its end: [T], float64."""
    sums = list(itertools.accumulate(reversed(rewards.tolist()), lambda following, reward: reward + gamma * following))
    return torch.tensor(sums[::-1], dtype=torch.float64)
