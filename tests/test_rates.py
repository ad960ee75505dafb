"""Each network learns at the rate of its own, which the defaults, being equal, do not show."""

import importlib

import pytest

RATES = {"actor": 1e-3, "critic": 2e-3, "value": 4e-3}


@pytest.mark.parametrize("script", ["td3_bc", "rebrac", "sac_bc", "edac", "awac", "iql", "discrete_iql"])
def test_each_network_has_its_learning_rate(script):
    module = importlib.import_module(script)
    networks = [name for name in RATES if hasattr(module.HyperParameters, f"{name}_learning_rate")]
    args = module.HyperParameters(**{f"{name}_learning_rate": RATES[name] for name in networks})
    learner = module.build(3, 2, args)
    rates = {weight: group["lr"] for group in learner.optimizer.param_groups for weight in group["params"]}
    for name in networks:
        assert {rates[weight] for weight in getattr(learner, name).parameters()} == {RATES[name]}
