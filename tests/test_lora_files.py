"""One file: scales, shapes, types, and the places of the weights."""

import json
import math
import os
import random
import re
import time
import tracemalloc

import numpy as np
import pytest
import torch
from headers import WHOLE, WHOLE_OF_TWO, Q, file_of, header_of, layout_of, load_weights, pair, refusal
from making import lora, module_names, write_lora
from safetensors.torch import save

from loras import headers, lora_files
from loras.keys import LoraFileError
from loras.lora_files import file_stat, parse_header, read_header
from loras.scales import update_scales

# ----------------------------------------------------------------------------------------------------------------------
# Scales, shapes, dtypes
# ----------------------------------------------------------------------------------------------------------------------


def scales_of(tensors: dict, config: dict | None = None) -> dict:
    data = save(tensors)
    header = parse_header(header_of(data))
    _, alphas = load_weights(data, header)
    return update_scales(header, alphas, config)


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
    assert scales_of(tensors if alpha is None else tensors | {"lora_unet_a.alpha": alpha}) == {"a": scale}


def test_alpha_of_each_module_is_its_own_and_half_precision_is_read():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up") | pair("lora_unet_b", 2, "lora_down", "lora_up")
    tensors |= {"lora_unet_a.alpha": torch.tensor(1.0).bfloat16(), "lora_unet_b.alpha": torch.tensor(1.0).half()}
    assert scales_of(tensors) == {"a": 0.25, "b": 0.5}


def test_an_alpha_that_is_no_number_is_refused_from_the_header():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert "lora_unet_a.alpha" in refusal(tensors | {"lora_unet_a.alpha": torch.ones(2)})


def test_an_alpha_of_a_type_that_is_no_number_is_refused():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    assert "of type BOOL" in refusal(tensors | {"lora_unet_a.alpha": torch.tensor(True)})


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e300])
def test_an_alpha_that_is_not_finite_is_refused(alpha):
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up")
    with pytest.raises(LoraFileError, match="module a is"):
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
    assert scales_of(peft("unet.a.to_q"), config) == {"a_to_q": scale}


def test_patterns_are_of_single_modules():
    tensors = peft("unet.a.to_q", rank=4) | peft("unet.b.to_q", rank=2)
    config = {"lora_alpha": 8, "r": 4, "rank_pattern": {"b.to_q": 2}, "alpha_pattern": {"b.to_q": 1}}
    assert scales_of(tensors, config) == {"a_to_q": 2.0, "b_to_q": 0.5}
    root = scales_of(tensors, config | {"use_rslora": True})
    assert root == {"a_to_q": 4.0, "b_to_q": pytest.approx(1 / math.sqrt(2))}


def test_an_alpha_in_the_file_comes_before_the_configuration():
    tensors = pair("lora_unet_a", 4, "lora_down", "lora_up") | pair("lora_unet_b", 4, "lora_down", "lora_up")
    tensors |= {"lora_unet_a.alpha": torch.tensor(1.0)}
    assert scales_of(tensors, {"lora_alpha": 64, "r": 4, "use_rslora": True}) == {"a": 0.25, "b": 32.0}


@pytest.mark.parametrize("config", [{"r": 8}, {"r": 4, "rank_pattern": {"a.to_q": 2}}, {"r": float("nan")}])
def test_a_configuration_of_another_rank_is_of_another_file(config):
    with pytest.raises(LoraFileError, match=r"adapter_config.json says rank .* for unet.a.to_q, where the file has 4"):
        scales_of(peft("unet.a.to_q"), {"lora_alpha": 8, **config})


def test_alpha_pattern_is_of_single_modules_in_every_style():
    config = {"lora_alpha": 8, "alpha_pattern": {"b.to_q": 2}}
    assert scales_of(peft("unet.a.to_q", "unet.b.to_q"), config) == {"a_to_q": 2.0, "b_to_q": 0.5}
    assert scales_of(pair("unet.a.to_q", 4) | pair("unet.b.to_q", 4), config) == {
        "a_to_q": 2.0,
        "b_to_q": 0.5,
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
        ("c", "down", (2, 4 * 3 * 5)),
        ("c", "up", (6, 2)),
    ]
    assert update_scales(header, alphas, None) == {"a": 1.0, "c": 0.5}
    _, _, wide, up = (
        weights[columns].reshape(layer.shape) for layer, columns in zip(layout.layers, layout.columns, strict=True)
    )
    factors = {key.split(".")[1][5:]: tensor.double() for key, tensor in tensors.items() if "c.lora" in key}
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
        (locon(mid=(3, 3, 3, 3)), r"ranks differ in module c: down \[2, 4, 1, 1\], mid \[3, 3, 3, 3\]"),
        (locon(mid=(2, 3, 3, 3)), "ranks differ in module c"),
        (locon(mid=(2, 2)), "ranks differ in module c"),
        (locon(mid=(2, 2, 0, 3)), "ranks differ in module c"),
        (locon(down=(2, 4, 3, 3)), "ranks differ in module c"),
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
    assert packed.width == 14 * 9 and packed.modules == ["a", "b"]
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
    monkeypatch.setattr(headers, "_accepted", set())
    opened, original = [], headers.safe_open
    monkeypatch.setattr(headers, "safe_open", lambda *args: opened.append(1) or original(*args))
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


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_header_may_keep_some_modules_alone(seed):
    """The same is read of them as of a file that holds nothing else."""
    tensors = {k: t for number in range(4) for k, t in pair(f"unet.blocks.{number}", 2 + number).items()}
    tensors |= locon() | {"unet.blocks.1.alpha": torch.tensor(3.0), "unet.blocks.2.alpha": torch.tensor(5.0)}
    few = {k: t for k, t in tensors.items() if re.search(r"blocks\.[023]|unet_c", k)}
    modules = frozenset({"blocks_0", "blocks_2", "blocks_3", "c", "not there"})
    data = save(tensors) if seed is None else reordered(save(tensors), seed)
    header = parse_header(header_of(data))
    kept, alone = header.keeping(modules), parse_header(header_of(save(few)))
    assert kept.layout.layers == alone.layout.layers and kept.layout.alphas == alone.layout.alphas
    weights, alphas = load_weights(data, kept)
    wanted, wanted_alphas = load_weights(save(few), alone)
    assert weights.tolist() == wanted.tolist() and alphas == wanted_alphas == {"blocks_2": 5.0}
    assert kept.keeping(modules).layout is kept.layout  # equal layouts stay one object
    assert header.keeping(modules).places is kept.places
    assert header.keeping(frozenset(header.layout.modules)).places is header.places


def test_a_file_that_is_written_again_is_another_whatever_its_mtime(tmp_path):
    """As archives are unpacked, with the mtimes that are written in them."""
    path = write_lora(tmp_path / "x.safetensors", lora(1))
    before, times = file_stat(path), path.stat().st_mtime_ns
    time.sleep(0.02)  # a tick of the file system's clock
    with open(path, "r+b") as file:
        file.write(path.read_bytes())
    os.utime(path, ns=(times, times))
    after = file_stat(path)
    assert (before[0], before[1], before[3]) == (after[0], after[1], after[3]) and before != after
