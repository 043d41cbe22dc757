"""transformers' own common tests, run on our classes."""
