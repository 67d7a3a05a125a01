from __future__ import annotations

import pytest
from torch import nn
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.t5.modeling_t5 import T5DenseActDense

from adaptq_peft.direct_reads import children_read_by, weights_read_by


class Reader(nn.Module):
    def forward(self, x):
        x = x.to(self.only_dtype.weight.dtype) if isinstance(self.only_checked.weight, nn.Parameter) else x
        x = x if self.checked_bias.bias is None else x + self.read_bias.bias.float()
        nn.init.zeros_(self.initialized.weight)
        return x @ self.read.weight + x @ self.sliced.weight[:2]


class Heir(Reader):
    pass


def test_what_is_read_as_a_tensor():
    assert children_read_by(Reader) == children_read_by(Heir) == {"read_bias", "read", "sliced"}
    assert weights_read_by(Heir) == {"only_checked", "read"}


@pytest.mark.parametrize(
    ("module_class", "expected"),
    [
        (MambaMixer, {"conv1d", "dt_proj", "x_proj", "out_proj"}),
        (BloomAttention, {"dense"}),
        (nn.MultiheadAttention, {"out_proj"}),
        (nn.TransformerEncoderLayer, {"linear1", "linear2", "norm1", "norm2"}),
        (LlamaAttention, set()),
        (LlamaMLP, set()),
        (T5DenseActDense, set()),  # it reads a dtype
    ],
)
def test_known_classes(module_class, expected):
    assert children_read_by(module_class) == expected


def test_a_class_without_source_reads_nothing():
    module_class = type("Made", (nn.Module,), {})
    assert children_read_by(module_class) == frozenset()
