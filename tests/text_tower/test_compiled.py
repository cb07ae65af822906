"""Compiled blocks: no break in their graphs, no graph for each batch, and eager's numbers.

Through the tracer and a backend that runs the graph as it is; Inductor's own code is a matter of `full`
(test_tower.py). On a GPU in 16 bits attention is PyTorch's `varlen_attn`. Here it is the same operator, with a kernel
for CPUs that these tests bring along, so that what is traced is what is traced there.
"""

import functools
import itertools

import pytest
import torch
from text_tower import attention

BATCHES = [(n, 1 + 37 * n % 90) for n in range(1, 21)]  # texts, and tokens of the longest


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def compile_with(monkeypatch):
    def choose(**options):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **options))

    return choose


@functools.cache
def varlen_on_a_cpu():
    import torch.nn.attention.varlen as varlen

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, bounds, bounds_of_keys, *_, **options):
        out, logsums = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        for start, end in itertools.pairwise(bounds.tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), k[start:end].float()) * q.shape[-1] ** -0.5
            logsums[:, start:end] = scores.logsumexp(-1)
            out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end].float())
        return out, logsums, torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(grad, q, k, v, out, logsums, bounds, *_, **options):
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for start, end in itertools.pairwise(bounds.tolist()):
            with torch.enable_grad():
                g, qs, ks, vs, o = (x[start:end].float() for x in (grad, q, k, v, out))
                scale = q.shape[-1] ** -0.5
                weights = (torch.einsum("qhd,khd->hqk", qs, ks) * scale - logsums[:, start:end, None]).exp()
                of_weights = torch.einsum("qhd,khd->hqk", g, vs) - (g * o).sum(-1).T[:, :, None]
                of_scores = weights * of_weights * scale
                grads[0][start:end] = torch.einsum("hqk,khd->qhd", of_scores, ks)
                grads[1][start:end] = torch.einsum("hqk,qhd->khd", of_scores, qs)
                grads[2][start:end] = torch.einsum("hqk,qhd->khd", weights, g)
        return tuple(grads)


@pytest.fixture
def varlen():
    varlen_on_a_cpu()
    return attention._varlen


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(tower, packed, **options):
    """Embeddings and gradients; the loss weighs each channel differently."""
    tower.zero_grad()
    out = tower(packed, sample_seeds=torch.arange(len(packed)), **options)
    (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
    return [out.detach(), *(p.grad for p in tower.parameters() if p.grad is not None)]


def error(found, exact):
    """Relative, over all values and gradients."""
    off = sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True))
    return float(off / sum(b.square().sum() for b in exact)) ** 0.5


@pytest.mark.parametrize(("checkpointing", "lengths"), [(True, [5, 40, 17]), (False, [7, 3])])  # many tokens, and few
def test_blocks_are_one_graph_with_eagers_values_and_gradients(
    make_tower, pack, lora, varlen, compile_with, checkpointing, lengths
):
    compile_with(backend="aot_eager", fullgraph=True)
    options = {"dropout": 0.3, "checkpointing": checkpointing, **lora}
    eager, compiled = make_tower(**options), make_tower(**options, compile=True)
    packed = pack(lengths)
    exact = step(make_tower(**options).double(), packed, attend=attention.sdpa)
    errors = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            errors.append((error(step(compiled, packed, attend=varlen), exact), error(step(eager, packed), exact)))
        assert errors[-1][0] < 2 * errors[-1][1]
    assert errors[1][1] > 100 * errors[0][1]
    assert graphs() == 2  # one for autocast, one without


def test_twenty_batches_take_no_more_graphs_than_the_first_few(make_tower, pack, lora, varlen, compile_with):
    """Each as gradient caching takes it: a pass without gradients, then one with. More than 32 tokens add adapters to
    the weights, fewer do not; one text or one token of each are sizes that the compiler treats apart."""
    compile_with(backend="eager", fullgraph=True)
    tower, seen = make_tower(dropout=0.1, compile=True, **lora), []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for texts, longest in BATCHES:
            packed = pack([max(1, longest - i) for i in range(texts)])
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    tower(packed, sample_seeds=torch.arange(texts), attend=varlen)
            seen.append(graphs())
    assert seen[-1] == seen[5] <= 8, seen


@pytest.mark.full  # twenty seconds of tracing
def test_all_that_a_tower_does_stays_compiled(make_tower, pack, lora, varlen, compile_with):
    """Training, evaluation, each adapter and none: more than the eight graphs at which Dynamo gives up by itself."""
    compile_with(backend="eager", fullgraph=True)
    tower = make_tower(dropout=0.1, compile=True, **lora)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for adapter in (*tower.config.adapters, "none"):
            for lengths in ([9, 40], [9, 3], [200]):
                for training in (False, True):
                    with torch.set_grad_enabled(training):
                        packed = pack(lengths)
                        seeds = torch.arange(len(packed))
                        tower(packed, adapter=adapter, sample_seeds=seeds, training=training, attend=varlen)
    assert graphs() > 8


def test_sdpa_breaks_a_graph_at_attention_alone(make_tower, pack, compile_with):
    """It is one call for each length, of which each batch has others."""
    compile_with(backend="eager")
    tower, seen = make_tower(compile=True), []
    for texts, longest in BATCHES:
        packed = pack([1 + longest // (1 + i) for i in range(texts)])
        tower(packed)
        seen.append(graphs())
    assert seen[-1] == seen[3], seen
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "torch.compiler.disable" in reason
    assert "sdpa" in reason
