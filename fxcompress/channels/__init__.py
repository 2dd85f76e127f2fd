"""The channel analysis: which slices of which tensors belong together."""
