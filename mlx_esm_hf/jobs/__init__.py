"""The jobs people run ESM for, one module each. Each has a function of the same name and a command of `mlx-esm`."""
