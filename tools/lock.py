"""Write the lock files: every package with its version and hashes, for Python 3.11 and 3.12.

python tools/lock.py                # needs `pip install uv`; keeps versions that still fit
python tools/lock.py --upgrade      # newest versions
python tools/lock.py --check        # offline: do the files still match pyproject.toml?

requirements.lock is for development and tests, launch/tpu.lock and launch/cuda.lock are for accelerators:

    pip install --require-hashes -r launch/tpu.lock && pip install --no-deps -e .

launch/rl.lock holds what graders need, in the versions of requirements.lock, and is installed in addition to
another lock file. Three of its packages are compiled at installation.

To find advisories for locked versions, `pip-audit` asks PyPI, with about one request per file, for the Python
that it runs under; without `--strict` it skips packages for which it gets no answer:

    pip-audit --strict --disable-pip --require-hashes -r requirements.lock
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from jaxlora.runtime.errors import UserError, run_main

ROOT = Path(__file__).resolve().parent.parent
# file: extra. Files in BESIDE take the versions of the first one.
LOCKS = {
    "requirements.lock": "test",
    "launch/tpu.lock": "tpu",
    "launch/cuda.lock": "cuda",
    "launch/rl.lock": "rl",
}
BESIDE = ("launch/rl.lock",)
PYTHONS = ("3.11", "3.12")
# The newest versions that this package has been run with.
TESTED = ("jax==0.11.2 ; python_version >= '3.12'", "flax==0.12.10 ; python_version >= '3.12'")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="upgrade to the newest versions")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; list what does not match pyproject.toml"
    )
    options = parser.parse_args()
    if not options.check:
        for name, extra in LOCKS.items():
            write(ROOT / name, extra, options.upgrade)
    faults = [fault for name, extra in LOCKS.items() for fault in check(ROOT / name, extra)]
    if faults:
        raise UserError(f"{'; '.join(faults)}; run python tools/lock.py")
    print(f"{', '.join(LOCKS)} fit pyproject.toml")
    return 0


def write(file: Path, extra: str, upgrade: bool) -> None:
    """Resolve the package with one extra for all platforms and both Pythons."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as tested:
        tested.write("\n".join(TESTED))
        tested.flush()
        words = [
            "uv",
            "pip",
            "compile",
            "pyproject.toml",
            "--extra",
            extra,
            "--universal",
            "--generate-hashes",
        ]
        words += [
            "--python-version",
            PYTHONS[0],
            "--no-emit-index-url",
            "--constraint",
            tested.name,
            "--quiet",
        ]
        if str(file.relative_to(ROOT)) in BESIDE:
            words += ["--constraint", "requirements.lock"]
        words += ["--custom-compile-command", "python tools/lock.py", "--output-file", str(file)]
        try:
            subprocess.run(
                [*words, *["--upgrade"] * upgrade], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise UserError("uv is not installed; pip install uv") from None
        except subprocess.CalledProcessError:
            raise UserError(f"{file.name} cannot be resolved; see above") from None
    constraints = rf"\n +#( via| ) +-c ({re.escape(tested.name)}|requirements\.lock)"
    file.write_text(re.sub(constraints, "", file.read_text()))


def pins(text: str) -> list[tuple[Requirement, int, list[str]]]:
    """Every pinned requirement of a lock file, its number of hashes, and the packages that require it."""
    found = []
    for block in re.split(r"\n(?=[A-Za-z0-9])", text):
        if not (first := re.match(r"([A-Za-z0-9][^\\\n]*)", block)):
            continue
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)
        via = re.findall(r"#(?: via)? +([A-Za-z0-9][\w.-]*(?: \(pyproject\.toml\))?)$", block, re.MULTILINE)
        found.append((Requirement(first[1].strip()), len(hashes), via))
    return found


def check(file: Path, extra: str) -> list[str]:
    """Where a lock file does not match pyproject.toml; works offline."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"][extra]]
    wanted = [Requirement(text) for text in texts]
    locked = pins(file.read_text()) if file.is_file() else []
    name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    faults = [f"{name}: {pin} has no hash" for pin, hashes, _ in locked if not hashes]
    faults += [
        f"{name}: {pin} is not one version" for pin, _, _ in locked if not str(pin.specifier).startswith("==")
    ]
    for need in wanted:
        for python in PYTHONS:
            place = {"python_version": python, "python_full_version": f"{python}.0"}
            place |= {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
            versions = [
                str(pin.specifier).removeprefix("==")
                for pin, _, _ in locked
                if canonical(pin.name) == canonical(need.name)
                and (pin.marker is None or pin.marker.evaluate(place))
            ]
            if len(versions) != 1 or not need.specifier.contains(versions[0], prereleases=True):
                faults.append(f"{name}: has {versions or 'nothing'} for {need} on Python {python}")
    asked = {canonical(pin.name) for pin, _, via in locked if any("pyproject.toml" in one for one in via)}
    odd = asked ^ {canonical(need.name) for need in wanted}
    return faults + [f"{name}: {one} is in only one of the two" for one in sorted(odd)]


def canonical(name: str) -> str:
    """A package's name as normalised by indexes."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    run_main(main)
