"""Long work on data sets, cut into units: each is done whole or not at all, by whichever engine, in any order.

A `Job` says what is to be done with which pieces of the input; `run_job` does it and publishes the data sets that come
out. What was done already is never done again: receipts beside the output say so, not the engine.
"""

from data_prep.execute.job import Execution, Job, Target, run_job, table
from data_prep.execute.unit import Output, Receipt, Spec, process_shard

__all__ = ["Execution", "Job", "Output", "Receipt", "Spec", "Target", "process_shard", "run_job", "table"]
