"""Parity is measured on the programs that users run."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_optimisation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
