"""launch/tpu.sh against a stand-in for the cloud (fake_gcloud) that really runs the remote commands."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FAKE_GCLOUD = Path(__file__).resolve().parents[1] / "helpers" / "fake_gcloud"
SLOW = pytest.mark.slow
SCRIPTS = ["tpu.sh", "tpu_slice.sh", "tpu_host.sh"]
WHERE = ["--zone=us-west4-a", "--quiet"]
SSH = ["--ssh-flag=-oServerAliveInterval=30", "--ssh-flag=-oConnectTimeout=20", *WHERE]

HOST_TOOLS = {
    "hostname": 'echo "t1v-n-fake-w-$FAKE_HOST"',
    "uv": 'echo "$*" >> "$FAKE_CLOUD/uv-$FAKE_HOST"',
    # A mount of worker 0's folder is a link to it here.
    "sudo": """echo "$*" >> "$FAKE_CLOUD/sudo-$FAKE_HOST"
if [ "$1" = tee ]; then cat >> "$FAKE_CLOUD/sudo-$FAKE_HOST"; fi
if [ "$1" = mount ]; then rmdir "$7"; ln -s "$FAKE_CLOUD/host-0/${7#"$HOME"/}" "$7"; fi""",
    "preempt": """echo '{"state": "PREEMPTED", "hosts": 1}' > "$FAKE_CLOUD/nodes/study"
if [ -e "$FAKE_CLOUD/queue/study" ]; then echo SUSPENDED > "$FAKE_CLOUD/queue/study"; fi""",
}
# A run that resumes: each start adds a line to results/run/starts and notes what it found.
RESUMABLE = """set -eu
mkdir -p results/run/checkpoints
echo start >> results/run/starts
touch results/run/owner.lock
echo "start number $(wc -l < results/run/starts) with $*"
"""


class Cloud:
    """A checkout, a laptop without anything in the cloud, and what it sees of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cloud"
        self.checkout = folder / "checkout"
        self.bucket = self.folder / "buckets" / "bucket"
        self.bucket.mkdir(parents=True)
        stub = f'exec {shlex.join([sys.executable, "-I", "-S", str(FAKE_GCLOUD)])} "$@"'
        for name, body in {**HOST_TOOLS, "gcloud": stub}.items():
            self.tool("host-bin", name, body)
        self.tool("laptop-bin", "gcloud", stub)
        (self.checkout / "launch").mkdir(parents=True)
        for script in SCRIPTS:
            shutil.copy(LAUNCH / script, self.checkout / "launch")
        self.on_the_host(JAXLORA_STOP_SECONDS="5")
        self.git("init", "--quiet")
        self.program(RESUMABLE)

    def tool(self, folder: str, name: str, body: str) -> None:
        path = self.folder / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=self.checkout, check=True, capture_output=True, text=True
        ).stdout.strip()

    def program(self, text: str) -> None:
        """Commits `text` as train.sh, the program that the slice runs."""
        (self.checkout / "train.sh").write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "A program")

    def on_the_host(self, **environment: str) -> None:
        (self.folder / "host-environment.json").write_text(json.dumps(environment))

    def plan(self, *faults: dict) -> None:
        (self.folder / "plan.json").write_text(json.dumps([{"times": 1, **fault} for fault in faults]))

    def line(self, step: str, *options: str, command: tuple[str, ...] = ()) -> list[str]:
        polls = ["--poll-min=0", "--poll-max=0"]
        place = ["--name=study", "--zone=us-west4-a", "--type=v5e-8", "--bucket=gs://bucket"]
        words = [str(self.checkout / "launch" / "tpu.sh"), step, *place, *polls, *options]
        return [*words, "--", *command] if command else words

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder / 'laptop-bin'}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.folder), "FAKE_CLOUD": str(self.folder), **more}

    def begin(
        self, step: str, *options: str, command: tuple[str, ...], **streams: Any
    ) -> subprocess.Popen[str]:
        """Starts a step that goes on by itself, in a process group of its own."""
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        return subprocess.Popen(
            self.line(step, *options, command=command),
            env=self.environment(),
            text=True,
            start_new_session=True,
            **(silent | streams),
        )

    def leave_running(self) -> subprocess.Popen[str]:
        """Starts `run`, and leaves it by Ctrl-C once the program has made results/ready."""
        run = self.begin("run", command=("bash", "train.sh"))
        while not self.host_file("src/results/ready").exists():
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        return run

    def launch(self, step: str, *options: str, command: tuple[str, ...] = (), **environment: str):
        return subprocess.run(
            self.line(step, *options, command=command),
            env=self.environment(**environment),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(
        self, *options: str, command: tuple[str, ...] = ("bash", "train.sh"), step: str = "run", **more: str
    ):
        return self.launch(step, *options, command=command, **more)

    def calls(self, host: str | None = None) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call["argv"] for call in lines if call["host"] == host]

    def verbs(self) -> list[str]:
        """What was asked of the cloud, without the looks at its state: `create`, `ssh run`, `delete`, ..."""
        words = []
        for call in self.calls():
            verb = call[3] if call[0] == "compute" else f"storage {call[1]}"
            remote = re.search(r"--command=bash tpu_host.sh (\w+)", " ".join(call))
            words.append(f"{verb} {remote[1]}" if remote else verb)
        return [word for word in words if word not in ("describe", "storage ls")]

    def state(self) -> str | None:
        path = self.folder / "nodes" / "study"
        return json.loads(path.read_text())["state"] if path.exists() else None

    def results(self) -> Path:
        return self.bucket / "study" / "results" / "run"

    def starts(self) -> int:
        return len((self.results() / "starts").read_text().splitlines())

    def host_file(self, name: str, host: int = 0) -> Path:
        return self.folder / f"host-{host}" / "jaxlora" / name


@pytest.fixture
def cloud(tmp_path: Path):
    cloud = Cloud(tmp_path)
    yield cloud
    end_processes_of(tmp_path)


def end_processes_of(folder: Path) -> None:
    """Leave nothing running: no launcher of this folder, and no command that it started on a "host"."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = process.joinpath("cmdline").read_bytes()
            works_there = process.joinpath("cwd").readlink().is_relative_to(folder)
            if works_there or os.fsencode(folder) in command:
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # ended in the meantime
            continue


def printed(output: str) -> list[list[str]]:
    """The cloud commands in what the launcher printed, as a shell would read them."""
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def given_as(option: str, values: list[str], message: str) -> list[tuple[list[str], str]]:
    return [([f"--{option}={value}"], f"--{option} {message}") for value in values]


BAD_VALUES = [
    *given_as("poll-min", ["", "-1", "1.5", "0x10", "1e3", " 1", "9" * 10], "needs a whole number"),
    *given_as("poll-max", ["1" + "0" * 18], "needs a whole number from 0 to 999,999,999"),
    *given_as("max-wait", ["3 days", "9" * 30], "needs a whole number"),
    *given_as("max-failures", ["a[0]"], "needs a whole number"),
    *given_as("max-resumes", ["1\n2"], "needs a whole number"),
    *given_as("results", ["", ".", "/", "/a", "a/.", "./a", "a/../b", "a//b"], "must be a folder inside"),
    *given_as("results", ["a*", "a?", "a[1]", "a]", "a\nb", "a\tb"], "cannot hold"),
    (["--results", "--spot"], "looks like an option"),
    *given_as("spot", ["no", ""], "takes no value"),
    *given_as("queued", ["false"], "takes no value"),
    *given_as("again", ["0"], "takes no value"),
    *given_as("keep", ["no"], "takes no value"),
    *given_as("dry-run", ["no"], "takes no value"),
    *given_as("zone", ["us west4", "us-west4-a\n", "US-WEST4-A", "-a", "*"], "must look like"),
    *given_as("project", ["my project", "$p", "-p"], "must be a project ID"),
    *given_as(
        "bucket", ["gs://", "gs:///a", "gs://a b", "gs://a*", "gs://a/b?", "gs://a//b"], "must look like"
    ),
    *given_as("create-flag", ["", "subnetwork=tpu", "--"], "needs a flag of gcloud"),
    *given_as("connect-flag", ["", "-x"], "needs a flag of gcloud"),
    *given_as("name", ["a" * 64, "a\n", "é"], "needs lowercase letters"),
    *given_as("type", ["v4-" + 20 * "8", "v5e-08", "v5e-8\n"], "must be like"),
]


class TestItIsUsableByANewcomer:
    def test_help_shows_steps_options_and_an_example(self, cloud: Cloud) -> None:
        result = cloud.launch("--help")
        assert result.returncode == 0
        for word in ["all", "up", "run", "status", "logs", "stop", "down", "--spot", "--queued", "--dry-run"]:
            assert re.search(rf"^  {word} ", result.stdout, re.MULTILINE), word
        assert "python launch/study.py --config configs/main.py" in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 110

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "say what to do"),
            (["go"], "say what to do"),
            (["up", "--zone=z", "--type=v4-8"], "--name needs"),
            (["up", "--name=Bad_Name", "--zone=z", "--type=v4-8"], "--name needs"),
            (["up", "--name=a", "--type=v4-8"], "--zone is missing"),
            (["up", "--name=a", "--zone=z", "--type=v3-8"], "--type must be like"),
            (["up", "--name=a", "--zone=z", "--type=v4-4"], "v4 sizes are multiples of 8"),
            (["up", "--name=a", "--zone=z", "--type=v5e-12"], "v5e sizes are"),
            (["up", "--name=a", "--zone=z", "--type"], "--type needs a value"),
            (["up", "--name=a", "--zone=z", "--typo=1"], "unknown option --typo"),
            (["up", "--name=a", "--zone=z", "--type=v4-8", "python"], "goes after --"),
            (["up", "--name=a", "--zone=z", "--type=v4-8", "--poll-min=soon"], "needs a whole number"),
            (["up", "--name=a", "--zone=z", "--type=v4-8", "--", "python"], "up takes no command"),
            (["up", "--name=a", "--zone=z", "--type=v4-8", "--bucket=b"], "must look like gs://"),
            (["run", "--name=a", "--zone=z", "--type=v4-8"], "no command given"),
            (["run", "--name=a", "--zone=z", "--type=v4-8", "--spot", "--", "x"], "--bucket is missing"),
            (["all", "--name=a", "--zone=z", "--type=v4-8", "--", "x"], "--bucket is missing"),
            (["up", "--name=a", "--zone=z", "--type=v4-8", "--results=../x"], "inside the checkout"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_2(
        self, cloud: Cloud, arguments: list[str], message: str
    ) -> None:
        script = str(cloud.checkout / "launch" / "tpu.sh")
        result = subprocess.run([script, *arguments], env=cloud.environment(), capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert message in errors(result.stderr)[0]
        assert cloud.calls() == []

    @pytest.mark.parametrize("token", ["hf_a hf_b", "hf_a\r", "hf_a\nhf_b"])
    def test_a_token_of_several_words_is_refused_before_anything_is_created(
        self, cloud: Cloud, token: str
    ) -> None:
        result = cloud.run(HF_TOKEN=token)
        assert result.returncode == 2
        assert "HF_TOKEN holds a space or a line break" in errors(result.stderr)[0]
        assert "hf_" not in result.stderr
        assert cloud.calls() == []

    def test_every_value_is_checked_before_the_cloud_is_asked(self, cloud: Cloud) -> None:
        script = str(cloud.checkout / "launch" / "tpu.sh")
        for options, message in BAD_VALUES:
            words = [script, "up", "--name=a", "--zone=z", "--type=v4-8", *options]
            result = subprocess.run(
                words, env=cloud.environment(), capture_output=True, text=True, timeout=20
            )
            assert (options, result.returncode) == (options, 2)
            assert len(result.stderr.splitlines()) == 1, options
            assert message in errors(result.stderr)[0], options
        assert cloud.calls() == []

    def test_numbers_with_leading_zeros_are_decimal(self, cloud: Cloud) -> None:
        cloud.plan({"match": " create ", "exit": 1, "stderr": "no more capacity", "times": 4})
        waits = cloud.folder / "waits"
        cloud.tool("laptop-bin", "sleep", f"echo $1 >> {waits}")
        cloud.program(RESUMABLE + "case $(wc -l < results/run/starts) in [1-9]) exit 75;; 1?) exit 3;; esac")
        limits = ["--max-wait=0089", "--max-resumes=09", "--max-failures=010"]
        result = cloud.run("--poll-min=08", "--poll-max=000000000025", *limits)
        assert result.returncode == 0, result.stderr
        assert waits.read_text().split() == ["8", "16", "25", "25", "25"] + ["8"] * 19
        assert cloud.starts() == 20

    def test_a_missing_gcloud_is_said(self, cloud: Cloud) -> None:
        (cloud.folder / "laptop-bin" / "gcloud").unlink()
        environment = {**cloud.environment(), "PATH": str(cloud.folder / "laptop-bin")}
        for tool in ["bash", "dirname", "mktemp", "rm"]:
            (cloud.folder / "laptop-bin" / tool).symlink_to(shutil.which(tool))
        result = subprocess.run(cloud.line("up"), env=environment, capture_output=True, text=True)
        assert result.returncode == 2
        assert "gcloud is not installed" in errors(result.stderr)[0]

    def test_a_bucket_that_cannot_be_read_is_said_before_anything_is_created(self, cloud: Cloud) -> None:
        result = cloud.run("--bucket=gs://other")
        assert result.returncode == 2
        assert "gs://other cannot be read" in errors(result.stderr)[0]
        assert cloud.verbs() == []

    def test_the_folder_in_the_bucket_need_not_exist_yet(self, cloud: Cloud) -> None:
        result = cloud.run("--bucket=gs://bucket/new/folder", step="all")
        assert result.returncode == 0, result.stderr
        assert (cloud.bucket / "new" / "folder" / "study" / "results" / "run" / "starts").exists()

    @pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
    def test_the_scripts_are_clean_to_shellcheck(self) -> None:
        scripts = [str(LAUNCH / script) for script in SCRIPTS]
        result = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


class TestDryRunTellsTheTruth:
    @pytest.mark.parametrize(
        "options",
        [
            ["--spot", "--queued", "--project=p"],
            ["--type=v5e-16"],
            *(pytest.param(o, marks=SLOW) for o in ([], ["--spot"])),
        ],
    )
    def test_it_prints_the_commands_that_a_real_run_makes(self, cloud: Cloud, options: list[str]) -> None:
        def normal(calls: list[list[str]]) -> list[list[str]]:
            text = json.dumps(calls)
            text = re.sub(r"\d{8}T\d{6}Z-\d{3}", "ATTEMPT", text)
            return json.loads(re.sub(r"/tmp/[^/\"]+/", "/tmp/", text))

        dry = cloud.run(*options, "--dry-run", step="all")
        assert dry.returncode == 0
        assert cloud.calls() == []
        assert (
            "leave something new under results; otherwise study is kept and the exit code is 74" in dry.stderr
        )
        real = cloud.run(*options, step="all")
        assert real.returncode == 0, real.stderr
        assert normal(printed(dry.stdout)) == normal([["gcloud", *call] for call in cloud.calls()])
        assert normal(printed(real.stderr)) == normal(printed(dry.stdout))

    def test_it_needs_no_gcloud(self, cloud: Cloud) -> None:
        (cloud.folder / "laptop-bin" / "gcloud").unlink()
        for step in ["up", "down", "status", "logs", "stop"]:
            result = cloud.launch(step, "--dry-run", PATH="/usr/bin:/bin")
            assert (result.returncode, errors(result.stderr)) == (0, [])
            assert printed(result.stdout)

    @SLOW
    @pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
    def test_the_real_command_line_knows_every_command_and_flag(self, cloud: Cloud, tmp_path: Path) -> None:
        lines = set()
        for options in [["--spot"], ["--queued", "--spot", "--project=p", "--connect-flag=--internal-ip"]]:
            for step in ["all", "down", "status", "logs", "stop"]:
                command = ("python", "x.py") if step == "all" else ()
                output = cloud.launch(step, *options, "--dry-run", command=command).stdout
                lines |= {line[2:] for line in output.splitlines() if line.startswith("+ ")}
        assert cloud.run().returncode == 0
        lines |= {shlex.join(["gcloud", *call]) for call in cloud.calls(host="0")}
        checked = tmp_path / "commands.json"
        checked.write_text(
            json.dumps([{"command_string": line} for line in [*sorted(lines), "gcloud storage ls --x"]])
        )
        result = subprocess.run(
            ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={checked}"],
            env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "sdk")},
            capture_output=True,
            text=True,
        )
        wrong = [item for item in json.loads(result.stdout) if not item["success"]]
        assert [item["command_string"] for item in wrong] == ["gcloud storage ls --x"]


class TestTheSliceIsTheOneAskedFor:
    @pytest.mark.parametrize(
        ("type_name", "accelerator", "version", "hosts"),
        [
            ("v4-8", "v4-8", "tpu-ubuntu2204-base", 1),
            ("v4-16", "v4-16", "tpu-ubuntu2204-base", 2),
            ("v4-32", "v4-32", "tpu-ubuntu2204-base", 4),
            ("v5e-4", "v5litepod-4", "v2-alpha-tpuv5-lite", 1),
            ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite", 1),
            ("v5litepod-8", "v5litepod-8", "v2-alpha-tpuv5-lite", 1),
            ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite", 4),
            ("v5e-32", "v5litepod-32", "v2-alpha-tpuv5-lite", 8),
            ("v5p-8", "v5p-8", "v2-alpha-tpuv5", 1),
            ("v6e-4", "v6e-4", "v2-alpha-tpuv6e", 1),
            ("v6e-8", "v6e-8", "v2-alpha-tpuv6e", 1),
        ],
    )
    def test_a_type_has_its_name_image_and_hosts(
        self, cloud: Cloud, type_name: str, accelerator: str, version: str, hosts: int
    ) -> None:
        commands = printed(cloud.launch("up", f"--type={type_name}", "--dry-run").stdout)
        create = next(words for words in commands if "create" in words)
        assert create == [
            *["gcloud", "compute", "tpus", "tpu-vm", "create", "study"],
            *[f"--version={version}", f"--accelerator-type={accelerator}", *WHERE],
        ]
        setup = next(words for words in commands if "ssh" in words)
        assert setup[6:8] == [
            "--worker=all",
            f"--command=bash tpu_host.sh setup {hosts} results {cloud.git('rev-parse', 'HEAD')} 0",
        ]
        assert setup[8:] == SSH

    def test_spot_queued_project_and_flags_reach_the_create_command(self, cloud: Cloud) -> None:
        options = ["--spot", "--queued", "--project=p", "--create-flag=--subnetwork=tpu net", "--type=v4-8"]
        create = next(c for c in printed(cloud.launch("up", *options, "--dry-run").stdout) if "create" in c)
        assert create == [
            *["gcloud", "compute", "tpus", "queued-resources", "create", "study", "--node-id=study"],
            *["--runtime-version=tpu-ubuntu2204-base", "--accelerator-type=v4-8", "--spot"],
            *["--subnetwork=tpu net", "--zone=us-west4-a", "--project=p", "--quiet"],
        ]

    def test_connect_flags_reach_ssh_and_scp(self, cloud: Cloud) -> None:
        commands = printed(cloud.launch("up", "--connect-flag=--internal-ip", "--dry-run").stdout)
        assert [words[-1] for words in commands if "ssh" in words or "scp" in words] == ["--internal-ip"] * 2

    def test_an_existing_slice_is_used(self, cloud: Cloud) -> None:
        assert cloud.launch("up").returncode == 0
        assert cloud.launch("up").returncode == 0
        assert cloud.verbs().count("create") == 1


class TestTheCheckoutArrives:
    def test_uncommitted_changes_are_copied_and_marked_and_old_files_go(self, cloud: Cloud) -> None:
        (cloud.checkout / "old.txt").write_text("old")
        cloud.program("set -eu; echo $JAXLORA_GIT_SHA $JAXLORA_GIT_DIRTY; mkdir -p results data; cat *.txt")
        first = cloud.run(command=("bash", "train.sh"))
        assert f"{cloud.git('rev-parse', 'HEAD')} 0\nold" in first.stdout
        (cloud.host_file("src/data/rows.jsonl")).write_text("kept")
        (cloud.checkout / "new.txt").write_text("committed")
        (cloud.checkout / "old.txt").unlink()
        cloud.program((cloud.checkout / "train.sh").read_text())
        (cloud.checkout / "new.txt").write_text("uncommitted")
        (cloud.checkout / "forgotten.txt").write_text("untracked")
        second = cloud.run("--again", command=("bash", "train.sh"))
        assert f"{cloud.git('rev-parse', 'HEAD')} 1\nuncommitted" in second.stdout
        assert "1 untracked files are not copied" in second.stderr
        assert not cloud.host_file("src/old.txt").exists()
        assert cloud.host_file("src/data/rows.jsonl").read_text() == "kept"
        assert cloud.git("status", "--short").splitlines() == ["M new.txt", "?? forgotten.txt"]

    @pytest.mark.parametrize("name", ["é日本.txt", "a b.txt", "back\\slash.txt", '"quoted".txt', "-f"])
    def test_an_old_file_of_any_name_goes(self, cloud: Cloud, name: str) -> None:
        (cloud.checkout / name).write_text("old")
        cloud.program(RESUMABLE)
        assert cloud.launch("up").returncode == 0
        assert cloud.host_file("src") / name in cloud.host_file("src").iterdir()
        (cloud.checkout / name).unlink()
        cloud.program(RESUMABLE)
        assert cloud.launch("up").returncode == 0
        assert cloud.host_file("src") / name not in cloud.host_file("src").iterdir()
        assert cloud.host_file("src/train.sh").exists()

    def test_the_locked_versions_and_the_package_are_installed_on_every_host(self, cloud: Cloud) -> None:
        assert cloud.launch("up", "--type=v5e-16").returncode == 0
        for host in range(4):
            lines = (cloud.folder / f"uv-{host}").read_text().splitlines()
            assert lines[0].startswith("venv ")
            install = "pip install --quiet --python ../venv/bin/python"
            assert lines[1:] == [
                f"{install} --require-hashes --requirements launch/tpu.lock",
                f"{install} --no-deps --editable .",
            ]


HARD_WORDS = [
    *[
        "plain",
        "",
        "two words",
        "  spaces  everywhere ",
        "it's",
        "'",
        '"quoted"',
        "$HOME",
        "${HOME}",
        "$(id)",
    ],
    *[
        "`id`",
        "a\\b",
        "\\",
        "a\nb",
        "tab\there",
        "*",
        "?",
        "[a]",
        "~",
        "!",
        "a;b",
        "a&&b",
        "a|b",
        ">x",
        "#no",
    ],
    *[
        "--config.lora.rank=8",
        "--",
        "-",
        "é日本",
        "%s",
        "a=b c",
        "{a,b}",
        "&",
        "gs://b/*.json",
        "\\'",
        "'\\''",
    ],
]
HARD_FOLDERS = ["my results", 'it\'s "$HOME"', "a\\040b #1", "é日本 (rw)", "deep/er {a,b}"]
ANY_CHARACTER = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


class TestTheCommandArrivesAsTyped:
    def test_every_host_gets_the_same_words(self, cloud: Cloud) -> None:
        cloud.program('printf \'%s\\0\' "$@" > "$FAKE_CLOUD/words-$FAKE_HOST"; pwd > results/run || true')
        result = cloud.run("--type=v5e-16", command=("bash", "train.sh", *HARD_WORDS))
        assert result.returncode == 0, result.stderr
        for host in range(4):
            words = (cloud.folder / f"words-{host}").read_bytes().decode().split("\0")[:-1]
            assert words == HARD_WORDS

    @example(HARD_WORDS)
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text(st.one_of(st.sampled_from("'\"\\$`&!*~-= \n"), ANY_CHARACTER), max_size=12)))
    def test_quoted_words_read_back_as_themselves(self, words: list[str]) -> None:
        read_back = """line=$(quote "$@"); set --; eval "set -- $line"; printf '%s\\0' "$@" """
        script = f"source {LAUNCH / 'tpu_slice.sh'}; {read_back}"
        output = subprocess.run(
            ["bash", "-c", script, "bash", *words], capture_output=True, check=True
        ).stdout
        assert output == b"".join(word.encode() + b"\0" for word in words or [""])

    def test_it_runs_in_the_checkout_with_the_environment_of_the_package(self, cloud: Cloud) -> None:
        cloud.program('echo "here $PWD"; echo "path ${PATH%%:*}"; echo "venv $VIRTUAL_ENV"')
        output = cloud.run().stdout.splitlines()
        assert f"here {cloud.host_file('src')}" in output
        assert f"path {cloud.host_file('venv/bin')}" in output
        assert f"venv {cloud.host_file('venv')}" in output


class TestWhatTheCommandReportsDecides:
    def test_success_ends_the_run_and_its_results_are_in_the_bucket(self, cloud: Cloud) -> None:
        result = cloud.run(command=("bash", "train.sh", "all", "well"))
        assert result.returncode == 0
        assert "start number 1 with all well" in result.stdout.splitlines()
        assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh run"]
        assert [file.name for file in cloud.results().iterdir()] == ["starts"]  # a lock is nobody else's
        (log,) = (cloud.bucket / "study" / "logs").iterdir()
        assert re.fullmatch(r"\d{8}T\d{6}Z-001-worker-0\.log", log.name)
        assert log.read_text() == "start number 1 with all well\n"

    def test_output_without_a_last_newline_is_understood(self, cloud: Cloud) -> None:
        cloud.program("printf unfinished")
        assert cloud.run("--max-resumes=0").returncode == 0

    @pytest.mark.parametrize(
        ("program", "hint"), [("echo bad key; exit 2", "bad key"), ("exec missing-program", "missing")]
    )
    def test_a_user_error_is_not_retried_and_nothing_is_deleted(
        self, cloud: Cloud, program: str, hint: str
    ) -> None:
        cloud.program(program)
        result = cloud.run(step="all")
        assert result.returncode == 2
        assert hint in result.stdout
        assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh run"]
        assert errors(result.stderr) == [
            "error: the command cannot work as given (its message is above); to end the cost: "
            "launch/tpu.sh down --name study --zone us-west4-a"
        ]

    def test_a_failure_is_retried_a_bounded_number_of_times(self, cloud: Cloud) -> None:
        cloud.program(RESUMABLE + "exit 3")
        result = cloud.run("--max-failures=2", step="all")
        assert result.returncode == 3
        assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh run", "ssh run", "ssh run"]
        assert cloud.starts() == 3
        assert "failed with exit code 3" in errors(result.stderr)[0]
        assert cloud.state() == "READY"

    @SLOW
    def test_75_on_a_living_slice_resumes_without_a_new_slice(self, cloud: Cloud) -> None:
        cloud.program(RESUMABLE + "[ $(wc -l < results/run/starts) -gt 2 ] || exit 75")
        result = cloud.run("--max-failures=0")
        assert result.returncode == 0
        assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh run", "ssh run", "ssh run"]
        assert cloud.starts() == 3

    @SLOW
    def test_resuming_is_bounded_too(self, cloud: Cloud) -> None:
        cloud.program("exit 75")
        result = cloud.run("--max-resumes=2")
        assert result.returncode == 1
        assert cloud.verbs().count("ssh run") == 3
        assert "interrupted more than 2 times" in errors(result.stderr)[0]

    def test_all_tears_down_after_success_unless_told_to_keep(self, cloud: Cloud) -> None:
        assert cloud.run("--keep", step="all").returncode == 0
        assert cloud.state() == "READY"
        assert cloud.run("--again", step="all").returncode == 0
        assert cloud.state() is None
        assert cloud.verbs()[-2:] == ["ssh stop", "delete"]

    def test_results_that_do_not_reach_the_bucket_keep_the_slice(self, cloud: Cloud) -> None:
        cloud.on_the_host(JAXLORA_PUSH_SECONDS="0.1")
        cloud.plan({"match": "^storage rsync results gs", "times": 99, "exit": 1})
        result = cloud.run(step="all")
        assert result.returncode == 1
        assert "the results could not be copied to gs://bucket/study" in errors(result.stderr)[0]
        assert cloud.state() == "READY"


class TestASliceGoesOnlyWhenItsResultsAreInTheBucket:
    ELSEWHERE = "mkdir -p out; echo x > out/y"

    def kept(self, cloud: Cloud, result: subprocess.CompletedProcess) -> None:
        assert result.returncode == 74
        (line,) = errors(result.stderr)
        assert line.startswith(
            "error: COMMAND succeeded but left nothing new under results, so study is kept: "
        )
        assert "--results" in line
        assert line.endswith("to end the cost: launch/tpu.sh down --name study --zone us-west4-a")
        assert cloud.state() == "READY"
        assert "delete" not in cloud.verbs()

    @pytest.mark.parametrize(
        "program",
        [
            ELSEWHERE,
            "true",
            "mkdir -p results/run/checkpoints",
            "mkdir -p results/.compiled/a; touch results/.run.lock results/.compiled/a/program",
        ],
    )
    def test_nothing_under_results_keeps_it(self, cloud: Cloud, program: str) -> None:
        cloud.program(program)
        self.kept(cloud, cloud.run(step="all"))

    def test_files_of_the_checkout_are_not_new_however_often_they_are_copied(self, cloud: Cloud) -> None:
        (cloud.checkout / "results").mkdir()
        (cloud.checkout / "results" / "README").write_text("Results go here.")
        cloud.program(self.ELSEWHERE)
        for _ in range(2):
            self.kept(cloud, cloud.run(step="all"))

    def test_what_a_later_start_fetches_from_the_bucket_is_not_new(self, cloud: Cloud) -> None:
        cloud.program(self.ELSEWHERE)
        assert cloud.run("--bucket=").returncode == 0
        cloud.results().mkdir(parents=True)
        (cloud.results() / "starts").write_text("start\n")
        self.kept(cloud, cloud.run(step="all"))
        assert cloud.host_file("src/results/run/starts").exists()

    def test_the_empty_folder_that_hosts_share_is_nothing(self, cloud: Cloud) -> None:
        cloud.program(self.ELSEWHERE)
        self.kept(cloud, cloud.run("--type=v5e-16", step="all"))
        assert cloud.host_file("src/results").is_dir()

    def test_keep_changes_nothing_about_it(self, cloud: Cloud) -> None:
        cloud.program(self.ELSEWHERE)
        self.kept(cloud, cloud.run("--keep", step="all"))

    def test_run_says_it(self, cloud: Cloud) -> None:
        cloud.program(self.ELSEWHERE)
        result = cloud.run()
        assert result.returncode == 0
        assert "tpu: it left nothing new under results" in result.stderr.splitlines()
        cloud.program(RESUMABLE)
        assert "left nothing new" not in cloud.run("--again").stderr

    def test_results_that_came_from_the_bucket_are_not_new(self, cloud: Cloud) -> None:
        old = cloud.results() / "starts"
        old.parent.mkdir(parents=True)
        old.write_text("start\n")
        os.utime(old, (4e9, 4e9))  # by the clock of another machine
        cloud.program(f"{self.ELSEWHERE}; test -e results/run/starts")
        self.kept(cloud, cloud.run(step="all"))

    def test_results_of_an_earlier_success_are_not_new(self, cloud: Cloud) -> None:
        assert cloud.run("--keep", step="all").returncode == 0
        cloud.program(self.ELSEWHERE)
        self.kept(cloud, cloud.run("--again", step="all"))

    def test_a_file_written_anew_is_new_whatever_its_date(self, cloud: Cloud) -> None:
        cloud.program("mkdir -p results; echo x > results/y; touch -d 1990-01-01 results/y")
        assert cloud.run(step="all").returncode == 0
        assert cloud.state() is None

    def test_the_right_folder_given_afterwards_ends_it(self, cloud: Cloud) -> None:
        cloud.program("[ -e out/y ] && exit; " + self.ELSEWHERE)  # the second time nothing is left to do
        self.kept(cloud, cloud.run(step="all"))
        result = cloud.run("--results=out", step="all")
        assert result.returncode == 0, result.stderr
        assert (cloud.bucket / "study" / "results" / "y").read_text() == "x\n"
        assert cloud.state() is None

    def test_a_corrected_program_given_afterwards_ends_it(self, cloud: Cloud) -> None:
        cloud.program(self.ELSEWHERE)
        self.kept(cloud, cloud.run(step="all"))
        cloud.program(RESUMABLE)
        assert cloud.run(step="all").returncode == 0
        assert cloud.state() is None

    @pytest.mark.parametrize("end", ["exit 3", "exit 75", "preempt; exit 75"])
    def test_an_attempt_that_finds_nothing_left_to_do_counts_what_came_before(
        self, cloud: Cloud, end: str
    ) -> None:
        cloud.program(f"[ -e results/y ] && exit; mkdir -p results; echo x > results/y; {end}")
        result = cloud.run(step="all")
        assert result.returncode == 0, result.stderr
        assert (cloud.bucket / "study" / "results" / "y").exists()
        assert cloud.state() is None

    def test_results_of_a_run_without_a_bucket_reach_it_before_the_slice_goes(self, cloud: Cloud) -> None:
        cloud.program("[ -e results/y ] && exit; mkdir -p results; echo x > results/y")
        assert cloud.run("--bucket=").returncode == 0
        assert not (cloud.bucket / "study").exists()
        result = cloud.run(step="all")
        assert result.returncode == 0, result.stderr
        assert (cloud.bucket / "study" / "results" / "y").exists()

    @pytest.mark.parametrize(
        ("first", "told"),
        [
            (["--bucket="], "--results 'results' and no --bucket"),
            (["--results=o ut"], "--results 'o ut' and --bucket gs://bucket"),
        ],
    )
    def test_a_command_that_runs_for_another_folder_or_bucket_is_not_followed(
        self, cloud: Cloud, first: list[str], told: str
    ) -> None:
        cloud.program('touch "$FAKE_CLOUD/runs"; until [ -e "$FAKE_CLOUD/finish" ]; do sleep 0.1; done')
        run = cloud.begin("run", *first, command=("bash", "train.sh"))
        while not (cloud.folder / "runs").exists():
            assert run.poll() is None
            time.sleep(0.05)
        result = cloud.run(step="all")
        assert result.returncode == 2
        assert errors(result.stderr) == [
            f"error: study runs this command with {told}; give those, or end it (launch/tpu.sh stop)"
        ]
        (cloud.folder / "finish").touch()
        assert run.wait(timeout=30) == 0


class TestTheClockOfTheLaptopDecidesNothing:
    def at(self, cloud: Cloud, moment: str) -> None:
        cloud.tool("laptop-bin", "date", f"echo {moment}")

    def test_attempts_of_one_second_are_two(self, cloud: Cloud) -> None:
        self.at(cloud, "20260101T000000Z")
        assert cloud.run().returncode == 0
        assert "start number 2" in cloud.run("--again").stdout
        assert cloud.starts() == 2

    @pytest.mark.parametrize("step", ["run", "status", "logs"])
    def test_a_clock_that_was_ahead_hides_no_running_command(self, cloud: Cloud, step: str) -> None:
        self.at(cloud, "20990101T000000Z")
        cloud.program(RESUMABLE + "exit 3")
        assert cloud.run("--max-failures=0", command=("bash", "train.sh", "ahead")).returncode == 3
        self.at(cloud, "20260101T000000Z")
        cloud.program(TestAnInterruptionTearsNothingDown.WAITS)
        command = ("bash", "train.sh", "ahead")
        run = cloud.begin("run", "--again", command=command, stdout=subprocess.PIPE)
        assert run.stdout is not None
        while "start number 2" not in run.stdout.readline():
            assert run.poll() is None
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=30)
        if step == "status":
            assert "worker 0: running: bash train.sh ahead" in cloud.launch("status").stdout
        elif step == "logs":
            with pytest.raises(subprocess.TimeoutExpired) as followed:
                subprocess.run(cloud.line("logs"), env=cloud.environment(), capture_output=True, timeout=5)
            assert b"start number 2 with ahead" in followed.value.stdout
        else:
            self.at(cloud, "20260101T010000Z")
            again = cloud.begin("run", command=command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert again.stdout is not None
            while "start number" not in (line := again.stdout.readline()):
                assert again.poll() is None
            (cloud.folder / "finish").touch()
            assert again.communicate(timeout=30)[0].startswith("finished")
            assert "start number 2" in line
        (cloud.folder / "finish").touch()
        while not (cloud.results() / "starts").exists():
            time.sleep(0.05)
        assert len(cloud.host_file("src/results/run/starts").read_text().splitlines()) == 2

    def test_a_clock_that_is_set_ends_no_wait(self, cloud: Cloud, tmp_path: Path) -> None:
        script = f"""source {LAUNCH / "tpu_slice.sh"}
        poll_min=10 max_wait=60 name=study how_to_end=end slept=0
        slice_state() {{ if ((slept < 30)); then echo CREATING; else echo READY; fi; }}
        pause() {{ SECONDS=$((SECONDS + 1000000)) slept=$((slept + delay)); }}
        say() {{ :; }}
        stop_with() {{ echo "$2"; exit "$1"; }}
        ensure_slice && echo ready
        slice_state() {{ echo CREATING; }}
        pause() {{ SECONDS=0; }}
        ensure_slice"""
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
        assert (result.returncode, result.stdout) == (
            1,
            "ready\nno slice within 60 seconds (study is CREATING); end\n",
        )


class TestItResumesAfterAPreemption:
    """The first start is preempted in the middle; the second finds what the first has saved."""

    PREEMPTED = RESUMABLE + 'if [ "$(wc -l < results/run/starts)" = 1 ]; then preempt; exit 75; fi'

    @pytest.mark.parametrize("options", [["--spot", "--queued"], pytest.param(["--spot"], marks=SLOW)])
    def test_the_slice_is_made_anew_and_the_same_command_goes_on(
        self, cloud: Cloud, options: list[str]
    ) -> None:
        cloud.program(self.PREEMPTED)
        result = cloud.run(*options, step="all", command=("bash", "train.sh", "a b"))
        assert result.returncode == 0, result.stderr
        once = ["create", "scp", "ssh setup", "ssh run"]
        assert cloud.verbs() == [*once, "delete", *once, "ssh stop", "delete"]
        creates = [call for call in cloud.calls() if "create" in call]
        assert creates[0] == creates[1]
        assert "--spot" in creates[0]
        assert "start number 2 with a b" in result.stdout
        assert cloud.starts() == 2

    def test_a_killed_command_on_a_preempted_slice_is_no_failure(self, cloud: Cloud) -> None:
        cloud.program(self.PREEMPTED.replace("exit 75", "sleep 1; kill -KILL 0"))
        cloud.on_the_host(JAXLORA_PUSH_SECONDS="0.1")  # nothing but the regular copies can save it
        result = cloud.run("--spot", "--max-failures=0")
        assert result.returncode == 0, result.stderr
        assert "start number 2" in result.stdout

    def test_the_metrics_in_the_bucket_are_never_older_than_a_checkpoint(self, cloud: Cloud) -> None:
        cloud.program(
            "mkdir -p results/run/checkpoints; echo x | tee results/run/m results/run/checkpoints/c"
        )
        cloud.plan({"match": "^storage rsync results .*lock\\$ --rec", "times": 9, "exit": 1})
        cloud.on_the_host(JAXLORA_PUSH_SECONDS="0.1")
        assert cloud.run().returncode == 1  # the second of the two copies never succeeded
        assert [path.name for path in cloud.results().rglob("*")] == ["m"]

    @SLOW
    def test_a_restore_that_fails_does_not_start_from_nothing(self, cloud: Cloud) -> None:
        cloud.program(self.PREEMPTED)
        cloud.plan({"match": "^storage rsync gs://bucket/study/results results", "times": 9, "exit": 1})
        result = cloud.run("--spot", "--max-failures=1")
        assert result.returncode == 69
        assert cloud.starts() == 1

    def test_a_stopped_slice_is_started_and_one_that_repairs_itself_is_waited_for(self, cloud: Cloud) -> None:
        assert cloud.launch("up").returncode == 0
        cloud.plan(
            {"match": "tpu-vm describe", "node": "STOPPED"}, {"match": "tpu-vm describe", "node": "REPAIRING"}
        )
        (cloud.folder / "laptop-bin" / "sleep").write_text(
            '#!/bin/sh\necho \'{"state": "READY", "hosts": 1}\' > "$FAKE_CLOUD/nodes/study"\n'
        )
        (cloud.folder / "laptop-bin" / "sleep").chmod(0o755)
        result = cloud.launch("up")
        assert result.returncode == 0, result.stderr
        assert cloud.verbs() == ["create", "scp", "ssh setup", "start", "scp", "ssh setup"]
        assert "study is REPAIRING; looking again" in result.stderr


class TestTheCloudMayRefuse:
    @pytest.mark.parametrize("options", [[], ["--queued"]])
    def test_no_quota_stops_at_once_with_one_line(self, cloud: Cloud, options: list[str]) -> None:
        message = (
            "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProject' has been exceeded. Limit: 0"
        )
        cloud.plan({"match": " create ", "exit": 1, "stderr": message})
        result = cloud.run(*options)
        assert result.returncode == 2
        assert message in result.stderr
        assert errors(result.stderr) == [
            "error: no quota for v5litepod-8 in us-west4-a: ask for it, or take another zone or type"
        ]
        assert cloud.verbs() == ["create"]

    def test_another_refusal_stops_too(self, cloud: Cloud) -> None:
        cloud.plan(
            {"match": " create ", "exit": 1, "stderr": "ERROR: PERMISSION_DENIED: the API is not enabled"}
        )
        result = cloud.run()
        assert result.returncode == 2
        assert "refused to create study" in errors(result.stderr)[0]

    def test_no_capacity_is_asked_for_again_with_growing_waits(self, cloud: Cloud) -> None:
        message = 'ERROR: {"code": 8, "message": "There is no more capacity in the zone"}'
        cloud.plan({"match": " create ", "exit": 1, "stderr": message, "times": 4})
        waits = cloud.folder / "waits"
        cloud.tool("laptop-bin", "sleep", f"echo $1 >> {waits}")
        result = cloud.launch("up", "--poll-min=10", "--poll-max=30")
        assert result.returncode == 0
        assert cloud.verbs() == ["create"] * 5 + ["scp", "ssh setup"]
        assert waits.read_text().split() == ["10", "20", "30", "30", "30"]

    def test_the_wait_has_an_end(self, cloud: Cloud) -> None:
        cloud.plan({"match": " create ", "exit": 1, "stderr": "no more capacity", "times": 99})
        result = cloud.launch("up", "--max-wait=0")
        assert result.returncode == 1
        assert "no slice within 0 seconds" in errors(result.stderr)[0]

    def test_a_queue_that_fails_again_and_again_is_left(self, cloud: Cloud) -> None:
        (cloud.folder / "laptop-bin" / "sleep").write_text(
            "#!/bin/sh\necho FAILED > $FAKE_CLOUD/queue/study\n"
        )
        (cloud.folder / "laptop-bin" / "sleep").chmod(0o755)
        (cloud.folder / "queue").mkdir()
        (cloud.folder / "queue" / "study").write_text("FAILED")
        result = cloud.launch("up", "--queued", "--max-failures=1")
        assert result.returncode == 1
        assert "refused study 2 times" in errors(result.stderr)[0]

    def test_a_cloud_that_does_not_answer_is_no_reason_to_create_or_delete(self, cloud: Cloud) -> None:
        assert cloud.launch("up").returncode == 0
        cloud.plan(
            {"match": "tpu-vm describe", "exit": 1, "stderr": "ERROR: network is unreachable", "times": 2}
        )
        assert cloud.launch("up").returncode == 0
        assert "create" not in cloud.verbs()[3:]
        assert "delete" not in cloud.verbs()

    def test_a_connection_that_fails_once_starts_the_command_once(self, cloud: Cloud) -> None:
        cloud.plan({"match": "tpu_host.sh run", "exit": 255, "stderr": "ssh: connection refused", "times": 2})
        result = cloud.run("--max-failures=0")
        assert result.returncode == 0
        assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh run", "ssh run", "ssh run"]
        attempts = [call for call in cloud.calls() if "tpu_host.sh run" in " ".join(call)]
        assert attempts[0] == attempts[1] == attempts[2]
        assert cloud.starts() == 1

    def test_a_connection_that_breaks_in_the_middle_follows_the_same_run(self, cloud: Cloud) -> None:
        cloud.program(
            RESUMABLE
            + 'touch "$FAKE_CLOUD/broken"; until [ -e "$FAKE_CLOUD/finish" ]; do sleep 0.1; done; echo end'
        )
        cloud.plan(
            {"match": "tpu_host.sh run", "breaks": True},
            {"match": "tpu_host.sh run", "exit": 255, "stderr": "ssh: connection refused"},
        )
        cloud.tool(
            "laptop-bin",
            "sleep",
            'if [ -e "$FAKE_CLOUD/slept" ]; then touch "$FAKE_CLOUD/finish"; fi\ntouch "$FAKE_CLOUD/slept"',
        )
        result = cloud.run("--spot", "--max-failures=0")
        assert result.returncode == 0, result.stderr
        assert cloud.verbs() == ["create", "scp", "ssh setup", "ssh run", "ssh run", "ssh run"]
        assert cloud.starts() == 1
        assert "end" in result.stdout.splitlines()

    def test_a_copy_or_an_installation_that_fails_is_tried_three_times(self, cloud: Cloud) -> None:
        cloud.plan(
            {"match": " scp ", "exit": 1, "times": 2}, {"match": "tpu_host.sh setup", "exit": 1, "times": 2}
        )
        assert cloud.launch("up").returncode == 0
        assert cloud.verbs() == ["create", *["scp"] * 3, *["ssh setup"] * 3]
        cloud.plan({"match": "tpu_host.sh setup", "exit": 1, "times": 3})
        result = cloud.launch("up")
        assert result.returncode == 1
        assert "could not be installed" in errors(result.stderr)[0]


class TestSeveralHosts:
    def test_they_share_the_results_folder_of_worker_0(self, cloud: Cloud) -> None:
        cloud.program(
            "mkdir -p results/run; echo $FAKE_HOST > results/run/part-$FAKE_HOST; echo out $FAKE_HOST"
        )
        result = cloud.run("--type=v5e-16")
        assert result.returncode == 0, result.stderr
        assert sorted(path.name for path in cloud.results().iterdir()) == [
            f"part-{host}" for host in range(4)
        ]
        assert "out 0" in result.stdout.splitlines()
        assert "out 1" not in result.stdout  # the others only speak up when they fail
        assert len(list((cloud.bucket / "study" / "logs").iterdir())) == 4
        lender, borrower = ((cloud.folder / f"sudo-{host}").read_text().splitlines() for host in (0, 3))
        folder = re.escape(str(cloud.host_file("src/results")))
        exports = [
            line for line in lender if re.match(rf"{folder} .*\(rw,sync,.*anonuid={os.getuid()}", line)
        ]
        networks = [line.removeprefix(f"{cloud.host_file('src/results')} ").split("(")[0] for line in exports]
        assert networks == ["10.130.0.2", "10.130.0.3", "10.130.0.4", "10.130.0.5"]  # the hosts, nobody else
        assert all("(rw,sync,no_subtree_check,secure,all_squash," in line for line in exports)
        assert lender[2:] == ["tee /etc/exports.d/jaxlora.exports", *exports, "exportfs -ra"]
        assert lender[0] == "apt-get -o DPkg::Lock::Timeout=600 update -qq"
        assert lender[1].endswith("install -qq -y nfs-kernel-server")
        assert borrower[2].startswith("mount -t nfs -o actimeo=1 t1v-n-fake-w-0:")

    def test_hosts_without_known_addresses_share_nothing(self, cloud: Cloud) -> None:
        cloud.plan({"match": "ipAddress", "exit": 1, "times": 3})
        result = cloud.launch("up", "--type=v5e-16")
        assert result.returncode == 1
        assert (
            "the addresses of the 4 hosts of study are not known; to end the cost" in errors(result.stderr)[0]
        )
        assert not list(cloud.folder.glob("sudo-*"))

    @pytest.mark.parametrize("name", HARD_FOLDERS)
    def test_a_results_folder_of_any_name_is_shared_and_copied(self, cloud: Cloud, name: str) -> None:
        cloud.program('mkdir -p "$1"; echo x > "$1/part-$FAKE_HOST"')
        result = cloud.run(
            "--type=v5e-16", f"--results={name}", step="all", command=("bash", "train.sh", name)
        )
        assert result.returncode == 0, result.stderr
        copied = cloud.bucket / "study" / "results"
        assert sorted(path.name for path in copied.iterdir()) == [f"part-{host}" for host in range(4)]
        exports = [line for line in (cloud.folder / "sudo-0").read_text().splitlines() if "(rw," in line]
        for line in exports:
            path, client = line.split(" ")  # else exports(5) reads another path, or other clients
            assert client.startswith("10.130.0.")
            octal = re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), path.encode())
            assert octal.decode() == str(cloud.host_file("src") / name)
            assert not set(path) & set("\"'#")

    def test_a_host_that_gives_its_full_name_is_known_by_its_number(self, cloud: Cloud) -> None:
        cloud.tool("host-bin", "hostname", 'echo "t1v-n-fake-w-$FAKE_HOST.us-west4-a.c.project.internal"')
        cloud.program("mkdir -p results; echo x > results/part-$FAKE_HOST; echo out $FAKE_HOST")
        result = cloud.run("--type=v5e-16")
        assert result.returncode == 0, result.stderr
        assert "out 1" not in result.stdout
        assert "mount -t nfs -o actimeo=1 t1v-n-fake-w-0:" in (cloud.folder / "sudo-3").read_text()

    def test_one_preempted_host_outweighs_the_failures_it_causes(self, cloud: Cloud) -> None:
        cloud.program(
            '[ -e results/again ] && exit 0; sleep 0.$FAKE_HOST; [ "$FAKE_HOST" = 3 ] || exit 134\n'
            "touch results/again; exit 75"
        )
        result = cloud.run("--type=v5e-16", "--max-failures=0")
        assert result.returncode == 0, result.stderr
        assert cloud.verbs().count("ssh run") == 2
        assert "interrupted (exit code 134); resuming" in result.stderr

    @SLOW
    def test_a_mistake_outweighs_everything(self, cloud: Cloud) -> None:
        cloud.program('case "$FAKE_HOST" in 0) exit 75;; 2) echo why; exit 2;; *) exit 1;; esac')
        result = cloud.run("--type=v5e-16")
        assert result.returncode == 2
        assert "worker 2: why" in result.stdout.splitlines()


class TestAnInterruptionTearsNothingDown:
    WAITS = RESUMABLE + 'until [ -e "$FAKE_CLOUD/finish" ]; do sleep 0.1; done; echo finished'

    def interrupt(self, cloud: Cloud, number: signal.Signals) -> tuple[int, str]:
        """Starts `all` and, once the command runs, signals every process that a terminal would signal."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = cloud.begin("all", command=("bash", "train.sh"), **pipes)
        assert process.stdout is not None
        while "start number" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    @pytest.mark.parametrize(
        "number", [signal.SIGINT, *(pytest.param(s, marks=SLOW) for s in (signal.SIGTERM, signal.SIGHUP))]
    )
    def test_it_says_how_and_the_command_goes_on(self, cloud: Cloud, number: signal.Signals) -> None:
        cloud.program(self.WAITS)
        code, message = self.interrupt(cloud, number)
        assert code == 130
        assert "go on and cost money" in message
        assert "launch/tpu.sh down --name study --zone us-west4-a" in message
        assert cloud.state() == "READY"
        assert not {"delete", "ssh stop"} & set(cloud.verbs())

        status = cloud.launch("status")
        assert "slice: READY" in status.stdout
        assert "worker 0: running: bash train.sh" in status.stdout

        other = cloud.run(command=("bash", "train.sh", "something else"))
        assert other.returncode == 2
        assert "study runs another command: bash train.sh" in errors(other.stderr)[0]

        (cloud.folder / "finish").touch()
        again = cloud.run(step="all")
        assert again.returncode == 0, again.stderr
        assert "finished" in again.stdout
        assert cloud.starts() == 1
        assert cloud.verbs()[-3:] == ["ssh run", "ssh stop", "delete"]

    @SLOW
    def test_a_command_that_succeeded_meanwhile_is_not_run_again(self, cloud: Cloud) -> None:
        cloud.program(self.WAITS)
        self.interrupt(cloud, signal.SIGINT)
        (cloud.folder / "finish").touch()
        while not list(cloud.folder.glob("host-0/jaxlora/attempts/*/exit")):
            time.sleep(0.1)
        result = cloud.run(step="all")
        assert result.returncode == 0
        assert "has succeeded on study already" in result.stderr
        assert cloud.starts() == 1
        assert cloud.state() is None

    @SLOW
    def test_a_forgotten_run_is_ended_before_another_starts(self, cloud: Cloud) -> None:
        ended = RESUMABLE + "trap 'echo $$ >> results/run/ended; exit 75' TERM\n"
        cloud.program(ended + self.WAITS.removeprefix(RESUMABLE))
        self.interrupt(cloud, signal.SIGINT)
        cloud.plan({"match": "tpu_host.sh current", "exit": 255, "stderr": "ssh: connection refused"})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        again = cloud.begin("run", command=("bash", "train.sh"), **pipes)
        assert again.stdout is not None
        while "start number 2" not in again.stdout.readline():
            assert again.poll() is None
        assert cloud.host_file("src/results/run/ended").exists()
        (cloud.folder / "finish").touch()
        again.communicate(timeout=30)
        assert again.returncode == 0
        assert cloud.starts() == 2


class TestEndingIt:
    def test_nothing_to_tear_down_is_fine(self, cloud: Cloud) -> None:
        result = cloud.launch("down")
        assert result.returncode == 0
        assert "there is no study in us-west4-a; nothing to delete" in result.stderr
        assert cloud.verbs() == []

    @pytest.mark.parametrize("options", [[], ["--queued"]])
    def test_down_finds_out_what_to_delete(self, cloud: Cloud, options: list[str]) -> None:
        assert cloud.launch("up", *options).returncode == 0
        assert cloud.launch("down").returncode == 0
        kind = (
            ["queued-resources", "delete", "study", "--force"] if options else ["tpu-vm", "delete", "study"]
        )
        assert ["compute", "tpus", *kind, *WHERE] in cloud.calls()
        assert cloud.state() is None

    def test_a_slice_that_cannot_be_deleted_is_said(self, cloud: Cloud) -> None:
        assert cloud.launch("up").returncode == 0
        cloud.plan({"match": " delete ", "exit": 1})
        result = cloud.launch("down")
        assert result.returncode == 1
        assert "could not be deleted and may cost money" in errors(result.stderr)[0]

    @pytest.mark.parametrize("step", ["down", "stop"])
    def test_the_command_saves_and_its_results_are_copied_first(self, cloud: Cloud, step: str) -> None:
        cloud.program(
            "mkdir -p results/run; trap 'sleep 0.5; echo saved > results/run/state; exit 75' TERM\n"
            "touch results/ready; while :; do sleep 0.1; done"
        )
        run = cloud.leave_running()
        assert run.wait(timeout=30) == 130
        assert cloud.launch(step).returncode == 0
        assert (cloud.results() / "state").read_text() == "saved\n"
        assert cloud.state() == (None if step == "down" else "READY")
        if step == "stop":
            assert "ended with exit code 75" in cloud.launch("status").stdout

    @SLOW
    def test_a_command_that_does_not_end_is_killed(self, cloud: Cloud) -> None:
        cloud.on_the_host(JAXLORA_STOP_SECONDS="1")
        cloud.program("trap '' TERM; mkdir -p results; touch results/ready; while :; do sleep 0.1; done")
        run = cloud.leave_running()
        run.wait(timeout=30)
        cloud.host_file("src/results/late").touch()
        assert cloud.launch("stop").returncode == 0
        assert "ended with exit code 137" in cloud.launch("status").stdout
        assert (cloud.bucket / "study" / "results" / "late").exists()

    def test_an_exit_code_that_was_cut_off_counts_as_killed(self, cloud: Cloud) -> None:
        assert cloud.run().returncode == 0
        (code,) = cloud.folder.glob("host-0/jaxlora/attempts/*/exit")
        code.write_text("")
        assert "ended with exit code 137" in cloud.launch("status").stdout
        assert "start number 2" in cloud.run().stdout

    def test_logs_come_from_the_bucket_when_the_slice_is_gone(self, cloud: Cloud) -> None:
        assert cloud.run(step="all", command=("bash", "train.sh", "hello")).returncode == 0
        result = cloud.launch("logs")
        assert result.returncode == 0
        assert result.stdout == "start number 1 with hello\n"


class TestTheTokenStaysSecret:
    def test_it_reaches_each_host_and_nothing_shows_it(self, cloud: Cloud) -> None:
        token = "hf_not_a_real_token"
        cloud.program(
            'echo "path $HF_TOKEN_PATH value ${HF_TOKEN:-none}"; cat "$HF_TOKEN_PATH" > "$FAKE_CLOUD/seen"'
        )
        result = cloud.run("--type=v5e-16", HF_TOKEN=token)
        assert result.returncode == 0, result.stderr
        assert cloud.verbs() == ["create", "scp", "ssh setup", *["ssh token"] * 4, "ssh run"]
        for host in range(4):
            path = cloud.host_file("token", host)
            assert path.read_text() == token
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (cloud.folder / "seen").read_text() == token
        assert f"path {cloud.host_file('token')} value none" in result.stdout
        (cloud.folder / "seen").unlink()
        assert token not in result.stdout + result.stderr
        holders = [
            path for path in cloud.folder.rglob("*") if path.is_file() and token in path.read_text("latin-1")
        ]
        assert sorted(holders) == sorted(cloud.host_file("token", host) for host in range(4))

    def test_a_dry_run_does_not_show_it(self, cloud: Cloud) -> None:
        result = cloud.run("--dry-run", HF_TOKEN="hf_not_a_real_token")
        assert "tpu_host.sh token" in result.stdout
        assert "hf_not" not in result.stdout + result.stderr


class TestTheJobSetManifest:
    """launch/jobset.yaml, the same run on a Kubernetes cluster with TPU nodes."""

    @pytest.fixture
    def documents(self) -> dict[str, dict]:
        text = (LAUNCH / "jobset.yaml").read_text()
        return {document["kind"]: document for document in yaml.safe_load_all(text)}

    @pytest.fixture
    def job(self, documents: dict[str, dict]) -> dict:
        (replicated,) = documents["JobSet"]["spec"]["replicatedJobs"]
        assert replicated["replicas"] == 1
        return replicated["template"]["spec"]

    @pytest.fixture
    def pod(self, job: dict) -> dict:
        return job["template"]["spec"]

    def test_one_pod_for_each_host_and_every_chip_of_it(self, job: dict, pod: dict) -> None:
        selector = pod["nodeSelector"]
        assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
        rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
        (container,) = pod["containers"]
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert container["resources"]["requests"]["google.com/tpu"] == chips
        assert job["completions"] == job["parallelism"] == rows * columns // int(chips) == 1
        assert job["completionMode"] == "Indexed"

    def test_the_table_of_types_in_it_is_right(self) -> None:
        rows = re.findall(
            r"^#   (v\S+) +(tpu-\S+) +(\S+) +(\d+) +(\d+)$",
            (LAUNCH / "jobset.yaml").read_text(),
            re.MULTILINE,
        )
        assert [row[0] for row in rows] == [
            "v4-8",
            "v4-16",
            "v5e-4",
            "v5e-8",
            "v5e-16",
            "v5p-8",
            "v6e-4",
            "v6e-8",
        ]
        names = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice"}
        for type_name, accelerator, topology, hosts, chips in rows:
            family, size = type_name.split("-")
            assert accelerator == names.get(family, "tpu-v6e-slice")
            total = int(size) // (2 if family in ("v4", "v5p") else 1)
            assert math.prod(map(int, topology.split("x"))) == int(hosts) * int(chips) == total

    def test_exit_codes_decide_as_in_the_launcher(
        self, documents: dict[str, dict], job: dict, pod: dict
    ) -> None:
        assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it
        assert job["backoffLimit"] == 0
        rules = job["podFailurePolicy"]["rules"]
        by_code = {
            code: rule["action"]
            for rule in rules
            if "onExitCodes" in rule
            for code in rule["onExitCodes"]["values"]
        }
        assert by_code == {2: "FailJob", 126: "FailJob", 127: "FailJob", 75: "Ignore"}
        assert all(rule["onExitCodes"]["operator"] == "In" for rule in rules if "onExitCodes" in rule)
        assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {
            pod["containers"][0]["name"]
        }
        (disruption,) = [rule for rule in rules if "onPodConditions" in rule]
        assert disruption == {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        }
        policy = documents["JobSet"]["spec"]["failurePolicy"]
        assert policy["maxRestarts"] >= 20  # spot nodes go often
        assert policy["rules"] == [
            {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        ]

    def test_results_outlive_the_pods_and_reach_the_bucket(
        self, documents: dict[str, dict], pod: dict
    ) -> None:
        claim = documents["PersistentVolumeClaim"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        (volume,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        (copier,) = pod["initContainers"]
        assert copier["restartPolicy"] == "Always"  # runs beside the command and ends with it
        for part in (container, copier):
            assert {mount["name"] for mount in part["volumeMounts"]} >= {volume["name"]}
        assert subprocess.run(["bash", "-n", "-c", copier["command"][-1]]).returncode == 0
        assert pod["terminationGracePeriodSeconds"] >= 25

    def test_the_copier_keeps_copying_and_copies_once_more_at_the_end(
        self, pod: dict, tmp_path: Path
    ) -> None:
        (copier,) = pod["initContainers"]
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "gcloud").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n')
        (tools / "gcloud").chmod(0o755)
        environment = {"PATH": f"{tools}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "0"}
        process = subprocess.Popen(copier["command"], env=environment)
        calls = tmp_path / "calls"
        while not calls.exists() or len(calls.read_text().splitlines()) < 2:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(timeout=10) == 0
        lines = calls.read_text().splitlines()
        assert len(lines) == 4
        assert lines[0] == lines[2]
        assert "checkpoints" in lines[0]
        assert "checkpoints" not in lines[1]
        assert all(line.endswith("/results gs://YOUR-BUCKET/study/results") for line in lines)

    def test_only_what_a_user_must_fill_in_is_left_open(self) -> None:
        assert set(re.findall(r"YOUR-[A-Z-]+", (LAUNCH / "jobset.yaml").read_text())) == {
            "YOUR-BUCKET",
            "YOUR-IMAGE",
        }

    def test_the_token_comes_from_a_secret(self, pod: dict) -> None:
        (container,) = pod["containers"]
        (token,) = [item for item in container["env"] if item["name"] == "HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "huggingface", "key": "token", "optional": True}
