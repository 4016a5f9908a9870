r"""Proposals: how weighted particles move from time t to u, and how the move changes their weight.

The base kernel of a step is `N(m, S2 I)` with `m = alpha_u D + sqrt(sigma_u^2 - S2) (x - alpha_t D)
/ sigma_t` (see `tiltjax.solvers`). A proposal shifts the mean by delta, which changes the
log-weight by `log p / q = -<delta, xi> / s - |delta|^2 / (2 s^2)`, where `s^2 = S2` and xi is the
noise of the draw. No difference of two log-densities is needed. With the shift
`D~ - D = (sigma_t^2 / alpha_t) ∇ log h` of a guidance,

| proposal | delta | |
|---|---|---|
| `Base()` | 0 | gradient-free: Feynman-Kac steering |
| `Guided()` | of the mean, `(alpha_u - sqrt(sigma_u^2 - S2) alpha_t / sigma_t) (D~ - D)` | TDS |
| `Shifted()` | `(1 + eta^-2) / 2 S2 ∇ log h` | by the score: DAS (at eta = 1) |
| `Children(m, proposal)` | as `proposal` | m children, one chosen by weight: SVDD |

In the limit of small steps, the factor of `Shifted` makes it Doob's transform for any eta: a kernel
with eta < 1 has less noise than the memoryless diffusion, and a part of the guidance belongs to its
drift. References: Wu et al. (arXiv 2306.17775, TDS), Kim et al. (arXiv 2501.05803, DAS), Li et al.
(arXiv 2408.08252, SVDD).
"""

import equinox as eqx
from jaxtyping import Array

from tiltjax import _checks, _repr
from tiltjax.solvers import Kernel


class Proposal(_repr.Printable):
    """How particles are proposed. Subclasses define `shift(kernel, guidance_shift)`, the shift of
    the kernel's mean for the guidance's `D~ - D` (`None`: no shift).

    `guided` is true if the proposal needs a guidance; `num_children` is the number of states that a
    particle proposes.
    """

    @property
    def guided(self) -> bool:
        return True

    @property
    def num_children(self) -> int:
        return 1

    def shift(self, kernel: Kernel, guidance_shift: Array) -> Array | None:
        raise NotImplementedError


class Base(Proposal):
    """The base kernel without a shift: only the twist steers."""

    @property
    def guided(self) -> bool:
        return False

    def shift(self, kernel, guidance_shift):
        return None


class Guided(Proposal):
    """The base kernel with its mean at the tilted denoiser and its noise unchanged."""

    def shift(self, kernel, guidance_shift):
        return kernel.response * guidance_shift


class Shifted(Proposal):
    """The base kernel with its variance times `∇ log h` added to its mean, times the factor for eta
    < 1.
    """

    def shift(self, kernel, guidance_shift):
        return (1 + kernel.eta**-2) / 2 * kernel.std**2 / kernel.tweedie * guidance_shift


class Children(Proposal):
    """Each particle proposes `m` states and continues as one of them, chosen by weight. Its weight
    changes by the mean weight of all children, which keeps the normalizing constant unbiased.

    A step costs m evaluations, also at the start.

    **Arguments:** `m`; `proposal` of each child, `Base()` by default.

    **Raises:** `ValueError` for a `proposal` that is itself `Children`.
    """

    _chosen = {"proposal": "Base()"}

    proposal: Proposal
    m: int = eqx.field(static=True)

    def __init__(self, m: int, proposal: Proposal | None = None):
        proposal = Base() if proposal is None else proposal
        _checks.instance(proposal, Proposal, "proposal", "use Base(), Guided() or Shifted()")
        if isinstance(proposal, Children):
            raise ValueError(
                f"the proposal of Children must not be Children, got Children({proposal.m}): use "
                "one Children with the product of both numbers"
            )
        self.proposal = proposal
        self.m = _checks.count(m, "m")

    @property
    def guided(self) -> bool:
        return self.proposal.guided

    @property
    def num_children(self) -> int:
        return self.m

    def shift(self, kernel, guidance_shift):
        return self.proposal.shift(kernel, guidance_shift)
