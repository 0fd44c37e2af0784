"""Replace training and evaluation by sleep in every worker process that has this folder on its PYTHONPATH.

`benchmarks/cluster.py` uses it. HPSEARCH_SLEEP_S is the duration of an epoch in seconds. Everything else of a fit is
real: checkpoints, scores, messages, weights.
"""

import os
import sys
import time

if "HPSEARCH_SLEEP_S" in os.environ and "hpsearch.workers.process" in sys.orig_argv:
    import numpy as np

    from hpsearch.training import loop
    from hpsearch.training.rows import Scores

    _EPOCH_S = float(os.environ["HPSEARCH_SLEEP_S"])

    def _train_epoch(progress, *_):
        time.sleep(_EPOCH_S)
        return Scores(0.5, 0.5, 0.4, 0.9)

    def _evaluate_epoch(progress, *_):
        task, epoch = progress.task, len(progress.rows) + 1
        n_images = len(task.held_out_indices)
        level = 0.8 * epoch / task.config.train.epochs + 0.1 * np.random.default_rng(task.seed).random()
        scores = level + 0.1 * np.random.default_rng(epoch).random(n_images)
        progress.counts = np.tile(np.array([20, 5, 5, 70], np.int64), (n_images, 1))
        progress.scores = np.vstack([progress.scores.reshape(epoch - 1, n_images), scores.astype(np.float32)])
        dice = float(scores.mean())
        return Scores(0.5, dice, dice, dice)

    loop._train_epoch, loop._evaluate_epoch = _train_epoch, _evaluate_epoch
