"""DeepSpeed's options in a recipe, against the installed DeepSpeed."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from stage_trainer.errors import UserError
from stage_trainer.recipe import deepspeed
from stage_trainer.recipe.read import load


def read(recipes, options, *more):
    return load(recipes / "drawn.yaml", ["optimizer.name=adamw", f"deepspeed={options}", *more], 1).recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((f"{{{name}: 1}}", f"deepspeed.{re.escape(name)} ") for name in deepspeed.REFUSED if "." not in name),
        *(
            (f"{{zero_optimization: {{stage: 2, {name.rpartition('.')[2]}: true}}}}", f"deepspeed.{re.escape(name)} ")
            for name in deepspeed.REFUSED
            if name.count(".") == 1
        ),
        ("{scheduler: {type: WarmupLR, params: {warmup_max_lr: 0.5}}}", "lr, warmup_steps and min_lr_ratio"),
        ("{optimizer: {type: AdamW, params: {lr: 0.5}}}", "the optimizer is the recipe's `optimizer`"),
        ("{train_batch_size: 48}", "use `batch`"),
        ("{gradient_accumulation_steps: 2}", "Set gradient_cache"),
        ("{bf16: {enabled: true}}", "would round the temperatures too; set 'precision: bf16'"),
        ("{zero_optimisation: {stage: 2}}", "no option 'zero_optimisation'; did you mean 'zero_optimization'"),
        ("{optimiser: {type: Adam}}", "did you mean 'optimizer'"),
        ("{zzz: 1}", "no option 'zzz'; known: aio, "),
        ("{zero_optimization: {stage: 1, reduce_bucketsize: 5}}", "did you mean 'reduce_bucket_size'"),
        ("{zero_optimization: {stage: 3, stage3_max_live_parameter: 5}}", "did you mean 'stage3_max_live_parameters'"),
        ("{zero_optimization: {stage: 3, offload_param: {devise: cpu}}}", "param.devise'; did you mean 'device'"),
        ("{zero_optimization: {stage: 3, leaf_module: {class: [a]}}}", "did you mean 'classes'"),
        ("{flops_profiler: {enable: true}}", "did you mean 'enabled'"),
        ("{timers: {throughput: {enable: true}}}", "timers.throughput.enable'; did you mean 'enabled'"),
        ("{zero_optimization: {stage: 7}}", "stage is '7': Input should be 0, 1, 2 or 3"),
        ("{zero_optimization: {stage: -1}}", "stage is '-1'"),
        ("{zero_optimization: {stage: true}}", "stage is 'True': a number is expected"),
        ("{zero_optimization: {stage: '1'}}", "stage is '1': a number is expected"),
        ("{zero_optimization: {stage: 1, reduce_bucket_size: -5}}", "reduce_bucket_size is '-5'"),
        ("{zero_optimization: {stage: 1, reduce_bucket_size: many}}", "reduce_bucket_size is 'many'"),
        ("{zero_optimization: {stage: 1, reduce_bucket_size: auto}}", "is 'auto', which only Hugging Face"),
        ("{zero_optimization: {stage: 1, overlap_comm: 'no'}}", "overlap_comm is 'no'"),
        ("{zero_optimization: {reduce_bucket_size: 5}}", "has no 'stage', which leaves ZeRO off"),
        ("{zero_optimization: 1}", "zero_optimization is '1': .*such as {stage: 1}"),
        ("{zero_optimization: null}", "zero_optimization is 'None'"),
        ("{zero_optimization: {stage: 2, offload_param: {device: cpu}}}", "offload_param needs ZeRO 3 or more"),
        ("{zero_optimization: {stage: 0, reduce_bucket_size: 5e8}}", "reduce_bucket_size is set, and stage 0"),
        ("{zero_optimization: {stage: 1, stage3_prefetch_bucket_size: 1}}", "is of ZeRO 3, and its stage is 1"),
        ("{zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}}", "offload_optimizer is set, and stage 0"),
        ("{zero_optimization: {stage: 3, offload_param: {device: disk}}}", "offload_param.device is 'disk'"),
        ("{zero_optimization: {stage: 3, offload_param: {device: nvme}}}", "without nvme_path"),
        ("{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}", "zero_force_ds_cpu_optimizer is false"),
        ("{zero_optimization: {stage: 2, offload_optimizer: {device: cpu, ratio: 0.5}}}", "ratio is 0.5"),
        ("{zero_optimization: {stage: 2, zero_quantized_gradients: true}}", "is of ZeRO 3, and its stage is 2"),
        ("{steps_per_print: 0}", "steps_per_print is '0'"),
        ("{communication_data_type: fp64}", "communication_data_type is 'fp64'"),
        ("{wall_clock_breakdown: 'false'}", "wall_clock_breakdown is 'false'"),
        ("{log_level: loud}", "log_level is 'loud'"),
    ],
)  # fmt: skip
def test_an_option_that_would_not_do_what_it_says_is_refused_by_name(recipes, options, message):
    with pytest.raises(UserError, match=message):
        read(recipes, options)


@pytest.mark.parametrize(
    "options",
    [
        "{}",
        "{bf16: {enabled: false}, fp16: {enabled: false}}",
        "{zero_optimization: {stage: 2, overlap_comm: true}}",
        "{zero_optimization: {stage: 3, stage3_gather_16bit_weights_on_model_save: true, prefetch_bucket_size: 5e7}}",
        "{zero_force_ds_cpu_optimizer: false, zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}",
        "{steps_per_print: 10, wall_clock_breakdown: true, communication_data_type: fp32, log_level: info}",
        "{flops_profiler: {enabled: true, profile_step: 5}, comms_logger: {enabled: true}}",
    ],
)
def test_an_option_that_deepspeed_honours_is_read_and_deepspeed_reads_it(recipes, options):
    from deepspeed.runtime.config import DeepSpeedConfig
    from stage_trainer.engine.make import deepspeed_config

    recipe = read(recipes, options)
    config = deepspeed_config(recipe.stages[0].deepspeed, recipe.optimizer.gradient_clipping)
    assert DeepSpeedConfig(config).gradient_clipping == recipe.optimizer.gradient_clipping
    assert {**config, **recipe.stages[0].deepspeed} == config


def test_muon_under_zero_is_refused(recipes):
    with pytest.raises(UserError, match="Muon needs whole matrices, and ZeRO 2 cuts them up"):
        load(recipes / "drawn.yaml", ["optimizer.name=muon", "deepspeed={zero_optimization: {stage: 2}}"], stage=1)


def test_every_key_that_deepspeed_reads_is_known_here():
    """DeepSpeed lists its keys nowhere: what its reader asks a mapping for is what it knows."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Asked(dict):
        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

        def keys(self):
            return self

    DeepSpeedConfig(Asked(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
    ours = {name for name in deepspeed.REFUSED if "." not in name} | deepspeed.names_of(deepspeed.Options)
    assert ours == asked


def test_every_block_has_the_keys_and_the_limits_of_deepspeeds_own():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    pairs = [
        ("zero_optimization.", deepspeed.ZeroOptimization, zero.DeepSpeedZeroConfig),
        ("zero_optimization.offload_param.", deepspeed.OffloadParam, zero.DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.offload_optimizer.", deepspeed.OffloadOptimizer, zero.DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.leaf_module.", deepspeed.LeafModule, DeepSpeedZeroLeafModuleConfig),
        ("comms_logger.", deepspeed.CommsLogger, CommsLoggerConfig),
        ("timers.throughput.", deepspeed.Throughput, DeepSpeedThroughputTimerConfig),
    ]
    for prefix, ours, theirs in pairs:
        refused = {n.removeprefix(prefix) for n in deepspeed.REFUSED if n.rpartition(".")[0] + "." == prefix}
        removed = set(_REMOVED_ZERO_CONFIG_KEYS) if prefix == "zero_optimization." else set()
        assert deepspeed.names_of(ours) | refused == deepspeed.names_of(theirs) | removed, prefix
        for name in ours.model_fields:
            for value in (-1, 0):  # no limit of theirs is passed over
                _same_verdict(ours, theirs, name, value)


def _same_verdict(ours, theirs, name, value):
    """Where DeepSpeed refuses a value, so do we."""
    from pydantic import ValidationError

    try:
        theirs(**{name: value})
    except (ValidationError, TypeError):
        with pytest.raises(ValidationError):
            ours(**{name: value})


def test_the_keys_of_plain_blocks_are_deepspeeds():
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert deepspeed.names_of(deepspeed.Aio) == set(AIO_DEFAULT_DICT)
    of_profiler = {
        value for name, value in vars(profiling).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("_DEFAULT", "_FORMAT"))
    }  # fmt: skip
    assert deepspeed.names_of(deepspeed.FlopsProfiler) == of_profiler


def test_deepspeed_is_bounded_to_the_versions_that_its_private_names_were_tried_on():
    """In the package's requirements and in the docstring alike."""
    from stage_trainer.engine import deepspeed_private

    package = tomllib.loads((Path(__file__).parents[2] / "packages/stage-trainer/pyproject.toml").read_text())
    (wanted,) = (r for r in map(Requirement, package["project"]["dependencies"]) if r.name == "deepspeed")
    assert version("deepspeed") in wanted.specifier
    bounds = {s.operator: s.version for s in wanted.specifier}
    said = f"pyproject.toml asks for {bounds['>=']} or later, below {bounds['<']};"
    assert said in " ".join(deepspeed_private.__doc__.split())
