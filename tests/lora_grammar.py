"""LoRA files by a grammar, for tests: modules of every family, what writers put beside them, and what may go wrong."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

# ----------------------------------------------------------------------------------------------------------------------
# Sound files
# ----------------------------------------------------------------------------------------------------------------------

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_TORCH = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
_NORMAL = torch.randn(4096, generator=torch.Generator().manual_seed(0))
NUMBERS = {
    name: _NORMAL.to(dtype).view(torch.uint8).numpy().tobytes() for name, dtype in zip(BYTES, _TORCH, strict=True)
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as it stands in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, Tensor]
Numbers = Callable[..., Tensor]  # shape -> a tensor of normal numbers


@dataclass(frozen=True)
class Made:
    """A file, adapter_config.json beside it, and whether it is to be read.

    Of a sparse file ``sparse`` bytes of holes follow; ``later`` stands in its place when its weights are read.
    """

    contents: bytes
    config: bytes | None = None
    sound: bool = False
    sparse: int = 0
    later: bytes | None = None


def numbers_of(draw: random.Random, dtype: str) -> Numbers:
    def numbers(*shape: int) -> Tensor:
        size, start = BYTES[dtype] * math.prod(shape), BYTES[dtype] * draw.randrange(1000)
        return Tensor(dtype, shape, NUMBERS[dtype][start : start + size])

    return numbers


def scalar(value: float) -> Tensor:
    return Tensor("F32", (), torch.tensor(value).numpy().tobytes())


PAIRS = {  # style -> keys of a down and an up of module {m} with number {n}, {u} with underscores
    "diffusers": ("unet.{m}.lora.down.weight", "unet.{m}.lora.up.weight"),
    "text encoder": ("text_encoder.{m}.lora_linear_layer.down.weight", "text_encoder.{m}.lora_linear_layer.up.weight"),
    "legacy": ("{m}.processor.to_q_lora.down.weight", "{m}.processor.to_q_lora.up.weight"),
    "PEFT": ("base_model.model.{m}.lora_A.weight", "base_model.model.{m}.lora_B.weight"),
    "new diffusers": ("unet.{m}.lora_A.weight", "unet.{m}.lora_B.weight"),
    "adapter name": ("base_model.model.{m}.lora_A.default.weight", "base_model.model.{m}.lora_B.default.weight"),
    "bare": ("diffusion_model.{m}.lora_A", "diffusion_model.{m}.lora_B"),
    "kohya": ("lora_unet_{u}.lora_down.weight", "lora_unet_{u}.lora_up.weight"),
    "XLabs": ("double_blocks.{n}.processor.qkv_lora1.down.weight", "double_blocks.{n}.processor.qkv_lora1.up.weight"),
    "cloneofsimo": ("unet:{n}:down", "unet:{n}:up"),
    "numbered": ("lora.down.weight.{n}", "lora.up.weight.{n}"),
}
OF_GROUPS = ("PEFT", "new diffusers", "adapter name", "bare")
OF_CONVOLUTIONS = (*OF_GROUPS, "diffusers", "kohya")


@dataclass(frozen=True)
class Sides:
    """Rank, inputs, outputs."""

    r: int
    i: int
    o: int


def module_name(number: int) -> str:
    return f"down_blocks.{number}.attentions.0.to_k"


def keys_of(style: str, number: int) -> tuple[str, str]:
    name = module_name(number)
    down, up = (key.format(m=name, u=name.replace(".", "_"), n=number) for key in PAIRS[style])
    return down, up


def linear(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
    down, up = keys_of(style, number)
    return {down: numbers(sides.r, sides.i), up: numbers(sides.o, sides.r)}


def convolution(dimensions: int, groups: int = 1) -> Callable:
    def make(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
        down, up = keys_of(style, number)
        r, kernel, one = sides.r * groups, (3, 2, 1)[:dimensions], (1,) * dimensions
        o = sides.o * groups
        return {down: numbers(r, sides.i, *kernel), up: numbers(o, r // groups, *one)}

    return make


def tucker(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
    down, up = keys_of("kohya", number)
    r, i, o = sides.r, sides.i, sides.o
    mid = down.replace("lora_down", "lora_mid")
    return {down: numbers(r, i, 1, 1), up: numbers(o, r, 1, 1), mid: numbers(r, r, 3, 3)}


def embedding(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
    name = f"base_model.model.model.embed_tokens_{number}.lora_embedding_"
    return {name + "A": numbers(sides.r, sides.i), name + "B": numbers(sides.o, sides.r)}


def mlx(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
    name = f"model.layers.{number}.self_attn.q_proj.lora_"
    return {name + "a": numbers(sides.i, sides.r), name + "b": numbers(sides.r, sides.o)}


def loha(core: bool) -> Callable:
    def make(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
        name, (r, i, o) = f"lora_unet_{number}_hadamard.hada_", (sides.r, sides.i, sides.o)
        a = (r, o) if core else (o, r)
        parts = {"w1_a": numbers(*a), "w1_b": numbers(r, i), "w2_a": numbers(*a), "w2_b": numbers(r, i)}
        if core:
            parts |= {"t1": numbers(r, r, 3, 3), "t2": numbers(r, r, 3, 3)}
        return {name + part: tensor for part, tensor in parts.items()}

    return make


def lokr(first: bool, second: str) -> Callable:
    """``first``: the left factor is whole; the second is "whole", "pair", "core" or of a "kernel"."""

    def make(style: str, number: int, sides: Sides, numbers: Numbers) -> Tensors:
        name, (r, i, o) = f"lycoris_{number}_kronecker.lokr_", (sides.r, sides.i, sides.o)
        parts = {"w1": numbers(2, 3)} if first else {"w1_a": numbers(2, r), "w1_b": numbers(r, 3)}
        parts |= {
            "whole": lambda: {"w2": numbers(o, i)},
            "kernel": lambda: {"w2": numbers(o, i, 3, 3)},
            "pair": lambda: {"w2_a": numbers(o, r), "w2_b": numbers(r, i)},
            "core": lambda: {"t2": numbers(r, r, 3, 3), "w2_a": numbers(r, o), "w2_b": numbers(r, i)},
        }[second]()
        return {name + part: tensor for part, tensor in parts.items()}

    return make


KINDS: dict[str, Callable] = {
    "linear": linear,
    **{f"convolution {d}-d": convolution(d) for d in (1, 2, 3)},
    "grouped": convolution(2, groups=2),
    "grouped 1-d": convolution(1, groups=3),
    "tucker": tucker,
    "embedding": embedding,
    "mlx": mlx,
    "LoHa": loha(core=False),
    "LoHa with cores": loha(core=True),
    **{f"LoKr {first} {second}": lokr(first, second) for first in (True, False) for second in ("whole", "pair")},
    "LoKr True core": lokr(True, "core"),
    "LoKr False kernel": lokr(False, "kernel"),
}
TRANSPOSED = ("mlx",)


def beside(draw: random.Random, numbers: Numbers) -> Tensors:
    """Return what writers put beside pairs, which is counted and not read."""
    some = {
        "<concept>": numbers(3, 4),
        "unet.norm.lora_B.bias": numbers(4),
        "diffusion_model.blocks.0.norm3.diff": numbers(5),
        "diffusion_model.blocks.0.self_attn.q.diff_b": numbers(5),
        "lora_unet_norm.w_norm": numbers(4),
        "lora_unet_norm.b_norm": numbers(4),
        "bundle_emb.lora word.string_to_param.*": numbers(2, 3),
        "base_model.model.classifier.modules_to_save.default.weight": numbers(2, 3),
        "lora_unet_down_blocks_0_attentions_0_to_k.dora_scale": numbers(4, 1),
    }
    return {key: some[key] for key in draw.sample(list(some), draw.randint(1, 3))}


REFUSED: dict[str, tuple[str, tuple[int, ...]]] = {  # a tensor of a family that no pair can be read from
    "OFT": ("lora_unet_a.oft_blocks", (2, 2, 2)),
    "OFT of PEFT": ("base_model.model.a.oft_R.default.weight", (2, 3)),
    "BOFT": ("base_model.model.a.boft_R", (1, 2, 2, 2)),
    "GLoRA": ("lora_unet_a.a1.weight", (2, 3)),
    "AdaLoRA": ("base_model.model.a.lora_E", (2, 1)),
    "IA3": ("base_model.model.a.ia3_l", (3, 1)),
    "VeRA": ("base_model.model.a.vera_lambda_b", (4,)),
    "RandLoRA": ("base_model.model.a.randlora_lambda", (2, 4)),
    "VB-LoRA": ("base_model.model.a.vblora_logits_A", (2, 3, 4)),
    "FourierFT": ("base_model.model.a.fourierft_spectrum.default", (9,)),
    "full difference": ("a.b.diff", (3, 4)),
    "mangled": ("lora_unet_down_blocks_0_lora_down.weight", (2, 3)),
}


def file_of(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def saved(tensors: Tensors, metadata: dict | None = None) -> bytes:
    """A safetensors file, its tensors in this order."""
    entries: dict = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for key, tensor in tensors.items():
        entries[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, start + len(tensor.data)]}
        start += len(tensor.data)
    return file_of(as_json(entries), b"".join(tensor.data for tensor in tensors.values()))


def as_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def stated(draw: random.Random, kinds: list[str], sides: Sides) -> tuple[dict | None, dict | None]:
    """Metadata and adapter_config.json as writers fill them; the oracle knows what scale these mean."""
    alpha = draw.choice([1, 2, 8, 0.5, 3.25])
    names = {"format": "pt", "ss_tag_frequency": '{"a": {"b": 1}}'}
    if "mlx" in kinds:
        parameters = {"rank": sides.r, "scale": draw.choice([20.0, 10, 0.5]), "dropout": 0.0}
        return None, {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    config = {"peft_type": "LORA", "r": sides.r, "lora_alpha": alpha, "use_rslora": draw.random() < 0.3}
    plain = {"ss_network_dim": f"{sides.r}", "ss_network_alpha": f"{alpha}"}
    patterns = {"alpha_pattern": {module_name(0): 5}, "target_modules": ["to_k"], "bias": "none"}
    by_component = {f"unet.{name}": value for name, value in config.items()}
    return draw.choice(
        [
            (None, None),
            (names, None),
            (names | plain, None),
            (names, config),
            (None, config | patterns),
            (names | {"lora_adapter_metadata": json.dumps(by_component)}, None),
            (names | {"lora_adapter_metadata": json.dumps(config | patterns)}, None),
        ]
    )


def sound_file(draw: random.Random) -> tuple[Tensors, dict | None, dict | None]:
    """Tensors, metadata and configuration of a file that is as it should be."""
    sides = Sides(draw.choice([1, 1, 2, 3]), draw.randint(9, 12), draw.randint(9, 12))
    numbers = numbers_of(draw, draw.choice(list(BYTES)))
    kinds = draw.choice([["linear"], ["linear", "linear"], [draw.choice(list(KINDS))], draw.choices(list(KINDS), k=3)])
    if "mlx" in kinds:
        kinds = ["mlx"] * len(kinds)
    style, tensors = draw.choice(list(PAIRS)), {}
    for number, kind in enumerate(kinds):
        own, styles = style, OF_GROUPS if "grouped" in kind else OF_CONVOLUTIONS if "convolution" in kind else PAIRS
        if own not in styles:
            own = draw.choice(styles)
        tensors |= KINDS[kind](own, number, sides, numbers)
    if draw.random() < 0.3 and "mlx" not in kinds:
        tensors |= alphas(draw, tensors)
    if draw.random() < 0.3:
        tensors |= beside(draw, numbers)
    metadata, config = stated(draw, kinds, sides)
    if any(word in kind for kind in kinds for word in ("grouped", "LoKr", "LoHa")):  # of other ranks than the file's
        metadata, config = None, None
    keys = list(tensors)
    if draw.random() < 0.5:
        draw.shuffle(keys)
    return {key: tensors[key] for key in keys}, metadata, config


def alphas(draw: random.Random, tensors: Tensors) -> Tensors:
    """An alpha for each module of a style that has them, under the module's name or beside its factors."""
    value, found = draw.choice([1.0, 4.0, 0.5, 0.0]), {}
    for key in tensors:
        for end in (".lora_down.weight", ".lora.down.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a"):
            if key.endswith(end):
                module = key.removesuffix(end)
                found[module + draw.choice([".alpha", ".lora.alpha"] if ".lora.down" in key else [".alpha"])] = value
    return {key: scalar(value) for key, value in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# What may happen to them
# ----------------------------------------------------------------------------------------------------------------------


def parts(whole: bytes) -> tuple[bytes, bytes]:
    """Header and data of a file."""
    end = 8 + int.from_bytes(whole[:8], "little")
    return whole[8:end], whole[end:]


def flip(draw: random.Random, contents: bytes, start: int, stop: int) -> bytes:
    """One to four bits are others, between two bytes."""
    changed = bytearray(contents)
    for _ in range(draw.randint(1, 4) if stop > start else 0):
        changed[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_in_length(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    return flip(draw, whole, 0, 8)


def flip_in_header(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    return flip(draw, whole, 8, 8 + len(parts(whole)[0]))


def flip_in_data(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    return flip(draw, whole, 8 + len(parts(whole)[0]), len(whole))


def truncated(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    return whole[: draw.randrange(len(whole))]


def spliced(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    """Some bytes of this or another file stand in the place of some others; half of the time the length is right."""
    source = draw.choice([whole, draw.choice(pool).contents])
    start, at = draw.randrange(len(source)), draw.randrange(len(whole))
    piece = draw.choice([source[start : start + draw.randint(0, 40)], draw.randbytes(draw.randint(1, 9))])
    changed = whole[:at] + piece + whole[at + draw.choice([0, len(piece), draw.randint(0, 40)]) :]
    header, _ = parts(whole)
    if 8 <= at < 8 + len(header) and draw.random() < 0.5:
        grown = len(changed) - len(whole)
        return max(0, len(header) + grown).to_bytes(8, "little") + changed[8:]
    return changed


def swapped_headers(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    """The header of another file, a header that stands twice, or both files one after the other."""
    header, body = parts(whole)
    other, other_body = parts(draw.choice(pool).contents)
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


def hostile_value(draw: random.Random) -> bytes:
    """A JSON value of metadata that is huge, nested, doubled, of other types, or not even text."""
    deep = draw.choice([20, 126, 127, 128, 129, 5_000])
    odd = draw.choice(["1e300", "-1e300", "NaN", "inf", "1e-320", "9" * 400, "0", "-0.0", "0x10", "1_0", "٣", "\u202e"])
    fields = {draw.choice(["ss_network_alpha", "lora_alpha", "alpha"]): odd, draw.choice(["ss_network_dim", "r"]): "2"}
    large = [
        lambda: as_json({"lora_adapter_metadata": hostile_config(draw).decode("utf-8", "replace")}),
        lambda: as_json({"lora_adapter_metadata": hostile_config(draw).decode("utf-8", "replace")}),
        lambda: as_json(fields),
        lambda: b'{"a":"%s"}' % (b"x" * draw.choice([10, 10**4, 10**6])),
        lambda: b"{%s}" % b",".join(b'"%d":"\\u0022}"' % i for i in range(draw.choice([2, 2_000]))),
        lambda: b'{"a":' * deep + b"1" + b"}" * deep,
        lambda: b"[" * deep + b"]" * deep,
        lambda: b'{"a":"%s"}' % (b"[" * deep),
    ]
    small = [
        *(b'{"a":"\\ud800"}', b'{"a":"\\udfff\\ud800"}', b'{"a":"\\ud83d\\ude00\\u0000"}', b'{"\\u202e":"\\u2028"}'),
        *(b'{"a":"%s"}' % draw.randbytes(4), b'{"a":"\xff\xfe\x00"}', b"-" + b"9" * 5000, b'"},"', b"null", b"[]"),
        *(b'{"a":"b","a":"c"}', b'{"a":1}', b'{"a":null}', b'{"a":["b"]}', b'{"":""}', b"1e999"),
        *(b'{"__metadata__":"x"}', b'{ "a" :\n"}" , "b":"{\\"c\\":[" }'),
    ]
    return draw.choice(small) if draw.random() < 0.5 else draw.choice(large)()


def hostile_metadata(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    header, body = parts(whole)
    rest = as_json({key: entry for key, entry in json.loads(header).items() if key != "__metadata__"})[1:]
    value = hostile_value(draw)
    name = draw.choice(
        [b'"__metadata__"', b'"__metadata__"', b'"__metadata__" ', b'"\\u005f_metadata__"', b'"metadata"']
    )
    if draw.random() < 0.3:
        return file_of(b"{" + rest.rstrip()[:-1] + b"," + name + b":" + value + b"}", body)
    return file_of(b"{" + name + b":" + value + draw.choice([b",", b",", b" ,\n", b""]) + rest, body)


NAMES = [
    *(f"unet.a.{name}" for name in ("to_q.lora.down.weight", "to_q.lora.up.weight", "lora_A.weight", "lora_B.weight")),
    *("m.a.lora_A.style.weight", "m.a.lora_B.style.weight", "a.lora_A", "lora.down.weight.7", "unet:3:up", "x.alpha"),
    *("lora_unet_a.lora_mid.weight", "lora_unet_a.hada_w1_a", "x.diff", "lora_unet_x_lora_down.weight", "<a>", ""),
    *("\n.lora.down.weight", "\x1b[2J.lora.up.weight", "\u202e", "\x00", "x" * 2000 + ".lora.down.weight", "é.lora_B"),
    *("..lora.down.weight", "a.modules_to_save.b", "lora", "unet.a.to_q.lora.down.weight\n", "__metadata__"),
    *("\ud800.lora_A.weight", "\u2028.lora_B.weight", "a.lora_a", "a.lora_b", "a.lora_embedding_A", "a.lokr_w1"),
    *(name for name, _ in REFUSED.values()),
]
WORDS = [
    ("down", "up"),
    ("up", "down"),
    ("_A", "_B"),
    ("lora", "Lora"),
    (".", "_"),
    ("w1", "w2"),
    ("_a", "_b"),
    ("weight", "alpha"),
]


def renamed_keys(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    """Keys trade their names, take another's or an odd one."""
    header, body = parts(whole)
    pairs = list(json.loads(header).items())
    for _ in range(draw.randint(1, 2)):
        i, j = draw.randrange(len(pairs)), draw.randrange(len(pairs))
        name, entry = pairs[i]
        if draw.random() < 0.4:
            pairs[i], pairs[j] = (pairs[j][0], entry), (name, pairs[j][1])
        else:
            pairs[i] = (draw.choice([name.replace(*draw.choice(WORDS)), *draw.sample(NAMES, 2)]), entry)
    draw.shuffle(pairs)
    escaped = draw.random() < 0.5
    written = (f"{json.dumps(key, ensure_ascii=escaped)}:{json.dumps(value)}" for key, value in pairs)
    return file_of(("{" + ",".join(written) + "}").encode("utf-8", "surrogatepass"), body)


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "I16", "I8", "U8", "BOOL"]
ODD = [None, True, -1, 0, 0.5, 1e300, 2**32, 2**63, 2**64, 10**4000, "", "F9", [], {}, [1], [0, 2**60], [-8, 8], [[]]]


def changed_entries(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    """Types, shapes and places of tensors are others: of equal size, traded, overlapping, negative or absurd."""
    header, body = parts(whole)
    entries = json.loads(header)
    tensors = [value for key, value in entries.items() if key != "__metadata__"]
    for _ in range(draw.randint(1, 2)):
        entry, other = draw.choice(tensors), draw.choice(tensors)
        field = draw.choice(["dtype", "shape", "data_offsets"])
        kind = draw.randrange(6)
        if kind == 0:
            entry[field], other[field] = other.get(field), entry.get(field)
        elif kind == 1:
            entry["dtype"] = draw.choice(DTYPES)
        elif kind == 2 and isinstance(entry.get("shape"), list):
            shape = entry["shape"]
            entry["shape"] = draw.choice([shape[::-1], [*shape, 1], [2**32, 2**32], shape[1:], [1, *shape]])
        elif kind == 3:
            start = draw.randrange(len(body))
            places = [[start, start + 24], [-start, start], [start, 0], [start + 2**63, 2**64]]
            entry["data_offsets"] = draw.choice(places)
        elif kind == 4:
            entry[draw.choice([field, "more"])] = draw.choice(ODD)
        else:
            entries[draw.choice(list(entries))] = draw.choice([*ODD, list(entry.values()), [entry], "x"])
    return file_of(as_json(entries), body)


def doubled_key(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    """A key stands twice, with this entry or another's."""
    header, body = parts(whole)
    entries = json.loads(header)
    key = draw.choice(list(entries))
    again = b"," + as_json(key) + b":" + as_json(entries[draw.choice([key, draw.choice(list(entries))])]) + b"}"
    return file_of(header.rstrip()[:-1] + again, body)


def odd_numbers(draw: random.Random, whole: bytes, pool: list[Made]) -> bytes:
    """Some numbers are zero, huge, tiny, infinite or none."""
    header, body = parts(whole)
    changed = bytearray(body)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(max(1, len(body) // 4)) * 4
        changed[at : at + 4] = draw.choice(
            [bytes(4), b"\xff\xff\x7f\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x01\x00\x00\x00", b"\xff" * 4]
        )
    return file_of(header, bytes(changed[: len(body)]))


BYTE_MUTATORS: list[Callable[[random.Random, bytes, list[Made]], bytes]] = [
    flip_in_length,
    flip_in_header,
    flip_in_data,
    truncated,
    spliced,
    swapped_headers,
    hostile_metadata,
    renamed_keys,
    changed_entries,
    doubled_key,
    odd_numbers,
]


def hostile_config(draw: random.Random) -> bytes:
    """An adapter_config.json that is no JSON, no object, or full of what is no number."""
    deep = draw.choice([10, 2_000, 100_000])
    odd = draw.choice(
        [*ODD[:-1], 16, "16", "0x1", "true", "false", "NaN", "\ud800", "\u202e", float("nan"), [2], {"a": 1}]
    )
    field = draw.choice(
        ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_parameters", "use_dora"]
    )
    pattern = draw.choice(
        ["(a+)+$", "(", ".*" * 50, "to_k", "", "\ud800", "x" * 10_000, "(?P<a>x)", "[" * 100, "a|b|to_k"]
    )
    document = {"peft_type": draw.choice(["LORA", "LOHA", None, 3]), "r": 2, "lora_alpha": 8, field: odd}
    with_pattern = document | {"alpha_pattern": {pattern: odd}, "target_parameters": odd, "init_lora_weights": odd}
    large = [  # made only where they are drawn
        lambda: b'{"r":' * deep + b"1" + b"}" * deep,
        lambda: b"[" * deep,
        lambda: b'{"a":"%s"}' % (b"x" * draw.choice([10, 3 * 2**20])),
        lambda: b'{"lora_alpha":%s,"r":2}' % (b"9" * 5_000),
    ]
    small = [
        *(b"", b"null", b"[]", b'"x"', b"3", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"NaN", b"\x00" * 100),
        *(b'{"lora_alpha":1e999,"r":2}', b'{"lora_alpha":-Infinity,"r":2}', b'{"r":2,"r":4,"lora_alpha":1}'),
    ]
    kind = draw.randrange(4)
    if kind < 2:
        return as_json(draw.choice([document, with_pattern]))
    return draw.choice(small) if kind == 2 else draw.choice(large)()


SPARSE = 3 * 2**29  # bytes: more than any test may hold


def giant(draw: random.Random, made: Made) -> Made:
    """A tensor of gigabytes that no pair needs, all holes; or a pair of that size."""
    header, body = parts(made.contents)
    entries = json.loads(header)
    key = draw.choice(
        ["unet.big.weight", "text.modules_to_save.x", "<big>", "m.lora_A.weight", "a.alpha", "z.hada_w1_a"]
    )
    size = SPARSE // 4
    shape = draw.choice([[size], [4, size // 4], [size // 4, 4], [2, 2, 2, size // 8]])
    entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + SPARSE]}
    return replace(made, contents=file_of(as_json(entries), body), sparse=SPARSE, sound=False)


def changed_later(draw: random.Random, made: Made, pool: list[Made]) -> Made:
    """Between its header and its weights a file becomes shorter, longer, another, or is gone."""
    whole = made.contents
    later = draw.choice(
        [whole[:-1], whole[: draw.randrange(len(whole))], b"", whole + b"x", draw.choice(pool).contents]
    )
    return replace(made, later=later, sound=False)


def of_refused_family(draw: random.Random, made: Made) -> Made:
    """A tensor of a family that no pair can be read from, alone or beside what the file has."""
    name, shape = draw.choice(list(REFUSED.values()))
    numbers = numbers_of(draw, "F32")
    tensors = {name: numbers(*shape)}
    if draw.random() < 0.5:
        tensors |= linear("diffusers", 0, Sides(2, 3, 4), numbers)
    return Made(saved(tensors), made.config)


def mutants(seed: int, count: int) -> Iterator[tuple[str, Made]]:
    """Files of every kind equally often, one in ten as it should be."""
    draw = random.Random(seed)
    pool = []
    for _ in range(min(count, 3_000) // 4):
        tensors, metadata, config = sound_file(draw)
        pool.append(Made(saved(tensors, metadata), None if config is None else as_json(config), True))
    kinds = ["sound", "sound", *(mutate.__name__ for mutate in BYTE_MUTATORS), "config", "config", "later", "refused"]
    by_name = {mutate.__name__: mutate for mutate in BYTE_MUTATORS}
    for i in range(count):
        kind, made = kinds[i % len(kinds)], draw.choice(pool)
        if i % 200 == 199:
            kind, made = "giant", giant(draw, made)
        elif kind == "config":
            made = replace(made, config=hostile_config(draw), sound=False)
        elif kind == "later":
            made = changed_later(draw, made, pool)
        elif kind == "refused":
            made = of_refused_family(draw, made)
        elif kind != "sound":
            contents = by_name[kind](draw, made.contents, pool)
            if draw.random() < 0.1:
                contents = flip(draw, contents, 0, len(contents))
            made = Made(contents, made.config)
        yield kind, made
