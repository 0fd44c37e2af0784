"""Run a search, a final evaluation and a prediction on your own images from Python.

    python examples/own_images.py photos masks --trials 30

`photos` and `masks` are folders whose files are matched by the stem of their names. A fifth of the pairs is set aside
as the test split. Run the same command again to continue after a stop. `mlflow ui` in the project folder shows the
runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import hpsearch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("--out", type=Path, default=Path("own-images"), help="project folder")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--size", type=int, default=128, help="height and width that the network sees")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()

    # Any setting of docs/reference.md, in the form that --set accepts.
    config = hpsearch.load_config(
        None,
        [
            f"data.images={arguments.images.absolute()}",
            f"data.masks={arguments.masks.absolute()}",
            f"data.size={arguments.size}",
            "unet.base_channels=8",
            "unet.depth=3",
            "train.lr=0.05",
            f"train.epochs={arguments.epochs}",
            "search.unet.base_channels=[4, 8, 16]",
            "search.unet.depth={low=2, high=4}",
            "search.train.lr={low=1e-3, high=3e-1, log=true}",
            f"study.trials={arguments.trials}",
            f"study.folds={arguments.folds}",
        ],
    )
    project = hpsearch.ProjectPaths(arguments.out)
    tracker = hpsearch.make_tracker(project)

    summary = hpsearch.run_study(project, "own", config, tracker=tracker)
    best = summary.record.best()
    if best is None:
        raise SystemExit("no trial was evaluated on all folds: see `hpsearch status`")
    print(f"best of {summary.n_counted} trials: number {best.number}, cross-validated Dice {best.value:.4f}")
    print(f"its settings: {best.params}")

    final = hpsearch.run_final(project, "own", tracker=tracker)
    for name, score in final.test.items():
        print(f"test {name} {score.mean:.4f} [{score.low:.4f}, {score.high:.4f}] on {final.n_test} images")
    print(f"report: {hpsearch.write_report(summary.record)}")

    predictor = hpsearch.Predictor.load(final.paths.model)
    images = hpsearch.find_images([arguments.images])
    hpsearch.predict_files(predictor, images, arguments.out / "masks", overlays=True)
    print(f"{len(images)} masks, and the images with their outlines: {arguments.out / 'masks'}")


if __name__ == "__main__":
    main()
