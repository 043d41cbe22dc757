"""ESMC (ESM Cambrian), the successor of ESM-2."""
