"""How wide the encoder of the network is, and where networks start."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from masm_jax.models.init import Initialiser
from masm_jax.models.masm import MASM
from masm_jax.state import Network


def test_parts_draw_apart_from_each_other_and_from_the_rest():
    init, alone = Initialiser(3), Initialiser(3)
    parts = [init.apart().normal((4,), 1.0) for _ in range(2)]
    rest = init.normal((4,), 1.0)
    np.testing.assert_array_equal(rest, alone.normal((4,), 1.0))
    assert len({tuple(values) for values in (*parts, rest)}) == 3
    np.testing.assert_array_equal(parts[0], Initialiser(3).apart().normal((4,), 1.0))
    assert not np.array_equal(parts[0], Initialiser(4).apart().normal((4,), 1.0))


def test_networks_start_equal_where_they_are_alike(make_config):
    """So that variants can be compared seed by seed."""

    def network(**changes):
        config = make_config(**{"model.detail": 4} | changes)
        return Network(config, modalities=("t1", "t1ce", "t2", "flair"), regions={"WT": (1,)})

    def start(**changes):
        return jax.tree_util.tree_flatten_with_path(network(**changes).init(3))[0]

    whole = dict(start())
    assert len(whole) == len(start())
    variants = {
        "pruning": start(**{"model.pruning": "none"}),
        "mixers": start(**{"model.mixers": ("concat",) * 6}),
        "one mixer": start(**{"model.mixers": ("concat",) + ("aware",) * 4 + ("shift",)}),
        "detail": start(**{"model.detail": 0}),
    }
    for name, part in variants.items():
        assert 0 < len(part) < len(whole)
        for path, value in part:
            np.testing.assert_array_equal(value, whole[path], err_msg=f"{name} {path}")
    # Mixers and detail start as the identity: without noise it is one function.
    x = jax.random.normal(jax.random.key(0), (1, 4, 16, 16, 16))
    ways = [{}, {"model.mixers": ("concat",) * 6}, {"model.detail": 0}]
    first, *others = (network(**way).apply(network(**way).init(3), x)[0][0] for way in ways)
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)


def test_channels_of_the_encoder_and_what_the_decoder_looks_at(make_config):
    def shapes(mixers, width, single, fused=6):
        changes = {"encoder_width": width, "encoder_single": single, "fused_levels": fused}
        changes["mixers"] = mixers
        model = make_config(**{f"model.{key}": value for key, value in changes.items()}).model
        sizes = dict(patch=(16,) * 3, modalities=("t1", "t1ce", "t2", "flair"), num_regions=3)
        network = MASM(model, init=Initialiser(None), **sizes)
        encoder = [[conv.kernel.shape[-2:] for conv in level] for level in network.encoder.levels]
        return encoder, jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(network.decoder)))

    def sees(decoder):
        first = [blocks[0]["kernel"][-2:] for blocks in decoder["blocks"].values()]
        return [*first, decoder["ups"][len(first) - 1]["kernel"]]

    mixers = ("aware",) * 5 + ("shift",)
    encoder, decoder = shapes(mixers, 0.5, 0)
    last = [level[-1] for level in encoder]
    assert last == [(c, c) for c in (8, 16, 32, 48, 64, 64)]  # tiny: 16, 32, 64, 96, 128, 128
    single, same = shapes(mixers, 0.5, 1)
    assert single == [[(8, 16)], [(16, 16), (16, 16)], *encoder[2:]]  # 2^3 voxels come in
    assert same == decoder == shapes(mixers, 1.0, 0)[1] == shapes((), 1.0, 0)[1]
    assert shapes((), 0.5, 1) == shapes((), 0.5, 1, 0) == shapes((), 1.0, 0)
    # What comes from below and the skip; the last level goes up by 1.
    fused = [*((2 * c, c) for c in (16, 32, 64, 96, 128)), (128, 128)]
    # What comes from below and four modalities.
    half = [(16 + 32, 16), (32 + 64, 32), (64 + 128, 64), (96 + 192, 96), (128 + 256, 128)]
    single, whole = shapes(mixers, 0.5, 1, 0)
    assert single == [[(8, 8)], *encoder[1:]] and sees(whole) == [*half, (256, 128)]
    assert sees(decoder) == fused and sees(shapes(mixers, 0.5, 0, 0)[1]) == sees(whole)
    assert sees(shapes(mixers, 0.5, 0, 2)[1]) == [*fused[:2], *half[2:], (256, 128)]
    assert sees(shapes(mixers, 0.5, 0, 5)[1]) == [*fused[:5], (256, 128)]
