"""GloTok (Zhao et al., AAAI 2026, arXiv 2511.14184) in one file, to be read beside the paper.

The idea. An image tokenizer turns a picture into a small grid of integers. Generators learn faster when those tokens are
semantic, so recent tokenizers copy a pre-trained vision model's features, image by image. GloTok looks at the whole data
set instead: it summarises the pre-trained model once, as the histogram of cosine similarities between the centres of its
features (40 numbers), and trains its own semantic codebook to have that same histogram. Training then never touches the
pre-trained model. A one-block transformer predicts what quantization threw away and adds it back before the decoder.

    image --encoder--> Z --adapters--> Z_sem, Z_vis --quantizers--> Zhat_sem, Zhat_vis --residual modules--> + --decoder--> image
                                       codebook C_sem follows the teacher's histogram (eq. 7); C_vis is free

The paper's own ideas come first, in its order and with its equation numbers; borrowed networks, k-means and t-SNE last. "Paper silent" marks
what it leaves open and we chose. Beside this file train.py trains, sample.py makes pictures, fid.py reads data and measures.
"""
import argparse
import contextlib
import difflib
import functools
import json
import math
import pickle
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import gaussian_kde
from torch.autograd.function import once_differentiable

class BadInput(ValueError):
    """What the user gave cannot be used. The scripts print its one line and exit with status 2."""

# ------------------------------------------------------------------------------------------------------- configuration
def setting(default, help, low=0, high=1e9):
    """A field of Config: its default, one line of help for the command line, and its permitted range (numbers only)."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))

@dataclass(frozen=True)
class Config:
    """Every setting of models, losses and training. The defaults are preset "shapes"; train.py has a flag for each."""
    data: str = setting("shapes", "shapes, cifar10, a folder of images, or an .npz of uint8 images (N, H, W, 3)")
    teacher: str = setting("convnet", "convnet, dinov2, sphere, or FILE[:TENSOR] of vectors (.npy, .npz, .pt, .pth)")
    teacher_centres: int = setting(1024, "k-means centres that stand for the teacher's features", 2)
    image_size: int = setting(32, "height and width of the images, pixels", 8, 4096)
    # the network (VQGAN's encoder and decoder; each level after the first halves the picture)
    patch: int = setting(2, "pixels folded into channels, in each direction, before the first level (the paper: 1)", 1, 16)
    channels: int = setting(32, "channels of the first level", 4, 4096)
    channel_mult: tuple = setting((1, 1), "channels of each level, times `channels`", 1, 64)
    res_blocks: int = setting(1, "residual blocks a level (the decoder has one more)", 1, 16)
    z_channels: int = setting(32, "channels of Z, the encoder's output", 1, 8192)
    adapter_layers: int = setting(0, "transformer layers in each adapter; 0 is a 1x1 convolution alone", 0, 64)
    width: int = setting(64, "width of adapters and residual modules", 8, 8192)
    heads: int = setting(4, "attention heads in adapters and residual modules", 1, 128)
    codes_sem: int = setting(256, "codes in the semantic codebook", 2, 2**20)
    codes_vis: int = setting(768, "codes in the visual codebook", 2, 2**20)
    code_dim: int = setting(8, "dimension of a code vector", 2, 4096)
    # the losses, eqs. (3) and (13); a weight of 0 switches a loss off
    beta: float = setting(0.25, "weight of the commitment term in eq. (1)")
    lambda_recon: float = setting(1.0, "weight of L_R, the squared error")
    lambda_quantize: float = setting(0.3, "weight of L_Q, eq. (1)")
    lambda_perceptual: float = setting(0.0, "weight of L_P, LPIPS")
    lambda_adv: float = setting(0.0, "weight of L_G, the adversarial loss")
    lambda_res: float = setting(0.5, "weight of L_res, eq. (10); 0 removes the residual modules")
    lambda_hist: float = setting(0.01, "weight of L_hist, eq. (7)")
    semantic: str = setting("global", "global: L_hist; local: the rival, a head on Zhat_sem imitates the teacher network image by image; none")
    lambda_local: float = setting(0.5, "weight of the local loss, 1 - cosine (FQGAN's weight)")
    bins: int = setting(40, "bins N of the similarity histogram", 2, 4096)
    adv_start: int = setting(20000, "step at which the discriminator enters")
    adv_ramp: int = setting(2000, "steps over which lambda_adv then grows to its full value")
    adv_adaptive: int = setting(1, "1: VQGAN's adaptive weight of L_G; 0: the plain weight", 0, 1)
    disc_channels: int = setting(64, "channels of the discriminator's first layer", 1, 4096)
    disc_layers: int = setting(3, "strided layers of the discriminator (3: a 70x70 patch)", 1, 8)
    disc_lr: float = setting(5e-4, "learning rate of the discriminator's Adam", 0, 1)
    # the generator
    generator: str = setting("xar", "xar, on the combined latents, or the rival far, on indices")
    classes: int = setting(6, "number of classes (train.py counts them in the data)", 1, 10**6)
    cell: int = setting(4, "tokens in each direction of a cell, xAR's unit of generation", 1, 1024)
    gen_width: int = setting(96, "width of xAR", 8, 8192)
    gen_layers: int = setting(5, "transformer blocks of xAR", 1, 200)
    gen_heads: int = setting(4, "attention heads of xAR", 1, 128)
    label_dropout: float = setting(0.1, "share of labels hidden in training, for classifier-free guidance", 0, 1)
    latent_residual: int = setting(0, "1: xAR learns the latents after eqs. (11), (12); 0: the code vectors before", 0, 1)
    snap: int = setting(0, "1: move each generated vector to the nearest code (latent_residual 0 only)", 0, 1)
    stochastic: int = setting(0, "1: sample by Euler-Maruyama, as xAR; 0: by Euler", 0, 1)
    top_k: int = setting(0, "far: sample among the k likeliest codes; 0: among all")
    guidance: float = setting(5.0, "classifier-free guidance (xar: of the last cell); 1 is none", 0, 100)
    sampling_steps: int = setting(10, "denoising steps a cell", 1, 10000)
    generator_steps: int = setting(3000, "training steps of the generator", 1)
    gen_batch: int = setting(16, "images a step, over all processes", 1)
    gen_lr: float = setting(3e-3, "learning rate of AdamW (betas 0.9, 0.96)", 0, 1)
    gen_decay: float = setting(0.02, "AdamW's weight decay", 0, 10)
    gen_warmup: int = setting(50, "steps over which the learning rate rises from 0")
    gen_cooldown: float = setting(0.5, "last share of the steps, over which the learning rate falls to 0, half a cosine", 0, 1)
    ema: float = setting(0.995, "decay of the moving average of the weights, which samples", 0, 1)
    # training
    tokenizer_steps: int = setting(1300, "training steps of the tokenizer", 1)
    batch_size: int = setting(16, "images a step, over all processes", 1)
    lr: float = setting(3e-3, "learning rate of Adam", 0, 1)
    beta1: float = setting(0.9, "Adam's first beta", 0, 0.999999)
    beta2: float = setting(0.95, "Adam's second beta", 0, 0.999999)
    warmup: int = setting(20, "steps over which the learning rate rises from 0")
    cooldown: float = setting(0.4, "last share of the steps, over which the learning rate falls to 0, half a cosine", 0, 1)
    clip: float = setting(1.0, "largest norm of the gradient; 0 does not clip")
    revive_every: int = setting(20, "steps between revivals of unused codes; 0 never revives")
    flip: int = setting(1, "1: mirror half of the training images", 0, 1)
    accumulate: int = setting(1, "parts of a process's batch that pass one after the other, to save memory", 1)
    compile: int = setting(0, "1: torch.compile the networks, if a compiler is there", 0, 1)
    precision: str = setting("auto", "float32, bf16 (autocast), or auto: bf16 where it is faster")
    eval_images: int = setting(1000, "held-out images that the final figures are taken on", 1)
    save_every: int = setting(200, "steps between checkpoints", 1)
    seed: int = setting(0, "seed of weights, data order and built-in data", 0, 2**31)
    def __post_init__(self):
        for f in fields(self):
            value, low, high, kind = getattr(self, f.name), f.metadata["low"], f.metadata["high"], type(f.default)
            if not isinstance(value, (int, float) if kind is float else kind):
                raise BadInput(f"{f.name} is {value!r}: it must be of type {kind.__name__}")
            for v in value if kind is tuple else [value]:
                if kind is not str and not low <= v <= high:  # NaN fails every comparison
                    raise BadInput(f"{f.name} is {v}: it must lie in [{low:g}, {high:g}]")
        for wrong, said in (
                (not self.channel_mult or self.image_size % self.factor,
                 f"image_size is {self.image_size}: {len(self.channel_mult)} levels of patch {self.patch} need a multiple of {self.factor}"),
                (self.width % self.heads, f"width is {self.width}: it must be a multiple of heads, {self.heads}"),
                (self.grid % self.cell, f"cell is {self.cell}: it must divide the grid of {self.grid} tokens"),
                (self.gen_width % (4 * self.gen_heads), f"gen_width is {self.gen_width}: it must be a multiple of 4 gen_heads, for 2-D rotary positions"),
                (self.semantic not in ("global", "local", "none") or self.generator not in ("xar", "far"),
                 f"semantic is {self.semantic!r}, one of global, local, none; generator is {self.generator!r}, one of xar, far"),
                (self.semantic == "local" and self.teacher not in ("convnet", "dinov2"), "semantic local imitates a network: --teacher convnet or dinov2"),
                (self.precision not in ("auto", "bf16", "float32"), f"precision is {self.precision!r}: it must be auto, bf16 or float32")):
            if wrong:
                raise BadInput(said)
    factor = property(lambda self: self.patch * 2 ** (len(self.channel_mult) - 1))  # pixels a token covers in each direction
    grid = property(lambda self: self.image_size // self.factor)  # tokens in each direction

PRESETS = {
    "shapes": Config(),
    "cifar10": Config(
        data="cifar10", teacher_centres=2048, patch=1, channels=32, channel_mult=(1, 2, 4), res_blocks=2, z_channels=128, width=128, codes_sem=512,
        codes_vis=1536, tokenizer_steps=20000, batch_size=128, lr=1e-3, warmup=100, eval_images=10000, save_every=500,
        lambda_adv=0.1, adv_start=15000, disc_layers=2,
        classes=10, gen_width=384, gen_layers=8, gen_heads=6, generator_steps=40000, gen_batch=256, gen_lr=5e-4, gen_warmup=1000,
        gen_cooldown=0.25, ema=0.9995, sampling_steps=40),
    "imagenet256": Config(  # section 4.1, and FQGAN's and VQGAN's code where the paper points at them
        data="imagenet", teacher="dinov2", teacher_centres=4096, image_size=256, patch=1, channels=128, channel_mult=(1, 1, 2, 2, 4),
        res_blocks=2, z_channels=256, adapter_layers=6, width=512, heads=8, codes_sem=4096, codes_vis=12288,
        lambda_quantize=1.0, lambda_perceptual=1.0, lambda_adv=0.5, tokenizer_steps=800730, batch_size=240, lr=2e-4, disc_lr=2e-4, warmup=0, cooldown=0.0,
        eval_images=50000, save_every=2000,  # 150 epochs of 1,281,167 images are 800,730 steps of 240
        # xAR-B as published: 800 epochs, 100 of warm-up, the last 200 cool-down; lr 5e-5 x 2048 / 256. H: width 1280, 40 layers, 16 heads
        classes=1000, cell=8, gen_width=768, gen_layers=16, gen_heads=12, generator_steps=500456, gen_batch=2048, gen_lr=4e-4,
        gen_warmup=62557, gen_cooldown=0.25, ema=0.9999, stochastic=1, guidance=2.7, sampling_steps=50),
}
PRESETS["imagenet256-2x"] = Config(**{**PRESETS["imagenet256"].__dict__, "codes_sem": 16384, "codes_vis": 16384})

def choose(name, options, what):
    """options[name]; BadInput naming the nearest option if there is none."""
    if name not in options:
        raise BadInput(f"no {what} {name!r}; did you mean {difflib.get_close_matches(name, options, 1, 0)[0]!r}? There are: {', '.join(options)}")
    return options[name]

# -------------------------------------------------------------------------------------------------------- quantizer (1)
# A quantizer replaces each feature by the nearest vector of a learned codebook C (n, d). Paper silent on the metric; as
# FQGAN we put features and codes on the unit sphere, where the nearest in angle is the nearest in distance:
# ||z - c||^2 = 2 - 2 z.c. No code can then win by its length alone, and cosines are what eq. (4) compares anyway.
#
# argmin has no gradient, so each side gets its own. The codebook follows the features, the encoder commits to the codes:
#     L_Q = ||sg[Z] - Zhat||^2 + beta ||sg[Zhat] - Z||^2                                                            (1)
#           moves the codebook     moves the encoder
# beta < 1 because the codebook should do most of the walking. (A widely copied bug has beta on the first term.) The
# decoder's gradient crosses the gap unchanged, "straight through": forward Zhat, backward the identity onto Z.

@contextlib.contextmanager
def exact(device):
    """Products inside are in float32, though autocast and TF32 may reign outside. Near codes differ in the third decimal; bf16 keeps two."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

def straight_through(z, codes):
    """Value of codes, gradient of z. Written so that the value is exact: z - sg[z] is 0, while z + (codes - z) rounds."""
    return codes.detach() + (z - z.detach())

class Quantizer(nn.Module):
    """Cosine look-up in a codebook of n unit vectors of dimension d."""
    def __init__(self, n, d, beta):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(n, d), dim=1))
        self.register_buffer("hits", torch.zeros(n))  # how often each code was used since the last revival
        self.beta, self.recent = beta, None  # recent: the features of the last training batch
    codebook = property(lambda self: F.normalize(self.weight, dim=1))  # (n, d), on the unit sphere
    def look_up(self, z, chunk=2**24):
        """Unit features z (..., d) -> int64 indices (...). In chunks: never more than 2^24 similarities in memory."""
        codes, flat = self.codebook.detach(), z.detach().flatten(0, -2)
        with exact(z.device):
            return torch.cat([(part @ codes.T).argmax(1) for part in flat.split(max(1, chunk // len(codes)))]).view(z.shape[:-1])
    def forward(self, z):
        """Features z (B, T, d) -> unit z, code vectors with gradient to the codebook (both float32), indices, L_Q."""
        with exact(z.device):
            z = F.normalize(z.float(), dim=-1)  # (B, T, d)
            index = self.look_up(z)  # (B, T)
            codes = F.embedding(index, self.codebook)  # (B, T, d)
            loss = F.mse_loss(codes, z.detach()) + self.beta * F.mse_loss(z, codes.detach())  # eq. (1), mean over elements
        if self.training:
            self.hits += torch.bincount(index.flatten(), minlength=len(self.hits))
            self.recent = z.detach().flatten(0, 1)
        return z, codes, index, loss
    @torch.no_grad()
    def revive(self):
        """Move codes that hardly any feature chose since the last call onto features of the last batch. NOT in the paper. Only chosen codes
        get gradient from eq. (1), so unlucky ones die early, and on small data most do. Several processes all do what process 0 does."""
        pick = self.recent[torch.randint(len(self.recent), (len(self.hits),), device=self.recent.device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.hits)
            torch.distributed.broadcast(pick, 0)
        self.weight.copy_(torch.where((self.hits < 0.05 * self.hits.mean())[:, None], pick, self.weight))
        self.hits.zero_()

# ----------------------------------------------------------------------------------- histogram relation loss (4)-(7)
# How do the vectors of a codebook lie to one another? Take all pairwise cosines, each code with itself included,
#     D = { cos(t_i, t_j) : t_i, t_j in C, i <= j },       M = n (n + 1) / 2 numbers in [-1, 1],                   (4)
# and describe their distribution by N bins with centres
#     B_k = -1 + 2 k / (N - 1),   k = 0 .. N - 1.                                                                   (5)
# A count per bin has no gradient, so each similarity falls into all bins a little, with Gaussian weight:
#     p_k = sum over D of exp(-alpha (D - B_k)^2),       P = p / sum(p).                                            (6)
# The diagonal (i = j) adds n times D = 1: a share 2 / (n + 1) in the last bins, the same constant for any codebook of that
# size. It has no gradient, and keeps log P finite at 1 for student and teacher alike.
#
# Paper silent: alpha. A similarity should weigh the same wherever it falls between two centres, or the histogram would
# favour some places. By Poisson summation, Gaussians a distance w = 2 / (N - 1) apart add up to
#     sum_k exp(-alpha (x - k w)^2) = sqrt(pi / alpha) / w * (1 + 2 exp(-pi^2 / (alpha w^2)) cos(2 pi x / w) + ...).
# alpha = 1 / w^2 leaves a ripple of 2 exp(-pi^2) = 1e-4. A larger alpha ripples (alpha = 4 / w^2: 17 %), a smaller one blurs.
ALPHA = ((40 - 1) / 2) ** 2  # 380.25 = 1 / w^2 at the paper's N = 40 bins

def bin_centres(bins, like):
    return torch.linspace(-1, 1, bins, dtype=like.dtype, device=like.device)  # (5)
def relation_histogram_direct(codes, bins=40, alpha=ALPHA):
    """Eqs. (4)-(6) as printed: codes (n, d) float -> (bins,), sum 1. The reference; memory M * bins (21 GB at n = 16,384)."""
    t = F.normalize(codes, dim=1)
    i, j = torch.triu_indices(len(t), len(t), device=t.device)
    similarity = (t @ t.T)[i, j]  # (4)  (M,)
    p = torch.exp(-alpha * (similarity[:, None] - bin_centres(bins, t)) ** 2).sum(0)  # (6)  (bins,)
    return p / p.sum()

# The same in a hundredth of the time. All M similarities act through N numbers, and each is acted upon by one scalar:
#     dL/dD = sum_k (dL/dp_k) f_k'(D) = g(D),     f_k(D) = exp(-alpha (D - B_k)^2),
# a force that depends on D alone. So neither direction needs N exponentials a pair. f_k and f_k' are tabulated once at FINE + 1 points of
# [-1, 1]. Forward: count the similarities nearest to each point, then p_k = sum over points of count * f_k. Backward: tabulate g and let
# every pair look its force up; D_ij = t_i . t_j moves t_i along t_j and t_j along t_i, so dL/dt_i = sum_j g(D_ij) t_j, a matrix product.
# Both run over tiles of the upper triangle and keep nothing between them. Moving D to the nearest point, by 1 / FINE at most, costs at
# most max |f'| / FINE = sqrt(2 alpha / e) / FINE = 1.3e-4 of a similarity's own weight, and far less in a sum of many, as signs cancel.
FINE, TILE = 2**17, 2**20

@functools.lru_cache(4)
def tables(bins, alpha, device):
    """f_k and f_k' of all bins at the FINE + 1 points, (bins, FINE + 1) each."""
    points = torch.linspace(-1, 1, FINE + 1, device=device)
    offset = points - bin_centres(bins, points)[:, None]
    f = torch.exp(-alpha * offset**2)
    return f, -2 * alpha * offset * f

def similarity_tiles(t):
    """Unit vectors t (n, d) -> for each band of rows: its first and last row, and the points (rows, n - first) nearest
    to its similarities with all vectors from the band's first on (the upper triangle, and the band's square twice)."""
    rows = max(1, TILE // len(t))
    for a in range(0, len(t), rows):
        # point = round((D + 1) FINE / 2): one scaled product, 0.5 for rounding, then truncation
        yield a, min(a + rows, len(t)), torch.addmm(t.new_full((1,), FINE / 2 + 0.5), t[a:a + rows] * (FINE / 2), t[a:].T).int()

class SmoothedHistogram(torch.autograd.Function):
    """Eq. (6) before normalisation: unit float32 vectors t (n, d) -> p (bins,)."""
    @staticmethod
    def forward(ctx, t, bins, alpha):
        f, ctx.slope = tables(bins, alpha, t.device)
        ctx.save_for_backward(t)
        count, squares = torch.zeros(FINE + 1, dtype=torch.int64, device=t.device), []
        for a, b, point in similarity_tiles(t.nan_to_num()):  # NaN is no index; the last line brings it back
            count += torch.bincount(point.flatten(), minlength=FINE + 1)
            squares.append(point[:, :b - a].flatten())
        # a band's square has i < j twice and i = j once: count all else double, then i = j is the only one short of 2
        count = 2 * count - torch.bincount(torch.cat(squares), minlength=FINE + 1)
        count[FINE] += len(t)
        return f @ (count / 2) + 0 * t.sum()
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (t,) = ctx.saved_tensors
        with exact(t.device):
            force, out = grad.float() @ ctx.slope, torch.zeros_like(t)
            for a, b, point in similarity_tiles(t.nan_to_num()):
                g = force.index_select(0, point.flatten()).view(point.shape)
                out[a:b] += g @ t[a:]
                out[b:] += g[:, b - a:].T @ t[a:b]
        return out, None, None  # i = j is left at half its gradient: radial, so the normalisation removes it

def relation_histogram(codes, bins=40, alpha=ALPHA):
    """Eqs. (4)-(6), fast: codes (n, d) float -> (bins,) float32, sum 1, differentiable once. float32 under autocast, too."""
    with exact(codes.device):
        p = SmoothedHistogram.apply(F.normalize(codes.float(), dim=1), bins, alpha)
        return p / p.sum()

# Eq. (7) is written L_hist = KL(log P_s || sg[P_t]), the way torch's kl_div takes its arguments. Its value is
#     L_hist = sum_k P_t (log P_t - log P_s) = KL(P_t || P_s),                                                      (7)
# so the student must cover every similarity that the teacher has; the other direction could ignore some. P_t is stopped.
#
# What can a codebook of dimension d imitate? The cosines' second moment is (1/n^2) ||T T'||_F^2 = (1/n^2) sum of squares of the d eigenvalues of T'T,
# which sum to n, hence at least 1/d (the Welch bound): codes on a small sphere cannot all be near-orthogonal. A teacher of mean squared cosine below
# 1/d (1/8 here) leaves a KL above zero whatever we do; train.py prints both numbers. The mean cosine, |mean of T|^2, is free in [0, 1].

def kl_divergence(p, q):
    """KL(p || q) of two histograms (bins,); empty bins count as 1e-10."""
    p, q = p.clamp_min(1e-10), q.clamp_min(1e-10)
    return (p * (p.log() - q.log())).sum()
def histogram_relation_loss(codes, teacher):
    """Eq. (7): student codes (n, d), teacher histogram (bins,) with sum 1 -> scalar, in nats."""
    return kl_divergence(teacher.detach(), relation_histogram(codes, len(teacher)))
def cosine_moments(vectors):
    """Mean and mean square of all n^2 cosines of vectors (n, d), without forming them."""
    t = F.normalize(vectors.double(), dim=1)
    return t.mean(0).square().sum().item(), ((t.T @ t).square().sum() / len(t) ** 2).item()

def sphere_histogram(dim, bins=40, alpha=ALPHA):
    """The histogram (bins,) of infinitely many vectors, uniform on the unit sphere of `dim` >= 2 dimensions.
    The height of a uniform point has density (1 - x^2)^((dim - 3) / 2); with x = cos(theta) that is sin(theta)^(dim - 2)
    d(theta), smooth for every dim, and eq. (6) is its integral against each Gaussian (midpoint rule)."""
    theta = (torch.arange(4096, dtype=torch.float64) + 0.5) * math.pi / 4096
    f = torch.exp(-alpha * (theta.cos() - bin_centres(bins, theta)[:, None]) ** 2)
    p = f @ theta.sin() ** (dim - 2)
    return (p / p.sum()).float()

# -------------------------------------------------------------------------------------- the residual module (8)-(12)
# Quantization error is not noise: a code's neighbours in the grid say much about where in its cell a feature lay. One
# transformer block reads all codes of one kind and predicts the missing part,
#     Zres_sem = R_sem(Zhat_sem)                                                                                    (8)
#     Zres_vis = R_vis(Zhat_vis)                                                                                    (9)
#     L_res = ||sg[Z_sem] - Zhat_sem - Zres_sem|| + ||sg[Z_vis] - Zhat_vis - Zres_vis||                             (10)
# and the decoder gets the sum, Zhat_vis + Zres_vis (11) and Zhat_sem + Zres_sem (12).
#
# In (10) Z is stopped and Zhat is not. Paper silent: whose gradient is that? If Zhat were the straight-through copy, the encoder would be pushed
# along +(Z - Zhat - Zres), away from its own code: the opposite of commitment. So Zhat here, and as the input of R, is the code vector itself: eq.
# (10) moves R and the codebook, never the encoder. Paper silent: squared norms, averaged over elements, as in eq. (1).

class Block(nn.Module):
    """A pre-norm transformer block, (B, T, width) -> the same: attention, then SwiGLU of 2/3 * 4 width. For the generators also: a condition
    (B, cells, width) that scales, shifts and gates each cell (AdaLN, starting as the identity); rotary positions (T, width / heads / 2); a
    mask (T, S); a cache, the list of earlier keys and values, to which this call's are appended if `keep`."""
    def __init__(self, width, heads, conditional=False):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width) if conditional else None
        if conditional:
            nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)
    def forward(self, x, condition=None, rotary=None, mask=None, cache=None, keep=False):
        B, T, W = x.shape
        scale1, shift1, gate1, scale2, shift2, gate2 = 0, 0, 1, 0, 0, 1
        if condition is not None:  # each (B, cells, 1, W): a cell's tokens share it
            scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(F.silu(condition))[:, :, None].chunk(6, dim=3)
            x = x.unflatten(1, (condition.shape[1], -1))  # (B, cells, tokens, W)
        h = F.rms_norm(x, (W,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, W / heads)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            past, k, v = (k, v), torch.cat([c[0] for c in cache] + [k], 2), torch.cat([c[1] for c in cache] + [v], 2)
            if keep:
                cache.append(past)
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        x = x + gate1 * self.proj(attended)
        gate, up = self.mlp_in(F.rms_norm(x, (W,)) * (1 + scale2) + shift2).chunk(2, dim=-1)
        return (x + gate2 * self.mlp_out(F.silu(gate) * up)).view(B, T, W)

class Transformer(nn.Module):
    """Linear, learned positions, blocks, linear: tokens (B, T, d_in) -> (B, T, d_out). Adapters and residual modules. Paper silent
    on how a block meets 8-d codes and where positions enter: projections to `width` and back, positions added."""
    def __init__(self, d_in, d_out, width, heads, layers, tokens):
        super().__init__()
        self.into, self.out = nn.Linear(d_in, width), nn.Linear(width, d_out)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
    def forward(self, x):
        x = self.blocks(self.into(x) + self.position)
        return self.out(F.rms_norm(x, x.shape[-1:]))

# ----------------------------------------------------------------------------------------------------- the tokenizer
class GloTok(nn.Module):
    """The tokenizer of figure 2. Grids are (B, h, w) with h = w = config.grid; images float (B, 3, H, W) in [-1, 1]."""
    def __init__(self, config):
        super().__init__()
        c, tokens = config, config.grid**2
        self.config = c
        def adapter():  # paper silent; FQGAN's: transformer layers, then a linear map to code_dim
            return (Transformer(c.z_channels, c.code_dim, c.width, c.heads, c.adapter_layers, tokens)
                    if c.adapter_layers else nn.Linear(c.z_channels, c.code_dim))
        def residual():
            module = Transformer(c.code_dim, c.code_dim, c.width, c.heads, 1, tokens)
            nn.init.zeros_(module.out.weight), nn.init.zeros_(module.out.bias)  # starts by adding nothing
            return module
        self.encoder, self.decoder = encoder(c), decoder(c)
        self.adapter_sem, self.adapter_vis = adapter(), adapter()
        self.quantizer_sem = Quantizer(c.codes_sem, c.code_dim, c.beta)
        self.quantizer_vis = Quantizer(c.codes_vis, c.code_dim, c.beta)
        if c.lambda_res:
            self.residual_sem, self.residual_vis = residual(), residual()
        if c.semantic == "local":
            self.head = nn.Sequential(nn.Linear(c.code_dim, c.width), nn.SiLU(), nn.Linear(c.width, {"convnet": 64, "dinov2": 384}[c.teacher]))
    codebook_sem = property(lambda self: self.quantizer_sem.codebook)
    codebook_vis = property(lambda self: self.quantizer_vis.codebook)
    def features(self, x):
        """Images -> Z_sem and Z_vis before normalisation, each (B, h * w, code_dim)."""
        z = self.encoder(x).flatten(2).transpose(1, 2)  # (B, T, z_channels)
        return self.adapter_sem(z), self.adapter_vis(z)
    def residuals(self, codes_sem, codes_vis):
        """(8), (9): code vectors (B, T, d) -> Zres_sem, Zres_vis; zeros without residual modules (lambda_res 0)."""
        if not self.config.lambda_res:
            return torch.zeros_like(codes_sem), torch.zeros_like(codes_vis)
        return self.residual_sem(codes_sem).float(), self.residual_vis(codes_vis).float()
    def decode_latents(self, sem, vis):
        """Latents (B, T, d) after (11), (12) -> images: channel-wise concatenation, then the decoder."""
        z = torch.cat([sem, vis], dim=2).transpose(1, 2)  # (B, 2d, T)
        return self.decoder(z.unflatten(2, (self.config.grid, self.config.grid))).float()
    def composite(self, sem, vis, residual=True):
        """Indices (B, h, w) -> the two halves of the composite latent, (B, T, d) each: code vectors, plus their residuals."""
        c_sem, c_vis = F.embedding(sem.flatten(1), self.codebook_sem), F.embedding(vis.flatten(1), self.codebook_vis)
        r_sem, r_vis = self.residuals(c_sem, c_vis) if residual else (0, 0)
        return c_sem + r_sem, c_vis + r_vis  # (12), (11)
    def to_latents(self, sem, vis):
        """Indices (B, h, w) -> what the generator learns, (B, 2 * code_dim, h, w): codes, or with the residual added."""
        z = torch.cat(self.composite(sem, vis, self.config.latent_residual), dim=2)
        return z.transpose(1, 2).unflatten(2, sem.shape[1:])
    def from_latents(self, latents):
        """Generated latents (B, 2 * code_dim, h, w) -> images (B, 3, H, W)."""
        sem, vis = latents.flatten(2).transpose(1, 2).chunk(2, dim=2)  # each (B, T, d)
        if self.config.snap and not self.config.latent_residual:
            sem, vis = (F.embedding(q.look_up(F.normalize(z, dim=2)), q.codebook) for q, z in ((self.quantizer_sem, sem), (self.quantizer_vis, vis)))
        r_sem, r_vis = (0, 0) if self.config.latent_residual else self.residuals(sem, vis)
        return self.decode_latents(sem + r_sem, vis + r_vis)
    def forward(self, x, target=None):
        """Images -> reconstructions, {"quantize": L_Q (1), "residual": L_res (10)}, each summed over the two codebooks; with the features
        (B, D, H, W) of a teacher network also "local", what FQGAN and VA-VAE do instead of eq. (7)."""
        f_sem, f_vis = self.features(x)
        z_sem, c_sem, _, quantize_sem = self.quantizer_sem(f_sem)
        z_vis, c_vis, _, quantize_vis = self.quantizer_vis(f_vis)
        r_sem, r_vis = self.residuals(c_sem, c_vis)
        residual = F.mse_loss(c_sem + r_sem, z_sem.detach()) + F.mse_loss(c_vis + r_vis, z_vis.detach())  # (10)
        sem, vis, losses = straight_through(z_sem, c_sem), straight_through(z_vis, c_vis), {"quantize": quantize_sem + quantize_vis, "residual": residual}
        if target is not None:
            target = F.adaptive_avg_pool2d(target.float(), self.config.grid).flatten(2).transpose(1, 2)  # (B, T, D)
            losses["local"] = 1 - F.cosine_similarity(self.head(sem).float(), target, dim=2).mean()
        return self.decode_latents(sem + r_sem, vis + r_vis), losses  # (11), (12)
    def encode(self, x):
        """Images -> semantic and visual indices, int64 (B, h, w) each."""
        grid = (self.config.grid, self.config.grid)
        return tuple(q(f)[2].unflatten(1, grid) for q, f in zip((self.quantizer_sem, self.quantizer_vis), self.features(x)))
    def decode(self, sem, vis):
        """Semantic and visual indices (B, h, w) -> images: what forward reconstructs from the same indices."""
        return self.decode_latents(*self.composite(sem, vis))

# ------------------------------------------------------------------------------------------------- the losses (2), (3), (13)
#     L_R     = ||x - xhat||^2                                                                                      (2)
#     L_VQGAN = l_R L_R + l_Q L_Q + l_P L_P + l_G L_G                                                               (3)
#     L       = L_VQGAN + l_res L_res + l_hist L_hist                                                               (13)
# train.py adds them up in one line. L_P is LPIPS (below). L_G = -mean D(xhat) with a patch discriminator D, which itself
# minimises the hinge loss: real patches above 1, false ones below -1, no credit for more.

def hinge_loss(real, fake):
    """The discriminator's loss from its logits on real and reconstructed images -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
def adaptive_weight(recon_loss, adv_loss, last_layer):
    """VQGAN: the factor for L_G that makes its gradient at the decoder's last layer as large as that of L_R and L_P."""
    of_recon, of_adv = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (recon_loss, adv_loss))
    return (of_recon / (of_adv + 1e-4)).clamp(max=1e4).detach()

def to_float(images, device, mirror=None):
    """Images uint8 (B, 3, H, W) -> float in [-1, 1], those flipped where mirror, bool (B, 1, 1, 1), says so."""
    x = images.to(device, non_blocking=True).to(memory_format=torch.channels_last).float() / 127.5 - 1
    return x if mirror is None else torch.where(mirror, x.flip(3), x)
def to_uint8(x):
    """float in [-1, 1], clipped -> uint8, rounded."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
def psnr(x, y):
    """Peak signal-to-noise ratio of uint8 images (N, C, H, W), dB, each image's own: (N,). Equal images: 99."""
    mse = (x.float() - y.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp_min(255**2 / 10**9.9))
def spread(n, k):
    """Up to k positions, evenly over range(n): folders come sorted by class."""
    return torch.arange(min(n, k)) * n // min(n, k)

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

def compile_all(c, device, *nets):
    """torch.compile, in place, if it is asked for and works here."""
    try:
        c.compile and torch.compile(torch.sin)(torch.ones(9, device=device))
    except RuntimeError as error:
        print(f"note: --compile 1 finds no working compiler ({str(error).strip().splitlines()[0]}): not compiled", file=sys.stderr)
    else:
        [net.compile(dynamic=False) for net in nets if c.compile]

def use_bf16(c, device):
    """bf16 autocast: as told, or where it is faster: GPUs that have it; wide networks on CPUs that multiply it natively (preset shapes took
    1.6 times as long with it; where it is emulated it is many times slower)."""
    cpu, flags = Path("/proc/cpuinfo"), ("avx512_bf16", "amx_bf16")
    if c.precision != "auto" or device.type == "cuda":
        return c.precision == "bf16" or c.precision == "auto" and torch.cuda.get_device_capability()[0] >= 8
    return c.channels >= 64 and cpu.exists() and any(flag in cpu.read_text() for flag in flags)

# ------------------------------------------------------------------------------- the generator: xAR (section 3.4)
# Two indices a position, predicted one after the other, double the chances to err, and errors feed on errors. So the paper
# concatenates the two code vectors of a position (8 + 8 = 16 numbers) and lets xAR (Ren et al. 2025, arXiv 2502.20388) learn
# that continuous space: the grid is cut into cells, generated in order, each by flow matching.
#
# Flow matching. Draw data z_0 and noise eps, and join them by a straight line: z_t = (1 - t) z_0 + t eps. A particle on it moves
# at velocity eps - z_0. Regress a network on that, v(z_t, t) ~ eps - z_0: the least-squares answer is the mean velocity of all
# lines through z_t, and following dz/dt = v from noise at t = 1 down to t = 0 carries noise to data, since a flow with the mean
# velocity moves the whole density as the lines do. Because E[eps | z_t] = z_t + (1 - t) v, the score comes free:
#     s = grad log p_t(z) = -E[eps | z_t] / t = -(z + (1 - t) v) / t,
# and for any w >= 0 the noisy path dz = (v - w s / 2) dt + sqrt(w) dW, run backwards, has the same densities. Euler-Maruyama
# takes w = 2 t: the fresh noise washes out the errors of earlier steps.
#
# Exposure bias. Teacher forcing shows cell k the true cells before it; at sampling it sees its own, imperfect ones. xAR noises
# every cell at its own t and lets cell k see the noisy ones: a model that has learned to work from a damaged context is not
# thrown off by its own mistakes. One pass under a block-causal mask trains all cells.

def rotate(x, angles):
    """Rotary positions: turn each pair of channels of x (B, heads, T, D) by angles (T, D / 2)."""
    a, b = x.float().unflatten(3, (-1, 2)).unbind(4)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=4).flatten(3).to(x.dtype)
def positions(side):  # of a grid, row by row: (side * side, 2)
    return torch.cartesian_prod(*2 * [torch.arange(side)]).float()
def rotary_angles(at, width):
    """Grid positions at (T, 2) -> angles (T, width / 2) for heads of `width`: half the pairs turn with y, half with x."""
    return (at[:, :, None] * 10000 ** (-torch.arange(width // 4) / (width // 4))).flatten(1)

class XAR(nn.Module):
    """The generator. Latents are (B, 2 * code_dim, h, w), h = w = config.grid, of about unit deviation; labels int64 (B,)."""
    def __init__(self, config):
        super().__init__()
        c, self.config, channels = config, config, 2 * config.code_dim
        self.side, self.tokens = c.grid // c.cell, c.cell**2  # cells in each direction, tokens in a cell
        self.into, self.out = nn.Linear(channels, c.gen_width), nn.Linear(c.gen_width, channels)
        self.position = nn.Parameter(0.02 * torch.randn(c.grid**2, c.gen_width))
        self.label = nn.Embedding(c.classes + 1, c.gen_width)  # the last stands for "no label"
        self.time = nn.Sequential(nn.Linear(256, c.gen_width), nn.SiLU(), nn.Linear(c.gen_width, c.gen_width))
        self.blocks = nn.ModuleList(Block(c.gen_width, c.gen_heads, conditional=True) for _ in range(c.gen_layers))
        self.last = nn.Linear(c.gen_width, 2 * c.gen_width)
        for module in (self.last, self.out):  # the first answer is 0, the mean velocity
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
        nn.init.normal_(self.label.weight, 0, 0.02)
        at = self.cells(positions(c.grid).T.view(1, 2, c.grid, c.grid))[0].flatten(0, 1)  # (T, 2), cell by cell
        order = torch.arange(self.side**2).repeat_interleave(self.tokens)
        self.register_buffer("angles", rotary_angles(at, c.gen_width // c.gen_heads), persistent=False)
        self.register_buffer("mask", order[:, None] >= order[None, :], persistent=False)  # a cell sees itself and those before it
    def cells(self, z):
        """Grid (B, C, h, w) -> tokens (B, cells, cell * cell, C): cell by cell, row by row inside a cell."""
        z = z.unflatten(3, (-1, self.config.cell)).unflatten(2, (-1, self.config.cell))  # (B, C, side, cell, side, cell)
        return z.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
    def grid(self, tokens):
        """The inverse of cells: (B, cells, cell * cell, C) -> (B, C, h, w)."""
        z = tokens.unflatten(2, (self.config.cell, -1)).unflatten(1, (self.side, -1))  # (B, side, side, cell, cell, C)
        return z.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    def velocity(self, z, t, labels, first=0, caches=None, keep=False):
        """Cells z (B, k, cell * cell, C) at times t (B, k) -> their velocities; they are the cells from `first` on. All earlier cells
        must be in caches, one list a block, to which these are added if `keep`. Without caches first is 0."""
        B, k = t.shape
        here = slice(first * self.tokens, (first + k) * self.tokens)
        waves = 1000 * t[:, :, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)  # (B, k, 128)
        condition = self.time(torch.cat([waves.cos(), waves.sin()], dim=2)) + self.label(labels)[:, None]  # (B, k, width)
        x = self.into(z.flatten(1, 2)) + self.position[here]  # (B, k * cell * cell, width)
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches is not None else None
            x = block(x, condition, self.angles[here], self.mask[here, here] if cache is None else None, cache, keep)
        scale, shift = self.last(F.silu(condition))[:, :, None].chunk(2, dim=3)
        return self.out(F.rms_norm(x.unflatten(1, (k, -1)), x.shape[-1:]) * (1 + scale) + shift).float()
    def loss(self, latents, labels, part=0, parts=1):
        """Flow matching with noisy context: latents (B, C, h, w), labels (B,) -> mean squared error of the velocity. If these are one
        of several equal parts of a batch, each draws for the whole and takes its own: their mean is the loss of the batch undivided."""
        z = self.cells(latents.float())  # (B, cells, cell * cell, C)
        draw = lambda random, *shape: random(parts * len(z), *shape, device=z.device)[part * len(z):][:len(z)]
        t = draw(torch.randn, z.shape[1]).sigmoid()  # a time of its own for each cell, logit-normal(0, 1)
        noise = draw(torch.randn, *z.shape[1:])
        hide = draw(torch.rand) < self.config.label_dropout
        labels = torch.where(hide, self.config.classes, labels)
        noisy = torch.lerp(z, noise, t[:, :, None, None])  # (1 - t) z + t eps
        return F.mse_loss(self.velocity(noisy, t, labels), noise - z)
    forward = loss  # what DistributedDataParallel calls
    @torch.no_grad()
    def sample(self, labels, steps=25, guidance=1.0):
        """Labels (B,) -> latents (B, C, h, w). Euler-Maruyama from t = 1 to 0.04 in steps - 1 steps, then one Euler step to 0; Euler
        throughout unless config.stochastic. Guidance grows linearly over the cells, from 1 at the first. Noise: the global generator's."""
        c, B, device = self.config, len(labels), labels.device
        both = torch.cat([labels, torch.full_like(labels, c.classes)])  # with and without the label, in one batch
        caches, done = [[] for _ in self.blocks], torch.empty(B, 0, self.tokens, 2 * c.code_dim, device=device)
        times = [*torch.linspace(1, 0.04, steps).tolist(), 0.0]
        for cell in range(self.side**2):
            strength = 1 + (guidance - 1) * cell / max(self.side**2 - 1, 1)
            z = torch.randn(B, 1, self.tokens, 2 * c.code_dim, device=device)
            def guided(z, t, keep=False):
                v = self.velocity(z.repeat(2, 1, 1, 1), torch.full((2 * B, 1), t, device=device), both, cell, caches, keep)
                with_label, without = v.chunk(2)
                return without + strength * (with_label - without)
            for t, after in zip(times, times[1:]):
                v = guided(z, t)
                if c.stochastic and after > 0:
                    score = -(z + (1 - t) * v) / t
                    z = z + (v - t * score) * (after - t) + math.sqrt(2 * t * (t - after)) * torch.randn_like(z)
                else:
                    z = z + v * (after - t)
            guided(z, 0.0, keep=True)  # a finished cell enters the cache clean
            done = torch.cat([done, z], dim=1)
        return self.grid(done)

class FAR(nn.Module):
    """The rival of table 2, FQGAN's: a causal transformer over the positions, row by row, and a head of four blocks that predicts a position's
    two indices, (B, 2, h, w), one after the other, semantic first. Trained on true tokens, it samples from its own: the exposure bias above."""
    def __init__(self, config):
        super().__init__()
        c, self.config, width, sizes = config, config, config.gen_width, (config.codes_sem, config.codes_vis)
        self.codes, self.label = nn.ModuleList(nn.Embedding(n, width) for n in sizes), nn.Embedding(c.classes + 1, width)
        self.into, self.out = nn.Linear(2 * width, width), nn.ModuleList(nn.Linear(width, n) for n in sizes)
        self.position, self.order = (nn.Parameter(0.02 * torch.randn(n, width)) for n in (c.grid**2, 2))
        self.blocks, self.head = (nn.ModuleList(Block(width, c.gen_heads) for _ in range(n)) for n in (c.gen_layers, 4))
        self.register_buffer("angles", rotary_angles(positions(c.grid), width // c.gen_heads), persistent=False)
        self.register_buffer("mask", torch.ones(c.grid**2, c.grid**2, dtype=torch.bool).tril(), persistent=False)
    def context(self, labels, tokens, first=0, caches=None):
        """Labels (B,), earlier tokens (B, T, 2) -> contexts (B, T + 1 - first, width) of positions `first` to T; caches hold those before."""
        pairs = self.into(torch.cat([codes(i) for codes, i in zip(self.codes, tokens.unbind(2))], dim=2))
        here = slice(first, tokens.shape[1] + 1)
        x = torch.cat([self.label(labels)[:, None], pairs], dim=1)[:, here] + self.position[here]
        for i, block in enumerate(self.blocks):
            x = block(x, None, self.angles[here], self.mask[here, :here.stop], caches[i] if caches else None, keep=True)
        return x
    def logits(self, context, *sem):
        """Contexts (N, width) -> [semantic logits (N, codes_sem)]; and with the semantic indices (N,) also visual logits (N, codes_vis)."""
        x = torch.stack([context, *(self.codes[0](i) for i in sem)], dim=1) + self.order[:1 + len(sem)]
        for block in self.head:
            x = block(x, mask=self.mask[:x.shape[1], :x.shape[1]])
        return [out(y).float() for out, y in zip(self.out, F.rms_norm(x, x.shape[-1:]).unbind(1))]
    def loss(self, indices, labels, part=0, parts=1):
        """Mean cross-entropy of both kinds of indices, nats; parts as in XAR.loss."""
        tokens = indices.flatten(2).transpose(1, 2).long()  # (B, T, 2)
        hide = torch.rand(parts * len(labels), device=labels.device)[part * len(labels):][:len(labels)] < self.config.label_dropout
        context = self.context(torch.where(hide, self.config.classes, labels), tokens[:, :-1])
        true = tokens.flatten(0, 1).unbind(1)
        return sum(F.cross_entropy(logits, index) for logits, index in zip(self.logits(context.flatten(0, 1), true[0]), true)) / 2
    forward = loss
    @torch.no_grad()
    def sample(self, labels, steps=0, guidance=1.0):
        """Labels (B,) -> indices int64 (B, 2, h, w), of the config's top_k likeliest. `steps` is XAR's. Chance: the global generator's."""
        both, caches = torch.cat([labels, torch.full_like(labels, self.config.classes)]), [[] for _ in self.blocks]
        tokens = both.new_empty(len(both), 0, 2)
        for position in range(self.config.grid**2):
            context, pair = self.context(both, tokens, position, caches)[:, -1], []
            for size in (self.config.codes_sem, self.config.codes_vis):
                with_label, without = self.logits(context, *pair)[-1].chunk(2)
                best, index = (without + guidance * (with_label - without)).topk(min(self.config.top_k or size, size))
                pair.append(index.gather(1, torch.multinomial(best.softmax(1), 1))[:, 0].repeat(2))
            tokens = torch.cat([tokens, torch.stack(pair, dim=1)[:, None]], dim=1)
        return tokens[:len(labels)].transpose(1, 2).unflatten(2, (self.config.grid, -1))
GENERATORS = {"xar": XAR, "far": FAR}
# ------------------------------------------------------------------- what the scripts share: talking to the user, reading files
def run(main):
    """main(), with what the user can mend, disks included, as one line on standard error (status 2) and Ctrl-C as status 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (BadInput, OSError) as error:
        print("\r\033[K" * sys.stderr.isatty() + f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage text
        raise BadInput(message)
    def parse(self, about):
        self.description, self.formatter_class, self.allow_abbrev = about, argparse.RawDescriptionHelpFormatter, False
        args, unknown = self.parse_known_args()
        return choose(unknown[0].split("=")[0], self._option_string_actions, "flag") if unknown else args

class Progress:
    """A line on standard error that overwrites itself on a terminal; elsewhere a plain line every ten seconds at most."""
    def __init__(self, what, total, done=0):
        self.what, self.total, self.first, self.start, self.said = what, total, done, time.monotonic(), time.monotonic()
    def __call__(self, done, text=""):
        now, tty, last = time.monotonic(), sys.stderr.isatty(), done >= self.total
        if last or now - self.said > (0.2 if tty else 10):
            left, self.said = int((now - self.start) / max(done - self.first, 1) * (self.total - done)), now
            line = f"{self.what} {done}/{self.total}  {text}{'  ' * bool(text)}{left // 60}:{left % 60:02d} left"
            print(f"\r{line}\033[K" if tty else line, end="" if tty and not last else "\n", file=sys.stderr, flush=True)

def read_arrays(path):
    """The arrays of an .npz, or of an .npy under the name "array"; nothing in them is ever unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        return dict(file) if path.suffix == ".npz" else {"array": file}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError, MemoryError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None

def read_vectors(spec):
    """FILE or FILE:TENSOR -> float vectors (n, d), n >= 2: an .npy, .npz, or a checkpoint (.pt, .pth) with a 2-D tensor."""
    spec, _, name = (spec, "", "") if Path(spec).exists() or ":" not in spec else spec.rpartition(":")
    path = Path(spec)
    if not path.is_file():
        raise BadInput(f"no teacher {spec!r}: want convnet, dinov2, sphere, or a file of vectors (.npy, .npz, .pt, .pth)")
    arrays = path.suffix in (".npy", ".npz")
    found = {k: torch.from_numpy(v) for k, v in read_arrays(path).items() if v.dtype.kind in "fiu"} if arrays else dict(tensors_in(load_checkpoint(path)))
    fits = [k for k, v in found.items() if v.dim() == 2 and len(v) > 1 and v.is_floating_point() and name in ("", k)]
    if len(fits) != 1:
        listed = ", ".join(f"{k} {tuple(v.shape)}" for k, v in found.items()) or "nothing"
        raise BadInput(f"{path} must hold one float array (n, d) of n > 1 vectors, or be given as {path}:NAME; it holds {listed[:500]}")
    if not (vectors := found[fits[0]].float()).isfinite().all() or not vectors.norm(dim=1).all() or not vectors.norm(dim=1).isfinite().all():
        raise BadInput(f"{path}: {fits[0]} has vectors that are zero or not finite")
    return vectors
def tensors_in(value, name=""):
    """All tensors in nested dictionaries, with dotted names."""
    if torch.is_tensor(value):
        yield name, value
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from tensors_in(inner, f"{name}.{key}" if name else str(key))

def load_config(out):
    """The Config of the run in folder `out`, and the name of its preset."""
    try:
        saved = json.loads((out / "config.json").read_text())
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k != "preset"}), saved["preset"]
    except FileNotFoundError:
        raise BadInput(f"no run in {out}: there is no {out / 'config.json'}") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{out / 'config.json'} is not a run's settings: {error}") from None

def load_checkpoint(path, device="cpu"):
    """A file of tensors and plain values; never runs code from it."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise BadInput(f"cannot read {path}: {(str(error) or 'damaged').splitlines()[0]}") from None
def restore(path, parts, device="cpu"):
    """Load the states in a checkpoint into parts, {name: module or optimizer}, or {None: module} if the file is its state; -> the checkpoint."""
    saved = load_checkpoint(path, device)
    try:
        for name, part in parts.items():
            part.load_state_dict(saved if name is None else dict(saved)[name])
        if strange := [k for k, v in tensors_in(saved) if v.is_floating_point() and not v.isfinite().all()]:
            raise ValueError(f"NaN or infinity in {strange[0]}")
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} holds other weights than these settings ask for: {' '.join(str(error).split())[:200]}") from None
    return saved

def load_run(folder, device, generator=False):
    """What train.py left in `folder` -> the tokenizer; with `generator` also the generator (its average) and its latents' deviation."""
    model = GloTok(load_config(folder)[0]).to(device)
    restore(folder / "tokenizer.pt", {"model": model}, device)
    if not generator:
        return model.eval()
    if not (folder / "generator.pt").exists():
        raise BadInput(f"{folder} has no generator yet: python train.py --stage generator --resume --out {folder}")
    average = GENERATORS[model.config.generator](model.config).to(device)
    scale = restore(folder / "generator.pt", {"ema": average}, device)["kept"]
    return model.eval(), average.eval(), scale

# ----------------------------------------------------------------------- appendix: VQGAN's encoder and decoder
def conv(c_in, c_out, kernel=3, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2 if stride == 1 else 0)
def group_norm(channels):
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)

class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), (B, c_in, H, W) -> (B, c_out, H, W)."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(group_norm(c_in), nn.SiLU(), conv(c_in, c_out), group_norm(c_out), nn.SiLU(), conv(c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)
    def forward(self, x):
        return self.skip(x) + self.body(x)

class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of (B, c, H, W)."""
    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv, self.proj = group_norm(channels), conv(channels, 3 * channels, 1), conv(channels, channels, 1)
    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (B, H * W, c)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
def downsample(channels):
    """Halve (B, c, H, W). The pad is right and bottom alone, (0, 1, 0, 1): with stride 2 a symmetric one shifts the grid."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(channels, channels, stride=2))
def middle(channels):
    return [ResBlock(channels, channels), SpatialAttention(channels), ResBlock(channels, channels)]
def level(c_in, c_out, blocks, lowest):
    """The residual blocks of one resolution; at the lowest each is followed by attention."""
    return [layer for i in range(blocks) for layer in [ResBlock(c_in if i == 0 else c_out, c_out)] + ([SpatialAttention(c_out)] if lowest else [])]

def encoder(c):
    """Images (B, 3, H, W) -> Z (B, z_channels, h, w)."""
    widths, last = [c.channels * m for m in c.channel_mult], len(c.channel_mult) - 1
    layers = [nn.PixelUnshuffle(c.patch), conv(3 * c.patch**2, c.channels)]
    for i, width in enumerate(widths):
        layers += level(widths[max(i - 1, 0)] if i else c.channels, width, c.res_blocks, i == last)
        layers += [downsample(width)] if i < last else []
    return nn.Sequential(*layers, *middle(width), group_norm(width), nn.SiLU(), conv(width, c.z_channels))
def decoder(c):
    """Composite latents (B, 2 * code_dim, h, w) -> images (B, 3, H, W), not clipped."""
    widths = [c.channels * m for m in c.channel_mult][::-1]
    layers = [conv(2 * c.code_dim, widths[0]), *middle(widths[0])]
    for i, width in enumerate(widths):
        layers += level(widths[max(i - 1, 0)], width, c.res_blocks + 1, i == 0)
        layers += [nn.Upsample(scale_factor=2), conv(width, width)] if i < len(widths) - 1 else []  # nearest
    return nn.Sequential(*layers, group_norm(width), nn.SiLU(), conv(width, 3 * c.patch**2), nn.PixelShuffle(c.patch))

# ------------------------------------------------------------------------------- appendix: discriminator, LPIPS, DINOv2
def discriminator(c):
    """PatchGAN: images (B, 3, H, W) -> a logit for each overlapping patch, (B, 1, H', W')."""
    layers, width = [nn.Conv2d(3, c.disc_channels, 4, 2, 1), nn.LeakyReLU(0.2)], c.disc_channels
    for i in range(1, c.disc_layers + 1):
        last, width = width, c.disc_channels * min(2**i, 8)
        layers += [nn.Conv2d(last, width, 4, 2 if i < c.disc_layers else 1, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
    net = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
    [nn.init.normal_(p, 0, 0.02) for p in net.parameters() if p.dim() == 4]
    return net

class LPIPS(nn.Module):
    """Zhang et al. 2018, on VGG16: images x, y (B, 3, H, W) in [-1, 1] -> distances (B,). State-dict names as published:
    features.* of torchvision's VGG16 and lin0 .. lin4. Random until both files are loaded."""
    widths = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    taps = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # layer of relu1_2, 2_2, 3_3, 4_3, 5_3: channels
    def __init__(self):
        super().__init__()
        layers, c_in = [], 3
        for width in self.widths:
            layers += [nn.MaxPool2d(2)] if width == "M" else [conv(c_in, width), nn.ReLU()]
            c_in = c_in if width == "M" else width
        self.features = nn.Sequential(*layers)
        for i, width in enumerate(self.taps.values()):  # `.model.1` because the published heads begin with a dropout
            setattr(self, f"lin{i}", nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))}))
        self.register_buffer("shift_scale", torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
    def forward(self, x, y):
        f, distance, head = (torch.cat([x, y]) - self.shift_scale[0]) / self.shift_scale[1], 0, 0
        for i, layer in enumerate(self.features):
            f = layer(f)
            if i in self.taps:
                u = f.float() / (f.float().square().sum(1, keepdim=True).sqrt() + 1e-10)  # unit length at each position
                a, b = u.chunk(2)
                distance = distance + getattr(self, f"lin{head}")["model"][1]((a - b) ** 2).mean((1, 2, 3))
                head += 1
        return distance

class DINOv2(nn.Module):
    """DINOv2 ViT-S/14: RGB in [0, 1], (B, 3, H, W), H and W multiples of 14 -> patch tokens after the last norm
    (B, H * W / 196, 384). State-dict names as published. Random until the file is loaded."""
    def __init__(self, width=384, depth=12, heads=6):
        super().__init__()
        self.heads = heads
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 37 * 37 + 1, width))  # a 37 x 37 grid, class token first
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, 14)})
        scale = lambda: nn.ParameterDict({"gamma": torch.ones(width)})
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(width, eps=1e-6), "norm2": nn.LayerNorm(width, eps=1e-6), "ls1": scale(), "ls2": scale(),
            "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
            "mlp": nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}),
        }) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.eval().requires_grad_(False)
    def forward(self, x):
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        x = self.patch_embed["proj"]((x - mean) / std)  # (B, width, h, w)
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (37, 37))
        if x.shape[2:] != grid.shape[2:]:
            grid = F.interpolate(grid, x.shape[2:], mode="bicubic", align_corners=False)
        x = (x + grid).flatten(2).transpose(1, 2)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + h * w, width)
        for b in self.blocks:
            q, k, v = b["attn"]["qkv"](b["norm1"](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + b["ls1"]["gamma"] * b["attn"]["proj"](a)
            x = x + b["ls2"]["gamma"] * b["mlp"]["fc2"](F.gelu(b["mlp"]["fc1"](b["norm2"](x))))
        return self.norm(x)[:, 1:]

# --------------------------------------------------------------------------- appendix: the offline teacher, k-means
class ConvNet(nn.Module):
    """A small classifier, trained on the labels in under a minute: a stand-in for a pre-trained vision model.
    Images (B, 3, H, W) in [-1, 1], at most 64 pixels used -> logits (B, classes); features() gives the maps before them."""
    def __init__(self, classes, widths=(32, 64, 64)):
        super().__init__()
        layers = []
        for i, (c_in, width) in enumerate(zip((3, *widths), widths)):
            layers += [nn.Conv2d(c_in, width, 3, 2 if i < 2 else 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers, nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)), nn.Linear(width, classes)
    def features(self, x):
        return self.body(F.adaptive_avg_pool2d(x, 64) if x.shape[-1] > 64 else x)  # (B, 64, H / 4, W / 4), before the last ReLU
    def forward(self, x):
        return self.head(F.relu(self.features(x)).mean((2, 3)))

def kmeans(x, k, iterations=20):
    """Centres (k, d) of points x (n, d), n >= k: Lloyd's iterations from a k-means++ start, which takes each next centre with probability
    proportional to the squared distance from those it has. A centre that loses all points stays. Draws from the global generator."""
    if len(x) < k:
        raise BadInput(f"k-means cannot place {k} centres among {len(x)} points")
    x, squares = x.float(), x.float().square().sum(1)
    centres, distance = x.new_empty(k, x.shape[1]), torch.full_like(squares, torch.inf)
    for i in range(k):
        weight = distance.clamp(max=1e30) if i and distance.max() > 0 else torch.ones_like(squares)
        centres[i] = x[torch.searchsorted(weight.double().cumsum(0), torch.rand(1).double().to(x.device) * weight.double().sum()).clamp(max=len(x) - 1)]
        distance = torch.minimum(distance, (squares - 2 * x @ centres[i] + centres[i].square().sum()).clamp_min(0))
    for _ in range(iterations):
        nearest = torch.cat([(2 * part @ centres.T - centres.square().sum(1)).argmax(1) for part in x.split(max(1, 2**24 // k))])
        count, total = torch.bincount(nearest, minlength=k), torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centres)
    return centres

# ------------------------------------------------------------------------- appendix: how evenly latents lie (table 3)
def tsne(x, perplexity=30.0, steps=1000):
    """t-SNE (van der Maaten and Hinton 2008), exact: points x (n, d) -> (n, 2). Memory 4 n^2 floats. Random start: global generator.
    p_ij: how probably i and j pick each other as neighbours, Gaussian in their distance, each point with a width of its own that
    gives it `perplexity` neighbours (the exponential of the entropy). q_ij: the same in the plane, with weights
    w = 1 / (1 + distance^2). Descend KL(p || q), whose gradient is 4 sum_j (p_ij - q_ij) w_ij (y_i - y_j)."""
    x, n, p = x.float(), len(x), []
    for at in torch.arange(n, device=x.device).split(1000):
        d = torch.cdist(x[at], x, compute_mode="donot_use_mm_for_euclid_dist").square()
        d[torch.arange(len(at)), at] = torch.inf  # nobody is a neighbour of itself
        low, high = x.new_full((len(at), 1), -50), x.new_full((len(at), 1), 50)  # of the log precision, halved until found
        for _ in range(40):
            middle = (low + high) / 2
            share = torch.softmax(-middle.exp() * d, dim=1)
            wide = torch.special.entr(share).sum(1, keepdim=True) > math.log(min(perplexity, (n - 1) / 3))
            low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
        p.append(share)
    p = torch.cat(p)
    p = (p + p.T) / (2 * n)
    y, speed, gain = 1e-4 * torch.randn(n, 2, device=x.device), x.new_zeros(n, 2), x.new_ones(n, 2)
    for step in range(steps):
        early = step < steps // 4  # exaggerated p and little momentum at first: clusters form before they settle
        w = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square_().add_(1).reciprocal_().fill_diagonal_(0)
        force = torch.sub(p, w / w.sum(), alpha=1 / 12).mul_(12 * w) if early else (p - w / w.sum()).mul_(w)
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * speed > 0, 0.8 * gain, gain + 0.2).clamp_min(0.01)  # larger steps while the sign persists
        speed = (0.5 if early else 0.8) * speed - max(n / 48, 50) * gain * gradient
        y = y + speed
    return y
def uniformity(points):
    """Table 3 of points (n, 2): their Gaussian kernel density at the points themselves -> {"density_cv": std / mean,
    "normalized_entropy": that of the shares, over log n, "gini": mean absolute difference / (2 mean)}. 0, 1, 0: perfectly even."""
    at = points.double().T.cpu().numpy()
    density = torch.from_numpy(gaussian_kde(at)(at)).sort().values  # Scott's bandwidth
    n, share = len(density), density / density.sum()
    return {"density_cv": (density.std(correction=0) / density.mean()).item(), "normalized_entropy": (torch.special.entr(share).sum() / math.log(n)).item(),
            "gini": ((2 * torch.arange(1, n + 1) - n - 1) * share).sum().item() / n}

# ------------------------------------------------------------------------------------ appendix: the built-in pictures
SHAPES = {  # signed distance to each outline at (u, v), in radii, negative inside; a = |u| and b = |v|
    "disc": lambda a, b, v: torch.hypot(a, b) - 1,
    "ring": lambda a, b, v: (torch.hypot(a, b) - 0.75).abs() - 0.25,
    "square": lambda a, b, v: torch.maximum(a, b) - 0.85,
    "triangle": lambda a, b, v: torch.maximum(v - 0.55, 0.866 * a - 0.5 * v - 0.55),
    "cross": lambda a, b, v: torch.minimum(torch.maximum(a - 1, b - 0.35), torch.maximum(b - 1, a - 0.35)),
    "bars": lambda a, b, v: torch.maximum(a - 0.95, (b - 0.6).abs() - 0.28),
}

def draw_shapes(n, size, seed):
    """n pictures uint8 (n, 3, size, size) and their classes int64 (n,), positions in SHAPES; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)
    labels, radius = torch.randint(len(SHAPES), (n,), generator=g), uniform(0.28, 0.38, 1, 1) * size
    x, y = (radius + 1 + uniform(0, 1, 1, 1) * (size - 2 * radius - 2) for _ in range(2))
    back = uniform(0, 1, 2, 3)  # the background: a gradient between two colours; the shape: of four colours the one furthest from both
    back[:, 1] = back[:, 0] + 0.6 * (back[:, 1] - back[:, 0])
    colours, slope = uniform(0, 1, 4, 3), uniform(-1, 1, 2)
    colour = colours[torch.arange(n), (colours[:, :, None] - back[:, None]).abs().sum(3).amin(2).argmax(1)]
    images, at = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.arange(size) + 0.5
    for k, outline in enumerate(SHAPES.values()):
        for i in (labels == k).nonzero()[:, 0].split(1000):
            u, v = (at[None, None, :] - x[i]) / radius[i], (at[None, :, None] - y[i]) / radius[i]
            cover = (0.5 - outline(u.abs(), v.abs(), v) * radius[i]).clamp(0, 1)[:, None]  # antialiased over one pixel
            ramp = (0.5 + slope[i, :1, None] * (at / size - 0.5) + slope[i, 1:, None] * (at[:, None] / size - 0.5)).clamp(0, 1)[:, None]
            ground = torch.lerp(back[i, 0, :, None, None], back[i, 1, :, None, None], ramp)
            images[i] = (255 * torch.lerp(ground, colour[i, :, None, None], cover)).round().byte()
    return images, labels
