"""Train GloTok.

    python train.py                                            # preset shapes: no download, no GPU, minutes
    python train.py --preset cifar10 --data cifar10            # real photographs, one GPU
    python train.py --preset cifar10 --data FOLDER --out runs/mine --tokenizer_steps 5000
    python train.py --resume --out runs/mine                   # go on where it stopped

Every setting of glotok.Config is a flag; see --help.
"""
import argparse
import copy
import functools
import json
import math
import platform
import signal
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from fid import Parser, fetch, load_data, run, sha256, write
from glotok import (LPIPS, PRESETS, XAR, BadInput, Config, ConvNet, DINOv2, GloTok, Progress, adaptive_weight, choose, cosine_moments, discriminator,
                    hinge_loss, histogram_relation_loss, kl_divergence, kmeans, load_checkpoint, load_config, psnr, read_arrays, relation_histogram, restore,
                    sphere_histogram, spread, to_float, to_uint8)
from sample import decode_all, encode_all, fid_of, generate, grid, grid_of_pairs, plot

LOG_EVERY = 20
MAY_CHANGE = {"tokenizer_steps", "generator_steps", "save_every", "eval_images", "guidance", "sampling_steps", "snap"}  # settings that --resume may alter

def parse():
    """Command line -> arguments, Config. A flag overrides the run's own settings (--resume) or the preset's."""
    parser = Parser()
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)} (default shapes)")
    parser.add_argument("--out", metavar="DIR", help="the run folder (default runs/PRESET)")
    parser.add_argument("--stage", default="all", choices=["tokenizer", "generator", "all"], help="what to train (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    group = parser.add_argument_group("settings (defaults of preset shapes)")
    for f in fields(Config):
        kind = dict(type=int, nargs="+") if isinstance(f.default, tuple) else dict(type=type(f.default))
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="X", help=f"{f.metadata['help']} ({f.default})", **kind)
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

def use_bf16(c, device):
    """bf16 autocast: as told, or where it is faster: GPUs that have it; CPUs that multiply it natively, if the network is wide (preset
    shapes took 1.6 times as long with it; where it is emulated it is many times slower)."""
    if c.precision == "auto" and device.type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    cpu = Path("/proc/cpuinfo")
    native = cpu.exists() and any(f in cpu.read_text() for f in ("avx512_bf16", "amx_bf16"))
    return c.precision == "bf16" or c.precision == "auto" and c.channels >= 64 and native

# ----------------------------------------------------------------------------------------------------- the teacher (section 3.3)

def make_teacher(c, data, device):
    """The teacher, made once: {"histogram" (bins,), "moments" (mean and mean squared cosine), ...}; all that training needs."""
    if c.teacher == "sphere":
        return {"histogram": sphere_histogram(c.code_dim, c.bins), "moments": (0.0, 1 / c.code_dim)}
    if c.teacher == "convnet":
        net = train_convnet(c, data, device)
        extra = {"convnet": net.state_dict(), "classes": len(data.classes)}
        vectors = patch_centres(c, data, lambda x: net.features(x).flatten(2).transpose(1, 2), device)
    elif c.teacher == "dinov2":
        net, extra = DINOv2().to(device), {}
        net.load_state_dict(load_checkpoint(fetch("dinov2_vits14_pretrain.pth")))
        vectors = patch_centres(c, data, lambda x: net(F.interpolate(x / 2 + 0.5, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)), device)
    else:
        vectors = read_vectors(c.teacher)
        extra = {"sha256": sha256(c.teacher if Path(c.teacher).exists() else c.teacher.rpartition(":")[0])}
    return {"histogram": relation_histogram(vectors.to(device), c.bins).cpu(), "moments": cosine_moments(vectors), "vectors": len(vectors), **extra}

@torch.no_grad()
def patch_centres(c, data, features, device, limit=10000, patches=5):
    """k-means centres (teacher_centres, D) of features(images in [-1, 1]) -> (B, T, D): some patches of up to `limit` images."""
    found, g = [], torch.Generator().manual_seed(c.seed)
    chosen, progress = torch.randperm(len(data.train), generator=g)[:limit], Progress("teacher: features of image", min(limit, len(data.train)))
    patches = max(patches, 2 * c.teacher_centres // len(chosen))  # small data sets: more patches of each
    for part in chosen.split(100):
        f = features(to_float(data.train[part], device)).float()
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
    for step in range(steps):
        i = batch_indices(len(data.train), batch, step, c.seed)
        x = to_float(data.train[i], device, c.flip)
        x = x + 0.15 * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)  # noise: it also judges imperfect, generated images
        loss = F.cross_entropy(net(x), data.train_labels[i].to(device))
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        progress(step + 1, f"loss {loss.item():.3f}")
    return net.eval()

def read_vectors(spec):
    """FILE or FILE:TENSOR -> float vectors (n, d), n >= 2: an .npy, .npz, or a checkpoint (.pt, .pth) with a 2-D tensor."""
    spec, _, name = (spec, "", "") if Path(spec).exists() else spec.rpartition(":") if ":" in spec else (spec, "", "")
    path = Path(spec)
    if not path.is_file():
        raise BadInput(f"no teacher {spec!r}: want convnet, dinov2, sphere, or a file of vectors (.npy, .npz, .pt, .pth)")
    if path.suffix in (".npy", ".npz"):
        found = {k: torch.from_numpy(v) for k, v in read_arrays(path).items() if v.dtype.kind in "fiu"}
    else:
        found = dict(tensors_in(load_checkpoint(path)))
    fits = [k for k, v in found.items() if v.dim() == 2 and len(v) > 1 and v.is_floating_point() and name in ("", k)]
    if len(fits) != 1:
        listed = ", ".join(f"{k} {tuple(v.shape)}" for k, v in found.items()) or "nothing"
        raise BadInput(f"{path} must hold one float array (n, d) of n > 1 vectors, or be given as {path}:NAME; it holds {listed[:500]}")
    vectors = found[fits[0]].float()
    if not vectors.isfinite().all() or not vectors.norm(dim=1).all():
        raise BadInput(f"{path}: {fits[0]} has vectors that are zero or not finite")
    return vectors

def tensors_in(value, name=""):
    """All tensors in nested dictionaries, with dotted names."""
    if torch.is_tensor(value):
        yield name, value
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from tensors_in(inner, f"{name}.{key}" if name else str(key))

@functools.lru_cache(2)
def shuffle(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

def batch_indices(n, batch, step, seed):
    """The step's positions in an endless row of shuffles of range(n): a function of the step, so that a run can resume."""
    at = torch.arange(step * batch, (step + 1) * batch)
    return torch.cat([shuffle(n, seed + 7919 * epoch)[at[at // n == epoch] % n] for epoch in (at // n).unique().tolist()])

def learning_rate(step, steps, peak, warmup, cooldown):
    """Linear warm-up over `warmup` steps, constant, then half a cosine down to 0 over the last share `cooldown` of the steps."""
    late = max(0.0, 1 - (steps - step) / max(cooldown * steps, 1))
    return peak * min(1, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * late)) / 2

def load_lpips(device):
    net, files = LPIPS(), ("vgg16-397923af.pth", "vgg.pth")
    weights = [load_checkpoint(fetch(name)) for name in files]
    net.load_state_dict({k: v for file in weights for k, v in file.items() if not k.startswith("classifier")})
    return net.to(device)

def train_steps(stage, out, parts, steps, batch, c, update, kept, device):
    """Call update(step) until `steps`: it makes one training step and returns (loss terms and "norm", scalar tensors; a function for
    further figures, called when they are logged). A checkpoint holds the states of `parts` and the values `kept`; it is written
    every c.save_every steps, at the end, and on Ctrl-C or SIGTERM once the step is complete. -> kept, seconds of training."""
    path, log_path, start, first, spent = out / f"{stage}.pt", out / "log.jsonl", time.time(), 0, 0.0
    if path.exists():
        saved = restore(path, parts, device)
        first, spent, kept = saved["step"], saved["seconds"], saved["kept"]
    log = [row for row in read_log(out) if row["stage"] != stage or row["step"] <= first]
    write(log_path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in log).encode()))

    def save(step):
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(step=step, kept=kept, seconds=spent + time.time() - start)
        write(path, lambda file: torch.save(state, file))

    stop = []  # the first Ctrl-C or SIGTERM only asks: the step in hand is completed, then saved
    before = [signal.signal(which, lambda *_: stop.append(True)) for which in (signal.SIGINT, signal.SIGTERM)]
    progress, healthy = Progress(f"{stage} step", steps, first), torch.ones((), dtype=torch.bool, device=device)
    try:
        for step in range(first + 1, steps + 1):
            torch.manual_seed(c.seed + 1_000_003 * step)  # every random choice depends on the step alone
            losses, figures = update(step - 1)
            healthy &= torch.isfinite(sum(v.detach() for v in losses.values()))
            if step % LOG_EVERY == 0 or step == steps or stop:
                if not healthy:
                    raise BadInput(f"a loss became NaN or infinite by step {step}; {path.name} keeps the last good state, if any: lower the learning rate")
                row = {"stage": stage, "step": step, **{k: v.item() for k, v in losses.items()}, **figures()}
                with open(log_path, "a") as file:
                    file.write(json.dumps(row) + "\n")
                progress(step, " ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in ("stage", "step", "norm"))
                         + f" {(step - first) * batch / (time.time() - start):.0f} images/s")
            if step % c.save_every == 0 and healthy or step == steps or stop:
                save(step)
            if stop and step < steps:
                print(f"\nstopped after step {step}: continue with --resume --out {out}", file=sys.stderr)
                raise KeyboardInterrupt
    finally:
        for which, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(which, handler)
    return kept, spent + time.time() - start

# ---------------------------------------------------------------------------------------------------------- the tokenizer

def train_tokenizer(c, out, data, teacher, perceptual, device):
    """Eq. (13), start to end. -> the model, its codebook's histogram before training, seconds."""
    torch.manual_seed(c.seed)
    model, bf16 = GloTok(c).to(device, memory_format=torch.channels_last).train(), use_bf16(c, device)
    adam, peaks = functools.partial(torch.optim.Adam, betas=(c.beta1, c.beta2), fused=True), {"optimizer": c.lr, "critic_optimizer": c.disc_lr}
    parts = {"model": model, "optimizer": adam(model.parameters())}
    if c.lambda_adv:
        critic = discriminator(c).to(device)
        parts |= {"critic": critic, "critic_optimizer": adam(critic.parameters())}
    histogram, before = teacher["histogram"].to(device), relation_histogram(model.codebook_sem).detach()
    print(f"tokenizer: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {c.grid}x{c.grid} tokens, "
          f"{'bf16' if bf16 else 'float32'} on {device.type}", file=sys.stderr)

    def update(step):
        for name in parts.keys() & peaks.keys():
            parts[name].param_groups[0]["lr"] = learning_rate(step, c.tokenizer_steps, peaks[name], c.warmup, c.cooldown)
        x = to_float(data.train[batch_indices(len(data.train), c.batch_size, step, c.seed)], device, c.flip)
        adversarial = c.lambda_adv and step >= c.adv_start
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            recon, losses = model(x)
            losses["recon"] = F.mse_loss(recon, x)  # (2)
            loss = c.lambda_recon * losses["recon"] + c.lambda_quantize * losses["quantize"] + c.lambda_res * losses["residual"]  # (3), (13)
            if c.lambda_hist:
                losses["hist"] = histogram_relation_loss(model.codebook_sem, histogram)
                loss = loss + c.lambda_hist * losses["hist"]
            if perceptual:
                losses["perceptual"] = perceptual(recon, x).mean()
                loss = loss + c.lambda_perceptual * losses["perceptual"]
            if adversarial:  # the pictures were fine without it: let its weight grow from 0
                losses["adv"] = -critic(recon).mean()
                weight = c.lambda_adv * min(1, (step + 1 - c.adv_start) / max(c.adv_ramp, 1))
                if c.adv_adaptive:
                    pixels = c.lambda_recon * losses["recon"] + c.lambda_perceptual * losses.get("perceptual", 0)
                    weight = weight * adaptive_weight(pixels, losses["adv"], model.decoder[-2].weight)
                loss = loss + weight * losses["adv"]
        parts["optimizer"].zero_grad()
        loss.backward()
        losses["norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip or math.inf)
        parts["optimizer"].step()
        if adversarial:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                losses["critic"] = hinge_loss(critic(x), critic(recon.detach()))
            parts["critic_optimizer"].zero_grad()
            losses["critic"].backward()
            parts["critic_optimizer"].step()
        quantizers = {"sem": model.quantizer_sem, "vis": model.quantizer_vis}
        used = {f"usage_{name}": (q.hits > 0).float().mean() for name, q in quantizers.items()}  # since the last revival
        if (step + 1) % (c.revive_every or LOG_EVERY) == 0:
            for q in quantizers.values():
                q.revive() if c.revive_every and step < 0.9 * c.tokenizer_steps else q.hits.zero_()  # the last tenth settles
        return losses, lambda: {"psnr": psnr(to_uint8(x), to_uint8(recon)).mean().item(), **{k: v.item() for k, v in used.items()}}

    before, seconds = train_steps("tokenizer", out, parts, c.tokenizer_steps, c.batch_size, c, update, before, device)
    return model.eval(), before, seconds

# ---------------------------------------------------------------------------------------------------------- the generator

def train_generator(c, out, data, model, device):
    """xAR on the latents of the training images. -> its moving average, the latents' deviation, seconds."""
    torch.manual_seed(c.seed)
    generator, bf16 = XAR(c).to(device).train(), use_bf16(c, device)
    optimizer = torch.optim.AdamW(generator.parameters(), c.gen_lr, (0.9, 0.96), weight_decay=c.gen_decay, fused=True)
    average = copy.deepcopy(generator).requires_grad_(False)
    indices = encode_all(model, data.train, device)
    scale = model.to_latents(*indices[:1000].to(device).unbind(1)).std().item()
    print(f"generator: {sum(p.numel() for p in generator.parameters()) / 1e6:.2f} M parameters, {generator.side**2} cells of {generator.tokens} "
          f"tokens, latent deviation {scale:.3f}", file=sys.stderr)

    def update(step):
        optimizer.param_groups[0]["lr"] = learning_rate(step, c.generator_steps, c.gen_lr, c.gen_warmup, c.gen_cooldown)
        i = batch_indices(len(indices), c.gen_batch, step, c.seed)
        with torch.no_grad():
            latents = model.to_latents(*indices[i].to(device).unbind(1)) / scale
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = generator.loss(latents, data.train_labels[i].to(device))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(generator.parameters(), c.clip or math.inf)
        optimizer.step()
        decay = min(c.ema, (1 + step) / (10 + step))  # young averages forget faster
        torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), 1 - decay)
        return {"flow": loss, "norm": norm}, dict

    parts = {"model": generator, "ema": average, "optimizer": optimizer}
    scale, seconds = train_steps("generator", out, parts, c.generator_steps, c.gen_batch, c, update, scale, device)
    return average.eval(), scale, seconds

# ------------------------------------------------------------------------------------------------- figures and pictures

def load_judge(teacher, device):
    """The convnet teacher as a classifier of uint8 images; None if the teacher was another."""
    if "convnet" not in teacher:
        return None
    net = ConvNet(teacher["classes"]).to(device).eval()
    net.load_state_dict(teacher["convnet"])
    return lambda images: torch.cat([net(to_float(part, device)).argmax(1).cpu() for part in images.split(100)])

@torch.no_grad()
def report_tokenizer(c, out, data, teacher, model, before, seconds, device):
    """Held-out figures, and three pictures in the run folder."""
    held, judge = data.held[spread(len(data.held), c.eval_images)], load_judge(teacher, device)
    indices = encode_all(model, held, device)
    recon = decode_all(model, indices, device)
    usage = [len(index.unique()) / len(codes) for index, codes in zip(indices.unbind(1), (model.codebook_sem, model.codebook_vis))]
    after, bins = relation_histogram(model.codebook_sem).cpu(), torch.linspace(-1, 1, c.bins)
    metrics = {"psnr": psnr(held, recon).mean().item(), "usage_sem": usage[0], "usage_vis": usage[1],
               "hist_kl": kl_divergence(teacher["histogram"], after).item(), "seconds": round(seconds, 1), "images": len(held),
               "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads, {platform.machine()}"}
    if (fid := fid_of(held, recon, device)) is not None:
        metrics["rfid"] = fid
    if judge:  # does the teacher still see the same class?
        metrics["class_agreement"] = (judge(held) == judge(recon)).float().mean().item()
    grid_of_pairs(out / "reconstructions.png", held, recon)
    plot(out / "histogram.png", [(f"pairwise cosines of the semantic codebook: KL {metrics['hist_kl']:.3f}", "cosine similarity", [
        (f"teacher ({Path(c.teacher).name})", bins, teacher["histogram"]), ("codebook after", bins, after), ("codebook before", bins, before.cpu()),
        (f"ideal sphere, d = {c.code_dim}", bins, sphere_histogram(c.code_dim, c.bins))], "line")])
    return metrics

def report_generator(c, out, data, teacher, model, generator, scale, seconds, device, each=16):
    """samples.png, one row a class, and how often the convnet teacher sees the class that was asked for."""
    shown, judge = min(len(data.classes), 10), load_judge(teacher, device)
    labels = torch.arange(shown, device=device).repeat_interleave(each)
    images = torch.cat(list(generate(model, generator, scale, labels, c.sampling_steps, c.guidance, c.seed)))
    grid(out / "samples.png", [(data.classes[k], images[k * each:][:12]) for k in range(shown)], f"generated, guidance {c.guidance:g}")
    accuracy = {"samples_class_accuracy": (judge(images) == labels.cpu()).float().mean().item()} if judge else {}
    return {"generator_seconds": round(seconds, 1), **accuracy}

def read_log(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

def write_json(path, value):
    write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

def draw_curves(out):
    rows, panels = read_log(out), []
    for stage, title, style, *names in (
            ("tokenizer", "PSNR of training images, dB", "line", "psnr"), ("tokenizer", "L_R and L_P, eq. (3)", "log", "recon", "perceptual"),
            ("tokenizer", "L_Q (1) and L_res (10)", "log", "quantize", "residual"), ("tokenizer", "L_hist (7)", "log", "hist"),
            ("tokenizer", "share of codes in use", "line", "usage_sem", "usage_vis"),
            ("tokenizer", "L_G and the discriminator's loss", "line", "adv", "critic"), ("generator", "flow matching", "log", "flow")):
        points = {n: [(r["step"], r[n]) for r in rows if r["stage"] == stage and n in r] for n in names}
        if any(points.values()):
            panels.append((title, f"{stage} step", [(n, *zip(*p)) for n, p in points.items() if p], style))
    plot(out / "curves.png", panels)

def main():
    args, c = parse()
    device, out, begin = torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.out, time.time()
    if args.stage == "generator" and not (out / "tokenizer.pt").exists():
        raise BadInput(f"{out} has no tokenizer yet: train it first, with --stage tokenizer")
    data = load_data(c.data, c.image_size, c.seed)
    c = replace(c, classes=len(data.classes))
    print(f"data: {len(data.train)} training and {len(data.held)} held-out images, {c.classes} classes", file=sys.stderr)
    perceptual = load_lpips(device) if c.lambda_perceptual and args.stage != "generator" else None
    torch.manual_seed(c.seed)
    cached = args.resume and (out / "teacher.pt").exists()
    teacher = load_checkpoint(out / "teacher.pt") if cached else make_teacher(c, data, device)
    write_json(out / "config.json", {"preset": args.preset, **asdict(c)})
    if not cached:
        write(out / "teacher.pt", lambda file: torch.save({**teacher, "made_by": asdict(c)}, file))
    (mean, square), bound = teacher["moments"], 1 / c.code_dim
    print(f"teacher: {c.teacher}, mean cosine {mean:.3f}, mean squared cosine {square:.3f}; a codebook of dimension {c.code_dim} has at "
          f"least {bound:.3f}{'' if square >= bound else ', so the KL cannot reach 0'}", file=sys.stderr)
    if args.stage != "generator":
        model, before, seconds = train_tokenizer(c, out, data, teacher, perceptual, device)
        metrics = report_tokenizer(c, out, data, teacher, model, before, seconds, device)
        write_json(out / "metrics.json", metrics)
    else:
        model, path = GloTok(c).to(device).eval(), out / "metrics.json"
        metrics = json.loads(path.read_text()) if path.exists() else {}
        if (done := restore(out / "tokenizer.pt", {"model": model}, device)["step"]) < c.tokenizer_steps:
            raise BadInput(f"the tokenizer in {out} stopped at step {done} of {c.tokenizer_steps}: finish it with --resume --stage tokenizer")
    if args.stage != "tokenizer":
        generator, scale, seconds = train_generator(c, out, data, model, device)
        metrics |= report_generator(c, out, data, teacher, model, generator, scale, seconds, device)
        write_json(out / "metrics.json", metrics)
    draw_curves(out)
    figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
    print(f"{out}: {figures}; {time.time() - begin:.0f} s in all")

if __name__ == "__main__":
    run(main)
