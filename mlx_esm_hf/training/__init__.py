"""Training: the masked-language-model objective, data sets, `MLXTrainer`, adapters."""
