"""Times the lowerings of the 3-D convolution on this machine: the table in docs/decisions.md.

    python -m scripts.conv_lowerings

Forward and backward, float32, 3x3x3, in alternating order; median ms of ROUNDS and GFLOP/s.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from masm_jax.models.conv import LOWERINGS, conv

# batch, edge, channels in, channels out
SHAPES = [(4, 48, 8, 8), (4, 48, 16, 16), (4, 24, 32, 32), (1, 48, 32, 16), (4, 12, 64, 64)]
ROUNDS = 7


def main():
    """Print one row per shape."""
    print(f"| batch, grid, channels | {' | '.join(f'`{name}`' for name in LOWERINGS)} |")
    print("|---" * (len(LOWERINGS) + 1) + "|")
    for batch, edge, inner, outer in SHAPES:
        x = jax.random.normal(jax.random.key(0), (batch * edge, edge, edge, inner))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, inner, outer))

        def loss(x, kernel, lowering, edge=edge):
            return jnp.square(conv(x, kernel, depth=edge, lowering=lowering)).sum()

        steps = {
            name: jax.jit(lambda x, k, name=name: jax.grad(loss, (0, 1))(x, k, name))
            for name in LOWERINGS
        }
        times = {name: [] for name in LOWERINGS}
        for turn in range(ROUNDS + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(x, kernel))
                if turn:  # the first compiles
                    times[name].append(time.perf_counter() - start)
        operations = 3 * 2 * 27 * batch * edge**3 * inner * outer  # one forward, two backward
        cells = []
        for name in LOWERINGS:
            median = statistics.median(times[name])
            cells.append(f"{1e3 * median:.1f} ms, {operations / median / 1e9:.0f} GFLOP/s")
        print(f"| {batch}, {edge}³, {inner} → {outer} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
