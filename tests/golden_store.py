"""What the analysis of an experiment read, in one small file: so that sentences are tested on real numbers."""

import io
import json
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from analysis import attention, collection_map, cross_fitting, evidence, questions, removal_plan
from experiment import store
from loras.blocks import blocks_of
from loras.lora_files import Layer

KINDS = {
    kind.__name__: kind
    for kind in (
        Layer,
        evidence.Evidence,
        evidence.Predictions,
        questions.Controls,
        removal_plan.Conditions,
        removal_plan.Order,
        cross_fitting.TrainedSets,
        attention.Attended,
        collection_map.Mapped,
    )
}
FEW = 3  # LoRAs whose features are looked at for coinciding ones
FOLDER = Path(__file__).parent / "golden"


def packed(value: object, arrays: dict[str, np.ndarray]) -> object:
    """Return JSON for a value, its arrays moved into ``arrays`` in as few bytes as what is tested needs."""
    if is_dataclass(value):
        return {
            "kind": type(value).__name__,
            "of": {f.name: packed(getattr(value, f.name), arrays) for f in fields(value)},
        }
    if isinstance(value, dict):
        return {"dict": [[key, packed(item, arrays)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [packed(item, arrays) for item in value]}
    if isinstance(value, list):
        return [packed(item, arrays) for item in value]
    if isinstance(value, np.ndarray):
        name = str(len(arrays))
        arrays[name] = smaller(value)
        return {"array": name, "dtype": value.dtype.str}
    if isinstance(value, np.generic):
        return value.item()
    assert value is None or isinstance(value, str | int | float | bool), type(value)
    return value


def smaller(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return array.astype(np.float16)
    if array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() < 2**16:
        return array.astype(np.min_scalar_type(int(array.max())))
    return array


def unpacked(value: object, arrays: dict[str, np.ndarray]) -> object:
    if isinstance(value, list):
        return [unpacked(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        return KINDS[value["kind"]](**{name: unpacked(item, arrays) for name, item in value["of"].items()})
    if "dict" in value:
        return {key: unpacked(item, arrays) for key, item in value["dict"]}
    if "tuple" in value:
        return tuple(unpacked(item, arrays) for item in value["tuple"])
    return arrays[value["array"]].astype(value["dtype"])


def save(path: Path, content: dict) -> None:
    """Write what an analysis read, less the arrays that it does not read, and of samples no more than a few."""
    read = content["evidence"].predictions
    conditions = {
        condition: {name: {"predicted": arrays["predicted"]} for name, arrays in named.items()}
        for condition, named in read.conditions.items()
    }
    layers = {name: read.layers[name] for name in ("predicted", "log_loss")}
    predictions = evidence.Predictions(read.rows, read.y, layers, conditions)
    samples = {name: (features[:FEW], names) for name, (features, names) in content["samples"].items()}
    kept = {"evidence": replace(content["evidence"], predictions=predictions), "samples": samples}
    content = content | kept | {"controls": replace(content["controls"], cheap={})}  # its outcome is kept
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps(packed(content, arrays), separators=(",", ":"))
    arrays["content"] = np.frombuffer(text.encode(), np.uint8)
    path.write_bytes(store.packed_arrays(arrays))


def load(path: Path) -> dict:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    content = unpacked(json.loads(arrays.pop("content").tobytes().decode()), arrays)
    layers = content["evidence"].layers
    blocks = blocks_of(tuple(layer.module for layer in layers))
    named = [replace(layer, block=block) for layer, block in zip(layers, blocks, strict=True)]
    for record in content["results"]["layer_ranking"]:
        record["block"] = next(layer.block for layer in named if layer.name == record["layer"])
    content["results"]["config"].setdefault("left_out", {})
    return content | {"evidence": replace(content["evidence"], layers=named)}


@cache
def recorded(name: str, resamples: int) -> str:
    """Return results.json of a recorded experiment, analysed once for all tests, as text that none can change."""
    return json.dumps(analysed(load(FOLDER / f"{name}.npz"), resamples))


def analysed(content: dict, resamples: int) -> dict:
    """Return results.json of what `save` kept, analysed anew with so many draws."""
    values = {field.name: getattr(content["evidence"], field.name) for field in fields(evidence.Evidence)}
    read = evidence.Evidence(**values | {"resamples": resamples, "permutations": resamples})
    inputs = (content["names"], content["statistics"], content["updates"], content["samples"], content["controls"])
    analysis = questions.analyse(read, *inputs)
    analysis |= {name: content[name] for name in ("controls_not_run", "cheap")}
    return content["results"] | {"analysis": json.loads(json.dumps(analysis))}
