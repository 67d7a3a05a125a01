from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from adaptq_peft.delta_linear import delta_linear
from adaptq_peft.merged_weight import _scratch, add_deltas, temporary_merged_weight


def last_place(values):
    """What the last of 8 binary places of bfloat16 is worth."""
    return 2.0 ** (values.double().abs().log2().floor() - 7)


def bfloat16_values(rows=256, columns=192):
    torch.manual_seed(0)
    return torch.randn(rows, columns).bfloat16()


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sum_in_another_dtype_than_the_base_is_rounded_once_to_the_nearest(dtype, with_grad):
    base = bfloat16_values().float()
    delta = torch.randn_like(base) * 1e-2
    expected = (base + 0.25 * delta).to(dtype)
    with torch.set_grad_enabled(with_grad):
        assert torch.equal(add_deltas(base, [delta], [0.25], dtype), expected)
        assert torch.equal(temporary_merged_weight(base, [delta], [0.25], dtype), expected)


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_sum_in_bfloat16_is_off_by_half_a_last_place_of_it_and_of_the_base_at_most(with_grad, delta_dtype):
    base = bfloat16_values()
    delta = (torch.randn_like(base, dtype=torch.float32) * 0.1).to(delta_dtype)
    exact = base.double() + 0.25 * delta.double()
    with torch.set_grad_enabled(with_grad):
        found = add_deltas(base, [delta], [0.25], torch.bfloat16)
        assert torch.equal(temporary_merged_weight(base, [delta], [0.25], torch.bfloat16), found)
    assert ((found.double() - exact).abs() <= (last_place(found) + last_place(base)) / 2).all()
    assert not torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("part", [0.01, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_updates_below_half_of_the_last_place_are_kept_on_average(part, sign):
    """To the nearest, those below 0.5 would be lost altogether."""
    unit = 2.0**-7
    base = (1 + torch.arange(128) * unit).bfloat16().repeat(2, 1)
    base[1] *= -1
    update = torch.full(base.shape, sign * part * unit)
    change = add_deltas(base, [update], [1.0], torch.bfloat16).float() - base.float()
    for row in change:
        assert row.mean().item() == pytest.approx(sign * part * unit, abs=0.015 * unit)


def test_values_of_a_model_are_rounded_up_as_often_as_they_should_be():
    base = bfloat16_values() * 0.05
    part = torch.rand(base.shape)
    unit = last_place(base).float() * base.sign()
    change = (add_deltas(base, [part * unit], [1.0], torch.bfloat16).float() - base.float()) / unit
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = (part >= low) & (part < low + 0.25)
        assert change[chosen].mean().item() == pytest.approx(low + 0.125, abs=0.015)


def every_bfloat16_value():
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def test_a_delta_of_zero_leaves_each_number_of_bfloat16_as_it_is():
    base = every_bfloat16_value()
    merged = add_deltas(base, [torch.zeros(base.shape)], [0.25], torch.bfloat16)
    assert torch.equal(merged.isnan(), base.isnan())
    assert torch.equal(merged[~base.isnan()], base[~base.isnan()])


@pytest.mark.parametrize("with_grad", [False, True])
def test_what_is_not_finite_stays_so(with_grad):
    base = torch.tensor([-1.0, 1.0, 3e38, torch.inf, -torch.inf, 1.0, 1.0, 0.0]).bfloat16()
    delta = torch.tensor([-torch.inf, torch.inf, 3e38, 1.0, 1.0, *[torch.nan] * 3])
    delta[-3:].view(torch.int32)[:2] = torch.tensor([0x7FFFFFFF, -1])  # a GPU's NaN, and that with the sign bit
    with torch.set_grad_enabled(with_grad):
        merged = add_deltas(base, [delta], [1.0], torch.bfloat16)
    assert merged[:5].tolist() == [-torch.inf, torch.inf, torch.inf, torch.inf, -torch.inf]
    assert merged[5:].isnan().all()


def test_the_rounding_of_a_part_is_that_of_the_whole():
    """So shards, transposed weights and experts that are split or fused give what the whole weight gives."""
    base = bfloat16_values()
    delta = torch.randn(base.shape) * 1e-3
    whole = add_deltas(base, [delta], [0.25], torch.bfloat16)
    assert not torch.equal(whole, base)
    assert torch.equal(add_deltas(base[3:9, 5:], [delta[3:9, 5:]], [0.25], torch.bfloat16), whole[3:9, 5:])
    assert torch.equal(add_deltas(base.t(), [delta.t()], [0.25], torch.bfloat16), whole.t())
    assert torch.equal(add_deltas(base[None], [delta[None]], [0.25], torch.bfloat16), whole[None])
    assert torch.equal(add_deltas(base[2, 4], [delta[2, 4]], [0.25], torch.bfloat16), whole[2, 4])


@pytest.mark.parametrize("shape", [(5, 70_000), (700, 300), (3, 300, 300), (200_000,), (0, 4), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_weights_that_are_summed_in_pieces(shape, dtype):
    torch.manual_seed(0)
    base, deltas = torch.randn(shape).to(dtype), [torch.randn(shape) * 1e-2, torch.randn(shape) * 1e-2]
    whole = add_deltas(base, deltas, [0.25, 2.0], dtype)  # autograd might need it: in one piece
    with torch.no_grad():
        assert torch.equal(add_deltas(base, deltas, [0.25, 2.0], dtype), whole)
        assert torch.equal(temporary_merged_weight(base, deltas, [0.25, 2.0], dtype), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_sum(dtype):
    base = bfloat16_values()
    deltas = [torch.zeros(base.shape, requires_grad=True), torch.zeros_like(base).requires_grad_()]
    add_deltas(base, deltas, [0.25, 2.0], dtype).mul(torch.arange(192)).sum().backward()
    expected = torch.arange(192).expand(base.shape)
    torch.testing.assert_close(deltas[0].grad, 0.25 * expected.float(), rtol=1e-2, atol=0)
    torch.testing.assert_close(deltas[1].grad, 2 * expected.bfloat16(), rtol=1e-2, atol=0)


def test_under_torch_func_and_torch_compile_the_sum_is_the_same():
    base, many = bfloat16_values(), torch.randn(3, 256, 192) * 1e-3

    def merge(delta):
        return add_deltas(base, [delta], [0.25], torch.bfloat16)

    expected = torch.stack([merge(delta) for delta in many])
    assert torch.equal(torch.func.vmap(merge)(many), expected)
    assert torch.equal(torch.compile(merge)(many[0]), expected[0])


def test_the_linear_map_uses_the_sum():
    base, delta, x = bfloat16_values(), torch.randn(256, 192) * 1e-2, torch.randn(2, 192).bfloat16()
    expected = F.linear(x, add_deltas(base, [delta], [0.25], torch.bfloat16))
    assert torch.equal(delta_linear(x, base, None, [delta], [0.25]), expected)


@pytest.mark.gpu
def test_on_the_gpu_the_sum_is_that_of_the_cpu():
    base, delta = bfloat16_values(), torch.randn(256, 192) * 1e-3
    expected = add_deltas(base, [delta], [0.25], torch.bfloat16)
    assert torch.equal(add_deltas(base.cuda(), [delta.cuda()], [0.25], torch.bfloat16).cpu(), expected)
    with torch.no_grad():
        assert torch.equal(add_deltas(base.cuda(), [delta.cuda()], [0.25], torch.bfloat16).cpu(), expected)


def test_threads_do_not_share_the_buffer():
    places = []

    def note():
        places.append(_scratch.like(torch.empty(3, 4), torch.float32).data_ptr())

    note()
    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    assert places[0] != places[1]
