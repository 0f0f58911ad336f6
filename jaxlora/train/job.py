"""Everything about a run that can be known before a model is loaded, checked and counted.

job = prepare(config)          # reads config.json, tokenizer and rows; UserError if anything is wrong
print(describe(job))           # the plan: parameters, steps, tokens, memory
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from rich.markup import escape
from rich.table import Table

from jaxlora.checkpoints.base import fingerprint
from jaxlora.checkpoints.tensors import open_tensors
from jaxlora.config import DataConfig, ModelSource, RunConfig
from jaxlora.data.batches import Layout, choose_layout, ranges
from jaxlora.data.gates import GateStatus, require_gates
from jaxlora.data.render import TOKENIZER_SUFFIXES, RenderedRow, Tokenizer, load_tokenizer
from jaxlora.data.rows import RowReport, load_rendered_rows
from jaxlora.data.sources import fetch_folder
from jaxlora.embedded import resolve
from jaxlora.estimate import with_mesh
from jaxlora.lora import count_trainable
from jaxlora.models.attention import pick_backend
from jaxlora.models.decoder import ModelSpec, kept_per_token
from jaxlora.models.head import CHUNK
from jaxlora.models.spec import ModelConfig, load_model_config, published_config
from jaxlora.models.table import count_parameters
from jaxlora.runtime.devices import scan_layers, slice_of
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import is_remote, mirror
from jaxlora.sharding import make_mesh, token_multiple
from jaxlora.train.schedule import RunPlan, plan_run
from jaxlora.train.step import Compute


@dataclass(frozen=True)
class Job:
    """A checked run: configuration, model shape, rows and plan. No weights."""

    config: RunConfig
    model_dir: Path | None  # None: random weights of a published shape
    spec: ModelSpec
    backend: str
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    train_rows: list[RenderedRow]
    validation_rows: list[RenderedRow]
    reports: tuple[RowReport, RowReport]
    gates: GateStatus
    plan: RunPlan
    train_layout: Layout
    validation_layout: Layout

    def compute(self, layout: Layout) -> Compute:
        """How steps over buffers of this layout are computed."""
        return Compute(self.backend, self.config.model.remat, layout.batch_rows if layout.packed else 1)


def locate_model(config: RunConfig, with_weights: bool = True) -> tuple[Path | None, ModelConfig]:
    """The model's directory and shape; a Hub name is fetched (announced) and then cached. Of a model in a
    bucket (`gs://bucket/folder`) only the small files are copied, see `jaxlora.runtime.remote`.

    Args:
      with_weights: fetch the weights too; without, only config.json (for plans).

    Raises:
      UserError: no such directory or Hub model, or not a Qwen3.
    """
    source = config.model
    if source.random_weights and not Path(source.path).exists():
        with contextlib.suppress(UserError):
            return None, published_config(source.path)
    folder = mirror(source.path) if is_remote(source.path) else resolve(source.path)
    if not folder.is_dir():
        folder = _fetch(source, with_weights and not source.random_weights)
    return folder, load_model_config(folder)


def _fetch(source: ModelSource, with_weights: bool) -> Path:
    """The local folder of a Hub model."""
    name = source.path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"config.model.path: no directory {name!r}; give one, or a Hub name such as Qwen/Qwen3-8B"
        )
    patterns = [f"*{suffix}" for suffix in sorted(TOKENIZER_SUFFIXES)] + ["*.safetensors"] * with_weights
    missing = partial(_missing, with_weights=with_weights, with_tokenizer=source.tokenizer is None)
    return fetch_folder(f"config.model.path: {name!r}", name, patterns, missing)


def _missing(folder: Path, with_weights: bool, with_tokenizer: bool) -> str:
    """What is missing of a model in a folder, in words; empty if nothing is."""
    for name in ["config.json"] + ["tokenizer_config.json"] * with_tokenizer:
        if not (folder / name).is_file():
            return f"{folder / name}: missing"
    try:
        if with_weights:
            open_tensors(folder)
    except UserError as error:
        return str(error)
    return ""


def base_fingerprint(config: RunConfig, model_dir: Path | None, model: ModelConfig) -> str:
    """Tells one base from another: by its files or, where it is drawn at random, by seed and shape."""
    if model_dir is None or config.model.random_weights:
        return f"random-{config.seed}-{hashlib.sha256(repr(model).encode()).hexdigest()[:16]}"
    return fingerprint(model_dir)


def load_job_tokenizer(config: RunConfig, model_dir: Path | None, model: ModelConfig) -> Tokenizer:
    """The tokenizer named by the configuration, or the model's own; the model must know all of its ids."""
    name = config.model.tokenizer or (str(model_dir) if model_dir else None)
    if name is None:
        raise UserError("config.model.tokenizer: a random model has none of its own; name a tokenizer")
    tokenizer = load_tokenizer(name)
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"config.model.tokenizer: {len(tokenizer)} tokens, but the model knows {model.vocab_size}"
        )
    return tokenizer


def prepare(
    config: RunConfig, with_weights: bool = True, like: Job | None = None, gates: GateStatus | None = None
) -> Job:
    """Check and count everything; nothing is written and no weights are loaded.

    Args:
      with_weights: fetch the weights of a Hub model; without, only its shape (for plans).
      like: a job that may read the same rows with the same tokenizer; if it does, they are not read again.
      gates: what to take for the state of the data's gates; None: look.

    Raises:
      UserError: anything that would stop the run: one line that says what to do.
    """
    data, train = config.data, config.train
    if gates is None:
        gates = require_gates(data.train_path, data.validation_path, data.gate_report, data.allow_ungated)
    model_dir, model_config = locate_model(config, with_weights)
    if like is not None and (like.config.model, like.config.data) != (config.model, config.data):
        like = None
    tokenizer = like.tokenizer if like else load_job_tokenizer(config, model_dir, model_config)
    if like is not None:
        train_rows, validation_rows, reports = like.train_rows, like.validation_rows, like.reports
    else:
        train_rows, validation_rows, reports = _load_rows(data, tokenizer)
    if train.batch_rows > len(train_rows):
        raise UserError(
            f"config.train.batch_rows: {train.batch_rows} rows, but {data.train_path} has {len(train_rows)};"
            f" give at most {len(train_rows)}"
        )
    if config.lora.output_head and model_config.tie_word_embeddings:
        raise UserError("config.lora.output_head: this model ties its head to the embedding; give false")
    platform = jax.default_backend()
    scan = scan_layers(config.model.layers, platform)
    spec = ModelSpec(model_config, config.lora, config.model.dtype, scan)
    config = with_mesh(config, model_config, slice_of(jax.devices()))
    mesh = make_mesh(config.mesh)
    plan = plan_run(config.optim, train, len(train_rows))
    steps = [plan.rows_of_step(step) for step in range(1, plan.steps_per_epoch + 1)]
    rows_a_time = min(train.validation_batch_rows, len(validation_rows))
    checks = ranges(len(validation_rows), rows_a_time)
    multiple = token_multiple(mesh)
    return Job(
        config=config,
        model_dir=model_dir,
        spec=spec,
        backend=pick_backend(config.model.attention, platform, config.model.dtype, mesh.size),
        tokenizer=tokenizer,
        mesh=mesh,
        train_rows=train_rows,
        validation_rows=validation_rows,
        reports=reports,
        gates=gates,
        plan=plan,
        train_layout=choose_layout(train_rows, steps, train.batch_rows, train, multiple),
        validation_layout=choose_layout(validation_rows, checks, rows_a_time, train, multiple),
    )


def _load_rows(
    data: DataConfig, tokenizer: Tokenizer
) -> tuple[list[RenderedRow], list[RenderedRow], tuple[RowReport, RowReport]]:
    """Training rows, validation rows, and what was skipped in each."""
    load = partial(
        load_rendered_rows, tokenizer=tokenizer, max_length=data.max_length, on_bad_row=data.on_bad_row
    )
    train_rows, train_report = load(data.train_path, limit=data.train_rows)
    validation_rows, validation_report = load(data.validation_path, limit=data.validation_rows)
    return train_rows, validation_rows, (train_report, validation_report)


def token_count(rows: list[RenderedRow]) -> int:
    """Shifted tokens of these rows."""
    return sum(row.n_tokens for row in rows)


def padding_efficiency(rows: list[RenderedRow], batches: list[range], layout: Layout) -> float:
    """Real tokens over buffer tokens of one pass."""
    built = sum(layout.build([rows[i] for i in batch])["tokens"].size for batch in batches)
    return token_count(rows) / built


def estimate_memory(job: Job) -> dict[str, int]:
    """Bytes that a run needs on all devices together, in four parts; an estimate to about a fifth.

    Adapter: weights, gradients and two moments in float32. Activations: what the backward pass of one
    buffer keeps, see `kept_per_token`. Output head: logits of one chunk and their gradient, in float32.
    """
    config, width = job.spec.config, 2 if job.spec.dtype == "bfloat16" else 4
    tokens = max(job.train_layout.sizes) * (1 if job.train_layout.packed else job.train_layout.batch_rows)
    kept = sum(kept_per_token(config, job.config.model.remat)) * config.num_hidden_layers
    if job.config.model.remat is True:  # one layer at a time is whole
        kept += sum(kept_per_token(config, False))
    return {
        "base": count_parameters(config) * width,
        "adapter and optimizer": count_trainable(job.spec) * 4 * 4,
        "activations": kept * tokens * width,
        "output head": 2 * 4 * config.vocab_size * min(CHUNK, tokens),
    }


def describe(job: Job) -> Table:
    """The plan as a table for the terminal: what will be trained, on what, in how many steps."""
    config, plan, model = job.config, job.plan, job.spec.config
    trainable, total = count_trainable(job.spec), count_parameters(model)
    train_tokens, validation_tokens = token_count(job.train_rows), token_count(job.validation_rows)
    passes = len(plan.validation_steps)
    epoch = [plan.rows_of_step(step) for step in range(1, plan.steps_per_epoch + 1)]
    memory = estimate_memory(job)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    device = jax.devices()[0]
    rows = {
        "run": f"{config.run_id} in {config.run_dir}",
        "model": f"{config.model.path}, {model.num_hidden_layers} layers, {config.model.dtype}"
        + (", random weights" if config.model.random_weights else ""),
        "parameters": f"{trainable:,} trainable, {total:,} in the base ({trainable / total:.2%})",
        "adapter": f"{config.lora.condition}, rank {config.lora.rank}, alpha {config.lora.alpha:g}, on "
        + ", ".join(weight.name for weight in job.spec.adapted),
        "training": f"{len(job.train_rows):,} rows, {train_tokens:,} tokens an epoch, "
        f"{train_tokens * config.train.epochs:,} in all",
        "validation": f"{len(job.validation_rows):,} rows, {validation_tokens:,} tokens a pass, "
        f"{validation_tokens * passes:,} in all",
        "steps": f"{plan.total_steps:,}, {plan.steps_per_epoch:,} an epoch, "
        f"{config.train.batch_rows} rows a step, {plan.warmup_steps} of warm-up",
        "validation steps": ", ".join(map(str, plan.validation_steps)),
        "learning rate": f"{config.optim.peak_lr:g}, {config.optim.schedule}",
        "buffers": f"{config.train.layout}, {', '.join(map(str, job.train_layout.sizes))} tokens, "
        f"{padding_efficiency(job.train_rows, epoch, job.train_layout):.1%} of them real",
        "memory": f"about {sum(memory.values()) / 2**30:.2f} GiB: {parts}",
        "devices": f"{job.mesh.size} x {device.device_kind}, mesh {dict(job.mesh.shape)},"
        f" attention {job.backend}, layers {'scanned' if job.spec.scan else 'unrolled'}",
    }
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(text))
    for report in job.reports:
        if report.skipped:
            table.add_row("[bold red]skipped rows[/bold red]", escape(report.describe()))
    return table
