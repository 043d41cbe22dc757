"""The error every checkpoint reader raises."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message says which file, what is wrong and what to do."""
