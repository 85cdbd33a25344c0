"""Learners: choices of settings that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LEARNERS", "Learner"]


@dataclass(frozen=True)
class Learner:
    """A named choice of settings.

    Attributes:
        title: What people call it.
        settings: What it sets.
        note: Where it comes from, in a sentence.
    """

    title: str
    settings: Mapping[str, Any]
    note: str


# At the published λ this network's inner problem is strongly convex near its solution.
_SMOOTH = {"activation": "tanh", "norm": "none", "strength": 2.0}
# Solvers that come nearer to a solution than a few steps of descent and 5 of CG.
_NEARER = {
    "activation": "tanh",
    "norm": "none",
    "inner_solver": "lbfgs",
    "inner_steps": 20,
    "method_options": {"max_steps": 20, "rtol": 0.01},
}
_UNBOUNDED = {"learn_strength": "scalar", "strength_min": 1e-4}
_PLAIN = {"strength": 0.0, "inner_solver": "gradient-descent", "clip": 10.0}

LEARNERS: dict[str, Learner] = {
    "imaml": Learner(
        "iMAML",
        {},
        "Rajeswaran et al. (2019), with a λ at which the inner problem is mostly convex.",
    ),
    "imaml-paper": Learner(
        "iMAML, λ = 2",
        {"strength": 2.0},
        "The published λ; the backtracking keeps the steps from diverging.",
    ),
    "imaml-weaker": Learner(
        "iMAML, λ = 0.1",
        {"strength": 0.1},
        "Where a λ that is learned ends: the default at 20 ways.",
    ),
    "imaml-released": Learner(
        "iMAML, released code",
        {
            "strength": 2.0,
            "inner_solver": "pull-back",
            "method": "released",
            "plain_test": True,
            "lr": 1e-3,
            "eps": 1e-3,
            "clip": 0.0,
        },
        "Inner steps without regularizer and one pull-back; operator 2v + Hv / 12.",
    ),
    "imaml-hessian-free": Learner(
        "iMAML, Hessian-free",
        {
            "inner_solver": "hessian-free",
            "inner_steps": 4,
            "inner_options": {"cg_steps": 5, "cg_rtol": 0.0},
        },
        "Inner steps by Newton-CG with a line search, 5 CG steps for each direction.",
    ),
    "imaml-damped": Learner(
        "iMAML, damped",
        {"method_options": {"indefinite": "damp"}},
        "Where CG meets negative curvature, H + λI is damped by about as much as is needed.",
    ),
    "imaml-gauss-newton": Learner(
        "iMAML, Gauss–Newton",
        {"method_options": {"indefinite": "ggn"}},
        "Where CG meets negative curvature, the Gauss–Newton matrix stands in for H.",
    ),
    "imaml-learned": Learner(
        "iMAML, λ learned",
        {"learn_strength": "scalar"},
        "One λ, learned by its own implicit gradient, down to a bound.",
    ),
    "imaml-unbounded": Learner(
        "iMAML, λ learned, no bound",
        _UNBOUNDED,
        "One λ, learned by its own implicit gradient wherever that leads.",
    ),
    "imaml-lbfgs": Learner(
        "iMAML, smooth, L-BFGS",
        _NEARER,
        "A smooth network without batch norm; 20 steps of L-BFGS inside, 20 of CG outside.",
    ),
    "imaml-lbfgs-unbounded": Learner(
        "iMAML, smooth, L-BFGS, λ learned, no bound",
        {**_NEARER, **_UNBOUNDED},
        "The same, with one λ learned wherever its implicit gradient leads.",
    ),
    "imaml-layers": Learner(
        "iMAML, λ learned by layer",
        {"learn_strength": "layer"},
        "One λ for each layer, learned likewise.",
    ),
    "imaml-estimated": Learner(
        "iMAML, error estimated",
        {"method_options": {"error_estimate": 0.1}},
        "The same training, in which every hypergradient estimates its error.",
    ),
    "imaml-scheduled": Learner(
        "iMAML, λ from 5 to 0.2",
        {"strength": 5.0, "strength_end": 0.2},
        "λ falls by equal factors.",
    ),
    "imaml-smooth": Learner(
        "iMAML, smooth activation",
        {"activation": "silu"},
        "SiLU in place of ReLU, so that second derivatives exist everywhere.",
    ),
    "imaml-no-norm": Learner(
        "iMAML, smooth, no batch norm",
        {**_SMOOTH, "method_options": {"error_estimate": 0.1}},
        "A smooth network without batch norm: the theorem's setting; estimates its error.",
    ),
    "fomaml-no-norm": Learner(
        "FOMAML, smooth, no batch norm",
        {**_SMOOTH, "method": "first-order"},
        "The first-order gradient on the same network.",
    ),
    "fomaml-regularized": Learner(
        "FOMAML, same inner problem",
        {"method": "first-order"},
        "The first-order gradient on iMAML's own inner problem.",
    ),
    "fomaml-weaker": Learner(
        "FOMAML, same inner problem, λ = 0.1",
        {"method": "first-order", "strength": 0.1},
        "The first-order gradient where λ is half as large.",
    ),
    "maml": Learner(
        "MAML", {**_PLAIN, "method": "unrolled"}, "Finn et al. (2017): all steps differentiated."
    ),
    "fomaml": Learner(
        "FOMAML", {**_PLAIN, "method": "first-order"}, "Finn et al. (2017), section 5.2."
    ),
    "reptile": Learner(
        "Reptile",
        {**_PLAIN, "method": "reptile", "train_shots": 10, "queries": 1},
        "Nichol et al. (2018): θ moves towards φ; 10 images per class in training.",
    ),
    "anil": Learner(
        "ANIL",
        {**_PLAIN, "method": "unrolled", "adapted": "head"},
        "Raghu et al. (2020): only the last layer is adapted.",
    ),
    "implicit-anil": Learner(
        "ANIL, implicit",
        {"adapted": "head"},
        "Only the last layer is adapted, near θ; the implicit gradient reaches the body too.",
    ),
    "no-adaptation": Learner(
        "no adaptation",
        {**_PLAIN, "method": "first-order", "inner_steps": 0},
        "The network as it is: chance, because labels are drawn anew in each task.",
    ),
    "scratch": Learner(
        "from scratch",
        {**_PLAIN, "method": "first-order", "steps": 0, "inner_steps": 100},
        "Each test task learned from random initial values.",
    ),
}
"""Learners by name."""
