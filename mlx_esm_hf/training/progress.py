"""The progress bar of a training: step, loss, tokens per second and remaining time."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingBar:
    """A progress bar on standard error.

    Args:
        steps: steps of the whole training.
        done: steps done before this call.
        visible: whether to show the bar; None shows it on a terminal only.
    """

    def __init__(self, steps: int, done: int, visible: bool | None):
        console = Console(stderr=True)
        shown = console.is_terminal if visible is None else visible
        columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not shown)
        self.task = self.bar.add_task("", total=steps, completed=done, text="")
        self._began, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> TrainingBar:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second since this process started or resumed the training."""
        return self._tokens / (time.perf_counter() - self._began)

    def show(self, step: int, loss: float, tokens: int) -> None:
        """Show a finished step.

        Args:
            step: its number, from 1.
            loss: its loss.
            tokens: real tokens of this step.
        """
        self._tokens += tokens
        text = f"loss {loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, text=text)
