"""The beginning of results.json: the inputs, the settings and the machine, known before the first number."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

import numpy as np
import torch

from data import Collection
from experiment import store
from experiment.datasets import is_built_in
from experiment.engine import Engine
from experiment.settings import Settings
from experiment.units import PROGRAM as TRAINING_PROGRAM
from training.classifier import scored

PROGRAM = (  # of which results are; tests and benchmarks are no part of it
    *("ablation_experiment", "autoencoders", "data", "representations"),
    *("analysis", "experiment", "loras", "report", "training"),
)
SCHEMA_VERSION = 8


def environment(settings: Settings, engine: Engine) -> dict:
    """Return the machine and the program, as results.json holds them."""
    on_gpu = settings.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "device": torch.cuda.get_device_name(settings.device) if on_gpu else f"CPU, {platform.machine()}",
        "workers": engine.count_workers(),
        "code": store.code_digest(*PROGRAM),
        "training_code": store.code_digest(*TRAINING_PROGRAM),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(settings: Settings, collection: Collection, rows: dict[str, np.ndarray], selected: np.ndarray) -> dict:
    """Return what results.json says before the first number: the inputs, the settings and the machine."""
    samples = [[file.path, file.label, file.group] for file in collection.files]
    test, classes = collection.y[rows["test"]], len(collection.classes)
    largest = np.full((1, len(test)), np.bincount(test, minlength=classes).argmax())
    accuracy, f1 = scored(test, largest, classes)
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": {
            "name": collection.name,
            "source": "built-in digits" if is_built_in(collection.root) else "files",
            "path": collection.root.as_posix(),
            "num_samples": len(collection.files),
            "num_classes": classes,
            "classes": collection.classes,
            "class_counts": collection.class_counts,
            "split_sizes": {part: len(indices) for part, indices in rows.items()},
            "num_layers": len(collection.layers),
            "num_layers_selected": int(selected.sum()),
            "step": collection.choice.step,
            "common_layers": collection.common_layers,
            "label_source": collection.label_source,
            "label_column": collection.label_column,
            "group_column": collection.group_column,
            "num_groups": None if collection.groups is None else int(collection.groups.max()) + 1,
            "samples": store.digest(samples),  # the fingerprint is of contents, and knows no groups
            "metadata": store.digest(collection.columns),
            "ignored": dict(collection.ignored),
            "skipped": collection.skipped_records,
            "not_trained_on": [],
        },
        "config": settings.config(),
        "chance": {"accuracy": float(accuracy[0]), "f1": float(f1[0])},
    }
