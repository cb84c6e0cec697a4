"""Optimizer, loss, step, checkpoints and the training loop."""
