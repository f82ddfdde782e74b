"""How far apart two sets of images are: FID, sFID, KID, Inception Score, precision, recall, PSNR.

    python fid.py REFERENCE SAMPLES                          # every measure
    python fid.py REFERENCE SAMPLES --only fid kid           # some
    python fid.py PHOTOS SAMPLES --save-stats photos.npz     # keep the photographs' statistics
    python fid.py photos.npz OTHER                           # for fid and sfid, again
    python fid.py ORIGINALS RECONSTRUCTIONS --paired         # also the PSNR of the pairs

    line            what it asks
    fid V           do the features of both sets have one mean and one covariance?
    sfid V          the same of spatial features: is everything in its place?
    kid MEAN STD    FID's question, without bias from few images
    is MEAN STD     is each sample of one clear class, and are there many classes?
    precision V     how many samples look real?
    recall V        how much of the real is covered?
    psnr V          how well is each pixel of a pair restored?

What fools each of them stands beside its formula, above its code. Which to use: below some 10,000
images kid; fid and sfid beside numbers of the same N and the same reference; precision and recall
at equal numbers of images. Images are stretched to 299x299 as they are: both sets must have been
cropped and shrunk alike, or let --size do it.

REFERENCE and SAMPLES are each a folder (all images below it), an .npz of images (first array uint8
(N, H, W, 3)) or an .npz of statistics (mu and sigma, maybe mu_s and sigma_s, maybe beside images
arr_0). Statistics of ADM's evaluator are of this protocol; those of pytorch-fid have the same form,
but it resizes otherwise, so that they do not go with samples that are measured here. Pairs are
files of the same name but for the suffix, or, in an .npz, its numbers from 0 on; where all names
are numbers, 7 is 007.

This file needs torch, numpy and pillow, and no other file. Its sections: the measures; the network;
reading an image; measuring two sets; files and the terminal; the command.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import os
import pickle
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps


class BadInput(ValueError):
    """What the user gave cannot be used. The scripts print its one line and exit with status 2."""


# What libraries raise where a file is not there or damaged
BROKEN = (OSError, EOFError, ValueError, RuntimeError, TypeError, LookupError, MemoryError)
BROKEN += (AttributeError, AssertionError, SyntaxError, struct.error, zlib.error)
BROKEN += (zipfile.BadZipFile, pickle.UnpicklingError, Image.DecompressionBombError)

# ================================================================================================
# 1. The measures
# ================================================================================================
# All but PSNR see an image through a network: its 2,048 pooled features (sFID: 2,023 spatial ones;
# the Inception Score: 1,008 logits). Only numbers of one protocol can be compared. FID, sFID,
# precision and recall are those of ADM's evaluator, KID and the Inception Score torch-fidelity's.
# Features may be NumPy arrays or tensors; the distances are computed in float64, on the device of
# the tensors.
#
# FID (Heusel et al. 2017) models each set of features as a Gaussian with mean mu and covariance S,
# and measures the Frechet distance between the two:
#
#     FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))
#
# S_1 S_2 is not symmetric, and scipy's root of it turns imaginary when images are fewer than
# features. But let S_1 = V L V^T (eigenvectors, eigenvalues) and R = V L^(1/2), so that R R^T =
# S_1. A B and B A share their eigenvalues, so S_1 S_2 = R (R^T S_2) has those of R^T S_2 R, which
# is symmetric and positive semi-definite: the trace of the root is the sum of their square roots.
#
# sFID (Nash et al. 2021) is the same distance of features that still know where they are.
#
# What fools both. The sampling error of mu and S counts as distance, so that N images give about
#
#     FID_N = FID_inf + b / N,        in practice b > 0, another one for each model,
#
# if N images are sampled, the reference is fixed, and N is well above 2,048. So a FID of 2.1 on
# 10,000 images and one of 2.1 on 50,000 are two results: if the models have the same b, the first
# number holds five times the bias, and its model is the better one. A random half of the images
# tells how large the bias is: FID_inf = 2 FID_N - FID_(N/2), nearly free of it (Chong and Forsyth
# 2020 put a line through more points). At 2,048 images or fewer S is singular, and the bias large.
# JPEG and another resizer count as distance, though no eye sees them (Parmar et al. 2022). And
# copies of the training set look like a perfect model.


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Means (d,) and covariances (d, d) of two sets -> float, at least 0."""
    given = (mu1, sigma1, mu2, sigma2)
    devices = [each.device for each in given if torch.is_tensor(each)]
    device = devices[0] if devices else "cpu"  # arrays go where the tensors are
    mu1, sigma1, mu2, sigma2 = [
        torch.as_tensor(each, dtype=torch.float64, device=device) for each in given
    ]
    values, vectors = torch.linalg.eigh(sigma1)
    # Few images span few directions. In the others there are eigenvalues of rounding alone, 1e-16,
    # whose roots, 1e-8, would add up.
    spanned = values > 1e-13 * values[-1]
    r = vectors[:, spanned] * values[spanned].sqrt()  # R R^T = S_1
    cross = torch.linalg.eigvalsh(r.T @ sigma2 @ r).clamp_min(0).sqrt().sum()
    shift = (mu1 - mu2).square().sum()
    return (shift + sigma1.trace() + sigma2.trace() - 2 * cross).clamp_min(0).item()


# KID (Binkowski et al. 2018) is the squared maximum mean discrepancy between the two sets under a
# cubic kernel, so that it compares means, covariances and third moments of the d = 2,048 features:
#
#     k(x, y) = (x.y / d + 1)^3
#     KID = mean of k(x_i, x_j), i != j  +  mean of k(y_i, y_j), i != j  -  2 mean of k(x_i, y_j)
#
# Leaving the pairs i = j out makes it unbiased: below some 10,000 images it is the number to trust,
# and it may come out below 0. As everybody does, we give mean and standard deviation over 100
# subsets of 1,000 images (torch-fidelity's, if its first input is the reference). The deviation is
# that of a subset, not the error of the mean. If y_i is made from x_i, a reconstruction, the two
# are not independent, and the pairs i = j of the last term, too, are left out. What fools KID: all
# that fools FID, except that few images merely make it noisy.


def kernel_distance(features1, features2, subsets=100, size=1000, paired=False):
    """KID of features (n, d) and (m, d) -> mean and standard deviation over the subsets.

    paired: features2[i] is of a copy of image i. Where there are fewer than `size` images the
    subsets are smaller, with a note; where one subset is all images of both sets, there is one, and
    its deviation is nan. BadInput if there are fewer than 2.
    """
    n = len(features1)
    m = len(features2)
    if min(n, m) < 2:
        raise BadInput(f"KID takes at least 2 images in each set, and there are {n} and {m}")
    if min(n, m) < size:
        note(f"KID's subsets are of {min(n, m)} images, not {size}: there are {n} and {m}")
        size = min(n, m)
    if size == n == m:
        subsets = 1  # all are the same
    features1 = torch.as_tensor(features1)
    features2 = torch.as_tensor(features2)
    rng = np.random.RandomState(2020)
    distances = []
    for _ in range(subsets):
        chosen = rng.choice(n, size, replace=False)
        x = features1[chosen].double()
        y = features2[chosen if paired else rng.choice(m, size, replace=False)].double()
        within = mean_of_pairs(cubic_kernel(x, x)) + mean_of_pairs(cubic_kernel(y, y))
        across = cubic_kernel(x, y)
        across = mean_of_pairs(across) if paired else across.mean()
        distances.append(within - 2 * across)
    distances = torch.stack(distances)
    deviation = distances.std(correction=0).item() if size < max(n, m) else float("nan")
    return distances.mean().item(), deviation


def cubic_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_pairs(kernel):
    """The mean of a matrix (n, n) without its diagonal."""
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))


# The Inception Score (Salimans et al. 2016) needs no reference. It is high if the network is sure
# of each image and sees many kinds:
#
#     IS = exp(mean over x of KL(p(y|x) || p(y))),     p(y) = mean over x of p(y|x)
#
# Logits leave out the bias, as in ADM's evaluator and torch-fidelity. These two split the images
# differently: torch-fidelity shuffles them and makes 10 parts, as we do; ADM's is the mean of
# inception_score(part, splits=1) over parts of 5,000 in file order. Published tables hold ADM's: of
# 50,000 images in random order the two agree but for chance, in a file sorted by class ADM's is
# lower, since its parts show few kinds. What fools it: one perfect image for each class scores as
# well as a thousand; so do copies of the training set, for it never sees the reference. And it
# grows with N: a part of n images shows n kinds at most.


def inception_score(logits, splits=10):
    """Logits (N, 1008) -> mean and standard deviation over the splits, shuffled by a fixed seed.

    Fewer than `splits` images make one split each, with a note. BadInput if there is no image.
    """
    n = len(logits)
    if n == 0:
        raise BadInput("the Inception Score takes at least 1 image")
    if n < splits:
        note(f"the Inception Score has {n} splits, not {splits}: there are {n} images")
        splits = n
    order = np.random.RandomState(2020).permutation(n)
    bounds = [i * n // splits for i in range(1, splits)]
    logits = torch.as_tensor(logits)
    scores = []
    for index in np.split(order, bounds):
        p = logits[index].double().softmax(1)
        kl = torch.special.xlogy(p, p / p.mean(0)).sum(1)
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# Precision and recall (Kynkaanniemi et al. 2019) part what FID mixes: bad samples, and samples of
# too few kinds. A set's manifold is the union of balls around its features, the radius of each the
# distance to the k-th nearest other one of the set, k = 3:
#
#     precision = share of samples inside the reference's manifold
#     recall    = share of the reference inside the samples' manifold
#
# What fools them: the numbers of images (more points, smaller balls), so compare at equal ones, as
# ADM's 10,000 references and 50,000 samples; an outlier, whose ball is wide and covers much; copies
# of the reference, which score 1 and 1. (ADM's evaluator computes the distances in float16.)

ROWS = 256  # of the matrix of distances, in memory at once


def precision_recall(reference, samples, k=3):
    """Features (n, d) and (m, d) -> precision, recall. BadInput if n or m is not above k."""
    n = len(reference)
    m = len(samples)
    if min(n, m) <= k:
        raise BadInput(f"precision and recall take more than {k} images a set, not {n} and {m}")
    reference = torch.as_tensor(reference).double()
    samples = torch.as_tensor(samples).double()
    return share_inside(samples, reference, k), share_inside(reference, samples, k)


def share_inside(points, centres, k):
    """The share of points (n, d) inside the manifold of centres (m, d)."""
    radii = squared_radii(centres, k)
    inside = []
    for some in points.split(ROWS):
        inside.append((squared_distances(some, centres) <= radii).any(1))
    return torch.cat(inside).double().mean().item()


def squared_radii(features, k):
    """The squared distance of each of features (n, d) to its k-th nearest other one -> (n,)."""
    radii = []
    for rows in torch.arange(len(features)).split(ROWS):
        squared = squared_distances(features[rows], features)
        squared[torch.arange(len(rows)), rows] = torch.inf  # nobody is a neighbour of itself
        radii.append(squared.topk(k, largest=False).values[:, -1])
    # A hair more, so that copies, whose distance is 0 but for rounding, lie in a ball of radius 0.
    return torch.cat(radii) + 1e-12 * features.square().sum(1)


def squared_distances(x, y):
    """float64 (n, d) and (m, d) -> (n, m). In float32 the differences of close points drown."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(squares, x, y.T, alpha=-2)  # |x|^2 + |y|^2 - 2 x.y


def evenly_spaced(n, k):
    """Up to k positions of range(n), evenly spaced: folders come sorted by class."""
    return torch.arange(min(n, k)) * n // min(n, k)


# PSNR, the peak signal-to-noise ratio, compares two images pixel by pixel. What fools it: blur,
# which is the mean of all that might be there, and so the guess that costs least.


def psnr(x, y):
    """10 log10(255^2 / mean squared error) of each pair of images.

    uint8 (N, C, H, W) twice -> (N,), dB. Equal images: 99.
    """
    mse = (x.float() - y.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse.clamp_min(255**2 / 10**9.9))


# ================================================================================================
# 2. The network
# ================================================================================================
# FID's network is TensorFlow's Inception graph of 2015-12-05. Its quirks are part of every
# published number: average pools that leave the padding out of the mean, a last block that pools
# by maximum, 1,008 outputs for 1,000 classes, TensorFlow 1's resizing. Layers bear the names of the
# published file, pt_inception-2015-12-05-6726825d.pth.


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    """3x3, of the same size; the padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed(nn.Module):
    """Chains of layers side by side; their outputs are concatenated.

    chains: {name: list of ConvUnits and pools}. A chain's ConvUnits are called name_1, name_2, ...;
    a single one bears the chain's name.
    """

    def __init__(self, **chains):
        super().__init__()
        self.chains = list(chains.values())
        for name, layers in chains.items():
            units = [layer for layer in layers if isinstance(layer, ConvUnit)]
            for i, unit in enumerate(units):
                self.add_module(name if len(units) == 1 else f"{name}_{i + 1}", unit)

    def forward(self, x):
        outputs = []
        for layers in self.chains:
            y = x
            for layer in layers:
                y = layer(y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def mixed5(c_in, c_pool):
    """Mixed_5b, 5c, 5d: 35x35."""
    return Mixed(
        branch1x1=[ConvUnit(c_in, 64)],
        branch5x5=[ConvUnit(c_in, 48), ConvUnit(48, 64, 5)],
        branch3x3dbl=[ConvUnit(c_in, 64), ConvUnit(64, 96, 3), ConvUnit(96, 96, 3)],
        branch_pool=[average_pool, ConvUnit(c_in, c_pool)],
    )


HALVING = {"kernel": 3, "stride": 2, "padding": "valid"}


def mixed6a():
    """35x35 -> 17x17."""
    return Mixed(
        branch3x3=[ConvUnit(288, 384, **HALVING)],
        branch3x3dbl=[ConvUnit(288, 64), ConvUnit(64, 96, 3), ConvUnit(96, 96, **HALVING)],
        branch_pool=[nn.MaxPool2d(3, stride=2)],
    )


def mixed6(c):
    """Mixed_6b to 6e: 17x17. The 7x7 convolutions are pairs of 1x7 and 7x1."""
    row = (1, 7)
    column = (7, 1)
    return Mixed(
        branch1x1=[ConvUnit(768, 192)],
        branch7x7=[ConvUnit(768, c), ConvUnit(c, c, row), ConvUnit(c, 192, column)],
        branch7x7dbl=[
            ConvUnit(768, c),
            ConvUnit(c, c, column),
            ConvUnit(c, c, row),
            ConvUnit(c, c, column),
            ConvUnit(c, 192, row),
        ],
        branch_pool=[average_pool, ConvUnit(768, 192)],
    )


def mixed7a():
    """17x17 -> 8x8."""
    return Mixed(
        branch3x3=[ConvUnit(768, 192), ConvUnit(192, 320, **HALVING)],
        branch7x7x3=[
            ConvUnit(768, 192),
            ConvUnit(192, 192, (1, 7)),
            ConvUnit(192, 192, (7, 1)),
            ConvUnit(192, 192, **HALVING),
        ],
        branch_pool=[nn.MaxPool2d(3, stride=2)],
    )


class Mixed7(nn.Module):
    """Mixed_7b and 7c: 8x8. The last steps of two branches fork into 1x3 and 3x1, side by side."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = ConvUnit(c_in, 320)
        self.branch3x3_1 = ConvUnit(c_in, 384)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3))
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvUnit(c_in, 448)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3)
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1))
        self.branch_pool = ConvUnit(c_in, 192)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch3x3_1(x)
        b = [self.branch3x3_2a(b), self.branch3x3_2b(b)]
        c = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        c = [self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        d = self.branch_pool(self.pool(x))
        return torch.cat([a, *b, *c, d], dim=1)


class InceptionV3(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 2048), logits without bias (B, 1008), spatial (B, 2023).

    The spatial features, of sFID, are 7 channels at 17x17 places, in TensorFlow's order (height,
    width, channel). Random until weights are loaded; see load_inception. Where the weights lack the
    classifier, fc is None, and so are the logits.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, **HALVING)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padding="valid")
        self.Mixed_5b = mixed5(192, 32)
        self.Mixed_5c = mixed5(256, 64)
        self.Mixed_5d = mixed5(288, 64)
        self.Mixed_6a = mixed6a()
        self.Mixed_6b = mixed6(128)
        self.Mixed_6c = mixed6(160)
        self.Mixed_6d = mixed6(160)
        self.Mixed_6e = mixed6(192)
        self.Mixed_7a = mixed7a()
        self.Mixed_7b = Mixed7(1280, average_pool)
        self.Mixed_7c = Mixed7(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)
        self.eval()
        self.requires_grad_(False)

    def forward(self, images):
        with full_float32(images.device):
            x = (resize_to_299(images) - 128) / 128
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
            x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
            x = self.Conv2d_2b_3x3(x)  # (B, 64, 147, 147)
            x = F.max_pool2d(x, 3, stride=2)  # (B, 64, 73, 73)
            x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
            x = self.Conv2d_4a_3x3(x)  # (B, 192, 71, 71)
            x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
            x = self.Mixed_5b(x)  # (B, 256, 35, 35)
            x = self.Mixed_5c(x)  # (B, 288, 35, 35)
            x = self.Mixed_5d(x)  # (B, 288, 35, 35)
            x = self.Mixed_6a(x)  # (B, 768, 17, 17)
            x = self.Mixed_6b(x)
            x = self.Mixed_6c(x)
            x = self.Mixed_6d(x)
            spatial = x[:, :7]  # of branch1x1, which comes first in the concatenation
            x = self.Mixed_6e(x)
            x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
            x = self.Mixed_7b(x)  # (B, 2048, 8, 8)
            x = self.Mixed_7c(x)
            features = x.mean((2, 3))  # (B, 2048)
            logits = F.linear(features, self.fc.weight) if self.fc else None
            return features, logits, spatial.permute(0, 2, 3, 1).flatten(1)

    def fold(self):
        """Merge every batch norm into its convolution: the same function, faster."""
        for unit in [m for m in self.modules() if isinstance(m, ConvUnit)]:
            unit.conv = nn.utils.fusion.fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def full_float32(device):
    """No TF32, bfloat16 or autocast inside, whatever the caller has set: precisions do not mix.

    Two sets of 10,000 photographs of CIFAR-10 are at a FID of 5.16 in float32 as in bfloat16, but
    at 5.48 if one of them was measured in bfloat16.
    """
    cuda = torch.backends.cuda
    cudnn = torch.backends.cudnn
    mkldnn = torch.backends.mkldnn
    if hasattr(cudnn, "conv"):  # torch 2.9 and later
        backends = [cudnn.conv, cuda.matmul, mkldnn.conv, mkldnn.matmul]
        attribute = "fp32_precision"
        full = "ieee"
    else:
        backends = [cudnn, cuda.matmul]
        attribute = "allow_tf32"
        full = False
    before = [getattr(backend, attribute) for backend in backends]
    for backend in backends:
        setattr(backend, attribute, full)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before):
            setattr(backend, attribute, value)


def resize_to_299(images):
    """uint8 (B, 3, H, W) -> float (B, 3, 299, 299) in [0, 255], as TensorFlow 1 does it."""
    rows = resize_matrix(images.shape[2]).to(images.device)
    columns = resize_matrix(images.shape[3]).to(images.device)
    return rows @ images.float() @ columns.T


@functools.lru_cache(8)
def resize_matrix(n):
    """Bilinear interpolation of n points to 299, as a matrix (299, n).

    Point i comes from i * n / 299: TensorFlow 1 has no half-pixel centres and no antialiasing.
    """
    position = torch.arange(299) * (n / 299)
    low = position.long()
    high = (low + 1).clamp(max=n - 1)
    part = position.frac()[:, None]
    return (1 - part) * F.one_hot(low, n) + part * F.one_hot(high, n)


# A file that can be downloaded, from base_url + name; see fetch.
Published = namedtuple("Published", "name base_url sha256")

INCEPTION = Published(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


def load_inception(file, device):
    """The published network, or the one in `file`, ready to measure; its batch norms folded.

    A file without its classifier, fc, serves for all but the Inception Score. BadInput if the file
    is not such a network.
    """
    net = InceptionV3()
    path = fetch(INCEPTION) if file is None else file
    saved = load_checkpoint(path)
    if "fc.weight" not in saved:
        net.fc = None
    load_states(path, {"": net}, {"": saved})
    return net.fold().to(device)


# ================================================================================================
# 3. Reading an image
# ================================================================================================

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
IMAGE_SUFFIXES += (".ppm", ".pgm", ".pnm", ".avif", ".jp2", ".j2k")

# Pillow goes by a file's content, not by its name, and hands some formats, as EPS, to another
# program: these it may read.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")


def load_image(item, size=None, crop=None):
    """A file or an array uint8 (H, W, 3) -> uint8 (3, H, W). Photographs are turned upright.

    If size is given: a square of it, size x size; see crop_and_resize. Of a moving picture the
    first frame; transparency is ignored. BadInput if it cannot be read.
    """
    if isinstance(item, np.ndarray):
        picture = Image.fromarray(item)
    else:
        try:
            with Image.open(item, formats=FORMATS) as file:
                picture = to_rgb(ImageOps.exif_transpose(file))
        except BROKEN as error:
            raise BadInput(f"cannot read {item}: {one_line(error)}") from None
    if crop is not None or size is not None and picture.size != (size, size):
        picture = crop_and_resize(picture, size, crop)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_rgb(picture):
    """Any PIL picture -> RGB, 8 bits. ValueError if its numbers have no clear meaning.

    Pillow alone would clip greys of 16 bits to 255, and floats to whole numbers.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        largest = 1 if picture.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= largest):  # nor NaN
            raise ValueError(f"it holds {values.min()} to {values.max()}, not 0 to {largest}")
        # of 16 bits the high byte, as Pillow takes it of 16-bit colours
        values = (255 * values).round() if picture.mode == "F" else values >> 8
        picture = Image.fromarray(values.astype(np.uint8))
    return picture.convert("RGB")


def crop_and_resize(picture, size, crop=None):
    """A square of a PIL picture, size x size.

    crop: (share, x, y): the square's side as a share of the short side, in (0, 1], and where it
    lies between left and right, top and bottom, in [0, 1). None: the largest, in the middle.

    The picture is shrunk as those of ADM's evaluator were, since FID sees the difference: halved
    by a box filter while it is twice too large, then bicubically (with antialiasing), then cropped.
    """
    share = 1.0 if crop is None else crop[0]
    short = round(size / share)  # of the shrunk picture; `size` is a share `share` of it
    # The middle of a line of pixels alone: enlarged as a whole it would take gigabytes.
    longest = 16 * min(picture.size)
    margins = [max(0, side - longest) // 2 for side in picture.size]
    picture = ImageOps.crop(picture, tuple(margins))
    width, height = picture.size
    while min(width, height) >= 2 * short:
        width //= 2
        height //= 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    scale = short / min(width, height)
    width = round(width * scale)
    height = round(height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if crop is None:
        left = (width - size) // 2
        top = (height - size) // 2
    else:  # each of the width - size + 1 places is as likely, if x is uniform
        left = int(crop[1] * (width - size + 1))
        top = int(crop[2] * (height - size + 1))
    return picture.crop((left, top, left + size, top + size))


# ================================================================================================
# 4. Measuring two sets
# ================================================================================================
# Each image passes the network once. Means and covariances come from sums that grow batch by batch,
#
#     mu = sum x / N,        S = (sum x x^T - N mu mu^T) / (N - 1),
#
# so that memory does not grow with the number of images. Features (8 KB an image) and logits (4 KB)
# are kept only for the measures that look at single images.

# What is known of a set of images; None: not known.
#   name              for messages
#   items             a list of files, or an array uint8 (N, H, W, 3)
#   pooled, spatial   mean (d,) and covariance (d, d), float64, of the features and spatial features
#   n, sizes          of how many images these are, and of which heights and widths
#   features, logits  float32 (N, 2048) and (N, 1008), of each image
Statistics = namedtuple(
    "Statistics", "name items pooled spatial n sizes features logits", defaults=[None] * 7
)

# measure, in the order of the output: the part of the Statistics that it takes, of both sets (the
# Inception Score: of the samples alone)
TAKES = {
    "fid": "pooled",
    "sfid": "spatial",
    "kid": "features",
    "is": "logits",
    "precision": "features",
    "recall": "features",
}


class RunningMoments:
    """Mean and covariance of vectors that come in batches (B, d)."""

    def __init__(self, d, device):
        self.total = torch.zeros(d, dtype=torch.float64, device=device)
        self.outer = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, batch):
        batch = batch.double()
        self.total += batch.sum(0)
        self.outer.addmm_(batch.T, batch)

    def moments(self, n):
        """Mean (d,) and covariance (d, d) of the n vectors so far."""
        sigma = (self.outer - torch.outer(self.total, self.total) / n) / (n - 1)
        return self.total / n, sigma


def read_images(name, items, size=None):
    """Yield load_image(item, size) for each of items, in order; some are read in parallel."""
    progress = Progress(f"reading {name}", len(items))
    load = functools.partial(load_image, size=size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 64):
            chunk = items[first : first + 64]
            yield from pool.map(load, chunk)
            progress.update(first + len(chunk))


@torch.no_grad()
def measure(name, items, net, device, keep=(), size=None):
    """Images (files, or an array uint8 (N, H, W, 3)) -> Statistics, on the device.

    Of "features" and "logits" those named in `keep` are kept for each image. size: see load_image.
    `name` is for messages. BadInput if an image cannot be read or fewer than 2 are there.
    """
    n = len(items)
    if n < 2:
        raise BadInput(f"{name}: a covariance takes at least 2 images, and there is {n}")
    # Small batches stay in a CPU's caches: 10 are a fifth faster than 50.
    batch_size = 10 if device.type == "cpu" else 100

    def batch_and_shape(numbered_image):  # for only equal shapes can be stacked
        i, image = numbered_image
        return i // batch_size, image.shape

    pooled = RunningMoments(2048, device)
    spatial = RunningMoments(2023, device)
    features = []
    logits = []
    sizes = set()
    numbered_images = enumerate(read_images(name, items, size))
    for (_, shape), group in itertools.groupby(numbered_images, batch_and_shape):
        images = torch.stack([image for _, image in group]).to(device)
        batch_features, batch_logits, batch_spatial = net(images)
        pooled.add(batch_features)
        spatial.add(batch_spatial)
        sizes.add(tuple(shape[1:]))
        if "features" in keep:
            features.append(batch_features)
        if "logits" in keep and batch_logits is not None:
            logits.append(batch_logits)
    kept = [torch.cat(batches) if batches else None for batches in (features, logits)]
    return Statistics(name, items, pooled.moments(n), spatial.moments(n), n, sizes, *kept)


def compare(reference, samples, wanted, paired=False):
    """Statistics of two sets -> {measure: its value, or (mean, deviation)}, those of `wanted`.

    paired: see kernel_distance. Notes say what cannot be had, and what may fool a FID.
    """
    possible = [name for name in wanted if can_be_had(name, reference, samples)]
    if len(possible) < len(wanted):
        left_out = [name for name in wanted if name not in possible]
        note(f"left out, for want of images or of a classifier: {', '.join(left_out)}")
    figures = {}
    if "fid" in possible:
        figures["fid"] = frechet_distance(*reference.pooled, *samples.pooled)
    if "sfid" in possible:
        figures["sfid"] = frechet_distance(*reference.spatial, *samples.spatial)
    if figures:
        note_on_fid(reference, samples)
    if "kid" in possible:
        figures["kid"] = kernel_distance(reference.features, samples.features, paired=paired)
    if "is" in possible:
        figures["is"] = inception_score(samples.logits)
    if "precision" in possible or "recall" in possible:
        of_reference = reference.features
        if len(of_reference) > 10000:  # as many as in ADM's files
            note(f"precision and recall take 10,000 of the {len(of_reference):,} reference images")
            of_reference = of_reference[evenly_spaced(len(of_reference), 10000)]
        both = precision_recall(of_reference, samples.features)
        figures |= zip(("precision", "recall"), both)
    return {name: value for name, value in figures.items() if name in wanted}


def can_be_had(name, reference, samples):
    """Whether two Statistics tell a measure."""
    sides = [samples] if name == "is" else [reference, samples]
    parts = [getattr(side, TAKES[name]) for side in sides]
    if any(part is None for part in parts):
        return False
    return name not in ("precision", "recall") or min(map(len, parts)) > 3


def note_on_fid(reference, samples):
    """Notes where the images of two Statistics are too few for FID and sFID, or of many sizes."""
    for each in (reference, samples):
        if each.n is not None and each.n < 2048:
            note(f"{each.name}: below 2,048 images FID and sFID are far too high; KID is not")
    sizes = (reference.sizes or set()) | (samples.sizes or set())
    if len(sizes) > 1:
        note(
            f"images are of {len(sizes)} sizes, and FID sees how they are resized: "
            "crop and shrink all alike (fid.py --size N)"
        )


def read_set(spec):
    """What a command line names -> Statistics, as far as known; a note counts the images.

    An .npz may hold statistics, images or both, as ADM's reference files do.
    """
    if not spec:
        raise BadInput("a path is empty: is a variable of the shell not set?")
    path = Path(spec)
    items = None
    pooled = None
    spatial = None
    if path.is_dir():
        items = list_folder(path)
    elif path.suffix == ".npz" and path.is_file():
        arrays = read_arrays(path)
        pooled = read_moments(spec, arrays, "mu", "sigma", 2048)
        spatial = read_moments(spec, arrays, "mu_s", "sigma_s", 2023)
        if not pooled or "arr_0" in arrays:
            items = first_array(spec, arrays)
            note(f"{spec}: {len(items):,} images")
    else:
        raise BadInput(f"no data at {spec!r}: want a folder of images or an .npz file")
    return Statistics(spec, items, pooled, spatial)


def list_folder(path):
    """The image files below a folder. A note counts them; BadInput if there are none."""
    files = list(files_below(path, set()))
    images = [file for file in files if file.name.lower().endswith(IMAGE_SUFFIXES)]
    note(f"{path}: {len(images):,} images, {len(files) - len(images):,} other files")
    if not images:
        raise BadInput(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {path}")
    return images


def files_below(folder, seen):
    """Yield the files below a folder, sorted, but for hidden ones. seen: the folders so far.

    Links are followed, but no folder is looked at twice, so that a link to above does no harm.
    """
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, seen)
        else:
            yield path


def first_array(spec, arrays):
    """The images among the arrays of an .npz, arr_0 or the first -> uint8 (N, H, W, 3)."""
    images = arrays["arr_0"] if "arr_0" in arrays else next(iter(arrays.values()), np.zeros(0))
    is_images = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    if not is_images or images.size == 0:
        raise BadInput(
            f"{spec}: the first array must be uint8 (N, H, W, 3), "
            f"and is {images.dtype} {images.shape}"
        )
    return images


def read_moments(spec, arrays, mu_name, sigma_name, d):
    """Mean and covariance, float64, or None if a file's arrays lack them. BadInput if unusable."""
    if mu_name not in arrays or sigma_name not in arrays:
        return None
    mu = arrays[mu_name].astype(np.float64)
    sigma = arrays[sigma_name].astype(np.float64)
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise BadInput(
            f"{spec}: {mu_name} must be ({d},) and {sigma_name} ({d}, {d}), "
            f"and they are {mu.shape} and {sigma.shape}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise BadInput(f"{spec}: {mu_name} or {sigma_name} holds NaN or infinity")
    # What is below a thousandth of the largest variance may be the rounding of whoever saved it.
    tolerance = 1e-3 * abs(sigma).max() + 1e-30
    symmetric = abs(sigma - sigma.T).max() <= tolerance
    # S + t I has a Cholesky factor just if no eigenvalue of S is below -t.
    shifted = torch.from_numpy(sigma + tolerance * np.eye(d))
    if not symmetric or torch.linalg.cholesky_ex(shifted).info != 0:
        raise BadInput(f"{spec}: {sigma_name} is not symmetric, or has negative eigenvalues")
    return mu, sigma


# ================================================================================================
# 5. Files and the terminal
# ================================================================================================


def write_atomically(path, save):
    """save(file) to a temporary neighbour of path, sync, rename: complete or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns the error of a full disk into a RuntimeError
        raise BadInput(f"cannot write {path}: {one_line(error.__context__ or error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(name, folder=None):
    """Where a published file is, or would be: in folder, or in torch's cache."""
    return Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name


def fetch(published, folder=None):
    """Path of a Published file, downloaded if need be; its SHA-256 is checked every time."""
    path = cache_path(published.name, folder)
    source = published.base_url + published.name
    digest = published.sha256
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # to a temporary file, checked, then renamed
            torch.hub.download_url_to_file(source, str(path), digest)
    except (OSError, RuntimeError) as error:  # no network; another SHA-256
        raise BadInput(
            f"cannot download {published.name} ({error}): fetch {source} elsewhere and put it at "
            f"{path}; SHA-256 {digest}"
        ) from None
    if sha256(path) != digest:
        raise BadInput(f"{path} is not the published file, SHA-256 {digest}: delete it to fetch it")
    return path


def read_arrays(path):
    """The arrays of an .npz, or of an .npy under the name "array". Nothing is ever unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        return {"array": file} if isinstance(file, np.ndarray) else dict(file)
    except BROKEN as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def load_checkpoint(path, device="cpu"):
    """A file of a dictionary of tensors and plain values. Code in it is never run."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except BROKEN as error:
        raise BadInput(f"cannot read {path}: {one_line(error)[:200] or 'damaged'}") from None
    if not isinstance(saved, dict):
        raise BadInput(f"{path} holds a {type(saved).__name__}, not a dictionary")
    return saved


def load_weights(path, net):
    """Load a file that holds the state of net alone."""
    load_states(path, {"": net}, {"": load_checkpoint(path)})


def load_states(path, parts, saved):
    """Load a checkpoint's states, saved[name], into parts[name], modules or optimizers.

    BadInput if they do not fit, or a module's hold NaN or infinity.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except BROKEN as error:
            raise BadInput(
                f"{path} holds other weights than this network, with these settings, has: "
                f"{one_line(error)[:200]}"
            ) from None
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                if not tensor.isfinite().all():
                    raise BadInput(f"{path} is of no use: NaN or infinity in {name} {key}")


def one_line(error):
    return " ".join(str(error).split())


def note(message):
    print(f"note: {message}", file=sys.stderr)


class Progress:
    """Every five seconds a line on standard error: how far, and how long it will still take."""

    def __init__(self, what, total, first=0):
        self.what = what
        self.total = total
        self.first = first
        self.start = time.monotonic()
        self.shown = self.start  # when the last line came

    def update(self, done, text=""):
        now = time.monotonic()
        if done < self.total and now - self.shown < 5:
            return
        self.shown = now
        each = (now - self.start) / max(done - self.first, 1)
        left = int(each * (self.total - done))
        line = f"{self.what} {done}/{self.total} {text} {left // 60}:{left % 60:02d} left"
        print(one_line(line), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput."""

    def __init__(self, about, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=about, formatter_class=raw, allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(message)


def run_script(main):
    """main(), where errors that the user can mend become one line and status 2. Ctrl-C: status 130.

    OSErrors are such errors, since disks are the user's, too.
    """
    try:
        main()
    except (BadInput, OSError, torch.cuda.OutOfMemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ================================================================================================
# 6. The command
# ================================================================================================


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("reference", help="a folder of images, or an .npz of images or of statistics")
    add("samples", help="the same")
    add("--only", nargs="+", choices=[*TAKES, "psnr"], help="these measures (default: all)")
    add("--size", type=int, help="first crop each image to a square and shrink it to SIZE x SIZE")
    add("--weights", metavar="FILE", help=f"the network (default: {INCEPTION.name}, downloaded)")
    add("--save-stats", metavar="FILE.npz", help="write the reference's statistics")
    add("--force", action="store_true", help="--save-stats may replace a file")
    add("--paired", action="store_true", help="files of one name are pairs: PSNR; KID without them")
    args = parser.parse_args()
    args.paired = args.paired or "psnr" in (args.only or [])
    args.only = [name for name in TAKES if name in (args.only or TAKES)]
    if args.size is not None and not 1 <= args.size <= 4096:
        raise BadInput(f"--size is {args.size}: it must lie in 1 to 4,096 pixels")
    check_save_path(args.save_stats, [args.reference, args.samples, args.weights], args.force)
    return args


def check_save_path(path, inputs, force):
    """BadInput if path is of no use to --save-stats, or there already: --force is for that."""
    if path is None:
        return
    if not path.endswith(".npz"):
        raise BadInput(f"--save-stats is {path!r}: it must end in .npz")
    if os.path.exists(path):
        is_input = any(each and os.path.samefile(path, each) for each in inputs)
        if is_input or not force:
            raise BadInput(f"{path} is there already: --force replaces it, unless it is an input")


def pair_samples(reference, samples):
    """The samples in the order of the reference images of the same names; both Statistics.

    BadInput if the names do not match one to one.
    """
    if reference.items is None or samples.items is None:
        raise BadInput("--paired wants images, not statistics")
    reference_names = names_of(reference)
    sample_names = names_of(samples)
    if all(name.isdecimal() for name in reference_names + sample_names):
        reference_names = [int(name) for name in reference_names]
        sample_names = [int(name) for name in sample_names]
    of_reference = Counter(reference_names)
    of_samples = Counter(sample_names)
    for name in of_reference | of_samples:
        if not of_reference[name] == of_samples[name] == 1:
            raise BadInput(
                f"--paired: {name!r} is the name of {of_reference[name]} reference images and "
                f"{of_samples[name]} samples, of {len(reference_names):,} and {len(sample_names):,}"
            )
    place = {name: i for i, name in enumerate(sample_names)}
    return samples._replace(items=[samples.items[place[name]] for name in reference_names])


def names_of(images):
    """What pairs go by: paths below the folder, without suffix; in an array the places, from 0."""
    if isinstance(images.items, np.ndarray):
        return [str(i) for i in range(len(images.items))]
    return [str(path.relative_to(images.name).with_suffix("")) for path in images.items]


def mean_psnr(reference, samples, size):
    """The mean PSNR of the pairs of images of two Statistics. size: see load_image."""
    values = []
    originals = read_images(reference.name, reference.items, size)
    copies = read_images(samples.name, samples.items, size)
    for i, (x, y) in enumerate(zip(originals, copies)):
        if x.shape != y.shape:
            raise BadInput(f"--paired: the images {i} are {tuple(x.shape)} and {tuple(y.shape)}")
        values.append(psnr(x[None], y[None]))
    return torch.cat(values).mean().item()


def completed(known, parts, network, device, size):
    """Statistics, with what they lack of these parts measured, if there are images.

    Means and covariances of a file come first, for they may be of more images. network() -> net.
    """
    complete = all(getattr(known, part) is not None for part in parts)
    if complete or known.items is None:
        return known
    measured = measure(known.name, known.items, network(), device, parts, size)
    if known.pooled is None:
        return measured
    spatial = known.spatial or measured.spatial
    return measured._replace(pooled=known.pooled, spatial=spatial, n=None, sizes=None)


def save_moments(file, statistics):
    """An .npz with mu and sigma and, if they are known, mu_s and sigma_s."""
    arrays = dict(zip(("mu", "sigma"), statistics.pooled))
    if statistics.spatial is not None:
        arrays |= dict(zip(("mu_s", "sigma_s"), statistics.spatial))
    np.savez(file, **{name: torch.as_tensor(array).cpu() for name, array in arrays.items()})


def main():
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = read_set(args.reference)
    samples = read_set(args.samples)
    if args.paired:  # before the network runs, for its errors are found soon
        samples = pair_samples(reference, samples)
        paired_psnr = mean_psnr(reference, samples, args.size)

    of_samples = {TAKES[name] for name in args.only}
    if reference.items is None or samples.items is None:
        of_samples -= {"features"}  # which are compared with those of the other set
    of_reference = of_samples - {"logits"}
    if args.save_stats:
        of_reference |= {"pooled"}

    network = functools.cache(functools.partial(load_inception, args.weights, device))
    reference = completed(reference, of_reference, network, device, args.size)
    samples = completed(samples, of_samples, network, device, args.size)
    figures = compare(reference, samples, args.only, paired=args.paired)
    if args.paired:
        figures["psnr"] = paired_psnr
    if not (figures or args.save_stats):
        raise BadInput("nothing that was asked for can be had of these two sets")
    for name, value in figures.items():
        decimals = 8 if name == "kid" else 6
        print(name, *[f"{number:.{decimals}f}" for number in np.atleast_1d(value)])
    if args.save_stats:  # last: a disk that fails costs no figure
        write_atomically(args.save_stats, lambda file: save_moments(file, reference))


if __name__ == "__main__":
    run_script(main)
