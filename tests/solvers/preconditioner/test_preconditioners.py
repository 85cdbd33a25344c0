"""Each preconditioner saves steps on the problem that it is for, and changes no solution."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Operator, Preconditioner, SecantPairs, Status, StructureError
from bilevel.registry import PRECONDITIONERS
from bilevel.solvers import (
    CG,
    MINRES,
    JacobiPreconditioner,
    NystromPreconditioner,
    RecyclingPreconditioner,
    SecantPreconditioner,
)
from tests.helpers import product, randn, spd

F64 = torch.float64
NAMES = PRECONDITIONERS.names()


@dataclass(frozen=True)
class Exact(Preconditioner):
    """The inverse itself."""

    matrix: torch.Tensor

    def prepare(self, operator, like):
        return product(torch.linalg.inv(self.matrix))


def symmetric(A):
    return Operator.symmetric(product(A))


def steps(operator, b, preconditioner=None, rtol=1e-8):
    found = CG(max_steps=5000, rtol=rtol, preconditioner=preconditioner)(operator, b)
    assert (found.status == Status.CONVERGED).all()
    return found.steps.max().item()


def badly_scaled(n, tasks=1, decades=2):
    """A diagonally dominant matrix whose diagonal spans 2 · ``decades`` decades."""
    scale = torch.logspace(0, decades, n, dtype=F64)
    matrices = []
    for seed in range(tasks):
        off = 0.3 * randn(n, n, seed=seed) / n
        matrices.append((torch.eye(n, dtype=F64) + off + off.mT) * scale * scale.unsqueeze(-1))
    return torch.stack(matrices)


def outlying(n, large, top=1e6, tasks=1):
    """A few large eigenvalues above a flat tail in [1, 2]."""
    tail = torch.linspace(1.0, 2.0, n - large, dtype=F64)
    values = torch.cat([torch.logspace(0, -2, large, dtype=F64) * top, tail])
    bases = [torch.linalg.qr(randn(n, n, seed=seed))[0] for seed in range(tasks)]
    return torch.stack([basis @ torch.diag(values) @ basis.mT for basis in bases])


def quasi_newton_pairs(A, count, seed=0):
    """Pairs s, y = A s of so many BFGS steps on ½ zᵀAz, with exact steps, from a random start."""
    s, y = [], []
    gradient, eye = randn(*A.shape[:2], seed=seed), torch.eye(A.shape[1], dtype=F64)
    inverse = eye.expand_as(A)
    for _ in range(count):
        p = -product(inverse)(gradient)
        length = -(gradient * p).sum(-1) / (p * product(A)(p)).sum(-1).abs()
        s.append(length.unsqueeze(-1) * p)
        y.append(product(A)(s[-1]))
        gradient = gradient + y[-1]
        rho = 1 / (s[-1] * y[-1]).sum(-1)[:, None, None]
        left = eye - rho * s[-1].unsqueeze(-1) * y[-1].unsqueeze(-2)
        inverse = left @ inverse @ left.mT + rho * s[-1].unsqueeze(-1) * s[-1].unsqueeze(-2)
    return SecantPairs(torch.stack(s), torch.stack(y), torch.ones(count, len(A), dtype=torch.bool))


def with_pairs(A, count=10):
    pairs = quasi_newton_pairs(A, count)
    return replace(symmetric(A), inner_pairs=pairs, recycled_pairs=pairs)


# Every one


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(n=st.integers(1, 12), tasks=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_every_preconditioner_is_symmetric_positive_definite(name, n, tasks, seed):
    A = torch.stack([spd(n, seed=seed + i, condition=100.0) for i in range(tasks)])
    M = PRECONDITIONERS.build(name).prepare(with_pairs(A, 3), randn(tasks, n))
    u, v = randn(tasks, n, seed=seed), randn(tasks, n, seed=seed + 1)
    torch.testing.assert_close((u * M(v)).sum(-1), (v * M(u)).sum(-1), rtol=1e-6, atol=1e-9)
    assert ((u * M(u)).sum(-1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_preconditioner_is_positive_definite_where_the_matrix_is_not(name):
    basis = torch.linalg.qr(randn(8, 8))[0]
    A = (basis @ torch.diag(torch.linspace(-2.0, 1.0, 8).double()) @ basis.mT)[None]
    M = PRECONDITIONERS.build(name).prepare(with_pairs(A, 5), randn(1, 8))
    matrix = torch.stack([M(e[None])[0] for e in torch.eye(8, dtype=F64)])
    assert torch.linalg.eigvalsh((matrix + matrix.mT) / 2).min() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", [CG, MINRES])
def test_no_preconditioner_changes_the_solution(name, solver):
    A, b = torch.stack([spd(15, seed=i) for i in range(2)]), randn(2, 15)
    solver = solver(rtol=1e-11, max_steps=300, preconditioner=PRECONDITIONERS.build(name))
    found = solver(with_pairs(A), b)
    assert found.status.tolist() == [Status.CONVERGED] * 2
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_tasks(name):
    A, b = torch.stack([spd(10, seed=i, condition=10.0**i) for i in range(3)]), randn(3, 10)
    solver = CG(rtol=1e-9, preconditioner=PRECONDITIONERS.build(name))
    operator = with_pairs(A)
    found = solver(operator, b)
    for i in range(3):
        pairs = operator.inner_pairs.select(torch.tensor([i]))
        alone = replace(symmetric(A[i : i + 1]), inner_pairs=pairs, recycled_pairs=pairs)
        alone = solver(alone, b[i : i + 1])
        torch.testing.assert_close(found.value[i], alone.value[0], rtol=1e-9, atol=1e-11)
        assert found.steps[i] == alone.steps[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_task(name):
    A, b = torch.stack([spd(6), spd(6, seed=1), spd(6, seed=2)]), randn(3, 6)
    A[1, 2, 3] = float("nan")
    solver = CG(rtol=1e-9, preconditioner=PRECONDITIONERS.build(name))
    found = solver(with_pairs(A, 3), b)
    assert found.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    want = torch.linalg.solve(A[[0, 2]], b[[0, 2]])
    torch.testing.assert_close(found.value[[0, 2]], want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_matrix_does_no_harm(name):
    A = torch.zeros(1, 4, 4, dtype=F64)
    M = PRECONDITIONERS.build(name).prepare(with_pairs(A, 2), randn(1, 4))
    assert M(randn(1, 4)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(name, scale):
    A, b = spd(10)[None], randn(1, 10)
    solver = CG(rtol=1e-9, preconditioner=PRECONDITIONERS.build(name))
    found = solver(with_pairs(A * scale), b)
    assert found.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(found.value * scale, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_float32(name):
    A, b = badly_scaled(20, decades=1).float(), randn(1, 20).float()
    pairs = quasi_newton_pairs(A.double(), 5)
    pairs = SecantPairs(pairs.s.float(), pairs.y.float(), pairs.valid)
    operator = replace(symmetric(A), inner_pairs=pairs, recycled_pairs=pairs)
    found = CG(rtol=1e-5, preconditioner=PRECONDITIONERS.build(name))(operator, b)
    assert found.value.dtype == torch.float32
    assert found.status.tolist() == [Status.CONVERGED]


def test_the_exact_inverse_takes_two_steps_at_most():
    A, b = torch.stack([spd(30, condition=1e6, seed=i) for i in range(2)]), randn(2, 30)
    assert steps(symmetric(A), b, Exact(A)) <= 2
    assert MINRES(rtol=1e-8, preconditioner=Exact(A))(symmetric(A), b).steps.max() <= 2


@pytest.mark.parametrize("rtol", [1e-8, 1e-12])
@pytest.mark.parametrize(
    ("A", "preconditioner"),
    [
        (badly_scaled(100, decades=3), JacobiPreconditioner()),
        (outlying(100, 8), NystromPreconditioner(rank=16)),
        (spd(100, condition=1e6, largest=1.0)[None], NystromPreconditioner(rank=20)),
        (spd(100, condition=1e6, largest=1.0)[None], RecyclingPreconditioner()),
    ],
    ids=["jacobi", "nystrom", "nystrom-in-vain", "recycling"],
)
def test_at_condition_1e6_the_error_is_1e6th_or_the_status_tells(A, preconditioner, rtol):
    b = randn(1, 100)
    found = CG(max_steps=1000, rtol=rtol, preconditioner=preconditioner)(symmetric(A), b)
    want = torch.linalg.solve(A, b)
    error = (found.value - want).norm() / want.norm()
    true = (b - product(A)(found.value)).norm() / b.norm()
    # Rounding in the product alone is about κ · 1e-16.
    torch.testing.assert_close(found.residual[0], true, rtol=1e-3, atol=1e-10)
    if found.residual.item() <= 1e-10:
        assert error <= 1e-6
    if found.status.item() == Status.CONVERGED:
        assert true <= rtol + 1e-10
    else:
        assert found.status.item() == Status.MAX_STEPS
        assert found.residual.item() > rtol


@pytest.mark.parametrize(
    ("A", "preconditioner"),
    [
        (badly_scaled(100, tasks=2, decades=3), JacobiPreconditioner()),
        (outlying(100, 8, tasks=2), NystromPreconditioner(rank=16)),
    ],
    ids=["jacobi", "nystrom"],
)
def test_at_condition_1e6_the_right_preconditioner_reaches_full_accuracy(A, preconditioner):
    b = randn(2, 100)
    found = CG(max_steps=60, rtol=1e-12, preconditioner=preconditioner)(symmetric(A), b)
    want = torch.linalg.solve(A, b)
    assert (found.value - want).norm() <= 1e-9 * want.norm()


# Jacobi


def test_jacobi_saves_steps_on_badly_scaled_matrices():
    A, b = badly_scaled(60, tasks=2), randn(2, 60)
    without = steps(symmetric(A), b)
    assert steps(symmetric(A), b, JacobiPreconditioner()) <= without / 8
    assert steps(symmetric(A), b, JacobiPreconditioner(samples=20)) <= without / 4


def test_jacobi_solves_a_diagonal_matrix_at_once():
    A, b = torch.diag(torch.logspace(-5, 5, 30, dtype=F64))[None], randn(1, 30)
    assert steps(symmetric(A), b, JacobiPreconditioner()) == 1
    # One probe sees a diagonal exactly.
    assert steps(symmetric(A), b, JacobiPreconditioner(samples=1)) == 1


def test_jacobi_takes_the_absolute_value_away_from_zero():
    A = torch.diag(torch.tensor([2.0, -4.0, 0.0], dtype=F64))[None]
    scaled = JacobiPreconditioner().prepare(symmetric(A), randn(1, 3))(torch.ones(1, 3).double())
    assert scaled[0, :2].tolist() == [0.5, 0.25]
    assert scaled[0, 2].isfinite()
    assert scaled[0, 2] > 0


# Nyström


def test_nystrom_saves_steps_below_a_few_large_eigenvalues():
    A, b = outlying(200, 10, tasks=2), randn(2, 200)
    without = steps(symmetric(A), b)
    assert steps(symmetric(A), b, NystromPreconditioner(rank=15)) <= without / 3
    assert steps(symmetric(A), b, NystromPreconditioner(rank=15, damping=1.5)) <= without / 3


def test_nystrom_of_full_rank_is_the_damped_inverse():
    A, b, damping = spd(12, largest=1.0)[None], randn(1, 12), 0.05
    M = NystromPreconditioner(rank=12, damping=damping).prepare(symmetric(A), b)
    shifted = A + damping * torch.eye(12, dtype=F64)
    smallest = torch.linalg.eigvalsh(shifted)[0, 0]
    torch.testing.assert_close(M(b), smallest * torch.linalg.solve(shifted, b))


def test_nystrom_is_the_same_at_every_call():
    A, b = spd(20)[None], randn(1, 20)
    first, second = (NystromPreconditioner(rank=5).prepare(symmetric(A), b)(b) for _ in range(2))
    assert torch.equal(first, second)


# Pairs


def test_secant_pairs_of_the_inner_solver_save_steps():
    A, b = outlying(100, 6, top=1e4, tasks=2), randn(2, 100)
    operator = with_pairs(A, 12)
    assert steps(operator, b, SecantPreconditioner(), 1e-6) <= steps(operator, b, rtol=1e-6) / 1.5


def test_secant_pairs_obey_the_secant_equation():
    A = spd(10)[None]
    pairs = quasi_newton_pairs(A, 5)
    operator = replace(symmetric(A), inner_pairs=pairs)
    M = SecantPreconditioner().prepare(operator, pairs.s[0])
    torch.testing.assert_close(M(pairs.y[-1]), pairs.s[-1])


def test_pairs_that_are_not_valid_are_left_out():
    A, b = spd(10)[None].expand(2, 10, 10), randn(2, 10)
    pairs = quasi_newton_pairs(A, 4)
    s, y, valid = pairs.s.clone(), pairs.y.clone(), pairs.valid.clone()
    s[3, 1], y[1, 1], valid[3, 1], valid[1, 1] = float("nan"), float("inf"), False, False
    M = SecantPreconditioner().prepare(
        replace(symmetric(A), inner_pairs=SecantPairs(s, y, valid)), b
    )
    short = SecantPairs(pairs.s[[0, 2]], pairs.y[[0, 2]], pairs.valid[[0, 2]])
    shorter = SecantPreconditioner().prepare(replace(symmetric(A), inner_pairs=short), b)
    whole = SecantPreconditioner().prepare(replace(symmetric(A), inner_pairs=pairs), b)
    torch.testing.assert_close(M(b)[0], whole(b)[0])
    torch.testing.assert_close(M(b)[1], shorter(b)[1])


def test_a_task_without_a_pair_has_the_identity():
    pairs = SecantPairs(torch.zeros(3, 1, 5), torch.zeros(3, 1, 5), torch.zeros(3, 1).bool())
    operator = replace(symmetric(spd(5)[None]), inner_pairs=pairs)
    b = randn(1, 5)
    assert torch.equal(SecantPreconditioner().prepare(operator, b)(b), b)


def test_secant_without_pairs_is_refused_with_a_cure():
    with pytest.raises(StructureError, match="use LBFGS as inner solver"):
        CG(preconditioner=SecantPreconditioner())(symmetric(spd(3)[None]), randn(1, 3))


def recycled(operators, right_hand_sides, preconditioner):
    """Steps of consecutive solves, each with the pairs of the one before."""
    solver, counts, pairs = CG(max_steps=2000, rtol=1e-6, preconditioner=preconditioner), [], None
    for operator, b in zip(operators, right_hand_sides, strict=True):
        found = solver(replace(operator, recycled_pairs=pairs), b)
        assert (found.status == Status.CONVERGED).all()
        counts.append(found.steps.max().item())
        pairs = found.pairs
    return counts


@pytest.mark.parametrize("drift", [0.0, 1e-4])
def test_recycled_pairs_save_steps_of_the_next_solve(drift):
    n = 100
    change = randn(n, n, seed=9)
    base = spd(n, condition=100.0, largest=1.0)
    matrices = [base * (1 + drift * k) + drift * (change @ change.mT) / n * k for k in range(3)]
    operators = [symmetric(A[None]) for A in matrices]
    b = [randn(1, n, seed=seed) for seed in range(3)]
    first, second, third = recycled(operators, b, RecyclingPreconditioner(pairs=30))
    plain = steps(operators[2], b[2], rtol=1e-6)
    assert abs(first - plain) <= 3  # nothing to recycle yet: the identity
    assert second <= 0.75 * plain
    assert third <= 0.9 * plain


def test_recycling_asks_for_its_pairs():
    assert RecyclingPreconditioner(pairs=7).recycles == 7
    assert JacobiPreconditioner().recycles == 0


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: JacobiPreconditioner(samples=0), "samples"),
        (lambda: NystromPreconditioner(rank=0), "rank"),
        (lambda: NystromPreconditioner(damping=-1.0), "damping"),
        (lambda: NystromPreconditioner(damping=float("nan")), "damping"),
        (lambda: RecyclingPreconditioner(pairs=0), "pairs"),
    ],
)
def test_settings_out_of_range_are_refused(build, name):
    with pytest.raises(ValueError, match=f"`{name}` is"):
        build()
