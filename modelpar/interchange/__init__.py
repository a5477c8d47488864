"""Weights in and out: the files of other programs."""
