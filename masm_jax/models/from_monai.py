"""Weights of MONAI's UNETR and SwinUNETR for ours, and what could not be mapped.

MONAI's names are translated one by one; nothing is guessed from shapes. An array that does not fit
is left as it was and named with the reason. Files of Swin's self-supervised pre-training
(``model_swinvit.pt``, encoder alone) have the same names but for a prefix.
"""

import dataclasses
import logging
import re

import numpy as np

from masm_jax.files import as_path

log = logging.getLogger(__name__)
MANY = 10  # of a part are not listed one by one
# (pattern of a name of MONAI's, our path, how it is turned). Norms, biases and tables stay as is.
_BLOCK = r"(?:layers(?P<stage>\d)\.0\.)?blocks\.(?P<block>\d+)\."
_RULES = (
    (r"patch_embedding\.patch_embeddings\.weight", "encoder.patch_embedding.kernel", "patches"),
    (r"patch_embedding\.patch_embeddings\.bias", "encoder.patch_embedding.bias", None),
    (r"patch_embedding\.position_embeddings", "encoder.position_embeddings", "first"),
    (r"patch_embed\.proj\.weight", "encoder.patch_embed.kernel", "patches"),
    (r"patch_embed\.proj\.bias", "encoder.patch_embed.bias", None),
    (_BLOCK + r"norm1\.weight", "{block}.attention.norm.scale", None),
    (_BLOCK + r"norm1\.bias", "{block}.attention.norm.shift", None),
    (_BLOCK + r"attn\.qkv\.weight", "{block}.attention.qkv.kernel", "dense"),
    (_BLOCK + r"attn\.qkv\.bias", "{block}.attention.qkv.bias", None),
    (_BLOCK + r"attn\.(?:out_)?proj\.weight", "{block}.attention.out.kernel", "dense"),
    (_BLOCK + r"attn\.(?:out_)?proj\.bias", "{block}.attention.out.bias", None),
    (_BLOCK + r"attn\.relative_position_bias_table", "{block}.attention.table", None),
    (_BLOCK + r"norm2\.weight", "{block}.mlp.norm.scale", None),
    (_BLOCK + r"norm2\.bias", "{block}.mlp.norm.shift", None),
    (_BLOCK + r"mlp\.(?:linear1|fc1)\.weight", "{block}.mlp.up.kernel", "dense"),
    (_BLOCK + r"mlp\.(?:linear1|fc1)\.bias", "{block}.mlp.up.bias", None),
    (_BLOCK + r"mlp\.(?:linear2|fc2)\.weight", "{block}.mlp.down.kernel", "dense"),
    (_BLOCK + r"mlp\.(?:linear2|fc2)\.bias", "{block}.mlp.down.bias", None),
    (r"layers(?P<stage>\d)\.0\.downsample\.norm\.weight", "{stage}.norm.scale", None),
    (r"layers(?P<stage>\d)\.0\.downsample\.norm\.bias", "{stage}.norm.shift", None),
    (r"layers(?P<stage>\d)\.0\.downsample\.reduction\.weight", "{stage}.reduction.kernel", "dense"),
    (r"norm\.weight", "encoder.norm.scale", None),
    (r"norm\.bias", "encoder.norm.shift", None),
    (r"encoder(?P<part>\d+)\.transp_conv_init\.conv\.weight", "{part}.first.dense.kernel", "up"),
    (r"encoder(?P<part>\d+)\.blocks\.(?P<n>\d)\.0\.conv\.weight",
     "{part}.ups.{n}.dense.kernel", "up"),
    (r"encoder(?P<part>\d+)\.blocks\.(?P<n>\d)\.1\.conv(?P<c>[12])\.conv\.weight",
     "{part}.blocks.{n}.conv{c}", "conv"),
    (r"encoder(?P<part>\d+)\.layer\.conv(?P<c>[12])\.conv\.weight", "{part}.conv{c}", "conv"),
    (r"encoder(?P<part>\d+)\.layer\.conv3\.conv\.weight", "{part}.conv3.kernel", "dense"),
    (r"decoder(?P<level>\d)\.transp_conv\.conv\.weight", "decoder.ups.{level}.dense.kernel", "up"),
    (r"decoder(?P<level>\d)\.conv_block\.conv(?P<c>[12])\.conv\.weight",
     "decoder.blocks.{level}.conv{c}", "conv"),
    (r"decoder(?P<level>\d)\.conv_block\.conv3\.conv\.weight",
     "decoder.blocks.{level}.conv3.kernel", "dense"),
    (r"out\.conv\.conv\.weight", "decoder.out.kernel", "dense"),
    (r"out\.conv\.conv\.bias", "decoder.out.bias", None),
)  # fmt: skip
# In the files, and of no use: what is computed again, norms and attention that are never called.
_IDLE = r".*(relative_position_index|norm_cross_attn\.(weight|bias)|\.cross_attn\..*)"
_PARTS = {  # encoderN: where it is in ours
    "unetr": {"1": "encoder1", "2": "projections.0", "3": "projections.1", "4": "projections.2"},
    "swin_unetr": {str(n): f"blocks.{i}" for i, n in enumerate((1, 2, 3, 4, 10))},
}
_TOP = {"unetr": 2, "swin_unetr": 1}  # N of the decoderN that ends at full resolution


@dataclasses.dataclass
class Report:
    """What became of the arrays.

    Attributes:
      mapped: names of MONAI's that were taken.
      changed: {name: how}: taken, but not as they are.
      unused: {name: reason}: in the file, not taken.
      missing: paths of ours that the file has nothing for.
    """

    mapped: list
    changed: dict
    unused: dict
    missing: list

    def lines(self):
        """Readable, one fact a line."""
        yield f"{len(self.mapped)} arrays taken, {len(self.changed)} of them changed"
        for name, how in self.changed.items():
            yield f"  changed: {name}: {how}"
        for name, reason in self.unused.items():
            yield f"  not taken: {name}: {reason}"
        for part in ("encoder", "decoder"):
            own = [path for path in self.missing if path.startswith(part)]
            if len(own) > MANY:
                own = [f"{own[0]}, {own[1]} and {len(own) - 2} more of the {part}"]
            yield from (f"  as it starts: {path}: nothing in the file" for path in own)


def start(network):
    """Fresh parameters, with those of ``config.model.start_from`` where it names a file.

    Args:
      network: state.Network.

    Returns:
      a nested dict of float32 arrays on the host. What was and was not taken is logged.
    """
    config = network.config
    params = network.init(config.seed)
    if not config.model.start_from:
        return params
    params, report = convert(read(config.model.start_from), params, config.model.backbone)
    log.info("%s: %s", config.model.start_from, "\n".join(report.lines()))
    return params


def read(path):
    """{name: array} of a file.

    Args:
      path: .pt, .pth (read by torch with ``weights_only``: no code in it is run) or .npz.

    Raises:
      ValueError: not such a file, or torch is needed and not installed.
    """
    path = as_path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights of MONAI's, .pt, .pth or .npz")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(
            f"{path}: torch is needed to read it: pip install torch; or write an .npz where torch "
            f"is: np.savez('weights.npz', **{{k: v.numpy() for k, v in state_dict.items()}})"
        ) from error
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as weights: {error}") from error
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    arrays = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, torch.Tensor):
            arrays[name] = value.float().numpy() if value.is_floating_point() else value.numpy()
    if not arrays:
        raise ValueError(f"{path}: no arrays by name in it; expected a state dict")
    return arrays


def convert(arrays, params, backbone):
    """Parameters with what the file has for them.

    The first layers take one modality where modalities are seen one by one: weights for several are
    then summed, as if all of them held this one.

    Args:
      arrays: {name of MONAI's: array}.
      params: nested dict of ours, of ``Network.init``; not changed.
      backbone: "unetr" or "swin_unetr".

    Returns:
      a new nested dict, and a Report.

    Raises:
      ValueError: another backbone, or nothing of the file fits.
    """
    if backbone not in _PARTS:
        raise ValueError(
            f"model.backbone = {backbone!r}: weights of MONAI's fit {' and '.join(_PARTS)} alone"
        )
    flat = dict(_flat(params))
    report = Report([], {}, {}, [])
    for name, array in arrays.items():
        short = re.sub(r"^(module\.)?(swinViT\.|vit\.)?", "", name)
        if re.fullmatch(_IDLE, short):
            continue
        path, kind = _path(short, backbone)
        if path is None or path not in flat:
            report.unused[name] = "not part of this network"
            continue
        turned, how = _fitted(_turned(np.asarray(array), kind), flat[path].shape, path, kind)
        if turned is None:
            report.unused[name] = how
            continue
        flat[path] = np.ascontiguousarray(turned, np.float32)
        report.mapped.append(name)
        report.missing.append(path)  # of those that are not missing, until the end
        if how:
            report.changed[name] = how
    if not report.mapped:
        raise ValueError(
            f"no array fits a network with model.backbone={backbone!r}; the first names are "
            f"{', '.join(list(arrays)[:3])}"
        )
    of_backbone = [path for path in flat if path.startswith(("encoder.", "decoder."))]
    report.missing = [path for path in of_backbone if path not in report.missing]
    return _nested(flat, params), report


def _path(name, backbone):
    """(our path, kind) of a name, or (None, None)."""
    for pattern, path, kind in _RULES:
        found = re.fullmatch(pattern, name)
        if not found:
            continue
        named = found.groupdict()
        if "part" in named:
            part = _PARTS[backbone].get(named["part"])
            if part is None:
                return None, None
            named["part"] = f"encoder.{part}"
        if "level" in named:
            named["level"] = int(named["level"]) - _TOP[backbone]
        stage = named.get("stage")
        stage = f"encoder.stages.{int(stage) - 1}" if stage else "encoder"
        if "block" in named:
            named["block"] = f"{stage}.blocks.{named['block']}"
        return path.format(**named | {"stage": stage}), kind
    return None, None


def _turned(array, kind):
    """From PyTorch's order of axes to ours; first layers keep their input axis apart."""
    if kind == "dense":  # (O, I) or (O, I, 1, 1, 1)
        return array.reshape(array.shape[:2]).T
    if kind == "conv":  # (O, I, d, h, w)
        return array.transpose(2, 3, 4, 1, 0)
    if kind == "up":  # (I, O, 2, 2, 2)
        return array.transpose(0, 2, 3, 4, 1).reshape(len(array), -1)
    if kind == "patches":  # (O, I, p, p, p)
        return array.transpose(2, 3, 4, 1, 0)
    return array[0] if kind == "first" else array


def _fitted(array, shape, path, kind):
    """(array of the shape, what was done), or (None, why not)."""
    first = path.startswith(("encoder.patch_embed", "encoder.encoder1.", "encoder.blocks.0.conv"))
    how = None
    if first and array.ndim in (2, 5) and kind in ("patches", "conv", "dense"):
        inputs = array.shape[-2]
        ours = shape[-2] // np.prod(array.shape[:3]) if kind == "patches" else shape[-2]
        if ours == 1 and inputs > 1:
            array = array.sum(-2, keepdims=True)
            how = f"its {inputs} input channels summed to the one of a modality"
    if kind == "patches":
        array = array.reshape(-1, array.shape[-1])
    if array.shape != tuple(shape):
        return None, f"is {array.shape}, ours is {tuple(shape)}"
    return array, how


def _flat(tree, prefix=""):
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value


def _nested(flat, like, prefix=""):
    return {
        key: _nested(flat, value, f"{prefix}{key}.") if isinstance(value, dict)
        else flat[f"{prefix}{key}"]
        for key, value in like.items()
    }  # fmt: skip
