"""Predictions for new LoRA files by the classifiers that an experiment has kept: what predict.py does.

Files are read as those of a collection are, and none is trusted: what differs from the training LoRAs in more than the
rank is refused in words. Modules are known by their canonical names, whatever wrote the files.

Shape letters: n LoRAs, R runs, C classes, P modules.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import pad

from analysis import calibration
from analysis.calibration import Norms, Usual
from data import CollectionError, LoraFile, index_files
from experiment.extraction import read_file
from experiment.model_files import ModelFolder
from experiment.predictors import Get, Predicted, Rows, predict
from experiment.settings import UsageError
from experiment.units import FAULTS, one_memory_error, reason_of
from loras import labels
from loras.checkpoints import FINAL, Choice, choose
from loras.command_line import suggestion
from loras.layouts import Layer, Layout
from loras.lora_files import LoraFileError
from loras.notices import Finding, unreadable
from loras.weight_files import find_weight_files
from representations import REPRESENTATIONS, UPDATES, pair_features
from training.stacks import start_thread

NUMBERS_AT_ONCE = 2**26  # of factors and features of new files: 256 MiB in float32
FILES_AT_ONCE = 256
FEW = 3  # modules in a message, and in the list of those that spoke for a class

Factors = tuple[Tensor, Tensor, float]  # down float32[r, in], up float32[out, r], scale
Described = tuple[dict[str, np.ndarray], list[Factors]]  # features by name, and factors where they are needed
FAULTY = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError)  # by numbers that no LoRA has
BEYOND = "its weights are beyond what can be computed with: numbers that are not finite. Leave it out."


@dataclass(frozen=True)
class Choices:
    """The treatment of modules that a file lacks, and of those that no training LoRA had.

    ``missing`` "refuse" or "zero" (no update), ``extra`` "refuse" or "ignore".
    """

    missing: str = "refuse"
    extra: str = "refuse"


@dataclass(frozen=True)
class New:
    """A file to predict: how it is shown, the folder that its path is relative to, and what its header says."""

    shown: str
    root: Path
    file: LoraFile


def chosen_record(model: ModelFolder, name: str | None) -> dict:
    """Return the record of a representation that was kept; None: the best by validation.

    Raises:
        UsageError: There is none of this name.
    """
    records = {record["representation"]: record for record in model.records}
    if name is None:
        return model.records[0]
    if name not in records:
        near = suggestion(name, records)
        mend = f"{near} Choose from {', '.join(records)}; --save-models of the experiment keeps others."
        raise UsageError(f"--representation {name}: not kept in {model.folder}.{mend}")
    return records[name]


def find(paths: Iterable[Path]) -> tuple[list[New], list[Finding]]:
    """Return the files that are named, and of folders those in them, of a training's checkpoints the last.

    Also what is wrong with the others, each at the place where it lies.
    """
    found: dict[str, New] = {}
    findings = []
    for path in paths:
        root, names, faults = _names(path)
        choice = _last(root, names) if os.path.isdir(path) else Choice(FINAL, tuple(names))
        good, bad = index_files(root, choice.paths, labels.Labels(choice))
        for finding in [*faults, *choice.findings, *bad]:
            findings += [replace(finding, files=(name,), place=os.path.join(root, name)) for name in finding.files]
        for file in good:
            shown = os.path.normpath(os.path.join(root, file.path))
            found.setdefault(_real(shown), New(shown, root, file))
    once = {(_real(finding.place), finding.reason): finding for finding in reversed(findings)}
    return list(found.values()), list(reversed(once.values()))


def _real(path: str) -> str:
    """Return the one path of a file in its folder, however that is written; a link to a file is another file."""
    folder, name = os.path.split(os.path.normpath(path))
    return os.path.join(os.path.realpath(folder), name)


def _names(path: Path) -> tuple[Path, list[str], list[Finding]]:
    """Return the folder that a path means, the files in it that are meant, and what is wrong with others."""
    if os.path.isdir(path):
        names, faults, _ = find_weight_files(path)
        empty = [Finding(("",), "no *.safetensors file in it. Give a LoRA, or a folder of LoRAs.")]
        return path, names, faults or ([] if names else empty)
    try:
        os.lstat(path)
    except FileNotFoundError:
        return path.parent, [], [Finding((path.name,), "no such file or folder. Mend the path.")]
    except (OSError, ValueError) as error:  # a name that is too long, say
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error}). Mend the path."
        return path.parent, [], [Finding((path.name,), reason)]
    if not path.name.lower().endswith(".safetensors"):
        reason = "no folder, and no *.safetensors. Convert it: nothing else is read."
        return path.parent, [], [Finding((path.name,), reason)]
    return path.parent, [path.name], []


def _last(folder: Path, names: Sequence[str]) -> Choice:
    """Return the files of a folder that are read: of each training with checkpoints the last, also if it is the folder.

    A table beside them, which would make samples of checkpoints, is not read.
    """
    whole = Path(os.path.abspath(folder))
    choice = choose(whole.parent, [os.path.join(whole.name, name) for name in names], by_folder=False, step=FINAL)

    def inside(paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(os.path.relpath(path, whole.name) for path in paths)

    findings = tuple(replace(finding, files=inside(finding.files)) for finding in choice.findings)
    return Choice(FINAL, inside(choice.paths), findings=findings)


class Network:
    """The modules that a model reads, and what a file may have beside them.

    Args:
        manifest: Of the model.
        choices: What is done where files differ.
    """

    def __init__(self, manifest: dict, choices: Choices):
        self.sides = {entry["module"]: (entry["inputs"], entry["outputs"]) for entry in manifest["modules"]}
        self.known = {*self.sides, *manifest["passed_over"]}
        self.choices = choices

    def fault(self, layout: Layout) -> str:
        """Return why a file of this layout cannot be predicted, and what to do; empty where it can."""
        here = {down.module: (down.free_side, up.free_side) for down, up in _pairs(layout)}
        for module, sides in self.sides.items():
            if module in here and here[module] != sides:
                (wide, high), (inputs, outputs) = here[module], sides
                fault = f"{module} is {wide} wide and {high} high, but {inputs} and {outputs} in the training LoRAs"
                return f"{fault}: another base model. Predict LoRAs of one base model."
        missing = [module for module in self.sides if module not in here]
        extra = [module for module in here if module not in self.known]
        if len(missing) == len(self.sides):
            return (
                f"has none of the {len(missing)} modules that the training LoRAs had ({missing[0]} ...): another "
                "network. Predict LoRAs of that network."
            )
        if missing and self.choices.missing == "refuse":
            return (
                f"lacks {_named(missing)} of {len(self.sides)} that the training LoRAs had. --missing zero takes "
                "them as no update."
            )
        if extra and self.choices.extra == "refuse":
            return f"adds {_named(extra)} that no training LoRA had. --extra ignore passes them over."
        return ""


def _pairs(layout: Layout) -> list[tuple[Layer, Layer]]:
    """Return down and up of each module."""
    return _in_pairs(layout.layers)


def _in_pairs(items: Sequence) -> list[tuple]:
    """Return what belongs to down and up of each module; in the network's order a module's up follows its down."""
    return list(zip(items[::2], items[1::2], strict=True))


def _named(modules: Sequence[str]) -> str:
    """Return a number of modules and the names of the first."""
    more = ", ..." if len(modules) > FEW else ""
    return f"{len(modules)} module{'s' * (len(modules) > 1)} ({', '.join(modules[:FEW])}{more})"


class Predictor:
    """A classifier that was kept, opened.

    Args:
        model: The folder.
        record: Of the classifier.
        get: Reads its tensors.
    """

    def __init__(self, model: ModelFolder, record: dict, get: Get):
        self.model, self.record, self.get, self.classes = model, record, get, model.manifest["classes"]
        self.modules = [(entry["module"], entry["inputs"], entry["outputs"]) for entry in model.manifest["modules"]]
        try:
            self.usual = Usual(**record["usual"])
        except FAULTY as error:
            raise model.refused(record, reason_of(error)) from error
        self.norms = Norms(get("norm_mean").numpy(), get("norm_spread").numpy())
        self.computed = [name for name in (record["representation"],) if REPRESENTATIONS[name].made == "computed"]

    def factors(self, new: New) -> list[Factors]:
        """Read the factors of a file, of the modules that are read; a missing one is no update.

        Raises:
            LoraFileError: Its weights are not finite, or it has changed.
            OSError: It cannot be read.
        """
        flat, scales, _ = read_file(new.root, new.file)
        layout, here = new.file.layout, {}
        for pair, columns in zip(_pairs(layout), _in_pairs(layout.columns), strict=True):
            down, up = (
                torch.from_numpy(flat[at].reshape(layer.shape)) for at, layer in zip(columns, pair, strict=True)
            )
            here[pair[0].module] = down, up, scales[pair[0].module]
        return [
            here.get(module) or (torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0)
            for module, inputs, outputs in self.modules
        ]

    def described(self, factors: Sequence[Factors]) -> dict[str, np.ndarray]:
        """Return the features of a LoRA, float32[P, F], by name: the norms, and those that the classifier reads."""
        names, groups = [UPDATES, *self.computed], defaultdict(list)
        for position, (down, up, _) in enumerate(factors):
            groups[down.shape, up.shape].append(position)
        found: dict[str, np.ndarray] = {}
        for positions in groups.values():
            downs, ups = (torch.stack([factors[p][part] for p in positions]) for part in (0, 1))
            scales = torch.tensor([factors[p][2] for p in positions], dtype=torch.float64)
            features = pair_features(downs, ups, [self.modules[p][0] for p in positions], scales, names)
            for name, values in features.items():
                whole = found.setdefault(name, np.empty((len(factors), values.shape[1]), np.float32))
                whole[positions] = values.numpy()
        return found

    def answers(self, loras: Sequence[Described]) -> list[dict | str]:
        """Predict LoRAs; return a record of each, or why it cannot be predicted, and what to do.

        Raises:
            CollectionError: The model can predict none, not even a LoRA without any update.
        """
        try:
            with one_memory_error():
                records = self.predict(loras)
        except FAULTS:
            raise
        except FAULTY:
            if len(loras) > 1:  # one of them may be at fault, or the model
                return [answer for lora in loras for answer in self.answers([lora])]
            records = [None]
        if None in records:
            self._check_model()
        return [BEYOND if record is None else record for record in records]

    def _check_model(self) -> None:
        """Refuse a model that cannot predict a LoRA without any update."""
        factors = [(torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0) for _, inputs, outputs in self.modules]
        try:
            with one_memory_error():
                if None not in self.predict([(self.described(factors), factors)]):
                    return
            fault = "its numbers are not finite"
        except FAULTS:
            raise
        except FAULTY as error:
            fault = reason_of(error)
        raise self.model.refused(self.record, f"it predicts nothing, not even of no update: {fault}")

    def predict(self, loras: Sequence[Described]) -> list[dict | None]:
        """Predict LoRAs of which features, and factors where they are needed, are given; return a record of each."""
        norms = np.stack([features[UPDATES][:, 1] for features, _ in loras])
        flat = np.stack([loras[i][0][name].ravel() for i in range(len(loras)) for name in self.computed] or [[]])
        factors = [factors for _, factors in loras]
        rows = Rows(norms, flat if self.computed else None, lambda module, _: _stacked([f[module] for f in factors]))
        return self.told(predict(self.record, self.get, rows), norms)

    def told(self, predicted: Predicted, norms: np.ndarray) -> list[dict | None]:
        """Return a record of each LoRA: class, probability, what the runs say, and whether it is like those known.

        None where a number is not finite.
        """
        probabilities = calibration.mean_probabilities(predicted.scores, self.record["temperature"])
        is_machine = self.record["kind"] in ("pairs", "rest")
        label = predicted.classes[0] if is_machine else probabilities.argmax(1)
        measures = np.column_stack([predicted.distance, self.norms.surprise(norms)])
        if measures.shape[1] != len(self.usual.medians):
            raise ValueError(f"medians of {len(self.usual.medians)} measures, where there are {measures.shape[1]}")
        scores = self.usual.scores(measures)
        unlike = self.usual.is_unlike(scores)
        added = np.zeros((len(norms), 0)) if predicted.contribution is None else predicted.contribution
        finite = np.isfinite(np.column_stack([*predicted.scores, probabilities, scores, added])).all(1)
        return [
            {
                "label": self.classes[label[i]],
                "probability": float(probabilities[i, label[i]]),
                "agreement": float((predicted.classes[:, i] == label[i]).mean()),
                "unlike": {"score": float(scores[i]), "bound": self.usual.bound, "flagged": bool(unlike[i])},
                "probabilities": dict(zip(self.classes, probabilities[i].tolist(), strict=True)),
                "runs": [self.classes[c] for c in predicted.classes[:, i]],
                "modules": self._modules(predicted, i),
            }
            if finite[i]
            else None
            for i in range(len(norms))
        ]

    def _modules(self, predicted: Predicted, row: int) -> list[dict] | None:
        """Return what each module adds for the label, the most first; None where it is not known."""
        if predicted.contribution is None:
            return None
        added = predicted.contribution[row]
        order = np.argsort(-added, kind="stable").tolist()
        return [{"module": self.modules[p][0], "contribution": float(added[p])} for p in order]


def _stacked(factors: Sequence[Factors]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of a module of several LoRAs, ranks filled up with zeros to the largest."""
    rank = max(len(down) for down, _, _ in factors)
    downs = torch.stack([pad(down, (0, 0, 0, rank - len(down))) for down, _, _ in factors])
    ups = torch.stack([pad(up, (0, rank - up.shape[1])) for _, up, _ in factors])
    return downs, ups, torch.tensor([scale for *_, scale in factors], dtype=torch.float64)


def predict_files(
    model: ModelFolder, record: dict, paths: Iterable[Path], choices: Choices, skip_bad: bool = False
) -> tuple[list[dict], list[dict]]:
    """Predict files, and those in folders.

    Args:
        model: The model.
        record: Of the classifier, see `chosen_record`.
        paths: Files and folders.
        choices: What is done where files differ from the training LoRAs.
        skip_bad: Leave out files that cannot be predicted.

    Returns:
        A record of each file, and path and reason of those left out.

    Raises:
        CollectionError: Files cannot be predicted; all are listed. With ``skip_bad``: none can.
    """
    files, findings = find(paths)
    network, good = Network(model.manifest, choices), []
    for new in files:
        if fault := network.fault(new.file.layout):
            findings.append(Finding((new.file.path,), fault, new.shown))
        else:
            good.append(new)
    if findings and not (skip_bad and good):
        raise _refused(findings)
    told: list[dict] = []
    start_thread(torch.device("cpu"))  # one core, as where the classifiers were trained: beside others it takes a third
    with model.tensors(record) as get, threadpool_limits(1, "blas"), np.errstate(all="ignore"):
        predictor = Predictor(model, record, get)
        for batch in _batches(predictor, good, findings):
            answers = predictor.answers([lora for _, lora in batch])
            for (new, _), answer in zip(batch, answers, strict=True):
                if isinstance(answer, str):
                    findings.append(Finding((new.file.path,), answer, new.shown))
                else:
                    told.append({"file": new.shown, **answer})
    if findings and not (skip_bad and told):
        raise _refused(findings)
    return told, [{"file": finding.place, "reason": finding.reason} for finding in findings]


def _batches(
    predictor: Predictor, files: Iterable[New], findings: list[Finding]
) -> Iterator[list[tuple[New, Described]]]:
    """Yield files and what is read of them, as many as are predicted at a time; add those that cannot be read."""
    batch: list = []
    numbers = 0
    for new in files:
        try:
            factors = predictor.factors(new)
        except (LoraFileError, OSError) as error:
            reason = str(error) if isinstance(error, LoraFileError) else unreadable(error)
            findings.append(Finding((new.file.path,), reason, new.shown))
            continue
        try:
            with one_memory_error():
                described = predictor.described(factors)
        except FAULTY:
            findings.append(Finding((new.file.path,), BEYOND, new.shown))
            continue
        batch.append((new, (described, [] if predictor.computed else factors)))
        numbers += sum(map(np.size, described.values())) + (0 if predictor.computed else new.file.layout.width)
        if len(batch) == FILES_AT_ONCE or numbers > NUMBERS_AT_ONCE:
            yield batch
            batch, numbers = [], 0
    if batch:
        yield batch


def _refused(findings: Sequence[Finding]) -> CollectionError:
    return CollectionError([finding.line(Path()) for finding in findings])
