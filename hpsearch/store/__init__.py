"""Read and write the record of a study, which is its folder. Does not import torch, Optuna or MLflow."""
