"""ESMFold2: structure prediction with an ESMC language model and diffusion."""
