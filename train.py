"""Train GloTok: first the tokenizer, then a generator of its tokens.

    python train.py                                             # drawn shapes: a CPU, minutes
    python train.py --preset cifar10-small --data FOLDER --out runs/mine
    python train.py --resume --out runs/mine --tokenizer_steps 1000
    torchrun --nproc_per_node=8 train.py --preset imagenet256 --data FOLDER

Every setting of glotok.Config is a flag; a preset gives the defaults. Afterwards, or meanwhile,
`python sample.py RUN` shows what a run has learned.

Read from the top: the two loops, a run from start to end, then what they call.
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import tarfile
import time
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

# For how many turns OpenMP's threads wait awake before they sleep; read when torch is loaded.
# Its default of 300,000 makes a step many times as long when another process wants one of the
# cores; with 5,000 it loses a tenth on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fid
import glotok
from fid import BadInput, note
from glotok import PRESETS, XAR, Config, GloTok

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these: this process among all,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among those of this machine,
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many there are,
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # and how many on this machine

LOG_EVERY = 20  # steps
USAGE_IMAGES = 1000  # a code is in use if one of so many last images chose it: the log's usage
ADV_RAMP = 2000  # steps over which the weight of L_G grows, since the discriminator is untrained

# config: Config; before: the Config that a resumed run had; out: its folder; preset: a name
# data: Data; teacher: what make_teacher gives
Run = namedtuple("Run", "config before out preset data teacher device")

# ================================================================================================
# 1. The tokenizer
# ================================================================================================


def train_tokenizer(run, lpips_file):
    """Descend eq. (13) -> the model. lpips_file: see load_lpips."""
    c = run.config
    device = run.device
    torch.manual_seed(c.seed)
    model = GloTok(c).to(device, memory_format=torch.channels_last).train()
    disc = glotok.discriminator(c).to(device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), **fused(c, device))
    disc_optimizer = torch.optim.Adam(disc.parameters(), betas=(0.9, 0.95), **fused(c, device))
    parts = {"model": model, "optimizer": optimizer}
    if c.lambda_adv:
        parts |= {"disc": disc, "disc_optimizer": disc_optimizer}
    stage = Stage(run, "tokenizer", parts, c.tokenizer_steps, c.batch_size)
    if stage.done == stage.steps:
        check_finished(run)
        return model.eval()
    teacher = run.teacher["histogram"].to(device)
    look = local_teacher(run)
    lpips = load_lpips(lpips_file, device) if c.lambda_perceptual else None
    # A single semantic code has no similarities. The tokenizer then has one codebook, the visual.
    use_hist = c.semantic == "global" and c.lambda_hist > 0 and c.codes_sem > 1
    old = run.before
    note_jump(tokenizer_rate(old, stage.done, old.lr), tokenizer_rate(c, stage.done, c.lr))

    def losses_of(images, ramp):
        """Images uint8 (B, 3, H, W) -> every loss, a dict of scalars, and L, with gradient.

        ramp: the share of its weight that L_G has by now; None before the discriminator enters.
        """
        x = mirrored(to_float(images, device), c)
        with autocast(c, device):
            recon, losses = model(x, look(x) if look else None)  # (1), (10)
            if use_hist:
                losses["hist"] = glotok.histogram_relation_loss(model.codebook_sem, teacher)  # (7)
            if lpips:
                losses["perceptual"] = lpips(recon, x).mean()
            if ramp is not None:
                losses["adv"] = glotok.adversarial_loss(disc, recon)
                losses["disc"] = glotok.discriminator_loss(disc, recon, x)
            share = 1.0 if ramp is None else ramp
            loss = glotok.total_loss(c, model, x, recon, losses, share)  # (2), (3), (13)
        losses["psnr"] = fid.psnr(to_uint8(x), to_uint8(recon)).mean()
        return losses, loss

    def step(images, ramp):
        """A step of both networks -> the means of all losses and the norms of the gradients."""
        optimizer.zero_grad()
        disc_optimizer.zero_grad()
        means = {}
        for part in images.chunk(c.accumulate):
            losses, loss = losses_of(part, ramp)
            (loss / c.accumulate).backward()
            if ramp is not None:
                (losses["disc"] / c.accumulate).backward()
            add_to(means, losses, 1 / c.accumulate)
        means["grad_norm"] = descend(model, optimizer, c.clip)
        if ramp is not None:
            means["disc_grad_norm"] = descend(disc, disc_optimizer, c.clip)
        return means

    step = recorded(step, c, device)
    with stage:
        for images in training_batches(run, range(stage.done, stage.steps)):
            torch.manual_seed(step_seed(c, stage.done))
            set_rate(optimizer, tokenizer_rate(c, stage.done, c.lr))
            set_rate(disc_optimizer, tokenizer_rate(c, stage.done, c.disc_lr))
            means = step(images, adversarial_ramp(c, stage.done))

            stage.end_step(means)  # from here on stage.done counts this step
            if stage.due(LOG_EVERY):
                means["usage_sem"] = usage(model.quantizer_sem)
                means["usage_vis"] = usage(model.quantizer_vis)
                stage.log(means)
            revival_due = c.revive_every and stage.done % c.revive_every == 0
            if revival_due and stage.done <= 0.9 * stage.steps:  # the last tenth is left in peace
                revive(model.quantizer_vis, c)
            if stage.due(c.save_every):
                share_ages(model.quantizer_sem)
                share_ages(model.quantizer_vis)
                stage.save()
            stage.leave_if_asked()
    return model.eval()


# ================================================================================================
# 2. The generator
# ================================================================================================


def train_generator(run, model):
    """Train xAR on the tokens that the tokenizer `model` makes of the training images."""
    c = run.config
    device = run.device
    model.requires_grad_(False)
    torch.manual_seed(c.seed)
    xar = XAR(c).to(device).train()
    ema_model = copy.deepcopy(xar).requires_grad_(False)  # the moving average, which samples
    optimizer = torch.optim.AdamW(decay_groups(xar), betas=(0.9, 0.96), **fused(c, device))
    parts = {"model": xar, "ema_model": ema_model, "optimizer": optimizer}
    stage = Stage(run, "generator", parts, c.generator_steps, c.gen_batch, made_of=model)
    if stage.done == stage.steps:
        return
    tokens = encode_training_set(run, model)  # int32 (N, 2, h, w)
    labels = run.data.train_labels.to(device)
    if c.flip:
        tokens = torch.cat([tokens, encode_training_set(run, model, mirror=True)])
        labels = labels.repeat(2)
    if stage.done == 0:
        some = tokens[fid.evenly_spaced(len(tokens), 5000)].long()
        latent_std = model.to_latents(*some.unbind(1)).std()
        xar.latent_std.copy_(latent_std)
        ema_model.latent_std.copy_(latent_std)
    # At 64 tokens cuDNN's attention (9.19) gave gradients that are not finite; at 256 it did not.
    torch.backends.cuda.enable_cudnn_sdp(c.grid_size**2 != 64)
    flow_loss = compiled(xar.loss, c, device, stage.steps - stage.done)
    note_jump(generator_rate(run.before, stage.done), generator_rate(c, stage.done))

    def step(index, decay):
        """A step on the tokens at index (B,) -> the mean loss, the norm of the gradient."""
        optimizer.zero_grad()
        means = {}
        for i in index.chunk(c.accumulate):
            latents = model.to_latents(*tokens[i].long().unbind(1))
            with autocast(c, device):
                loss = flow_loss(latents, labels[i])
            (loss / c.accumulate).backward()
            add_to(means, {"flow": loss}, 1 / c.accumulate)
        means["grad_norm"] = descend(xar, optimizer, c.clip)
        update_average(ema_model, xar, decay)
        return means

    step = recorded(step, c, device)
    with stage:
        while stage.done < stage.steps:
            torch.manual_seed(step_seed(c, stage.done))
            set_rate(optimizer, generator_rate(c, stage.done))
            index = own_share(batch_indices(len(tokens), c.gen_batch, stage.done, c.seed))
            index = to_device(index, device)
            # a decay that starts low: a young average forgets the initial weights sooner
            decay = min(c.ema, (1 + stage.done) / (10 + stage.done))
            means = step(index, decay)

            stage.end_step(means)
            if stage.due(LOG_EVERY):
                stage.log(means)
            if stage.due(c.save_every):
                stage.save()
            stage.leave_if_asked()


def encode_training_set(run, model, mirror=False):
    """The tokens of all training images, or of their mirror images, int32 (N, 2, h, w)."""
    n = len(run.data.train)
    share = math.ceil(n / WORLD_SIZE)  # of one size for each process
    index = torch.arange(RANK, share * WORLD_SIZE, WORLD_SIZE) % n
    tokens = encode_all(model, run.data.train, index, run.device, mirror).to(run.device)
    if WORLD_SIZE == 1:
        return tokens
    shares = [torch.empty_like(tokens) for _ in range(WORLD_SIZE)]
    dist.all_gather(shares, tokens)
    return torch.stack(shares, dim=1).flatten(0, 1)[:n]


@torch.no_grad()
def encode_all(model, images, index, device, mirror=False):
    """images[index] -> their semantic and visual tokens, int32 (n, 2, h, w), on the CPU.

    images: of a Data. With `mirror`, those of the mirrored images.
    """
    size = model.config.image_size
    batches = index.split(images_at_once(model.config))
    progress = fid.Progress("encoding", len(index))
    tokens = []
    for batch in stream_batches(images, batches, device, size):
        x = to_float(batch, device)
        sem, vis = model.encode(x.flip(3) if mirror else x)
        tokens.append(torch.stack([sem, vis], dim=1).int().cpu())
        progress.update(sum(map(len, tokens)))
    return torch.cat(tokens)


# ================================================================================================
# 3. A run, from start to end
# ================================================================================================


def main():
    # Process 0 speaks for all; errors leave this block.
    with contextlib.redirect_stderr(open(os.devnull, "w") if RANK else sys.stderr):
        args, given = parse_arguments()
        cuda = torch.cuda.is_available()
        if cuda and torch.cuda.device_count() <= LOCAL_RANK:
            raise BadInput(f"this machine has {torch.cuda.device_count()} GPU(s), one a process")
        device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32, but for glotok.full_precision
        if WORLD_SIZE > 1:
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=12))
        train(args, given, device)
    if WORLD_SIZE > 1:
        # Together: a process that left first was now and then aborted by its own threads.
        dist.barrier()
        dist.destroy_process_group()


def train(args, given, device):
    """Data, teacher, tokenizer, generator. What may fail comes before anything is written."""
    out = args.out
    before = None
    if args.resume:
        before, preset, trained_on = load_config(out)
        c = make_config(asdict(before) | given)
    else:
        preset = args.preset or "shapes"
        c = make_config(asdict(PRESETS[preset]) | given)
    check_batches(c)
    data = load_data(c.data, c.image_size, c.seed, decode_later=c.crop < 1)
    if given.get("classes", len(data.classes)) != len(data.classes):
        raise BadInput(f"--classes is {c.classes}, and the data have {len(data.classes)}")
    c = replace(c, classes=len(data.classes))
    if torch.is_tensor(data.train):
        data = data._replace(train=data.train.to(device))
    print(*describe(data), sep="\n", file=sys.stderr)
    if args.resume:
        if data.digest != trained_on["digest"]:
            different = "; ".join(differences(trained_on["summary"], describe(data)))
            raise BadInput(f"{out} was trained on other images: {different}")
        note_changes(before, c)
    if before and all(getattr(before, name) == getattr(c, name) for name in TEACHER_SETTINGS):
        teacher = load_teacher(out)
    else:
        torch.manual_seed(c.seed)
        teacher = from_first_process(lambda: make_teacher(c, data, device))
    run = Run(c, before or c, out, preset, data, teacher, device)

    model = train_tokenizer(run, args.lpips)
    if args.stage != "tokenizer":
        train_generator(run, model)
    if RANK == 0:
        save_settings(run)
        print(f"done. What it has learned: python sample.py {out}")


# ================================================================================================
# 4. Data sets: from a SPEC to batches on the device
# ================================================================================================
# A data SPEC is `shapes` (drawn on the spot), `cifar10` or `imagenette` (downloaded once into
# data/), a folder (a sub-folder a class, or flat; train/ and val/ or test/ are splits), or an .npz
# (images uint8 (N, H, W, 3), maybe labels).

# Images are a tensor uint8 (N, 3, size, size) or, if that would exceed MEMORY_BUDGET, a sequence of
# files or arrays (H, W, 3) of any size. Labels are int64 (N,), classes their names. digest: of what
# was listed; val_from: where the held-out images come from, in words.
Data = namedtuple("Data", "train train_labels val val_labels classes digest val_from")

# An image as it is listed: a file or an array (H, W, 3), its class's name, its place in the data
Item = namedtuple("Item", "image name place")

MEMORY_BUDGET = 2**31  # bytes; what takes more is decoded while training runs

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")  # the first that is there
IMAGE_NAMES = ("x_train", "train_images", "arr_0")  # of arrays, the first that is there
LABEL_NAMES = ("labels", "label", "y_train", "train_labels", "arr_1")


def load_data(spec, size, seed=0, decode_later=False):
    """A data SPEC -> Data, every image size x size.

    decode_later: what is trained on stays as it came, even if it would fit into memory, so that
    stream_batches can take crops of whole pictures. BadInput if there is nothing to train on.
    """
    if spec == "shapes":
        train, train_labels = draw_shapes(20000, size, seed)
        val, val_labels = draw_shapes(1000, size, seed + 1)
        digest = hashlib.sha256(train.numpy().tobytes()).hexdigest()
        if decode_later:
            train = train.permute(0, 2, 3, 1).numpy()
        return Data(train, train_labels, val, val_labels, list(SHAPES), digest, "drawn anew")
    train, val, val_from = list_data(spec)
    digest = digest_of(train, val)
    classes = sorted({item.name for item in train}, key=by_number)
    lost = sorted({item.name for item in val} - set(classes))
    if lost:
        note(f"left out: classes without an image to train on: {', '.join(map(repr, lost[:5]))}")
        val = [item for item in val if item.name in classes]
    train, train_labels = read_all(train, classes, size, decode_later)
    val, val_labels = read_all(val, classes, size)
    if not len(val):
        raise BadInput(f"{spec}: no image is held out of the classes that are trained on")
    if set(classes) <= set(IMAGENETTE_CLASSES):
        classes = [IMAGENETTE_CLASSES[name] for name in classes]
    return Data(train, train_labels, val, val_labels, classes, digest, val_from)


def describe(data):
    """The lines that say what a run is trained on: images, split, and up to 20 classes."""
    n = len(data.classes)
    kind = "1 class" if n == 1 else f"{n} classes"
    lines = [
        f"data: {len(data.train)} images to train on, {len(data.val)} held out ({data.val_from}), "
        f"{kind}"
    ]
    if 1 < n <= 20:
        train = torch.bincount(data.train_labels, minlength=n).tolist()
        val = torch.bincount(data.val_labels, minlength=n).tolist()
        for k, name in enumerate(data.classes):
            lines.append(f"  class {k}: {name}, {train[k]} to train on, {val[k]} held out")
    return lines


def differences(then, now):
    """What two descriptions of data do not share, up to four lines of it."""
    before = [f"then {line.strip()}" for line in then if line not in now]
    after = [f"now {line.strip()}" for line in now if line not in then]
    return before[:2] + after[:2] or ["as many of each class, but not the same"]


def quotas(counts, n):
    """Labels int64 (n,) in the shares of counts (classes,), each rounded up or down; shuffled.

    FID sees the shares of the classes, so that images for it must have those of the data.
    """
    position = (torch.arange(n) + 0.5) / n * counts.sum()
    labels = torch.searchsorted(counts.cumsum(0).double(), position.double(), right=True)
    return labels[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


# ---- listing


def by_number(name):
    """A key that sorts class names, those that are numbers as numbers; 07 and 7 differ, too."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def hold_out(items):
    """Items -> those to train on, and a fixed random twentieth, at least one, to hold out.

    A class whose images would all be held out is trained on instead.
    """
    n = len(items)
    if n < 2:
        raise BadInput(f"{n} image(s) are too few: one to train on, one held out")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held_out = set(order[: max(1, n // 20)].tolist())
    classes = {item.name for i, item in enumerate(items) if i not in held_out}
    held_out = {i for i in held_out if items[i].name in classes}
    train = [item for i, item in enumerate(items) if i not in held_out]
    return train, [items[i] for i in sorted(held_out)]


def list_data(spec):
    """A SPEC but `shapes` -> Items to train on and held out, and where the second are from."""
    if not spec:
        raise BadInput("--data is empty: want shapes, cifar10, imagenette, a folder, or an .npz")
    if spec == "cifar10":
        return *list_cifar10(fid.fetch(CIFAR10_ARCHIVE, "data")), "its test set"
    path = Path(spec)
    if spec == "imagenette":
        path = unpack(fid.fetch(IMAGENETTE_ARCHIVE, "data"), "imagenette2-160")
    split = find_split(path) if path.is_dir() else None
    if split:
        return list_split(path, *split)
    if path.is_dir():
        items = list_unsplit(path)
    elif path.suffix == ".npz" and path.is_file():
        items = list_arrays(path)
    else:
        raise BadInput(
            f"no data at {spec!r}: want shapes, cifar10, imagenette, a folder of images, or an .npz"
        )
    return *hold_out(items), "a fixed random twentieth"


def list_split(path, train_folder, val_folder):
    train = list_folder(train_folder)
    val = list_folder(val_folder)
    if val[0].name == "" != train[0].name:
        raise BadInput(f"{val_folder} is flat, and {train_folder} has a folder a class: sort it")
    unused = [p.name for p in folders_in(path) if p not in (train_folder, val_folder)]
    if unused:
        note(f"{path}: not looked at beside the split: {', '.join(unused[:5])}")
    return train, val, f"{val_folder.name}/"


def list_unsplit(path):
    """A folder without a split -> Items. BadInput if it is above the data, or inside out."""
    folders = folders_in(path)
    with_split = [folder for folder in folders if find_split(folder)]
    if len(with_split) == 1:
        raise BadInput(f"{path} is above the data: give --data {with_split[0]}")
    if with_split:
        raise BadInput(f"{path}: want train/CLASS and val/CLASS, not CLASS/train and CLASS/val")
    if len(folders) == 1 and folders[0].name.lower() in TRAIN_NAMES:
        path = folders[0]  # not a class of that name, since there is no other
    items = list_folder(path)
    for name in sorted({item.name for item in items}):
        if name.lower() in TRAIN_NAMES + VAL_NAMES:
            note(f"{name}/ is taken for a class: a split has both train/ and val/")
    return items


def folders_in(path):
    return [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def find_split(path):
    """The folders to train on and to hold out among those of path; None unless both are there."""
    folder = {p.name.lower(): p for p in folders_in(path)}
    train = [folder[name] for name in TRAIN_NAMES if name in folder]
    val = [folder[name] for name in VAL_NAMES if name in folder]
    return (train[0], val[0]) if train and val else None


def list_folder(path):
    """The images below a folder, sorted, with their first-level folder as class -> Items.

    Links are followed, once. What is passed over is counted and named.
    """
    items = []
    passed_over = []
    for file in fid.files_below(path, set()):
        place = file.relative_to(path)
        if file.name.lower().endswith(fid.IMAGE_SUFFIXES):
            items.append(Item(file, place.parts[0] if len(place.parts) > 1 else "", str(place)))
        else:
            passed_over.append(str(place))
    loose = [item for item in items if not item.name]
    if 0 < len(loose) < len(items):  # beside class folders
        if 2 * len(loose) > len(items):
            raise BadInput(f"{path}: more images beside its folders than in them: sort them")
        passed_over += [item.place for item in loose]
        items = [item for item in items if item.name]
    if passed_over:
        some = ", ".join(passed_over[:3])
        note(f"{path}: {len(passed_over)} file(s) passed over, no images of a class: {some}")
    if not items:
        raise BadInput(f"no images ({', '.join(fid.IMAGE_SUFFIXES)}) in {path}")
    empty = {folder.name for folder in folders_in(path)} - {item.name for item in items}
    if empty:
        note(f"{path}: folders without an image: {', '.join(sorted(empty)[:5])}")
    return items


def list_arrays(path):
    """An .npz of images and maybe labels -> Items. Other arrays are named as ignored."""
    arrays = fid.read_arrays(path)
    with_images = [name for name, array in arrays.items() if array.ndim == 4]
    with_images = [name for name in IMAGE_NAMES if name in with_images] or with_images
    with_labels = [name for name in LABEL_NAMES if name in arrays and name not in with_images]
    images = arrays[with_images[0]] if with_images else np.zeros(0)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        listed = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items()) or "nothing"
        raise BadInput(f"{path} must hold images uint8 (N, H, W, 3), and holds {listed[:500]}")
    n = len(images)
    labels = arrays[with_labels[0]] if with_labels else np.zeros(n, np.int64)
    labels = labels[:, 0] if labels.shape == (n, 1) else labels  # as Keras has them
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise BadInput(f"{path}: labels must be {n} integers, not {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() > 1000 + 100 * n:
        raise BadInput(f"{path}: labels {labels.min()} to {labels.max()} are no class numbers")
    ignored = [name for name in arrays if name not in with_images[:1] + with_labels[:1]]
    if ignored:
        note(f"{path}: ignored: {', '.join(ignored)}")
    return [Item(image, str(label), i) for i, (image, label) in enumerate(zip(images, labels))]


def digest_of(train, val):
    """SHA-256 of Items: of files size and first 64 KB, of arrays all; classes and places."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(WORKERS) as pool:
        for items in (train, val):
            for content in pool.map(head, [item.image for item in items]):
                digest.update(content)
            digest.update(repr([(item.name, item.place) for item in items]).encode())
    return digest.hexdigest()


def head(image):
    if isinstance(image, np.ndarray):
        return image.tobytes()
    try:
        with open(image, "rb") as file:
            return image.stat().st_size.to_bytes(8, "big") + file.read(65536)
    except OSError:  # read_all will meet it again
        return b""


# ---- published data sets

CIFAR10_ARCHIVE = fid.Published(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
IMAGENETTE_ARCHIVE = fid.Published(
    "imagenette2-160.tgz",
    "https://s3.amazonaws.com/fast-ai-imageclas/",
    "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
)
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_CLASSES += ["dog", "frog", "horse", "ship", "truck"]

# Imagenette's folders are called after WordNet; the words are of Deng et al.'s ImageNet.
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def list_cifar10(path):
    """CIFAR-10's binary archive, read without unpacking -> Items of its training and test set.

    Each of its files holds records of a label byte and 3 x 32 x 32 colour bytes.
    """
    records = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".bin"):
                raw = np.frombuffer(archive.extractfile(member).read(), np.uint8)
                records[Path(member.name).name] = raw.reshape(-1, 3073)
    train = np.concatenate([records[f"data_batch_{i}.bin"] for i in range(1, 6)])
    parts = []
    for part in (train, records["test_batch.bin"]):
        images = part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        names = [CIFAR10_CLASSES[label] for label in part[:, 0]]
        parts.append([Item(*each) for each in zip(images, names, range(len(part)))])
    return parts


def unpack(archive, name):
    """The folder `name` of a tar archive, unpacked beside it -> its path.

    It is there whole or not at all: what is unpacked is renamed when it is complete.
    """
    folder = archive.with_name(name)
    if folder.is_dir():
        return folder
    if not hasattr(tarfile, "data_filter"):
        raise BadInput("to unpack an archive safely takes Python 3.11.4 or later")
    part = archive.with_name(f".{name}.{os.getpid()}.part")
    note(f"unpacking {archive}")
    try:
        with tarfile.open(archive) as members:
            members.extractall(part, filter="data")  # nothing outside, no links to there
        (part / name).rename(folder)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        if not folder.is_dir():  # another process may have been faster
            raise BadInput(f"cannot unpack {archive}: {fid.one_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


# ---- reading
#
# Threads decode: Pillow lets go of Python's lock while it decodes and resizes, and threads, unlike
# worker processes, share memory and do not die alone.

WORKERS = max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE)


def read_all(items, classes, size, decode_later=False):
    """Items -> their images and labels, as in Data. Unreadable ones are left out."""
    n = len(items)
    number = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([number[item.name] for item in items], dtype=torch.int64)
    images = [item.image for item in items]
    if decode_later or n * 3 * size * size > MEMORY_BUDGET:
        return images, labels
    decoded = torch.empty(n, 3, size, size, dtype=torch.uint8)
    unreadable = set()
    progress = fid.Progress("reading image", n)
    batches = torch.arange(n).split(256) if n else []
    stream = stream_batches(images, batches, torch.device("cpu"), size, None, unreadable)
    for index, batch in zip(batches, stream):
        decoded[index] = batch
        progress.update(index[-1].item() + 1)
    readable = [i for i in range(n) if i not in unreadable]
    return decoded[readable], labels[readable]


def stream_batches(items, batches, device, size, crops=None, unreadable=None):
    """Yield items[index], uint8 (B, 3, size, size) on the device, for each index (B,) of batches.

    What is not in memory is decoded by threads, two batches ahead; crops: for each batch the
    squares (B, 3) of load_image, without the middle. Grey stands in for what cannot be read, with a
    note; its position is added to the set `unreadable`. BadInput if that is more than 1 %.
    """
    if torch.is_tensor(items):
        for index in batches:
            yield items[to_device(index, items.device)].to(device, non_blocking=True)
        return
    unreadable = set() if unreadable is None else unreadable
    crops = itertools.repeat(None) if crops is None else crops

    def collect(index, futures):
        images = torch.full((len(index), 3, size, size), 128, dtype=torch.uint8)
        for k, future in enumerate(futures):
            try:
                images[k] = future.result()
            except BadInput as error:
                note_once(f"{error}: left out, or grey")
                unreadable.add(index[k].item())
        if len(unreadable) > max(1, 0.01 * len(items)):
            raise BadInput(f"{len(unreadable)} of {len(items)} images cannot be read")
        return to_device(images, device)

    pool = ThreadPoolExecutor(WORKERS)
    ahead = collections.deque()  # (index, a future for each of its images)
    try:
        for index, crop in zip(batches, crops):
            squares = [None] * len(index) if crop is None else crop.tolist()
            chosen = [items[i] for i in index.tolist()]
            requests = zip(chosen, itertools.repeat(size), squares)
            ahead.append((index, [pool.submit(fid.load_image, *each) for each in requests]))
            if len(ahead) > 2:
                yield collect(*ahead.popleft())
        while ahead:
            yield collect(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


note_once = functools.lru_cache(None)(note)


# ---- the built-in pictures: one shape each, its class; colours, size, place and background vary
#
# An outline is given by a signed distance, negative inside (exact along edges, too small outside
# corners), at the point (u, v) from the middle, in radii; u, float (n, 1, size), and v, (n, size,
# 1), broadcast.


SHAPES = {
    "disc": lambda u, v: torch.hypot(u, v) - 1,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.75).abs() - 0.25,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.85,
    "triangle": lambda u, v: torch.maximum(v, 0.866 * u.abs() - 0.5 * v) - 0.55,
    "cross": lambda u, v: torch.minimum(box(u, v, 1, 0.35), box(u, v, 0.35, 1)),
    "bars": lambda u, v: box(u, v.abs() - 0.6, 0.95, 0.28),
}


def box(u, v, width, height):
    return torch.maximum(u.abs() - width, v.abs() - height)


def draw_shapes(n, size, seed):
    """n pictures uint8 (n, 3, size, size) and their classes int64 (n,), positions in SHAPES.

    The same for the same seed.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    labels = torch.randint(len(SHAPES), (n,), generator=g)
    radius = uniform(0.28, 0.38, 1, 1) * size
    free = size - 2 * radius - 2  # how far the middle may move
    x = radius + 1 + uniform(0, 1, 1, 1) * free
    y = radius + 1 + uniform(0, 1, 1, 1) * free

    # The ground is a gradient between two colours. The shape has, of four colours, the one that is
    # furthest from both.
    ground = uniform(0, 1, 2, 3)
    ground[:, 1] = ground[:, 0] + 0.6 * (ground[:, 1] - ground[:, 0])
    colours = uniform(0, 1, 4, 3)
    slope = uniform(-1, 1, 2)
    contrast = (colours[:, :, None] - ground[:, None]).abs().sum(3).amin(2)  # (n, 4)
    colour = colours[torch.arange(n), contrast.argmax(1)]  # (n, 3)

    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    pixel = torch.arange(size) + 0.5
    across = pixel / size - 0.5
    for k, outline in enumerate(SHAPES.values()):
        for i in (labels == k).nonzero()[:, 0].split(1000):
            u = (pixel[None, None, :] - x[i]) / radius[i]  # (n_i, 1, size)
            v = (pixel[None, :, None] - y[i]) / radius[i]  # (n_i, size, 1)
            distance = outline(u, v) * radius[i]  # in pixels
            cover = (0.5 - distance).clamp(0, 1)[:, None]  # antialiased over one pixel
            ramp = 0.5 + slope[i, :1, None] * across + slope[i, 1:, None] * across[:, None]
            ramp = ramp.clamp(0, 1)[:, None]
            behind = torch.lerp(ground[i, 0, :, None, None], ground[i, 1, :, None, None], ramp)
            picture = torch.lerp(behind, colour[i, :, None, None], cover)
            images[i] = (255 * picture).round().byte()
    return images, labels


# ================================================================================================
# 5. The teacher (section 3.3)
# ================================================================================================

TEACHER_SETTINGS = ("teacher", "teacher_centres", "teacher_by_class", "bins")
TEACHER_SETTINGS += ("image_size", "codes_sem", "code_dim")  # its floor, too
MAX_FLOOR_CODES = 4096  # more take minutes, and hardly change the floor


def make_teacher(c, data, device):
    """All that training needs of the teacher, a dict; made once. Says what it is.

    "histogram" (bins,), P_t of eq. (7); "floor", the KL that as many free codes reach, or
    MAX_FLOOR_CODES of them (histogram_floor); of a convnet also its weights, "convnet", and its
    number of "classes".
    """
    teacher = {}
    if c.teacher == "sphere":
        histogram = glotok.sphere_histogram(c.code_dim, c.bins)
        mean, mean_square = 0.0, 1 / c.code_dim
    else:
        vectors = teacher_vectors(c, data, device, teacher)
        histogram = glotok.relation_histogram(vectors, c.bins)
        mean, mean_square = glotok.cosine_moments(vectors)
    teacher["histogram"] = histogram.cpu()
    codes = min(c.codes_sem, MAX_FLOOR_CODES)
    teacher["floor"] = glotok.histogram_floor(histogram.to(device), codes, c.code_dim)
    print(
        f"teacher: {c.teacher}, mean cosine {mean:.3f}, mean squared cosine {mean_square:.3f} "
        f"(codes of dimension {c.code_dim}: at least {1 / c.code_dim:.3f}); "
        f"such codes can imitate it to a KL of {teacher['floor']:.2g}",
        file=sys.stderr,
    )
    return teacher


def teacher_vectors(c, data, device, teacher):
    """The vectors (n, d) whose relations are the teacher's. A convnet is trained into `teacher`."""
    if Path(c.teacher).is_dir():
        return load_run(c.teacher).codebook_sem.detach()  # as it is
    labels = None
    if c.teacher in glotok.TEACHER_WIDTH:
        if c.teacher == "convnet":
            teacher["convnet"] = train_convnet(c, data, device).cpu().state_dict()
            teacher["classes"] = len(data.classes)
        look = feature_network(c.teacher, teacher, device)
        vectors, labels = training_features(c, data, look, device)
    else:
        vectors = read_vectors(Path(c.teacher)).to(device)
        if len(vectors) <= c.teacher_centres:
            note(f"teacher: the {len(vectors)} vectors of {c.teacher}, as they are")
            return vectors
    # a note, since a million take minutes
    note(f"teacher: clustering {len(vectors)} vectors, {c.teacher_centres} centres")
    return glotok.teacher_centres(vectors, c.teacher_centres, labels)


def train_convnet(c, data, device, steps=300, batch_size=64):
    """The offline stand-in for a pre-trained model: a small classifier of the training labels."""
    if len(data.classes) < 2:
        raise BadInput(
            "teacher convnet learns from class labels, and these data have one class: "
            "use --teacher sphere, dinov2 or a file"
        )
    net = glotok.ConvNet(len(data.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    progress = fid.Progress("teacher: convnet step", steps)
    indices = [batch_indices(len(data.train), batch_size, step, c.seed) for step in range(steps)]
    batches = stream_batches(data.train, indices, device, c.image_size)
    for step, images in enumerate(batches):
        x = mirrored(to_float(images, device), c)
        # noise, because it will also classify imperfect, generated images
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)
        loss = F.cross_entropy(net(x), data.train_labels[indices[step]].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return net.eval()


def feature_network(name, teacher, device):
    """The network of a teacher, convnet or dinov2, as a function of images in [-1, 1].

    It gives, without gradient, a vector (B, D) of each image, DINOv2's class token or the mean of
    the convnet's features, and maps of features (B, D, h', w').
    """
    if name == "convnet":
        net = load_convnet(teacher, device)
    else:
        net = glotok.DINOv2().to(device)
        fid.load_weights(fid.fetch(DINOV2), net)

    @torch.no_grad()
    def look(x):
        if name == "convnet":
            maps = net.features(x)
            return maps.mean((2, 3)), maps
        x = F.interpolate(x / 2 + 0.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = net(x)  # (B, 1 + 256, D)
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, (16, 16))

    return look


def local_teacher(run):
    """The network that FQGAN's and VA-VAE's losses ask in every step; None for other methods."""
    if run.config.semantic not in ("fqgan", "vavae"):
        return None
    return feature_network(run.config.teacher, run.teacher, run.device)


def load_convnet(teacher, device):
    """The network of a convnet teacher, in eval mode."""
    net = glotok.ConvNet(teacher["classes"]).to(device).eval().requires_grad_(False)
    net.load_state_dict(teacher["convnet"])
    return net


@torch.no_grad()
def training_features(c, data, look, device):
    """Features of all training images, (N, D), and their labels (N,), None unless by class.

    Paper silent on the number of vectors. Each image gives one of its patches at random, or so many
    that there are 25 for each centre; with teacher_by_class, as VQGAN-LC, the mean of its patches.
    """
    g = torch.Generator().manual_seed(c.seed)
    order = torch.randperm(len(data.train), generator=g)
    patches = math.ceil(25 * c.teacher_centres / len(order))
    progress = fid.Progress("teacher: features of image", len(order))
    features = []
    labels = []
    batches = order.split(100)
    images = stream_batches(data.train, batches, device, c.image_size)
    for k, (index, batch) in enumerate(zip(batches, images)):
        _, maps = look(to_float(batch, device))
        f = maps.float().flatten(2).transpose(1, 2)  # (B, T, D)
        if c.teacher_by_class:
            f = f.mean(1, keepdim=True)  # (B, 1, D)
        some = torch.rand(f.shape[:2], generator=g).argsort(1)[:, :patches]  # (B, patches)
        f = f[torch.arange(len(f))[:, None], some]  # (B, patches, D)
        features.append(f.flatten(0, 1))
        labels.append(data.train_labels[index].repeat_interleave(f.shape[1]))
        progress.update(min(100 * (k + 1), len(order)))
    labels = torch.cat(labels).to(device) if c.teacher_by_class else None
    return torch.cat(features), labels


def read_vectors(path):
    """The one float array (n, d), n > 1, of an .npy or .npz -> float32."""
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise BadInput(
            f"no teacher {str(path)!r}: want convnet, dinov2, sphere, a file of vectors (.npy or "
            ".npz), or a run folder"
        )
    found = []
    arrays = fid.read_arrays(path)
    for array in arrays.values():
        if array.ndim == 2 and len(array) > 1 and array.dtype.kind == "f":
            found.append(torch.from_numpy(array.astype("float32")))
    if len(found) != 1:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise BadInput(f"{path} must hold one float array (n, d), n > 1; it holds {listed[:500]}")
    length = found[0].norm(dim=1)
    if not length.isfinite().all() or not length.all():
        raise BadInput(f"{path} has vectors that are zero or not finite")
    return found[0]


DINOV2 = fid.Published(
    "dinov2_vits14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/",
    "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
)
VGG16 = fid.Published(
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
LPIPS_HEADS = fid.Published(
    "vgg.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


def load_lpips(file, device):
    """LPIPS with the weights in `file` or, if that is None, the published ones."""
    net = glotok.LPIPS()
    if file:
        fid.load_weights(Path(file), net)
        return net.to(device)
    state = fid.load_checkpoint(fid.fetch(VGG16)) | fid.load_checkpoint(fid.fetch(LPIPS_HEADS))
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier")})
    return net.to(device)


# ================================================================================================
# 6. Schedule, precision, processes
# ================================================================================================


def learning_rate(step, steps, peak, warmup, cooldown, end=0.0):
    """Linear warm-up over `warmup` steps, constant at `peak`, then half a cosine down to `end`.

    The cosine takes the last share `cooldown` of the steps. step counts from 0.
    """
    up = min(1, (step + 1) / max(warmup, 1))
    last_part = max(cooldown * steps, 1)
    late = max(0.0, 1 - (steps - step) / last_part)  # 0 until the last part, then up to 1
    down = (1 + math.cos(math.pi * late)) / 2
    return up * (end + (peak - end) * down)


def tokenizer_rate(c, step, peak):
    return learning_rate(step, c.tokenizer_steps, peak, c.warmup, c.cooldown)


def generator_rate(c, step):
    schedule = (c.gen_warmup, c.gen_cooldown, c.gen_lr_end)
    return learning_rate(step, c.generator_steps, c.gen_lr, *schedule)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"].fill_(rate)


def adversarial_ramp(c, step):
    """The share of lambda_adv that counts at a step; None before the discriminator enters."""
    if not c.lambda_adv or step < c.adv_start:
        return None
    return min(1.0, (step + 1 - c.adv_start) / ADV_RAMP)


@functools.lru_cache(2)
def shuffled(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_indices(n, batch_size, step, seed):
    """The step's positions in an endless row of shuffles of range(n), (batch_size,).

    A function of the step alone, so that a run can resume.
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch = position // n
    parts = []
    for e in epoch.unique().tolist():
        order = shuffled(n, seed + 7919 * e)
        parts.append(order[position[epoch == e] % n])
    return torch.cat(parts)


def step_seed(c, step):
    """Random choices depend on the step and the process alone, so that a run can resume."""
    return c.seed + 1_000_003 * (step + 1) + 500_009 * RANK


def random_crops(c, step):
    """The squares that the step's images are cropped to, (batch_size, 3): see load_image."""
    # another seed than the loop's, or an image's crop would tell whether it is mirrored
    generator = torch.Generator().manual_seed(c.seed + 1_000_003 * (step + 1) + 1)
    crops = torch.rand(c.batch_size, 3, generator=generator)
    crops[:, 0] = c.crop + (1 - c.crop) * crops[:, 0]
    return crops


def training_batches(run, steps):
    """Yield this process's share of the images of each of the steps, uint8 (B, 3, H, W)."""
    c = run.config
    items = run.data.train
    indices = (own_share(batch_indices(len(items), c.batch_size, s, c.seed)) for s in steps)
    crops = (own_share(random_crops(c, s)) for s in steps) if c.crop < 1 else None
    return stream_batches(items, indices, run.device, c.image_size, crops)


def mirrored(x, c):
    """Images (B, 3, H, W), a random half of them mirrored if c.flip is 1."""
    mirror = torch.rand(len(x), 1, 1, 1, device=x.device) < c.flip / 2
    return torch.where(mirror, x.flip(3), x)


def to_device(x, device):
    """A tensor on the CPU -> on the device. From pinned memory the host need not wait for it."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_float(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1] on the device."""
    images = images.to(device, non_blocking=True)
    return images.to(memory_format=torch.channels_last).float() / 127.5 - 1


def to_uint8(x):
    """Float images in [-1, 1], clipped -> uint8, rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def images_at_once(config):
    """How many images go through the tokenizer in one pass outside training."""
    return max(1, min(200, 2**21 // config.image_size**2))


def add_to(means, losses, share):
    """Add a micro-batch's share of its losses to the step's means."""
    for name, loss in losses.items():
        means[name] = means.get(name, 0) + share * loss.detach()


def descend(network, optimizer, clip):
    """A step along the gradients' mean over the processes, clipped -> its norm before that."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if WORLD_SIZE > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        flat = all_reduce_mean(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip or torch.inf)
    optimizer.step()
    return norm


def decay_groups(network, decay=0.02):
    """AdamW's parameter groups: xAR's weight decay on matrices, none on vectors (biases)."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@torch.no_grad()
def update_average(ema_model, model, decay):
    """ema_model's weights = decay * themselves + (1 - decay) * model's; decay: float or scalar.

    Three launches for all tensors together, where a loop makes one or more for each.
    """
    averages = list(ema_model.parameters())
    change = torch._foreach_sub(list(model.parameters()), averages)
    torch._foreach_mul_(change, 1 - decay)
    torch._foreach_add_(averages, change)


def autocast(c, device):
    """bf16 where use_bf16 says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(c, device))


def use_bf16(c, device):
    """Whether to train in bf16: as told; auto: on GPUs that have it."""
    if c.precision != "auto":
        return c.precision == "bf16"
    return device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8


# A CUDA graph. On one H200 a step of preset shapes is 1,600 kernels that take 4 ms together, and
# Python takes 33 ms to launch them one by one. A graph is a list of launches, recorded once, which
# the GPU then works off by itself. It holds addresses, not values: what changes from step to step
# (images, rates, shares) must stand in a tensor that keeps its place, and nothing may make the host
# wait. torch.manual_seed acts on a replay as on a call.


def use_graph(c, device):
    """Whether to record steps. One process alone: gradients of several meet outside a step."""
    return c.compile == "on" and device.type == "cuda" and WORLD_SIZE == 1


def fused(c, device):
    """Options of an Adam that can stand in a graph: the rate is a tensor, which set_rate fills."""
    return {"lr": torch.zeros((), device=device), "fused": True, "capturable": use_graph(c, device)}


def recorded(step, c, device):
    """step -> a function that does the same, recorded and replayed if use_graph says so.

    step takes tensors, numbers and None, and gives {name: scalar}. For each choice of arguments
    that are None the first three calls are plain, since libraries choose their kernels then.
    """
    if not use_graph(c, device):
        return step
    calls = collections.Counter()
    recordings = {}

    def replayed(*arguments):
        kind = tuple(argument is None for argument in arguments)
        calls[kind] += 1
        if calls[kind] <= 3:
            return on_side_stream(step, arguments)
        if kind not in recordings:
            try:
                recordings[kind] = record(step, arguments, device)
            except RuntimeError as error:
                note(f"no CUDA graph ({fid.one_line(error)[:100]}): steps are launched one by one")
                recordings[kind] = None
        if recordings[kind] is None:
            return step(*arguments)
        places, results, launch = recordings[kind]
        for place, argument in zip(places, arguments):
            if torch.is_tensor(argument):
                place.copy_(argument, non_blocking=True)
            elif argument is not None:
                place.fill_(argument)
        launch()
        return dict(results)

    return replayed


def on_side_stream(step, arguments):
    """step(*arguments) as CUDA's rules for what comes before a recording want it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    return results


def record(step, arguments, device):
    """step -> the places of its arguments and of its results, and a function that launches it."""
    places = []
    for a in arguments:
        places.append(None if a is None else torch.as_tensor(a, device=device).clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*places)
    return places, results, graph.replay


def compiled(function, c, device, steps):
    """torch.compile(function) if it is asked for, pays and works here.

    On one H200 it took 20 to 50 s, and a step of xAR then 0.5 to 0.6 of its time.
    """
    if c.compile != "on" or steps < 1000:
        return function
    try:
        torch.compile(torch.sin)(torch.ones(9, device=device))
    except RuntimeError as error:
        note(f"no working compiler ({fid.one_line(error)[:100]}): not compiled")
        return function
    return torch.compile(function, dynamic=False)


# Several processes (torchrun). Every process takes an equal share of every batch; its random
# numbers are its own, and gradients are averaged. What looks at a batch as a whole (coverage,
# revival, batch norm, gradient_ratio, InfoNCE) sees the micro-batch of one process.


def from_first_process(make):
    """make(), called in process 0 alone -> its result, in every process."""
    result = [make() if RANK == 0 else None]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(result)
    return result[0]


def own_share(x):
    """This process's part of a tensor of a batch."""
    return x.chunk(WORLD_SIZE)[RANK]


def all_reduce_mean(x):
    """The mean of a tensor over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x / WORLD_SIZE


def share_ages(quantizer):
    """A code is as old as in the process that chose it last."""
    if WORLD_SIZE > 1:
        dist.all_reduce(quantizer.age, dist.ReduceOp.MIN)


def usage(quantizer):
    """Share of the codes that the last USAGE_IMAGES training images chose."""
    share_ages(quantizer)
    return (quantizer.age < USAGE_IMAGES / WORLD_SIZE).float().mean()


def revive(quantizer, c):
    """Revive what no process chose since the last revival; all take process 0's choice."""
    share_ages(quantizer)
    glotok.revive(quantizer, c.revive_every * c.batch_size // WORLD_SIZE)
    if WORLD_SIZE > 1:
        dist.broadcast(quantizer.weight.data, 0)


def check_batches(c):
    """BadInput if the batches cannot be divided."""
    for name in ("batch_size", "gen_batch"):
        if getattr(c, name) % (WORLD_SIZE * c.accumulate):
            raise BadInput(
                f"{name} is {getattr(c, name)}: it must be a multiple of {WORLD_SIZE} process(es) "
                f"times accumulate, {c.accumulate}"
            )
    if c.semantic == "fqgan" and c.batch_size == WORLD_SIZE * c.accumulate:
        raise BadInput("semantic fqgan tells the images of a micro-batch apart: 2 at least")


# ================================================================================================
# 7. The run folder
# ================================================================================================


class Stage:
    """Where a loop stands: its checkpoint and log, the progress line, requests to stop.

    parts: {name: module or optimizer}, what the checkpoint holds; made_of: a generator's tokenizer.
    A `with` block around the loop makes Ctrl-C and SIGTERM requests: the step in hand is completed
    and saved first. BadInput if a checkpoint is there that does not fit.
    """

    def __init__(self, run, name, parts, steps, batch_size, made_of=None):
        self.run = run
        self.name = name
        self.parts = parts
        self.steps = steps
        self.batch_size = batch_size
        self.made_of = made_of
        self.path = run.out / f"{name}.pt"
        self.done = 0  # steps
        self.images = 0  # trained on, in
        self.seconds = 0.0  # so many, and with
        self.peak = 0  # so many bytes of memory
        self.stop_requested = False  # of this process
        self.stopping = False  # of all
        self.all_finite = torch.ones((), dtype=torch.bool, device=run.device)
        if self.path.exists():
            self.load()

    def load(self):
        saved = fid.load_checkpoint(self.path, self.run.device)
        entering = () if "disc" in saved else ("disc", "disc_optimizer")
        parts = {name: part for name, part in self.parts.items() if name not in entering}
        fid.load_states(self.path, parts, saved)
        for name, part in parts.items():
            if name.endswith("optimizer"):  # an option of the device, not of the run
                for group in part.param_groups:
                    group["capturable"] = use_graph(self.run.config, self.run.device)
        if self.made_of:
            check_made_of(self.path, saved, self.made_of)
        self.done = saved["step"]
        self.images = saved["images"]
        self.seconds = saved["seconds"]
        self.peak = saved["peak"]
        if self.done > self.steps:
            raise BadInput(f"{self.path} has been trained for {self.done} steps already")

    def __enter__(self):
        device = self.run.device
        generator = self.run.out / "generator.pt"
        if self.name == "tokenizer" and generator.exists():
            raise BadInput(f"{generator} was trained on the tokenizer as it is: move it away first")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if RANK == 0:
            save_settings(self.run)
        millions = sum(p.numel() for p in self.parts["model"].parameters()) / 1e6
        precision = "bf16" if use_bf16(self.run.config, device) else "float32"
        print(
            f"{self.name}: {millions:.2f} M parameters, {precision} on {WORLD_SIZE} x "
            f"{device.type}",
            file=sys.stderr,
        )
        self.progress = fid.Progress(f"{self.name} step", self.steps, self.done)
        self.started = time.monotonic() - self.seconds  # as if no process had ended since

        def request_stop(*_):
            self.stop_requested = True

        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, request_stop)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def end_step(self, means):
        """Count the step; gather whether its means are finite, and whether to stop."""
        self.done += 1
        self.images += self.batch_size
        self.seconds = time.monotonic() - self.started
        self.all_finite &= torch.isfinite(sum(means.values()))
        self.stopping = self.stop_requested
        if WORLD_SIZE > 1:  # all processes stop after the same step
            self.stopping = all_reduce_mean(torch.tensor(float(self.stop_requested))).item() > 0

    def due(self, every):
        """Whether something comes now that comes every so many steps, at the end, at a stop."""
        return self.done % every == 0 or self.done == self.steps or self.stopping

    def check_finite(self):
        if all_reduce_mean(self.all_finite.float()).item() < 1:
            raise BadInput(
                f"a loss became NaN or infinite by step {self.done}; {self.path.name} keeps the "
                "last good state, if any: --resume with a lower learning rate"
            )

    def log(self, means):
        """Write a row of figures {name: scalar} to log.jsonl, and show it."""
        self.check_finite()
        values = all_reduce_mean(torch.stack(list(means.values()))).tolist()
        figures = dict(zip(means, values))
        text = " ".join(f"{k} {v:.3g}" for k, v in figures.items() if not k.endswith("grad_norm"))
        speed = self.images / self.seconds
        self.progress.update(self.done, f"{text} {speed:.3g} images/s")
        if RANK == 0:
            row = {"stage": self.name, "step": self.done, **figures}
            append_line(self.run.out / "log.jsonl", json.dumps(row))

    def save(self):
        """Write the checkpoint."""
        self.check_finite()
        if RANK != 0:
            return
        self.peak = max(self.peak, peak_memory(self.run.device))
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        saved |= {"step": self.done, "images": self.images, "seconds": self.seconds}
        saved |= {"peak": self.peak, "tokenizer": self.made_of and weights_digest(self.made_of)}
        fid.write_atomically(self.path, lambda file: torch.save(saved, file))

    def leave_if_asked(self):
        """End the program, if Ctrl-C or SIGTERM came."""
        if not self.stopping:
            return
        if WORLD_SIZE > 1:
            dist.barrier()  # torchrun ends all processes soon after the first: not before the save
        out = self.run.out
        print(f"\nstopped after step {self.done}: go on with --resume --out {out}", file=sys.stderr)
        raise KeyboardInterrupt


def append_line(path, text):
    """Append a line to a file; one that a crash cut short is ended first."""
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(text.encode() + b"\n")


def peak_memory(device):
    """Bytes of the GPU that this stage took at most; on a CPU, all that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def weights_digest(model):
    """SHA-256 of a tokenizer's weights, by which a generator knows its tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(".age"):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_made_of(path, saved, model):
    """BadInput if saved, a generator's checkpoint, was trained on tokens of another tokenizer."""
    if saved.get("tokenizer") != weights_digest(model):
        raise BadInput(f"{path} was trained on the tokens of another tokenizer")


def save_settings(run):
    """teacher.pt and, when that is there, config.json: from then on there is a run to resume."""
    out, data = run.out, run.data
    fid.write_atomically(out / "teacher.pt", lambda file: torch.save(run.teacher, file))
    trained_on = {
        "digest": data.digest,
        "classes": data.classes,
        "counts": torch.bincount(data.train_labels, minlength=len(data.classes)).tolist(),
        "summary": describe(data),
    }
    saved = {"preset": run.preset, **asdict(run.config), "trained_on": trained_on}
    text = json.dumps(saved, indent=1) + "\n"
    fid.write_atomically(out / "config.json", lambda file: file.write(text.encode()))


def load_config(folder):
    """The Config of the run in `folder`, its preset's name, and what it was trained on, a dict."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())
        preset = saved.pop("preset")
        trained_on = saved.pop("trained_on")
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        if not {"digest", "classes", "counts", "summary"} <= set(trained_on):
            raise ValueError("it does not say what it was trained on")
        return Config(**settings), preset, trained_on
    except FileNotFoundError:
        raise BadInput(f"no run in {folder}: there is no {path}") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{path} is not a run's settings: {error}") from None


def make_config(settings):
    """A dict of settings -> Config; BadInput if they do not fit."""
    try:
        return Config(**settings)
    except ValueError as error:
        raise BadInput(str(error)) from None


def load_teacher(folder):
    """What make_teacher left in the run folder."""
    path = Path(folder) / "teacher.pt"
    teacher = fid.load_checkpoint(path)
    if not {"histogram", "floor"} <= set(teacher):
        raise BadInput(f"{path} is not a teacher that this program made")
    return teacher


def load_run(folder, device="cpu"):
    """The trained tokenizer of a run folder, a GloTok in eval mode."""
    config, _, _ = load_config(folder)
    model = GloTok(config).to(device)
    path = Path(folder) / "tokenizer.pt"
    fid.load_states(path, {"model": model}, fid.load_checkpoint(path, device))
    return model.eval()


def check_finished(run):
    """BadInput if a finished tokenizer is given other losses, another rate or another teacher.

    Nothing would be trained by them, and config.json and teacher.pt would be wrong about it.
    """
    names = [f.name for f in fields(Config) if f.name.startswith("lambda_")]
    names += ["semantic", "beta", "lr", *TEACHER_SETTINGS]
    changed = [name for name in names if getattr(run.before, name) != getattr(run.config, name)]
    if changed:
        raise BadInput(
            f"the tokenizer is finished: {', '.join(changed)} may change with more "
            "--tokenizer_steps alone"
        )


def note_changes(before, c):
    """Say which settings of a run are others now."""
    changed = []
    for name, old in asdict(before).items():
        new = getattr(c, name)
        if new != old:
            changed.append(f"{name} {old} -> {new}")
    if changed:
        note(f"changed: {', '.join(changed)}")


def note_jump(before, now):
    if abs(now - before) > 0.01 * before:
        note(f"the learning rate jumps from {before:.2g} to {now:.2g}")


# ================================================================================================
# 8. The command line
# ================================================================================================


def parse_arguments():
    """Command line -> arguments, {setting: value} of the settings that were given."""
    parser = fid.Parser(
        __doc__,
        usage="train.py [--preset P] [--data SPEC] [--out DIR] [--stage S] [--resume] [settings]",
    )
    parser.add_argument("--preset", choices=PRESETS, help="default shapes")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default runs/PRESET)")
    parser.add_argument(
        "--stage",
        default="all",
        choices=["tokenizer", "generator", "all"],
        help="what to train; generator: of the tokenizer that is there, finished first if need be "
        "(default %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--lpips",
        metavar="FILE",
        help="a local file of LPIPS, VGG16's convolutions and the heads, for lambda_perceptual "
        "(default: the published ones, downloaded once)",
    )
    group = parser.add_argument_group("settings (defaults of preset shapes)")
    for f in fields(Config):
        several = isinstance(f.default, tuple)
        group.add_argument(
            f"--{f.name}",
            metavar="X",
            type=int if several else type(f.default),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} ({str(f.default).strip('()')})",
        )
    args = parser.parse_args()
    if args.out == "":
        raise BadInput("--out is empty: want the run folder")
    args.out = Path(args.out or f"runs/{args.preset or 'shapes'}")
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if "channel_mult" in given:
        given["channel_mult"] = tuple(given["channel_mult"])
    if given.get("label_dropout") in (0, 1) and "guidance" not in given:
        given["guidance"] = 1.0
        note("guidance is 1, none: it needs labels that are hidden now and then in training")
    check_folder(args)
    return args, given


def check_folder(args):
    """BadInput if the run folder holds what it should not, or lacks what it should hold."""
    files = ("config.json", "tokenizer.pt", "generator.pt")
    if args.resume and args.preset:
        raise BadInput("--resume goes on with the settings of the run: leave --preset out")
    if not args.resume and any((args.out / name).exists() for name in files):
        raise BadInput(f"{args.out} holds a run: go on with --resume, or choose another --out")
    if args.stage == "generator" and not (args.out / "tokenizer.pt").exists():
        raise BadInput(f"{args.out} has no tokenizer yet: train it first, with --stage tokenizer")


if __name__ == "__main__":
    fid.run_script(main)
