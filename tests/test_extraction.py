import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, lora, module_names, planted_collection, write_collection, write_lora
from safetensors.torch import load_file, save_file

import data
from data import CollectionError, index_collection, without
from experiment import extraction, store
from experiment.arrays import WEIGHTS
from experiment.engine import Engine
from experiment.extraction import Extracted, extract
from representations import MEASURES, REPRESENTATIONS, matrix_features, pair_features

CPU = torch.device("cpu")
TABLE = REPRESENTATIONS | MEASURES
MATRIX = [name for name, row in TABLE.items() if (row.unit, row.made) == ("layer", "computed")]
PAIR = [name for name, row in TABLE.items() if (row.unit, row.made) == ("pair", "computed")]


def files_in(root) -> list:
    return sorted(root.rglob("*.safetensors"))


def loaded(found: Extracted, name: str) -> np.ndarray:
    return found.weights().read() if name == WEIGHTS else found.load(name)


def extracted(root, cache, names=("stats",)) -> Extracted:
    return extract(index_collection(root), names, cache, CPU)


def test_features_are_those_of_each_file_alone(tmp_path):
    planted_collection(tmp_path / "zoo", per_class=3)
    collection = index_collection(tmp_path / "zoo")
    found = extract(collection, [*MATRIX, *PAIR], tmp_path / "cache", CPU)
    arrays = {name: found.load(name) for name in [*MATRIX, *PAIR]}
    for row, file in enumerate(collection.files):
        tensors = load_file(collection.root / file.path)
        for column, layer in enumerate(collection.layers):
            alone = matrix_features(tensors[layer.name][None], MATRIX)
            for name in MATRIX:
                np.testing.assert_allclose(arrays[name][row, column], alone[name][0], rtol=1e-5, atol=1e-6)
        for p, (down, up) in enumerate(zip(collection.layers[::2], collection.layers[1::2], strict=True)):
            alone = pair_features(tensors[down.name][None], tensors[up.name][None], down.module, None, PAIR)
            for name in PAIR:
                np.testing.assert_allclose(arrays[name][row, p], alone[name][0], rtol=1e-5, atol=1e-6)
    for name, array in arrays.items():
        items = collection.layers if TABLE[name].unit == "layer" else collection.modules
        assert array.shape == (9, len(items), len(TABLE[name].feature_names))
        assert array.dtype == np.float32


def test_scales_reach_the_pair_features(tmp_path):
    """Three files of equal weights and rank 2: alpha 6 in the file, lora_alpha 10 beside it, none."""
    name = "lora_unet_a"
    weights = {f"{name}.lora_down.weight": torch.randn(2, 6), f"{name}.lora_up.weight": torch.randn(5, 2)}
    write_lora(tmp_path / "zoo" / "a" / "0" / FILE_NAME, weights | {f"{name}.alpha": torch.tensor(6.0)})
    path = write_lora(tmp_path / "zoo" / "a" / "1" / FILE_NAME, weights)
    (path.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 10, "r": 2}))
    write_lora(tmp_path / "zoo" / "a" / "2" / FILE_NAME, weights)
    found = extracted(tmp_path / "zoo", tmp_path / "cache", PAIR)
    sketch, coupling, updates = (found.load(name) for name in ("update_sketch", "coupling", "updates"))
    np.testing.assert_allclose(sketch[0, 0], 3 * sketch[2, 0], rtol=1e-5)
    np.testing.assert_allclose(sketch[1, 0], 5 * sketch[2, 0], rtol=1e-5)
    norm = float(torch.linalg.norm(weights[f"{name}.lora_up.weight"] @ weights[f"{name}.lora_down.weight"]))
    np.testing.assert_allclose(coupling[:, 0, 2], norm * np.array([3.0, 5.0, 1.0]), rtol=1e-5)
    np.testing.assert_allclose(updates[:, 0, 1], norm * np.array([3.0, 5.0, 1.0]), rtol=1e-5)
    assert updates[:, 0, 2].tolist() == [3, 5, 1]


def test_packed_weights_are_the_matrices_in_layer_order(tmp_path):
    root = write_collection(tmp_path / "zoo", modules=11, rank=2, width=5)
    collection = index_collection(root)
    packed = extract(collection, [WEIGHTS], tmp_path / "cache", CPU).weights().read()
    columns = collection.files[0].layout.columns
    assert packed.shape == (6, 11 * 20)
    for row, file in enumerate(collection.files):
        tensors = load_file(root / file.path)
        for layer, name in enumerate(lora(11)):
            np.testing.assert_array_equal(packed[row, columns[layer]], tensors[name].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_packed_as_float32(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in lora().items()}
    write_lora(tmp_path / "zoo" / "a" / "x.safetensors", tensors)
    packed = extracted(tmp_path / "zoo", tmp_path / "cache", [WEIGHTS]).weights().read()
    np.testing.assert_array_equal(packed[0], torch.cat([tensor.float().flatten() for tensor in tensors.values()]))


def later(path) -> None:
    """Give a file a time of its own: two writes may fall into one tick of the file system's clock."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def spoil(path, number: float, tensors: int = 1) -> str:
    """Put a number into the last tensors of a file; the first one's name."""
    loaded = load_file(path)
    names = list(lora())[-tensors:]
    for name in names:
        loaded[name][0, 0] = number
    save_file(loaded, path)
    later(path)
    return names[0]


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_nan_and_infinity_are_told_of_every_file_and_nothing_is_left(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(extraction, "CHUNK_NUMBERS", chunk)
    root = write_collection(tmp_path / "zoo")
    paths = files_in(root)
    first, second = spoil(paths[1], float("nan"), 2), spoil(paths[4], float("-inf"))
    with pytest.raises(CollectionError) as error:
        extracted(root, tmp_path / "out" / "deep" / "cache", ["stats", "coupling", WEIGHTS])
    told = error.value.findings
    assert [finding.split(". ")[0] for finding in told] == [
        f"{paths[1]}: NaN or infinity in 2 tensors, first in {first}",
        f"{paths[4]}: NaN or infinity in 1 tensors, first in {second}",
    ]
    assert not (tmp_path / "out").exists()


def test_a_refused_collection_leaves_the_cache_as_it_was(tmp_path):
    root = write_collection(tmp_path / "zoo")
    extracted(root, tmp_path / "cache")
    before = sorted(tmp_path.joinpath("cache").rglob("*"))
    spoil(files_in(root)[0], float("nan"))
    with pytest.raises(CollectionError):
        extracted(root, tmp_path / "cache")
    assert sorted(tmp_path.joinpath("cache").rglob("*")) == before


def test_values_beyond_float32_are_refused(tmp_path):
    tensors = {name: tensor.double() for name, tensor in lora().items()}
    next(iter(tensors.values()))[0, 0] = 1e300
    path = write_lora(tmp_path / "zoo" / "a" / "x.safetensors", tensors)
    with pytest.raises(CollectionError, match=re.escape(f"{path}: NaN or infinity in 1 tensors")):
        extracted(tmp_path / "zoo", tmp_path / "cache")


def test_an_alpha_that_is_not_finite_is_told(tmp_path):
    tensors = {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(3, 2)}
    for i, alpha in enumerate([1.0, float("nan"), float("inf")]):
        write_lora(tmp_path / "zoo" / "a" / f"{i}.safetensors", tensors | {"a.alpha": torch.tensor(alpha)})
    with pytest.raises(CollectionError) as error:
        extracted(tmp_path / "zoo", tmp_path / "cache")
    assert [finding.split(": ")[0][-13:] for finding in error.value.findings] == ["1.safetensors", "2.safetensors"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("change", ["gone", "truncated", "garbage", "other layers", "other weights"])
def test_a_file_that_changes_after_the_index_is_refused(tmp_path, change):
    root = write_collection(tmp_path / "zoo")
    collection = index_collection(root)
    path = files_in(root)[2]
    whole = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "other layers":
        write_lora(path, lora(3))
    else:
        kept = {"truncated": whole[:5], "garbage": bytes(len(whole)), "other weights": whole[:-4] + b"abcd"}
        path.write_bytes(kept[change])
        later(path)
    with pytest.raises(CollectionError, match=re.escape(str(path)) + ".*(changed|No such)"):
        extract(collection, ["stats"], tmp_path / "cache", CPU)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def passes(monkeypatch) -> list:
    """Counts the passes over weights, of as many shards as the collection has: one, where none is made smaller."""
    counted, original = [], extraction._Pass.run

    def counting(*args, **more):
        counted.append(1)
        return original(*args, **more)

    monkeypatch.setattr(extraction._Pass, "run", counting)
    return counted


def test_the_second_time_no_weight_is_read(tmp_path, passes):
    root = write_collection(tmp_path / "zoo")
    first = extracted(root, tmp_path / "cache", ["stats", WEIGHTS])
    kept = first.load("stats").copy()
    again = extracted(root, tmp_path / "cache", ["stats"])
    assert len(passes) == 1
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.load("stats"), kept)
    extracted(root, tmp_path / "cache", ["stats", "coupling"])
    assert len(passes) == 2
    extracted(root, tmp_path / "cache", ["stats", "coupling", WEIGHTS])
    assert len(passes) == 2
    extracted(root, tmp_path / "cache", ["updates"])
    extracted(root, tmp_path / "cache", ["updates", "coupling"])
    assert len(passes) == 3
    assert not (tmp_path / "cache" / "passes").exists()


def change_contents(root):
    path = files_in(root)[3]
    size = path.stat().st_size
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    later(path)
    assert path.stat().st_size == size


def change_label(root):
    (root / "class_0" / "0002").rename(root / "class_1" / "0007")


def add_file(root):
    write_lora(root / "class_1" / "0009" / FILE_NAME, lora(seed=9))


def change_scale(root):
    (files_in(root)[0].parent / "adapter_config.json").write_text('{"lora_alpha": 8}')


def remove_file(root):
    shutil.rmtree(files_in(root)[2].parent)


@pytest.mark.parametrize("change", [change_contents, change_label, add_file, remove_file, change_scale])
def test_the_cache_is_not_used_after_a_change(tmp_path, passes, change):
    root = write_collection(tmp_path / "zoo")
    names = ["stats", "coupling", "update_sketch"]
    before = extracted(root, tmp_path / "cache", names)
    change(root)
    after = extracted(root, tmp_path / "cache", names)
    assert len(passes) == 2
    assert after.fingerprint != before.fingerprint
    assert after.folder != before.folder
    fresh = extracted(root, tmp_path / "fresh", names)
    assert fresh.fingerprint == after.fingerprint
    for name in names:
        np.testing.assert_array_equal(after.load(name), fresh.load(name))


def test_code_that_changed_is_not_trusted(tmp_path, passes, monkeypatch):
    root = write_collection(tmp_path / "zoo")
    extracted(root, tmp_path / "cache")
    monkeypatch.setattr(extraction.store, "code_digest", lambda *_: "0123456789abcdef")
    extracted(root, tmp_path / "cache")
    assert len(passes) == 2


def test_two_collections_never_share(tmp_path):
    planted_collection(tmp_path / "a", per_class=3, seed=0)
    planted_collection(tmp_path / "b", per_class=3, seed=1)
    a, b = extracted(tmp_path / "a", tmp_path / "cache"), extracted(tmp_path / "b", tmp_path / "cache")
    assert a.folder != b.folder
    assert not np.array_equal(a.load("stats"), b.load("stats"))
    alone = extracted(tmp_path / "b", tmp_path / "other")
    np.testing.assert_array_equal(alone.load("stats"), b.load("stats"))


def test_two_collections_of_one_name_never_share(tmp_path):
    """Equal names, files, sizes and times, other numbers: the case that a key of names alone would get wrong."""
    roots = [tmp_path / place / "zoo" for place in "ab"]
    for root, seed in zip(roots, (0, 1), strict=True):
        planted_collection(root, per_class=3, seed=seed)
        for path in files_in(root):
            os.utime(path, ns=(0, 10**18))
    a, b = (extracted(root, tmp_path / "cache", ["stats", WEIGHTS]) for root in roots)
    assert a.fingerprint != b.fingerprint
    for name in ("stats", WEIGHTS):
        assert not np.array_equal(loaded(a, name), loaded(b, name))
        alone = extracted(roots[1], tmp_path / "other", ["stats", WEIGHTS])
        np.testing.assert_array_equal(loaded(alone, name), loaded(b, name))


def test_nothing_is_packed_unless_it_is_asked_for(tmp_path):
    root = write_collection(tmp_path / "zoo")
    found = extracted(root, tmp_path / "cache", ["stats", "coupling"])
    features = found.folder / "features"
    assert {path.name.split("-")[0] for path in features.iterdir()} == {"stats", "coupling"}
    largest = max(path.stat().st_size for path in tmp_path.joinpath("cache").rglob("*"))
    extracted(root, tmp_path / "cache", [WEIGHTS])
    assert {path.name.split("-")[0] for path in features.iterdir()} == {"stats", "coupling", WEIGHTS}
    assert largest < 2**14


def test_the_fingerprint_is_of_contents_not_of_the_place(tmp_path):
    root = write_collection(tmp_path / "zoo")
    shutil.copytree(root, tmp_path / "copy")
    one, two = extracted(root, tmp_path / "cache"), extracted(tmp_path / "copy", tmp_path / "cache")
    assert one.fingerprint == two.fingerprint


def test_the_chunk_size_changes_nothing(tmp_path, monkeypatch):
    planted_collection(tmp_path / "zoo", per_class=4)
    write_lora(files_in(tmp_path / "zoo")[5], lora(4))
    names = [*MATRIX, *PAIR, WEIGHTS]
    whole = extracted(tmp_path / "zoo", tmp_path / "whole", names)
    for numbers in (1, 400):
        monkeypatch.setattr(extraction, "CHUNK_NUMBERS", numbers)
        parts = extracted(tmp_path / "zoo", tmp_path / str(numbers), names)
        assert parts.fingerprint == whole.fingerprint
        for name in names:
            np.testing.assert_array_equal(loaded(parts, name), loaded(whole, name), err_msg=name)


@pytest.mark.parametrize(("shard", "chunk"), [(1, 1), (5 * 128, 2 * 128), (5 * 128, 2**22), (4 * 128, 4 * 128)])
def test_several_shards_give_the_arrays_of_one(tmp_path, monkeypatch, shard, chunk):
    planted_collection(tmp_path / "zoo", per_class=4)  # 12 files of 128 numbers
    names = [*MATRIX, *PAIR, WEIGHTS]
    monkeypatch.setattr(extraction, "_numbers_of_a_lora", lambda _: 128)
    whole = extracted(tmp_path / "zoo", tmp_path / "whole", names)
    assert [path.name for path in sorted(whole.path("stats").iterdir())] == ["00000000.npy", store.SHARDS_NAME]
    monkeypatch.setattr(extraction, "SHARD_NUMBERS", shard)
    monkeypatch.setattr(extraction, "CHUNK_NUMBERS", chunk)
    parts = extracted(tmp_path / "zoo", tmp_path / "parts", names)
    firsts = [f"{first:08}.npy" for first in range(0, 12, max(1, shard // 128))]
    for name in names:
        assert sorted(path.name for path in parts.path(name).glob("*.npy")) == firsts
        np.testing.assert_array_equal(loaded(parts, name), loaded(whole, name), err_msg=name)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of four LoRAs, worked on two at a time."""
    monkeypatch.setattr(extraction, "_numbers_of_a_lora", lambda _: 64)
    monkeypatch.setattr(extraction, "SHARD_NUMBERS", 4 * 64)
    monkeypatch.setattr(extraction, "CHUNK_NUMBERS", 2 * 64)


@pytest.mark.parametrize("bad", [(1,), (4, 5, 6, 7), (3, 4, 15)])  # one; a whole shard; at the ends of shards
def test_rows_that_are_bad_are_dropped_and_the_others_not_read_again(tmp_path, small_shards, passes, monkeypatch, bad):
    root, names = write_collection(tmp_path / "zoo", classes=2, per_class=8), [*MATRIX, *PAIR, WEIGHTS]
    for row in bad:
        spoil(files_in(root)[row], float("nan"))
    collection, cache = index_collection(root), tmp_path / "cache"
    with pytest.raises(CollectionError) as error:
        extract(collection, names, cache, CPU, skip_bad=True)
    assert len(error.value.files) == len(bad) and len(passes) == 4
    good = without(collection, error.value.files)
    opened = []
    original = extraction.read_file
    monkeypatch.setattr(extraction, "read_file", lambda *args: opened.append(1) or original(*args))
    kept = extract(good, names, cache, CPU, skip_bad=True)
    assert len(passes) == 4 and not opened and not list(cache.glob("passes/*"))
    with pytest.raises(CollectionError):  # what is bad is remembered, not read again
        extract(collection, names, cache, CPU, skip_bad=True)
    assert not opened
    alone = extract(good, names, tmp_path / "alone", CPU)
    assert kept.fingerprint == alone.fingerprint
    for name in names:
        np.testing.assert_array_equal(loaded(kept, name), loaded(alone, name))


def test_nothing_is_kept_of_a_collection_that_is_refused_for_its_classes(tmp_path):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=3)
    spoil(files_in(root)[0], float("nan"))
    with pytest.raises(CollectionError):
        extract(index_collection(root), ["stats"], tmp_path / "cache", CPU, skip_bad=True)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_weights_padded_for_a_bad_file_alone_are_read_again(tmp_path):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=4)
    write_lora(files_in(root)[2], lora(rank=3))
    spoil(files_in(root)[2], float("nan"))
    collection, cache = index_collection(root), tmp_path / "cache"
    with pytest.raises(CollectionError) as error:
        extract(collection, ["stats", WEIGHTS], cache, CPU, skip_bad=True)
    good = without(collection, error.value.files)
    kept = extract(good, ["stats", WEIGHTS], cache, CPU)
    alone = extract(good, ["stats", WEIGHTS], tmp_path / "alone", CPU)
    assert kept.weights().shape == alone.weights().shape == (7, good.packed_layout.width)
    np.testing.assert_array_equal(loaded(kept, WEIGHTS), loaded(alone, WEIGHTS))


def test_shards_are_written_as_they_are_finished(tmp_path, small_shards):
    """So memory holds one of each thread."""
    root = write_collection(tmp_path / "zoo", classes=2, per_class=5)
    seen = []

    def progress(stage, done, total):
        seen.append((stage, done, total, len(list(tmp_path.rglob("*.npy"))) >= 2 * done))

    extract(index_collection(root), ["stats", WEIGHTS], tmp_path / "cache", CPU, progress=progress)
    assert seen == [("features", done, 3, True) for done in (1, 2, 3)]


def test_some_rows_of_features_are_read_from_the_shards_that_hold_them(tmp_path, small_shards):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=5)
    found = extracted(root, tmp_path / "cache", ["stats"])
    assert len(list(found.path("stats").glob("*.npy"))) == 3
    rows = np.array([9, 0, 4, 3, 3])
    np.testing.assert_array_equal(found.load("stats", rows), found.load("stats")[rows])


def test_a_pass_that_was_stopped_reads_no_finished_shard_again(tmp_path, small_shards, passes, monkeypatch):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=5)
    original, names = store.save_array, ["stats", WEIGHTS]

    def stop_in_third(path, array):
        if len(passes) == 3:
            raise KeyboardInterrupt
        return original(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_array", stop_in_third)
        with pytest.raises(KeyboardInterrupt):
            extracted(root, tmp_path / "cache", names)
    done = extracted(root, tmp_path / "cache", names)
    assert len(passes) == 4
    fresh = extracted(root, tmp_path / "fresh", names)
    assert done.fingerprint == fresh.fingerprint
    for name in names:
        np.testing.assert_array_equal(loaded(done, name), loaded(fresh, name))


def test_a_pass_stopped_among_the_renames_reads_nothing_again(tmp_path, small_shards, passes, monkeypatch):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=5)
    original, names = Path.rename, ["stats", "coupling"]

    def stop_at_coupling(path, target):
        if path.name == "coupling":
            raise KeyboardInterrupt
        return original(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop_at_coupling)
        with pytest.raises(KeyboardInterrupt):
            extracted(root, tmp_path / "cache", names)
    done = extracted(root, tmp_path / "cache", names)
    assert len(passes) == 3 and not list((tmp_path / "cache" / "passes").iterdir())
    np.testing.assert_array_equal(done.load("coupling"), extracted(root, tmp_path / "fresh", names).load("coupling"))


def test_what_a_stopped_pass_left_is_not_trusted_after_a_change(tmp_path, small_shards, passes, monkeypatch):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=5)
    with monkeypatch.context() as patch:
        patch.setattr(extraction._Pass, "end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extracted(root, tmp_path / "cache", ["stats"])
    change_contents(root)
    found = extracted(root, tmp_path / "cache", ["stats"])
    assert len(passes) == 6
    np.testing.assert_array_equal(found.load("stats"), extracted(root, tmp_path / "fresh", ["stats"]).load("stats"))


def test_contents_that_changed_unnoticed_are_computed_anew(tmp_path, passes, monkeypatch):
    """Same path, size, times and inode: only another array that is asked for can tell."""
    for module in (data, extraction):  # nobody can set back a ctime
        monkeypatch.setattr(module, "file_stat", lambda path: (os.stat(path).st_size, 0, 0, 0))
    root = write_collection(tmp_path / "zoo")
    extracted(root, tmp_path / "cache", ["stats"])
    path = files_in(root)[3]
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = extracted(root, tmp_path / "cache", ["stats", "coupling"])
    assert len(passes) == 3
    np.testing.assert_array_equal(found.load("stats"), extracted(root, tmp_path / "fresh", ["stats"]).load("stats"))


def test_threads_give_the_same_as_one(tmp_path, small_shards):
    root = write_collection(tmp_path / "zoo", classes=2, per_class=9)
    collection, names = index_collection(root), ["stats", "spectral", "coupling", WEIGHTS]
    one = extract(collection, names, tmp_path / "one", CPU, Engine([CPU]))
    four = extract(collection, names, tmp_path / "four", CPU, Engine([CPU], cores=4))
    assert one.fingerprint == four.fingerprint
    for name in names:
        np.testing.assert_array_equal(loaded(one, name), loaded(four, name))


def test_another_label_is_another_question_asked_of_the_same_features(tmp_path, passes):
    root = tmp_path / "zoo"
    planted_collection(root, per_class=3)
    first = extracted(root, tmp_path / "cache")
    for path in files_in(root):
        (path.parent / "metadata.json").write_text(json.dumps({"category_label": path.parent.name[-1]}))
    assert extracted(root, tmp_path / "cache").fingerprint == first.fingerprint and len(passes) == 1


def test_mixed_ranks_have_matrix_and_pair_features(tmp_path):
    root = write_collection(tmp_path / "zoo")
    paths = files_in(root)
    for i, rank in ((1, 1), (4, 5)):
        write_lora(paths[i], lora(rank=rank, seed=i))
    collection = index_collection(root)
    found = extract(collection, ["spectral", *PAIR], tmp_path / "cache", CPU)
    for i, path in enumerate(paths):
        tensors = load_file(path)
        down, up = (tensors[name][None] for name in list(lora())[2:])
        np.testing.assert_allclose(
            found.load("spectral")[i, 3], matrix_features(up, ["spectral"])["spectral"][0], rtol=1e-5, atol=1e-6
        )
        alone = pair_features(down, up, collection.modules[1], None, PAIR)
        for name in PAIR:
            np.testing.assert_allclose(found.load(name)[i, 1], alone[name][0], rtol=1e-5, atol=1e-6)


def write_mixed(root):
    """Six LoRAs of two modules of width 8, of ranks 2, 1, 2, 2, 5 and 2, one with a scale."""
    paths = files_in(write_collection(root))
    for i, rank in ((1, 1), (4, 5)):
        write_lora(paths[i], lora(rank=rank, seed=i))
    (paths[2].parent / "adapter_config.json").write_text('{"lora_alpha": 6}')
    return paths


def test_updates_are_effective_rank_norm_and_scale_of_each_formed_update(tmp_path):
    paths = write_mixed(tmp_path / "zoo")
    updates = extracted(tmp_path / "zoo", tmp_path / "cache", ["updates"]).load("updates")
    assert updates.shape == (6, 2, 3)
    for i, path in enumerate(paths):
        tensors, scale = list(load_file(path).values()), 3.0 if i == 2 else 1.0
        for p in range(2):
            down, up = (t.double().numpy() for t in sorted(tensors[2 * p : 2 * p + 2], key=lambda t: len(t)))
            s = np.linalg.svd(scale * up @ down)[1][: len(down)]
            share = s / s.sum()
            expected = [np.exp(-(share * np.log(share)).sum()), np.linalg.norm(s), scale]
            np.testing.assert_allclose(updates[i, p], expected, rtol=1e-5)
    assert updates[1, :, 0].tolist() == [1, 1] and (updates[4, :, 0] > 2).all()


def test_equal_ranks_are_packed_as_they_lie_in_each_file(tmp_path):
    collection = index_collection(write_collection(tmp_path / "zoo"))
    assert collection.packed_layout is collection.files[0].layout


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_mixed_ranks_are_packed_with_zeros_up_to_the_largest(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(extraction, "CHUNK_NUMBERS", chunk)
    paths = write_mixed(tmp_path / "zoo")
    collection = index_collection(tmp_path / "zoo")
    layout = collection.packed_layout
    assert [layer.shape for layer in layout.layers] == [(5, 8), (8, 5)] * 2
    assert [layer.name for layer in layout.layers] == [layer.name for layer in collection.layers]
    assert collection.weights_per_layer == [40] * 4 and layout.width == 160
    packed = extract(collection, [WEIGHTS], tmp_path / "cache", CPU).weights().read()
    assert packed.shape == (6, 160)
    for row, path in zip(packed, paths, strict=True):
        tensors = load_file(path)
        for layer, columns in zip(layout.layers, layout.columns, strict=True):
            matrix, weights = row[columns].reshape(layer.shape), tensors[layer.name].numpy()
            rows, cols = weights.shape
            np.testing.assert_array_equal(matrix[:rows, :cols], weights)
            assert np.count_nonzero(matrix) == np.count_nonzero(weights)


def test_each_layer_is_padded_to_its_own_largest_rank(tmp_path):
    for i, ranks in enumerate([(1, 4), (3, 2), (2, 2)]):
        tensors = {}
        for module, rank in zip(module_names(2), ranks, strict=True):
            tensors |= {
                f"{module}.lora.down.weight": torch.ones(rank, 6),
                f"{module}.lora.up.weight": torch.ones(5, rank),
            }
        write_lora(tmp_path / "zoo" / "a" / f"{i}.safetensors", tensors)
    collection = index_collection(tmp_path / "zoo")
    assert [layer.shape for layer in collection.packed_layout.layers] == [(3, 6), (5, 3), (4, 6), (5, 4)]
    packed = extract(collection, [WEIGHTS], tmp_path / "cache", CPU).weights().read()
    assert packed.sum(1).tolist() == [11 * (1 + 4), 11 * (3 + 2), 11 * (2 + 2)]


def test_factors_multiply_to_the_updates_of_the_files(tmp_path):
    paths = write_mixed(tmp_path / "zoo")
    collection = index_collection(tmp_path / "zoo")
    read = extract(collection, ["updates", WEIGHTS], tmp_path / "cache", CPU).factor_reader(collection)
    names = list(lora())
    for module in range(2):
        down, up, scale = read(module)
        assert down.shape == (6, 5, 8) and up.shape == (6, 8, 5) and scale.tolist() == [1, 1, 3, 1, 1, 1]
        for i, path in enumerate(paths):
            tensors = load_file(path)
            expected = tensors[names[2 * module + 1]] @ tensors[names[2 * module]]
            torch.testing.assert_close(up[i] @ down[i], expected)
    some = read(1, np.array([4, 1]))
    for part, whole in zip(some, read(1), strict=True):
        assert torch.equal(part, whole[[4, 1]])


def test_planted_layers_alone_carry_the_class(tmp_path):
    names = planted_collection(tmp_path / "zoo", per_class=20)
    planted_collection(tmp_path / "shuffled", per_class=20, shuffle=True)
    for root, expected in ((tmp_path / "zoo", names), (tmp_path / "shuffled", [])):
        collection = index_collection(root)
        assert collection.class_counts == {f"class_{c}": 20 for c in range(3)}
        deviations = extracted(root, tmp_path / "cache").load("stats")[:, :, 1]
        means = np.stack([deviations[collection.y == c].mean(0) for c in range(3)])  # (C, L)
        apart = means.max(0) / means.min(0)
        assert [layer.name for layer, ratio in zip(collection.layers, apart, strict=True) if ratio > 3] == expected
        assert ((apart > 3) | (apart < 1.6)).all()
