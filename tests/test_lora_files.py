"""One file: scales, shapes, types, places of the weights, and what is wrong with it."""

import io
import json
import math
import os
import pickle
import random
import re
import tracemalloc

import numpy as np
import pytest
import torch
from headers import Q, file_of, header_of, pair, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from making import lora, module_names, write_lora
from safetensors.torch import save

from loras import lora_files
from loras.keys import LoraFileError, canonical_module
from loras.lora_files import load_weights, parse_header, read_header

# ----------------------------------------------------------------------------------------------------------------------
# Scales, shapes, dtypes
# ----------------------------------------------------------------------------------------------------------------------


def scales_of(tensors: dict, config: dict | None = None) -> dict:
    data = save(tensors)
    header = parse_header(header_of(data))
    _, alphas = load_weights(data, header)
    return lora_files.update_scales(header.layout, alphas, config)


def peft(*modules: str, rank: int = 4) -> dict:
    return {k: v for m in modules for k, v in pair(f"base_model.model.{m}", rank, "lora_A", "lora_B").items()}


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(2.0), 0.5),
        (torch.tensor([8.0]), 2.0),
        (torch.tensor(2), 0.5),
        (torch.tensor(0.0), 1.0),
        (None, 1.0),
    ],
)
def test_kohya_alpha_over_rank(alpha, scale):
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert scales_of(tensors if alpha is None else tensors | {"lora_unet_a.alpha": alpha}) == {"unet_a": scale}


def test_alpha_of_each_module_is_its_own_and_half_precision_is_read():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up") | pair("lora_unet_b", 2, "lora_down", "lora_up")
    tensors |= {"lora_unet_a.alpha": torch.tensor(1.0).bfloat16(), "lora_unet_b.alpha": torch.tensor(1.0).half()}
    assert scales_of(tensors) == {"unet_a": 0.25, "unet_b": 0.5}


def test_an_alpha_that_is_no_number_is_refused_from_the_header():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert "lora_unet_a.alpha" in refusal(tensors | {"lora_unet_a.alpha": torch.ones(2)})


def test_an_alpha_of_a_type_that_is_no_number_is_refused():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert "of type BOOL" in refusal(tensors | {"lora_unet_a.alpha": torch.tensor(True)})


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e300])
def test_an_alpha_that_is_not_finite_is_refused(alpha):
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    with pytest.raises(LoraFileError, match="unet_a"):
        scales_of(tensors | {"lora_unet_a.alpha": torch.tensor(alpha, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (None, 1.0),
        ({}, 1.0),
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 0, "r": 4}, 1.0),
        ({"lora_alpha": None}, 1.0),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"a.to_q": 2}}, 0.5),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_q": 2}, "use_rslora": True}, 1.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {r"^unet\.a\.to_[qk]": 2}}, 0.5),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"o_q": 2, "a": 2, "b.to_q": 2}}, 2.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"to_q": 4}}, 2.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {r"^unet\.a\.to_[qk]": 4}, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "r": 16, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"a.to_q": 16}}, 4.0),
        ({"lora_alpha": 8, "r": 4, "rank_pattern": {"to_k": 16, "o_q": 16}, "alpha_pattern": {}}, 2.0),
        ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_q": 2, "a.to_q": 16}}, 0.5),  # the first one, as in PEFT
        ({"lora_alpha": 8, "r": 4, "rank_pattern": None, "alpha_pattern": None}, 2.0),
    ],
)
def test_peft_scale(config, scale):
    assert scales_of(peft("unet.a.to_q"), config) == {"unet_a_to_q": scale}


def test_patterns_are_of_single_modules():
    tensors = peft("unet.a.to_q", rank=4) | peft("unet.b.to_q", rank=2)
    config = {"lora_alpha": 8, "r": 4, "rank_pattern": {"b.to_q": 2}, "alpha_pattern": {"b.to_q": 1}}
    assert scales_of(tensors, config) == {"unet_a_to_q": 2.0, "unet_b_to_q": 0.5}
    root = scales_of(tensors, config | {"use_rslora": True})
    assert root == {"unet_a_to_q": 4.0, "unet_b_to_q": pytest.approx(1 / math.sqrt(2))}


def test_an_alpha_in_the_file_comes_before_the_configuration():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up") | pair("lora_unet_b", 4, "lora_down", "lora_up")
    tensors |= {"lora_unet_a.alpha": torch.tensor(1.0)}
    assert scales_of(tensors, {"lora_alpha": 64, "r": 4, "use_rslora": True}) == {"unet_a": 0.25, "unet_b": 32.0}


@pytest.mark.parametrize("config", [{"r": 8}, {"r": 4, "rank_pattern": {"a.to_q": 2}}, {"r": float("nan")}])
def test_a_configuration_of_another_rank_is_of_another_file(config):
    with pytest.raises(LoraFileError, match=r"adapter_config.json says rank .* for unet.a.to_q, where the file has 4"):
        scales_of(peft("unet.a.to_q"), {"lora_alpha": 8, **config})


def test_alpha_pattern_is_of_single_modules_in_every_style():
    config = {"lora_alpha": 8, "alpha_pattern": {"b.to_q": 2}}
    assert scales_of(peft("unet.a.to_q", "unet.b.to_q"), config) == {"unet_a_to_q": 2.0, "unet_b_to_q": 0.5}
    assert scales_of(pair("unet.a.to_q", 4) | pair("unet.b.to_q", 4), config) == {
        "unet_a_to_q": 2.0,
        "unet_b_to_q": 0.5,
    }


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "much"},
        {"lora_alpha": [1]},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"to_q": "x"}},
        {"alpha_pattern": {"to_q": 10**400}},
        {"alpha_pattern": {"a{99999999999}": 1}},
        {"alpha_pattern": {"(" * 5000 + ")" * 5000: 1}},
        {"lora_alpha": 10**400},
        {"r": "four"},
        {"r": {}, "lora_alpha": {"a": 1}},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 1}},
    ],
)
def test_an_unusable_adapter_config_is_refused(config):
    with pytest.raises(LoraFileError, match="alpha"):
        scales_of(peft("unet.a.to_q"), config)


def test_convolutions_are_read_as_matrices():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 3, 3, 3, generator=generator), torch.randn(5, 2, 1, 1, generator=generator)
    data = save({"unet.conv_in.lora.down.weight": down, "unet.conv_in.lora.up.weight": up})
    header = parse_header(header_of(data))
    layout = header.layout
    weights, _ = load_weights(data, header)
    assert [layer.shape for layer in layout.layers] == [(2, 27), (5, 2)]
    assert [layer.rank for layer in layout.layers] == [2, 2]
    assert [layer.free_side for layer in layout.layers] == [27, 5]
    assert layout.columns == (slice(0, 54), slice(54, 64))
    assert weights.tolist() == torch.cat([down.flatten(), up.flatten()]).tolist()


def locon(mid: tuple[int, ...] = (2, 2, 3, 5), down: tuple[int, ...] = (2, 4, 1, 1)) -> dict:
    """A convolution from 4 to 6 channels in Tucker form."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": down, "mid": mid, "up": (6, 2, 1, 1)}
    return {f"lora_unet_c.lora_{r}.weight": torch.randn(s, generator=generator) for r, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("down", [(2, 4, 1, 1), (2, 4)])
def test_a_mid_is_multiplied_into_the_down(dtype, down):
    """So that up·down is the update that LyCORIS rebuilds: up, mid and down applied one after the other."""
    tensors = {key: tensor.to(dtype) for key, tensor in (locon(down=down) | pair("lora_unet_a")).items()}
    tensors["lora_unet_c.alpha"] = torch.tensor(1.0)
    data = save(tensors)
    header = parse_header(header_of(data))
    layout = header.layout
    weights, alphas = load_weights(data, header)
    assert [(layer.module, layer.role, layer.shape) for layer in layout.layers[2:]] == [
        ("unet_c", "down", (2, 4 * 3 * 5)),
        ("unet_c", "up", (6, 2)),
    ]
    assert lora_files.update_scales(layout, alphas, None) == {"unet_a": 1.0, "unet_c": 0.5}
    _, _, wide, up = (
        weights[columns].reshape(layer.shape) for layer, columns in zip(layout.layers, layout.columns, strict=True)
    )
    factors = {key.split(".")[1][5:]: tensor.double() for key, tensor in tensors.items() if "unet_c.lora" in key}
    update = torch.einsum("oi,ijhw,jc->ochw", factors["up"].flatten(1), factors["mid"], factors["down"].flatten(1))
    np.testing.assert_allclose(up @ wide, update.flatten(1), rtol=1e-4, atol=1e-5)
    inputs = torch.randn(1, 4, 7, 9, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    through = conv(conv(inputs, factors["down"].reshape(2, 4, 1, 1)), factors["mid"])
    direct = conv(inputs, torch.from_numpy(wide).double().reshape(2, 4, 3, 5))
    torch.testing.assert_close(through, direct, rtol=1e-4, atol=1e-5)
    assert weights[: 2 * 6].tolist() == [1.0] * 12  # its neighbours stay as they are


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (locon(mid=(3, 3, 3, 3)), r"ranks differ in module unet_c: down \[2, 4, 1, 1\], mid \[3, 3, 3, 3\]"),
        (locon(mid=(2, 3, 3, 3)), "ranks differ in module unet_c"),
        (locon(mid=(2, 2)), "ranks differ in module unet_c"),
        (locon(mid=(2, 2, 0, 3)), "ranks differ in module unet_c"),
        (locon(down=(2, 4, 3, 3)), "ranks differ in module unet_c"),
        ({k: t for k, t in locon().items() if "down" not in k}, r"has a mid \[2, 2, 3, 5\] but no down"),
        ({k: t for k, t in locon().items() if "up" not in k}, "has a down .* but no up"),
        ({k: t.int() if "mid" in k else t for k, t in locon().items()}, "mid.weight is of type I32"),
    ],
)
def test_a_mid_that_does_not_fit_is_refused(tensors, words):
    assert re.search(words, refusal(tensors))


def test_a_mid_that_is_not_finite_is_found():
    tensors = locon()
    tensors["lora_unet_c.lora_mid.weight"][1, 0, 2, 2] = torch.nan
    data = save(tensors)
    header = parse_header(header_of(data))
    with pytest.raises(LoraFileError, match=r"NaN or infinity in 1 tensors, first in lora_unet_c\.lora_down"):
        lora_files.check_finite(load_weights(data, header)[0], header.layout)


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 6, 3), (8, 2)), ((2,), (8, 2)), ((0, 6), (8, 0)), ((2, 6), (8, 2, 3, 3)), ((2, 6, 1, 1, 1), (8, 2))],
)
def test_other_shapes_are_refused(down, up):
    message = refusal({f"{Q}.lora.down.weight": torch.ones(down), f"{Q}.lora.up.weight": torch.ones(up)})
    assert Q in message
    assert "shape" in message


FLOATS_OF_8_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32, *FLOATS_OF_8_BITS])
def test_every_float_type_is_read_as_float32(dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in lora(1).items()}
    data = save(tensors)
    header = parse_header(header_of(data))
    layout = header.layout
    weights, _ = load_weights(data, header)
    assert {layer.dtype for layer in layout.layers} <= set(lora_files.FLOAT_TYPES)
    assert weights.dtype == "float32"
    for layer, columns in zip(layout.layers, layout.columns, strict=True):
        assert weights[columns].tolist() == tensors[layer.name].float().flatten().tolist()


@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
def test_every_number_of_8_bits_is_torchs(dtype):
    bits = torch.arange(256, dtype=torch.uint8).view(dtype)
    tensors = {f"{Q}.lora.{role}.weight": bits.reshape(16, 16).clone() for role in ("down", "up")}
    weights, _ = load_weights(save(tensors), parse_header(header_of(save(tensors))))
    np.testing.assert_array_equal(weights, bits.float().repeat(2).numpy())


def test_types_may_differ_within_a_file():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float16, torch.float32]
    tensors = {key: tensor.to(dtype) for dtype, (key, tensor) in zip(dtypes, lora(3).items(), strict=True)}
    tensors["x.alpha"] = torch.tensor(3, dtype=torch.uint8)  # nothing after it is aligned
    data = save(tensors)
    weights, _ = load_weights(data, parse_header(header_of(data)))
    assert weights.tolist() == torch.cat([tensor.float().flatten() for tensor in list(tensors.values())[:-1]]).tolist()


def reordered(data: bytes, seed: int) -> bytes:
    """The same tensors, in another order of keys and of data, behind a header that ends at an odd byte."""
    header = header_of(data)
    entries, keys, body, moved = json.loads(header), list(json.loads(header)), b"", {}
    random.Random(seed).shuffle(keys)
    for key in keys:
        start, end = entries[key]["data_offsets"]
        moved[key] = entries[key] | {"data_offsets": [len(body), len(body) + end - start]}
        body += data[8 + len(header) + start : 8 + len(header) + end]
    new = json.dumps(moved).encode()
    return file_of(new + b" " * (len(new) % 2 == 0), body)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_and_data_changes_nothing(tmp_path, seed):
    data = save(lora(12) | {f"{module_names(1)[0]}.alpha": torch.tensor(3.0)})
    header = parse_header(header_of(data))
    layout = header.layout
    path = tmp_path / "x.safetensors"
    path.write_bytes(reordered(data, seed))
    moved = parse_header(read_header(path))
    assert moved.layout is layout and moved.places is not header.places  # one layout, however many files
    weights, alphas = load_weights(path.read_bytes(), moved)
    assert weights.tolist() == torch.cat([tensor.flatten() for tensor in lora(12).values()]).tolist()
    assert list(alphas.values()) == [3.0]


def test_packed_weights_have_the_largest_rank_of_each_module():
    first, wide, long = (layout_of(pair("unet.a", a) | pair("unet.b", b)) for a, b in ((2, 3), (4, 1), (1, 5)))
    packed = lora_files.packed_layout([first, wide, long])
    assert [layer.shape for layer in packed.layers] == [(4, 6), (8, 4), (5, 6), (8, 5)]
    assert [layer.name for layer in packed.layers] == [layer.name for layer in first.layers]
    assert packed.width == 14 * 9 and packed.modules == ["unet_a", "unet_b"]
    assert lora_files.packed_layout([first, first]) is first


def test_files_of_equal_tensors_share_their_places_whatever_the_metadata():
    header = parse_header(header_of(save(lora(2))))
    wanted = load_weights(save(lora(2)), header)[0].tolist()
    for metadata in ({"a": "1"}, {"ss": '}, "x": {', "t": "\\u007b\u00fc"}, {"long": "x" * 10_000}):
        data = save(lora(2), metadata=metadata)
        other = parse_header(header_of(data))
        assert other.places is header.places
        spaced = header_of(data).replace(b'{"__metadata__":', b'{ "__metadata__" : ')
        assert parse_header(spaced).places is header.places
        assert load_weights(data, other)[0].tolist() == wanted
    entries = json.loads(header_of(save(lora(2))))
    at_the_end = parse_header(json.dumps(entries | {"__metadata__": {"at": "the end"}}).encode())
    assert at_the_end.places is header.places
    with pytest.raises(LoraFileError, match="no LoRA pair"):
        parse_header(b'{"__metadata__":{"a":"b"}}')


def test_many_files_of_a_few_kinds_hold_their_places_once_and_little_else():
    kinds = [header_of(save(lora(modules))) for modules in range(1, 101)]  # more than the parser remembers
    first = [parse_header(header) for header in kinds]
    assert all(parse_header(header).places is known.places for header, known in zip(kinds, first, strict=True))
    long = [b'{"__metadata__":{"a":"%05d%s"},%s' % (i, b"x" * 5000, kinds[9][1:]) for i in range(1000)]
    parse_header(long[0])
    tracemalloc.start()
    try:
        headers = [parse_header(header) for header in long]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len({header.digest for header in headers}) == 1000
    assert held < 300 * len(headers)


@pytest.mark.parametrize("contents", [b"", b"1234567", bytes(400), file_of(b"[1]"), file_of(b'{"a":1}'), b"\xff" * 99])
def test_contents_that_are_no_lora_any_more_are_not_read(contents):
    header = parse_header(header_of(WHOLE))
    for data in (contents, WHOLE[:-1], np.frombuffer(contents, np.uint8)):
        with pytest.raises(LoraFileError, match=r"^changed since it was indexed\. Start again\.$"):
            load_weights(data, header)


def test_a_header_that_changed_is_not_read_with_what_the_first_one_said():
    header = parse_header(header_of(save(lora(2))))
    names = list(lora(2))
    swapped = header_of(WHOLE_OF_TWO).replace(names[0].encode(), b"?").replace(names[2].encode(), names[0].encode())
    swapped = swapped.replace(b"?", names[2].encode())
    assert len(swapped) == len(header_of(WHOLE_OF_TWO)) and parse_header(swapped).layout is header.layout
    body = WHOLE_OF_TWO[8 + len(swapped) :]
    for changed in (save(lora(3)), save(lora(2), metadata={"a": "b"}), file_of(swapped, body)):
        with pytest.raises(LoraFileError, match="changed since it was indexed"):
            load_weights(changed, header)


def test_an_equal_header_is_checked_once_for_each_size(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_files, "_accepted", set())
    opened, original = [], lora_files.safe_open
    monkeypatch.setattr(lora_files, "safe_open", lambda *args: opened.append(1) or original(*args))
    paths = [write_lora(tmp_path / f"{i}.safetensors", lora(seed=i)) for i in range(3)]
    for path in paths * 2:
        read_header(path)
    assert len(opened) == 1
    for spoilt in (paths[0].read_bytes() + b"x", paths[0].read_bytes()[:-1]):
        paths[0].write_bytes(spoilt)
        with pytest.raises(LoraFileError):
            read_header(paths[0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fnuz])
def test_other_types_are_refused(dtype):
    message = refusal({key: tensor.to(dtype) for key, tensor in pair().items()})
    assert Q in message
    assert "type" in message


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong with a file
# ----------------------------------------------------------------------------------------------------------------------

WHOLE, WHOLE_OF_TWO = save(lora(1)), save(lora(2))


def fault(path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(LoraFileError) as error:
        parse_header(read_header(path))
    return str(error.value)


def test_a_whole_file_is_read(tmp_path):
    header = parse_header(read_header(write_lora(tmp_path / "a" / "x.safetensors", lora(2))))
    layout = header.layout
    assert [layer.name for layer in layout.layers] == list(lora(2))
    assert [layer.module for layer in layout.layers[::2]] == [name.replace(".", "_") for name in module_names(2)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n <!doctype HTML>", "web page"),
        (b"<html><body>404</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle.*never loaded.*safetensors"),
        (b"", "incomplete download: has 0 bytes"),
        (b"1234567", "incomplete download: has 7 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((100).to_bytes(8, "little") + b"{}", "incomplete download: has 10 bytes, header promises 108"),
        (WHOLE[:-1], f"incomplete download: has {len(WHOLE) - 1} bytes, header promises {len(WHOLE)}"),
        (file_of(b""), "not a readable safetensors file"),
        (file_of(b"\xff\xfe garbage"), "not a readable safetensors file"),
        (file_of(b"not json"), "not a readable safetensors file"),
        (file_of(b"[1, 2]"), "not a readable safetensors file"),
        (file_of(b'{"a": 1}'), "not a readable safetensors file"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "not a readable safetensors file"),
        (file_of(b'{"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "not a readable"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(4)), "not a readable"),
        (file_of(b"[" * 200_000), "not a readable safetensors file"),
        (WHOLE + b"more", "not a readable safetensors file"),
        (file_of(b"{}"), "no LoRA pair"),
    ],
)
def test_what_a_header_shows(tmp_path, data, words):
    message = fault(tmp_path / "x.safetensors", data)
    assert re.search(words, message)
    assert "\n" not in message


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    for length in range(len(WHOLE) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(LoraFileError, match="incomplete download"):
            read_header(path)


def entry(shape=(2, 8), start=0, end=64, dtype="F32") -> str:
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]})


@pytest.mark.parametrize(
    "data",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        (lora_files.MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        *(
            file_of(f'{{"{Q}.lora.down.weight":{first},"{Q}.lora.up.weight":{second}}}'.encode(), bytes(128))
            for first, second in [
                (entry([2**32, 2**32]), entry(start=64, end=128)),  # 2**64 numbers are 0 of them, in 64 bits
                (entry([2**62, 4]), entry(start=64, end=128)),
                (entry([2**63, 2]), entry(start=64, end=128)),
                (entry([2**64, 1]), entry(start=64, end=128)),
                (entry([-2, -8]), entry(start=64, end=128)),
                (entry(start=-64, end=0), entry(start=64, end=128)),
                (entry(start=64, end=0), entry(start=64, end=128)),
                (entry(), entry()),  # one over the other
                (entry(), entry(start=32, end=96)),
                (entry(), entry(start=2**60, end=2**60 + 64)),
                (entry(end=2**64 - 1), entry(start=64, end=128)),
                (entry(end=10**4299), entry(start=64, end=128)),
                (entry(end=int("9" * 4300)), entry(start=64, end=128)),
                (entry(end=1e300), entry(start=64, end=128)),
                (entry(dtype="\u20ac"), entry(start=64, end=128)),
                ("[" * 200_000, entry()),
                ('{"a":' * 50_000, entry()),
            ]
        ),
        file_of(b'{"__metadata__":' + b'{"a":' * 200_000),
        file_of(b'{"__metadata__":{"a":"\\ud800"}}'),
        file_of(b'{"__metadata__":{"a":"\xff\xfe"}}'),
    ],
)
def test_no_memory_is_taken_for_what_a_header_only_promises(tmp_path, data):
    tracemalloc.start()
    try:
        message = fault(tmp_path / "x.safetensors", data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.isprintable()
    assert len(message) < 1100
    assert most < 2**20 + 10 * len(data)


def test_a_header_of_the_largest_size_is_read_in_time(tmp_path):
    path = tmp_path / "x.safetensors"
    body, entries = WHOLE[8 + len(header_of(WHOLE)) :], header_of(WHOLE)[1:]
    room = lora_files.MAX_HEADER_BYTES - len(entries) - 40
    texts = b",".join(b'"%06d":"\\""' % i for i in range(10**5))  # many small ones and a long one
    path.write_bytes(file_of(b'{"__metadata__":{%s,"x":"%s"},%s' % (texts, b"x" * (room - len(texts)), entries), body))
    assert path.stat().st_size > lora_files.MAX_HEADER_BYTES
    header = parse_header(read_header(path))
    small = parse_header(header_of(WHOLE))
    assert header.places is small.places
    assert load_weights(path.read_bytes(), header)[0].tolist() == load_weights(WHOLE, small)[0].tolist()


def test_more_tensors_than_any_lora_has_are_refused_before_they_are_parsed(tmp_path):
    empty = ",".join(f'"{i:09}":{entry([0], 0, 0)}' for i in range(lora_files.MAX_TENSORS_BYTES // 60))
    assert "more than any LoRA has" in fault(tmp_path / "x.safetensors", file_of(f"{{{empty}}}".encode()))


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    with pytest.raises(LoraFileError, match="a pipe or a device, not a file"):
        read_header(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(LoraFileError, match="a pipe or a device, not a file"):
        read_header(path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickles(trap: Trap) -> dict[str, bytes]:
    """The trap in every form that torch has saved checkpoints in."""
    found = {f"protocol {p}": pickle.dumps(trap, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
    for name, zipped in (("torch", True), ("torch of old", False)):
        buffer = io.BytesIO()
        torch.save({"a": trap}, buffer, _use_new_zipfile_serialization=zipped)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("form", list(pickles(Trap(""))))
def test_a_pickle_in_a_safetensors_file_is_never_loaded(tmp_path, form):
    data = pickles(Trap(tmp_path / "sprung"))[form]
    message = fault(tmp_path / "x.safetensors", data)
    if form not in ("protocol 0", "protocol 1"):  # plain text, and nearly so
        assert message.startswith("a pickle checkpoint: never loaded.")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickles(Trap(tmp_path / "sprung"))["protocol 2"])
    assert (tmp_path / "sprung").exists()  # the trap works


def test_a_header_that_begins_as_a_pickle_does_is_read(tmp_path):
    """640 bytes long: 80 02, as a pickle of protocol 2."""
    tensors = lora(1)
    spare = 640 - len(header_of(save(tensors, metadata={"a": ""})))
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"a": "x" * spare}))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert len(parse_header(read_header(path)).layout.layers) == 2


ENTRY = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-1, 99), max_size=3),
)


@st.composite
def mutated_headers(draw) -> bytes:
    """The header of a whole file with a few bytes changed, or with a few of its values."""
    header = header_of(WHOLE)
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 4))):
            at, byte = draw(st.integers(0, len(header) - 1)), draw(st.binary(max_size=2))
            header = header[:at] + byte + header[at + draw(st.integers(0, 2)) :]
        return header
    entries = json.loads(header)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(entries)))
        if draw(st.booleans()) and isinstance(entries[key], dict):
            entries[key][draw(st.sampled_from([*ENTRY, "more"]))] = draw(ODD)
        else:
            entries[draw(st.one_of(st.just(key), st.text(max_size=8), st.just("__metadata__")))] = draw(ODD)
    return json.dumps(entries).encode()


@settings(deadline=None, max_examples=300)
@given(header=mutated_headers())
def test_a_mutated_header_is_refused_or_valid(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(file_of(header, WHOLE[8 + len(header_of(WHOLE)) :]))
    try:
        parsed = parse_header(read_header(path))
    except LoraFileError as error:
        assert str(error)
        return
    layout = parsed.layout
    weights, _ = load_weights(path.read_bytes(), parsed)
    assert len(weights) == layout.width == sum(rows * columns for rows, columns in (x.shape for x in layout.layers))
    assert [layer.role for layer in layout.layers] == ["down", "up"] * (len(layout.layers) // 2)


@settings(deadline=None, max_examples=200)
@given(
    keys=st.lists(
        st.text(max_size=12).flatmap(
            lambda m: st.sampled_from([f"{m}.lora.down.weight", f"{m}.lora_B.weight", f"{m}.alpha", m])
        ),
        max_size=5,
    )
)
def test_any_keys_are_refused_or_valid(keys):
    entries = {key: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} for key in keys}
    try:
        layout = parse_header(json.dumps(entries).encode()).layout
    except LoraFileError:
        return
    assert layout.layers


@pytest.mark.parametrize("kept", ["down", "up"])
def test_a_missing_partner_is_named(kept):
    tensors = pair("unet.a") | {key: tensor for key, tensor in pair().items() if kept in key.split(".")}
    message = refusal(tensors)
    assert canonical_module(Q) in message
    assert f"has a {kept} {'[2, 6]' if kept == 'down' else '[8, 2]'}" in message


def test_ranks_that_differ_are_shown():
    message = refusal({f"{Q}.lora.down.weight": torch.ones(2, 6), f"{Q}.lora.up.weight": torch.ones(8, 3)})
    assert canonical_module(Q) in message
    assert "down [2, 6], up [8, 3]" in message


def test_without_a_pair_the_first_keys_are_shown():
    message = refusal({"model.a.weight": torch.ones(2, 2), "model.b.weight": torch.ones(2, 2)})
    assert "no LoRA pair" in message
    assert "model.a.weight, model.b.weight" in message
