"""What an evaluation is of: the untouched base, a run's selected adapter, or any PEFT adapter.

    target = run_target(config, Path("results/tiny-all_layer-seed-0"))
    summary = evaluate_target(target)        # writes target.out

Everything is checked before weights are loaded. An adapter whose condition or seed is not known, or which
belongs to another base, is an error: it never falls back to the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import load_base, random_base
from jaxlora.checkpoints.export import load_selected
from jaxlora.checkpoints.peft import METADATA, SETTINGS, WEIGHTS
from jaxlora.config import RunConfig, from_dict
from jaxlora.data.render import chat_text, prompt_messages
from jaxlora.data.sources import HUB_PREFIX, fetch_folder
from jaxlora.evals.run import Subject, end_of_turn, evaluate, load_prompts
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import sha256_of
from jaxlora.runtime.progress import console
from jaxlora.runtime.records import read_manifest
from jaxlora.runtime.remote import weight_files
from jaxlora.sharding import make_mesh, place_trained
from jaxlora.train.job import base_fingerprint, load_job_tokenizer, locate_model

FILES = ("summary.json", "predictions.jsonl", "metrics.jsonl")


@dataclass(frozen=True)
class Target:
    """A checked subject with all that its evaluation needs, except the base's weights."""

    config: RunConfig
    subject: Subject
    model_dir: Path | None  # None: random weights of a published shape
    spec: ModelSpec
    lora: Tree
    out: Path


def base_target(config: RunConfig, with_weights: bool = True) -> Target:
    """The untouched base of the configuration; written to `<results>/<prefix>-base/evaluation`."""
    model_dir, model = locate_model(config, with_weights)
    name = f"{config.prefix}-base"
    spec = ModelSpec(model, None, config.model.dtype, scan=False)
    subject = Subject(name, base_fingerprint=_fingerprint(config, model_dir, model, with_weights))
    return Target(config, subject, model_dir, spec, {}, Path(config.results_dir) / name / "evaluation")


def run_config(config: RunConfig, run: Path) -> RunConfig:
    """The run's own configuration from its manifest; evaluation, mesh and place of the base from `config`."""
    manifest = read_manifest(run)
    if manifest.get("config") is None:
        raise UserError(f"{run / 'manifest.json'}: has no config; this is not a run directory")
    own = from_dict(manifest["config"])
    here = {name: getattr(config.model, name) for name in ("path", "tokenizer")}
    return replace(
        own, model=replace(own.model, **here), eval=config.eval, mesh=config.mesh, data=config.data
    )


def run_target(config: RunConfig, run: Path, with_weights: bool = True) -> Target:
    """The selected adapter of a finished run; written to `<run>/evaluation`.

    Model, dtype and adapter are the run's own, as its manifest records them. Only the place of the base and
    of its tokenizer come from `config`, because they may have moved: the base's files must be the same.

    Raises:
      UserError: the run is unfinished or contradicts itself, its data was not gated, or the base is another.
    """
    config = run_config(config, run)
    model_dir, model = locate_model(config, with_weights)
    manifest = read_manifest(run)
    _check_gates(run, manifest, config.data.allow_ungated)
    recorded = (manifest.get("base") or {}).get("fingerprint")
    found = _fingerprint(config, model_dir, model, with_weights, recorded)
    if recorded != found:
        trained = (manifest.get("base") or {}).get("path")
        raise UserError(
            f"{run}: was trained on another base than {config.model.path!r} (their files differ);"
            f" give --config.model.path={trained}"
        )
    selected = load_selected(run, model_dir)
    step = selected.metadata["step"]
    adapter = sha256_of(run / "selected" / WEIGHTS)
    subject = Subject(config.run_id, config.lora.condition, config.seed, f"step-{step}", adapter, found)
    return Target(config, subject, model_dir, selected.spec, selected.lora, run / "evaluation")


def adapter_target(
    config: RunConfig,
    adapter: str,
    out: Path,
    condition: str | None = None,
    seed: int | None = None,
    with_weights: bool = True,
) -> Target:
    """Any PEFT adapter, from a folder or `hf://OWNER/NAME[@REVISION]/PATH`, on the base of `config`.

    Condition, rank and alpha are read from the adapter itself. `condition` and `seed` are what the caller
    says of it; they must not contradict it, and a seed that it does not record must be given.

    Raises:
      UserError: no such adapter, one for another shape of model, or one whose seed is not known.
    """
    model_dir, model = locate_model(config, with_weights)
    folder = fetch_adapter(adapter) if adapter.startswith(HUB_PREFIX) else Path(adapter)
    lora_config, lora, metadata, _ = read_adapter(folder, model)
    if condition not in (None, lora_config.condition):
        raise UserError(f"--condition: {condition}, but {adapter} adapts {lora_config.condition}")
    recorded = metadata["seed"]
    if seed is not None and recorded not in (None, seed):
        raise UserError(f"--seed: {seed}, but {adapter} records seed {recorded}")
    if seed is None and recorded is None:
        raise UserError(f"{adapter}: does not record its seed; name it with --seed")
    seed = recorded if seed is None else seed
    spec = ModelSpec(model, lora_config, config.model.dtype, scan=False)
    step = metadata.get("step")
    checkpoint = Path(adapter).name if step is None else f"step-{step}"
    name = metadata.get("run_id") or f"{config.prefix}-{lora_config.condition}-seed-{seed}"
    subject = Subject(
        name,
        lora_config.condition,
        seed,
        checkpoint,
        adapter_sha256=sha256_of(folder / WEIGHTS),
        base_fingerprint=_fingerprint(config, model_dir, model, with_weights),
    )
    return Target(replace(config, lora=lora_config, seed=seed), subject, model_dir, spec, lora, out)


def fetch_adapter(address: str) -> Path:
    """The local folder of `hf://OWNER/NAME[@REVISION]/PATH`: the three files of an adapter, then cached.

    Raises:
      UserError: the address is not one, or the Hub does not give it.
    """
    parts = address.removeprefix(HUB_PREFIX).strip("/").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{address}: not an adapter on the Hub; write hf://OWNER/NAME/PATH")
    owner, name, inner = parts[0], parts[1], parts[2] if len(parts) == 3 else ""
    name, _, revision = name.partition("@")
    wanted = [str(Path(inner) / file) for file in (WEIGHTS, SETTINGS, METADATA)]

    def missing(folder: Path) -> str:
        found = (folder / inner / WEIGHTS).is_file()
        return "" if found else f"the repository holds no {WEIGHTS} there; name the adapter's folder"

    return fetch_folder(address, f"{owner}/{name}", wanted, missing, revision or None) / inner


def describe(target: Target) -> list[str]:
    """What an evaluation would do, a line each: subject, base, problems, tokens, limits, template."""
    config, subject, lora = target.config, target.subject, target.spec.lora
    tokenizer = load_job_tokenizer(config, target.model_dir, target.spec.config)
    problems, prompts = load_prompts(config, tokenizer)
    (stop,) = end_of_turn(tokenizer)
    mesh = make_mesh(config.mesh)
    adapter = "none: the untouched base"
    if lora is not None:
        adapter = f"{lora.condition}, rank {lora.rank}, alpha {lora.alpha:g}, seed {subject.seed}"
        adapter += f", {subject.checkpoint}, {'merged' if config.eval.merge_adapter else 'not merged'}"
    sample = chat_text(tokenizer, prompt_messages(problems[0].question), generation_prompt=True)
    return [
        f"subject   {subject.run_id}",
        f"adapter   {adapter}",
        f"base      {config.model.path}, {config.model.dtype}",
        f"mesh      {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        f"benchmark {config.eval.benchmark}, {len(problems):,} problems",
        f"prompts   {sum(map(len, prompts)):,} tokens in all, longest {max(map(len, prompts))}",
        f"limits    greedy, at most {config.eval.max_new_tokens} new tokens, stop at token {stop}"
        f" ({tokenizer.decode([stop])}), {config.eval.batch_rows} answers at once",
        f"out       {target.out}",
        "first prompt, as the model sees it:",
        sample,
    ]


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace an evaluation unless asked.

    Raises:
      UserError: `out` holds one, whole or in part.
    """
    if not overwrite and any((out / name).exists() for name in FILES):
        raise UserError(f"{out}: holds an evaluation already; --overwrite replaces it")


def load_target_base(target: Target) -> Tree:
    """The weights of the target's base, on the mesh of its configuration."""
    config, mesh = target.config, make_mesh(target.config.mesh)
    with jax.set_mesh(mesh):
        if target.model_dir is None or config.model.random_weights:
            return random_base(target.spec, config.seed, mesh)
        return load_base(target.model_dir, target.spec, mesh)


def evaluate_target(target: Target, overwrite: bool = False, frozen: Tree | None = None) -> dict[str, Any]:
    """Decode and score the benchmark, write the records to `target.out`.

    Args:
      frozen: the base from `load_target_base`, where several subjects share it; None: load it.

    Returns:
      The summary.
    """
    config, spec = target.config, target.spec
    check_free(target.out, overwrite)
    tokenizer = load_job_tokenizer(config, target.model_dir, target.spec.config)
    frozen = load_target_base(target) if frozen is None else frozen
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        lora = place_trained(mesh, spec, target.lora)
        for name in (
            FILES if hosts.is_main() else ()
        ):  # the summary first: what is left of an interrupted evaluation never looks whole
            (target.out / name).unlink(missing_ok=True)
        return evaluate(config, target.subject, spec, lora, frozen, tokenizer, target.out)


def _check_gates(run: Path, manifest: dict[str, Any], allow_ungated: bool) -> None:
    """A run whose data was not gated may have seen the benchmark."""
    gates = manifest.get("gates") or {}
    if gates.get("passed") is True:
        return
    reason = gates.get("reason") or "its manifest records no passed data gates"
    if not allow_ungated:
        raise UserError(
            f"{run}: trained on ungated data: {reason}; --config.data.allow_ungated=true scores it"
        )
    console.print(f"UNGATED DATA: {reason}", style="bold red", markup=False)


def _fingerprint(
    config: RunConfig,
    model_dir: Path | None,
    model: ModelConfig,
    with_weights: bool,
    recorded: str | None = None,
) -> str | None:
    """What a run on this base records in its manifest; `recorded` where the weights are not here yet."""
    if model_dir is None or config.model.random_weights or with_weights or weight_files(model_dir):
        return base_fingerprint(config, model_dir, model)
    return recorded  # a plan; the weights are compared when they are fetched
