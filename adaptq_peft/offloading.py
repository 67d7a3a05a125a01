"""Models of which accelerate keeps weights on the CPU or on disk (`device_map`), and models on the meta device.

An offloaded parameter is on the meta device too, and a hook of its module brings it to the execution device for each
forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """The device for the inputs of a model: that of its first parameter or, if that is offloaded, where it is used."""
    for module in model.modules():
        if has_offloaded_params(module):
            return torch.device(module._hf_hook.execution_device)  # type: ignore[arg-type, union-attr]
        for parameter in module.parameters(recurse=False):
            return parameter.device
    raise ValueError(f"{type(model).__name__} has no parameters")


def accelerator_or_cpu() -> torch.device | str:
    """For a `device_map`: the accelerator, if there is one, else "cpu", which accelerate knows as a str only."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or "cpu"


def parameter_value(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter with a dotted name, loaded if it is offloaded; on the meta device only if it has no values."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module):
        return getattr(module, leaf)


def check_weights_reachable(model: nn.Module) -> None:
    """Raise ValueError if weights are on disk and the hooks that load them are gone.

    `PeftModel.from_pretrained` takes the hooks off a model whose device map says "cpu" or "disk". That brings back
    what is on the CPU.
    """
    if "disk" not in (getattr(model, "hf_device_map", None) or {}).values():
        return
    for name, module in model.named_modules():
        on_meta = any(parameter.is_meta for parameter in module.parameters(recurse=False))
        if on_meta and not has_offloaded_params(module):
            raise ValueError(
                f"the weights of {name} are offloaded to disk, and PEFT has taken off the hooks that load them, as it "
                'does to load an adapter. Load the base with a device_map without "disk", or use\n'
                "    model = get_peft_model(base, AdaptQConfig.from_pretrained(folder))\n"
                "    set_peft_model_state_dict(model, load_peft_weights(folder))"
            )


@contextmanager
def kept_on_device(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Load the layers with these dotted names that are offloaded onto the device that they run on, for good.

    Deltas, their gradients and the optimizer's states stay on the device and are larger than the weight, so that to
    offload it would save little. On an error within the context the layers are offloaded again.
    """
    hooks: dict[nn.Module, ModelHook] = {}
    try:
        for module in map(model.get_submodule, names):
            if has_offloaded_params(module):
                hooks[module] = module._hf_hook  # type: ignore[assignment]
                _keep_on_device(module)
        yield
    except BaseException:
        for module, hook in hooks.items():
            add_hook_to_module(module, hook)
        raise


def _keep_on_device(module: nn.Module) -> None:
    with align_module_device(module):
        parameters, buffers = dict(module._parameters), dict(module._buffers)
    remove_hook_from_module(module)
    module._parameters.update(parameters)
    module._buffers.update(buffers)
