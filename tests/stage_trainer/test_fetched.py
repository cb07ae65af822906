import pytest
import torch.distributed as dist
from stage_trainer.run import agreement
from stage_trainer.run.fetched import Fetched
from stage_trainer.run.hooks import Step, Totals


def a_step(fetched, scalars):
    totals = Totals(asked=False, tokens=0, squared_tokens=0, texts=(), corrupt=(), fetched=fetched)
    return Step(0, {}, True, "", scalars, 1, 1, 0.0, totals)


def test_what_each_machine_has_fetched_is_shown_in_the_steps_that_are_logged():
    hook, shown = Fetched(), {}
    hook.after_step(a_step([0, 0], shown))
    assert shown == {}  # data are not remote, or all there already
    hook.after_step(a_step([2_000_000_000, 0], None))
    hook.after_step(a_step([1_000_000_000, 500_000_000], shown))
    assert shown == pytest.approx({"fetched_gigabytes/machine 0": 3.0, "fetched_gigabytes/machine 1": 0.5})


@pytest.mark.parametrize(("node", "number"), [("a", 0), ("b", 1), ("c", 2)])
def test_machines_are_numbered_by_their_first_ranks(monkeypatch, node, number):
    def gather(found, mine):
        found[:] = ["a", "a", "b", "c", "b"]

    monkeypatch.setattr(agreement.platform, "node", lambda: node)
    monkeypatch.setattr(dist, "get_world_size", lambda: 5)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert agreement.machines() == (number, 3)
