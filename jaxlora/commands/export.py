"""Export a run's selected weights: a PEFT adapter and optionally a merged checkpoint, or a full model.

Each folder includes the tokenizer, its template and a model card generated from the run's records.

jaxlora export --run results/qwen3-8b-all_layer-seed-0 --out adapter
jaxlora export --run results/qwen3-8b-all_layer-seed-0 --out adapter --merged merged
jaxlora export --run results/qwen3-8b-all_layer-seed-0 --out adapter --license apache-2.0 --push OWNER/NAME
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlora.cli import HelpFormatter
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import claimed, enough_room

if TYPE_CHECKING:
    from jaxlora.checkpoints.export import Selected


def main() -> None:
    options = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # works in host memory, so the accelerator stays free
    from jaxlora.checkpoints.base import refuse_existing
    from jaxlora.checkpoints.card import base_name, model_card
    from jaxlora.checkpoints.export import is_exported, load_selected, write_adapter, write_merged
    from jaxlora.runtime.remote import is_hub_name

    with_weights = options.merged is not None and not options.dry_run
    selected = load_selected(options.run, options.base, with_weights, options.tokenizer)
    if selected.spec.lora is None and options.merged:
        raise UserError("--merged: this run trained all weights; give --out alone for its model")
    # If an export with --merged was stopped halfway, the adapter already exists.
    name = base_name(selected, options.base_name)
    kept = options.merged is not None and is_exported(selected, options.out, name)
    if not options.overwrite and not kept:
        refuse_existing(options.out)
    full = selected.spec.lora is None
    card = model_card(selected, "model" if full else "adapter", name, options.license)
    if not is_hub_name(name):
        print(
            f"base      {name}: others cannot load it from there; give its Hub name with"
            " --base-name OWNER/NAME"
        )
        if options.push:
            raise UserError("--push: the base has no name on the Hub; give --base-name OWNER/NAME")
    describe(selected, options.out, options.merged)
    hub = None
    if options.push:
        from jaxlora.checkpoints.push import open_hub

        hub = open_hub(options.push, options.public)
    if options.dry_run:
        print("dry run: nothing was written")
        return
    with enough_room(options.out):
        if full:
            write_merged(selected, options.out, card)
        elif kept:
            with claimed(options.out):
                pass  # removes leftovers of the stopped export
        else:
            write_adapter(selected, options.out, options.overwrite, name, card)
    if options.merged:
        with enough_room(options.merged):
            write_merged(selected, options.merged, model_card(selected, "merged", name, options.license))
    if hub is not None:
        from jaxlora.checkpoints.push import push_folder

        pushed = push_folder(hub, options.merged or options.out)
        print(f"pushed    {pushed}, {'public' if hub.public else 'private'}")


def parse() -> argparse.Namespace:
    """The options, checked against each other and against what is on disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="directory of a finished run")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="ADAPTER_DIR",
        help="folder to write adapter_model.safetensors and adapter_config.json to, for PEFT and vLLM",
    )
    parser.add_argument(
        "--merged",
        type=Path,
        metavar="OUT",
        help="also write a merged checkpoint: W + (alpha / r) B A, summed in float32, in the base's dtype",
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="directory of the base (default: the run's)")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="the run's tokenizer, if it has moved (default: as recorded in the run)",
    )
    parser.add_argument(
        "--base-name",
        metavar="OWNER/NAME",
        help="name of the base on the Hub (default: determined from the run)",
    )
    parser.add_argument(
        "--license", metavar="NAME", help="licence in the model card, as the Hub names it [unknown]"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload --merged, or else --out, to the Hugging Face Hub, privately",
    )
    parser.add_argument("--public", action="store_true", help="with --push: make the repository public")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter in --out")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the plan and stop; nothing is written"
    )
    options = parser.parse_args()

    if options.public and not options.push:
        raise UserError("--public needs --push")
    if options.merged and options.merged.resolve() == options.out.resolve():
        raise UserError(f"--merged {options.merged}: is the same as --out; give two folders")
    new = options.merged or (None if options.overwrite else options.out)
    if new is not None and new.exists():
        raise UserError(f"{new}: exists already; give a new folder")
    return options


def describe(selected: Selected, out: Path, merged: Path | None) -> None:
    """Print what would be written, and where."""
    from jaxlora.checkpoints.export import adapter_bytes, merged_bytes

    lora = selected.spec.lora
    print(f"run       {selected.config.run_id}, step {selected.metadata.get('step', 'not recorded')}")
    if lora is None:
        print(f"model     all weights, seed {selected.config.seed}")
        print(f"out       {out}, {merged_bytes(selected) / 1e9:.2f} GB")
    else:
        what = f"{lora.condition}, rank {lora.rank}, alpha {lora.alpha:g}"
        print(f"adapter   {what}, seed {selected.config.seed}")
        print(f"out       {out}, {adapter_bytes(selected) / 1e6:.1f} MB")
    if merged:
        size = merged_bytes(selected) / 1e9
        print(f"merged    {merged}, {size:.2f} GB; needs about {2 * size:.1f} GB of host memory")
    if (tokenizer := selected.tokenizer_folder()) is not None:
        print(f"tokenizer {tokenizer}")
