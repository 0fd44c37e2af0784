"""`run_final` and its result: retrain the best configuration and evaluate it on the test split."""

from hpsearch.final.result import FinalResult as FinalResult
from hpsearch.final.run import run_final as run_final
