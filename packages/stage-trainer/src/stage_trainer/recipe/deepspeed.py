"""DeepSpeed's options: those that a recipe may set, and why it may not set the others.

DeepSpeed ignores unknown keys, accepts some that have no effect in this trainer, and answers invalid values with a
traceback. Every key is listed here, so that a recipe is checked without importing DeepSpeed, which takes seconds; a
test compares the list with the installed version (0.19.8; https://www.deepspeed.ai/docs/config-json/).
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

from stage_trainer.errors import UserError


def _number(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("a number is expected")
    return value


_Int = Annotated[int, BeforeValidator(_number)]
_Count = Annotated[int, BeforeValidator(_number), Field(ge=0)]
_Some = Annotated[int, BeforeValidator(_number), Field(ge=1)]
_Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class _Offload(_Block):
    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: _Count = 0
    pin_memory: StrictBool = True


class OffloadParam(_Offload):
    buffer_size: _Count = 0
    max_in_cpu: _Count = 0


class OffloadOptimizer(_Offload):
    pipeline_read: StrictBool = False
    pipeline_write: StrictBool = False
    fast_init: StrictBool = False
    ratio: _Share = 1.0


class LeafModule(_Block):
    classes: list[str] | str = []
    names: list[str] | str = []
    name_suffixes: list[str] | str = []


class ZeroOptimization(_Block):
    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_number)] = 0
    contiguous_gradients: StrictBool = True
    reduce_scatter: StrictBool = True
    reduce_bucket_size: _Some = 1
    use_multi_rank_bucket_allreduce: StrictBool = True
    allgather_partitions: StrictBool = True
    allgather_bucket_size: _Count = 0
    overlap_comm: StrictBool | None = None
    offload_param: OffloadParam | None = None
    offload_optimizer: OffloadOptimizer | None = None
    sub_group_size: _Count = 0
    prefetch_bucket_size: _Count = Field(default=0, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: _Count = Field(default=0, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: _Count = Field(default=0, alias="stage3_model_persistence_threshold")
    max_live_parameters: _Count = Field(default=0, alias="stage3_max_live_parameters")
    max_reuse_distance: _Count = Field(default=0, alias="stage3_max_reuse_distance")
    # Accepted without effect: checkpoints hold whole weights anyway.
    gather_16bit_weights_on_model_save: StrictBool = Field(
        default=False, alias="stage3_gather_16bit_weights_on_model_save"
    )
    module_granularity_threshold: _Int = Field(default=0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: StrictBool = Field(default=False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: StrictBool = Field(default=False, alias="stage3_allgather_sequential")
    round_robin_gradients: StrictBool = False
    parameter_alignment: StrictBool = False
    zero_hpz_partition_size: _Count = 1
    zero_quantized_weights: StrictBool = False
    zero_quantized_nontrainable_weights: StrictBool = False
    zero_quantized_gradients: StrictBool = False
    memory_efficient_linear: StrictBool = True
    override_module_apply: StrictBool = True
    log_trace_cache_warnings: StrictBool = False
    enable_sanity_checks: StrictBool = False
    leaf_module: LeafModule = Field(default_factory=LeafModule)


class CommsLogger(_Block):
    enabled: StrictBool = False
    prof_all: StrictBool = True
    prof_ops: list[str] = []
    verbose: StrictBool = False
    debug: StrictBool = False


class FlopsProfiler(_Block):
    enabled: StrictBool = False
    recompute_fwd_factor: Annotated[float, BeforeValidator(_number), Field(ge=0)] = 0.0
    profile_step: _Some = 1
    module_depth: _Int = -1
    top_modules: _Some = 1
    detailed: StrictBool = True
    output_file: str | None = None


class Aio(_Block):
    block_size: _Some = 1
    queue_depth: _Some = 1
    intra_op_parallelism: _Some = 1
    single_submit: StrictBool = False
    overlap_events: StrictBool = True
    use_gds: StrictBool = False


class Throughput(_Block):
    enabled: StrictBool = True
    synchronized: StrictBool = True


class Timers(_Block):
    throughput: Throughput = Field(default_factory=Throughput)


class Options(_Block):
    """What a stage's `deepspeed` may hold. The defaults are DeepSpeed's own, not these; only types are checked here."""

    zero_optimization: ZeroOptimization = Field(default_factory=ZeroOptimization)
    zero_force_ds_cpu_optimizer: StrictBool = True
    communication_data_type: Literal["fp16", "bf16", "fp32"] | None = None
    aio: Aio = Field(default_factory=Aio)
    steps_per_print: _Some | None = None
    wall_clock_breakdown: StrictBool = False
    memory_breakdown: StrictBool = False
    dump_state: StrictBool = False
    disable_python_gc: StrictBool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    comms_logger: CommsLogger = Field(default_factory=CommsLogger)
    flops_profiler: FlopsProfiler = Field(default_factory=FlopsProfiler)
    timers: Timers = Field(default_factory=Timers)


_BATCH = "set by the trainer; use `batch`, the global size of each task, and `gradient_cache`"
_PRECISION = "would round the temperatures too; set 'precision: bf16' instead, which computes in bfloat16 and keeps " \
    "parameters in float32"  # fmt: skip
_MEAN = "is the trainer's: it averages gradients over ranks in float32, which needs no scaling; take it out"
_LOGS = "is not written to; the trainer logs to TensorBoard, and `sinks` take the scalars elsewhere"
_OWN_CHECKPOINTS = "is about checkpoints of DeepSpeed's own, which are not written; see `checkpoint` in the recipe"
_LOADING = "is for DeepSpeed's own data loading; what is drawn is the stage's `data` to say"
_NO_USE = "does nothing in this trainer; take it out"
_REMOVED = "was removed from DeepSpeed; take it out"

REFUSED = {
    "train_batch_size": "is " + _BATCH,
    "train_micro_batch_size_per_gpu": "is " + _BATCH,
    "gradient_accumulation_steps": "would split the batch, and with it the negatives that a contrastive loss compares: "
    "several small losses are not that of one big batch. Set gradient_cache, which gives the gradients of the whole "
    "batch in the memory of a part",
    "managed_gradient_accumulation": "is set by the trainer; take it out",
    "gradient_clipping": "is set by the trainer; use `optimizer.gradient_clipping` instead",
    "optimizer": "would not be used: the optimizer is the recipe's `optimizer`, its rates are the stage's `lr`",
    "scheduler": "would not be used: the rate follows from the stage's lr, warmup_steps and min_lr_ratio",
    "zero_allow_untested_optimizer": "is set by the trainer; take it out",
    **dict.fromkeys(("gradient_allreduce_op", "prescale_gradients", "gradient_predivide_factor"), _MEAN),
    **dict.fromkeys(("bf16", "bfloat16", "fp16"), _PRECISION),
    "torch_autocast": "is the trainer's; set 'precision: bf16' instead",
    "data_types": "is the trainer's; set 'precision' instead",
    "activation_checkpointing": "has no effect on these towers; set model.text.checkpointing and "
    "model.vision.checkpointing instead",
    "compile": "has no effect here; set model.text.compile instead",
    **dict.fromkeys(("checkpoint", "datastates_ckpt"), _OWN_CHECKPOINTS),
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), _LOGS),
    **dict.fromkeys(("data_efficiency", "dataloader_drop_last"), _LOADING),
    **dict.fromkeys(("seq_parallel_communication_data_type", "disable_allgather", "vocabulary_size"), _NO_USE),
    **dict.fromkeys(("autotuning", "hybrid_engine", "weight_quantization"), _NO_USE),
    **dict.fromkeys(("pipeline", "tensor_parallel", "expert_parallel", "use_data_before_expert_parallelism"), _NO_USE),
    "amp": _REMOVED + " and set 'precision: bf16' instead",
    **dict.fromkeys(("nebula", "elasticity", "curriculum_learning", "progressive_layer_drop"), _REMOVED),
    **dict.fromkeys(("compression_training", "quantize_training", "graph_harvesting", "eigenvalue"), _REMOVED),
    **dict.fromkeys(("sparse_gradients", "sparse_attention"), _REMOVED),
    "zero_optimization.cpu_offload": "is DeepSpeed's old way; write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "is DeepSpeed's old way; write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "is DeepSpeed's old way; write pin_memory under offload_optimizer "
    "or offload_param",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is DeepSpeed's old name for "
    "stage3_gather_16bit_weights_on_model_save, and checkpoints hold whole weights anyway; take it out",
    "zero_optimization.compute_grad_norm": "is the trainer's: it clips by the norm and logs it; take it out",
    "zero_optimization.ignore_unused_parameters": "is the trainer's: a tower may rest in a step; take it out",
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.zenflow": "replaces the optimizer, which the recipe sets; take it out",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "is for DeepSpeed's own Muon; take it out",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.offload_optimizer.super_offload": "is for DeepSpeed's own Adam; take it out",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "is for DeepSpeed's own Adam; take it out",
}
"""Options that DeepSpeed has or had and a recipe cannot set, by dotted name, and what to do instead."""


_ZERO_3 = {
    "leaf_module",
    "sub_group_size",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
}
"""Keys that only ZeRO 3 uses, in addition to those that begin with "stage3_"."""


def check(options: dict[str, object], here: str, *, muon: bool) -> None:
    """Checks a stage's `deepspeed`.

    Raises:
        UserError: an option that the trainer sets, one that DeepSpeed does not know (with the nearest that it does), an
            invalid value, or options that contradict each other.
    """
    _check_names(options, Options, "", here)
    try:
        found = Options.model_validate({k: v for k, v in options.items() if k not in REFUSED})
    except ValidationError as error:
        first = error.errors()[0]
        name, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        hint = " (such as {stage: 1})" if name == "zero_optimization" else ""
        raise UserError(f"{here}: deepspeed.{name} is {str(first['input'])[:80]!r}: {what}{hint}") from None
    _check_zero(found, here, muon)


def _check_names(options: dict[str, object], block: type[BaseModel], prefix: str, here: str) -> None:
    known = names_of(block)
    refused = {k.removeprefix(prefix) for k in REFUSED if k.startswith(prefix) and "." not in k.removeprefix(prefix)}
    for key, value in options.items():
        name = f"{prefix}{key}"
        if name in REFUSED:
            if key in ("bf16", "bfloat16", "fp16", "torch_autocast") and value in (None, {"enabled": False}):
                continue
            raise UserError(f"{here}: deepspeed.{name} {REFUSED[name]}")
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted({*known, *refused}), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"{here}: DeepSpeed has no option {name!r}; {hint}")
        if value == "auto":
            raise UserError(
                f"{here}: deepspeed.{name} is 'auto', which only Hugging Face's Trainer fills in; leave it out for "
                "DeepSpeed's default, or write a value"
            )
        if (inner := block_of(block, key)) is not None and isinstance(value, dict):
            _check_names(value, inner, f"{name}.", here)


def _check_zero(found: Options, here: str, muon: bool) -> None:
    zero = found.zero_optimization
    if zero.model_fields_set and "stage" not in zero.model_fields_set:
        raise UserError(
            f"{here}: deepspeed.zero_optimization has no 'stage', which leaves ZeRO off and the rest unused; add "
            "stage: 1, 2 or 3"
        )
    if muon and zero.stage:
        raise UserError(
            f"{here}: Muon needs whole matrices, and ZeRO {zero.stage} cuts them up; "
            "set zero_optimization.stage to 0 or optimizer.name to adamw"
        )
    stated = {type(zero).model_fields[name].alias or name for name in zero.model_fields_set}
    if not zero.stage and (unused := sorted(stated - {"stage"})):
        raise UserError(
            f"{here}: deepspeed.zero_optimization.{unused[0]} is set, and stage 0 is no ZeRO; raise the "
            "stage, or take that out"
        )
    of_3 = sorted(name for name in stated if name in _ZERO_3 or name.startswith("stage3_"))
    if zero.stage < 3 and of_3:
        raise UserError(
            f"{here}: deepspeed.zero_optimization.{of_3[0]} is of ZeRO 3, and its stage is {zero.stage}; raise that, "
            "or take it out"
        )
    for name in ("offload_param", "offload_optimizer"):
        block = getattr(zero, name)
        if block is None or block.device == "none":
            continue
        if name == "offload_param" and zero.stage < 3:
            raise UserError(
                f"{here}: deepspeed.zero_optimization.{name} needs ZeRO 3 or more, and its stage is {zero.stage}; "
                "raise that, or take it out"
            )
        if block.device == "nvme" and not block.nvme_path:
            raise UserError(f"{here}: deepspeed.zero_optimization.{name} is on nvme without nvme_path; add it")
    offload = zero.offload_optimizer
    if offload is None or offload.device == "none":
        return
    if offload.ratio < 1 and zero.stage < 3:
        raise UserError(
            f"{here}: deepspeed.zero_optimization.offload_optimizer.ratio is {offload.ratio:g}, and a part can be "
            f"offloaded under ZeRO 3 alone (its stage is {zero.stage}); take it out"
        )
    if found.zero_force_ds_cpu_optimizer:
        raise UserError(
            f"{here}: deepspeed.zero_optimization.offload_optimizer requires DeepSpeed's own Adam unless "
            "deepspeed.zero_force_ds_cpu_optimizer is false; set that: the optimizer is the recipe's"
        )


def names_of(block: type[BaseModel]) -> set[str]:
    """The names of a block's options, with aliases."""
    return {name for key, field in block.model_fields.items() for name in (key, field.alias) if name}


def block_of(block: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The block that is an option's value, if it is one."""
    field = block.model_fields.get(key)
    options = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
