"""`python -m benchmarks.select`: the program is selection.py, beside it.

This file has the name of a module of Python's own. A script that is run by its path, `python benchmarks/run.py`, finds
it here first when it imports that one, which it then gets.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

if __name__ == "select":
    spec = PathFinder.find_spec("select", [path for path in sys.path if Path(path).resolve() != FOLDER])
    if spec is not None and spec.loader is not None:
        sys.modules["select"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["select"])
else:
    sys.path.append(str(FOLDER))
    import report  # noqa: F401, for it says in one line that pandas or SciPy are missing
    from selection import Args, main

    from common.command_line import launch

    if __name__ == "__main__":
        launch(main, Args)
