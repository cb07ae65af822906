"""`residual_in_fp32`: the dtype of the tokens between blocks under autocast, and what that costs in exactness.

LayerNorm computes as on a GPU where a test says so."""

import pytest
import torch
from text_tower import TextTower, attention
from text_tower.norm import LayerNorm

LENGTHS = [5, 40, 17, 40, 3]
RESIDUAL = 8.0
"""A residual stream in bfloat16 may make the error of bfloat16 so many times as large: every block rounds what it adds
to, which autocast leaves in float32. So it is not the default."""


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    plain = LayerNorm.forward

    def forward(norm, x):
        return norm.in_16_bits(x) if x.dtype == torch.bfloat16 else plain(norm, x)

    monkeypatch.setattr(LayerNorm, "forward", forward)


def step(tower, packed, **options):
    """Embeddings and gradients; the loss weighs each channel differently."""
    tower.zero_grad()
    out = tower(packed, sample_seeds=torch.arange(len(packed)), **options)
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return [out.detach(), *(p.grad for p in tower.parameters() if p.grad is not None)]


def errors(found, exact):
    """Relative: of the embeddings, and of all gradients as one vector."""
    off = [(a.double() - b).square().sum() for a, b in zip(found, exact, strict=True)]
    size = [b.square().sum() for b in exact]
    return [float(sum(off[part]) / sum(size[part])) ** 0.5 for part in (slice(1), slice(1, None))]


def test_tokens_between_blocks_have_the_dtype_that_is_asked_for(make_tower, pack, lora):
    tower, seen = make_tower(dropout=0.1, **lora).train(), []
    for block in tower.encoder.layers:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    for in_fp32, expected in ((True, torch.float32), (False, torch.bfloat16)):
        tower.configure(residual_in_fp32=in_fp32)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            out = tower(pack(LENGTHS), sample_seeds=torch.arange(len(LENGTHS)))
        assert seen == len(tower.encoder.layers) * [(expected, expected)]
        assert out.dtype == torch.float32


def test_without_autocast_nothing_changes(make_tower, pack):
    tower = make_tower()
    expected = tower(pack(LENGTHS))
    tower.configure(residual_in_fp32=False)
    assert torch.equal(tower(pack(LENGTHS)), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_16_bits_add_to_the_error_of_bfloat16(make_tower, pack, lora, as_on_a_gpu, checkpointing):
    options = {"dropout": 0.1, "layers": 12, "checkpointing": checkpointing, **lora}
    packed, (tower, wide) = pack(LENGTHS), (make_tower(**options) for _ in range(2))
    with torch.no_grad():  # twelve blocks as wild as those of other tests have no exact digit in bfloat16
        for parameter in (*tower.parameters(), *wide.parameters()):
            parameter *= 0.3 if parameter.ndim == 2 else 1.0
    exact = step(wide.double(), packed, attend=attention.sdpa)
    with torch.autocast("cpu", torch.bfloat16):
        before = errors(step(tower, packed), exact)
        tower.configure(residual_in_fp32=False)
        residual = errors(step(tower, packed), exact)
    for own, of_residual in zip(before, residual, strict=True):
        print(f"{own:.2e}, residual {of_residual / own:.2f}")
        assert own < 0.1
        assert of_residual < RESIDUAL * own


def test_compiled_blocks_keep_it_in_one_graph(make_tower, pack, lora, as_on_a_gpu, monkeypatch):
    """But for attention, which is not compiled here."""
    from functools import partial

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"residual_in_fp32": False, **lora}
    eager, compiled, packed = make_tower(**options), make_tower(**options, compile=True), pack(LENGTHS)
    exact = step(make_tower(**options).double(), packed, attend=attention.sdpa)
    with torch.autocast("cpu", torch.bfloat16):
        of_eager, of_compiled = (errors(step(tower, packed), exact) for tower in (eager, compiled))
    assert of_compiled == pytest.approx(of_eager, rel=0.5)
    assert all("sdpa" in reason for reason in torch._dynamo.utils.counters["graph_break"])


def test_a_models_directory_does_not_say_it(make_tower, tmp_path):
    tower = make_tower(residual_in_fp32=False)
    tower.save_pretrained(tmp_path / "saved")
    assert TextTower.from_pretrained(tmp_path / "saved").config.residual_in_fp32
    assert not TextTower.from_pretrained(tmp_path / "saved", residual_in_fp32=False).config.residual_in_fp32
