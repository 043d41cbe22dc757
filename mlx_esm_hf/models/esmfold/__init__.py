"""ESMFold: structures from an ESM-2 language model."""
