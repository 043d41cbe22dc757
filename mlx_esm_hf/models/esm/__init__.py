"""ESM-1, ESM-1b, ESM-1v and ESM-2."""
