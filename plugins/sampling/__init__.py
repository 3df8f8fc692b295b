"""Kernels that choose tokens from rows of logits; they are no operators of the graph, and the runtime launches them."""
