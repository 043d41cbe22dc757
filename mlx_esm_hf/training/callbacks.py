"""Callbacks of a training: transformers' `TrainerCallback` and anything with the same methods."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from mlx_esm_hf.errors import UserError


@dataclass
class Control:
    """What a callback can ask for, with the names of transformers' `TrainerControl`.

    Attributes:
        should_training_stop: end the training after this step.
        should_epoch_stop: the same as `should_training_stop` until the next epoch begins.
        should_save: write a checkpoint after this step.
        should_evaluate: evaluate after this step.
        should_log: log the loss after this step.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class Callbacks:
    """The callbacks of a trainer, called in their order.

    Args:
        callbacks: objects or classes.
    """

    def __init__(self, callbacks: Iterable[Any]):
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Add an object, or an object of a class."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop(self, callback: Any) -> Any:
        """Remove and return a callback, or the first one of a class; None if there is none."""
        for number, found in enumerate(self.callbacks):
            if found is callback or (isinstance(callback, type) and isinstance(found, callback)):
                return self.callbacks.pop(number)
        return None

    def call(self, event: str, args: Any, state: Any, control: Control, **values: Any) -> None:
        """Call a method of each callback, which may change `control` or return another one.

        Args:
            event: name of the method, such as "on_step_end". A callback may lack it.
            args: the arguments of the training.
            state: its state.
            control: changed in place.
            values: what the method gets by name, such as `model` and `logs`.
        """
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is None:
                continue
            result = method(args, state, control, **values)
            if result is not None and result is not control:
                for wish in fields(Control):
                    setattr(control, wish.name, getattr(result, wish.name))

    def states(self) -> dict[str, Any]:
        """Return {name of the class: what it wants to keep in a checkpoint}, such as the patience of early stopping."""
        states = {name: callback.state() for name, callback in self._with_state()}
        try:
            return json.loads(json.dumps(states))
        except TypeError as error:
            raise UserError(f"The state() of a callback must be JSON values ({error}).") from error

    def restore(self, states: dict[str, Any]) -> None:
        """Set the attributes that `states` returned."""
        for key, callback in self._with_state():
            for name, value in states.get(key, {}).get("attributes", {}).items():
                setattr(callback, name, value)

    def _with_state(self) -> Iterator[tuple[str, Any]]:
        """Yield the callbacks that keep something, with the name of the class, numbered from its second object on."""
        counts: Counter[str] = Counter()
        for callback in self.callbacks:
            if callable(getattr(callback, "state", None)):
                name = type(callback).__name__
                counts[name] += 1
                yield name if counts[name] == 1 else f"{name} {counts[name]}", callback
