"""Benchmarks: real tokens per second of training and decoding, beside what the same machine can do at most.

    lengths = [(72, 340), (95, 410)]    # prompt and total tokens of each row
    result = bench_train(config, model, lengths, max_steps=60, validation=True)
    result = bench_decode(config, model, prompt_lengths, answer_lengths)
    result = bench_experts(config, model, tokens=8192)     # one layer's experts, by each implementation

Only real tokens count, never padding. Utilisation counts 4N FLOPs per training token (forward 2N, activation
gradients 2N; the frozen base needs no weight gradients) and 2N per decoded token, relative to the maker's
peak and to a matrix product measured in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlora.checkpoints.base import random_base
from jaxlora.config import RunConfig
from jaxlora.data.batches import ahead, choose_layout, ranges, step_batch
from jaxlora.data.packing import Batch
from jaxlora.data.render import RenderedRow
from jaxlora.estimate import mesh_here
from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import check_targets, count_trainable, init_lora, lora_shapes
from jaxlora.models.attention import decode_backend
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.experts import own_experts
from jaxlora.models.families import count_matrix_parameters
from jaxlora.models.grouped import resolve
from jaxlora.models.quantised import pick_scheme
from jaxlora.models.spec import Experts, How, ModelConfig
from jaxlora.runtime.ahead import Ahead
from jaxlora.runtime.devices import memory_in_use, peak_flops
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.sharding import place_batch, place_trained, token_lines, token_multiple
from jaxlora.train.job import buffer_lengths
from jaxlora.train.schedule import learning_rate, plan_run
from jaxlora.train.step import Compute, TrainState, init_state, make_eval_step, make_train_step
from jaxlora.train.step import wire as wire_machine

LATE = 2  # steps that the host runs ahead, as in training


def wire(config: RunConfig, model: ModelConfig, training: bool = True) -> tuple[Mesh, ModelSpec, Compute]:
    """The mesh, the spec and the way to compute that a run of this configuration has on this machine."""
    machine = wire_machine(config.model, mesh_here(config, model).mesh)
    full = config.train.what == "full"
    scheme = pick_scheme(config.model, machine.mesh.devices.flat[0], training)
    lora = None if full else config.lora
    spec = ModelSpec(model, lora, config.model.dtype, machine.scan, full=full, scheme=scheme)
    return machine.mesh, spec, machine.compute()


def _mesh_facts(mesh: Mesh) -> dict[str, Any]:
    return {"mesh": ", ".join(f"{name}={size}" for name, size in mesh.shape.items())}


def product_ceiling(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s that this device really reaches, in a bf16 product of random `[size, size]` matrices."""
    size = size if jax.default_backend() != "cpu" else 512
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    product(a, a).block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        out = product(a, a)
    out.block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def random_rows(lengths: list[tuple[int, int]], vocab: int) -> list[RenderedRow]:
    """Rows of random tokens with these (prompt, total) lengths, trained on the tokens after the prompt."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (prompt, total) in enumerate(lengths):
        weights = (np.arange(total) >= prompt).astype(np.float32)
        rows.append(RenderedRow(str(i), rng.integers(0, vocab, total).astype(np.int32), weights))
    return rows


class CompileCounter:
    """Collects the seconds of each XLA compilation while the context is open."""

    def __init__(self) -> None:
        self.events: list[float] = []

    def __enter__(self) -> CompileCounter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.events.append(duration_secs)


def warm_up_runs() -> int:
    """How often a program runs before it is timed: on a GPU the second run makes its CUDA graph."""
    return 2 if jax.default_backend() == "gpu" else 1


def device_facts() -> dict[str, Any]:
    """The device, the versions and the ceilings that a result belongs to."""
    import jaxlib

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "ceiling_tflops": product_ceiling() / 1e12,
        "peak_tflops": (peak_flops(device) or 0) / 1e12 or None,
    }


def utilisation(tokens_per_second: float, flops: int, facts: dict[str, Any]) -> dict[str, float | None]:
    """Shares of the maker's peak and of the measured matrix product.

    Args:
      flops: of the model, per token.
    """
    rate = tokens_per_second * flops / 1e12 / facts["devices"]
    return {
        "model_flops_utilisation": rate / facts["peak_tflops"] if facts["peak_tflops"] else None,
        "of_ceiling": rate / facts["ceiling_tflops"],
    }


def waits(seconds: list[float]) -> dict[str, Any]:
    """What steps after the first waited for, beyond what most of them take: a program that was not there."""
    extra = np.array(seconds[1:]) - np.median(seconds)
    return {
        "longest_wait_seconds": float(extra.max()),
        "waits_above_1s": int((extra > 1).sum()),
        "waited_seconds": float(extra[extra > 0.1].sum()),
    }


class Timing(NamedTuple):
    """Steps of an epoch, timed after every buffer length has been compiled."""

    tokens: int  # real ones
    buffer_tokens: int  # padding included
    seconds: list[float]  # of each step: from reading the metrics of the one before to reading its own
    first_step_seconds: float  # from tracing to the first metrics
    compilations: int
    compile_seconds: float


def bench_train(
    config: RunConfig,
    model: ModelConfig,
    lengths: list[tuple[int, int]],
    max_steps: int | None,
    validation: bool,
    products: How = "auto",
    cold: bool = False,
) -> dict[str, Any]:
    """Time training steps over rows of these (prompt, total) lengths, then validating the first 512 of them.

    Args:
      max_steps: time only this many steps of the epoch; None: all.
      cold: time them from the first on, while their programs are compiled as in a run.

    Raises:
      UserError: the configuration asks for a mesh or an attention that this machine does not have.
    """
    mesh, spec, compute = wire(config, model)
    spec = replace(spec, products=products)
    facts = device_facts()
    start = time.perf_counter()
    rows = random_rows(lengths, model.vocab_size)
    trained, frozen = jax.block_until_ready(_random_weights(spec, mesh))
    weights_seconds = time.perf_counter() - start
    measured: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        state = init_state(trained, config.optim)
        del trained  # the first step takes its memory
        lora, timing = _time_training(config, spec, mesh, compute, rows, state, frozen, max_steps, cold)
        train_rate = timing.tokens / sum(timing.seconds)
        if validation:
            eval_rate = _time_validation(config, spec, mesh, compute, rows[:512], lora, frozen)
            measured["validation_tokens_per_second"] = eval_rate
            measured["validation_over_training"] = eval_rate / train_rate
    milliseconds = 1e3 * np.array(timing.seconds)
    memory = memory_in_use(jax.devices()[0])
    return facts | {
        "benchmark": "train",
        **_mesh_facts(mesh),
        "rows_a_step": config.train.batch_rows,
        "trainable_parameters": count_trainable(spec),
        "attention": compute.backend,
        "layers": "scan" if spec.scan else "unroll",
        **({"products": resolve(products)} if model.experts else {}),
        "remat": config.model.remat,
        "steps": len(timing.seconds),
        "real_tokens_per_second": train_rate,
        "padding_efficiency": timing.tokens / timing.buffer_tokens,
        "step_ms_median": float(np.median(milliseconds)),
        "step_ms_p90": float(np.percentile(milliseconds, 90)),
        **utilisation(train_rate, (6 if spec.full else 4) * count_matrix_parameters(model), facts),
        "compilations": timing.compilations,
        "compile_seconds": timing.compile_seconds,
        "first_step_seconds": timing.first_step_seconds,
        **(waits(timing.seconds) if cold else {}),
        "weights_seconds": weights_seconds,
        "peak_memory_gib": memory / 2**30 if memory else None,
        **measured,
    }


def _random_weights(spec: ModelSpec, mesh: Mesh) -> tuple[Tree, Tree]:
    """What is trained, and the frozen base."""
    if spec.full:
        return random_base(replace(spec, dtype="float32", full=False), 0, mesh), {}
    return place_trained(mesh, spec, init_lora(spec, 0)), random_base(spec, 0, mesh)


def _one_of_each_shape(batch_of: Callable[[int], Batch], last: int) -> dict[tuple[int, ...], Batch]:
    shapes: dict[tuple[int, ...], Batch] = {}
    for step in range(1, last + 1):
        batch = batch_of(step)
        shapes.setdefault(batch["tokens"].shape, batch)
    return shapes


def _time_training(
    config: RunConfig,
    spec: ModelSpec,
    mesh: Mesh,
    compute: Compute,
    rows: list[RenderedRow],
    state: TrainState,
    frozen: Tree,
    max_steps: int | None,
    cold: bool,
) -> tuple[Tree, Timing]:
    """Compile the step for each buffer length, then time the first steps of an epoch.

    Batches are made ahead and metrics are read late, as in training; compiling goes on beside a cold start.

    Returns:
      what is trained, after these steps, and their times.
    """
    plan = plan_run(config.optim, config.train, len(rows))
    parts = [plan.rows_of_step(step) for step in range(1, plan.steps_per_epoch + 1)]
    split = token_multiple(mesh), token_lines(mesh)
    tokens = float(sum(row.n_tokens for row in rows))
    _, stages = buffer_lengths(config.train, spec, mesh, tokens, len(parts)) if cold else (None, ())
    layout = choose_layout(rows, parts, config.train.batch_rows, config.train, *split, stages)
    compute = replace(compute, max_segments=layout.rows_a_line, longest_row=layout.longest_row)
    step_fn = make_train_step(spec, config.optim, compute)
    last = min(plan.steps_per_epoch, max_steps or plan.steps_per_epoch)
    rate = partial(learning_rate, optim=config.optim, plan=plan)

    seed = 0 if config.lora.dropout else None
    batch_of = partial(step_batch, rows, plan.rows_of_step, layout, dropout_seed=seed)
    shapes = _one_of_each_shape(batch_of, last)
    with CompileCounter() as compiled:
        start, first_step_seconds = time.perf_counter(), None
        programs = Ahead(step_fn, lambda *arguments: arguments[2]["tokens"].shape)
        for i, batch in enumerate(shapes.values()):
            placed = place_batch(mesh, batch)
            programs.start(state, frozen, placed, jnp.float32(0), alone=i == 0, cached=i == 0 or not cold)
        if not cold:
            state, first_step_seconds = _run_each(programs, shapes, mesh, state, frozen, rate(1))

    real_tokens = buffer_tokens = 0
    seconds: list[float] = []
    waiting: list[jax.Array] = []
    with CompileCounter() as compiled_again, progress_bar("training", last, "steps") as advance:
        clock = start if cold else time.perf_counter()
        for step, batch in ahead(batch_of, range(1, last + 1)):
            state, metrics = programs(state, frozen, place_batch(mesh, batch), jnp.float32(rate(step)))
            real_tokens += sum(rows[i].n_tokens for i in plan.rows_of_step(step))
            buffer_tokens += batch["tokens"].size
            waiting.append(metrics["nll"])
            while len(waiting) > (LATE if step < last else 0):
                float(waiting.pop(0))
                seconds.append(time.perf_counter() - clock)
                clock += seconds[-1]
                advance(1)
    events = compiled.events + compiled_again.events
    compilations = len(events) if cold else len(shapes) + len(compiled_again.events)
    first = first_step_seconds or seconds[0]
    return state.trained, Timing(real_tokens, buffer_tokens, seconds, first, compilations, sum(events))


def _run_each(programs, shapes, mesh, state, frozen, rate) -> tuple[TrainState, float]:
    """Run the program of each shape until it is warm; the state, and seconds until the first has run."""
    start, first = time.perf_counter(), None
    for shape, batch in shapes.items():
        console.print(f"compiling for {shape[-1]} tokens")
        for _ in range(warm_up_runs()):
            state, metrics = programs(state, frozen, place_batch(mesh, batch), jnp.float32(rate))
            float(metrics["nll"])
            first = first or time.perf_counter() - start
    return state, first or 0.0


def _time_validation(config, spec, mesh, compute, rows, lora, frozen) -> float:
    """Real tokens per second of a validation pass that has been compiled and warmed up."""
    rows_a_time = config.train.validation_batch_rows
    batches = ranges(len(rows), rows_a_time)
    split = token_multiple(mesh), token_lines(mesh)
    layout = choose_layout(rows, batches, rows_a_time, config.train, *split)
    compute = replace(compute, remat=False, max_segments=layout.rows_a_line, longest_row=layout.longest_row)
    step = make_eval_step(spec, compute)
    placed = [place_batch(mesh, layout.build([rows[i] for i in batch])) for batch in batches]
    for _ in range(warm_up_runs()):
        jax.block_until_ready([step(lora, frozen, batch) for batch in placed])
    start = time.perf_counter()
    jax.block_until_ready([step(lora, frozen, batch) for batch in placed])
    return sum(row.n_tokens for row in rows) / (time.perf_counter() - start)


def bench_decode(
    config: RunConfig,
    model: ModelConfig,
    prompt_lengths: list[int],
    answer_lengths: list[int],
    expected: list[float] | None = None,
    padded: bool = False,
) -> dict[str, Any]:
    """Merge an adapter, then decode prompts of random tokens to answers of given lengths.

    This is done twice, and the second time, when everything has been compiled, is reported. The base stays in
    memory, as it does when a study evaluates several adapters.

    Args:
      expected: how long answers may become, as an earlier evaluation would say; None: nothing is known.
      padded: read prompts as padded rows, also where they could be packed.

    Raises:
      UserError: the configuration asks for a mesh or an attention that this machine does not have.
    """
    mesh, spec, _ = wire(config, model, training=False)
    spec = replace(spec, scan=False)
    schedule = {"expected": expected, "packed": False if padded else None}
    backend = decode_backend(config.model.dtype, config.model.attention)
    facts = device_facts()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.vocab_size, n).tolist() for n in prompt_lengths]
    frozen = jax.block_until_ready(random_base(spec, 0, mesh))
    lora = place_trained(mesh, spec, init_lora(spec, 0))
    with CompileCounter() as compiled:
        first, timed = (
            _time_decoding(config, spec, lora, frozen, prompts, answer_lengths, backend, schedule)
            for _ in range(2)
        )
    tokens = sum(answer_lengths)
    rate = tokens / timed.seconds
    memory = memory_in_use(jax.devices()[0])
    return facts | {
        "benchmark": "decode",
        **_mesh_facts(timed.mesh),
        "attention": backend,
        "slots": config.eval.batch_rows,
        "merged": timed.merged,
        "prompts": len(prompts),
        "prompt_tokens": sum(prompt_lengths),
        "generated_tokens": tokens,
        "seconds": timed.seconds,
        "preparing_weights_seconds": timed.preparing_seconds,
        "first_pass_seconds": first.seconds,
        "generated_tokens_per_second": rate,
        **utilisation(rate, 2 * count_matrix_parameters(model), facts),
        "compilations": len(compiled.events),
        "compile_seconds": sum(compiled.events),
        "peak_memory_gib": memory / 2**30 if memory else None,
    }


class DecodeTiming(NamedTuple):
    """One pass over all prompts."""

    seconds: float  # preparing the weights included
    preparing_seconds: float
    merged: bool
    mesh: Mesh


def _time_decoding(config, spec, lora, frozen, prompts, answer_lengths, backend, schedule) -> DecodeTiming:
    """Prepare the decoder's weights and answer every prompt, each with as many tokens as it is told."""
    start = time.perf_counter()
    form, adapter, weights, mesh = decode_weights(spec, lora, frozen, merge=config.eval.merge_adapter)
    jax.block_until_ready(weights)
    preparing = time.perf_counter() - start
    with jax.set_mesh(mesh), progress_bar("decoding", len(prompts), "prompts") as advance:
        answers = generate(
            form,
            adapter,
            weights,
            prompts,
            stop_ids=(),
            max_new_tokens=max(answer_lengths),
            slots=config.eval.batch_rows,
            limits=answer_lengths,
            backend=backend,
            progress=advance,
            **schedule,
        )
    seconds = time.perf_counter() - start
    assert [len(answer.tokens) for answer in answers] == answer_lengths
    return DecodeTiming(seconds, preparing, form.lora is None, mesh)


def bench_experts(config: RunConfig, model: ModelConfig, tokens: int, hows: list[How]) -> dict[str, Any]:
    """Time the experts of one layer, forward and backward with adapters, and compare with float32.

    Every token goes to experts drawn at random. FLOPs count 4N for the weights of a token's experts: forward
    and gradients of activations. Errors are norms, relative to that of the same in float32 by the loop.

    Args:
      hows: implementations; one that does not run here is reported as failed.

    Raises:
      UserError: the model has no experts, or its adapter's rank does not divide.
    """
    spec = ModelSpec(model, config.lora, config.model.dtype)
    check_targets(spec)
    experts = model.experts
    if experts is None:
        raise UserError("--model: has no experts; give one that has, such as qwen3-30b-a3b")
    inputs = _expert_inputs(spec, experts, tokens)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    with jax.default_matmul_precision("highest"):
        expected = _expert_step(experts, spec.expert_scale, "loop")(*exact)
    expected = jax.tree.map(np.asarray, expected)
    sizes = experts.num_experts_per_tok * 3 * model.hidden_size * experts.moe_intermediate_size
    result: dict[str, Any] = {"benchmark": "experts", "tokens": tokens} | device_facts()
    for how in hows:
        try:
            seconds, found = _time_experts(_expert_step(experts, spec.expert_scale, how), inputs)
        except Exception as error:  # whatever a kernel's compiler says: the others are still measured
            result[f"{how}_failed"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            continue
        result[f"{how}_ms"] = 1e3 * seconds
        result[f"{how}_tflops"] = 4 * sizes * tokens / seconds / 1e12
        result[f"{how}_errors"] = {name: _relative(found[name], expected[name]) for name in expected}
    return result


def _expert_inputs(spec: ModelSpec, experts: Experts, tokens: int) -> tuple[Any, ...]:
    """States, choices, shares and a gradient of so many tokens; weights and adapters of all experts."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    dtype, hidden = jnp.dtype(spec.dtype), spec.config.hidden_size

    def normal(shape: tuple[int, ...], std: float, dtype: Any = dtype) -> jax.Array:
        return (std * jax.random.normal(next(keys), shape, jnp.float32)).astype(dtype)

    arrays = {}
    for weight in spec.table:
        if weight.experts:
            (*_, rank, _), _ = lora_shapes(spec, weight)
            n, out_size, in_size = weight.shape
            arrays[weight.name] = {
                "weight": normal(weight.shape, in_size**-0.5),
                "lora_a": normal((n, rank, in_size), in_size**-0.5, jnp.float32),
                "lora_b": normal((n, out_size, rank), 0.02, jnp.float32),
            }
    chances = jax.random.uniform(next(keys), (tokens, experts.num_experts))
    shares, choices = jax.lax.top_k(chances, experts.num_experts_per_tok)
    shares = (shares / shares.sum(-1, keepdims=True)).astype(dtype)
    return normal((tokens, hidden), 1.0), shares, arrays, choices, normal((tokens, hidden), 1.0)


def _expert_step(experts: Experts, scale: float, how: How):
    """The jitted `(x, shares, arrays, choices, d_y) -> y and gradients` of one layer's experts."""

    def step(x, shares, arrays, choices, d_y):
        adapters = {name: {k: v for k, v in own.items() if k != "weight"} for name, own in arrays.items()}

        def run(x, shares, adapters):
            own = {name: adapters[name] | {"weight": arrays[name]["weight"]} for name in arrays}
            return own_experts(experts, scale, how, x, choices, shares, own)

        y, pull = jax.vjp(run, x, shares, adapters)
        d_x, d_shares, d_adapters = pull(d_y)
        return {"y": y, "d_x": d_x, "d_shares": d_shares, "d_adapters": d_adapters}

    return jax.jit(step)


def _time_experts(step, inputs, repeats: int = 20) -> tuple[float, Any]:
    """Seconds of one run, and its results."""
    for _ in range(warm_up_runs()):
        found = jax.block_until_ready(step(*inputs))
    start = time.perf_counter()
    for _ in range(repeats):
        found = step(*inputs)
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / repeats, found


def _relative(found: Any, expected: Any) -> float:
    """The largest relative difference (norm) of two trees' arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    gaps = [np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b) for a, b in pairs]
    return float(max(gaps))
