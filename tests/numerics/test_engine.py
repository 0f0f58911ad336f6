"""The engine's five verbs compute what a run, Transformers and PEFT compute, and touch nothing else."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.hf_models import make_checkpoint
from peft import PeftModel
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

import jaxlora
from jaxlora.config import LoraConfig, MeshConfig, OptimConfig
from jaxlora.data.packing import pack
from jaxlora.lora import init_lora
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.remote import embedded_path
from jaxlora.sharding import make_mesh
from jaxlora.train.step import init_state, make_gradient_step, make_train_step

CHAT = [
    {"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": text}]}
    for text in ("It is 5.", "2 + 3 = 5, so the answer is 5.", "five")
]


@pytest.fixture(scope="module")
def engine():
    return jaxlora.load("embedded:base", "float32", make_mesh(MeshConfig(), jax.devices()[:1]))


def difference(a, b) -> float:
    flat = [np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def ids_of(engine, row) -> list[int]:
    return engine.tokenizer.apply_chat_template(row["messages"], enable_thinking=False, return_dict=False)


def torch_logprobs(model, tokens: list[int]) -> np.ndarray:
    """log p of each token after the first."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()


def test_log_probabilities_are_those_of_transformers(engine):
    reference = AutoModelForCausalLM.from_pretrained(embedded_path("base"), dtype=torch.float32).eval()
    found = engine.lora(rank=2).logprobs(CHAT)
    for row, ours in zip(CHAT, found, strict=True):
        theirs = torch_logprobs(reference, ids_of(engine, row))
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_gradient_is_computed_at_the_call_and_adds_up(engine):
    together, apart = engine.lora(rank=4, seed=1), engine.lora(rank=4, seed=1)
    whole = together.forward_backward(CHAT)
    parts = [apart.forward_backward([row]) for row in CHAT]
    assert whole.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-6)
    assert whole.mean_nll == pytest.approx(whole.loss / sum(part.weight for part in parts), rel=1e-6)
    for ours, part in zip(whole.logprobs, parts, strict=True):
        np.testing.assert_allclose(ours, part.logprobs[0], atol=1e-5)
    assert difference(together._grads, apart._grads) < 1e-5
    norms = [trainer.optim_step(1e-3) for trainer in (together, apart)]
    assert norms[0]["grad_norm"] == pytest.approx(norms[1]["grad_norm"], rel=1e-5)
    assert together._grads is None
    # The gradient was that of the weights at the call: changing them afterwards must not matter.
    first = engine.lora(rank=4, seed=1)
    first.forward_backward(CHAT)
    first._trained = jax.tree.map(lambda x: x + 1, first.trained)
    assert difference(first._grads, engine_gradient(engine)) < 1e-6


def engine_gradient(engine):
    trainer = engine.lora(rank=4, seed=1)
    trainer.forward_backward(CHAT)
    return trainer._grads


@pytest.mark.parametrize("what", ["lora", "full"])
def test_steps_are_those_of_a_run(engine, what):
    trainer = engine.lora(rank=4, seed=3) if what == "lora" else engine.full()
    rows = trainer._render(CHAT)
    start = jax.tree.map(jnp.copy, trainer.trained)
    optim = OptimConfig(weight_decay=0.1)
    step = make_train_step(trainer.spec, optim, engine.machine.compute(len(rows)))
    state = init_state(start, optim)
    for rate in (1e-3, 5e-4, 1e-3):
        result = trainer.forward_backward(CHAT)
        trainer.optim_step(rate, weight_decay=0.1)
        with engine.inside():
            frozen = {} if what == "full" else engine.frozen
            state, metrics = step(state, frozen, pack(rows, (256,), 256), jnp.float32(rate))
        assert result.loss == pytest.approx(float(metrics["nll"]), rel=1e-5)
        assert result.loss == pytest.approx(
            -sum(float(np.dot(row.weights[1:], lp)) for row, lp in zip(rows, result.logprobs, strict=True)),
            rel=1e-5,
        )
    assert difference(trainer.trained, state.trained) < 1e-4


def test_token_ids_with_weights_are_rows_too(engine):
    trainer = engine.lora(rank=2)
    tokens = ids_of(engine, CHAT[0])
    weights = [0.0] * (len(tokens) - 3) + [1.0, 0.5, 0.0]
    result = trainer.forward_backward([{"tokens": tokens, "weights": weights}])
    assert result.weight == 1.5
    assert result.loss == pytest.approx(-(result.logprobs[0][-3] + 0.5 * result.logprobs[0][-2]), rel=1e-6)
    with pytest.raises(UserError, match="need as many finite weights"):
        trainer.forward_backward([{"tokens": tokens, "weights": weights[1:]}])


def test_greedy_answers_are_those_of_transformers_and_so_are_their_log_probabilities(engine):
    reference = AutoModelForCausalLM.from_pretrained(embedded_path("base"), dtype=torch.float32).eval()
    prompt = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"
    (answer,) = engine.lora(rank=2).sample([prompt], max_new_tokens=24, temperature=0)
    messages = [{"role": "user", "content": prompt}]
    ids = engine.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    with torch.no_grad():
        theirs = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert answer.tokens == theirs[0, len(ids) :].tolist()
    logprobs = torch_logprobs(reference, ids + answer.tokens)[len(ids) - 1 :]
    np.testing.assert_allclose(answer.logprobs, logprobs, atol=2e-5)
    assert answer.stop_reason in ("stop", "length")
    assert engine.tokenizer.decode(answer.tokens).startswith(answer.text)


def test_the_same_seed_draws_the_same_tokens_whatever_the_batch(engine):
    trainer = engine.lora(rank=2)
    prompts = [f"What is {a} + {b}?" for a in range(3) for b in range(4)]
    many = trainer.sample(prompts, max_new_tokens=12, temperature=1.0, seed=5, slots=12)
    few = trainer.sample(prompts, max_new_tokens=12, temperature=1.0, seed=5, slots=2)
    assert [a.tokens for a in many] == [b.tokens for b in few]
    other = trainer.sample(prompts, max_new_tokens=12, temperature=1.0, seed=6, slots=12)
    assert [a.tokens for a in many] != [b.tokens for b in other]
    assert len({tuple(a.tokens) for a in trainer.sample([prompts[0]] * 8, 12, temperature=1.5)}) > 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.4, 0.9)])
def test_drawn_tokens_have_the_frequencies_of_the_distribution(engine, temperature, top_p):
    trainer, n = engine.lora(rank=2), 2000
    ids = ids_of(engine, CHAT[0])[:9]
    answers = trainer.sample([ids] * n, 1, temperature=temperature, top_p=top_p, seed=1, slots=256)
    reference = AutoModelForCausalLM.from_pretrained(embedded_path("base"), dtype=torch.float32).eval()
    with torch.no_grad():
        p = (reference(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    keep = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1] if top_p < 1 else order
    kept = np.zeros_like(p)
    kept[keep] = p[keep] / p[keep].sum()
    counts = np.bincount([a.tokens[0] for a in answers], minlength=len(p))
    assert not counts[kept == 0].any()
    common = kept * n >= 5
    rest = kept[~common].sum()
    observed, expected = [*counts[common]], [*(kept[common] * n)]
    if rest * n >= 5:
        observed, expected = [*observed, counts[~common].sum()], [*expected, rest * n]
    else:
        scale = sum(observed) / sum(expected)
        expected = [e * scale for e in expected]
    assert len(observed) > 2
    assert chisquare(observed, expected).pvalue > 1e-4
    for answer in answers[:50]:
        assert answer.logprobs[0] == pytest.approx(np.log(kept[answer.tokens[0]]), abs=1e-4)


def train_a_little(trainer):
    for _ in range(3):
        trainer.forward_backward(CHAT)
        trainer.optim_step(3e-3)
    return trainer


def test_an_adapter_is_saved_opened_and_read_by_peft(engine, tmp_path):
    trainer = train_a_little(engine.lora(rank=4, targets=["q_proj", "down_proj"], alpha=16, seed=2))
    trainer.save(tmp_path / "adapter")
    again = engine.open(tmp_path / "adapter")
    assert again.seed == 2
    assert again.spec.lora == LoraConfig(targets="q_proj,down_proj", rank=4, alpha=16)
    assert difference(again.trained, trainer.trained) == 0
    base = AutoModelForCausalLM.from_pretrained(embedded_path("base"), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    theirs = torch_logprobs(peft, ids_of(engine, CHAT[1]))
    np.testing.assert_allclose(again.logprobs([CHAT[1]])[0], theirs, atol=5e-5)
    with pytest.raises(UserError, match="exists already"):
        trainer.save(tmp_path / "adapter")


def test_an_adapter_is_saved_where_the_base_has_no_chat_template(tmp_path):
    make_checkpoint(tmp_path / "base")
    trainer = jaxlora.load(str(tmp_path / "base"), "float32").lora(rank=2)
    trainer.save(tmp_path / "adapter")
    again = trainer.engine.open(tmp_path / "adapter")
    assert difference(again.trained, trainer.trained) == 0


def test_a_full_model_is_saved_opened_and_read_by_transformers(engine, tmp_path):
    trainer = train_a_little(engine.full())
    before = engine.lora(rank=1).logprobs(CHAT)
    trainer.save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.dtype == torch.float32
    ours = trainer.logprobs(CHAT)
    for row, values in zip(CHAT, ours, strict=True):
        np.testing.assert_allclose(values, torch_logprobs(model, ids_of(engine, row)), atol=5e-5)
    again = engine.open(tmp_path / "model").logprobs(CHAT)
    np.testing.assert_allclose(again[0], ours[0], atol=1e-6)
    assert np.abs(ours[0] - before[0]).max() > 0.1  # it learned, and the base did not
    assert (
        engine.tokenizer.chat_template
        == type(engine.tokenizer).from_pretrained(tmp_path / "model").chat_template
    )


@pytest.mark.parametrize("what", ["lora", "full"])
def test_training_goes_on_from_a_saved_state(engine, tmp_path, what):
    def fresh():
        return engine.lora(rank=2, seed=1) if what == "lora" else engine.full()

    straight = train_a_little(train_a_little(fresh()))
    first = train_a_little(fresh())
    first.save_state(tmp_path / "state", step=3)
    resumed = fresh()
    assert resumed.resume(tmp_path / "state") == 3
    train_a_little(resumed)
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("settings", [{"weight_decay": 0.1}, {"clip_norm": 1.0, "weight_decay": 0.1}])
def test_a_state_fits_whatever_the_optimizers_settings(engine, tmp_path, settings):
    straight, early = engine.lora(rank=2, seed=1), engine.lora(rank=2, seed=1)
    early.save_state(tmp_path / "start")  # looked at before anybody said how to optimise
    for trainer in (straight, early):
        trainer.forward_backward(CHAT)
        trainer.optim_step(1e-3, **settings)
    straight.save_state(tmp_path / "state", step=1)
    resumed = engine.lora(rank=2, seed=5)
    assert resumed.resume(tmp_path / "state") == 1
    for trainer in (straight, early, resumed):
        trainer.forward_backward(CHAT)
        trainer.optim_step(1e-3, **settings)
    assert difference(early.trained, straight.trained) == 0
    assert difference(resumed.trained, straight.trained) == 0
    for other in (engine.lora(rank=3), engine.full()):
        with pytest.raises(UserError, match="holds arrays of different shapes") as error:
            other.resume(tmp_path / "state")
        assert "\n" not in str(error.value)


def test_a_stopped_call_leaves_a_trainer_that_goes_on(engine, monkeypatch):
    trainer = engine.lora(rank=2, seed=1)
    trainer.forward_backward(CHAT[:2])

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("jaxlora.engine.hosts.whole", interrupted)
        with pytest.raises(KeyboardInterrupt) as error:
            trainer.forward_backward(CHAT)
    assert "gradients since the last optim_step are dropped" in error.value.__notes__[0]
    with pytest.raises(UserError, match="call forward_backward first"):
        trainer.optim_step(1e-3)
    other = engine.lora(rank=2, seed=1)
    for one in (trainer, other):
        one.forward_backward(CHAT)
    assert difference(trainer._grads, other._grads) == 0


def test_one_program_serves_any_number_of_buffers(engine):
    trainer = engine.lora(rank=2, targets="v_proj")
    rows = [{"tokens": [5 + (i + j) % 900 for j in range(700)]} for i in range(3)]
    compute = engine.machine.compute(32)
    losses = []
    for n in (1, 2, 3):
        found = trainer.forward_backward(rows[:n])
        assert [len(values) for values in found.logprobs] == [699] * n
        losses.append(found.loss)
    assert make_gradient_step(trainer.spec, compute, "cross_entropy")._cache_size() == 1
    alone = [trainer.forward_backward([row]).loss for row in rows]
    np.testing.assert_allclose(losses, np.cumsum(alone), rtol=1e-6)


def test_rows_and_prompts_come_from_anything_that_lists_them(engine):
    trainer = engine.lora(rank=2)
    expected = trainer.logprobs([CHAT[0], {"tokens": [5, 6, 7]}])
    rows = [CHAT[0], {"tokens": np.array([5, 6, 7], np.uint8), "weights": np.array([False, True, True])}]
    for given in (tuple(rows), (row for row in rows), np.array(rows, object)):
        for a, b in zip(trainer.logprobs(given), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    answers = [
        trainer.sample(given, 3, temperature=0)[0].tokens
        for given in ([[5, 6, 7]], np.array([[5, 6, 7]]), (x for x in [(5, 6, 7)]), [jnp.array([5, 6, 7])])
    ]
    assert answers == [answers[0]] * 4


def test_the_base_stays_as_it_was_and_trainers_do_not_see_each_other(engine):
    before = jax.tree.map(np.array, engine.frozen)
    one, two = engine.lora(rank=2, seed=0), engine.lora(rank=2, seed=0)
    train_a_little(one)
    assert difference(two.trained, init_lora(two.spec, 0)) == 0
    jax.tree.map(np.testing.assert_array_equal, before, engine.frozen)


def test_it_works_in_a_thread_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found: list = []

    def work():
        try:
            trainer = jaxlora.load("embedded:base").lora(rank=2)
            trainer.forward_backward(CHAT[:1])
            trainer.optim_step(1e-3)
            found.append(trainer.sample(["What is 2 + 3?"], max_new_tokens=4, seed=0)[0].text)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], str), found
    assert list(tmp_path.rglob("*")) == []


def test_all_devices_give_what_one_gives(engine):
    many = jaxlora.load("embedded:base", "float32", MeshConfig(data=2, fsdp=2, tensor=2))
    trainers = [train_a_little(one.lora(rank=2, seed=4)) for one in (engine, many)]
    assert difference(trainers[1].trained, trainers[0].trained) < 1e-4
    answers = [t.sample(["What is 2 + 3?", "And 3 + 4?"], 8, temperature=0) for t in trainers]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in answers[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.optim_step(1e-3), "call forward_backward first"),
        (lambda t: t.forward_backward([]), "at least one row"),
        (lambda t: t.forward_backward(CHAT[0]), "give a list"),
        (lambda t: t.forward_backward([{"text": "a"}]), "row 0: give `messages`, or `tokens`"),
        (lambda t: t.forward_backward([{"tokens": [1, 2], "wieghts": [0, 1]}]), "'wieghts' is not known"),
        (lambda t: t.forward_backward(CHAT, loss="hinge"), "'hinge' is not known; give one of cross_entropy"),
        (lambda t: t.forward_backward(CHAT, loss=None), "loss: None is not known; give a name or a"),
        (lambda t: t.forward_backward([{"tokens": [1, 5000]}]), "5000 is not one of the model's 1024"),
        (lambda t: t.forward_backward([{"tokens": [1] * 5000}]), "but the model has only 2048 positions"),
        (lambda t: t.forward_backward([{"messages": CHAT[0]["messages"][:1]}]), "row 0: no assistant turn"),
        (lambda t: t.sample(["a"], max_new_tokens=5000), "the model has 2,048 positions"),
        (lambda t: t.forward_backward([{"tokens": [1, 2**32 + 3]}]), "row 0: token 2147483647 is not one"),
        (lambda t: t.forward_backward([{"tokens": [1, -7]}]), "row 0: token -1 is not one of"),
        (lambda t: t.forward_backward([{"tokens": None}]), "row 0: tokens must be at least two whole"),
        (lambda t: t.forward_backward([{"tokens": [[1, 2], [3]]}]), "row 0: tokens must be at least two"),
        (lambda t: t.forward_backward([{"tokens": [1, 2], "weights": ["a", "b"]}]), "as many finite weights"),
        (lambda t: t.forward_backward([{"tokens": [1, 2], "weights": [0, 1e300]}]), "as many finite weights"),
        (
            lambda t: t.forward_backward([CHAT[0] | {"weights": [0, 1]}]),
            "both `weights` and `messages` are given",
        ),
        (lambda t: t.forward_backward("text"), "rows: give a list, not one str"),
        (lambda t: t.sample("a prompt"), "prompts: give a list, not one str"),
        (lambda t: t.sample([1, 2]), "prompt 0: give a list, not one int"),
        (lambda t: t.sample([CHAT[0]]), "prompt 0: give a list, not one dict"),
        (lambda t: t.sample([[1.5]]), "prompt 0: give whole numbers"),
        (lambda t: t.sample(["a"], stop_ids=5), "stop_ids: give a list, not one int"),
        (lambda t: t.sample(["a"], stop_ids=[10**12]), "stop_ids: give whole numbers"),
        (lambda t: t.sample(["a"], slots=0), "slots: 0 is not allowed; give a whole number, 1 or more"),
        (lambda t: t.sample(["a"], max_new_tokens=4.5), "max_new_tokens: 4.5 is not allowed"),
        (lambda t: t.sample(["a"], seed=None), "seed: None is not allowed"),
        (lambda t: t.sample(["a"], temperature=1e-300), "temperature: 1e-300 is not allowed"),
        (lambda t: t.sample(["a"], temperature=float("inf")), "temperature: inf is not allowed"),
        (lambda t: t.sample(["a"], top_p=1e-300), "top_p: 1e-300 is not allowed"),
        (lambda t: t.sample(["a"], temperature=-1), "temperature: -1 is not allowed; give 0, or more"),
        (lambda t: t.sample(["a"], top_p=0), "top_p"),
        (lambda t: t.sample([[]]), "at least one token"),
        (lambda t: t.sample([[5000]]), "from 0 to 1023"),
        (lambda t: t.resume("nowhere"), "no such folder"),
        (lambda t: t.engine.open("nowhere"), "no such folder"),
        (lambda t: t.engine.lora(rank=0), "config.lora.rank: 0 is not allowed"),
        (lambda t: t.engine.lora(rank=2, targets="w1"), 'config.lora.targets: "w1" is not allowed'),
        (lambda t: t.engine.lora(rank=2, targets="w_proj"), "this model has no w_proj"),
        (lambda t: jaxlora.load("nowhere"), "no directory 'nowhere'"),
        (lambda t: jaxlora.load("embedded:base", "int8"), "'int8' is not supported"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(engine, call, message):
    with pytest.raises(UserError, match=re.escape(message) if "|" not in message else message) as error:
        call(engine.lora(rank=2))
    assert "\n" not in str(error.value)


def test_only_the_rate_may_change_between_steps(engine):
    trainer = engine.lora(rank=2)
    trainer.forward_backward(CHAT)
    trainer.optim_step(1e-3)
    trainer.forward_backward(CHAT)
    with pytest.raises(UserError, match="only the learning rate may change"):
        trainer.optim_step(1e-3, b2=0.999)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "dro"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_the_line_names_the_step(engine, loss):
    """Recorded log-probabilities that are finite, and absurd."""
    trainer = engine.lora(rank=2)
    row = {"tokens": [5, 6, 7, 8], "weights": [0, 0, 1, 1], "advantages": [0, 0, 0.5, -0.5]}
    trainer.forward_backward([row | {"logprobs": [0, 0, -1.2, -0.7]}], loss=loss)
    trainer.optim_step(1e-3)
    before = jax.tree.map(np.asarray, trainer.state)
    trainer.forward_backward([row | {"logprobs": [0, 0, -1e30, -1e30]}], loss=loss)
    with pytest.raises(UserError, match=r"^optim_step 2: the gradient's norm is (nan|inf), so .*changed"):
        trainer.optim_step(1e-3)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, trainer.state))
    with pytest.raises(UserError, match="there is no gradient"):
        trainer.optim_step(1e-3)
    trainer.forward_backward([row | {"logprobs": [0, 0, -1.2, -0.7]}], loss=loss)
    assert np.isfinite(trainer.optim_step(1e-3)["update_norm"])


def test_the_readmes_lines_run(repository, tmp_path, monkeypatch):
    text = (repository / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "jaxlora.load" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert sorted(os.listdir(tmp_path)) == ["adapter"]
    assert (Path("adapter") / "adapter_model.safetensors").is_file()
