"""What a run has learned: figures, pictures, new images.

    python sample.py runs/shapes              # everything about a run, also while it trains

writes into its folder reconstructions.png, histogram.png, curves.png, samples.png and metrics.json.
New images, as a picture, or as arrays for fid.py and ADM's evaluator:

    python sample.py runs/shapes --n 64 --guidance 2 --steps 25 --seed 1 --out grid.png
    python sample.py runs/shapes --n 10000 --out samples.npz

Originals over reconstructions, of any images; figure 4 of the paper, what each half of the tokens
carries; table 3, how evenly the semantic latents lie:

    python sample.py runs/shapes --reconstruct FOLDER --out pairs.png
    python sample.py runs/shapes --retain shapes --out halves.png
    python sample.py runs/shapes --uniformity shapes --out scatter.png
"""

import json
import math
import platform
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import gaussian_kde

import fid
import glotok
from fid import BadInput, note
from train import (
    autocast,
    check_made_of,
    encode_all,
    images_at_once,
    load_config,
    load_convnet,
    load_data,
    load_run,
    load_teacher,
    make_config,
    quotas,
    stream_batches,
    to_float,
    to_uint8,
)

# ================================================================================================
# 1. Everything about a run
# ================================================================================================


def report(args, config, device):
    """Figures and pictures of a run -> files in its folder."""
    folder = args.run
    net = find_network(args, device)
    model = load_run(folder, device)
    teacher = load_teacher(folder)
    val = read_val_set(args, config.data, config.eval_images, model, device)
    classify = load_classifier(teacher, device)
    metrics = report_tokenizer(args, model, teacher, val, net, device)
    if (folder / "generator.pt").exists():
        metrics |= report_generator(args, config, model, classify, device)
    else:
        note(f"no generator yet: python train.py --resume --stage generator --out {folder}")
    draw_curves(folder, teacher["floor"])
    metrics["device"] = device_name(device)
    text = json.dumps(metrics, indent=1) + "\n"
    fid.write_atomically(folder / "metrics.json", lambda file: file.write(text.encode()))
    shown = []
    for name, value in metrics.items():
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    print(f"{folder}: {', '.join(shown)}")


@torch.no_grad()
def report_tokenizer(args, model, teacher, val, net, device):
    """reconstructions.png and histogram.png of held-out images -> figures, a dict."""
    c = model.config
    recon = decode_all(model, val.tokens, device)
    sem, vis = val.tokens.long().unbind(1)
    chosen = torch.bincount(sem.flatten(), minlength=c.codes_sem).to(device)
    hist_teacher = teacher["histogram"]
    hist_after = glotok.relation_histogram(model.codebook_sem, c.bins).cpu()
    hist_used = glotok.used_histogram(model.codebook_sem, chosen, c.bins).cpu()
    tokens = sem.numel()
    metrics = {
        "images": len(recon),
        "psnr": fid.psnr(val.images, recon).mean().item(),
        "usage_sem": len(sem.unique()) / c.codes_sem,
        "usage_sem_most": min(1.0, tokens / c.codes_sem),  # that so few images can reach
        "usage_vis": len(vis.unique()) / c.codes_vis,
        "usage_vis_most": min(1.0, tokens / c.codes_vis),
        "hist_kl": glotok.kl_divergence(hist_teacher, hist_after).item(),
        "hist_kl_floor": teacher["floor"],
        "hist_kl_used": glotok.kl_divergence(hist_teacher, hist_used).item(),
        **training_figures(args.run / "tokenizer.pt"),
    }
    distances = measure_reconstructions(net, val.images, recon, device)
    if distances:
        metrics["rfid"] = distances["fid"]
        metrics["kid"] = distances["kid"][0]

    save_pairs(args.run / "reconstructions.png", val.images, recon)
    torch.manual_seed(c.seed)
    untrained = glotok.GloTok(c)  # as train.py makes it
    bins = torch.linspace(-1, 1, c.bins)
    curves = [
        (f"teacher ({Path(c.teacher).name})", bins, hist_teacher),
        ("codebook after", bins, hist_after),
        ("before", bins, glotok.relation_histogram(untrained.codebook_sem, c.bins)),
        (f"sphere, d = {c.code_dim}", bins, glotok.sphere_histogram(c.code_dim, c.bins)),
    ]
    title = f"cosines of all pairs of semantic codes: KL {metrics['hist_kl']:.2g}"
    title += f", floor {metrics['hist_kl_floor']:.2g}"
    panel = Panel(title, "cosine similarity", curves, "line")
    save_plot(args.run / "histogram.png", [panel], width=720)
    return metrics


@torch.no_grad()
def report_generator(args, config, model, classify, device, per_class=16):
    """samples.png, a row for each of the first ten classes -> figures, a dict.

    per_class images are drawn of each class, and 12 of them shown. If the teacher is the convnet,
    the figures include how often it sees the class that was asked for.
    """
    generator = load_generator(args.run, model, device)
    names = args.trained_on["classes"][:10]
    labels = torch.arange(len(names), device=device).repeat_interleave(per_class)
    images = torch.cat(list(generate(model, generator, labels, config, args.seed)))
    rows = [(name, images[k * per_class :][:12]) for k, name in enumerate(names)]
    save_image_grid(args.run / "samples.png", rows, f"generated, guidance {config.guidance:g}")
    metrics = {
        "sampling_steps": config.sampling_steps,
        "guidance": config.guidance,
        "sampling_seed": args.seed,
    }
    for name, value in training_figures(args.run / "generator.pt").items():
        metrics[f"generator_{name}"] = value
    if classify:
        right = classify(images) == labels.cpu()
        metrics["samples_class_accuracy"] = right.float().mean().item()
    return metrics


def training_figures(path):
    """What a checkpoint knows of its training: steps, time, speed, memory."""
    saved = fid.load_checkpoint(path)
    return {
        "steps": saved["step"],
        "seconds": round(saved["seconds"], 1),
        "images_per_second": round(saved["images"] / saved["seconds"], 2),
        "peak_memory_gb": round(saved["peak"] / 2**30, 2),
    }


def load_classifier(teacher, device):
    """The convnet teacher as a function: uint8 images -> classes (N,). None for other teachers."""
    if "convnet" not in teacher:
        return None
    net = load_convnet(teacher, device)

    def classify(images):
        parts = images.split(100)
        return torch.cat([net(to_float(part, device)).argmax(1).cpu() for part in parts])

    return classify


def find_network(args, device):
    """The FID network; None, with a note, if it is not at hand."""
    path = fid.cache_path(fid.INCEPTION.name)
    if args.weights is None and not path.exists():
        note(
            f"no FID and KID, for {path} is not there: the first run of fid.py downloads it; "
            "or give --weights FILE"
        )
        return None
    return fid.load_inception(args.weights, device)


def measure_reconstructions(net, images, recon, device):
    """FID and KID of reconstructions, uint8 (N, 3, H, W), with their originals, in one order.

    -> {"fid": value, "kid": (mean, deviation)}, empty without a network or with a single image.
    """
    if net is None or len(images) < 2:  # a covariance takes at least two
        return {}
    statistics = []
    for name, each in (("held-out images", images), ("reconstructions", recon)):
        arrays = each.permute(0, 2, 3, 1).numpy()
        statistics.append(fid.measure(name, arrays, net, device, keep=["features"]))
    return fid.compare(*statistics, ["fid", "kid"], paired=True)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def read_log(folder):
    """The rows of log.jsonl, a list of dicts; of repeated steps the last row.

    A run that was resumed repeats steps. A last line may be cut short by a crash.
    """
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {}
    try:
        for line in lines:
            if line.endswith("}"):
                row = json.loads(line)
                rows[row["stage"], row["step"]] = row
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is damaged ({error}): move it away") from None
    return sorted(rows.values(), key=lambda row: row["step"])


# stage, title, style, names in log.jsonl
CURVES = [
    ("tokenizer", "PSNR of training images, dB", "line", ["psnr"]),
    ("tokenizer", "L_R and L_P, eq. (3)", "log", ["recon", "perceptual"]),
    ("tokenizer", "L_Q (1) and L_res (10)", "log", ["quantize", "residual"]),
    ("tokenizer", "L_hist (7)", "log", ["hist"]),
    ("tokenizer", "share of codes in use", "line", ["usage_sem", "usage_vis"]),
    ("tokenizer", "L_G and the discriminator's loss", "line", ["adv", "disc"]),
    ("tokenizer", "FQGAN's contrastive loss, nats", "line", ["contrastive"]),
    ("tokenizer", "VA-VAE's L_vf", "line", ["vf"]),
    ("generator", "flow matching", "log", ["flow"]),
]


def draw_curves(folder, floor):
    """log.jsonl -> curves.png. floor: the least L_hist, a line beside it."""
    rows = read_log(folder)
    panels = []
    for stage, title, style, names in CURVES:
        curves = []
        for name in names:
            found = [row for row in rows if row["stage"] == stage and name in row]
            if found:
                steps = [row["step"] for row in found]
                curves.append((name, steps, [row[name] for row in found]))
                if name == "hist":
                    curves.append(("floor", [steps[0], steps[-1]], [floor, floor]))
        if curves:
            panels.append(Panel(title, f"{stage} step", curves, style))
    if panels:
        save_plot(folder / "curves.png", panels)


# ================================================================================================
# 2. Tokens, images
# ================================================================================================

# Held-out images of some data: uint8 (N, 3, H, W), labels (N,), tokens int32 (N, 2, h, w).
ValSet = namedtuple("ValSet", "data images labels tokens")


def read_val_set(args, spec, n, model, device):
    """Up to n held-out images of a data SPEC, evenly spaced, and their tokens -> ValSet.

    Says so if these are not the data of the run: then nobody knows what it was trained on.
    """
    c = model.config
    data = load_data(spec, c.image_size, c.seed, decode_later=True)
    if data.digest != args.trained_on["digest"]:
        note(
            f"the images of {spec} are not those of the run, or no longer: some that are held out "
            "here may have been trained on"
        )
    index = fid.evenly_spaced(len(data.val), n)
    images = read_at(data.val, index, c.image_size)
    tokens = encode_all(model, images, torch.arange(len(images)), device)
    return ValSet(data, images, data.val_labels[index], tokens)


def read_at(images, index, size):
    """images[index], uint8 (n, 3, size, size), of images in memory or of files."""
    batches = stream_batches(images, index.split(100), torch.device("cpu"), size)
    return torch.cat(list(batches))


@torch.no_grad()
def decode_all(model, tokens, device):
    """Tokens int (N, 2, h, w) -> uint8 images on the CPU."""
    images = []
    for part in tokens.split(images_at_once(model.config)):
        sem, vis = part.long().to(device).unbind(1)
        images.append(to_uint8(model.decode(sem, vis)).cpu())
    return torch.cat(images)


def load_generator(folder, model, device="cpu"):
    """The trained generator of a run folder, the moving average of its weights, in eval mode.

    BadInput if it was trained on the tokens of another tokenizer than model.
    """
    path = Path(folder) / "generator.pt"
    if not path.exists():
        raise BadInput(
            f"{folder} has no generator yet: "
            f"python train.py --resume --stage generator --out {folder}"
        )
    generator = glotok.XAR(model.config).to(device)
    saved = fid.load_checkpoint(path, device)
    fid.load_states(path, {"ema_model": generator}, saved)
    check_made_of(path, saved, model)
    return generator.eval()


GENERATE_BATCH = 100


@torch.no_grad()
def generate(model, generator, labels, config, seed):
    """Labels int64 (n,) -> uint8 images on the CPU, yielded in batches of 100.

    Steps and guidance are the config's.
    """
    torch.manual_seed(seed)
    for batch in labels.split(GENERATE_BATCH):
        with autocast(config, labels.device):  # decoding stays in float32, as all measures do
            latents = generator.sample(batch, config.sampling_steps, config.guidance)
        parts = latents.split(images_at_once(config))
        yield torch.cat([to_uint8(model.from_latents(part)).cpu() for part in parts])


# ================================================================================================
# 3. Figure 4: what the visual and the semantic latents carry
# ================================================================================================


@torch.no_grad()
def retain(path, model, images, tokens):
    """Decode with the visual latents at a share of the positions, 0 elsewhere -> a PNG.

    With the semantic latents and without. Paper silent on which positions: random ones, and each
    share holds the smaller shares. images uint8 (N, 3, H, W), tokens (N, 2, h, w).
    """
    sem, vis = model.code_vectors(*tokens.long().unbind(1))  # (N, T, d) each
    res_sem, res_vis = model.residuals(sem, vis)
    sem = sem + res_sem
    vis = vis + res_vis
    positions = vis.shape[1]
    rank = torch.rand(vis.shape[:2], device=vis.device).argsort(1)  # (N, T), random permutations
    some = fid.evenly_spaced(len(images), 12)
    rows = [("original", images[some])]
    for with_semantic, shares in ((True, (0, 25, 50, 75, 100)), (False, (25, 50, 75, 100))):
        for share in shares:
            retained = rank < share / 100 * positions  # (N, T)
            shown_sem = sem if with_semantic else torch.zeros_like(sem)
            recon = model.decode_latents(shown_sem, vis * retained[:, :, None])
            recon = to_uint8(recon).cpu()
            name = f"semantic + {share} % visual" if with_semantic else f"{share} % visual alone"
            rows.append((f"{name}: {fid.psnr(images, recon).mean():.1f} dB", recon[some]))
    title = "what the visual and the semantic latents carry; "
    save_image_grid(path, rows, f"{title}PSNR over {len(images)} held-out images")


# ================================================================================================
# 4. Table 3: how evenly the semantic latents lie
# ================================================================================================
# The protocol of VA-VAE: a random position of each image, its code vector normalised per channel,
# t-SNE to the plane, a kernel density estimate at the points themselves, and how uneven that is.
# VA-VAE's own script differs in three ways: it mirrors half of the images, normalises by the data
# set's statistics instead of the sample's, and calls scikit-learn's t-SNE, approximate, from a PCA.
# So our values compare with one another, not with the paper's.
#
# t-SNE (van der Maaten and Hinton 2008), exact. p_ij says how probably i and j pick each other as
# neighbours, Gaussian in their distance, each point with a width of its own that gives it
# `perplexity` neighbours (the exponential of the entropy). q_ij says the same in the plane, with
# weights w = 1 / (1 + distance^2). Descend KL(p || q), whose gradient is
#
#     dKL / dy_i = 4 sum_j (p_ij - q_ij) w_ij (y_i - y_j).


def tsne(x, perplexity=30.0, steps=1000):
    """Points x (n, d) -> (n, 2). Memory 6 n^2 floats. Starts from the global random generator."""
    n = len(x)
    p = neighbour_probabilities(x.float(), perplexity)
    y = 1e-4 * torch.randn(n, 2, device=x.device)
    speed = torch.zeros_like(y)
    gain = torch.ones_like(y)
    learning_rate = max(n / 48, 50)
    for step in range(steps):
        # At first p is exaggerated and momentum small: clusters form before they settle.
        early = step < steps // 4
        w = squared_cdist(y, y).add_(1).reciprocal_().fill_diagonal_(0)
        q = w / w.sum()
        if early:
            force = torch.sub(p, q, alpha=1 / 12).mul_(12 * w)  # (12 p - q) w
        else:
            force = (p - q).mul_(w)
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        # larger steps while the sign of the gradient persists
        gain = torch.where(gradient * speed > 0, 0.8 * gain, gain + 0.2).clamp_min(0.01)
        speed = (0.5 if early else 0.8) * speed - learning_rate * gain * gradient
        y = y + speed
    return y


def squared_cdist(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_()


def neighbour_probabilities(x, perplexity):
    """p of t-SNE, (n, n), for points x (n, d) float32."""
    n = len(x)
    entropy = math.log(min(perplexity, (n - 1) / 3))
    bands = []
    for rows in torch.arange(n, device=x.device).split(1000):
        distance = squared_cdist(x[rows], x)
        distance[torch.arange(len(rows)), rows] = torch.inf  # nobody is a neighbour of itself
        # Bisect the logarithm of the precision, row by row, until the entropy fits.
        low = x.new_full((len(rows), 1), -50)
        high = x.new_full((len(rows), 1), 50)
        for _ in range(40):
            middle = (low + high) / 2
            share = torch.softmax(-middle.exp() * distance, dim=1)
            too_wide = torch.special.entr(share).sum(1, keepdim=True) > entropy
            low = torch.where(too_wide, middle, low)
            high = torch.where(too_wide, high, middle)
        bands.append(share)
    p = torch.cat(bands)
    return (p + p.T) / (2 * n)


def uniformity(points):
    """Table 3's measures of points (n, 2), from their Gaussian kernel density at the points.

    "density_cv": standard deviation / mean of the densities; "normalized_entropy": entropy of the
    densities' shares / log n; "gini": mean absolute difference / (2 mean). Perfectly even: 0, 1, 0.
    """
    at = points.double().T.cpu().numpy()
    density = torch.from_numpy(gaussian_kde(at)(at)).sort().values  # Scott's bandwidth
    n = len(density)
    share = density / density.sum()
    cv = density.std(correction=0) / density.mean()
    entropy = torch.special.entr(share).sum() / math.log(n)
    gini = ((2 * torch.arange(1, n + 1) - n - 1) * share).sum() / n
    return {
        "density_cv": cv.item(),
        "normalized_entropy": entropy.item(),
        "gini": gini.item(),
    }


UNIFORMITY_RUNS = 10  # the protocol's


def repeat_uniformity(codebook, tokens, runs):
    """Table 3 of semantic tokens (N, h, w) into a codebook (n, d), `runs` times.

    -> the measures of each run, a list of dicts, and the points (N, 2) of the last.
    """
    tokens = tokens.flatten(1)  # (N, T)
    progress = fid.Progress("t-SNE run", runs)
    measures = []
    for run in range(runs):
        position = torch.randint(tokens.shape[1], (len(tokens), 1))
        chosen = tokens.gather(1, position)[:, 0]  # (N,)
        z = codebook[chosen.to(codebook.device)]  # (N, d)
        z = (z - z.mean(0)) / z.std(0).clamp_min(1e-9)
        points = tsne(z).cpu()
        measures.append(uniformity(points))
        progress.update(run + 1)
    return measures, points


def save_scatter(path, points, labels, classes, measures):
    """t-SNE points (N, 2), those of ten classes, coloured -> a PNG that names their measures."""
    curves = []
    for k, name in enumerate(classes[:10]):
        of_class = points[labels == k]
        if len(of_class):
            curves.append((" ".join(name.split()), *of_class.T))
    x_label = (
        f"density CV {measures['density_cv']:.3f}, "
        f"normalized entropy {measures['normalized_entropy']:.4f}, Gini {measures['gini']:.4f}"
    )
    title = f"t-SNE of {len(points)} latents, coloured by class"
    if len(classes) > 10:
        title += "; ten classes shown"
    save_plot(path, [Panel(title, x_label, curves, "dots")], width=900, height=900)


# ================================================================================================
# 5. The commands
# ================================================================================================


def command_sample(args, config, device):
    """New images -> a picture, or an .npz as ADM's evaluator reads it."""
    model = load_run(args.run, device)
    generator = load_generator(args.run, model, device)
    names = args.trained_on["classes"]
    if args.classes:
        chosen = [class_number(word, names) for word in args.classes]
        labels = torch.tensor([chosen[i % len(chosen)] for i in range(args.n)])
    else:
        labels = quotas(torch.tensor(args.trained_on["counts"]), args.n)
    progress = fid.Progress("sampling", args.n)
    images = np.empty((args.n, config.image_size, config.image_size, 3), np.uint8)
    done = 0
    for batch in generate(model, generator, labels.to(device), config, args.seed):
        images[done : done + len(batch)] = batch.permute(0, 2, 3, 1).numpy()
        done += len(batch)
        progress.update(done)
    if args.out.suffix == ".npz":
        arrays = {"arr_0": images, "labels": labels.numpy()}
        fid.write_atomically(args.out, lambda file: np.savez(file, **arrays))
    else:
        columns = len(args.classes) if args.classes and len(args.classes) in range(4, 17) else 8
        rows = torch.from_numpy(images).permute(0, 3, 1, 2).split(columns)
        save_image_grid(args.out, [("", row) for row in rows])
    drawn, counts = labels.unique(return_counts=True)
    listed = [f"{k} ({names[k]}) {n}" for k, n in zip(drawn.tolist(), counts.tolist())]
    if len(drawn) > 20:
        listed[20:] = [f"and {len(drawn) - 20} more of the {len(names)} classes"]
    print(f"{args.out}: {args.n} images of {', '.join(listed)}")


def class_number(word, names):
    """A class's name or its number, as text -> its number."""
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise BadInput(f"--classes {word}: the run has classes 0 to {len(names) - 1}, {names[:20]}")


def command_reconstruct(args, config, device):
    net = find_network(args, device)
    model = load_run(args.run, device)
    val = read_val_set(args, args.reconstruct, config.eval_images, model, device)
    recon = decode_all(model, val.tokens, device)
    save_pairs(args.out, val.images, recon)
    message = f"{args.out}: {len(recon)} held-out images of {args.reconstruct}: "
    message += f"PSNR {fid.psnr(val.images, recon).mean():.2f} dB"
    distances = measure_reconstructions(net, val.images, recon, device)
    if distances:
        message += f", FID {distances['fid']:.3f}, KID {distances['kid'][0]:.6f}"
    print(message)


def command_retain(args, config, device):
    model = load_run(args.run, device)
    val = read_val_set(args, args.retain, min(config.eval_images, 5000), model, device)
    torch.manual_seed(args.seed)
    measured = fid.evenly_spaced(len(val.images), images_at_once(config))
    retain(args.out, model, val.images[measured], val.tokens[measured].to(device))
    print(f"{args.out}: {len(measured)} held-out images of {args.retain}")


def command_uniformity(args, config, device):
    model = load_run(args.run, device)
    # at most the 10,000 of the paper's protocol: memory grows with the square
    val = read_val_set(args, args.uniformity, min(config.eval_images, 10000), model, device)
    if len(val.images) < 10:
        raise BadInput(f"{args.uniformity} has {len(val.images)} held-out images: 10 at least")
    torch.manual_seed(args.seed)
    # a tokenizer with a single semantic code has one codebook, the visual one
    single = config.codes_sem == 1
    codebook = (model.codebook_vis if single else model.codebook_sem).detach()
    tokens = val.tokens[:, int(single)].long()
    measures, points = repeat_uniformity(codebook, tokens, UNIFORMITY_RUNS)
    save_scatter(args.out, points, val.labels, val.data.classes, measures[-1])
    figures = []
    for name in measures[0]:
        values = torch.tensor([each[name] for each in measures])
        figures.append(f"{name} {values.mean():.4f} +- {values.std(correction=0):.4f}")
    print(
        f"{args.out}: {len(points)} held-out images of {args.uniformity}: {', '.join(figures)} "
        f"over {len(measures)} runs, by exact t-SNE: compare with our own runs alone"
    )


def parse_arguments():
    parser = fid.Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder of train.py")
    add("--n", type=int, help="draw so many new images (default 64)")
    add("--classes", nargs="+", metavar="K", help="classes to draw, in turn, numbers or names")
    add("--steps", type=int, help="denoising steps a cell (default: the run's sampling_steps)")
    add("--guidance", type=float, help="guidance of the last cell; 1: none (default: the run's)")
    add("--seed", type=int, default=0, help="same seed and --n, same images (default %(default)s)")
    add("--out", metavar="FILE", help="a .png, or new images as arrays, .npz (default new.png)")
    val = "held-out images of shapes, cifar10, imagenette, a folder, or an .npz"
    add("--reconstruct", metavar="SPEC", help=f"{val}: reconstruct them")
    add("--retain", metavar="SPEC", help=f"{val}: figure 4, decode from parts of the latents")
    add("--uniformity", metavar="SPEC", help=f"{val}: table 3")
    add("--weights", metavar="FILE", help="a local file of the FID network (default: downloaded)")
    add("--force", action="store_true", help="overwrite the file")
    args = parser.parse_args()
    if "" in (args.run, args.out):
        raise BadInput("RUN or --out is empty")
    args.run = Path(args.run)
    check_arguments(args)
    return args


def check_arguments(args):
    specs = [s for s in (args.reconstruct, args.retain, args.uniformity) if s is not None]
    draws = args.n is not None or args.classes is not None
    if len(specs) > 1:
        raise BadInput("at most one of --reconstruct, --retain, --uniformity can be given")
    if specs and (draws or args.steps is not None or args.guidance is not None):
        raise BadInput("--n, --classes, --steps and --guidance are of new images alone")
    if not 0 <= args.seed < 2**31:
        raise BadInput(f"--seed {args.seed} must lie in 0 to 2^31 - 1")
    args.is_report = not specs and not draws and args.out is None
    args.out = Path(args.out or "new.png")
    args.n = 64 if args.n is None else args.n
    if args.out.suffix not in (".png", ".npz") or specs and args.out.suffix == ".npz":
        raise BadInput(f"--out {args.out} must end in .png (new images: or .npz)")
    most = 10**4 if args.out.suffix == ".png" else 10**7
    if not 0 < args.n <= most:
        raise BadInput(f"--n {args.n} must lie in 1 to {most:,} for {args.out.suffix}")
    if args.is_report:
        return
    if args.out.resolve() == (args.run / "samples.png").resolve():
        raise BadInput(f"{args.out} belongs to the report: choose another --out")
    if args.out.exists() and not args.force:
        raise BadInput(f"{args.out} exists: choose another --out, or overwrite it with --force")


def main():
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, _, args.trained_on = load_config(args.run)
    settings = asdict(config)
    if args.steps is not None:
        settings["sampling_steps"] = args.steps
    if args.guidance is not None:
        settings["guidance"] = args.guidance
    config = make_config(settings)
    if args.reconstruct is not None:
        command_reconstruct(args, config, device)
    elif args.retain is not None:
        command_retain(args, config, device)
    elif args.uniformity is not None:
        command_uniformity(args, config, device)
    elif args.is_report:
        report(args, config, device)
    else:
        command_sample(args, config, device)


# ================================================================================================
# 6. Drawing
# ================================================================================================

INK = (30, 30, 30)
RULE = (225, 225, 225)
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#787878"]
COLOURS += ["#ff7f0e", "#17becf", "#e377c2", "#bcbd22", "#8c564b"]


def save_png(path, canvas):
    fid.write_atomically(Path(path), lambda file: canvas.save(file, "PNG"))


def save_image_grid(path, rows, title=""):
    """rows, a list of (label, images uint8 (n, 3, H, W)) -> a PNG; small images are enlarged."""
    # A class may be called anything, line breaks included.
    rows = [(" ".join(label.split()), images) for label, images in rows]
    font = ImageFont.load_default(20)  # legible on a phone, where the picture is half as wide
    gap = 4
    side = rows[0][1].shape[3]
    side *= max(1, 64 // side)  # whole pixels
    left = 8 + max(int(font.getlength(label)) for label, _ in rows)
    top = 36 if title else gap
    columns = max(len(images) for _, images in rows)
    width = left + (side + gap) * columns
    height = top + (side + gap) * len(rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 6), title, INK, font)
    for r, (label, images) in enumerate(rows):
        y = top + r * (side + gap)
        draw.text((4, y + side // 2), label, INK, font, anchor="lm")
        for i, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            picture = picture.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + i * (side + gap), y))
    save_png(path, canvas)


def save_pairs(path, images, recon, n=12):
    """Images above their reconstructions, uint8 (N, 3, H, W) twice: n of them, evenly spaced."""
    some = fid.evenly_spaced(len(images), n)
    rows = [("original", images[some]), ("reconstruction", recon[some])]
    mean = fid.psnr(images, recon).mean()
    save_image_grid(path, rows, f"held-out images, {mean:.1f} dB over {len(images)}")


# curves: a list of (name, xs, ys); style: "line", "log" (of y) or "dots"
Panel = namedtuple("Panel", "title x_label curves style")


def save_plot(path, panels, columns=2, width=560, height=400):
    """Panels -> a PNG; width and height of each in pixels."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas = Image.new("RGB", (width * columns, height * rows), "white")
    draw = ImageDraw.Draw(canvas)
    for i, panel in enumerate(panels):
        left = i % columns * width
        top = i // columns * height
        draw_panel(draw, panel, (left + 90, left + width - 30), (top + 76, top + height - 70))
    save_png(path, canvas)


def draw_panel(draw, panel, x_range, y_range):
    """Draw a Panel with its axes at the pixels (left, right) and (top, bottom)."""
    left, right = x_range
    top, bottom = y_range
    font = ImageFont.load_default(23)
    small = ImageFont.load_default(20)
    draw.text((left - 80, top - 70), panel.title, INK, font)
    draw.text(((left + right) / 2, bottom + 34), panel.x_label, INK, small, anchor="ma")

    curves = []
    for name, xs, ys in panel.curves:
        ys = np.log10(np.maximum(ys, 1e-12)) if panel.style == "log" else np.asarray(ys)
        curves.append((name, np.asarray(xs), ys))
    x_low, x_high = limits([xs for _, xs, _ in curves])
    y_low, y_high = limits([ys for _, _, ys in curves], room=0.05)

    def pixel(x, y):
        px = left + (x - x_low) / (x_high - x_low) * (right - left)
        py = bottom - (y - y_low) / (y_high - y_low) * (bottom - top)
        return px, py

    for x, y in zip(np.linspace(x_low, x_high, 3), np.linspace(y_low, y_high, 3)):
        draw.line([pixel(x, y_low), pixel(x, y_high)], RULE)
        draw.line([pixel(x_low, y), pixel(x_high, y)], RULE)
        draw.text((pixel(x, y)[0], bottom + 6), f"{x:.4g}", INK, small, anchor="ma")
        value = 10**y if panel.style == "log" else y
        draw.text((left - 6, pixel(x, y)[1]), f"{value:.2g}", INK, small, anchor="rm")

    legend = left - 80
    for colour, (name, xs, ys) in zip(COLOURS, curves):
        points = list(zip(*pixel(xs, ys)))
        if panel.style == "dots":
            for x, y in points:
                draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), colour)
        elif len(points) > 1:
            draw.line(points, colour, 2)
        else:
            draw.point(points, colour)
        draw.text((legend, top - 34), name, colour, small)
        legend += draw.textlength(name, small) + 16


def limits(values, room=0.0):
    """The least and the greatest of a list of arrays, apart by more than 0; room above, a share."""
    values = np.concatenate(values)
    low = values.min()
    high = values.max()
    if high == low:
        return low, low + 1
    return low, high + room * (high - low)


if __name__ == "__main__":
    fid.run_script(main)
