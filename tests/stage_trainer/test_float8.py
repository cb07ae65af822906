"""Products in 8 bits: against float64 with the bounds of rounding, torchao's Float8Linear, and in whole steps.

On a CPU they are computed in float32 from the same numbers of 8 bits (`fp8: emulate`); that a GPU's operator takes the
call as it is made is checked on fake tensors.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bare_engine import CHUNKS, LORA, VISION, WAYS, make_batch
from bare_engine import Engine as CastOnce
from stage_trainer.engine.float8 import DTYPE, Float8Product, in_float8, scaled
from stage_trainer.recipe import GradientCache
from stage_trainer.tasks.contrastive import forward_backward
from text_tower import PackedTokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

STEP = 2.0**-4
"""Most that a number of e4m3 is off by, relative: it has three bits after its first."""
LEAST = 2.0**-10
"""Most that a subnormal one is off by, in its row's scale."""
HALF = 2.0**-8


class Engine(CastOnce):
    """Without DeepSpeed, in 8 bits."""

    def __init__(self, fp8=True, **options):
        super().__init__(**options)
        self.objective.fp8 = fp8

    def cast_once(self):
        return in_float8(self.objective) if self.objective.fp8 else super().cast_once()


def linears(outs, width=44, bias=True, seed=0):
    torch.manual_seed(seed)
    made = [nn.Linear(width, out, bias=bias and k != 1) for k, out in enumerate(outs)]  # the second has none
    return [each.bfloat16() for each in made]


def tokens(count, width, seed=1):
    """Sizes spread over six decades, as gradients' do, and a row of zeros."""
    torch.manual_seed(seed)
    x = torch.randn(count, width) * 10 ** torch.empty(count, 1).uniform_(-4, 2)
    x[0] = 0
    return x.bfloat16()


def run(product, x, made, seed=2):
    """(outputs, gradient of x, of weights, of biases); the gradient of the outputs is that of `seed`."""
    x = x.clone().requires_grad_()
    out = torch.cat([part.double() if x.dtype == torch.float64 else part for part in product(x)], dim=-1)
    given = tokens(len(x), out.shape[-1], seed).to(out.dtype)
    learned = [p for each in made for p in each.parameters()]
    return out.detach(), *torch.autograd.grad(out, [x, *learned], given)


def test_scales_are_the_least_powers_of_2_that_keep_rows_within_8_bits():
    x = tokens(64, 40)
    x[1, :] = torch.tensor(448.0)
    x[2, 0] = 2.0**120
    x[3] = 2.0**-120  # below all that can have a scale: zeros
    found, scale = scaled(x)
    assert found.dtype == DTYPE
    assert found.float().isfinite().all()
    assert (torch.frexp(scale)[0] == 0.5).all()
    rows = [n for n in range(64) if n not in (0, 3)]
    assert (found[rows].float().abs().amax(-1) > 448 / 2 * (1 - STEP)).all()
    assert scale[1].item() == 1.0
    assert (found[1].float() == 448).all()
    assert not found[[0, 3]].float().any()
    exact = x[rows].double()
    error = (found[rows].double() * scale[rows].double() - exact).abs()
    assert (error <= torch.maximum(STEP * exact.abs(), LEAST * scale[rows].double())).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    (made,) = linears([32])
    x = tokens(3, 44)
    x[1, 5] = bad
    (y,) = Float8Product([made])(x)
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()


def error_bound(a, b):
    """Of the product of the rows of two float64 matrices, element by element: what rounding both can do to it."""

    def off(x):
        scale = 2 ** torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 448))
        return torch.maximum(STEP * x.abs(), LEAST * scale)

    return off(a) @ b.abs().T + a.abs() @ off(b).T + off(a) @ off(b).T


@pytest.mark.parametrize("outs", [(32,), (22,), (22, 40, 64)], ids=str)
def test_values_and_gradients_are_within_what_rounding_does(outs):
    made = linears(outs)
    exact = [nn.Linear(44, each.out_features, bias=each.bias is not None).double() for each in made]
    for double, each in zip(exact, made, strict=True):
        double.load_state_dict({name: value.double() for name, value in each.state_dict().items()})
    x = tokens(50, 44)
    found = run(Float8Product(made), x, made)
    expected = run(lambda x: [each(x) for each in exact], x.double(), exact)
    weight = torch.cat([each.weight for each in exact]).detach()
    given = tokens(50, sum(outs), 2).double()
    bounds = [error_bound(x.double(), weight), error_bound(given, weight.T)]
    for y, wanted, bound in zip(found[:2], expected[:2], bounds, strict=True):
        assert ((y.double() - wanted).abs() <= 1.001 * bound + HALF * (wanted.abs() + bound)).all()
    for y, wanted in zip(found[2:], expected[2:], strict=True):  # products in bfloat16, sums in float32
        assert (y.double() - wanted).norm() <= HALF * wanted.norm()


def test_rounding_is_what_a_random_walk_makes_of_it():
    """Two roundings of 2.6 % (uniform in the last bit) make 3.7 %: more would be a fault that the bounds are too wide
    to show."""
    (made,) = linears([64], width=256)
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = Float8Product([made])(x)[0].double()
    exact = x.double() @ made.weight.double().T + made.bias.double()
    assert 0.025 < (found - exact).norm() / exact.norm() < 0.04


def test_values_are_torchaos_and_gradients_of_x_are_closer():
    """Its recipe "rowwise_with_gw_hp", emulated; weights have one scale in its gradients of x."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    config = replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=True)
    (made,) = linears([48], width=64)
    with torch.no_grad():  # rows of different sizes, where one scale costs most
        made.weight.mul_(10 ** torch.linspace(-4, 0, 48)[:, None])
    peer = Float8Linear.from_float(made, config)
    x = tokens(50, 64)
    ours, theirs = run(Float8Product([made]), x, [made]), run(lambda x: [peer(x)], x, [peer])
    exact = run(lambda x: [nn.functional.linear(x, made.weight.double(), made.bias.double())], x.double(), [made])
    assert (ours[0].double() - theirs[0].double()).norm() <= HALF * theirs[0].double().norm()
    of_x = [(found[1].double() - exact[1]).norm() for found in (ours, theirs)]
    assert of_x[0] <= of_x[1] * 1.05
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        assert (mine.double() - other.double()).norm() <= HALF * other.double().norm()


def test_padding_changes_no_bit():
    """Widths of 44 and 22 are filled up to 48 and 32: as if zeros had been there before."""
    made = linears([22, 40])
    wide = [nn.Linear(48, out, bias=each.bias is not None).bfloat16() for out, each in zip((32, 48), made, strict=True)]
    with torch.no_grad():
        for whole, each in zip(wide, made, strict=True):
            whole.weight.zero_()[: each.out_features, :44] = each.weight
            if each.bias is not None:
                whole.bias.zero_()[: each.out_features] = each.bias
    x = tokens(9, 44)
    found = Float8Product(made)(x)
    expected = Float8Product(wide)(nn.functional.pad(x, (0, 4)))
    for y, whole in zip(found, expected, strict=True):
        assert torch.equal(y, whole[:, : y.shape[1]])
        assert not whole[:, y.shape[1] :].any()


def test_a_token_does_not_depend_on_its_neighbours():
    made = linears([32])
    x = tokens(40, 44)
    whole, few = Float8Product(made)(x)[0], Float8Product(made)(x[7:12])[0]
    assert (whole[7:12].double() - few.double()).abs().max() <= HALF * few.abs().max()
    assert torch.equal(scaled(x)[0][7:12].float(), scaled(x[7:12])[0].float())


def test_pytorchs_operator_computes_the_same_on_a_cpu():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("this PyTorch's operator has no scales for rows on a CPU")
    (made,) = linears([32], width=64)
    rows, scales, _, _, bias = Float8Product([made]).held
    left, of_left = scaled(tokens(50, 64))
    theirs = torch._scaled_mm(left, rows.T, of_left, scales.T, bias=bias, out_dtype=torch.bfloat16)
    ours = Float8Product([made])(tokens(50, 64))[0]
    assert (ours.double() - theirs.double()).norm() <= HALF * theirs.double().norm()


def test_a_gpus_operator_takes_the_calls():
    """Its checks of dtypes, layouts and multiples of 16, and the dtypes of what comes out."""
    from stage_trainer.engine.float8 import _multiplied

    with FakeTensorMode():
        for width, out in ((44, 22), (2730, 1024), (1024, 5472)):
            rows = torch.empty(out + -out % 16, width + -width % 16, device="cuda", dtype=DTYPE)
            x = torch.empty(3, 7, width, device="cuda", dtype=torch.bfloat16)
            scales = torch.empty(len(rows), 1, device="cuda")
            y = _multiplied(x, rows, scales, torch.empty(len(rows), device="cuda", dtype=torch.bfloat16))
            assert y.dtype == torch.bfloat16
            assert y.shape == (3, 7, len(rows))


def gradients(engine, cache=CHUNKS):
    """After a step's passes: (embeddings of every pass, gradients)."""
    seen = []

    def forward(part, **options):
        seen.append(CastOnce.forward(engine, part, **options))
        return seen[-1]

    engine.forward = forward
    forward_backward(engine, make_batch(), pairs=("image_text", "text"), patch_dropout=0.5, cache=cache)
    found = {n: p.grad for n, p in engine.objective.model.named_parameters() if p.grad is not None}
    return seen, torch.cat([grad.flatten() for grad in found.values()]), found


@pytest.mark.parametrize("way", WAYS)
def test_both_passes_of_gradient_caching_are_the_same_function(way):
    """Bit for bit; and what is learned has a gradient as without FP8, near that one."""
    engine = Engine(**WAYS[way])
    names = set(engine.objective.state_dict())
    seen, found, by_name = gradients(engine)
    half = len(seen) // 2
    for first, second in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.texts, second.texts)
    _, plain, plain_by_name = gradients(Engine(fp8=False, **WAYS[way]))
    assert by_name.keys() == plain_by_name.keys()
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.25
    assert set(engine.objective.state_dict()) == names
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float32 for p in engine.objective.parameters())
    assert all(getattr(m, "joined", None) is None for m in engine.objective.modules())


def test_chunks_have_the_gradients_of_the_whole_batch():
    """The same function of the same weights: apart by bfloat16's rounding of parts that are added up."""
    _, chunks, _ = gradients(Engine())
    _, whole, _ = gradients(Engine(), cache=None)
    _, without, _ = gradients(Engine(fp8=False), cache=None)
    assert (chunks - whole).norm() / whole.norm() < 0.02 < (without - whole).norm() / whole.norm()


def test_weights_are_back_after_an_error():
    engine = Engine()
    with pytest.raises(KeyError), in_float8(engine.objective):
        raise KeyError
    assert all(getattr(m, "joined", None) is None for m in engine.objective.modules())
    held = [p for m in engine.objective.modules() for p in m._parameters.values() if p is not None]
    assert all(isinstance(p, nn.Parameter) for p in held)


def test_weights_are_cast_once_whatever_the_number_of_chunks(monkeypatch):
    import stage_trainer.engine.float8 as module

    made = []
    monkeypatch.setattr(module, "Float8Product", lambda given: (made.append(given), Float8Product(given))[1])
    counts = []
    for chunks in (CHUNKS, GradientCache(images=2, tokens=40)):
        made.clear()
        gradients(Engine(), cache=chunks)
        counts.append(len(made))
    blocks = LORA.layers * 4 + VISION.layers * 4 + 1  # the last block's class tokens have queries of their own
    assert counts == [blocks, blocks]


def test_compiled_blocks_have_no_break_in_their_graphs_and_none_for_each_step(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    text, vision = replace(LORA, compile=True), replace(VISION, compile=True)
    engine = Engine(text=text, vision=vision)
    _, found, _ = gradients(engine)
    graphs = counters["stats"]["unique_graphs"]
    for parameter in engine.objective.parameters():
        parameter.grad = None
    _, again, _ = gradients(engine)
    assert counters["stats"]["unique_graphs"] == graphs
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])  # attention of many lengths
    assert torch.equal(found, again)
    _, eager, _ = gradients(Engine())
    assert (found - eager).norm() / eager.norm() < 0.05


ZERO = (0, 1)


@pytest.fixture(scope="module")
def under_deepspeed(tmp_path_factory, two_ranks):
    """{ZeRO stage: {parameter: (gradient of two ranks, that of the whole batch on one)}}"""
    folder = tmp_path_factory.mktemp("float8")
    two_ranks(__file__, folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("zero", ZERO)
def test_two_ranks_have_one_ranks_gradients(under_deepspeed, zero):
    found = under_deepspeed[zero]
    ours, whole, without = (torch.cat([each[i].flatten() for each in found.values()]) for i in range(3))
    assert (ours - whole).norm() / whole.norm() < 0.02 < (without - whole).norm() / whole.norm()


def part_of(batch, rank: int):
    """Half of the batch: its captions, then the queries and targets of its pairs."""
    images, pairs = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
    rows = [*range(8)[images], *(8 + n for n in range(4)[pairs]), *(12 + n for n in range(4)[pairs])]
    texts = [batch.texts.ids[batch.texts.cu_seqlens[n] : batch.texts.cu_seqlens[n + 1]].tolist() for n in rows]
    return replace(
        batch, images=batch.images[images], image_seeds=batch.image_seeds[images], image_ids=batch.image_ids[images],
        texts=PackedTokens.from_lists(texts), text_seeds=batch.text_seeds[rows],
        text_ids=batch.text_ids[pairs], pairs=2,
    )  # fmt: skip


def one_rank(rank: int, folder: str) -> None:
    from deepspeed.utils import safe_get_full_grad
    from stage_trainer.engine import make_engine
    from stage_trainer.recipe.read import load
    from stage_trainer.run.environment import quiet
    from stage_trainer.run.rendezvous import initialize_distributed

    quiet()
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    initialize_distributed()
    _, _, whole = gradients(Engine(), cache=None)
    _, _, without = gradients(Engine(fp8=False), cache=None)
    drawn = Path(__file__).parents[2] / "launch/recipes/drawn.yaml"
    found = {}
    for zero in ZERO:
        bucket = ", reduce_bucket_size: 100000" if zero else ""
        options = f"deepspeed={{zero_optimization: {{stage: {zero}{bucket}}}}}"
        settings = ["optimizer.name=adamw", "loss={dims: [32, 16]}", "precision=bf16", "device=cpu", options]
        recipe = load(drawn, settings, 1).recipe
        stage, objective = recipe.stage(1), Engine().objective
        groups = objective.parameter_groups(stage, recipe.optimizer)
        engine = make_engine(objective, groups, recipe.optimizer, precision="bf16", deepspeed=stage.deepspeed)
        engine.train()
        forward_backward(
            engine, part_of(make_batch(), rank), pairs=("image_text", "text"), patch_dropout=0.5, cache=CHUNKS,
            group=torch.distributed.group.WORLD,
        )  # fmt: skip
        mine = {n: safe_get_full_grad(p) for n, p in engine.parameters.items()}
        found[zero] = {n: (g.clone(), whole[n], without[n]) for n, g in mine.items() if g is not None and n in whole}
        assert engine.step()
        state = engine.copy_of_weights()
        assert all(value.dtype == torch.float32 for value in state.values())
        engine.close()
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])
