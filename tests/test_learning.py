"""Every algorithm learns on the built-in dataset: short runs with small networks, judged with generous margins.

The full runs, three seeds each with the default arguments, are in benchmarks/results/.
"""

import csv
import json

import pytest
from conftest import assert_model_beats_naive_forecasts, run_script

SMALL = ["--hidden-dims", "64", "64", "--eval-every", "100000", "--eval-episodes", "20", "--final-eval-episodes", "20"]
CRITIC = ["--critic-learning-rate", "3e-3", "--tau", "0.05", "--gamma", "0.9"]
BOTH = [*CRITIC, "--actor-learning-rate", "3e-3"]
VALUE = [*BOTH, "--value-learning-rate", "3e-3", "--reward-scale", "0.1"]
CAREFUL = [*VALUE, "--critic-learning-rate", "1e-3", "--value-learning-rate", "1e-3"]
VAE = ["--vae-hidden-dims", "64", "64", "--num-target-actions", "5", "--num-acting-actions", "10"]
SAMPLES = ["--batch-size", "128", "--actor-learning-rate", "1e-3", "--num-samples", "2"]
DYNAMICS = ["--dynamics-hidden-dims", "64", "64", "--dynamics-batch-size", "512", "--max-dynamics-epochs", "6"]
DYNAMICS += ["--num-models", "3", "--num-elites", "2", "--batch-size", "128"]
MODEL = [*DYNAMICS, "--rollout-batch-size", "2000", "--rollout-every", "125"]
NOISE = ["--flow-hidden-dims", "64", "64", "--num-acting-actions", "32"]
STEEP = ["--eta", "20", "--actor-tau", "0.05", "--reward-scale", "0.1", "--batch-size", "128"]
STAY = ["--threshold", "0.1", "--alpha-learning-rate", "1e-2", "--vae-learning-rate", "1e-3"]
AT_ONCE = ["--updates-per-step", "2", "--batch-size", "128", "--random-steps", "100"]
SEQUENCE = ["--learning-rate", "2e-3", "--warmup-updates", "100", "--batch-size", "128", "--context-length", "5"]
RUNS = {
    "bc": ["--num-updates", "1000", "--learning-rate", "1e-3"],
    "td3_bc": ["--num-updates", "1200", *BOTH, "--gamma", "0.95", "--alpha", "10"],
    "sac_bc": ["--num-updates", "1000", *BOTH],
    "rebrac": ["--num-updates", "1000", *BOTH, "--gamma", "0.95", "--batch-size", "256"],
    "diffusion_ql": [
        "--num-updates",
        "500",
        *CRITIC,
        *STEEP,
        "--actor-learning-rate",
        "1e-3",
        "--num-acting-actions",
        "10",
    ],
    "fql": ["--num-updates", "800", *BOTH, "--flow-learning-rate", "3e-3", "--flow-steps", "5", "--alpha", "0.03"],
    "iql": ["--num-updates", "1200", *VALUE, "--beta", "10"],
    "sql": ["--num-updates", "1200", *CAREFUL],
    "xql": ["--num-updates", "1200", *CAREFUL],
    "idql": ["--num-updates", "1200", *CAREFUL, *NOISE],
    "awr": [
        "--num-updates",
        "1200",
        "--actor-learning-rate",
        "3e-3",
        "--value-learning-rate",
        "3e-3",
        "--returns-every",
        "250",
    ],
    "awac": ["--num-updates", "1000", *BOTH, "--gamma", "0.95", "--beta", "10"],
    "bcq": ["--num-updates", "800", *CRITIC, "--vae-learning-rate", "3e-3", *VAE],
    "bear": ["--num-updates", "1000", *BOTH, "--warm-start", "200", *STAY, *VAE],
    "cql": ["--num-updates", "1000", *CRITIC, *SAMPLES, "--cql-alpha", "0.5"],
    "cal_ql": ["--num-updates", "1000", *CRITIC, *SAMPLES],
    "edac": ["--num-updates", "1000", *BOTH, "--num-critics", "5"],
    "rlpd": ["--num-updates", "800", *BOTH, "--num-critics", "4", *AT_ONCE],
    "mopo": ["--num-updates", "1000", *BOTH, *MODEL],
    "combo": ["--num-updates", "1000", *BOTH, *MODEL],
    "mobile": ["--num-updates", "1000", *BOTH, *MODEL, "--num-samples", "2"],
    "morel": ["--num-updates", "1000", *BOTH, *MODEL],
    "mve": ["--num-updates", "1000", *BOTH, *DYNAMICS, "--expansion", "last", "--alpha", "10"],
    "pets": [
        "--num-updates",
        "1500",
        "--population",
        "32",
        "--num-best",
        "5",
        "--eval-episodes",
        "3",
        "--final-eval-episodes",
        "3",
    ],
    "naf": ["--num-updates", "2000", "--online-steps", "1500", *CRITIC, "--critic-learning-rate", "1e-3"],
    "decision_transformer": ["--num-updates", "700", *SEQUENCE, "--hidden-dims", "64", "--dropout", "0"],
}
DISCRETE_FAST = ["--num-updates", "2000", "--critic-learning-rate", "1e-3", "--tau", "0.05", "--eval-every", "400"]
DISCRETE_FAST += ["--eval-episodes", "10", "--final-eval-episodes", "1"]  # the curve is judged
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
