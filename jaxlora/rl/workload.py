"""The work of a batch for sampler and learner, from lengths alone: program calls, and tokens in buffers.

    lengths = drawn_lengths(prompts=64, group=16, prompt_tokens=120, answer_tokens=170, most=512)
    sampling = sampling_calls(lengths, slots=384, shards=1)         # 30 prefills, 1,300 steps
    learning_buffers(lengths, config.train, multiple=128)           # a buffer of 4,096 tokens, 73.0

Follows the rules of `jaxlora.generate.decode` and `jaxlora.rl.learning`, without any tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlora.config import TrainConfig
from jaxlora.data.packing import Batch, round_up
from jaxlora.data.render import RenderedRow
from jaxlora.estimate import BF16, REACHED
from jaxlora.generate.decode import SHARED_PROMPTS, SHARED_ROWS, SHARED_WORTH, STEPS_PER_CALL, WINDOW_MULTIPLE
from jaxlora.generate.order import order_of
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import count_matrix_parameters
from jaxlora.rl.job import RLJob
from jaxlora.rl.learning import buffers_of
from jaxlora.rl.mesh import shares_prompts, slots_of
from jaxlora.runtime.devices import memory_rate_of, peak_flops

USUAL_SHARE = 1 / 3  # default mean answer length, as a share of the longest
SPREAD = 0.5  # standard deviation of log answer length; about that of grade-school problems


@dataclass(frozen=True)
class Lengths:
    """Tokens of each prompt of a batch, and of each answer; answers to one prompt are adjacent."""

    prompts: np.ndarray  # int [prompts]
    answers: np.ndarray  # int [prompts * group]

    @property
    def group(self) -> int:
        return len(self.answers) // len(self.prompts)

    @property
    def of_answers(self) -> np.ndarray:
        """int `[prompts * group]`: tokens of each answer's prompt."""
        return np.repeat(self.prompts, self.group)


@dataclass(frozen=True)
class SamplingCalls:
    """How often the sampler's programs run for a batch."""

    prefills: int
    steps: int  # decode steps
    window: int  # positions of the cache read by a step, on average
    busy: float  # share of the slots with an unfinished answer, on average


def drawn_lengths(prompts: int, group: int, prompt_tokens: float, answer_tokens: float, most: int) -> Lengths:
    """A deterministic batch with these mean lengths.

    Prompts vary by half their mean; answers are log-normal, spread like grade-school answers, and cut at
    `most`.
    """
    rng = np.random.default_rng(0)
    asked = np.linspace(0.5, 1.5, prompts) * prompt_tokens
    drawn = rng.lognormal(0, SPREAD, prompts * group)
    low, high = 0.0, 100.0 * most  # cutting lowers the mean, so search for the scale that reaches it
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(scale * drawn, most).mean() < answer_tokens else (low, scale)
    answers = np.clip(np.round(np.minimum(high * drawn, most)), 1, most)
    return Lengths(np.maximum(1, np.round(asked)).astype(int), answers.astype(int))


def sampling_calls(lengths: Lengths, slots: int, shards: int = 1) -> SamplingCalls:
    """The calls that sample a batch; the smaller programs for its last answers are counted as full ones.

    Args:
      slots: on all devices together.
      shards: number of devices with slots of their own.
    """
    each, begun = slots // shards, lengths.of_answers
    left, capacity = order_of(begun.tolist()), begun.max() + lengths.answers.max()
    new, limit, held = (np.zeros(slots, int) for _ in range(3))
    prefills, windows, busy = 0, [], []
    while left or (new < limit).any():
        while left:
            free = np.flatnonzero(new >= limit)
            worth = min(SHARED_ROWS, each, SHARED_WORTH) * shards
            if len(free) < min(worth, len(left)) and len(free) < slots:
                break
            prefills += 1
            for shard in range(shards):
                own = free[free // each == shard][: min(SHARED_ROWS, each)]
                prompts: set[int] = set()
                for slot in own:
                    if not left or len(prompts | {left[-1] // lengths.group}) > SHARED_PROMPTS:
                        break
                    index = left.pop()
                    prompts.add(index // lengths.group)
                    new[slot], limit[slot], held[slot] = 1, lengths.answers[index], begun[index]
        active = new < limit
        longest = int((held + new)[active].max(initial=0)) + STEPS_PER_CALL
        windows.append(min(round_up(longest, WINDOW_MULTIPLE), round_up(int(capacity), WINDOW_MULTIPLE)))
        busy.append(np.minimum(limit - new, STEPS_PER_CALL)[active].sum() / (slots * STEPS_PER_CALL))
        new = np.minimum(new + STEPS_PER_CALL, limit)
    mean = round_up(int(np.mean(windows)), WINDOW_MULTIPLE)
    return SamplingCalls(prefills, len(windows) * STEPS_PER_CALL, mean, float(np.mean(busy)))


def least_seconds(
    spec: ModelSpec,
    lengths: Lengths,
    slots: int,
    mesh: Mesh,
    flops: float,
    memory_rate: float,
    shares: bool = False,
) -> dict[str, float]:
    """Seconds of sampling and learning of a batch at `REACHED` of peak rates, without grading or collectives.

    Args:
      slots: on all devices together.
      flops, memory_rate: peaks of one device, for bfloat16 products in FLOP/s and for its memory in bytes/s.
      shares: whether the learner computes a prompt only once.
    """
    model, devices = spec.config, mesh.size
    weights = count_matrix_parameters(model)
    token = 2 * BF16 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
    filled = float(lengths.prompts.mean() + lengths.answers.mean() / 2)
    calls = sampling_calls(lengths, slots)
    moved = BF16 * weights / mesh.shape["tensor"] + slots * calls.busy * filled * token / devices
    step = max(moved / memory_rate, 2 * weights * slots / devices / flops)
    read = lengths.prompts if shares else lengths.of_answers
    tokens = read.sum() + lengths.answers.sum()
    prefill = 2 * weights * lengths.prompts.sum() / devices / flops
    learning = (6 if spec.full else 4) * weights * tokens / devices / flops
    return {"sampling": (calls.steps * step + prefill) / REACHED, "learning": learning / REACHED}


def told_time(job: RLJob) -> str:
    """The least time of a run on these devices, in words, if answers have a third of the maximum length."""
    device, rl = jax.devices()[0], job.config.rl
    flops, memory_rate = peak_flops(device), memory_rate_of(device)
    if flops is None or memory_rate is None:
        return (
            f"not known for {device.device_kind} devices: the first batches will show;"
            " for TPU slices: jaxlora plan"
        )
    mean = sum(map(len, job.prompts)) / len(job.prompts)
    lengths = drawn_lengths(rl.prompts, rl.group, mean, USUAL_SHARE * rl.max_new_tokens, rl.max_new_tokens)
    shards = job.mesh.size if job.mesh.shape["tensor"] == 1 else 1
    slots, shares = slots_of(job.config, shards), shares_prompts(job.config, job.mesh)
    parts = least_seconds(job.spec, lengths, slots, job.mesh, flops, memory_rate, shares)
    whole = sum(parts.values())
    told = ", ".join(f"{name} {value:.3g} s" for name, value in parts.items())
    return (
        f"at least {rl.steps * whole / 3600:.2f} h without evaluations, {whole:.3g} s a batch ({told}, and"
        f" grading), where answers have {lengths.answers.mean():,.0f} tokens on average"
    )


def learning_buffers(
    lengths: Lengths, train: TrainConfig, multiple: int, shares: bool = False
) -> tuple[Batch, float]:
    """The largest buffer of a batch's answers, and the tokens in all their buffers, in units of that buffer.

    Args:
      multiple: the buffers' lengths are multiples of this, as the mesh requires.
      shares: answers share their prompt, laid out for dense attention, such as the TPU's.
    """
    rows = [
        RenderedRow(
            "", np.zeros(asked + n, np.int32), (np.arange(asked + n) >= asked).astype(np.float32), str(i)
        )
        for i, asked in enumerate(lengths.prompts)
        for n in lengths.answers[i * lengths.group :][: lengths.group]
    ]
    buffers = buffers_of(rows, train, multiple, shares, dense=True)
    largest = max(buffers, key=lambda batch: batch["tokens"].size)
    return largest, sum(batch["tokens"].size for batch in buffers) / largest["tokens"].size
