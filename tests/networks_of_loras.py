"""Modules of the LoRAs that people train, by their canonical ids in the network's order, whole networks of them."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")
FEED_FORWARD = ("ff_net_0_proj", "ff_net_2")
TRANSFORMER = tuple(f"{kind}_{end}" for kind in ("attn1", "attn2") for end in ATTENTION) + FEED_FORWARD
LLM = tuple(f"self_attn_{x}_proj" for x in "qkvo") + tuple(f"mlp_{x}_proj" for x in ("gate", "up", "down"))
CLIP = (*(f"self_attn_{end}" for end in ("k_proj", "v_proj", "q_proj", "out_proj")), "mlp_fc1", "mlp_fc2")
CONTEXT = (*(f"attn_{end}" for end in ATTENTION), "attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj",
           "attn_to_add_out", *FEED_FORWARD, "ff_context_net_0_proj", "ff_context_net_2")  # fmt: skip


def unet(down: dict[int, int], middle: int, up: dict[int, int], ends: tuple[str, ...]) -> list[str]:
    """Return modules of a UNet: transformers in each of the attentions, by level."""
    places = [(f"down_blocks_{level}_attentions_{i}", depth) for level, depth in down.items() for i in range(2)]
    places.append(("mid_block_attentions_0", middle))
    places += [(f"up_blocks_{level}_attentions_{i}", depth) for level, depth in up.items() for i in range(3)]
    modules = []
    for place, depth in places:
        inside = [f"transformer_blocks_{i}_{end}" for i in range(depth) for end in ends]
        if ends == TRANSFORMER:
            inside = ["proj_in", *inside, "proj_out"]
        modules += [f"unet_{place}_{end}" for end in inside]
    return modules


def numbered(start: str, count: int, ends: tuple[str, ...]) -> list[str]:
    """Return modules of so many blocks."""
    return [f"{start}_{i}_{end}" for i in range(count) for end in ends]


NETWORKS = {  # their layers are twice as many
    "SDXL": unet({1: 2, 2: 10}, 10, {0: 10, 1: 2}, TRANSFORMER),  # 722
    "SD 1.5": unet(dict.fromkeys((0, 1, 2), 1), 1, dict.fromkeys((1, 2, 3), 1), TRANSFORMER),  # 192
    "SD 1.5, cross": unet(
        dict.fromkeys((0, 1, 2), 1), 1, dict.fromkeys((1, 2, 3), 1), TRANSFORMER[4:8]
    ),  # 64, which is 128 layers
    "SD 1.5 and text": numbered("text_encoder_text_model_encoder_layers", 12, CLIP[:4])
    + unet(dict.fromkeys((0, 1, 2), 1), 1, dict.fromkeys((1, 2, 3), 1), TRANSFORMER[4:8]),  # 112
    "Flux": numbered("transformer_transformer_blocks", 19, CONTEXT)
    + numbered("transformer_single_transformer_blocks", 38, ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")),
    "SD3": numbered("transformer_transformer_blocks", 24, CONTEXT[:4]),  # 96
    "LLM": numbered("model_layers", 32, LLM),  # 224
    "LLM of 80": numbered("model_layers", 80, LLM),  # 560
    "small LLM": numbered("model_layers", 24, ("self_attn_q_proj", "self_attn_v_proj")),  # 48
}  # fmt: skip
