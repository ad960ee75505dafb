"""Files and environments of D4RL's tasks have its reference returns, and no others have."""

import pytest
from reference_returns import find_reference_returns

HOPPER, PEN = (-20.272305, 3234.3), (96.262799, 3076.8331017826877)
KNOWN = {
    "hopper_medium-v2.hdf5": HOPPER,
    "hopper_full_replay-v2.hdf5": HOPPER,
    "hopper_mixed.hdf5": HOPPER,
    "Hopper-v5": HOPPER,
    "halfcheetah_medium_expert-v2.hdf5": (-280.178953, 12135.0),
    "HalfCheetah-v4": (-280.178953, 12135.0),
    "walker_mixed.hdf5": (1.629008, 4592.3),
    "Walker2d-v5": (1.629008, 4592.3),
    "ant_random-v2.hdf5": (-325.6, 3879.7),
    "pen-human-v1.hdf5": PEN,
    "pen-v0_demos_clipped.hdf5": PEN,
    "AdroitHandPen-v1": PEN,
    "hammer-demos-v0-bc-combined.hdf5": (-274.856578, 12794.134825156867),
    "door-cloned-v1.hdf5": (-56.512833, 2880.5693087298737),
    "relocate-expert-v1.hdf5": (-6.425911, 4233.877797728884),
    "kitchen_microwave_kettle_light_slider-v0.hdf5": (0, 4),
    "mini_kitchen_microwave_kettle_light_slider-v0.hdf5": (0, 4),
    "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5": (0, 1),
    "antmaze-large-diverse-v2.hdf5": (0, 1),
    "maze2d-umaze-sparse-v1.hdf5": (23.85, 161.86),
    "maze2d-medium-dense-v1.hdf5": (44.264742, 297.4552547777125),
    "maze2d-large-sparse-v1.hdf5": (6.7, 273.99),
    "maze2d-open-dense.hdf5": (11.17817, 27.166538620695782),
}
UNKNOWN = ["Pendulum-v1", "pendulum.hdf5", "bullet-hopper_medium.hdf5", "AdroitHandPenSparse-v1", "my-hopper.hdf5"]
UNKNOWN += ["antimatter-v1.hdf5", "hopper.hdf5", "AntMaze_UMaze-v5", "PointMaze_UMaze-v3", "maze2d-eval-umaze-v1.hdf5"]


@pytest.mark.parametrize("name", KNOWN)
def test_d4rls_tasks(name):
    assert find_reference_returns(name) == KNOWN[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_tasks(name):
    assert find_reference_returns(name) is None
