"""Scripts that convert checkpoints of other projects to folders that this library and transformers load."""
