"""ESMFold: structure prediction with an ESM-2 language model."""
