"""Headers and small LoRA files as bytes, for tests."""

import tempfile

import numpy as np
import pytest
import torch
from making import lora
from safetensors.torch import save

from loras.lora_files import Header, Layout, LoraFileError, parse_header, read_weights

WHOLE, WHOLE_OF_TWO = save(lora(1)), save(lora(2))
Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def layout_of(tensors: dict) -> Layout:
    return parse_header(header_of(save(tensors))).layout


def load_weights(data: bytes | np.ndarray, header: Header) -> tuple[np.ndarray, dict[str, float]]:
    """Weights and alphas of a file, given its bytes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        contents = read_weights(file.name, header)
    return contents.weights, contents.alphas


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def file_of(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def pair(module: str = Q, rank: int = 2, down: str = "lora.down", up: str = "lora.up") -> dict:
    """A diffusers pair of a module from 6 to 8 features."""
    return {f"{module}.{down}.weight": torch.ones(rank, 6), f"{module}.{up}.weight": torch.ones(8, rank)}


def refusal(tensors: dict) -> str:
    with pytest.raises(LoraFileError) as error:
        layout_of(tensors)
    return str(error.value)
