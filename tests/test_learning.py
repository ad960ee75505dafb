"""Every algorithm learns on the built-in dataset: short runs with small networks, judged with generous margins.

The full runs, three seeds each with the default arguments, are in benchmarks/results/.
"""

import csv
import json

import pytest
from conftest import assert_model_beats_naive_forecasts, run_script

SMALL = ["--hidden-dims", "64", "64", "--eval-every", "100000"]
FAST = ["--actor-learning-rate", "1e-3", "--critic-learning-rate", "1e-3", "--tau", "0.02"]
FEW = ["--vae-hidden-dims", "64", "64", "--num-target-actions", "5", "--num-acting-actions", "20"]
FLOW = ["--gamma", "0.95", "--flow-hidden-dims", "64", "64", "--num-acting-actions", "32"]
WARM_START = ["--warm-start", "300", "--vae-learning-rate", "1e-3", *FEW]
DYNAMICS = ["--dynamics-hidden-dims", "64", "64", "--dynamics-batch-size", "512", "--max-dynamics-epochs", "10"]
DYNAMICS += ["--num-models", "3", "--num-elites", "2"]
ONLINE = ["--num-updates", "3000", "--online-steps", "2500"]
SOON = ["--expansion", "last", "--alpha", "10"]
MODEL = [*DYNAMICS, "--rollout-batch-size", "5000", "--rollout-every", "250"]
STEEP = ["--eta", "20", "--actor-tau", "0.02", "--gamma", "0.95", "--reward-scale", "0.1", "--batch-size", "128"]
PLAN = ["--population", "32", "--num-best", "5", "--eval-episodes", "1", "--final-eval-episodes", "3"]
SEQUENCE = ["--hidden-dims", "64", "--context-length", "5", "--learning-rate", "2e-3", "--warmup-updates", "100"]
SOONER = ["--actor-learning-rate", "1e-3", "--critic-learning-rate", "3e-3", "--tau", "0.05"]
AT_ONCE = ["--num-updates", "1200", "--updates-per-step", "2", "--random-steps", "100", "--batch-size", "128"]
RUNS = {
    "bc": ["--num-updates", "1000", "--learning-rate", "1e-3"],
    "td3_bc": ["--num-updates", "3000", *FAST],
    "sac_bc": ["--num-updates", "2500", *FAST],
    "rebrac": ["--num-updates", "2000", "--tau", "0.02", "--batch-size", "256"],
    "diffusion_ql": ["--num-updates", "1200", *FAST, *STEEP, "--num-acting-actions", "20"],
    "fql": ["--num-updates", "1500", *FAST, "--flow-learning-rate", "1e-3", "--alpha", "0.03"],
    "iql": ["--num-updates", "2500", *FAST, "--value-learning-rate", "1e-3", "--reward-scale", "0.1"],
    "sql": ["--num-updates", "2500", *FAST, "--value-learning-rate", "1e-3", "--reward-scale", "0.1"],
    "xql": ["--num-updates", "2500", *FAST, "--value-learning-rate", "1e-3", "--reward-scale", "0.1"],
    "idql": ["--num-updates", "3000", *FAST, "--value-learning-rate", "1e-3", "--reward-scale", "0.1", *FLOW],
    "awr": ["--num-updates", "2500", *FAST[:2], "--value-learning-rate", "1e-3", "--returns-every", "250"],
    "awac": ["--num-updates", "2500", *FAST, "--beta", "10"],
    "bcq": ["--num-updates", "2000", "--critic-learning-rate", "3e-3", "--tau", "0.05", *FEW],
    "cql": ["--num-updates", "2000", *FAST, "--gamma", "0.95", "--num-samples", "4", "--cql-alpha", "0.5"],
    "cal_ql": ["--num-updates", "1500", *SOONER, "--gamma", "0.9", "--batch-size", "128", "--num-samples", "2"],
    "edac": ["--num-updates", "1500", *FAST, "--gamma", "0.95", "--num-critics", "5"],
    "rlpd": [*FAST, "--gamma", "0.95", "--num-critics", "4", *AT_ONCE],
    "bear": [
        "--num-updates",
        "1500",
        *FAST,
        "--gamma",
        "0.95",
        "--alpha-learning-rate",
        "1e-2",
        "--threshold",
        "0.1",
        *WARM_START,
    ],
    "mopo": ["--num-updates", "2000", "--batch-size", "128", *FAST, "--gamma", "0.95", *MODEL],
    "combo": ["--num-updates", "2000", "--batch-size", "128", *FAST, "--gamma", "0.95", *MODEL],
    "mobile": ["--num-updates", "2500", "--batch-size", "128", *FAST, "--gamma", "0.95", *MODEL, "--num-samples", "2"],
    "morel": ["--num-updates", "2000", "--batch-size", "128", *FAST, "--gamma", "0.95", *MODEL],
    "mve": [*SOON, "--num-updates", "2000", "--batch-size", "128", *FAST, "--gamma", "0.95", *DYNAMICS],
    "pets": ["--num-updates", "1500", *PLAN],
    "naf": [*ONLINE, "--critic-learning-rate", "1e-3", "--tau", "0.02", "--gamma", "0.95"],
    "decision_transformer": ["--num-updates", "700", "--batch-size", "128", *SEQUENCE, "--dropout", "0"],
}
DISCRETE_FAST = ["--num-updates", "2000", "--critic-learning-rate", "1e-3", "--tau", "0.05", "--eval-every", "400"]
DISCRETE_FAST += ["--final-eval-episodes", "1"]  # the curve is judged
DISCRETE_RUNS = {
    "fqi": ["--num-updates", "1000", "--critic-learning-rate", "1e-3", "--tau", "0.2"],
    "discrete_iql": [*DISCRETE_FAST, "--actor-learning-rate", "1e-3", "--value-learning-rate", "1e-3"],
    "discrete_cql": DISCRETE_FAST,
    "discrete_bcq": [*DISCRETE_FAST, "--behaviour-learning-rate", "1e-3"],
}


def train(algorithm, tmp_path, *arguments):
    """The final score of a short run, from fifty states that the curve does not start from."""
    run = run_script(
        algorithm, *SMALL, *(RUNS | DISCRETE_RUNS)[algorithm], *arguments, "--run-dir", str(tmp_path / "run")
    )
    assert run.returncode == 0, run.stderr
    return json.loads((tmp_path / "run" / "result.json").read_text())["final_score"]


@pytest.mark.parametrize("algorithm", [name for name in RUNS if name != "bc"])
def test_offline_rl_passes_behaviour_cloning(algorithm, tmp_path, pendulum):
    assert train(algorithm, tmp_path) > 48  # ten points above what cloning is held below
    if algorithm in ("mopo", "combo", "mobile", "morel", "mve"):
        assert_model_beats_naive_forecasts(tmp_path / "run")
    if algorithm in ("mopo", "combo", "mobile", "morel"):
        assert_rollouts_are_like_the_data(tmp_path / "run", pendulum.transitions)


def assert_rollouts_are_like_the_data(folder, data):
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["model/rewards"]]
    raw = {"mopo": "model/raw_rewards", "morel": "model/raw_rewards"}
    name = raw.get(json.loads((folder / "result.json").read_text())["algorithm"], "model/rewards")
    assert len(logged) >= 8
    for row in logged:
        assert float(row["data/rewards"]) == pytest.approx(data.rewards.mean().item(), rel=1e-4)
        assert -16.3 < float(row[name]) < 0.1  # a pendulum's are from -16.3 to 0
        assert float(row["data/terminations"]) == 0  # and what morel's rollouts have besides, its detector stopped
        assert float(row["model/terminations"]) == float(row.get("halt/share", 0))


@pytest.mark.slow
def test_combo_with_logsumexp_passes_behaviour_cloning(tmp_path, pendulum):
    few = ["--num-samples", "2", "--num-updates", "2500"]
    assert train("combo", tmp_path, "--regularizer", "logsumexp", *few) > 48


@pytest.mark.slow
def test_naf_with_rollouts_passes_behaviour_cloning_offline(tmp_path, pendulum):
    half = ["--imagined-ratio", "0.5", *MODEL, "--batch-size", "128"]
    assert train("naf", tmp_path, *half, "--num-updates", "2500", "--online-steps", "0") > 48


def test_behaviour_cloning_learns_the_average_of_the_data(tmp_path, pendulum):
    assert 10 < train("bc", tmp_path) < 38


def test_cloning_the_best_episodes_only_learns_the_good_controller(tmp_path, pendulum):
    assert train("bc", tmp_path, "--top-fraction", "0.2") > 85


@pytest.mark.parametrize("algorithm", ["discrete_iql", "discrete_cql", "discrete_bcq"])
def test_offline_rl_with_discrete_actions_passes_its_data(algorithm, tmp_path, cartpole):
    """By the mean of five evaluations: from one to the next, a pole or two of the ten may fall."""
    train(algorithm, tmp_path)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        scores = [float(row["eval/score"]) for row in csv.DictReader(file) if row["eval/score"]]
    assert len(scores) == 5 and sum(scores) / 5 > 85


def test_fitted_q_iteration_promises_more_than_there_is(tmp_path, cartpole):
    train("fqi", tmp_path)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["critic/q_initial"]) > 115  # no return exceeds 1 / (1 - gamma) = 100
    assert float(last["critic/overestimate"]) > 15
