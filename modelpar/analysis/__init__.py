"""What a trained net shows: kernels, activations, nearest images; knows no training."""
