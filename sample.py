"""Pictures of a run.

    python sample.py runs/shapes --n 64 --guidance 2 --steps 25 --seed 1 --out grid.png     # new images
    python sample.py runs/shapes --reconstruct shapes --out pairs.png                       # originals over reconstructions, PSNR
"""
import argparse
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fid import Progress, load_data, psnr, run, to_float, to_uint8, write
from glotok import XAR, BadInput, Config, GloTok, choose

# ---------------------------------------------------------------------------------------------------------------- drawing

INK, PAPER, COLOURS = (30, 30, 30), (255, 255, 255), [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (120, 120, 120)]


def grid(path, rows, title=""):
    """rows: a list of (label, uint8 (n, 3, H, W)) -> a PNG, one labelled row each, small pictures enlarged."""
    h, w = rows[0][1].shape[2:]
    zoom = max(1, 64 // h)
    font, left, top, gap = ImageFont.load_default(14), 8 + 8 * max(len(label) for label, _ in rows), 28 if title else 4, 4
    h, w = h * zoom + gap, w * zoom + gap
    canvas = Image.new("RGB", (left + w * max(len(x) for _, x in rows), top + h * len(rows)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), title, INK, font)
    for r, (label, images) in enumerate(rows):
        draw.text((4, top + r * h + h // 2 - 10), label, INK, font)
        for i, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            canvas.paste(picture.resize((w - gap, h - gap), Image.Resampling.NEAREST), (left + i * w, top + r * h))
    write(Path(path), lambda file: canvas.save(file, "PNG"))


def spread(n, k):
    """Up to k positions, evenly over range(n): folders come sorted by class."""
    return torch.arange(min(n, k)) * n // min(n, k)


def grid_of_pairs(path, images, recon, n=12):
    i = spread(len(images), n)
    grid(path, [("original", images[i]), ("reconstruction", recon[i])], f"held-out images, {psnr(images, recon).mean():.1f} dB over {len(images)}")


def plot(path, panels, columns=2):
    """panels: a list of (title, x label, [(name, xs, ys), ...], log y?) -> a PNG of line plots."""
    W, H, left, top, right, bottom = 560, 320, 64, 50, 16, 44
    canvas = Image.new("RGB", (W * min(columns, len(panels)), H * -(-len(panels) // columns)), PAPER)
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(12)
    for p, (title, x_label, lines, log) in enumerate(panels):
        ox, oy = p % columns * W, p // columns * H
        lines = [(n, list(map(float, xs)), [max(float(y), 1e-12) if log else float(y) for y in ys]) for n, xs, ys in lines if len(xs)]
        every_x, every_y = [x for _, xs, _ in lines for x in xs], [y for _, _, ys in lines for y in ys]
        y_of = (lambda y: torch.tensor(y).log10().item()) if log else (lambda y: y)
        x0, x1, y0, y1 = min(every_x), max(every_x), y_of(min(every_y)), y_of(max(every_y))
        x1, y1 = x1 + (x1 == x0), y1 + 0.05 * (y1 - y0) + (y1 == y0)
        place = lambda x, y: (ox + left + (x - x0) / (x1 - x0) * (W - left - right), oy + H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom))
        for k in range(5):  # grid lines and their numbers
            x, y = x0 + (x1 - x0) * k / 4, y0 + (y1 - y0) * k / 4
            draw.line([place(x, y0), place(x, y1)], (225, 225, 225)), draw.line([place(x0, y), place(x1, y)], (225, 225, 225))
            draw.text((place(x, y0)[0], oy + H - bottom + 4), f"{x:.4g}", INK, small, anchor="ma")
            draw.text((ox + left - 5, place(x0, y)[1]), f"{10**y if log else y:.3g}", INK, small, anchor="rm")
        draw.text((ox + left, oy + 7), title, INK, font)
        draw.text((ox + (W + left - right) / 2, oy + H - 20), x_label, INK, small, anchor="ma")
        legend = ox + left
        for i, (name, xs, ys) in enumerate(lines):
            points = [place(x, y_of(y)) for x, y in zip(xs, ys)]
            draw.line(points if len(points) > 1 else points * 2, COLOURS[i % len(COLOURS)], 2)
            draw.text((legend, oy + 28), name, COLOURS[i % len(COLOURS)], small)
            legend += draw.textlength(name, small) + 14
    write(Path(path), lambda file: canvas.save(file, "PNG"))


# ----------------------------------------------------------------------------------------------------------- reading a run


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage text
        raise BadInput(message)

    def parse(self, argv):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            choose(unknown[0].split("=")[0], list(self._option_string_actions), "flag")
            raise BadInput(f"what is {unknown[0]!r}?")
        return args


def load_config(out):
    """The Config of the run in folder `out`, and the name of its preset."""
    try:
        saved = json.loads((out / "config.json").read_text())
        preset = saved.pop("preset")
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}), preset
    except FileNotFoundError:
        raise BadInput(f"no run in {out}: there is no {out / 'config.json'}") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{out / 'config.json'} is not a run's settings: {error}") from None


def load_checkpoint(path, device="cpu"):
    """A file of tensors and plain values; never runs code from it."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"there is no {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise BadInput(f"cannot read {path}: {str(error).splitlines()[0] if str(error) else 'damaged'}") from None


@torch.no_grad()
def reconstruct(model, images, device):
    """uint8 images (N, 3, H, W) -> reconstructions, uint8 on the CPU, and both index grids (N, h, w)."""
    progress, out = Progress("reconstructing", len(images)), []
    for part in images.split(100):
        indices = model.encode(to_float(part, device))
        out.append((to_uint8(model.decode(*indices)).cpu(), *(i.cpu() for i in indices)))
        progress(sum(len(o[0]) for o in out))
    return tuple(map(torch.cat, zip(*out)))


def restore(path, parts, device):
    """Load the states in a checkpoint into parts, {name: module or optimizer}; -> everything in the checkpoint."""
    saved = load_checkpoint(path, device)
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise BadInput(f"{path} does not fit the settings in config.json beside it: {str(error).splitlines()[0]}") from None
    return saved


def load_tokenizer(folder, device):
    """The trained tokenizer of a run."""
    model = GloTok(load_config(folder)[0]).to(device)
    restore(folder / "tokenizer.pt", {"model": model}, device)
    return model.eval()


def load_generator(folder, model, device):
    """The trained generator of a run (its moving average) and the deviation that its latents were divided by."""
    if not (folder / "generator.pt").exists():
        raise BadInput(f"{folder} has no generator yet: python train.py --stage generator --resume --out {folder}")
    generator = XAR(model.config).to(device)
    return generator.eval(), restore(folder / "generator.pt", {"ema": generator}, device)["kept"]


def generate(model, generator, scale, labels, steps, guidance, seed):
    """Labels (n,) -> uint8 images (n, 3, H, W) on the CPU; the same for the same seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return to_uint8(model.from_latents(scale * generator.sample(labels, steps, guidance))).cpu()


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run folder of train.py")
    parser.add_argument("--n", type=int, default=64, help="pictures (default %(default)s)")
    parser.add_argument("--classes", type=int, nargs="+", metavar="K", help="the classes to draw, in turn (default all)")
    parser.add_argument("--steps", type=int, help="denoising steps a cell (default: the run's sampling_steps)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance of the last cell, 1 is none (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same pictures (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.png", default="samples.png", help="the picture (default %(default)s)")
    parser.add_argument("--reconstruct", metavar="SPEC", help="reconstruct the held-out images of SPEC: shapes, cifar10, a folder, or an .npz")
    parser.add_argument("--force", action="store_true", help="overwrite the picture")
    args = parser.parse(argv)
    folder, device = Path(args.run), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, _ = load_config(folder)
    steps = config.sampling_steps if args.steps is None else args.steps
    guidance = config.guidance if args.guidance is None else args.guidance
    replace(config, sampling_steps=steps, guidance=guidance)  # checks their ranges
    if args.n < 1 or args.seed < 0 or Path(args.out).suffix != ".png":
        raise BadInput(f"--n {args.n} must be at least 1, --seed {args.seed} from 0 up, and --out {args.out} end in .png")
    if strange := [k for k in args.classes or [] if not 0 <= k < config.classes]:
        raise BadInput(f"--classes {strange[0]}: the run has classes 0 to {config.classes - 1}")
    if Path(args.out).exists() and not args.force:
        raise BadInput(f"{args.out} exists: choose another --out, or overwrite it with --force")
    model = load_tokenizer(folder, device)
    if args.reconstruct:
        held = load_data(args.reconstruct, config.image_size, config.seed).held
        held = held[spread(len(held), config.eval_images)]
        recon = reconstruct(model, held, device)[0]
        grid_of_pairs(args.out, held, recon)
        print(f"{args.out}: PSNR {psnr(held, recon).mean():.2f} dB over {len(held)} held-out images of {args.reconstruct}")
        return
    classes = args.classes or list(range(config.classes))
    labels = torch.tensor([classes[i % len(classes)] for i in range(args.n)], device=device)
    images = generate(model, *load_generator(folder, model, device), labels, steps, guidance, args.seed)
    grid(args.out, [("", row) for row in images.split(max(len(classes), 8))])
    print(f"{args.out}: {args.n} pictures of classes {', '.join(map(str, classes))}")


if __name__ == "__main__":
    run(main)
