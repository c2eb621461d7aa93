"""Folders ``model/`` that somebody else has made and sealed: predicted from, or refused in a line."""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import module_names, write_lora
from safetensors.numpy import load_file, save_file
from test_predict import edited, planted

import predict
from experiment import model_files, prediction
from experiment.model_files import Made
from representations import REPRESENTATIONS
from training import attention

CLASSES, MODULES, WIDTH, M, R = 3, 2, 8, 5, 2
RECORDS = {
    "update_spectrum": "layers",
    "update_kernel": "pairs",
    "update_views": "rest",
    "update_attention": "attention",
}
USUAL = {"layers": 3, "pairs": 2, "rest": 2, "attention": 3}  # measures


def tensors_of(name: str, kind: str) -> dict[str, np.ndarray]:
    """Random tensors of a record."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int, dtype: type = np.float64) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    found = {"norm_mean": drawn(MODULES), "norm_spread": np.full(MODULES, np.inf)}
    if kind == "layers":
        width = len(REPRESENTATIONS[name].feature_names) * MODULES
        found |= {"columns": np.arange(width) > 3, "mean": drawn(width - 4), "scale": drawn(width - 4)}
        found |= {"train": drawn(M, width - 4, dtype=np.float16)}
        for layer, (inputs, outputs) in enumerate(((width - 4, 6), (6, CLASSES))):
            found[f"parameters.weight{layer}"] = drawn(R, inputs, outputs, dtype=np.float32)
            found[f"parameters.bias{layer}"] = drawn(R, 1, outputs, dtype=np.float32)
        return found
    views = 1 if name == "update_kernel" else 3
    found |= {"own": np.ones(M), "weights": np.ones((MODULES, views)), "sizes": np.ones(MODULES)}
    for m in range(MODULES):
        found[f"down.{m}"], found[f"up.{m}"] = (
            drawn(M, 2, WIDTH, dtype=np.float32),
            drawn(M, WIDTH, 2, dtype=np.float32),
        )
        found[f"size.{m}"] = np.ones(M)
    if kind == "pairs":
        found |= {"counts": np.array([2, 2, 1]), "coefficients": drawn(CLASSES - 1, M), "intercept": drawn(CLASSES)}
    elif kind == "rest":
        found |= {"coefficients": drawn(CLASSES, M), "intercept": drawn(CLASSES)}
    else:
        for part, shape in attention.parameter_shapes(MODULES, CLASSES, 4).items():
            found[f"parameters.{part}"] = drawn(R, *shape, dtype=np.float32)
        found["train"] = drawn(M, MODULES * attention.TOKEN, dtype=np.float16)
        for m in range(MODULES):
            found |= {f"map.{m}": drawn(M, attention.COORDINATES), f"shift.{m}": drawn(attention.COORDINATES)}
            found |= {f"{part}.{m}": drawn(1, attention.TOKEN) for part in ("mean", "scale")}
    return found


def record_of(name: str, kind: str) -> dict:
    usual = {"medians": [1.0] * USUAL[kind], "spreads": [1.0] * USUAL[kind], "bound": 2.0}
    usual |= {"measured_on": "validation LoRAs", "rows": 20}
    runs = R if kind in ("layers", "attention") else 1
    record = {"representation": name, "kind": kind, "landmarks": None, "dtype": "float32", "runs": runs, "same": 1.0}
    record |= {"temperature": 0.5, "usual": usual, "validation_accuracy": 0.9, "file": f"{name}.safetensors"}
    record |= {"validation": {"loras": 9, "chance": 0.4}}
    return record | ({"layers": 2} if kind == "layers" else {})


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    """A folder with ``model/`` of one record of each kind, and ``lora.safetensors`` that it predicts."""
    folder = tmp_path_factory.mktemp("miniature")
    (folder / "model").mkdir()
    kept, files = [], {}
    for name, kind in RECORDS.items():
        made = {part: Made.of(array) for part, array in tensors_of(name, kind).items()}
        record = record_of(name, kind)
        files[record["file"]], record["bytes"] = model_files.write_tensors(folder / "model" / record["file"], made)
        kept.append(record)
    names = [name.replace(".", "_") for name in module_names(MODULES)]
    manifest = {
        "results": {"fingerprint": "0", "samples": "0", "config": "0"},
        "dataset": {"name": "loras", "num_samples": 60},
        "classes": ["cat", "dog", "owl"],
        "modules": [{"module": name, "inputs": WIDTH, "outputs": WIDTH} for name in names],
        "passed_over": [],
        "kept": kept,
        "files": files,
    }
    model_files.write_manifest(folder / "model", manifest)
    write_lora(folder / "lora.safetensors", planted(0, 0, MODULES))
    return folder


@pytest.fixture
def copied(miniature, tmp_path) -> Path:
    return Path(shutil.copytree(miniature, tmp_path / "miniature"))


def said(folder: Path, *arguments: object) -> tuple[int, str, list[str]]:
    """Return exit code, standard output, and the lines of standard error that are no notes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = predict.main([str(folder), *map(str, arguments)])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]


def refusal(folder: Path, *arguments: object) -> str:
    """Return the line by which the program refuses."""
    code, out, lines = said(folder, *arguments)
    assert (code, out, len(lines)) == (2, "", 1), (code, out, lines)
    assert lines[0].startswith("error: ") and lines[0].endswith(".")
    return lines[0]


def tensor_edited(folder: Path, name: str, change) -> None:
    """Edit tensors of a representation, and seal the folder again."""
    path = folder / "model" / f"{name}.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    edited(folder, lambda manifest: manifest["files"].update({path.name: sha}))


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_right_is_predicted(miniature, name):
    for how in ((), ("--json",), ("--csv",)):
        code, out, lines = said(miniature, miniature / "lora.safetensors", "--representation", name, *how)
        assert (code, lines) == (0, []) and any(label in out for label in ("cat", "dog", "owl"))


def record_with(**fields: object):
    return lambda manifest: manifest["kept"][0].update(fields)


def usual_with(**fields: object):
    return lambda manifest: manifest["kept"][0]["usual"].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(kept=[]), "kept is no list of records, or empty"),
        (lambda m: m.update(files=[]), "a file of a name"),
        (lambda m: m.update(versions=[]), "versions are not texts"),
        (lambda m: m.update(dataset={}), "dataset has no name"),
        (lambda m: m.update(results=[]), "results are not texts"),
        (lambda m: m.update(passed_over=None), "passed_over is no list"),
        (lambda m: m.update(modules=[]), "modules are not different names"),
        (lambda m: m["modules"][0].update(inputs=10**12), "modules are not different names"),
        (lambda m: m["modules"][0].update(inputs=True), "modules are not different names"),
        (lambda m: m.update(classes=["cat", "dog"]), "its tensor parameters.weight1 has the shape"),
        (lambda m: m.update(classes=["cat"]), "two or more different names"),
        (lambda m: m.update(classes=[1, 2, 3]), "two or more different names"),
        (lambda m: m.update(classes=["cat", "cat", "dog"]), "two or more different names"),
        (lambda m: m.update(classes=["cat", "dog", "o\x9b31m"]), "two or more different names"),
        (lambda m: m["kept"].append(m["kept"][0]), "stands twice"),
        (record_with(file="/etc/hostname"), "is not update_spectrum.safetensors"),
        (record_with(file="../../lora.safetensors"), "is not update_spectrum.safetensors"),
        (lambda m: m["files"].pop("update_spectrum.safetensors"), "without a SHA-256"),
        (record_with(representation="stats"), "representation of a record"),
        (record_with(representation=[1]), "representation of a record"),
        (record_with(kind="pairs"), "kind that does not belong"),
        (record_with(layers=10**9), "none from 1 to 16"),
        (record_with(layers=3), "has no tensor parameters.weight2"),
        (record_with(runs=3), "its tensor parameters.weight0 has the shape"),
        *[(record_with(temperature=value), "temperature of") for value in (0, 0.0, 1e-320, 1e308, None, "1", True)],
        (record_with(validation_accuracy=10**400), "validation_accuracy of"),
        (record_with(usual={}), "usual of"),
        (usual_with(medians=[1.0, 1.0]), "usual of"),
        (usual_with(spreads=[0.0, 1.0, 1.0]), "usual of"),
        (usual_with(bound="2"), "usual of"),
        (usual_with(medians=[1.0], spreads=[1.0]), "medians of 1 measures, where there are 3"),
    ],
)
def test_a_manifest_that_is_sealed_and_wrong_is_refused(copied, change, words):
    edited(copied, change)
    assert words in refusal(copied, copied / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("update_spectrum", lambda t: t.pop("mean"), "has no tensor mean"),
        ("update_spectrum", lambda t: t.update(mean=t["mean"][:3]), "its tensor mean has the shape"),
        ("update_spectrum", lambda t: t.update(train=t["train"][:0]), "its tensor train has the shape"),
        ("update_spectrum", lambda t: t.update(columns=t["mean"]), "its tensor columns is F64, not BOOL"),
        ("update_spectrum", lambda t: t.update(norm_mean=t["norm_mean"] * np.nan), "norm_mean is not finite"),
        ("update_spectrum", lambda t: t.update(norm_spread=t["norm_spread"] * np.nan), "norm_spread is not finite"),
        ("update_spectrum", lambda t: t["parameters.bias0"].fill(np.inf), "parameters.bias0 is not finite"),
        ("update_spectrum", lambda t: t["parameters.weight1"].fill(3e38), "predicts nothing, not even of no update"),
        ("update_kernel", lambda t: t.update(counts=np.array([9, 2, 1])), "counts does not count"),
        ("update_kernel", lambda t: t.update(counts=np.array([-2, 6, 1])), "counts does not count"),
        ("update_views", lambda t: t.update({"down.1": t["down.1"][..., :3]}), "its tensor down.1 has the shape"),
        ("update_views", lambda t: t.update(weights=t["weights"][:, :1]), "its tensor weights has the shape"),
        ("update_attention", lambda t: t.pop("map.1"), "has no tensor map.1"),
        ("update_attention", lambda t: t.pop("parameters.gate_tanh"), "has no tensor parameters.gate_tanh"),
    ],
)
def test_tensors_that_are_none_of_a_record_are_refused(copied, name, change, words):
    tensor_edited(copied, name, change)
    line = refusal(copied, copied / "lora.safetensors", "--representation", name)
    assert words in line and f"{name}.safetensors" in line


def test_bounds_and_notes_that_a_later_version_writes_are_allowed(miniature):
    manifest = json.loads((miniature / "model" / "manifest.json").read_text())
    manifest["kept"][0]["usual"] |= {"bound": None, "measured_on": "held-out LoRAs", "n": 12}
    assert model_files.manifest_fault(manifest) == ""


def test_a_file_cut_short_while_it_is_read_is_refused(copied):
    model = model_files.ModelFolder(copied)
    with model.tensors(model.records[-1]) as get:
        assert get("norm_mean").shape == (MODULES,)
        os.truncate(copied / "model" / "update_attention.safetensors", 100)
        with pytest.raises(model_files.CollectionError, match="changed while it was read"):
            [get(f"{kind}.{m}") for kind in ("map", "mean", "scale", "shift") for m in range(MODULES)]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(copied):
    path = copied / "model" / "update_views.safetensors"
    path.unlink()
    os.mkfifo(path)
    assert "update_views.safetensors: missing or damaged" in refusal(copied, copied / "lora.safetensors")


# -- paths and files ---------------------------------------------------------------------------------------------------


def test_paths_that_mean_nothing_are_refused_in_words(miniature, tmp_path, monkeypatch):
    lora = miniature / "lora.safetensors"
    assert "nosuch: no such file or folder" in refusal(miniature, tmp_path / "nosuch")
    assert "nosuch.safetensors: no such file or folder" in refusal(miniature, tmp_path / "nosuch.safetensors")
    monkeypatch.chdir(miniature)
    assert "an empty path" in refusal(miniature, "")
    assert "an empty path" in refusal(Path("x"), "") and said("", lora)[0] == 2
    (tmp_path / "text").write_text("")
    assert "text: a file. Give the folder" in refusal(tmp_path / "text", lora)
    long = tmp_path / ("x" * 300)
    assert "File name too long" in refusal(miniature, long)
    code, out, _ = said(miniature, long, lora, "--skip-bad", "--json")
    assert code == 0 and [len(json.loads(out)[part]) for part in ("files", "skipped")] == [1, 1]


def test_results_json_means_its_folder(copied):
    edited(copied, lambda manifest: None)
    shutil.move(copied / "model", copied / "results" / "model")
    (copied / "results" / "results.json").write_text("{}")
    line = refusal(copied / "results" / "results.json", copied / "lora.safetensors")
    assert "belongs to other results" in line


def test_a_file_that_is_given_twice_is_listed_once(miniature, monkeypatch):
    monkeypatch.chdir(miniature)
    _, out, _ = said(miniature, "lora.safetensors", miniature / "lora.safetensors", "--json")
    assert [record["file"] for record in json.loads(out)["files"]] == ["lora.safetensors"]
    line = refusal(miniature, "no", miniature / "no")
    assert "no such file" in line


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_a_lora_of_numbers_that_are_not_finite_is_named(copied, monkeypatch, name, raises):
    """Bounds on LoRAs keep their numbers finite: those of a large one are made infinite here."""
    write_lora(copied / "large.safetensors", {key: 1e4 * part for key, part in planted(0, 0, MODULES).items()})
    kept = prediction.predict

    def overflowing(record: dict, get, rows):
        found, large = kept(record, get, rows), rows.norms.max(1) > 1e4
        if raises and large.any():
            raise np.linalg.LinAlgError("no convergence")
        found.scores[:, large] = np.inf
        return found

    monkeypatch.setattr(prediction, "predict", overflowing)
    both, how = (copied / "large.safetensors", copied / "lora.safetensors"), ("--representation", name, "--json")
    assert "large.safetensors: its weights are beyond what can be computed with" in refusal(copied, *both, *how)
    answer = json.loads(said(copied, *both, *how, "--skip-bad")[1])
    assert [entry["file"] for entry in answer["skipped"]] == [str(both[0])]
    (here,), (alone,) = answer["files"], json.loads(said(copied, both[1], *how)[1])["files"]
    assert here["label"] == alone["label"] and here["probability"] == pytest.approx(alone["probability"], rel=1e-4)


def test_what_is_not_printable_is_escaped_in_json_and_csv(copied):
    odd = copied / "o\x9b31m\u2028é😀\U000e0001" / "lora.safetensors"
    odd.parent.mkdir()
    shutil.copy(copied / "lora.safetensors", odd)
    _, text, _ = said(copied, odd, "--json")
    assert json.loads(text)["files"][0]["file"] == str(odd)
    assert all(line.isprintable() for line in text.split("\n")) and "é😀" in text
    _, text, _ = said(copied, odd, "--csv")
    assert all(line.isprintable() for line in text.split("\n"))
    assert "/o\\x9b31m\\u2028é😀\\U000e0001/lora" in list(csv.reader(io.StringIO(text)))[1][0]


# -- random edits ------------------------------------------------------------------------------------------------------

ODD = (
    None,
    True,
    0,
    -1,
    2,
    10**9,
    10**400,
    0.0,
    -0.5,
    1e-320,
    1e308,
    "",
    "x",
    "\x9b31m",
    "../x",
    "/etc/hostname",
    [],
    {},
)
ODD += ([1], ["a"], {"a": 1}, [None], "update_views", "pairs", "update_kernel.safetensors", "0" * 64, 10**6, [[]])


def places(value: object) -> list[tuple[object, object]]:
    """Return each list or object of a JSON value with each of its keys."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in items] + [place for _, item in items for place in places(item)]


def edit_manifest(draw: random.Random, manifest: dict) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        where, key = draw.choice(places(manifest))
        how = draw.randrange(4)
        if how == 0:
            del where[key]
        elif how == 1 and isinstance(where, list):
            where.append(draw.choice((where[key], *ODD)))
        elif how == 2:
            other, name = draw.choice(places(manifest))
            where[key] = json.loads(json.dumps(other[name]))
        else:
            where[key] = json.loads(json.dumps(draw.choice(ODD)))


def edit_tensors(draw: random.Random, arrays: dict[str, np.ndarray]) -> None:
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(sorted(arrays))
        array, how = arrays[name], draw.randrange(7)
        if how == 0:
            del arrays[name]
        elif how == 1:
            arrays[name] = array[: draw.randrange(len(array) + 1)] if array.ndim else array[None]
        elif how == 2:
            arrays[name] = array.astype(draw.choice((np.float16, np.float32, np.float64, np.int64, bool, np.int8)))
        elif how == 3 and array.size:
            array.reshape(-1)[draw.randrange(array.size)] = draw.choice((0, -1, 1e4, -6e4, 9))
        elif how == 4 and array.size and array.dtype.kind == "f":
            array.reshape(-1)[draw.randrange(array.size)] = draw.choice((np.nan, np.inf, np.finfo(array.dtype).max))
        elif how == 5:
            arrays[name] = np.concatenate([array, array], axis=draw.randrange(array.ndim)) if array.ndim else array
        else:
            arrays[name] = arrays[draw.choice(sorted(arrays))].copy()


@pytest.mark.parametrize("edits", [80, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_no_edit_gives_a_traceback(miniature, tmp_path, edits):
    outcomes = []
    for seed in range(edits):
        draw, folder = random.Random(seed), tmp_path / f"{seed}"
        shutil.copytree(miniature, folder)
        name = draw.choice(list(RECORDS))
        how = draw.choice(([], ["--json"], ["--csv"], ["--skip-bad"], ["--missing=zero", "--extra=ignore"]))
        if draw.random() < 0.5:
            edited(folder, lambda manifest: edit_manifest(draw, manifest))  # noqa: B023 (called at once)
            how = how + (["--representation", name] if draw.random() < 0.5 else [])
        else:
            tensor_edited(folder, name, lambda arrays: edit_tensors(draw, arrays))  # noqa: B023
            how = [*how, "--representation", name]
        code, out, lines = said(folder, folder / "lora.safetensors", *how)
        assert (code == 0 and not lines) or (code == 2 and len(lines) == 1 and not out), (seed, code, lines)
        assert all(line.isprintable() for line in [*out.split("\n"), *lines]), seed
        outcomes.append(code)
        shutil.rmtree(folder)
    assert {0, 2} == set(outcomes)
