import os
import time
from pathlib import Path

import numpy as np
import pytest

from experiment import store

ROOT = Path(store.__file__).parent.parent

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5),
    "c": np.array(["x", "yz"]),
    "empty": np.zeros((0, 4), np.int64),
}


def test_a_folder_of_the_user_beside_a_module_is_no_part_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(store, "_source", store._source.__wrapped__)
    (tmp_path / "data.py").write_text("1")
    before = store.code_digest("data")
    (tmp_path / "data").mkdir()  # as the built-in collection makes it, while workers are at work
    assert store.code_digest("data") == before
    (tmp_path / "data.py").write_text("2")
    assert store.code_digest("data") != before


def test_equal_arrays_give_the_same_bytes_at_any_time(monkeypatch):
    before = store.packed_arrays(ARRAYS)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    turned = ARRAYS | {"a": np.asfortranarray(ARRAYS["a"])}
    assert store.packed_arrays(turned) == before


def test_units_are_stored_and_predictions_deflated_and_both_are_read(tmp_path, monkeypatch):
    zeros = {"a": np.zeros(10_000)}
    store.save_arrays(tmp_path / "x.npz", zeros)
    assert (tmp_path / "x.npz").stat().st_size > 80_000 > 8_000 > len(store.packed_arrays(zeros))
    packed = store.packed_arrays
    monkeypatch.setattr(store, "packed_arrays", lambda arrays, _: packed(arrays))  # as units of earlier versions
    store.save_arrays(tmp_path / "old.npz", zeros)
    assert (tmp_path / "old.npz").stat().st_size < 8_000
    for name in ("x", "old"):
        np.testing.assert_array_equal(store.load_arrays(tmp_path / f"{name}.npz")["a"], zeros["a"])


def test_arrays_come_back_as_they_were(tmp_path):
    store.save_arrays(tmp_path / "deep" / "er" / "x.npz", ARRAYS)
    found = store.load_arrays(tmp_path / "deep" / "er" / "x.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_objects_are_never_pickled(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        store.save_arrays(tmp_path / "x.npz", {"a": np.array([{}], dtype=object)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4), np.arange(12).reshape(3, 4).T, np.zeros((0, 2))])
def test_a_saved_array_is_read_by_numpy(tmp_path, array):
    store.save_array(tmp_path / "deep" / "x.npy", array)
    found = np.load(tmp_path / "deep" / "x.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_a_failed_array_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        store.save_array(tmp_path / "x.npy", np.array([{}], dtype=object))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sharded(tmp_path) -> tuple[store.Shards, np.ndarray]:
    """An array of 11 rows in shards of 4, 4 and 3, and the whole."""
    whole = np.random.default_rng(0).standard_normal((11, 7), dtype=np.float32)
    digests = [
        store.save_array(store.shard_path(tmp_path / "x", first), whole[first : first + 4]) for first in (0, 4, 8)
    ]
    shards = [[rows, digest] for rows, digest in zip((4, 4, 3), digests, strict=True)]
    store.describe_shards(tmp_path / "x", "x", (np.dtype(np.float32), (7,)), shards)
    return store.Shards(tmp_path / "x", "x"), whole


@pytest.mark.parametrize("columns", [None, slice(None), slice(2, 5), slice(0, 0), [6, 0, 3, 3], [1, 2, 3], []])
@pytest.mark.parametrize("rows", [None, [], [10, 0, 4, 3, 4, 10], [5], list(range(11))])
def test_shards_read_as_numpy_indexes(sharded, rows, columns):
    shards, whole = sharded
    asked = columns if columns is None or isinstance(columns, slice) else np.array(columns, int)
    found = shards.read(None if rows is None else np.array(rows, int), asked)
    expected = whole[slice(None) if rows is None else rows][:, slice(None) if columns is None else asked]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "columns"), [([11], None), ([-1], None), ([0], np.array([7])), ([0], np.array([-1]))])
def test_what_is_not_in_the_shards_is_refused(sharded, rows, columns):
    with pytest.raises(IndexError):
        sharded[0].read(np.array(rows), columns)


def test_a_shard_that_is_missing_is_told(sharded, tmp_path):
    assert sharded[0].shape == (11, 7)
    store.shard_path(tmp_path / "x", 4).unlink()
    with pytest.raises(store.DamagedError, match=r"00000004.npy is missing\. Remove"):
        store.Shards(tmp_path / "x", "x")


def test_a_shard_that_was_cut_short_is_told(sharded, tmp_path):
    path = store.shard_path(tmp_path / "x", 8)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(store.DamagedError, match=r"00000008.npy is damaged \(.*\)\. Remove"):
        sharded[0].read()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_digest_is_of_strict_json(number):
    with pytest.raises(ValueError, match="JSON"):
        store.digest({"a": [number]})


def test_a_digest_stands_for_a_value_whatever_the_order_of_its_keys():
    assert store.digest({"a": 1, "b": [1, 2]}) == store.digest({"b": [1, 2], "a": 1})
    values = [{"a": 1}, {"a": "1"}, {"b": 1}, [1, 2], [2, 1], [[1], 2], 1.5, None, "é"]
    assert len({store.digest(value) for value in values}) == len(values)
    assert all(len(store.digest(value)) == 16 for value in values)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a folder of source that digests are of: modules, and a folder with modules and a template."""
    for name in ("alone.py", "other.py", "room/first.py", "room/second.py", "room/page.html", "room/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def digest_now(monkeypatch):
    """Return a function that digests a folder and a module as they are at each call."""
    monkeypatch.setattr(store, "_source", store._source.__wrapped__)
    return lambda: store.code_digest("room", "alone")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("alone.py", True),
        ("room/first.py", True),
        ("room/second.py", True),
        ("room/page.html", True),
        ("room/notes.txt", False),
        ("other.py", False),
    ],
)
def test_a_digest_of_code_is_of_a_module_and_of_every_module_and_template_of_a_folder(
    program, digest_now, name, counts
):
    before = digest_now()
    (program / name).write_text(f"# {name}, edited\n")
    assert (digest_now() != before) == counts
    (program / name).write_text(f"# {name}\n")
    assert digest_now() == before


def test_a_digest_of_code_is_of_names_too(program, digest_now):
    digests = [digest_now()]
    (program / "room" / "second.py").rename(program / "room" / "third.py")
    digests.append(digest_now())
    (program / "room" / "empty.html").touch()
    digests.append(digest_now())
    assert len(set(digests)) == 3
    with pytest.raises(FileNotFoundError, match=r"gone\.py"):
        store.code_digest("room", "gone")


def test_a_digest_of_code_is_of_what_was_there_at_the_first_call(program):
    (program / "edited_under_a_run.py").write_text("# as it runs\n")
    before = store.code_digest("edited_under_a_run")
    (program / "edited_under_a_run.py").write_text("# as it will be\n")
    assert store.code_digest("edited_under_a_run") == before


def results(number):
    return {"results.txt": f"text {number}".encode(), "results.json": f"json {number}".encode()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_previous_results_are_numbered_and_never_lost(tmp_path):
    store.replace_all(tmp_path, results(1))
    assert contents(tmp_path) == results(1) and not (tmp_path / "previous").exists()
    (tmp_path / "mine.txt").write_text("stays")
    store.replace_all(tmp_path, results(2))
    (tmp_path / "previous" / "2024-notes").mkdir()  # someone's own folder is no number
    (tmp_path / "results.txt").unlink()
    store.replace_all(tmp_path, results(3))
    assert contents(tmp_path) == {**results(3), "mine.txt": b"stays"}
    assert contents(tmp_path / "previous" / "1") == results(1)
    assert contents(tmp_path / "previous" / "2") == {"results.json": b"json 2"}
    (tmp_path / "results.json").unlink()  # what is left might be of anything
    store.replace_all(tmp_path, results(4))
    assert contents(tmp_path / "previous" / "3") == {"results.txt": b"text 3"}
    store.replace_all(tmp_path, results(5))  # and is not written over by what comes later
    assert contents(tmp_path / "previous" / "3") == {"results.txt": b"text 3"}
    assert contents(tmp_path / "previous" / "4") == results(4)


def test_only_temporary_files_of_the_program_are_cleared_away(tmp_path):
    names = [".results.json.swp", ".results.json.0123456789", ".results.json.0123abcd"]
    for name in names:
        (tmp_path / name).write_text("x")
    store.replace_all(tmp_path, results(1))
    assert contents(tmp_path).keys() == {*results(1), *names[:2]}


def test_numbering_goes_on_after_the_largest(tmp_path):
    for number in ("10", "9"):
        (tmp_path / "previous" / number).mkdir(parents=True)
        (tmp_path / "previous" / number / "a").write_text("kept")
    (tmp_path / "a").write_text("old")
    store.replace_all(tmp_path, {"a": b"new"})
    assert (tmp_path / "previous" / "11" / "a").read_text() == "old" and (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("before", [{}, results(1)], ids=["nothing there", "others there"])
def test_results_written_halfway_are_finished_wherever_it_was(tmp_path, monkeypatch, before):
    """Stop at the n-th of all renames, for each n, and do it again."""
    real_replace, real_rename, stops = os.replace, Path.rename, 0
    for stop_at in range(1, 10):
        folder, renames = tmp_path / str(stop_at), []
        if before:
            store.replace_all(folder, before)

        def counted(real, renames=renames, stop_at=stop_at):
            def rename(*paths):
                renames.append(paths)
                if len(renames) == stop_at:
                    raise KeyboardInterrupt
                return real(*paths)

            return rename

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(real_replace))
            patch.setattr(Path, "rename", counted(real_rename))
            try:
                store.replace_all(folder, results(2))
            except KeyboardInterrupt:
                stops += 1
        store.replace_all(folder, results(2)) if contents(folder) != results(2) else None
        assert contents(folder) == results(2)
        kept = [contents(path) for path in sorted((folder / "previous").glob("*"))]
        assert kept == ([before] if before else [])
    assert stops == (4 if before else 2)


def test_files_in_folders_and_those_without_a_like_move_together(tmp_path):
    first = {"figures/a.png": b"a", "figures/b.png": b"b", "results.json": b"1"}
    store.replace_all(tmp_path, first)
    (tmp_path / "figures" / ".a.png.0123abcd").write_text("half")
    store.replace_all(tmp_path, {"figures/a.png": b"c", "results.json": b"2"}, also=["figures/b.png"])
    kept = tmp_path / "previous" / "1"
    assert contents(kept) == {"results.json": b"1"} and contents(kept / "figures") == {"a.png": b"a", "b.png": b"b"}
    assert contents(tmp_path / "figures") == {"a.png": b"c"}
    assert [path.name for path in (tmp_path / "previous").iterdir()] == ["1"]


def test_results_are_kept_in_one_place_also_where_those_to_come_have_figures(tmp_path, monkeypatch):
    """Stop before the n-th file is moved away, for each n, and do it again."""
    after, rename = {"figures/a.png": b"a", **results(2)}, Path.rename
    for stop_at in range(len(results(1))):
        folder, moved = tmp_path / str(stop_at), []
        store.replace_all(folder, results(1))

        def stopping(path, target, moved=moved, stop_at=stop_at):
            moved.append(path)
            if len(moved) > stop_at:
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", stopping)
            store.replace_all(folder, after)
        store.replace_all(folder, after)
        assert [contents(path) for path in sorted((folder / "previous").iterdir())] == [results(1)]


@pytest.mark.parametrize("link", ["previous", "previous/1", "figures"])
def test_results_are_not_moved_through_links(tmp_path, link):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    store.replace_all(folder, results(1))
    elsewhere.mkdir()
    (elsewhere / ".a.png.0123abcd").write_text("stays")
    (elsewhere / "b.png").write_text("stays")
    (elsewhere / "results.txt").write_text("stays")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(elsewhere)
    for keep in (True, False) if link == "figures" else (True,):
        if link == "previous/1":  # it is gone past
            store.replace_all(folder, results(2))
            assert contents(folder / "previous" / "2") == results(1)
            continue
        with pytest.raises(OSError, match="a link, which results are not written through: remove it"):
            store.replace_all(folder, {"figures/a.png": b"a", **results(2)}, also=["figures/b.png"], keep=keep)
        assert contents(folder) == results(1)
    assert len(list(elsewhere.iterdir())) == 3
