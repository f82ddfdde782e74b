"""GloTok (Zhao et al., AAAI 2026, arXiv 2511.14184) in one file, to be read beside the paper.

The idea. An image tokenizer turns a picture into a small grid of integers. Generators learn faster
when those tokens are semantic, so recent tokenizers copy a pre-trained vision model's features,
image by image. GloTok looks at the whole data set instead: it summarises the pre-trained model
once, as the histogram of cosine similarities between the centres of its features (40 numbers), and
trains its own semantic codebook to have that same histogram. Training then never touches the
pre-trained model. A one-block transformer predicts what quantization threw away and adds it back
before the decoder.

                    .-> adapter -> Z_sem -> quantizer (1) -> Zhat_sem -> + R_sem(Zhat_sem) -.
                    |               codebook C_sem,               (8), (12)                 |
                    |               follows the teacher (4)-(7)                             |
    x -> encoder -> Z                                                                     concat
                    |               codebook C_vis                (9), (11)                 |
                    '-> adapter -> Z_vis -> quantizer (1) -> Zhat_vis -> + R_vis(Zhat_vis) -'
                                                                                            |
                                                                       xhat <- decoder <----'

The map of this file. An equation's number in parentheses stands beside the code that computes it.

     1  quantizer                           (1)
     2  histogram relation loss             (4)-(7); the teacher; the fast form of (6)
     3  residual module                     the network of (8), (9)
     4  tokenizer                           GloTok, (8)-(12)
     5  the whole loss                      (2), (3), (13)
     6  generator, section 3.4              XAR
     7  what the paper argues against       local supervision: FQGAN, VA-VAE
     8  appendix                            VQGAN's encoder, decoder and discriminator, LPIPS,
                                            DINOv2, the offline teacher; keeping codes in use (ours)
     9  settings                            Config, PRESETS: `c` in the code before is a Config

"Paper silent" marks what the paper leaves open and we chose. sg[.] is its stop-gradient, .detach().
"""

import contextlib
import functools
import math
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ================================================================================================
# 1. Quantizer (1)
# ================================================================================================
# A quantizer replaces each feature by the nearest vector of a learned codebook C (n, d). Paper
# silent on the metric: as FQGAN, we put features and codes on the unit sphere, where the nearest
# in angle is the nearest in distance, since ||z - c||^2 = 2 - 2 z.c. No code can then win by its
# length alone, and cosines are what eq. (4) compares anyway.
#
# argmin has no gradient, so each side gets a gradient of its own. The codebook follows the
# features, and the encoder commits to the codes:
#
#     L_Q = ||sg[Z] - Zhat||^2 + beta ||sg[Zhat] - Z||^2                                       (1)
#           moves the codebook   moves the encoder
#
# beta < 1 because the codebook should do most of the walking. (Paper silent: beta. FQGAN has 0.25.
# A widely copied bug has beta on the first term.) The decoder's gradient crosses the gap unchanged,
# "straight through": the value is Zhat, and the gradient goes to Z.


@contextlib.contextmanager
def full_precision(device):
    """Matrix products inside are in float32, whatever autocast and TF32 do outside.

    The two best cosines of a feature often differ only in the third decimal; bf16 keeps two. The
    backward pass, if it runs after the block, has the settings outside.
    """
    switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    if not hasattr(switches[0], "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    else:  # where callers use these switches, to read the older one is an error
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if isinstance(before, str):
            torch.set_float32_matmul_precision(before)
        else:
            for switch, value in zip(switches, before):
                switch.fp32_precision = value


def nearest(x, y, max_similarities=2**24):
    """Unit vectors x (N, d), y (n, d) -> for each of x the index of the nearest of y, int64 (N,).

    In chunks, so that no more than max_similarities stand in memory at once.
    """
    chunks = x.detach().split(max(1, max_similarities // len(y)))
    with full_precision(x.device):
        return torch.cat([(chunk @ y.detach().T).argmax(1) for chunk in chunks])


def straight_through(z, codes):
    # z - sg[z] is exactly 0. The more common z + sg[codes - z] has the same gradient, but rounds.
    return codes.detach() + (z - z.detach())


class Quantizer(nn.Module):
    """Cosine look-up in a codebook of n unit vectors of dimension d."""

    def __init__(self, n, d, beta):
        super().__init__()
        self.beta = beta
        # Adam moves it freely; `codebook` puts it on the sphere.
        self.weight = nn.Parameter(F.normalize(torch.randn(n, d), dim=1))
        # Training images since each code was last chosen, and the features of the last batch: for
        # `revive` (section 8).
        self.register_buffer("age", torch.full((n,), 2**40))
        self.last_features = None

    @property
    def codebook(self):
        """The code vectors as the look-up uses them: (n, d) float32, on the unit sphere."""
        return F.normalize(self.weight, dim=1)

    def look_up(self, z):
        """Unit features z (..., d) -> indices of the nearest codes, int64 (...)."""
        return nearest(z.flatten(0, -2), self.codebook).view(z.shape[:-1])

    def forward(self, z):
        """Features (B, T, d), not normalised -> unit z and codes (B, T, d), index (B, T), L_Q."""
        with full_precision(z.device):
            z = F.normalize(z.float(), dim=-1)
            index = self.look_up(z)
            codes = F.embedding(index, self.codebook)
            # Paper silent: the reduction. We average over elements.
            codebook_loss = F.mse_loss(codes, z.detach())
            commitment_loss = F.mse_loss(z, codes.detach())
            loss = codebook_loss + self.beta * commitment_loss  # (1)
        if self.training:
            self.age += len(z)
            self.age.index_fill_(0, index.flatten(), 0)
            self.last_features = z.detach().flatten(0, 1)
        return z, codes, index, loss


# ================================================================================================
# 2. Histogram relation loss (4)-(7)
# ================================================================================================
# How do the vectors of a codebook lie to one another? Take all pairwise cosines, each code with
# itself included,
#
#     D = { cos(t_i, t_j) : t_i, t_j in C, i <= j },      M = n (n + 1) / 2 numbers in [-1, 1], (4)
#
# and describe their distribution by N bins with centres
#
#     B_k = -1 + 2 k / (N - 1),     k = 0 .. N - 1.                                            (5)
#
# A count per bin has no gradient, so each similarity falls into all bins a little, with a Gaussian
# weight:
#
#     p_k = sum over x in D of exp(-alpha (x - B_k)^2),     P = p / sum(p).                    (6)
#
# The diagonal (i = j) adds n times the similarity 1, a share 2 / (n + 1) of all pairs. It has no
# gradient, and keeps log P finite in the last bins. If there are fewer codes than the teacher has
# centres, the student's share is larger: a small effect.
#
# Paper silent: alpha. A similarity should weigh the same wherever it falls between two centres. By
# Poisson summation, an endless row of Gaussians a distance w = 2 / (N - 1) apart adds up to
#
#     sum_k exp(-alpha (x - k w)^2)
#         = sqrt(pi / alpha) / w * (1 + 2 exp(-pi^2 / (alpha w^2)) cos(2 pi x / w) + ...).
#
# alpha = 1 / w^2 leaves a ripple of 2 exp(-pi^2) = 1e-4. A larger alpha ripples (4 / w^2: 17 %), a
# smaller one blurs. So alpha follows from the number of bins. The sum is constant only away from
# +-1: the row of bins ends there, and a similarity of exactly 1 gets 78 % of an interior one's
# weight, (1 + 1/e + 1/e^4 + ...) / sqrt(pi). Teacher and student lose the same at the same place.


def default_alpha(bins):
    return ((bins - 1) / 2) ** 2  # 1 / w^2


ALPHA = default_alpha(40)  # 380.25: alpha at the paper's N = 40


def bin_centres(bins, like):
    """B_k of eq. (5), (bins,), in the dtype and on the device of the tensor `like`."""
    return torch.linspace(-1, 1, bins, dtype=like.dtype, device=like.device)  # (5)


def relation_histogram_direct(codes, bins=40, alpha=None):
    """Eqs. (4)-(6) as printed: codes (n, d) float -> P (bins,), sum 1. alpha: default_alpha.

    The reference. Its tensors take 21 GB each at n = 16,384; training calls `relation_histogram`.
    """
    check_tensor("codes", codes, (None, None))
    alpha = default_alpha(bins) if alpha is None else alpha
    t = F.normalize(codes, dim=1)
    i, j = torch.triu_indices(len(t), len(t), device=t.device)
    similarity = (t @ t.T)[i, j]  # (4)  D (M,)
    offset = similarity[:, None] - bin_centres(bins, t)  # (M, bins)
    p = torch.exp(-alpha * offset**2).sum(0)  # (6)  p (bins,)
    return p / p.sum()  # (6)  P


# Eq. (7) is written L_hist = KL(log P_s || sg[P_t]), the way torch's kl_div takes its arguments;
# s is the student's codebook, t the teacher. Its value is
#
#     L_hist = sum_k P_t (log P_t - log P_s) = KL(P_t || P_s),                                 (7)
#
# so leaving out a similarity that the teacher has is what costs most; the other direction could
# leave some out. Paper silent: the reduction. We sum over the bins, which makes it a KL divergence;
# kl_div's own default is their mean, smaller by a factor of N. (Below P_s = 1e-10 we clamp: a bin
# five or more bins away from every pair of the student pulls nothing.)


def kl_divergence(p, q):
    """KL(p || q) of two histograms (bins,), in nats; empty bins count as 1e-10."""
    p = p.clamp_min(1e-10)
    q = q.clamp_min(1e-10)
    return (p * (p.log() - q.log())).sum()  # (7)


def histogram_relation_loss(codes, teacher):
    """Eq. (7): student codes (n, d), teacher histogram (bins,) with sum 1 -> scalar, in nats."""
    check_tensor("teacher", teacher, (None,))
    student = relation_histogram(codes, len(teacher))
    return kl_divergence(teacher.detach(), student)  # (7)


# ---- The teacher (section 3.3)
#
# P_t is made once, before training: the features that a pre-trained model gives of all training
# images are clustered by k-means, and the histogram of the centres' similarities is all that
# training ever sees of the model. (The paper's other teacher, the semantic codebook of an already
# trained tokenizer, needs no clustering: relation_histogram(codebook).)
#
# Paper silent on which layer's features (ours: the last), and on k-means; (7) inherits the choice.
# Lloyd's iterations end in the nearest of many local minima, so the start decides. k-means++
# (Arthur and Vassilvitskii 2007) takes points as first centres, each with probability proportional
# to its squared distance from the nearest so far. Greedy k-means++ draws 2 + ln k candidates for
# each and takes the one that lowers the sum of these distances most. Without that choice (1,024
# centres of 26,000 vectors) the teacher's histogram differs 40 times as much as between two seeds.


def kmeans(x, k, iterations=20):
    """Centres (k, d) of points x (n, d) float, n >= k. Draws from the global random generator.

    A centre that loses all its points stays where it is.
    """
    check_tensor("x", x, (None, None))
    check(len(x) >= k, f"k-means cannot place {k} centres among {len(x)} points")
    x = x.float()
    with full_precision(x.device):
        centres = kmeans_start(x, k)
        for _ in range(iterations):
            chunks = x.split(max(1, 2**24 // k))  # at most 2^24 distances in memory
            # ||x - c||^2 = ||x||^2 - (2 x.c - ||c||^2): the nearest has the largest bracket
            squared = centres.square().sum(1)
            closest = torch.cat([(2 * chunk @ centres.T - squared).argmax(1) for chunk in chunks])
            count = torch.bincount(closest, minlength=k)
            total = torch.zeros_like(centres).index_add_(0, closest, x)
            mean = total / count.clamp(min=1)[:, None]
            centres = torch.where(count[:, None] > 0, mean, centres)
    return centres


def kmeans_start(x, k):
    """k of the points x (n, d), chosen by greedy k-means++."""
    x_squared = x.square().sum(1)  # (n,)
    centres = x.new_empty(k, x.shape[1])
    centres[0] = x[torch.randint(len(x), ())]
    distance = (x - centres[0]).square().sum(1)  # to the nearest centre so far, squared
    for i in range(1, k):
        weight = distance if distance.max() > 0 else torch.ones_like(distance)
        cumulative = weight.double().cumsum(0)
        target = torch.rand(2 + int(math.log(k))).double().to(x.device) * cumulative[-1]
        chosen = torch.searchsorted(cumulative, target).clamp(max=len(x) - 1)  # (candidates,)
        to_chosen = x_squared[:, None] - 2 * x @ x[chosen].T + x_squared[chosen]  # (n, candidates)
        lowered = torch.minimum(distance[:, None], to_chosen.clamp_min(0))
        best = lowered.sum(0).argmin()
        distance = lowered[:, best]
        centres[i] = x[chosen[best]]
    return centres


MOST_PER_CENTRE = 256  # vectors; paper silent, and more take longer


def teacher_centres(features, k, labels=None):
    """Features (n, d) of a pre-trained model -> k centres, or fewer of few features, (k, d).

    If labels int64 (n,) are given, as VQGAN-LC has it: each class is clustered for itself, k //
    classes centres each (at least one), and the centres are stacked.
    """
    check_tensor("features", features, (None, None))
    if labels is not None:
        classes = labels.unique()
        share = max(1, k // len(classes))
        return torch.cat([teacher_centres(features[labels == label], share) for label in classes])
    if len(features) > MOST_PER_CENTRE * k:
        some = torch.randperm(len(features))[: MOST_PER_CENTRE * k]
        features = features[some.to(features.device)]
    return kmeans(features, min(k, len(features)))


def teacher_histogram(features, k, bins=40):
    """Features (n, d) of a pre-trained model -> P_t (bins,), the relations of their k centres."""
    return relation_histogram(teacher_centres(features, k), bins)


def sphere_histogram(dim, bins=40, alpha=None):
    """The histogram (bins,) of infinitely many vectors, uniform on the unit sphere of R^dim.

    As a teacher it asks for uniform spread and needs no network: a control that the paper lacks. It
    has no diagonal (i = j), so that the KL of a student cannot quite become 0.

    The cosine x between a fixed and a uniform unit vector has the density (1 - x^2)^((dim - 3) / 2)
    up to a constant. With x = cos(theta) that is sin(theta)^(dim - 2) d(theta), smooth for every
    dim >= 2, and eq. (6) is its integral against each Gaussian (midpoint rule).
    """
    alpha = default_alpha(bins) if alpha is None else alpha
    theta = (torch.arange(4096, dtype=torch.float64) + 0.5) * math.pi / 4096
    f = torch.exp(-alpha * (theta.cos() - bin_centres(bins, theta)[:, None]) ** 2)
    p = f @ theta.sin() ** (dim - 2)
    return (p / p.sum()).float()


# What can a codebook of dimension d imitate? With T (n, d) the matrix of its unit vectors, the
# mean square of all n^2 cosines is ||T T^T||_F^2 / n^2 = ||T^T T||_F^2 / n^2: the sum of the
# squares of the d eigenvalues of T^T T, over n^2. They sum to n, so it is at least 1/d (the Welch
# bound): in few dimensions codes cannot all be near-orthogonal. A teacher whose mean squared cosine
# lies below 1/d (1/8 here) keeps the KL above zero whatever we do. The mean cosine, |mean of T|^2,
# may be anything from 0 to the root of the mean square. Both moments only hint at how well a
# teacher can be imitated, so `histogram_floor` measures it: the KL that a codebook reaches if (7)
# is its only loss.


def cosine_moments(vectors):
    """Mean and mean square of all n^2 cosines of vectors (n, d), two floats."""
    t = F.normalize(vectors.double(), dim=1)
    mean = t.mean(0).square().sum()
    mean_square = (t.T @ t).square().sum() / len(t) ** 2
    return mean.item(), mean_square.item()


def histogram_floor(teacher, n, d, steps=300):
    """The KL (7) that n free codes of dimension d reach for a teacher (bins,), a float."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(n, d, generator=generator).to(teacher.device).requires_grad_()
    optimizer = torch.optim.Adam([codes], 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lowest = math.inf
    for _ in range(steps):
        loss = histogram_relation_loss(codes, teacher)
        lowest = min(lowest, loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return max(0.0, lowest)  # clamping and rounding can end a hair below 0


# ---- The fast form of (6)
#
# All M similarities act on the loss through N numbers, and the loss acts back on each by a scalar:
#
#     dL/dx = sum_k (dL/dp_k) f_k'(x) = g(x),     f_k(x) = exp(-alpha (x - B_k)^2),
#
# a force that depends on x alone. So f_k and f_k' are tabulated once, at TABLE + 1 evenly spaced
# points of [-1, 1].
#
#   Forward:  count the similarities nearest to each point; p_k = sum over points of count * f_k.
#   Backward: tabulate g; let every pair look its force up. x_ij = t_i . t_j moves t_i along t_j
#             and t_j along t_i, so dL/dt_i = sum_j g(x_ij) t_j, a matrix product.
#
# Both run over bands of rows, and the (n, n) matrix never stands in memory. Moving x to the nearest
# point, by 1 / TABLE at most, changes its weight in (6) by at most max |f'| / TABLE =
# sqrt(2 alpha / e) / TABLE = 1.3e-4, against a peak weight of 1, and its force by at most
# max |f''| / TABLE = 2 alpha / TABLE = 6e-3 for each unit of dL/dp_k, against a largest |f'| of 17.
# Over many pairs signs cancel.

TABLE = 2**17
BAND = {"cpu": 2**20, "cuda": 2**24}  # similarities at once: few fit a cache, many fill a GPU


@functools.lru_cache(4)
def kernel_tables(bins, alpha, device):
    """f_k and f_k' of all bins at the TABLE + 1 points, (bins, TABLE + 1) each."""
    points = torch.linspace(-1, 1, TABLE + 1, device=device)
    offset = points - bin_centres(bins, points)[:, None]
    f = torch.exp(-alpha * offset**2)
    return f, -2 * alpha * offset * f


def similarity_bands(t):
    """The cosines of all n^2 pairs of unit vectors t (n, d), a band of rows at a time.

    Yields a, b, and the points of the table nearest to the similarities of t[a:b] with t, int
    (b - a, n).
    """
    rows = max(1, BAND[t.device.type] // len(t))
    half = TABLE / 2
    for a in range(0, len(t), rows):
        b = min(a + rows, len(t))
        # point = round((x + 1) TABLE / 2): a scaled product, 0.5 for rounding, then truncation
        position = torch.addmm(t.new_full((1,), half + 0.5), t[a:b] * half, t.T)
        yield a, b, position.int()


class SmoothedHistogram(torch.autograd.Function):
    """Eq. (6) before normalisation: unit float32 vectors t (n, d) -> p (bins,).

    NaN, which is no index, counts as 0; the last term of p passes it on.
    """

    @staticmethod
    def forward(ctx, t, bins, alpha):
        f, ctx.slope = kernel_tables(bins, alpha, t.device)
        ctx.save_for_backward(t)
        count = torch.zeros(TABLE + 1, dtype=torch.int64, device=t.device)
        for _, _, point in similarity_bands(t.nan_to_num()):
            point = point.flatten()
            if point.is_cuda:  # bincount would make the host wait; a float stops at 2^24
                count.index_add_(0, point, torch.ones_like(point, dtype=torch.int64))
            else:
                count += torch.bincount(point, minlength=TABLE + 1)
        # The square holds a pair i < j twice, and i = j, whose similarity is 1, once. With n more
        # at the last point (4) is there exactly twice.
        count[TABLE] += len(t)
        return f @ (count / 2) + 0 * t.sum()  # (4), (6)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (t,) = ctx.saved_tensors
        out = torch.empty_like(t)
        with full_precision(t.device):
            force = grad.float() @ ctx.slope  # g at every point of the table
            for a, b, point in similarity_bands(t.nan_to_num()):
                g = force.index_select(0, point.flatten()).view(point.shape)  # (b - a, n)
                out[a:b] = g @ t
        # t_i's pair with itself adds a force along t_i, which the normalisation removes.
        return out, None, None


def relation_histogram(codes, bins=40, alpha=None):
    """Eqs. (4)-(6), fast: codes (n, d) float -> P (bins,) float32, sum 1. Differentiable once."""
    check_tensor("codes", codes, (None, None))
    alpha = default_alpha(bins) if alpha is None else alpha
    with full_precision(codes.device):
        p = SmoothedHistogram.apply(F.normalize(codes.float(), dim=1), bins, alpha)  # (4), (6)
        return p / p.sum()  # (6)  P


# Eq. (4) counts every code once, used or not, so (7) can be satisfied by codes that nobody uses.
# The histogram of what is used counts the pair i, j of (4) u_i u_j times instead of once, where
# u_i is the share of tokens that chose code i, times n. If all codes are used alike it is (6).


@torch.no_grad()
def used_histogram(codes, counts, bins=40):
    """Codes (n, d), how often each was chosen (n,) -> P (bins,) float32, sum 1."""
    t = F.normalize(codes.float(), dim=1)
    u = counts.double() / counts.sum() * len(t)
    weight = torch.zeros(TABLE + 1, dtype=torch.float64, device=t.device)
    with full_precision(t.device):
        for a, b, point in similarity_bands(t):
            pairs = u[a:b, None] * u  # (b - a, n)
            weight += torch.bincount(point.flatten(), pairs.flatten(), minlength=TABLE + 1)
        weight[TABLE] += u.square().sum()  # i = j, as above: all is there twice
        f, _ = kernel_tables(bins, default_alpha(bins), t.device)
        p = f @ weight.float()
    return p / p.sum()


# ================================================================================================
# 3. The residual module: the idea of (8)-(12), the network of (8) and (9)
# ================================================================================================
# Quantization error is not noise: a code's neighbours in the grid say much about where in its
# Voronoi cell a feature lay. One transformer block reads all codes of a kind and predicts the rest,
#
#     Zres_sem = R_sem(Zhat_sem)                                                               (8)
#     Zres_vis = R_vis(Zhat_vis)                                                               (9)
#     L_res = ||sg[Z_sem] - Zhat_sem - Zres_sem|| + ||sg[Z_vis] - Zhat_vis - Zres_vis||       (10)
#
# and the decoder gets the sums, Zhat_vis + Zres_vis (11) and Zhat_sem + Zres_sem (12).
#
# In (10) Z is stopped and Zhat is not. Paper silent: where Zhat's gradient goes. If Zhat were the
# straight-through copy, descent would push Z along +(Z - Zhat - Zres), away from the very vector
# Zhat + Zres that should approximate it: the opposite of commitment. So Zhat here, and as the input
# of R, is the code vector itself: (10) moves R and the codebook, never the encoder. (The decoder's
# losses reach the encoder through the straight-through copy, and R and the codebook through Zres.)
# Paper silent: (10) prints plain norms; we square and average them over elements, as in (1). Z is
# the unit vector that was quantized; Zhat + Zres is not put back on the sphere.
#
# Paper silent: how a block meets 8-d codes, and where positions enter. Here: linear maps to the
# block's width and back, learned positions added after the first.


class Attention(nn.Module):
    """Multi-head self-attention, tokens (B, T, width) -> the same."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, T, 3, heads, width / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Tokens (..., width) -> the same: linear, GELU of one half times the other half, linear."""

    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)  # three such matrices cost what two of 4 * width would
        self.linear_in = nn.Linear(width, 2 * hidden)
        self.linear_out = nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(F.gelu(gate) * up)


def rms_norm(x):
    """x (..., width) over its root mean square along the last dimension."""
    return F.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    """A pre-norm transformer block, (B, T, width) -> the same: attention, then a gated MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = GatedMLP(width)

    def forward(self, x):
        x = x + self.attention(rms_norm(x))
        return x + self.mlp(rms_norm(x))


class Transformer(nn.Module):
    """Linear, positions, blocks, linear: tokens (B, T, d_in) -> (B, T, d_out).

    With one block and d_in = d_out it is R_sem or R_vis, with several an adapter.
    """

    def __init__(self, c, d_in, d_out, layers):
        super().__init__()
        self.proj_in = nn.Linear(d_in, c.width)
        self.proj_out = nn.Linear(c.width, d_out)
        self.position = nn.Parameter(0.02 * torch.randn(1, c.grid_size**2, c.width))
        self.blocks = nn.Sequential(*[Block(c.width, c.heads) for _ in range(layers)])

    def forward(self, x):
        x = self.blocks(self.proj_in(x) + self.position)  # (B, T, width)
        return self.proj_out(rms_norm(x))


# ================================================================================================
# 4. The tokenizer (figure 2)
# ================================================================================================


class GloTok(nn.Module):
    """Images float (B, 3, H, W) in [-1, 1] <-> semantic and visual tokens, int64 (B, h, w) each.

    Inside, tokens stand in a row of T = h * w, and d is config.code_dim.
    """

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c
        self.encoder = encoder(c)
        self.decoder = decoder(c)
        self.adapter_sem = self.make_adapter()
        self.adapter_vis = self.make_adapter()
        if c.codes_sem == 1:  # the baseline of one codebook: this branch has nothing to learn
            self.adapter_sem.requires_grad_(False)
        self.quantizer_sem = Quantizer(c.codes_sem, c.code_dim, c.beta)
        self.quantizer_vis = Quantizer(c.codes_vis, c.code_dim, c.beta)
        if c.lambda_res:
            self.residual_sem = self.make_residual_module()
            self.residual_vis = self.make_residual_module()
        if c.semantic == "fqgan":
            self.semantic_head = ContrastiveHead(c.code_dim, TEACHER_WIDTH[c.teacher], c.grid_size)
        if c.semantic == "vavae":
            self.semantic_head = nn.Linear(c.code_dim, TEACHER_WIDTH[c.teacher])

    def make_adapter(self):
        """Z (B, T, z_channels) -> Z_sem or Z_vis (B, T, d). Paper silent on what it is."""
        c = self.config
        if c.adapter_layers == 0:
            return nn.Linear(c.z_channels, c.code_dim)
        return Transformer(c, c.z_channels, c.code_dim, c.adapter_layers)

    def make_residual_module(self):
        """R_sem or R_vis of (8), (9). It starts by adding nothing."""
        c = self.config
        module = Transformer(c, c.code_dim, c.code_dim, layers=1)
        nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(module.proj_out.bias)
        return module

    @property
    def codebook_sem(self):
        return self.quantizer_sem.codebook

    @property
    def codebook_vis(self):
        return self.quantizer_vis.codebook

    def features(self, x):
        """Images -> Z_sem and Z_vis before normalisation, each (B, T, d)."""
        size = self.config.image_size
        check_tensor("images", x, (None, 3, size, size))
        z = self.encoder(x).flatten(2).transpose(1, 2)  # (B, T, z_channels)
        # A single semantic code says nothing of the image: its branch must not teach the encoder.
        z_for_sem = z.detach() if self.config.codes_sem == 1 else z
        return self.adapter_sem(z_for_sem), self.adapter_vis(z)

    def residuals(self, zhat_sem, zhat_vis):
        """Code vectors (B, T, d) -> Zres_sem, Zres_vis; zeros if there are no residual modules."""
        if not self.config.lambda_res:
            return torch.zeros_like(zhat_sem), torch.zeros_like(zhat_vis)
        zres_sem = self.residual_sem(zhat_sem).float()  # (8)
        zres_vis = self.residual_vis(zhat_vis).float()  # (9)
        return zres_sem, zres_vis

    def forward(self, x, teacher_features=None):
        """Images -> reconstructions, losses. The training pass.

        losses is a dict of scalars: "quantize" (1) and "residual" (10), each summed over the two
        codebooks; "coverage" (section 8); those of section 7, for which teacher_features holds a
        teacher network's vectors (B, D) and maps (B, D, h', w') of the same images.
        """
        c = self.config
        f_sem, f_vis = self.features(x)
        z_sem, zhat_sem, index_sem, quantize_sem = self.quantizer_sem(f_sem)
        z_vis, zhat_vis, _, quantize_vis = self.quantizer_vis(f_vis)
        zres_sem, zres_vis = self.residuals(zhat_sem, zhat_vis)

        residual_sem = F.mse_loss(zhat_sem + zres_sem, z_sem.detach())  # (10)
        residual_vis = F.mse_loss(zhat_vis + zres_vis, z_vis.detach())  # (10)
        losses = {}
        losses["quantize"] = quantize_sem + quantize_vis
        losses["residual"] = residual_sem + residual_vis
        if c.lambda_coverage:
            losses["coverage"] = coverage_loss(z_sem, index_sem, self.codebook_sem)

        sem = straight_through(z_sem, zhat_sem)
        vis = straight_through(z_vis, zhat_vis)
        if c.semantic == "fqgan":
            losses["contrastive"] = contrastive_loss(self.semantic_head(sem), teacher_features[0])
        if c.semantic == "vavae":
            losses["vf"] = vf_loss(self.semantic_head(sem), teacher_features[1])
        recon = self.decode_latents(sem + zres_sem, vis + zres_vis)  # (12), (11)
        return recon, losses

    def decode_latents(self, sem, vis):
        """Latents (B, T, d) each, after (11) and (12) -> images float32, not clipped."""
        return self.decoder(self.concatenate(sem, vis)).float()

    def concatenate(self, sem, vis):
        """Latents (B, T, d) each -> along channels, (B, 2 d, h, w)."""
        side = self.config.grid_size
        return torch.cat([sem, vis], dim=2).transpose(1, 2).unflatten(2, (side, side))

    def encode(self, x):
        """Images -> semantic and visual indices, int64 (B, h, w) each."""
        f_sem, f_vis = self.features(x)
        side = self.config.grid_size
        sem = self.quantizer_sem.look_up(F.normalize(f_sem.float(), dim=2))
        vis = self.quantizer_vis.look_up(F.normalize(f_vis.float(), dim=2))
        return sem.unflatten(1, (side, side)), vis.unflatten(1, (side, side))

    def decode(self, sem, vis):
        """Indices (B, h, w) each -> images: what forward reconstructs from the same indices."""
        return self.decode_vectors(*self.code_vectors(sem, vis))

    def code_vectors(self, sem, vis):
        """Indices int64 (B, h, w) each -> code vectors (B, T, d) each."""
        side = self.config.grid_size
        check_tensor("semantic indices", sem, (None, side, side), integers=True)
        check_tensor("visual indices", vis, (len(sem), side, side), integers=True)
        zhat_sem = F.embedding(sem.flatten(1), self.codebook_sem)
        zhat_vis = F.embedding(vis.flatten(1), self.codebook_vis)
        return zhat_sem, zhat_vis

    def decode_vectors(self, zhat_sem, zhat_vis):
        """Code vectors (B, T, d) each -> images, not clipped."""
        zres_sem, zres_vis = self.residuals(zhat_sem, zhat_vis)
        return self.decode_latents(zhat_sem + zres_sem, zhat_vis + zres_vis)  # (12), (11)

    # What the generator learns (section 3.4): the features "obtained after vector quantization",
    # concatenated along channels. Paper silent: before or after (11) and (12). Before: the residual
    # modules then see generated vectors, too, which are not moved to the nearest codes.

    def to_latents(self, sem, vis):
        """Indices (B, h, w) each -> what the generator learns, (B, 2 d, h, w)."""
        return self.concatenate(*self.code_vectors(sem, vis))

    def from_latents(self, latents):
        """Generated latents (B, 2 d, h, w) -> images, not clipped."""
        side = self.config.grid_size
        check_tensor("latents", latents, (None, 2 * self.config.code_dim, side, side))
        sem, vis = latents.flatten(2).transpose(1, 2).chunk(2, dim=2)  # (B, T, d) each
        return self.decode_vectors(sem, vis)

    @property
    def semantic_layer(self):
        """The weight of the last layer before Z_sem, where VA-VAE compares gradients."""
        adapter = self.adapter_sem
        return adapter.weight if self.config.adapter_layers == 0 else adapter.proj_out.weight


# ================================================================================================
# 5. The whole loss (2), (3), (13)
# ================================================================================================
#     L_R     = ||x - xhat||^2                                                                 (2)
#     L_VQGAN = l_R L_R + l_Q L_Q + l_P L_P + l_G L_G                                          (3)
#     L       = L_VQGAN + l_res L_res + l_hist L_hist                                         (13)
#
# L_P is LPIPS (section 8). L_G = -mean disc(xhat), with a patch discriminator that is trained at
# the same time to tell x from xhat. Its own loss is the hinge: real patches above 1, fake ones
# below -1, no credit for more. Paper silent on all weights but l_res and l_hist (l_R is 1 here),
# and on when the discriminator enters: late, since early, blurred reconstructions are so easily
# told from true pictures that its answers teach little. It is untrained then: l_G grows from 0.
#
# A training step (train.py):
#
#     recon, losses = model(x)                                      "quantize" (1), "residual" (10)
#     losses["hist"] = histogram_relation_loss(model.codebook_sem, teacher)                     (7)
#     losses["perceptual"] = lpips(recon, x).mean()
#     losses["adv"] = adversarial_loss(disc, recon)                          from step adv_start on
#     total_loss(c, model, x, recon, losses, ramp).backward()                            (2), (13)
#     discriminator_loss(disc, recon, x).backward()                          from step adv_start on


def total_loss(c, model, x, recon, losses, ramp=1.0):
    """L of (13), of images x, their reconstructions and the other losses; adds "recon" to these.

    losses: a dict of scalars, 0 if one is not there. ramp: the share of lambda_adv that L_G has by
    now. The last three terms are not in (13): sections 7 and 8.
    """
    losses["recon"] = F.mse_loss(recon, x)  # (2)
    pixels = losses["recon"] + c.lambda_perceptual * losses.get("perceptual", 0)
    lambda_g = c.lambda_adv * ramp
    if c.adv_adaptive and "adv" in losses:
        lambda_g = lambda_g * gradient_ratio(pixels, losses["adv"], model.decoder[-2].weight)
    vqgan = pixels + c.lambda_quantize * losses["quantize"] + lambda_g * losses.get("adv", 0)  # (3)
    loss = vqgan + c.lambda_res * losses["residual"] + c.lambda_hist * losses.get("hist", 0)  # (13)

    loss = loss + c.lambda_coverage * losses.get("coverage", 0)
    loss = loss + FQGAN_WEIGHT * losses.get("contrastive", 0)
    if "vf" in losses:
        ratio = gradient_ratio(pixels, losses["vf"], model.semantic_layer)
        loss = loss + VAVAE_WEIGHT * ratio * losses["vf"]
    return loss


def gradient_ratio(loss, other, weight):
    """||d loss / d weight|| / ||d other / d weight||, a scalar without gradient.

    VQGAN's adaptive weight: it makes the gradient of L_G at the decoder's last layer as large as
    that of L_R and L_P. As there, 1e-4 is added to the denominator, and the ratio is at most 1e4.
    """
    (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (other_grad,) = torch.autograd.grad(other, weight, retain_graph=True)
    return (grad.norm() / (other_grad.norm() + 1e-4)).clamp(max=1e4).detach()


def adversarial_loss(disc, recon):
    """L_G: reconstructions with gradient (B, 3, H, W) -> scalar. It moves the tokenizer alone."""
    disc.requires_grad_(False)
    loss = -disc(recon).mean()
    disc.requires_grad_(True)
    return loss


def discriminator_loss(disc, recon, x):
    """The hinge loss, from reconstructions and images -> scalar. Moves the discriminator alone."""
    real = disc(x)
    fake = disc(recon.detach())
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# ================================================================================================
# 6. The generator: xAR (section 3.4)
# ================================================================================================
# Two indices a position, predicted one after the other, double the chances to err, and errors feed
# on errors. So the paper concatenates the two code vectors of a position (8 + 8 = 16 numbers) and
# lets xAR (Ren et al. 2025, arXiv 2502.20388) learn that continuous space: the grid is cut into
# cells, generated in order, each by flow matching.
#
# Flow matching. Draw data z_0 and noise eps, and join them by a straight line,
#
#     z_t = (1 - t) z_0 + t eps.
#
# A particle on it moves at the velocity eps - z_0. A network v(z_t, t) regressed on that gives the
# mean velocity of all lines through z_t. Following dz/dt = v from t = 1 down to t = 0 carries noise
# to data, since a flow with the mean velocity moves the whole density as the lines do.
#
# The score comes free. For a fixed z_0, z_t is Gaussian with mean (1 - t) z_0 and standard
# deviation t, so grad log p(z_t | z_0) = -(z_t - (1 - t) z_0) / t^2 = -eps / t. The score of the
# mixture over z_0 is the posterior mean of that. With E[eps | z_t] = z_t + (1 - t) v, which follows
# from the line and from v = E[eps - z_0 | z_t],
#
#     s = grad log p_t(z) = -E[eps | z_t] / t = -(z + (1 - t) v) / t.
#
# Noise in sampling. For any w >= 0 the noisy path dz = (v - w s / 2) dt + sqrt(w) dW, W Brownian
# motion, run backwards in t (dt < 0), has the same densities p at every t: the noise spreads them
# by w / 2 times the Laplacian of p, the drift along the score gathers w / 2 div(p s), and p s =
# grad p. Fresh noise washes out the errors of earlier steps. With xAR's choice, w = 2 t, the drift
# v - t s = v + E[eps | z_t] stays finite down to t = 0 though s does not, and the noise fades as
# the picture is finished. Euler-Maruyama takes steps along it.
#
# Exposure bias. Teacher forcing shows cell k the true cells before it; at sampling it sees its
# own, imperfect ones. xAR noises every cell at its own t and lets cell k see the noisy ones: a
# model that has learned to work from a damaged context is not thrown off by its own mistakes. One
# pass under a block-causal mask trains all cells. At sampling finished cells are shown at t = 0.
#
# Classifier-free guidance. By Bayes, grad log p(y | z) = s(z | y) - s(z) for a label y: the
# difference of the scores with and without it points to where the label is more certain. At each t
# we follow the score of p_t(z) p_t(y | z)^g, which is s(z) + g (s(z | y) - s(z)); g is the strength
# of guidance, and g = 1 is none. (These densities are not the noised versions of p_0(z) p_0(y |
# z)^g, so the samples only lean that way.) That score is (1 - g) s(z) + g s(z | y), whose weights
# add up to 1; and v = -(z + t s) / (1 - t), for t < 1, is affine in s: velocities are combined with
# the same weights. One network gives both, since a share of its labels is hidden in training.
#
# xAR lets g grow linearly over the cells, from 1 at the first: the first cells decide what the
# picture is, where guidance costs variety; the later ones must fit to them.
#
# Rotary positions. A query at position m and a key at n should meet by their offset n - m alone.
# Turn pairs of channels by angles proportional to the position, R(m) q and R(n) k: then
# (R(m) q) . (R(n) k) = q . R(n - m) k, for rotations compose and R(m)^T = R(-m). The frequencies
# fall geometrically from 1 towards 1/10,000, so that near and far offsets both show. In two
# dimensions half of the pairs turn with the row, half with the column.


def rotary_tables(positions, width):
    """(row, column) of each token, float (T, 2) -> what `rotate` needs, two (T, 1, 1, width)."""
    frequencies = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (T, width / 2)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], 1)[:, None, None], torch.cat([-sin, sin], 1)[:, None, None]


def rotate(x, cos, sin):
    """Turn the channel pairs (i, D / 2 + i) of x (B, T, ..., heads, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def timestep_embedding(t, width=256):
    """Times t (...) in [0, 1] -> (..., width), waves of 1000 t. (xAR's code: of floor(1000 t).)"""
    half = width // 2
    frequencies = 10000 ** (-torch.arange(half, device=t.device) / half)
    waves = 1000 * t[..., None] * frequencies
    return torch.cat([waves.cos(), waves.sin()], dim=-1)


class XARBlock(nn.Module):
    """Section 3's block, with rotary positions and a condition, (B, T, width) -> the same.

    AdaLN: from the condition of each cell come a scale and a shift for what enters attention and
    MLP, and a gate for what leaves them.
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.adaln = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = GatedMLP(width)

    def forward(self, x, condition, rotary, mask=None, cache=None):
        """Tokens x (B, T, width) of some cells, condition (B, cells, width) -> (B, T, width).

        rotary: the tables of `rotate`. mask, in training: bool (T, T), which keys each query may
        see. cache, in sampling: see `attend`.
        """
        modulation = self.adaln(F.silu(condition))[:, :, None]  # (B, cells, 1, 6 * width)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=3)
        x = x.unflatten(1, (condition.shape[1], -1))  # (B, cells, tokens a cell, width)
        h = torch.addcmul(shift1, rms_norm(x), 1 + scale1)  # shift + norm * (1 + scale)
        h = self.attend(h.flatten(1, 2), rotary, mask, cache)
        x = torch.addcmul(x, gate1, self.drop(h).view(x.shape))  # x + gate * h
        h = torch.addcmul(shift2, rms_norm(x), 1 + scale2)
        x = torch.addcmul(x, gate2, self.drop(self.mlp(h)))
        return x.flatten(1, 2)

    def attend(self, x, rotary, mask, cache):
        """Self-attention of tokens (B, T, width). They also see the earlier tokens in the cache.

        cache: keys and values of the whole grid, (B, heads, all tokens, width / heads) each, and
        the slice of it where these T tokens stand, which they fill.
        """
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, T, 3, heads, width / heads)
        q, k = rotate(qkv[:, :, :2], *rotary).permute(2, 0, 3, 1, 4)  # (B, heads, T, ...) each
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            keys, values, here = cache
            keys[:, :, here] = k
            values[:, :, here] = v
            k = keys[:, :, : here.stop]
            v = values[:, :, : here.stop]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)


class XAR(nn.Module):
    """The generator of latents float (B, 2 d, h, w); inside, (B, cells, tokens a cell, 2 d)."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c
        self.channels = 2 * c.code_dim
        self.cells = (c.grid_size // c.cell) ** 2
        self.tokens_per_cell = c.cell**2
        width = c.gen_width
        self.proj_in = nn.Linear(self.channels, width)
        self.proj_out = nn.Linear(width, self.channels)
        # Positions enter twice, before the first half of the blocks and before the second.
        self.position = nn.Parameter(0.02 * torch.randn(2, c.grid_size**2, width))
        self.label_embedding = nn.Embedding(c.classes + 1, width)  # the last is "no label"
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            XARBlock(width, c.gen_heads, c.gen_dropout) for _ in range(c.gen_layers)
        )
        for module in self.modules():  # Xavier's weights, biases of 0
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embedding.weight, 0, 0.02)
        for block in self.blocks:  # ours, after DiT
            nn.init.zeros_(block.adaln.weight)

        # Where tokens stand in the grid: cell by cell, row by row inside a cell.
        grid = torch.arange(c.grid_size**2)
        rows = c.grid_size // c.cell
        order = grid.view(rows, c.cell, rows, c.cell).transpose(1, 2).flatten()  # (T,)
        positions = torch.stack([order // c.grid_size, order % c.grid_size], dim=1).float()
        cos, sin = rotary_tables(positions, width // c.gen_heads)
        cell_of_token = torch.arange(self.cells).repeat_interleave(self.tokens_per_cell)
        mask = cell_of_token[:, None] >= cell_of_token[None, :]  # itself and the cells before it
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        # Paper silent: the scale of the latents. We divide them by their standard deviation, one
        # number, which train.py sets.
        self.register_buffer("latent_std", torch.ones(()))

    def to_cells(self, z):
        """(B, C, h, w) -> (B, cells, tokens a cell, C)."""
        z = z.flatten(2).index_select(2, self.order)  # (B, C, T)
        return z.transpose(1, 2).unflatten(1, (self.cells, -1))

    def from_cells(self, z):
        """The inverse of to_cells: (B, cells, tokens a cell, C) -> (B, C, h, w)."""
        z = z.flatten(1, 2).transpose(1, 2)  # (B, C, T)
        side = self.config.grid_size
        return z.index_select(2, self.order.argsort()).unflatten(2, (side, side))

    # Training: all cells in one pass, each noised at its own time.

    def loss(self, latents, labels):
        """Flow matching with noisy context: latents, labels int64 (B,) -> mean squared error."""
        side = self.config.grid_size
        check_tensor("latents", latents, (None, self.channels, side, side))
        check_tensor("labels", labels, (len(latents),), integers=True)
        t, noise, hidden = self.draw(len(latents), latents.device)
        z = self.to_cells(latents.float() / self.latent_std)
        labels = torch.where(hidden, self.config.classes, labels)
        z_t = torch.lerp(z, noise, t[:, :, None, None])  # (1 - t) z + t eps
        return F.mse_loss(self.velocity(z_t, t, labels), noise - z)

    def draw(self, batch, device):
        """The random numbers of a training step: times, noise, and which labels to hide."""
        # The logit of t is normal; xAR's has mean 0. Few t then lie near 1, where the shape of a
        # picture is decided: a short run needs more of them.
        normal = torch.randn(batch, self.cells, device=device)
        t = (normal + self.config.time_shift).sigmoid()
        noise = torch.randn(batch, self.cells, self.tokens_per_cell, self.channels, device=device)
        hidden = torch.rand(batch, device=device) < self.config.label_dropout
        return t, noise, hidden

    def velocity(self, z, t, labels, first_cell=0, caches=None):
        """Cells z (B, k, tokens a cell, 2 d) at times t (B, k), labels (B,) -> their velocities."""
        x = self.run_blocks(z, t, labels, first_cell, caches)
        return self.proj_out(rms_norm(x)).float().view(z.shape)

    def run_blocks(self, z, t, labels, first_cell=0, caches=None):
        """The same without the output layer -> (B, k * tokens a cell, width).

        In training z holds all cells, under the block-causal mask. In sampling it holds one,
        first_cell, which sees the earlier ones through caches, (keys, values) for each block.
        """
        first = first_cell * self.tokens_per_cell
        here = slice(first, first + z.shape[1] * self.tokens_per_cell)
        rotary = (self.cos[here], self.sin[here])
        mask = self.mask if caches is None else None
        time = self.time_mlp(timestep_embedding(t))  # (B, k, width)
        condition = time + self.label_embedding(labels)[:, None]  # (B, k, width)
        x = self.proj_in(z.flatten(1, 2)) + self.position[0, here]
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) // 2:
                x = rms_norm(x) + self.position[1, here]
            cache = None if caches is None else (*caches[i], here)
            x = block(x, condition, rotary, mask, cache)
        return x

    # Sampling: cell after cell, each from noise.

    @torch.no_grad()
    def sample(self, labels, steps=25, guidance=1.0):
        """Labels int64 (B,) -> latents. Draws from the global random generator.

        `guidance` is the last cell's. The first has as much, but at most config.guidance_first.
        """
        check_tensor("labels", labels, (None,), integers=True)
        c = self.config
        check_guidance(c.label_dropout, guidance)
        first = min(c.guidance_first, guidance)
        no_label = torch.full_like(labels, c.classes)
        both = torch.cat([labels, no_label])  # with and without the label, in one batch
        shape = (2, len(both), c.gen_heads, c.grid_size**2, c.gen_width // c.gen_heads)
        kind = both.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        caches = [torch.zeros(shape, device=both.device, dtype=dtype) for _ in self.blocks]
        cells = []
        for cell in range(self.cells):
            ramp = cell / max(self.cells - 1, 1)
            strength = first + (guidance - first) * ramp
            z = self.sample_cell(both, cell, caches, steps, strength)
            if cell < self.cells - 1:  # its clean keys and values, for the cells after it
                clean = torch.zeros(len(both), 1, device=z.device)
                self.run_blocks(z.repeat(2, 1, 1, 1), clean, both, cell, caches)
            cells.append(z)
        return self.latent_std * self.from_cells(torch.cat(cells, dim=1))

    def sample_cell(self, both, cell, caches, steps, strength):
        """One cell from noise, (B, 1, tokens a cell, 2 d), for both = labels and "no label" (2B,).

        t falls from 1 to 0.04 in steps - 1 steps, then to 0 in one, as in xAR's code.
        """
        batch = len(both) // 2
        z = torch.randn(batch, 1, self.tokens_per_cell, self.channels, device=both.device)
        times = [*torch.linspace(1, 0.04, steps).tolist(), 0.0]
        for t, t_next in zip(times, times[1:]):
            dt = t_next - t
            now = torch.full((2 * batch, 1), t, device=z.device)
            v = self.velocity(z.repeat(2, 1, 1, 1), now, both, cell, caches)
            with_label, without = v.chunk(2)
            v = without + strength * (with_label - without)
            if self.config.stochastic:  # Euler-Maruyama
                score = -(z + (1 - t) * v) / t
                z = z + (v - t * score) * dt
                if t_next > 0:  # the last step has no noise
                    z = z + math.sqrt(2 * t * -dt) * torch.randn_like(z)
            else:  # Euler
                z = z + v * dt
        return z


# ================================================================================================
# 7. What the paper argues against
# ================================================================================================
# Local supervision, what FQGAN and VA-VAE do instead of eq. (7): the semantic codes of an image
# should predict a pre-trained network's features of that same image. The network runs in every
# step. What each method compares with its teacher:
#
#     a token with its own target        VA-VAE's L_mcos    1 - 0.5 - cos(z'_i, f_i)
#     the tokens inside one image        VA-VAE's L_mdms    |cos(z'_i, z'_j) - cos(f_i, f_j)| - 0.25
#     the images inside a batch          FQGAN's InfoNCE    which image of the batch is mine?
#     the codes over the whole data set  GloTok's eq. (7)   no image at all
#
# So GloTok is not the only relational one, but the only one whose relations leave the batch.
#
# Both read the straight-through semantic codes: their gradient passes the quantizer to the encoder.
# f are the teacher's features, and D is their number of channels. What keeps codes in use (section
# 8) stays on for every method. (FQGAN adds two losses that have no teacher; they are not here.)

TEACHER_WIDTH = {"convnet": 64, "dinov2": 384}  # D

# FQGAN (Bai et al. 2024, arXiv 2411.16681): one vector an image. A head predicts the teacher's from
# the semantic codes; both to unit length, S_ij = <prediction_i, target_j>. Its InfoNCE is the
# cross-entropy of picking the target of one's own image out of the batch's,
#
#     L_contrastive = mean over i of -log(exp S_ii / sum over j of exp S_ij),
#
# without temperature: S lies in [-1, 1], so even a perfect match leaves most of the loss. FQGAN's
# target is CLIP's class token; ours DINOv2's, or the mean of the convnet's features.

FQGAN_WEIGHT = 0.5  # as published


class ContrastiveHead(nn.Module):
    """FQGAN's head: semantic codes (B, T, d) -> a prediction of the teacher's vector, (B, D)."""

    def __init__(self, d, width, side):
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + side**2, width))
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.Sequential()
        for _ in range(3):
            layer = nn.TransformerEncoderLayer(
                width, 8, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers.append(layer)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, codes):
        x = self.proj(codes)  # (B, T, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm_in(x + self.position)
        x = self.layers(x)
        return self.norm_out(x[:, 0])


def contrastive_loss(prediction, target):
    """InfoNCE of predictions (B, D) and the teacher's vectors (B, D), a scalar, nats."""
    check(len(prediction) > 1, "InfoNCE tells the images of a batch apart: it needs more than 1")
    with full_precision(prediction.device):
        prediction = F.normalize(prediction.float(), dim=1)
        target = F.normalize(target.detach().float(), dim=1)
        similarity = prediction @ target.T  # (B, B)
        itself = torch.arange(len(target), device=target.device)
        return F.cross_entropy(similarity, itself)


# VA-VAE (Yao et al. 2025, arXiv 2501.01423): one vector a token. A linear map takes the latent to
# the teacher's width, z'. Two margins, below which a difference is forgiven:
#
#     L_mdms = mean over images and i, j of relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - 0.25)
#     L_mcos = mean over images and i of relu(1 - 0.5 - cos(z'_i, f_i))
#     L_vf   = L_mdms + L_mcos
#
# Its weight is 0.1 times a ratio of gradients at the last layer before the latent, those of
# l_R L_R + l_P L_P and of L_vf (total_loss). VA-VAE's latent is continuous; ours is the quantized
# one, which is what the decoder gets.

VAVAE_WEIGHT = 0.1  # as published


def vf_loss(projected, maps):
    """Projected codes z' (B, T, D), the teacher's maps (B, D, h', w') -> L_vf, a scalar."""
    side = math.isqrt(projected.shape[1])
    maps = F.adaptive_avg_pool2d(maps.detach().float(), side)  # (B, D, h, w), a mean for each token
    with full_precision(projected.device):
        target = F.normalize(maps.flatten(2).transpose(1, 2), dim=2)  # (B, T, D)
        z = F.normalize(projected.float(), dim=2)
        difference = z @ z.transpose(1, 2) - target @ target.transpose(1, 2)  # (B, T, T)
        mdms = F.relu(difference.abs() - 0.25).mean()
        mcos = F.relu(1 - 0.5 - (z * target).sum(2)).mean()
        return mdms + mcos


# ================================================================================================
# 8. Appendix: borrowed networks; keeping codes in use
# ================================================================================================
# VQGAN's encoder and decoder (Esser et al. 2021, arXiv 2012.09841).


def conv(c_in, c_out, kernel=3, stride=1):
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=padding)


class GroupNorm(nn.GroupNorm):
    """Group norm of up to 32 groups, in the type of its input.

    Autocast would cast the input to float32, though the kernel adds up in float32 anyway: on one
    H200 that was a seventh of a step of imagenet256 and a third of its memory.
    """

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(
            GroupNorm(c_in),
            nn.SiLU(),
            conv(c_in, c_out),
            GroupNorm(c_out),
            nn.SiLU(),
            conv(c_out, c_out),
        )
        self.skip = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)

    def forward(self, x):
        return self.skip(x) + self.body(x)


class SpatialAttention(nn.Module):
    """x + single-head self-attention over the positions of norm(x), (B, c, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.attention = Attention(channels, 1)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H * W, c)
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


def downsample(channels):
    """Halve (B, c, H, W). Padded right and bottom alone, as in VQGAN."""
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(channels, channels, stride=2))


def middle(channels):
    return [ResBlock(channels, channels), SpatialAttention(channels), ResBlock(channels, channels)]


def level(c_in, c_out, blocks, attention):
    """The residual blocks of one resolution, each followed by attention or not."""
    layers = []
    for i in range(blocks):
        layers.append(ResBlock(c_in if i == 0 else c_out, c_out))
        if attention:
            layers.append(SpatialAttention(c_out))
    return layers


def encoder(c):
    """Images (B, 3, H, W) -> Z (B, z_channels, h, w). Attention at the lowest resolution."""
    layers = [nn.PixelUnshuffle(c.patch), conv(3 * c.patch**2, c.channels)]
    width = c.channels
    lowest = len(c.channel_mult) - 1
    for i, mult in enumerate(c.channel_mult):
        layers += level(width, c.channels * mult, c.res_blocks, attention=i == lowest)
        width = c.channels * mult
        if i < lowest:
            layers.append(downsample(width))
    layers += middle(width)
    layers += [GroupNorm(width), nn.SiLU(), conv(width, c.z_channels)]
    return nn.Sequential(*layers)


def decoder(c):
    """Both latents, concatenated (B, 2 * code_dim, h, w) -> images (B, 3, H, W), not clipped."""
    width = c.channels * c.channel_mult[-1]
    layers = [conv(2 * c.code_dim, c.z_channels, 1), conv(c.z_channels, width), *middle(width)]
    lowest = len(c.channel_mult) - 1
    for i in range(lowest, -1, -1):
        c_out = c.channels * c.channel_mult[i]
        layers += level(width, c_out, c.res_blocks + 1, attention=i == lowest)
        width = c_out
        if i > 0:
            layers += [nn.Upsample(scale_factor=2), conv(width, width)]  # nearest neighbour
    layers += [GroupNorm(width), nn.SiLU(), conv(width, 3 * c.patch**2), nn.PixelShuffle(c.patch)]
    return nn.Sequential(*layers)


def discriminator(c):
    """PatchGAN (Isola et al. 2017): images -> a logit for each overlapping patch (B, 1, H', W')."""
    halvings = 3 if c.image_size >= 128 else 2  # a patch is 70x70 or 34x34 pixels
    width = 64
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, halvings + 1):
        c_in = width
        width = 64 * 2**i
        stride = 2 if i < halvings else 1
        layers.append(nn.Conv2d(c_in, width, 4, stride, 1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
    layers.append(nn.Conv2d(width, 1, 4, 1, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, 0.02)
    return nn.Sequential(*layers)


# Two published networks, with the state-dict names of the published files.


class LPIPS(nn.Module):
    """Zhang et al. 2018, on VGG16: images x, y (B, 3, H, W) in [-1, 1] -> distances (B,).

    features.* are torchvision's VGG16, lin0 .. lin4 the published heads.
    """

    VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # layer of relu1_2 .. relu5_3: its channels

    def __init__(self):
        super().__init__()
        layers = []
        c_in = 3
        for width in self.VGG16:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [conv(c_in, width), nn.ReLU()]
                c_in = width
        self.features = nn.Sequential(*layers)
        for i, width in enumerate(self.TAPS.values()):
            # `model.1`, because the published heads begin with a dropout
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x, y):
        distance = 0
        pairs = zip(self.unit_features(x), self.unit_features(y))
        for i, (unit_x, unit_y) in enumerate(pairs):
            weight = self.get_submodule(f"lin{i}.model.1").weight  # (1, C, 1, 1)
            distance = distance + (weight * (unit_x - unit_y) ** 2).sum(1).mean((1, 2))
        return distance

    def unit_features(self, x):
        """At each tap the features of images x, float32 (B, C, H', W'), of length 1 along C."""
        f = (x - self.shift) / self.scale
        for i, layer in enumerate(self.features):
            f = layer(f)
            if i in self.TAPS:
                length = f.float().square().sum(1, keepdim=True).sqrt()
                yield f.float() / (length + 1e-10)


class DINOv2(nn.Module):
    """Oquab et al. 2023, ViT-S/14: RGB in [0, 1], (B, 3, H, W), H and W multiples of 14 -> tokens.

    (B, 1 + H * W / 196, 384): the class token and the patch tokens, after the last norm.
    """

    GRID = 37  # patches each way that the position embedding was made for

    def __init__(self, width=384, depth=12, heads=6):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the file, not used here
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.GRID**2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, 14)})
        self.blocks = nn.ModuleList(DINOv2Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, x):
        x = self.patch_embed["proj"]((x - self.mean) / self.std)  # (B, width, h, w)
        position_cls, position = self.pos_embed.split([1, self.GRID**2], dim=1)
        position = position.transpose(1, 2).unflatten(2, (self.GRID, self.GRID))
        if x.shape[2:] != position.shape[2:]:
            # The published code passes factors, with 0.1 against rounding down, and they, not the
            # sizes, say where the points lie: point i at 37 (i + 0.5) / (side + 0.1) - 0.5.
            factors = [(side + 0.1) / self.GRID for side in x.shape[2:]]
            position = F.interpolate(position, scale_factor=factors, mode="bicubic")
        x = (x + position).flatten(2).transpose(1, 2)  # (B, h * w, width)
        cls_token = (self.cls_token + position_cls).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # (B, 1 + h * w, width)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DINOv2Block(nn.Module):
    """Attention and MLP, each after a LayerNorm, each scaled by a learned vector (LayerScale)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.attn = Attention(width, heads)
        fc1 = nn.Linear(width, 4 * width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))
        return x + self.ls2["gamma"] * self.mlp["fc2"](hidden)


class ConvNet(nn.Module):
    """The offline teacher, a small classifier: images (B, 3, H, W) -> logits (B, classes)."""

    def __init__(self, classes):
        super().__init__()
        layers = []
        c_in = 3
        for width, stride in ((32, 2), (64, 2), (64, 1), (64, 1)):
            layers.append(nn.Conv2d(c_in, width, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            c_in = width
        self.body = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(64, classes)

    def features(self, x):
        """The maps before the last ReLU, (B, 64, H / 4, W / 4), at most those of 64x64 pixels."""
        if x.shape[-1] > 64:
            x = F.adaptive_avg_pool2d(x, 64)
        return self.body(x)

    def forward(self, x):
        return self.head(F.relu(self.features(x)).mean((2, 3)))


# ---- Keeping codes in use: ours, not the paper's, which names no remedy
#
# Only chosen codes get a gradient from (1). On small data most are never chosen: in C_vis they
# would stay where they began; in C_sem the histogram loss (7) moves them, but nothing brings
# features to them. Without a remedy 18 to 29 % of the semantic codes are used in small runs
# (assets/evidence.md).
#
# For C_vis `revive` does the usual, and puts codes that nobody chose lately onto features. For
# C_sem that would undo (7), which says where the codes lie, so the features come to the codes
# instead. Coverage is commitment's mirror image: each unused code wants a feature near it,
#
#     L_coverage = mean over codes c of u_c min over z of ||z - sg[c]||^2 / d,
#
# where u_c is 1 if no feature z of the batch chose c, and 0 otherwise. (If a batch has few more
# features than there are codes, some are always unused by chance, and the pull never quite ends.)


def coverage_loss(z, index, codebook):
    """Unit features z (B, T, d), their indices (B, T), codebook (n, d) -> L_coverage, a scalar."""
    z = z.flatten(0, 1)  # (B * T, d)
    codes = codebook.detach()  # (n, d)
    unused = torch.ones(len(codes), device=z.device).index_fill(0, index.flatten(), 0)
    pulled = z.index_select(0, nearest(codes, z))  # (n, d)
    distance = (pulled - codes).square().mean(1)  # (n,)
    return (unused * distance).mean()


@torch.no_grad()
def revive(quantizer, images):
    """Move codes that none of the last `images` images chose onto random features of the batch."""
    features = quantizer.last_features  # (B * T, d)
    chosen = torch.randint(len(features), quantizer.age.shape, device=features.device)
    unused = (quantizer.age >= images)[:, None]  # (n, 1)
    quantizer.weight.copy_(torch.where(unused, features[chosen], quantizer.weight))


# ================================================================================================
# 9. Settings
# ================================================================================================


def setting(default, text, low=0, high=1e9):
    """A field of Config: its default, a line of help, and a number's range."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """Every setting of models, losses and training. The defaults are preset "shapes"."""

    # data and teacher
    data: str = setting("shapes", "shapes, cifar10, imagenette, a folder, or an .npz of images")
    teacher: str = setting("convnet", "convnet, dinov2, sphere, a file of vectors, or a run folder")
    teacher_centres: int = setting(1024, "k-means centres that stand for its features", 2)
    teacher_by_class: int = setting(0, "1: VQGAN-LC's centres: image means, class by class", 0, 1)
    image_size: int = setting(32, "height and width of the images, pixels", 8, 4096)

    # the tokenizer: VQGAN's encoder and decoder; each level after the first halves the picture
    patch: int = setting(2, "pixels folded into channels, each way, at the start (paper: 1)", 1, 16)
    channels: int = setting(48, "channels of the first level", 4, 4096)
    channel_mult: tuple = setting((1, 1), "channels of each level, times `channels`", 1, 64)
    res_blocks: int = setting(1, "residual blocks a level (the decoder has one more)", 1, 16)
    z_channels: int = setting(48, "channels of Z, the encoder's output", 1, 8192)
    adapter_layers: int = setting(0, "transformer layers of an adapter; 0: one linear map", 0, 64)
    width: int = setting(64, "width of adapters and residual modules", 8, 8192)
    heads: int = setting(4, "attention heads in adapters and residual modules", 1, 128)
    codes_sem: int = setting(256, "codes in the semantic codebook; 1: there is none", 1, 2**20)
    codes_vis: int = setting(768, "codes in the visual codebook", 2, 2**20)
    code_dim: int = setting(8, "dimension of a code vector", 2, 4096)

    # its losses, eqs. (3) and (13); a weight of 0 switches a loss off
    beta: float = setting(0.25, "weight of the commitment term in eq. (1)")
    lambda_quantize: float = setting(0.3, "weight of L_Q, eq. (1)")
    lambda_perceptual: float = setting(0.0, "weight of L_P, LPIPS")
    lambda_adv: float = setting(0.0, "weight of L_G, the adversarial loss")
    lambda_res: float = setting(0.5, "weight of L_res, eq. (10); 0 removes the residual modules")
    lambda_hist: float = setting(0.05, "weight of L_hist, eq. (7) (paper: 0.01)")
    lambda_coverage: float = setting(0.1, "weight of coverage, which keeps semantic codes in use")
    semantic: str = setting("global", "global: L_hist; or a local loss: fqgan, vavae; or none")
    bins: int = setting(40, "bins N of the similarity histogram", 2, 4096)
    adv_start: int = setting(20000, "step at which the discriminator enters")
    adv_adaptive: int = setting(1, "1: VQGAN's adaptive weight of L_G; 0: as FQGAN, plain", 0, 1)
    disc_lr: float = setting(5e-4, "learning rate of the discriminator's Adam", 0, 1)

    # the generator
    classes: int = setting(6, "number of classes (train.py counts them in the data)", 1, 10**6)
    cell: int = setting(4, "tokens each way in a cell, xAR's unit of generation", 1, 1024)
    gen_width: int = setting(96, "width of the generator", 8, 8192)
    gen_layers: int = setting(5, "transformer blocks of the generator", 1, 200)
    gen_heads: int = setting(4, "attention heads of the generator", 1, 128)
    gen_dropout: float = setting(0.0, "dropout in the generator's blocks", 0, 0.999)
    time_shift: float = setting(0.8, "trains at t = sigmoid(normal + this) (xAR: 0)", 0, 9)
    label_dropout: float = setting(0.1, "share of labels hidden in training, for guidance", 0, 1)
    stochastic: int = setting(0, "1: sample by Euler-Maruyama, as xAR; 0: by Euler", 0, 1)
    guidance: float = setting(3.0, "classifier-free guidance of the last cell; 1: none", 0, 100)
    guidance_first: float = setting(3.0, "of the first cell, at most guidance (xAR: 1)", 0, 100)
    sampling_steps: int = setting(10, "denoising steps a cell", 1, 10000)
    generator_steps: int = setting(3000, "training steps of the generator", 1)
    gen_batch: int = setting(16, "images a step, over all processes", 1)
    gen_lr: float = setting(5e-3, "learning rate of AdamW (betas 0.9, 0.96)", 0, 1)
    gen_lr_end: float = setting(0.0, "learning rate at the end of gen_cooldown", 0, 1)
    gen_warmup: int = setting(200, "steps over which the learning rate rises from 0")
    gen_cooldown: float = setting(0.5, "last share of the steps: half a cosine down", 0, 1)
    ema: float = setting(0.995, "decay of the weights' moving average, which samples", 0, 1)

    # training
    tokenizer_steps: int = setting(1300, "training steps of the tokenizer", 1)
    batch_size: int = setting(16, "images a step, over all processes", 1)
    lr: float = setting(3e-3, "learning rate of Adam (betas 0.9, 0.95)", 0, 1)
    warmup: int = setting(20, "steps over which the learning rate rises from 0")
    cooldown: float = setting(0.4, "last share of the steps: half a cosine down to 0", 0, 1)
    clip: float = setting(1.0, "largest norm of the gradient; 0 does not clip")
    revive_every: int = setting(20, "steps between revivals of unused visual codes; 0: never")
    flip: int = setting(1, "1: mirror half of the training images", 0, 1)
    crop: float = setting(1.0, "smallest random crop (tokenizer), share of the short side", 0.1, 1)
    accumulate: int = setting(1, "micro-batches of a process's batch, to save memory", 1)
    compile: str = setting("auto", "on: CUDA graphs, and xAR compiled; off; auto: as yet off")
    precision: str = setting("auto", "float32, bf16 (autocast), or auto: bf16 where it is faster")
    eval_images: int = setting(1000, "held-out images that the final figures are taken on", 1)
    save_every: int = setting(200, "steps between checkpoints", 1)
    seed: int = setting(0, "seed of weights, data order and built-in data", 0, 2**31)

    @property
    def downsampling(self):
        """Pixels that a token covers in each direction."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def grid_size(self):
        """Tokens in each direction."""
        return self.image_size // self.downsampling

    def __post_init__(self):
        for f in fields(self):
            check_field(f, getattr(self, f.name))
        size = self.image_size
        local = self.semantic in ("fqgan", "vavae")
        check(local or self.semantic in ("global", "none"), "semantic: no such method")
        check(self.precision in ("auto", "bf16", "float32"), "precision: auto, bf16 or float32")
        check(self.compile in ("auto", "on", "off"), "compile: auto, on or off")
        check(size % self.downsampling == 0, f"image_size: no multiple of {self.downsampling}")
        check(self.width % self.heads == 0, "width: no multiple of heads")
        check(self.grid_size % self.cell == 0, f"cell: does not divide {self.grid_size}, the grid")
        check(self.gen_width % (4 * self.gen_heads) == 0, "gen_width: no multiple of 4 gen_heads")
        check(self.lambda_adv == 0 or size >= 12, "image_size: the discriminator takes 12")
        check(self.lambda_perceptual == 0 or size >= 16, "image_size: LPIPS takes 16")
        check(not local or self.teacher in TEACHER_WIDTH, "teacher: semantic wants a network")
        check(not local or self.codes_sem > 1, "codes_sem: with one there is nothing to teach")
        check(self.gen_lr_end <= self.gen_lr, "gen_lr_end: above gen_lr")
        check_guidance(self.label_dropout, self.guidance)


def check(good, message):
    if not good:
        raise ValueError(message)


def check_field(f, value):
    """ValueError unless value has the type and lies in the range of the Config field f."""
    kind = type(f.default)
    accepted = (int, float) if kind is float else kind
    good = isinstance(value, accepted) and value != ()
    check(good, f"{f.name} is {value!r}: it must be of type {kind.__name__}")
    if kind is str:
        return
    low, high = f.metadata["low"], f.metadata["high"]
    for number in value if kind is tuple else [value]:
        whole = kind is float or isinstance(number, int)
        good = whole and low <= number <= high  # NaN fails every comparison
        check(good, f"{f.name} is {number}: it must lie in [{low:g}, {high:g}]")


def check_guidance(label_dropout, guidance):
    """Guidance combines two velocities, and both must have been learned."""
    learned = 0 < label_dropout < 1
    check(learned or guidance == 1, f"guidance must be 1: label_dropout is {label_dropout:g}")


def check_tensor(name, x, shape, integers=False):
    """ValueError unless x is a tensor of floats, or int64, of this shape; None: any size but 0."""
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    kind = "int64" if integers else "float"
    found = f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
    good = torch.is_tensor(x) and x.dim() == len(shape) and x.numel() > 0
    good = good and (x.dtype == torch.int64 if integers else x.is_floating_point())
    good = good and all(size in (None, actual) for size, actual in zip(shape, x.shape))
    check(good, f"{name} must be a tensor of {kind} ({wanted}), not {found}")


# Each preset names what differs from the one that it replaces.

PRESETS = {"shapes": Config()}  # 32x32 drawn pictures, 8x8 tokens: a CPU, minutes

PRESETS["cifar10-small"] = replace(  # 32x32 photographs, 8x8 tokens: a CPU
    PRESETS["shapes"],
    data="cifar10",
    teacher_centres=2048,
    channels=32,
    channel_mult=(1, 2),
    z_channels=64,
    codes_sem=512,
    codes_vis=1536,
    lambda_hist=0.3,
    adv_start=15000,
    classes=10,
    gen_width=128,
    gen_layers=6,
    time_shift=0.0,
    guidance_first=1.0,
    gen_batch=32,
    gen_lr=2e-3,
    gen_warmup=100,
    tokenizer_steps=500,
    batch_size=32,
    lr=2e-3,
    warmup=100,
    eval_images=2000,
)

PRESETS["imagenette-small"] = replace(  # 64x64 photographs, 16x16 tokens: a CPU
    PRESETS["cifar10-small"],
    data="imagenette",
    teacher_centres=1024,
    image_size=64,
    lambda_hist=0.1,
    cell=8,
    gen_batch=16,
    tokenizer_steps=1600,
    batch_size=16,
    eval_images=3925,
)

PRESETS["cifar10"] = replace(  # 32x32 photographs, 8x8 tokens: one GPU
    PRESETS["cifar10-small"],
    patch=1,
    channel_mult=(1, 2, 4),
    res_blocks=2,
    z_channels=128,
    width=128,
    lambda_adv=0.1,
    lambda_hist=0.01,
    gen_width=384,
    gen_layers=8,
    gen_heads=6,
    gen_dropout=0.1,
    guidance=5.0,
    sampling_steps=40,
    generator_steps=40000,
    gen_batch=256,
    gen_lr=5e-4,
    gen_warmup=1000,
    gen_cooldown=0.25,
    ema=0.9995,
    tokenizer_steps=20000,
    batch_size=128,
    lr=1e-3,
    eval_images=10000,
    save_every=500,
)

PRESETS["imagenette"] = replace(  # 128x128, 16x16 tokens, every loss of (3): one GPU
    PRESETS["cifar10"],
    data="imagenette",
    teacher="dinov2",
    image_size=128,
    channels=64,
    channel_mult=(1, 1, 2, 4),
    z_channels=256,
    width=256,
    heads=8,
    codes_sem=1024,
    codes_vis=3072,
    lambda_quantize=1.0,
    lambda_perceptual=1.0,
    lambda_adv=0.5,
    adv_start=10000,
    adv_adaptive=0,
    disc_lr=3e-4,
    cell=8,
    gen_width=512,
    gen_layers=12,
    gen_heads=8,
    stochastic=1,
    guidance=2.7,
    generator_steps=60000,
    gen_batch=128,
    gen_lr=3e-4,
    tokenizer_steps=40000,
    batch_size=64,
    lr=3e-4,
    warmup=500,
    crop=0.8,
    eval_images=3925,
)

# From section 4.1 and, where that is silent, from the code that the paper builds on: FQGAN for the
# tokenizer, xAR-B for the generator. (H: gen_width 1280, gen_layers 40, gen_heads 16, guidance 2.2,
# sampling_steps 50.) Ours are teacher_centres, lambda_coverage and revive_every.
PRESETS["imagenet256"] = replace(  # GloTok of tables 1 and 2
    PRESETS["imagenette"],
    data="imagenet",  # a folder of that name, or --data
    teacher_centres=4096,  # 4 a class, so 4,000
    teacher_by_class=1,  # section 3.3: as VQGAN-LC
    image_size=256,
    channels=128,
    channel_mult=(1, 1, 2, 2, 4),
    adapter_layers=6,
    width=512,
    codes_sem=4096,
    codes_vis=12288,
    adv_start=20000,
    disc_lr=2e-4,
    classes=1000,
    gen_width=768,
    gen_layers=16,
    gen_heads=12,
    generator_steps=500456,  # 800 epochs of 1,281,167 images, 2,048 a step
    gen_batch=2048,
    gen_lr=4e-4,  # 5e-5 x 2048 / 256
    gen_lr_end=1e-5,
    gen_warmup=62557,  # 100 epochs
    ema=0.9999,
    tokenizer_steps=800730,  # 150 epochs of 1,281,167 images, 240 a step
    batch_size=240,
    lr=2e-4,
    warmup=0,
    cooldown=0.0,
    eval_images=50000,
    save_every=2000,
)

PRESETS["imagenet256-2x"] = replace(  # GloTok(2x)
    PRESETS["imagenet256"],
    teacher_centres=16384,  # 16 a class, so 16,000
    codes_sem=16384,
    codes_vis=16384,
)
