"""In what blocks nnU-Net v2 stores a volume: for reading crops, each by one core.

Of its ``nnUNetDatasetBlosc2.comp_blosc2_params`` (MIC-DKFZ/nnUNet, nnunetv2/training/dataloading/
nnunet_dataset.py), with its sizes of caches: those of an old Xeon, per core.
"""

import math

L1, L3 = 32_768, 1_441_792  # bytes
_FILL = 0.8  # share of a cache that is used


def sizes(image, patch, itemsize):
    """Blocks, decompressed as a whole, that fit into L1; chunks of blocks that fit into L3.

    Args:
      image: (C, d, h, w), shape of the array.
      patch: (d, h, w) of the crops.
      itemsize: bytes of an element.

    Returns:
      blocks, chunks: (C, d, h, w) each, tuples of ints.
    """
    channels, *volume = image
    voxel = channels * itemsize
    block = [2 ** math.ceil(math.log2(edge)) for edge in patch]
    while voxel * math.prod(block) > _FILL * L1 and max(block) > 1:
        # The axis that is longest beside the patch; of equal ones the last.
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / patch[a], a))
        block[axis] = min(2 ** math.floor(math.log2(block[axis] - 1)), volume[axis])
    block = [min(edge, most) for edge, most in zip(block, volume)]

    chunk = list(block)
    while voxel * math.prod(chunk) < _FILL * L3 and chunk != volume:
        # The axis that has grown least; of equal ones the first.
        axis = min(
            (a for a in range(3) if chunk[a] < volume[a]), key=lambda a: (chunk[a] / block[a], a)
        )
        before, chunk[axis] = chunk[axis], min(chunk[axis] + block[axis], volume[axis])
        if sum(edge / crop for edge, crop in zip(chunk, patch)) / 3 > 1.5:
            chunk[axis] = before
            break
    return (channels, *block), (channels, *chunk)
