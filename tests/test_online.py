"""--online-steps: after the data the policy acts, is resumed to the same bits, and what it did is in the buffer."""

import csv
import json
import re

import gymnasium as gym
import numpy as np
import pets
import pytest
import td3_bc
from conftest import SHORT, SHORTER, assert_one_line, assert_same_runs, checkpoint, random_episode, run_script
from matplotlib.image import imread

from common.evaluation import load_policy

ALGORITHMS = ["iql", "td3_bc", "awac", "cql", "awr", "pets", "naf"]
MORE = {
    "td3_bc": ["--exploration-noise", "3"],
    "cql": ["--num-samples", "2"],
    "awr": ["--returns-every", "8"],
    "pets": ["--horizon", "3", "--population", "20", "--num-best", "2"],
    "naf": [*SHORTER["naf"], "--rollout-every", "4", "--exploration-noise", "3"],  # five models of what was played, too
}
FROM_THE_START = {
    "rlpd": [*SHORTER["rlpd"], "--num-updates", "100"],
    "sac": ["--random-steps", "20", "--num-updates", "100"],
    "mbpo": [*SHORTER["mbpo"], "--random-steps", "20", "--num-updates", "200"],
}
OFFLINE, ONLINE = 10, 20
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


class Walk(gym.Env):
    """Of what is played, not of evaluations, some episodes end at their third step, the others at their limit."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,))
    fails_after = 10**6
    wind = 0.0
    shape = (3,)  # of the observations after an action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.played, self.number = seed >= 30_000, 0  # evaluations' seeds are below
        self.short = self.played and seed % 2 == 1
        self.state = self.np_random.normal(size=3).astype(np.float32)
        return self.state, {}

    def step(self, action):
        self.number += 1
        if self.played:
            Walk.actions.append(np.array(action))
            if len(Walk.actions) > Walk.fails_after:
                raise RuntimeError("a joint is broken")
        self.state = 0.9 * self.state + 0.1 * action + np.float32(self.wind)
        seen = np.resize(self.state, self.shape if self.played else (3,))
        return seen, -float(self.state @ self.state), self.short and self.number == 3, False, {}


@pytest.fixture(autouse=True)
def walk(monkeypatch):
    gym.register("Walk-v0", Walk, max_episode_steps=5)
    monkeypatch.setattr(Walk, "actions", [], raising=False)
    yield Walk
    gym.registry.pop("Walk-v0")


@pytest.fixture
def arguments(algorithm, make_dataset):
    """Of an offline run."""
    data = make_dataset(episodes=[random_episode(seed, rewards=np.ones(30) * seed) for seed in range(4)])
    words = ["--dataset-id", data, "--env-id", "Walk-v0", "--num-updates", str(OFFLINE), "--hidden-dims", "4"]
    words += ["--batch-size", "16", "--log-every", "5", "--eval-every", "10", "--checkpoint-every", "21"]
    return [*words, "--eval-episodes", "1", "--final-eval-episodes", "1", *MORE.get(algorithm, [])]


def run(algorithm, *words, plot=False):
    ran = run_script(algorithm, *map(str, words), plot=plot)
    assert ran.returncode == 0, ran.stderr


@every_algorithm
def test_a_run_goes_on_online_to_the_same_bits(algorithm, arguments, tmp_path, monkeypatch, walk):
    """Where the environment failed, amid an episode and between AWR's returns, and where an offline run had ended."""
    whole, failed, later = (tmp_path / name for name in ("whole", "failed", "later"))
    online = [*arguments, "--online-steps", ONLINE]
    run(algorithm, *online, "--run-dir", whole)
    with monkeypatch.context() as patch:
        patch.setattr(walk, "fails_after", ONLINE + 17)
        ran = run_script(algorithm, *map(str, [*online, "--run-dir", failed]))
        assert ran.returncode == 2 and "Traceback" not in ran.stderr
        message = "error: the environment failed at step . of an episode: a joint is broken"
        assert re.fullmatch(message, ran.stderr.splitlines()[-1])
    saved = checkpoint(failed)
    assert saved["step"] == 21 and len(saved["learner"]["player"]["actions"]) > 0
    run(algorithm, *online, "--run-dir", failed, "--resume")
    assert_same_runs(whole, failed)

    run(algorithm, *arguments, "--run-dir", later)
    assert "player" not in checkpoint(later)["learner"]
    run(algorithm, *online, "--run-dir", later, "--resume")
    assert_same_runs(whole, later)

    result, (_, seconds) = json.loads((whole / "result.json").read_text()), checkpoint(whole)["seconds"]
    assert result["num_updates"] == OFFLINE
    assert result["updates_per_second"] == pytest.approx((OFFLINE + ONLINE) / seconds, rel=0.01)

    with (whole / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not row.get("model/rewards") and int(row["step"])]
    assert [int(row["step"]) for row in rows] == [*range(5, OFFLINE + ONLINE + 1, 5)]
    assert all(row.get("critic/loss") or row.get("value/loss") or row["dynamics/nll"] for row in rows)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (["--online-steps", "20"], ["--num-updates", "40", "--online-steps", "20"], "num_updates is 10 in it, not 30"),
        (["--online-steps", "20"], ["--num-updates", "5", "--online-steps", "40"], "num_updates is 10 in it, not 5"),
        ([], ["--num-updates", "5", "--online-steps", "20"], "num_updates is 10 in it, not 5"),
        (["--online-steps", "20"], ["--env-id", "Walk-v1", "--online-steps", "40"], "env_id is Walk-v0 in it, not"),
    ],
)
@pytest.mark.parametrize("algorithm", ["awr"])
def test_a_run_that_has_played_goes_on_as_it_began(algorithm, arguments, before, after, message, tmp_path, walk):
    """When it began to act decides which rows were played."""
    gym.register("Walk-v1", walk, max_episode_steps=5)
    run(algorithm, *arguments, *before, "--run-dir", tmp_path / "run")
    ran = run_script(algorithm, *arguments, *after, "--resume", "--run-dir", str(tmp_path / "run"))
    gym.registry.pop("Walk-v1")
    assert_one_line(ran, message)


@pytest.mark.parametrize("algorithm", ["iql"])
def test_a_run_that_was_stopped_online_has_no_result_of_before(algorithm, arguments, tmp_path, monkeypatch, walk):
    run(algorithm, *arguments, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(walk, "fails_after", 12)
    words = [*arguments, "--online-steps", ONLINE, "--run-dir", tmp_path / "run", "--resume"]
    assert run_script(algorithm, *map(str, words)).returncode == 2
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(walk, "fails_after", 10**6)
    run(algorithm, *words)
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("shape", [(3, 1), (4,)])
@pytest.mark.parametrize("algorithm", ["iql"])
def test_observations_of_another_shape_are_one_line(algorithm, shape, arguments, tmp_path, monkeypatch, walk):
    monkeypatch.setattr(walk, "shape", shape)
    ran = run_script(algorithm, *map(str, [*arguments, "--online-steps", ONLINE, "--run-dir", tmp_path / "run"]))
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert re.match(r"error: next_observations of shape .* in a room of \(1, 3\)$", ran.stderr.splitlines()[-1])


@pytest.mark.parametrize("algorithm", ["awr"])
def test_steps_that_would_never_be_learned_from_are_refused(algorithm, arguments, tmp_path):
    words = [*arguments, "--run-dir", tmp_path / "run", "--returns-every", "15", "--online-steps"]  # 10 offline
    assert_one_line(run_script(algorithm, *map(str, [*words, 5])), "--online-steps 5: these updates take no returns of")
    run(algorithm, *words, 6)


@pytest.mark.parametrize("algorithm", ["cal_ql"])
def test_the_steps_of_whole_episodes_are_in_the_metrics(algorithm, arguments, tmp_path, walk):
    more = ["--num-samples", "2", "--online-steps", ONLINE, "--log-every", "1", "--eval-every", "100"]
    run(algorithm, *arguments, *more, "--run-dir", tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        found = [int(float(row["player/steps"] or 0)) for row in csv.DictReader(file)]
    ends = checkpoint(tmp_path / "run")["learner"]["player"]["lengths"].cumsum(0).tolist()
    assert found == [0] * OFFLINE + [next(end for end in ends if end >= step) for step in range(1, ONLINE + 1)]
    assert len(walk.actions) == found[-1]


@pytest.mark.parametrize("algorithm", ["iql"])
def test_an_environment_that_goes_another_way_is_not_resumed(algorithm, arguments, tmp_path, monkeypatch, walk):
    """Amid an episode, which is as long as before."""
    online = [*arguments, "--online-steps", ONLINE, "--run-dir", tmp_path / "run"]
    monkeypatch.setattr(walk, "fails_after", 17)
    run_script(algorithm, *map(str, online))
    assert len(checkpoint(tmp_path / "run")["learner"]["player"]["actions"]) > 0
    monkeypatch.setattr(walk, "fails_after", 10**6)
    monkeypatch.setattr(walk, "wind", 1e-3)
    ran = run_script(algorithm, *map(str, online), "--resume")
    assert_one_line(ran, "does not fit, start a new run: the environment does not go the same way")


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "cal_ql", "rlpd"])
def test_no_action_goes_beyond_the_environments_bounds(algorithm, arguments, tmp_path, monkeypatch, walk):
    """Which are narrower than the data's. Without acting there is a warning."""
    monkeypatch.setattr(walk, "action_space", gym.spaces.Box(-1, 1, (1,)))
    acting = [] if algorithm in FROM_THE_START else ["--online-steps", ONLINE]
    ran = run_script(algorithm, *map(str, [*arguments, *acting, "--run-dir", tmp_path / "run"]))
    assert ran.returncode == 2 and "Traceback" not in ran.stderr and not walk.actions
    assert re.match("error: the data's actions go beyond the environment's, Box.*: ", ran.stderr.splitlines()[-1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["cal_ql", "rlpd", "sac", "mbpo"])
def test_where_the_environment_fails_the_checkpoint_is_kept(algorithm, arguments, tmp_path, monkeypatch, walk):
    """Of scripts that play whole episodes, or from the start; what they played was within the bounds."""
    monkeypatch.setattr(walk, "fails_after", 40)
    words = arguments if algorithm in ("cal_ql", "rlpd") else arguments[2:]  # the others know no data
    words = [*words, *FROM_THE_START.get(algorithm, ["--num-samples", "2", "--online-steps", "50"])]
    words += ["--checkpoint-every", "5", "--run-dir", tmp_path / "run"]
    ran = run_script(algorithm, *map(str, words))
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "the environment failed at step" in ran.stderr.splitlines()[-1]
    assert checkpoint(tmp_path / "run")["step"] > 0 and checkpoint(tmp_path / "run")["step"] % 5 == 0
    assert np.abs(walk.actions).max() <= 2


@every_algorithm
def test_what_is_played_is_within_the_bounds_and_in_the_buffer(algorithm, arguments, tmp_path, walk):
    """An end is a termination there, a time limit is none. Noise may go beyond the bounds, but for CQL's, within
    tanh, and the plans of PETS."""
    run(algorithm, *arguments, "--online-steps", ONLINE, "--run-dir", tmp_path / "run")
    actions = np.concatenate(walk.actions)
    assert len(actions) == ONLINE and len(np.unique(actions)) > 5 and actions.dtype == np.float32
    assert np.abs(actions).max() <= 2 and (np.any(np.abs(actions) == 2) or algorithm in ("cql", "pets"))
    state = checkpoint(tmp_path / "run")["learner"]["player"]
    lengths = state["lengths"].numpy()
    assert {*lengths} == {3, 5} and lengths.sum() + len(state["actions"]) == ONLINE
    ends = np.isin(np.arange(ONLINE), lengths.cumsum()[lengths == 3] - 1)
    np.testing.assert_array_equal(state["added"][:, -1].numpy(), ends.astype(np.float32))
    np.testing.assert_allclose(state["added"][:, 3].numpy(), actions / 2, atol=1e-6)  # after observations of 3 numbers
    if algorithm != "pets":  # with noise
        best = load_policy(tmp_path / "run").act(state["added"][:, :3]).numpy()
        assert np.abs(best - actions / 2).mean() > 0.1


@pytest.mark.parametrize("algorithm", ["pets"])
def test_a_plan_lasts_as_long_as_its_episode(algorithm, arguments, tmp_path, monkeypatch):
    begun, play = [], pets.Actor.play
    monkeypatch.setattr(pets.Actor, "play", lambda *words, begins: (begun.append(begins), play(*words, begins))[1])
    run(algorithm, *arguments, "--online-steps", ONLINE, "--run-dir", tmp_path / "run")
    lengths = checkpoint(tmp_path / "run")["learner"]["player"]["lengths"]
    expected = np.isin(np.arange(ONLINE), [0, *lengths.cumsum(0).tolist()])
    np.testing.assert_array_equal(begun, expected)


@pytest.mark.parametrize("algorithm", ["iql"])
def test_the_curve_is_shaded_where_the_policy_acts(algorithm, arguments, tmp_path):
    shares = []
    for steps in (0, ONLINE):
        run(algorithm, *arguments, "--online-steps", steps, "--run-dir", tmp_path / str(steps), plot=True)
        picture = imread(tmp_path / str(steps) / "learning_curve.png")[:, :, :3]
        shares.append(np.isclose(picture, 0.93, atol=0.005).all(axis=2).mean())
    assert shares[0] < 0.01 and shares[1] > 0.3


@every_algorithm
def test_acting_needs_an_environment(algorithm, make_dataset, tmp_path):
    words = ["--dataset-id", make_dataset(), "--online-steps", "2000", "--run-dir", str(tmp_path / "run")]
    ran = run_script(algorithm, *words, "--reward-scale", "return-range")
    assert_one_line(ran, r"^error: test/data-v0 names no environment \(--env-id does\)$")
    assert not (tmp_path / "run").exists()


def test_other_scripts_do_not_act():
    ran = run_script("bc", "--online-steps", "5")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("algorithm", "flag"), [*((name, "online_steps") for name in ALGORITHMS), ("td3_bc", "exploration_noise")]
)
def test_bad_arguments_are_one_line(algorithm, flag, tmp_path):
    ran = run_script(algorithm, f"--{flag}", "-1", "--run-dir", str(tmp_path / "run"))
    assert_one_line(ran, f"error: --{flag.replace('_', '-')} -1")


def test_td3_bc_plays_with_noise_of_the_size_it_is_told(tmp_path, pendulum):
    words = ["--num-updates", "5", "--exploration-noise", "0.01", "--actor-learning-rate", "1e-30", *SHORT]
    folder = tmp_path / "run"
    run("td3_bc", *words, "--online-steps", "60", "--run-dir", folder)
    saved = checkpoint(folder)["learner"]
    actor = td3_bc.Actor(3, 1, td3_bc.Args(hidden_dims=(16, 16)))
    actor.load_state_dict(saved["actor"])
    added = saved["player"]["added"]
    away = added[:, 3:4] - actor(added[:, :3]).detach()
    assert len(added) == 60 and 0.007 < away.std() < 0.013
