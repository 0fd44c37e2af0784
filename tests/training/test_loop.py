import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hpsearch import paths as files
from hpsearch.config.data import AugmentConfig
from hpsearch.config.model import UNetConfig
from hpsearch.config.train import TrainConfig
from hpsearch.data.batches import DeviceData, eval_batches, train_batches
from hpsearch.errors import CheckpointError, ConfigError, DivergedError, OutOfMemoryError
from hpsearch.models.network import uses_batch_statistics
from hpsearch.models.unet import UNet
from hpsearch.paths import FitPaths
from hpsearch.training import checkpoint, loop, progress
from hpsearch.training.checkpoint import load_weights
from hpsearch.training.evaluation import eval_batch_size, evaluate, predict_logits, resize_logits
from hpsearch.training.losses import loss_function
from hpsearch.training.metrics import PixelCounts, dice, jaccard
from hpsearch.training.progress import Progress, finish_fit
from hpsearch.training.rows import EpochRow
from hpsearch.typed_json import from_json
from tests.training.fakes import FLOAT32, NORMALIZATION, FakeCache, fit, fit_arguments, make_data


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def unkilled() -> Progress:
    return fit(**fit_arguments())


@pytest.fixture(scope="module")
def best_of_unkilled(tmp_path_factory) -> bytes:
    paths = FitPaths(tmp_path_factory.mktemp("unkilled") / "fold0")
    fit(**fit_arguments(), paths=paths, keep_best=True)
    return paths.best.read_bytes()


@pytest.fixture
def folder(tmp_path) -> FitPaths:
    return FitPaths(tmp_path / "fold0")


def weights(result: Progress) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in result.model.state_dict().items()}


def assert_equal(result: Progress, expected: Progress) -> None:
    assert weights(result) == weights(expected)
    assert result.scores.tobytes() == expected.scores.tobytes()
    assert result.counts.tobytes() == expected.counts.tobytes()
    assert [(row.epoch, row.train, row.held_out, row.lr) for row in result.rows] == [
        (row.epoch, row.train, row.held_out, row.lr) for row in expected.rows
    ]


def recorded(folder: FitPaths) -> list[EpochRow]:
    return [from_json(EpochRow, json.loads(line)) for line in folder.epochs.read_text().splitlines()]


def finish(result: Progress, folder: FitPaths, **changes):
    return finish_fit(result, folder, make_data(), FLOAT32, **changes)


def batches(indices, data: DeviceData | None = None, batch_size: int = 16):
    return eval_batches(
        data or make_data(), indices, batch_size=batch_size, normalization=NORMALIZATION, size=(16, 16)
    )


# --- what a fit computes ------------------------------------------------------------------------------------------


def test_a_fit_is_the_plain_loop_it_claims_to_be(unkilled):
    arguments = fit_arguments()
    model = UNet(arguments["model_config"], 3, seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = 0
    for epoch in (1, 2, 3):
        model.train()
        losses = []
        for images, masks in train_batches(
            arguments["data"],
            np.arange(13),
            batch_size=4,
            seed=5,
            epoch=epoch,
            augment=arguments["augment"],
            normalization=NORMALIZATION,
            size=(16, 16),
        ):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 9))
            logits, target = model(images), masks.float()
            probabilities = torch.sigmoid(logits)
            overlap = 2 * (probabilities * target).sum((1, 2, 3)) + 1
            soft_dice = overlap / (probabilities.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)
            loss = F.binary_cross_entropy_with_logits(logits, target) + (1 - soft_dice).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        assert unkilled.rows[epoch - 1].train.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert step == 9
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(unkilled.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_fit_learns_what_can_be_learnt():
    train = TrainConfig(epochs=12, batch_size=4, lr=0.1)
    result = fit(**fit_arguments(train=train, model_config=UNetConfig(base_channels=4, depth=2)))
    assert result.scores.shape == (12, 7)
    assert result.scores[-1].mean() > 0.9
    assert result.rows[-1].train.loss < 0.5 * result.rows[0].train.loss


def test_same_seed_same_bytes_whatever_the_global_generators_hold(unkilled):
    torch.manual_seed(123)
    np.random.seed(123)
    assert_equal(fit(**fit_arguments()), unkilled)


def test_another_seed_gives_another_network(unkilled):
    assert weights(fit(**fit_arguments(seed=6))) != weights(unkilled)


def test_rows_tell_rates_scores_speed_and_memory(unkilled):
    last = unkilled.rows[-1]
    assert [row.epoch for row in unkilled.rows] == [1, 2, 3]
    assert last.lr == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 8 / 9)))
    counts = PixelCounts.from_columns(unkilled.counts)
    assert last.held_out is not None
    assert last.held_out.dice == pytest.approx(dice(counts).mean())
    assert last.held_out.jaccard == pytest.approx(jaccard(counts).mean())
    assert last.images_per_s == pytest.approx(12 / last.train_s)
    assert last.peak_bytes > 2**20
    assert abs(last.time - time.time()) < 3600


@pytest.mark.parametrize("metric", ["dice", "jaccard"])
def test_scores_are_the_metric_of_the_held_out_images_in_their_order(metric, unkilled):
    result = fit(**fit_arguments(metric=metric))
    assert result.scores.dtype == np.float32
    expected = {"dice": dice, "jaccard": jaccard}[metric](PixelCounts.from_columns(result.counts))
    np.testing.assert_array_equal(result.scores[-1], expected.astype(np.float32))
    assert weights(result) == weights(unkilled)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
def test_every_optimizer_and_normalization_trains_and_resumes_exactly(optimizer, norm, folder):
    train = TrainConfig(epochs=2, batch_size=4, optimizer=optimizer, lr=1e-3, loss="jaccard")
    changes = {"train": train, "model_config": UNetConfig(base_channels=2, depth=1, norm=norm)}
    expected = fit(**fit_arguments(**changes))
    fit(**fit_arguments(**changes), paths=folder, on_epoch=lambda *_: "stop")
    assert_equal(fit(**fit_arguments(**changes), paths=folder), expected)


def test_without_held_out_images_nothing_is_scored(folder):
    result = fit(**fit_arguments(held_out_indices=np.arange(0), paths=folder))
    assert result.scores.shape == (3, 0)
    assert result.counts.shape == (0, 4)
    assert {row.held_out for row in result.rows} == {None}
    summary = finish(result, folder)
    assert summary.value is None
    assert not folder.examples.exists()


def test_a_training_set_smaller_than_a_batch_is_one_batch():
    result = fit(**fit_arguments(train_indices=np.arange(3), train=TrainConfig(epochs=1, batch_size=16)))
    assert len(result.rows) == 1


def test_bf16_autocast_leaves_weights_and_scores_in_float32():
    result = fit(**fit_arguments(runtime=dataclasses.replace(FLOAT32, precision="bf16")))
    assert {t.dtype for t in result.model.parameters()} == {torch.float32}
    assert np.isfinite(result.scores).all()


def test_grayscale_images_train_a_network_of_one_channel():
    normalization = dataclasses.replace(NORMALIZATION, mean=(0.5,), std=(0.25,))
    result = fit(**fit_arguments(in_channels=1, data=make_data(), normalization=normalization))
    assert result.model.state_dict()["encoder.0.0.conv.weight"].shape[1] == 1


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_depends_on_no_batch_size(unkilled):
    loss = loss_function(TrainConfig(loss="bce+dice"))
    results = [evaluate(unkilled.model, batches(np.arange(13, 20), batch_size=n), FLOAT32, loss) for n in (1, 3, 7)]
    for result in results:
        np.testing.assert_array_equal(result.counts, unkilled.counts)
        held_out = unkilled.rows[-1].held_out
        assert held_out is not None
        assert result.loss == pytest.approx(held_out.loss, rel=1e-5)
    assert math.isnan(evaluate(unkilled.model, batches(np.arange(3)), FLOAT32).loss)


def test_counts_are_those_of_the_logits_above_zero(unkilled):
    batch = next(eval_batches(make_data(), np.arange(7), batch_size=7, normalization=NORMALIZATION, size=(16, 16)))
    with torch.no_grad():
        preds = unkilled.model(batch.images) > 0
    result = evaluate(unkilled.model, batches(np.arange(7)), FLOAT32)
    masks = batch.masks.bool()
    expected = torch.stack([preds & masks, preds & ~masks, ~preds & masks, ~preds & ~masks], 1).sum((2, 3, 4))
    np.testing.assert_array_equal(result.counts, expected.numpy())


def test_scores_are_computed_at_the_size_of_the_truth():
    truth = FakeCache(size=(32, 24))
    data = make_data(truth=truth)
    result = fit(**fit_arguments(data=data, eval_size=(32, 24)))
    assert set(result.counts.sum(1)) == {32 * 24}
    logits, masks = next(predict_logits(result.model, batches(np.arange(13, 20), data), FLOAT32))
    assert logits.shape == masks.shape == (7, 1, 32, 24)
    np.testing.assert_array_equal(masks[:, 0].numpy(), truth.masks[13:20])
    np.testing.assert_array_equal(((logits > 0) & (masks > 0)).sum((1, 2, 3)).numpy(), result.counts[:, 0])


def test_windows_are_scored_where_the_output_of_a_valid_network_lies():
    config = UNetConfig(base_channels=2, depth=1, stacking=1, padding="valid", norm="none")
    data = make_data()
    result = fit(**fit_arguments(model_config=config, data=data, stretch=False))
    # 16 -> 14 | pool 7 -> 5 | up 10 -> 8: four pixels less on each side.
    assert set(result.counts.sum(1)) == {8 * 8}
    logits, masks = next(predict_logits(result.model, batches(np.arange(13, 20), data), FLOAT32))
    assert logits.shape == (7, 1, 8, 8)
    np.testing.assert_array_equal(masks[:, 0].numpy(), data.cache.masks[13:20, 4:12, 4:12])
    stretched = fit(**fit_arguments(model_config=config, data=data))
    assert set(stretched.counts.sum(1)) == {16 * 16}


def test_an_evaluation_size_that_the_masks_do_not_have_is_a_fault():
    with pytest.raises(ValueError, match="but the masks have 256 pixels"):
        fit(**fit_arguments(eval_size=(32, 32)))


def test_logits_of_the_right_size_are_untouched_and_others_interpolated():
    logits = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert resize_logits(logits, (8, 8)) is logits
    larger = resize_logits(logits, (16, 12))
    torch.testing.assert_close(larger, F.interpolate(logits, size=(16, 12), mode="bilinear"), rtol=1e-5, atol=1e-5)
    flat = resize_logits(torch.full((1, 1, 9, 9), 2.0), (4, 4))
    torch.testing.assert_close(flat, torch.full((1, 1, 4, 4), 2.0))
    # Shrinking averages: stripes nearly cancel, whichever pixels lie at the centres of the new ones.
    stripes = torch.tensor([3.0, -3.0, 3.0, -3.0, -3.0]).repeat(4).expand(1, 1, 20, 20)
    assert float(resize_logits(stripes, (4, 4)).abs().max()) < 1.5


def test_a_gpu_evaluates_more_images_at_once_than_it_trains_on():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [eval_batch_size(16, (side, side), cpu) for side in (64, 128, 572)] == [32, 16, 16]
    assert [eval_batch_size(16, (side, side), cuda) for side in (64, 128, 572)] == [256, 64, 64]


# --- what a fit writes --------------------------------------------------------------------------------------------


class ValueReads(TorchDispatchMode):
    """Counts the operations that a device would have to be waited for: those whose result depends on values."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        self.n += not tags.isdisjoint(func.tags)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_no_step_and_no_evaluated_batch_asks_for_a_value(norm, optimizer, monkeypatch):
    """What `test_loop_on_cuda.py` asks CUDA itself, without a GPU: nothing between two epochs makes anyone wait."""
    monkeypatch.setattr(loop, "eval_batch_size", lambda *_: 4)

    def n_reads(n_images: int) -> int:
        augment = AugmentConfig(
            hflip=0.5, vflip=0.5, brightness=0.2, contrast=0.2, hue=0.1, rotate=10, blur=1, noise=0.1
        )
        arguments = fit_arguments(
            data=make_data(FakeCache(n=2 * n_images)),
            model_config=UNetConfig(base_channels=2, depth=1, stacking=1, norm=norm),
            train=TrainConfig(epochs=2, batch_size=4, optimizer=optimizer, loss="bce+dice+jaccard"),
            augment=augment,
            train_indices=np.arange(n_images),
            held_out_indices=np.arange(n_images, 2 * n_images),
        )
        with ValueReads() as reads:
            fit(**arguments)
        return reads.n

    assert n_reads(24) == n_reads(8)


def test_after_each_epoch_come_checkpoint_scores_line_and_call_in_this_order(folder):
    seen = []

    def on_epoch(row, scores):
        seen.append(row)
        assert checkpoint.load_checkpoint(folder.last)["epoch"] == row.epoch
        np.testing.assert_array_equal(np.load(folder.scores)[-1], scores)
        assert np.load(folder.scores).shape == (row.epoch, 7)
        assert recorded(folder) == seen
        return "go"

    result = fit(**fit_arguments(), paths=folder, on_epoch=on_epoch)
    assert seen == result.rows
    assert not result.stopped
    assert not folder.best.exists()


def test_stop_ends_the_fit_after_the_epoch_and_it_goes_on_from_there(folder, unkilled):
    result = fit(**fit_arguments(), paths=folder, on_epoch=lambda row, _: "stop" if row.epoch == 2 else "go")
    assert result.stopped
    assert len(result.rows) == 2
    assert_equal(fit(**fit_arguments(), paths=folder), unkilled)


def test_a_resumed_fit_has_its_last_epoch_judged_again(folder, unkilled):
    fit(**fit_arguments(), paths=folder, on_epoch=lambda *_: "stop")
    judged = []
    again = fit(**fit_arguments(), paths=folder, on_epoch=lambda row, scores: judged.append((row, scores)) or "stop")
    assert again.stopped
    assert [row for row, _ in judged] == list(again.rows)
    np.testing.assert_array_equal(judged[0][1], unkilled.scores[0])


def test_stop_after_the_last_epoch_is_no_stop():
    assert not fit(**fit_arguments(), on_epoch=lambda row, _: "stop" if row.epoch == 3 else "go").stopped


def test_best_is_kept_at_once_when_the_held_out_score_improves(folder):
    kept = []

    def on_epoch(row, scores):
        kept.append((row.epoch, float(scores.mean()), checkpoint.load_checkpoint(folder.best)))
        return "go"

    fit(
        **fit_arguments(train=TrainConfig(epochs=6, batch_size=4, lr=0.3)),
        paths=folder,
        keep_best=True,
        on_epoch=on_epoch,
    )
    best = -1.0
    for epoch, score, state in kept:
        if score > best:
            best, best_epoch = score, epoch
        assert (state["epoch"], state["score"]) == (best_epoch, best)


def test_finish_leaves_weights_scores_counts_examples_and_the_summary(folder):
    result = fit(**fit_arguments(), paths=folder, keep_best=True)
    summary = finish(result, folder, extra={"threshold": 0.5})
    names = ["best.pt", "counts.npy", "epochs.jsonl", "examples.npz", "fit.json", "scores.npy", "weights.safetensors"]
    assert sorted(path.name for path in folder.root.iterdir()) == names
    assert files.read_json(folder.fit) == {"format": 1, **dataclasses.asdict(summary)}
    assert summary.value == pytest.approx(float(result.scores[-1].mean()))
    assert summary.epochs == 3
    np.testing.assert_array_equal(np.load(folder.counts), result.counts)
    model, info = load_weights(folder.weights)
    assert (info.size, info.in_channels, info.extra) == ((16, 16), 3, {"threshold": 0.5})
    evaluation = evaluate(model, batches(np.arange(13, 20)), FLOAT32)
    np.testing.assert_array_equal(evaluation.counts, result.counts)


def test_the_value_and_the_examples_are_those_of_the_last_epoch(folder, unkilled):
    scores = np.array([np.arange(7), np.arange(7)[::-1] + 9, [3, 1, 2, 0, 6, 5, 4]], np.float32)
    assert finish(dataclasses.replace(unkilled, scores=scores), folder).value == 3
    with np.load(folder.examples) as examples:
        np.testing.assert_array_equal(examples["indices"] - 13, [3, 1, 0, 6, 5, 4])


def test_examples_are_the_worst_the_median_and_the_best_held_out_images(folder):
    result = fit(**fit_arguments())
    finish(result, folder)
    with np.load(folder.examples) as examples:
        indices, scores, probabilities = (examples[name] for name in ("indices", "scores", "probabilities"))
    order = np.argsort(result.scores[-1], kind="stable")
    np.testing.assert_array_equal(indices, 13 + order[[0, 1, 3, 4, 5, 6]])
    np.testing.assert_array_equal(scores, result.scores[-1][indices - 13])
    assert probabilities.dtype == np.uint8
    assert probabilities.shape == (6, 16, 16)
    tp = ((probabilities > 127) & (FakeCache().masks[indices] > 0)).sum((1, 2))
    np.testing.assert_array_equal(tp, result.counts[indices - 13, 0])


def test_finishing_again_after_a_kill_writes_the_same_bytes(folder, monkeypatch):
    write = files.atomic_write

    def dying_at(target):
        def die(path, *, sync=True):
            if path == target:
                raise Killed
            return write(path, sync=sync)

        return die

    for name in ("scores", "counts", "examples", "fit"):
        result = fit(**fit_arguments(), paths=folder)
        for module in (files, checkpoint, progress):
            monkeypatch.setattr(module, "atomic_write", dying_at(getattr(folder, name)))
        with pytest.raises(Killed):
            finish(result, folder)
        monkeypatch.undo()
        assert folder.last.exists()
        assert not folder.fit.exists()
    finish(fit(**fit_arguments(), paths=folder), folder)
    again = FitPaths(folder.root.with_name("again"))
    finish(fit(**fit_arguments()), again)
    for name in ("weights", "scores", "counts", "examples"):
        assert getattr(folder, name).read_bytes() == getattr(again, name).read_bytes(), name


# --- resume equals never having stopped ---------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("where", ["checkpoint", "after checkpoint", "scores", "line", "on_epoch"])
def test_killed_anywhere_in_any_epoch_a_fit_ends_with_the_same_bytes(
    epoch, where, folder, unkilled, best_of_unkilled, monkeypatch
):
    calls = {"n": 0}

    def dying(function):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == epoch:
                if where.startswith("after"):
                    function(*args, **kwargs)
                raise Killed
            return function(*args, **kwargs)

        return call

    if where.endswith("checkpoint"):
        save = checkpoint.save_checkpoint
        save_last = dying(save)
        # Only the checkpoint keeps the file before it; best.pt does not.
        monkeypatch.setattr(
            checkpoint, "save_checkpoint", lambda *at, **options: (save_last if options else save)(*at, **options)
        )
    elif where == "scores":
        monkeypatch.setattr(checkpoint, "save_array", dying(checkpoint.save_array))
    elif where == "line":
        monkeypatch.setattr(progress, "append_line", dying(files.append_line))
    on_epoch = dying(lambda *_: "go") if where == "on_epoch" else None
    with pytest.raises(Killed):
        fit(**fit_arguments(), paths=folder, keep_best=True, on_epoch=on_epoch)
    monkeypatch.undo()

    before = recorded(folder) if folder.epochs.exists() else []
    trained = []
    train_epoch = loop._train_epoch

    def counting(progress, *arguments):
        trained.append(len(progress.rows) + 1)
        return train_epoch(progress, *arguments)

    monkeypatch.setattr(loop, "_train_epoch", counting)
    result = fit(**fit_arguments(), paths=folder, keep_best=True)
    assert_equal(result, unkilled)
    first = epoch if where == "checkpoint" else epoch + 1
    assert trained == list(range(first, 4)), "only an epoch without a checkpoint is done again"
    rows = recorded(folder)
    assert rows == result.rows
    assert rows[: len(before)] == before
    np.testing.assert_array_equal(np.load(folder.scores), unkilled.scores)
    assert folder.best.read_bytes() == best_of_unkilled


def test_draws_from_the_global_generators_are_the_same_after_a_resume(folder, monkeypatch):
    drawn = []

    def drawing(config):
        def compute(logits, masks):
            drawn.append((float(torch.rand(())), float(np.random.random())))
            return loss_function(config)(logits, masks)

        return compute

    monkeypatch.setattr(loop, "loss_function", drawing)
    fit(**fit_arguments())
    expected = drawn.copy()
    assert len(set(expected)) == len(expected), "no two epochs draw the same numbers"
    drawn.clear()
    fit(**fit_arguments(), paths=folder, on_epoch=lambda *_: "stop")
    fit(**fit_arguments(), paths=folder)
    assert drawn == expected


def test_a_finished_fit_is_not_trained_again(folder, unkilled, monkeypatch):
    fit(**fit_arguments(), paths=folder)
    monkeypatch.setattr(loop, "_train_epoch", lambda *_: pytest.fail("an epoch was trained"))
    result = fit(**fit_arguments(), paths=folder)
    assert_equal(result, unkilled)
    assert not result.model.training


def test_with_a_torn_checkpoint_the_fit_goes_on_from_the_previous_one(folder, unkilled, caplog):
    fit(**fit_arguments(), paths=folder, on_epoch=lambda row, _: "stop" if row.epoch == 2 else "go")
    before = recorded(folder)
    folder.last.write_bytes(folder.last.read_bytes()[:-1])
    result = fit(**fit_arguments(), paths=folder)
    assert_equal(result, unkilled)
    assert recorded(folder)[0] == before[0]
    assert [row.epoch for row in recorded(folder)] == [1, 2, 3]
    assert "torn" in caplog.text


def test_with_both_checkpoints_torn_the_fit_begins_anew(folder, unkilled):
    fit(**fit_arguments(), paths=folder, on_epoch=lambda row, _: "stop" if row.epoch == 2 else "go")
    for path in (folder.last, folder.previous):
        path.write_bytes(b"torn")
    assert_equal(fit(**fit_arguments(), paths=folder), unkilled)
    assert [row.epoch for row in recorded(folder)] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b'{"epoch": 2, "ti', b"\xff\xfe\n[1, 2]\nnull\n", b'{"epoch": 2}\n'])
def test_a_damaged_line_is_replaced_from_the_checkpoint(damage, folder, unkilled):
    fit(**fit_arguments(), paths=folder, on_epoch=lambda row, _: "stop" if row.epoch == 2 else "go")
    first = folder.epochs.read_bytes().splitlines(keepends=True)[0]
    folder.epochs.write_bytes(first + damage)
    result = fit(**fit_arguments(), paths=folder)
    assert_equal(result, unkilled)
    assert recorded(folder) == result.rows
    assert folder.epochs.read_bytes().startswith(first)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 6},
        {"metric": "jaccard"},
        {"train": TrainConfig(epochs=3, batch_size=4, lr=0.06, loss="bce+dice")},
        {"augment": AugmentConfig(hflip=0.5)},
        {"train_indices": np.arange(12)},
        {"train_indices": np.arange(13)[::-1]},
        {"held_out_indices": np.arange(14, 20)},
        {"model_config": UNetConfig(base_channels=2, depth=1, stacking=2)},
        {"normalization": dataclasses.replace(NORMALIZATION, mean=(0.4, 0.5, 0.5))},
        {"data": make_data(FakeCache(key="other"))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_checkpoint_of_another_fit_is_refused(changes, folder):
    fit(**fit_arguments(), paths=folder, on_epoch=lambda *_: "stop")
    with pytest.raises(CheckpointError, match="other settings, images or seeds"):
        fit(**fit_arguments(**changes), paths=folder)


def test_a_fit_may_go_on_in_micro_batches_where_they_are_exact(folder):
    model = UNetConfig(base_channels=2, depth=1, norm="none")
    fit(**fit_arguments(model_config=model), paths=folder, on_epoch=lambda *_: "stop")
    assert len(fit(**fit_arguments(model_config=model, micro_batch=2), paths=folder).rows) == 3


def test_a_fit_may_go_on_with_another_precision(folder):
    fit(**fit_arguments(), paths=folder, on_epoch=lambda *_: "stop")
    train = TrainConfig(epochs=3, batch_size=4, lr=0.05, loss="bce+dice", amp="bf16", compile="off")
    runtime = dataclasses.replace(FLOAT32, precision="bf16")
    assert len(fit(**fit_arguments(train=train, runtime=runtime), paths=folder).rows) == 3


KILLED_FITS = """
import os, random, signal, sys, time
from pathlib import Path

from hpsearch.paths import FitPaths
from hpsearch.config.train import TrainConfig
from tests.training.fakes import fit, fit_arguments

def recorded():
    return folder.epochs.stat().st_size if folder.epochs.exists() else 0

folder, seconds_an_epoch = FitPaths(Path(sys.argv[1])), float(sys.argv[2])
instants, kills, status = random.Random(0), 0, None
while status != 0:
    before = recorded()
    # A fork has torch loaded already, which takes longer than the fit.
    child = os.fork()
    if child == 0:
        fit(**fit_arguments(train=TrainConfig(epochs=30, batch_size=4, lr=0.05)), paths=folder)
        os._exit(0)
    # However slow the machine is, each life gets an epoch further.
    while recorded() == before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    time.sleep(instants.uniform(0, 1.5 * seconds_an_epoch))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += status == signal.SIGKILL
print(kills)
"""


@pytest.mark.slow
def test_killed_by_sigkill_at_random_instants_a_fit_ends_with_the_same_bytes(folder):
    train = TrainConfig(epochs=30, batch_size=4, lr=0.05)
    started = time.perf_counter()
    expected = fit(**fit_arguments(train=train))
    seconds_an_epoch = (time.perf_counter() - started) / train.epochs
    output = subprocess.run(
        [sys.executable, "-c", KILLED_FITS, str(folder.root), str(seconds_an_epoch)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=200,
    ).stdout
    assert int(output) >= 5
    result = fit(**fit_arguments(train=train), paths=folder)
    assert_equal(result, expected)
    assert [row.epoch for row in recorded(folder)] == list(range(1, 31))
    finish(result, folder)
    files.remove_stale_temporaries(folder.root)
    names = ["counts.npy", "epochs.jsonl", "examples.npz", "fit.json", "scores.npy", "weights.safetensors"]
    assert sorted(path.name for path in folder.root.iterdir()) == names


# --- what can go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["bce", "dice"])
def test_a_loss_that_is_not_finite_ends_the_fit_and_names_the_epoch(loss, monkeypatch):
    def poisoned(config):
        steps = iter(range(1000))

        def compute(logits, masks):
            value = loss_function(config)(logits, masks)
            # Steps 0 to 2 and evaluations are the first epoch.
            return value * math.nan if logits.requires_grad and next(steps) == 4 else value

        return compute

    monkeypatch.setattr(loop, "loss_function", poisoned)
    with pytest.raises(DivergedError) as error:
        fit(**fit_arguments(train=TrainConfig(epochs=3, batch_size=4, loss=loss)))
    assert error.value.epoch == 2


def test_an_absurd_learning_rate_diverges():
    train = TrainConfig(epochs=3, batch_size=4, lr=1e30)
    model = UNetConfig(base_channels=2, depth=1, stacking=1, norm="none")
    with pytest.raises(DivergedError):
        fit(**fit_arguments(train=train, model_config=model))


@pytest.mark.parametrize("held_out", [np.arange(13, 20), np.arange(0)])
def test_weights_ruined_by_the_very_last_step_are_noticed(held_out, monkeypatch):
    make_optimizer = loop.make_optimizer

    def ruin_last(*args):
        optimizer = make_optimizer(*args)
        step, calls = optimizer.step, iter(range(100))

        def stepping(*step_args, **kwargs):
            step(*step_args, **kwargs)
            if next(calls) == 2:
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].fill_(math.nan)

        optimizer.step = stepping
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", ruin_last)
    train = TrainConfig(epochs=1, batch_size=4)
    with pytest.raises(DivergedError, match="epoch 1"):
        fit(**fit_arguments(train=train, held_out_indices=held_out))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_out_of_memory_is_an_error_of_its_own_and_everything_is_freed(error, monkeypatch):
    alive = []

    class Network(UNet):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            alive.append(weakref.ref(self))

        def forward(self, images, **kwargs):
            raise error

    monkeypatch.setattr(loop, "build_network", lambda config, in_channels, **_: Network(config, in_channels))
    with pytest.raises(OutOfMemoryError, match="training on cpu ran out of memory") as caught:
        fit(**fit_arguments())
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    error.__traceback__ = None
    gc.collect()
    assert [reference() for reference in alive] == [None]


def test_a_real_allocation_that_cannot_be_is_out_of_memory():
    data = make_data(FakeCache(n=2, size=(16, 16)))
    # 2^22 channels at the first stage: terabytes.
    with pytest.raises(OutOfMemoryError):
        fit(
            **fit_arguments(
                data=data,
                model_config=UNetConfig(base_channels=2**22, depth=1, stacking=1),
                train_indices=np.arange(1),
                held_out_indices=np.arange(1, 2),
            )
        )


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(loop, "train_batches", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(**fit_arguments())


@pytest.mark.parametrize("norm", ["none", "group", "instance"])
def test_micro_batches_give_the_same_result_without_batch_normalization(norm):
    model = UNetConfig(base_channels=4, depth=1, stacking=1, norm=norm)
    assert not uses_batch_statistics(model)
    # Parts of three and of two.
    train = TrainConfig(epochs=3, batch_size=5, lr=0.05, loss="bce+dice")
    whole = fit(**fit_arguments(model_config=model, train=train))
    parts = fit(**fit_arguments(model_config=model, train=train, micro_batch=3))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    assert parts.rows[-1].train.loss == pytest.approx(whole.rows[-1].train.loss, rel=1e-3)


def test_micro_batches_give_another_result_with_batch_normalization(unkilled):
    assert uses_batch_statistics(UNetConfig(norm="batch"))
    parts = fit(**fit_arguments(micro_batch=2))
    name = "encoder.0.0.norm.running_var"
    assert not torch.allclose(parts.model.state_dict()[name], unkilled.model.state_dict()[name], rtol=1e-3)


def test_a_network_that_one_image_cannot_train_is_refused_in_a_sentence():
    # 16x16 is a single pixel after four halvings.
    model = UNetConfig(base_channels=2, depth=4, stacking=1)
    with pytest.raises(ConfigError, match=r"with 1 image at once: encoder\.4.* has a map of 1x1"):
        fit(**fit_arguments(model_config=model, train_indices=np.arange(1)))
