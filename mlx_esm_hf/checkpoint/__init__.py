"""Reading and writing checkpoints: files to and from {parameter name: `mx.array`}, without knowing about layers."""
