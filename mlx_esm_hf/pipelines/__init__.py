"""Sequences in, answers out."""
