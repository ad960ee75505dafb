"""What offline RL is for, on data small enough to know the answer: stay inside the data, and join its pieces.

Here an algorithm is its `build` and `update` alone, on a replay buffer made of arrays; no environment is involved.
"""

import importlib

import numpy as np
import pytest
import torch
from conftest import batch_of

from common.data import Batch as Episode
from common.data import Dataset, ReplayBuffer
from common.optim import Adam

CPU = torch.device("cpu")
RATES = {
    "bc": {"learning_rate": 3e-3},
    "naf": {"critic_learning_rate": 3e-3},
    "iql": {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "value_learning_rate": 3e-3},
    "idql": {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "value_learning_rate": 3e-3},
    "awr": {"actor_learning_rate": 3e-3, "value_learning_rate": 3e-3},
    "awac": {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3},
    "bcq": {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "vae_learning_rate": 3e-3},
    "rebrac": {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3},
    "cql": {"actor_learning_rate": 1e-2, "critic_learning_rate": 1e-3},  # the actor's is the temperature's, too
    # alpha has to settle: the faster it and the actor are, the longer one swings around the other
    "bear": {
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 3e-3,
        "vae_learning_rate": 3e-3,
        "alpha_learning_rate": 1e-2,
    },
}
SMALL = {"hidden_dims": (32, 32), "batch_size": 64}


def make_buffer(episodes):
    """Of episodes with one number as observation and one as action, on [-1, 1]."""
    ones, num_steps = np.ones(1, np.float32), sum(len(episode.rewards) for episode in episodes)
    return ReplayBuffer(Dataset("test", num_steps, ["0"], -ones, ones, lambda: iter(episodes)), CPU)


def learn(algorithm, buffer, num_updates, **arguments):
    """The deterministic policy, a function from observations [N] to actions [N]."""
    module = importlib.import_module(algorithm)
    torch.manual_seed(0)
    args = module.Args(num_updates=num_updates, **(SMALL | RATES[algorithm] | arguments))
    args.validate()
    learner = module.build(1, 1, args, CPU, Adam)
    for step in range(1, num_updates + 1):
        module.update(learner, batch_of(module, buffer.sample(args.batch_size)), step, args)

    @torch.no_grad()
    def act(*observations):
        inputs = (torch.tensor(observations)[:, None] - buffer.normalization[0]) / buffer.normalization[1]
        return learner.actor(inputs.float())[:, 0].numpy()

    return act


@pytest.fixture(scope="module")
def bandit():
    """One step each: a state of no meaning, an action from the middle of its range, which is also the reward.

    A critic that has seen that more is better will say so of the outer half too, where no action was ever tried.
    """
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(2000, 1, 1)), rng.uniform(-0.5, 0.5, size=(2000, 1, 1))
    end = np.ones(1)
    return make_buffer([Episode(s, a, a[:, 0], s, end) for s, a in zip(states, actions, strict=True)])


STATES = -1.0, -0.3, 0.2, 0.9


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("iql", {"beta": 10.0}),
        ("idql", {"flow_hidden_dims": (32, 32), "num_acting_actions": 16}),
        ("awr", {"beta": 0.3}),
        ("awac", {"beta": 0.1}),
        ("bcq", {"vae_hidden_dims": (32, 32), "kl_weight": 0.05, "latent_clip": 1.5}),
        ("rebrac", {"actor_beta": 3.0}),
        ("cql", {"cql_alpha": 0.3, "target_entropy": -2.0}),
        ("bear", {"vae_hidden_dims": (32, 32), "kl_weight": 0.05, "latent_clip": 1.5, "warm_start": 100}),
        ("cql", {"variant": "mean", "cql_alpha": 0.1, "target_entropy": -2.0, "warm_start": 100}),
    ],
)
def test_chooses_the_best_of_the_data_and_not_beyond(bandit, algorithm, arguments):
    actions = learn(algorithm, bandit, 800, **arguments)(*STATES)
    assert ((actions > 0.25) & (actions < 0.6)).all(), actions


@pytest.mark.parametrize(("algorithm", "arguments"), [("cql", {"cql_alpha": 0.0, "target_entropy": -2.0}), ("naf", {})])
def test_without_an_anchor_it_goes_to_the_edge_of_what_nobody_tried(bandit, algorithm, arguments):
    """Plain SAC, and NAF, whose parabola has its summit where it says."""
    actions = learn(algorithm, bandit, 800, **arguments)(*STATES)
    assert (actions > 0.85).all(), actions


@pytest.fixture(scope="module")
def half_tried():
    """One step each: a state of no meaning, the first or the second of three actions, -0.8 or -0.4 as the reward.

    The third was never tried: no reward speaks against it, and neither does one for it.
    """
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(2000, 1, 1)), rng.integers(2, size=(2000, 1))
    episodes = [Episode(s, a, 0.4 * a - 0.8, s, np.ones(1)) for s, a in zip(states, actions, strict=True)]
    first, last = np.array([0]), np.array([2])
    return ReplayBuffer(Dataset("test", 2000, ["0"], first, last, lambda: iter(episodes), discrete=True), CPU)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "expected"),
    [
        ("fqi", {}, 2),  # at first its Q is near 0, above all of the rewards, and nothing moves it
        ("discrete_iql", {"beta": 10.0, "actor_learning_rate": 3e-3, "value_learning_rate": 3e-3, "tau": 0.05}, 1),
        ("discrete_cql", {"cql_alpha": 0.0}, 2),
        ("discrete_cql", {"cql_alpha": 0.1}, 1),
        ("discrete_cql", {"cql_alpha": 0.0, "bc_weight": 0.2, "behaviour_learning_rate": 3e-3}, 1),
        ("discrete_bcq", {"behaviour_learning_rate": 3e-3, "threshold": 0.0}, 2),
        ("discrete_bcq", {"behaviour_learning_rate": 3e-3}, 1),
    ],
)
def test_an_action_that_never_occurs(half_tried, algorithm, arguments, expected):
    module = importlib.import_module(algorithm)
    torch.manual_seed(0)
    args = module.Args(num_updates=400, critic_learning_rate=3e-3, **(SMALL | arguments))
    args.validate()
    learner = module.build(1, 3, args, CPU, Adam)
    for step in range(1, 401):
        module.update(learner, batch_of(module, half_tried.sample(64)), step, args)
    with torch.no_grad():
        assert learner.actor(torch.linspace(-1, 1, 9)[:, None]).argmax(dim=1).tolist() == [expected] * 9


START, OTHER_START, MIDDLE, SAFE = -2.0, -1.0, 1.0, 2.0


@pytest.fixture(scope="module")
def crossroads():
    """Two steps. From START, up leads to MIDDLE and down to SAFE, where 0.5 is certain; in MIDDLE, up pays 1, down 0.

    Who came from START always went down in MIDDLE; only episodes from OTHER_START went up there. So the best path from
    START is in no episode: its first half ended badly, and looks worse than the safe way to whoever sums rewards.
    """
    rng = np.random.default_rng(0)

    def episode(first, first_action, second, second_action, reward):
        actions = np.array([[first_action], [second_action]]) + rng.uniform(-0.1, 0.1, size=(2, 1))
        observations = np.array([[first], [second]])
        following = np.array([[second], [0.0]])
        return Episode(observations, actions, np.array([0.0, reward]), following, np.array([0.0, 1.0]))

    kinds = [(START, 0.5, MIDDLE, -0.5, 0.0), (START, -0.5, SAFE, -0.5, 0.5), (OTHER_START, -0.5, MIDDLE, 0.5, 1.0)]
    return make_buffer([episode(*kind) for kind in kinds for _ in range(100)])


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("iql", {"expectile": 0.9, "beta": 10.0, "tau": 0.05}),
        ("idql", {"expectile": 0.9, "flow_hidden_dims": (32, 32), "tau": 0.05}),
        ("awac", {"beta": 0.1, "tau": 0.05}),
        ("cql", {"cql_alpha": 0.2, "tau": 0.05}),
        ("bcq", {"vae_hidden_dims": (32, 32), "tau": 0.05}),
    ],
)
def test_joins_the_best_path_from_two_episodes(crossroads, algorithm, arguments):
    start, middle = learn(algorithm, crossroads, 1500, **arguments)(START, MIDDLE)
    assert start > 0.25 and middle > 0.25


def test_behaviour_cloning_does_not(crossroads):
    start, middle = learn("bc", crossroads, 800)(START, MIDDLE)
    assert start < 0.25 and middle < 0.25


@pytest.fixture(scope="module")
def discrete_crossroads():
    """The same with up as 1 and down as 0, and most of the data going down in START and in MIDDLE."""

    def episode(first, first_action, second, second_action, reward):
        actions, rewards = np.array([first_action, second_action]), np.array([0.0, reward])
        return Episode(np.array([[first], [second]]), actions, rewards, np.array([[second], [0.0]]), np.array([0, 1.0]))

    kinds = [(START, 1, MIDDLE, 0, 0.0)] * 150 + [(OTHER_START, 0, MIDDLE, 1, 1.0)] * 100
    kinds += [(START, 0, SAFE, number % 2, 0.5) for number in range(300)]
    first, last = np.array([0]), np.array([1])
    episodes = [episode(*kind) for kind in kinds]
    return ReplayBuffer(Dataset("test", 1100, ["0"], first, last, lambda: iter(episodes), discrete=True), CPU)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "joins"),
    [
        ("fqi", {}, True),
        (
            "discrete_iql",
            {"expectile": 0.9, "beta": 10.0, "actor_learning_rate": 3e-3, "value_learning_rate": 3e-3},
            True,
        ),
        ("discrete_iql", {"beta": 0.0, "actor_learning_rate": 3e-3}, False),  # which is cloning
        ("discrete_cql", {"cql_alpha": 0.05}, True),
        ("discrete_bcq", {"behaviour_learning_rate": 3e-3}, True),
        ("discrete_bcq", {"behaviour_learning_rate": 3e-3, "threshold": 0.99}, False),
    ],
)
def test_joins_the_best_path_with_discrete_actions(discrete_crossroads, algorithm, arguments, joins):
    module = importlib.import_module(algorithm)
    torch.manual_seed(0)
    args = module.Args(critic_learning_rate=3e-3, tau=0.05, **(SMALL | arguments))
    args.validate()
    learner = module.build(1, 2, args, CPU, Adam)
    for step in range(1, 801):
        module.update(learner, batch_of(module, discrete_crossroads.sample(64)), step, args)
    mean, std = discrete_crossroads.normalization
    with torch.no_grad():
        actions = learner.actor(((torch.tensor([[START], [MIDDLE]]) - mean) / std).float()).argmax(dim=1)
    assert actions.tolist() == [int(joins)] * 2
