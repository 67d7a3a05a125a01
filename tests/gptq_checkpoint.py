"""Writes a checkpoint in GPTQ, rounded plainly: a real one takes GPTQModel minutes."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adaptq_peft.selection import find_blocks

GROUP = 32


def pack(codes, bits, dim):
    """Codes, 32 // bits of them to an int32, along one dimension, the first one in the lowest bits."""
    rows = codes.to(torch.int64).movedim(dim, 0)
    rows = rows.unflatten(0, (-1, 32 // bits))
    shifts = bits * torch.arange(32 // bits)
    return (rows << shifts[None, :, None]).sum(1).to(torch.int32).movedim(0, dim).contiguous()


def gptq_tensors(weight, bits, order):
    """The tensors of a GPTQ checkpoint for a weight [out, in], rounded symmetrically, inputs grouped in an order."""
    middle = 2 ** (bits - 1)
    groups = weight.float()[:, order].unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / (middle - 1)).half()
    codes = ((groups / scales.float()[..., None]).round() + middle).clamp(0, 2 * middle - 1).flatten(1)
    back = order.argsort()
    zeros = torch.full(scales.t().shape, middle - 1)  # the format stores them less one
    return {
        "qweight": pack(codes[:, back].t(), bits, 0),
        "qzeros": pack(zeros, bits, 1),
        "scales": scales.t().contiguous(),
        "g_idx": (back // GROUP).to(torch.int32),
    }


def write_gptq(model, folder, bits=4, desc_act=False):
    """The GPTQ checkpoint of a model, all linears of its blocks by plain rounding."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    linears = {
        f"{block.name}.{name}": module
        for block in find_blocks(model)
        for name, module in block.module.named_modules()
        if isinstance(module, nn.Linear)
    }
    for name, linear in linears.items():
        del tensors[f"{name}.weight"]
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.data.half()
        order = torch.randperm(linear.in_features) if desc_act else torch.arange(linear.in_features)
        made = gptq_tensors(linear.weight.data, bits, order)
        tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "sym": True,
        "desc_act": desc_act,
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(written))
