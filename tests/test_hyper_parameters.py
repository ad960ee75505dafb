"""Every hyper-parameter changes what is learned, each network has the rate of its own, and what updates draw."""

import importlib
import inspect
import math
from dataclasses import fields
from functools import cache
from operator import attrgetter

import pytest
import torch
from conftest import (
    DISCRETE,
    REMEMBER,
    SCRIPTS,
    SHORT,
    SHORTER,
    assert_same,
    batch_of,
    checkpoint,
    discrete_batch,
    random_batch,
    run_script,
)

from common.optim import Adam

CPU = torch.device("cpu")
LEARN = [name for name in SCRIPTS if name not in (*REMEMBER, "fqe")]  # from batches of transitions
SMALL = {
    "hidden_dims": (5, 4),
    "vae_hidden_dims": (5, 4),
    "flow_hidden_dims": (5, 4),
    "dynamics_hidden_dims": (5,),
    "num_acting_actions": 5,
    "num_models": 3,
    "num_elites": 2,
    "rollout_batch_size": 10,
    "batch_size": 8,
    "gamma": 0.9,
    "warm_start": 0,
    "updates_per_step": 2,
}
OF_MODELS = "rollout", "dynamics", "max_dynamics", "num_models", "num_elites"  # how these names begin
IN_MAIN = {  # or in rollouts, and not in `build`, `update` or the policy's actions: tested there
    "awr": ["gamma", "td_lambda"],
    "combo": ["real_ratio"],
    "discrete_cql": ["legal_actions"],
    "discrete_bcq": ["legal_actions"],
    "discrete_iql": ["legal_actions"],
    "fqi": ["legal_actions"],
    "naf": ["imagined_ratio", "imagined_until", "exploration_noise"],
    "mbpo": ["updates_per_step", "model_every", "real_ratio"],
    "mobile": ["real_ratio"],
    "mopo": ["real_ratio", "penalty", "penalty_coefficient"],
    "morel": ["threshold", "halt_penalty"],
}
WITH = {  # what must be on
    ("cql", "rho"): {"variant": "rho"},
    ("cql", "target_gap"): {"lagrange": True},
    ("cal_ql", "target_gap"): {"lagrange": True},
    ("combo", "num_samples"): {"regularizer": "logsumexp"},
    ("discrete_cql", "behaviour_learning_rate"): {"bc_weight": 1.0},
    ("fqi", "double"): {"critic_learning_rate": 0.1},
    ("mobile", "penalty_coefficient"): {"real_ratio": 0.0},
    ("mobile", "num_samples"): {"real_ratio": 0.0},
}
OTHERS = {  # where twice as much is none, or makes no difference
    "gamma": 0.5,
    "weight_clip": 0.5,
    "threshold": 0.9,
    "variant": "rho",
    "rho": "uniform",
    "kernel": "gaussian",
    "regularizer": "logsumexp",
    "q_aggregation": "min",
    "expectile": 0.6,
    "q_mix": 0.4,
    "tau": 0.5,
    "noise_clip": 0.01,
    "target_entropy": 1.0,
    "warm_start": 2,
    "z_clip": 0.01,
    "huber_delta": 0.01,
    "latent_clip": 0.01,
    "num_acting_actions": 20,
    "expansion": "steve",
    "log_alpha_max": -4.0,
    "min_target": 0.0,
    "gradient_clip": 1e-3,
    "bc_weight": 1.0,
}


def build(script, args):
    torch.manual_seed(0)
    return script.build(3, 3 if script.__name__ in DISCRETE else 2, args, CPU, Adam)


def data(script, batch_size=8):
    batch = discrete_batch() if script.__name__ in DISCRETE else random_batch(batch_size)
    return batch_of(script, batch._replace(rewards=3 * batch.rewards))


@cache
def trained(script, *arguments):
    """All weights and metrics of a few updates, and what the policy does then; `arguments` are pairs."""
    known = {field.name for field in fields(script.Args)}
    args = script.Args(**{name: value for name, value in (SMALL | dict(arguments)).items() if name in known})
    learner = build(script, args)
    numbers = [network for network in learner if isinstance(network, torch.nn.Module)]
    metrics = [script.update(learner, data(script), step, args) for step in range(1, 7)]
    found = [weight.detach().flatten() for network in numbers for weight in network.parameters()]
    found += [torch.stack([value.detach().float() for value in row.values()]) for row in metrics]
    found.append(learner.actor(random_batch(30).observations).detach().flatten().float())
    return torch.cat(found)


def told():
    """Scripts and the fields that `build`, `update` and the policy take."""
    for name in LEARN:
        script = importlib.import_module(name)
        for field in fields(script.HyperParameters):
            elsewhere = field.name in (*IN_MAIN.get(name, ()), "cosine_decay") or field.name.startswith(OF_MODELS)
            if not elsewhere:
                yield pytest.param(script, field, id=f"{name}-{field.name}")


@pytest.mark.parametrize(("script", "field"), list(told()))
def test_every_hyper_parameter_does_something(script, field):
    """Two trainings from one seed that differ in it alone come to something else."""
    more = WITH.get((script.__name__, field.name), {})
    before = SMALL.get(field.name, field.default)
    if isinstance(before, bool):
        other = not before
    elif isinstance(before, tuple):
        other = (6, 5)
    elif (script.__name__, field.name) == ("sql", "variant"):
        other = "eql"
    else:
        other = OTHERS[field.name] if field.name in OTHERS else 2 * before
    assert other != before
    one, another = trained(script, *more.items()), trained(script, *more.items(), (field.name, other))
    assert one.shape != another.shape or not torch.equal(one, another)


@pytest.mark.parametrize("name", LEARN)
def test_targets_start_as_what_they_follow(name):
    script = importlib.import_module(name)
    known = {field.name for field in fields(script.Args)}
    learner = build(script, script.Args(**{key: value for key, value in SMALL.items() if key in known}))
    parts = dict(learner.actor.named_children()) | learner._asdict()
    targets = [key for key in parts if key.startswith("target_")]
    assert targets or name in ("bc", "discrete_bc")
    for key in targets:
        assert_same(parts[key].state_dict(), parts[key.removeprefix("target_")].state_dict())


@pytest.mark.parametrize("name", [name for name in SCRIPTS if hasattr(importlib.import_module(name), "EnsembleLinear")])
def test_layers_start_as_pytorchs_do(name):
    """Uniform within 1 / sqrt(inputs), here 1/8; with the outputs in their place within 1/16."""
    layer = importlib.import_module(name).EnsembleLinear(2, 64, 256)
    assert all(0.12 < numbers.abs().max() <= 1 / 8 for numbers in layer.parameters())


CRITIC_IN_ACTOR = {"critic": ["actor.critic"]}
NETWORKS = {  # that learn at a rate, where their name is another
    "bcq": CRITIC_IN_ACTOR | {"actor": ["actor.perturbation"], "vae": ["encoder", "actor.decoder"]},
    "bear": CRITIC_IN_ACTOR | {"actor": ["actor.policy"], "vae": ["encoder", "decoder"]},
    "cql": {"critic": ["critic", "multiplier"]},
    "cal_ql": {"critic": ["critic", "multiplier"]},
    "diffusion_ql": {"actor": ["actor.diffusion"]},
    "discrete_bcq": CRITIC_IN_ACTOR | {"behaviour": ["actor.behaviour"]},
    "discrete_cql": CRITIC_IN_ACTOR | {"behaviour": ["actor.behaviour"]},
    "fqi": CRITIC_IN_ACTOR,
    "fql": CRITIC_IN_ACTOR | {"actor": ["actor.policy"]},
    "idql": {"actor": ["actor.flow"]},
    "naf": CRITIC_IN_ACTOR,
}


@pytest.mark.parametrize("name", LEARN)
def test_each_network_has_its_learning_rate(name):
    """Which the defaults, mostly equal, do not show. The optimizer has no other weights."""
    script = importlib.import_module(name)
    suffix = "_learning_rate"
    known = [field.name.removesuffix(suffix) for field in fields(script.HyperParameters) if field.name.endswith(suffix)]
    rates = {part: 0.5 ** (5 + number) for number, part in enumerate(known) if part != "dynamics"}
    small = SMALL | {f"{part}{suffix}": rate for part, rate in rates.items()} | {"bc_weight": 1.0}
    learner = build(script, script.Args(**{key: value for key, value in small.items() if hasattr(script.Args, key)}))
    found = {weight: float(group["lr"]) for group in learner.optimizer.param_groups for weight in group["params"]}
    for part, rate in rates.items():
        for network in NETWORKS.get(name, {}).get(part, [part]):
            assert {found.pop(weight) for weight in attrgetter(network)(learner).parameters()} == {rate}
    assert not found or name == "bc"


DRAWN = {"noise", "latents", "uniform"}


def drawing():
    """Scripts, and the function to whom `update` hands what it drew."""
    for name in LEARN:
        script = importlib.import_module(name)
        function = "total_loss" if hasattr(script, "total_loss") else "critic_loss"
        if DRAWN & set(inspect.signature(getattr(script, function, print)).parameters):
            yield pytest.param(script, function, id=name)


@pytest.mark.parametrize(("script", "function"), list(drawing()))
def test_updates_draw_what_the_losses_ask_for(script, function, monkeypatch):
    """Standard normal noise or, as `uniform`, actions on [-1, 1], and others at each update."""
    drawn, loss = [], getattr(script, function)

    def spy(*words):
        bound = inspect.signature(loss).bind(*words).arguments
        drawn.append({key: value for key, value in bound.items() if key in DRAWN})
        return loss(*words)

    monkeypatch.setattr(script, function, spy)
    small = SMALL | {"batch_size": 1024}
    learner_args = script.Args(**{key: value for key, value in small.items() if hasattr(script.Args, key)})
    learner = build(script, learner_args)
    for step in (1, 2):
        script.update(learner, data(script, 1024), step, learner_args)
    for key, first in drawn[0].items():
        assert abs(first.mean()) < 0.1 and not torch.equal(first, drawn[1][key])
        if key == "uniform":
            assert -1 <= first.min() < -0.99 and 0.99 < first.max() <= 1
        else:
            assert 0.95 < first.std() < 1.05 and first.abs().max() > 2.5


COSINE = [name for name in LEARN if hasattr(importlib.import_module(name).Args, "cosine_decay")]


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("name", COSINE)
def test_the_actors_rate_decays_if_told_to(name, decays, tmp_path, request):
    request.getfixturevalue("cartpole" if name in DISCRETE else "pendulum")
    words = [*SHORT, *SHORTER.get(name, []), "--batch-size", "16", "--num-updates", "4"]
    words += ["--cosine-decay" if decays else "--no-cosine-decay", "--actor-learning-rate", "0.01"]
    run = run_script(name, *words, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    rate = checkpoint(tmp_path / "run")["learner"]["optimizer"]["0"]  # of the first group, the actor
    assert float(rate) == pytest.approx(0.005 * (1 + math.cos(3 / 4 * math.pi)) if decays else 0.01)


@pytest.mark.parametrize("name", ["rlpd", "cal_ql"])
def test_the_share_of_data_is_that_of_the_command_line(name, tmp_path, pendulum, monkeypatch):
    script, ratios = importlib.import_module(name), []
    draw_both = script.draw_both
    monkeypatch.setattr(script, "draw_both", lambda *words: ratios.append(words[2]) or draw_both(*words))
    words = ["--num-updates", "30"] if name == "rlpd" else ["--num-updates", "1", "--online-steps", "2"]
    words += [*SHORT, *SHORTER[name], "--batch-size", "16", "--data-ratio", "0.25", "--run-dir", str(tmp_path / "run")]
    run = run_script(name, *words)
    assert run.returncode == 0, run.stderr
    assert {*ratios} == {0.25}
