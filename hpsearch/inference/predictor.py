"""Predict masks at the original resolution of each image, from the resized image or from overlapping tiles."""

import glob
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hpsearch.config.data import GRAY_WEIGHTS
from hpsearch.data.batches import ToInput
from hpsearch.data.decode import crop, read_image, resize
from hpsearch.data.formats import readable_suffixes
from hpsearch.data.pairing import is_image_file
from hpsearch.errors import CheckpointError, DatasetError, OutOfMemoryError, StudyError
from hpsearch.inference.postprocessing import Postprocessing, clean_mask
from hpsearch.inference.scoring import mask_name, write_mask
from hpsearch.models.network import margin_of, output_size
from hpsearch.paths import FinalPaths, FitPaths, ProjectPaths, atomic_write, read_json
from hpsearch.store.record import study_record
from hpsearch.training.checkpoint import WeightsInfo, load_weights
from hpsearch.training.evaluation import mean_over_flips
from hpsearch.training.runtime import Runtime, is_out_of_memory, make_runtime
from hpsearch.typed_json import from_json
from hpsearch.user_files import file_fault, list_folder, name_key, user_path

BLEND_OVERLAP = 0.25
"""Minimum overlap of blended tiles, as a fraction of the tile's side."""
OUTLINE = (0, 255, 0)
"""RGB colour of the mask's outline in an overlay. It does not occur in skin or lesions."""

_OUTPUT_SUFFIXES = ("_segmentation", "_probability", "_overlay", "_superpixels")

OnImage = Callable[[int, int, Path, str | None], None]
"""Callback after each image, called with (done, total, path, error message if the image was skipped, else None)."""


class Predictor:
    """A trained network that predicts images of any size.

    By default, the whole image is resized as in training, and the logits are resized back with bilinear
    interpolation.

    With `tiles`, the image keeps its resolution and is predicted in overlapping tiles of the training size
    (Ronneberger et al. 2015, Figure 2). If the network was trained with `augment.crop`, the image is first resized
    to the size from which the training crops were taken. The image is mirrored beyond its borders. If the network has
    `valid` padding and was trained on crops, its output is smaller than a tile. Such outputs are placed side by
    side and averaged where they overlap. The output of any other network covers the whole tile, after interpolation
    if it has `valid` padding. It is least reliable near the tile's border, so these tiles overlap by at least a
    quarter and are blended.

    The threshold, test-time augmentation and mask cleaning come from the weights file (`choices`). Prediction always
    runs in float32, so the mask does not depend on the precision of the training.
    """

    def __init__(self, model: torch.nn.Module, info: WeightsInfo, runtime: Runtime, *, tiles: bool = False) -> None:
        self.info = info
        self.tiles = tiles
        self.choices = from_json(Postprocessing, info.extra)
        self._model = model
        self._margin = margin_of(model)
        self._runtime = runtime
        self._to_input = ToInput(info.normalization, "cpu")

    @classmethod
    def load(
        cls, weights: Path, *, device: str = "auto", threads: int | None = None, tiles: bool | None = None
    ) -> Self:
        """Load a predictor from a weights file. By default, it uses tiles if the network was trained on crops.

        Raises CheckpointError for an invalid file (a pickle is refused without being loaded), and DeviceError for a
        device that cannot be used.
        """
        runtime = make_runtime(device, amp="off", compile="off", threads=threads)
        model, info = load_weights(weights, runtime.device)
        model.to(memory_format=torch.channels_last)
        return cls(model, info, runtime, tiles=info.sees_windows if tiles is None else tiles)

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits of an RGB image (3, H, W) uint8, as (H, W) float32 on the CPU."""
        try:
            with torch.inference_mode(), self._runtime.active():
                return self._logits(image)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            (height, width), device = self.info.size, self._runtime.device
            raise OutOfMemoryError(f"{device} has too little memory to predict {height}x{width}") from error

    def mask(self, logits: Tensor) -> NDArray[np.bool_]:
        """Return the boolean mask (H, W) of `logits` (H, W), using the threshold and cleaning of the weights file."""
        mask = np.asarray((logits > torch.tensor(self.choices.threshold).logit()).numpy())
        return clean_mask(mask) if self.choices.clean else mask

    def _logits(self, image: Tensor) -> Tensor:
        frame = self.info.extra.get("frame") if self.tiles else self.info.size
        seen = image if frame is None else resize(image, *frame)
        # The output of a network with a margin is smaller than its input, so only tiles cover the whole image.
        logits = self._tiled(seen) if self.tiles or self._margin else self._run(seen)
        if frame is None:
            return logits
        return F.interpolate(logits[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]

    def _tiled(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        margin, size = self._margin, self.info.size
        out = output_size(self.info.model, self.info.in_channels, size) if margin else size
        rows = tile_axis(height, out[0], blend=not margin)
        columns = tile_axis(width, out[1], blend=not margin)
        total = torch.zeros(height, width)
        for row in rows:
            for column in columns:
                logits = self._run(crop(image, row.start - margin, column.start - margin, *size))
                inside = logits[row.inside, column.inside]
                total[row.covers, column.covers] += inside * row.weights[:, None] * column.weights
        return total

    def _run(self, pixels: Tensor) -> Tensor:
        """Return the network's logits (h, w) on the CPU for pixels (3, h, w) uint8."""
        channels = pixels.to(torch.float32)
        if self.info.in_channels == 1:
            # Unlike `to_gray`, this rounds after each product. Earlier versions did so, and masks must not change.
            red, green, blue = (weight * channel for weight, channel in zip(GRAY_WEIGHTS, channels, strict=True))
            channels = (red + green + blue)[None]
        images = self._to_input.normalize(channels[None]).to(self._runtime.device)
        logits: Tensor = mean_over_flips(self._model, images) if self.choices.flips else self._model(images)
        return logits[0, 0].float().cpu()


class Ensemble(Predictor):
    """Several predictors whose logits are averaged. The threshold and cleaning of the first member are used."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        self.members = tuple(members)
        self.info, self.tiles, self.choices = members[0].info, members[0].tiles, members[0].choices

    def logits(self, image: Tensor) -> Tensor:
        """Return the mean logits of the members, (H, W) float32 on the CPU."""
        total = sum((member.logits(image) for member in self.members), start=torch.zeros(()))
        return total / len(self.members)


def load_predictor(weights: Path, *, ensemble: bool | None = None, **how: Any) -> Predictor:
    """Load the network in `weights`, or the ensemble that `final --ensemble` wrote beside it.

    `ensemble` says whether to load the ensemble; None uses what `final` selected. `how` is passed to
    `Predictor.load`. Raises the errors of `Predictor.load`, and StudyError if the ensemble is requested but does not
    exist.
    """
    predictor = Predictor.load(weights, **how)
    folder = FinalPaths(weights.parent).ensemble
    members = sorted(folder.glob("*.safetensors"))
    if ensemble and not members:
        raise StudyError(f"there is no ensemble in {folder}: `hpsearch final --ensemble` creates one")
    if not members or not (predictor.choices.ensemble if ensemble is None else ensemble):
        return predictor
    return Ensemble([Predictor.load(path, **how) for path in members])


@dataclass(frozen=True)
class Tile:
    """Position and blending weights of a tile along one axis."""

    start: int
    """Image coordinate of the tile's first output pixel; negative if the image is smaller than the output."""
    covers: slice
    """Image pixels that this tile predicts."""
    inside: slice
    """The same pixels in coordinates of the tile's output."""
    weights: Tensor
    """Weight of the tile at each of these pixels, float32. At each pixel, the weights of all tiles sum to 1."""


def tile_axis(length: int, out: int, *, blend: bool) -> list[Tile]:
    """Return evenly spaced tiles whose outputs of `out` pixels cover an axis of `length`.

    As few tiles as possible are used. For example, outputs of 388 pixels cover an axis of 512 pixels with two tiles,
    124 pixels apart. With `blend`, neighbouring tiles overlap by at least `BLEND_OVERLAP`, and the weight of a tile
    decreases towards its border. Without it, all tiles that cover a pixel have equal weight.
    """
    step = max(1, out - math.ceil(out * BLEND_OVERLAP)) if blend else out
    n = max(1, math.ceil((length - out) / step) + 1)
    # If the tile is larger than the image, centre the image in it, like the crops in training.
    starts = [(length - out) // 2] if n == 1 else [round(i * (length - out) / (n - 1)) for i in range(n)]
    ramp = torch.arange(1, out + 1, dtype=torch.float64)
    window = torch.minimum(ramp, ramp.flip(0)) if blend else torch.ones_like(ramp)
    total = torch.zeros(length, dtype=torch.float64)
    parts = []
    for start in starts:
        covers = slice(max(0, start), min(length, start + out))
        inside = slice(covers.start - start, covers.stop - start)
        total[covers] += window[inside]
        parts.append((start, covers, inside))
    return [Tile(*part, (window[part[2]] / total[part[1]]).float()) for part in parts]


def find_images(inputs: Iterable[str | Path]) -> list[Path]:
    """Return the image paths for a list of files, folders and globs, without duplicates.

    A file is always included. A folder (subfolders are not searched) or glob (`**` matches any depth) includes its
    images in sorted order. Superpixels and earlier predictions are left out. Broken links are included, so that they
    are reported later.

    Raises DatasetError if a folder cannot be listed, if a folder or glob has no images, if none of the files exists,
    or if two images would have the same output files.
    """
    found: dict[Path, None] = {}
    for each in map(str, inputs):
        path = user_path(each)
        images = [path]
        if os.path.isdir(path):
            images = _images_among(list_folder(path, DatasetError))
        elif glob.has_magic(each) and not os.path.lexists(path):
            images = _images_among(map(Path, glob.glob(str(path), recursive=True)))
        if not images:
            raise DatasetError(f"{each} has no images ({', '.join(readable_suffixes())})")
        found |= dict.fromkeys(images)
    if not any(os.path.isfile(path) for path in found):
        first = next(iter(found), None)
        raise DatasetError(file_fault(first) if first is not None else "there are no files to predict")
    by_stem: dict[str, Path] = {}
    for path in found:
        # Some file systems do not distinguish case or Unicode form.
        first = by_stem.setdefault(name_key(path.stem), path)
        if first != path:
            raise DatasetError(f"{first} and {path} would have the same output files: use two different --out-dir")
    return list(found)


def predict_files(
    predictor: Predictor,
    images: Sequence[Path],
    out_dir: Path,
    *,
    probabilities: bool = False,
    overlays: bool = False,
    on_image: OnImage | None = None,
) -> dict[Path, str]:
    """Write the mask of every image as `<stem>_segmentation.png` (values 0 and 255) into `out_dir`.

    With `probabilities`, also write `<stem>_probability.png` with 8 bits; 255 is probability 1. With `overlays`, also
    write `<stem>_overlay.jpg`, the image with the mask's outline. Only one image is in memory at a time.

    Returns the images that could not be read, mapped to the error messages. Raises StorageError if a file cannot be
    written.
    """
    bad: dict[Path, str] = {}
    for done, path in enumerate(images, 1):
        try:
            image = read_image(path, predictor.info.reading)
        except DatasetError as error:
            bad[path] = str(error)
        else:
            logits = predictor.logits(image)
            mask = predictor.mask(logits)
            write_mask(out_dir / mask_name(path.stem), mask, sync=False)
            if probabilities:
                certainty = logits.sigmoid().mul_(255).round_().to(torch.uint8)
                _save_image(out_dir / f"{path.stem}_probability.png", certainty.numpy())
            if overlays:
                _save_image(out_dir / f"{path.stem}_overlay.jpg", draw_outline(image, mask))
            # Free this memory before the next image is decoded: one image may take hundreds of megabytes.
            del image, logits, mask
        if on_image is not None:
            on_image(done, len(images), path, bad.get(path))
    return bad


def draw_outline(image: Tensor, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Draw the outline of `mask` (H, W) on an image (3, H, W) uint8, and return it as (H, W, 3) uint8.

    The line has the colour OUTLINE and lies inside the mask. Its width is about 1/400 of the longer image side, so
    that it remains visible when the image is scaled down.
    """
    from scipy import ndimage  # slow to import and rarely needed

    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    thickness = max(1, round(max(mask.shape) / 400))
    inner = ndimage.binary_erosion(mask, iterations=thickness, border_value=1)
    pixels[mask & ~inner] = OUTLINE
    return pixels


def find_model(project: ProjectPaths, study: str | None, model: str | None) -> Path:
    """Return the path of a weights file.

    `model` is a weights file or the folder that contains it. If it is None, the model of the study's latest
    `hpsearch final` is used. Raises CheckpointError if `model` has no weights, and StudyError if the study has no
    such model.
    """
    if model is None:
        record = study_record(project, study)
        finals = [final for final in map(record.paths.final, record.paths.final_names()) if final.model.is_file()]
        if finals:
            return max(finals, key=lambda final: float(read_json(final.result)["ended_at"])).model
        raise StudyError(f"study {record.name!r} has no final model yet: run `hpsearch final`, or use --model")
    path = user_path(model)
    for weights in (path, FinalPaths(path).model, FitPaths(path).weights):
        if os.path.isfile(weights):
            return weights
    raise CheckpointError(f"there is no model in {path}: choose a weights file or a folder of `hpsearch final`")


def _images_among(paths: Iterable[Path]) -> list[Path]:
    images = filter(is_image_file, paths)
    return sorted(path for path in images if not path.stem.lower().endswith(_OUTPUT_SUFFIXES))


def _save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    with atomic_write(path, sync=False) as temporary:
        Image.fromarray(pixels).save(temporary, "JPEG" if path.suffix == ".jpg" else "PNG", quality=90)
