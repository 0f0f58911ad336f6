"""The selected weights of a finished run, checked against its records, and ways to export them.

selected = load_selected("results/qwen3-8b-all_layer-seed-0")
write_adapter(selected, "adapter")      # a PEFT folder
write_merged(selected, "merged")        # a full checkpoint with the adapter merged
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import (
    TOKENIZER_FILES,
    Base,
    find_base,
    fingerprint,
    load_base,
    save_model,
    tokenizer_sha256,
)
from jaxlora.checkpoints.peft import (
    FINGERPRINT,
    METADATA,
    RENDERED_BY,
    SETTINGS,
    WEIGHTS,
    export_adapter,
)
from jaxlora.checkpoints.tensors import open_tensors
from jaxlora.config import MeshConfig, RunConfig, from_dict
from jaxlora.lora import check_mergeable, count_trainable, merge_lora
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import count_parameters
from jaxlora.models.quantised import dequantised, pick_scheme
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object, sha256_of
from jaxlora.runtime.progress import console
from jaxlora.runtime.records import read_manifest, read_summary
from jaxlora.runtime.remote import weight_files
from jaxlora.sharding import make_mesh


@dataclass(frozen=True)
class Selected:
    """The selected weights of a run, and the base that they belong to."""

    run: Path
    config: RunConfig
    base: Base
    fingerprint: str | None  # of the base used in training; None: not recorded
    spec: ModelSpec
    lora: Tree  # the adapter; `{}` for a full model, whose weights are in `<run>/selected`
    metadata: dict[str, Any]
    weights_sha256: str | None = None  # of that base; None: not recorded

    def tokenizer_folder(self) -> Path | None:
        """The files of the tokenizer and template that rendered the run's rows; None if there are none.

        Raises:
          UserError: the present files are not those that rendered them.
        """
        folder = self.base.tokenizer_folder()
        if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        if self.metadata.get(RENDERED_BY) not in (None, tokenizer_sha256(folder)):
            raise UserError(
                f"{self.run}: its rows were rendered with a different tokenizer or chat template than"
                f" {folder}; give --tokenizer"
            )
        return folder


def load_selected(
    run: str | Path,
    base: str | Path | None = None,
    with_weights: bool = False,
    tokenizer: str | Path | None = None,
) -> Selected:
    """Read `<run>/selected` and check it against the run's manifest and summary.

    Args:
      run: the run's directory.
      base: directory of the base; None: the one recorded by the run.
      with_weights: also make sure that the base's weights are available (a Hub model is fetched).
      tokenizer: the present location of the run's tokenizer; None: as recorded by the run.

    Raises:
      UserError: the run is not finished, or its parts contradict each other.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory")
    manifest = read_manifest(folder)
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder}: is not finished (no summary.json); resume it with its own command")
    summary = read_summary(folder)
    if manifest.get("config") is None:
        raise UserError(f"{folder / 'manifest.json'}: has no config; this is not a run directory")
    status = summary.get("status")
    if status != "completed":
        raise UserError(
            f"{folder}: status is {status!r}; finish the run first (resume it with its own command)"
        )
    config = from_dict(manifest["config"])
    named = run_tokenizer(folder, config.model.tokenizer) if tokenizer is None else str(tokenizer)
    source = replace(config.model, tokenizer=named)
    source = source if base is None else replace(source, path=str(base))
    found = find_base(source, config.seed, with_weights)
    trained_on = manifest.get("base") or {}
    known = trained_on.get("fingerprint"), summary.get("base_weights_sha256")
    spec = ModelSpec(found.config, None, config.model.dtype, scan=False, scheme=pick_scheme(config.model))
    selected = folder / "selected"
    check_selected(folder)
    if config.train.what == "full":
        metadata = {"run_id": config.run_id, "step": summary.get("selected_step")}
        metadata[RENDERED_BY] = rendered_by(manifest)
        return Selected(folder, config, found, known[0], replace(spec, full=True), {}, metadata, known[1])
    adapter = read_adapter(selected, found.config, found.folder)
    for name, given, expected in (
        ("the placement", adapter.lora, replace(config.lora, start=None, dropout=0.0)),
        ("the seed", adapter.metadata["seed"], config.seed),
        ("the run id", adapter.metadata.get("run_id"), config.run_id),
        ("the step", adapter.metadata.get("step"), summary.get("selected_step")),
    ):
        if given != expected:
            raise UserError(f"{selected}: {name} is {given}, but the run's own record says {expected}")
    spec = replace(spec, lora=adapter.lora, shapes=adapter.shapes)
    metadata = adapter.metadata
    if metadata.get(RENDERED_BY) is None:
        metadata[RENDERED_BY] = rendered_by(manifest)
    return Selected(folder, config, found, known[0], spec, adapter.tree, metadata, known[1])


def check_selected(run: Path) -> None:
    """Verify the selected files of a finished run before they are read.

    Raises:
      UserError: a file is missing, or does not match its hash in the run's summary.
    """
    for name, expected in (read_summary(run).get("sha256") or {}).items():
        if not name.startswith("selected/"):
            continue
        file = run / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; restore it, or train this run again")
        if sha256_of(file) != expected:
            raise UserError(
                f"{file}: is not what the run wrote (its SHA-256 differs from the one in summary.json);"
                " restore an intact copy, or train this run again"
            )


def rendered_by(manifest: dict[str, Any]) -> str | None:
    """The hash of the tokenizer and template of a run's rows; None if its manifest does not record it."""
    recorded = manifest.get("tokenizer")
    return recorded.get("sha256") if isinstance(recorded, dict) else None


def run_tokenizer(run: Path, named: str | None) -> str | None:
    """The tokenizer of a run, in the form of `config.model.tokenizer`: the copy beside its weights or, if
    there is none, the one used in training."""
    shipped = run / "selected"
    return str(shipped) if (shipped / "tokenizer_config.json").is_file() else named


def adapter_bytes(selected: Selected) -> int:
    """Bytes of the adapter's values, in float32."""
    return 4 * count_trainable(selected.spec)


def merged_bytes(selected: Selected) -> int:
    """Bytes of the merged checkpoint's values, in the dtype of the base's files."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}
    return width[_stored_dtype(_base(selected))] * count_parameters(selected.spec.config)


def is_exported(selected: Selected, out: Path, base_name: str) -> bool:
    """Whether a folder holds exactly this adapter: an export stopped after writing it resumes from there."""
    if selected.spec.full or not (out / SETTINGS).is_file():
        return False
    named = read_object(out / SETTINGS).get("base_model_name_or_path")
    return named == base_name and unlike(selected.run / "selected", out) in (None, SETTINGS)


def unlike(own: Path, out: Path) -> str | None:
    """The first file of the adapter in `out` that differs from the one in `own`; None if all are equal."""
    for name in (WEIGHTS, METADATA, SETTINGS):
        if not (out / name).is_file() or sha256_of(out / name) != sha256_of(own / name):
            return name
    return None


def write_adapter(
    selected: Selected,
    out: str | Path,
    overwrite: bool = False,
    base_name: str | None = None,
    readme: str | None = None,
) -> None:
    """Write the adapter as a PEFT folder; see `export_adapter`.

    Args:
      base_name: the name to record for the base; None: the name used by the run.

    Raises:
      UserError: the run trained all weights, so there is no adapter.
    """
    if selected.spec.full:
        raise UserError(f"{selected.run}: trained all weights; its model is in {selected.run / 'selected'}")
    given = ("condition", "output_head", "rank", "alpha", "seed", "base_model", RENDERED_BY)
    extra = {key: value for key, value in selected.metadata.items() if key not in given}
    base = base_name or selected.metadata["base_model"] or selected.config.model.path
    if FINGERPRINT not in extra and selected.fingerprint is not None:
        extra[FINGERPRINT] = selected.fingerprint
    export_adapter(
        out,
        selected.spec,
        selected.lora,
        base,
        seed=selected.config.seed,
        extra=extra,
        tokenizer=selected.tokenizer_folder(),
        readme=readme,
        overwrite=overwrite,
    )


def write_merged(selected: Selected, out: str | Path, readme: str | None = None) -> None:
    """Write the base with the adapter merged, in the dtype of the base's files; see `save_model`.

    The base is loaded unrolled to the first device, and each matrix is merged separately in float32. An
    adapter trained on a quantised base is merged with the dequantised weights: with the original ones, the
    result would not be the trained model. For a run that trained all weights, its model is written.
    """
    check_mergeable(selected.spec)
    base = _base(selected)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    tokenizer = selected.tokenizer_folder()
    if selected.spec.full:
        spec = replace(selected.spec, full=False)
        weights = load_base(selected.run / "selected", spec, mesh)
    else:
        dtype, scheme = _stored_dtype(base), selected.spec.scheme
        # Weights to be quantised are first read in the same dtype as in training.
        spec = replace(selected.spec, dtype=dtype) if scheme is None else selected.spec
        frozen = selected.base.load(spec, mesh, selected.weights_sha256)
        spec = replace(spec, dtype=dtype)
        if scheme is not None:
            console.print(f"merging with the base as used in training, rounded to {scheme.kind}")
        weights = dequantised(merge_lora(spec, selected.lora, frozen), dtype)
        spec = replace(spec, scheme=None)
    console.print(f"writing {out}", markup=False)
    save_model(out, spec, weights, base, tokenizer, readme)


def _base(selected: Selected) -> Path:
    """The base to merge with, after checking that it is the one used in training."""
    folder = selected.base.folder
    if folder is None or (selected.fingerprint or "").startswith("random-"):
        raise UserError(f"{selected.run}: trained on random weights, so there is nothing to merge with")
    if selected.fingerprint not in (None, fingerprint(folder)):
        raise UserError(f"{folder}: not the base of this run (its files differ); give --base")
    return folder


def _stored_dtype(base: Path) -> str:
    """Dtype of the matrices in a Hugging Face directory."""
    if not weight_files(base):
        raise UserError(f"{base}: its weights are missing, and merging needs them")
    found = {tensor.dtype.name for tensor in open_tensors(base).values() if len(tensor.shape) == 2}
    if len(found) != 1:
        raise UserError(
            f"{base}: has matrices in {' and '.join(sorted(found))}; merging needs a single dtype"
        )
    return found.pop()
