"""Analysis of a trained net: conv1's kernels, activations and nearest images."""
