"""Sweeps: rows of changes to one config, each trained and scored with several seeds."""
