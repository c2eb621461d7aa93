"""The recipe of files, and what headers show of files that can be used but may mean something else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from making import FILE_NAME, STYLES, lora, module_names, write_lora
from safetensors.torch import load_file, save_file

from data import Collection, CollectionError, index_collection
from loras.recipe import header_columns, recipe, recipe_columns

MODULES = module_names(2)


def one(root: Path, label: str, number: int, tensors: dict | None = None, config: dict | None = None, **header) -> str:
    """Write a LoRA of two modules with fields of its header and an adapter_config.json; return its relative path."""
    path = root / label / f"{number:02}" / FILE_NAME
    write_lora(path, lora(seed=len(label) + number) | (tensors or {}))
    if header:
        save_file(load_file(path), path, {name: str(value) for name, value in header.items()})
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return str(path.relative_to(root))


def zoo(root: Path, dog: dict, cat: dict | None = None, each: int = 4) -> Collection:
    """Two classes of LoRAs, each made with arguments of `one`."""
    for label, arguments in (("cat", cat or {}), ("dog", dog)):
        for number in range(each):
            one(root, label, number, **arguments)
    return index_collection(root)


def of_class(collection: Collection, label: str) -> tuple[str, ...]:
    return tuple(file.path for file in collection.files if file.label == label)


# ----------------------------------------------------------------------------------------------------------------------
# Recipe
# ----------------------------------------------------------------------------------------------------------------------


def test_files_alike_have_no_recipe_to_tell_them_apart(tmp_path):
    assert recipe_columns(zoo(tmp_path, {}).files) == {}


@pytest.mark.parametrize(
    ("dog", "field", "values"),
    [
        ({"tensors": {f"{m}.alpha": torch.tensor(1.0) for m in MODULES}}, "alpha tensors", ["none", "all"]),
        ({"tensors": {f"{MODULES[0]}.alpha": torch.tensor(1.0)}}, "alpha tensors", ["none", "some"]),
        ({"tensors": {f"{MODULES[0]}.alpha": torch.tensor(1.0)}}, "scale source", ["none", "alpha tensors + none"]),
        ({"config": {"lora_alpha": 8}}, "scale source", ["none", "adapter_config.json"]),
        ({"config": {"lora_alpha": 8}}, "scale", ["1", "4"]),
        ({"config": {"lora_alpha": 8, "alpha_pattern": {MODULES[0]: 4}}}, "scale", ["1", "3"]),
        ({"config": {"use_rslora": True}}, "adapter_config.json: use_rslora", ["", "True"]),
        ({"config": {"init_lora_weights": "pissa"}}, "adapter_config.json: init_lora_weights", ["", "pissa"]),
        ({"tensors": {f"{MODULES[0]}.dora_scale": torch.ones(8)}}, "DoRA", ["no", "yes"]),
        ({"tensors": {"<token>": torch.ones(8)}}, "ignored: embeddings <...>", ["", "1"]),
        ({"ss_base_model_version": "sdxl"}, "header: ss_base_model_version", ["", "sdxl"]),
        (
            {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4}'},
            "lora_adapter_metadata: unet.lora_alpha",
            ["", "4"],
        ),
    ],
)
def test_the_fields_of_a_recipe(tmp_path, dog, field, values):
    columns = recipe_columns(zoo(tmp_path, dog).files)
    assert columns[field] == [values[0]] * 4 + [values[1]] * 4


def test_styles_and_types_are_of_the_recipe(tmp_path):
    for style in ("PEFT", "kohya"):
        for number in range(3):
            tensors = {
                STYLES[style](*key.replace(".lora.", "|").replace(".weight", "").split("|")): tensor.half()
                for key, tensor in lora().items()
            }
            if style == "kohya":
                tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
            write_lora(tmp_path / style / f"{number}.safetensors", tensors)
    columns = recipe_columns(index_collection(tmp_path).files)
    assert columns == {"key style": ["PEFT"] * 3 + ["kohya"] * 3, "dtype": ["F16"] * 3 + ["BF16"] * 3}


def test_ids_and_long_texts_are_of_no_recipe(tmp_path):
    for i in range(8):
        one(
            tmp_path,
            "cat" if i < 4 else "dog",
            i,
            ss_session_id=i,
            hash=f"{i // 2}",
            same="x",
            prose="word " * (i % 2 * 90),
        )
    columns = recipe_columns(index_collection(tmp_path).files)
    assert columns == {
        "header: hash": ["0", "0", "1", "1", "2", "2", "3", "3"],
        "header: prose": ["", ""] * 4,
    } or columns == {"header: hash": ["0", "0", "1", "1", "2", "2", "3", "3"]}


def test_what_names_the_concept_is_no_recipe(tmp_path):
    for i in range(8):
        label = "cat" if i < 4 else "dog"
        one(tmp_path, label, i, ss_output_name=f"my_{label}", ss_dataset_dirs=f'{{"10_{label}": 1}}', ss_seed=i % 2)
    assert recipe_columns(index_collection(tmp_path).files) == {"header: ss_seed": ["0", "1"] * 4}


def test_scales_of_alpha_tensors_come_from_the_features(tmp_path):
    alphas = {f"{module}.alpha": torch.tensor(1.0) for module in MODULES}
    files = zoo(tmp_path, {"tensors": alphas}, {"tensors": alphas}).files
    assert "scale" not in recipe(files[0])
    scales = np.repeat([[0.5, 0.5], [2.0, 1.0]], 4, axis=0)
    assert recipe_columns(files, scales)["scale"] == ["0.5"] * 4 + ["1.5"] * 4


def test_header_fields_that_divide_files_alike_are_one_column(tmp_path):
    for i in range(8):
        fields = {"a_set": f"s{i // 2}", "b_set": f"t{i // 2}", "some": "x"} | ({"only": "y"} if i else {})
        one(tmp_path, "cat" if i < 4 else "dog", i, **fields)
    files = index_collection(tmp_path).files
    (name,) = header_columns(files)
    assert name == "header: a_set"
    assert header_columns(files)[name] == {file.path: f"s{i // 2}" for i, file in enumerate(files)}
    assert header_columns(zoo(tmp_path / "plain", {}).files) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Notices
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [{}, {"config": {"lora_alpha": 4}}, {"ss_network_alpha": 4, "ss_network_dim": 2}])
def test_scales_that_are_stated_alike_are_no_notice(tmp_path, both):
    assert zoo(tmp_path, both, both).notices == ()


def test_scales_from_none_while_others_have_one(tmp_path):
    collection = zoo(tmp_path, {"config": {"lora_alpha": 4, "r": 2}})
    (notice,) = collection.notices
    assert notice.kind == "scales"
    assert f"by adapter_config.json in 4 LoRAs (dog/00/{FILE_NAME} ...)" in notice.message
    assert f"by nothing in 4 LoRAs (cat/00/{FILE_NAME} ...)" in notice.message
    assert "put an adapter_config.json with r and lora_alpha beside" in notice.message
    assert notice.files == of_class(collection, "cat")


def test_scales_from_two_sources(tmp_path):
    one(tmp_path, "dog", 9, config={"lora_alpha": 4})
    header = {"lora_adapter_metadata": '{"unet.lora_alpha": 4}'}
    (notice,) = zoo(tmp_path, header, header).notices
    assert "by lora_adapter_metadata in 8 LoRAs" in notice.message
    assert f"by adapter_config.json in 1 LoRA (dog/09/{FILE_NAME})" in notice.message
    assert notice.files == (f"dog/09/{FILE_NAME}",)


def test_fields_of_the_header_that_do_not_fit_are_a_notice(tmp_path):
    odd = {"rank": 16, "alpha": 16}
    (notice,) = zoo(tmp_path, odd, odd).notices
    assert notice.kind == "scales" and len(notice.files) == 8
    assert notice.message.startswith(f"alpha and rank in the header of 8 LoRAs (cat/00/{FILE_NAME} ...) do not fit")


def test_modules_of_one_file_without_the_scale_that_others_have(tmp_path):
    half = {"tensors": {f"{MODULES[0]}.alpha": torch.tensor(1.0)}}
    (notice,) = zoo(tmp_path, half, half).notices
    assert "by alpha tensors of some modules, and by nothing of others, in 8 LoRAs" in notice.message
    assert len(notice.files) == 8


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something new"])
@pytest.mark.parametrize("place", ["config", "lora_adapter_metadata", "header"])
def test_a_training_that_changed_w_first_is_a_notice(tmp_path, init, place):
    stated = {
        "config": {"config": {"init_lora_weights": init}},
        "lora_adapter_metadata": {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": init})},
        "header": {"init_lora_weights": init},
    }
    collection = zoo(tmp_path, stated[place], each=2)
    (notice,) = collection.notices
    assert notice.kind == "not the whole update" and notice.files == of_class(collection, "dog")
    assert notice.message.startswith(f"init_lora_weights {init} in 2 LoRAs (dog/00/{FILE_NAME} ...): W itself was")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", None, "True"])
def test_a_plain_initialisation_is_none(tmp_path, init):
    assert zoo(tmp_path, {"config": {"init_lora_weights": init}}, each=1).notices == ()


@pytest.mark.parametrize(
    "dora",
    [
        {"tensors": {f"{MODULES[0]}.dora_scale": torch.ones(8, 1)}},
        {"tensors": {f"{MODULES[0]}.lora_magnitude_vector": torch.ones(8)}},
        {"config": {"use_dora": True}},
        {"lora_adapter_metadata": '{"unet.use_dora": true}'},
        {"tensors": {f"{MODULES[0]}.m": torch.ones(8)}},
        {"config": {"fine_tune_type": "dora"}},
    ],
)
def test_magnitudes_of_dora_are_a_notice(tmp_path, dora):
    collection = zoo(tmp_path, dora)
    (notice,) = collection.notices
    assert notice.kind == "not the whole update" and notice.files == of_class(collection, "dog")
    assert notice.message.startswith(f"DoRA magnitudes in 4 LoRAs (dog/00/{FILE_NAME} ...)")


def test_what_strangers_write_is_one_line(tmp_path):
    collection = zoo(tmp_path, {"config": {"init_lora_weights": "x\n\x1b[2J" + "y" * 5000}})
    (notice,) = collection.notices
    assert notice.message.isprintable() and len(notice.message) < 500


# ----------------------------------------------------------------------------------------------------------------------
# --strict
# ----------------------------------------------------------------------------------------------------------------------


def test_strict_refuses_what_is_reported(tmp_path):
    config = {"lora_alpha": 4, "init_lora_weights": "pissa"}
    notices = zoo(tmp_path, {"config": config}).notices
    with pytest.raises(CollectionError) as error:
        index_collection(tmp_path, strict=True)
    places = [f"{tmp_path / label / '00' / FILE_NAME} and 3 more: " for label in ("cat", "dog")]
    assert error.value.findings == [place + n.message for place, n in zip(places, notices, strict=True)]


def test_strict_and_skip_bad_leave_the_files_out(tmp_path):
    one(tmp_path, "dog", 8, tensors={f"{MODULES[0]}.dora_scale": torch.ones(8, 1)})
    one(tmp_path, "dog", 9, config={"lora_alpha": 4})
    zoo(tmp_path, {})
    collection = index_collection(tmp_path, strict=True, skip_bad=True)
    assert len(collection.files) == 8 and collection.notices == ()
    assert [path for path, _ in collection.skipped] == [f"dog/0{i}/{FILE_NAME}" for i in (8, 9)]
    assert "DoRA" in collection.skipped[0][1] and "scales" in collection.skipped[1][1]
