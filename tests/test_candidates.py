"""A policy played with the first few of its candidates."""

import csv
import json

import pytest
import torch
from conftest import SHORT, SHORTER, run_script, short_environments
from measurements import candidates
from trained_run import load_run

from common.command_line import BadInput


def rows(folder, counts):
    table = folder / "rows.csv"
    candidates.main(candidates.Args((folder,), counts, episodes=3, csv=table))
    with table.open() as file:
        return {int(row["candidates"]): float(row["return_mean"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize("algorithm", sorted(candidates.NOISE))
def test_all_candidates_are_the_policy_and_of_one_q_has_no_say(algorithm, tmp_path, monkeypatch, pendulum):
    monkeypatch.setattr(candidates, "make_environments", short_environments)
    folder = tmp_path / "run"
    counts = [*SHORTER[algorithm], "--num-acting-actions", "5"]
    assert run_script(algorithm, "--num-updates", "3", *SHORT, *counts, "--run-dir", str(folder)).returncode == 0
    found = rows(folder, (1, 5, 9))
    assert found.keys() == {1, 5}  # there are no nine
    result = json.loads((folder / "result.json").read_text())
    assert found[5] == pytest.approx(result["final_return_mean"], rel=1e-6)

    run = load_run(folder)
    critic = getattr(run.policy.actor, "target_critic", None) or run.policy.actor.critic
    with torch.no_grad():
        for weight in critic.layers[-1].parameters():
            weight.neg_()  # the worst by Q
    monkeypatch.setattr(candidates, "load_run", lambda folder: run)
    worst = rows(folder, (1, 5))
    assert worst[1] == pytest.approx(found[1], rel=1e-6) and abs(worst[5] - found[5]) > 1e-3


def test_what_cannot_be_asked(tmp_path, pendulum):
    folder = tmp_path / "run"
    assert run_script("bc", "--num-updates", "1", *SHORT, "--run-dir", str(folder)).returncode == 0
    with pytest.raises(BadInput, match=r"bc does not choose among candidates, as bcq, .* do"):
        candidates.play(folder, candidates.Args((folder,)))
    with pytest.raises(BadInput, match=r"--csv .*: there is no folder .*none"):
        candidates.main(candidates.Args((folder,), csv=tmp_path / "none" / "rows.csv"))
    with pytest.raises(BadInput, match="give the folder of a run"):
        candidates.main(candidates.Args(()))
    for wrong in ({"counts": (0,)}, {"episodes": 0}):
        with pytest.raises(BadInput, match=r"--(counts|episodes) .*0.*: must be at least 1"):
            candidates.main(candidates.Args((folder,), **wrong))
