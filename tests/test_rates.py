"""Each network learns at the rate of its own, which the defaults, being equal, do not show."""

import importlib

import pytest

NAMES = {"actor_learning_rate": 1e-3, "critic_learning_rate": 2e-3, "value_learning_rate": 4e-3}


@pytest.mark.parametrize("script", ["td3_bc", "rebrac", "sac_bc", "edac", "awac", "iql", "discrete_iql"])
def test_each_network_has_its_learning_rate(script):
    module = importlib.import_module(script)
    args = module.HyperParameters(**{n: r for n, r in NAMES.items() if hasattr(module.HyperParameters, n)})
    learner = module.build(3, 2, args)
    rates = {weight: group["lr"] for group in learner.optimizer.param_groups for weight in group["params"]}
    for name, rate in NAMES.items():
        for weight in getattr(getattr(learner, name.split("_")[0], None), "parameters", list)():
            assert rates[weight] == rate
