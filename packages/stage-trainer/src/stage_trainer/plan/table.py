"""A plan as text, no line of it longer than WIDTH."""

from __future__ import annotations

import textwrap

from stage_trainer.plan.devices import GIB
from stage_trainer.plan.memory import Setting
from stage_trainer.plan.planner import Cluster, Option, SegmentPlan, StagePlan
from stage_trainer.plan.roofline import ELEMENTWISE

WIDTH = 120


def heading(name: str, precision: str, cluster: Cluster) -> str:
    """What is planned for, and what is assumed, for a recipe of that name and precision."""
    device = cluster.device
    computed = device.precision(precision)
    peak = device.peak(computed)
    lines = [
        f"{name} on {cluster.ranks} × {device.name}: {device.memory / GIB:.1f} GiB each, of which "
        f"{cluster.usable / GIB:.1f} GiB are planned with (the rest goes to libraries and fragments)",
    ]
    if device.timed and peak and device.bandwidth:
        link = f", {cluster.link / 1e9:,.0f} GB/s between devices" if cluster.link and cluster.ranks > 1 else ""
        lines.append(
            f"times are predicted, not measured: large products at {device.products:.0%} of {peak / 1e12:,.0f} TFLOP/s "
            f"dense {computed}, everything else at {device.stream * ELEMENTWISE:.0%} of "
            f"{device.bandwidth / 1e12:,.2f} TB/s, {device.launch * 1e6:.0f} µs for the host to issue an operation"
            f"{link}; "
            + (f"at most {cluster.loader:,.0f} images a second for each" if cluster.loader else "data never waited for")
        )
    else:
        lines.append("too little is known of this device, so no times; give it with --peak and --bandwidth")
    return "\n".join(wrapped(lines))


def stage_table(plan: StagePlan, cluster: Cluster) -> str:
    """Each segment's ways to run, and the memory, operations, time and money of the recipe's own and the best."""
    computed = f"{plan.precision}, blocks in FP8" if plan.fp8 else plan.precision
    lines = [f"stage {plan.number}: {plan.steps:,} steps, {computed}; {plan.lengths.origin}"]
    lines += [f"  {line}" for line in plan.lengths.cut]
    for segment_plan in plan.segments:
        lines += ["", *_segment(segment_plan, plan, cluster)]
    deciding = plan.deciding
    if len(plan.segments) > 1:
        lines += ["", f"  the steps from {deciding.segment.start:,} decide what fits"]
    best = deciding.best
    if best is None:
        lines.append(
            f"  nothing fits into {cluster.usable / GIB:.1f} GiB: take more or larger devices, or a smaller model"
        )
    else:
        lines.append(f"  {'fastest' if best.time else 'first'} that fits: {_in_recipe(best.setting)}")
    lines += _totals(plan, cluster)
    return "\n".join(wrapped(lines))


def wrapped(lines: list[str]) -> list[str]:
    """Lines that are too long go on below, further to the right."""
    parts = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        parts += textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return parts


def _segment(plan: SegmentPlan, stage: StagePlan, cluster: Cluster) -> list[str]:
    segment, sizes = plan.segment, plan.sizes
    dropped = f", {segment.patch_dropout:.0%} of the patches dropped" if segment.patch_dropout else ""
    lines = [
        f"  steps {segment.start:,} to {segment.stop:,}: {segment.resolution} px{dropped}; a device has "
        f"{sizes.images:,} images and {sizes.texts:,} texts of {sizes.length} tokens",
    ]
    shown = [("the recipe's: " + describe(plan.as_written.setting), plan.as_written)]
    shown += [(describe(option.setting), option) for option in plan.tried]
    width = min(max(len(name) for name, _ in shown), WIDTH - 50)
    lines.append(f"    {'way to run':<{width}}{'peak':>14}  {'fits':<4}{'s/step':>9}{'samples/s':>11}{'MFU':>6}")
    for name, option in shown:
        seconds, peak = plan.seconds(option, cluster), cluster.device.peak(stage.precision)
        speed = f"{'–':>9}{'–':>11}{'–':>6}"
        if seconds and peak:
            mfu = option.flops.model / (seconds * cluster.ranks * peak)
            speed = f"{seconds:>9.3g}{plan.samples / seconds:>11,.0f}{mfu:>6.0%}"
        fits = "yes" if option.fits else "no"
        *above, name = textwrap.wrap(name, width, subsequent_indent="  ")
        lines += [f"    {part}" for part in above]
        lines.append(f"    {name:<{width}}{_size(option.memory.total):>14}  {fits:<4}{speed}")
    option = plan.as_written if plan.as_written.fits or not plan.best else plan.best
    return [*lines, "", *_details(option), *_times(plan, option, stage, cluster)]


def _times(plan: SegmentPlan, option: Option, stage: StagePlan, cluster: Cluster) -> list[str]:
    """Where the time of a step goes in one way to run, and what bounds it."""
    seconds, peak = plan.seconds(option, cluster), cluster.device.peak(stage.precision)
    if option.time is None or seconds is None or not peak:
        return []
    available, waiting = seconds * cluster.ranks * peak, seconds - option.time.total
    bound = "waiting for data" if waiting > 0 else option.time.bound
    return [
        f"    time of a step, predicted: {seconds:.3g} s, bound by {bound}; MFU {option.flops.model / available:.0%}, "
        f"with what is computed again {option.flops.total / available:.0%}",
        *(
            f"    {time:>11.3g} s  {time / seconds:>4.0%}  {name}"
            for name, time in (*option.time.parts, ("waiting for data", waiting))
            if time > 0
        ),
    ]


def _details(option: Option) -> list[str]:
    """Memory by part and operations of one way to run."""
    flops = option.flops
    parts = [f"    {_size(size):>13}  {name}" for name, size in option.memory.parts.items() if size]
    return [
        f"    memory of one device, {describe(option.setting)}, at its peak ({_moment(option)}):",
        *parts,
        f"    floating-point operations of a step, on all devices: {_operations(flops.forward)} forward, "
        f"{_operations(flops.backward)} backward, {_operations(flops.recomputed)} recomputed",
    ]


def _moment(option: Option) -> str:
    """`memory` numbers the moments of a backward pass; which one it is says nothing to a person."""
    tower, is_backward, _ = option.memory.moment.partition(", backward")
    return f"in the backward pass of the {tower}" if is_backward else option.memory.moment


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _operations(count: float) -> str:
    """With the unit that leaves up to four digits before the point."""
    units = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    size, unit = next(((size, unit) for size, unit in units if count >= size), units[-1])
    return f"{count / size:,.4g} {unit}"


def _totals(plan: StagePlan, cluster: Cluster) -> list[str]:
    """Days and money of the stage as the recipe has it, or, where that does not fit, in the best way."""
    hours = 0.0
    for segment_plan in plan.segments:
        written = segment_plan.as_written
        option = written if plan.deciding.as_written.fits else segment_plan.best
        seconds = segment_plan.seconds(option, cluster) if option else None
        if seconds is None:
            return []
        hours += seconds * (segment_plan.segment.stop - segment_plan.segment.start) / 3600
    how = "as in the recipe" if plan.deciding.as_written.fits else "in the fastest way that fits"
    line = f"  {how}: {_time(hours)}, {_round(hours * cluster.ranks)} device hours"
    if cluster.price is not None:
        line += f", {_round(hours * cluster.ranks * cluster.price)} at {cluster.price:g} a device hour"
    return [line]


def describe(setting: Setting) -> str:
    """In a few words."""
    words = []
    if setting.cache:
        words.append(f"chunks of {setting.cache.images or 'all'} images, {setting.cache.tokens or 'all'} tokens")
    if setting.checkpointing_image and setting.checkpointing_text:
        words.append("checkpointing")
    elif setting.checkpointing_image or setting.checkpointing_text:
        words.append(f"checkpointing of {'images' if setting.checkpointing_image else 'texts'}")
    if setting.zero:
        words.append(f"ZeRO {setting.zero}")
    return ", ".join(words) or "at once"


def _in_recipe(setting: Setting) -> str:
    """As the recipe writes it."""
    cache = f"{{images: {setting.cache.images}, tokens: {setting.cache.tokens}}}" if setting.cache else "none"
    return (
        f"gradient_cache: {cache}, checkpointing: {str(setting.checkpointing_image).lower()} (both towers), "
        f"zero_optimization: {{stage: {setting.zero}}}"
    )


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} seconds"
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def _round(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
