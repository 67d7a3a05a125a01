"""A device that computes on the CPU and refuses tensors of the CPU, as a GPU does; run as a process of its own.

It tells on any machine where code forgets to move a tensor. Tensors on it are wrappers around those on the CPU.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import torch._dynamo  # before functions are replaced below: it looks at them
from conftest import make_llama
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from transformers import BatchEncoding

from adaptq_peft import AdaptQConfig, Anchor, BaseReference, fit_to_budget, measure_forgetting, quantize_base

NAME = "second"
aten: Any = torch.ops.aten
#: What takes tensors of both, on a GPU, too.
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class OnSecond(Tensor):
    """A tensor on the device: `on_cpu` has its values."""

    @staticmethod
    def __new__(cls, on_cpu: Tensor, requires_grad: bool = False) -> Any:
        return _wrap(cls, on_cpu, requires_grad)

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, value: Any) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.on_cpu = value.on_cpu

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
        return super().__getitem__(parts if isinstance(index, tuple) else parts[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = OnSecond(self.on_cpu.detach().clone())
            is_parameter = getattr(self, "_is_param", False)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within the context there is the device, for functions that make tensors, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _wrap(kind: Any, on_cpu: Tensor, requires_grad: bool) -> Any:
    made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        kind,
        on_cpu.shape,
        strides=on_cpu.stride(),
        storage_offset=on_cpu.storage_offset(),
        dtype=on_cpu.dtype,
        device=torch.device(NAME, 0),
        requires_grad=requires_grad,
    )
    made.on_cpu = on_cpu
    return made


def _is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wrapped = [tensor for tensor in tensors if isinstance(tensor, OnSecond)]
    foreign = [tuple(t.shape) for t in tensors if t.ndim and not isinstance(t, OnSecond)]
    if wrapped and foreign and func not in MIXED:
        raise RuntimeError(f"{func} got tensors of both devices; on the CPU: {foreign}")
    if func is aten.index.Tensor and wrapped and not isinstance(args[0], OnSecond):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    device = kwargs.get("device")
    if _is_second(device):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if func is aten.copy_.default:
        return args[0]
    if not (bool(wrapped) if device is None else _is_second(device)):
        return result
    outputs = tree_map(lambda x: OnSecond(x) if isinstance(x, Tensor) and not isinstance(x, OnSecond) else x, result)
    return outputs if device is not None else return_and_correct_aliasing(func, args, kwargs, outputs)


def _plain(value: Any) -> Any:
    return value.on_cpu if isinstance(value, OnSecond) else value


def _install() -> None:
    """Register the device, and replace what makes tensors past PyTorch's dispatcher."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    make_tensor, make_subclass, generator = torch.tensor, Tensor._make_subclass, torch.Generator
    classes: dict[type, type] = {}

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if _is_second(device):
            return make_tensor(_plain(data), **options).to(NAME)
        return make_tensor(_plain(data), device=device, **options)

    def subclass(kind: Any, data: Any, require_grad: bool = False, **options: Any) -> Any:
        if not isinstance(data, OnSecond):
            return make_subclass(kind, data, require_grad, **options)
        both = classes.setdefault(kind, type(kind)(kind.__name__, (kind, OnSecond), {}))  # as Params4bit
        return _wrap(both, data.on_cpu, require_grad)

    torch.tensor = tensor  # type: ignore[assignment]
    Tensor._make_subclass = staticmethod(subclass)  # type: ignore[method-assign, assignment]
    torch.Generator = lambda device="cpu": generator("cpu")  # type: ignore[assignment, misc]


def tokenizer(text: str, **options: Any) -> BatchEncoding:
    """One token a letter."""
    return BatchEncoding({"input_ids": [1, *(3 + ord(letter) % 93 for letter in text)]})


def main() -> None:
    """Train, anchor, hold to a budget, merge, calibrate: the name of each part that is done is printed."""
    _install()
    torch.manual_seed(0)
    samples = [{"input_ids": [3 + (7 * i + j) % 37 for j in range(10 + i % 5)]} for i in range(50)]
    texts = ["".join(chr(ord("a") + (i * i + 3 * j) % 26) for j in range(12 + i % 5)) for i in range(24)]

    def base() -> Any:
        return make_llama().to(NAME)

    def step(model: Any, *losses: Any) -> None:
        ids = torch.tensor(samples[0]["input_ids"])[None].to(NAME)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        sum((loss(model) for loss in losses), model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
        assert {parameter.device.type for parameter in model.parameters()} == {NAME}
        assert model.eval()(input_ids=ids).logits.isfinite().all()

    with SecondDevice():
        for fields in (
            {"quantization": "nf4"},
            {"quantization": "int8"},
            {"quantization_calibration": "absmax", "frozen_rank_init": "svd"},
        ):
            step(get_peft_model(base(), AdaptQConfig(calibration_data=samples, **fields)))
            print("trained", fields)
        for config in (AdaptQConfig(calibration_data=samples), LoraConfig(target_modules="all-linear")):
            model = base()
            reference = BaseReference.of(model, texts, texts[:8], tokenizer=tokenizer)
            anchor = Anchor.from_base(model, texts, tokenizer, one_sided=True)
            model = get_peft_model(model, config)
            step(model, anchor.loss)
            assert measure_forgetting(model, base=reference).domain_kl is not None
            fit_to_budget(model, base=reference, budget=1.0)
            model.merge_adapter()
            model.unmerge_adapter()
            assert {parameter.device.type for parameter in model.merge_and_unload().parameters()} == {NAME}
            print("anchored, fitted and merged", type(config).__name__)
        with tempfile.TemporaryDirectory() as folder:
            quantize_base(base(), folder, calibration="absmax", data=samples, tokens=200)
            step(get_peft_model(base(), AdaptQConfig(layers_to_transform=[1, 2], quantized_base=folder)))
            print("quantized a base")


if __name__ == "__main__":
    sys.exit(main())
