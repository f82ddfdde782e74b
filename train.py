"""Train GloTok: first the tokenizer, then a generator of its tokens.

    python train.py                                             # drawn shapes: a CPU, minutes
    python train.py --preset cifar10-small --data FOLDER --out runs/mine --lambda_res 0
    python train.py --resume --out runs/mine                    # go on where it stopped
    torchrun --nproc_per_node=8 train.py --preset imagenet256 --data FOLDER

Every setting of glotok.Config is a flag; a preset gives the defaults.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # until run_script takes over, Ctrl-C ends the slow imports silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# For how many turns OpenMP's threads wait awake before they sleep; read when torch is loaded.
# Its default of 300,000 makes a step many times as long when another process wants one of the
# cores; with 5,000 it loses a tenth on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fid import (
    BadInput,
    Parser,
    Progress,
    choose,
    evenly_spaced,
    fetch,
    load_checkpoint,
    load_data,
    load_states,
    load_weights,
    lock,
    named_tensors,
    note,
    psnr,
    read_arrays,
    run_script,
    sha256,
    stream_batches,
    write_atomically,
)
from glotok import (
    GENERATORS,
    LPIPS,
    PRESETS,
    TEACHER_WIDTH,
    Config,
    ConvNet,
    DINOv2,
    GloTok,
    adversarial_loss,
    cosine_moments,
    discriminator,
    discriminator_loss,
    gradient_weights,
    histogram_floor,
    histogram_relation_loss,
    kmeans,
    reconstruction_loss,
    relation_histogram,
    sphere_histogram,
    total_loss,
)
from sample import (
    Run,
    draw_curves,
    encode_all,
    find_inception,
    load_config,
    load_convnet,
    make_config,
    read_log,
    report_generator,
    report_tokenizer,
    to_float,
    to_uint8,
)

LOG_EVERY = 20  # steps

# ================================================================================================
# 1. The command line
# ================================================================================================

# What --resume may change in a run.
MAY_CHANGE = {
    "tokenizer_steps",
    "generator_steps",
    "save_every",
    "accumulate",
    "compile",
    # read after training alone
    "eval_images",
    "guidance",
    "guidance_first",
    "sampling_steps",
    "stochastic",
    "snap",
    "top_k",
}

# The first setting of each group in --help, and the group's title.
GROUPS = {
    "data": "data and teacher",
    "patch": "the tokenizer",
    "beta": "its losses, eqs. (3) and (13)",
    "generator": "the generator",
    "start_from": "training",
}


def parse_arguments():
    """Command line -> arguments, Config. A flag overrides the preset or, to resume, the run."""
    parser = Parser(
        __doc__,
        usage="train.py [--preset P] [--data SPEC] [--out DIR] [--stage S] [--resume] [settings]",
    )
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)} (default shapes)")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default runs/PRESET)")
    parser.add_argument(
        "--stage",
        default="all",
        choices=["tokenizer", "generator", "all"],
        help="what to train; generator: with --resume, of the tokenizer that is there "
        "(default %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="a local file of the FID network, for rfid and kid (default: the published one, if "
        "fid.py has downloaded it)",
    )
    parser.add_argument(
        "--lpips",
        metavar="FILE",
        help="a local file of LPIPS, VGG16's convolutions and the heads, for lambda_perceptual "
        "(default: the published ones, downloaded once)",
    )
    add_setting_flags(parser)
    args = parser.parse()
    args.out = Path(args.out or f"runs/{args.preset or 'shapes'}")
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if "channel_mult" in given:
        given["channel_mult"] = tuple(given["channel_mult"])

    if args.resume:
        saved, preset = load_config(args.out)
        check_unchanged(args, given, saved, preset)
        args.preset = preset
        return args, make_config({**asdict(saved), **given})
    refuse_to_overwrite(args)
    args.preset = args.preset or "shapes"
    preset = choose(args.preset, PRESETS, "preset")
    return args, make_config({**asdict(preset), **given})


def refuse_to_overwrite(args):
    files = ("config.json", "tokenizer.pt", "generator.pt")
    if not args.resume and any((args.out / name).exists() for name in files):
        raise BadInput(
            f"{args.out} holds a run: continue it with --resume, or choose another --out"
        )


def add_setting_flags(parser):
    """A flag for each field of Config. What is not given stays absent from the arguments."""
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(f"{GROUPS[f.name]} (defaults of preset shapes)")
        several = isinstance(f.default, tuple)
        default = str(f.default).strip("()") or "none"
        group.add_argument(
            f"--{f.name}",
            metavar="X",
            type=int if several else type(f.default),
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} ({default})",
        )


def check_unchanged(args, given, saved, preset):
    """BadInput if flags to --resume contradict the run."""
    changed = []
    for name, value in given.items():
        if getattr(saved, name) != value and name not in MAY_CHANGE:
            changed.append(f"{name} {getattr(saved, name)}")
    if args.preset not in (None, preset):
        changed.append(f"preset {preset}")
    if changed:
        raise BadInput(
            f"the run in {args.out} was made with {', '.join(changed)}: choose another --out"
        )


# ================================================================================================
# 2. Schedule, precision, processes
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


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


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
    """Every random choice of a step depends on the step alone, so that a run can resume."""
    return c.seed + 1_000_003 * (step + 1)


def random_crops(c, step):
    """The squares that the step's images are cropped to, (batch_size, 3): see crop_and_resize."""
    # another seed than the loop's, or an image's crop would tell whether it is mirrored
    generator = torch.Generator().manual_seed(step_seed(c, step) + 1)
    crops = torch.rand(c.batch_size, 3, generator=generator)
    crops[:, 0] = c.crop + (1 - c.crop) * crops[:, 0]
    return crops


def autocast(c, device):
    """bf16 where use_bf16 says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(c, device))


@functools.lru_cache
def use_bf16(c, device):
    """Whether to train in bf16: as told, or where it is faster.

    That is on GPUs that have it, and for wide tokenizers and their generators on CPUs that multiply
    it natively. Preset shapes took 1.6 times as long with it; where it is emulated it is many times
    slower.
    """
    if c.precision != "auto":
        return c.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return c.channels >= 64 and ("avx512_bf16" in flags or "amx_bf16" in flags)


def compile_networks(c, device, *networks):
    """torch.compile them in place, if it is asked for and works here."""
    if not c.compile:
        return
    try:
        torch.compile(torch.sin)(torch.ones(9, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        note(f"--compile 1 finds no working compiler ({reason}): not compiled")
        return
    # gradient_ratio goes backward through one graph several times. A compiled one, from torch 2.6
    # on, refuses unless it keeps its buffers: the setting is the one that its message names.
    if hasattr(torch._functorch.config, "donated_buffer"):
        torch._functorch.config.donated_buffer = False
    for network in networks:
        network.compile(dynamic=False)


# Several processes (torchrun) and micro-batches (--accumulate). Every process takes an equal share
# of every batch, in --accumulate micro-batches one after the other. Random numbers are drawn for
# the whole batch, and each takes its own: any division of the batch makes the same step, up to
# rounding. Exceptions: what looks at a micro-batch as a whole (coverage_loss, revive, the
# discriminator's batch norm, gradient_weights, FQGAN's InfoNCE and entropy), and dropout.

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def own_share(x):
    """This process's part of a tensor of a batch."""
    return x.chunk(WORLD_SIZE)[RANK]


def micro_batches(c, *tensors):
    """The tensors of this process's share, cut together into micro-batches."""
    return zip(*(x.chunk(c.accumulate) for x in tensors))


def distributed(network):
    """The network to call in training: its gradients are averaged over the processes."""
    if WORLD_SIZE == 1:
        return network
    # `broadcast_buffers` is deprecated, but its replacement is newer than torch 2.5
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def set_gradient_sync(network, on):
    """Whether the next forward and backward pass averages gradients: no_sync() as a switch."""
    if WORLD_SIZE > 1:
        network.require_backward_grad_sync = on


def all_reduce_mean(x):
    """The mean of a tensor over the processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x / WORLD_SIZE


def add_to(means, losses, c):
    """Add a micro-batch's losses to the step's means over its micro-batches."""
    for name, loss in losses.items():
        means[name] = means.get(name, 0) + loss.detach() / c.accumulate


# ================================================================================================
# 3. The teacher (section 3.3)
# ================================================================================================


MAX_FLOOR_CODES = 4096  # more take minutes, and hardly change the floor


def make_teacher(c, data, device):
    """All that training needs of the teacher, a dict; made once.

    "histogram" (bins,); "moments", the mean and the mean square of its cosines; "floor", the KL
    that as many free codes reach, or MAX_FLOOR_CODES of them (histogram_floor); of a convnet also
    its weights and its number of classes. For the record: how many "vectors" there are, and the
    SHA-256 of a file.
    """
    if c.teacher == "sphere":
        histogram = sphere_histogram(c.code_dim, c.bins)
        teacher = {"histogram": histogram, "moments": (0.0, 1 / c.code_dim)}
    else:
        vectors, teacher = teacher_vectors(c, data, device)
        teacher["histogram"] = relation_histogram(vectors.to(device), c.bins).cpu()
        teacher["moments"] = cosine_moments(vectors)
        teacher["vectors"] = len(vectors)
    codes = min(c.codes_sem, MAX_FLOOR_CODES)
    teacher["floor"] = histogram_floor(teacher["histogram"].to(device), codes, c.code_dim)
    return teacher


def teacher_vectors(c, data, device):
    """The vectors (n, d) of a teacher that has some, and what to keep beside them, a dict.

    A convnet is trained here, and a network's features are clustered.
    """
    teacher = {}
    if c.teacher == "convnet":
        teacher["convnet"] = train_convnet(c, data, device).state_dict()
        teacher["classes"] = len(data.classes)
    if c.teacher in TEACHER_WIDTH:
        vectors = feature_centres(c, data, load_feature_network(teacher, device), device)
    else:
        path, name = split_teacher_spec(c.teacher)
        vectors = read_vectors(path, name)
        teacher["sha256"] = sha256(path)
    return vectors, teacher


def train_convnet(c, data, device, steps=300, batch_size=64):
    """The offline stand-in for a pre-trained model: a small classifier of the training labels."""
    if len(data.classes) < 2:
        raise BadInput(
            "teacher convnet learns from class labels, and these data have one class: "
            "use --teacher sphere, dinov2 or a file"
        )
    net = ConvNet(len(data.classes)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    progress = Progress("teacher: convnet step", steps)
    indices = [batch_indices(len(data.train), batch_size, step, c.seed) for step in range(steps)]
    batches = stream_batches(data.train, indices, device, c.image_size)
    for step, images in enumerate(batches):
        mirror = torch.rand(batch_size, 1, 1, 1, device=device) < c.flip / 2
        x = mirrored(to_float(images, device), mirror)
        # noise, because it will also classify imperfect, generated images
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)
        labels = data.train_labels[indices[step]].to(device)
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return net.eval()


def mirrored(x, mirror):
    """Images (B, 3, H, W), those mirrored where mirror, bool (B, 1, 1, 1), says so."""
    return torch.where(mirror, x.flip(3), x)


def load_feature_network(teacher, device):
    """The teacher network as a function of images in [-1, 1], without gradient.

    It gives a vector (B, D) of each image, DINOv2's class token or the mean of the convnet's
    features, and maps of features (B, D, h', w').
    """
    if "convnet" in teacher:
        convnet = load_convnet(teacher, device).requires_grad_(False)

        @torch.no_grad()
        def convnet_features(x):
            maps = convnet.features(x)
            return maps.mean((2, 3)), maps

        return convnet_features

    dinov2 = DINOv2().to(device)
    load_weights(fetch("dinov2_vits14_pretrain.pth"), dinov2)

    @torch.no_grad()
    def dinov2_features(x):
        x = F.interpolate(x / 2 + 0.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = dinov2(x)  # (B, 1 + 256, D)
        return tokens[:, 0], tokens[:, 1:].transpose(1, 2).unflatten(2, (16, 16))

    return dinov2_features


# k-means of a teacher network's features. Paper silent on the number of vectors: each image gives
# one of its patches at random, or so many that there are 25 for each centre, and k-means sees at
# most 256 for each.
FEWEST_PER_CENTRE = 25
MOST_PER_CENTRE = 256


@torch.no_grad()
def feature_centres(c, data, features, device):
    """Centres of the features of all training images, or of teacher_images of them, (n, D).

    n = teacher_centres, or fewer in small data sets. With teacher_by_class as VQGAN-LC: the mean of
    each image's patches, clustered class by class, teacher_centres // classes centres each (but at
    least one), stacked. So 4,096 centres of ImageNet's 1,000 classes are 4,000.
    """
    g = torch.Generator().manual_seed(c.seed)
    n = len(data.train)
    chosen = torch.randperm(n, generator=g)[: c.teacher_images or n]
    patches = math.ceil(FEWEST_PER_CENTRE * c.teacher_centres / len(chosen))
    progress = Progress("teacher: features of image", len(chosen))
    vectors = []
    done = 0
    for images in stream_batches(data.train, chosen.split(100), device, c.image_size):
        _, maps = features(to_float(images, device))
        f = maps.float().flatten(2).transpose(1, 2)  # (B, T, D)
        if c.teacher_by_class:
            f = f.mean(1, keepdim=True)  # (B, 1, D)
        some = torch.rand(f.shape[:2], generator=g).argsort(1)[:, :patches]  # (B, patches)
        vectors.append(f[torch.arange(len(f))[:, None], some].flatten(0, 1))
        done += len(images)
        progress.update(done)
    vectors = torch.cat(vectors)
    if c.teacher_by_class:
        labels = data.train_labels[chosen].to(device)
        return class_centres(vectors, labels, c.teacher_centres).cpu()
    most = MOST_PER_CENTRE * c.teacher_centres
    if len(vectors) > most:
        vectors = vectors[torch.randperm(len(vectors), generator=g)[:most].to(device)]
    return kmeans(vectors, min(c.teacher_centres, len(vectors))).cpu()


def class_centres(vectors, labels, centres):
    """VQGAN-LC's centres: k-means of the vectors (N, D) of each class, labels (N,), stacked."""
    classes = labels.unique()
    share = max(1, centres // len(classes))
    stacked = []
    for label in classes:
        of_class = vectors[labels == label]
        stacked.append(kmeans(of_class, min(share, len(of_class))))
    return torch.cat(stacked)


def split_teacher_spec(spec):
    """FILE or FILE:TENSOR -> path, name of the tensor or ""."""
    name = ""
    if not Path(spec).exists() and ":" in spec:
        spec, _, name = spec.rpartition(":")
    path = Path(spec)
    if not path.is_file():
        raise BadInput(
            f"no teacher {spec!r}: want convnet, dinov2, sphere, "
            "or a file of vectors (.npy, .npz, .pt, .pth)"
        )
    return path, name


def read_vectors(path, name=""):
    """The one float array (n, d), n > 1, of a file or, given a name, that one -> float32."""
    if path.suffix in (".npy", ".npz"):
        arrays = {k: v for k, v in read_arrays(path).items() if v.dtype.kind in "fiu"}
        # two kinds, since torch has neither all widths nor all byte orders of numpy
        found = {}
        for k, v in arrays.items():
            found[k] = torch.from_numpy(v.astype("float32" if v.dtype.kind == "f" else "int64"))
    else:
        found = dict(named_tensors(load_checkpoint(path)))
    fitting = []
    for k, v in found.items():
        is_list_of_vectors = v.dim() == 2 and len(v) > 1 and v.is_floating_point()
        if is_list_of_vectors and name in ("", k):
            fitting.append(k)
    if len(fitting) != 1:
        listed = ", ".join(f"{k} {tuple(v.shape)}" for k, v in found.items()) or "nothing"
        raise BadInput(
            f"{path} must hold one float array (n, d) of n > 1 vectors, "
            f"or be given as {path}:NAME; it holds {listed[:500]}"
        )
    vectors = found[fitting[0]].float()
    length = vectors.norm(dim=1)
    if not length.isfinite().all() or not length.all():
        raise BadInput(f"{path}: {fitting[0]} has vectors that are zero or not finite")
    return vectors


def load_lpips(file, device):
    """LPIPS with the weights in `file` or, if that is None, the published ones."""
    net = LPIPS()
    if file:
        load_weights(Path(file), net)
        return net.to(device)
    state = {}
    for name in ("vgg16-397923af.pth", "vgg.pth"):
        state |= load_checkpoint(fetch(name))
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier")})
    return net.to(device)


def load_start(c):
    """The weights of the tokenizer that this one starts from."""
    path = Path(c.start_from) / "tokenizer.pt"
    saved = load_checkpoint(path)
    load_states(path, {"model": GloTok(c)}, saved)  # BadInput if it does not fit
    return saved["model"]


# ================================================================================================
# 4. Saving, resuming, logging, stopping
# ================================================================================================


class Stage:
    """What both loops below share: where to start, the log, the checkpoints, stopping.

    states: {name: module or optimizer}, what a checkpoint holds; at_start: a tensor that it holds
    as it was when the run began. A `with` block around the loop makes Ctrl-C and SIGTERM requests:
    the step in hand is completed and saved first.
    """

    def __init__(self, run, name, states, steps, batch_size, at_start=None):
        self.run = run
        self.name = name
        self.states = states
        self.at_start = at_start
        self.steps = steps
        self.batch_size = batch_size
        self.path = run.out / f"{name}.pt"
        self.step = 0  # steps done
        self.seconds_before = 0.0  # of training, before this process
        self.peak_before = 0  # bytes of memory, of earlier processes
        if self.path.exists():
            saved = load_checkpoint(self.path, run.device)
            load_states(self.path, states, saved)
            self.step = saved["step"]
            self.seconds_before = saved.get("seconds", 0.0)
            self.peak_before = saved.get("peak", 0)
            self.at_start = saved.get("at_start", at_start)
        self.first_step = self.step
        self.started = time.monotonic()
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.forget_later_rows()
        self.all_finite = torch.ones((), dtype=torch.bool, device=run.device)
        self.stop_requested = False  # of this process
        self.stopping = False  # of all

    def forget_later_rows(self):
        """Rows of the log that were written after the checkpoint: their steps will come again."""
        rows = read_log(self.run.out)
        rows = [row for row in rows if row["stage"] != self.name or row["step"] <= self.step]
        if RANK == 0:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(self.run.out / "log.jsonl", text)

    def __enter__(self):
        self.progress = Progress(f"{self.name} step", self.steps, self.step)
        self.started = time.monotonic()  # again: what came before the loop is not training

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
        """Count the step; look whether its means {name: scalar} are finite, and at the signals."""
        self.step += 1
        self.all_finite &= torch.isfinite(sum(means.values()))
        requests = all_reduce_mean(torch.tensor(float(self.stop_requested)))
        self.stopping = requests.item() > 0  # all processes stop after the same step

    def finite_everywhere(self):
        """Whether all means of all steps were finite, in all processes."""
        return all_reduce_mean(self.all_finite.float()).item() == 1

    def due(self, every):
        """Whether something comes now that comes every so many steps, at the end, at a stop."""
        return self.step % every == 0 or self.step == self.steps or self.stopping

    def log(self, means):
        """Write a row of figures {name: scalar} to log.jsonl, and show it."""
        if not self.finite_everywhere():
            raise BadInput(
                f"a loss became NaN or infinite by step {self.step}; {self.path.name} keeps the "
                "last good state, if any: lower the learning rate"
            )
        values = all_reduce_mean(torch.stack(list(means.values()))).tolist()
        figures = dict(zip(means, values))
        text = " ".join(f"{k} {v:.3g}" for k, v in figures.items() if not k.endswith("grad_norm"))
        seconds = time.monotonic() - self.started
        speed = (self.step - self.first_step) * self.batch_size / seconds
        self.progress.update(self.step, f"{text} {speed:.3g} images/s")
        if RANK == 0:
            row = {"stage": self.name, "step": self.step, **figures}
            with open(self.run.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def save(self):
        """Write the checkpoint, unless a loss is not finite: then the last good one stays."""
        if not self.finite_everywhere() or RANK != 0:
            return
        saved = {name: part.state_dict() for name, part in self.states.items()}
        saved |= {"step": self.step, "seconds": self.seconds(), "peak": self.peak()}
        saved["at_start"] = self.at_start
        write_atomically(self.path, lambda file: torch.save(saved, file))

    def stop(self):
        """Leave the loop, as Ctrl-C does."""
        if WORLD_SIZE > 1:
            dist.barrier()  # torchrun ends all processes soon after the first: not before the save
        message = f"\nstopped after step {self.step}: continue with --resume --out {self.run.out}"
        print(message, file=sys.stderr)
        raise KeyboardInterrupt

    def seconds(self):
        return self.seconds_before + time.monotonic() - self.started

    def peak(self):
        """The most memory that a process took which trained this stage, bytes.

        On a CPU that counts all that the process did before.
        """
        if self.step == self.first_step:  # this process has not trained it
            return self.peak_before
        if self.run.device.type == "cuda":
            return max(self.peak_before, torch.cuda.max_memory_allocated())
        return max(self.peak_before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def figures(self):
        """For metrics.json: time, speed, memory."""
        seconds = self.seconds()
        return {
            "seconds": round(seconds, 1),
            "images_per_second": round(self.steps * self.batch_size / seconds, 2),
            "peak_memory_gb": round(self.peak() / 2**30, 2),
        }


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def announce(stage_name, network, c, device):
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    precision = "bf16" if use_bf16(c, device) else "float32"
    print(
        f"{stage_name}: {millions:.2f} M parameters, {precision} on {WORLD_SIZE} x {device.type}",
        file=sys.stderr,
    )


# ================================================================================================
# 5. The tokenizer
# ================================================================================================


def train_tokenizer(run, lpips, start_weights):
    """Descend eq. (13) -> the model, its codebook's histogram before training, figures.

    start_weights: the weights to begin with, None for random ones.
    """
    c = run.config
    device = run.device
    torch.manual_seed(c.seed)
    model = new_tokenizer(c, start_weights).to(device, memory_format=torch.channels_last).train()
    disc = discriminator(c).to(device)
    betas = (c.beta1, c.beta2)
    optimizer = torch.optim.Adam(model.parameters(), c.lr, betas, fused=True)
    disc_optimizer = torch.optim.Adam(disc.parameters(), c.disc_lr, betas, fused=True)
    states = {"model": model, "optimizer": optimizer}
    if c.lambda_adv:
        states |= {"disc": disc, "disc_optimizer": disc_optimizer}

    teacher_hist = run.teacher["histogram"].to(device)
    # Of the initial codebook, before Stage loads a checkpoint. If a run is resumed, Stage takes the
    # one that the checkpoint holds in its place.
    hist_before = relation_histogram(model.codebook_sem, c.bins).detach()
    # A single semantic code has no similarities. The tokenizer then has one codebook, the visual.
    use_hist = c.semantic == "global" and c.lambda_hist > 0 and c.codes_sem > 1
    feature_network = None
    if c.semantic in ("fqgan", "vavae"):
        feature_network = load_feature_network(run.teacher, device)

    compile_networks(c, device, model.encoder, model.decoder, disc)
    ddp_model = distributed(model)
    ddp_disc = distributed(disc)
    stage = Stage(run, "tokenizer", states, c.tokenizer_steps, c.batch_size, hist_before)
    keep_counts_in_process_0(model)
    announce("tokenizer", model, c, device)
    batches = training_batches(run, range(stage.step, c.tokenizer_steps))
    schedule = (c.warmup, c.cooldown)
    with stage:
        for step, images in enumerate(batches, stage.step):
            set_learning_rate(optimizer, learning_rate(step, stage.steps, c.lr, *schedule))
            disc_rate = learning_rate(step, stage.steps, c.disc_lr, *schedule)
            set_learning_rate(disc_optimizer, disc_rate)
            optimizer.zero_grad()
            disc_optimizer.zero_grad()
            use_disc = c.lambda_adv > 0 and step >= c.adv_start
            means = {}

            torch.manual_seed(step_seed(c, step))
            mirror = own_share(torch.rand(c.batch_size, 1, 1, 1, device=device) < c.flip / 2)
            for k, (part, flip) in enumerate(micro_batches(c, images, mirror)):
                x = mirrored(to_float(part, device), flip)
                last = k == c.accumulate - 1
                set_gradient_sync(ddp_model, on=last)
                set_gradient_sync(ddp_disc, on=last)
                with autocast(c, device):
                    target = feature_network(x) if feature_network else None
                    recon, losses = ddp_model(x, target)  # (1), (10)
                    losses["recon"] = reconstruction_loss(recon, x)  # (2)
                    if use_hist and k == 0:
                        # It depends on the codebook alone: once a step is enough. The factor
                        # cancels the division by accumulate, below.
                        hist_loss = histogram_relation_loss(model.codebook_sem, teacher_hist)
                        losses["hist"] = c.accumulate * hist_loss  # (7)
                    if lpips:
                        losses["perceptual"] = lpips(recon, x).mean()
                    if use_disc:
                        # disc itself, frozen: through ddp_disc this pass would prepare DDP for
                        # gradients that never come.
                        losses["adv"] = adversarial_loss(disc, recon)
                        losses["disc"] = discriminator_loss(ddp_disc, recon, x)
                    weights = gradient_weights(c, step, losses, model)
                    loss = total_loss(c, losses, weights)  # (13)
                (loss / c.accumulate).backward()
                if use_disc:
                    (losses["disc"] / c.accumulate).backward()
                add_to(means, losses, c)
                add_to(means, {"psnr": psnr(to_uint8(x), to_uint8(recon)).mean()}, c)

            limit = c.clip or torch.inf
            means["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            if use_disc:
                disc_norm = torch.nn.utils.clip_grad_norm_(disc.parameters(), limit)
                means["disc_grad_norm"] = disc_norm
                disc_optimizer.step()

            stage.end_step(means)  # from here on stage.step is step + 1, the number of steps done
            if stage.due(LOG_EVERY):
                means["usage_sem"] = usage(model.quantizer_sem)
                means["usage_vis"] = usage(model.quantizer_vis)
                stage.log(means)
            if stage.step % (c.revive_every or LOG_EVERY) == 0:
                if c.revive_every and step < 0.9 * stage.steps:  # the last tenth is left in peace
                    model.quantizer_vis.revive()
                reset_usage_counts(model)
            if stage.due(c.save_every):
                gather_usage_counts(model)
                stage.save()
            if stage.stopping:
                stage.stop()
    return model.eval(), stage.at_start, stage.figures()


def new_tokenizer(c, weights):
    """A GloTok with these weights or, if they are None, random ones."""
    model = GloTok(c)
    if weights:
        model.load_state_dict(weights)
        reset_usage_counts(model)
    return model


def training_batches(run, steps):
    """This process's share of the images of each of the steps: an iterator of (B, 3, H, W)."""
    c = run.config
    n = len(run.data.train)
    indices = (own_share(batch_indices(n, c.batch_size, step, c.seed)) for step in steps)
    crops = None
    if c.crop < 1:
        crops = (own_share(random_crops(c, step)) for step in steps)
    return stream_batches(run.data.train, indices, run.device, c.image_size, crops)


def reset_usage_counts(model):
    for quantizer in (model.quantizer_sem, model.quantizer_vis):
        quantizer.usage_count.zero_()


def usage(quantizer):
    """Share of the codes that were used since the count was reset, by any process."""
    return (all_reduce_mean(quantizer.usage_count.clone()) > 0).float().mean()


# Each process counts what its own images use. A checkpoint holds the sum: process 0 writes it, and
# after loading it process 0 alone may keep it, or it would count once for each process.


def gather_usage_counts(model):
    for quantizer in (model.quantizer_sem, model.quantizer_vis):
        if WORLD_SIZE > 1:
            dist.all_reduce(quantizer.usage_count)
    keep_counts_in_process_0(model)


def keep_counts_in_process_0(model):
    if RANK > 0:
        reset_usage_counts(model)


# ================================================================================================
# 6. The generator
# ================================================================================================


def train_generator(run, model):
    """Train xAR, or FAR, on the tokens of the training images -> its moving average, figures."""
    c = run.config
    device = run.device
    model.requires_grad_(False)
    torch.manual_seed(c.seed)
    generator = GENERATORS[c.generator](c).to(device).train()
    betas = (0.9, 0.96)
    groups = decay_groups(generator, c.gen_decay)
    optimizer = torch.optim.AdamW(groups, c.gen_lr, betas, fused=True)
    ema_model = copy.deepcopy(generator).requires_grad_(False)
    states = {"model": generator, "ema_model": ema_model, "optimizer": optimizer}
    compile_networks(c, device, *generator.blocks)
    ddp_generator = distributed(generator)
    stage = Stage(run, "generator", states, c.generator_steps, c.gen_batch)
    announce("generator", generator, c, device)
    if stage.step == stage.steps:  # complete
        return ema_model.eval(), stage.figures()

    tokens = encode_training_set(run, model)  # (N, 2, h, w)
    labels = run.data.train_labels.to(device)
    if c.flip:
        tokens = torch.cat([tokens, encode_training_set(run, model, mirror=True)])
        labels = labels.repeat(2)
    if c.generator == "xar" and stage.step == 0:
        some = tokens[evenly_spaced(len(tokens), 5000)]
        latents = model.to_latents(*some.unbind(1))
        for network in (generator, ema_model):
            network.latent_std.copy_(latents.std())
    loss_name = "flow" if c.generator == "xar" else "cross_entropy"
    schedule = (c.gen_warmup, c.gen_cooldown, c.gen_lr_end)
    with stage:
        for step in range(stage.step, c.generator_steps):
            set_learning_rate(optimizer, learning_rate(step, stage.steps, c.gen_lr, *schedule))
            optimizer.zero_grad()
            means = {}

            torch.manual_seed(step_seed(c, step))
            index = own_share(batch_indices(len(tokens), c.gen_batch, step, c.seed)).to(device)
            draws = [own_share(x) for x in generator.draw(c.gen_batch, device)]
            for k, (i, *part_draws) in enumerate(micro_batches(c, index, *draws)):
                x = tokens[i]
                if c.generator == "xar":
                    x = model.to_latents(*x.unbind(1))
                last = k == c.accumulate - 1
                set_gradient_sync(ddp_generator, on=last)
                with autocast(c, device):
                    loss = ddp_generator(x, labels[i], part_draws)
                (loss / c.accumulate).backward()
                add_to(means, {loss_name: loss}, c)

            limit = c.clip or torch.inf
            means["grad_norm"] = torch.nn.utils.clip_grad_norm_(generator.parameters(), limit)
            optimizer.step()
            # a decay that starts low: a young average forgets the initial weights sooner
            update_ema(ema_model, generator, min(c.ema, (1 + step) / (10 + step)))

            stage.end_step(means)
            if stage.due(LOG_EVERY):
                stage.log(means)
            if stage.due(c.save_every):
                stage.save()
            if stage.stopping:
                stage.stop()
    return ema_model.eval(), stage.figures()


def decay_groups(network, decay):
    """AdamW's parameter groups: weight decay on matrices, none on vectors (biases)."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


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


def update_ema(ema_model, model, decay):
    """The moving average of the weights takes a step towards them."""
    for average, weight in zip(ema_model.parameters(), model.parameters()):
        average.lerp_(weight.detach(), 1 - decay)


# ================================================================================================
# 7. A run, from start to end
# ================================================================================================


def main():
    args, c = parse_arguments()
    check_fits(args, c)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, but for glotok.full_precision
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    # Process 0 speaks for all; errors leave this block.
    with contextlib.redirect_stderr(open(os.devnull, "w") if RANK else sys.stderr):
        train(args, c, device)
    if WORLD_SIZE > 1:
        # Together: a process that left first was now and then aborted by its own threads.
        dist.barrier()
        dist.destroy_process_group()


def check_fits(args, c):
    """BadInput if the batches cannot be divided, or the stage lacks what it builds on."""
    for name in ("batch_size", "gen_batch"):
        if getattr(c, name) % (WORLD_SIZE * c.accumulate):
            raise BadInput(
                f"{name} is {getattr(c, name)}: it must be a multiple of {WORLD_SIZE} process(es) "
                f"times accumulate, {c.accumulate}"
            )
    if torch.cuda.is_available() and torch.cuda.device_count() <= LOCAL_RANK:
        raise BadInput(
            f"this machine has {torch.cuda.device_count()} GPU(s): give torchrun no more "
            "--nproc_per_node"
        )
    if args.stage == "generator" and not (args.out / "tokenizer.pt").exists():
        raise BadInput(f"{args.out} has no tokenizer yet: train it first, with --stage tokenizer")


def train(args, c, device):
    """Data, teacher, tokenizer, generator; figures and pictures into the run folder."""
    start = time.monotonic()
    data = load_data(c.data, c.image_size, c.seed, decode_later=c.crop < 1)
    check_same_data(args, data)
    c = make_config({**asdict(c), "classes": len(data.classes)})
    in_memory = torch.is_tensor(data.train)
    if in_memory:
        data = data._replace(train=data.train.to(device))
        where = f"in memory ({device.type})"
    else:
        where = "decoded when they are needed, by worker processes"
    print(
        f"data: {len(data.train)} training and {len(data.val)} held-out images, "
        f"{c.classes} classes, training images {where}",
        file=sys.stderr,
    )
    print_plan(args, c)
    # What may fail for want of a file comes before anything is written, and before the seed: making
    # these networks draws random numbers, and a teacher must not depend on whether they are there.
    inception = find_inception(args.weights, torch.device("cpu")) if RANK == 0 else None
    complete = steps_done(args.out / "tokenizer.pt") >= c.tokenizer_steps
    use_lpips = c.lambda_perceptual and not complete
    lpips = load_lpips(args.lpips, device) if use_lpips else None
    start_weights = None
    if c.start_from and not (args.out / "tokenizer.pt").exists():
        start_weights = load_start(c)
    torch.manual_seed(c.seed)

    with contextlib.ExitStack() as stack:
        if RANK == 0:
            path = args.out / "teacher.pt"
            teacher = None
            if not (args.resume and path.exists()):
                teacher = make_teacher(c, data, device)
            stack.enter_context(locked(args.out))
            refuse_to_overwrite(args)  # again: another may have finished meanwhile
            check_steps(args.out, c)
            write_json(args.out / "config.json", {"preset": args.preset, **asdict(c)})
            if teacher:
                saved = {**teacher, "made_by": asdict(c), "data": summary(data)}
                write_atomically(path, lambda file: torch.save(saved, file))
        if WORLD_SIZE > 1:
            dist.barrier()  # the others wait for the teacher
        teacher = load_teacher(args.out, c)
        run = Run(c, args.out, data, teacher, device, inception)

        # Figures of an earlier call stay: the generator's, and FID if its network is not at hand
        # this time. Not those of a tokenizer that had fewer steps.
        metrics = read_metrics(args.out) if complete else {}
        # a complete tokenizer is only read; an unfinished one is finished, whatever the stage
        model, hist_before, figures = train_tokenizer(run, lpips, start_weights)
        figures["processes"] = WORLD_SIZE
        if RANK == 0:
            figures = report_tokenizer(run, model, hist_before, figures)
            if metrics.get("images") != figures["images"]:  # FID and KID are of other images
                metrics.pop("rfid", None)
                metrics.pop("kid", None)
            metrics |= figures
            write_json(args.out / "metrics.json", metrics)
            print(
                f"tokenizer: done. Look at {args.out}: reconstructions.png, histogram.png",
                file=sys.stderr,
            )
        if args.stage != "tokenizer":
            generator, figures = train_generator(run, model)
            if RANK == 0:
                metrics |= report_generator(run, model, generator, figures)
                write_json(args.out / "metrics.json", metrics)
        if RANK == 0:
            draw_curves(args.out, teacher["floor"])
            print_summary(args.out, metrics, time.monotonic() - start)
            print_next_steps(args, c)


def summary(data):
    """What a run may not lose sight of: its classes, and how many images it has."""
    return {"classes": list(data.classes), "train": len(data.train), "val": len(data.val)}


def check_same_data(args, data):
    """BadInput if a run that is resumed began with other data.

    It would draw other batches, and might have trained on what is now held out.
    """
    path = args.out / "teacher.pt"
    if not (args.resume and path.exists()):
        return
    saved = load_checkpoint(path)
    now = summary(data)
    before = saved.get("data", now) if isinstance(saved, dict) else now
    if before != now:
        raise BadInput(
            f"the run in {args.out} began with {before['train']} training and {before['val']} "
            f"held-out images of {len(before['classes'])} classes; now there are {now['train']}, "
            f"{now['val']} and {len(now['classes'])}: bring the data back, or choose another --out"
        )


def print_plan(args, c):
    stages = [f"a tokenizer in {c.tokenizer_steps} steps"]
    if args.stage != "tokenizer":
        stages.append(f"a generator of its tokens in {c.generator_steps} steps")
    print(
        f"plan: a teacher; {'; '.join(stages)}. What is complete is only read. Each line of "
        f"progress ends in the time left. Pictures come into {args.out}. Ctrl-C saves, --resume "
        f"goes on",
        file=sys.stderr,
    )
    if c.lambda_adv and c.adv_start >= c.tokenizer_steps:
        note(
            f"the discriminator would enter at step {c.adv_start}, and training ends at "
            f"{c.tokenizer_steps}: it is not used (--adv_start)"
        )


def print_next_steps(args, c):
    """The pictures of a finished run, and commands that show more of it."""
    pictures = ["reconstructions.png", "histogram.png", "curves.png"]
    if args.stage == "tokenizer":
        command = f"python train.py --resume --out {args.out}  # the generator"
    else:
        pictures.insert(0, "samples.png")
        command = f"python sample.py {args.out} --n 64 --out more.png"
    print(f"pictures in {args.out}: {', '.join(pictures)}", file=sys.stderr)
    print(
        f"next: {command}\n"
        f"      python sample.py {args.out} --retain {c.data} --out halves.png  # figure 4",
        file=sys.stderr,
    )


def check_steps(folder, c):
    """BadInput if a run is asked to go back, or its generator would lose its tokenizer."""
    tokenizer = steps_done(folder / "tokenizer.pt")
    generator = steps_done(folder / "generator.pt")
    if tokenizer > c.tokenizer_steps:
        raise BadInput(f"the tokenizer in {folder} has been trained for {tokenizer} steps already")
    if generator > c.generator_steps:
        raise BadInput(f"the generator in {folder} has been trained for {generator} steps already")
    if generator and tokenizer < c.tokenizer_steps:
        raise BadInput(
            f"{folder / 'generator.pt'} was trained on a finished tokenizer: "
            "move it away to train the tokenizer further"
        )


def steps_done(path):
    """The step of a checkpoint; 0 if there is none."""
    if not path.exists():
        return 0
    saved = load_checkpoint(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
        raise BadInput(f"{path} holds other weights than a checkpoint of this program")
    return saved["step"]


def read_metrics(folder):
    """metrics.json of an earlier part of the run; {} if there is none."""
    path = folder / "metrics.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}): delete it, and it is written anew") from None


@contextlib.contextmanager
def locked(folder):
    """Make the run folder, and keep other processes from training there meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror}") from None
    try:
        lock(descriptor, f"cannot write {folder}: another process is training there")
        yield
    finally:
        os.close(descriptor)


def load_teacher(folder, c):
    """What make_teacher left in the run folder; says what a codebook can follow of it."""
    path = folder / "teacher.pt"
    teacher = load_checkpoint(path)
    if not {"moments", "histogram", "floor"} <= set(teacher):
        raise BadInput(
            f"{path} is not a teacher that this program made: delete it, and --resume makes it anew"
        )
    mean, mean_square = teacher["moments"]
    print(
        f"teacher: {c.teacher}, mean cosine {mean:.3f}, mean squared cosine {mean_square:.3f} "
        f"(codes of dimension {c.code_dim}: at least {1 / c.code_dim:.3f}); "
        f"such codes can imitate it to a KL of {teacher['floor']:.2g}",
        file=sys.stderr,
    )
    return teacher


def print_summary(folder, metrics, seconds):
    shown = []
    for name, value in metrics.items():
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    print(f"{folder}: {', '.join(shown)}; {seconds:.0f} s in all")


if __name__ == "__main__":
    run_script(main)
