"""What the net sees: sets, their order, augmentation and batches; knows nothing of the net."""
