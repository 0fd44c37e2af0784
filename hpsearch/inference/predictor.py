"""Predict masks at each image's own resolution, from the resized image or from overlapping tiles."""

import glob
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hpsearch.config.data import GRAY_WEIGHTS
from hpsearch.data.decode import crop, read_image, resize
from hpsearch.data.formats import is_image_name, readable_suffixes
from hpsearch.data.pairing import may_be_file
from hpsearch.errors import CheckpointError, DatasetError, OutOfMemoryError, StudyError
from hpsearch.inference.postprocessing import Postprocessing, clean_mask
from hpsearch.inference.scoring import mask_name
from hpsearch.models.network import margin_of, output_size
from hpsearch.paths import FinalPaths, FitPaths, ProjectPaths, atomic_write, read_json
from hpsearch.store.record import study_record
from hpsearch.training.checkpoint import WeightsInfo, load_weights
from hpsearch.training.evaluation import mean_over_flips
from hpsearch.training.runtime import Runtime, is_out_of_memory, make_runtime
from hpsearch.typed_json import from_json
from hpsearch.user_files import file_fault, list_folder, name_key, user_path

BLEND_OVERLAP = 0.25
"""Least overlap of blended tiles, as a share of a tile's side."""
OUTLINE = (0, 255, 0)
"""Colour of the mask's border in an overlay. It does not occur in skin or lesions."""

_OUTPUT_SUFFIXES = ("_segmentation", "_probability", "_overlay", "_superpixels")

OnImage = Callable[[int, int, Path, str | None], None]
"""Callback after each image, called with (done, total, image, reason why it was left out or None)."""


class Predictor:
    """A trained network, ready to predict images of any size.

    By default, the whole image is resized as in training, and the logits are resized back bilinearly.

    With `tiles`, the image keeps its resolution and is predicted in overlapping windows of the training size
    (Ronneberger et al. 2015, Figure 2). If the network was trained with `augment.crop`, the image first gets the
    resolution of the frames that the crops were taken from. The image is mirrored beyond its borders. A `valid`
    network that was trained on windows has outputs smaller than a window. They are placed side by side and averaged
    where they overlap. The output of any other network fills the window; it is stretched if it was in training. It is
    least reliable at the window's border, so these windows overlap by at least a quarter and are blended.

    The threshold, test-time augmentation and mask cleaning come from the weights file (`choices`). Prediction always
    computes in float32, so the same file gives the same mask whatever precision was used in training.
    """

    def __init__(self, model: torch.nn.Module, info: WeightsInfo, runtime: Runtime, *, tiles: bool = False) -> None:
        self.info = info
        self.tiles = tiles
        self.choices = from_json(Postprocessing, info.extra)
        self._model = model
        self._margin = margin_of(model)
        self._runtime = runtime
        mean = torch.tensor(info.normalization.mean, dtype=torch.float64)
        std = torch.tensor(info.normalization.std, dtype=torch.float64)
        # (x / 255 - mean) / std = x * factor + shift, as in training.
        self._factor = (1 / (255 * std)).float().view(-1, 1, 1)
        self._shift = (-mean / std).float().view(-1, 1, 1)

    @classmethod
    def load(
        cls, weights: Path, *, device: str = "auto", threads: int | None = None, tiles: bool | None = None
    ) -> Self:
        """Return the predictor of a weights file. By default it uses tiles if the network was trained on windows.

        Raises CheckpointError for an invalid file (a pickle is refused without reading it), and DeviceError.
        """
        runtime = make_runtime(device, amp="off", compile="off", threads=threads)
        model, info = load_weights(weights, runtime.device)
        model.to(memory_format=torch.channels_last)
        return cls(model, info, runtime, tiles=info.sees_windows if tiles is None else tiles)

    def logits(self, image: Tensor) -> Tensor:
        """Return the logits (H, W) float32 on the CPU of an RGB image (3, H, W) uint8."""
        try:
            with torch.inference_mode(), self._runtime.active():
                return self._logits(image)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"{self._runtime.device} has too little memory to predict {self.info.size[0]}x{self.info.size[1]}"
            ) from error

    def mask(self, logits: Tensor) -> NDArray[np.bool_]:
        """Return the mask of `logits` (H, W) by the threshold and cleaning of the weights file."""
        mask = np.asarray((logits > torch.tensor(self.choices.threshold).logit()).numpy())
        return clean_mask(mask) if self.choices.clean else mask

    def _logits(self, image: Tensor) -> Tensor:
        frame = self.info.extra.get("frame") if self.tiles else self.info.size
        seen = image if frame is None else resize(image, *frame)
        # A network with a margin covers a whole frame only in tiles.
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
            # Elementwise, as in training.
            red, green, blue = (weight * channel for weight, channel in zip(GRAY_WEIGHTS, channels, strict=True))
            channels = (red + green + blue)[None]
        images = torch.addcmul(self._shift, channels, self._factor)[None]
        images = images.to(self._runtime.device, memory_format=torch.channels_last)
        logits: Tensor = mean_over_flips(self._model, images) if self.choices.flips else self._model(images)
        return logits[0, 0].float().cpu()


class Ensemble(Predictor):
    """Several predictors whose logits are averaged. Threshold and cleaning are those of the first."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        self.members = tuple(members)
        self.info, self.tiles, self.choices = members[0].info, members[0].tiles, members[0].choices

    def logits(self, image: Tensor) -> Tensor:
        """Return the mean logits, like `Predictor.logits`."""
        total = self.members[0].logits(image)
        for member in self.members[1:]:
            total = total + member.logits(image)
        return total / len(self.members)


def load_predictor(
    weights: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    tiles: bool | None = None,
    ensemble: bool | None = None,
) -> Predictor:
    """Return the network in `weights`, or the ensemble that `final --ensemble` wrote beside it.

    `ensemble` selects one of them. None selects what `final` chose. Raises the errors of `Predictor.load`, and
    StudyError if an ensemble is selected and there is none.
    """
    load = partial(Predictor.load, device=device, threads=threads, tiles=tiles)
    predictor = load(weights)
    folder = FinalPaths(weights.parent).ensemble
    members = sorted(folder.glob("*.safetensors"))
    if ensemble and not members:
        raise StudyError(f"there is no ensemble in {folder}: `hpsearch final --ensemble` makes one")
    if not members or not (predictor.choices.ensemble if ensemble is None else ensemble):
        return predictor
    return Ensemble([load(path) for path in members])


@dataclass(frozen=True)
class Tile:
    """One window along one axis."""

    start: int
    """Position in the image of the first output pixel; negative if the image is smaller than the output."""
    covers: slice
    """Pixels of the image that this window predicts."""
    inside: slice
    """The same pixels as positions in the window's output."""
    weights: Tensor
    """Weight of the window at each of these pixels, float32; the weights of all windows add up to 1."""


def tile_axis(length: int, out: int, *, blend: bool) -> list[Tile]:
    """Return evenly spaced windows whose outputs of `out` pixels cover an axis of `length`.

    The number of windows is the smallest possible: 512 pixels and outputs of 388 make two, 124 apart. With `blend`
    neighbours overlap by at least `BLEND_OVERLAP`, and the weight of a tile decreases towards its border. Otherwise
    they are averaged.
    """
    step = max(1, out - math.ceil(out * BLEND_OVERLAP)) if blend else out
    n = max(1, math.ceil((length - out) / step) + 1)
    # A tile that is larger than the image has it in its middle, like the crops in training.
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
    """Return the images that files, folders and globs name, without repetitions, sorted within each argument.

    A file is taken unconditionally. A folder (without subfolders) or glob (`**` is any depth) gives its images,
    broken links included, so that they are reported, but no superpixels and no earlier predictions. Raises
    DatasetError for a folder that cannot be listed, a folder or glob without images, if no file exists, and for two
    images that would write the same files.
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
        raise DatasetError(file_fault(first) if first is not None else "there is no file to predict")
    by_stem: dict[str, Path] = {}
    for path in found:
        # Some file systems do not distinguish case or Unicode form.
        first = by_stem.setdefault(name_key(path.stem), path)
        if first != path:
            raise DatasetError(f"{first} and {path} would write the same files: predict them into different folders")
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
    """Write `<stem>_segmentation.png` (0 and 255) for every image into `out_dir`.

    `probabilities` adds `<stem>_probability.png`, 8 bits, 255 for a certain lesion. `overlays` adds
    `<stem>_overlay.jpg`, the image with the mask's border. One image is in memory at a time. Returns the images that
    could not be read, with the reasons. Raises StorageError if a file cannot be written.
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
            _save_image(out_dir / mask_name(path.stem), np.multiply(mask, 255, dtype=np.uint8))
            if probabilities:
                certainty = logits.sigmoid().mul_(255).round_().to(torch.uint8)
                _save_image(out_dir / f"{path.stem}_probability.png", certainty.numpy())
            if overlays:
                _save_image(out_dir / f"{path.stem}_overlay.jpg", draw_outline(image, mask))
            # Free the memory before decoding the next image: one image may take hundreds of megabytes.
            del image, logits, mask
        if on_image is not None:
            on_image(done, len(images), path, bad.get(path))
    return bad


def draw_outline(image: Tensor, mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the image (3, H, W) uint8 as (H, W, 3) with the inner border of `mask` (H, W) in OUTLINE.

    The line is thick enough to be visible when the whole image is displayed.
    """
    from scipy import ndimage  # as in `clean_mask`

    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    thickness = max(1, round(max(mask.shape) / 400))
    inner = ndimage.binary_erosion(mask, iterations=thickness, border_value=1)
    pixels[mask & ~inner] = OUTLINE
    return pixels


def find_model(project: ProjectPaths, study: str | None, model: str | None) -> Path:
    """Return the weights file that `model` names, itself or by its folder, or else that of the study's latest final.

    Raises StudyError if there is none.
    """
    if model is None:
        record = study_record(project, study)
        finals = [final for final in map(record.paths.final, record.paths.final_names()) if final.model.is_file()]
        if finals:
            return max(finals, key=lambda final: float(read_json(final.result)["ended_at"])).model
        raise StudyError(f"study {record.name!r} has no final model yet: run `hpsearch final`, or name one (--model)")
    path = user_path(model)
    for weights in (path, FinalPaths(path).model, FitPaths(path).weights):
        if os.path.isfile(weights):
            return weights
    raise CheckpointError(f"there is no model in {path}: name a folder that `hpsearch final` made, or a file")


def _images_among(paths: Iterable[Path]) -> list[Path]:
    # Files of unsupported formats are included, so that they are reported.
    return sorted(
        path
        for path in paths
        if is_image_name(path.name)
        and not path.name.startswith(".")
        and not path.stem.lower().endswith(_OUTPUT_SUFFIXES)
        and may_be_file(path)
    )


def _save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    with atomic_write(path, sync=False) as temporary:
        Image.fromarray(pixels).save(temporary, "JPEG" if path.suffix == ".jpg" else "PNG", quality=90)
