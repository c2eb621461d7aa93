"""Labels that are numbers, in bins: by hand, by planted counts, and refusals in words."""

import json

import numpy as np
import pytest
from making import FILE_NAME, lora, write_lora

import data
from data import CollectionError, index_collection
from experiment.settings import UsageError, resolve
from loras.label_bins import bins_of, in_order, number_of


def labelled(root, labels):
    """A collection whose metadata.json files hold these labels as ``steps``."""
    for i, label in enumerate(labels):
        write_lora(
            root / f"{i:03}" / FILE_NAME, lora(seed=i), {"steps": label, "category_label": ["cat", "dog"][i % 2]}
        )
    return root


@pytest.mark.parametrize(
    ("numbers", "count", "bins"),
    [
        (["1", "2", "3", "4"], 2, ["[1, 3)", "[1, 3)", "[3, 4]", "[3, 4]"]),
        (["4", "1", "3", "2"], 2, ["[3, 4]", "[1, 3)", "[3, 4]", "[1, 3)"]),  # in the order of the LoRAs
        (["5", "5.0", "5e0", "7"], 2, ["[5, 7)"] * 3 + ["[7, 7]"]),  # equal numbers, however written
        (["0", "0", "0", "0", "1", "2"], 3, ["[0, 1)"] * 4 + ["[1, 2)", "[2, 2]"]),  # a value each, at least
        (["1499", "1523", "9000", "100"], 2, ["[100, 1500)", "[1500, 9000]", "[1500, 9000]", "[100, 1500)"]),
        (["-3", "-1", "2", "4"], 2, ["[-3, 0)", "[-3, 0)", "[0, 4]", "[0, 4]"]),
        (["1e-4", "3e-4", "1e-3", "1"], 2, ["[0.0001, 0.001)"] * 2 + ["[0.001, 1]"] * 2),
    ],
)
def test_bins_are_those_made_by_hand(numbers, count, bins):
    assert bins_of(numbers, count) == bins


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_bins_hold_about_equal_numbers_and_never_divide_equal_values(count):
    generator = np.random.default_rng(count)
    for numbers in (generator.normal(size=300), generator.exponential(size=300) * 1e-7, np.arange(300) - 150.0):
        bins = np.array(bins_of([repr(float(number)) for number in numbers], count))
        sizes = np.unique(bins, return_counts=True)[1]
        assert len(sizes) == count and np.ptp(sizes) <= 1
    tied = generator.integers(0, 40, 300)
    bins = np.array(bins_of([str(number) for number in tied], count))
    assert all(len(set(bins[tied == number])) == 1 for number in tied) and len(set(bins)) == count


def test_every_number_lies_in_its_bin_as_written():
    generator = np.random.default_rng(1)
    numbers = np.concatenate([generator.normal(size=200) * 10.0 ** generator.integers(-8, 8, 200), [0.3, 0.1 + 0.2]])
    for number, label in zip(numbers, bins_of([repr(float(n)) for n in numbers], 50), strict=True):
        low, high = map(float, label[1:-1].split(", "))
        assert low <= number <= high and (number < high or label.endswith("]"))


def test_numbers_are_what_a_person_writes():
    assert [number_of(text) for text in ("7", " -1.5 ", ".5", "5.", "1E3", "+2")] == [7, -1.5, 0.5, 5, 1000, 2]
    assert {number_of(text) for text in ("", "nan", "inf", "1_000", "1,5", "0x10", "1e999", "10 %", "a")} == {None}


def test_a_collection_has_its_bins_as_classes(tmp_path):
    root = labelled(tmp_path / "loras", [100, 200, 300, 400, 500, 600])
    found = index_collection(root, label_column="steps", label_bins=2)
    assert found.class_counts == {"[100, 400)": 3, "[400, 600]": 3}
    assert found.label_source == "steps in metadata.json, in 2 bins" and found.label_column == "steps"
    plain = index_collection(root, label_column="steps")
    assert [file.path for file in plain.files] == [file.path for file in found.files]


def test_bins_are_in_the_order_of_their_numbers(tmp_path):
    root = labelled(tmp_path / "loras", [2, 3, 4, 10, 11, 12])
    assert index_collection(root, label_column="steps", label_bins=2).classes == ["[2, 10)", "[10, 12]"]
    assert index_collection(root, label_column="steps").classes == ["10", "11", "12", "2", "3", "4"]
    assert in_order(["[2, b)", "[10, 20)"]) == ["[10, 20)", "[2, b)"]


def test_a_table_is_binned_too(tmp_path):
    root = labelled(tmp_path / "loras", [1] * 6)
    rows = [f"{i:03}/{FILE_NAME},{10 * i}" for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
    found = index_collection(root, labels=tmp_path / "labels.csv", label_bins=3)
    assert list(found.class_counts.values()) == [2, 2, 2] and found.classes == ["[0, 20)", "[20, 40)", "[40, 50]"]


def test_labels_that_are_no_numbers_are_refused_by_file_or_left_out(tmp_path):
    root = labelled(tmp_path / "loras", [1, 2, "many", 4, 5, 6])
    with pytest.raises(CollectionError) as refused:
        index_collection(root, label_column="steps", label_bins=2)
    (line,) = refused.value.findings
    assert line.startswith(f"{root}/002/{FILE_NAME}: its label 'many' is no number, as --label-bins asks. Mend it")
    left = index_collection(root, label_column="steps", label_bins=2, skip_bad=True)
    assert len(left.files) == 5 and [path for path, _ in left.skipped] == [f"002/{FILE_NAME}"]


def test_fewer_distinct_numbers_than_bins_are_refused(tmp_path):
    root = labelled(tmp_path / "loras", [1, 1, 2, 2, 2, 1])
    with pytest.raises(
        CollectionError, match=r"steps in metadata.json are 2 distinct numbers, too few for --label-bins=3"
    ):
        index_collection(root, label_column="steps", label_bins=3)
    assert len(index_collection(root, label_column="steps", label_bins=3, unlabelled=True).files) == 6


def test_one_bin_is_refused_as_a_flag():
    from ablation_experiment import parse_arguments

    with pytest.raises(UsageError, match=r"--label-bins 1: at least two bins make classes. Give 2 or more."):
        resolve(parse_arguments(["--label-bins=1"]))
    settings = resolve(parse_arguments(["--label-bins=4", "--device=cpu"]))
    assert settings.config()["label_bins"] == settings.label_bins == 4


def test_inspect_shows_the_bins(tmp_path, capsys):
    root = labelled(tmp_path / "loras", [100 * (i // 2 + 1) for i in range(40)])
    flags = ["--label-column=steps", "--label-bins=2"]
    assert data.main(["inspect", str(root), "--headers-only", "--top-k=1", *flags]) == 0
    shown = capsys.readouterr().out
    assert "labels from steps in metadata.json, in 2 bins" in shown and "[100, 1100) (20), [1100, 2000] (20)" in shown
    assert "--label-bins=2" in shown.splitlines()[-1]
    data.main(["inspect", str(root), "--headers-only", "--json", "--top-k=1", *flags])
    assert json.loads(capsys.readouterr().out)["classes"] == {"[100, 1100)": 20, "[1100, 2000]": 20}
