"""Covariance-weighted shrinkage: what of a difference of weights the domain needs and general text does not excite.

    D(lambda) = argmin mean ||(D - Delta) x||^2 over the domain + lambda * mean ||D x||^2 over general text
              = Delta C_dom (C_dom + lambda C_gen)^-1,          C = mean of x x^T over the inputs of the linear

This is RegMean (Jin et al., arXiv 2212.09849) between the tuned weight W0 + Delta with C_dom and the base weight W0
with lambda C_gen. Where both texts excite a direction alike it is a factor 1 / (1 + lambda), as in interpolation
towards the base; what only the domain excites is kept, and what only general text excites is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Share of each channel's mean square that is added to its own: at rank deficiency a matrix has an inverse.
DAMPING = 0.01


@dataclass(frozen=True)
class ShrinkagePath:
    """All D(lambda) of the matrices that multiply one input, from one generalized eigendecomposition.

    C_dom v = mu C_gen v with V^T C_gen V = 1 gives
    C_dom (C_dom + lambda C_gen)^-1 = C_gen V diag(mu / (mu + lambda)) V^T.

    Attributes:
        ratios: mu, [in], float64: how much more the domain excites each direction than general text does.
        to_directions: C_gen V, [in, in], float32.
        from_directions: V^T, [in, in], float32.
    """

    ratios: Tensor
    to_directions: Tensor
    from_directions: Tensor

    @classmethod
    def of(cls, domain: Tensor, general: Tensor, damping: float = DAMPING) -> ShrinkagePath:
        """Decompose a pair of second moments, in float64: about 10 in^3 operations.

        Args:
            domain: C_dom, [in, in].
            general: C_gen, [in, in].
            damping: added to the diagonals, as a share of them; see `DAMPING`.
        """
        domain, general = damp(domain.double(), damping), damp(general.double(), damping)
        factor = torch.linalg.cholesky(general)
        half = torch.linalg.solve_triangular(factor, domain, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.t(), upper=False)
        ratios, vectors = torch.linalg.eigh((whitened + whitened.t()) / 2)
        back = torch.linalg.solve_triangular(factor.t(), vectors, upper=True)
        return cls(ratios.clamp_min(0), (factor @ vectors).float(), back.t().contiguous().float())

    def filters(self, strength: float) -> Tensor:
        """mu / (mu + lambda), [in], float64; all 1 at lambda = 0."""
        return torch.ones_like(self.ratios) if strength == 0 else self.ratios / (self.ratios + strength)

    def shrink(self, matrix: Tensor, strength: float) -> Tensor:
        """D(lambda) of a matrix; of the factor A of a product B A, whose D is B D(A).

        Args:
            matrix: Delta, [out, in], any floating dtype.
            strength: lambda, 0 or more.

        Returns:
            [out, in], float32.
        """
        if strength == 0:
            return matrix.float()
        kept = self.filters(strength).float()
        return ((matrix.float() @ self.to_directions) * kept) @ self.from_directions


def damp(moment: Tensor, damping: float) -> Tensor:
    """C + damping * diag(C), and a little more, for channels that are always zero.

    By channel, because a few channels with huge values would drown all others in a multiple of the mean.
    """
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    floor = torch.finfo(torch.float32).eps * (mean if mean > 0 else 1.0)
    return moment + torch.diag(damping * diagonal + floor)
