"""--compile and --precision: the same training, faster. What needs a GPU skips without one."""

import importlib

import pytest
import torch
from conftest import ALGORITHMS, DISCRETE, SHORT, SHORTER, assert_one_line, batch_of, run_script
from torch import Tensor

from common.data import Batch
from common.optim import Adam, compiled

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [(name, {}) for name in (*ALGORITHMS, "sac", "mbpo")]
    + [
        ("cql", {"variant": "rho", "lagrange": True}),
        ("cql", {"variant": "var"}),
        ("cql", {"warm_start": 15, "max_backup": True, "gap_softness": 2.0}),
        ("cql", {"variant": "mean", "entropy_in_backup": True}),
        ("discrete_cql", {"bc_weight": 1.0}),
        ("fqi", {"double": True}),
        ("mve", {"expansion": "steve"}),
        ("sql", {"variant": "eql"}),
    ],
)
def test_compiled_updates_equal_eager_ones(algorithm, arguments, data, double_precision):
    """Compiled losses must train to the same weights, or their speed means nothing.

    In double precision: Adam turns the rounding of a gradient near zero into a step as long as any other.
    """
    module, device = importlib.import_module(algorithm), torch.device("cpu")
    finals = []
    for compile in (False, True):
        args = module.Args(hidden_dims=(32, 32), compile=compile, batch_size=64, **arguments)
        torch.manual_seed(0)
        learner = module.build(data.observation_dim, data.num_actions or data.action_dim, args, device, Adam)
        initial = [weight.clone() for weight in learner.actor.parameters()]
        train = compiled(module.update, learner, args)
        for step in range(1, 31):
            batch = [tensor.double() if tensor.is_floating_point() else tensor for tensor in data.sample(64)]
            train(learner, batch_of(module, Batch(*batch)), step, args)
        finals.append(
            [
                weight.detach().clone()
                for part in learner
                if isinstance(part, torch.nn.Module)
                for weight in part.parameters()
            ]
        )
        assert not all(map(torch.equal, initial, learner.actor.parameters()))
    for eager, graph in zip(*finals, strict=True):
        torch.testing.assert_close(eager, graph, atol=1e-9, rtol=1e-7)


@pytest.mark.slow
def test_a_graph_looks_for_nothing_where_the_graph_before_it_did(pendulum):
    """ReBRAC's actor has no gradient at its first update, and more weights here than BC's."""
    for algorithm, hidden_dims in (("rebrac", (8, 8, 8)), ("bc", (8,))):
        module = importlib.import_module(algorithm)
        args = module.Args(hidden_dims=hidden_dims, compile=True, batch_size=64)
        learner = module.build(pendulum.observation_dim, pendulum.action_dim, args, torch.device("cpu"), Adam)
        train = compiled(module.update, learner, args)
        metrics = [train(learner, batch_of(module, pendulum.sample(64)), step, args) for step in (1, 2)]
        assert metrics[-1]["actor/loss"].isfinite()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more", "first", "then"),
    [
        *((name, [], ["--num-updates", "10"], ["--num-updates", "20"]) for name in ("awr", "td3_bc", "mopo", "naf")),
        ("iql", ["--num-updates", "10"], ["--online-steps", "10"], ["--online-steps", "20"]),
        ("td3_bc", ["--num-updates", "10"], [], ["--online-steps", "20"]),
        ("cal_ql", ["--num-updates", "10"], ["--online-steps", "10"], ["--online-steps", "20"]),
    ],
)
def test_a_compiled_run_resumes_to_the_same_bits(algorithm, more, first, then, tmp_path, pendulum):
    """Offline, and where the policy acts."""
    arguments = ["--compile", *more, *SHORT, *SHORTER.get(algorithm, ()), "--run-dir"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_script(algorithm, *then, *arguments, str(whole)).returncode == 0
    assert run_script(algorithm, *first, *arguments, str(stopped)).returncode == 0
    assert run_script(algorithm, "--resume", *then, *arguments, str(stopped)).returncode == 0
    policies = [torch.load(folder / "policy.pt", weights_only=True)["actor"] for folder in (whole, stopped)]
    assert policies[0].keys() == policies[1].keys()
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


def test_without_a_compiler(tmp_path):
    arguments = ["--compile", "--num-updates", "3", *SHORT, "--run-dir", str(tmp_path / "run")]
    run = run_script("bc", *arguments, CXX="no-such-compiler")
    assert_one_line(run, "--compile: there is no compiler 'no-such-compiler'")
    assert not (tmp_path / "run").exists()


# --- Precision ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bf16_rounds_the_products_alone(algorithm, data):
    """Weights stay float32; an update is near float32's, and not the same."""
    module, device = importlib.import_module(algorithm), torch.device("cpu")
    steps = []
    for precision in ("float32", "bf16"):
        args = module.Args(hidden_dims=(16, 16), precision=precision, batch_size=64)
        torch.manual_seed(0)
        learner = module.build(data.observation_dim, data.num_actions or data.action_dim, args, device, Adam)
        before = torch.cat([weight.detach().flatten() for weight in learner.actor.parameters()])
        batch = batch_of(module, data.sample(64))
        metrics = compiled(module.update, learner, args)(learner, batch, 20, args)  # which trains RLPD's actor, too
        weights = list(learner.actor.parameters())
        assert all(weight.dtype == torch.float32 for weight in weights)
        assert all(value.isfinite() for value in metrics.values())
        steps.append(torch.cat([weight.detach().flatten() for weight in weights]) - before)
    assert not torch.equal(*steps)
    # Adam's first step is the sign of the gradient: rounding turns few of them
    assert (steps[0].sign() == steps[1].sign()).float().mean() > 0.9


def test_a_resumed_run_keeps_its_precision(tmp_path):
    folder = str(tmp_path / "run")
    assert run_script("bc", "--num-updates", "2", *SHORT, "--precision", "bf16", "--run-dir", folder).returncode == 0
    run = run_script("bc", "--num-updates", "4", *SHORT, "--resume", "--run-dir", folder)
    assert run.returncode == 2
    assert "precision is bf16 in it, not float32" in run.stderr


# --- GPU ---


def train_on_cuda(algorithm: str, compile: bool, num_updates: int, sync_debug_mode: str = "default") -> list[Tensor]:
    """The weights after updates on batches that are the same in every call; the third and later ones are watched."""
    module = importlib.import_module(algorithm)
    args = module.Args(hidden_dims=(32, 32), compile=compile, batch_size=64, device="cuda")
    torch.manual_seed(0)
    learner = module.build(3, 2 if algorithm in DISCRETE else 1, args, CUDA, Adam)
    update = compiled(module.update, learner, args)
    for step in range(1, num_updates + 1):
        x = torch.randn(64, 9, device=CUDA)
        actions = (x[:, 3] > 0).long() if algorithm in DISCRETE else x[:, 3:4].tanh()
        batch = Batch(x[:, :3], actions, x[:, 4], x[:, 5:8], (x[:, 8] > 1).to(x.dtype))
        torch.cuda.set_sync_debug_mode(sync_debug_mode if step > 2 else "default")
        update(learner, batch_of(module, batch), step, args)
    torch.cuda.set_sync_debug_mode("default")
    networks = [part for part in learner if isinstance(part, torch.nn.Module)]
    return [weight.detach().clone() for network in networks for weight in network.parameters()]


@pytest.mark.parametrize("algorithm", ["td3_bc", "cql", "mopo"])
def test_what_an_update_changes_is_known_to_stay_where_it_is(algorithm, data, monkeypatch):
    """PyTorch makes no CUDA graph of an update that changes any other input, and says so in its log alone."""
    inputs = []

    def remember(graph, tensors):
        inputs.extend(tensors)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda update, **_: compile(update, fullgraph=True, backend=remember))
    module = importlib.import_module(algorithm)
    args = module.Args(hidden_dims=(8,), batch_size=4, compile=True)
    learner = module.build(data.observation_dim, data.action_dim, args, torch.device("cpu"), Adam)
    compiled(module.update, learner, args)(learner, batch_of(module, data.sample(4)), 1, args)
    changed = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor._version > 0]
    assert len(changed) > 10
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in changed)


@needs_cuda
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_never_waits_for_the_device(algorithm):
    try:
        train_on_cuda(algorithm, False, 4, sync_debug_mode="error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cuda_graphs_train_to_eagers_weights(algorithm, double_precision):
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    eager, graph = (train_on_cuda(algorithm, compile, 35) for compile in (False, True))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    for expected, found in zip(eager, graph, strict=True):
        torch.testing.assert_close(expected, found, atol=1e-9, rtol=1e-7)


@needs_cuda
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_on_the_device_can_be_resumed(algorithm, tmp_path, pendulum):
    """Sums on a GPU may go in another order, so not to the same bits."""
    decay = algorithm in ("iql", "idql", "sql", "xql", "discrete_iql")  # which is over all updates
    own = ["--no-cosine-decay"] if decay else SHORTER.get(algorithm, [])
    arguments = ["--device", "cuda", *SHORT, *own, "--run-dir"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_script(algorithm, "--num-updates", "20", *arguments, str(whole)).returncode == 0
    assert run_script(algorithm, "--num-updates", "10", *arguments, str(stopped)).returncode == 0
    assert run_script(algorithm, "--resume", "--num-updates", "20", *arguments, str(stopped)).returncode == 0
    policies = [torch.load(folder / "policy.pt", weights_only=True)["actor"] for folder in (whole, stopped)]
    for name in policies[0]:
        torch.testing.assert_close(policies[0][name], policies[1][name], atol=1e-4, rtol=1e-3)
