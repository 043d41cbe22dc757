"""Scripts that turn checkpoints of other projects into folders that this library and transformers load."""
