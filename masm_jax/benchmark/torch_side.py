"""Networks in PyTorch: counted, and as calls that a clock can be held to.

Importing this imports torch.
"""

import contextlib

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def _convolution_backward(
    gradient, x, kernel, _bias, _stride, _pad, _dilation, transposed, _out_pad, _groups, mask, **_
):
    """Each gradient that is asked for costs as much as the convolution.

    torch's own formula gives the gradient of a grouped kernel ``groups`` times that, as if the
    groups were not there: for MedNeXt's depth-wise convolutions 32 to 512 times.
    """
    return sum(mask[:2]) * conv_flop_count(x, kernel, gradient, transposed=transposed)


def macs(run):
    """Multiply-adds of a call without arguments, by torch's counter."""
    mended = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mended) as counter:
        run()
    return counter.get_total_flops() // 2


def count(peer, *, patch):
    """Parameters and multiply-adds at 1 x 4 x patch^3; on the "meta" device, which has no memory.

    Args:
      peer: peers.Peer.
      patch: edge in voxels.

    Returns:
      {"parameters", "forward", "train"}: ints; "train" is forward and backward.

    Raises:
      ValueError: the network cannot be built, or not for this patch.
    """
    model = peer.build(patch).to("meta")
    x = torch.empty(1, 4, *[patch] * 3, device="meta")

    def forward():
        with torch.no_grad():
            model.eval()(x)

    try:
        found = {"forward": macs(forward), "train": macs(lambda: model.train()(x).sum().backward())}
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{peer.name} at {patch}^3: {_line(error)}") from error
    return {"parameters": sum(p.numel() for p in model.parameters())} | found


def prepare(peer, *, patch, batch, dtype, mode, variant, device):
    """One call of the network, its input on the device already.

    Inference: without gradients, logits in float32. Training: forward with one head at full
    resolution, Dice and cross-entropy over three sigmoid regions as ``masm_jax.losses`` has them,
    backward, clipping of the gradient, AdamW. Parameters are float32; with bfloat16 under autocast.

    Args:
      peer: peers.Peer.
      patch: edge in voxels.
      batch: B.
      dtype: "float32" or "bfloat16".
      mode: "infer" or "train".
      variant: "eager" or "compile", both channels last; "contiguous": channels first.
      device: "cpu" or "cuda".

    Returns:
      a function without arguments that returns when its work is done; of training with the loss.
    """
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        # As JAX has it on a GPU: float32 products in TF32 too, not convolutions alone.
        torch.backends.cuda.matmul.allow_tf32 = True
    layout = torch.contiguous_format if variant == "contiguous" else torch.channels_last_3d
    torch.manual_seed(0)
    model = peer.build(patch).to(device).to(memory_format=layout)
    run = torch.compile(model) if variant == "compile" else model
    x = torch.randn(batch, 4, *[patch] * 3).to(device).to(memory_format=layout)

    def cast():
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

    def done():
        if device == "cuda":
            torch.cuda.synchronize()

    if mode == "infer":
        model.eval()

        def infer():
            with torch.inference_mode(), cast():
                run(x).float()
            done()

        return infer

    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    target = (torch.rand(batch, 3, *[patch] * 3) < 0.05).float().to(device)

    def train():
        optimiser.zero_grad(set_to_none=True)
        with cast():
            logits = run(x)
        found = loss(logits.float(), target)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimiser.step()
        done()
        return found.detach()

    return train


def loss(logits, target, smooth=1e-5):
    """Dice summed over the batch, and binary cross-entropy: (B, R, D, H, W) twice -> scalar."""
    axes, probability = (0, 2, 3, 4), torch.sigmoid(logits)
    overlap, total = (probability * target).sum(axes), (probability + target).sum(axes)
    dice = 1 - (2 * overlap + smooth) / (total + smooth)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, target)


def peak_bytes(device):
    """Most bytes that were allocated on the device; None on a CPU, where the process is asked."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def versions(device):
    """{"torch", "monai", "device"}."""
    import importlib.metadata

    found = {"torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["monai"] = importlib.metadata.version("monai")
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    return found


def _line(error):
    return str(error).strip().partition("\n")[0]
