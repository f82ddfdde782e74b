"""Pictures and figures of a run.

    python sample.py runs/shapes --n 64 --guidance 2 --steps 25 --seed 1 --out grid.png     # new images
    python sample.py runs/shapes --n 10000 --out samples.npz                                # for fid.py and ADM's evaluator
    python sample.py runs/shapes --reconstruct shapes --out pairs.png                       # originals over reconstructions, PSNR
    python sample.py runs/shapes --retain shapes --out halves.png                           # figure 4: what each half carries
    python sample.py runs/shapes --uniformity shapes --out scatter.png                      # table 3: how evenly latents lie
"""
import hashlib
import signal
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # until run() takes over, Ctrl-C ends the slow imports below without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fid import WEIGHTS, fetch, frechet_distance, load_data, load_inception, measure, sha256, stream, write
from glotok import BadInput, Parser, Progress, load_config, load_run, psnr, run, spread, to_float, to_uint8, tsne, uniformity

# ---------------------------------------------------------------------------------------------------------------- drawing
INK, RULE, COLOURS = (30, 30, 30), (225, 225, 225), ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#787878", "#ff7f0e", "#17becf", "#e377c2", "#bcbd22", "#8c564b"]
def grid(path, rows, title=""):
    """rows: a list of (label, uint8 (n, 3, H, W)) -> a PNG, one labelled row each, small pictures enlarged."""
    rows = [(" ".join(label.split()), images) for label, images in rows]  # a class may be called anything
    font, gap, side = ImageFont.load_default(14), 4, max(64, rows[0][1].shape[3])
    left, top = 8 + max(int(font.getlength(label)) for label, _ in rows), 28 if title else gap
    canvas = Image.new("RGB", (left + (side + gap) * max(len(x) for _, x in rows), top + (side + gap) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 6), title, INK, font)
    for r, (label, images) in enumerate(rows):
        draw.text((4, top + r * (side + gap) + side // 2), label, INK, font, anchor="lm")
        for i, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + i * (side + gap), top + r * (side + gap)))
    write(Path(path), lambda file: canvas.save(file, "PNG"))
def grid_of_pairs(path, images, recon, n=12):
    grid(path, [("original", images[i := spread(len(images), n)]), ("reconstruction", recon[i])], f"held-out images, {psnr(images, recon).mean():.1f} dB over {len(images)}")
def plot(path, panels, columns=2, W=560, H=320):
    """panels: a list of (title, x label, [(name, xs, ys), ...], style) -> a PNG; style "line", "log" (of y) or "dots"."""
    canvas = Image.new("RGB", (W * min(columns, len(panels)), H * -(-len(panels) // columns)), "white")
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    for p, (title, x_label, lines, style) in enumerate(panels):
        left, right, top, bottom = p % columns * W + 64, p % columns * W + W - 16, p // columns * H + 50, p // columns * H + H - 44
        lines = [(name, np.asarray(xs), np.log10(np.maximum(ys, 1e-12)) if style == "log" else np.asarray(ys)) for name, xs, ys in lines]
        (x0, y0), (x1, y1) = (np.array([f(np.concatenate(axis)) for axis in list(zip(*lines))[1:]]) for f in (np.min, np.max))
        x1, y1 = x1 + (x1 == x0), y1 + 0.05 * (y1 - y0) + (y1 == y0)
        legend, place = left, lambda x, y: (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
        for x, y in zip(np.linspace(x0, x1, 5), np.linspace(y0, y1, 5)):  # grid lines and their numbers
            draw.line([place(x, y0), place(x, y1)], RULE), draw.line([place(x0, y), place(x1, y)], RULE)
            draw.text((place(x, y)[0], bottom + 4), f"{x:.4g}", INK, small, anchor="ma")
            draw.text((left - 5, place(x, y)[1]), f"{10**y if style == 'log' else y:.3g}", INK, small, anchor="rm")
        draw.text((left, top - 43), title, INK, font), draw.text(((left + right) / 2, bottom + 24), x_label, INK, small, anchor="ma")
        for colour, (name, xs, ys) in zip(COLOURS, lines):
            points = list(zip(*place(xs, ys)))
            [draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), colour) for x, y in points if style == "dots"]
            if style != "dots":
                draw.line(points if len(points) > 1 else points * 2, colour, 2)
            draw.text((legend, top - 22), name, colour, small)
            legend += draw.textlength(name, small) + 14
    write(Path(path), lambda file: canvas.save(file, "PNG"))

# ------------------------------------------------------------------------------------------------------- what a run can do
at_once = lambda model: max(1, min(200, 2**21 // model.config.image_size**2))  # images in a forward pass
@torch.no_grad()
def encode_all(model, images, at, device):
    """uint8 images (N, 3, H, W), or files; positions at (n,) -> their semantic and visual indices, int32 (n, 2, h, w), on the CPU."""
    progress, out = Progress("encoding", len(at)), []
    for part in stream(images, at.split(at_once(model)), device, model.config.image_size):
        out.append(torch.stack(model.encode(to_float(part, device)), dim=1).int().cpu())
        progress(sum(map(len, out)))
    return torch.cat(out)
@torch.no_grad()
def decode_all(model, found, device, scale=1.0):
    """Indices (N, 2, h, w), or generated latents (N, C, h, w) in units of scale -> uint8 images on the CPU."""
    decode = lambda z: model.from_latents(scale * z) if z.is_floating_point() else model.decode(*z.unbind(1))
    return torch.cat([to_uint8(decode(part.to(device))).cpu() for part in found.split(at_once(model))])
def fid_of(reference, images, device):
    """FID of uint8 images (N, 3, H, W) if the network is there; None, and a line that says why, if not."""
    if not (path := fetch(WEIGHTS, download=False)).exists():
        return print(f"note: FID is not measured, for {path} is not there; fid.py downloads it", file=sys.stderr)
    net = load_inception(None, device)
    one, two = (measure(what, x.permute(0, 2, 3, 1).numpy(), net, device)[:2] for what, x in (("reference", reference), ("images", images)))
    return frechet_distance(*one, *two)
@torch.no_grad()
def generate(model, generator, scale, labels, steps, guidance, seed, first=0, batch=100):
    """Labels (n,) -> uint8 images on the CPU, a batch (100, 3, H, W) at a time from image `first` on; each batch has its own seed."""
    for i in range(first, len(labels), batch):
        torch.manual_seed(seed + i)
        yield decode_all(model, generator.sample(labels[i:i + batch], steps, guidance), labels.device, scale)  # latents (xar) or indices (far)
def write_npz(path, labels, size, key, draw, batch=100):
    """The images of draw(first), a generator of batches from image `first` on -> .npz of arr_0 uint8 (N, H, W, 3) and labels, as ADM's
    evaluator reads it. Finished batches wait in a hidden file that bears `key`: after a stop the same command goes on from there."""
    part, whole = path.with_name(f".{path.name}.{key}.part"), batch * size * size * 3
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        done = min(file.tell() // whole * batch, len(labels))
        file.truncate(done // batch * whole)
        progress = Progress("sampling", len(labels), done)
        for images in draw(done):
            file.write(images.permute(0, 2, 3, 1).numpy().tobytes()), file.flush()
            progress(done := done + len(images))
    images = np.memmap(part, np.uint8, "r", shape=(len(labels), size, size, 3))
    write(path, lambda file: np.savez(file, arr_0=images, labels=labels.cpu().numpy()))
    part.unlink()
@torch.no_grad()
def retain(path, model, original, indices):
    """Figure 4: decode with the visual latents at a share of the positions (paper silent: random ones, each share within the next), 0 elsewhere."""
    sem, vis = model.composite(*indices.unbind(1))  # (B, T, d)
    order, rows = torch.rand(vis.shape[:2], device=vis.device).argsort(1).argsort(1), [("original", original[spread(len(original), 12)])]
    for semantic, share in [(1, share) for share in (0, 25, 50, 75, 100)] + [(0, share) for share in (25, 50, 75, 100)]:
        out = to_uint8(model.decode_latents(semantic * sem, vis * (order < share / 100 * vis.shape[1])[:, :, None])).cpu()
        rows.append((f"{'semantic + ' * semantic}{share} % visual{' alone' * (1 - semantic)}: {psnr(original, out).mean():.1f} dB", out[spread(len(out), 12)]))
    grid(path, rows, f"what the visual and the semantic latents carry; PSNR over {len(original)} held-out images")
@torch.no_grad()
def probe(model, images, labels, n, device):
    """Figure 4 as numbers: what linear (ridge) regression from the code vectors of one half, fitted on the first n images, makes of the class and
    of the mean colour of the others: images uint8 (N, 3, H, W), labels (N,) -> {half: (accuracy, R2 of the colour)}."""
    y, found = torch.cat([torch.eye(int(labels.max()) + 1)[labels], images.mean((2, 3), dtype=torch.float32)], dim=1), {}
    indices = encode_all(model, images, torch.arange(len(images)), device).long()
    for name, codes, index in zip(("semantic", "visual"), (model.codebook_sem, model.codebook_vis), indices.unbind(1)):
        x = codes.cpu()[index].flatten(1)  # (N, h * w * d)
        x, mean = (x - x[:n].mean(0)) / x[:n].std(0).clamp_min(1e-6), y[:n].mean(0)
        guess = mean + x[n:] @ torch.linalg.solve(x[:n].T @ x[:n] + 0.3 * n * torch.eye(x.shape[1]), x[:n].T @ (y[:n] - mean))
        wrong, apart = ((v - y[n:])[:, -3:].square().sum() for v in (guess, mean))
        found[name] = (guess[:, :-3].argmax(1) == labels[n:]).float().mean().item(), 1 - (wrong / apart).item()
    return found
def measure_uniformity(path, index, codes, labels, classes, runs):
    """Table 3, as VA-VAE: one random position of each image, its code vector normalised per channel, t-SNE to the plane, density
    there; over `runs` runs. index (N, h, w) into codes (n, d) -> {measure: (mean, deviation)}; the scatter of the last run as a PNG."""
    found, progress, index = [], Progress("t-SNE run", runs), index.flatten(1)
    for run_ in range(runs):
        z = codes[index.gather(1, torch.randint(index.shape[1], (len(index), 1)))[:, 0].to(codes.device)]  # (N, d)
        found.append(uniformity(points := tsne((z - z.mean(0)) / z.std(0).clamp_min(1e-9)).cpu()))
        progress(run_ + 1)
    plot(path, [(f"t-SNE of {len(index)} semantic latents, coloured by class", "density CV {density_cv:.3f}, normalized entropy "
                 "{normalized_entropy:.4f}, Gini {gini:.4f}".format(**found[-1]),
                 [(" ".join(name.split()), *points[labels == k].T) for k, name in enumerate(classes[:10]) if (labels == k).any()], "dots")], W=700, H=700)
    return {k: torch.std_mean(torch.tensor([f[k] for f in found]), correction=0)[::-1] for k in found[0]}

def main():
    parser = Parser()
    parser.add_argument("run", metavar="RUN", help="a run folder of train.py")
    parser.add_argument("--n", type=int, default=64, help="pictures (default %(default)s)")
    parser.add_argument("--classes", type=int, nargs="+", metavar="K", help="the classes to draw, in turn (default all)")
    parser.add_argument("--steps", type=int, help="denoising steps a cell (default: the run's sampling_steps)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance of the last cell, 1 is none (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default %(default)s)")
    parser.add_argument("--out", metavar="FILE", default="samples.png", help="a picture (.png), or new images as arrays (.npz) (default %(default)s)")
    for flag, what in (("reconstruct", "reconstruct them"), ("retain", "figure 4: decode from parts of the latents"), ("uniformity", "table 3")):
        parser.add_argument(f"--{flag}", metavar="SPEC", help=f"held-out images of shapes, cifar10, a folder, or an .npz: {what}")
    parser.add_argument("--runs", type=int, default=10, help="t-SNE runs of --uniformity (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    args = parser.parse(__doc__)
    folder, device, out = Path(args.run), torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(args.out)
    config = replace(load_config(folder)[0], **{k: v for k, v in {"sampling_steps": args.steps, "guidance": args.guidance}.items() if v is not None})
    specs = list(filter(None, (args.reconstruct, args.retain, args.uniformity)))
    if len(specs) > 1 or out.suffix not in (".png", ".png" if specs else ".npz") or not (
            0 < args.n <= 10**(7 if out.suffix == ".npz" else 4) and 0 <= args.seed < 2**31 and 0 < args.runs <= 1000):
        raise BadInput(f"--n {args.n} must lie in 1 to 10,000 (.npz: 10 million), --runs {args.runs} in 1 to 1,000, --seed {args.seed} in 0 to 2^31 - 1, "
                       f"--out {out} end in .png (samples: or .npz), and at most one of --reconstruct, --retain, --uniformity be given")
    if strange := [k for k in args.classes or [] if not 0 <= k < config.classes]:
        raise BadInput(f"--classes {strange[0]}: the run has classes 0 to {config.classes - 1}")
    if out.exists() and not args.force:
        raise BadInput(f"{out} exists: choose another --out, or overwrite it with --force")
    if specs:
        model, data = load_run(folder, device), load_data(specs[0], config.image_size, config.seed)
        i = spread(len(data.held), min(config.eval_images, 5000) if args.retain else config.eval_images)
        labels, said = data.held_labels[i], f"{out}: {len(i)} held-out images of {specs[0]}"
        torch.manual_seed(args.seed)
        read = lambda images, at: torch.cat([*stream(images, at.split(100), torch.device("cpu"), config.image_size)])
        indices = encode_all(model, held := read(data.held, i), torch.arange(len(i)), device)
        if args.retain:
            few, some = spread(len(held), at_once(model)), torch.randperm(len(data.train))[:4000]
            retain(out, model, held[few], indices[few].to(device))
            found = probe(model, torch.cat([read(data.train, some), held]), torch.cat([data.train_labels[some], labels]), len(some), device)
            said += "".join(f"\n{half} codes alone: a linear probe finds the class of {100 * right:.1f} %, the mean colour with R2 {r2:.3f}" for half, (right, r2) in found.items())
        elif args.uniformity:
            found = measure_uniformity(out, indices[:, 0], model.codebook_sem.detach(), labels, data.classes, args.runs)
            said += f": {', '.join(f'{k} {mean:.4f} +- {std:.4f}' for k, (mean, std) in found.items())} over {args.runs} runs"
        else:
            recon = decode_all(model, indices, device)
            grid_of_pairs(out, held, recon)
            said += f": PSNR {psnr(held, recon).mean():.2f} dB" + ("" if (fid := fid_of(held, recon, device)) is None else f", FID {fid:.3f}")
        return print(said)
    classes, (model, generator, scale) = args.classes or [*range(config.classes)], load_run(folder, device, generator=True)
    labels = torch.tensor([classes[i % len(classes)] for i in range(args.n)], device=device)
    draw = lambda first=0: generate(model, generator, scale, labels, config.sampling_steps, config.guidance, args.seed, first)
    if out.suffix == ".npz":
        made_of = repr((classes, config.sampling_steps, config.guidance, args.seed, sha256(folder / "tokenizer.pt"), sha256(folder / "generator.pt")))
        write_npz(out, labels, config.image_size, hashlib.sha256(made_of.encode()).hexdigest()[:12], draw)
    else:
        grid(out, [("", row) for row in torch.cat(list(draw())).split(max(len(classes), 8))])
    print(f"{out}: {args.n} pictures of classes {', '.join(map(str, classes))}")

if __name__ == "__main__":
    run(main)
