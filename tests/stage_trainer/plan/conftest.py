import pytest
from torch.profiler import ProfilerActivity, profile


@pytest.fixture
def profiled_peak():
    """profiled_peak(run): most bytes that the CPU's allocator had given out at a time, above what there was, by the
    profiler's account of it."""

    def measure(run) -> int:
        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    return measure
