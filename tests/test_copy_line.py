"""What stands above the copy line of a script needs PyTorch alone, and trains to the weights of the script itself."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
import torch
from conftest import DISCRETE, ROOT, SCRIPTS

from common.optim import Adam

SMALL = {"hidden_dims": (16, 16)}
SMALLER = {
    "bcq": {"vae_hidden_dims": (16,), "num_target_actions": 3, "num_acting_actions": 5},
    "diffusion_ql": {"diffusion_steps": 2, "num_acting_actions": 5},
    "fql": {"flow_steps": 2, "num_acting_actions": 5},
    "idql": {"flow_hidden_dims": (16,), "flow_steps": 3, "num_acting_actions": 5},
    "cql": {"num_samples": 3},
    "cal_ql": {"num_samples": 3},
    "edac": {"num_critics": 3},
    "rlpd": {"num_critics": 3, "updates_per_step": 2},
    "bear": {"vae_hidden_dims": (16,), "num_samples": 3, "num_acting_actions": 5, "warm_start": 2},
    "mopo": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 1, "rollout_batch_size": 10},
    "combo": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 1, "rollout_batch_size": 10},
    "mbpo": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 1, "rollout_batch_size": 10},
    "mobile": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 2, "rollout_batch_size": 10},
    "morel": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 2, "rollout_batch_size": 10},
    "mve": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 2},
    "naf": {"dynamics_hidden_dims": (8,), "num_models": 2, "num_elites": 2, "imagined_ratio": 0.5},
    "pets": {"num_models": 2, "num_particles": 2},
}

# the code of a user who pasted the text into a file of his own, where nothing of this repository is to be found; he
# tries one folder after the other, as to import PyTorch takes longer than any of them
USER = """
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("common", "gymnasium", "minari"):
            raise ImportError(f"{name} is not to be imported")

import sys
sys.meta_path.insert(0, Nowhere())
del sys.path[0]

def paste(folder):
    pasted = open(f"{folder}/pasted.py").read()
    sys.modules["pasted"] = module = type(sys)("pasted")
    exec(compile(pasted, "pasted.py", "exec"), module.__dict__)

    import torch
    data = torch.load(f"{folder}/data.pt")
    torch.manual_seed(0)
    args = module.HyperParameters(**data["args"])
    learner = module.build(3, 2, args)
    assert isinstance(learner.optimizer, torch.optim.Adam)
    for step, columns in enumerate(data["batches"], start=1):
        torch.manual_seed(step)
        module.update(learner, module.Batch(**columns), step, args)
    networks = [part for part in learner if isinstance(part, torch.nn.Module)]
    torch.save([weight.detach() for network in networks for weight in network.parameters()], f"{folder}/weights.pt")

for line in sys.stdin:
    try:
        paste(line.strip())
        print("trained", flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", USER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=elsewhere, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        yield process


def above_the_line(script):
    text = (ROOT / "algorithms" / f"{script}.py").read_text()
    (line,) = re.findall(r"^# .*copy line.*$", text, re.MULTILINE)
    return text[: text.index(line)]


def random_columns(script, module, seed):
    """The fields of the script's Batch, for observations of 3 and actions of 2 numbers, or 2 discrete ones."""
    generator = torch.Generator().manual_seed(seed)
    lead = {"fqe": (3, 8), "decision_transformer": (8, 4)}.get(script, (8,))

    def normal(*shape):
        return torch.randn(*lead, *shape, generator=generator)

    actions = (normal() > 0).long() if script in DISCRETE else normal(2).tanh()
    columns = {"observations": normal(3), "actions": actions, "rewards": normal(), "next_observations": normal(3)}
    columns |= {"terminations": (normal() > 1).float(), "returns": normal(), "next_actions": normal(2).tanh()}
    columns |= {"returns_to_go": normal(), "timesteps": torch.arange(lead[-1]).expand(lead), "mask": normal() < 1}
    return {name: columns[name] for name in module.Batch._fields}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_text_above_the_line_needs_torch_and_the_standard_library_alone(script):
    tree = ast.parse(above_the_line(script))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in imports for alias in node.names}
    assert {name.split(".")[0] for name in names} <= {"torch"} | sys.stdlib_module_names
    for definition in ("HyperParameters", "Batch", "Learner", "build", "update"):
        assert any(getattr(node, "name", None) == definition for node in tree.body), definition


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_text_above_the_line_trains_to_the_scripts_weights(script, tmp_path, user):
    module = importlib.import_module(script)
    known = SMALL | SMALLER.get(script, {}) | ({"num_members": 3} if script == "fqe" else {})
    batches = [random_columns(script, module, seed) for seed in range(6)]
    (tmp_path / "pasted.py").write_text(above_the_line(script))
    torch.save({"args": known, "batches": batches}, tmp_path / "data.pt")
    print(tmp_path, file=user.stdin, flush=True)
    assert user.stdout.readline() == "trained\n"

    torch.manual_seed(0)
    args = module.Args(**known)
    learner = module.build(3, 2, args, torch.device("cpu"), Adam)
    networks = [part for part in learner if isinstance(part, torch.nn.Module)]
    weights = [weight for network in networks for weight in network.parameters()]
    before = [weight.detach().clone() for weight in weights]
    for step, columns in enumerate(batches, start=1):
        torch.manual_seed(step)
        module.update(learner, module.Batch(**columns), step, args)
    pasted = torch.load(tmp_path / "weights.pt")
    assert len(pasted) == len(weights)
    assert any(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    for ours, theirs in zip(weights, pasted, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-4)
