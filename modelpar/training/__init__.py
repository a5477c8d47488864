"""Training, evaluation and prediction: steps, learning rates, checkpoints and logging."""
