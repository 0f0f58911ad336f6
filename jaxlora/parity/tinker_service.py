"""The parity interface implemented by a Tinker service via its SDK (`pip install 'jaxlora[parity]'`).

    backend = TinkerBackend("Qwen/Qwen3-8B")         # the hosted service, with TINKER_API_KEY set

Address and key come from the environment (`TINKER_BASE_URL`, `TINKER_API_KEY`) and are never printed or
recorded. Every call has a time limit. Only this module imports `tinker`, and only when a backend is created.
"""

from __future__ import annotations

import io
import os
import queue
import tarfile
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxlora.config import Condition
from jaxlora.data.render import RenderedRow, shifted
from jaxlora.models.spec import GROUPS
from jaxlora.parity.backend import AdamStep, Drawn, Pass, loss_of
from jaxlora.runtime.errors import UserError

T = TypeVar("T")
MAX_ARCHIVE_BYTES = 2 * 10**9


def switches(condition: Condition) -> dict[str, bool]:
    """Tinker's three switches for a condition. All are always sent, since `train_unembed` defaults to on."""
    groups = GROUPS[condition]
    return {"train_attn": "attention" in groups, "train_mlp": "mlp" in groups, "train_unembed": False}


class TinkerBackend:
    """A Tinker service and one of its base models.

    Args:
      base_model: the service's own name for the base.
      seconds: time limit per call. A service may compile or load for minutes on the first ones.

    Raises:
      UserError: the SDK is not installed, no key is set, or the service does not answer in time.
    """

    def __init__(self, base_model: str, seconds: float = 300.0):
        try:
            import tinker
        except ImportError:
            raise UserError("the tinker SDK is not installed; pip install 'jaxlora[parity]'") from None
        if not os.environ.get("TINKER_API_KEY"):
            raise UserError(
                "TINKER_API_KEY is not set; export your key (and TINKER_BASE_URL for another service)"
            )
        os.environ.setdefault("TINKER_TELEMETRY", "0")
        self.tinker, self.base_model, self.seconds = tinker, base_model, seconds
        self.service = self.call("connecting", tinker.ServiceClient)

    def create(self, condition: Condition, rank: int, seed: int) -> TinkerTrainer:
        """See `Backend`."""

        def create():
            return _settled(
                self.service.create_lora_training_client(
                    base_model=self.base_model, rank=rank, seed=seed, **switches(condition)
                ),
                self.seconds,
            )

        return TinkerTrainer(self, self.call("creating an adapter", create))

    def describe(self) -> dict[str, str]:
        """See `Backend`."""
        return {"trainer": "tinker", "sdk": self.tinker.__version__}

    def call(self, what: str, function: Callable[[], T]) -> T:
        """Run one SDK call with a time limit; any failure becomes a one-line error.

        The SDK retries an unreachable service for hours, and some of its calls take no time limit, so the
        call runs in a thread that is abandoned when its time is up.
        """
        answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def run() -> None:
            try:
                answers.put((True, function()))
            except BaseException as error:  # handed to the caller's thread
                answers.put((False, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            ok, value = answers.get(timeout=self.seconds)
        except queue.Empty:
            raise UserError(
                f"the Tinker service did not answer within {self.seconds:g} s while {what};"
                " is it up, and is TINKER_BASE_URL right?"
            ) from None
        if ok:
            return value
        reason = " ".join(str(value).split())[:300]
        raise UserError(
            f"the Tinker service failed while {what}: {type(value).__name__}: {_redacted(reason)}"
        )


class TinkerTrainer:
    """One adapter on a Tinker service."""

    def __init__(self, backend: TinkerBackend, client: Any):
        self.backend, self.client = backend, client

    def forward(self, rows: Sequence[RenderedRow]) -> Pass:
        """See `Trainer`."""
        return self._pass("computing log-probabilities", self.client.forward, rows, "cross_entropy")

    def forward_backward(self, rows: Sequence[RenderedRow], loss: str = "cross_entropy") -> Pass:
        """See `Trainer`."""
        return self._pass("computing gradients", self.client.forward_backward, rows, loss)

    def optim_step(self, adam: AdamStep) -> None:
        """See `Trainer`."""
        settings = self.backend.tinker.types.AdamParams(
            learning_rate=adam.learning_rate, beta1=adam.b1, beta2=adam.b2, eps=adam.eps, weight_decay=0.0
        )
        self._wait("making an optimizer step", lambda: self.client.optim_step(settings))

    def save(self, name: str) -> str:
        """See `Trainer`."""
        return self._wait("saving the adapter", lambda: self.client.save_weights_for_sampler(name)).path

    def sample(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], limit: int, end: int
    ) -> list[list[int]]:
        """See `Trainer`."""
        sampler = self._sampler(checkpoint)
        return [self._answer(sampler, prompt, 0.0, limit, 0, end).tokens for prompt in prompts]

    def draw(self, checkpoint: str, prompt: Sequence[int], limits: Sequence[int], end: int) -> list[Drawn]:
        """See `Trainer`."""
        sampler = self._sampler(checkpoint)
        return [
            self._answer(sampler, prompt, 1.0, limit, seed, end) for seed, limit in enumerate(limits, start=1)
        ]

    def _sampler(self, checkpoint: str) -> Any:
        return self.backend.call(
            "opening a sampler",
            lambda: _settled(
                self.backend.service.create_sampling_client(model_path=checkpoint), self.backend.seconds
            ),
        )

    def _answer(
        self, sampler: Any, prompt: Sequence[int], temperature: float, limit: int, seed: int, end: int
    ) -> Drawn:
        types = self.backend.tinker.types
        settings = types.SamplingParams(max_tokens=limit, temperature=temperature, seed=seed, stop=[end])
        given = types.ModelInput.from_ints(list(prompt))
        call = partial(sampler.sample, prompt=given, num_samples=1, sampling_params=settings)
        sequence = self._wait("sampling", call).sequences[0]
        return Drawn([int(token) for token in sequence.tokens], [float(x) for x in sequence.logprobs or ()])

    def fetch(self, checkpoint: str, folder: Path) -> None:
        """See `Trainer`."""
        folder.mkdir(parents=True)

        def archive() -> bytes:
            run, *_, name = checkpoint.removeprefix("tinker://").split("/")
            rest = self.backend.service.create_rest_client()
            inner = "sampler_weights/" + name if "/sampler_weights/" in checkpoint else name
            url = rest.get_checkpoint_archive_url(run, inner).result(timeout=self.backend.seconds).url
            with urllib.request.urlopen(url, timeout=self.backend.seconds) as response:
                return response.read(MAX_ARCHIVE_BYTES + 1)

        content = self.backend.call("fetching the adapter", archive)
        if len(content) > MAX_ARCHIVE_BYTES:
            raise UserError(f"the adapter's archive is larger than {MAX_ARCHIVE_BYTES} bytes; it is not read")
        unpack_adapter(content, folder)

    def _pass(self, what: str, method: Callable[..., Any], rows: Sequence[RenderedRow], loss: str) -> Pass:
        datums = [self._datum(row, loss) for row in rows]
        answer = self._wait(what, lambda: method(datums, loss))
        logprobs = [np.asarray(out["logprobs"].tolist(), np.float32) for out in answer.loss_fn_outputs]
        lengths = [row.n_tokens for row in rows]
        if [len(values) for values in logprobs] != lengths:
            raise UserError(
                f"the Tinker service answered {[len(v) for v in logprobs]} values for {lengths} targets"
            )
        return Pass(logprobs, _reported_loss(answer, logprobs, rows, loss))

    def _datum(self, row: RenderedRow, loss: str) -> Any:
        """The row in the SDK's format.

        Cross entropy takes weights; policy gradients take none, and an advantage of 0 on the prompt.
        """
        types = self.backend.tinker.types
        inputs, targets, weights = shifted(row)
        given = {"weights": weights}
        if loss != "cross_entropy":
            advantages, logprobs = row.extras["advantages"][1:], row.extras["sampler_logprobs"][1:]
            given = {"advantages": weights * advantages, "logprobs": logprobs}
        numbers = {
            name: types.TensorData.from_numpy(values.astype(np.float32)) for name, values in given.items()
        }
        return types.Datum(
            model_input=types.ModelInput.from_ints(inputs.tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(targets.astype(np.int64)),
                **numbers,
            },
        )

    def _wait(self, what: str, method: Callable[[], Any]) -> Any:
        return self.backend.call(what, lambda: method().result(timeout=self.backend.seconds))


def unpack_adapter(content: bytes, folder: Path) -> None:
    """Extract an adapter's two files from Tinker's tar archive, ignoring anything else in it.

    Raises:
      UserError: the archive cannot be read, or does not contain them.
    """
    from jaxlora.checkpoints.peft import SETTINGS, WEIGHTS

    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {Path(member.name).name: member for member in archive if member.isfile()}
            for name in (WEIGHTS, SETTINGS):
                source = archive.extractfile(files[name]) if name in files else None
                if source is None:
                    raise UserError(f"the adapter's archive holds no {name}, only {', '.join(sorted(files))}")
                (folder / name).write_bytes(source.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"the adapter's archive cannot be read: {error}") from None


def _reported_loss(answer: Any, logprobs: list[np.ndarray], rows: Sequence[RenderedRow], loss: str) -> float:
    """The summed loss that the service reports: as a metric, as token losses, or via log-probabilities."""
    if (metrics := answer.metrics or {}).get("loss:sum") is not None:
        return float(metrics["loss:sum"])
    if all("elementwise_loss" in out for out in answer.loss_fn_outputs):
        return float(sum(np.sum(out["elementwise_loss"].tolist()) for out in answer.loss_fn_outputs))
    return sum(loss_of(row, lp, loss) for row, lp in zip(rows, logprobs, strict=True))


def _settled(value: Any, seconds: float) -> Any:
    """Newer SDKs return a future where older ones return the client itself."""
    return value.result(timeout=seconds) if hasattr(value, "result") else value


def _redacted(text: str) -> str:
    """The text without the service's address and key."""
    address = urllib.parse.urlsplit(os.environ.get("TINKER_BASE_URL", ""))
    secrets = {
        "TINKER_API_KEY": [os.environ.get("TINKER_API_KEY", "")],
        "TINKER_BASE_URL": [address.geturl(), address.netloc, address.hostname or ""],
    }
    for name, parts in secrets.items():
        for part in filter(None, parts):
            text = text.replace(part, f"<{name}>")
    return text
