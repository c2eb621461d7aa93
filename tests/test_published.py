"""Importing published parquet collections; see published.py."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import module_names
from safetensors.numpy import load_file

import ablation_experiment
import data
from loras import building, published
from loras.flags import parse_arguments

ROOT = Path(__file__).parent.parent
RANK, WIDTH = 2, 4
ROW_BY_ROW = published.Limits(batch_rows=1)
TWO_ROWS = published.Limits(batch_rows=2, hub_rows=2)
LAYERS = [f"{module}.lora.{role}.weight" for module in module_names(2) for role in ("down", "up")]


def weights(rows: int, rank: int = RANK, seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers of each layer, [rows, r, in] or [rows, out, r]."""
    generator = np.random.default_rng(seed)
    shapes = {"down": (rows, rank, WIDTH), "up": (rows, WIDTH, rank)}
    return {name: generator.standard_normal(shapes[name.split(".")[-2]]).astype(np.float32) for name in LAYERS}


def as_table(arrays: dict[str, np.ndarray], kind: pa.DataType | None = None, flat: bool = False, **others) -> pa.Table:
    """A collection with a column for each layer, two classes, and the columns ``others``."""
    rows = len(next(iter(arrays.values())))
    kind = kind or (pa.list_(pa.float32()) if flat else pa.list_(pa.list_(pa.float32())))
    columns = {"category_label": [f"class {i % 2}" for i in range(rows)], "label": list(range(rows))} | others
    for name, numbers in arrays.items():
        columns[name] = pa.array((numbers.reshape(rows, -1) if flat else numbers).tolist(), kind)
    return pa.table(columns)


def write(path: Path, table: pa.Table, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def run(*arguments, limits: published.Limits | None = None) -> int:
    arguments = ["import", *map(str, arguments)]
    if limits is None:
        return data.main(arguments)
    return published.run(parse_arguments(arguments), limits)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder and what it holds."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def tensors(out: Path, row: int) -> dict[str, np.ndarray]:
    return load_file(out / f"{row:06}" / "pytorch_lora_weights.safetensors")


# -- what comes out ---------------------------------------------------------------------------------------


def test_rows_become_files_that_the_program_reads(tmp_path, capsys):
    wanted = weights(8)
    steps, images = [100] * 8, [b"png"] * 8
    source = write(tmp_path / "c.parquet", as_table(wanted, steps=steps, image=images, score=[float("nan")] * 8))
    out = tmp_path / "data" / "50k"
    assert run(source, out) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        f"{out}: 8 LoRAs of 4 layers from 8 rows of {source}",
        "label:    category_label",
        "metadata: category_label, label, steps, score",
        "left out: image",
        f"next:     python data.py inspect {out}",
        f"          python ablation_experiment.py --dataset={out}",
    ]
    assert sorted(path.name for path in out.iterdir()) == [*(f"{row:06}" for row in range(8)), "import.json"]
    assert sorted(path.name for path in (out / "000003").iterdir()) == [
        "metadata.json",
        "pytorch_lora_weights.safetensors",
    ]
    assert json.loads((out / "000003" / "metadata.json").read_text()) == {
        "category_label": "class 1",
        "label": 3,
        "steps": 100,
        "score": None,
    }
    for row in range(8):
        saved = tensors(out, row)
        assert set(saved) == set(LAYERS)
        for name in LAYERS:
            np.testing.assert_array_equal(saved[name], wanted[name][row])
    collection = data.index_collection(out)
    assert [layer.name for layer in collection.layers] == LAYERS
    assert collection.class_counts == {"class 0": 4, "class 1": 4}
    assert data.main(["inspect", str(out), "--top-k=1"]) == 0


def test_the_experiment_runs_on_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "c.parquet", as_table(weights(16)))
    assert run(source, "data/50k") == 0
    flags = ["--top-k=1", "--quick", "--num-runs=1", "--representations=stats", "--device=cpu"]
    assert ablation_experiment.main(["--dataset=50k", *flags]) == 0
    results = json.loads(Path("ablation-results/ablation_50k/results.json").read_text())
    assert results["dataset"]["num_samples"] == 16 and results["dataset"]["source"] == "files"
    assert "category_label in metadata.json" in capsys.readouterr().out


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize(
    "nested",
    [
        lambda value: pa.list_(pa.list_(value)),
        lambda value: pa.large_list(pa.large_list(value)),
        lambda value: pa.list_(pa.list_(value, WIDTH)),
    ],
    ids=["list", "large list", "list of fixed size"],
)
def test_every_type_of_numbers_and_lists(tmp_path, value, nested):
    downs = [name for name in LAYERS if "down" in name]
    numbers = weights(3, rank=WIDTH)  # square, so that lists of fixed size fit both factors
    if value == pa.float16():
        numbers = {name: array.astype(np.float16) for name, array in numbers.items()}
    if value == pa.float64():
        numbers = {name: array.astype(np.float64) + 1e-12 for name, array in numbers.items()}
    rows = 3
    columns = {"label": [0, 1, 0]}
    for name, array in numbers.items():
        cells = pa.array(array.ravel()).cast(value)
        sides = nested(value)
        columns[name] = pa.array(cells.to_numpy().reshape(rows, WIDTH, WIDTH).tolist(), sides)
    assert run(write(tmp_path / "c.parquet", pa.table(columns)), tmp_path / "out") == 0
    dtype = np.float16 if value == pa.float16() else np.float32
    for row in range(rows):
        saved = tensors(tmp_path / "out", row)
        for name in downs:
            assert saved[name].dtype == dtype
            np.testing.assert_array_equal(saved[name], numbers[name][row].astype(dtype))


def test_shards_may_store_one_column_in_several_types(tmp_path):
    """As datasets and pandas write them: list or large_list, floats of any width, columns in any order."""
    numbers = {name: array.astype(np.float16).astype(np.float32) for name, array in weights(6).items()}
    kinds = [
        pa.list_(pa.list_(pa.float32())),
        pa.large_list(pa.large_list(pa.float64())),
        pa.large_list(pa.list_(pa.float16())),
    ]
    for shard, kind in enumerate(kinds):
        rows = slice(2 * shard, 2 * shard + 2)
        part = {name: array[rows].astype(np.float16 if shard == 2 else np.float32) for name, array in numbers.items()}
        names = ["category_label", "label", *LAYERS][:: 1 if shard else -1]
        write(tmp_path / "shards" / f"{shard}.parquet", as_table(part, kind).select(names))
    assert run(tmp_path / "shards", tmp_path / "out") == 0
    for row in range(6):
        for name, tensor in tensors(tmp_path / "out", row).items():
            assert tensor.dtype == (np.float16 if row > 3 else np.float32)
            np.testing.assert_array_equal(tensor, numbers[name][row])


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint32()])
def test_whole_numbers_are_no_weights(tmp_path, capsys, kind):
    numbers = {name: (10 * array).round().astype(np.int8) for name, array in weights(3).items()}
    table = as_table({name: abs(array) for name, array in numbers.items()}, pa.list_(pa.list_(kind)))
    assert run(write(tmp_path / "c.parquet", table), tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"column {LAYERS[0]} is list<" in told and "whole numbers, which no weights are. Save them as floats" in told
    floats = as_table(weights(3))  # in one shard of two
    write(tmp_path / "shards" / "0.parquet", floats)
    write(tmp_path / "shards" / "1.parquet", table)
    assert run(tmp_path / "shards", tmp_path / "out") == 2
    assert "its columns differ from those of " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tensors_of_arrows_own_type_and_convolutions_have_their_shapes(tmp_path):
    generator = np.random.default_rng(0)
    down = generator.standard_normal((3, RANK, 5, 3, 3)).astype(np.float32)
    up = generator.standard_normal((3, 6, RANK, 1, 1)).astype(np.float32)
    own = {name: pa.FixedShapeTensorArray.from_numpy_ndarray(array) for name, array in weights(3).items()}
    kind = pa.list_(pa.list_(pa.list_(pa.list_(pa.float32()))))
    convolution = {
        "unet.conv_in.lora_A.weight": pa.array(down.tolist(), kind),
        "unet.conv_in.lora_B.weight": pa.array(up.tolist(), kind),
    }
    table = pa.table({"label": ["a", "b", "a"]} | own | convolution)
    assert run(write(tmp_path / "c.parquet", table), tmp_path / "out") == 0
    saved = tensors(tmp_path / "out", 1)
    for name, array in weights(3).items():
        np.testing.assert_array_equal(saved[name], array[1])
    np.testing.assert_array_equal(saved["unet.conv_in.lora_A.weight"], down[1])
    np.testing.assert_array_equal(saved["unet.conv_in.lora_B.weight"], up[1])
    assert len(data.index_collection(tmp_path / "out").layers) == 6


def test_an_alpha_comes_along(tmp_path):
    alpha = f"{module_names(1)[0]}.alpha"
    table = as_table(weights(3), **{alpha: [1.0, 2.0, 4.0]})
    assert run(write(tmp_path / "c.parquet", table), tmp_path / "out") == 0
    assert tensors(tmp_path / "out", 2)[alpha] == np.float32(4.0)
    layout = data.index_collection(tmp_path / "out").files[0].layout
    assert list(layout.alphas.values()) == [alpha]


def test_the_label_is_category_label_and_label_without_one(tmp_path, capsys):
    table = as_table(weights(3))
    assert run(write(tmp_path / "a.parquet", table), tmp_path / "a") == 0
    assert data.index_collection(tmp_path / "a").classes == ["class 0", "class 1"]
    assert run(tmp_path / "a.parquet", tmp_path / "b", "--leave-out=category_*") == 0
    assert "left out: category_label" in capsys.readouterr().out
    assert data.index_collection(tmp_path / "b").classes == ["0", "1", "2"]
    encoded = table.set_column(0, "category_label", table["category_label"].dictionary_encode())
    assert run(write(tmp_path / "c.parquet", encoded), tmp_path / "c") == 0
    assert data.index_collection(tmp_path / "c").classes == ["class 0", "class 1"]


# -- flat lists have no shape -----------------------------------------------------------------------------


def test_flat_lists_are_rank_one_and_the_output_says_so(tmp_path, capsys):
    wanted = weights(3, rank=1)
    assert run(write(tmp_path / "c.parquet", as_table(wanted, flat=True)), tmp_path / "out") == 0
    assert "rank:     1, assumed" in capsys.readouterr().out
    for name in LAYERS:
        np.testing.assert_array_equal(tensors(tmp_path / "out", 2)[name], wanted[name][2])


@pytest.mark.parametrize("flags, column", [(["--rank=2"], None), ([], [2, 2, 2]), (["--rank=2"], [9, 9, 9])])
def test_a_flag_or_a_column_tells_the_rank(tmp_path, capsys, flags, column):
    wanted = weights(3)
    table = as_table(wanted, flat=True, **({"rank": column} if column else {}))
    assert run(write(tmp_path / "c.parquet", table), tmp_path / "out", *flags) == 0
    assert "assumed" not in capsys.readouterr().out
    for name in LAYERS:
        np.testing.assert_array_equal(tensors(tmp_path / "out", 2)[name], wanted[name][2])


def test_a_rank_that_does_not_fit_is_refused(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", as_table(weights(3), flat=True, rank=[2, None, 3]))
    assert run(source, tmp_path / "a", "--rank=3") == 2
    error = capsys.readouterr().err
    assert f"error: {source}: row 0 (counted from 0): column {LAYERS[0]}: cannot reshape" in error
    assert run(source, tmp_path / "b") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "row 1 (counted from 0): column rank: None is no rank" in lines[0] and "row 2" in lines[1]
    assert run(source, tmp_path / "c", "--rank=0") == 2
    assert capsys.readouterr().err.startswith("error: --rank 0: no rank.")
    assert sorted(os.listdir(tmp_path)) == ["c.parquet"]


# -- sources ----------------------------------------------------------------------------------------------


def test_shards_are_read_in_sorted_order(tmp_path):
    wanted = weights(12)
    table = as_table(wanted)
    for name, first, end in (("train-1", 5, 12), ("train-0", 0, 5), (".cache/other", 0, 1)):
        write(tmp_path / "c" / "data" / f"{name}.parquet", table.slice(first, end - first), row_group_size=3)
    assert run(tmp_path / "c", tmp_path / "out", limits=TWO_ROWS) == 0
    for row in range(12):
        assert json.loads((tmp_path / "out" / f"{row:06}" / "metadata.json").read_text())["label"] == row
        np.testing.assert_array_equal(tensors(tmp_path / "out", row)[LAYERS[1]], wanted[LAYERS[1]][row])


@pytest.mark.parametrize("start", range(13))
def test_batches_begin_at_any_row_and_are_small(tmp_path, start):
    table = as_table(weights(12))
    write(tmp_path / "0.parquet", table.slice(0, 5), row_group_size=5)
    write(tmp_path / "1.parquet", table.slice(5), row_group_size=3)
    rows = []
    for path, first, batch in published.open_source(str(tmp_path), limits=TWO_ROWS).batches(start, ["label"]):
        labels = batch.column("label").to_pylist()
        assert len(labels) <= 2 and labels[0] == first + 5 * (Path(path).name == "1.parquet")
        rows += labels
    assert rows == list(range(start, 12))


def test_rows_of_many_weights_are_held_one_at_a_time(tmp_path):
    path = write(tmp_path / "c.parquet", as_table(weights(5)))
    source = published.open_source(str(path), limits=published.Limits(batch_bytes=10))
    assert [batch.num_rows for *_, batch in source.batches(0, LAYERS)] == [1] * 5


# -- what is refused --------------------------------------------------------------------------------------


def other_layer(name: str) -> pa.Table:
    table = as_table(weights(3))
    return table.rename_columns([name if column == LAYERS[0] else column for column in table.column_names])


FLAT = pa.table({"label": [0, 1], "weights": [[1.0, 2.0], [3.0, 4.0]]})
TWO_UNKNOWN = pa.table({"label": [0, 1], "x": [[1.0], [3.0]], "y": [[1.0], [3.0]]})
REFUSED = {
    "flat vector": (FLAT, "one flat vector per row (weights): it has no layers. "),
    "unknown names": (TWO_UNKNOWN, "no column is named as a layer is; the first columns are x, y. "),
    "no weights": (pa.table({"label": [0, 1]}), "no column is named as a layer is; the first columns are label. "),
    "one unknown": (other_layer("first"), "columns of numbers that are not named as a layer is: first (1 in all). "),
    "LoHa": (other_layer("unet.a.hada_w1_a"), "its columns: a LoHa adapter (unet.a.hada_w1_a) whose module "),
    "no partner": (as_table(weights(3)).drop([LAYERS[0]]), "its columns: module unet_down_blocks_0_"),
    "two of a role": (
        as_table(weights(3)).append_column(f"{module_names(1)[0]}.lora_A.weight", as_table(weights(3))[LAYERS[0]]),
        "its columns: two tensors are the down of module",
    ),
    "no label": (as_table(weights(3)).drop(["category_label", "label"]), "no column category_label or label of "),
    "label is a number": (as_table(weights(3), category_label=[0.5] * 3), "no column category_label or label of "),
    "label is a list": (as_table(weights(3), category_label=[["a"]] * 3), "no column category_label or label of "),
    "texts": (
        as_table(weights(3)).set_column(2, LAYERS[0], pa.array(["a"] * 3)),
        f"column {LAYERS[0]} is string, not lists of numbers. ",
    ),
    "too deep": (
        as_table(weights(3)).set_column(2, LAYERS[0], pa.array([[[[1.0]]]] * 3)),
        f"column {LAYERS[0]} is list<",
    ),
    "no rows": (as_table(weights(3)).slice(0, 0), "none of its 0 rows is a LoRA. "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_holds_no_loras_is_refused_at_the_door(tmp_path, capsys, case):
    table, message = REFUSED[case]
    source = write(tmp_path / "c.parquet", table)
    assert run(source, tmp_path / "made" / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: {message}") and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["c.parquet"]


def test_columns_of_numbers_that_are_no_layers_can_be_left_out(tmp_path):
    table = as_table(weights(3), clip_embedding=[[1.0, 2.0]] * 3)
    source = write(tmp_path / "c.parquet", table)
    assert run(source, tmp_path / "a") == 2
    assert run(source, tmp_path / "a", "--leave-out=clip_*") == 0
    assert (
        run(write(tmp_path / "d.parquet", other_layer("unet.a.hada_w1_a")), tmp_path / "d", "--leave-out=*hada*") == 2
    )
    assert set(tensors(tmp_path / "a", 0)) == set(LAYERS)


def test_a_source_that_cannot_be_read_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = write(Path("whole/c.parquet"), as_table(weights(3))).read_bytes()
    Path("empty").mkdir()
    Path("text.parquet").write_text("<!DOCTYPE html>")
    Path("pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("cut.parquet").write_bytes(whole[:-100])
    write(Path("differ/0.parquet"), as_table(weights(3)))
    write(Path("differ/1.parquet"), as_table(weights(3), steps=[1, 2, 3]))
    for source, message in (
        ("nowhere", "nowhere: no such file or folder. Give parquet files, or owner/name"),
        ("some/nowhere.parquet", "some/nowhere.parquet: no such file or folder. "),
        ("empty", "empty: no *.parquet file in it. "),
        ("text.parquet", "text.parquet: not a readable parquet file ("),
        ("pointer.parquet", "pointer.parquet: a Git LFS pointer, not parquet. Fetch the file with `git lfs pull`."),
        ("cut.parquet", "cut.parquet: not a readable parquet file ("),
        ("differ", "differ/1.parquet: its columns differ from those of differ/0.parquet (steps). "),
    ):
        assert run(source, "out") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
        assert not Path("out").exists() and not Path("out.partial").exists()
    assert run("whole", "out", "--split=train") == 2
    assert "--subset and --split are for data sets of the hub" in capsys.readouterr().err
    for out in (".", "..", "made/.."):
        assert run("whole", out) == 2 and capsys.readouterr().err.startswith("error: ")


def test_damage_inside_a_file_is_told(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", as_table(weights(500)), compression="zstd", data_page_size=1000)
    contents = bytearray(source.read_bytes())
    contents[len(contents) // 3 : len(contents) // 2] = bytes(len(contents) // 2 - len(contents) // 3)
    source.write_bytes(contents)
    assert run(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: not a readable parquet file (") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def bad_rows() -> pa.Table:
    """Six rows, of which 1 to 4 are bad and 5 has no label."""
    cells = weights(6)[LAYERS[1]].tolist()
    cells[1][2][1] = float("nan")
    cells[2] = None
    cells[3][0][0] = None
    cells[4][1] = [1.0]
    labels = ["a", "b", "a", "b", "a", None]
    kind = pa.list_(pa.list_(pa.float32()))
    table = as_table(weights(6), category_label=labels)
    return table.set_column(table.column_names.index(LAYERS[1]), LAYERS[1], pa.array(cells, kind))


def test_bad_rows_are_refused_by_number_and_column(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", bad_rows())
    assert run(source, tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {source}: row {row} (counted from 0): column {fault}. Mend it, or leave out such rows with --skip-bad."
        for row, fault in (
            (1, f"{LAYERS[1]}: NaN, infinity, or beyond float32"),
            (2, f"{LAYERS[1]}: missing"),
            (3, f"{LAYERS[1]}: missing"),
            (4, f"{LAYERS[1]}: empty, or lists of differing lengths"),
            (5, "category_label: missing"),
        )
    ]
    assert os.listdir(tmp_path) == ["c.parquet"]


def test_skip_bad_leaves_them_out_and_counts(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", bad_rows())
    assert run(source, tmp_path / "out", "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 1 LoRAs of 4 layers from 6 rows" in printed
    assert "skipped:  5 of 6 rows, which are no LoRAs; the first:" in printed and "row 3 (counted from 0)" in printed
    assert sorted(os.listdir(tmp_path / "out")) == ["000000", "import.json"]
    assert run(write(tmp_path / "d.parquet", bad_rows().slice(1)), tmp_path / "none", "--skip-bad") == 2
    assert "none of its 5 rows is a LoRA" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["c.parquet", "d.parquet", "out"]


@pytest.mark.parametrize("value, fault", [(1e39, "NaN, infinity, or beyond float32"), (-np.inf, "NaN, infinity")])
def test_numbers_beyond_float32_are_bad(tmp_path, capsys, value, fault):
    numbers = {name: array.astype(np.float64) for name, array in weights(3).items()}
    numbers[LAYERS[3]][2, 1, 1] = value
    source = write(tmp_path / "c.parquet", as_table(numbers, pa.list_(pa.list_(pa.float64()))))
    assert run(source, tmp_path / "out") == 2
    assert f"row 2 (counted from 0): column {LAYERS[3]}: {fault}" in capsys.readouterr().err


def test_factors_that_do_not_match_are_a_bad_row(tmp_path, capsys):
    down, up = weights(3)[LAYERS[0]].tolist(), weights(3)
    down[1] = down[1][:1]
    table = as_table(up)
    kind = table.schema.field(LAYERS[0]).type
    table = table.set_column(table.column_names.index(LAYERS[0]), LAYERS[0], pa.array(down, kind))
    assert run(write(tmp_path / "c.parquet", table), tmp_path / "out") == 2
    assert "row 1 (counted from 0): ranks differ in module" in capsys.readouterr().err


def test_a_later_bad_row_keeps_what_was_done_for_skip_bad(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", bad_rows())
    assert run(source, tmp_path / "out", limits=ROW_BY_ROW) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
    kept = (tmp_path / "out.partial" / "000000" / "pytorch_lora_weights.safetensors").stat()
    assert run(source, tmp_path / "out", "--skip-bad", limits=ROW_BY_ROW) == 0
    assert (tmp_path / "out" / "000000" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == kept.st_mtime_ns


# -- OUT, and going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("contents", ["a file", "a folder", "a link to nowhere", "another import"])
def test_an_out_that_holds_something_else_is_refused(tmp_path, capsys, contents):
    source, out = write(tmp_path / "c.parquet", as_table(weights(3))), tmp_path / "out"
    if contents == "a file":
        out.write_text("mine")
    elif contents == "a folder":
        out.mkdir()
        (out / "import.json").write_text('{"mine": 1}')
    elif contents == "a link to nowhere":
        out.symlink_to("nowhere")
    else:
        assert run(write(tmp_path / "other.parquet", as_table(weights(4))), out) == 0
    before = tree(tmp_path)
    assert run(source, out) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}: ") and "Give another folder, or remove it." in error
    assert tree(tmp_path) == before and os.path.lexists(out)


def test_a_partial_folder_of_something_else_is_refused(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", as_table(weights(3)))
    (tmp_path / "out.partial" / "000001").mkdir(parents=True)
    assert run(source, tmp_path / "out") == 2
    assert "out.partial: exists and is no import." in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "000001").is_dir()


def test_the_second_time_nothing_is_done(tmp_path, capsys, monkeypatch):
    source, out = write(tmp_path / "c.parquet", as_table(weights(3))), tmp_path / "out"
    out.mkdir()  # an empty folder holds nothing else
    assert run(source, out) == 0
    before = tree(out)
    monkeypatch.setattr(building, "write_atomically", None)
    capsys.readouterr()
    assert run(source, out) == 0
    assert f"{out}: 3 LoRAs of 4 layers, imported before: nothing to do" in capsys.readouterr().out
    assert run(source, out, "--rank=1") == 2
    assert "was imported from another source, or with other --rank or --leave-out" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.parametrize("stop", range(14))
def test_an_import_goes_on_where_it_was_stopped(tmp_path, monkeypatch, stop):
    """Fourteen files are written: 5 LoRAs of two each, and the state at the start and after each of 3 batches."""
    source = write(tmp_path / "c.parquet", as_table(weights(5)))
    assert run(source, tmp_path / "whole", limits=TWO_ROWS) == 0
    written, plain = [], building.write_atomically

    def write_some(path, contents):
        if len(written) == stop:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.0123abcd").write_bytes(contents[:5])  # as a kill leaves it
            raise KeyboardInterrupt
        written.append(path)
        plain(path, contents)

    monkeypatch.setattr(building, "write_atomically", write_some)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", limits=TWO_ROWS)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        building, "write_atomically", lambda path, contents: (written.append(path), plain(path, contents))
    )
    assert run(source, tmp_path / "out", limits=TWO_ROWS) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    weight_files = [path.parent.name for path in written if path.name.endswith(".safetensors")]
    assert len(weight_files) <= 5 + 2  # at most one batch is written twice


def test_a_killed_import_goes_on(tmp_path):
    source = write(tmp_path / "c.parquet", as_table(weights(150)))
    assert run(source, tmp_path / "whole") == 0
    code = (
        "import sys; from loras import flags, published; "
        "sys.exit(published.run(flags.parse_arguments(sys.argv[1:]), published.Limits(batch_rows=8)))"
    )
    command = [sys.executable, "-c", code, "import", str(source), str(tmp_path / "out")]
    draw = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        wanted = draw.randrange(20, 100)
        while process.poll() is None and not (tmp_path / "out.partial" / f"{wanted:06}").exists():
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert data.index_collection(tmp_path / "out.partial").files  # no half LoRA among them
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_imports_never_work_in_one_folder(tmp_path, capsys):
    source = write(tmp_path / "c.parquet", as_table(weights(3)))
    with building.partial_folder(tmp_path / "out", None) as partial:
        assert run(source, tmp_path / "out") == 2
        assert list(partial.iterdir()) == []
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'out.partial'}: process {os.getpid()} on ")
    assert error.endswith(" is at work there. Wait for it, or end it.\n") and error.count("\n") == 1
    assert run(source, tmp_path / "out") == 0


def test_an_import_that_another_process_finishes_first_is_not_done_again(tmp_path, monkeypatch, capsys):
    source, out = write(tmp_path / "c.parquet", as_table(weights(3))), tmp_path / "out"
    plain, before = building.partial_folder, {}

    def after_another_import(folder, check):
        monkeypatch.setattr(building, "partial_folder", plain)
        assert run(source, out) == 0
        before.update(tree(out))
        monkeypatch.setattr(building, "write_atomically", None)
        capsys.readouterr()
        return plain(folder, check)

    monkeypatch.setattr(building, "partial_folder", after_another_import)
    assert run(source, out) == 0
    assert f"{out}: 3 LoRAs of 4 layers, imported before: nothing to do" in capsys.readouterr().out
    assert before and tree(out) == before and sorted(os.listdir(tmp_path)) == ["c.parquet", "out"]


def test_a_state_that_cannot_be_read_is_named(tmp_path, capsys):
    source, out = write(tmp_path / "c.parquet", as_table(weights(3))), tmp_path / "out"
    (out / "import.json").mkdir(parents=True)
    assert run(source, out) == 2
    fault = f"{out / 'import.json'}: Is a directory. Mend that; the same command then continues."
    assert capsys.readouterr().err == f"error: {fault}\n"


def test_a_full_disk_is_reported_and_the_import_goes_on(tmp_path, monkeypatch, capsys):
    source, plain = write(tmp_path / "c.parquet", as_table(weights(3))), building.write_atomically

    def full(path, contents):
        if path.name.endswith(".safetensors"):
            raise OSError(28, "No space left on device", str(path))
        plain(path, contents)

    monkeypatch.setattr(building, "write_atomically", full)
    assert run(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left on device" in error and "then continues." in error
    monkeypatch.setattr(building, "write_atomically", plain)
    assert run(source, tmp_path / "out") == 0


def test_a_half_built_import_is_no_collection(tmp_path, capsys):
    assert run(write(tmp_path / "c.parquet", bad_rows()), tmp_path / "out", limits=ROW_BY_ROW) == 2
    assert ablation_experiment.main([f"--dataset={tmp_path / 'out.partial'}"]) == 2
    assert "a half-built collection" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["50k", "100k"])
def test_a_missing_collection_says_that_the_command_exists(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for flags, folder in (([], "data"), (["--data-dir=elsewhere"], "elsewhere")):
        assert ablation_experiment.main([f"--dataset={name}", *flags]) == 2
        assert f"`python data.py import SOURCE {folder}/{name}`" in capsys.readouterr().err


# -- the hub ----------------------------------------------------------------------------------------------


class Stream:
    """As much of datasets.IterableDataset as is used."""

    def __init__(self, table: pa.Table, broken: str = ""):
        self.table, self.broken = table, broken

    def with_format(self, name: str) -> "Stream":
        assert name == "arrow"
        return self

    def select_columns(self, names: list[str]) -> "Stream":
        return Stream(self.table.select(names), self.broken)

    def skip(self, rows: int) -> "Stream":
        return Stream(self.table.slice(rows), self.broken)

    def iter(self, batch_size: int):
        for first in range(0, len(self.table), batch_size):
            if self.broken and batch_size > 1 and first:
                raise ConnectionError(self.broken)
            yield self.table.slice(first, batch_size)


class Hub:
    """A stand-in for the library."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def load_dataset(self, name, subset, split, streaming):
        assert streaming
        self.asked.append((name, subset, split))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def install(answer) -> Hub:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", Hub(answer))
        return sys.modules["datasets"]

    return install


def test_a_data_set_of_the_hub(tmp_path, hub, capsys):
    wanted = weights(5)
    library = hub({"train": Stream(as_table(wanted, image=[b"png"] * 5))})
    assert run("someone/loras", "out", "--subset=small", limits=TWO_ROWS) == 0
    assert library.asked == [("someone/loras", "small", None)]
    assert "out: 5 LoRAs of 4 layers from 5 rows of someone/loras" in capsys.readouterr().out
    for row in range(5):
        np.testing.assert_array_equal(tensors(tmp_path / "out", row)[LAYERS[2]], wanted[LAYERS[2]][row])


def test_a_hub_that_breaks_off_is_reported_in_its_words_and_the_import_goes_on(tmp_path, hub, capsys):
    table = as_table(weights(5))
    hub(Stream(table, broken="the line\nis dead."))
    assert run("someone/loras", "out", "--split=train", limits=TWO_ROWS) == 2
    fault = "datasets says ConnectionError: the line is dead. Mend that and start again, which continues."
    assert capsys.readouterr().err == f"error: someone/loras: {fault}\n"
    assert sorted(os.listdir(tmp_path / "out.partial")) == ["000000", "000001", "import.json"]
    hub(Stream(table))
    assert run("someone/loras", "out", "--split=train", limits=TWO_ROWS) == 0
    assert len(data.index_collection(tmp_path / "out").files) == 5


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            ValueError("Config name is missing.\nPick one"),
            "datasets says ValueError: Config name is missing. Pick one. ",
        ),
        ({"train": None, "test": None}, "has the splits train, test. Choose one with --split."),
        (Stream(as_table(weights(1)).slice(1)), "holds no rows. "),
        (Stream(FLAT), "one flat vector per row (weights)"),
    ],
)
def test_what_the_hub_does_not_have_is_reported(tmp_path, hub, capsys, answer, message):
    hub(answer)
    assert run("someone/loras", "out", limits=TWO_ROWS) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: someone/loras: {message}") and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_the_real_library_on_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    load = datasets.load_dataset
    folder = write(tmp_path / "c" / "train-0.parquet", as_table(weights(5), steps=[1] * 5)).parent
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *args, **kwargs: load(str(folder), *args, **kwargs, cache_dir=str(tmp_path)),
    )
    monkeypatch.chdir(tmp_path)
    assert run("someone/loras", "hub", limits=TWO_ROWS) == 0
    assert run(folder, "local", limits=TWO_ROWS) == 0
    without_source = [
        {name: held for name, held in tree(Path(out)).items() if name != "import.json"} for out in ("hub", "local")
    ]
    assert without_source[0] == without_source[1] and len(without_source[0]) == 10
    source = published.hub_source("someone/loras", limits=TWO_ROWS)
    assert [row for *_, batch in source.batches(3, ["label"]) for row in batch.column("label").to_pylist()] == [3, 4]


def test_tensors_as_the_real_library_saves_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    wanted = weights(3)
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["a", "b"])}
        | {name: datasets.Array2D(wanted[name].shape[1:], "float32") for name in LAYERS}
    )
    rows = {"label": [0, 1, 0]} | {name: list(array) for name, array in wanted.items()}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "c.parquet")
    assert run(tmp_path / "c.parquet", tmp_path / "out") == 0
    for name in LAYERS:
        np.testing.assert_array_equal(tensors(tmp_path / "out", 1)[name], wanted[name][1])


# -- absent libraries -------------------------------------------------------------------------------------


def test_without_pyarrow_or_datasets_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run("someone/loras", "out") == 2
    fault = "no such folder, and datasets, which reads the hub, is not installed. Run `pip install datasets`."
    assert capsys.readouterr().err == f"error: someone/loras: {fault}\n"
    monkeypatch.setattr(published, "pa", None)
    assert run("c.parquet", "out") == 2
    fault = "pyarrow, which reads parquet, is not installed. Run `pip install pyarrow`."
    assert capsys.readouterr().err == f"error: c.parquet: {fault}\n"


def test_a_python_without_pyarrow_loads_the_module():
    code = "import sys; sys.modules['pyarrow'] = None; import data; sys.exit(data.main(['import', 'data.py', '/out']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: data.py: pyarrow, which reads parquet, is not installed. Run `pip install pyarrow`.\n"
