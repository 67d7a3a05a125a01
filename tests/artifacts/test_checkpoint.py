from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from adaptq_peft.artifacts.checkpoint import check_adapter_tensors, check_weights_file

KEY = "base_model.model.model.layers.{}.mlp.up_proj.adaptq_delta.weight"


def adapter(*blocks):
    return {KEY.format(i): torch.zeros(3, 2) for i in blocks}


def test_a_complete_file_passes(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(7), "b": torch.zeros(3, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    check_weights_file(path)
    save_file({}, path)
    check_weights_file(path)


@pytest.mark.parametrize("keep", [0, 5, 30])
def test_a_file_without_its_header(tmp_path, keep):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"\({keep} bytes\) has no readable safetensors header: it is truncated or"):
        check_weights_file(path)


@pytest.mark.parametrize("change", [-1, 3])
def test_a_file_of_the_wrong_size(tmp_path, change):
    path = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x" * change)
    with pytest.raises(ValueError, match=rf"is {len(data) + change} bytes and its header describes {len(data)}"):
        check_weights_file(path)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"not safetensors at all, but long enough")
    with pytest.raises(ValueError, match="is truncated or is not a safetensors file"):
        check_weights_file(path)


def test_the_same_tensors_pass_and_other_parts_of_the_model_are_ignored():
    check_adapter_tensors(adapter(1, 2), adapter(1, 2) | {"lm_head.weight": torch.zeros(1)}, {"lm_head.weight"})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (adapter(1), r"1 tensors are missing: base_model\.model\.model\.layers\.2\.mlp"),
        (adapter(1, 2, 3), r"1 tensors are not part of this adapter: base_model\.model\.model\.layers\.3\.mlp"),
        (
            adapter(1) | {KEY.format(2): torch.zeros(2, 3)},
            r"1 tensors have another shape: .* is \(2, 3\) instead of \(3, ",
        ),
        (
            adapter(1) | {KEY.format(2): torch.full((3, 2), torch.nan)},
            r"1 tensors hold values that are not finite: base",
        ),
        (adapter(3, 4), r"the file has deltas for blocks \[3, 4\], and this adapter adapts \[1, 2\]"),
    ],
    ids=["missing", "extra", "shape", "not finite", "other blocks"],
)
def test_every_fault_is_named(found, message):
    with pytest.raises(ValueError, match=message) as error:
        check_adapter_tensors(adapter(1, 2), found, set())
    assert str(error.value).endswith("Nothing was loaded. Use the file and the config that were saved together.")


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"10 tensors are missing: ([^,]+, ){3}\.\.\."):
        check_adapter_tensors(adapter(*range(10)), {}, set())
    compiled = {name.replace("base_model.model.", "base_model.model._orig_mod."): t for name, t in adapter(1).items()}
    with pytest.raises(ValueError, match="names with _orig_mod are of an adapter on"):
        check_adapter_tensors(adapter(1), compiled, set())
