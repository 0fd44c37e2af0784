"""The search: study, record, coordinator, workers, racing. The only place that knows Optuna."""
