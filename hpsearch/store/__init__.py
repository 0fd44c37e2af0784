"""The record of a study: its folder, read and written. Knows no torch, Optuna or MLflow."""
