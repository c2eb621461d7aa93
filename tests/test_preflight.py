"""The pre-flight: it refuses what the experiment refuses, in the same words, and says what a folder holds."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import FILE_NAME, NARROW, lora, module_names, write_collection, write_lora
from safetensors.torch import load_file

import ablation_experiment
import data
from experiment import contents, datasets

PROGRAM = Path(data.__file__).resolve()
FLAGS = ("--top-k=1", "--quick", "--device=cpu", "--representations=stats")


def errors_of(program, capsys, arguments) -> tuple[int, list[str]]:
    """Exit code and error lines of a command."""
    capsys.readouterr()
    code = program(arguments)
    return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def both(root, capsys, *flags: str) -> tuple[list[str], list[str]]:
    """The errors of the experiment and of the pre-flight, which both refuse a folder."""
    out = root.parent / "out"
    flags = [*(flag for flag in FLAGS if flag.split("=")[0] not in " ".join(flags)), *flags, f"--output-dir={out}"]
    refused = errors_of(lambda a: ablation_experiment.main(a, NARROW), capsys, [f"--dataset={root}", *flags])
    seen = errors_of(data.main, capsys, ["inspect", str(root), *flags])
    assert refused[0] == seen[0] == 2 and refused[1] and not list(out.glob("*/*"))
    return refused[1], seen[1]


def spoil(path: Path, value: float = float("nan")) -> None:
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = value
    write_lora(path, tensors)


def file_of(root: Path, label: int, number: int) -> Path:
    return root / f"class_{label}" / f"{number:04}" / FILE_NAME


def one_class(root):
    shutil.rmtree(root / "class_1")


def a_class_of_two(root):
    for number in range(2, 6):
        shutil.rmtree(root / "class_1" / f"{number:04}")


def a_label_for_each(root):
    for number, path in enumerate(sorted(root.rglob("*.safetensors"))):
        (path.parent / "metadata.json").write_text(json.dumps({"category_label": number}))


def too_few_groups(root):
    for number, path in enumerate(sorted(root.rglob("*.safetensors"))):
        fields = {"category_label": path.parts[-3], "artist": f"a{number // 4}"}
        (path.parent / "metadata.json").write_text(json.dumps(fields))


PLACES = ("a1", "a2", "a3", "b1", "b2", "b4", "c3", "c4", "c5", "a1", "b1", "c3")


def no_split_of_groups(root):
    """Three groups a class: 3 and 4 are in one part for class b, and in two for class c."""
    for path, (label, group) in zip(sorted(root.rglob("*.safetensors")), PLACES, strict=True):
        fields = {"category_label": label, "artist": group}
        (path.parent / "metadata.json").write_text(json.dumps(fields))


def copies_of_two_classes(root):
    shutil.copyfile(file_of(root, 0, 1), file_of(root, 1, 4))


def a_class_of_copies(root):
    for number in range(1, 6):
        shutil.copyfile(file_of(root, 0, 0), file_of(root, 0, number))


def not_a_number(root):
    spoil(file_of(root, 0, 1))
    spoil(file_of(root, 1, 3), float("inf"))


def an_alpha_that_is_none(root):
    alpha = {f"{module_names(1)[0]}.alpha": torch.tensor(float("nan"))}
    write_lora(file_of(root, 0, 1), lora() | alpha)
    spoil(file_of(root, 0, 0))  # an experiment says both, as it reads both


def spoiled_but_for_two(root):
    for number in range(4):
        spoil(file_of(root, 1, number))


def bad_alphas_but_for_two(root):
    for number in range(4):
        alpha = {f"{module_names(1)[0]}.alpha": torch.tensor(float("inf"))}
        write_lora(file_of(root, 1, number), lora(seed=100 + number) | alpha)


def untrained(root):
    write_lora(file_of(root, 1, 1), {name: 0 * tensor for name, tensor in lora().items()})


def flat(root):
    for number, path in enumerate(sorted(root.rglob("*.safetensors"))):
        path.rename(root / f"{number}.safetensors")


def other_layers(root):
    write_lora(file_of(root, 0, 1), lora(3))


def another_base_model(root):
    write_lora(file_of(root, 0, 1), lora(width=12))


def a_pickle(root):
    (root / "class_0" / "0007").mkdir()
    (root / "class_0" / "0007" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04.")


def damaged(root):
    file_of(root, 0, 1).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (root / "class_1" / "0002" / "adapter_config.json").write_text('{"lora_alpha": "x"}')


def a_table_of_other_files(root):
    (root / "metadata.csv").write_text("file_name,label\nnowhere.safetensors,a\n")


def empty(root):
    shutil.rmtree(root)
    root.mkdir()


def missing(root):
    shutil.rmtree(root)


def results_that_are_a_file(root):
    (root.parent / "out").mkdir()
    (root.parent / "out" / f"ablation_{root.name}").touch()


REFUSED = [
    (one_class,),
    (a_class_of_two,),
    (a_label_for_each,),
    (too_few_groups, "--group-column=artist"),
    (no_split_of_groups, "--group-column=artist"),
    (copies_of_two_classes,),
    (copies_of_two_classes, "--keep-twins"),
    (a_class_of_copies,),
    (not_a_number,),
    (not_a_number, "--layers=attentions.0"),
    (an_alpha_that_is_none,),
    (spoiled_but_for_two, "--skip-bad"),
    (bad_alphas_but_for_two, "--skip-bad"),
    (untrained, "--strict"),
    (flat,),
    (other_layers,),
    (another_base_model, "--common-layers"),
    (a_pickle,),
    (damaged,),
    (a_table_of_other_files,),
    (empty,),
    (missing,),
    (None, "--top-k=4"),
    (None, "--top-k=5"),
    (None, "--top-k=0"),
    (None, "--top-k=2", "--layers=attentions.0"),
    (None, "--layers=attn7"),
    (None, "--layers=,"),
    (None, "--layers=!attentions"),
    (None, "--labels=nowhere.csv"),
    (None, "--label-column=artist"),
    (None, "--group-column=artist"),
    (None, "--group-column= "),
    (None, "--step=100"),
    (None, "--representations=stats,statistics"),
    (None, "--num-runs=0"),
    (None, "--device=abacus"),
    (None, "--holdout=artst"),
    (None, "--also=artst"),
    (None, "--holdout="),
    (None, "--label-bins=1"),
    (None, "--label-bins=3"),
    (None, "--save-models=stats"),
    (None, "--activations=nowhere.safetensors"),
    (results_that_are_a_file,),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("good") / "zoo", per_class=6)


@pytest.mark.parametrize(
    "case",
    [c if i % 3 == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(REFUSED)],
    ids=lambda case: " ".join([getattr(case[0], "__name__", "good"), *case[1:]]),
)
def test_whatever_the_experiment_refuses_is_refused_in_the_same_words(good, tmp_path, capsys, case):
    root = Path(shutil.copytree(good, tmp_path / "zoo"))
    spoilt_by, *flags = case
    if spoilt_by:
        spoilt_by(root)
    refused, seen = both(root, capsys, *flags)
    assert seen == [line.replace("error: --dataset ", "error: ") for line in refused]


def test_faults_of_headers_and_of_weights_are_said_in_one_go(good, tmp_path, capsys):
    root = Path(shutil.copytree(good, tmp_path / "zoo"))
    damaged(root)
    spoil(file_of(root, 0, 3))
    shutil.copyfile(file_of(root, 0, 4), file_of(root, 1, 4))
    refused, seen = both(root, capsys)
    assert len(refused) == 2 and seen[:2] == refused
    assert "NaN or infinity" in seen[2] and "another label" in seen[3] and "another label" in seen[4] and len(seen) == 5
    code, by_headers = errors_of(data.main, capsys, ["inspect", str(root), "--headers-only"])
    assert code == 2 and by_headers == refused


def test_a_folder_without_labels_is_shown_all_the_same(good, tmp_path, capsys):
    root = Path(shutil.copytree(good, tmp_path / "zoo"))
    flat(root)
    lines = shown(capsys, root, *FLAGS, expected=2)
    assert lines[0] == f"{root}: 12 LoRAs of 4 layers; labels from nothing yet" and "classes: (no label) (12)" in lines
    assert any(line.startswith("block") for line in lines)
    assert lines[-1].endswith(f"data.py label {root} writes a table of labels to fill in")
    lines = shown(capsys, good, *FLAGS, "--label-column=artist", expected=2)
    assert "labels from nothing yet" in lines[0]


def test_labels_layers_and_weights_are_refused_in_one_go(good, tmp_path, capsys):
    root = Path(shutil.copytree(good, tmp_path / "zoo"))
    a_class_of_two(root)
    spoil(file_of(root, 0, 3))
    refused, seen = both(root, capsys, "--top-k=7")
    assert (
        len(refused) == 1 and seen[0] == refused[0] and "--top-k 7" in seen[1] and "NaN" in seen[2] and len(seen) == 3
    )


def test_bad_alphas_are_left_out_by_both(good, tmp_path, capsys):
    root = Path(shutil.copytree(good, tmp_path / "zoo"))
    alpha = {f"{module_names(1)[0]}.alpha": torch.tensor(float("nan"))}
    write_lora(file_of(root, 0, 1), lora() | alpha)
    assert data.main(["inspect", str(root), *FLAGS, "--skip-bad", "--json"]) == 0
    skipped = json.loads(capsys.readouterr().out)["skipped"]
    collection = data.index_collection(root, skip_bad=True)
    args = ablation_experiment.parse_arguments([f"--dataset={root}", "--skip-bad"])
    asked = data.index_as_asked(args, root, None, datasets.Progress(shown=False))
    assert len(collection.files) == 12 and asked.skipped_records == skipped and len(skipped) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What it says
# ----------------------------------------------------------------------------------------------------------------------


def shown(capsys, root, *flags: str, expected: int = 0) -> list[str]:
    capsys.readouterr()
    assert data.main(["inspect", str(root), *flags]) == expected
    return capsys.readouterr().out.splitlines()


def test_numbers_in_labels_are_in_order():
    labels = ["10", "2", "-1", "2.5", "a 10", "a 9", "b", "A", "١٠", "9" * 200]
    assert contents.in_order(labels) == ["-1", "2", "2.5", "10", "9" * 200, "A", "a 9", "a 10", "b", "١٠"]


def test_many_classes_are_summarised(tmp_path, capsys):
    for label in range(40):
        for i in range(3 + label % 4):
            write_lora(tmp_path / f"{label}" / f"{i}.safetensors", lora(1, width=4, seed=10 * label + i))
    flags = ("--top-k=1", "--representations=stats", "--headers-only")
    lines = shown(capsys, tmp_path, *flags)
    assert lines[1] == "classes: 40 of 3 to 6 LoRAs: 0, 1, 2, ..., 39 (all: --all)"
    assert lines[2] == "         the smallest: 0 (3), 4 (3), 8 (3); the largest: 39 (6), 35 (6), 31 (6)"
    everything = "\n".join(shown(capsys, tmp_path, *flags, "--all"))
    assert "2 (5), 3 (6), 4 (3)" in everything and "38 (5), 39 (6)" in everything
    assert max(map(len, everything.splitlines()[:6])) < 120
    assert list(json.loads("\n".join(shown(capsys, tmp_path, *flags, "--json")))["classes"])[9:11] == ["9", "10"]


def test_columns_that_could_be_labels_or_groups(tmp_path, capsys):
    for i in range(12):
        label = ["anime", " anime", "cat"][i % 3]
        fields = {"category_label": label, "artist": f"{label} {i // 6}", "style": f"s{i % 2}", "name": f"n{i}"}
        write_lora(tmp_path / f"{i:02}" / FILE_NAME, lora(1, seed=i), fields)
    lines = shown(capsys, tmp_path, *FLAGS)
    assert "columns: category_label (3), artist (6), style (2), name (12) (number of values)" in lines
    assert "         would make classes (--label-column): style" in lines
    assert "         looks like a group (--group-column): artist" in lines
    found = json.loads("\n".join(shown(capsys, tmp_path, *FLAGS, "--json")))
    assert found["label_columns"] == ["style"] and found["group_columns"] == {"artist": 6}
    assert sorted(found["near_duplicates"][0]) == [" anime", "anime"]


def test_what_is_left_out_and_what_the_rest_takes(tmp_path, capsys):
    root = write_collection(tmp_path / "zoo", per_class=4)
    write_lora(file_of(root, 0, 0), lora(rank=5))
    write_lora(file_of(root, 0, 1), lora(rank=3))
    flags = ["--top-k=1", "--device=cpu", "--quick"]
    lines = shown(capsys, root, *flags)
    assert "ranks:   2 (6 LoRAs), 3 (1 LoRA), 5 (1 LoRA)" in lines
    (left_out,) = (line for line in lines if line.startswith("not run: "))
    assert left_out.startswith("not run: flat_vec, pca, vae, contrastive, denoising: ranks differ between LoRAs: ")
    assert any(line.split()[0] == "spectral" and "MiB" in line for line in lines[8:])
    found = json.loads("\n".join(shown(capsys, root, *flags, "--json")))
    assert {entry["step"] for entry in found["estimates"]} >= {"ranking", "stats", "update_kernel"}
    assert list(found["not_run"]) == ["flat_vec", "pca", "vae", "contrastive", "denoising"] and found["mixed_ranks"]
    assert found["ranks"] == [{"ranks": [2], "files": 6}, {"ranks": [3], "files": 1}, {"ranks": [5], "files": 1}]
    assert found["weights"] == {"least": 64, "most": 160, "total": 6 * 64 + 96 + 160}
    assert found["refused"] == [] and found["next"].startswith("python ")
    found = json.loads("\n".join(shown(capsys, root, *flags, "--json", "--layers=lora.down")))
    assert found["not_run"]["spectral" if "spectral" in found["not_run"] else "update_kernel"] == (
        "--layers leaves no pair whole"
    )


def test_a_block_is_a_line(tmp_path, capsys):
    modules = [f"unet.{block}.attentions.0.transformer_blocks.{n}" for n in range(2) for block in ("mid_block",)]
    names = [f"{m}.{end}" for m in modules for end in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.2")]
    for label in "ab":
        for i in range(3):
            tensors = {}
            for number, name in enumerate([*names, "unet.something.new"]):
                tensors[f"{name}.lora.down.weight"] = torch.randn(2, 4 + number % 2)
                tensors[f"{name}.lora.up.weight"] = torch.randn(6, 2)
            write_lora(tmp_path / label / f"{i}.safetensors", tensors)
    lines = shown(capsys, tmp_path, *FLAGS)
    start = lines.index("block  layers  out x rank x in  projections")
    assert lines[start + 1 : start + 3] == [
        "MID        16  6x2x4, 6x2x5     attn1 q out, attn2 k, ff out",
        "none        2  6x2x4            something_new",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# What to do next
# ----------------------------------------------------------------------------------------------------------------------


def test_the_last_line_is_the_command_with_the_flags_quoted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_collection(tmp_path / "my loras; rm x")
    flags = [*FLAGS, "--layers=*attentions.[01]*", "--strict", "--controls=none"]
    *_, last = shown(capsys, root, *flags)
    assert "\\x1b" in shown(capsys, f"{root}\x1b[31m", expected=2)[-1]
    words = shlex.split(last.removeprefix("next:    "))
    assert words[:2] == ["python", str(PROGRAM.with_name("ablation_experiment.py"))]
    parsed, asked = (ablation_experiment.parse_arguments(given) for given in (words[2:], [f"--dataset={root}", *flags]))
    assert parsed == asked
    monkeypatch.chdir(PROGRAM.parent)
    assert shown(capsys, root, *flags)[-1].startswith("next:    python ablation_experiment.py --dataset='")


def test_the_last_line_says_what_helps_where_the_folder_is_refused(good, tmp_path, capsys):
    root = Path(shutil.copytree(good, tmp_path / "zoo"))
    spoil(file_of(root, 0, 1))
    *_, last = shown(capsys, root, *FLAGS, expected=2)
    assert "or leave those files out: python " in last
    again = shlex.split(last.partition("data.py ")[2])
    assert again[1] == str(root) and data.main(again) == 0
    for i, path in enumerate(sorted(root.rglob("*.safetensors"))):
        (path.parent / "metadata.json").write_text(json.dumps({"category_label": i, "artist": f"a{i % 3}"}))
    *_, last = shown(capsys, root, *FLAGS, "--skip-bad", expected=2)
    assert "or by other labels: python " in last and last.endswith(
        "--label-column=artist --skip-bad --quick --top-k=1 --representations=stats --device=cpu"
    )
    found = json.loads("\n".join(shown(capsys, root, *FLAGS, "--skip-bad", "--json", expected=2)))
    assert f"next:    {found['next']}" == last and "looks like an id" in found["refused"][0]


def test_a_name_means_the_folder_that_the_experiment_means(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.digits_zoo, "build", lambda *_, **__: pytest.fail("it trains"))
    assert data.main(["inspect", "small"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: data/small: no such folder, and no data/built-in-digits/small. `python ")
    assert "ablation_experiment.py --dataset=small --quick` trains" in told and not os.listdir(tmp_path)
    write_collection(tmp_path / "elsewhere" / "small")
    first, *_, last = shown(capsys, "small", "--data-dir=elsewhere", *FLAGS)
    assert (
        first.startswith("small, which is elsewhere/small: 6 LoRAs") and "--dataset=small --data-dir=elsewhere" in last
    )


# ----------------------------------------------------------------------------------------------------------------------
# Shells
# ----------------------------------------------------------------------------------------------------------------------


def in_shell(command: str, **how) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, **how)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["| head -n 1", "| head", ">&-", "2>&-", "--json | head -n 1", "--all | head -n 3"])
def test_whoever_reads_may_stop(tmp_path, reader):
    write_collection(tmp_path / "zoo", modules=2000, per_class=3, width=2)
    flags = " ".join(FLAGS)
    done = in_shell(f"{sys.executable} {PROGRAM} inspect {tmp_path / 'zoo'} {flags} {reader}")
    assert (done.returncode, done.stderr) == (0, "")
    assert reader in (">&-", "--json | head -n 1") or "LoRAs of 4000 layers" in done.stdout


@pytest.mark.slow
def test_whoever_reads_may_stop_and_still_learns_that_it_is_refused(tmp_path):
    damaged(write_collection(tmp_path / "zoo", per_class=3))
    assert in_shell(f"{sys.executable} {PROGRAM} inspect {tmp_path / 'zoo'} 2>&1 | true").returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["import", "--help"]])
def test_help_needs_no_library(arguments):
    heavy = "numpy", "torch", "safetensors", "scipy", "sklearn"
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    print('loaded', [name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROGRAM.parent)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stdout.endswith("loaded []\n"), done
