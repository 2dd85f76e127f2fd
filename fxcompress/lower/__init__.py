"""Lowering: the layers of a graph become calls of onednn's kernels, whose weights are packed once (design 11)."""
