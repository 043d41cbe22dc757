"""Quantized checkpoints: which layers are quantized and how, conversion, and its report."""
