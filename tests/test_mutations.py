"""Thousands of LoRA files with something wrong in them: each is refused in words, or read as the library reads it.

``pytest -m slow tests/test_mutations.py`` tries 40,000, and every truncation of five files; the default run a part.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from data import CollectionError, index_collection
from experiment import extraction
from loras.lora_files import LoraFileError
from representations import REPRESENTATIONS

MOST_SECONDS = 5.0
FEATURES = [name for name, row in REPRESENTATIONS.items() if row.made == "computed"]


# ----------------------------------------------------------------------------------------------------------------------
# Whole files, of every family and type
# ----------------------------------------------------------------------------------------------------------------------


def pair(down: str, up: str, dtype=torch.float32, down_shape=(2, 3), up_shape=(4, 2)) -> dict:
    generator = torch.Generator().manual_seed(len(down))
    factors = {down: torch.randn(down_shape, generator=generator), up: torch.randn(up_shape, generator=generator)}
    return {key: factor.to(dtype) for key, factor in factors.items()}


def whole_files() -> dict[str, bytes]:
    """Five small files that are as they should be."""
    kohya = pair("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", torch.float16)
    kohya |= pair(
        "lora_unet_c.lora_down.weight", "lora_unet_c.lora_up.weight", torch.float16, (2, 3, 1, 1), (4, 2, 1, 1)
    )
    kohya |= {"lora_unet_c.lora_mid.weight": torch.randn(2, 2, 3, 3).half(), "lora_unet_a.alpha": torch.tensor(3.0)}
    mixed = pair("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight", torch.float64)
    mixed |= pair("unet.conv.lora_A.weight", "unet.conv.lora_B.weight", torch.float32, (2, 3, 3, 3), (4, 2, 1, 1))
    mixed |= pair("te.q.lora_linear_layer.down.weight", "te.q.lora_linear_layer.up.weight", torch.float8_e4m3fn)
    mixed |= {"<concept>": torch.ones(2), "unet.a.dora_scale": torch.ones(3)}
    peft = pair("m.a.lora_A.default.weight", "m.a.lora_B.default.weight", torch.bfloat16)
    legacy = pair("a.processor.to_out_lora.down.weight", "a.processor.to_out_lora.up.weight", torch.float8_e5m2)
    legacy |= pair("unet:3:down", "unet:3:up") | pair("lora.down.weight.7", "lora.up.weight.7", torch.float16)
    return {
        "diffusers": save(pair("unet.a.to_q.lora.down.weight", "unet.a.to_q.lora.up.weight")),
        "kohya": save(kohya, metadata={"ss_tag_frequency": '{"a": {"b": 1}}', "ss_network_dim": "2"}),
        "PEFT": save(peft, metadata={"format": "pt"}),
        "mixed": save(mixed),
        "legacy": save(legacy),
    }


WHOLE = whole_files()


def parts(whole: bytes) -> tuple[bytes, bytes]:
    """Header and data of a file."""
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:end], whole[end:]


def file_of(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


# ----------------------------------------------------------------------------------------------------------------------
# What may happen to them
# ----------------------------------------------------------------------------------------------------------------------


def flip(draw: random.Random, contents: bytes, start: int, stop: int) -> bytes:
    """One to four bits are others, between two bytes."""
    changed = bytearray(contents)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_in_length(draw: random.Random, whole: bytes) -> bytes:
    return flip(draw, whole, 0, 8)


def flip_in_header(draw: random.Random, whole: bytes) -> bytes:
    return flip(draw, whole, 8, 8 + len(parts(whole)[0]))


def flip_in_data(draw: random.Random, whole: bytes) -> bytes:
    return flip(draw, whole, 8 + len(parts(whole)[0]), len(whole))


def truncated(draw: random.Random, whole: bytes) -> bytes:
    return whole[: draw.randrange(len(whole))]


def spliced(draw: random.Random, whole: bytes) -> bytes:
    """Some bytes of this or another file stand in the place of some others; half of the time the length is right."""
    source = draw.choice([whole, *WHOLE.values()])
    start, at = draw.randrange(len(source)), draw.randrange(len(whole))
    piece = draw.choice([source[start : start + draw.randint(0, 40)], draw.randbytes(draw.randint(1, 9))])
    changed = whole[:at] + piece + whole[at + draw.choice([0, len(piece), draw.randint(0, 40)]) :]
    header, _ = parts(whole)
    if 8 <= at < 8 + len(header) and draw.random() < 0.5:
        grown = len(changed) - len(whole)
        return max(0, len(header) + grown).to_bytes(8, "little") + changed[8:]
    return changed


def swapped_headers(draw: random.Random, whole: bytes) -> bytes:
    """The header of another file, a header that stands twice, or both files one after the other."""
    header, body = parts(whole)
    other, other_body = parts(draw.choice(list(WHOLE.values())))
    return draw.choice(
        [
            file_of(other, body),
            file_of(header, other_body),
            file_of(header + header, body),
            file_of(header, file_of(header, body)),
            file_of(header.rstrip()[:-1] + b"," + header[1:], body),
            file_of(header.rstrip()[:-1] + b"," + other[1:], body + other_body),
            file_of(header, body) + file_of(other, other_body),
            file_of(header, body + draw.randbytes(draw.randint(1, 64))),
        ]
    )


def hostile_metadata(draw: random.Random, whole: bytes) -> bytes:
    """Metadata that is huge, nested, doubled, of other types, or not even text."""
    header, body = parts(whole)
    rest = header[1:] if b"__metadata__" not in header else b'"' + header.split(b'},"', 1)[1]
    deep = draw.choice([20, 126, 127, 128, 129, 5_000])
    value = draw.choice(
        [
            b'{"a":"%s"}' % (b"x" * draw.choice([10, 10**4, 10**6])),
            b"{%s}" % b",".join(b'"%d":"\\u0022}"' % i for i in range(draw.choice([2, 2_000]))),
            b'{"a":"\\ud800"}',
            b'{"a":"\\udfff\\ud800"}',
            b'{"a":"\\ud83d\\ude00\\u0000"}',
            b'{"a":"%s"}' % draw.randbytes(4),
            b'{"a":"\xff\xfe\x00"}',
            b'{"a":' * deep + b"1" + b"}" * deep,
            b"[" * deep + b"]" * deep,
            b'{"a":"%s"}' % (b"[" * deep),
            b'{"a":"b","a":"c"}',
            b'{"a":1}',
            b'{"a":null}',
            b'{"":""}',
            b"null",
            b"[]",
            b"1e999",
            b"-" + b"9" * 5000,
            b'"},"',
            b'{"__metadata__":"x"}',
            b'{ "a" :\n"}" , "b":"{\\"c\\":[" }',
        ]
    )
    name = draw.choice([b'"__metadata__"', b'"__metadata__" ', b'"\\u005f_metadata__"', b'"metadata"'])
    if draw.random() < 0.3:
        header = b"{" + rest.rstrip()[:-1] + b"," + name + b":" + value + b"}"
    else:
        header = b"{" + name + b":" + value + draw.choice([b",", b" ,\n", b""]) + rest
    return file_of(header, body)


NAMES = [
    *(f"unet.a.{name}" for name in ("to_q.lora.down.weight", "to_q.lora.up.weight", "lora_A.weight", "lora_B.weight")),
    *("m.a.lora_A.style.weight", "m.a.lora_B.style.weight", "a.lora_A", "lora.down.weight.7", "unet:3:up", "x.alpha"),
    *("lora_unet_a.lora_mid.weight", "lora_unet_a.hada_w1_a", "x.diff", "lora_unet_x_lora_down.weight", "<a>", ""),
    *("\n.lora.down.weight", "\x1b[2J.lora.up.weight", "\u202e", "\x00", "x" * 2000 + ".lora.down.weight", "é.lora_B"),
    *("..lora.down.weight", "a.modules_to_save.b", "lora", "unet.a.to_q.lora.down.weight\n", "__metadata__"),
]


def renamed_keys(draw: random.Random, whole: bytes) -> bytes:
    """Keys trade their names, take another's or an odd one."""
    header, body = parts(whole)
    pairs = list(json.loads(header).items())
    for _ in range(draw.randint(1, 2)):
        i, j = draw.randrange(len(pairs)), draw.randrange(len(pairs))
        name, entry = pairs[i]
        if draw.random() < 0.4:
            pairs[i], pairs[j] = (pairs[j][0], entry), (name, pairs[j][1])
        else:
            word, other = draw.choice([("down", "up"), ("up", "down"), ("_A", "_B"), ("lora", "Lora"), (".", "_")])
            pairs[i] = (draw.choice([name.replace(word, other), *draw.sample(NAMES, 2)]), entry)
    draw.shuffle(pairs)
    return file_of(b"{" + b",".join(b"%s:%s" % (as_json(key), as_json(value)) for key, value in pairs) + b"}", body)


def as_json(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "I16", "I8", "U8", "BOOL"]
ODD = [None, True, -1, 0, 0.5, 1e300, 2**32, 2**63, 2**64, 10**4000, "", "F9", [], {}, [1], [0, 2**60], [-8, 8], [[]]]


def changed_entries(draw: random.Random, whole: bytes) -> bytes:
    """Types, shapes and places of tensors are others: of equal size, traded, overlapping, negative or absurd."""
    header, body = parts(whole)
    entries = json.loads(header)
    tensors = [value for key, value in entries.items() if key != "__metadata__"]
    for _ in range(draw.randint(1, 2)):
        entry, other = draw.choice(tensors), draw.choice(tensors)
        field = draw.choice(["dtype", "shape", "data_offsets"])
        kind = draw.randrange(5)
        if kind == 0:
            entry[field], other[field] = other.get(field), entry.get(field)
        elif kind == 1:
            entry["dtype"] = draw.choice(DTYPES)
        elif kind == 2 and isinstance(entry.get("shape"), list):
            entry["shape"] = draw.choice(
                [entry["shape"][::-1], [*entry["shape"], 1], [2**32, 2**32], entry["shape"][1:]]
            )
        elif kind == 3:
            start = draw.randrange(len(body))
            entry["data_offsets"] = draw.choice(
                [[start, start + 24], [-start, start], [start, 0], [start + 2**63, 2**64]]
            )
        else:
            entry[draw.choice([field, "more"])] = draw.choice(ODD)
    return file_of(as_json(entries), body)


MUTATORS = [
    flip_in_length,
    flip_in_header,
    flip_in_data,
    truncated,
    spliced,
    swapped_headers,
    hostile_metadata,
    renamed_keys,
    changed_entries,
]


def mutants(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Files with one fault or more, of every kind equally often."""
    draw = random.Random(seed)
    for i in range(count):
        mutate = MUTATORS[i % len(MUTATORS)]
        mutant = mutate(draw, draw.choice(list(WHOLE.values())))
        if draw.random() < 0.1:
            mutant = flip(draw, mutant or b"x", 0, len(mutant or b"x"))
        yield mutate.__name__, mutant


# ----------------------------------------------------------------------------------------------------------------------
# What the program makes of them
# ----------------------------------------------------------------------------------------------------------------------


def read(root: Path, path: Path, contents: bytes) -> str:
    """Index and read a collection of this one file: "refused" or "accepted", anything else is an error."""
    path.write_bytes(contents)
    start = time.perf_counter()
    try:
        (file,) = index_collection(root).files
        weights, scales, _ = extraction._read_file(root, file)
    except (CollectionError, LoraFileError) as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        outcome = "refused"
    else:
        check_against_the_library(path, file.layout, weights, scales)
        outcome = "accepted"
    assert time.perf_counter() - start < MOST_SECONDS
    return outcome


def check_against_the_library(path: Path, layout, weights, scales: dict[str, float]) -> None:
    """Every key is accounted for, and what it holds is what the library's torch backend gives for it."""
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        mids = {key for key in keys if key.endswith(".lora_mid.weight")}
        used = {layer.name for layer in layout.layers} | set(layout.alphas.values()) | mids
        assert used <= keys
        assert sum(layout.ignored.values()) == len(keys - used)
        assert sum(columns.stop - columns.start for columns in layout.columns) == len(weights)
        for layer, columns in zip(layout.layers, layout.columns, strict=True):
            tensor = file.get_tensor(layer.name)
            assert layer.role == role_in(layer.name)
            mid = layer.name.replace(".lora_down.", ".lora_mid.")
            if mid in mids and layer.role == "down":
                tensor = torch.tensordot(file.get_tensor(mid).double(), tensor.double().flatten(1), dims=([1], [0]))
                tensor = tensor.movedim(-1, 1)  # (r, in, kernel ...)
                torch.testing.assert_close(
                    torch.from_numpy(weights[columns]), tensor.float().flatten(), rtol=1e-6, atol=0
                )
            else:
                assert weights[columns].tolist() == tensor.float().flatten().tolist()
            assert layer.shape == tuple(tensor.flatten(1).shape)
            assert torch.isfinite(torch.from_numpy(weights[columns])).all()
            if layer.role == "down":
                key = layout.alphas.get(layer.module)
                alpha = float(file.get_tensor(key).double()) if key else 0.0
                assert scales[layer.module] == (alpha / tensor.shape[0] if alpha else 1.0)


def role_in(key: str) -> str:
    """The last word of a key that can be a role."""
    words = key.replace("_", ".").replace(":", ".").split(".")
    return {"A": "down", "B": "up"}.get(last := [w for w in words if w in ("down", "up", "A", "B")][-1], last)


@pytest.mark.parametrize(
    "count", [pytest.param(2_000, id="2,000"), pytest.param(40_000, id="40,000", marks=pytest.mark.slow)]
)
def test_a_mutated_file_is_refused_in_words_or_read_as_the_library_reads_it(tmp_path, capsys, count):
    path = tmp_path / "zoo" / "a" / "x.safetensors"
    path.parent.mkdir(parents=True)
    outcomes: dict[str, Counter] = {mutate.__name__: Counter() for mutate in MUTATORS}
    slowest, accepted = 0.0, []
    for kind, mutant in mutants(seed=count, count=count):
        start = time.perf_counter()
        outcome = read(tmp_path / "zoo", path, mutant)
        slowest = max(slowest, time.perf_counter() - start)
        outcomes[kind][outcome] += 1
        if outcome == "accepted":
            accepted.append(mutant)
    with capsys.disabled():
        total = sum(outcomes.values(), Counter())
        print(
            f"\n{total.total()} mutated files: {total['refused']} refused, {total['accepted']} accepted as the library"
        )
        print(f"reads them, 0 tracebacks, the slowest {slowest:.2f} s; refused and accepted by kind:")
        print("; ".join(f"{kind} {found['refused']} {found['accepted']}" for kind, found in outcomes.items()))
    assert total.total() == count
    assert min(found["refused"] for kind, found in outcomes.items() if kind != "flip_in_data") > count // 100
    assert outcomes["truncated"]["accepted"] == 0
    assert total["accepted"] > count // 50
    for i, mutant in enumerate(accepted[:: max(1, 100 * len(accepted) // count)]):
        path.write_bytes(mutant)
        found = extraction.extract(index_collection(tmp_path / "zoo"), FEATURES, tmp_path / f"{i}", torch.device("cpu"))
        assert all(np.isfinite(found.load(name)).all() for name in FEATURES)


@pytest.mark.parametrize("name", ["diffusers", *(pytest.param(n, marks=pytest.mark.slow) for n in list(WHOLE)[1:])])
def test_every_truncation_is_refused_as_an_incomplete_download(tmp_path, capsys, name):
    path = tmp_path / "a" / "x.safetensors"
    path.parent.mkdir()
    for length in range(len(WHOLE[name])):
        path.write_bytes(WHOLE[name][:length])
        with pytest.raises(CollectionError) as error:
            index_collection(tmp_path)
        assert error.value.findings[0].startswith(f"{path}: incomplete download: has {length} bytes, ")
    assert read(tmp_path, path, WHOLE[name]) == "accepted"
    with capsys.disabled():
        print(f"\n{len(WHOLE[name])} truncations of a file of {name}, each refused as an incomplete download")
