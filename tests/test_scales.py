"""The scale of each update, and its source: alpha tensors, adapter_config.json, the header, nothing."""

import json
import re
import time

import pytest
import torch
from headers import header_of, load_weights, pair
from making import write_lora
from safetensors.torch import save

from loras.keys import LoraFileError
from loras.lora_files import MAX_CONFIG_LENGTH, MAX_FIELDS, parse_header, read_alphas, read_header
from loras.patterns import Rule
from loras.scales import (
    ADAPTER_METADATA,
    CONFIG,
    FIELDS,
    NONE,
    TENSORS,
    Scale,
    count_scales,
    has_unused_fields,
    module_scales,
)

UNET, TEXT = "unet.mid_block.to_q", "text_encoder.text_model.q_proj"
BOTH = pair(UNET, 4) | pair(TEXT, 4)
BY_COMPONENT = {"unet.r": 4, "unet.lora_alpha": 16, "text_encoder.r": 4, "text_encoder.lora_alpha": 8}


def scales_of(tensors: dict, metadata: dict | None = None, config: dict | None = None) -> list[tuple[float, str]]:
    """Scale and source of each module, in the network's order; a value of the metadata that is no text becomes JSON."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in (metadata or {}).items()}
    data = save(tensors, texts or None)
    header = parse_header(header_of(data))
    by_module = module_scales(header, load_weights(data, header)[1], config)
    counted = dict(count_scales(header, config))
    for scale in by_module.values():
        assert (scale if scale.source != TENSORS else Scale(None, TENSORS)) in counted
    assert sum(counted.values()) == len(by_module)
    return [tuple(scale) for scale in by_module.values()]


def adapter(**fields) -> dict:
    return {ADAPTER_METADATA: {name.replace("__", "."): value for name, value in fields.items()}}


# ----------------------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------------------


def test_diffusers_states_scales_by_component():
    assert scales_of(BOTH, {ADAPTER_METADATA: BY_COMPONENT}) == [(2.0, ADAPTER_METADATA), (4.0, ADAPTER_METADATA)]


def test_patterns_of_a_component_name_paths_below_it():
    single = "single_transformer_blocks.0.attn.to_q"
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", 4) | pair(f"transformer.{single}", 8)
    fields = {"transformer__r": 4, "transformer__lora_alpha": 8, "transformer__rank_pattern": {f"^{single}": 8}}
    found = scales_of(tensors, adapter(**fields, transformer__alpha_pattern={single: 2}))
    assert found == [(2.0, ADAPTER_METADATA), (0.25, ADAPTER_METADATA)]


def test_rank_stabilised_scales_are_of_their_component():
    found = scales_of(BOTH, {ADAPTER_METADATA: BY_COMPONENT | {"unet.use_rslora": True}})
    assert [value for value, _ in found] == [2.0, 8.0]
    found = scales_of(BOTH, {ADAPTER_METADATA: BY_COMPONENT | {"unet.use_rslora": "false"}})
    assert [value for value, _ in found] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("module", "fields", "scale"),
    [
        (UNET, {"r": 4, "lora_alpha": 8}, 2.0),  # a model saved by itself: no component in the metadata
        ("mid_block.to_q", {"r": 4, "lora_alpha": 8}, 2.0),
        ("mid_block.to_q", {"unet__r": 4, "unet__lora_alpha": 8, "text_encoder__lora_alpha": 4}, 2.0),
        ("diffusion_model.blocks.0.to_q", {"transformer__r": 4, "transformer__lora_alpha": 8}, 2.0),
        ("transformer.a.to_q", {"transformer__lora_alpha": 8, "transformer_2__lora_alpha": 4}, 2.0),
        ("transformer_2.a.to_q", {"transformer__lora_alpha": 8, "transformer_2__lora_alpha": 4}, 1.0),
        ("text_encoder_2.a.q_proj", {"text_encoder__lora_alpha": 8, "text_encoder_2__lora_alpha": 4}, 1.0),
        ("text_encoder_2.a.q_proj", {"text_encoder__lora_alpha": 8}, None),
        (UNET, {"unet__r": 4}, None),
        (UNET, {"unet__r": None, "unet__lora_alpha": None}, None),
        (UNET, {"unet__lora_dropout": 0.5, "something": [1]}, None),
    ],
)
def test_a_module_has_the_scale_of_its_component(module, fields, scale):
    expected = (1.0, NONE) if scale is None else (scale, ADAPTER_METADATA)
    assert scales_of(pair(module, 4), adapter(**fields)) == [expected]


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"ss_network_alpha": "8.0", "ss_network_dim": "4"}, 2.0),
        ({"ss_network_alpha": "8", "ss_network_dim": "None"}, 2.0),
        ({"lora_alpha": "2", "r": "4"}, 0.5),
        ({"lora_alpha": "2", "r": "4", "use_rslora": "True"}, 1.0),
        ({"alpha": "2", "rank": "4"}, 0.5),
        ({"alpha": "2"}, None),  # may be anything
        ({"rank": "4"}, None),
        ({"ss_network_alpha": "None", "ss_network_dim": "4"}, None),
        ({"lora_alpha": "0", "rank": "4"}, None),
    ],
)
def test_plain_fields_of_the_header(fields, scale):
    expected = (1.0, NONE) if scale is None else (scale, FIELDS)
    assert scales_of(pair(UNET, 4), fields) == [expected]


def test_of_several_sources_the_nearest_to_the_weights_counts():
    plain = {"lora_alpha": "64", "r": "4"}
    metadata = plain | {ADAPTER_METADATA: {"unet.r": 4, "unet.lora_alpha": 32}}
    config = {"lora_alpha": 16, "r": 4}
    tensors = pair(UNET, 4)
    assert scales_of(tensors, plain) == [(16.0, FIELDS)]
    assert scales_of(tensors, metadata) == [(8.0, ADAPTER_METADATA)]
    assert scales_of(tensors, metadata, config) == [(4.0, CONFIG)]
    assert scales_of(tensors, metadata, {"r": 4}) == [(8.0, ADAPTER_METADATA)]  # which states no alpha
    assert scales_of(tensors | {f"{UNET}.alpha": torch.tensor(2.0)}, metadata, config) == [(0.5, TENSORS)]


def test_sources_may_differ_between_modules():
    metadata = {ADAPTER_METADATA: {"unet.lora_alpha": 8}, "lora_alpha": "None"}
    assert scales_of(BOTH, metadata) == [(1.0, NONE), (2.0, ADAPTER_METADATA)]


@pytest.mark.parametrize("place", ["lora", "lora_linear_layer", "lora_down"])
def test_an_alpha_may_stand_beside_the_factors(place):
    assert scales_of(pair(UNET, 4) | {f"{UNET}.{place}.alpha": torch.tensor(1.0)}) == [(0.25, TENSORS)]


def test_two_alphas_of_one_module_are_refused():
    alphas = {f"{UNET}.alpha": torch.tensor(1.0), f"{UNET}.lora.alpha": torch.tensor(2.0)}
    with pytest.raises(LoraFileError, match="two tensors are the alpha of module"):
        scales_of(pair(UNET, 4) | alphas)


def test_metadata_count_wherever_they_stand_in_the_header():
    header = json.loads(header_of(save(pair(UNET, 4), {"lora_alpha": "8", "r": "4"})))
    metadata = header.pop("__metadata__")
    last = parse_header(json.dumps(header | {"__metadata__": metadata}).encode())
    assert count_scales(last, None) == ((Scale(2.0, FIELDS), 1),)
    assert last.fields == metadata


def test_alphas_can_be_read_alone(tmp_path):
    tensors = BOTH | {f"{UNET}.alpha": torch.tensor(3.0, dtype=torch.bfloat16), f"{TEXT}.alpha": torch.tensor([2])}
    path = write_lora(tmp_path / "x.safetensors", tensors)
    header = parse_header(read_header(path))
    assert read_alphas(path, header) == load_weights(path.read_bytes(), header)[1]
    path.write_bytes(path.read_bytes()[: header.data_start])
    with pytest.raises(LoraFileError, match="changed since it was indexed"):
        read_alphas(path, header)


# ----------------------------------------------------------------------------------------------------------------------
# What strangers write
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "no JSON object"),
        ('"x"', "no JSON object"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"unet.rank_pattern":' * 40_000, "not readable as JSON"),
        ("{}" + " " * MAX_CONFIG_LENGTH, "characters"),
        ('{"unet.lora_alpha": "much"}', "unusable alpha or rank"),
        ('{"unet.lora_alpha": 1e999}', "alpha of module unet_mid_block_to_q is inf"),
        ('{"unet.lora_alpha": NaN}', "alpha of module unet_mid_block_to_q is nan"),
        (f'{{"unet.lora_alpha": 1{"0" * 400}}}', "unusable alpha or rank"),
        (f'{{"unet.lora_alpha": 1{"0" * 5000}}}', "not readable as JSON"),
        ('{"unet.r": 8, "unet.lora_alpha": 8}', "lora_adapter_metadata says rank 8 for mid_block.to_q, where .* has 4"),
        ('{"unet.alpha_pattern": [1]}', "unusable alpha or rank"),
        ('{"unet.alpha_pattern": "to_q"}', "unusable alpha or rank"),
        ('{"unet.alpha_pattern": {"(": 1}}', "unusable alpha or rank"),
        ('{"unet.alpha_pattern": {"to_q": {}}}', "unusable alpha or rank"),
    ],
)
def test_metadata_that_cannot_be_used_are_refused_in_one_line(text, words):
    with pytest.raises(LoraFileError, match=words) as error:
        scales_of(pair(UNET, 4), {ADAPTER_METADATA: text})
    assert "\n" not in str(error.value) and str(error.value).endswith((".",))


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": "x", "r": "4"},
        {"lora_alpha": "auto"},
        {"ss_network_alpha": "8", "ss_network_dim": "Dynamic"},
        {"rank": "16", "alpha": "16"},
        {"lora_alpha": "8", "r": "-4"},
        {"lora_alpha": "nan"},
        {"lora_alpha": "1e300"},
        {"lora_alpha": "8", "use_rslora": "perhaps"},
    ],
)
def test_plain_fields_that_do_not_fit_the_file_state_nothing(fields):
    assert scales_of(pair(UNET, 4), fields) == [(1.0, NONE)]
    header = parse_header(header_of(save(pair(UNET, 4), fields)))
    assert has_unused_fields(header, [Scale(1.0, NONE)]) and not has_unused_fields(header, [Scale(1.0, TENSORS)])
    alpha = {f"{UNET}.alpha": torch.tensor(4.0)}
    assert scales_of(pair(UNET, 4) | alpha, fields) == [(1.0, TENSORS)]


def test_plain_fields_are_of_the_modules_whose_rank_they_state():
    assert sorted(scales_of(pair(UNET, 4) | pair(TEXT, 2), {"ss_network_alpha": "8", "ss_network_dim": "4"})) == [
        (1.0, NONE),
        (2.0, FIELDS),
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(.*.*)*x",
        "(a|a)" * 30,
        "a?" * 40,
        ".*" * 20,
        "(x+x+)+y",
        "[a-z]{1,50}{1,50}",
        "a{1,9}{1,9}{1,9}{1,9}",
        "(?:a*)*",
    ],
)
def test_a_pattern_that_would_never_end_is_refused(pattern):
    module = "unet." + "a" * 200 + ".to_q"
    start = time.perf_counter()
    with pytest.raises(LoraFileError, match="unusable alpha or rank"):
        scales_of(pair(module, 4), adapter(unet__lora_alpha=4, unet__alpha_pattern={pattern: 1}))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("pattern", "value"),
    [
        ("to_q", 1.0),
        (r".*\.to_q", 1.0),
        (r"mid_block\.to_[qk]", 1.0),
        ("to_q|to_k", 1.0),
        ("o_q", 2.0),
        ("mid_block", 2.0),
    ],
)
def test_a_pattern_names_the_end_of_a_path(pattern, value):
    found = scales_of(pair(UNET, 4), adapter(unet__lora_alpha=8, unet__alpha_pattern={"x": 3, pattern: 4}))
    assert found == [(value, ADAPTER_METADATA)]


LAYERS_OF_32 = "|".join(map(str, range(32)))


@pytest.mark.parametrize(
    ("pattern", "path", "named"),
    [
        (r"^layers\.0\.q", "layers.0.q", True),
        (r"^layers\.0\.q", "inner.layers.0.q", False),
        (r"^layers.0.q", "inner.layers.0.q", False),
        (r"(^layers|inner\.layers)\.0\.q", "m.inner.layers.0.q", True),
        (r"(^layers|inner\.layers)\.0\.q", "m.layers.0.q", False),
        (r"\Alayers\.0\.q", "inner.layers.0.q", False),
        (r".*layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\..*", "m.layers.11.q", True),
        (rf".*layers\.(?:{LAYERS_OF_32})\..*", "m.layers.31.q", True),
        (rf".*layers\.(?:{LAYERS_OF_32})\.attn\.(q|k|v)", "m.layers.32.attn.q", False),
        (rf"layers\.({LAYERS_OF_32})\.(attn|mlp)\.(q|k|v|o|gate|up|down)", "m.layers.30.mlp.gate", True),
    ],
)
def test_patterns_match_as_those_of_peft(pattern, path, named):
    assert bool(re.match(rf"(.*\.)?({pattern})$", path)) is named  # as PEFT does
    rule = Rule({"r": 4, "rank_pattern": {pattern: 8}}, "rank_pattern", "r")
    rule.check([path] * 700)
    assert rule.value(path) == (8 if named else 4)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?x)(x+x+) +y",
        "(x+x+)(?#)+y",
        r"\\*" * 20 + "y",
        "(?s:x+)(?i)y",
        "(" + "|".join("x" * n for n in range(100)) + ")" + "(x|xx)" * 14 + "y",
        "|".join("x" * 300),
    ],
)
def test_patterns_that_hide_their_cost_are_refused(pattern):
    start = time.process_time()
    with pytest.raises(LoraFileError, match="unusable alpha or rank"):
        scales_of(pair("x" * 200, 4), config={"lora_alpha": 4, "alpha_pattern": {pattern: 1}})
    assert time.process_time() - start < 2


def test_many_patterns_and_many_modules_take_no_time():
    modules = [f"blocks.{i}.to_q" for i in range(600)]
    tensors = {key: tensor for module in modules for key, tensor in pair(module, 2).items()}
    patterns = dict.fromkeys(modules, 4)
    start = time.perf_counter()
    assert set(scales_of(tensors, adapter(lora_alpha=2, alpha_pattern=patterns))) == {(2.0, ADAPTER_METADATA)}
    assert time.perf_counter() - start < 2


def test_little_is_kept_of_metadata_and_held_once():
    used = {"unet.r": 4, "unet.lora_alpha": 8}
    headers = [
        parse_header(
            header_of(
                save(
                    pair(UNET, 4),
                    {
                        ADAPTER_METADATA: json.dumps(used | {"unet.target_modules": [f"{number}"]}),
                        "long": "x" * 10_000,
                        "number": str(number),
                        "line\nbreak": "x",
                        "base": "sd 1.5",
                    },
                )
            )
        )
        for number in range(2)
    ]
    assert [header.fields for header in headers] == [{"number": str(number), "base": "sd 1.5"} for number in range(2)]
    for name in ("adapter_configs", "field_names", "places"):
        assert getattr(headers[0], name) is getattr(headers[1], name), name
    assert headers[0].adapter_configs == {"unet": {"r": 4, "lora_alpha": 8}}


def test_a_scale_is_found_behind_more_fields_than_are_kept():
    fields = {f"field {number}": "x" for number in range(2 * MAX_FIELDS)} | {"lora_alpha": "8", "r": "4"}
    header = parse_header(header_of(save(pair(UNET, 4), fields)))
    assert len(header.fields) <= MAX_FIELDS + 2
    assert scales_of(pair(UNET, 4), fields) == [(2.0, FIELDS)]


@pytest.mark.parametrize("name", ["to_q", r"mid_block\.to_[qk]"])
@pytest.mark.parametrize("alpha", [1e300, -1e39, 1e-50, 10**400, "1e999", "NaN", "much", [4], [[4]], {"a": 4}, True])
def test_an_alpha_that_is_no_number_of_float32_is_refused_at_the_header(name, alpha):
    header = parse_header(header_of(save(pair(UNET, 4))))
    for config in ({"r": 4, "lora_alpha": alpha}, {"r": 4, "lora_alpha": 8, "alpha_pattern": {name: alpha}}):
        with pytest.raises(LoraFileError, match="alpha"):
            count_scales(header, config)
    if alpha != 10**400:
        config = {"r": 4, "lora_alpha": 8, "rank_pattern": {name: alpha}}
        with pytest.raises(LoraFileError, match=r"unusable alpha or rank|says rank"):
            count_scales(header, config)


def test_a_scale_that_is_lost_in_float32_is_refused():
    with pytest.raises(LoraFileError, match=r"scale of module unet_mid_block_to_q is 2\.5e-39"):
        count_scales(parse_header(header_of(save(pair(UNET, 8)))), {"lora_alpha": 2e-38, "r": 8})


@pytest.mark.parametrize(
    ("text", "scale"),
    [(True, 4.0), ("True", 4.0), (1, 4.0), (False, 2.0), ("false", 2.0), (" FALSE ", 2.0), (0, 2.0), (None, 2.0),
     ("None", 2.0), ("", 2.0)],
)  # fmt: skip
def test_a_truth_value_may_be_a_text(text, scale):
    config = {"lora_alpha": 8, "r": 4, "use_rslora": text}
    assert scales_of(pair(UNET, 4), config=config) == [(scale, CONFIG)]
    component = adapter(unet__lora_alpha=8, unet__r=4, unet__use_rslora=text)
    assert scales_of(pair(UNET, 4), component) == [(scale, ADAPTER_METADATA)]


@pytest.mark.parametrize("text", ["falsch", 2, [True], {}, 1e300])
def test_what_is_neither_true_nor_false_is_refused(text):
    with pytest.raises(LoraFileError, match=r"use_rslora is .* neither true nor false"):
        scales_of(pair(UNET, 4), config={"lora_alpha": 8, "r": 4, "use_rslora": text})


@pytest.mark.parametrize(
    "key",
    [
        "unet.a.to_q.alpha",
        "unet.a.to_q.lora.alpha",
        "unet.a.to_q.lora.down.alpha",
        "unet.a.to_q.lora.up.weight.alpha",
        "unet.a.to_q.lora_down.weight.alpha",
        "unet.a.to_q.lora_A.alpha",
        "unet.a.to_q.lora_A.default.alpha",
        "unet.a.to_q.lora_linear_layer.alpha",
        "unet.a.processor.to_q_lora.alpha",
        "unet.a.processor.to_q_lora.down.alpha",
        "lora_unet_a_to_q.alpha",
    ],
)
def test_an_alpha_is_found_beside_its_factors(key):
    assert scales_of(pair("unet.a.to_q", 4) | {key: torch.tensor(1.0)}) == [(0.25, TENSORS)]


def test_patterns_of_many_files_take_no_time():
    """Ten thousand plain patterns for 700 modules: compiled never, looked up, and made once for one configuration."""
    modules = [f"model.layers.{layer}.self_attn.{p}_proj" for layer in range(175) for p in "qkvo"]
    tensors = {key: tensor for module in modules for key, tensor in pair(module, 2).items()}
    header = parse_header(header_of(save(tensors)))
    patterns = {f"x{number}.y": 3 for number in range(10_000 - len(modules))} | dict.fromkeys(modules, 4)
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": patterns, "rank_pattern": dict.fromkeys(patterns, 2)}
    assert count_scales(header, config) == ((Scale(2.0, CONFIG), 700),)
    start = time.process_time()
    for _ in range(20):
        count_scales(header, config)
    assert time.process_time() - start < 1  # about 5 ms each


@pytest.mark.parametrize("expression", [r".*.*.*x", r"model\.layers\.\d+\..*q_proj", r"(a|b)(a|b)(a|b)(a|b).*.*z"])
def test_expressions_for_many_modules_are_matched_in_time_or_refused(expression):
    modules = [f"model.layers.{layer}.self_attn.{'a' * 150}.{p}_proj" for layer in range(100) for p in "qkvo"]
    header = parse_header(header_of(save({k: t for module in modules for k, t in pair(module, 2).items()})))
    refused = []
    for count in (1, 4, 64):
        config = {"lora_alpha": 2, "alpha_pattern": {expression + "y" * number: 4 for number in range(count)}}
        start = time.process_time()
        try:
            count_scales(header, config)
        except LoraFileError as error:
            refused.append(str(error))
        assert time.process_time() - start < 2
    assert all("the regular expressions of alpha_pattern take too long for so many modules" in text for text in refused)
    assert refused


def test_expressions_that_refer_back_are_refused():
    with pytest.raises(LoraFileError, match="more than a pattern of modules"):
        scales_of(pair(UNET, 4), config={"lora_alpha": 4, "alpha_pattern": {r"(.)\1": 1}})


def test_metadata_counts_however_its_name_is_escaped():
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})}
    data = save({"m.a.lora_A.weight": torch.ones(2, 3), "m.a.lora_B.weight": torch.ones(4, 2)}, metadata)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b"__metadata__", b"\\u005f_metadata__")
    assert [scale.value for scale in module_scales(parse_header(header), {}, None).values()] == [4.0]
