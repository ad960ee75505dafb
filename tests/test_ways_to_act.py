"""A finished run's policy played in more ways than its own: with the first few candidates, or by its target actor."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import SHORT, SHORTER, run_script, short_environments
from measurements import acting
from trained_run import load_run

from common.command_line import BadInput


@pytest.fixture
def rows(monkeypatch, tmp_path, pendulum):
    """A function that plays a run, and gives its table: of each way, the mean return."""
    monkeypatch.setattr(acting, "make_environments", short_environments)

    def played(folder, counts=(1, 5, 9)):
        table = tmp_path / "rows.csv"
        acting.main(acting.Args((folder,), counts, episodes=3, csv=table))
        with table.open() as file:
            return {row["way"]: float(row["return_mean"]) for row in csv.DictReader(file)}

    return played


def train(algorithm, folder, *arguments):
    words = [*SHORT, *SHORTER.get(algorithm, []), *arguments, "--run-dir", str(folder)]
    assert run_script(algorithm, *words).returncode == 0
    return json.loads((folder / "result.json").read_text())["final_return_mean"]


@pytest.mark.parametrize("algorithm", sorted(acting.NOISE))
def test_all_candidates_are_the_policy_and_of_one_q_has_no_say(algorithm, rows, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    own = train(algorithm, folder, "--num-updates", "3", "--num-acting-actions", "5")
    found = rows(folder)
    assert found.keys() == {"z = 0", "1 candidate", "5 candidates"}  # there are no nine
    assert found["5 candidates"] == pytest.approx(own, rel=1e-6)

    run = load_run(folder)
    name, dim = acting.NOISE[algorithm]
    first_is_0 = not getattr(run.policy.actor, name).select(dim, 0).any()
    assert first_is_0 == (algorithm in ("bear", "fql", "idql"))
    assert found["z = 0"] != pytest.approx(found["1 candidate"], rel=1e-6)  # which was drawn
    critic = getattr(run.policy.actor, "target_critic", None) or run.policy.actor.critic
    with torch.no_grad():
        for weight in critic.layers[-1].parameters():
            weight.neg_()  # the worst by Q
    monkeypatch.setattr(acting, "load_run", lambda folder, env_id: run)
    worst = rows(folder)
    assert worst["1 candidate"] == pytest.approx(found["1 candidate"], rel=1e-6)
    assert abs(worst["5 candidates"] - found["5 candidates"]) > 1e-3


@pytest.mark.parametrize("algorithm", ["td3_bc", "rebrac", "mve"])
def test_a_target_actor_is_where_the_actor_was(algorithm, rows, tmp_path):
    """With --tau 1 it is the actor itself; with a tau of almost 0 it is what the actor began as."""
    few = ["--num-updates", "30", "--actor-learning-rate", "1e-2"]
    whole, begun = (tmp_path / name for name in ("whole", "begun"))
    own = train(algorithm, whole, *few, "--tau", "1")
    assert rows(whole) == pytest.approx({"actor": own, "target actor": own}, rel=1e-6)
    own = train(algorithm, tmp_path / "run", *few, "--tau", "1e-9")
    initial = train(algorithm, begun, "--num-updates", "1", "--actor-learning-rate", "1e-12")
    assert rows(tmp_path / "run") == pytest.approx({"actor": own, "target actor": initial}, rel=1e-4)
    assert abs(own - initial) > 1e-2


def test_a_row_has_score_and_standard_error(tmp_path, pendulum, monkeypatch):
    returns = np.array([-100.0, -200.0, -600.0])
    monkeypatch.setattr(acting, "evaluate", lambda *_: (returns, None))
    train("td3_bc", tmp_path / "run", "--num-updates", "3")
    for row in acting.play(tmp_path / "run", acting.Args((tmp_path / "run",), episodes=3)):
        found = dict(zip(acting.COLUMNS, row, strict=True))
        scores = pendulum.dataset.score(returns)
        assert (found["return_mean"], found["score"]) == pytest.approx((-300, scores.mean()))
        assert found["standard_error"] == pytest.approx(scores.std(ddof=1) / 3**0.5)


def test_what_was_played_is_kept_where_the_next_folder_fails(tmp_path, pendulum, monkeypatch):
    """Of a run in an environment of a module, which is named again."""
    monkeypatch.setattr(acting, "make_environments", short_environments)
    train("td3_bc", tmp_path / "run", "--num-updates", "3", "--env-id", "gymnasium:Pendulum-v1")
    folders, table = (tmp_path / "run", tmp_path / "none"), tmp_path / "rows.csv"
    with pytest.raises(BadInput, match="give --env-id gymnasium:Pendulum-v1 again"):
        acting.main(acting.Args(folders, csv=table))
    with pytest.raises(BadInput, match=r"no folder .*none"):
        acting.main(acting.Args(folders, env_id="gymnasium:Pendulum-v1", episodes=2, csv=table))
    assert len(table.read_text().splitlines()) == 3


def test_what_cannot_be_asked(tmp_path, pendulum):
    folder = tmp_path / "run"
    assert run_script("bc", "--num-updates", "1", *SHORT, "--run-dir", str(folder)).returncode == 0
    with pytest.raises(BadInput, match=r"bc has no target actor, nor the candidates of bcq, "):
        acting.play(folder, acting.Args((folder,)))
    with pytest.raises(BadInput, match=r"--csv .*: there is no folder .*none"):
        acting.main(acting.Args((folder,), csv=tmp_path / "none" / "rows.csv"))
    with pytest.raises(BadInput, match="give the folder of a run"):
        acting.main(acting.Args(()))
    for wrong in ({"counts": (0,)}, {"episodes": 0}):
        with pytest.raises(BadInput, match=r"--(counts|episodes) .*0.*: must be at least 1"):
            acting.main(acting.Args((folder,), **wrong))
