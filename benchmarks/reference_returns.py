"""The returns by which D4RL scores: of a random policy, which is score 0, and of an expert, which is score 100.

The numbers are those of D4RL's d4rl/infos.py. Its Bullet, CARLA, Flow and MiniGrid tasks are not among them.
"""

import re

GYM = r"-(v\d|random|medium|expert|full|mixed)"  # how names go on: Hopper-v5, hopper_medium_replay-v2.hdf5
HAND = r"-(v\d|human|cloned|expert|demos)"  # pen-v0_demos_clipped.hdf5

# by the beginnings of D4RL's files and of the environments that give the same returns, in lower case, with - for _
RETURNS = {
    "halfcheetah" + GYM: (-280.178953, 12135.0),
    "hopper" + GYM: (-20.272305, 3234.3),
    "walker(2d)?" + GYM: (1.629008, 4592.3),
    "ant" + GYM: (-325.6, 3879.7),
    "(adroithand)?pen" + HAND: (96.262799, 3076.8331017826877),
    "(adroithand)?hammer" + HAND: (-274.856578, 12794.134825156867),
    "(adroithand)?door" + HAND: (-56.512833, 2880.5693087298737),
    "(adroithand)?relocate" + HAND: (-6.425911, 4233.877797728884),
    "(mini-)?kitchen-(complete|partial|mixed|microwave)": (0.0, 4.0),
    r"antmaze-\w+(-play|-diverse)?-v[0-2]|ant-maze-(u|big|hardest)-maze": (0.0, 1.0),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
}


def find_reference_returns(name: str) -> tuple[float, float] | None:
    """Of the task that a file's name or an environment's id begins with; None if D4RL has no such task."""
    name = name.lower().replace("_", "-")
    return next((returns for pattern, returns in RETURNS.items() if re.match(pattern, name)), None)
