"""What to do after a stage: printed when it is complete."""

from __future__ import annotations

import shlex

from stage_trainer.errors import UserError
from stage_trainer.evaluation.held_out import find
from stage_trainer.recipe import Recipe


def next_steps(recipe: Recipe, number: int) -> str:
    """The commands to go on with once stage `number` is complete."""
    directory = recipe.stage_directory(number)
    lines = []
    if number < len(recipe.stages):
        following = number + 1
        lines.append(
            f"  stage {following}:  launch/stage{following}.sh, or --stage {following}, in place of stage {number}"
        )
    if not recipe.stage(number).kind.both_towers:
        lines.append(f"  use it:   name {directory}/step-…/model as model.text_weights of a recipe")
    else:
        try:
            find(recipe.corpus)
            data = recipe.corpus
        except UserError:
            data = "FOLDER-OF-HELD-OUT-DATA"
        lines += [
            f"  figures:  stage-trainer evaluate {_words(directory, data)}",
            f"  picture:  stage-trainer search {_words(directory, data)}",
            f"  model:    stage-trainer export {_words(directory, 'my-model')}",
        ]
    lines.append(f"  curves:   tensorboard --logdir {_words(recipe.output)}   (first the page Custom Scalars)")
    return "\n".join(["what next:", *lines])


def _words(*words: object) -> str:
    return shlex.join(map(str, words))
