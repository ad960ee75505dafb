"""export.py: a file that acts as the policy does, without PyTorch; one that does not is never written."""

import importlib
import json
import re
import sys

import export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import DISCRETE, REMEMBER, ROOT, SCRIPTS, SHORT, assert_one_line, run_script

from common.command_line import BadInput
from common.evaluation import Policy, load_policy

KINDS = "td3_bc", "bcq", "bear", "discrete_bcq"  # of Actors; the others' are like one of these
NAMES = ["clock", "speed", "height"]
RUN = {"dataset_id": "my/rooms-v0", "dataset_fingerprint": "abc", "seed": 3, "num_updates": 100}  # of its args.json
NORMALIZATION = torch.tensor([[1.7e9, -3.0, 0.0], [40.0, 0.01, 1.0]], dtype=torch.float64)


def save_policy(folder, name="td3_bc", script=None):
    """A run folder that holds an untrained policy alone; a clock of Unix seconds is among what it observes."""
    module = script or importlib.import_module(name)
    torch.manual_seed(0)
    few = {"vae_hidden_dims": (8,), "num_acting_actions": 10} if name in ("bcq", "bear") else {}
    args = module.HyperParameters(hidden_dims=(16,), **few)
    bounds = np.array([[-2.0, 0.0], [2.0, 0.5]], np.float32)
    if name in DISCRETE:
        bounds = np.array([[5], [8]])
    actor = module.Actor(3, 4 if name in DISCRETE else 2, args)
    origin = {"script": name, "hyper_parameters": vars(args), "observation_names": NAMES}
    folder.mkdir(exist_ok=True)
    with (folder / "policy.pt").open("wb") as file:
        Policy(actor, NORMALIZATION, bounds, name in DISCRETE, origin).save(file)
    return folder


def export_to(folder, *arguments):
    """What the command writes beside the policy, and what it said."""
    ran = run_script("export", str(folder), "--out", str(folder / "policy.onnx"), *arguments)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return onnxruntime.InferenceSession(folder / "policy.onnx"), ran.stdout


def metadata(session):
    return {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}


def observe(count=20):
    return (NORMALIZATION[0] + NORMALIZATION[1] * torch.randn(count, 3, dtype=torch.float64)).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of a script's name: the folder of a policy of it and of its file, and what the command said."""
    made = {}

    def make(name):
        if name not in made:
            folder = save_policy(tmp_path_factory.mktemp(name), name)
            (folder / "args.json").write_text(
                json.dumps(RUN | {"run_dir": "/private/place", "env_id": "module:Env-v0"})
            )
            made[name] = folder, *export_to(folder)
        return made[name]

    return make


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in SCRIPTS
        if name not in ("fqe", *REMEMBER)
    ],
)
def test_the_file_acts_as_the_policy_does(name, exported):
    folder, session, said = exported(name)
    policy, observations = load_policy(folder), observe()
    expected = policy(observations)
    assert len(np.unique(expected, axis=0)) > 1
    for rows in (slice(0, 1), slice(0, 7), slice(0, 20), slice(0, 0)):
        actions, *preferences = session.run(None, {"observations": observations[rows]})
        assert actions.dtype == expected.dtype
        np.testing.assert_allclose(actions, expected[rows], atol=1e-5)
        if name in DISCRETE:
            assert set(actions) <= {5, 6, 7, 8}
            inputs = torch.from_numpy((observations[rows] - NORMALIZATION[0].numpy()) / NORMALIZATION[1].numpy())
            np.testing.assert_allclose(preferences[0], policy.act(inputs.float()), atol=1e-5)
    size = (folder / "policy.onnx").stat().st_size
    outputs, scale = ("actions of 2", "half an action's range")
    if name in DISCRETE:
        outputs, scale = ("a discrete action", "the largest preference")
    assert said.startswith(f"{name}: observations of 3 numbers to {outputs}, {size / 1024:.0f} KiB\n")
    assert float(re.search(rf"by at most (\S+) of {scale} on 66 observations: {folder}", said)[1]) < 1e-5


def test_a_second_of_a_clock_of_unix_seconds_is_seen(exported):
    """float32 tells 1.7e9 from 1.7e9 + 128 at best."""
    folder, session, _ = exported("td3_bc")
    observations = NORMALIZATION[0].repeat(2, 1).numpy()
    observations[1, 0] += 1
    first, second = session.run(None, {"observations": observations})[0]
    assert np.abs(first - second).max() > 1e-4
    np.testing.assert_allclose([first, second], load_policy(folder)(observations), atol=1e-6)


@pytest.mark.parametrize("name", ["td3_bc", "discrete_bcq"])
def test_what_is_no_observation_gives_no_action(name, exported):
    observations = observe(4)
    observations[1, 0], observations[2, 2] = np.nan, np.inf
    actions, *preferences = exported(name)[1].run(None, {"observations": observations})
    lost = actions == -(2**63) if preferences else np.isnan(actions).all(axis=1)
    assert lost.tolist() == [False, True, True, False]
    assert all(np.isnan(values[1:3]).all() and not np.isnan(values[[0, 3]]).any() for values in preferences)


def test_the_metadata(exported):
    folder, session, _ = exported("td3_bc")
    told = metadata(session)
    assert {name: told[name] for name in RUN} == RUN
    assert told["observation_names"] == NAMES
    assert told["observation_mean"] == NORMALIZATION[0].tolist()
    assert told["observation_std"] == NORMALIZATION[1].tolist()
    assert (told["action_low"], told["action_high"], told["discrete"]) == ([-2, 0], [2, 0.5], False)
    assert told["inputs"].keys() == {"observations"} and told["outputs"].keys() == {"actions"}
    assert told["script"] == "td3_bc" and told["hyper_parameters"]["hidden_dims"] == [16]
    assert told["policy"] == "policy.pt" and told["action_names"] is None
    assert told["versions"]["torch"] == torch.__version__
    content = (folder / "policy.onnx").read_bytes()
    assert b"stack_trace" not in content and str(ROOT).encode() not in content and b"/private/place" not in content


def test_discrete_actions_may_have_names(tmp_path):
    folder = save_policy(tmp_path / "run", "fqi")
    policy = load_policy(folder)
    policy.origin["action_names"] = ["left", "right", "up", "down"]
    told = export.describe(policy, export.read_run(folder, "policy.pt"))
    assert told["action_names"] == ["left", "right", "up", "down"]
    assert told["outputs"]["actions"] == "int64 [N], from 5 to 8" and told["outputs"].keys() == {
        "actions",
        "preferences",
    }
    assert told["dataset_id"] is None  # of a folder with a policy alone


def write_script(folder, actor_line):
    """A user's own copy of td3_bc.py, whose Actor ends otherwise."""
    text = (ROOT / "algorithms" / "td3_bc.py").read_text()
    before, name, after = text.partition("class Actor(nn.Module):")
    assert after.count("return self.net(observations)") == 1
    path = folder / "my_td3.py"
    path.write_text(before + name + after.replace("return self.net(observations)", actor_line))
    return path


OWN = {
    "an own": ("return self.net(observations).sin()", ""),
    "noise": (
        "out = self.net(observations); return out + 1e-4 * torch.rand_like(out)",
        "its Actor draws random numbers when it acts",
    ),
    "a branch": (
        "return self.net(observations) * (1 if bool(observations.sum() > 0) else 0.9995)",
        "its Actor cannot be exported: ",
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_users_own_script(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    line, problem = OWN[kind]
    path = write_script(tmp_path, line)
    monkeypatch.delitem(sys.modules, "my_td3", raising=False)
    folder = save_policy(tmp_path / "run", "my_td3", importlib.import_module("my_td3"))
    words = str(folder), "--out", str(folder / "policy.onnx")
    assert_one_line(run_script("export", *words), "no script .*my_td3.py")
    if problem:
        assert_one_line(run_script("export", *words, "--script", str(path)), problem)
        assert sorted(file.name for file in folder.iterdir()) == ["policy.pt"]
        return
    session, _ = export_to(folder, "--script", str(path))
    observations = observe()
    actions = session.run(None, {"observations": observations})[0]
    np.testing.assert_allclose(actions, load_policy(folder, path)(observations), atol=1e-6)


def test_float_error_is_none_to_speak_of_and_more_is_refused(exported):
    for name in ("td3_bc", "discrete_bcq"):
        folder = exported(name)[0]
        content, policy = (folder / "policy.onnx").read_bytes(), load_policy(folder).requires_grad_(False)
        largest, count = export.compare(content, export.jittered(policy, 99))
        assert 0 < largest < 1e-5 and count == 66
        last = list((policy.actor if name == "td3_bc" else policy.actor.critic).parameters())[-1]
        last[0] += 1e-3
        with pytest.raises(BadInput, match=r"nothing is written: .* acts otherwise .* is not .* at "):
            export.compare(content, policy)


class Masked(torch.nn.Module):
    """Forbids the first choice where the first number is positive, and prefers all by `more` there."""

    def __init__(self, more):
        super().__init__()
        self.net, self.more = torch.nn.Linear(3, 4), more

    def forward(self, observations):
        masked = observations[:, :1] > 0
        return (self.net(observations) + self.more * masked).masked_fill(masked & (torch.arange(4) == 0), -1e9)


def test_a_difference_is_none_of_what_is_illegal():
    right, wrong = (Policy(Masked(more), NORMALIZATION, np.array([[5], [8]]), True, {}) for more in (0.0, 0.5))
    wrong.load_state_dict(right.state_dict())
    content = export.convert(right.requires_grad_(False), {})
    export.compare(content, right)
    with pytest.raises(BadInput, match=r"nothing is written: .* acts otherwise"):
        export.compare(content, wrong.requires_grad_(False))


def test_actions_are_float32_whatever_the_bounds_are(tmp_path):
    folder = save_policy(tmp_path / "run")
    policy = load_policy(folder)
    bounds = policy.action_range.double().numpy()
    with (folder / "policy.pt").open("wb") as file:
        Policy(policy.actor, policy.normalization, bounds, False, policy.origin).save(file)
    session, _ = export_to(folder)
    assert [output.type for output in session.get_outputs()] == ["tensor(float)"]


def test_candidates_as_good_as_equal_may_be_taken_for_one_another(tmp_path):
    """Where rounding alone decides, as where Q hardly depends on the action."""
    policy = load_policy(save_policy(tmp_path / "run", "bcq")).requires_grad_(False)
    policy.actor.critic.layers[-1].weight.mul_(1e-6)
    policy.actor.critic.layers[-1].bias.fill_(1)
    content, other = export.convert(policy, {}), export.jittered(policy, 99)
    observations = export.rows(policy)
    actions = onnxruntime.InferenceSession(content).run(None, {"observations": observations})[0]
    assert np.abs(actions - other(observations)).max() > 1e-2
    export.compare(content, other)


def edit(content, fault):
    """The file with a fault."""
    proto = onnx.load_from_string(content)
    graph, (kind, output) = proto.graph, fault.split(" of ")
    node = next(node for node in graph.node if output in node.output)
    if kind == "one size":
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 66
    elif kind == "no refusal":
        del node.input[2], node.input[0]
        node.op_type = "Identity"
    else:
        node.output[0] = "right"
        value = np.array(1 if kind == "other action" else 1e-3, np.int64 if kind == "other action" else np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(value, "more"))
        graph.node.append(onnx.helper.make_node("Add", ["right", "more"], [output]))
    return proto.SerializeToString()


FAULTS = {
    "small of actions": "acts otherwise than load_policy's: .* is not .* at ",
    "other action of actions": "acts otherwise than load_policy's: ",
    "no refusal of actions": "gives an action where an observation is no number",
    "one size of actions": "onnxruntime cannot run what was exported: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_a_fault_is_not_written(fault, exported, tmp_path, monkeypatch):
    name = "td3_bc" if fault == "small of actions" else "discrete_bcq"
    faulty = edit((exported(name)[0] / "policy.onnx").read_bytes(), fault)
    monkeypatch.setattr(export, "convert", lambda *_: faulty)
    folder = save_policy(tmp_path / "run", name)
    (folder / "older.onnx").write_bytes(b"an older one")
    for out in ("policy.onnx", "older.onnx"):
        assert_one_line(run_script("export", str(folder), "--out", str(folder / out)), FAULTS[fault])
    assert sorted(file.name for file in folder.iterdir()) == ["older.onnx", "policy.pt"]
    assert (folder / "older.onnx").read_bytes() == b"an older one"


def test_the_distance_of_preferences_that_are_infinite():
    left, right = np.array([-np.inf, -np.inf, 1, np.nan], np.float32), np.array([-np.inf, 2, 3, 0], np.float32)
    np.testing.assert_array_equal(export.distance(left, right), [0, np.inf, 2, np.nan])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "policy.pt"], "--out policy.pt: must end with .onnx"),
        (["--out", "nowhere/policy.onnx"], "--out nowhere/policy.onnx: there is no folder nowhere"),
        (["--policy", "../policy.pt"], "--policy ../policy.pt: must be the name of a file in nosuch"),
        (["--policy", "policy-7.pt"], "no policy at nosuch/policy-7.pt"),
        ([], "no policy at nosuch/policy.pt"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    assert_one_line(run_script("export", "nosuch", *arguments), message)


@pytest.mark.parametrize("text", ["{", "3"])
def test_damaged_arguments_are_one_line(text, tmp_path):
    folder = save_policy(tmp_path / "run")
    (folder / "args.json").write_text(text)
    assert_one_line(run_script("export", str(folder), "--out", str(folder / "a.onnx")), "cannot read .*args.json")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_one_line_says_how_to_get_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(run_script("export", str(save_policy(tmp_path / "run"))), r"pip install -e '\.\[export\]'")


def test_a_kept_policy_of_a_trained_run(tmp_path):
    words = "--num-updates", "30", "--eval-every", "10", "--keep-policies", *SHORT, "--run-dir", str(tmp_path / "run")
    assert run_script("bc", *words).returncode == 0
    session, _ = export_to(tmp_path / "run", "--policy", "policy-10.pt")
    told, saved = metadata(session), json.loads((tmp_path / "run" / "args.json").read_text())
    assert told["dataset_fingerprint"] == saved["dataset_fingerprint"] and told["num_updates"] == 10
    assert told["policy"] == "policy-10.pt" and len(told["observation_names"]) == 3
    observations = np.random.default_rng(0).normal(size=(20, 3))
    actions = session.run(None, {"observations": observations})[0]
    np.testing.assert_allclose(actions, load_policy(tmp_path / "run" / "policy-10.pt")(observations), atol=1e-6)
    assert np.abs(actions - load_policy(tmp_path / "run")(observations)).max() > 1e-3
    (tmp_path / "run" / "args.json").write_text(json.dumps(saved | {"num_updates": 1000}))  # of which 30 were made
    assert metadata(export_to(tmp_path / "run")[0])["num_updates"] == 30
