import re

import numpy as np
import pytest
import torch
from making import lora, write_lora
from safetensors.torch import load_file

from data import index_collection
from loras import digits_zoo, lora_files
from loras.weight_checks import check_weights, oversized, weight_notices

GENERATOR = np.random.default_rng(0)


def checked(path, adapter_config=None):
    return check_weights(path, lora_files.parse_header(lora_files.read_header(path)), adapter_config)


def test_sizes_and_norms_are_those_of_the_matrices(tmp_path):
    path = write_lora(tmp_path / "x.safetensors", {name: t.bfloat16() for name, t in lora(3, rank=2).items()})
    result = checked(path, {"lora_alpha": 6, "r": 2})
    tensors = [t.double() for t in load_file(path).values()]
    names = list(load_file(path))
    again = write_lora(tmp_path / "y.safetensors", load_file(path))
    assert result.digest == checked(again, None).digest and result.fault == ""
    by_name = dict(zip(names, tensors, strict=True))
    ordered = [by_name[name] for name in lora(3)]
    np.testing.assert_allclose(result.sizes, [float(t.square().mean().sqrt()) for t in ordered])
    updates = [3 * torch.linalg.norm(up @ down) for down, up in zip(ordered[::2], ordered[1::2], strict=True)]
    np.testing.assert_allclose(result.norms, updates)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_a_fault(tmp_path, number):
    tensors = lora()
    name = list(tensors)[1]
    tensors[name][0, 0] = number
    path = write_lora(tmp_path / "x.safetensors", tensors)
    assert checked(path).fault == f"NaN or infinity in 1 tensors, first in {name}. Train again or leave it out."


def notices(norms, labels=None):
    count, modules = norms.shape
    paths = [f"{i}.safetensors" for i in range(count)]
    return weight_notices(paths, labels or ["a"] * count, [f"m{p}" for p in range(modules)], norms)


def norms(count=20, modules=8, spread=0.3):
    return np.exp(spread * GENERATOR.standard_normal((count, modules)))


def test_untrained_files_and_modules_without_an_update_are_told():
    sizes = norms()
    sizes[[3, 5]] = 0
    sizes[:, 6] = 0
    sizes[4, 2] = 0
    untrained, modules = notices(sizes)
    assert untrained.kind == "untrained" and untrained.files == ("3.safetensors", "5.safetensors")
    assert untrained.message.startswith("2 LoRAs are untrained, as every update is zero (3.safetensors, 5.safetensors)")
    assert modules.kind == "zero modules" and modules.files == ()
    assert modules.message.startswith("1 module is zero in every LoRA that is trained (m6).")
    assert [notice.kind for notice in notices(np.zeros((6, 3)))] == ["untrained"]


def test_modules_that_are_zero_are_told_of_the_layers_that_are_looked_at():
    sizes = norms(modules=3)
    sizes[:, 1] = 0
    paths, modules = [f"{i}.safetensors" for i in range(20)], ["m0", "m1", "m2"]
    kinds = [
        [notice.kind for notice in weight_notices(paths, ["a"] * 20, modules, sizes, np.array(selected, bool))]
        for selected in ([1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1])
    ]
    assert kinds == [["zero modules"], ["zero modules"], []]


@pytest.mark.filterwarnings("error")
def test_files_that_train_a_module_each_are_compared_with_nothing():
    assert notices(np.eye(10)) == []


@pytest.mark.filterwarnings("error")
def test_a_size_next_to_zero_is_a_number():
    sizes = norms(spread=0.05).astype(np.float32)
    sizes[4] = 1e-45
    (notice,) = notices(sizes)
    assert "inf" not in notice.message and notice.files == ("4.safetensors",)


@pytest.mark.parametrize(
    ("factor", "words"), [(83, "its updates are 8[0-9.]+ times"), (0.01, r"its updates are 1/[0-9.]+ of")]
)
def test_a_file_far_from_the_others_is_told_and_how_far(factor, words):
    sizes = norms(spread=0.05)
    sizes[7] *= factor
    (notice,) = notices(sizes)
    assert notice.kind == "outlier" and notice.files == ("7.safetensors",)
    assert re.search(rf"\(7.safetensors: {words} those of the others\)", notice.message)


def test_one_module_far_from_that_of_the_others_is_told():
    sizes = norms(spread=0.1)
    sizes[2, 5] *= 1000
    (notice,) = notices(sizes)
    assert notice.files == ("2.safetensors",) and "that of m5 is " in notice.message


def classes_apart(count, classes=3, modules=8):
    """Sizes of LoRAs of which each class is twice as large as the one before, in half of the modules."""
    labels = [f"class {i % classes}" for i in range(count)]
    sizes = norms(count, modules, 0.05)
    sizes[:, ::2] *= 4.0 ** (np.arange(count) % classes)[:, None]
    return sizes, labels


@pytest.mark.parametrize("where", ["all modules", "two modules"])
@pytest.mark.parametrize(("count", "absurd"), [(60, [7]), (60, [7, 20, 33]), (60, [0, 3, 6]), (12, [4]), (12, [4, 5])])
@pytest.mark.parametrize("factor", [1e6, 1e60, 1e-60])
def test_absurd_files_are_named_and_those_that_are_too_large_not_learned_from(count, absurd, where, factor):
    sizes, labels = classes_apart(count)
    part = slice(None) if where == "all modules" else slice(2, 4)
    sizes[absurd, part] *= factor
    (notice,) = notices(sizes, labels)
    assert notice.kind == "outlier" and notice.files == tuple(f"{i}.safetensors" for i in absurd)
    assert oversized(labels, sizes).tolist() == (absurd if factor > 1 else [])


@pytest.mark.parametrize("where", ["all modules", "two modules"])
@pytest.mark.parametrize("factor", [1e5, 1e14, 1e60])
@pytest.mark.parametrize(
    ("count", "absurd"),
    [
        (30, range(1)),
        (30, range(4)),
        (20, range(5, 8)),
        (60, range(0, 24, 3)),  # 40 % of a class
        (60, range(0, 45, 3)),  # most of one
        (60, range(29)),
    ],
)
def test_any_minority_of_absurd_files_is_named_and_not_learned_from(count, absurd, factor, where):
    labels, sizes = [f"class {i % 3}" for i in range(count)], norms(count)
    sizes[:, ::2] *= 4.0 ** (np.arange(count) % 3)[:, None]
    sizes[absurd, slice(None) if where == "all modules" else slice(2, 4)] *= factor
    (notice,) = notices(sizes, labels)
    assert notice.kind == "outlier" and notice.files == tuple(f"{i}.safetensors" for i in absurd)
    assert oversized(labels, sizes).tolist() == list(absurd)


def test_a_file_that_is_a_little_larger_is_named_beside_absurd_ones():
    sizes = norms(30, spread=0.05)
    sizes[:5] *= 1e14
    sizes[9] *= 50
    (notice,) = notices(sizes)
    assert len(notice.files) == 6 and oversized(["a"] * 30, sizes).tolist() == list(range(5))


@pytest.mark.parametrize(
    ("count", "words"),
    [(30, r"of 30 are (9|1)[0-9.e+]+ times those of the other 30"), (20, r"of 20 are .* times those of the other 40")],
)
def test_two_kinds_of_loras_are_said_to_be_two_and_none_is_an_outlier(count, words):
    factor, labels = 1000, ["a"] * 60
    if count < 30:  # all LoRAs of a class, whatever the factor
        factor, labels = 1e6, ["a"] * 20 + ["b"] * 40
    sizes = norms(60, spread=0.1)
    sizes[:count] *= factor
    (notice,) = notices(sizes, labels)
    assert notice.kind == "two sizes" and notice.files == () and re.search(words, notice.message)
    assert oversized(labels, sizes).tolist() == []


def test_files_that_are_a_little_larger_are_learned_from():
    sizes = norms(60, spread=0.05)
    sizes[7] *= 50
    assert notices(sizes) and oversized(["a"] * 60, sizes).tolist() == []
    assert oversized(["a"] * 4, np.full((4, 2), 1e9)).tolist() == []


def test_sizes_beyond_float32_are_told_as_such():
    sizes = norms(spread=0.05).astype(np.float32)
    sizes[4] = np.finfo(np.float32).max
    (notice,) = notices(sizes)
    assert "its updates are over " in notice.message


@pytest.mark.parametrize(
    "kind", ["normal", "heavy", "very heavy", "two kinds", "classes", "equal", "mixed zero", "few"]
)
def test_ordinary_collections_have_no_outliers(kind):
    for _ in range(20):
        generator, labels = GENERATOR, None
        whole = generator.standard_normal((60, 1))
        sizes = norms(60, 12, 0.5)
        if kind == "heavy":  # of files as a whole, and of modules
            sizes = np.exp(generator.standard_t(5, (60, 1)) * 0.5) * np.exp(generator.standard_t(5, (60, 12)) * 0.2)
        elif kind == "very heavy":
            sizes = np.exp(2 * whole) * np.exp(generator.standard_normal((60, 12)))
        elif kind == "two kinds":
            sizes[:20] *= 100
        elif kind == "classes":  # one of twelve is trained with a higher learning rate
            labels = [str(i // 5) for i in range(60)]
            sizes = norms(60, 12, 0.05)
            sizes[:5] *= 50
        elif kind == "equal":
            sizes = np.ones((60, 12))
            sizes[0] = 1.1
        elif kind == "mixed zero":
            sizes[generator.random((60, 12)) < 0.4] = 0
        elif kind == "few":
            sizes = norms(4)
            sizes[0] *= 1000
        assert notices(sizes, labels) == [] and len(oversized(labels or ["a"] * len(sizes), sizes)) == 0


@pytest.mark.slow
def test_the_built_in_collection_is_ordinary(tmp_path):
    digits_zoo.build(tmp_path / "zoo", 100)
    collection = index_collection(tmp_path / "zoo")
    sizes = np.stack([check_weights(collection.root / file.path, file.header).norms for file in collection.files])
    paths, labels = [file.path for file in collection.files], [file.label for file in collection.files]
    assert weight_notices(paths, labels, collection.modules, sizes) == []
