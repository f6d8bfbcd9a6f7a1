"""Where parameters come from: NumPy on the host, a function of the seed alone.

The same numbers on every backend, device count and JAX version, and no program to compile: a jitted
initialisation of the tiny network takes 12 s to compile on two cores, this one takes 2 s at most.
"""

import numpy as np


class Initialiser:
    """Draws parameters in the order in which modules ask for them.

    Args:
      seed: of the draws; None gives zeros, for tracing shapes without work.
    """

    def __init__(self, seed):
        self._random = None if seed is None else np.random.default_rng(seed)

    def apart(self):
        """For a part that a network may have or not: draws of its own, the others stay as they are.

        So networks that differ in such a part start equal everywhere else, and can be compared
        seed by seed.
        """
        other = Initialiser(None)
        if self._random is not None:
            (other._random,) = self._random.spawn(1)
        return other

    def normal(self, shape, std):
        """Float32 normal of mean 0."""
        if self._random is None:
            return np.zeros(shape, np.float32)
        return self._random.standard_normal(shape, np.float32) * np.float32(std)

    def fan_in(self, shape, gain=1.0):
        """Normal of variance gain / fan-in; the last axis is the output (LeCun 1998; He 2015)."""
        return self.normal(shape, np.sqrt(gain / np.prod(shape[:-1])))
