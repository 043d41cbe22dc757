"""Proteins on their way to a model: read, cleaned, made into token ids, cut into windows and batches."""
