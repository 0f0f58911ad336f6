"""The model computes what Transformers' Qwen3 computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.hf_models import CONFIGURATIONS, make_checkpoint, our_model

from jaxlora.models.attention import segment_attention


def our_logits(spec, frozen, tokens, positions, segment_ids):
    @jax.jit
    def run(frozen):
        model = spec.bind({}, frozen)
        hidden, _ = model(
            tokens, positions, lambda q, k, v, _: (segment_attention(q, k, v, segment_ids), None)
        )
        return model.logits(hidden)

    return np.asarray(run(frozen), np.float32)


def rows_of_tokens(vocab, lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (len(lengths), max(lengths)))  # padding is arbitrary tokens, not zeros
    positions = np.broadcast_to(np.arange(max(lengths)), tokens.shape)
    segment_ids = (positions < np.array(lengths)[:, None]).astype(np.int32)
    return tokens, positions, segment_ids


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unroll"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_float32_logits_equal_transformers(tmp_path, name, scan):
    reference = make_checkpoint(tmp_path, seed=len(name), **CONFIGURATIONS[name])
    spec, frozen = our_model(tmp_path, scan=scan)
    lengths = [37, 5, 64]
    tokens, positions, segment_ids = rows_of_tokens(160, lengths)
    ours = our_logits(spec, frozen, tokens, positions, segment_ids)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            theirs = reference(torch.tensor(tokens[row : row + 1, :length])).logits[0].numpy()
        error = np.linalg.norm(ours[row, :length] - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
        assert error.max() < 2e-5, (row, error.max())


def test_positions_beyond_8k_equal_transformers(tmp_path):
    reference = make_checkpoint(tmp_path, rope_theta=50_000.0)
    spec, frozen = our_model(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 160, (1, 48))
    positions = np.arange(9_000, 9_048)[None]
    # a constant shift of all positions cancels out in attention, so leave a gap in the middle
    positions[:, 24:] += 6_000
    ours = our_logits(spec, frozen, tokens, positions, np.ones_like(tokens))
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens), position_ids=torch.tensor(positions)).logits.numpy()
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert error.max() < 2e-5, error.max()


def test_bfloat16_logits_are_within_bfloat16_rounding(tmp_path):
    """Our bfloat16 error against float32 is no larger than Transformers' own, within a quarter."""
    make_checkpoint(tmp_path)
    tokens, positions, segment_ids = rows_of_tokens(160, [64, 64])
    exact = our_logits(*our_model(tmp_path), tokens, positions, segment_ids)
    ours = our_logits(*our_model(tmp_path, "bfloat16"), tokens, positions, segment_ids)
    from transformers import Qwen3ForCausalLM

    reference = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.float().numpy()

    def error(x):
        return np.linalg.norm(x - exact) / np.linalg.norm(exact)

    assert error(ours) < 0.05
    assert error(ours) < 1.25 * error(theirs)


def test_packed_rows_do_not_see_each_other(tmp_path):
    make_checkpoint(tmp_path)
    spec, frozen = our_model(tmp_path)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 160, n) for n in (11, 30, 7)]
    packed = [np.concatenate(rows)[None], np.concatenate([np.arange(len(r)) for r in rows])[None]]
    segment_ids = np.concatenate([np.full(len(r), i + 1) for i, r in enumerate(rows)])[None]
    together = our_logits(spec, frozen, *packed, segment_ids)[0]
    start = 0
    for row in rows:
        alone = our_logits(
            spec, frozen, row[None], np.arange(len(row))[None], np.ones((1, len(row)), np.int32)
        )[0]
        np.testing.assert_allclose(together[start : start + len(row)], alone, atol=2e-5)
        start += len(row)


def test_base_in_bfloat16_is_loaded_bit_for_bit(tmp_path):
    reference = make_checkpoint(tmp_path, dtype=torch.bfloat16, shards=3)
    for scan in (True, False):
        _, frozen = our_model(tmp_path, "bfloat16", scan)
        layers = frozen["layers"]
        ours = layers["mlp"]["up_proj"]["weight"][2] if scan else layers[2]["mlp"]["up_proj"]["weight"]
        theirs = reference.model.layers[2].mlp.up_proj.weight.detach()
        assert np.array_equal(np.asarray(ours, np.float32), theirs.float().numpy())
        assert ours.dtype == jnp.bfloat16
