"""A step's losses and gradients, also with gradient caching, in float64 against plain torch. Under DeepSpeed:
tests/integration."""

import contextlib
import sys

import pytest
import torch
import torch.distributed as dist
from contrastive_losses import matryoshka_info_nce
from contrastive_losses.plain import plain_cosent
from stage_trainer.batch import Batch, Part, image_chunks, text_chunks
from stage_trainer.dual_encoder import DualEncoder
from stage_trainer.engine.cast_once import cast_once
from stage_trainer.recipe import GradientCache, LossConfig
from stage_trainer.tasks.contrastive import forward_backward
from stage_trainer.tasks.contrastive_objective import ContrastiveObjective
from text_tower import PackedTokens, TextTower, TextTowerConfig
from torch.nn.functional import cross_entropy, normalize, softplus
from vision_tower import VisionTower, VisionTowerConfig

BOTH = ("image_text", "text")
OF_KIND = {
    "multi_task": {},
    "graded": {"negatives": 0, "graded": True},
    "sigmoid": {},
    "unified": {"negatives": 0, "views": 2},
    "image_negatives": {"image_negatives": 2},
    "image_negatives, ring": {"image_negatives": 2},
    "image_negatives, sigmoid": {"image_negatives": 2},
}
LOSSES = {
    "multi_task": LossConfig(dims=(32, 16)),
    "graded": LossConfig(dims=(32, 16), weights=(1.0, 2.5)),
    "sigmoid": LossConfig(
        "sigmoid", dims=(32, 16), weights=(1.0, 2.5), temperature="shared", false_negative_margin=0.1
    ),
    "unified": LossConfig("unified", dims=(32, 16)),
    "image_negatives": LossConfig(dims=(32, 16)),
    "image_negatives, ring": LossConfig(dims=(32, 16), exchange="ring"),
}
LOSSES["image_negatives, sigmoid"] = LOSSES["sigmoid"]


class PlainEngine:
    """No DeepSpeed, one or several ranks whose gradients are averaged after the last backward pass."""

    def __init__(
        self, kind="multi_task", dtype=torch.float64, adapters=("a",), temperature=0.07, image_rank=0, **block
    ):
        torch.manual_seed(0)
        text = TextTowerConfig(
            vocab_size=50, width=32, layers=2, heads=2, mlp_width=64, dropout=0.1, lora_rank=2, adapters=adapters,
            **block,
        )  # fmt: skip
        shape = {"resolution": 24, "patch": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
        vision = VisionTowerConfig(**shape, lora_rank=image_rank)
        model = DualEncoder(TextTower(text), VisionTower(vision), temperature=temperature).to(dtype).train()
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.set_biases((-3.0, -1.0) if LOSSES[kind].kind == "sigmoid" else None)
        self.objective = ContrastiveObjective(model, LOSSES[kind], "fp32")
        self.passes = 0

    def upload(self, part):
        return part

    def forward(self, part, **options):
        self.passes += 1
        return self.objective(part, **options)

    def cast_once(self):
        return cast_once(self.objective) if self.objective.precision == "bf16" else contextlib.nullcontext()

    def forward_passes(self, mine):
        return mine

    @contextlib.contextmanager
    def backwards(self):
        yield lambda loss, last: loss.backward()
        if dist.is_initialized():
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

    def gradients(self):
        return {n: p.grad for n, p in self.objective.model.named_parameters() if p.grad is not None}


def deepspeed_engine(objective, recipe, saved=None):
    """The engine of a recipe's first stage, in training."""
    from stage_trainer.engine import make_engine

    stage = recipe.stage(1)
    objective.set_trainable(stage)
    groups = objective.parameter_groups(stage, recipe.optimizer, saved)
    settings = {"precision": recipe.precision, "deepspeed": stage.deepspeed}
    engine = make_engine(objective, groups, recipe.optimizer, **settings, saved=saved)
    engine.train()
    return engine


def make_batch(
    images=7, pairs=6, negatives=3, seed=0, rows=slice(None), views=0, graded=False, image_negatives=0
) -> Batch:
    """The rows of a global batch: of its pairs of both kinds, and of its views or hard negatives of each image."""
    g = torch.Generator().manual_seed(seed)
    texts = [
        torch.randint(3, 50, (n,), generator=g).tolist()
        for n in torch.randint(1, 9, (images + pairs * (2 + negatives),), generator=g).tolist()
    ]
    i, p = range(images)[rows], range(pairs)[rows]
    hard = [images + 2 * pairs + k * negatives + n for k in p for n in range(negatives)]
    chosen = [*i, *[images + k for k in p], *[images + pairs + k for k in p], *hard]
    shown = 1 + views + image_negatives
    pixels = torch.randint(0, 256, (shown, images, 3, 24, 24), generator=g, dtype=torch.uint8)
    return Batch(
        images=pixels[:, rows].flatten(0, 1),
        image_seeds=torch.arange(shown * images).view(shown, images)[:, rows].flatten(),
        texts=PackedTokens.from_lists([texts[n] for n in chosen]),
        text_seeds=torch.tensor(chosen),
        image_ids=torch.arange(images)[rows] // 2,
        pairs=len(p),
        negatives=negatives,
        text_ids=torch.arange(pairs)[rows],
        scores=torch.tensor([0.5, 3, 0.5, 2, 5, 1, 4][:pairs], dtype=torch.float64)[rows] if graded else None,
        image_negatives=image_negatives,
    )


def step(batch, cache=None, group=None, pairs=BOTH, kind="multi_task", **block):
    engine = PlainEngine(kind, **block)
    losses = forward_backward(engine, batch, pairs=pairs, patch_dropout=0.5, group=group, cache=cache)
    return {t: loss.item() for t, (loss, _) in losses.items()}, engine.gradients(), engine.passes


@pytest.mark.parametrize("cache", [GradientCache(2, 10), GradientCache(0, 7), GradientCache(3, 0), GradientCache(1, 1)])
@pytest.mark.parametrize(
    ("negatives", "block"), [(0, {}), (3, {}), (3, {"positions": "alibi", "mlp": "geglu"})], ids=str
)
def test_caching_gives_the_gradients_of_one_big_batch(cache, negatives, block):
    batch = make_batch(negatives=negatives)
    losses, gradients, _ = step(batch, **block)
    cached_losses, cached, passes = step(batch, cache, **block)
    assert passes > 2
    assert cached_losses == pytest.approx(losses, rel=1e-12)
    assert cached.keys() == gradients.keys()
    assert {"logit_scale", "text_logit_scale"} <= cached.keys()
    assert any("lora" in name for name in cached)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_no_patch_is_dropped_unasked():
    engine, other = PlainEngine(), PlainEngine()
    forward_backward(engine, make_batch(), pairs=BOTH)
    forward_backward(other, make_batch(), pairs=BOTH, patch_dropout=0.0)
    torch.testing.assert_close(engine.gradients(), other.gradients(), rtol=0, atol=0)
    _, dropped, _ = step(make_batch())
    assert not torch.equal(dropped["vision.pos_embed"], engine.gradients()["vision.pos_embed"])


@pytest.mark.parametrize("task", BOTH)
def test_caching_serves_a_task_alone(task):
    batch = make_batch(pairs=0, negatives=0) if task == "image_text" else make_batch(images=0)
    if task == "text":
        batch = Batch(**{**vars(batch), "images": None})
    _, gradients, _ = step(batch, pairs=(task,))
    _, cached, _ = step(batch, GradientCache(2, 10), pairs=(task,))
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("cache", [None, GradientCache(2, 10)])
def test_a_unified_batch_is_one_info_nce_over_all_pairs_and_views(cache):
    """Against InfoNCE over the columns of the paper's figure 3, put together by hand; one temperature learns."""
    batch = make_batch(negatives=0, views=2)
    losses, gradients, _ = step(batch, cache, kind="unified")
    engine = PlainEngine("unified")
    embedded = engine.forward(batch, patch_dropout=0.5)
    images, first, second = embedded.images.split(7)
    captions, queries, targets = embedded.texts.split([7, 6, 6])
    ids = torch.cat([batch.image_ids, 100 + batch.text_ids, batch.image_ids])
    columns = torch.cat([images, queries, first]), torch.cat([captions, targets, second])
    temperature = torch.exp(-engine.objective.model.logit_scale)
    loss = matryoshka_info_nce(*columns, temperature=temperature, dims=(32, 16), query_ids=ids)
    loss.backward()
    assert losses == {"unified": pytest.approx(loss.item(), rel=1e-12)}
    expected = engine.gradients()
    assert gradients.keys() == expected.keys()
    assert "text_logit_scale" not in gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def info_nce(queries, targets, negatives, ids, temperature, dims):
    total = torch.zeros((), dtype=queries.dtype)
    same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
    for dim in dims:
        q, t, n = (normalize(x[..., :dim], dim=-1) for x in (queries, targets, negatives))
        logits = (q @ t.T / temperature).masked_fill(same, -torch.inf)
        hard = q @ n.T / temperature
        places = torch.arange(len(q))
        total = total + cross_entropy(torch.cat([logits, hard], 1), places) + cross_entropy(logits.T, places)
    return total


def image_text_by_hand(captions, images, ids, scale, bias=None):
    """The loss of captions with hard-negative images, `[1 + M, I, D]` in all, written out for each caption: to the
    images it is told apart from all images of the batch, hard negatives among them, from an image from the captions."""
    positives, total = images[0], captions.new_zeros(())
    for dim, weight in ((32, 1.0), (16, 1.0 if bias is None else 2.5)):
        c, p, every = (x[..., :dim] / x[..., :dim].norm(dim=-1, keepdim=True) for x in (captions, positives, images))
        for i in range(len(ids)):
            others = [j for j in range(len(ids)) if ids[j] != ids[i]]
            hard = every[1:].flatten(0, 1)  # of every caption, whatever it shows
            own = c[i] @ p[i]
            further = torch.cat([p[others] @ c[i], hard @ c[i]])
            if bias is None:
                to_images = -torch.log_softmax(torch.cat([own[None], further]) * torch.exp(scale), 0)[0]
                to_captions = -torch.log_softmax(torch.cat([own[None], c[others] @ p[i]]) * torch.exp(scale), 0)[0]
                total = total + weight * (to_images + to_captions) / len(ids)
            else:
                far = further[further <= own + 0.1]  # the sigmoid loss's margin here
                no = softplus(far * torch.exp(scale) + bias).sum()
                total = total + weight * (softplus(-(own * torch.exp(scale) + bias)) + no).squeeze() / len(ids)
    return total


@pytest.mark.parametrize("cache", [None, GradientCache(2, 10)])
@pytest.mark.parametrize("kind", ["image_negatives", "image_negatives, sigmoid"])
def test_a_captions_hard_negative_images_are_negatives_of_every_caption_and_of_no_image(kind, cache):
    """Each image's place among the batch's counts, and patch dropout's seed with it: in float64, by hand."""
    batch, engine = make_batch(**OF_KIND[kind]), PlainEngine(kind)
    model = engine.objective.model
    embedded = engine.forward(batch, patch_dropout=0.5)
    images = torch.stack([embedded.images[:7], embedded.images[7:14], embedded.images[14:]])
    loss = image_text_by_hand(embedded.texts[:7], images, batch.image_ids, model.logit_scale, model.logit_bias)
    loss.backward()
    losses, gradients, _ = step(batch, cache, pairs=("image_text",), kind=kind)
    assert losses == {"image_text": pytest.approx(loss.item(), rel=1e-12)}
    expected = engine.gradients()
    assert gradients.keys() == expected.keys() >= {"logit_scale", "vision.pos_embed"}
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_rank_without_pairs_of_a_kind_has_its_hard_negatives_by_number():
    """Where a task begins later, or other ranks have the few samples of a batch."""
    batch = make_batch(images=0, image_negatives=2)
    losses, _, _ = step(Batch(**{**vars(batch), "images": None}), pairs=("text",))
    others, _, _ = step(make_batch(pairs=0, image_negatives=2), pairs=("image_text",))
    assert (losses.keys(), others.keys()) == ({"text"}, {"image_text"})


def expected_losses(engine, batch, scales):
    embedded = engine.forward(batch)
    captions, queries, targets, negatives = embedded.texts.split([7, 6, 6, 18])
    image, text = torch.exp(-scales)
    none, dims = captions[:0], (32, 16)
    return {
        "image_text": info_nce(captions, embedded.images, none, batch.image_ids, image, dims),
        "text": info_nce(queries, targets, negatives, batch.text_ids, text, dims),
    }


@pytest.mark.parametrize("cache", [None, GradientCache(2, 10)])
@pytest.mark.parametrize("tasks", [BOTH, ("image_text",), ("text",)])
def test_each_task_has_the_loss_and_the_gradient_of_its_own_temperature(tasks, cache):
    """Against torch's cross entropy. The temperature of a task that rests has no gradient, rather than zeros."""
    engine, batch = PlainEngine(), make_batch()
    scales = -torch.log(torch.tensor([0.05, 0.3], dtype=torch.float64))
    with torch.no_grad():
        engine.objective.model.logit_scale.copy_(scales[:1])
        engine.objective.model.text_logit_scale.copy_(scales[1:])
    scales.requires_grad_()
    expected = expected_losses(engine, batch, scales)
    (by_scale,) = torch.autograd.grad(sum(expected[task] for task in tasks), scales)
    losses = forward_backward(engine, batch, pairs=tasks, cache=cache)
    assert {task: loss.item() for task, (loss, _) in losses.items()} == {
        task: pytest.approx(expected[task].item(), rel=1e-9) for task in tasks
    }
    for task, of_task in zip(BOTH, by_scale, strict=True):
        gradient = engine.objective.logit_scales[task].grad
        if task in tasks:
            assert gradient.item() == pytest.approx(of_task.item(), rel=1e-8)
        else:
            assert gradient is None


def sigmoid_loss(queries, targets, negatives, ids, scale, bias):
    """SigLIP's, by pairs; what is closer than the positive by more than 0.1 is left out."""
    total = torch.zeros((), dtype=queries.dtype)
    positive = torch.eye(len(ids), dtype=torch.bool)
    for dim, weight in ((32, 1.0), (16, 2.5)):
        q, t, n = (normalize(x[..., :dim], dim=-1) for x in (queries, targets, negatives))
        cosines, own = torch.cat([q @ t.T, q @ n.T], 1), (q * t).sum(1)
        signs = torch.cat([2.0 * positive - 1, -torch.ones(len(q), len(n))], 1)
        same = torch.cat([ids[:, None] == ids, torch.zeros(len(q), len(n), dtype=torch.bool)], 1)
        left_out = (same | (cosines > own[:, None] + 0.1)) & (signs < 0)
        terms = softplus(-signs * (cosines * torch.exp(scale) + bias)).masked_fill(left_out, 0)
        total = total + weight * terms.sum() / len(q)
    return total


@pytest.mark.parametrize("cache", [None, GradientCache(2, 10)])
def test_a_sigmoid_loss_is_siglips_with_a_bias_for_each_task_and_the_temperature_that_they_share(cache):
    batch = make_batch()
    engine = PlainEngine("sigmoid")
    model = engine.objective.model
    embedded = engine.forward(batch, patch_dropout=0.5)
    captions, queries, targets, negatives = embedded.texts.split([7, 6, 6, 18])
    expected = {
        "image_text": sigmoid_loss(
            captions, embedded.images, captions[:0], batch.image_ids, model.logit_scale, model.logit_bias
        ),
        "text": sigmoid_loss(queries, targets, negatives, batch.text_ids, model.logit_scale, model.text_logit_bias),
    }
    sum(expected.values()).backward()
    losses, gradients, _ = step(batch, cache, kind="sigmoid")
    assert losses == {task: pytest.approx(loss.item(), rel=1e-9) for task, loss in expected.items()}
    assert gradients.keys() == engine.gradients().keys() >= {"logit_scale", "logit_bias", "text_logit_bias"}
    assert "text_logit_scale" not in gradients
    for name, gradient in engine.gradients().items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("cache", [None, GradientCache(2, 10)])
def test_graded_pairs_are_ranked_at_the_temperature_of_the_text_loss(cache):
    batch = make_batch(**OF_KIND["graded"])
    engine = PlainEngine("graded")
    embedded = engine.forward(batch, patch_dropout=0.5)
    captions, queries, targets = embedded.texts.split([7, 6, 6])
    model, options = engine.objective.model, {"dims": (32, 16), "weights": (1.0, 2.5)}
    of_images = torch.exp(-model.logit_scale)
    expected = {
        "image_text": matryoshka_info_nce(
            captions, embedded.images, temperature=of_images, query_ids=batch.image_ids, **options
        ),
        "graded": plain_cosent(
            queries, targets, batch.scores, temperature=torch.exp(-model.text_logit_scale), **options
        ).squeeze(),
    }
    sum(expected.values()).backward()
    losses, gradients, _ = step(batch, cache, kind="graded")
    assert losses == {task: pytest.approx(loss.item(), rel=1e-9) for task, loss in expected.items()}
    assert gradients.keys() == engine.gradients().keys()
    for name, gradient in engine.gradients().items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("task", BOTH)
def test_a_batch_that_is_one_chunk_is_a_batch(task):
    batch = make_batch(pairs=0, negatives=0) if task == "image_text" else make_batch(images=0)
    batch = Batch(**{**vars(batch), "images": None}) if task == "text" else batch
    _, gradients, _ = step(batch, pairs=(task,))
    _, cached, passes = step(batch, GradientCache(0, 0), pairs=(task,))
    assert passes == (4 if task == "image_text" else 2)
    torch.testing.assert_close(cached, gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("more", [0, 1, 3, 4])
def test_passes_for_other_ranks_sake_change_no_gradient_and_the_last_is_marked(more):
    """As ZeRO 3 wants them; what is run beyond a rank's own parts is dropped."""
    batch, engine, marks = make_batch(), PlainEngine(), []
    _, gradients, _ = step(batch)

    @contextlib.contextmanager
    def backwards():
        yield lambda loss, last: (marks.append(last), loss.backward())

    engine.forward_passes, engine.backwards = lambda mine: mine + more, backwards
    forward_backward(engine, batch, pairs=BOTH, patch_dropout=0.5, cache=GradientCache(2, 10))
    own = len(list(image_chunks(batch, 2))) + len(list(text_chunks(batch_by_length(batch), 10)))
    assert engine.passes == 2 * (own + 2 * more)
    assert marks == [False] * (own + 2 * more - 1) + [True]
    torch.testing.assert_close(engine.gradients(), gradients, rtol=1e-10, atol=1e-12)


class FarEngine(PlainEngine):
    """Its device is elsewhere: an upload is a copy."""

    def __init__(self):
        super().__init__()
        self.uploads, self.computed = [], []

    def upload(self, part):
        self.uploads.append(Part(*(x.clone() if torch.is_tensor(x) else x for x in vars(part).values())))
        return self.uploads[-1]

    def forward(self, part, **options):
        self.computed.append(part)
        return super().forward(part, **options)


def test_every_chunk_is_uploaded_once_for_both_passes():
    batch, engine = make_batch(), FarEngine()
    forward_backward(engine, batch, pairs=BOTH, patch_dropout=0.5, cache=GradientCache(2, 10))
    assert [id(part) for part in engine.computed] == 2 * [id(part) for part in engine.uploads]
    assert torch.equal(torch.cat([p.images for p in engine.uploads if p.images is not None]), batch.images)
    assert sum(len(p.texts.ids) for p in engine.uploads if p.texts is not None) == len(batch.texts.ids)


def batch_by_length(batch):
    return Batch(**{**vars(batch), "texts": batch.texts.by_length()[0]})


@pytest.mark.parametrize("kind", OF_KIND)
def test_two_ranks_with_caching_give_the_gradients_of_one_process(tmp_path, kind, two_ranks):
    two_ranks(__file__, tmp_path, kind)
    losses, gradients, _ = step(make_batch(**OF_KIND[kind]), kind=kind)
    for rank in (0, 1):
        theirs, averaged = torch.load(tmp_path / f"{rank}.pt")
        assert theirs == pytest.approx(losses, rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(averaged[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def one_rank(rank: int, folder: str, kind: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(0, 2) if rank == 0 else slice(2, None)
    batch = make_batch(rows=rows, **OF_KIND[kind])
    losses, gradients, _ = step(batch, GradientCache(2, 9), dist.group.WORLD, kind=kind)
    torch.save((losses, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), *sys.argv[2:])
