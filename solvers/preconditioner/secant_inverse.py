r"""The inverse that L-BFGS builds from pairs, in compact form (Byrd, Nocedal and Schnabel, 1994).

$$B_{i+1} = (I - \rho_i s_i y_i^\top)\, B_i\, (I - \rho_i y_i s_i^\top) + \rho_i s_i s_i^\top,
  \qquad \rho_i = \frac{1}{s_i^\top y_i},\qquad B_0 = \gamma I,\quad
  \gamma = \frac{s^\top y}{y^\top y}\ \text{of the newest pair}$$

is for pairs in the columns of S and Y, with R the upper triangle of SᵀY and D its diagonal,

$$B v = \gamma\, (v - Y p) + S R^{-\top} \big( (D + \gamma Y^\top Y)\, p - \gamma Y^\top v \big),
  \qquad p = R^{-1} S^\top v$$

(their eq. 3.1). The usual two loops are as exact, but take four passes for each pair, one vector
long; here four products with S and Y are all. The small matrices are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.operator import SecantPairs
from bilevel.rows import Choice, check_interval, column, dot

__all__ = ["SecantInverse"]


class SecantInverse:
    """B of the last pairs of each task, positive definite; at first the identity.

    Args:
        count: Number of pairs kept for each task.
        like: A tensor ``[tasks, n]`` of the dtype and device of the vectors.
    """

    def __init__(self, count: int, like: Tensor) -> None:
        tasks, n = like.shape
        device = like.device
        # Products of half numbers leave their range.
        wide = torch.float32 if like.itemsize < 4 else like.dtype
        # Rings of slots, written in place: to copy them would cost more than a gradient.
        self._s = torch.zeros(tasks, count, n, dtype=wide, device=device)
        self._y = torch.zeros_like(self._s)
        self._next = torch.zeros(tasks, dtype=torch.int64, device=device)
        self._task = torch.arange(tasks, device=device).unsqueeze(-1)
        # Slots that may hold a pair.
        self._used = 0
        # Of the slots from the oldest pair to the newest: SᵀY and YᵀY, and which hold a pair.
        self._sy = torch.zeros(tasks, count, count, dtype=torch.float64, device=device)
        self._yy = torch.zeros_like(self._sy)
        self._valid = torch.zeros(tasks, count, dtype=torch.bool, device=device)
        self._gamma = torch.ones(tasks, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, pairs: SecantPairs) -> SecantInverse:
        """B of given pairs, newest last, without those that are invalid or of no use."""
        out = cls(max(len(pairs.s), 1), pairs.s[0] if len(pairs.s) else pairs.s.sum(0))
        for s, y, valid in zip(pairs.s, pairs.y, pairs.valid, strict=True):
            sy, yy = dot(s, y), dot(y, y)
            out.add(s, y, valid & (sy > 0) & sy.isfinite() & yy.isfinite())
        return out

    def add(self, s: Tensor, y: Tensor, keep: Tensor) -> None:
        """Keep a pair in the place of the oldest, for those tasks; ``sᵀy > 0`` there."""
        choose = Choice(keep)
        if not choose.everyone and check_interval(keep.device) == 1 and not keep.any():
            return
        here = (self._task.squeeze(-1), self._next)
        for ring, new in ((self._s, s), (self._y, y)):
            ring[here] = choose(new.to(ring.dtype), ring[here])
        count = len(self._valid[0])
        self._used = min(self._used + 1, count)
        self._next = (self._next + keep) % count
        sy, yy = dot(s, y), dot(y, y)
        self._sy = _shifted(choose, self._sy, self._products(self._s, y), sy)
        self._yy = _shifted(choose, self._yy, self._products(self._y, y), yy)
        last = torch.ones_like(self._valid[:, :1])
        self._valid = choose(torch.cat([self._valid[:, 1:], last], 1), self._valid)
        self._gamma = choose(sy / yy, self._gamma)

    def forget(self, tasks: Tensor) -> None:
        """Drop all pairs of those tasks; the scale of B stays."""
        self._valid = self._valid & ~tasks.unsqueeze(-1)

    @property
    def empty(self) -> Tensor:
        """Tasks without a pair, ``[tasks]``."""
        return ~self._valid.any(-1)

    @property
    def scale(self) -> Tensor:
        """γ of each task, float64 ``[tasks]``."""
        return self._gamma

    def scaled(self, gamma: Tensor) -> SecantInverse:
        """The same object, with that scale ``[tasks]`` of B until there is a pair."""
        self._gamma = gamma
        return self

    def __call__(self, v: Tensor) -> Tensor:
        """B v, ``[tasks, n]``."""
        gamma = self._gamma
        if not self._used:
            return column(gamma, v) * v
        first = len(self._valid[0]) - self._used
        valid = self._valid[:, first:]
        both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
        sy, yy = (torch.where(both, one[:, first:, first:], 0.0) for one in (self._sy, self._yy))
        diagonal = sy.diagonal(dim1=-2, dim2=-1)
        # A slot without a pair: a row and a column of the identity, with zeros on the right.
        r = sy.triu() + torch.diag_embed((~valid).to(sy.dtype))
        sv, yv = (
            torch.where(valid, self._products(ring, v)[:, first:], 0.0).unsqueeze(-1)
            for ring in (self._s, self._y)
        )
        scale = gamma[:, None, None]
        p = torch.linalg.solve_triangular(r, sv, upper=True)
        right = diagonal.unsqueeze(-1) * p + scale * (yy @ p - yv)
        q = torch.linalg.solve_triangular(r.mT, right, upper=False)
        out = column(gamma, v) * v
        for ring, weights in ((self._s, q), (self._y, -scale * p)):
            out = out + self._mixed(ring, weights.squeeze(-1)).to(v.dtype)
        return out

    def pairs(self) -> SecantPairs:
        """The pairs, newest last."""
        where = (self._task, self._slots)
        s, y = (ring[where].transpose(0, 1) for ring in (self._s, self._y))
        return SecantPairs(s, y, self._valid.T)

    @property
    def _slots(self) -> Tensor:
        """The slots of each task, oldest first, ``[tasks, count]``."""
        count = len(self._valid[0])
        order = torch.arange(count, device=self._next.device) + self._next.unsqueeze(-1)
        return order % count

    def _products(self, ring: Tensor, v: Tensor) -> Tensor:
        """The products of a ring's vectors with v, oldest first, float64 ``[tasks, count]``."""
        v = v.to(ring.dtype)
        if v.device.type == "cpu":
            # A stack of products with one column each is ten times slower there.
            found = torch.stack([one @ row for one, row in zip(ring, v, strict=True)])
        else:
            found = (ring @ v.unsqueeze(-1)).squeeze(-1)
        return found.double().gather(1, self._slots)

    def _mixed(self, ring: Tensor, weights: Tensor) -> Tensor:
        """The sum of a ring's vectors with weights ``[tasks, used]``, ``[tasks, n]``."""
        slots = self._slots[:, -self._used :]
        spread = weights.new_zeros(self._valid.shape).scatter(1, slots, weights).to(ring.dtype)
        if ring.device.type == "cpu":
            return torch.stack([row @ one for one, row in zip(ring, spread, strict=True)])
        return (spread.unsqueeze(-2) @ ring).squeeze(-2)


def _shifted(choose: Choice, table: Tensor, edge: Tensor, corner: Tensor) -> Tensor:
    """The table without its first row and column, and with another row and column at the end."""
    # Below the diagonal SᵀY is wrong so, and never looked at.
    edge = torch.cat([edge[:, :-1], corner.unsqueeze(-1)], 1)
    inside = torch.cat([table[:, 1:, 1:], edge[:, :-1].unsqueeze(-2)], 1)
    moved = torch.cat([inside, edge.unsqueeze(-1)], 2)
    if choose.everyone:
        return moved
    return torch.where(choose.tasks[:, None, None], moved, table)
