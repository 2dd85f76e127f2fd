"""Quantization: what fake-quant nodes are, where they go, and how their ranges are found. It knows no algorithm."""
