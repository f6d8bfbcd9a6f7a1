"""Training crops from the same cases in three ways: ours, MONAI's, nnU-Net's.

All hand out batches of B crops in the memory of the host, the volumes whole in the page cache or
in memory, with the same share of crops around tumour, without augmentation: ours happens on the
device, and what the others would do on the CPU is left out of theirs. Every way keeps its own
manners: its dtype, how a crop is drawn around tumour, what is read anew for each crop.

Imported late, so that a process of one way does not carry the packages of another.
"""

import math
import pathlib
import pickle

import numpy as np

from masm_jax.benchmark import blosc_blocks
from masm_jax.data.records import Records

WAYS = {
    "masm_jax": "records, float16, memory-mapped (Grain)",
    "monai": "CacheDataset as it comes: float32 in memory, each case copied before a crop",
    "monai, no copy": "CacheDataset(copy_cache=False): the same without that copy",
    "nnunet": "blosc2 files, float32, LZ4HC, memory-mapped, as nnU-Net 2.8 reads them",
}
NEEDS = {
    "monai": ("monai", "torch"),
    "monai, no copy": ("monai", "torch"),
    "nnunet": ("blosc2", "torch"),
}
_EPOCH = 1251  # training cases of BraTS 2021
WITH_WORKERS = ("masm_jax", "monai, no copy")  # nnU-Net's processes are batchgenerators'


def batches(way, *, records, patch, batch, foreground, seed=0, workers=0, store=None):
    """Endless batches.

    Args:
      way: a key of WAYS.
      records: folder of the cases; all are used.
      patch: edge of a crop, voxels.
      batch: B.
      foreground: share of the crops around a voxel of tumour.
      seed: of order and crops.
      workers: processes; 0 reads in this one.
      store: folder that ``compress`` has filled, for nnunet.

    Returns:
      Iterator of {"image": (B, M, p, p, p), "label": (B, p, p, p) or (B, 1, p, p, p)}, float16 and
      uint8 (ours), or tensors of float32 and uint8 (MONAI) or int16 (nnU-Net).
    """
    found, crop = Records(records), {"patch": patch, "batch": batch, "foreground": foreground}
    if way == "masm_jax":
        from masm_jax.data import pipeline

        return pipeline.batches(
            found, visits(found.cases), seed=seed, batch_size=batch, patch=patch,
            foreground=foreground, workers=workers,
        )  # fmt: skip
    if way == "nnunet":
        return _nnunet(store, found.cases, seed=seed, **crop)
    return _monai(found, seed=seed, workers=workers, copied=way == "monai", **crop)


def visits(cases):
    """The cases of an epoch, few of them so often that it is as long as one of BraTS 2021.

    Grain's shuffle walks through 65536 places until it meets one that is in the epoch: 5.5 ms for
    4 places, 0.04 ms for 1251 (grain 0.2.18). Few cases stand for many here.
    """
    return cases * math.ceil(_EPOCH / len(cases))


def whole(records, case):
    """A case as the others store it.

    Records are float16. Where a record keeps the grid of its scan, the float32 z-scores are made
    anew from the scan's integers, which the float16 tell apart: widened halves would have empty low
    bytes, and compress better than any scan.

    Args:
      records: the ``Records``.
      case: id.

    Returns:
      (M, d, h, w) float32 image, (d, h, w) uint8 label.
    """
    meta, image = records.meta(case), np.asarray(records.image(case), np.float32)
    if meta["record_shape"] == meta["crop_shape"]:
        for channel, modality in zip(image, records.modalities):
            mean, std = (meta["intensity"][modality][key] for key in ("mean", "std"))
            brain = channel != 0
            channel[brain] = (np.rint(channel[brain] * std + mean) - mean) / std
    return image, np.array(records.label(case))


# ---------------------------------------------------------------- MONAI


def _monai(records, *, patch, batch, foreground, seed, workers, copied):
    """As MONAI's guide to fast training advises: all that is not random lies in the cache."""
    import monai
    import torch
    from monai import transforms
    from torch.utils.data import RandomSampler

    torch.manual_seed(seed)
    monai.data.set_track_meta(False)
    keys = ["image", "label"]
    steps = [
        transforms.SpatialPadd(keys, patch),
        transforms.FgBgToIndicesd("label"),
        transforms.RandCropByPosNegLabeld(
            keys, "label", patch, pos=foreground, neg=1 - foreground, num_samples=1,
            fg_indices_key="label_fg_indices", bg_indices_key="label_bg_indices",
        ),
    ]  # fmt: skip
    cases = []
    for case in records.cases:
        image, label = whole(records, case)
        cases.append({"image": torch.from_numpy(image), "label": torch.from_numpy(label)[None]})
    dataset = monai.data.CacheDataset(
        cases, transforms.Compose(steps).set_random_state(seed), progress=False, copy_cache=copied
    )
    # With replacement, for a stream without ends of epochs, at which workers would run dry.
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    return iter(
        monai.data.DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=workers)
    )


# ---------------------------------------------------------------- nnU-Net


def compress(records, store, patch):
    """Write cases as nnU-Net does (nnunetv2 2.8.1, nnUNetDatasetBlosc2.save_case).

    Args:
      records: folder of the cases.
      store: folder to write to.
      patch: edge of the crops that the blocks are made for.

    Returns:
      {"bytes": of the files, "of": bytes of the arrays}.
    """
    records, store = Records(records), pathlib.Path(store)
    store.mkdir(parents=True, exist_ok=True)
    size = 0
    for case in records.cases:
        image, label = whole(records, case)
        size += _save(image, store / f"{case}.b2nd", patch)
        size += _save(label[None].astype(np.int16), store / f"{case}_seg.b2nd", patch)
        places = {
            name: np.pad(voxels.astype(np.int64), ((0, 0), (1, 0)))  # a column for the channel
            for name, voxels in records.foreground(case).items()
        }
        (store / f"{case}.pkl").write_bytes(pickle.dumps({"class_locations": places}))
    return {"bytes": sum(file.stat().st_size for file in store.iterdir()), "of": size}


def _save(array, path, patch):
    """Bytes of the array, written without or with byte shuffling: what suits its middle better."""
    import blosc2

    blocks, chunks = blosc_blocks.sizes(array.shape, (patch,) * 3, array.itemsize)
    starts = [(edge - part) // 2 for edge, part in zip(array.shape, chunks)]
    middle = np.ascontiguousarray(array[tuple(slice(s, s + n) for s, n in zip(starts, chunks))])

    def written(array, how, **where):
        packing = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [how], "nthreads": 1}
        return blosc2.asarray(array, chunks=chunks, blocks=blocks, cparams=packing, **where)

    ways = (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE)
    best = min(ways, key=lambda how: written(middle, how).schunk.cbytes)
    written(np.ascontiguousarray(array), best, urlpath=str(path), mode="w")
    return array.nbytes


def _nnunet(store, cases, *, patch, batch, foreground, seed):
    """As nnUNetDataLoader.generate_train_batch with nnUNetDatasetBlosc2, without a rotation's rim.

    For every crop the two files and the pickle are opened anew; only the blocks that the crop
    touches are decompressed; every batch is a new tensor of float32 and one of int16. (NumPy would
    ask for them in huge pages, and fill them in a fifth of the time.)
    """
    import blosc2
    import torch

    blosc2.set_nthreads(1)
    store, rng = pathlib.Path(store), np.random.default_rng(seed)
    how = {"mode": "r", "dparams": {"nthreads": 1}, "mmap_mode": "r"}
    while True:
        for place, case in enumerate(rng.choice(cases, batch)):
            image = blosc2.open(urlpath=str(store / f"{case}.b2nd"), **how)
            label = blosc2.open(urlpath=str(store / f"{case}_seg.b2nd"), **how)
            known = pickle.loads((store / f"{case}.pkl").read_bytes())["class_locations"]
            if place == 0:
                images = torch.empty((batch, image.shape[0], *(patch,) * 3))
                labels = torch.empty((batch, 1, *(patch,) * 3), dtype=torch.int16)
            start = _start(image.shape[1:], patch, known if rng.random() < foreground else {}, rng)
            images[place] = torch.from_numpy(_crop(image, start, patch, 0))
            labels[place] = torch.from_numpy(_crop(label, start, patch, -1))
        yield {"image": images, "label": labels}


def _start(shape, patch, known, rng):
    """First voxel, (3,) int, as nnUNetDataLoader.get_bbox.

    Around tumour only the low end is kept inside: a crop may reach over the far end.
    """
    missing = np.maximum(patch - np.asarray(shape), 0)
    low, high = -missing // 2, np.asarray(shape) + missing // 2 + missing % 2 - patch
    present = [voxels for voxels in known.values() if len(voxels)]
    if not present:
        return rng.integers(low, high, endpoint=True)
    voxels = present[rng.integers(len(present))]
    return np.maximum(low, voxels[rng.integers(len(voxels))][1:] - patch // 2)


def _crop(array, start, patch, outside):
    """(C, p, p, p) out of (C, d, h, w); ``outside`` the volume that value."""
    shape = array.shape[1:]
    low, high = np.maximum(start, 0), np.minimum(start + patch, shape)
    part = array[(slice(None), *map(slice, low.tolist(), high.tolist()))]
    rim = [(0, 0), *zip(low - start, start + patch - high)]
    return np.pad(part, rim, constant_values=outside) if np.any(rim) else part
