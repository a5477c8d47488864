"""Images and batches: data sets, sample order, augmentation and loaders."""
