"""Whatever network a script defines is what acts: in evaluation, for load_policy, and in the tools."""

import json
import re

import numpy as np
import pytest
import torch
import tyro
from conftest import DISCRETE, ROOT, SHORT, SHORTER, assert_one_line, checkpoint, run_script, short_environments

from common.command_line import BadInput
from common.evaluation import FINAL_SEED, evaluate, load_policy, load_script

CHANGED = {"iql": "Actor", "td3_bc": "Actor", "sac_bc": "Actor", "bcq": "Decoder"}  # classes
CHANGED |= {"discrete_iql": "Actor", "discrete_cql": "Critic"}
RESIDUAL = """class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


"""
LAYERS = {  # between an input of I and an output of O numbers
    "layer norm": "nn.Linear(I, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, O)",
    "deeper": "nn.Linear(I, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 10), nn.ReLU(), nn.Linear(10, O)",
    "residual": "nn.Linear(I, 16), Residual(nn.Sequential(nn.ReLU(), nn.Linear(16, 16))), nn.Linear(16, O)",
    "dropout": "nn.Linear(I, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, O)",
}


def write_script(folder, script, change):
    """A copy of a script with another network, and its path. SAC+BC's Actor keeps its two heads."""
    text = (ROOT / "algorithms" / f"{script}.py").read_text()
    if change == "GELU":
        text, count = re.subn(r"nn\.ReLU\(inplace=True\)", "nn.GELU()", text)
    else:
        before, name, after = text.partition(f"class {CHANGED[script]}(nn.Module):")
        pattern = r"\*mlp\(([^,]+), [^,]+, ([^)]+)\)"
        if script == "sac_bc":
            pattern = r"\*hidden, mean = mlp\((observation_dim), args.hidden_dims, (action_dim)\)"
        (inputs, outputs), count = re.search(pattern, after).groups(), 1
        layers = re.sub(r"\bI\b", inputs, re.sub(r"\bO\b", outputs, LAYERS[change]))
        if script == "sac_bc":
            layers = f"*hidden, mean = {layers}"
            after = after.replace(
                "nn.Linear(args.hidden_dims[-1], action_dim)", "nn.Linear(mean.in_features, action_dim)"
            )
        text = before + RESIDUAL + name + re.sub(pattern, lambda _: layers, after, count=1)
    assert count == 1
    path = folder / f"my_{script}_{change.replace(' ', '_')}.py"
    path.write_text(text)
    return path


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that trains a user's own script, and gives its path and its run folder."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(script, change, *arguments):
        path, folder = write_script(tmp_path, script, change), tmp_path / "run"
        words = [*SHORT, *SHORTER.get(script, ()), "--num-updates", "30", "--eval-every", "30", *arguments]
        ran = run_script(path.stem, *words, "--run-dir", str(folder))
        assert ran.returncode == 0, ran.stderr
        return path, folder

    return run


@pytest.mark.parametrize("change", ["GELU", *LAYERS])
@pytest.mark.parametrize("script", CHANGED)
def test_the_policy_that_is_loaded_is_the_one_that_was_evaluated(script, change, train, request):
    path, folder = train(script, change)
    data = request.getfixturevalue("cartpole" if script in DISCRETE else "pendulum")
    policy = load_policy(folder, script=path)
    returns, _ = evaluate(policy, short_environments(data.dataset, 2), 3, FINAL_SEED)
    assert returns.mean() == json.loads((folder / "result.json").read_text())["final_return_mean"]

    module = load_script(path.stem, path)
    args = tyro.cli(module.Args, args=[*SHORT, *SHORTER.get(script, ())])
    actor = module.Actor(data.observation_dim, data.num_actions or data.action_dim, args)
    saved = checkpoint(folder)["learner"]["actor"]
    actor.load_state_dict(saved)
    observations = data.transitions.observations[::500]
    with torch.no_grad():
        torch.testing.assert_close(policy.act(observations), actor.eval()(observations), rtol=0, atol=0)
    if change == "dropout":
        with torch.no_grad():
            assert not torch.allclose(actor.train()(observations), policy.act(observations))
    assert saved.keys() == policy.actor.state_dict().keys()

    with pytest.raises(BadInput, match=f"no script .*{path.stem}.py"):
        load_policy(folder)
    expected = (
        "makes something else of the same weights" if change == "GELU" else "Missing key|Unexpected key|size mismatch"
    )
    with pytest.raises(BadInput, match=rf"policy.pt does not fit .*{script}.py: .*: .*({expected})"):
        load_policy(folder, script=ROOT / "algorithms" / f"{script}.py")


def test_a_script_beside_the_repositorys_own_is_found_by_its_name(train, monkeypatch, tmp_path):
    path, folder = train("iql", "GELU")
    monkeypatch.setattr("common.evaluation.__file__", str(tmp_path / "common" / "evaluation.py"))
    (tmp_path / "algorithms").mkdir()
    path = path.rename(tmp_path / "algorithms" / path.name)
    assert np.isfinite(load_policy(folder)(np.zeros((2, 3)))).all()
    path.rename(path.with_name("my-iql.py"))
    state = torch.load(folder / "policy.pt", weights_only=True)
    torch.save(state | {"script": "my-iql"}, folder / "policy.pt")
    assert np.isfinite(load_policy(folder)(np.zeros((2, 3)))).all()


@pytest.mark.parametrize("name", ["../evil", "{here}/evil", "{here}/evil.py", "evil.py", "evil", "os"])
def test_a_policy_names_no_file_that_is_run(name, train, tmp_path, monkeypatch):
    """Only the argument may name one outside algorithms/."""
    monkeypatch.chdir(tmp_path)
    _, folder = train("iql", "GELU")
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    state = torch.load(folder / "policy.pt", weights_only=True)
    torch.save(state | {"script": name.format(here=tmp_path)}, folder / "policy.pt")
    with pytest.raises(BadInput, match="no script"):
        load_policy(folder)


def test_the_tools_take_a_users_own_script(train, tmp_path):
    path, folder = train("td3_bc", "layer norm")
    fqe = ["--policy-run-dir", str(folder), "--num-updates", "3", "--run-dir", str(tmp_path / "fqe"), *SHORT]
    assert_one_line(run_script("fqe", *fqe), f"no script .*{path.stem}")
    report = [str(folder), "--num-updates", "5", "--num-states", "50", "--eval-episodes", "2"]
    assert_one_line(run_script("shift_report", *report), f"no script .*{path.stem}")
    watch = [str(folder), "--out", str(tmp_path / "policy.gif")]
    assert_one_line(run_script("watch", *watch), f"no script .*{path.stem}")
    for tool, words, option in (
        ("fqe", fqe, "--policy-script"),
        ("shift_report", report, "--script"),
        ("watch", watch, "--script"),
    ):
        ran = run_script(tool, *words, option, str(path))
        assert ran.returncode == 0, ran.stderr
