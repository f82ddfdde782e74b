"""Train GloTok.

    python train.py                                            # preset shapes: no download, no GPU, minutes
    python train.py --preset cifar10 --data FOLDER --out runs/mine --tokenizer_steps 5000
    python train.py --resume --out runs/mine                   # go on where it stopped
    torchrun --nproc_per_node=8 train.py --preset imagenet256 --data FOLDER

Every setting of glotok.Config is a flag; a preset gives the defaults.
"""
import argparse
import contextlib
import copy
import fcntl
import functools
import json
import os
import platform
import resource
import signal
import sys
import time
import warnings
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # until run() takes over, Ctrl-C ends the slow imports below without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from fid import fetch, load_data, sha256, stream, write
from glotok import (GENERATORS, LPIPS, PRESETS, BadInput, Config, ConvNet, DINOv2, GloTok, Parser, Progress, adaptive_weight, batch_indices, choose, compile_all,
                    cosine_moments, discriminator, hinge_loss, histogram_relation_loss, kl_divergence, kmeans, learning_rate, load_checkpoint,
                    load_config, psnr, read_vectors, relation_histogram, restore, run, sphere_histogram, spread, to_float, to_uint8, use_bf16)
from sample import decode_all, encode_all, fid_of, generate, grid, grid_of_pairs, plot

LOG_EVERY = 20
MAY_CHANGE = {"tokenizer_steps", "generator_steps", "save_every", "eval_images", "guidance", "sampling_steps", "snap", "accumulate", "compile"}  # by --resume
GROUPS = {"data": "data and teacher", "patch": "the tokenizer", "beta": "its losses, eqs. (3) and (13)", "generator": "the generator",
          "tokenizer_steps": "training"}  # first setting of a group in --help: its title
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun's

def parse():
    """Command line -> arguments, Config. A flag overrides the run's own settings (--resume) or the preset's."""
    parser = Parser(usage="train.py [--preset P] [--data SPEC] [--out DIR] [--stage S] [--resume] [settings]")
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)} (default shapes)")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default runs/PRESET)")
    parser.add_argument("--stage", default="all", choices=["tokenizer", "generator", "all"], help="what to train (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    for f in fields(Config):
        group = parser.add_argument_group(f"{GROUPS[f.name]} (defaults of preset shapes)") if f.name in GROUPS else group
        kind = dict(type=int, nargs="+") if isinstance(f.default, tuple) else dict(type=type(f.default))
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="X", help=f"{f.metadata['help']} ({str(f.default).strip('()')})", **kind)
    args = parser.parse(__doc__)
    given = {f.name: tuple(v) if isinstance(v := getattr(args, f.name), list) else v for f in fields(Config) if hasattr(args, f.name)}
    args.out = Path(args.out or f"runs/{args.preset or 'shapes'}")
    if args.resume:
        saved, preset = load_config(args.out)
        changed = [f"{k} {getattr(saved, k)}" for k, v in given.items() if getattr(saved, k) != v and k not in MAY_CHANGE]
        if changed or args.preset not in (None, preset):
            raise BadInput(f"the run in {args.out} was made with {', '.join(changed) or 'preset ' + preset}: choose another --out")
        args.preset = preset
        return args, replace(saved, **given)
    if (args.out / "config.json").exists():
        raise BadInput(f"{args.out} holds a run: continue it with --resume, or choose another --out")
    args.preset = args.preset or "shapes"
    return args, replace(choose(args.preset, PRESETS, "preset"), **given)

# ------------------------------------------------------------------- one batch, many processes (torchrun) and parts (--accumulate)
# Every process takes an equal share of every batch, in --accumulate parts one after the other. Random numbers are drawn for the whole
# batch and each part takes its own: any division of the batch makes the same step, up to rounding.
def wrap(net):
    """What a training step calls: net, its gradients averaged over the processes if there are several."""
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # its successor is not in torch 2.5
    return net if WORLD == 1 else DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
def average(x):
    """The mean of a tensor over the processes."""
    WORLD > 1 and dist.all_reduce(x)
    return x / WORLD

# ----------------------------------------------------------------------------------------------------- the teacher (section 3.3)
def make_teacher(c, data, device):
    """The teacher, made once: {"histogram" (bins,), "moments" (mean and mean squared cosine), ...}; all that training needs."""
    if c.teacher == "sphere":
        return {"histogram": sphere_histogram(c.code_dim, c.bins), "moments": (0.0, 1 / c.code_dim)}
    if c.teacher in ("convnet", "dinov2"):
        extra = {"convnet": train_convnet(c, data, device).state_dict(), "classes": len(data.classes)} if c.teacher == "convnet" else {}
        vectors = patch_centres(c, data, teacher_features(extra, device), device)
    else:
        vectors = read_vectors(c.teacher)
        extra = {"sha256": sha256(c.teacher if Path(c.teacher).exists() else c.teacher.rpartition(":")[0])}
    return {"histogram": relation_histogram(vectors.to(device), c.bins).cpu(), "moments": cosine_moments(vectors), "vectors": len(vectors), **extra}
def load_convnet(teacher, device):
    net = ConvNet(teacher["classes"]).to(device).eval()
    net.load_state_dict(teacher["convnet"])
    return net
def teacher_features(teacher, device):
    """The teacher network as a function of images in [-1, 1] -> features (B, D, H, W)."""
    if "convnet" in teacher:
        return load_convnet(teacher, device).features
    net = DINOv2().to(device)
    restore(fetch("dinov2_vits14_pretrain.pth"), {None: net})
    resized = lambda x: F.interpolate(x / 2 + 0.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    return lambda x: net(resized(x)).transpose(1, 2).unflatten(2, (16, 16))
@torch.no_grad()
def patch_centres(c, data, features, device, limit=10000, patches=5):
    """k-means centres (teacher_centres, D) of features(images in [-1, 1]) -> (B, D, H, W): some patches of up to `limit` images."""
    found, g = [], torch.Generator().manual_seed(c.seed)
    chosen, progress = torch.randperm(len(data.train), generator=g)[:limit], Progress("teacher: features of image", min(limit, len(data.train)))
    patches = max(patches, 2 * c.teacher_centres // len(chosen))  # small data sets: more patches of each
    for part in stream(data.train, chosen.split(100), device, c.image_size):
        f = features(to_float(part, device)).float().flatten(2).transpose(1, 2)
        found.append(f[:, torch.randperm(f.shape[1], generator=g)[:patches]].flatten(0, 1))
        progress(sum(map(len, found)) // patches)
    return kmeans(torch.cat(found), min(c.teacher_centres, sum(map(len, found)))).cpu()
def train_convnet(c, data, device, steps=300, batch=64):
    """The offline stand-in for a pre-trained model: a small classifier of the training labels."""
    if len(data.classes) < 2:
        raise BadInput("teacher convnet learns from class labels, and these data have one class: use --teacher sphere, dinov2 or a file")
    net = ConvNet(len(data.classes)).to(device, memory_format=torch.channels_last)
    optimizer, progress = torch.optim.Adam(net.parameters(), 3e-3), Progress("teacher: convnet step", steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    index = [batch_indices(len(data.train), batch, step, c.seed) for step in range(steps)]
    for step, images in enumerate(stream(data.train, index, device, c.image_size)):
        x = to_float(images, device, torch.rand(batch, 1, 1, 1, device=device) < c.flip / 2)
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)  # noise: it also judges imperfect, generated images
        loss = F.cross_entropy(net(x), data.train_labels[index[step]].to(device))
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        progress(step + 1, f"loss {loss.item():.3f}")
    return net.eval()
def load_lpips(device):
    net, files = LPIPS(), ("vgg16-397923af.pth", "vgg.pth")
    weights = [load_checkpoint(fetch(name)) for name in files]
    net.load_state_dict({k: v for file in weights for k, v in file.items() if not k.startswith("classifier")})
    return net.to(device)

def train_steps(stage, c, out, parts, peaks, schedule, steps, batch, net, feed, loss_of, after, kept, device):
    """Train `net`, which wraps parts["model"]. For each item of feed(first step), this process's share of a batch: loss_of(step, part, *tensors)
    of each of its parts -> (loss, loss terms), backward, a step of the optimizers `peaks`, {name: peak learning rate}, then after(step) -> a
    function for further figures, called when they are logged. Process 0 writes a checkpoint, the states of `parts` and the value `kept`, every
    c.save_every steps, at the end, and on Ctrl-C or SIGTERM after the step. -> kept, {"seconds", "images_per_second", "peak_memory_gb"}."""
    path, log_path, start, first, spent = out / f"{stage}.pt", out / "log.jsonl", time.monotonic(), 0, 0.0
    if path.exists():
        saved = restore(path, parts, device)
        first, spent, kept = saved["step"], saved["seconds"], saved["kept"]
    log, bf16, cuda = [row for row in read_log(out) if row["stage"] != stage or row["step"] <= first], use_bf16(c, device), device.type == "cuda"
    if RANK == 0:
        write(log_path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in log).encode()))
    print(f"{stage}: {sum(p.numel() for p in parts['model'].parameters()) / 1e6:.2f} M parameters, {'bf16' if bf16 else 'float32'} on "
          f"{WORLD} x {device.type}", file=sys.stderr)
    asked = []  # the first Ctrl-C or SIGTERM only asks: the step in hand is completed, then saved
    before = [signal.signal(which, lambda *_: asked.append(True)) for which in (signal.SIGINT, signal.SIGTERM)]
    progress, healthy = Progress(f"{stage} step", steps, first), torch.ones((), dtype=torch.bool, device=device)
    try:
        for step, item in enumerate(feed(first), first):
            for name, peak in peaks.items():
                parts[name].param_groups[0]["lr"] = learning_rate(step, steps, peak, *schedule)
                parts[name].zero_grad()
            losses = {}
            for k, tensors in enumerate(zip(*(x.chunk(c.accumulate) for x in item))):
                torch.manual_seed(c.seed + 1_000_003 * (step + 1))  # every random choice depends on the step alone
                with net.no_sync() if WORLD > 1 and k + 1 < c.accumulate else contextlib.nullcontext():  # average gradients once
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        loss, terms = loss_of(step, RANK * c.accumulate + k, *tensors)
                    (loss / c.accumulate).backward()
                losses |= {name: losses.get(name, 0) + term.detach() / c.accumulate for name, term in terms.items()}
            losses["norm"] = torch.nn.utils.clip_grad_norm_(parts["model"].parameters(), c.clip or torch.inf)
            for name in peaks:
                parts[name].step()
            step, figures = step + 1, after(step)
            healthy &= torch.isfinite(sum(losses.values()))
            stop = average(torch.tensor(float(len(asked)))) > 0  # all processes stop after the same step
            if step % LOG_EVERY == 0 or step == steps or stop:
                if not healthy:
                    raise BadInput(f"a loss became NaN or infinite by step {step}; {path.name} keeps the last good state, if any: lower the learning rate")
                row = {"stage": stage, "step": step, **dict(zip(losses, average(torch.stack([*losses.values()])).tolist())), **figures()}
                progress(step, " ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in ("stage", "step", "norm"))
                         + f" {(step - first) * batch / (time.monotonic() - start):.3g} images/s")
                if RANK == 0:
                    with open(log_path, "a") as file:
                        file.write(json.dumps(row) + "\n")
            if RANK == 0 and (step % c.save_every == 0 and healthy or step == steps or stop):
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= dict(step=step, kept=kept, seconds=spent + time.monotonic() - start)
                write(path, lambda file: torch.save(state, file))
            if stop and step < steps:
                print(f"\nstopped after step {step}: continue with --resume --out {out}", file=sys.stderr)
                raise KeyboardInterrupt
    finally:
        for which, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(which, handler)
    seconds, peak = spent + time.monotonic() - start, torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kept, {"seconds": round(seconds, 1), "images_per_second": round(steps * batch / seconds, 2), "peak_memory_gb": round(peak / 2**30, 2)}

# ---------------------------------------------------------------------------------------------------------- the tokenizer
def train_tokenizer(c, out, data, teacher, perceptual, device):
    """Eq. (13), start to end. -> the model, its codebook's histogram before training, train_steps' figures."""
    torch.manual_seed(c.seed)
    model, critic = GloTok(c).to(device, memory_format=torch.channels_last).train(), discriminator(c).to(device)
    adam, n = functools.partial(torch.optim.Adam, betas=(c.beta1, c.beta2), fused=True), len(data.train)
    parts, peaks = {"model": model, "optimizer": adam(model.parameters())}, {"optimizer": c.lr}
    if c.lambda_adv:
        parts |= {"critic": critic, "critic_optimizer": adam(critic.parameters())}
        peaks["critic_optimizer"] = c.disc_lr
    histogram, before = teacher["histogram"].to(device), relation_histogram(model.codebook_sem).detach()
    compile_all(c, device, model.encoder, model.decoder, critic)
    net, judge, pairs, features = wrap(model), wrap(critic), [], torch.no_grad()(teacher_features(teacher, device)) if c.semantic == "local" else None
    def feed(first):
        index = (batch_indices(n, c.batch_size, step, c.seed).chunk(WORLD)[RANK] for step in range(first, c.tokenizer_steps))
        return zip(stream(data.train, index, device, c.image_size))
    def loss_of(step, part, images):
        mirror = torch.rand(c.batch_size, 1, 1, 1, device=device) < c.flip / 2
        x = to_float(images, device, mirror.chunk(WORLD * c.accumulate)[part])
        recon, losses = net(x, features(x) if features else None)
        losses["recon"] = F.mse_loss(recon, x)  # (2)
        loss = c.lambda_recon * losses["recon"] + c.lambda_quantize * losses["quantize"] + c.lambda_res * losses["residual"]  # (3), (13)
        if features:
            loss = loss + c.lambda_local * losses["local"]
        if c.semantic == "global" and c.lambda_hist and part % c.accumulate == 0:  # of the codebook, not of images: a process's first part pays for all
            losses["hist"] = c.accumulate * histogram_relation_loss(model.codebook_sem, histogram)
            loss = loss + c.lambda_hist * losses["hist"]
        if perceptual:
            losses["perceptual"] = perceptual(recon, x).mean()
            loss = loss + c.lambda_perceptual * losses["perceptual"]
        if c.lambda_adv and step >= c.adv_start:  # the pictures were fine without it: let its weight grow from 0
            losses["adv"] = -critic.requires_grad_(False)(recon).mean()
            weight = c.lambda_adv * min(1, (step + 1 - c.adv_start) / max(c.adv_ramp, 1))
            if c.adv_adaptive:
                pixels = c.lambda_recon * losses["recon"] + c.lambda_perceptual * losses.get("perceptual", 0)
                weight = weight * adaptive_weight(pixels, losses["adv"], model.decoder[-2].weight)
            critic.requires_grad_(True)
            losses["critic"] = hinge_loss(judge(x), judge(recon.detach()))  # moves the critic alone, as "adv" moves the tokenizer alone
            loss = loss + weight * losses["adv"] + losses["critic"]
        pairs.append((to_uint8(x), to_uint8(recon)))
        return loss, losses
    def after(step):
        seen = [*map(torch.cat, zip(*pairs))]
        pairs.clear()
        quantizers = {"usage_sem": model.quantizer_sem, "usage_vis": model.quantizer_vis}
        hits = {name: q.hits.clone() for name, q in quantizers.items()}  # since the last revival
        if (step + 1) % (c.revive_every or LOG_EVERY) == 0:
            for q in quantizers.values():
                q.revive() if c.revive_every and step < 0.9 * c.tokenizer_steps else q.hits.zero_()  # the last tenth settles
        return lambda: {"psnr": average(psnr(*seen).mean()).item(), **{name: (average(h) > 0).float().mean().item() for name, h in hits.items()}}
    before, figures = train_steps("tokenizer", c, out, parts, peaks, (c.warmup, c.cooldown), c.tokenizer_steps, c.batch_size, net, feed, loss_of, after,
                                  before, device)
    return model.eval(), before, figures

# ---------------------------------------------------------------------------------------------------------- the generator
def train_generator(c, out, data, model, device):
    """xAR on the latents of the training images. -> its moving average, the latents' deviation, train_steps' figures."""
    torch.manual_seed(c.seed)
    generator, far = GENERATORS[c.generator](c).to(device).train(), c.generator == "far"
    optimizer = torch.optim.AdamW(generator.parameters(), c.gen_lr, (0.9, 0.96), weight_decay=c.gen_decay, fused=True)
    mean, labels, n = copy.deepcopy(generator).requires_grad_(False), data.train_labels.to(device), len(data.train)
    mine = encode_all(model, data.train, torch.arange(RANK, -(-n // WORLD) * WORLD, WORLD) % n, device).to(device)  # shares of one size
    every = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(every, mine) if WORLD > 1 else every[0].copy_(mine)
    indices = torch.stack(every, dim=1).flatten(0, 1)[:n]  # (N, 2, h, w)
    scale = 1.0 if far else model.to_latents(*indices[:1000].unbind(1)).std().item()
    compile_all(c, device, *generator.blocks)
    net = wrap(generator)
    def feed(first):
        for step in range(first, c.generator_steps):
            i = batch_indices(n, c.gen_batch, step, c.seed).chunk(WORLD)[RANK]
            yield indices[i], labels[i]
    def loss_of(step, part, index, label):
        with torch.no_grad():
            learned = index if far else model.to_latents(*index.unbind(1)) / scale
        loss = net(learned, label, part, WORLD * c.accumulate)
        return loss, {"entropy" if far else "flow": loss}
    def after(step):
        decay = min(c.ema, (1 + step) / (10 + step))  # young averages forget faster
        torch._foreach_lerp_(list(mean.parameters()), [p.detach() for p in generator.parameters()], 1 - decay)
        return dict
    scale, figures = train_steps("generator", c, out, {"model": generator, "ema": mean, "optimizer": optimizer}, {"optimizer": c.gen_lr},
                                 (c.gen_warmup, c.gen_cooldown), c.generator_steps, c.gen_batch, net, feed, loss_of, after, scale, device)
    return mean.eval(), scale, figures

# ------------------------------------------------------------------------------------------------- figures and pictures
def load_judge(teacher, device):
    """The convnet teacher as a classifier of uint8 images; None if the teacher was another."""
    if "convnet" not in teacher:
        return None
    net = load_convnet(teacher, device)
    return lambda images: torch.cat([net(to_float(part, device)).argmax(1).cpu() for part in images.split(100)])
@torch.no_grad()
def report_tokenizer(c, out, data, teacher, model, before, figures, device):
    """Held-out figures, and three pictures in the run folder."""
    at, judge = spread(len(data.held), c.eval_images), load_judge(teacher, device)
    held = torch.cat([*stream(data.held, at.split(100), torch.device("cpu"), c.image_size)])
    indices = encode_all(model, held, torch.arange(len(held)), device)
    recon = decode_all(model, indices, device)
    usage = [len(index.unique()) / len(codes) for index, codes in zip(indices.unbind(1), (model.codebook_sem, model.codebook_vis))]
    after, bins = relation_histogram(model.codebook_sem).cpu(), torch.linspace(-1, 1, c.bins)
    metrics = {"psnr": psnr(held, recon).mean().item(), "usage_sem": usage[0], "usage_vis": usage[1],
               "hist_kl": kl_divergence(teacher["histogram"], after).item(), **figures, "images": len(held), "processes": WORLD,
               "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads, {platform.machine()}"}
    if (fid := fid_of(held, recon, device)) is not None:
        metrics["rfid"] = fid
    if judge:  # does the teacher still see the same class?
        metrics["class_agreement"] = (judge(held) == judge(recon)).float().mean().item()
    grid_of_pairs(out / "reconstructions.png", held, recon)
    plot(out / "histogram.png", [(f"pairwise cosines of the semantic codebook: KL {metrics['hist_kl']:.3f}", "cosine similarity", [
        (f"teacher ({Path(c.teacher).name})", bins, teacher["histogram"]), ("codebook after", bins, after), ("codebook before", bins, before.cpu()),
        (f"ideal sphere, d = {c.code_dim}", bins, sphere_histogram(c.code_dim, c.bins))], "line")])
    write_json(out / "metrics.json", metrics)
    return metrics
def report_generator(c, out, data, teacher, model, generator, scale, figures, device, each=16):
    """samples.png, one row a class, and how often the convnet teacher sees the class that was asked for."""
    shown, judge = min(len(data.classes), 10), load_judge(teacher, device)
    labels = torch.arange(shown, device=device).repeat_interleave(each)
    images = torch.cat(list(generate(model, generator, scale, labels, c.sampling_steps, c.guidance, c.seed)))
    grid(out / "samples.png", [(data.classes[k], images[k * each:][:12]) for k in range(shown)], f"generated, guidance {c.guidance:g}")
    accuracy = {"samples_class_accuracy": (judge(images) == labels.cpu()).float().mean().item()} if judge else {}
    return {**{f"generator_{k}": v for k, v in figures.items()}, **accuracy}
def read_log(out):
    path = out / "log.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        return [row for row in rows if row["stage"] and row["step"] >= 0]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error}): move it away, and --resume goes on without the old curves") from None
def write_json(path, value):
    write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))
def draw_curves(out):
    rows, panels = read_log(out), []
    for stage, title, style, *names in (
            ("tokenizer", "PSNR of training images, dB", "line", "psnr"), ("tokenizer", "L_R and L_P, eq. (3)", "log", "recon", "perceptual"),
            ("tokenizer", "L_Q (1) and L_res (10)", "log", "quantize", "residual"), ("tokenizer", "L_hist (7)", "log", "hist"),
            ("tokenizer", "share of codes in use", "line", "usage_sem", "usage_vis"),
            ("tokenizer", "L_G and the discriminator's loss", "line", "adv", "critic"), ("generator", "flow matching (xar)", "log", "flow"),
            ("generator", "cross-entropy (far), nats", "line", "entropy"), ("tokenizer", "local loss, 1 - cosine", "line", "local")):
        points = {n: [(r["step"], r[n]) for r in rows if r["stage"] == stage and n in r] for n in names}
        if any(points.values()):
            panels.append((title, f"{stage} step", [(n, *zip(*p)) for n, p in points.items() if p], style))
    plot(out / "curves.png", panels)

def main():
    args, c = parse()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if c.batch_size % (WORLD * c.accumulate) or c.gen_batch % (WORLD * c.accumulate):
        raise BadInput(f"batch_size {c.batch_size} and gen_batch {c.gen_batch} must be multiples of {WORLD} process(es) times accumulate, {c.accumulate}")
    if args.stage == "generator" and not (args.out / "tokenizer.pt").exists():
        raise BadInput(f"{args.out} has no tokenizer yet: train it first, with --stage tokenizer")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where glotok.exact does not forbid it
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    with contextlib.redirect_stderr(open(os.devnull, "w") if RANK else sys.stderr), contextlib.ExitStack() as stack:
        work(args, c, args.out, device, stack.callback)  # process 0 speaks for all; errors leave this block
    WORLD > 1 and dist.destroy_process_group()

def lock(out, at_exit):
    """Make the run folder, and keep other processes from training there until at_exit's functions are called."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        at_exit(os.close, folder := os.open(out, os.O_RDONLY))
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if (taken := isinstance(error, BlockingIOError)) or error.filename:  # neither: a file system without locks
            raise BadInput(f"cannot write {out}: {'another process is training there' if taken else error.strerror}") from None
def work(args, c, out, device, at_exit):
    begin, data = time.monotonic(), load_data(c.data, c.image_size, c.seed)
    c, small = replace(c, classes=len(data.classes)), torch.is_tensor(data.train)
    data = data._replace(train=data.train.to(device) if small else data.train)
    print(f"data: {len(data.train)} training and {len(data.held)} held-out images, {c.classes} classes, training images "
          f"{f'in memory ({device.type})' if small else 'decoded when they are needed, by worker processes'}", file=sys.stderr)
    torch.manual_seed(c.seed)
    perceptual = load_lpips(device) if c.lambda_perceptual else None  # what may fail for want of a file comes before anything is written
    if RANK == 0:
        teacher = None if args.resume and (out / "teacher.pt").exists() else make_teacher(c, data, device)
        lock(out, at_exit)
        write_json(out / "config.json", {"preset": args.preset, **asdict(c)})
        if teacher:
            write(out / "teacher.pt", lambda file: torch.save({**teacher, "made_by": asdict(c)}, file))
    WORLD > 1 and dist.barrier()  # the others wait for the teacher
    if not {"moments", "histogram"} <= set(teacher := load_checkpoint(out / "teacher.pt")):
        raise BadInput(f"{out / 'teacher.pt'} is not a teacher that this program made: delete it, and --resume makes it again")
    (mean, square), bound = teacher["moments"], 1 / c.code_dim
    print(f"teacher: {c.teacher}, mean cosine {mean:.3f}, mean squared cosine {square:.3f}; a codebook of dimension {c.code_dim} has at "
          f"least {bound:.3f}{'' if square >= bound else ', so the KL cannot reach 0'}", file=sys.stderr)
    model, before, figures = train_tokenizer(c, out, data, teacher, perceptual, device)  # one that is complete is only read
    metrics = report_tokenizer(c, out, data, teacher, model, before, figures, device) if RANK == 0 else {}
    if args.stage != "tokenizer":
        generator, scale, figures = train_generator(c, out, data, model, device)
        metrics |= report_generator(c, out, data, teacher, model, generator, scale, figures, device) if RANK == 0 else {}
    if RANK == 0:
        write_json(out / "metrics.json", metrics)
        draw_curves(out)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        print(f"{out}: {shown}; {time.monotonic() - begin:.0f} s in all")

if __name__ == "__main__":
    run(main)
