"""Every algorithm learns on the built-in dataset: short runs with small networks, judged with generous margins.

The full runs, three seeds each with the default arguments, are in benchmarks/results/.
"""

import csv
import json

import pytest
from conftest import assert_model_beats_naive_forecasts, run_script

SMALL = "--hidden-dims 64 64 --eval-every 100000 --eval-episodes 1 --final-eval-episodes 20"
CRITIC = "--critic-learning-rate 3e-3 --tau 0.05 --gamma 0.9"
ACTOR = "--actor-learning-rate 3e-3"
VALUE = f"{ACTOR} --tau 0.05 --gamma 0.9 --reward-scale 0.1 --critic-learning-rate 1e-3 --value-learning-rate 1e-3"
SAMPLES = f"{CRITIC} --actor-learning-rate 1e-3 --num-samples 2 --batch-size 128"
VAE = f"{CRITIC} --vae-hidden-dims 64 64 --num-target-actions 5 --num-acting-actions 10"
MODEL = "--num-models 3 --num-elites 2 --dynamics-hidden-dims 64 64 --dynamics-batch-size 512 --max-dynamics-epochs 6"
DYNAMICS = f"{CRITIC} {ACTOR} {MODEL} --batch-size 128"
ROLLOUTS = "--rollout-batch-size 2000 --rollout-every 125"
RUNS = {
    "bc": "--num-updates 1000 --learning-rate 1e-3",
    "td3_bc": f"--num-updates 1200 {CRITIC} {ACTOR} --gamma 0.95 --alpha 10",
    "sac_bc": f"--num-updates 1000 {CRITIC} {ACTOR}",
    "rebrac": f"--num-updates 1000 {CRITIC} {ACTOR} --gamma 0.95 --batch-size 256",
    "diffusion_ql": f"--num-updates 500 {CRITIC} --actor-learning-rate 1e-3 --actor-tau 0.05 --eta 20"
    " --reward-scale 0.1 --batch-size 128 --num-acting-actions 10",
    "fql": f"--num-updates 600 {CRITIC} {ACTOR} --flow-learning-rate 3e-3 --flow-steps 5 --alpha 0.03",
    "iql": f"--num-updates 1200 {VALUE} --critic-learning-rate 3e-3 --value-learning-rate 3e-3 --beta 10",
    "sql": f"--num-updates 1200 {VALUE}",
    "xql": f"--num-updates 1200 {VALUE}",
    "idql": f"--num-updates 1000 {VALUE} --flow-hidden-dims 64 64 --num-acting-actions 32",
    "awr": f"--num-updates 1200 {ACTOR} --value-learning-rate 3e-3 --returns-every 250",
    "awac": f"--num-updates 1000 {CRITIC} {ACTOR} --gamma 0.95 --beta 3",
    "bcq": f"--num-updates 800 {VAE} --vae-learning-rate 3e-3",
    "bear": f"--num-updates 1000 {VAE} --vae-learning-rate 1e-3 {ACTOR} --alpha-learning-rate 1e-2 --threshold 0.1"
    " --warm-start 200",
    "cql": f"--num-updates 1000 {SAMPLES} --cql-alpha 0.5",
    "cal_ql": f"--num-updates 1200 {SAMPLES}",
    "edac": f"--num-updates 1000 {CRITIC} {ACTOR} --num-critics 5",
    "rlpd": f"--num-updates 600 {CRITIC} {ACTOR} --num-critics 4 --updates-per-step 2 --random-steps 100"
    " --batch-size 128",
    "mopo": f"--num-updates 1000 {DYNAMICS} {ROLLOUTS}",
    "combo": f"--num-updates 1000 {DYNAMICS} {ROLLOUTS}",
    "mobile": f"--num-updates 1000 {DYNAMICS} {ROLLOUTS} --num-samples 2",
    "morel": f"--num-updates 1000 {DYNAMICS} {ROLLOUTS}",
    "mve": f"--num-updates 1000 {DYNAMICS} --expansion last --alpha 10",
    "pets": "--num-updates 1200 --num-models 3 --num-particles 3 --population 32 --num-best 5 --final-eval-episodes 5",
    "naf": f"--num-updates 1500 --online-steps 1200 {CRITIC} --reward-scale 0.1",
    "decision_transformer": "--num-updates 700 --hidden-dims 64 --context-length 5 --dropout 0 --learning-rate 2e-3"
    " --warmup-updates 100 --batch-size 128",
}
CURVE = "--eval-every 400 --eval-episodes 10 --final-eval-episodes 1"  # the curve is judged
DISCRETE = f"--num-updates 2000 --critic-learning-rate 1e-3 --tau 0.05 {CURVE}"
DISCRETE_RUNS = {
    "fqi": "--num-updates 1000 --critic-learning-rate 1e-3 --tau 0.2",
    "discrete_iql": f"{DISCRETE} --actor-learning-rate 1e-3 --value-learning-rate 1e-3",
    "discrete_cql": DISCRETE,
    "discrete_bcq": f"{DISCRETE} --behaviour-learning-rate 1e-3",
}


def train(algorithm, tmp_path, arguments=""):
    """The final score of a short run, from twenty states that the curve does not start from."""
    words = f"{SMALL} {(RUNS | DISCRETE_RUNS)[algorithm]} {arguments}".split()
    run = run_script(algorithm, *words, "--run-dir", str(tmp_path / "run"), whole=True)
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
    assert train("combo", tmp_path, "--regularizer logsumexp --num-samples 2 --num-updates 2500") > 48


@pytest.mark.slow
def test_naf_with_rollouts_passes_behaviour_cloning_offline(tmp_path, pendulum):
    half = f"--imagined-ratio 0.5 --batch-size 128 {MODEL} {ROLLOUTS}"
    assert train("naf", tmp_path, f"{half} --num-updates 2500 --online-steps 0") > 48


def test_behaviour_cloning_learns_the_average_of_the_data(tmp_path, pendulum):
    assert 10 < train("bc", tmp_path) < 38


def test_cloning_the_best_episodes_only_learns_the_good_controller(tmp_path, pendulum):
    assert train("bc", tmp_path, "--top-fraction 0.2") > 85


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
