"""Retrain one configuration and evaluate it on the test split: `run_final` and its result."""

from hpsearch.final.run import run_final as run_final
from hpsearch.report.final_record import FinalResult as FinalResult
