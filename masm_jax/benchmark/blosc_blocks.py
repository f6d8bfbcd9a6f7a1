"""In what blocks nnU-Net stores a volume, for reading crops of it.

By the rule of its ``comp_blosc2_params`` (nnunetv2 2.8.1, nnunetv2/training/dataloading/
nnunet_dataset.py): each modality alone, chunks not much larger than a crop.
"""

import math

BLOCK, CHUNK = 128 * 1024, 6 * 1024**2  # bytes at most; a block is decompressed as a whole


def sizes(image, patch, itemsize):
    """Blocks, and chunks made of them.

    Args:
      image: (C, d, h, w), shape of the array.
      patch: (d, h, w) of the crops.
      itemsize: bytes of an element.

    Returns:
      blocks, chunks: (1, d, h, w) each, tuples of ints.
    """
    volume = image[1:]
    most = [min(edge, crop * 3 // 2) for edge, crop in zip(volume, patch)]
    block = [min(2 ** math.ceil(math.log2(crop)), edge) for edge, crop in zip(volume, patch)]
    while itemsize * math.prod(block) > BLOCK:
        # The axis that is longest beside what a chunk may have; of equal ones the last.
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / most[a], a))
        block[axis] = 2 ** math.floor(math.log2(block[axis] - 1))

    chunk = block
    while larger := [
        # The axis that covers least of that grows first; of equal ones that of the longest edge.
        (chunk[axis] / most[axis], -volume[axis], axis, grown)
        for axis in range(3)
        if (grown := _grown(chunk, block, most, axis)) != chunk
        and itemsize * math.prod(grown) <= CHUNK
    ]:
        *_, chunk = min(larger)
    return (1, *block), (1, *chunk)


def _grown(chunk, block, most, axis):
    """``chunk`` with one more block along an axis, as far as it may."""
    edge = max(chunk[axis], min(chunk[axis] + block[axis], most[axis]))
    return [*chunk[:axis], edge, *chunk[axis + 1 :]]
