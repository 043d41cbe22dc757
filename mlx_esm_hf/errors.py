"""Errors whose message says what happened, where and what to do. Commands print them without a traceback."""


class UserError(ValueError):
    """A mistake in what the caller, a file or the environment provides."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read. The message names the file, what is wrong and what to do."""


class UserRuntimeError(UserError, RuntimeError):
    """A user error that torch and transformers raise as RuntimeError."""


class NonFiniteLossError(UserError, FloatingPointError):
    """A training loss or gradient that is infinite or NaN."""


class NonFiniteError(UserError, FloatingPointError):
    """A result of a model that is infinite or NaN."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as Ctrl-C does."""

    exit_code = 143


def quoted(id: str) -> str:
    """Return an id quoted for a message, shortened to 100 characters."""
    return repr(id if len(id) <= 100 else f"{id[:100]}...")
