"""TwoWays: a point in the plane, a wall in its way, and a goal behind it that can be reached above or below the wall.

Either way is as good as the other; the straight one between them ends at the wall. So a policy whose action is the
average of what others did at its state crashes, where one that takes either of the two ways arrives. An observation is
the place (x, y); an action, in [-1, 1]^2, moves it by up to STEP along each axis. The goal ends an episode and pays
100; the wall, or the border above and below, ends it and pays nothing; no other step pays, either. `common.evaluation`
imports this module, which registers the environment as anchorl/TwoWays-v0.
"""

from typing import Any

import gymnasium as gym
import numpy as np

STEP = 0.2
FIELD = np.array([1.2, 1.0])  # the place stays between -FIELD and FIELD
START, SPREAD = np.array([-1.0, 0.0]), 0.03  # an episode starts within SPREAD of START along each axis
WALL = np.array([[-0.6, -0.5], [0.5, 0.5]])  # its lowest and highest corner
BORDER = 0.9  # a wall, too, above and below
GOAL = 0.8  # where x is at least this
MAX_STEPS = 40
PIXELS = 120  # of a picture, for a unit of length
WHITE, GREY, GREEN, BLUE, RED = (255, 255, 255), (90, 90, 90), (160, 215, 160), (60, 110, 200), (200, 30, 30)


class TwoWays(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-FIELD.astype(np.float32), FIELD.astype(np.float32))
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.path: list[np.ndarray] = []  # the places of the episode so far, of which the last one is now's

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.path = [(START + self.np_random.uniform(-SPREAD, SPREAD, 2)).astype(np.float32)]
        return self.path[-1], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        place = np.clip(self.path[-1] + STEP * np.clip(action, -1, 1), -FIELD, FIELD).astype(np.float32)
        self.path.append(place)
        arrived, crashed = bool(in_goal(place)), bool(in_wall(place))
        return place, 100.0 * arrived, arrived or crashed, False, {}

    def render(self) -> np.ndarray:
        """The field from above, [height, width, 3]: the wall, the goal, the path so far, and the point at its end."""
        height, width = (2 * PIXELS * FIELD[::-1]).astype(int)
        x, y = np.meshgrid(np.linspace(-1, 1, width) * FIELD[0], np.linspace(1, -1, height) * FIELD[1])
        places = np.stack([x, y], axis=-1)
        picture = np.full((height, width, 3), WHITE, np.uint8)
        picture[in_wall(places)], picture[in_goal(places)] = GREY, GREEN
        for before, after in zip(self.path, self.path[1:], strict=False):
            for part in np.linspace(0, 1, 20):
                picture[near(places, before + part * (after - before), 0.015)] = BLUE
        picture[near(places, self.path[-1], 0.04)] = RED
        return picture


def near(places: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    return ((places - centre) ** 2).sum(axis=-1) <= radius**2


def in_goal(places: np.ndarray) -> np.ndarray:
    return places[..., 0] >= GOAL


def in_wall(places: np.ndarray) -> np.ndarray:
    inside = ((places >= WALL[0]) & (places <= WALL[1])).all(axis=-1)
    return inside | (np.abs(places[..., 1]) >= BORDER)


if "anchorl/TwoWays-v0" not in gym.registry:  # the tools import this module under another name
    gym.register("anchorl/TwoWays-v0", "benchmarks.two_ways:TwoWays", max_episode_steps=MAX_STEPS)
