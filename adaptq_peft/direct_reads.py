"""Finds the layers whose weight the module around them reads instead of calling the layer, in its source code."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from functools import cache
from typing import Any

from torch import nn

#: `self.NAME.weight` or `.bias` in source code, used as a tensor: not a dtype and the like, a check or initialization.
_READ = re.compile(
    r"(?<!_\()(?<!isinstance\()\bself\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|ndim|data)\b| is )"
)
#: The same of a whole weight. Bloom takes slices, to imitate tensor parallelism.
_READ_WHOLE_WEIGHT = re.compile(r"(?<!_\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|ndim)|\[)")


@cache
def children_read_by(module_class: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight or bias a class of modules, or one it inherits from, reads as a tensor.

    For instance `dt_proj` and `conv1d` of Mamba's mixer, and `out_proj` of `nn.MultiheadAttention`.
    """
    return frozenset().union(*(_READ.findall(_source(ancestor)) for ancestor in module_class.__mro__))


@cache
def weights_read_by(module_class: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose whole weight a class of modules reads: a packed 4-bit one would break it there.

    Classes of torch are not looked at.
    """
    own = [ancestor for ancestor in module_class.__mro__ if not ancestor.__module__.startswith("torch.")]
    return frozenset().union(*(_READ_WHOLE_WEIGHT.findall(_source(ancestor)) for ancestor in own))


def _source(ancestor: type[Any]) -> str:
    with suppress(OSError, TypeError):  # a class without a source file
        return inspect.getsource(ancestor)
    return ""
