"""Read images from anywhere, and measure them.

A data SPEC is one of
    shapes     drawn on the spot: six shapes (the class) in free colours, sizes and places on free backgrounds
    cifar10    CIFAR-10, downloaded once into data/ and checked
    FOLDER     images in class sub-folders, or flat; its train/ and val/ (or test/) if it has them
    FILE.npz   its first array uint8 (N, H, W, 3), and `labels` (N,) if there are any
"""
import argparse
import functools
import hashlib
import os
import sys
import tarfile
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from glotok import BadInput, choose

# -------------------------------------------------------------------------------------- what every script needs: small tools

def run(main):
    """main(), with what the user can mend as one line on standard error (status 2) and Ctrl-C as status 130."""
    try:
        main()
    except BadInput as error:
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # of a progress line
        print(f"{clear}{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage text
        raise BadInput(message)

    def parse(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            choose(unknown[0].split("=")[0], list(self._option_string_actions), "flag")
            raise BadInput(f"what is {unknown[0]!r}?")
        return args

def write(path, save):
    """save(file) to a temporary neighbour of path, sync, rename: the file is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)

class Progress:
    """A line on standard error that overwrites itself on a terminal; elsewhere a plain line every ten seconds at most."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first, self.start, self.said = what, total, done, time.time(), time.time()

    def __call__(self, done, text=""):
        now, tty = time.time(), sys.stderr.isatty()
        if done < self.total and now - self.said < (0.2 if tty else 10):
            return
        left = int((now - self.start) / max(done - self.first, 1) * (self.total - done))
        line = f"{self.what} {done}/{self.total}  {text}{'  ' if text else ''}{left // 60}:{left % 60:02d} left"
        print(f"\r{line}\033[K" if tty else line, end="\n" if not tty or done >= self.total else "", file=sys.stderr, flush=True)
        self.said = now

def read_arrays(path):
    """The arrays of an .npz, or of an .npy under the name "array"; nothing in them is ever unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        return dict(file) if path.suffix == ".npz" else {"array": file}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None

# ------------------------------------------------------------------------------------------------------- published files

PUBLISHED = {  # name: (address, SHA-256)
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                               "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "dinov2_vits14_pretrain.pth": ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
                                   "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/vgg16-397923af.pth",
                           "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "lpips-vgg-v0.1.pth": ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
                           "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
}

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def fetch(name, folder=None):
    """Path of a published file in folder (default: torch's cache), downloaded if it is not there, its SHA-256 checked every time."""
    (url, digest), path = PUBLISHED[name], Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    if path.exists():
        if sha256(path) != digest:
            raise BadInput(f"{path} is not the published file (its SHA-256 should be {digest}): delete it to download it again")
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as source:
            progress, seen = Progress(f"downloading {name}, MB", int(source.headers.get("Content-Length") or 0) >> 20), hashlib.sha256()

            def copy(file):
                while block := source.read(1 << 20):
                    seen.update(block)
                    progress(file.write(block) and file.tell() >> 20)
                if seen.hexdigest() != digest:
                    raise BadInput(f"{url} gave a file with another SHA-256 than {digest}: nothing kept")

            write(path, copy)
    except OSError as error:  # URLError is one
        raise BadInput(f"cannot download {name} ({error}): fetch {url} elsewhere and put it at {path}; SHA-256 {digest}") from None
    return path

# --------------------------------------------------------------------------------------------------------------- data sets

class Data(NamedTuple):
    """Images uint8 (N, 3, H, W), labels int64 (N,), and the held-out ones; names of the classes."""

    train: torch.Tensor
    train_labels: torch.Tensor
    held: torch.Tensor
    held_labels: torch.Tensor
    classes: list

def load_data(spec, size, seed=0):
    """A data SPEC (above) as Data, every image size x size. Pictures of another shape are resized and centre-cropped."""
    if spec == "shapes":
        return Data(*draw_shapes(20000, size, seed), *draw_shapes(1000, size, seed + 1), SHAPES)
    if spec == "cifar10":
        return read_cifar10(fetch("cifar-10-binary.tar.gz", "data"), size)
    path = Path(spec)
    held = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if held and (path / "train").is_dir():
        train, train_labels, classes = read_all(*list_images(path / "train"), size)
        return Data(train, train_labels, *read_all(*list_images(held, classes), size)[:2], classes)
    images, labels, classes = read_all(*list_images(path), size)
    if len(images) < 2:
        raise BadInput(f"{len(images)} image(s) in {spec} are too few: one to train on and one to hold out is the least")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # a fixed twentieth is held out
    held, train = (part.sort().values for part in order.tensor_split([max(1, len(images) // 20)]))
    return Data(images[train], labels[train], images[held], labels[held], classes)

SHAPES = ["disc", "ring", "square", "triangle", "cross", "bars"]
OUTLINES = [  # signed distance to each outline at (u, v), in radii, negative inside; |u|, v, |v| suffice
    lambda u, v, w: torch.hypot(u, v) - 1,
    lambda u, v, w: (torch.hypot(u, v) - 0.75).abs() - 0.25,
    lambda u, v, w: torch.maximum(u, w) - 0.85,
    lambda u, v, w: torch.maximum(v - 0.55, 0.866 * u - 0.5 * v - 0.55),
    lambda u, v, w: torch.minimum(torch.maximum(u - 1, w - 0.35), torch.maximum(w - 1, u - 0.35)),
    lambda u, v, w: torch.maximum(u - 0.95, (w - 0.6).abs() - 0.28),
]

def draw_shapes(n, size, seed):
    """n pictures uint8 (n, 3, size, size) and their classes int64 (n,); the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (n,), generator=g)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)
    radius = uniform(0.28, 0.38, 1, 1) * size
    x, y = (radius + 1 + uniform(0, 1, 1, 1) * (size - 2 * radius - 2) for _ in range(2))
    back = uniform(0, 1, 2, 3)  # the background: a gradient between two colours; the shape: of four colours the one furthest from both
    back[:, 1] = back[:, 0] + 0.6 * (back[:, 1] - back[:, 0])
    colours = uniform(0, 1, 4, 3)
    contrast = (colours[:, :, None] - back[:, None]).abs().sum(3).amin(2)  # (n, 4)
    colour = colours[torch.arange(n), contrast.argmax(1)]
    slope = uniform(-1, 1, 2)
    images, at = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.arange(size) + 0.5
    for k, outline in enumerate(OUTLINES):
        for part in (labels == k).nonzero()[:, 0].split(1000):
            u, v = (at[None, None, :] - x[part]) / radius[part], (at[None, :, None] - y[part]) / radius[part]
            cover = (0.5 - outline(u.abs(), v, v.abs()) * radius[part]).clamp(0, 1)[:, None]  # antialiased over one pixel
            ramp = (0.5 + slope[part, :1, None] * (at / size - 0.5) + slope[part, 1:, None] * (at[:, None] / size - 0.5)).clamp(0, 1)[:, None]
            ground = torch.lerp(back[part, 0, :, None, None], back[part, 1, :, None, None], ramp)
            images[part] = (255 * torch.lerp(ground, colour[part, :, None, None], cover)).round().byte()
    return images, labels

def read_cifar10(path, size):
    """CIFAR-10's binary archive: records of a label byte and 3 x 32 x 32 colour bytes, read without unpacking."""
    parts, classes = {}, "airplane automobile bird cat deer dog frog horse ship truck".split()
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".bin"):
                parts[Path(member.name).name] = np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, 3073)
    read = lambda names: read_all("CIFAR-10", (r := np.concatenate([parts[f"{n}.bin"] for n in names]))[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
                                  torch.from_numpy(r[:, 0].astype(np.int64)), classes, size)
    return Data(*read([f"data_batch_{i}" for i in range(1, 6)])[:2], *read(["test_batch"]))

def list_images(path, classes=None):
    """A folder or an .npz -> its name, its images (files, sorted, or one array (N, H, W, 3)), their labels, the names of the classes:
    `classes`, else the first-level sub-folders (one class if there are none) or the numbers up to the highest label."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp"} and p.name[0] != ".")
        names = [p.relative_to(path).parts[0] if p.parent != path else "" for p in files]
        classes = classes or sorted(set(names))
        if strange := sorted(set(names) - set(classes)):
            raise BadInput(f"{path} has a class that train/ has not: {strange[0]!r}")
        if not files:
            raise BadInput(f"no images (.png, .jpg, .jpeg, .webp, .bmp) in {path}")
        position = {name: i for i, name in enumerate(classes)}
        return path, files, torch.tensor([position[name] for name in names]), classes
    if path.suffix != ".npz" or not path.is_file():
        raise BadInput(f"no data at {str(path)!r}: want shapes, cifar10, a folder of images, or an .npz file")
    arrays = read_arrays(path)
    labels = arrays.pop("labels", None)
    images = next(iter(arrays.values()), np.zeros(0))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise BadInput(f"{path}: the first array must be uint8 (N, H, W, 3), and is {images.dtype} {images.shape}")
    labels = np.zeros(len(images), int) if labels is None else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise BadInput(f"{path}: labels must be {len(images)} integers from 0 up, and are {labels.dtype} {labels.shape}")
    return path, images, torch.from_numpy(labels.astype(np.int64)), [str(i) for i in range(labels.max(initial=0) + 1)]

def decode(item):
    """A file or an array (H, W, 3) -> an upright RGB picture, or why not."""
    try:
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        with Image.open(item) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
        return f"{item} ({' '.join(str(error).split())})"

def read_all(where, items, labels, classes, size, tolerated=0.01):
    """Decode items in parallel -> uint8 (N, 3, size, size), their labels, the classes. Pictures of another size: the largest centred
    square, resized bicubically with antialiasing. Unreadable ones are named and left out; more than a share `tolerated` is an error."""
    images, bad, resized = torch.empty(len(items), 3, size, size, dtype=torch.uint8), {}, 0

    def read(i):
        if isinstance(picture := decode(items[i]), str):
            bad[i] = picture
            return False
        other = picture.size != (size, size)
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC) if other else picture
        images[i] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return other

    progress = Progress(f"reading {where}", len(items))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, other in enumerate(pool.map(read, range(len(items))), 1):
            resized += other
            if len(items) > 5000:
                progress(done)
    what = f"of {len(items)} images in {where}"
    listed = "; ".join(bad[i] for i in sorted(bad)[:3]) + ("; ..." if len(bad) > 3 else "")
    if len(bad) > tolerated * len(items):
        raise BadInput(f"{len(bad)} {what} cannot be read: {listed}")
    for n, text in ((len(bad), f"cannot be read and are left out: {listed}"), (resized, f"are not {size}x{size}: resized and centre-cropped")):
        if n:
            print(f"note: {n} {what} {text}", file=sys.stderr)
    keep = [i for i in range(len(items)) if i not in bad]
    return (images[keep], labels[keep], classes) if bad else (images, labels, classes)

# ------------------------------------------------------------------------------------------------- from images to batches

def to_float(images, device, flip=False):
    """uint8 (B, 3, H, W) -> float in [-1, 1], each mirrored with probability 1/2 if flip."""
    x = images.to(device, non_blocking=True).to(memory_format=torch.channels_last).float() / 127.5 - 1
    return torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x) if flip else x

def to_uint8(x):
    """float in [-1, 1], clipped -> uint8, rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()

@functools.lru_cache(2)
def shuffle(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

def batch_indices(n, batch, step, seed):
    """The step's positions in an endless row of shuffles of range(n): a function of the step, so that a run can resume."""
    at = torch.arange(step * batch, (step + 1) * batch)
    return torch.cat([shuffle(n, seed + 7919 * epoch)[at[at // n == epoch] % n] for epoch in (at // n).unique().tolist()])

# --------------------------------------------------------------------------------------------------------------- measures

def psnr(x, y):
    """Peak signal-to-noise ratio of uint8 images (N, C, H, W), dB, each image's own: (N,). Equal images: 99."""
    mse = (x.float() - y.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp_min(255**2 / 10**9.9))
