"""When environments end an episode: what their documentation says, for models that roll out without them."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.datasets import check

# from the states [N, observation_dim] that steps lead to, as the environment has them, to [N]: true where it ends
TERMINATION_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "Hopper": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "Walker2d": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1)),
    "Ant": lambda s: ~((s[:, 0] >= 0.2) & (s[:, 0] <= 1) & s.isfinite().all(dim=1)),
    **dict.fromkeys(("HalfCheetah", "Pendulum", "never"), lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)),
}


def termination_rule(termination: str, env_id: str | None) -> str:
    """What ends a rollout, given --termination and an environment's id, such as Hopper-v5: a key of TERMINATION_RULES,
    "learned" or "never". Raises BadInput if a rule is asked for and none is known.
    """
    if termination in ("learned", "never"):
        return termination
    name = (env_id or "").split("-")[0]
    known = name in TERMINATION_RULES
    check(known or termination == "auto", f"--termination rule: none is known for {env_id}; take learned or never")
    return name if known else "learned"
