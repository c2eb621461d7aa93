"""Bits that flip in files of the cache, and files cut short: what is damaged is never taken for what was written."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from making import NARROW, write_collection

import ablation_experiment
from data import index_collection
from experiment import extraction, store
from experiment.arrays import DIGESTS, WEIGHTS
from experiment.extraction import extract
from experiment.units import Units

CPU = torch.device("cpu")
NAMES = ["stats", "updates", DIGESTS, WEIGHTS]
KEY = {"kind": "classifier", "models": [0, 1]}
ARRAYS = {"predicted": np.arange(12, dtype=np.uint8).reshape(2, 6), "log_loss": np.linspace(0, 1, 12).reshape(2, 6)}
SHARED = np.arange(40, dtype=np.float32).reshape(5, 8)


class Written:
    """A small cache, and for each kind of file in it its path and a function that returns what it is read for."""

    def __init__(self, folder, width=8):
        self.collection = index_collection(write_collection(folder / "zoo", classes=2, per_class=3, width=width))
        self.cache = folder / "cache"
        self.found = extract(self.collection, NAMES, self.cache, CPU)
        self.weight_pass = extraction._Pass(self.collection, folder / "pass", CPU)
        (rows,) = self.weight_pass.shards
        self.weight_pass.begin(NAMES)
        self.weight_pass.run(rows, NAMES, CPU)
        self.units, shared = Units(self.cache / self.found.fingerprint / "units"), folder / "run" / "flat.npy"
        store.save_arrays(self.units.path(KEY), ARRAYS)
        store.shared_rows(shared, SHARED.shape, lambda: [SHARED])
        shards = {name: store.shard_path(self.found.path(name), 0) for name in NAMES}
        self.kinds = {
            "features": (shards["stats"], lambda: self.found.load("stats")),
            "rows of features": (shards["updates"], lambda: self.found.load("updates", np.array([5, 0]))),
            "digests": (shards[DIGESTS], lambda: self.found.load(DIGESTS)),
            "weights": (shards[WEIGHTS], lambda: self.found.weights().read(np.array([4, 1]), slice(3, 9))),
            "what shards are": (self.found.path("stats") / store.SHARDS_NAME, lambda: self.found.load("stats")),
            "fingerprint": (extraction._Pass(self.collection, self.cache, CPU).known, self.fingerprint),
            "a pass that goes on": (self.weight_pass._document(rows), lambda: self.weight_pass._read(rows)),
            "whose it is": (self.weight_pass._owner, lambda: self.weight_pass._is_mine() or None),
            "a shard of it": (store.shard_path(self.weight_pass.arrays("stats"), 0), self.unfinished),
            "unit": (self.units.path(KEY), lambda: self.units.load(KEY)),
            "shared by workers": (shared, lambda: np.array(store.shared_rows(shared, SHARED.shape, lambda: [SHARED]))),
        }

    def fingerprint(self):
        return extraction._Pass(self.collection, self.cache, CPU).read_known()

    def unfinished(self):
        """Return nothing where the shard is to be computed again."""
        (rows,) = self.weight_pass.shards
        return self.weight_pass.finished(rows, NAMES) or None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("written"))


KINDS = ("features", "rows of features", "digests", "weights", "what shards are", "fingerprint", "a pass that goes on")
KINDS += ("whose it is", "a shard of it", "unit", "shared by workers")


def flipped(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one bit flipped."""
    place, damaged = draw.randrange(8 * len(content)), bytearray(content)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice([0, 1, len(content) // 2, len(content) - 1, draw.randrange(len(content))])]


def longer(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.choice([1, 32, 500]))


def same(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [flipped, cut, longer])
@pytest.mark.parametrize("count", [8, pytest.param(10_000, marks=pytest.mark.slow)])
def test_nothing_damaged_is_used(written, capsys, kind, how, count):
    """It is said to be damaged, or nothing comes back, or it is thrown away and computed again."""
    path, read = written.kinds[kind]
    content, expected, draw = path.read_bytes(), read(), random.Random(count)
    assert expected is not None
    for number in range(count if how is flipped else min(count, 1000)):
        damaged = how(content, draw)
        path.write_bytes(damaged)
        store._right.clear()  # as in another process
        capsys.readouterr()
        try:
            value = read()
        except store.DamagedError as error:
            assert "Remove" in str(error) and str(written.cache.parent) in str(error)
            continue
        told = "removed, and computed again" in capsys.readouterr().out
        if value is not None and not (isinstance(value, dict) and not value):
            assert same(value, expected), number
            json = path.suffix == ".json"  # without the line end it is whole
            assert told or (json and damaged.rstrip() == content.rstrip()), number
    path.write_bytes(content)


def test_a_pipe_in_place_of_the_owner_of_a_pass_is_not_waited_for(tmp_path):
    collection = index_collection(write_collection(tmp_path / "zoo", classes=2, per_class=3))
    weight_pass = extraction._Pass(collection, tmp_path / "cache", CPU)
    weight_pass.folder.mkdir(parents=True)
    os.mkfifo(weight_pass._owner)
    weight_pass.begin(NAMES)
    assert weight_pass._is_mine()
    weight_pass._owner.write_bytes(b"\xff" + weight_pass._owner.read_bytes()[1:])
    extract(collection, NAMES, tmp_path / "cache", CPU)


@pytest.mark.parametrize("kind", ["features", "what shards are", "fingerprint", "unit"])
def test_a_file_of_something_else_is_not_used(tmp_path, kind):
    """Whole in itself, and of the same shape."""
    one, other = Written(tmp_path / "one"), Written(tmp_path / "other", width=9)
    (path, read), (foreign, _) = one.kinds[kind], other.kinds[kind]
    if kind == "unit":
        foreign = other.units.path(KEY | {"kind": "pca"})
        store.save_arrays(foreign, ARRAYS)
    shutil.copyfile(foreign, path)
    store._right.clear()
    if kind == "fingerprint":
        assert read() == {}
    else:
        with pytest.raises(store.DamagedError):
            read()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["flipped", "empty", "gone", "of other rows"])
def test_an_array_that_was_damaged_is_computed_again_before_it_is_read(tmp_path, capsys, name, how):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=3)
    collection = index_collection(root)
    found = extract(collection, NAMES, tmp_path / "cache", CPU)
    path, expected = store.shard_path(found.path(name), 0), found.load(name)
    if how == "gone":
        path.unlink()
    elif how == "of other rows":
        digest = store.save_array(path, expected[:4])
        row = expected.dtype, expected.shape[1:]
        store.describe_shards(found.path(name), found.place(name), row, [[4, digest]])
    else:
        path.write_bytes(flipped(path.read_bytes(), random.Random(1)) if how == "flipped" else b"")
    store._right.clear()
    again = extract(collection, NAMES, tmp_path / "cache", CPU, thorough=True)
    np.testing.assert_array_equal(again.load(name), expected)
    assert capsys.readouterr().out.count("removed, and computed again") == 1


def test_a_damaged_unit_is_done_again(tmp_path, capsys):
    path = Units(tmp_path / "units").path(KEY)
    store.save_arrays(path, ARRAYS)
    assert store.is_whole(path) and capsys.readouterr().out == ""
    os.truncate(path, path.stat().st_size - 1)
    assert not store.is_whole(path) and not path.exists()
    assert (
        capsys.readouterr().out == f"cache     {path} is damaged (its digest is another): removed, and computed again\n"
    )
    assert not store.is_whole(path)


FLAGS = ("--top-k=1", "--quick", "--num-runs=1", "--device=cpu", "--representations=stats,pca,vae")


def test_a_run_with_a_damaged_cache_ends_with_the_same_results(tmp_path, monkeypatch, capsys):
    """One file of each kind has a bit flipped between two runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = write_collection(tmp_path / "small", classes=2, per_class=6)
    command = ["--dataset", str(root), "--output-dir", str(tmp_path / "out"), *FLAGS]
    target, draw = tmp_path / "out" / "ablation_small", random.Random(2)

    def results() -> dict:
        return {path.name: path.read_bytes() for path in target.glob("*.[tcn][xsp]*")}

    assert ablation_experiment.main(command, NARROW) == 0
    expected = results()
    shutil.rmtree(target)
    kinds = ("collections/*", "*/features/stats*/0*", "*/features/weights*/*.json", "*/features/digests*/0*")
    kinds += ("*/features/weights*/0*", "*/units/classifier*", "*/units/pca*", "*/units/autoencoder*")
    damaged = [sorted((tmp_path / "out" / ".cache").glob(kind))[0] for kind in kinds]
    for path in damaged:
        path.write_bytes(flipped(path.read_bytes(), draw))
    store._right.clear()
    capsys.readouterr()
    assert ablation_experiment.main(command, NARROW) == 0
    assert results() == expected and len(expected) == 3
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("removed, and computed again")]
    assert len(told) >= len(damaged) - 2
