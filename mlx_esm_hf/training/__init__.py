"""Training: data sets, `MLXTrainer`, adapters, and the jobs behind `mlx-esm train` and `mlx-esm finetune`."""
