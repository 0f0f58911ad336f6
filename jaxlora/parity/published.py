"""Evaluate the study's published adapters and its base, and compare with the study's own results.

    points = evaluate_published(config, Path("published"))

Nothing is trained: with an accelerator for an 8B model you can check 1193, 1196, 1194 and 1186, 1190, 1189.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jaxlora.config import RunConfig
from jaxlora.evals.run import show
from jaxlora.evals.subjects import Target, adapter_target, base_target, evaluate_target, load_target_base
from jaxlora.parity import study_figures as study
from jaxlora.parity.study import Point, evaluation_points
from jaxlora.runtime.files import read_json
from jaxlora.runtime.progress import console


def published_subjects(root: str) -> list[tuple[str, str | None, int | None, str | None]]:
    """Name, condition, seed and adapter of the base and of the six adapters below `root`."""
    adapters = [
        (
            f"{condition} seed {seed}",
            condition,
            seed,
            f"{root}/{condition}/seed-{seed}/step-{study.SELECTED_STEP}",
        )
        for condition in study.CONDITIONS
        for seed in study.SEEDS
    ]
    return [("base", None, None, None), *adapters]


def evaluate_published(
    config: RunConfig, out: Path, root: str = study.ADAPTERS, overwrite: bool = False
) -> list[Point]:
    """Evaluate what has not been evaluated yet, all on one loaded base, and return every point of comparison.

    Args:
      out: gets one folder per subject; finished ones are read, not run again, unless `overwrite`.
      root: where the adapters are: `<root>/<condition>/seed-<seed>/step-3169`, on the Hub or a local folder.

    Raises:
      UserError: an adapter is missing, or does not have the condition that its folder says.
    """
    subjects = published_subjects(root)
    folders = {name: out / name.replace(" ", "-") for name, *_ in subjects}
    # All targets before the first evaluation, so that a missing adapter is reported at once, not after the
    # base.
    targets = {
        name: _target(config, folders[name], condition, seed, adapter)
        for name, condition, seed, adapter in subjects
        if overwrite or not (folders[name] / "summary.json").is_file()
    }
    frozen = None
    summaries, points = [], []
    for name, condition, seed, _ in subjects:
        folder = folders[name]
        if name in targets:
            if frozen is None:
                frozen = load_target_base(targets[name])
            evaluate_target(targets[name], overwrite, frozen)
        summary = read_json(folder / "summary.json")
        summaries.append(summary)
        points += evaluation_points(folder, condition, name, seed)
        console.print(f"{name}: done, {folder}", markup=False)
    show(summaries)
    return points


def _target(
    config: RunConfig, folder: Path, condition: str | None, seed: int | None, adapter: str | None
) -> Target:
    if adapter is None:
        return replace(base_target(config), out=folder)
    return adapter_target(config, adapter, folder, condition, seed)
