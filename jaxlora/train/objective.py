"""Objectives: each maps log-probabilities of targets to a loss per position.

    objective = objective_of("cross_entropy")
    objective = objective_of(Loss("ppo", clip_low=0.8, clip_high=1.2))  # with settings
    loss = objective(logprobs, weights, extras)                         # float32, in the shape of logprobs

A step sums the losses over all positions of all its rows (like Tinker), so the result does not depend on how
rows are packed, padded or split over buffers. Nothing is divided by lengths, tokens or groups. A new
objective takes one function and one line in the table.

Policy-gradient objectives take two extras per token: its advantage A and its log-probability q under the
policy that sampled it. With lp under the policy being trained and the ratio r = exp(lp - q), they are

- `importance_sampling`: -r A
- `ppo`: -min(r A, clip(r, low, high) A)
- `cispo`: -clip(r, low, high) A lp, with the ratio treated as a constant
- `dro`: -(A lp - beta / 2 (lp - q)^2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.models.head import Objective
from jaxlora.runtime.errors import UserError


@dataclass(frozen=True)
class Loss:
    """An objective's name and settings; each objective reads only its own. Hashable."""

    name: str = "importance_sampling"
    clip_low: float = 0.8  # bound of the ratio, for `ppo` and `cispo`
    clip_high: float = 1.2
    beta: float = 0.05  # for `dro`
    kl: float = 0.0  # weight of the divergence from a reference; its log-probabilities are then an extra
    temperature: float = 1.0  # logits are divided by this before all log-probabilities


def cross_entropy(logprobs: jax.Array, weights: jax.Array, extras: Any) -> jax.Array:
    """-weight * log p(target): the negative log likelihood of the weighted targets. Takes no extras."""
    return -weights * logprobs


def importance_sampling(loss: Loss, logprobs: jax.Array, log_ratio: jax.Array, extras: Any) -> jax.Array:
    """-r A. On policy its gradient is that of REINFORCE: the ratio is 1 and its derivative that of lp."""
    return -jnp.exp(log_ratio) * extras["advantages"]


def ppo(loss: Loss, logprobs: jax.Array, log_ratio: jax.Array, extras: Any) -> jax.Array:
    """-min(r A, clip(r) A): no gradient where the ratio has passed a bound in the direction A favours."""
    ratio, advantages = jnp.exp(log_ratio), extras["advantages"]
    clipped = jnp.clip(ratio, loss.clip_low, loss.clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def cispo(loss: Loss, logprobs: jax.Array, log_ratio: jax.Array, extras: Any) -> jax.Array:
    """-clip(r) A lp with a constant ratio: every token keeps a gradient, with bounded weight."""
    clipped = jnp.clip(jnp.exp(log_ratio), loss.clip_low, loss.clip_high)
    return -jax.lax.stop_gradient(clipped) * extras["advantages"] * logprobs


def dro(loss: Loss, logprobs: jax.Array, log_ratio: jax.Array, extras: Any) -> jax.Array:
    """-(A lp - beta / 2 (lp - q)^2)."""
    return -(extras["advantages"] * logprobs - 0.5 * loss.beta * jnp.square(log_ratio))


def divergence(logprobs: jax.Array, log_ratio: jax.Array, reference: jax.Array) -> jax.Array:
    """A loss whose expected gradient is that of KL(policy || reference), per token.

    It is r/2 (lp - ref)^2 with a constant ratio. Over tokens sampled from q, its expected gradient is
    sum p (lp - ref) dlp, the gradient of the divergence, since sum p dlp = 0. Its value is not the
    divergence. On policy, lp - ref estimates the divergence, but as a loss its expected gradient is 0.
    """
    return 0.5 * jax.lax.stop_gradient(jnp.exp(log_ratio)) * jnp.square(logprobs - reference)


Policy = Callable[[Loss, jax.Array, jax.Array, Any], jax.Array]
POLICY: dict[str, Policy] = {
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
}
NAMES = ("cross_entropy", *POLICY)


@lru_cache(maxsize=64)  # the same function for the same settings: it is part of the key of compiled programs
def objective_of(loss: str | Loss) -> Objective:
    """The objective of this name, or with these settings.

    Raises:
      UserError: there is none.
    """
    loss = Loss(loss) if isinstance(loss, str) else loss
    if loss.name == "cross_entropy":
        return cross_entropy
    if loss.name not in POLICY:
        raise UserError(f"loss: {loss.name!r:.80} is not known; give one of {', '.join(NAMES)}")
    policy = POLICY[loss.name]

    def objective(logprobs: jax.Array, weights: jax.Array, extras: Any) -> jax.Array:
        # At positions of weight 0, the extras must not lead to infinity times 0.
        used = weights != 0
        log_ratio = jnp.where(used, logprobs - extras["sampler_logprobs"], 0)
        value = policy(loss, logprobs, log_ratio, extras)
        if loss.kl:
            value += loss.kl * divergence(logprobs, log_ratio, extras["reference_logprobs"])
        return jnp.where(used, weights * value, 0)

    return objective


def extras_of(loss: str | Loss) -> tuple[str, ...]:
    """Names of the per-token arrays that this objective takes besides the weights."""
    loss = Loss(loss) if isinstance(loss, str) else loss
    if loss.name not in POLICY:
        return ()
    return ("advantages", "sampler_logprobs", *(("reference_logprobs",) if loss.kl else ()))


def temperature_of(loss: str | Loss) -> float:
    """The temperature that logits are divided by for this objective's log-probabilities."""
    return 1.0 if isinstance(loss, str) else loss.temperature
