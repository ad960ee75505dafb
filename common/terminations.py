"""When environments end an episode: what their documentation says, for models that roll out without them."""

from collections.abc import Callable

import torch
from torch import Tensor

# from the states [N, observation_dim] that steps lead to, as the environment has them, to [N]: true where it ends
TERMINATION_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "Hopper": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "Walker2d": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1)),
    "Ant": lambda s: ~((s[:, 0] >= 0.2) & (s[:, 0] <= 1) & s.isfinite().all(dim=1)),
    **dict.fromkeys(("HalfCheetah", "Pendulum"), lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)),
}


def termination_rule(env_id: str | None) -> str | None:
    """The key of TERMINATION_RULES for an environment's id, such as Hopper-v5; None if there is none."""
    name = (env_id or "").split("-")[0]
    return name if name in TERMINATION_RULES else None
