"""Weights & Biases, if --track asks for it."""

import threading
from collections.abc import Callable
from typing import Any

from common.datasets import one_line, warn

PATIENCE_SECONDS = 100  # with one call; W&B itself gives up its start after 90


class Tracker:
    """A run of W&B; no run unless `init` holds what wandb.init takes. Its first failure is one line and ends tracking,
    never training. As W&B may also hang, each call is made in a thread, which is left behind after PATIENCE_SECONDS.

    `id` is that of the run, or None; given as `run_id`, it is gone on with.
    """

    def __init__(self, init: dict[str, Any] | None, run_id: str | None) -> None:
        self.run: Any = None
        self.id = run_id
        self.failed = False
        if init is not None:
            self._attempt(lambda: self._start(init))

    def _start(self, init: dict[str, Any]) -> None:
        import wandb  # slow to import, and most runs do without

        run = wandb.init(**init, id=self.id, resume="allow" if self.id else None)
        run.define_metric("*", step_metric="step")  # W&B's own step counts rows: several may be of one update
        run.define_metric("dynamics/*", step_metric="dynamics/epoch")
        self.id, self.run = run.id, run

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self._attempt(lambda: self.run.log(row))

    def finish(self, result: dict[str, Any]) -> None:
        if self.run is not None:
            self._attempt(lambda: (self.run.summary.update(result), self.run.finish()))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.failed:
            return
        failures = []

        def call() -> None:
            try:
                action()
            except Exception as error:
                failures.append(f"{type(error).__name__}: {one_line(error)}")

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        if thread.is_alive():
            failures.append(f"no answer in {PATIENCE_SECONDS} s")
        if failures:
            self.failed = True
            warn(f"W&B failed ({failures[0]}): training goes on without it")
