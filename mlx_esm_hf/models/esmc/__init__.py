"""ESMC, which follows ESM-2."""
