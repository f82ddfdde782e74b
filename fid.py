"""How far apart two sets of images are: the measures of the field's evaluator, and KID and PSNR.

    python fid.py REFERENCE SAMPLES                               # every measure
    python fid.py REFERENCE SAMPLES --only fid kid                # some
    python fid.py cifar10 samples.npz --save-stats cifar10.npz    # keep the reference's statistics
    python fid.py cifar10.npz OTHER                               # for fid and sfid, again

    line              what it asks                          what fools it
    fid V             do the features of both sets have     few images raise it; so do JPEG and
                      one mean and one covariance?          another resizer; memorising lowers it
    sfid V            the same of spatial features: is      as FID
                      everything in its place?
    kid MEAN STD      FID's question, without bias from     JPEG, another resizer, memorising; few
                      few images                            images make it noisy
    is MEAN STD       is each sample of one clear class,    one good image a class; it never sees
                      and are there many classes?           the reference; few images lower it
    precision V       how many samples look real?           the same real image, again and again
    recall V          how much of the real is covered?      rare bad samples far out, whose balls
                      (both of features)                    are wide; memorising lifts both
    psnr V            how well is each pixel restored?      blur (only of pairs: --paired)

Which to use: below some 10,000 images kid; fid and sfid beside numbers of the same N and the same
reference; precision and recall at equal numbers of images. Images are stretched to 299x299 as they
are: both sets must have been cropped and shrunk alike, or let --size do it.

Section 1 gives the formula of each. REFERENCE and SAMPLES are each a folder of images, an .npz of
images (first array uint8 (N, H, W, 3)), an .npz of statistics (mu and sigma, maybe mu_s and
sigma_s, maybe beside images arr_0), or cifar10 or shapes, their training images. Statistics of
ADM's evaluator are of this protocol; those of pytorch-fid have the same form, but it resizes
otherwise, so that they do not go with samples that are measured here.

This file needs torch, numpy and pillow, and no other file. Its sections:

    1  the measures           frechet_distance, kernel_distance, inception_score,
                              precision_recall, psnr
    2  the network            InceptionV3
    3  measuring sets         measure, compare
    4  images from anywhere   load_data, stream_batches; shapes, cifar10, folders, arrays
    5  files                  atomic writing, checked downloads, checkpoints
    6  the terminal           progress, one-line errors, main
"""

import argparse
import contextlib
import difflib
import fcntl
import functools
import hashlib
import itertools
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # until run_script takes over, Ctrl-C ends the slow imports silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps


class BadInput(ValueError):
    """What the user gave cannot be used. The scripts print its one line and exit with status 2."""


# ================================================================================================
# 1. The measures
# ================================================================================================
# All but PSNR see an image through a network: its 2,048 pooled features (sFID: 2,023 spatial ones;
# the Inception Score: 1,008 logits). Only numbers of one protocol can be compared. FID, sFID,
# precision and recall are those of ADM's evaluator, KID and the Inception Score torch-fidelity's.
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
    """Means (d,) and covariances (d, d) of two sets -> float, computed in float64."""
    mu1 = torch.as_tensor(mu1, dtype=torch.float64)
    mu2 = torch.as_tensor(mu2, dtype=torch.float64)
    sigma1 = torch.as_tensor(sigma1, dtype=torch.float64)
    sigma2 = torch.as_tensor(sigma2, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(sigma1)
    r = vectors * values.clamp_min(0).sqrt()  # R R^T = S_1
    cross = torch.linalg.eigvalsh(r.T @ sigma2 @ r).clamp_min(0).sqrt().sum()
    shift = (mu1 - mu2).square().sum()
    return max(0.0, (shift + sigma1.trace() + sigma2.trace() - 2 * cross).item())


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

    paired: features2[i] is of a copy of image i. Computed in float64. Where there are fewer than
    `size` images the subsets are smaller, with a note; where one subset is all images of both sets,
    there is one, and its deviation is nan. BadInput if there are fewer than 2.
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
    progress = Progress("KID, subset", subsets)
    distances = []
    for i in range(subsets):
        chosen = rng.choice(n, size, replace=False)
        x = features1[chosen].double()
        y = features2[chosen if paired else rng.choice(m, size, replace=False)].double()
        within = mean_of_pairs(cubic_kernel(x, x)) + mean_of_pairs(cubic_kernel(y, y))
        across = cubic_kernel(x, y)
        across = mean_of_pairs(across) if paired else across.mean()
        distances.append(within - 2 * across)
        progress.update(i + 1)
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
# differently: torch-fidelity shuffles and makes 10 parts, as we do, ADM's takes each 5,000 in file
# order, and finds less in a file sorted by class, whose parts show few kinds. What fools it: one
# perfect image for each class scores as well as a thousand; so do copies of the training set. And
# it grows with N: a part of n images shows n kinds at most.


def inception_score(logits, splits=10, split_size=None):
    """Logits (N, 1008) -> mean and standard deviation over the splits.

    The splits are shuffled, with torch-fidelity's seed; given a split_size, they are that many
    images each, in order, as ADM's evaluator makes them of 5,000.
    """
    n = len(logits)
    if split_size:
        order = np.arange(n)
        bounds = range(split_size, n, split_size)
    else:
        splits = min(splits, n)
        order = np.random.RandomState(2020).permutation(n)
        bounds = [i * n // splits for i in range(1, splits)]
    scores = []
    for index in np.split(order, bounds):
        p = torch.as_tensor(logits)[index].double().softmax(1)
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

TILE = 2048  # rows and columns of the distances that are in memory at once


def precision_recall(reference, samples, k=3):
    """Features (n, d) and (m, d) -> precision, recall.

    Exact, in float64; memory does not grow with n m. BadInput if n or m is not above k.
    """
    n = len(reference)
    m = len(samples)
    if min(n, m) <= k:
        raise BadInput(f"precision and recall take more than {k} images a set, not {n} and {m}")
    reference = torch.as_tensor(reference)
    samples = torch.as_tensor(samples)
    reference_radii = squared_radii(reference, k, "radii of the reference")
    samples_radii = squared_radii(samples, k, "radii of the samples")
    reference_inside = torch.zeros(n, dtype=torch.bool)
    samples_inside = torch.zeros(m, dtype=torch.bool)
    progress = Progress("precision and recall", n)
    for rows in torch.arange(n).split(TILE):
        for columns in torch.arange(m).split(TILE):
            squared = squared_distances(reference[rows], samples[columns])
            in_reference = squared <= reference_radii[rows, None]
            in_samples = squared <= samples_radii[columns]
            samples_inside[columns] |= in_reference.any(0).cpu()
            reference_inside[rows] |= in_samples.any(1).cpu()
        progress.update(rows[-1].item() + 1)
    return samples_inside.double().mean().item(), reference_inside.double().mean().item()


def squared_radii(features, k, what):
    """The squared distance of each of features (n, d) to its k-th nearest other one -> (n,).

    `what` is for the progress line.
    """
    progress = Progress(what, len(features))
    radii = []
    for rows in torch.arange(len(features)).split(TILE):
        nearest = []
        for columns in torch.arange(len(features)).split(TILE):
            squared = squared_distances(features[rows], features[columns])
            if rows[0] == columns[0]:
                squared.fill_diagonal_(torch.inf)  # nobody is a neighbour of itself
            nearest.append(squared.topk(min(k, len(columns)), largest=False).values)
        radii.append(torch.cat(nearest, dim=1).kthvalue(k).values)
        progress.update(rows[-1].item() + 1)
    # A hair more, so that copies, whose distance is 0 but for rounding, lie in a ball of radius 0.
    return torch.cat(radii) + 1e-12 * features.double().square().sum(1)


def evenly_spaced(n, k):
    """Up to k positions of range(n), evenly spaced: folders come sorted by class."""
    return torch.arange(min(n, k)) * n // min(n, k)


def squared_distances(x, y):
    """(n, d) and (m, d) -> (n, m), float64: in float32 the differences of close points drown."""
    x = x.double()
    y = y.double()
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(squares, x, y.T, alpha=-2)  # |x|^2 + |y|^2 - 2 x.y


def psnr(x, y):
    """Peak signal-to-noise ratio, 10 log10(255^2 / mean squared error), of each pair of images.

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

    def __init__(self, c_in, c_out, kernel=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    """3x3, of the same size; the padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """Mixed_5b, 5c, 5d: 35x35."""

    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = ConvUnit(c_in, 64)
        self.branch5x5_1 = ConvUnit(c_in, 48)
        self.branch5x5_2 = ConvUnit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvUnit(c_in, 64)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, padding=1)
        self.branch_pool = ConvUnit(c_in, c_pool)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch5x5_2(self.branch5x5_1(x))
        c = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        d = self.branch_pool(average_pool(x))
        return torch.cat([a, b, c, d], dim=1)


class Mixed6a(nn.Module):
    """35x35 -> 17x17."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvUnit(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvUnit(288, 64)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2)

    def forward(self, x):
        a = self.branch3x3(x)
        b = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        c = F.max_pool2d(x, 3, stride=2)
        return torch.cat([a, b, c], dim=1)


class Mixed6(nn.Module):
    """Mixed_6b to 6e: 17x17. The 7x7 convolutions are pairs of 1x7 and 7x1."""

    def __init__(self, c):
        super().__init__()
        row = {"kernel": (1, 7), "padding": (0, 3)}
        column = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvUnit(768, 192)
        self.branch7x7_1 = ConvUnit(768, c)
        self.branch7x7_2 = ConvUnit(c, c, **row)
        self.branch7x7_3 = ConvUnit(c, 192, **column)
        self.branch7x7dbl_1 = ConvUnit(768, c)
        self.branch7x7dbl_2 = ConvUnit(c, c, **column)
        self.branch7x7dbl_3 = ConvUnit(c, c, **row)
        self.branch7x7dbl_4 = ConvUnit(c, c, **column)
        self.branch7x7dbl_5 = ConvUnit(c, 192, **row)
        self.branch_pool = ConvUnit(768, 192)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        c = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        c = self.branch7x7dbl_5(self.branch7x7dbl_4(c))
        d = self.branch_pool(average_pool(x))
        return torch.cat([a, b, c, d], dim=1)


class Mixed7a(nn.Module):
    """17x17 -> 8x8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvUnit(768, 192)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvUnit(768, 192)
        self.branch7x7x3_2 = ConvUnit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvUnit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2)

    def forward(self, x):
        a = self.branch3x3_2(self.branch3x3_1(x))
        b = self.branch7x7x3_2(self.branch7x7x3_1(x))
        b = self.branch7x7x3_4(self.branch7x7x3_3(b))
        c = F.max_pool2d(x, 3, stride=2)
        return torch.cat([a, b, c], dim=1)


class Mixed7(nn.Module):
    """Mixed_7b and 7c: 8x8. The last steps of two branches fork into 1x3 and 3x1, side by side."""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        row = {"kernel": (1, 3), "padding": (0, 1)}
        column = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = ConvUnit(c_in, 320)
        self.branch3x3_1 = ConvUnit(c_in, 384)
        self.branch3x3_2a = ConvUnit(384, 384, **row)
        self.branch3x3_2b = ConvUnit(384, 384, **column)
        self.branch3x3dbl_1 = ConvUnit(c_in, 448)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvUnit(384, 384, **row)
        self.branch3x3dbl_3b = ConvUnit(384, 384, **column)
        self.branch_pool = ConvUnit(c_in, 192)

    def forward(self, x):
        a = self.branch1x1(x)
        b = self.branch3x3_1(x)
        b = [self.branch3x3_2a(b), self.branch3x3_2b(b)]
        c = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        c = [self.branch3x3dbl_3a(c), self.branch3x3dbl_3b(c)]
        d = self.branch_pool(self.pool(x))
        return torch.cat([a, *b, *c, d], dim=1)


def max_pool(x):
    """3x3, of the same size."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionV3(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 2048), logits without bias (B, 1008), spatial (B, 2023).

    The spatial features, of sFID, are 7 channels at 17x17 places, in TensorFlow's order (height,
    width, channel). Random until weights are loaded; see load_inception. Where the weights lack the
    classifier, fc is None, and so are the logits.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.Mixed_5b = Mixed5(192, 32)
        self.Mixed_5c = Mixed5(256, 64)
        self.Mixed_5d = Mixed5(288, 64)
        self.Mixed_6a = Mixed6a()
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, average_pool)
        self.Mixed_7c = Mixed7(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.eval()
        self.requires_grad_(False)

    def forward(self, images):
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
        """Merge every batch norm into its convolution: the same function, faster.

        The state-dict names are lost.
        """
        for unit in [m for m in self.modules() if isinstance(m, ConvUnit)]:
            unit.conv = nn.utils.fusion.fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


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


INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


def load_inception(file, device):
    """The published network, or the one in `file`, ready to measure; its batch norms folded.

    A file without fc.weight and fc.bias gives a network without classifier, for all but the
    Inception Score. BadInput if the file is not such a network.
    """
    net = InceptionV3()
    path = Path(file) if file else fetch(INCEPTION_FILE)
    saved = load_checkpoint(path)
    if isinstance(saved, dict) and not {"fc.weight", "fc.bias"} & saved.keys():
        net.fc = None
    load_states(path, {"": net}, {"": saved})
    if file and sha256(path) != PUBLISHED[INCEPTION_FILE].sha256:
        note(
            f"{path} is not the published file: "
            "its figures compare with others' only if it holds the same network"
        )
    return net.fold().to(device)


# ================================================================================================
# 3. Measuring sets
# ================================================================================================
# Each image passes the network once. Means and covariances come from sums that grow batch by batch,
#
#     mu = sum x / N,        S = (sum x x^T - N mu mu^T) / (N - 1),
#
# so that memory does not grow with the number of images. Features (8 KB an image) and logits (4 KB)
# are kept only for the measures that look at single images.

Moments = namedtuple("Moments", "mu sigma")  # mean (d,) and covariance (d, d), float64

# What the measures take of a set: Moments of its pooled and of its spatial features; the pooled
# features float32 (N, 2048) and logits float32 (N, 1008) of each image. None: not known.
Statistics = namedtuple("Statistics", "pooled spatial features logits")

# One side of a comparison. name: for messages; items: files or an array uint8 (N, H, W, 3), or
# None; known: the Statistics that came in a file.
ImageSet = namedtuple("ImageSet", "name items known")
NOTHING_KNOWN = Statistics(None, None, None, None)

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


@contextlib.contextmanager
def full_float32(device):
    """No TF32 or autocast inside, even if the caller has set it.

    The figure must not depend on who asks.
    """
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class RunningMoments:
    """Sums that give the Moments of vectors that come in batches (B, d)."""

    def __init__(self, d, device):
        self.total = torch.zeros(d, dtype=torch.float64, device=device)
        self.outer = torch.zeros(d, d, dtype=torch.float64, device=device)

    def add(self, batch):
        batch = batch.double()
        self.total += batch.sum(0)
        self.outer.addmm_(batch.T, batch)

    def moments(self, n):
        """Of the n vectors so far."""
        sigma = (self.outer - torch.outer(self.total, self.total) / n) / (n - 1)
        return Moments((self.total / n).cpu(), sigma.cpu())


@torch.no_grad()
def measure(name, items, net, device, keep=(), skip_bad=False, size=None):
    """Images (files, or an array uint8 (N, H, W, 3)) -> Statistics.

    Of "features" and "logits" those named in `keep` are kept for each image, else None. If size is
    given, each image is first cropped and shrunk to size x size. `name` is for messages.
    BadInput if an image cannot be read (unless skip_bad) or fewer than 2 are there.
    """
    # Small batches stay in a CPU's caches: 10 are a fifth faster than 50.
    batch_size = 10 if device.type == "cpu" else 100

    # A new batch after every batch_size images, and wherever the shape changes: only equal shapes
    # can be stacked.
    def batch_and_shape(numbered_image):
        i, image = numbered_image
        return i // batch_size, image.shape

    pooled = RunningMoments(2048, device)
    spatial = RunningMoments(2023, device)
    # memory is taken when it is written to
    features = torch.empty(len(items), 2048) if "features" in keep else None
    logits = torch.empty(len(items), 1008) if "logits" in keep else None
    n = 0
    numbered_images = read_images(name, items, size, tolerated=1 if skip_bad else 0)
    for _, group in itertools.groupby(numbered_images, batch_and_shape):
        images = torch.stack([image for _, image in group]).to(device)
        with full_float32(device):
            batch_features, batch_logits, batch_spatial = net(images)
        pooled.add(batch_features)
        spatial.add(batch_spatial)
        if "features" in keep:
            features[n : n + len(images)] = batch_features
        if "logits" in keep:
            logits[n : n + len(images)] = batch_logits
        n += len(images)
    if n < 2:
        raise BadInput(f"{name}: a covariance takes at least 2 images, and {n} could be read")
    if n < len(items):  # unreadable ones were left out
        features = None if features is None else features[:n]
        logits = None if logits is None else logits[:n]
    return Statistics(pooled.moments(n), spatial.moments(n), features, logits)


def compare(reference, samples, wanted, device, split_size=None, paired=False):
    """Statistics of two sets -> {measure: its value, or (mean, deviation)}, those of `wanted`.

    Precision and recall are computed on the device. split_size: see inception_score; paired: see
    kernel_distance.
    """
    figures = {}
    if "fid" in wanted:
        figures["fid"] = frechet_distance(*reference.pooled, *samples.pooled)
    if "sfid" in wanted:
        figures["sfid"] = frechet_distance(*reference.spatial, *samples.spatial)
    if "kid" in wanted:
        figures["kid"] = kernel_distance(reference.features, samples.features, paired=paired)
    if "is" in wanted:
        figures["is"] = inception_score(samples.logits, split_size=split_size)
    names = [name for name in ("precision", "recall") if name in wanted]
    if not names:
        return figures

    # 10,000 references, as in ADM's files
    n = len(reference.features)
    at_most = min(n, 10000)
    if at_most < n:
        note(f"precision and recall take 10,000 of the {n} reference images, evenly spaced")
    of_reference = reference.features[evenly_spaced(n, at_most)].to(device)
    of_samples = samples.features.to(device)
    fewest = min(at_most, len(of_samples))
    if fewest > 3:
        precision, recall = precision_recall(of_reference, of_samples)
        both = {"precision": precision, "recall": recall}
        figures |= {name: both[name] for name in names}
    else:
        leave_out(names, f"they take at least 4 images a set, and there are {fewest}")
    return figures


def read_set(spec):
    """What a command line names -> ImageSet.

    An .npz may hold statistics, images or both. If both, its statistics are believed to be those
    of more images, as in ADM's reference files.
    """
    if spec == "imagenette":
        raise BadInput(
            "imagenette's photographs are a training and a validation set: name a folder, "
            "for instance data/imagenette2-160/val, and give --size"
        )
    if spec in ("shapes", "cifar10"):
        items = load_data(spec, 32).train
        if torch.is_tensor(items):  # else, where memory is short, arrays (H, W, 3) already
            items = items.permute(0, 2, 3, 1).numpy()
        return ImageSet(spec, items, NOTHING_KNOWN)
    path = Path(spec)
    if path.suffix != ".npz" or not path.is_file():
        return ImageSet(spec, list_images(path).items, NOTHING_KNOWN)
    arrays = read_arrays(path)
    if "mu" not in arrays or "sigma" not in arrays:
        return ImageSet(spec, list_arrays(path, arrays).items, NOTHING_KNOWN)
    pooled = read_moments(spec, arrays, "mu", "sigma", 2048)
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        spatial = read_moments(spec, arrays, "mu_s", "sigma_s", 2023)
    items = list_arrays(path, arrays).items if "arr_0" in arrays else None
    return ImageSet(spec, items, NOTHING_KNOWN._replace(pooled=pooled, spatial=spatial))


def read_moments(spec, arrays, mu_name, sigma_name, d):
    """Two of a file's arrays -> Moments, float64.

    BadInput if they are not finite numbers or not of d features.
    """
    try:
        mu = np.asarray(arrays[mu_name], np.float64)
        sigma = np.asarray(arrays[sigma_name], np.float64)
    except (ValueError, TypeError) as error:
        raise BadInput(f"{spec}: {mu_name} or {sigma_name} is not of numbers: {error}") from None
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise BadInput(
            f"{spec}: want statistics {mu_name} ({d},) and {sigma_name} ({d}, {d}), "
            f"and it has {mu.shape} and {sigma.shape}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise BadInput(f"{spec}: {mu_name} or {sigma_name} holds NaN or infinity")
    return Moments(mu, sigma)


def lacks(image_set, parts):
    """Whether an ImageSet's file lacks some of these parts of the Statistics."""
    return any(getattr(image_set.known, part) is None for part in parts)


def statistics_of(image_set, parts, net, device, skip_bad, size):
    """The Statistics of an ImageSet, at least these parts; measured if its file lacks some.

    Moments in the file come first, for they may be of more images. size: see measure.
    """
    known = image_set.known
    if not lacks(image_set, parts):
        return known
    measured = measure(image_set.name, image_set.items, net, device, parts, skip_bad, size)
    if known.pooled is None:
        return measured
    return measured._replace(pooled=known.pooled, spatial=known.spatial)


def save_moments(file, statistics):
    """Moments -> an .npz with mu and sigma and, if they are known, mu_s and sigma_s."""
    arrays = dict(zip(("mu", "sigma"), statistics.pooled))
    if statistics.spatial is not None:
        arrays |= dict(zip(("mu_s", "sigma_s"), statistics.spatial))
    np.savez(file, **arrays)


def reason_against(part, image_set):
    """Why a part of the Statistics cannot be had of an ImageSet; None if it can."""
    known = image_set.known
    if getattr(known, part) is not None:
        return None
    if part == "spatial" and known.pooled is not None:
        return f"{image_set.name} holds mu and sigma, but not mu_s and sigma_s"
    if image_set.items is None:
        return f"{image_set.name} holds statistics, but no images"
    return None


def leave_out(measures, reason):
    """Say which measures there will not be, and why."""
    note(f"left out: {', '.join(measures)}, for {reason}")


# ================================================================================================
# 4. Images from anywhere
# ================================================================================================
# A data SPEC is `shapes` (drawn on the spot), `cifar10` or `imagenette` (downloaded once into
# data/), a folder (class sub-folders, or flat; its train/ and val/ or test/ if it has them) or an
# .npz (first array uint8 (N, H, W, 3), optional `labels`).

# torchrun's processes on this machine
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

# Images are one tensor uint8 (N, 3, size, size). If that would exceed memory_budget they stay
# items, files or arrays (H, W, 3) of any size, which stream_batches resizes. Labels are int64 (N,),
# classes their names.
Data = namedtuple("Data", "train train_labels val val_labels classes")
# name: for messages; held_out: bool (N,)
Listing = namedtuple("Listing", "name items labels classes held_out")


def load_data(spec, size, seed=0, decode_later=False):
    """A data SPEC -> Data, every image size x size.

    decode_later: the images of a folder or an .npz stay as they came, even if they would fit into
    memory, so that stream_batches can take crops of whole pictures.
    """
    if spec == "shapes":
        train = draw_shapes(20000, size, seed)
        val = draw_shapes(1000, size, seed + 1)
        return Data(*train, *val, list(SHAPES))
    if spec == "cifar10":
        return read_cifar10(fetch("cifar-10-binary.tar.gz", "data"), size)
    if spec == "imagenette":
        archive = fetch("imagenette2-160.tgz", "data")
        folder = unpack(archive, "imagenette2-160")
        data = load_data(folder, size, seed, decode_later)
        return data._replace(classes=[IMAGENETTE_CLASSES[name] for name in data.classes])

    path = Path(spec)
    for name in ("val", "test"):
        if (path / "train").is_dir() and (path / name).is_dir():
            train = read_all(list_images(path / "train"), size, decode_later)
            val = read_all(list_images(path / name, train.classes), size)
            return Data(train.items, train.labels, val.items, val.labels, train.classes)
    if path.is_dir() and [p.name for p in path.iterdir() if p.name[0] != "."] == ["train"]:
        path = path / "train"  # not a class of that name, since there is no other
    # Before the images are read: what is held out must not depend on which of them can be.
    listing = hold_out(list_images(path))
    return split(read_all(listing, size, decode_later))


def hold_out(listing):
    """Listing -> Listing, a fixed random twentieth of it held out."""
    n = len(listing.items)
    if n < 2:
        raise BadInput(
            f"{n} image(s) in {listing.name} are too few: "
            "one to train on and one to hold out is the least"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[order[: max(1, n // 20)]] = True
    return listing._replace(held_out=held_out)


def split(listing):
    """Listing -> Data."""
    train = (~listing.held_out).nonzero()[:, 0]
    val = listing.held_out.nonzero()[:, 0]
    return Data(
        take(listing.items, train),
        listing.labels[train],
        take(listing.items, val),
        listing.labels[val],
        listing.classes,
    )


def take(items, index):
    """The items at the positions index (n,)."""
    return items[index] if torch.is_tensor(items) else [items[i] for i in index]


def list_images(path, classes=None):
    """A folder or an .npz -> Listing; a folder's files are not yet read.

    The classes of a folder are `classes`, else its first-level sub-folders (one class if there are
    none); those of an .npz the numbers up to its highest label.
    """
    if path.is_dir():
        return list_folder(path, classes)
    if path.suffix != ".npz" or not path.is_file():
        raise BadInput(
            f"no data at {str(path)!r}: "
            "want shapes, cifar10, imagenette, a folder of images, or an .npz file"
        )
    return list_arrays(path, read_arrays(path))


def list_arrays(path, arrays):
    """The arrays of an .npz, images and maybe labels -> Listing."""
    labels = arrays.get("labels")
    others = [array for name, array in arrays.items() if name != "labels"]
    items = arrays["arr_0"] if "arr_0" in arrays else next(iter(others), np.zeros(0))
    if items.dtype != np.uint8 or items.ndim != 4 or items.shape[3] != 3:
        raise BadInput(
            f"{path}: the first array must be uint8 (N, H, W, 3), "
            f"and is {items.dtype} {items.shape}"
        )
    n = len(items)
    if labels is None:
        labels = np.zeros(n, np.int64)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise BadInput(
            f"{path}: labels must be {n} integers from 0 up, and are {labels.dtype} {labels.shape}"
        )
    names = [str(i) for i in range(int(labels.max(initial=0)) + 1)]
    held_out = torch.zeros(n, dtype=torch.bool)
    return Listing(path, items, torch.from_numpy(labels.astype(np.int64)), names, held_out)


def list_folder(path, classes=None):
    """The image files below a folder, sorted, but for hidden ones -> Listing."""
    files = []
    for p in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in p.relative_to(path).parts)
        if p.suffix.lower() in SUFFIXES and not hidden:
            files.append(p)
    if not files:
        raise BadInput(f"no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    class_of = [p.relative_to(path).parts[0] if p.parent != path else "" for p in files]
    classes = classes or sorted(set(class_of))
    unknown = set(class_of) - set(classes)
    if unknown:
        raise BadInput(f"{path} has a class that train/ has not: {min(unknown)!r}")
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name] for name in class_of])
    held_out = torch.zeros(len(files), dtype=torch.bool)
    return Listing(path, files, labels, classes, held_out)


CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def read_cifar10(path, size):
    """CIFAR-10's binary archive, read without unpacking -> Data.

    Each of its files holds records of a label byte and 3 x 32 x 32 colour bytes.
    """
    records = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".bin"):
                raw = np.frombuffer(archive.extractfile(member).read(), np.uint8)
                records[Path(member.name).name] = raw.reshape(-1, 3073)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    every = np.concatenate([records[name] for name in names])
    arrays = every[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = torch.from_numpy(every[:, 0].astype(np.int64))
    held_out = torch.arange(len(every)) >= len(every) - len(records["test_batch.bin"])
    listing = Listing("CIFAR-10", arrays, labels, CIFAR10_CLASSES, held_out)
    return split(read_all(listing, size))


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


# image: uint8 (3, H, W), or None if it cannot be read, and then `problem` says why
Loaded = namedtuple("Loaded", "image resized problem")


def load_image(item, size=None, crop=None):
    """A file or an array (H, W, 3) -> Loaded. Photographs are turned upright.

    If size is given: a square of it, size x size; see crop_and_resize.
    """
    try:
        if isinstance(item, np.ndarray):
            picture = Image.fromarray(item)
        else:
            with Image.open(item) as file:
                picture = to_rgb(ImageOps.exif_transpose(file))
        resized = size is not None and picture.size != (size, size)
        if resized or crop is not None:
            picture = crop_and_resize(picture, size, crop)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return Loaded(image, resized, None)
    # These are what PIL's decoders raise on broken files; the last two come from broken tags.
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        TypeError,
        struct.error,
    ) as error:
        return Loaded(None, False, f"{item} ({one_line(error)})")


def crop_and_resize(picture, size, crop=None):
    """A square of a PIL picture, size x size.

    crop: (share, x, y), numbers in [0, 1]: the square's side as a share of the short side, and
    where it lies between left and right, top and bottom. None: the largest square, in the middle.

    The picture is shrunk as those of ADM's evaluator were, since FID sees the difference: halved
    by a box filter while it is twice too large, then bicubically (with antialiasing), then cropped.
    """
    share, x, y = (1.0, 0.5, 0.5) if crop is None else crop
    short = round(size / share)  # of the shrunk picture; `size` is a share `share` of it
    width, height = picture.size
    while min(width, height) >= 2 * short:
        width //= 2
        height //= 2
        picture = picture.resize((width, height), Image.Resampling.BOX)
    scale = short / min(width, height)
    width = round(width * scale)
    height = round(height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left = int(x * (width - size))
    top = int(y * (height - size))
    return picture.crop((left, top, left + size, top + size))


def to_rgb(picture):
    """Any picture -> RGB. 16 bits are scaled to 8; PIL alone would clip them."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def load_images(name, items, size=None, tolerated=0.0, fate="Left out"):
    """Yield (i, Loaded) for each of items, files or arrays (H, W, 3).

    Loaded in parallel, few at a time. Unreadable ones are left out, with a note that names them and
    their fate; BadInput if they are more than a share `tolerated` of all.
    """
    problems = []
    progress = Progress(f"reading {name}", len(items))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 64):
            chunk = items[first : first + 64]
            loaded = list(pool.map(functools.partial(load_image, size=size), chunk))
            problems += [each.problem for each in loaded if each.problem]
            if len(problems) > tolerated * len(items):
                raise BadInput(f"{unreadable(name, items, problems)}. Mend or remove them")
            for i, each in enumerate(loaded, first):
                if not each.problem:
                    yield i, each
            progress.update(first + len(chunk))
    if problems:
        note(f"{unreadable(name, items, problems)}. {fate}")


def unreadable(name, items, problems):
    """A line that names the first three of the problems."""
    some = "; ".join(problems[:3])
    more = "; ..." if len(problems) > 3 else ""
    return f"{len(problems)} of {len(items)} images in {name} cannot be read: {some}{more}"


def read_images(name, items, size=None, tolerated=0.0):
    """Yield (i, uint8 (3, H, W)) for each of items, as load_images."""
    for i, loaded in load_images(name, items, size, tolerated):
        yield i, loaded.image


def read_all(listing, size, decode_later=False):
    """Listing -> Listing whose items are images uint8 (N, 3, size, size); as it was if too large.

    Up to 1 % unreadable ones are left out. Of a set that is too large, or to be decoded later, a
    hundred are looked at, to meet errors early, of which up to 5 % may be unreadable; it comes back
    as it is, and decode_batch will meet the rest.
    """
    n = len(listing.items)
    fits = not decode_later and n * 3 * size * size <= memory_budget()
    items = listing.items if fits else listing.items[:: n // 100 + 1]
    images = torch.empty(n if fits else 0, 3, size, size, dtype=torch.uint8)
    readable = []
    resized = 0
    tolerated = 0.01 if fits else 0.05
    fate = "Left out" if fits else "Grey will stand in for such"
    for i, loaded in load_images(listing.name, items, size, tolerated, fate):
        if fits:
            images[i] = loaded.image
        readable.append(i)
        resized += loaded.resized
    if resized:
        note(
            f"{resized} of {len(items)} {'' if fits else 'sampled '}images in {listing.name} "
            f"are not {size}x{size}: "
            "resized and centre-cropped"
        )
    if not fits:
        return listing
    if len(readable) < n:
        images = images[readable]
        listing = listing._replace(
            labels=listing.labels[readable], held_out=listing.held_out[readable]
        )
    return listing._replace(items=images)


def memory_budget():
    """Bytes that a data set may take in memory.

    A quarter of the machine's, shared by the processes on it, and no more than a quarter of a
    GPU's free memory.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 // LOCAL_WORLD_SIZE
    if not torch.cuda.is_available():
        return host
    return min(host, torch.cuda.mem_get_info()[0] // 4)


def stream_batches(items, batches, device, size, crops=None):
    """Yield items[index], uint8 (B, 3, size, size) on the device, for each index (B,) of batches.

    What is not in memory is decoded ahead, by worker processes. crops: for each batch the squares
    (B, 3) of crop_and_resize; without them they are the middle ones.
    """
    crops = itertools.repeat(None) if crops is None else crops
    if torch.is_tensor(items):
        for index, crop in zip(batches, crops):
            batch = items[index.to(items.device)]
            if crop is not None:
                arrays = batch.permute(0, 2, 3, 1).cpu().numpy()
                batch = decode_batch(list(zip(arrays, crop.tolist())), size)
            yield batch.to(device, non_blocking=True)
        return

    def requests():
        for index, crop in zip(batches, crops):
            squares = [None] * len(index) if crop is None else crop.tolist()
            yield list(zip(index.tolist(), squares))

    loader = torch.utils.data.DataLoader(
        Requested(items),
        batch_sampler=requests(),
        collate_fn=functools.partial(decode_batch, size=size),
        num_workers=min(16, max(1, os.cpu_count() // LOCAL_WORLD_SIZE)),
        worker_init_fn=reset_signals_in_worker,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def reset_signals_in_worker(_):
    """A Ctrl-C in the terminal reaches worker processes, too, and is not for them.

    SIGTERM must end them: they inherit the handler of training, which only takes a note.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Requested(torch.utils.data.Dataset):
    """Items for a DataLoader that asks for them by (position, crop)."""

    def __init__(self, items):
        self.items = items

    def __getitem__(self, request):
        i, crop = request
        return self.items[i], crop


def decode_batch(requests, size):
    """Pairs of a file or array and its crop, or None -> uint8 (B, 3, size, size).

    Grey stands in for one that cannot be read.
    """
    batch = torch.full((len(requests), 3, size, size), 128, dtype=torch.uint8)
    for i, (item, crop) in enumerate(requests):
        loaded = load_image(item, size, crop)
        if loaded.problem:
            note(f"cannot read {loaded.problem}: grey stands in for it")
        else:
            batch[i] = loaded.image
    return batch


# The built-in pictures: one shape each, its class; colours, size, place and background vary. An
# outline is given by a signed distance, negative inside (exact along edges, too small outside
# corners), at the point (u, v) from the middle, in radii; u, float (n, 1, size), and v, (n, size,
# 1), broadcast.


def disc(u, v):
    return torch.hypot(u, v) - 1


def ring(u, v):
    return (torch.hypot(u, v) - 0.75).abs() - 0.25


def square(u, v):
    return torch.maximum(u.abs(), v.abs()) - 0.85


def triangle(u, v):
    return torch.maximum(v - 0.55, 0.866 * u.abs() - 0.5 * v - 0.55)


def cross(u, v):
    across = torch.maximum(u.abs() - 1, v.abs() - 0.35)
    upright = torch.maximum(v.abs() - 1, u.abs() - 0.35)
    return torch.minimum(across, upright)


def bars(u, v):
    return torch.maximum(u.abs() - 0.95, (v.abs() - 0.6).abs() - 0.28)


SHAPES = {
    "disc": disc,
    "ring": ring,
    "square": square,
    "triangle": triangle,
    "cross": cross,
    "bars": bars,
}


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
# 5. Files
# ================================================================================================


def write_atomically(path, save):
    """save(file) to a temporary neighbour of path, sync, rename: complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns the error of a full disk into a RuntimeError
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise BadInput(f"cannot write {path}: {cause.strerror or cause}") from None
    finally:
        temporary.unlink(missing_ok=True)


def lock(file, problem):
    """Lock an open file or a descriptor until it is closed; BadInput(problem) if another has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(problem) from None
    except OSError:
        pass  # a file system without locks


Published = namedtuple("Published", "base_url sha256")

PUBLISHED = {
    INCEPTION_FILE: Published(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "cifar-10-binary.tar.gz": Published(
        "https://www.cs.toronto.edu/~kriz/",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "imagenette2-160.tgz": Published(
        "https://s3.amazonaws.com/fast-ai-imageclas/",
        "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
    ),
    "dinov2_vits14_pretrain.pth": Published(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "vgg16-397923af.pth": Published(
        "https://download.pytorch.org/models/",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "vgg.pth": Published(  # the heads of LPIPS
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/"
        "lpips/weights/v0.1/",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(name, folder=None):
    """Where the published file `name` is, or would be: in folder, or in torch's cache."""
    return Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / name


def fetch(name, folder=None):
    """Path of the published file `name`, downloaded if need be, its SHA-256 checked every time."""
    path = cache_path(name, folder)
    source = PUBLISHED[name].base_url + name
    digest = PUBLISHED[name].sha256
    if path.exists():
        if sha256(path) != digest:
            raise BadInput(
                f"{path} is not the published file (its SHA-256 should be {digest}): "
                "delete it to download it again"
            )
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # to a temporary file, checked, then renamed
        torch.hub.download_url_to_file(source, str(path), digest)
    except (OSError, RuntimeError) as error:  # no network; another SHA-256
        raise BadInput(
            f"cannot download {name} ({error}): fetch {source} elsewhere and put it at {path}; "
            f"SHA-256 {digest}"
        ) from None
    return path


def unpack(archive, name):
    """The folder `name` of a tar archive, unpacked beside it -> its path.

    It is there whole or not at all: what is unpacked is renamed when it is complete.
    """
    folder = archive.with_name(name)
    if folder.is_dir():
        return folder
    part = archive.with_name(f".{name}.{os.getpid()}.part")
    note(f"unpacking {archive}")
    try:
        with tarfile.open(archive) as members:
            members.extractall(part, filter="data")  # nothing outside, no links to there
        (part / name).rename(folder)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        if not folder.is_dir():  # another process may have been faster
            raise BadInput(f"cannot unpack {archive} to {folder}: {one_line(error)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def read_arrays(path):
    """The arrays of an .npz, or of an .npy under the name "array". Nothing is ever unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        return {"array": file} if isinstance(file, np.ndarray) else dict(file)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise BadInput(f"cannot read {path}: {error}") from None


def load_checkpoint(path, device="cpu"):
    """A file of tensors and plain values. Code in it is never run."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error) or "damaged"
        raise BadInput(f"cannot read {path}: {reason.splitlines()[0]}") from None


def load_weights(path, net):
    """Load a file that holds the state of net alone."""
    # as a checkpoint of one part, without a name: messages then name the tensors as the file does
    load_states(path, {"": net}, {"": load_checkpoint(path)})


def load_states(path, parts, saved):
    """Load a checkpoint's states, saved[name], into parts[name], modules or optimizers.

    BadInput if they do not fit, or hold NaN or infinity.
    """
    try:
        if not isinstance(saved, dict):
            raise TypeError(f"a {type(saved).__name__}, not a dictionary")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (
        KeyError,
        IndexError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        reason = one_line(error)[:200]
        raise BadInput(
            f"{path} holds other weights than this network, with these settings, has: {reason}"
        ) from None
    for name, tensor in named_tensors(saved):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BadInput(f"{path} is of no use: NaN or infinity in {name}")


def named_tensors(value, name=""):
    """Yield (dotted name, tensor) for all tensors in nested dictionaries."""
    if torch.is_tensor(value):
        yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from named_tensors(inner, f"{name}.{key}" if name else str(key))


# ================================================================================================
# 6. The terminal
# ================================================================================================


def one_line(error):
    return " ".join(str(error).split())


def note(message):
    print(f"note: {message}", file=sys.stderr)


class Progress:
    """A line on standard error that says how far, and how long it will still take.

    On a terminal it overwrites itself; elsewhere a plain line comes every ten seconds at most.
    """

    def __init__(self, what, total, first=0):
        self.what = what
        self.total = total
        self.first = first
        self.start = time.monotonic()
        self.shown = self.start  # when it was last shown

    def update(self, done, text=""):
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        finished = done >= self.total
        pause = 0.2 if terminal else 10
        if not finished and now - self.shown < pause:
            return
        self.shown = now
        each = (now - self.start) / max(done - self.first, 1)
        left = int(each * (self.total - done))
        text = f"{text}  " if text else ""
        line = f"{self.what} {done}/{self.total}  {text}{left // 60}:{left % 60:02d} left"
        if terminal:
            end = "\n" if finished else ""
            print(f"\r{line}\033[K", end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def choose(name, options, what):
    """options[name]; BadInput naming the nearest option if there is none."""
    if name not in options:
        nearest = difflib.get_close_matches(name, options, 1, 0)[0]
        raise BadInput(
            f"no {what} {name!r}; did you mean {nearest!r}? There are: {', '.join(options)}"
        )
    return options[name]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, of one line, and which suggests flags."""

    def __init__(self, about, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=about, formatter_class=raw, allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(message)

    def parse(self):
        args, unknown = self.parse_known_args()
        if unknown and not unknown[0].startswith("-"):
            raise BadInput(f"one argument too many: {unknown[0]!r}")
        if unknown:
            choose(unknown[0].split("=")[0], self._option_string_actions, "flag")  # raises
        return args


def run_script(main):
    """main(). What the user can mend becomes one line on standard error, and status 2.

    That is BadInput; OSError, since disks are the user's too; and a GPU's lack of memory. Ctrl-C is
    status 130.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (BadInput, OSError, torch.cuda.OutOfMemoryError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            error = "the GPU has too little memory: for train.py --accumulate or a smaller batch"
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)  # over an unfinished progress line
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_arguments():
    parser = Parser(__doc__)
    what = "a folder of images, an .npz of images or of statistics, cifar10 or shapes"
    parser.add_argument("reference", help=what)
    parser.add_argument("samples", help=what)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*TAKES, "psnr"],
        metavar="MEASURE",
        help=f"compute just these of {', '.join(TAKES)}, psnr (as with --paired; default: "
        "all but psnr)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="first crop each image to a square and shrink it to N x N, as train.py does "
        "(default: as they are); statistics stay as they are",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=f"a local file of the network (default: {INCEPTION_FILE}, downloaded once); "
        "if it has no classifier (fc.*) there is no Inception Score",
    )
    parser.add_argument(
        "--save-stats",
        metavar="FILE.npz",
        help="write mu, sigma, mu_s and sigma_s of the reference",
    )
    parser.add_argument(
        "--paired",
        action="store_true",
        help="the i-th sample is a copy of the i-th reference image: also their PSNR, and KID "
        "without these pairs",
    )
    parser.add_argument(
        "--unshuffled",
        action="store_true",
        help="Inception Score of splits of 5,000 in file order, as ADM's evaluator, "
        "not of 10 shuffled ones, as torch-fidelity",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    args = parser.parse()
    args.only = args.only or list(TAKES)
    args.paired = args.paired or "psnr" in args.only
    if args.size is not None and not 1 <= args.size <= 4096:
        raise BadInput(f"--size is {args.size}: it must lie in 1 to 4,096 pixels")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise BadInput(f"--save-stats is {args.save_stats}: it must end in .npz")
    if args.paired and args.skip_bad:
        raise BadInput("PSNR (--paired) needs every image: it does not go with --skip-bad")
    return args


def check_pairs(reference, samples):
    """BadInput if two ImageSets are no pairs of images."""
    if reference.items is None or samples.items is None:
        raise BadInput("--paired wants images, not statistics")
    n = len(reference.items)
    if n != len(samples.items):
        raise BadInput(f"--paired: {n} reference images, but {len(samples.items)} samples")


def mean_psnr(reference, samples, size):
    """The mean PSNR of the pairs of two ImageSets. size: see measure."""
    values = []
    originals = read_images(reference.name, reference.items, size)
    copies = read_images(samples.name, samples.items, size)
    for (i, x), (_, y) in zip(originals, copies):
        if x.shape != y.shape:
            raise BadInput(f"--paired: the images {i} are {tuple(x.shape)} and {tuple(y.shape)}")
        values.append(psnr(x[None], y[None]))
    return torch.cat(values).mean().item()


def possible_measures(wanted, reference, samples):
    """Those of the wanted measures that can be had of two ImageSets; notes on the others."""
    possible = []
    impossible = {}  # reason: measures
    for name, part in TAKES.items():
        if name not in wanted:
            continue
        reason = reason_against(part, samples)
        if name != "is":
            reason = reason_against(part, reference) or reason
        if reason:
            impossible.setdefault(reason, []).append(name)
        else:
            possible.append(name)
    for reason, names in impossible.items():
        leave_out(names, reason)
    return possible


def note_on_numbers(image_sets, wanted):
    """Say of how many images the figures are, and whether they are too few for FID.

    (A file of statistics does not tell. Those that --skip-bad leaves out are counted, too; a line
    of its own says how many they are.)
    """
    measured = [each for each in image_sets if each.known.pooled is None]
    for each in measured:
        note(f"{each.name}: {len(each.items):,} images; compare with figures of as many")
    few = any(len(each.items) < 2048 for each in measured)
    if few and {"fid", "sfid"} & set(wanted):
        note("below 2,048 images FID and sFID are biased upward, badly; KID is not")


def main():
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = read_set(args.reference)
    samples = read_set(args.samples)
    if args.paired:
        check_pairs(reference, samples)
    wanted = possible_measures(args.only, reference, samples)

    # the parts of the Statistics that each side must give
    of_samples = {TAKES[name] for name in wanted}
    of_reference = of_samples - {"logits"}
    if args.save_stats:
        of_reference |= {"pooled"}
    net = None
    if lacks(reference, of_reference) or lacks(samples, of_samples):
        net = load_inception(args.weights, device)
        if "is" in wanted and net.fc is None:
            leave_out(["is"], "the network has no classifier (fc.weight, fc.bias)")
            wanted.remove("is")
            of_samples.remove("logits")
    nothing = BadInput(f"none of {', '.join(args.only)} can be had of these two sets")
    if not (wanted or args.paired or args.save_stats):
        raise nothing
    reference_statistics = statistics_of(
        reference, of_reference, net, device, args.skip_bad, args.size
    )
    sample_statistics = statistics_of(samples, of_samples, net, device, args.skip_bad, args.size)
    note_on_numbers([reference, samples], wanted)

    split_size = 5000 if args.unshuffled else None
    figures = compare(
        reference_statistics, sample_statistics, wanted, device, split_size, args.paired
    )
    if args.paired:
        figures["psnr"] = mean_psnr(reference, samples, args.size)
    if not (figures or args.save_stats):
        raise nothing
    for name, value in figures.items():
        decimals = 8 if name == "kid" else 6
        print(name, *[f"{number:.{decimals}f}" for number in np.atleast_1d(value)])
    if args.save_stats:  # last: a disk that fails costs no figure
        write_atomically(
            Path(args.save_stats), lambda file: save_moments(file, reference_statistics)
        )


if __name__ == "__main__":
    run_script(main)
