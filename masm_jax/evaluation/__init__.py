"""Metrics as the BraTS challenge defines them, and what people look at."""
