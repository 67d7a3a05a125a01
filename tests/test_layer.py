from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer, AdaptQLinear, create_layer

MAKERS = {
    "linear": lambda: nn.Linear(8, 6),
    "linear without bias": lambda: nn.Linear(8, 6, bias=False),
    "conv1d": lambda: Conv1D(6, 8),
    "square conv1d": lambda: Conv1D(8, 8),
    "layer norm": lambda: nn.LayerNorm(8),
    "conv2d": lambda: nn.Conv2d(2, 3, 3),
    "embedding": lambda: nn.Embedding(10, 4),
}


def make_input(base):
    if isinstance(base, nn.Conv2d):
        return torch.randn(2, 2, 5, 5)
    return torch.tensor([[1, 2], [3, 1]]) if isinstance(base, nn.Embedding) else torch.randn(3, 4, 8)


def make_layer(base, dtype=None, name="default", scaling=0.5):
    torch.manual_seed(0)
    base.requires_grad_(False)
    return create_layer(base, name, AdaptQConfig(delta_dtype=dtype, delta_scaling=scaling))


def randomize(layer, name="default", std=0.1):
    for parameter in layer.adaptq_delta[name].parameters():
        nn.init.normal_(parameter, std=std)


@pytest.fixture(params=MAKERS)
def base(request):
    torch.manual_seed(1)
    return MAKERS[request.param]()


def test_a_new_layer_gives_exactly_the_output_of_its_base(base):
    x = make_input(base)
    expected = base(x)
    assert torch.equal(make_layer(base)(x), expected)


def test_there_is_a_delta_for_each_parameter_under_its_name(base):
    layer = make_layer(base)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert names == [f"adaptq_delta.default.{name}" for name, _ in base.named_parameters()]


def test_the_output_is_that_of_base_plus_scale_times_delta(base):
    x = make_input(base)
    layer = make_layer(base)
    randomize(layer)
    with torch.no_grad():
        found = layer(x)
        for name, parameter in base.named_parameters():
            parameter += 0.5 * getattr(layer.adaptq_delta["default"], name)
        torch.testing.assert_close(found, base(x))


@pytest.mark.parametrize("make", [MAKERS["linear"], MAKERS["linear without bias"], MAKERS["conv1d"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fused_path_equals_the_generic_one(make, dtype):
    torch.manual_seed(1)
    layer = make_layer(make().to(dtype))
    assert isinstance(layer, AdaptQLinear)
    randomize(layer)
    x = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    parameters = [x, *layer.adaptq_delta.parameters()]
    outputs = [layer(x), AdaptQLayer._forward_with_deltas(layer, ["default"], x)]
    gradients = [torch.autograd.grad(output.float().pow(2).sum(), parameters) for output in outputs]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(outputs[0], outputs[1], **tolerance)
    torch.testing.assert_close(gradients[0], gradients[1], **tolerance)


@pytest.mark.parametrize("make", [MAKERS["linear"], MAKERS["conv1d"]])
def test_a_single_vector_has_gradients_too(make):
    layer = make_layer(make())
    randomize(layer)
    x = torch.randn(8, requires_grad=True)
    layer(x).sum().backward()
    found = [x.grad, *(parameter.grad.clone() for parameter in layer.adaptq_delta.parameters())]
    layer.zero_grad()
    y = x.detach()[None].requires_grad_()
    layer(y).sum().backward()
    expected = [y.grad[0], *(parameter.grad for parameter in layer.adaptq_delta.parameters())]
    torch.testing.assert_close(found, expected)


def test_under_autocast_the_output_has_its_dtype_and_deltas_get_float32_gradients():
    layer = make_layer(nn.Linear(8, 6))
    randomize(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.randn(3, 8))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert layer.adaptq_delta["default"].weight.grad.dtype == torch.float32


def test_hooks_on_the_base_layer_still_run():
    base = nn.Linear(8, 6)
    calls = []
    base.register_forward_hook(lambda *args: calls.append("hook"))
    make_layer(base)(torch.randn(2, 8))
    assert calls == ["hook"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_then_unmerge_restores_every_weight_bit_for_bit(base, dtype):
    base.to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    layer = make_layer(base)
    randomize(layer, std=1.0)
    layer.merge()
    assert layer.merged
    assert not any(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())
    layer.unmerge()
    assert all(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())
    assert not layer.merged


def test_a_layer_that_was_cast_while_merged_is_unmerged_in_its_new_dtype(base):
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    layer = make_layer(base)
    randomize(layer)
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name].bfloat16())
    layer(make_input(base) if isinstance(base, nn.Embedding) else make_input(base).bfloat16())


def test_a_merged_layer_gives_the_same_output(base):
    x = make_input(base)
    layer = make_layer(base)
    randomize(layer)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_several_adapters_add_up_and_merge_one_by_one():
    layer = make_layer(nn.Linear(8, 6))
    layer.update_layer("second", AdaptQConfig(delta_scaling=2.0))
    randomize(layer)
    randomize(layer, "second")
    x = torch.randn(3, 8)
    with torch.no_grad():
        alone = {}
        for name in ("default", "second"):
            layer.set_adapter(name)
            alone[name] = layer(x) - layer.base_layer(x)
        layer.set_adapter(["default", "second"])
        both = layer(x)
        torch.testing.assert_close(both, layer.base_layer(x) + alone["default"] + alone["second"])
        original = layer.base_layer.weight.clone()
        layer.merge(adapter_names=["default"])
        layer.merge(adapter_names=["second"])
        torch.testing.assert_close(layer(x), both)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)


def test_safe_merge_refuses_values_that_are_not_finite():
    layer = make_layer(nn.Linear(8, 6))
    layer.adaptq_delta["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.isfinite(layer.base_layer.weight).all()


def test_switched_off_and_without_an_adapter_the_base_runs():
    layer = make_layer(nn.Linear(8, 6))
    randomize(layer)
    x = torch.randn(2, 8)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_the_scale_can_be_set():
    layer = make_layer(nn.Linear(8, 6))
    randomize(layer)
    layer.set_scale("default", 0.0)
    layer.set_scale("unknown", 3.0)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.scaling == {"default": 0.0}


@pytest.mark.parametrize(
    ("given", "expected"), [(None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_the_dtype_of_deltas(given, expected):
    layer = make_layer(nn.Linear(8, 6, dtype=torch.bfloat16), dtype=given)
    assert {parameter.dtype for parameter in layer.adaptq_delta.parameters()} == {expected}


def test_moving_to_the_device_of_the_base_keeps_the_dtype():
    layer = make_layer(nn.Linear(8, 6, dtype=torch.bfloat16), dtype="float32")
    layer._move_adapter_to_device_of_base_layer("default")
    assert layer.adaptq_delta["default"].weight.dtype == torch.float32


def test_attributes_that_models_read_come_from_the_base():
    layer = make_layer(nn.Linear(8, 6))
    assert (layer.in_features, layer.out_features) == (8, 6)
    assert layer.weight is layer.base_layer.weight
    assert not hasattr(layer, "_hf_hook")
    with pytest.raises(AttributeError):
        _ = layer.no_such_attribute


class TestReadDirectly:
    """Where the module around a layer reads its weight, it must get W0 + s * delta."""

    @staticmethod
    def make():
        layer = make_layer(nn.Linear(8, 6))
        randomize(layer)
        layer.read_directly = True
        return layer

    def test_weight_and_bias_are_the_adapted_ones_and_differentiable(self):
        layer = self.make()
        x = torch.randn(2, 8)
        found = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, layer(x))
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in layer.adaptq_delta["default"].parameters())
        assert layer.base_layer.weight.grad is None

    def test_the_base_without_an_adapter_to_apply(self):
        layer = self.make()
        layer.enable_adapters(False)
        assert layer.weight is layer.base_layer.weight
        layer.enable_adapters(True)
        layer.set_adapter([])
        assert layer.bias is layer.base_layer.bias

    def test_merged_it_is_added_once(self):
        layer = self.make()
        expected = layer.weight.detach().clone()
        layer.merge()
        assert layer.weight is layer.base_layer.weight
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert layer.get_base_layer().weight is layer.base_layer.weight

    def test_without_a_bias(self):
        layer = make_layer(nn.Linear(8, 6, bias=False))
        layer.read_directly = True
        assert layer.bias is None
        assert layer.weight.dtype == layer.base_layer.weight.dtype


def test_the_name_in_print_outs_starts_with_adaptq():
    assert repr(make_layer(nn.Linear(8, 6))).startswith("adaptq.AdaptQLinear(")


def test_a_delta_cannot_be_called(base):
    layer = make_layer(base)
    with pytest.raises(RuntimeError, match="only holds parameters; call the layer that owns it"):
        layer.adaptq_delta["default"](make_input(base))


def test_the_delta_of_a_linear_is_a_linear_and_no_other_is(base):
    """GaLore and APOLLO look for `nn.Linear`; so do collectors of layers, which must find nothing else."""
    delta = make_layer(base).adaptq_delta["default"]
    assert isinstance(delta, nn.Linear) == isinstance(base, nn.Linear)
    if isinstance(base, nn.Linear):
        assert repr(delta) == f"LinearDelta({base.extra_repr()})"


def test_making_a_delta_draws_no_random_numbers(base):
    state = torch.get_rng_state()
    create_layer(base, "default", AdaptQConfig())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_delta_starts_at_zero_also_where_fsdp_makes_it_anew(base):
    """FSDP calls `reset_parameters` on what it moves from the meta device."""
    layer = make_layer(base)
    randomize(layer)
    layer.adaptq_delta["default"].reset_parameters()
    assert not any(parameter.any() for parameter in layer.adaptq_delta["default"].parameters())


def test_a_delta_on_the_meta_device():
    with torch.device("meta"):
        base = nn.Linear(8, 6, bias=False)
    layer = make_layer(base)
    assert layer.adaptq_delta["default"].weight.is_meta
    assert layer.adaptq_delta["default"].bias is None


def test_each_sample_of_a_batch_through_its_own_adapter():
    layer = make_layer(nn.Linear(8, 6))
    layer.update_layer("second", AdaptQConfig(delta_scaling=2.0))
    randomize(layer)
    randomize(layer, "second")
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        expected = []
        for row, name in enumerate(("second", "__base__", "default", "second")):
            layer.set_adapter([] if name == "__base__" else name)
            expected.append(layer(x[row : row + 1]))
        found = layer(x, adapter_names=["second", "__base__", "default", "second"])
    torch.testing.assert_close(found, torch.cat(expected))
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 and 4 respectively"):
        layer(x, adapter_names=["default"] * 3)
    layer.merge(adapter_names=["default"])
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        layer(x, adapter_names=["default"] * 4)
