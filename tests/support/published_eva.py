"""The image half of a published jina-clip: EVA02 under its own names."""


def image_half(hidden: int, layers: int, grid: int, patch: int) -> dict[str, list[int]]:
    """{name: shape} of every tensor."""
    vision, inner = "vision_model.", int(hidden * 2.6667)
    shapes = {
        f"{vision}cls_token": [1, 1, hidden],
        f"{vision}pos_embed": [1, grid * grid + 1, hidden],
        f"{vision}patch_embed.proj.weight": [hidden, 3, patch, patch],
        f"{vision}patch_embed.proj.bias": [hidden],
    }

    def norm(name: str, width: int = hidden) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]

    for i in range(layers):
        block = f"{vision}blocks.{i}."
        for name in ("norm1", "norm2", "attn.inner_attn_ln"):
            norm(block + name)
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "proj.weight"):
            shapes[f"{block}attn.{name}"] = [hidden, hidden]
        for name in ("q_bias", "v_bias", "proj.bias"):
            shapes[f"{block}attn.{name}"] = [hidden]
        for name, rows, columns in (("w1", inner, hidden), ("w2", inner, hidden), ("w3", hidden, inner)):
            shapes[f"{block}mlp.{name}.weight"], shapes[f"{block}mlp.{name}.bias"] = [rows, columns], [rows]
        norm(f"{block}mlp.ffn_ln", inner)
    norm(f"{vision}norm")
    return shapes
