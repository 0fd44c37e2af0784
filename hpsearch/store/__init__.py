"""Read and write the record of a study. This package does not import torch, Optuna or MLflow."""
