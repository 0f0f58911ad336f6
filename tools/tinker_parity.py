"""Parity with Tinker: record a service's results, replay them here, compare a run with the study.

    python tools/tinker_parity.py install-server                # the local service that the live tests start
    python tools/tinker_parity.py record --out parity.json      # drive the service of TINKER_BASE_URL
    python tools/tinker_parity.py compare parity.json           # replay a recording in jaxlora
    python tools/tinker_parity.py study --run DIR               # a finished run beside the study's figures
    python tools/tinker_parity.py study --published --config configs/main.py --out DIR

Each command has its own --help. `compare` and `study` exit with code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxlora.runtime.errors import UserError, run_main
from jaxlora.runtime.progress import make_console


def install_server(words: list[str]) -> int:
    """Create the environment of the local Tinker server: a virtual environment with pinned packages, 2 GB."""
    from jaxlora.parity.server import install_server as install
    from jaxlora.parity.server import server_folder

    parser = _parser("install-server", install_server)
    parser.parse_args(words)
    install()
    print(server_folder())
    return 0


def _record_parser() -> argparse.ArgumentParser:
    parser = _parser("record", record)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="file for the recording; adapters are written beside it",
    )
    parser.add_argument(
        "--base", default="Qwen/Qwen3-8B", help="the service's name for the base (default: %(default)s)"
    )
    parser.add_argument("--base-label", help="name of the base in the recording (default: --base)")
    parser.add_argument(
        "--tokenizer",
        default="Qwen/Qwen3-8B",
        help="directory or Hub name of the tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", default="embedded:data/train.jsonl", help="rendered rows, JSONL (default: %(default)s)"
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        default=["all_layer"],
        help="adapter placements to record (default: all_layer)",
    )
    parser.add_argument(
        "--policy",
        action="store_true",
        help="record policy gradients (importance_sampling, ppo) on sampled answers instead of likelihood",
    )
    parser.add_argument(
        "--reduction",
        choices=["sum", "sequence_mean", "length_mean"],
        default="sum",
        help="the service's loss: sum over tokens (Tinker) or mean of the rows' means (SkyRL); with --policy,"
        " length_mean divides by all tokens of a row (default: sum)",
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1e-3,
        help="peak learning rate; with --policy, the rate of every step",
    )
    parser.add_argument("--seconds", type=float, default=300, help="time limit per call (default: 300)")
    return parser


def record(words: list[str]) -> int:
    """Drive a Tinker service and write a recording.

    The service is the hosted one, or the one at TINKER_BASE_URL; TINKER_API_KEY must be set. Neither is
    printed or recorded.
    """
    options = _record_parser().parse_args(words)

    from jaxlora.checkpoints.base import end_of_turn
    from jaxlora.data.render import load_tokenizer
    from jaxlora.data.rows import load_rendered_rows
    from jaxlora.parity.policy import PolicySettings, record_policy
    from jaxlora.parity.recording import choose_rows, make_settings, prompts_of
    from jaxlora.parity.recording import record as run
    from jaxlora.parity.tinker_service import TinkerBackend

    settings = make_settings(
        conditions=options.conditions,
        reduction=options.reduction,
        rank=options.rank,
        seed=options.seed,
        steps=options.steps,
        peak_lr=options.learning_rate,
    )
    backend = TinkerBackend(options.base, options.seconds)
    tokenizer = load_tokenizer(options.tokenizer)
    limit = 100 * settings.n_rows
    rows, _ = load_rendered_rows(options.rows, tokenizer, max_length=4096, on_bad_row="skip", limit=limit)
    if (stop := end_of_turn(tokenizer)) is None:
        raise UserError(f"{options.tokenizer}: its chat template writes no token after an answer")
    label = options.base_label or options.base
    if options.policy:
        policy = PolicySettings(
            condition=settings.conditions[0],
            reduction=settings.reduction,
            rank=settings.rank,
            seed=settings.seed,
            steps=settings.steps,
            learning_rate=settings.peak_lr,
        )
        prompts = prompts_of(choose_rows(rows, settings), settings)
        record_policy(backend, prompts, policy, options.out, label, stop)
    else:
        run(backend, rows, settings, options.out, label, stop)
    print(options.out)
    return 0


def compare(words: list[str]) -> int:
    """Replay a recording in jaxlora and print every difference with its bar, and pass or fail."""
    parser = _parser("compare", compare)
    parser.add_argument("recording", type=Path, metavar="FILE")
    parser.add_argument("--base", help="directory or Hub name of the base (default: the recorded name)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the replay, on which the tolerances depend (default: float32)",
    )
    options = parser.parse_args(words)

    from jaxlora.checkpoints.base import find_base
    from jaxlora.config import ModelSource
    from jaxlora.parity.comparing import compare as replay
    from jaxlora.parity.comparing import table
    from jaxlora.parity.policy import compare_policy, is_policy, load_policy
    from jaxlora.parity.recording import load_recording

    of_policy = load_policy(options.recording) if is_policy(options.recording) else None
    recording = of_policy.recording if of_policy else load_recording(options.recording)
    source = ModelSource(path=options.base or recording.base)
    try:
        model_dir = find_base(source).folder
    except UserError as error:
        raise UserError(str(error).replace("config.model.path", "--base")) from None
    assert model_dir is not None
    if of_policy:
        checks = compare_policy(of_policy, model_dir, options.dtype)
    else:
        checks = replay(recording, model_dir, options.dtype)
    trainer = ", ".join(f"{name} {value}" for name, value in recording.trainer.items())
    title = f"{options.recording.name} ({trainer}) replayed in {options.dtype}"
    make_console(stderr=False).print(table(checks, title))
    failed = [check for check in checks if not check.passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks pass")
    return 1 if failed else 0


def study(words: list[str]) -> int:
    """Compare a finished run, or the study's published adapters evaluated here, with the study's figures."""
    parser = _parser("study", study)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--run", type=Path, metavar="DIR", help="a finished training run, or a learning-rate trial"
    )
    subject.add_argument(
        "--published",
        action="store_true",
        help="evaluate the six published adapters and the base; needs --config and --out (see"
        " `study --published --help`)",
    )
    if "--published" not in words:
        options = parser.parse_args(words)
        from jaxlora.parity.study import compare_run

        return _report(compare_run(options.run), options.run.name)

    from jaxlora.cli import parse_config
    from jaxlora.parity import study_figures

    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the evaluations")
    parser.add_argument(
        "--adapters",
        default=study_figures.ADAPTERS,
        help="folder or hf:// path of the adapters (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="repeat the evaluations already in --out")
    config, options = parse_config(parser, words)
    from jaxlora.parity.published import evaluate_published
    from jaxlora.runtime.devices import setup

    setup(config.results_dir, config.model.dtype)
    points = evaluate_published(config, options.out, options.adapters, options.overwrite)
    return _report(points, "the study's published adapters, evaluated here")


def _report(points, title: str) -> int:
    from jaxlora.parity.study import agrees, table, verdict

    make_console(stderr=False).print(table(points, title))
    print(verdict(points))
    return 0 if agrees(points) else 1


def _parser(name: str, command) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        f"tinker_parity.py {name}",
        description=command.__doc__,
        formatter_class=formatter,
        allow_abbrev=False,  # `study` checks for --published itself
    )


COMMANDS = {"install-server": install_server, "record": record, "compare": compare, "study": study}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    if sys.argv[1] not in COMMANDS:
        raise UserError(f"unknown command {sys.argv[1]!r}; one of {', '.join(COMMANDS)}")
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    run_main(main)
