"""Long work on data sets, cut into units that are done whole or not at all, on any engine and in any order.

A `Job` is the work and the pieces of the input; `run_job` does it and publishes the data sets. Receipts beside the
output record which units are done, so a stopped job continues where it was.
"""

from data_prep.execute.job import Execution, Job, Target, run_job, say, table
from data_prep.execute.unit import Output, Receipt, Spec, process_shard

__all__ = ["Execution", "Job", "Output", "Receipt", "Spec", "Target", "process_shard", "run_job", "say", "table"]
