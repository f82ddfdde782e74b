"""Read images from anywhere, and measure them: FID, Inception Score, PSNR.

    python fid.py REFERENCE SAMPLES                                  # folders, .npz of images or of statistics, or cifar10
    python fid.py cifar10 samples.npz --save-stats cifar10.npz       # next time: python fid.py cifar10.npz OTHER

A data SPEC of the other scripts: shapes (drawn on the spot), cifar10 (downloaded once into data/), a folder (class sub-folders, or
flat; its train/ and val/ or test/ if it has them) or an .npz (first array uint8 (N, H, W, 3), optional `labels`).
"""
import functools
import hashlib
import itertools
import os
import signal
import sys
import tarfile
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # until run() takes over, Ctrl-C ends the slow imports below without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps

from glotok import SHAPES, BadInput, Parser, Progress, draw_shapes, psnr, read_arrays, restore, run

# ------------------------------------------------------------------------------------------------- files written and downloaded
def write(path, save):
    """save(file) to a temporary neighbour of path, sync, rename: the file is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file), file.flush(), os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.exists() and temporary.unlink()

WEIGHTS, HUB = "pt_inception-2015-12-05-6726825d.pth", "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
PUBLISHED = {  # file: its folder, its SHA-256
    WEIGHTS: ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "dinov2_vits14_pretrain.pth": ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "vgg16-397923af.pth": ("https://download.pytorch.org/models/", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    "vgg.pth": (HUB, "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")}  # the heads of LPIPS

def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def fetch(name, folder=None, download=True):
    """Path of a published file in folder (default: torch's cache), downloaded if it is not there, its SHA-256 checked every time."""
    (source, digest), path = PUBLISHED[name], Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name
    if not path.exists() and download:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source + name, str(path), digest)  # to a temporary file, checked, renamed
        except (OSError, RuntimeError) as error:  # no network; another SHA-256
            raise BadInput(f"cannot download {name} ({error}): fetch {source + name} elsewhere and put it at {path}; SHA-256 {digest}") from None
    elif path.exists() and sha256(path) != digest:
        raise BadInput(f"{path} is not the published file (its SHA-256 should be {digest}): delete it to download it again")
    return path

# --------------------------------------------------------------------------------------------------------------- data sets
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, if torchrun started them
Data = namedtuple("Data", "train train_labels held held_labels classes")  # uint8 (N, 3, H, W) or files, int64 (N,), twice; the classes' names
def load_data(spec, size, seed=0):
    """A data SPEC (above) as Data, every image size x size."""
    if spec == "shapes":
        return Data(*draw_shapes(20000, size, seed), *draw_shapes(1000, size, seed + 1), list(SHAPES))
    if spec == "cifar10":
        return read_cifar10(fetch("cifar-10-binary.tar.gz", "data"), size)
    path = Path(spec)
    held = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if held and (path / "train").is_dir():
        train, train_labels, classes = read_all(*list_images(path / "train"), size)
        return Data(train, train_labels, *read_all(*list_images(held, classes), size)[:2], classes)
    images, labels, classes = read_all(*list_images(path), size)
    if (n := len(images)) < 2:
        raise BadInput(f"{n} image(s) in {spec} are too few: one to train on and one to hold out is the least")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # a fixed twentieth is held out
    held, train = (part.sort().values for part in order.tensor_split([max(1, n // 20)]))
    pick = lambda i: images[i] if torch.is_tensor(images) else [images[k] for k in i]
    return Data(pick(train), labels[train], pick(held), labels[held], classes)

def read_cifar10(path, size):
    """CIFAR-10's binary archive: records of a label byte and 3 x 32 x 32 colour bytes, read without unpacking."""
    parts, classes = {}, "airplane automobile bird cat deer dog frog horse ship truck".split()
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".bin"):
                parts[Path(member.name).name] = np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, 3073)
    records = np.concatenate([parts[f"{name}.bin"] for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")])
    pictures, labels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), torch.from_numpy(records[:, 0].astype(np.int64))
    images, n = read_all("CIFAR-10", pictures, labels, classes, size)[0], len(parts["test_batch.bin"])
    return Data(images[:-n], labels[:-n], images[-n:], labels[-n:], classes)

def list_images(path, classes=None):
    """A folder or an .npz -> its name, its images (files, sorted, or one array (N, H, W, 3)), their labels, the names of the classes:
    `classes`, else the first-level sub-folders (one class if there are none) or the numbers up to the highest label."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp"} and p.name[0] != ".")
        names = [p.relative_to(path).parts[0] if p.parent != path else "" for p in files]
        classes = classes or sorted(set(names))
        if not files or set(names) - set(classes):
            raise BadInput(f"no images (.png, .jpg, .jpeg, .webp, .bmp) in {path}" if not files else
                           f"{path} has a class that train/ has not: {min(set(names) - set(classes))!r}")
        return path, files, torch.tensor([*map({name: i for i, name in enumerate(classes)}.get, names)]), classes
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

def attempt(item, prepare):
    """prepare(RGB picture) of a file or an array (H, W, 3), photographs upright; if it cannot be read, a string that says why."""
    try:
        if isinstance(item, np.ndarray):
            return prepare(Image.fromarray(item))
        with Image.open(item) as file:
            picture = ImageOps.exif_transpose(file)
            deep = picture.mode.startswith("I;16")  # convert would clip 16 bits, not scale them
            return prepare((Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if deep else picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
        return f"{item} ({' '.join(str(error).split())})"

def decoded(where, items, prepare, tolerated):
    """(i, prepare(RGB picture)) for each of items, files or arrays (H, W, 3); decoded in parallel, few at a time. Unreadable ones are
    named and left out; more than a share `tolerated` of them is an error."""
    bad, progress = [], Progress(f"reading {where}", len(items))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 64):
            out = list(enumerate(pool.map(attempt, items[first:first + 64], itertools.repeat(prepare)), first))
            bad += [why for _, why in out if isinstance(why, str)]
            said = f"{len(bad)} of {len(items)} images in {where} cannot be read: {'; '.join(bad[:3])}{'; ...' * (len(bad) > 3)}"
            if len(bad) > tolerated * len(items):
                raise BadInput(f"{said}. Mend or remove them")
            yield from ((i, picture) for i, picture in out if not isinstance(picture, str))
            progress(first + len(out))
    if bad:
        print(f"note: {said}. Left out", file=sys.stderr)

def fit(picture, size=None):
    """A picture -> uint8 (3, H, W); if size is given, of its largest centred square, resized bicubically with antialiasing."""
    if size and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

def read_all(where, items, labels, classes, size):
    """-> uint8 (N, 3, size, size), or the items if that is too large, their labels, the classes. Up to 1 % unreadable ones are left out."""
    large, kept, resized = len(items) * 3 * size * size > room(), [], 0
    images, some = torch.empty(0 if large else len(items), 3, size, size, dtype=torch.uint8), items[::len(items) // 100 + 1 if large else 1]
    prepare = lambda picture: (picture.size != (size, size), fit(picture, size))
    for i, (other, picture) in decoded(where, some, prepare, 0.01):  # of a large set a hundred are looked at, to meet errors early
        images[i:i + 1] = picture
        kept.append(i)
        resized += other
    if resized:
        print(f"note: {resized} of {len(some)} images in {where} are not {size}x{size}: resized and centre-cropped", file=sys.stderr)
    return (items, labels, classes) if large else (images, labels, classes) if len(kept) == len(items) else (images[kept], labels[kept], classes)

def room():
    """Bytes that a data set may take in memory: a quarter, shared by the processes here; no more than a quarter of a GPU's free memory."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 // LOCAL_WORLD
    return min(host, torch.cuda.mem_get_info()[0] // 4) if torch.cuda.is_available() else host

def decode(items, size):
    """Files or arrays -> uint8 (B, 3, size, size). Grey stands in for one that cannot be read."""
    pictures = [attempt(item, functools.partial(fit, size=size)) for item in items]
    for why in filter(lambda picture: isinstance(picture, str), pictures):
        print(f"note: cannot read {why}: grey stands in for it", file=sys.stderr)
    return torch.stack([torch.full((3, size, size), 128, dtype=torch.uint8) if isinstance(p, str) else p for p in pictures])

def stream(images, batches, device, size):
    """images[i] on the device for each i of batches, tensors of positions. What is not in memory is decoded ahead, by worker processes."""
    undisturbed = lambda _: (signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL))  # a Ctrl-C is not for them
    found = (images[i] for i in batches) if torch.is_tensor(images) else torch.utils.data.DataLoader(
        images, batch_sampler=(i.tolist() for i in batches), collate_fn=functools.partial(decode, size=size), worker_init_fn=undisturbed,
        num_workers=max(1, os.cpu_count() // LOCAL_WORLD), pin_memory=device.type == "cuda")
    return (x.to(device, non_blocking=True) for x in found)

# ------------------------------------------------------------------------------------------------------------------- FID
# FID (Heusel et al. 2017) asks how far apart two sets of images lie in the eyes of a network. Take the 2,048 pooled features of
# each image, think of each set as a Gaussian, and measure the Frechet distance between the two:
#     FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))
# S_1 S_2 is not symmetric, and its root by the usual routine turns imaginary when images are fewer than features. But it has the
# eigenvalues of S_1^(1/2) S_2 S_1^(1/2), which is symmetric and positive: the trace of the root is the sum of their square roots.
# What biases FID: few images (upwards: their scatter counts as distance, badly below 2,048), another resizing or file format (JPEG!),
# another network. Compare values of one protocol only. Here: that of ADM's evaluator.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Means (d,), covariances (d, d) of two sets -> their Frechet distance, float, computed in float64."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt()  # root root' = sigma1, as good as the symmetric one
    cross = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp_min(0).sqrt().sum()
    return max(0.0, ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item())

def inception_score(logits, splits=10):
    """Logits (N, 1008) -> mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))): sure of each image, and of many kinds.
    Shuffled first, and with torch-fidelity's seed to give its very number: images in order of class would fool the splits."""
    shuffled = np.random.RandomState(2020).permutation(n := len(logits))
    parts = (torch.as_tensor(logits)[at].double().softmax(1) for at in np.split(shuffled, [i * n // splits for i in range(1, splits)]))
    scores = torch.stack([torch.special.xlogy(part, part / part.mean(0)).sum(1).mean().exp() for part in parts])
    return scores.mean().item(), scores.std(correction=0).item()

A = "mean branch1x1=64 branch5x5=48,64@5 branch3x3dbl=64,96@3,96@3 branch_pool="
C = "mean branch1x1=192 branch7x7={0},{0}@1x7,192@7x1 branch7x7dbl={0},{0}@7x1,{0}@1x7,{0}@7x1,192@1x7 branch_pool=192"
E = " branch1x1=320 branch3x3=384,384@fork branch3x3dbl=448,384@3,384@fork branch_pool=192"
GRAPH = {  # block: pool, branches side by side (channels@kernel; "s" strides by 2, "fork" is a 1x3 and a 3x1 side by side)
    "5b": A + "32", "5c": A + "64", "5d": A + "64", "6a": "halve branch3x3=384@3s branch3x3dbl=64,96@3,96@3s branch_pool=",
    "6b": C.format(128), "6c": C.format(160), "6d": C.format(160), "6e": C.format(192),
    "7a": "halve branch3x3=192,320@3s branch7x7x3=192,192@1x7,192@7x1,192@3s branch_pool=", "7b": "mean" + E, "7c": "max" + E}
POOLS = {"mean": nn.AvgPool2d(3, 1, 1, count_include_pad=False), "max": nn.MaxPool2d(3, 1, 1), "halve": nn.MaxPool2d(3, 2)}
def unit(c_in, c_out, kernel="1", pad=True):
    """Convolution without bias, batch norm, ReLU; padded to keep the size unless it strides or pad is False."""
    stride, size = 1 + kernel.endswith("s"), (2 * [int(k) for k in kernel.rstrip("s").split("x")])[:2]
    conv = nn.Conv2d(c_in, c_out, size, stride, [k // 2 if pad and stride == 1 else 0 for k in size], bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out, eps=0.001), relu=nn.ReLU(inplace=True)))

class Mixed(nn.ModuleDict):
    """A row of GRAPH: branches beside one another, concatenated; branch_pool sees the pooled input."""
    def __init__(self, c_in, pool, *branches):
        super().__init__()
        self.pool, self.paths, self.width = POOLS[pool], {}, 0
        for name, units in (branch.split("=") for branch in branches):
            c, self.paths[name], parts = c_in, [], {name: ""}
            for i, (c_out, _, kernel) in enumerate(u.partition("@") for u in units.split(",") if u):
                label = f"{name}_{i + 1}" if "," in units else name
                parts = {label + "a": "1x3", label + "b": "3x1"} if kernel == "fork" else {label: kernel or "1"}
                self.update({label: unit(c, int(c_out), kernel) for label, kernel in parts.items()})
                self.paths[name].append(list(parts))
                c = int(c_out)
            self.width += c * len(parts)
    def forward(self, x):
        out = []
        for name, path in self.paths.items():
            out.append(self.pool(x) if name == "branch_pool" else x)
            for labels in path:
                out[-1] = torch.cat([self[label](out[-1]) for label in labels], dim=1)
        return torch.cat(out, dim=1)

class InceptionV3(nn.Sequential):
    """The 2015 Inception graph: uint8 (B, 3, H, W) -> features (B, 2048), logits without bias (B, 1008). State-dict names of
    pt_inception-2015-12-05. Its quirks, all part of published numbers: average pools that leave the padding out of the mean, a last
    block that pools by maximum, 1,008 outputs for 1,000 classes, and TensorFlow 1's resizing (below)."""
    def __init__(self):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=unit(3, 32, "3s"), Conv2d_2a_3x3=unit(32, 32, "3", pad=False), Conv2d_2b_3x3=unit(32, 64, "3"), pool1=POOLS["halve"],
            Conv2d_3b_1x1=unit(64, 80), Conv2d_4a_3x3=unit(80, 192, "3", pad=False), pool2=POOLS["halve"]))
        width = 192
        for name, row in GRAPH.items():
            self.add_module(f"Mixed_{name}", Mixed(width, *row.split()))
            width = self[-1].width
        self.add_module("fc", nn.Linear(width, 1008))
        self.eval().requires_grad_(False)
    def fold(self):
        """Merge every batch norm into its convolution: the same function, faster. The state-dict names are lost."""
        for m in [m for m in self.modules() if hasattr(m, "bn")]:
            m.conv, m.bn = nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)
    def forward(self, images):
        rows, columns = (resize_matrix(n).to(images.device) for n in images.shape[2:])
        x = ((rows @ images.float() @ columns.T - 128) / 128).contiguous(memory_format=torch.channels_last)
        for layer in list(self)[:-1]:
            x = layer(x)
        x = x.mean((2, 3))
        return x, nn.functional.linear(x, self.fc.weight)

@functools.lru_cache(8)
def resize_matrix(n, to=299):
    """Bilinear interpolation of n points to `to` as TensorFlow 1 does it, (to, n): point i comes from i * n / to, without half-pixel
    centres and without antialiasing. Both axes at once: R_h @ image @ R_w'."""
    at = torch.arange(to) * (n / to)
    low, part = at.long(), at.frac()[:, None]
    return (1 - part) * nn.functional.one_hot(low, n) + part * nn.functional.one_hot((low + 1).clamp(max=n - 1), n)

def load_inception(file, device):
    """The published network, or the one in `file`, ready to measure; its batch norms folded."""
    net, path = InceptionV3(), Path(file) if file else fetch(WEIGHTS)
    restore(path, {None: net})
    if file and sha256(path) != PUBLISHED[WEIGHTS][1]:
        print(f"note: {path} is not the published network: what it measures is not FID", file=sys.stderr)
    return net.fold().to(device)

@torch.no_grad()
def measure(where, items, net, device, skip_bad=False):
    """Images (files, or an array (N, H, W, 3)) -> mean (2048,) and covariance (2048, 2048) of their features, float64, and logits
    (N, 1008). Sums accumulate batch by batch; each size of picture is resized by itself."""
    batch = 10 if device.type == "cpu" else 100  # small ones stay in a CPU's caches: a fifth faster than 50
    total, outer, found, pictures = 0, 0, [], decoded(where, items, fit, 1 if skip_bad else 0)
    for _, group in itertools.groupby(pictures, lambda pair: (pair[0] // batch, pair[1].shape)):
        f, logits = (y.cpu() for y in net(torch.stack([x for _, x in group]).to(device)))
        total, outer = total + f.double().sum(0), outer + f.double().T @ f.double()
        found.append(logits)
    if (n := sum(map(len, found))) < 2:
        raise BadInput(f"{where}: a covariance takes at least 2 images, and {n} could be read")
    if n < 2048:
        print(f"note: {where} has {n} images: below 2,048 FID is biased upward, badly", file=sys.stderr)
    return total / n, (outer - torch.outer(total, total) / n) / (n - 1), torch.cat(found)

def read_set(spec, want_images):
    """-> images (files, or an array (N, H, W, 3)), or the statistics (mu (2048,), sigma (2048, 2048), None) of an .npz (pytorch-fid's, ADM's)."""
    if spec in ("shapes", "cifar10"):
        return load_data(spec, 32).train.permute(0, 2, 3, 1).numpy()
    arrays = read_arrays(Path(spec)) if Path(spec).suffix == ".npz" and Path(spec).is_file() else {}
    if not {"mu", "sigma"} <= set(arrays) or want_images and "arr_0" in arrays:
        return list_images(Path(spec))[1]
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.shape != (2048,) or sigma.shape != (2048, 2048) or not np.isfinite(sigma.sum() + mu.sum()):
        raise BadInput(f"{spec}: want finite statistics mu (2048,) and sigma (2048, 2048), and it has {mu.shape} and {sigma.shape}")
    return mu, sigma, None

def main():
    parser = Parser()
    for name in ("reference", "samples"):
        parser.add_argument(name, help="a folder of images, an .npz of images or of statistics (mu, sigma), or cifar10: its training images")
    parser.add_argument("--weights", metavar="FILE", help=f"a local file of the network (default: {WEIGHTS}, downloaded once)")
    parser.add_argument("--save-stats", metavar="FILE.npz", help="write mu and sigma of the reference")
    parser.add_argument("--paired", action="store_true", help="also the PSNR between the i-th reference image and the i-th sample")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    args, device = parser.parse(__doc__), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    specs = args.reference, args.samples
    sets = [read_set(spec, want_images) for spec, want_images in zip(specs, (args.paired, True))]
    known = [isinstance(s, tuple) for s in sets]
    if args.paired and (any(known) or len(sets[0]) != len(sets[1])) or not (args.save_stats or ".npz").endswith(".npz"):
        raise BadInput("--paired wants as many samples as reference images, and images of both; --save-stats wants a name in .npz")
    net = None if all(known) else load_inception(args.weights, device)
    (mu1, sigma1, _), (mu2, sigma2, logits) = (s if k else measure(spec, s, net, device, args.skip_bad) for spec, s, k in zip(specs, sets, known))
    print(f"fid {frechet_distance(mu1, sigma1, mu2, sigma2):.6f}")
    if logits is not None:
        print("is {:.6f} {:.6f}".format(*inception_score(logits)))
    if args.paired:
        pairs = zip(*(decoded(spec, s, fit, 0) for spec, s in zip(specs, sets)))
        print(f"psnr {torch.cat([psnr(a[None], b[None]) for (_, a), (_, b) in pairs]).mean():.4f}")
    if args.save_stats:  # last: a disk that fails costs no figure
        write(Path(args.save_stats), lambda file: np.savez(file, mu=mu1, sigma=sigma1))

if __name__ == "__main__":
    run(main)
