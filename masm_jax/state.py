"""The network as functions, and the training state: plain nested dicts of arrays.

NNX modules are parameter containers. They are split and merged here and nowhere else; what is
trained, saved and restored is {"step", "params", "ema", "opt_state"}.
"""

import copy
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from masm_jax.models.init import Initialiser
from masm_jax.models.masm import MASM, edges
from masm_jax.models.sizes import size_of
from masm_jax.optim import optimiser

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Network:
    """MASM of a config, without parameters.

    Args:
      config: a validated config.
      modalities: names in the order of the input.
      regions: {name: label values}, outer to inner.
      mesh: of the devices that the steps (steps.py) run on; None: one.
    """

    def __init__(self, config, *, modalities, regions, mesh=None):
        self.config, self.mesh, self.patch = config, mesh, edges(config.patch)
        self.modalities, self.regions = tuple(modalities), dict(regions)
        self.dtype = DTYPES[config.model.dtype]
        self._build = functools.partial(
            MASM,
            config.model,
            patch=self.patch,
            modalities=self.modalities,
            num_regions=len(self.regions),
        )
        abstract = nnx.eval_shape(lambda: self._build(init=Initialiser(None)))
        self._graph, self._skeleton = nnx.split(abstract)

    def on(self, mesh):
        """The same network for the devices of another mesh."""
        other = copy.copy(self)
        other.mesh = mesh
        return other

    def segmenting_on(self, platform):
        """The same network, as ``infer.dtype`` has it on a platform: "cpu", "tpu", "cuda", ..."""
        chosen = self.config.infer.dtype
        if chosen == "auto":  # a CPU has no fast products of bfloat16 in XLA (docs/decisions.md)
            chosen = "float32" if platform == "cpu" else self.config.model.dtype
        other = copy.copy(self)
        other.dtype = DTYPES[chosen]
        return other

    @property
    def stem(self):
        """Edge of the space-to-depth stem: the first logits hold stem^3 voxels each."""
        return size_of(self.config.model).stem

    def init(self, seed):
        """Fresh float32 parameters on the host, a nested dict; seed None: zeros, for shapes."""
        model = self._build(init=Initialiser(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def apply(self, params, x, **options):
        """x: (B, M, D, H, W) of any float dtype -> (logits, keep), as ``MASM.__call__``.

        On a mesh of several devices it is a part of ``spatial.over``; ``options`` are those of
        ``MASM.__call__``.
        """
        return self._module(params)(x.astype(self.dtype), **options)

    def learnt_mosaics(self, params):
        """{"level6": (d, h, w, M) logits of the offsets, ...} of the levels that learn their
        mosaic: of one cell, as far as the grid of the tokens has its places."""
        found = {}
        for level, mixer in self._module(params).mixers.items():
            if getattr(mixer, "learnt", None) is not None:
                places = tuple(slice(size) for size in mixer.learnt.grid)
                found[level] = mixer.learnt.logits[...][places]
        return found

    def _module(self, params):
        state = jax.tree.map(lambda leaf: leaf, self._skeleton)  # a copy, not shared between traces
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def init_state(network, params):
    """The state before the first step; jit-able.

    Args:
      network: the network.
      params: ``network.init(seed)``.

    Returns:
      {"step": int32 scalar, "params", "ema": nested dicts of float32, "opt_state": optax state}.
    """
    config = network.config
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimiser(config.optim, config.total_steps).init(params),
    }


def abstract_state(network):
    """Shapes and dtypes of the state: a tree of ShapeDtypeStructs, nothing computed."""
    return jax.eval_shape(lambda: init_state(network, network.init(None)))


def num_parameters(params):
    """Number of scalars in a (possibly abstract) parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
