"""What is wrong with a file, in words: damage, hostile headers, pickles, and layers that make no pairs."""

import io
import json
import os
import pickle
import re
import tracemalloc

import pytest
import torch
from headers import WHOLE, Q, file_of, header_of, pair, refusal
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
