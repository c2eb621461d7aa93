"""Every row of the table of bad input that a file or a flag can show, through the command line.

What is told begins with ``error: <path>: `` and the very words; the exit code is 2, and the output folder is as it was,
both where there was none and where it holds earlier results of a collection of that name.
"""

import ast
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from making import FILE_NAME, NARROW, lora, module_names, write_collection, write_lora
from safetensors.torch import save

import ablation_experiment
from ablation_experiment import main

ROOT = Path(ablation_experiment.__file__).parent
FLAGS = ("--top-k=1", "--quick", "--num-runs=1", "--representations=stats,flat_vec", "--device=cpu")
MODULE = module_names(1)[0]
ID = MODULE.replace(".", "_")
DOWN, UP = f"{MODULE}.lora.down.weight", f"{MODULE}.lora.up.weight"
WHOLE = save(lora(1))
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def contents(data: bytes) -> Callable[[Path], Path]:
    """Puts other bytes in the place of a file."""

    def spoil(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return spoil


def beside(name: str) -> Callable[[Path], Path]:
    """Leaves a file of another name in the place of the weights."""

    def spoil(path: Path) -> Path:
        path.unlink()
        path.with_name(name).write_bytes(b"\x80\x02}.")
        return path.with_name(name)

    return spoil


def tensors(change: Callable[[dict], dict]) -> Callable[[Path], Path]:
    """Writes the LoRA with other tensors."""

    def spoil(path: Path) -> Path:
        return write_lora(path, change(lora(1)))

    return spoil


def added(key: str) -> Callable[[Path], Path]:
    return tensors(lambda whole: whole | {key: torch.ones(2, 2)})


def with_number(number: float, *keys: str) -> Callable[[Path], Path]:
    def change(whole: dict) -> dict:
        for key in keys:
            whole[key][0, 1] = number
        return whole

    return tensors(change)


PICKLE = "a pickle checkpoint: never loaded. Convert it to safetensors."
LIBRARY = "not a readable safetensors file (Error while deserializing header: "
FILES = {
    "Git LFS pointer": (
        contents(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3188\n"),
        "a Git LFS pointer, not weights. Fetch the weights with `git lfs pull`.",
    ),
    "empty": (contents(b""), "incomplete download: has 0 bytes, a header alone needs 8. Download it again."),
    "7 bytes": (contents(b"1234567"), "incomplete download: has 7 bytes, a header alone needs 8. Download it again."),
    "within the header": (
        contents(WHOLE[: HEADER_END - 1]),
        f"incomplete download: has {HEADER_END - 1} bytes, header promises {HEADER_END}. Download it again.",
    ),
    "without data": (
        contents(WHOLE[:HEADER_END]),
        f"incomplete download: has {HEADER_END} bytes, header promises {len(WHOLE)}. Download it again.",
    ),
    "a byte short": (
        contents(WHOLE[:-1]),
        f"incomplete download: has {len(WHOLE) - 1} bytes, header promises {len(WHOLE)}. Download it again.",
    ),
    "<!DOCTYPE": (contents(b"<!DOCTYPE html><html></html>"), "a web page saved as weights. Download the file itself."),
    "<html": (contents(b"<html><body>404"), "a web page saved as weights. Download the file itself."),
    **{name: (beside(name), PICKLE) for name in ("weights.bin", "x.pt", "x.ckpt", "x.pth", "x.pkl", "X.CKPT")},
    "zip magic": (contents(b"PK\x03\x04" + bytes(200)), PICKLE),
    "pickle of old": (contents(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), PICKLE),
    "no JSON": (
        contents(with_header(b"not json")),
        f"{LIBRARY}invalid JSON in header: expected ident at line 1 column 2)",
    ),
    "no text": (contents(with_header(b"\xff\xfe\x00")), f"{LIBRARY}invalid UTF-8 in header: invalid utf-8"),
    "more data than told": (contents(WHOLE + b"x"), f"{LIBRARY}incomplete metadata, file not fully covered)"),
    "absurd length": (
        contents((2**60).to_bytes(8, "little") + b"{}"),
        f"not a safetensors file: its header would be {2**60} bytes. Download it again.",
    ),
    "no LoRA pair": (
        tensors(lambda _: {f"model.{i}.weight": torch.ones(2) for i in range(5)}),
        "no LoRA pair; the first keys are model.0.weight, model.1.weight, model.2.weight. Is it a LoRA?",
    ),
    "no tensors": (contents(with_header(b"{}")), "no LoRA pair; the first keys are none. Is it a LoRA?"),
    "a down without its up": (
        tensors(lambda whole: {DOWN: whole[DOWN]}),
        f"module {ID} has a down [2, 8] but no up. Save both factors.",
    ),
    "an up without its down": (
        tensors(lambda whole: {UP: whole[UP]}),
        f"module {ID} has a up [8, 2] but no down. Save both factors.",
    ),
    "ranks of a pair differ": (
        tensors(lambda whole: whole | {DOWN: torch.ones(3, 8)}),
        f"ranks differ in module {ID}: down [3, 8], up [8, 2]. Save both factors of one LoRA.",
    ),
    "LoHa": (
        added("lora_unet_a.hada_w1_a"),
        "a LoHa adapter (lora_unet_a.hada_w1_a) whose module a has no hada_w1_b, hada_w2_a, hada_w2_b. Save all",
    ),
    "LoKr": (
        added("lora_unet_a.lokr_w1"),
        "a LoKr adapter (lora_unet_a.lokr_w1) whose module a has no lokr_w2_a, lokr_w2_b. Save all",
    ),
    "OFT": (
        added("lora_unet_a.oft_blocks"),
        "an OFT adapter (lora_unet_a.oft_blocks), which cannot be read. Convert it",
    ),
    "full differences": (
        tensors(lambda whole: {"unet.a.diff": torch.ones(2, 2), "unet.a.diff_b": torch.ones(2)}),
        "a full-difference adapter (unet.a.diff), which cannot be read. Convert it",
    ),
    "mangled": (
        added("lora_unet_a_lora_down.weight"),
        "a mangled kohya adapter (lora_unet_a_lora_down.weight), which cannot be read. Convert it",
    ),
    "NaN": (
        with_number(float("nan"), DOWN, UP),
        f"NaN or infinity in 2 tensors, first in {DOWN}. Train again or leave it out.",
    ),
    "Inf": (
        with_number(float("-inf"), UP),
        f"NaN or infinity in 1 tensors, first in {UP}. Train again or leave it out.",
    ),
    "more layers": (
        tensors(lambda _: lora(2)),
        f"adds 2 layers ({module_names(2)[1].replace('.', '_')} down ...) compared with 9 files. Keep LoRAs of",
    ),
    "other layers": (
        tensors(lambda whole: {key.replace("to_q", "to_k"): tensor for key, tensor in whole.items()}),
        f"lacks 2 layers ({ID} down ...) and adds 2 layers ({ID[:-1]}k down ...) compared with 9 files. Keep LoRAs of",
    ),
    "other widths": (
        tensors(lambda _: lora(1, width=12)),
        f"{ID} down is 12 wide, but 8 in 9 files: mixed base models. Keep one base model to a collection.",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("good") / "zoo", classes=2, per_class=5, modules=1)


@pytest.fixture(scope="module")
def earlier(good, tmp_path_factory):
    """An output folder that holds the results of a good collection, and what a person put there."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    assert main(["--dataset", str(good), "--output-dir", str(out), *FLAGS], NARROW) == 0
    (out / "ablation_zoo" / "mine.txt").write_text("kept")
    return out


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with its contents."""
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refusals(dataset: Path, tmp_path: Path, earlier: Path, capsys, *flags: str) -> str:
    """Exit code 2, both output folders as they were, and the same words both times; which are returned."""
    capsys.readouterr()
    told = []
    before, around = listing(earlier), sorted(tmp_path.iterdir())
    for out in (tmp_path / "not" / "there", earlier):
        assert main(["--dataset", str(dataset), "--output-dir", str(out), *FLAGS, *flags], NARROW) == 2
        told.append(capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == around  # neither not/there nor any folder above it
    assert listing(earlier) == before and "ablation_zoo/results.json" in before
    assert told[0] == told[1] and "Traceback" not in told[0]
    return told[0]


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used(tmp_path, good, earlier, capsys, case):
    spoil, words = FILES[case]
    root = shutil.copytree(good, tmp_path / "zoo")
    path = spoil(root / "class_1" / "0002" / FILE_NAME)
    told = refusals(root, tmp_path, earlier, capsys)
    assert told.startswith(f"error: {path}: {words}")
    assert told.count("\n") == 1 and told.endswith((".\n", "?\n"))


def test_faults_of_the_whole_collection_are_told_at_once(tmp_path, good, earlier, capsys):
    """Those of one index; the same fault of several files once, with their number."""
    root = shutil.copytree(good, tmp_path / "zoo")
    for i in range(25):
        path = root / "class_0" / f"1{i:03}" / FILE_NAME
        path.parent.mkdir()
        path.write_bytes(b"<html>" if i % 2 else b"")
    lines = refusals(root, tmp_path, earlier, capsys).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"error: {root}/class_0/1000/{FILE_NAME} and 12 more: incomplete download: has 0 bytes")
    web_page = f"{root}/class_0/1001/{FILE_NAME} and 11 more: a web page saved as weights. Download the file itself."
    assert lines[1] == f"error: {web_page}"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--top-k=2", "--top-k 2: these LoRAs have 2 layers. Give fewer."),
        ("--top-k=5", "--top-k 5: these LoRAs have 2 layers. Give fewer."),
        ("--top-k=0", "--top-k 0: at least one layer is to be removed. Give 1 or more."),
        ("--top-k=-3", "--top-k -3: at least one layer is to be removed. Give 1 or more."),
        (
            f"--device=cuda:{torch.cuda.device_count()}",
            "Give cpu, or" if torch.backends.cuda.is_built() else "this torch is built without CUDA. Install one",
        ),
    ],
)
def test_a_flag_that_cannot_be_used(tmp_path, good, earlier, capsys, flag, words):
    told = refusals(good, tmp_path, earlier, capsys, flag)
    name, value = flag.split("=")
    assert told.startswith(f"error: {name} {value}: ") and words in told
    assert told.count("\n") == 1


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_loaded_whatever_it_is_called(tmp_path, good, earlier, capsys):
    root, sprung = shutil.copytree(good, tmp_path / "zoo"), tmp_path / "sprung"
    names = [FILE_NAME, "adapter_model.bin", "x.ckpt", "y.pt", "z.pth", "w.pkl"]
    for i, name in enumerate(names):
        path = root / "class_0" / f"100{i}" / name
        path.parent.mkdir()
        torch.save({"a": Trap(sprung)}, path)
    torch.save({"a": Trap(sprung)}, root / "class_0" / "1000" / "optimizer.bin")
    for old in ("metadata.json", "adapter_config.json"):
        torch.save({"a": Trap(sprung)}, root / "class_0" / "0001" / old)
    told = refusals(root, tmp_path, earlier, capsys)
    assert f" and {len(names) - 1} more: {PICKLE}" in told
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap works


def test_no_module_can_load_a_pickle():
    """None imports a module that unpickles, and numpy, torch and joblib are never asked to."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]:
        if path.parent.name in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"pickle", "shelve", "marshal", "dill", "cloudpickle"}, path
            assert "joblib" not in names or not names & {"load", "Memory", "*"}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "joblib.load", "eval", "exec", "np.loads"), path
                for keyword in node.keywords:
                    assert keyword.arg != "allow_pickle" or ast.unparse(keyword.value) == "False", path
