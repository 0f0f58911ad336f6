"""One writer at a time for each product, and nothing of a dead one stays."""

from __future__ import annotations

import threading

import pytest

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import claimed, replace_together


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_writer_is_refused_or_waits_as_asked(tmp_path):
    out, order, holds, go = tmp_path / "out", [], threading.Event(), threading.Event()

    def second():
        with claimed(out, wait=True):
            order.append("second")
            holds.set()
            go.wait(10)

    with claimed(out):
        with (
            pytest.raises(UserError, match="another process is writing it; wait for it or stop it"),
            claimed(out),
        ):
            pass
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    assert holds.wait(10)
    assert order == ["first", "second"]
    with pytest.raises(UserError, match="another process is writing it"), claimed(out):
        pass  # the first one's lock file is gone, and the second one has not kept to it
    go.set()
    waiting.join(10)
    assert names(tmp_path) == []


def test_only_what_belongs_to_the_product_is_cleared(tmp_path):
    """Another product may have a name that begins with this one's."""
    ours = [".a.12.partial", ".a.12.tmp", ".a.replaced"]
    others = [".a.b.12.partial", ".a.12.tmp.txt", ".a.notes", "a.12.partial", ".aa.12.partial", ".a.1x.tmp"]
    (tmp_path / "a").mkdir()
    for name in ours + others:
        (tmp_path / name).mkdir()
    with claimed(tmp_path / "a"):
        assert names(tmp_path) == sorted([*others, "a", ".a.lock"])
    assert names(tmp_path) == sorted([*others, "a"])


def test_what_was_moved_aside_by_a_dead_process_comes_back(tmp_path):
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "old").touch()
    with claimed(tmp_path / "a"):
        assert names(tmp_path / "a") == ["old"]


def test_a_leftover_that_is_a_link_is_removed_and_not_what_it_names(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / ".a.12.partial").symlink_to(tmp_path / "precious")
    with claimed(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["precious"]


def test_the_claim_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a"):
        raise ZeroDivisionError
    with claimed(tmp_path / "a"):
        pass


def test_files_are_replaced_only_when_all_of_them_are_written(tmp_path):
    (tmp_path / "a").write_text("old a")
    (tmp_path / "b").write_text("old b")
    with pytest.raises(TypeError):
        replace_together(tmp_path, {"a": b"new a", "b": None})
    assert [(tmp_path / name).read_text() for name in "ab"] == ["old a", "old b"]
    replace_together(tmp_path, {"a": b"new a", "b": b"new b"})
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new a", "new b"]
    assert names(tmp_path) == ["a", "b"]
