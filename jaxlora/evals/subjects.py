"""What to evaluate: the untouched base, a run's selected adapter, or any PEFT adapter.

    target = run_target(config, Path("results/tiny-all_layer-seed-0"))
    summary = evaluate_target(target)        # writes target.out

Everything is checked before weights are loaded. An adapter whose condition is unknown, or that belongs to
another base, is an error: there is no fallback to the base.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxlora.checkpoints.adapters import other_base, read_adapter
from jaxlora.checkpoints.base import (
    TOKENIZER_FILES,
    Base,
    find_base,
    load_base,
    tokenizer_sha256,
    weights_sha256,
)
from jaxlora.checkpoints.export import load_selected, run_tokenizer
from jaxlora.checkpoints.peft import ADAPTER_FILES, BASE_DTYPE, METADATA, RENDERED_BY, WEIGHTS
from jaxlora.config import ModelSource, RunConfig, from_dict
from jaxlora.data.render import chat_text, prompt_messages
from jaxlora.data.sources import HUB_PREFIX
from jaxlora.evals.run import Subject, check_lengths, evaluate, load_prompts, system_prompt
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.quantised import pick_scheme
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object, sha256_of
from jaxlora.runtime.folders import claimed, enough_room
from jaxlora.runtime.progress import console
from jaxlora.runtime.records import read_manifest
from jaxlora.runtime.remote import fetch_folder
from jaxlora.runtime.text import harmless
from jaxlora.sharding import make_mesh, place_trained

FILES = ("summary.json", "predictions.jsonl", "metrics.jsonl")


@dataclass(frozen=True)
class Target:
    """A checked subject with everything its evaluation needs, except the base's weights."""

    config: RunConfig
    subject: Subject
    base: Base
    spec: ModelSpec
    trained: Tree  # the adapter; `{}` for the base and for a full model, whose weights are read when needed
    out: Path
    model: Path | None = None  # directory of a full model; None: the base's weights are used
    weights_sha256: str | None = None  # of the base, as recorded by a run


def base_target(config: RunConfig, with_weights: bool = True) -> Target:
    """The untouched base of the configuration; results go to `<results>/<prefix>-base/evaluation`."""
    base = find_base(config.model, config.seed, with_weights)
    name = f"{config.prefix}-base"
    spec = ModelSpec(base.config, None, config.model.dtype, scan=False, scheme=pick_scheme(config.model))
    subject = Subject(name, base_fingerprint=_fingerprint(base))
    return Target(config, subject, base, spec, {}, Path(config.results_dir) / name / "evaluation")


def run_config(config: RunConfig, run: Path) -> RunConfig:
    """The run's own configuration from its manifest, with evaluation, mesh and the base's path from `config`.

    The tokenizer is the run's own too, unless `config` names one.
    """
    manifest = read_manifest(run)
    if manifest.get("config") is None:
        raise UserError(f"{run / 'manifest.json'}: has no config; this is not a run directory")
    own = from_dict(manifest["config"])
    tokenizer = config.model.tokenizer or run_tokenizer(run, own.model.tokenizer)
    model = replace(own.model, path=config.model.path, tokenizer=tokenizer)
    return replace(own, model=model, eval=config.eval, mesh=config.mesh, data=config.data)


def run_target(config: RunConfig, run: Path, with_weights: bool = True) -> Target:
    """The weights selected by a finished run; results go to `<run>/evaluation`.

    Model, dtype and what was trained are the run's own, as recorded in its manifest. Only the paths of the
    base and its tokenizer come from `config`, because they may have moved; the base's files must be the same.

    Raises:
      UserError: the run is unfinished or inconsistent, its data was not gated, or the base is a different
        one.
    """
    config = run_config(config, run)
    base = find_base(config.model, config.seed, with_weights)
    manifest = read_manifest(run)
    if config.eval.rule is None:  # gates only concern benchmarks
        _check_gates(run, manifest, config.data.allow_ungated)
    recorded = (manifest.get("base") or {}).get("fingerprint")
    found = _fingerprint(base) or recorded  # for a plan, the weights are compared when they are fetched
    if recorded != found:
        trained = (manifest.get("base") or {}).get("path")
        raise UserError(
            f"{run}: was trained on a different base than {config.model.path!r} (their files differ);"
            f" give --config.model.path={trained}"
        )
    selected = load_selected(run, base.folder)
    _check_tokenizer(str(run), base, selected.metadata.get(RENDERED_BY))
    step = selected.metadata["step"]
    trained = weights_sha256(run / "selected")
    subject = Subject(config.run_id, config.condition, config.seed, f"step-{step}", trained, found)
    model = run / "selected" if selected.spec.full else None
    spec = replace(selected.spec, full=False)
    weights = None if base.is_drawn else selected.weights_sha256
    return Target(config, subject, base, spec, selected.lora, run / "evaluation", model, weights)


def adapter_target(
    config: RunConfig,
    adapter: str,
    out: Path,
    condition: str | None = None,
    seed: int | None = None,
    with_weights: bool = True,
    any_base: bool = False,
) -> Target:
    """Any PEFT adapter, from a folder or `hf://OWNER/NAME[@REVISION]/PATH`, on the base of `config`.

    Condition, rank and alpha are read from the adapter itself. `condition` and `seed` are the caller's claims
    and must not contradict it. If neither states a seed, it is unknown, and null in the records. The
    tokenizer is the one next to the adapter, if there is one and `config` names none.

    Args:
      any_base: accept the adapter even if it names another base.

    Raises:
      UserError: no such adapter, or one for another base.
    """
    folder = adapter_folder(adapter)
    config = replace(config, model=with_own_base_dtype(with_own_tokenizer(config.model, folder), folder))
    base = find_base(config.model, config.seed, with_weights)
    lora_config, lora, metadata, shapes = read_adapter(folder, base.config, base.folder)
    if not any_base and (reason := other_base(metadata, base)):
        raise UserError(f"{adapter}: {reason}; --any-base uses it anyway")
    _check_tokenizer(adapter, base, metadata.get(RENDERED_BY))
    if condition not in (None, lora_config.condition):
        raise UserError(f"--condition: {condition}, but {adapter} adapts {lora_config.condition}")
    recorded = metadata["seed"]
    if seed is not None and recorded not in (None, seed):
        raise UserError(f"--seed: {seed}, but {adapter} records seed {recorded}")
    seed = recorded if seed is None else seed
    scheme = pick_scheme(config.model)
    spec = ModelSpec(base.config, lora_config, config.model.dtype, scan=False, shapes=shapes, scheme=scheme)
    step = metadata.get("step")
    checkpoint = Path(adapter).name if step is None else f"step-{step}"
    whose = Path(adapter).name if seed is None else f"seed-{seed}"
    name = metadata.get("run_id") or f"{config.prefix}-{lora_config.condition}-{whose}"
    subject = Subject(
        name,
        lora_config.condition,
        seed,
        checkpoint,
        adapter_sha256=sha256_of(folder / WEIGHTS),
        base_fingerprint=_fingerprint(base),
    )
    own = replace(config, lora=lora_config, seed=config.seed if seed is None else seed)
    return Target(own, subject, base, spec, lora, out)


def with_own_tokenizer(source: ModelSource, adapter: Path) -> ModelSource:
    """Use the tokenizer next to an adapter, if there is one and no other is named."""
    named = source.tokenizer is not None or not (adapter / "tokenizer_config.json").is_file()
    return source if named else replace(source, tokenizer=str(adapter))


def with_own_base_dtype(source: ModelSource, adapter: Path) -> ModelSource:
    """Round the base as it was when the adapter was trained, if that is recorded and not overridden."""
    file = adapter / METADATA
    own = read_object(file).get(BASE_DTYPE) if source.base_dtype is None and file.is_file() else None
    return source if own is None else from_dict({"model": asdict(source) | {BASE_DTYPE: own}}).model


def adapter_folder(address: str) -> Path:
    """The local folder of an adapter.

    For `hf://OWNER/NAME[@REVISION]/PATH`, the adapter's three files and those of its tokenizer, if it has
    one, are fetched and then cached.

    Raises:
      UserError: the address is malformed, or the Hub does not provide it.
    """
    if not address.startswith(HUB_PREFIX):
        return Path(address)
    parts = address.removeprefix(HUB_PREFIX).strip("/").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{address}: not an adapter on the Hub; write hf://OWNER/NAME/PATH")
    owner, name, inner = parts[0], parts[1], parts[2] if len(parts) == 3 else ""
    name, _, revision = name.partition("@")
    wanted = [str(Path(inner) / file) for file in (*ADAPTER_FILES, *TOKENIZER_FILES)]

    def missing(folder: Path) -> str:
        found = (folder / inner / WEIGHTS).is_file()
        return "" if found else f"the repository holds no {WEIGHTS} there; name the adapter's folder"

    return fetch_folder(address, f"{owner}/{name}", wanted, missing, revision or None) / inner


def describe(target: Target) -> list[str]:
    """Describe an evaluation, one line each: subject, base, problems, tokens, limits, template."""
    config, subject, lora = target.config, target.subject, target.spec.lora
    tokenizer = target.base.tokenizer()
    problems, prompts = load_prompts(config, tokenizer)
    stops = ", ".join(
        f"{stop} ({harmless(str(tokenizer.decode([stop])))})" for stop in target.base.stop_ids(tokenizer)
    )
    check_lengths(config, target.base, prompts)
    mesh = make_mesh(config.mesh)
    adapter = "none: the untouched base" if target.model is None else f"none: all weights, {target.model}"
    if lora is not None:
        adapter = f"{lora.condition}, rank {lora.rank}, alpha {lora.alpha:g}, seed {subject.seed}"
        adapter += f", {subject.checkpoint}, {'merged' if config.eval.merge_adapter else 'not merged'}"
    messages = prompt_messages(problems[0].question, system_prompt(config))
    sample = chat_text(tokenizer, messages, generation_prompt=True)
    return [
        f"subject   {subject.run_id}",
        f"adapter   {adapter}",
        f"base      {config.model.path}, {config.model.dtype}",
        f"tokenizer {config.model.tokenizer or config.model.path}",
        f"mesh      {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}",
        f"benchmark {config.eval.benchmark}, {len(problems):,} problems, {_scored(config)}",
        f"prompts   {sum(map(len, prompts)):,} tokens in all, longest {max(map(len, prompts))}",
        f"limits    greedy, at most {config.eval.max_new_tokens} new tokens, stop at token {stops},"
        f" {config.eval.batch_rows} answers at once",
        f"out       {target.out}",
        "first prompt, as the model sees it:",
        harmless(sample),
    ]


def _scored(config: RunConfig) -> str:
    return "GSM8K's score" if config.eval.rule is None else f"rule {config.eval.rule}"


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace an evaluation unless asked to.

    Raises:
      UserError: `out` already holds one, complete or partial.
    """
    if not overwrite and any((out / name).exists() for name in FILES):
        raise UserError(
            f"{out}: already holds an evaluation; give another --out, or --overwrite to replace it"
        )


def load_target_base(target: Target) -> Tree:
    """The weights of the target's base, on the configured mesh."""
    mesh = make_mesh(target.config.mesh)
    with jax.set_mesh(mesh):
        return target.base.load(target.spec, mesh, target.weights_sha256)


def evaluate_target(target: Target, overwrite: bool = False, frozen: Tree | None = None) -> dict[str, Any]:
    """Decode and score the benchmark, and write the records to `target.out`.

    Args:
      frozen: the base from `load_target_base`, if several subjects share it; None: load it.

    Returns:
      The summary.
    """
    config, spec = target.config, target.spec
    tokenizer = target.base.tokenizer()
    check_lengths(config, target.base, load_prompts(config, tokenizer)[1])
    mesh = make_mesh(config.mesh)
    with enough_room(target.out), claimed(target.out) if hosts.is_main() else nullcontext():
        check_free(target.out, overwrite)
        if target.model is not None:
            with jax.set_mesh(mesh):
                frozen = load_base(target.model, spec, mesh)
        frozen = load_target_base(target) if frozen is None else frozen
        with jax.set_mesh(mesh):
            trained = place_trained(mesh, spec, target.trained)
            return evaluate(config, target.subject, spec, trained, frozen, target.base, target.out, tokenizer)


def _check_tokenizer(what: str, base: Base, recorded: str | None) -> None:
    """Refuse a template other than that of training, whose effect the answers would not reflect."""
    if recorded is not None and tokenizer_sha256(base.tokenizer()) != recorded:
        named = base.source.tokenizer or base.source.path
        raise UserError(
            f"{what}: was trained with a different tokenizer or chat template than {named!r}; give"
            " --config.model.tokenizer"
        )


def _check_gates(run: Path, manifest: dict[str, Any], allow_ungated: bool) -> None:
    """Refuse a run on ungated data, which may have contained the benchmark, unless `allow_ungated`."""
    gates = manifest.get("gates") or {}
    if gates.get("passed") is True:
        return
    reason = gates.get("reason") or "its manifest records no passed data gates"
    if manifest.get("kind") == "rl":  # gates concern rows with an answer to imitate
        reason = "rl.problems are not compared with benchmarks"
    if not allow_ungated:
        raise UserError(
            f"{run}: trained on ungated data: {reason}; --config.data.allow_ungated=true scores it;"
            " questions of your own need no gates: give --rule"
        )
    console.print(f"UNGATED DATA: {reason}", style="bold red", markup=False)


def _fingerprint(base: Base) -> str | None:
    """The fingerprint that a run on this base records; None if its weights have not been fetched (a plan)."""
    return base.fingerprint() if base.has_weights else None
