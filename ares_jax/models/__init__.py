"""Models: NNX modules with logical axis names on every parameter."""
