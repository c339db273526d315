"""Sweeps: the figures of checkpoints over the options of sampling, cell by cell."""
