"""What is wrong with a file, in words: damage, hostile headers, pickles, and layers that make no pairs."""

import io
import json
import os
import pickle
import re
import tracemalloc

import pytest
import torch
from headers import WHOLE, Q, file_of, header_of, load_weights, pair, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from making import lora, module_names, write_lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from loras import headers, lora_files
from loras.keys import LoraFileError, canonical_module
from loras.lora_files import parse_header, read_alphas, read_header, read_weights

# ----------------------------------------------------------------------------------------------------------------------
# Scales, shapes, dtypes
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Entries, and the library's word on them
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    [
        None,
        True,
        7,
        "F32",
        [],
        ["F32", [2, 8], [0, 64]],  # which the library takes for an object
        {},
        ENTRY | {"dtype": 7},
        ENTRY | {"dtype": None},
        ENTRY | {"shape": None},
        ENTRY | {"shape": "28"},
        ENTRY | {"shape": {"2": 8}},
        ENTRY | {"shape": [2, "8"]},
        ENTRY | {"shape": [2, 8.0]},
        ENTRY | {"shape": [True, 16]},
        ENTRY | {"shape": [-2, -8]},
        ENTRY | {"shape": [2**63, 0]},
        ENTRY | {"shape": [[2], 8]},
        ENTRY | {"data_offsets": None},
        ENTRY | {"data_offsets": [0]},
        ENTRY | {"data_offsets": [0, 64, 64]},
        ENTRY | {"data_offsets": [0, "64"]},
        ENTRY | {"data_offsets": [False, 64]},
        ENTRY | {"data_offsets": [0, 64.0]},
        ENTRY | {"data_offsets": {"0": 64}},
        ENTRY | {"data_offsets": [-64, 0]},
    ],
)
@pytest.mark.parametrize("key", [f"{Q}.lora.down.weight", f"{Q}.alpha", "beside"])
def test_an_entry_that_is_no_tensor_is_refused_whatever_it_is_called(tmp_path, odd, key):
    entries = {f"{Q}.lora.down.weight": ENTRY, f"{Q}.lora.up.weight": ENTRY} | {key: odd}
    header = json.dumps(entries).encode()
    with pytest.raises(LoraFileError, match=r"^its header has no type, shape and place for .*\. Download it again\.$"):
        parse_header(header)
    fault(tmp_path / "x.safetensors", file_of(header, bytes(64 * len(entries))))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"1",
        b'"x"',
        b"nul",
        b"{",
        b"",
        b"\xff",
        b'{"a":' * 50_000,
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"__metadata__":[1]}',
        b'{"a":{},"__metadata__":[1]}',
        b'{"a":{},"__metadata__":1e999}',
        b'{"a":{},"a":{}}',
        b'{"__metadata__":{"lora_adapter_metadata":"{\\"unet.init_lora_weights\\":\\"\\\\ud800\\"}"}}',
        b'{"\\ud800.lora_A.weight":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]}}',
        b'{"a\\u202e.lora_A.weight":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]}}',
        b'{"a\\u2028.lora_A.weight":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]}}',
    ],
)
def test_a_header_that_is_no_header_is_refused_also_without_the_library(header):
    with pytest.raises(LoraFileError) as error:
        parse_header(header)
    assert str(error.value).isprintable() and str(error.value).isascii()


def test_half_a_surrogate_in_a_configuration_of_the_header_is_refused():
    text = json.dumps({"unet.lora_alpha": 8, "unet.init_lora_weights": "\ud800"})
    data = save(lora(1), {"lora_adapter_metadata": text})
    with pytest.raises(LoraFileError, match="lora_adapter_metadata is not readable"):
        parse_header(header_of(data))


def accepted_by_the_library(path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except (SafetensorError, ValueError):
        return False


@settings(deadline=None, max_examples=100)
@given(header=mutated_headers())
def test_a_header_is_read_if_the_library_reads_the_file(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "judged.safetensors"
    path.write_bytes(file_of(header, WHOLE[8 + len(header_of(WHOLE)) :]))
    try:
        accepted = bool(read_header(path))
    except LoraFileError:
        accepted = False
    assert accepted == accepted_by_the_library(path)


def test_the_library_maps_no_file_that_others_can_truncate(tmp_path, monkeypatch):
    """Whatever becomes of the file then, it is never mapped: no signal can end the process."""
    path, opened, original = tmp_path / "x.safetensors", [], headers.safe_open
    path.write_bytes(save(lora(2), {"odd": "odd"}))

    def open_and_truncate(name, *rest):
        os.truncate(path, 0)
        opened.append((os.stat(name).st_dev, os.stat(name).st_ino))
        return original(name, *rest)

    own = path.stat().st_dev, path.stat().st_ino
    monkeypatch.setattr(headers, "_accepted", set())
    monkeypatch.setattr(headers, "safe_open", open_and_truncate)
    header = parse_header(read_header(path))
    assert opened and own not in opened
    with pytest.raises(LoraFileError, match="changed since it was indexed"):
        read_weights(path, header)


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def test_only_what_the_pairs_need_is_read(tmp_path):
    """A sparse tensor of 64 GiB lies beside them, in front of all of their data."""
    pairs = lora(2) | {f"{module_names(1)[0]}.alpha": torch.tensor(3.0)}
    header, body = json.loads(header_of(save(pairs))), save(pairs)[8 + len(header_of(save(pairs))) :]
    large = 2**36
    moved = {key: e | {"data_offsets": [large + at for at in e["data_offsets"]]} for key, e in header.items()}
    new = json.dumps({"bundle": {"dtype": "U8", "shape": [large], "data_offsets": [0, large]}} | moved).encode()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(new).to_bytes(8, "little") + new)
        file.seek(large, os.SEEK_CUR)
        file.write(body)
    tracemalloc.start()
    try:
        contents = read_weights(path, parse_header(read_header(path)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2**21
    wanted, alphas = load_weights(save(pairs), parse_header(header_of(save(pairs))))
    assert contents.weights.tolist() == wanted.tolist() and contents.alphas == alphas


def test_a_digest_is_of_all_that_is_read_and_of_nothing_else(tmp_path):
    tensors = lora(2) | {f"{module_names(1)[0]}.alpha": torch.tensor(3.0), "beside": torch.zeros(4)}

    def digest(tensors: dict, metadata: dict | None = None, kept: int = 2) -> str:
        path = write_lora(tmp_path / "x.safetensors", tensors)
        path.write_bytes(save(tensors, metadata))
        header = parse_header(read_header(path))
        return read_weights(path, header.keeping(frozenset(header.layout.modules[:kept]))).digest

    first = digest(tensors)
    assert digest(tensors) == first == digest(tensors | {"beside": torch.ones(4)})
    others = [digest(tensors | {key: tensor + 1}) for key, tensor in tensors.items() if key != "beside"]
    others += [digest(tensors, {"a": "b"}), digest(tensors, kept=1)]
    assert len({first, *others}) == len(others) + 1


@pytest.mark.parametrize("become", ["nothing", "a pipe", "a folder", "shorter", "another"])
def test_a_file_that_became_another_thing_is_an_error_in_words(tmp_path, become):
    path = write_lora(tmp_path / "x.safetensors", lora(2))
    header = parse_header(read_header(path))
    whole = path.read_bytes()
    path.unlink()
    if become == "a pipe":
        os.mkfifo(path)
    elif become == "a folder":
        path.mkdir()
    elif become != "nothing":
        path.write_bytes(whole[:-1] if become == "shorter" else save(lora(1)))
    for read in (read_weights, read_alphas if become in ("nothing", "a pipe", "a folder") else read_weights):
        with pytest.raises((LoraFileError, OSError)):
            read(path, header)


def test_reading_in_parts_gives_the_same(tmp_path, monkeypatch):
    tensors = {key: tensor.to(dtype) for dtype, (key, tensor) in zip(
        (torch.float32, torch.bfloat16, torch.float64, torch.float8_e5m2), lora(2).items(), strict=True)}  # fmt: skip
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors))
    header = parse_header(read_header(path))
    whole = read_weights(path, header)
    monkeypatch.setattr(lora_files, "CHUNK_NUMBERS", 7)
    assert read_weights(path, header).weights.tolist() == whole.weights.tolist()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: pread(file, min(size, 3), start))
    assert read_weights(path, header).weights.tolist() == whole.weights.tolist()
