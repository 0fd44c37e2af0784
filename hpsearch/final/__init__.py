"""`run_final` and its result: retrain the best configuration and evaluate it on the test split."""

from hpsearch.final.run import run_final as run_final
from hpsearch.report.final_record import FinalResult as FinalResult
