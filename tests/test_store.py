import os
import time

import numpy as np
import pytest

import store

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5),
    "c": np.array(["x", "yz"]),
    "empty": np.zeros((0, 4), np.int64),
}


def test_equal_arrays_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    store.save_arrays(tmp_path / "1.npz", ARRAYS)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(2e9))
    turned = ARRAYS | {"a": np.asfortranarray(ARRAYS["a"])}
    store.save_arrays(tmp_path / "2.npz", turned)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


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


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, step):
    path = tmp_path / "x.json"
    store.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_obeys_the_umask(tmp_path):
    path = tmp_path / "x.json"
    store.write_atomically(path, b"old")
    before = os.umask(0o027)
    try:
        store.write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


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
    for first in (0, 4, 8):
        store.save_array(store.shard_path(tmp_path / "x", first), whole[first : first + 4])
    return store.Shards(tmp_path / "x"), whole


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
    with pytest.raises(OSError, match="rows 4 to 7 are missing"):
        store.Shards(tmp_path / "x")


def test_a_shard_that_was_cut_short_is_told(sharded, tmp_path):
    path = store.shard_path(tmp_path / "x", 8)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="cut short"):
        sharded[0].read()


def test_a_unit_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return ARRAYS

    key = {"kind": "ranking", "seed": 1, "layers": [1, 2]}
    first = store.Units(tmp_path).get(key, compute)
    again = store.Units(tmp_path).get(dict(reversed(key.items())), compute)
    assert len(calls) == 1
    np.testing.assert_array_equal(first["a"], again["a"])
    store.Units(tmp_path).get(key | {"seed": 2}, compute)
    store.Units(tmp_path / "other").get(key, compute)
    assert len(calls) == 3


def test_a_unit_that_failed_is_computed_again(tmp_path):
    units = store.Units(tmp_path)
    key = {"kind": "ranking"}
    with pytest.raises(ZeroDivisionError):
        units.get(key, lambda: {"a": 1 / 0})
    assert not units.path(key).exists()
    assert units.get(key, lambda: ARRAYS)["b"] == 2.5


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict(number):
    with pytest.raises(ValueError, match="JSON"):
        store.canonical_json({"a": [number]})
    with pytest.raises(ValueError, match="JSON"):
        store.digest({"a": [number]})


def test_json_keeps_order_and_letters():
    assert store.canonical_json({"ü": 1, "a": [0.1]}) == '{"ü": 1, "a": [0.1]}\n'.encode()


def test_a_digest_stands_for_a_value_whatever_the_order_of_its_keys():
    assert store.digest({"a": 1, "b": [1, 2]}) == store.digest({"b": [1, 2], "a": 1})
    values = [{"a": 1}, {"a": "1"}, {"b": 1}, [1, 2], [2, 1], [[1], 2], 1.5, None, "é"]
    assert len({store.digest(value) for value in values}) == len(values)
    assert all(len(store.digest(value)) == 16 for value in values)


def test_previous_results_are_numbered_and_never_lost(tmp_path):
    names = ["results.json", "results.txt"]
    store.move_to_previous(tmp_path, names)
    assert list(tmp_path.iterdir()) == []
    for n in (1, 2, 3):
        (tmp_path / "results.json").write_text(f"json {n}")
        (tmp_path / "mine.txt").write_text("stays")
        if n == 2:
            (tmp_path / "results.txt").write_text("text 2")
            (tmp_path / "previous" / "2024-notes").mkdir()  # someone's own folder is no number
        store.move_to_previous(tmp_path, names)
        assert (tmp_path / "previous" / str(n) / "results.json").read_text() == f"json {n}"
    assert (tmp_path / "previous" / "2" / "results.txt").read_text() == "text 2"
    assert (tmp_path / "previous" / "1" / "results.json").read_text() == "json 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "previous"]


def test_numbering_goes_on_after_the_largest(tmp_path):
    (tmp_path / "previous" / "10").mkdir(parents=True)
    (tmp_path / "previous" / "9").mkdir()
    (tmp_path / "a").write_text("a")
    store.move_to_previous(tmp_path, ["a"])
    assert (tmp_path / "previous" / "11" / "a").read_text() == "a"
