"""A trained policy as one ONNX file, which acts without PyTorch: on a controller, in a browser, from C++.

    observations   float64 [N, observation_dim], raw as the environment has them; the file normalises them in double
                   precision, so that clocks of 1e9 seconds lose nothing
    actions        float32 [N, action_dim] in the environment's units, or int64 [N] where actions are discrete
    preferences    float32 [N, num_actions], of discrete actions: what the action is the highest of

N is any number of rows. A row that holds what is no finite number gives actions and preferences that are none: NaN, and
-2^63 in place of a discrete action. `load_policy` refuses such a row.

The file is written only if it acts as `load_policy` does, on random rows, on rows a thousand deviations away and on
zeros, together and one by one. With f what a file makes of a row x and pi what PyTorch does, it must hold that

    |f(x) - pi(x)| <= 1e-5 scale + 4 max_k |pi_k(x) - pi(x)|,    pi_k: pi with each weight w times 1 + 1e-6 u,
                                                                 u drawn from [-1, 1]

scale is half the range of an action, or the largest preference of x. The eight pi_k tell float error from a fault:
where the two best candidates of an Actor that chooses, as BCQ's does, are as good as equal, either may be taken. An
Actor that draws random numbers is refused; those that choose drew their candidates' noise once, before training, and it
is a part of the file.

The file's metadata tells names, ranges, normalization, the script with its hyper-parameters, the data and versions,
each as JSON.

Run: python -m benchmarks.export runs/first --out policy.onnx
"""

import contextlib
import copy
import importlib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from scratch import replace

from common.command_line import BadInput, check, explain, launch, one_line
from common.evaluation import Policy, load_file, load_policy

NOT_AN_ACTION = torch.iinfo(torch.int64).min  # which nobody takes for the index of one, as Python would take -1
PACKAGES = "torch", "numpy", "onnx", "onnxscript", "onnxruntime"


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """folder of a run"""
    out: Path = Path("policy.onnx")
    """the file to write, .onnx"""
    policy: str = "policy.pt"
    """the run's file to take; --keep-policies keeps more of them, as policy-1000.pt"""
    script: Path | None = None
    """path of the script that trained the policy, if it is not in algorithms/"""


def main(args: Args) -> None:
    check(args.out.suffix.lower() == ".onnx", f"--out {args.out}: must end with .onnx")
    check(args.out.parent.is_dir(), f"--out {args.out}: there is no folder {args.out.parent}")
    inside = Path(args.policy).name == args.policy
    check(inside, f"--policy {args.policy}: must be the name of a file in {args.run_dir}")
    try:
        versions = {name: importlib.import_module(name).__version__ for name in PACKAGES}
    except ImportError as error:
        raise BadInput(f"there is no ONNX here ({one_line(error)}): pip install -e '.[export]'") from None
    policy = load_policy(args.run_dir / args.policy, args.script).requires_grad_(False)
    remembers = "its Actor remembers what it did in an episode (`follow`), which no file does: act by load_policy"
    check(not hasattr(policy.actor, "follow"), remembers)
    refuse_noise(policy)
    told = describe(policy, read_run(args.run_dir, args.policy)) | {"policy": args.policy, "versions": versions}
    content = convert(policy, told)
    difference, count = compare(content, policy)
    replace(args.out, content)
    inputs, (low, _) = policy.normalization.shape[1], policy.action_range
    outputs = "a discrete action" if policy.discrete else f"actions of {len(low)}"
    print(f"{policy.origin['script']}: observations of {inputs} numbers to {outputs}, {len(content) / 1024:.0f} KiB")
    scale = "the largest preference" if policy.discrete else "half an action's range"
    print(f"differs from load_policy by at most {difference:.1e} of {scale} on {count} observations: {args.out}")


def read_run(folder: Path, policy: str) -> dict[str, Any]:
    """What args.json tells of the data, and the updates of this policy. Nothing, where a folder has a policy alone."""
    path, names = folder / "args.json", ("dataset_id", "dataset_fingerprint", "seed", "num_updates")
    if not path.exists():
        return dict.fromkeys(names)
    with explain(f"cannot read {path}"):
        saved = dict(json.loads(path.read_text()))
    if kept := re.fullmatch(r"policy-(\d+)\.pt", policy):
        saved["num_updates"] = int(kept[1])
    elif policy == "policy.pt":  # its run may have been stopped, or acted for more
        with contextlib.suppress(BadInput):
            saved["num_updates"] = load_file(folder / "checkpoint.pt")["step"]
    return {name: saved.get(name) for name in names}


def describe(policy: Policy, run: dict[str, Any]) -> dict[str, Any]:
    """The metadata, before it is JSON."""
    mean, std = policy.normalization.tolist()
    low, high = policy.action_range.tolist()
    outputs = {"actions": f"float32 [N, {len(low)}], in the environment's units"}
    if policy.discrete:
        outputs = {
            "actions": f"int64 [N], from {low[0]} to {high[0]}",
            "preferences": f"float32 [N, {high[0] - low[0] + 1}], the action is that of the highest",
        }
    return {
        "inputs": {"observations": f"float64 [N, {len(mean)}], as the environment has them: not normalised"},
        "outputs": outputs,
        "observation_names": policy.origin["observation_names"],
        "observation_mean": mean,
        "observation_std": std,
        "discrete": policy.discrete,
        "action_low": low,
        "action_high": high,
        "action_names": policy.origin.get("action_names"),
        "script": policy.origin["script"],
        "hyper_parameters": policy.origin["hyper_parameters"],
        **run,
    }


class Exported(nn.Module):
    """What the file computes: the policy's own `forward`, with the actor's preferences beside a discrete action."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []

        def act(inputs: Tensor) -> Tensor:
            kept.extend((self.policy.actor(inputs), inputs))
            return kept[0]

        actions = self.policy.forward(observations, act)
        known = kept[1].isfinite().all(dim=1)  # [N], as load_policy refuses the others
        if self.policy.num_legal:
            masks = observations[:, : self.policy.num_legal]
            known = known & ((masks == 0) | (masks == 1)).all(dim=1) & (masks == 1).any(dim=1)
        if self.policy.discrete:
            return torch.where(known, actions, NOT_AN_ACTION), torch.where(known[:, None], kept[0], torch.nan)
        return (torch.where(known[:, None], actions, torch.nan).float(),)


def convert(policy: Policy, told: dict[str, Any]) -> bytes:
    """The file's content. Raises BadInput for an Actor that ONNX cannot express."""
    import onnx

    example = policy.normalization[:1].double().repeat(3, 1)  # [3, observation_dim]: the mean is finite for any actor
    shapes = ({0: torch.export.Dim("N")},)
    names = ["actions", "preferences"] if policy.discrete else ["actions"]
    with explain("its Actor cannot be exported"), quiet():
        graph = torch.export.export(Exported(policy), (example,), dynamic_shapes=shapes)
        program: Any = torch.onnx.export(
            graph, input_names=["observations"], output_names=names, dynamo=True, verbose=False
        )
        proto = program.model_proto
    parts = proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer
    for part in (*parts, *proto.graph.value_info):
        part.ClearField("metadata_props")  # lines of source, with their places on this machine
    onnx.helper.set_model_props(proto, {name: json.dumps(value, default=str) for name, value in told.items()})
    return proto.SerializeToString()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch says of packages that are not needed, nor the graph that it prints where one fails."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stderr(io.StringIO()) as nowhere,
            contextlib.redirect_stdout(nowhere),  # older rewriters count there what they did
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def rows(policy: Policy) -> np.ndarray:
    """Observations to compare on: 48 as the data's, 8 ten and 8 a thousand deviations away, the mean, and zeros; masks
    as they may be."""
    rng = np.random.default_rng(0)
    mean, std = policy.normalization.double().numpy()
    deviations = rng.normal(size=(64, len(mean)))
    deviations[48:56] *= 10
    deviations[56:] = 1000 * rng.choice([-1, 1], (8, len(mean)))
    deviations[56:58] = [[-1000], [1000]]
    found = np.concatenate([mean + std * deviations, mean[None], 0 * mean[None]])
    if policy.num_legal:
        found[:, : policy.num_legal] = rng.integers(0, 2, (len(found), policy.num_legal))
        found[np.arange(len(found)), rng.integers(0, policy.num_legal, len(found))] = 1
    return found


def compare(content: bytes, policy: Policy) -> tuple[float, int]:
    """The largest difference from the policy, of a scale, and on how many observations. Raises BadInput if it is no
    float error.
    """
    import onnxruntime

    with explain("onnxruntime cannot run what was exported"):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    observations = rows(policy)
    expected = outputs_of(policy, observations)
    moved = [outputs_of(jittered(policy, seed), observations) for seed in range(8)]
    low, high = policy.action_range.double().numpy()
    largest = 0.0
    for batch in (slice(None), *(slice(row, row + 1) for row in (0, 48, 56, 57, -2))):
        with explain("onnxruntime cannot run what was exported"):
            found = session.run(None, {"observations": observations[batch]})
        asked = [output[batch] for output in expected]
        values, reference = found[-1], asked[-1]  # of discrete actions the preferences
        finite = np.where(np.abs(reference) < 1e8, np.abs(reference), 0)  # not of what is illegal, or hardly likely
        scale = finite.max(axis=1, keepdims=True) if policy.discrete else (high - low) / 2
        spread = np.max([distance(outputs[-1][batch], reference) for outputs in moved], axis=0)
        differences = distance(values, reference)
        wrong = ~(differences <= 1e-5 * scale + 4 * spread)
        if policy.discrete:
            best = values.argmax(axis=1)
            same = best == reference.argmax(axis=1)
            wrong |= (found[0] != np.where(same, asked[0], low[0] + best))[:, None]
        if wrong.any():
            row = wrong.any(axis=1).argmax()
            acts, should = ([output[row].tolist() for output in outputs] for outputs in (found, asked))
            what = f"{acts} is not {should} at {observations[batch][row].tolist()}"
            raise BadInput(f"nothing is written: the exported policy acts otherwise than load_policy's: {what:.300}")
        steady = (spread <= 1e-3 * scale) & (scale > 0)  # elsewhere rounding decides
        largest = max(largest, float((differences / np.where(steady, scale, np.inf)).max()))
    lost = np.repeat(observations[-2:-1], 2, axis=0)
    lost[:, 0] = np.nan, np.inf
    nothing = session.run(None, {"observations": lost})
    silent = np.isnan(nothing[-1]).all() and (not policy.discrete or (nothing[0] == NOT_AN_ACTION).all())
    check(bool(silent), "nothing is written: the exported policy gives an action where an observation is no number")
    return largest, len(observations)


def outputs_of(policy: Policy, observations: np.ndarray) -> list[np.ndarray]:
    """Actions and, of discrete ones, preferences."""
    kept: list[Tensor] = []
    with policy.actor.register_forward_hook(lambda _, __, outputs: kept.append(outputs)):
        actions = policy(observations)
    return [actions, kept[0].numpy()] if policy.discrete else [actions]


def refuse_noise(policy: Policy) -> None:
    """Raises BadInput if the policy acts otherwise when it is asked again: no file could be compared with it."""
    outputs = [outputs_of(policy, rows(policy)) for _ in range(2)]
    same = all(np.array_equal(one, other) for one, other in zip(*outputs, strict=True))
    check(same, "its Actor draws random numbers when it acts: draw them once, into a buffer, as BCQ's Actor does")


def jittered(policy: Policy, seed: int) -> Policy:
    """The policy, its weights moved by about eight times what float32 rounds."""
    moved, generator = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
    for weight in moved.parameters():
        weight.mul_(1 + 1e-6 * (2 * torch.rand(weight.shape, generator=generator).to(weight) - 1))
    return moved


def distance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """|left - right|, which is 0 for two infinities of one sign."""
    with np.errstate(invalid="ignore"):
        return np.where(left == right, 0, np.abs(left.astype(np.float64) - right))


if __name__ == "__main__":
    launch(main, Args)
