"""Updates per second of JAX, for throughput.py --jax, which runs this with the Python of JAX's environment.

Each line on standard input asks for one measurement of that many seconds, and is answered by a line on standard output.
The train steps are those of a checkout of EmptyJackson/unifloral (commit f2dc127), unchanged, as its scripts scan over
them, with batches of 256 and twins for its CQL's and COMBO's ten critics. Their CQL takes one action of each kind, as
`cql --num-samples 1` does here, their COMBO as `combo --regularizer logsumexp --num-samples 1`; COMBO's model buffer is
filled beforehand, and its rollouts are left out, as in throughput.py; its logsumexp is held constant there, so that no
gradient passes through those actions, which makes it another step than ours. A TD3+BC step makes two updates of the
critics and one of the actor: it counts as two. `threads` processors are all that this process may use.

Needs JAX, Flax, Optax and Distrax: pip install "jax[cpu]" flax optax distrax tyro
"""

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

NUM_SCANNED = 100  # updates of a call: from 50 on the time of one no longer falls
SIZES = {"cql": {"num_critics": 2}, "combo": {"num_critics": 2, "rollout_interval": 2**30}}


def load(unifloral: str, name: str) -> Any:
    """The script as a module. What plays and logs is not installed, nor asked for in a train step."""
    for absent in ("d4rl", "gym", "wandb"):
        sys.modules[absent] = ModuleType(absent)
    sys.path.insert(0, str(Path(unifloral) / "algorithms"))
    import jax

    if not hasattr(jax, "tree_map"):  # as newer versions of JAX call it
        jax.tree_map = jax.tree.map
    return import_module(name)


def make_trainer(module: Any, name: str, observation_dim: int, action_dim: int, num_steps: int) -> tuple[Any, Any]:
    """A train step and what it changes, put together as the script's main part does, on random data."""
    import jax
    import jax.numpy as jnp

    args = module.Args(**SIZES.get(name, {}))
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    observations = jax.random.normal(keys[0], (num_steps + 1, observation_dim))
    columns: dict[str, Any] = {
        "obs": observations[:-1],
        "action": jax.random.uniform(keys[1], (num_steps, action_dim), minval=-1, maxval=1),
        "reward": jax.random.normal(keys[2], (num_steps,)),
        "next_obs": observations[1:],
        "done": jnp.zeros(num_steps),
    }
    columns["next_action"] = jnp.roll(columns["action"], -1, axis=0)
    dataset = module.Transition(**{field: columns[field] for field in module.Transition._fields})
    s, a = jnp.zeros(observation_dim), jnp.zeros(action_dim)
    scale = observations.mean(axis=0), observations.std(axis=0)
    actor_key, q_key, value_key, other_key, key = keys[3:]

    def state(key: Any, network: Any, inputs: list[Any], *rate: float) -> Any:
        return module.create_train_state(args, key, network, inputs, *rate)

    if name in ("td3_bc", "iql"):
        actors = {"td3_bc": "DeterministicTanhActor", "iql": "TanhGaussianActor"}
        actor, q = getattr(module, actors[name])(action_dim, *scale), module.DualQNetwork(*scale)
        states = {"actor": state(actor_key, actor, [s])}
        states |= {part: state(q_key, q, [s, a]) for part in ("dual_q", "dual_q_target")}
        applied = [actor.apply, q.apply]
        if name == "td3_bc":
            states["actor_target"] = state(actor_key, actor, [s])
        else:
            value = module.StateValueFunction(*scale)
            states["value"] = state(value_key, value, [s])
            applied.append(value.apply)
        step = module.make_train_step(args, *applied, dataset)
        return step, (key, module.AgentTrainState(**states))
    actor, q, alpha = module.TanhGaussianActor(action_dim), module.VectorQ(args.num_critics), module.EntropyCoef()
    states = {"actor": state(actor_key, actor, [s], args.actor_lr), "alpha": state(other_key, alpha, [])}
    states |= {part: state(q_key, q, [s, a]) for part in ("vec_q", "vec_q_target")}
    agent = module.AgentTrainState(**states)
    applied = [actor.apply, q.apply, alpha.apply]
    if name == "cql":
        return module.make_train_step(args, *applied, dataset), (key, agent)
    step = module.make_train_step(args, *applied, dataset, lambda key, policy, buffer: buffer)
    return step, (key, agent, dataset)


def main(
    unifloral: str, name: str, observation_dim: int, action_dim: int, threads: int, num_steps: int = 100_000
) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # before JAX counts them
    step, carried = make_trainer(load(unifloral, name), name, observation_dim, action_dim, num_steps)
    import jax

    scan: Callable = jax.jit(lambda carried: jax.lax.scan(step, carried, None, NUM_SCANNED)[0])
    carried = jax.block_until_ready(scan(carried))  # compiles
    for line in sys.stdin:
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < float(line):
            carried = jax.block_until_ready(scan(carried))
            calls += NUM_SCANNED * (2 if name == "td3_bc" else 1)
        print(f"{calls / (time.perf_counter() - began):.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
