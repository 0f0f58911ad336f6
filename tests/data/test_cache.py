"""Tokenised rows that are kept are the rows, and are found only where nothing has changed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.trials import flip_a_bit

from jaxlora.checkpoints.base import tokenizer_sha256
from jaxlora.commands import bench_dataset
from jaxlora.data import cache as caching
from jaxlora.data import rows as reading
from jaxlora.data.cache import RowCache
from jaxlora.data.render import load_tokenizer
from jaxlora.data.rows import RowOptions, load_rendered_rows

TOKENIZER = load_tokenizer("embedded:base")


@pytest.fixture
def cache(tmp_path) -> RowCache:
    return RowCache(tmp_path / "kept", lambda: tokenizer_sha256(TOKENIZER), smallest=0)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}"} for n in range(20)]
    rows[7] = {"prompt": "odd"}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def rendered(monkeypatch):
    """How many rows were tokenised."""
    counts: list[int] = []
    original = reading.render_batch

    def counting(tokenizer, examples, **options):
        counts.append(len(examples))
        return original(tokenizer, examples, **options)

    monkeypatch.setattr(reading, "render_batch", counting)
    return counts


def load(file, cache, **given):
    settings = {"max_length": 100, "on_bad_row": "skip"} | given
    return load_rendered_rows(file, TOKENIZER, cache=cache, **settings)


def test_what_is_found_is_what_was_tokenised(file, cache, rendered):
    plain, first, again = load(file, None), load(file, cache), load(file, cache)
    assert len(rendered) == 2
    for rows, report in (first, again):
        assert report == plain[1]
        assert report.describe() == plain[1].describe()
        for ours, theirs in zip(rows, plain[0], strict=True):
            assert (ours.row_id, ours.prompt_id) == (theirs.row_id, theirs.prompt_id)
            for name in ("tokens", "weights"):
                a, b = getattr(ours, name), getattr(theirs, name)
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype
    copy = file.with_name("copy.jsonl")
    copy.write_bytes(file.read_bytes())
    rows, report = load(copy, cache)
    assert len(rendered) == 2
    assert report == replace(plain[1], path=str(copy))


def test_whatever_changes_a_row_makes_them_anew(file, cache, rendered, monkeypatch):
    load(file, cache)
    changes = [
        {"max_length": 99},
        {"limit": 5},
        {"options": RowOptions(loss_on="all")},
        {"options": RowOptions(columns={"prompt": "completion", "completion": "prompt"})},
    ]
    for change in changes:
        load(file, cache, **change)
    load(file, replace(cache, tokenizer_sha256=lambda: "another"))
    monkeypatch.setattr(caching, "_code", lambda: "changed")
    load(file, cache)
    file.write_text(file.read_text().replace("and", "plus"))
    load(file, cache)
    assert len(rendered) == 1 + len(changes) + 3
    assert len(list(cache.folder.iterdir())) == caching.ENTRIES


def test_only_the_newest_are_kept_and_use_makes_new(file, cache, rendered):
    load(file, cache, max_length=101)
    for length in range(102, 103 + caching.ENTRIES):
        load(file, cache, max_length=length)
        load(file, cache, max_length=101)  # in use
    assert len(rendered) == caching.ENTRIES + 2
    load(file, cache, max_length=102)
    assert len(rendered) == caching.ENTRIES + 3


@pytest.mark.parametrize("name", ["tokens", "weights", "ends", "names", "rows.json"])
def test_a_damaged_entry_is_made_anew(file, cache, rendered, name):
    expected = load(file, cache)[0]
    (entry,) = cache.folder.iterdir()
    if name == "rows.json":
        (entry / name).write_text("{")
    else:
        flip_a_bit(entry / name)
    for rows in (load(file, cache)[0], load(file, cache)[0]):
        assert [row.tokens.tolist() for row in rows] == [row.tokens.tolist() for row in expected]
    assert len(rendered) == 2


def test_a_place_that_cannot_be_written_costs_only_the_cache(file, tmp_path, cache, capsys):
    (tmp_path / "kept").write_text("a file")
    rows, _ = load(file, cache)
    assert len(rows) == 19
    assert "the tokenised rows are not kept" in " ".join(capsys.readouterr().err.split())


def test_small_files_are_not_kept(file, cache):
    load(file, replace(cache, smallest=caching.SMALLEST))
    assert not cache.folder.exists()


@pytest.mark.slow
def test_the_benchmark_counts_the_rows_of_both_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--config", "own", "--rows", "50"])
    bench_dataset.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(results) == {"first start", "from what was kept"}
    for found in results.values():
        assert found["rows"] == 50
        assert found["peak_bytes"] > 50e6
        assert found["rows_seconds"] > 0
