"""What the peers' scripts read, how they evaluate and what they write, without the peers, which are not among the
test's packages: small files stand for their checkouts.
"""

import ast
import importlib.util
import json
import re
import sys
import textwrap
import tomllib
from functools import partial
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, random_episode

from common.command_line import BUILT_IN_ID
from common.data import BUILT_IN_DISCRETE_ID, load_dataset
from common.evaluation import FINAL_SEED, evaluate, make_environments

FOLDER = ROOT / "benchmarks" / "peers"
SCRIPTS = ("corl_scores", "d3rlpy_scores", "edac_scores", "offlinerlkit_scores")
CHECKOUTS = (("corl_scores", "corl"), ("edac_scores", "edac"), ("offlinerlkit_scores", "kit"))


def load(name):
    """The module, with something in d3rlpy's place that takes every call."""
    fake = mock.MagicMock(__version__="0")
    fakes = dict.fromkeys(["d3rlpy", "d3rlpy.preprocessing", "structlog"], fake)
    path = [str(FOLDER), *sys.path]
    with mock.patch.dict(sys.modules, fakes), mock.patch.object(sys, "path", path), mock.patch.dict("os.environ"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@pytest.fixture(scope="module")
def protocol():
    with mock.patch.object(sys, "path", [str(FOLDER), *sys.path]):
        return importlib.import_module("protocol")


@pytest.fixture
def apart():
    """Leaves no stand-ins of modules behind."""
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [*sys.path]):
        yield


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_packages_are_in_the_first_lines(name):
    path = FOLDER / f"{name}.py"
    text = re.match(r"# /// script\n(.*?)# ///\n", path.read_text(), flags=re.DOTALL)[1]
    metadata = tomllib.loads(re.sub("^# ", "", text, flags=re.MULTILINE))
    needed = {re.split(r"[\[=>]", package)[0] for package in metadata["dependencies"]}
    imported = set()
    for source in (path, FOLDER / "protocol.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {name.split(".")[0] for name in [getattr(node, "module", None) or node.names[0].name]}
    brought = {"numpy", "structlog"} if name == "d3rlpy_scores" else set()  # by d3rlpy
    packages = {"pyyaml" if package == "yaml" else package for package in imported}
    assert packages - set(sys.stdlib_module_names) - {"protocol"} <= needed | brought


# --- Data and evaluation --------------------------------------------------------------------------------------------


def test_it_reads_the_transitions_that_we_read(protocol, pendulum):
    data = protocol.read(BUILT_IN_ID)
    episodes = list(load_dataset(BUILT_IN_ID).read_episodes())
    np.testing.assert_array_equal(data.observations, np.concatenate([episode.observations for episode in episodes]))
    np.testing.assert_array_equal(data.actions, np.concatenate([episode.actions for episode in episodes]))
    np.testing.assert_allclose(data.rewards, np.concatenate([episode.rewards for episode in episodes]))
    ends = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    assert np.flatnonzero(data.truncations).tolist() == ends.tolist() and not data.terminations.any()
    inside = np.setdiff1d(np.arange(len(data.rewards)), ends)
    np.testing.assert_array_equal(data.next_observations[inside], data.observations[inside + 1])
    assert np.abs(data.next_observations[ends[:-1]] - data.observations[ends[:-1] + 1]).max(axis=1).min() > 0
    assert data.score(-300.0) == pytest.approx(pendulum.dataset.score(-300.0))


def test_an_episode_that_stops_short_is_cut_and_one_that_terminates_is_not(protocol, make_dataset):
    ended = np.arange(30) == 29
    episodes = [
        random_episode(0, terminations=ended, truncations=ended),  # both, which d3rlpy refuses
        random_episode(1, truncations=np.zeros(30, bool)),
    ]
    name = make_dataset(episodes=episodes, env="Pendulum-v1")
    with mock.patch.object(protocol.json, "loads", lambda text: {"ref_min_score": 0, "total_episodes": 2}):
        data = protocol.read(name)
    assert np.flatnonzero(data.terminations).tolist() == [29] and np.flatnonzero(data.truncations).tolist() == [59]


def test_a_dataset_that_is_not_there_is_bad_input(protocol, capsys):
    with pytest.raises(SystemExit) as stopped:
        protocol.read("no/such-v0")
    assert stopped.value.code == 2 and "--datasets no/such-v0: no " in capsys.readouterr().err


def data_of(protocol, **specs):
    metadata = {name: json.dumps({"id": "Pendulum-v1", **spec}) for name, spec in specs.items()}
    return protocol.Data("test/data-v0", *[np.zeros((1, 1))] * 6, metadata=metadata)


@pytest.mark.parametrize(
    ("specs", "limit"),
    [
        ({"env_spec": {"kwargs": {}, "max_episode_steps": 50}}, 50),
        ({"env_spec": {"kwargs": {"g": 5.0, "render_mode": "human"}, "max_episode_steps": 50}}, 50),
        ({"env_spec": {"max_episode_steps": 50}, "eval_env_spec": {"max_episode_steps": 70}}, 70),
        ({"eval_env_spec": {}}, 200),  # as import_logs writes it
    ],
)
def test_it_plays_where_ours_is_evaluated(protocol, specs, limit):
    environment = data_of(protocol, **specs).environments(2)[1]
    assert environment.spec.max_episode_steps == limit
    kwargs = specs.get("eval_env_spec", specs.get("env_spec")).get("kwargs", {})
    assert environment.unwrapped.g == kwargs.get("g", 10)


@pytest.mark.parametrize("specs", [{}, {"env_spec": {"id": "Nowhere-v0"}}])
def test_an_environment_that_cannot_be_made_is_bad_input(protocol, specs, capsys):
    with pytest.raises(SystemExit) as stopped:
        data_of(protocol, **specs).environments(1)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and told.count("\n") == 1
    assert told.startswith("--datasets test/data-v0: its environment cannot be made (")


def test_discrete_actions_are_bad_input(protocol, capsys):
    with pytest.raises(SystemExit) as stopped:
        protocol.read(BUILT_IN_DISCRETE_ID)
    assert stopped.value.code == 2 and "its observations and actions must be vectors" in capsys.readouterr().err


def test_parts_of_observations_are_bad_input(protocol, make_dataset, capsys, monkeypatch):
    episode = random_episode(0)
    parts = episode | {"observations": {"joints": episode["observations"]}}
    space = gym.spaces.Dict({"joints": gym.spaces.Box(-np.inf, np.inf, (3,))})
    name = make_dataset(episodes=[parts], observation_space=space)
    monkeypatch.setattr(protocol.json, "loads", lambda text: {"ref_min_score": 0, "total_episodes": 1})
    with pytest.raises(SystemExit) as stopped:
        protocol.read(name)
    assert stopped.value.code == 2 and "its observations and actions must be vectors" in capsys.readouterr().err


def test_actions_are_scaled_and_scaled_back(protocol):
    """Pendulum's are in [-2, 2]."""
    cell = protocol.Cell("x", BUILT_IN_ID, 0, protocol.Args(eval_episodes=1))
    scaled = cell.data.d4rl(cell.space)
    np.testing.assert_allclose(scaled["actions"], cell.data.actions / 2, atol=1e-6)
    np.testing.assert_allclose(cell.from_unit(np.array([[-3.0], [0.25]])), [[-2.0], [0.5]])
    assert scaled["terminals"].dtype == bool and scaled["rewards"] is not cell.data.rewards
    cell.space = gym.spaces.Box(-1, 3, (1,))  # whose middle is 1
    np.testing.assert_allclose(cell.data.d4rl(cell.space)["actions"], (cell.data.actions - 1) / 2, atol=1e-6)
    np.testing.assert_allclose(cell.from_unit(np.array([[-3.0], [0.25]])), [[-1.0], [1.5]])


def test_its_evaluation_is_ours(protocol, pendulum):
    def policy(observations):
        return 2 * np.tanh(observations[:, 1:2] - observations[:, 2:] / 4).astype(np.float32)

    environments = make_environments(pendulum.dataset, 3)
    np.testing.assert_allclose(protocol.evaluate(policy, environments), evaluate(policy, environments)[0])


def at_rest(observations):
    return np.zeros((len(observations), 1), np.float32)


def test_a_cell_is_trained_and_evaluated_as_asked(protocol, pendulum):
    script = load("d3rlpy_scores")
    learner = mock.MagicMock(predict=at_rest)
    script.CONFIGS["iql"] = mock.MagicMock(return_value=mock.Mock(create=mock.Mock(return_value=learner)))
    args = script.Args(num_updates=5, eval_every=2, eval_episodes=3)  # of which 50 is no multiple
    result, rows = script.train("iql", protocol.Cell("d3rlpy iql", BUILT_IN_ID, 0, args))
    assert learner.update.call_count == 5 and [row["num_updates"] for row in rows] == [2, 4, 5]
    environments = make_environments(pendulum.dataset, 3)
    curve, final = (evaluate(at_rest, environments, *more)[0] for more in ((), (50, FINAL_SEED)))
    np.testing.assert_allclose([row["return_mean"] for row in rows], curve.mean())
    np.testing.assert_allclose(result["final_returns"], final)
    np.testing.assert_allclose(result["final_score"], pendulum.dataset.score(final.mean()))
    assert result["algorithm"] == "d3rlpy iql" and rows[0]["seed"] == 0


def test_evaluations_are_no_time_of_updates(protocol, monkeypatch):
    now = [0.0]

    def take(seconds):
        now[0] += seconds
        return np.zeros(1)

    cell = protocol.Cell("x", BUILT_IN_ID, 0, protocol.Args(num_updates=100, eval_episodes=1))
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(protocol, "evaluate", lambda *_: take(1000.0))
    cell.start()
    for step, seconds in ((50, 3.0), (100, 7.0)):
        take(seconds)
        cell.evaluate(step, at_rest)
    assert cell.finish(at_rest, "")[0]["updates_per_second"] == 10


# --- Checkouts ------------------------------------------------------------------------------------------------------

CORL = """
    import d4rl, gym, pyrallis, wandb
    from dataclasses import dataclass

    @dataclass
    class TrainConfig:
        env: str = "x"
        beta: float = 1.0
        max_timesteps: int = 0
        eval_freq: int = 0
        n_episodes: int = 0
        buffer_size: int = 0
        seed: int = 7
        device: str = "cuda"

    SEEN = []

    def wandb_init(config): raise NotImplementedError
    def eval_actor(*args, **kwargs): raise NotImplementedError
    def wrap_env(env, state_mean, state_std): raise NotImplementedError

    class Actor:
        def eval(self): self.acting = True
        def train(self): self.acting = False
        def act(self, state, device):
            assert self.acting and state.shape == (3,)
            return state[:1] * 0 + 0.5

    @pyrallis.wrap()
    def train(config):
        env = wrap_env(gym.make(config.env), state_mean=1.0, state_std=2.0)
        dataset = d4rl.qlearning_dataset(env)
        SEEN.append((config, dataset, env))
        wandb_init({})
        for step in range(1, config.max_timesteps + 1):
            wandb.log({}, step=step)
            if step % config.eval_freq == 0:
                scores = eval_actor(env, Actor(), device="cpu", n_episodes=1, seed=0)
                env.get_normalized_score(scores.mean())
"""


def test_corl_is_trained_with_its_configuration_and_our_data(protocol, tmp_path, pendulum, apart):
    (tmp_path / "algorithms" / "offline").mkdir(parents=True)
    (tmp_path / "algorithms" / "offline" / "iql.py").write_text(textwrap.dedent(CORL))
    (tmp_path / "configs" / "offline" / "iql" / "pendulum").mkdir(parents=True)
    (tmp_path / "configs" / "offline" / "iql" / "pendulum" / "mixed_v2.yaml").write_text("beta: 3e-4\nenv: pendulum")
    script = load("corl_scores")
    args = script.Args(num_updates=4, eval_every=2, eval_episodes=2, corl=tmp_path)
    result, rows = script.train("iql", protocol.Cell("CORL iql", BUILT_IN_ID, 5, args), args)
    config, dataset, env = sys.modules["iql"].SEEN[0]
    assert (config.beta, config.env, config.seed, config.device) == (3e-4, "pendulum", 5, "cpu")
    assert (config.max_timesteps, config.eval_freq, config.buffer_size) == (4, 2, len(dataset["rewards"]))
    assert env.action_space.high.tolist() == [1.0] and env.observation_space.shape == (3,)
    assert [row["num_updates"] for row in rows] == [2, 4]
    returns, _ = evaluate(lambda states: at_rest(states) + 1, make_environments(pendulum.dataset, 2), 50, FINAL_SEED)
    np.testing.assert_allclose(result["final_returns"], returns)  # 0.5 of [-1, 1] is 1 of [-2, 2]


KIT = """
    import argparse
    import gym, d4rl
    from gym.envs.mujoco import mujoco_env

    '''
    hopper-medium-v2: rollout-length=5, penalty-coef=2.5
    hopper-medium-expert-v2: rollout-length=1, penalty-coef=5.0
    '''

    def get_args():
        parser = argparse.ArgumentParser()
        parser.add_argument("--task", type=str, default="")
        parser.add_argument("--rollout-length", type=int, default=0)
        parser.add_argument("--penalty-coef", type=float, default=0)
        parser.add_argument("--tau", type=float, default=0.005)
        return parser.parse_args()

    class Policy:
        acting = True
        def train(self): self.acting = False
        def eval(self): self.acting = True
        def select_action(self, observations, deterministic=False):
            assert deterministic and self.acting
            return observations[:, :1] * 0 - 0.5

    class MFPolicyTrainer:
        def __init__(self, policy, epoch, step_per_epoch):
            self.policy, self._epoch, self._step_per_epoch = policy, epoch, step_per_epoch
        def train(self):
            for _ in range(self._epoch):
                self.policy.train()
                self._evaluate()

    SEEN = []

    def train(args=get_args()):
        env = gym.make(args.task)
        SEEN.append((args, d4rl.qlearning_dataset(env)))
        Logger(make_log_dirs(args.task), {}).log("x")
        MFPolicyTrainer(Policy(), args.epoch, args.step_per_epoch).train()
"""


def test_the_kit_is_trained_with_its_arguments_and_our_data(protocol, tmp_path, pendulum, apart, monkeypatch):
    (tmp_path / "run_example").mkdir()
    (tmp_path / "run_example" / "run_cql.py").write_text(textwrap.dedent(KIT))
    script = load("offlinerlkit_scores")
    monkeypatch.setattr(script, "task_of", lambda name: "hopper-medium-expert-v2")
    monkeypatch.setattr(sys, "argv", ["x"])
    args = script.Args(
        num_updates=4, eval_every=2, eval_episodes=2, kit=tmp_path, more=("tau=0.02",), out=tmp_path / "out"
    )
    result, rows = script.train("cql", protocol.Cell("OfflineRL-Kit cql", BUILT_IN_ID, 5, args), args)
    seen, dataset = sys.modules["run_cql"].SEEN[0]
    assert (seen.rollout_length, seen.penalty_coef, seen.tau, seen.seed, seen.device) == (1, 5.0, 0.02, 5, "cpu")
    assert (seen.epoch, seen.step_per_epoch, seen.load_dynamics_path) == (2, 2, None)
    assert [row["num_updates"] for row in rows] == [2, 4] and len(dataset["terminals"]) == len(dataset["rewards"])
    returns, _ = evaluate(lambda states: at_rest(states) - 1, make_environments(pendulum.dataset, 2), 50, FINAL_SEED)
    np.testing.assert_allclose(result["final_returns"], returns)


def test_the_kit_s_results_and_models_are_of_their_arguments(protocol, tmp_path, monkeypatch):
    script, named = load("offlinerlkit_scores"), []
    monkeypatch.setattr(script, "run", lambda library, names, *_: named.extend(names))
    words = ["--algorithms", "mopo", "cql", "--kit", str(tmp_path), "--max-dynamics-epochs", "9"]
    more = ["--more", "tau=0.02", "dynamics-lr=1e-4"]
    for given in (words, [*words, *more]):
        monkeypatch.setattr(sys, "argv", ["x", *given])
        script.main()
    rest = "--tau 0.02 --dynamics-lr 1e-4"
    assert named == ["mopo --max-dynamics-epochs 9", "cql", f"mopo {rest} --max-dynamics-epochs 9", f"cql {rest}"]

    folders = []
    for epochs, pairs in ((None, ()), (None, ("tau=0.02",)), (9, ()), (None, ("dynamics-lr=1e-4",))):
        args = script.Args(out=tmp_path, max_dynamics_epochs=epochs, more=pairs)
        folders.append(script.model_folder(protocol.Cell("x", BUILT_IN_ID, 5, args), args))
    assert folders[0] == folders[1] == tmp_path / "dynamics" / BUILT_IN_ID / "5"  # MOPO and COMBO share one
    assert len({*folders}) == 3


def test_the_kit_s_names_of_tasks():
    script = load("offlinerlkit_scores")
    assert script.task_of("zoo/hopper/medium-expert-v0") == "hopper-medium-expert-v2"
    text = "hopper-medium-v2: a-b=1, c=2.5\nhopper-medium-expert-v2: a-b=5\n"
    assert script.suggested(text, "hopper-medium-v2") == ["--a-b=1", "--c=2.5"]
    assert script.suggested(text, "walker2d-medium-v2") == []


def test_the_kit_s_models_are_for_tasks_whose_ends_it_knows(protocol, capsys):
    script = load("offlinerlkit_scores")
    args = script.Args(eval_episodes=1)
    with pytest.raises(SystemExit) as stopped:
        script.train("mopo", protocol.Cell("x", BUILT_IN_ID, 0, args), args)
    assert stopped.value.code == 2 and "does not know when anchorl/pendulum" in capsys.readouterr().err


EDAC = {
    "scripts/sac.py": """
        import argparse
        from experiment_utils.launch_experiment import launch_experiment
        from lifelong_rl.config import get_config

        if __name__ == "__main__":
            parser = argparse.ArgumentParser()
            parser.add_argument("--env_name")
            parser.add_argument("--seed", type=int)
            parser.add_argument("--num_qs", default=2, type=int)
            parser.add_argument("--eta", default=-1.0, type=float)
            args = parser.parse_args()
            launch_experiment(
                variant={"args": vars(args), "offline_kwargs": {"batch_size": 7}}, get_config=get_config, data_args={}
            )
    """,
    "experiment_utils/launch_experiment.py": """
        import gtimer
        from experiment_configs.base_experiment import experiment

        def launch_experiment(**_): raise NotImplementedError
    """,
    "experiment_utils/prepare_data.py": """
        import gym
        from d4rl import qlearning_dataset

        def load_hdf5(env, replay_buffer, args):
            assert isinstance(env.action_space, gym.spaces.Box) and args == {}
            print("its lines")
            replay_buffer.data = qlearning_dataset(env)
    """,
    "lifelong_rl/data_management/replay_buffers/env_replay_buffer.py": """
        class EnvReplayBuffer:
            def __init__(self, size, env): self.drawn = []
            def random_batch(self, batch_size, return_indices):
                self.drawn.append(batch_size)
                return self.data, [0]
    """,
    "lifelong_rl/config.py": """
        import numpy as np

        SEEN = []

        class Policy:
            stochastic_policy = property(lambda self: self)
            def get_actions(self, observations, deterministic=False):
                assert deterministic
                return observations[:, :1] * 0 + 0.5

        class Trainer:
            def train(self, batch, indices): SEEN.append((batch, indices))

        def get_config(variant, expl_env, eval_env, obs_dim, action_dim, replay_buffer):
            SEEN.append((variant["args"], obs_dim, action_dim, replay_buffer, np.random.rand()))
            return {"evaluation_policy": Policy(), "trainer": Trainer()}
    """,
}


def test_edac_is_trained_with_its_arguments_and_our_data(protocol, tmp_path, pendulum, apart, monkeypatch, capsys):
    for name, text in EDAC.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    script = load("edac_scores")
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.syspath_prepend(tmp_path)
    args = script.Args(num_updates=4, eval_every=2, eval_episodes=2, eta=5.0, edac=tmp_path)
    result, rows = script.train(protocol.Cell("snu-mllab edac", BUILT_IN_ID, 5, args), args)
    (seen, *dims, buffer, drawn), *updates = sys.modules["lifelong_rl.config"].SEEN
    assert seen == {"env_name": BUILT_IN_ID, "seed": 5, "num_qs": 10, "eta": 5.0} and dims == [3, 1]
    assert drawn == np.random.RandomState(5).rand()
    assert buffer.drawn == [7] * 4 and len(updates) == 4 and all(batch is buffer.data for batch, _ in updates)
    assert len(buffer.data["terminals"]) == len(buffer.data["rewards"])
    assert [row["num_updates"] for row in rows] == [2, 4] and "its lines" not in capsys.readouterr().out
    returns, _ = evaluate(lambda states: at_rest(states) + 1, make_environments(pendulum.dataset, 2), 50, FINAL_SEED)
    np.testing.assert_allclose(result["final_returns"], returns)  # 0.5 of [-1, 1] is 1 of [-2, 2]


def test_edac_s_results_are_of_their_arguments(protocol):
    script = load("edac_scores")
    names = [
        script.full_name(script.Args(num_critics=count, eta=eta)) for count, eta in ((10, 1.0), (50, 1.0), (10, 5.0))
    ]
    assert names == ["edac", "edac --num-critics 50", "edac --eta 5"]


@pytest.mark.parametrize(("name", "argument"), CHECKOUTS)
def test_no_checkout_is_bad_input(protocol, name, argument, tmp_path, capsys, apart, monkeypatch):
    script = load(name)
    monkeypatch.setattr(sys, "argv", ["x"])
    args = script.Args(eval_episodes=1, out=tmp_path, **{argument: tmp_path / "none"})
    with pytest.raises(SystemExit) as stopped:
        train = script.train if name == "edac_scores" else partial(script.train, "cql")
        train(protocol.Cell("x", BUILT_IN_ID, 0, args), args)
    assert stopped.value.code == 2 and f"--{argument} {tmp_path}/none: no " in capsys.readouterr().err


# --- Results --------------------------------------------------------------------------------------------------------


def run(protocol, out, monkeypatch, **values):
    """What was trained: a fake takes note."""
    seen = []

    def train(algorithm, cell):
        seen.append((algorithm, cell.seed))
        about = {name: getattr(cell.args, name) for name in ("num_updates", "eval_every", "eval_episodes")}
        return cell.names | {"final_score": 1} | about, [cell.names | {"score": 1}, cell.names | {"score": 2}]

    monkeypatch.setattr(protocol.torch, "set_num_threads", lambda count: None)
    protocol.run("d3rlpy", ("iql", "bcq"), protocol.Args(out=out, **values), train)
    return seen


def test_done_cells_are_skipped(protocol, tmp_path, monkeypatch):
    assert run(protocol, tmp_path, monkeypatch, seeds=1) == [("iql", 0), ("bcq", 0)]
    assert run(protocol, tmp_path, monkeypatch, seeds=2) == [("iql", 1), ("bcq", 1)]
    assert run(protocol, tmp_path, monkeypatch, seeds=2, first_seed=1) == [("iql", 2), ("bcq", 2)]
    assert len(protocol.read_rows(tmp_path / "evaluations.csv")) == 12
    assert [row["algorithm"] for row in protocol.read_rows(tmp_path / "results.csv")] == [
        "d3rlpy iql",
        "d3rlpy bcq",
    ] * 3


def test_a_cell_that_was_cut_off_between_its_two_files_is_there_once(protocol, tmp_path, monkeypatch):
    run(protocol, tmp_path, monkeypatch, seeds=1)
    protocol.write_rows(tmp_path / "results.csv", protocol.read_rows(tmp_path / "results.csv")[:1])
    assert run(protocol, tmp_path, monkeypatch, seeds=1) == [("bcq", 0)]
    assert len(protocol.read_rows(tmp_path / "evaluations.csv")) == 4


def test_a_cell_that_another_command_has_done_meanwhile_is_there_once(protocol, tmp_path):
    cell = {"algorithm": "d3rlpy iql", "dataset_id": "x", "seed": 0}
    for score in (1, 2):
        protocol.add(tmp_path, cell | {"final_score": score}, [cell | {"score": score}])
    assert [row["final_score"] for row in protocol.read_rows(tmp_path / "results.csv")] == ["2"]
    assert [row["score"] for row in protocol.read_rows(tmp_path / "evaluations.csv")] == ["2"]


def test_cells_of_other_arguments_do_not_count_as_done(protocol, tmp_path, monkeypatch, capsys):
    run(protocol, tmp_path, monkeypatch, seeds=1)
    with pytest.raises(SystemExit):
        run(protocol, tmp_path, monkeypatch, seeds=1, num_updates=20_000)
    assert "d3rlpy iql anchorl/pendulum/mixed-v0 0 with num_updates 10000" in capsys.readouterr().err


def test_rows_of_an_older_version_may_lack_columns(protocol, tmp_path, monkeypatch, capsys):
    run(protocol, tmp_path, monkeypatch, seeds=1)
    path = tmp_path / "results.csv"
    rows = [{name: cell for name, cell in row.items() if name != "final_score"} for row in protocol.read_rows(path)]
    protocol.write_rows(path, rows)
    assert run(protocol, tmp_path, monkeypatch, seeds=2) == [("iql", 1), ("bcq", 1)]
    assert [row["final_score"] for row in protocol.read_rows(path)] == ["", "", "1", "1"]
    protocol.write_rows(path, [{name: cell for name, cell in row.items() if name != "eval_every"} for row in rows])
    with pytest.raises(SystemExit):
        run(protocol, tmp_path, monkeypatch, seeds=1)
    assert "with eval_every None: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("seeds", 0), ("eval_every", 0), ("num_updates", -1), ("first_seed", -1)])
def test_bad_values_are_bad_input(protocol, tmp_path, monkeypatch, capsys, name, value):
    with pytest.raises(SystemExit) as stopped:
        run(protocol, tmp_path, monkeypatch, **{name: value})
    assert stopped.value.code == 2 and f"--{name.replace('_', '-')} {value}: must" in capsys.readouterr().err
