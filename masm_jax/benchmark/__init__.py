"""Cost of the network, measured or predicted: ``python -m masm_jax.benchmark --help``."""
