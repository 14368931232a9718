"""From problems to arrays: sources, prompts, image patches, packing. NumPy only; knows nothing of the model or of JAX."""
