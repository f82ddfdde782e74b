"""Pictures and figures of a run.

New images, as a picture, or as arrays for fid.py and ADM's evaluator:

    python sample.py runs/shapes --n 64 --guidance 2 --steps 25 --seed 1 --out grid.png
    python sample.py runs/shapes --n 10000 --out samples.npz

Originals over reconstructions, their PSNR, FID and KID; figure 4 of the paper, what each half of
the tokens carries; table 3, how evenly the semantic latents lie:

    python sample.py runs/shapes --reconstruct shapes --out pairs.png
    python sample.py runs/shapes --retain shapes --out halves.png
    python sample.py runs/shapes --uniformity shapes --out scatter.png
"""

import hashlib
import json
import math
import platform
import signal
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # until run_script takes over, Ctrl-C ends the slow imports silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import gaussian_kde

from fid import (
    INCEPTION_FILE,
    BadInput,
    Parser,
    Progress,
    cache_path,
    compare,
    evenly_spaced,
    load_checkpoint,
    load_data,
    load_inception,
    load_states,
    lock,
    measure,
    note,
    psnr,
    run_script,
    sha256,
    stream_batches,
    write_atomically,
)
from glotok import (
    GENERATORS,
    Config,
    ConvNet,
    GloTok,
    kl_divergence,
    relation_histogram,
    sphere_histogram,
    used_histogram,
)

# ================================================================================================
# 1. Drawing
# ================================================================================================

INK = (30, 30, 30)
RULE = (225, 225, 225)
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#787878"]
COLOURS += ["#ff7f0e", "#17becf", "#e377c2", "#bcbd22", "#8c564b"]


def save_png(path, canvas):
    write_atomically(Path(path), lambda file: canvas.save(file, "PNG"))


def save_image_grid(path, rows, title="", least_side=64):
    """rows, a list of (label, images uint8 (n, 3, H, W)) -> a PNG.

    Images of fewer than least_side pixels are enlarged to so many.
    """
    # A class may be called anything, line breaks included.
    rows = [(" ".join(label.split()), images) for label, images in rows]
    font = ImageFont.load_default(14)
    gap = 4
    side = max(least_side, rows[0][1].shape[3])
    left = 8 + max(int(font.getlength(label)) for label, _ in rows)
    top = 28 if title else gap
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
    some = evenly_spaced(len(images), n)
    rows = [("original", images[some]), ("reconstruction", recon[some])]
    mean = psnr(images, recon).mean()
    save_image_grid(path, rows, f"held-out images, {mean:.1f} dB over {len(images)}")


def save_comparison(path, images, recons, n=8):
    """Images above what several runs make of them, n of them, enlarged so that one sees texture.

    images uint8 (N, 3, H, W); recons: {name of a run: such images}.
    """
    some = evenly_spaced(len(images), n)
    rows = [("original", images[some])]
    for name, recon in recons.items():
        mean = psnr(images, recon).mean()
        rows.append((f"{name}: {mean:.1f} dB", recon[some]))
    save_image_grid(path, rows, f"held-out images, PSNR over {len(images)}", least_side=128)


# curves: a list of (name, xs, ys); style: "line", "log" (of y) or "dots"
Panel = namedtuple("Panel", "title x_label curves style")


def save_plot(path, panels, columns=2, width=560, height=320):
    """Panels -> a PNG; width and height of each in pixels."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas = Image.new("RGB", (width * columns, height * rows), "white")
    draw = ImageDraw.Draw(canvas)
    for i, panel in enumerate(panels):
        left = i % columns * width
        top = i // columns * height
        draw_panel(draw, panel, (left + 64, left + width - 16), (top + 50, top + height - 44))
    save_png(path, canvas)


def draw_panel(draw, panel, x_range, y_range):
    """Draw a Panel with its axes at the pixels (left, right) and (top, bottom)."""
    left, right = x_range
    top, bottom = y_range
    font = ImageFont.load_default(15)
    small = ImageFont.load_default(12)
    draw.text((left, top - 43), panel.title, INK, font)
    draw.text(((left + right) / 2, bottom + 24), panel.x_label, INK, small, anchor="ma")

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

    for x, y in zip(np.linspace(x_low, x_high, 5), np.linspace(y_low, y_high, 5)):
        draw.line([pixel(x, y_low), pixel(x, y_high)], RULE)
        draw.line([pixel(x_low, y), pixel(x_high, y)], RULE)
        draw.text((pixel(x, y)[0], bottom + 4), f"{x:.4g}", INK, small, anchor="ma")
        value = 10**y if panel.style == "log" else y
        draw.text((left - 5, pixel(x, y)[1]), f"{value:.3g}", INK, small, anchor="rm")

    legend = left
    for colour, (name, xs, ys) in zip(COLOURS, curves):
        points = list(zip(*pixel(xs, ys)))
        if panel.style == "dots":
            for x, y in points:
                draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), colour)
        elif len(points) > 1:
            draw.line(points, colour, 2)
        else:
            draw.point(points, colour)
        draw.text((legend, top - 22), name, colour, small)
        legend += draw.textlength(name, small) + 14


def limits(values, room=0.0):
    """The least and the greatest of a list of arrays, apart by more than 0; room above, a share."""
    values = np.concatenate(values)
    low = values.min()
    high = values.max()
    if high == low:
        return low, low + 1
    return low, high + room * (high - low)


# ================================================================================================
# 2. A run: load it, encode, decode, generate
# ================================================================================================


def make_config(settings):
    """A dict of settings -> Config; BadInput if they do not fit."""
    try:
        return Config(**settings)
    except ValueError as error:
        raise BadInput(str(error)) from None


def load_config(folder):
    """The Config of the run in `folder`, and the name of its preset."""
    path = folder / "config.json"
    try:
        saved = json.loads(path.read_text())
        preset = saved.pop("preset")
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        return Config(**settings), preset
    except FileNotFoundError:
        raise BadInput(f"no run in {folder}: there is no {path}") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{path} is not a run's settings: {error}") from None


def load_run(folder, device="cpu"):
    """The trained tokenizer of a run folder, a GloTok in eval mode."""
    folder = Path(folder)
    config, _ = load_config(folder)
    model = GloTok(config).to(device)
    path = folder / "tokenizer.pt"
    load_states(path, {"model": model}, load_checkpoint(path, device))
    return model.eval()


def load_generator(folder, device="cpu"):
    """The trained generator of a run folder, the moving average of its weights, in eval mode."""
    folder = Path(folder)
    config, _ = load_config(folder)
    path = folder / "generator.pt"
    if not path.exists():
        raise BadInput(
            f"{folder} has no generator yet: "
            f"python train.py --stage generator --resume --out {folder}"
        )
    generator = GENERATORS[config.generator](config).to(device)
    load_states(path, {"ema_model": generator}, load_checkpoint(path, device))
    return generator.eval()


def to_float(images, device):
    """uint8 (B, 3, H, W) -> float in [-1, 1] on the device."""
    images = images.to(device, non_blocking=True)
    return images.to(memory_format=torch.channels_last).float() / 127.5 - 1


def to_uint8(x):
    """Float images in [-1, 1], clipped -> uint8, rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def images_at_once(config):
    """How many images go through the tokenizer in one pass."""
    return max(1, min(200, 2**21 // config.image_size**2))


def read_at(images, index, size):
    """images[index], uint8 (n, 3, size, size), of images in memory or of files."""
    batches = stream_batches(images, index.split(100), torch.device("cpu"), size)
    return torch.cat(list(batches))


@torch.no_grad()
def encode_all(model, images, index, device, mirror=False):
    """images[index] -> their semantic and visual tokens, int32 (n, 2, h, w), on the CPU.

    With `mirror`, those of the mirrored images.
    """
    config = model.config
    batches = index.split(images_at_once(config))
    progress = Progress("encoding", len(index))
    tokens = []
    done = 0
    for batch in stream_batches(images, batches, device, config.image_size):
        x = to_float(batch, device)
        sem, vis = model.encode(x.flip(3) if mirror else x)
        tokens.append(torch.stack([sem, vis], dim=1).int().cpu())
        done += len(batch)
        progress.update(done)
    return torch.cat(tokens)


@torch.no_grad()
def decode_all(model, tokens, device):
    """Tokens int (N, 2, h, w) -> uint8 images on the CPU."""
    images = []
    for part in tokens.split(images_at_once(model.config)):
        sem, vis = part.to(device).unbind(1)
        images.append(to_uint8(model.decode(sem, vis)).cpu())
    return torch.cat(images)


@torch.no_grad()
def decode_generated(model, latents):
    """Generated latents (N, C, h, w) -> uint8 images on the CPU."""
    parts = latents.split(images_at_once(model.config))
    return torch.cat([to_uint8(model.from_latents(part)).cpu() for part in parts])


GENERATE_BATCH = 100


@torch.no_grad()
def generate(model, generator, labels, config, seed, first=0):
    """Labels (n,) -> uint8 images on the CPU, yielded in batches of 100, from image `first` on.

    Steps and guidance are the config's. Each batch has its own seed, so that any can be made anew.
    """
    for i in range(first, len(labels), GENERATE_BATCH):
        torch.manual_seed(seed + 1_000_003 * i)
        batch = labels[i : i + GENERATE_BATCH]
        generated = generator.sample(batch, config.sampling_steps, config.guidance)
        if config.generator == "far":
            yield decode_all(model, generated, labels.device)
        else:
            yield decode_generated(model, generated)


# ================================================================================================
# 3. What a finished run reports
# ================================================================================================

# config: Config; out: its folder; data: fid.Data; teacher: what train.py's make_teacher gives;
# inception: the FID network, or None
Run = namedtuple("Run", "config out data teacher device inception")


@torch.no_grad()
def report_tokenizer(run, model, hist_before, figures):
    """Held-out figures and two pictures of a trained tokenizer -> the figures, a dict.

    hist_before: the semantic codebook's histogram before training; figures: further ones.
    """
    c = run.config
    index = evenly_spaced(len(run.data.val), c.eval_images)
    images = read_at(run.data.val, index, c.image_size)
    tokens = encode_all(model, images, torch.arange(len(images)), run.device)
    recon = decode_all(model, tokens, run.device)
    teacher_hist = run.teacher["histogram"]
    hist_after = relation_histogram(model.codebook_sem, c.bins).cpu()
    sem, vis = tokens.unbind(1)
    counts = torch.bincount(sem.flatten(), minlength=c.codes_sem).to(run.device)
    hist_used = used_histogram(model.codebook_sem, counts, c.bins).cpu()
    metrics = {
        "psnr": psnr(images, recon).mean().item(),
        "usage_sem": len(sem.unique()) / c.codes_sem,
        "usage_vis": len(vis.unique()) / c.codes_vis,
        "hist_kl": kl_divergence(teacher_hist, hist_after).item(),
        "hist_kl_floor": run.teacher["floor"],
        "hist_kl_used": kl_divergence(teacher_hist, hist_used).item(),
        **figures,
        "images": len(images),
        "device": device_name(run.device),
    }
    if run.inception and len(images) > 1:  # a covariance takes at least two
        inception = run.inception.to(run.device)
        originals = image_statistics("held-out images", images, inception, run.device)
        distances = reconstruction_distances(originals, recon, inception, run.device)
        metrics["rfid"] = distances["fid"]
        metrics["kid"], _ = distances["kid"]  # without the deviation
    classify = load_classifier(run)
    if classify:  # does the teacher still see the same class?
        metrics["class_agreement"] = (classify(images) == classify(recon)).float().mean().item()

    save_pairs(run.out / "reconstructions.png", images, recon)
    bins = torch.linspace(-1, 1, c.bins)
    curves = [
        (f"teacher ({Path(c.teacher).name})", bins, teacher_hist),
        ("codebook after", bins, hist_after),
        ("codebook before", bins, hist_before.cpu()),
        (f"ideal sphere, d = {c.code_dim}", bins, sphere_histogram(c.code_dim, c.bins)),
    ]
    title = f"pairwise cosines of the semantic codebook: KL {metrics['hist_kl']:.3g}"
    title += f", floor {metrics['hist_kl_floor']:.3g}"
    save_plot(run.out / "histogram.png", [Panel(title, "cosine similarity", curves, "line")])
    return metrics


@torch.no_grad()
def report_generator(run, model, generator, figures, per_class=16):
    """samples.png, a row for each of the first ten classes -> figures, a dict.

    per_class images are drawn of each class, and 12 of them shown. If the teacher is the convnet,
    the figures include how often it sees the class that was asked for.
    """
    c = run.config
    classes = run.data.classes[:10]
    labels = torch.arange(len(classes), device=run.device).repeat_interleave(per_class)
    images = torch.cat(list(generate(model, generator, labels, c, c.seed)))
    rows = [(name, images[k * per_class :][:12]) for k, name in enumerate(classes)]
    save_image_grid(run.out / "samples.png", rows, f"generated, guidance {c.guidance:g}")

    metrics = {f"generator_{name}": value for name, value in figures.items()}
    classify = load_classifier(run)
    if classify:
        right = classify(images) == labels.cpu()
        metrics["samples_class_accuracy"] = right.float().mean().item()
    return metrics


def load_convnet(teacher, device):
    """The network of a convnet teacher, in eval mode."""
    net = ConvNet(teacher["classes"]).to(device).eval()
    net.load_state_dict(teacher["convnet"])
    return net


def load_classifier(run):
    """The convnet teacher as a function: uint8 images -> classes (N,). None for other teachers."""
    if "convnet" not in run.teacher:
        return None
    net = load_convnet(run.teacher, run.device)

    def classify(images):
        parts = images.split(100)
        return torch.cat([net(to_float(part, run.device)).argmax(1).cpu() for part in parts])

    return classify


def find_inception(weights, device):
    """The FID network of the file `weights` or, if that is None, the published one in the cache.

    None, with a note, if it is not there.
    """
    path = cache_path(INCEPTION_FILE)
    if weights is None and not path.exists():
        note(
            f"FID and KID will not be measured, for {path} is not there: "
            "the first run of fid.py downloads it; or give --weights FILE"
        )
        return None
    return load_inception(weights, device)


def image_statistics(name, images, inception, device):
    """Images uint8 (N, 3, H, W) -> fid.Statistics, with each image's features.

    name: for messages.
    """
    arrays = images.permute(0, 2, 3, 1).numpy()
    return measure(name, arrays, inception, device, keep=["features"])


def reconstruction_distances(originals, recon, inception, device):
    """FID and KID of images with the Statistics of their originals, in the same order.

    recon uint8 (N, 3, H, W) -> {"fid": value, "kid": (mean, deviation)}.
    """
    statistics = image_statistics("reconstructions", recon, inception, device)
    return compare(originals, statistics, ["fid", "kid"], device, paired=True)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"


def read_log(folder):
    """The rows of log.jsonl, a list of dicts. A last line cut short by a crash is left out."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if row["stage"] and row["step"] >= 0]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} is damaged ({error}): "
            "move it away, and --resume goes on without the old curves"
        ) from None


# stage, title, style, names in log.jsonl
CURVES = [
    ("tokenizer", "PSNR of training images, dB", "line", ["psnr"]),
    ("tokenizer", "L_R and L_P, eq. (3)", "log", ["recon", "perceptual"]),
    ("tokenizer", "L_Q (1) and L_res (10)", "log", ["quantize", "residual"]),
    ("tokenizer", "L_hist (7)", "log", ["hist"]),
    ("tokenizer", "share of codes in use", "line", ["usage_sem", "usage_vis"]),
    ("tokenizer", "L_G and the discriminator's loss", "line", ["adv", "disc"]),
    ("generator", "flow matching (xar)", "log", ["flow"]),
    ("generator", "cross-entropy (far), nats", "line", ["cross_entropy"]),
    ("tokenizer", "FQGAN: contrastive loss, nats", "line", ["contrastive"]),
    ("tokenizer", "FQGAN: disentanglement", "log", ["disentangle"]),
    ("tokenizer", "FQGAN: entropy loss, nats", "line", ["entropy"]),
    ("tokenizer", "VA-VAE's L_vf", "line", ["vf"]),
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
# 4. Figure 4: what the visual and the semantic latents carry
# ================================================================================================


@torch.no_grad()
def retain(path, model, images, tokens):
    """Decode with the visual latents at a share of the positions, 0 elsewhere -> a PNG.

    With the semantic latents and without. Paper silent on which positions: random ones, and each
    share holds the smaller shares. images uint8 (N, 3, H, W), tokens (N, 2, h, w).
    """
    sem, vis = model.code_vectors(*tokens.unbind(1))  # (N, T, d) each
    res_sem, res_vis = model.residuals(sem, vis)
    sem = sem + res_sem
    vis = vis + res_vis
    positions = vis.shape[1]
    rank = torch.rand(vis.shape[:2], device=vis.device).argsort(1)  # (N, T), random permutations
    some = evenly_spaced(len(images), 12)
    rows = [("original", images[some])]
    for with_semantic, shares in ((True, (0, 25, 50, 75, 100)), (False, (25, 50, 75, 100))):
        for share in shares:
            retained = rank < share / 100 * positions  # (N, T)
            shown_sem = sem if with_semantic else torch.zeros_like(sem)
            recon = model.decode_latents(shown_sem, vis * retained[:, :, None])
            recon = to_uint8(recon).cpu()
            name = f"semantic + {share} % visual" if with_semantic else f"{share} % visual alone"
            rows.append((f"{name}: {psnr(images, recon).mean():.1f} dB", recon[some]))
    title = "what the visual and the semantic latents carry; "
    save_image_grid(path, rows, f"{title}PSNR over {len(images)} held-out images")


@torch.no_grad()
def probe(model, images, labels, n, device):
    """Figure 4 as numbers: how well a linear map of one half's code vectors tells an image.

    Ridge regression, fitted on the first n images, predicts the class and the mean colour of the
    others. images uint8 (N, 3, H, W), labels (N,) -> {"semantic" and "visual": (accuracy, R2 of
    the colour)}.
    """
    classes = torch.eye(int(labels.max()) + 1)[labels]  # (N, classes)
    colours = images.mean((2, 3), dtype=torch.float32)  # (N, 3)
    y = torch.cat([classes, colours], dim=1)
    y_mean = y[:n].mean(0)
    tokens = encode_all(model, images, torch.arange(len(images)), device).long()
    halves = {"semantic": model.codebook_sem, "visual": model.codebook_vis}
    found = {}
    for (name, codebook), index in zip(halves.items(), tokens.unbind(1)):
        x = codebook.cpu()[index].flatten(1)  # (N, h * w * d)
        x = (x - x[:n].mean(0)) / x[:n].std(0).clamp_min(1e-6)
        ridge = 0.3 * n * torch.eye(x.shape[1])
        weight = torch.linalg.solve(x[:n].T @ x[:n] + ridge, x[:n].T @ (y[:n] - y_mean))
        guess = y_mean + x[n:] @ weight
        accuracy = (guess[:, :-3].argmax(1) == labels[n:]).float().mean()
        error = (guess - y[n:])[:, -3:].square().sum()
        variance = (y_mean - y[n:])[:, -3:].square().sum()
        found[name] = (accuracy.item(), 1 - (error / variance).item())
    return found


# ================================================================================================
# 5. Table 3: how evenly the semantic latents lie
# ================================================================================================
# The protocol of VA-VAE: a random position of each image, its code vector normalised per channel,
# t-SNE to the plane, a kernel density estimate at the points themselves, and how uneven that is.
# VA-VAE's own script differs in three ways: it mirrors half of the images, normalises by the data
# set's statistics instead of the sample's, and calls scikit-learn's t-SNE, approximate, from a PCA.
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


def repeat_uniformity(codebook, tokens, runs):
    """Table 3 of semantic tokens (N, h, w) into a codebook (n, d), `runs` times.

    -> the measures of each run, a list of dicts, and the points (N, 2) of the last.
    """
    tokens = tokens.flatten(1)  # (N, T)
    progress = Progress("t-SNE run", runs)
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
    save_plot(path, [Panel(title, x_label, curves, "dots")], width=700, height=700)


# ================================================================================================
# 6. The commands
# ================================================================================================


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder of train.py")
    add("--n", type=int, help="pictures (default 64)")
    add(
        "--classes", type=int, nargs="+", metavar="K", help="classes to draw, in turn (default all)"
    )
    add("--steps", type=int, help="denoising steps a cell (default: the run's sampling_steps)")
    add("--guidance", type=float, help="guidance of the last cell; 1: none (default: the run's)")
    add(
        "--seed", type=int, default=0, help="same seed and --n, same pictures (default %(default)s)"
    )
    add(
        "--out",
        metavar="FILE",
        default="samples.png",
        help="a picture (.png), or new images as arrays (.npz) (default %(default)s)",
    )
    val = "held-out images of shapes, cifar10, imagenette, a folder, or an .npz"
    add("--reconstruct", metavar="SPEC", help=f"{val}: reconstruct them")
    add("--weights", metavar="FILE", help="of --reconstruct's FID network, else the published one")
    add(
        "--beside",
        metavar="RUN",
        nargs="+",
        default=[],
        help="with --reconstruct: other runs, for a picture with a row of each",
    )
    add("--retain", metavar="SPEC", help=f"{val}: figure 4, decode from parts of the latents")
    add("--uniformity", metavar="SPEC", help=f"{val}: table 3")
    add("--runs", type=int, help="t-SNE runs of --uniformity (default 10)")
    add("--force", action="store_true", help="overwrite the file")
    args = parser.parse()
    args.run = Path(args.run)
    args.out = Path(args.out)
    check_arguments(args)
    return args


def check_arguments(args):
    specs = [s for s in (args.reconstruct, args.retain, args.uniformity) if s]
    if len(specs) > 1:
        raise BadInput("at most one of --reconstruct, --retain, --uniformity can be given")
    if args.beside and not args.reconstruct:
        raise BadInput("--beside names runs to compare with, for --reconstruct alone")
    if args.weights and not args.reconstruct:
        raise BadInput("--weights is the network of FID and KID, of --reconstruct alone")
    of_new_images = [args.n, args.classes, args.steps, args.guidance]
    if specs and any(value is not None for value in of_new_images):
        raise BadInput("--n, --classes, --steps and --guidance are of new images alone")
    if args.runs is not None and not args.uniformity:
        raise BadInput("--runs counts the t-SNE runs of --uniformity alone")
    args.n = 64 if args.n is None else args.n
    args.runs = 10 if args.runs is None else args.runs
    if specs and args.out.suffix != ".png":
        raise BadInput(f"--out {args.out} must end in .png")
    if args.out.suffix not in (".png", ".npz"):
        raise BadInput(f"--out {args.out} must end in .png or .npz")
    if args.out.suffix == ".png" and not 0 < args.n <= 10**4:
        raise BadInput(f"--n {args.n} must lie in 1 to 10,000 for a picture (more: --out X.npz)")
    if not 0 < args.n <= 10**7:
        raise BadInput(f"--n {args.n} must lie in 1 to 10 million")
    if not 0 <= args.seed < 2**31:
        raise BadInput(f"--seed {args.seed} must lie in 0 to 2^31 - 1")
    if not 0 < args.runs <= 1000:
        raise BadInput(f"--runs {args.runs} must lie in 1 to 1,000")
    if args.out.exists() and not args.force:
        raise BadInput(f"{args.out} exists: choose another --out, or overwrite it with --force")


# What the three commands on held-out images have in common.
ValSet = namedtuple("ValSet", "data images labels tokens")


def read_val_set(model, spec, n, device):
    """The tokenizer's ValSet: n held-out images of a data SPEC, evenly spaced, and their tokens."""
    c = model.config
    data = load_data(spec, c.image_size, c.seed)
    index = evenly_spaced(len(data.val), n)
    images = read_at(data.val, index, c.image_size)
    tokens = encode_all(model, images, torch.arange(len(images)), device)
    return ValSet(data, images, data.val_labels[index], tokens)


def command_reconstruct(args, config, device):
    runs = [args.run, *map(Path, args.beside)]
    models = [load_run(run, device) for run in runs]
    for run, model in zip(runs, models):
        if model.config.image_size != config.image_size:
            raise BadInput(
                f"{run} is of images of {model.config.image_size} pixels, {args.run} of "
                f"{config.image_size}: they cannot stand side by side"
            )
    inception = find_inception(args.weights, device)
    val = read_val_set(models[0], args.reconstruct, config.eval_images, device)
    if len(val.images) < 2:
        inception = None  # a covariance takes at least two
    recons = {}
    for run, model in zip(runs, models):
        tokens = val.tokens
        if model is not models[0]:
            tokens = encode_all(model, val.images, torch.arange(len(val.images)), device)
        recons[str(run)] = decode_all(model, tokens, device)
    if args.beside:
        save_comparison(args.out, val.images, recons)
    else:
        save_pairs(args.out, val.images, recons[str(args.run)])
    if inception:
        originals = image_statistics("held-out images", val.images, inception, device)
    for run, recon in recons.items():
        message = f"{args.out}: {run}, {len(recon)} held-out images of {args.reconstruct}: "
        message += f"PSNR {psnr(val.images, recon).mean():.2f} dB"
        if inception:
            distances = reconstruction_distances(originals, recon, inception, device)
            message += f", FID {distances['fid']:.3f}, KID {distances['kid'][0]:.6f}"
        print(message)


def command_retain(args, config, device):
    model = load_run(args.run, device)
    val = read_val_set(model, args.retain, min(config.eval_images, 5000), device)
    torch.manual_seed(args.seed)
    train_index = torch.randperm(len(val.data.train))[:4000]
    measured = evenly_spaced(len(val.images), images_at_once(config))
    retain(args.out, model, val.images[measured], val.tokens[measured].to(device))
    print(f"{args.out}: {len(measured)} held-out images of {args.retain}")

    train_images = read_at(val.data.train, train_index, config.image_size)
    images = torch.cat([train_images, val.images])
    labels = torch.cat([val.data.train_labels[train_index], val.labels])
    for half, (accuracy, r2) in probe(model, images, labels, len(train_index), device).items():
        print(
            f"{half} codes alone: a linear probe finds the class of {100 * accuracy:.1f} %, "
            f"the mean colour with R2 {r2:.3f}"
        )


def command_uniformity(args, config, device):
    model = load_run(args.run, device)
    # at most the 10,000 of the paper's protocol: memory grows with the square
    val = read_val_set(model, args.uniformity, min(config.eval_images, 10000), device)
    if len(val.images) < 10:
        raise BadInput(
            f"{args.uniformity} has {len(val.images)} held-out images: the density of fewer than "
            "10 points says nothing"
        )
    torch.manual_seed(args.seed)
    # a tokenizer with a single semantic code has one codebook, the visual one
    single = config.codes_sem == 1
    codebook = (model.codebook_vis if single else model.codebook_sem).detach()
    measures, points = repeat_uniformity(codebook, val.tokens[:, int(single)], args.runs)
    save_scatter(args.out, points, val.labels, val.data.classes, measures[-1])
    figures = []
    for name in measures[0]:
        values = torch.tensor([each[name] for each in measures])
        figures.append(f"{name} {values.mean():.4f} +- {values.std(correction=0):.4f}")
    print(
        f"{args.out}: {len(points)} held-out images of {args.uniformity}: "
        f"{', '.join(figures)} over {args.runs} runs"
    )


def command_sample(args, config, device):
    classes = args.classes or list(range(config.classes))
    model = load_run(args.run, device)
    generator = load_generator(args.run, device)
    labels = torch.tensor([classes[i % len(classes)] for i in range(args.n)], device=device)

    def batches(first=0):
        return generate(model, generator, labels, config, args.seed, first)

    if args.out.suffix == ".npz":
        files = [sha256(args.run / f"{stage}.pt") for stage in ("tokenizer", "generator")]
        made_of = (classes, args.seed, asdict(config), *files)
        key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
        write_npz(args.out, labels, config.image_size, key, batches)
    else:
        images = torch.cat(list(batches()))
        columns = len(classes) if 8 <= len(classes) <= 16 else 8
        if len(classes) < 8:
            columns = len(classes) * (8 // len(classes))  # whole turns of the classes
        rows = [("", row) for row in images.split(columns)]
        save_image_grid(args.out, rows)
    listed = ", ".join(str(k) for k in args.classes) if args.classes else f"0 to {classes[-1]}"
    print(f"{args.out}: {args.n} pictures of classes {listed}")


def write_npz(path, labels, size, key, batches):
    """The images of batches(first), which yields them from image `first` on -> an .npz.

    As ADM's evaluator reads it: arr_0 uint8 (N, H, W, 3) and labels. Finished batches wait in a
    hidden file that bears `key`, a hash of what makes the images; after a stop the same command
    goes on from there.
    """
    n = len(labels)
    batch_bytes = GENERATE_BATCH * size * size * 3
    part = path.with_name(f".{path.name}.{key}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        lock(file, f"cannot write {path}: another process is drawing the same images")
        # Whole batches alone: the noise of a last, smaller one depends on its size.
        finished = min(file.tell() // batch_bytes, n // GENERATE_BATCH)
        file.truncate(finished * batch_bytes)
        done = finished * GENERATE_BATCH
        progress = Progress("sampling", n, done)
        for images in batches(done):
            file.write(images.permute(0, 2, 3, 1).numpy().tobytes())
            file.flush()
            done += len(images)
            progress.update(done)
    images = np.memmap(part, np.uint8, "r", shape=(n, size, size, 3))
    arrays = {"arr_0": images, "labels": labels.cpu().numpy()}
    write_atomically(path, lambda file: np.savez(file, **arrays))
    part.unlink()


def main():
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, _ = load_config(args.run)
    settings = asdict(config)
    if args.steps is not None:
        settings["sampling_steps"] = args.steps
    if args.guidance is not None:
        settings["guidance"] = args.guidance
    config = make_config(settings)
    for k in args.classes or []:
        if not 0 <= k < config.classes:
            raise BadInput(f"--classes {k}: the run has classes 0 to {config.classes - 1}")

    if args.reconstruct:
        command_reconstruct(args, config, device)
    elif args.retain:
        command_retain(args, config, device)
    elif args.uniformity:
        command_uniformity(args, config, device)
    else:
        command_sample(args, config, device)


if __name__ == "__main__":
    run_script(main)
