"""The paper, checked: its equations against independent computations; then the commands.

    python -m pytest -q

Part I     the paper, equation by equation
Part II    networks, data, measures
Part III   commands, bad input, faults
"""

import argparse
import ast
import functools
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

# Models this small are as fast on one thread, and much faster beside a busy process.
os.environ["OMP_NUM_THREADS"] = "1"
# Stand-ins and comparisons bit for bit are of the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Whatever was downloaded earlier is not found.
os.environ["TORCH_HOME"] = "/dev/null/nothing"

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import glotok
import sample
import train
from fid import BadInput
from glotok import (
    ALPHA,
    LPIPS,
    PRESETS,
    XAR,
    Config,
    DINOv2,
    GloTok,
    Quantizer,
    histogram_relation_loss,
    kmeans,
    relation_histogram,
    relation_histogram_direct,
    sphere_histogram,
)
from sample import tsne, uniformity

REPOSITORY = Path(train.__file__).parent
CPU = torch.device("cpu")

# A run of seconds. Images of 16x16 pixels, 8x8 tokens.
TINY = Config(
    data="shapes",
    teacher="sphere",
    image_size=16,
    patch=1,
    channels=8,
    channel_mult=(1, 2),
    z_channels=16,
    width=16,
    heads=2,
    codes_sem=16,
    codes_vis=24,
    tokenizer_steps=20,
    batch_size=8,
    revive_every=5,
    eval_images=20,
    save_every=5,
    cell=4,
    gen_width=16,
    gen_layers=1,
    gen_heads=2,
    generator_steps=20,
    gen_batch=8,
    sampling_steps=3,
)


def flags_of(config):
    """The words on train.py's command line that turn preset shapes into config."""
    words = []
    for f in fields(Config):
        value = getattr(config, f.name)
        if value != f.default:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--{f.name}", *[str(v) for v in values]]
    return words


FLAGS = flags_of(TINY)

Result = namedtuple("Result", "status out err")  # exit status; stripped texts


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def run_command(monkeypatch, capsys):
    """run_command(module, *words): `python MODULE.py WORDS` in this process -> Result.

    The teacher's floor is sought in 40 steps, not 300: it need not be the least.
    """
    monkeypatch.setattr(glotok.histogram_floor, "__defaults__", (40,))

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *[str(w) for w in words]])
        capsys.readouterr()
        try:
            fid.run_script(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Result(status, captured.out.strip(), captured.err.strip())

    return run


def run_process(*words, cwd=None):
    """`python WORDS`, in a process of its own -> subprocess.CompletedProcess with texts."""
    words = [sys.executable, *[str(w) for w in words]]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd)


def tensors_in(path):
    """{dotted name: tensor} of a checkpoint."""
    return dict(named_tensors(torch.load(path, weights_only=True)))


def named_tensors(value, name=""):
    """Yield (dotted name, tensor) for all tensors in nested dictionaries."""
    if torch.is_tensor(value):
        yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from named_tensors(inner, f"{name}.{key}")


def assert_same_weights(folder, other, stage):
    """The checkpoints of a stage in two run folders hold the same tensors, bit for bit."""
    a = tensors_in(folder / f"{stage}.pt")
    b = tensors_in(other / f"{stage}.pt")
    assert a.keys() == b.keys()
    assert len(a) > 10
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def read_rows(folder):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def assert_refused(result, script):
    """Status 2; one line of the script's own, the last on standard error; no traceback."""
    assert result.status == 2, result.err
    assert result.out == ""
    last = result.err.splitlines()[-1]
    assert last.startswith(f"{script}: "), result.err
    assert "Traceback" not in result.err


def read_files(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill_zero_weights(generator):
    """Layers that start at zero would hide everything: give them weights. -> generator.eval()"""
    for p in generator.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, 0, 0.1)
    return generator.eval()


def random_images(n=2, size=16):
    """Float images (n, 3, size, size) in [-1, 1]."""
    return torch.rand(n, 3, size, size) * 2 - 1


def save_pictures(folder, n, size=16, seed=0, name="{:03d}.png"):
    """n pictures of random pixels, in a new or old folder -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(seed + i).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name.format(i))
    return folder


class RunsCode:
    """What a hostile pickle does when it is read: here it makes a folder at `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ================================================================================================
# Part I. The paper, equation by equation
# ================================================================================================

# ---- Configuration (section 4.1)


def test_presets_have_the_papers_settings():
    c = PRESETS["imagenet256"]
    assert (c.image_size, c.grid_size, c.code_dim, c.bins) == (256, 16, 8, 40)
    assert (c.codes_sem, c.codes_vis) == (4096, 12288)
    assert (c.lambda_hist, c.lambda_res) == (0.01, 0.5)
    assert (c.lr, c.warmup, c.cooldown) == (2e-4, 0, 0)  # a constant learning rate
    assert c.batch_size == 240
    assert c.tokenizer_steps == math.ceil(150 * 1281167 / 240)  # 150 epochs of ImageNet
    double = PRESETS["imagenet256-2x"]
    assert double == replace(c, codes_sem=16384, codes_vis=16384, teacher_centres=16384)

    # where the paper is silent: FQGAN's, then xAR-B's as released
    assert (c.lambda_quantize, c.lambda_perceptual, c.lambda_adv) == (1, 1, 0.5)
    assert (c.beta, c.adv_adaptive, c.adv_start) == (0.25, 0, 20000)
    assert (c.crop, c.teacher_by_class, c.adapter_layers) == (0.8, 1, 6)
    assert (c.gen_width, c.gen_layers, c.gen_heads, c.cell) == (768, 16, 12, 8)
    assert (c.gen_dropout, c.label_dropout, c.sampling_steps) == (0.1, 0.1, 40)
    assert (c.gen_lr, c.gen_lr_end, c.gen_warmup, c.gen_cooldown) == (4e-4, 1e-5, 62557, 0.25)
    assert (c.gen_batch, c.ema, c.stochastic, c.time_shift) == (2048, 0.9999, 1, 0.0)
    assert (c.guidance, c.guidance_first) == (2.7, 1.0)

    for name, side in {"imagenette-small": 16, "imagenette": 16, "cifar10": 8}.items():
        assert PRESETS[name].grid_size == side


def count_modules(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


def test_paper_preset_builds_the_papers_networks():
    c = PRESETS["imagenet256"]
    with torch.device("meta"):
        model = GloTok(c)
    assert c.grid_size == 16
    assert model.encoder[-1].out_channels == 256
    assert model.codebook_sem.shape == (4096, 8)
    assert model.codebook_vis.shape == (12288, 8)
    blocks = [m for m in model.encoder if isinstance(m, glotok.ResBlock)]
    channels = [block.body[2].in_channels for block in blocks]
    assert channels == [128, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512]
    assert count_modules(model.decoder, glotok.ResBlock) == 5 * 3 + 2  # two in the middle
    assert count_modules(model.encoder, glotok.SpatialAttention) == 2 + 1
    assert count_modules(model.decoder, glotok.SpatialAttention) == 3 + 1
    attention = [m for m in model.modules() if isinstance(m, glotok.SpatialAttention)]
    assert {m.norm.num_channels for m in attention} == {512}  # at the lowest resolution
    assert len(model.adapter_sem.blocks) == 6
    assert len(model.residual_sem.blocks) == 1
    first = model.decoder[0]
    assert first.weight.shape == (256, 16, 1, 1)  # from the concatenated codes to z_channels


# ---- Quantizer (1)


def through_normalization(gradient, unit, length):
    """The gradient at unit = raw / length, taken back to raw; unit (..., d), length (..., 1)."""
    radial = (gradient * unit).sum(-1, keepdims=True) * unit
    return (gradient - radial) / length


@pytest.mark.parametrize("beta", [0.25, 0.0, 1.0])
def test_eq01_sends_each_term_to_its_own_side(beta):
    quantizer = Quantizer(5, 4, beta)
    torch.nn.init.normal_(quantizer.weight, 0, 3)
    features = torch.randn(2, 3, 4, requires_grad=True)
    _, _, index, loss = quantizer(features)
    loss.backward()

    # By hand, in float64 NumPy: unit vectors, mean over all elements.
    c = quantizer.weight.detach().double().numpy()
    z = features.detach().double().numpy()
    length_c = np.linalg.norm(c, axis=-1, keepdims=True)
    length_z = np.linalg.norm(z, axis=-1, keepdims=True)
    unit_c = c / length_c
    unit_z = z / length_z
    gap = unit_z - unit_c[index.numpy()]
    assert loss.item() == pytest.approx((1 + beta) * (gap**2).mean(), rel=1e-5)

    # The codebook's gradient has no beta in it, the features' nothing else.
    grad_c = np.zeros_like(c)
    np.add.at(grad_c, index.numpy(), -2 * gap / gap.size)
    grad_c = through_normalization(grad_c, unit_c, length_c)
    grad_z = through_normalization(beta * 2 * gap / gap.size, unit_z, length_z)
    np.testing.assert_allclose(quantizer.weight.grad.numpy(), grad_c, atol=1e-6)
    np.testing.assert_allclose(features.grad.numpy(), grad_z, atol=1e-6)


def test_eq01_look_up_finds_the_nearest_code_in_any_chunk():
    quantizer = Quantizer(50, 8, 0.25)
    z = F.normalize(torch.randn(3, 7, 8), dim=-1)
    distance = ((z[..., None, :] - quantizer.codebook) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    assert torch.equal(quantizer.look_up(z), nearest)
    flat = z.flatten(0, 1)
    in_chunks = glotok.nearest(flat, quantizer.codebook, max_similarities=1)
    assert torch.equal(in_chunks, nearest.flatten())


def test_straight_through_is_exact_in_value_and_the_identity_in_gradient():
    z = torch.randn(100, 8, requires_grad=True)
    codes = torch.randn(100, 8, requires_grad=True)
    gradient = torch.randn(100, 8)
    out = glotok.straight_through(z, codes)
    out.backward(gradient)
    assert torch.equal(out, codes)
    assert torch.equal(z.grad, gradient)
    assert codes.grad is None


def test_training_knows_how_many_images_ago_a_code_was_chosen():
    quantizer = Quantizer(5, 4, 0.25)
    features = quantizer.codebook[[0, 1, 1, 2]].detach().view(2, 2, 4)  # two images
    quantizer(features)
    assert quantizer.age[:3].tolist() == [0, 0, 0]
    quantizer(features[:1])  # of code 0 and 1
    assert quantizer.age[:3].tolist() == [0, 0, 1]
    assert quantizer.age[3:].min() > 10**9  # never
    quantizer.eval()
    quantizer(features)
    assert quantizer.age[:3].tolist() == [0, 0, 1]  # evaluation does not count


def test_revival_moves_only_codes_that_were_not_chosen_onto_features():
    quantizer = Quantizer(6, 4, 0.25)
    quantizer.age.copy_(torch.tensor([0, 39, 40, 41, 2**40, 7]))
    quantizer.last_features = F.normalize(torch.randn(50, 4), dim=1)
    before = quantizer.weight.clone()
    glotok.revive(quantizer, images=40)
    moved = (quantizer.weight != before).any(1)
    assert moved.tolist() == [False, False, True, True, True, False]
    for code in quantizer.weight[moved]:
        assert (quantizer.last_features == code).all(1).any()


def test_coverage_draws_the_nearest_feature_to_each_unused_code():
    quantizer = Quantizer(40, 4, 0.25)
    features = torch.randn(2, 15, 4, requires_grad=True)
    z, _, index, _ = quantizer(features)
    z.retain_grad()
    loss = glotok.coverage_loss(z, index, quantizer.codebook)
    loss.backward()

    codes = quantizer.codebook.detach().double().numpy()
    flat = z.detach().flatten(0, 1).double().numpy()
    chosen = set(index.flatten().tolist())
    assert 10 <= len(chosen) <= 30
    expected = 0.0
    gradient = np.zeros_like(flat)
    for k, code in enumerate(codes):
        if k in chosen:
            continue
        distance = ((flat - code) ** 2).sum(1)
        near = distance.argmin()
        expected += distance[near] / 4 / 40  # mean over dimensions and codes
        gradient[near] += 2 * (flat[near] - code) / 4 / 40
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(z.grad.flatten(0, 1), gradient, atol=1e-7)
    assert quantizer.weight.grad is None  # sg[c]


# ---- Histogram relation loss (4)-(7)


def histogram_by_loops(codes, bins, alpha, use=None):
    """Eqs. (4)-(6) in plain Python and float64; each pair counts use[i] * use[j] times."""
    c = np.asarray(codes, np.float64)
    use = np.ones(len(c)) if use is None else use
    p = np.zeros(bins)
    for i in range(len(c)):
        for j in range(i, len(c)):
            cosine = c[i] @ c[j] / np.sqrt((c[i] @ c[i]) * (c[j] @ c[j]))
            for k in range(bins):
                centre = -1 + 2 * k / (bins - 1)
                p[k] += use[i] * use[j] * math.exp(-alpha * (cosine - centre) ** 2)
    return p / p.sum()


def alpha_of(bins):
    """1 / w^2 for bins a distance w apart on [-1, 1]."""
    w = 2 / (bins - 1)
    return 1 / w**2


@pytest.mark.parametrize("bins, alpha", [(40, None), (12, None), (12, 30.0)])
def test_eq04_eq05_eq06_histograms_equal_plain_loops(bins, alpha):
    codes = torch.randn(17, 5) + 0.3
    expected = histogram_by_loops(codes, bins, alpha or alpha_of(bins))
    direct = relation_histogram_direct(codes.double(), bins, alpha)
    fast = relation_histogram(codes, bins, alpha)
    np.testing.assert_allclose(direct, expected, atol=1e-12)
    np.testing.assert_allclose(fast, expected, atol=1e-4 * expected.max())


def test_eq06_default_alpha_gives_every_similarity_the_same_weight():
    """The Poisson-summation argument for alpha = 1 / w^2."""
    centres = np.linspace(-1, 1, 40)
    x = np.linspace(-0.5, 0.5, 1001)
    total = np.exp(-ALPHA * (x[:, None] - centres) ** 2).sum(1)
    assert total.mean() == pytest.approx(math.sqrt(math.pi), rel=1e-4)
    ripple = (total.max() - total.min()) / 2 / total.mean()
    assert ripple == pytest.approx(2 * math.exp(-(math.pi**2)), rel=0.02)

    # At +1 the row of bins ends: what lies beyond it is lost.
    share = np.exp(-ALPHA * (1 - centres) ** 2).sum() / total.mean()
    assert share == pytest.approx(0.782, abs=5e-4)


def kl_by_hand(p, q):
    """KL(p || q) in nats; empty bins count as 1e-10."""
    p = p.clamp_min(1e-10)
    q = q.clamp_min(1e-10)
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("bins", [20, 40])
def test_eq07_is_kl_of_teacher_from_student(bins):
    codes = torch.randn(15, 4, requires_grad=True)
    teacher = torch.tensor(histogram_by_loops(torch.randn(9, 4) + 1, bins, alpha_of(bins)))
    student = torch.tensor(histogram_by_loops(codes.detach(), bins, alpha_of(bins)))
    forward = kl_by_hand(teacher, student).item()
    backward = kl_by_hand(student, teacher).item()
    assert abs(forward - backward) > 0.1  # the example tells the directions apart

    teacher = teacher.float().requires_grad_()
    loss = histogram_relation_loss(codes, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(forward, rel=1e-3)
    assert teacher.grad is None  # sg[P_t]
    assert codes.grad.abs().sum() > 0


def test_eq07_floor_of_a_teacher_that_cannot_be_reached_is_the_least_that_is_found():
    """Near-orthogonal vectors are none of dimension 3: the Welch bound."""
    teacher = relation_histogram(torch.randn(64, 64))
    floor = glotok.histogram_floor(teacher, 64, 3)
    assert floor > 0.2
    codes = torch.randn(64, 3, requires_grad=True)  # another start, another optimizer
    optimizer = torch.optim.SGD([codes], 3.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss = histogram_relation_loss(codes, teacher)
        loss.backward()
        optimizer.step()
    assert floor < loss.item() + 0.01


@pytest.mark.parametrize("band", [2**20, 60])
def test_eq06_used_histogram_weighs_pairs_by_use(band, monkeypatch):
    monkeypatch.setitem(glotok.BAND, "cpu", band)  # one band of rows, or many
    codes = torch.randn(17, 5) + 0.3
    counts = torch.arange(17)  # code 0 is of no use
    expected = histogram_by_loops(codes, 40, ALPHA, counts.double().numpy())
    found = glotok.used_histogram(codes, counts)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())


def test_eq07_moves_the_semantic_codebook_alone():
    model = GloTok(TINY)
    histogram_relation_loss(model.codebook_sem, sphere_histogram(8)).backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert moved == ["quantizer_sem.weight"]


# The fast histogram against the direct one.


@pytest.mark.parametrize("band", [2**20, 1000])  # one band of rows, and many of uneven height
@pytest.mark.parametrize("n, d, shift", [(2, 8, 0), (10, 3, 0.5), (300, 8, 0), (500, 8, 1.0)])
def test_eq06_fast_histogram_equals_the_direct_one(n, d, shift, band, monkeypatch):
    monkeypatch.setitem(glotok.BAND, "cpu", band)
    codes = torch.randn(n, d) + shift
    fast = codes.clone().requires_grad_()
    direct = codes.double().requires_grad_()
    teacher = relation_histogram_direct(torch.rand(50, 16).double())

    p = relation_histogram_direct(direct)
    assert (relation_histogram(fast) - p).abs().max() < 1e-4 * p.max()

    histogram_relation_loss(fast, teacher.float()).backward()
    kl_by_hand(teacher, p).backward()
    assert (fast.grad - direct.grad).norm() < 1e-3 * direct.grad.norm()


def test_eq06_fast_histogram_passes_nan_on():
    codes = torch.randn(5, 3)
    codes[2, 1] = math.nan
    assert relation_histogram(codes).isnan().all()


def test_eq06_fast_histogram_ignores_autocast():
    codes = torch.randn(200, 8, requires_grad=True)
    teacher = sphere_histogram(8)
    (plain,) = torch.autograd.grad(histogram_relation_loss(codes, teacher), codes)
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = torch.autograd.grad(histogram_relation_loss(codes, teacher), codes)
    assert torch.equal(plain, mixed)


def seconds_of(histogram, codes):
    start = time.perf_counter()
    histogram(codes)[0].backward()
    return time.perf_counter() - start


def test_eq06_fast_histogram_is_much_faster():
    codes = torch.randn(1536, 8, requires_grad=True)
    direct = seconds_of(relation_histogram_direct, codes)
    fast = min(seconds_of(relation_histogram, codes) for _ in range(3))
    assert direct > 5 * fast  # 100 and more at 4,096 on a quiet machine


# Eq. (6) as printed would take 21 GB. A process of its own, for its peak memory.
PEAK_MEMORY = """
import resource
import torch
import glotok

for n in (64, 16384):
    codes = torch.randn(n, 8, requires_grad=True)
    glotok.histogram_relation_loss(codes, glotok.sphere_histogram(8)).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_eq06_fast_histogram_of_16384_codes_is_small():
    done = run_process("-c", PEAK_MEMORY, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after - before < 200  # MB


# What a codebook can imitate.


@pytest.mark.parametrize("dim, bins", [(2, 40), (3, 20), (8, 40)])
def test_eq06_sphere_histogram_is_that_of_a_million_random_vectors(dim, bins):
    x = F.normalize(torch.randn(1_000_000, dim), dim=1)
    y = F.normalize(torch.randn(1_000_000, dim), dim=1)
    cosines = (x * y).sum(1)
    centres = torch.linspace(-1, 1, bins)
    p = torch.stack(
        [torch.exp(-alpha_of(bins) * (cosines - centre) ** 2).sum() for centre in centres]
    )
    assert (sphere_histogram(dim, bins) - p / p.sum()).abs().max() < 1e-3


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_cosine_moments_are_those_of_all_pairs_and_respect_their_bounds(shift):
    """Welch's: mean square >= 1 / d. And no mean exceeds the root mean square."""
    vectors = torch.randn(60, 8) + shift
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    mean, mean_square = glotok.cosine_moments(vectors)
    assert mean == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert mean_square == pytest.approx((cosines**2).mean().item(), abs=1e-5)
    assert mean_square >= 1 / 8
    assert mean**2 <= mean_square
    assert glotok.cosine_moments(torch.eye(8))[1] == pytest.approx(1 / 8)  # reaches the bound


# ---- Residual module and tokenizer (8)-(12)


def random_residuals(model):
    """model, with residual modules that say something: they start at zero."""
    for module in (model.residual_sem, model.residual_vis):
        torch.nn.init.normal_(module.proj_out.weight, 0, 0.3)
    return model


def modules_with_gradient(model):
    """Names of the model's direct children in which some parameter has a gradient."""
    return {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


@pytest.mark.parametrize("lambda_res", [0.5, 0.0])
def test_eq08_eq09_eq11_eq12_decoder_gets_codes_plus_residuals(lambda_res):
    model = GloTok(replace(TINY, lambda_res=lambda_res)).eval()
    sem = torch.randint(16, (2, 8, 8))
    vis = torch.randint(24, (2, 8, 8))
    z_sem = model.codebook_sem[sem.flatten(1)]  # (2, 64, 8)
    z_vis = model.codebook_vis[vis.flatten(1)]
    if lambda_res:
        random_residuals(model)
        z_sem = z_sem + model.residual_sem(z_sem)  # (8), (12)
        z_vis = z_vis + model.residual_vis(z_vis)  # (9), (11)
    else:
        assert not hasattr(model, "residual_sem")
        assert not hasattr(model, "residual_vis")
    z = torch.zeros(2, 16, 8, 8)
    for row in range(8):
        for column in range(8):
            z[:, :8, row, column] = z_sem[:, 8 * row + column]
            z[:, 8:, row, column] = z_vis[:, 8 * row + column]
    torch.testing.assert_close(model.decode(sem, vis), model.decoder(z))


def test_eq10_value_and_stop_gradients():
    model = random_residuals(GloTok(TINY)).eval()
    x = random_images()
    _, losses = model(x)

    def squared_error(features, quantizer, residual_module):
        z = features / features.norm(dim=-1, keepdim=True)
        codes = quantizer.codebook[quantizer.look_up(z)]
        return ((z - codes - residual_module(codes)) ** 2).mean()

    f_sem, f_vis = model.features(x)
    expected = squared_error(f_sem, model.quantizer_sem, model.residual_sem)
    expected = expected + squared_error(f_vis, model.quantizer_vis, model.residual_vis)
    assert losses["residual"].item() == pytest.approx(expected.item(), rel=1e-4)

    losses["residual"].backward()
    # sg[Z]: neither the encoder nor the adapters.
    moved = {"quantizer_sem", "quantizer_vis", "residual_sem", "residual_vis"}
    assert modules_with_gradient(model) == moved
    # Zhat is stopped nowhere, neither as R's input nor beside Zres.
    for quantizer in (model.quantizer_sem, model.quantizer_vis):
        (whole,) = torch.autograd.grad(expected, quantizer.weight, retain_graph=True)
        torch.testing.assert_close(quantizer.weight.grad, whole, atol=1e-7, rtol=1e-3)


def test_coverage_moves_the_encoder_towards_unused_semantic_codes():
    model = GloTok(replace(TINY, codes_sem=256))  # more codes than features: some are unused
    x = random_images(1)
    _, losses = model(x)
    losses["coverage"].backward()
    assert modules_with_gradient(model) == {"encoder", "adapter_sem"}
    f_sem, _ = model.features(x)
    index, _ = model.encode(x)
    expected = glotok.coverage_loss(F.normalize(f_sem, dim=2), index, model.codebook_sem)
    assert losses["coverage"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_decoder_gradient_reaches_the_encoder_and_the_residual_modules():
    """And through these the codebooks."""
    model = random_residuals(GloTok(TINY))
    recon, _ = model(random_images())
    recon.square().sum().backward()
    assert modules_with_gradient(model) == {name for name, _ in model.named_children()}


@pytest.mark.parametrize("lambda_res", [0.5, 0.0])
def test_encode_then_decode_is_what_forward_does(lambda_res):
    model = GloTok(replace(TINY, lambda_res=lambda_res)).eval()
    if lambda_res:
        random_residuals(model)
    x = random_images()
    sem, vis = model.encode(x)
    assert sem.shape == vis.shape == (2, 8, 8)
    assert sem.dtype == vis.dtype == torch.int64
    recon, _ = model(x)
    assert torch.equal(model.decode(sem, vis), recon)

    latents = model.to_latents(sem, vis)
    assert latents.shape == (2, 16, 8, 8)
    assert torch.equal(latents[1, :8, 2, 3], model.codebook_sem[sem[1, 2, 3]])
    assert torch.equal(latents[1, 8:, 2, 3], model.codebook_vis[vis[1, 2, 3]])
    torch.testing.assert_close(model.from_latents(latents), recon)


def test_group_norm_stays_in_bfloat16_under_autocast():
    norm = glotok.GroupNorm(64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 64, 5, 5) + 1
    groups = x.view(2, 32, -1)
    mean = groups.mean(2, keepdim=True)
    variance = (groups - mean).square().mean(2, keepdim=True)
    normal = ((groups - mean) / (variance + 1e-6).sqrt()).view(x.shape)
    expected = normal * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x.bfloat16())
    torch.testing.assert_close(found, expected.bfloat16(), atol=0.05, rtol=0.02)


def test_networks_in_bfloat16_say_nearly_the_same():
    """As on a GPU. Losses, codes and similarities stay in float32."""
    model = random_residuals(GloTok(TINY))
    xar = fill_zero_weights(XAR(TINY))
    x = random_images(8)
    labels = torch.arange(8) % 6
    latents = torch.randn(8, 16, 8, 8)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            recon, losses = model(x)
            flow = xar.loss(latents, labels)
        assert {recon.dtype, flow.dtype, *[loss.dtype for loss in losses.values()]} == {
            torch.float32
        }
        found.append([recon.square().mean(), losses["quantize"], losses["residual"], flow])
    for exact, rounded in zip(*found):
        assert exact != rounded  # bfloat16 was at work
        assert rounded.item() == pytest.approx(exact.item(), rel=0.03)


def test_down_sampling_pads_right_and_bottom():
    down = glotok.downsample(1)
    with torch.no_grad():
        down[1].weight.zero_()
        down[1].bias.zero_()
        down[1].weight[0, 0, 0, 0] = 1  # picks the top left of each window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


# ---- The whole loss (2), (3), (13)

# Distinct weights; the weight of "contrastive" is a constant.
LOSS_CONFIG = replace(
    TINY,
    lambda_quantize=0.3,
    lambda_perceptual=0.7,
    lambda_adv=0.8,
    adv_adaptive=0,
    lambda_res=0.5,
    lambda_hist=0.01,
    lambda_coverage=0.4,
)
TERMS = {"recon": 2.0, "quantize": 3.0, "perceptual": 5.0, "adv": 7.0}
TERMS |= {"residual": 11.0, "hist": 13.0, "coverage": 17.0, "contrastive": 19.0}
WEIGHTS = {"recon": 1.0, "quantize": 0.3, "perceptual": 0.7, "adv": 0.8 * 0.25}  # of its ramp
WEIGHTS |= {"residual": 0.5, "hist": 0.01, "coverage": 0.4, "contrastive": 0.5}
OPTIONAL = ["perceptual", "adv", "hist", "coverage", "contrastive"]


@pytest.mark.parametrize("without", [[], *[[name] for name in OPTIONAL], OPTIONAL])
def test_eq02_eq03_eq13_is_the_weighted_sum_of_what_is_on(without):
    terms = {}
    for name, value in TERMS.items():
        if name not in ("recon", *without):
            terms[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    recon = x + math.sqrt(TERMS["recon"]) * torch.randn_like(x).sign()
    loss = glotok.total_loss(LOSS_CONFIG, None, x, recon, terms, ramp=0.25)
    expected = sum(WEIGHTS[name] * TERMS[name] for name in terms)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert terms.pop("recon").item() == pytest.approx(TERMS["recon"], rel=1e-12)  # (2)
    loss.backward()
    for name, term in terms.items():
        assert term.grad.item() == pytest.approx(WEIGHTS[name], rel=1e-12), name


# The adversarial part.


def test_discriminator_judges_patches():
    """3 halvings from 128 pixels on, 2 below; at its least size it has one patch."""
    for size, halvings, patches in ((256, 3, 30), (128, 3, 14), (64, 2, 14), (12, 2, 1)):
        c = replace(PRESETS["shapes"], image_size=size, cell=1)
        disc = glotok.discriminator(c).eval()
        assert disc(torch.zeros(1, 3, size, size)).shape == (1, 1, patches, patches)
        assert count_modules(disc, torch.nn.BatchNorm2d) == halvings
    with pytest.raises(ValueError):
        replace(TINY, image_size=10, cell=1, lambda_adv=0.1)


def test_eq03_adversarial_loss_moves_the_reconstruction_alone():
    disc = glotok.discriminator(TINY)
    recon = random_images().requires_grad_()
    loss = glotok.adversarial_loss(disc, recon)
    assert all(p.requires_grad for p in disc.parameters())
    loss.backward()
    assert all(p.grad is None for p in disc.parameters())

    plain = -disc(recon).mean()
    (grad,) = torch.autograd.grad(plain, recon)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(recon.grad, grad)


def test_discriminator_loss_moves_the_discriminator_alone():
    disc = glotok.discriminator(TINY)
    recon = random_images().requires_grad_()
    x = random_images()
    loss = glotok.discriminator_loss(disc, recon, x)
    loss.backward()
    assert recon.grad is None
    assert all(p.grad.isfinite().all() for p in disc.parameters())
    assert disc[0].weight.grad.abs().sum() > 0

    real = disc(x).detach().numpy()
    fake = disc(recon).detach().numpy()
    expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradient_ratio():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = glotok.gradient_ratio((3 * w).sum(), w[1] / 2, w)
    assert ratio.item() == pytest.approx(3 * math.sqrt(2) / 0.5, rel=1e-3)
    assert glotok.gradient_ratio((3 * w).sum(), (0 * w).sum(), w).item() == 1e4  # its largest


def test_eq03_adaptive_weight_equalizes_gradients_at_the_decoders_last_convolution():
    c = replace(TINY, lambda_perceptual=1.5, lambda_adv=0.8, adv_adaptive=1)
    model = GloTok(c)
    x = random_images()
    recon, losses = model(x)
    losses["perceptual"] = recon.abs().mean()  # a stand-in
    # A louder discriminator, or the 1e-4 that guards the division would show.
    losses["adv"] = 1000 * glotok.adversarial_loss(glotok.discriminator(TINY), recon)
    last = [m for m in model.decoder if isinstance(m, torch.nn.Conv2d)][-1].weight
    pixels = F.mse_loss(recon, x) + 1.5 * losses["perceptual"]
    (of_pixels,) = torch.autograd.grad(pixels, last, retain_graph=True)
    (of_adv,) = torch.autograd.grad(losses["adv"], last, retain_graph=True)
    expected = of_pixels + 0.8 * 0.25 * of_pixels.norm() / of_adv.norm() * of_adv

    loss = glotok.total_loss(c, model, x, recon, losses, ramp=0.25)
    (found,) = torch.autograd.grad(loss, last)
    assert (found - expected).norm() < 2e-3 * expected.norm()


# ---- The generator, xAR (section 3.4)

# 8x8 tokens in 4 cells of 4x4.
SMALL = replace(TINY, image_size=16, cell=4, gen_width=32, gen_layers=2, gen_heads=2, classes=3)


def test_cells_run_row_by_row_and_back():
    xar = XAR(SMALL)
    cells = xar.to_cells(torch.arange(64.0).view(1, 1, 8, 8))
    top_right = [8 * row + column for row in range(4) for column in range(4, 8)]
    assert cells[0, 1, :, 0].tolist() == top_right
    assert cells[0, 2, 5, 0] == 8 * 5 + 1  # the third cell is bottom left
    z = torch.randn(2, 16, 8, 8)
    assert torch.equal(xar.from_cells(xar.to_cells(z)), z)


def test_rotary_tables_by_hand():
    """A quarter of the width turns with the row, a quarter with the column; token by token."""
    xar = XAR(SMALL)  # heads of width 16
    frequencies = np.array([1, 0.1, 0.01, 0.001])
    tokens = [(r, c, i, j) for r in (0, 4) for c in (0, 4) for i in range(4) for j in range(4)]
    for token, (r, c, i, j) in enumerate(tokens):  # cell by cell
        angles = np.concatenate([(r + i) * frequencies, (c + j) * frequencies])
        np.testing.assert_allclose(xar.cos[token, 0, 0, :8], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(xar.sin[token, 0, 0, 8:], np.sin(angles), atol=1e-6)


def test_embedding_of_times_by_hand():
    embedding = glotok.timestep_embedding(torch.tensor([0.0, 0.003]), 8)
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    by_hand = [math.cos(3 * f) for f in (1, 0.1, 0.01, 0.001)]
    by_hand += [math.sin(3 * f) for f in (1, 0.1, 0.01, 0.001)]
    np.testing.assert_allclose(embedding[1], by_hand, atol=1e-5)


@pytest.mark.parametrize("cell", range(4))
@pytest.mark.parametrize("change", ["latents", "time"])
@torch.no_grad()
def test_a_cell_sees_itself_and_earlier_cells_only(cell, change):
    xar = fill_zero_weights(XAR(SMALL))
    z = torch.randn(1, 4, 16, 16)
    t = torch.rand(1, 4)
    labels = torch.tensor([1])
    before = xar.velocity(z, t, labels)
    if change == "latents":
        z[:, cell] += 1
    else:
        t[:, cell] = 1 - t[:, cell]
    after = xar.velocity(z, t, labels)
    changed = (after - before).abs().amax((0, 2, 3)) > 1e-5
    assert changed.tolist() == [k >= cell for k in range(4)]


@torch.no_grad()
def test_flow_loss_noises_each_cell_at_its_own_time(monkeypatch):
    xar = fill_zero_weights(XAR(SMALL))
    latents = torch.randn(2, 16, 8, 8)
    t = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.7, 0.2, 0.0, 1.0]])
    noise = torch.randn(2, 4, 16, 16)
    hidden = torch.tensor([False, True])
    monkeypatch.setattr(xar, "draw", lambda batch, device: (t, noise, hidden))
    loss = xar.loss(latents, torch.tensor([1, 2]))

    z = xar.to_cells(latents)
    z_t = torch.empty_like(z)
    for b in range(2):
        for k in range(4):
            z_t[b, k] = (1 - t[b, k]) * z[b, k] + t[b, k] * noise[b, k]
    velocity = xar.velocity(z_t, t, torch.tensor([1, 3]))  # 3: "no label"
    expected = ((velocity - (noise - z)) ** 2).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_latent_std_divides_the_latents_and_multiplies_the_samples():
    xar = fill_zero_weights(XAR(SMALL))
    latents = torch.randn(2, 16, 8, 8)
    labels = torch.tensor([1, 2])

    def loss_and_samples(latents):
        torch.manual_seed(5)
        return xar.loss(latents, labels).item(), xar.sample(labels, steps=2)

    loss, sampled = loss_and_samples(latents)
    xar.latent_std.fill_(4)
    scaled_loss, scaled_samples = loss_and_samples(4 * latents)
    assert scaled_loss == pytest.approx(loss, rel=1e-6)
    assert torch.equal(scaled_samples, 4 * sampled)


def test_times_are_logit_normal_and_each_cells_own():
    xar = XAR(replace(SMALL, label_dropout=0.3, time_shift=0.8))
    t, noise, hidden = xar.draw(4000, CPU)
    assert t.shape == (4000, 4)
    assert noise.shape == (4000, 4, 16, 16)
    normal = t.logit()
    assert normal.mean().item() == pytest.approx(0.8, abs=0.05)
    assert normal.std().item() == pytest.approx(1, abs=0.05)
    assert (torch.corrcoef(normal.T) - torch.eye(4)).abs().max() < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert hidden.shape == (4000,)
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("share", [0, 1])
def test_guidance_needs_both_kinds_of_labels(share):
    with pytest.raises(ValueError, match="label_dropout"):
        replace(SMALL, label_dropout=float(share), guidance=3.0)
    xar = XAR(replace(SMALL, label_dropout=float(share), guidance=1.0))
    xar.sample(torch.tensor([0]), steps=1, guidance=1.0)
    with pytest.raises(ValueError, match="label_dropout"):
        xar.sample(torch.tensor([0]), steps=1, guidance=2.0)


def test_sampling_makes_no_pass_that_nobody_reads():
    """4 cells of 5 steps, and a clean pass of each cell but the last."""
    xar = XAR(SMALL)
    calls = []
    xar.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    xar.proj_out.register_forward_hook(lambda *_: calls.append("output"))
    xar.sample(torch.tensor([0]), steps=5, guidance=2.0)
    assert calls.count("block") == 4 * 5 + 3
    assert calls.count("output") == 4 * 5


@pytest.mark.parametrize("guidance_first, step", [(1.0, 1.0), (2.5, 0.5), (9.0, 0.0)])
@pytest.mark.parametrize("cell", [0, 1, 2, 3])
@torch.no_grad()
def test_guidance_grows_over_the_cells_to_its_full_value(cell, guidance_first, step):
    """v(no label) + g (v(label) - v(no label)), at guidance 4: g = 4 at the last of 4 cells."""
    strength = 4 - step * (3 - cell)
    xar = fill_zero_weights(XAR(replace(SMALL, guidance_first=guidance_first)))
    labels = torch.tensor([1, 0])
    torch.manual_seed(0)
    cells = xar.to_cells(xar.sample(labels, steps=3, guidance=4.0))

    # By hand, without cache: all cells in one pass under the mask, the finished ones at t = 0.
    torch.manual_seed(0)
    noise = torch.stack([torch.randn(2, 1, 16, 16) for _ in range(4)])
    z = noise[cell]
    for t, t_next in ((1.0, 0.52), (0.52, 0.04), (0.04, 0.0)):
        so_far = torch.cat([cells[:, :cell], z, torch.zeros(2, 3 - cell, 16, 16)], dim=1)
        times = torch.zeros(2, 4)
        times[:, cell] = t
        with_label = xar.velocity(so_far, times, labels)[:, cell : cell + 1]
        without = xar.velocity(so_far, times, torch.tensor([3, 3]))[:, cell : cell + 1]
        z = z + (without + strength * (with_label - without)) * (t_next - t)
    torch.testing.assert_close(cells[:, cell : cell + 1], z, atol=1e-4, rtol=1e-4)


class GaussianVelocity(XAR):
    """The best velocity for data N(0.7, 0.5^2): E[eps - z_0 | z_t] in closed form."""

    MEAN = 0.7
    STD = 0.5

    def velocity(self, z, t, labels, first_cell=0, caches=None):
        t = t[:, :, None, None]
        variance = (1 - t) ** 2 * self.STD**2 + t**2  # of z_t
        gap = z - (1 - t) * self.MEAN
        noise = t / variance * gap  # E[eps | z_t]
        data = self.MEAN + (1 - t) * self.STD**2 / variance * gap  # E[z_0 | z_t]
        return noise - data


@pytest.mark.parametrize("stochastic", [1, 0])
def test_both_samplers_carry_noise_to_a_known_gaussian(stochastic):
    xar = GaussianVelocity(replace(SMALL, stochastic=stochastic))
    latents = xar.sample(torch.zeros(64, dtype=torch.int64), steps=200)
    assert latents.mean().item() == pytest.approx(0.7, abs=0.02)
    assert latents.std().item() == pytest.approx(0.5, abs=0.02)


def test_two_steps_of_euler_maruyama_by_hand():
    xar = GaussianVelocity(replace(SMALL, stochastic=1, cell=8))  # one cell
    torch.manual_seed(4)
    found = xar.to_cells(xar.sample(torch.tensor([0]), steps=2))

    def drift(z, t):
        """v - t s, from the density of z_t, N(0.7 (1 - t), variance)."""
        variance = 0.25 * (1 - t) ** 2 + t**2
        gap = z - 0.7 * (1 - t)
        noise = t / variance * gap
        data = 0.7 + 0.25 * (1 - t) / variance * gap
        return noise - data + t * gap / variance  # s = -gap / variance

    torch.manual_seed(4)
    z = torch.randn(1, 1, 64, 16)
    z = z - 0.96 * drift(z, 1.0) + math.sqrt(2 * 1.0 * 0.96) * torch.randn(1, 1, 64, 16)
    z = z - 0.04 * drift(z, 0.04)  # without noise
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-5)


# ---- xAR as released


@pytest.mark.parametrize(
    "changes, millions, tolerance",
    [({}, 172, 0.5), ({"gen_width": 1280, "gen_layers": 40, "gen_heads": 16}, 1150, 50)],
    ids=["B", "H"],
)
def test_xar_has_the_published_number_of_parameters(changes, millions, tolerance):
    """172 M and 1.1 B."""
    with torch.device("meta"):
        xar = XAR(replace(PRESETS["imagenet256"], **changes))
    found = sum(p.numel() for p in xar.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=tolerance)


def test_xar_starts_from_xaviers_weights_and_biases_of_0():
    xar = XAR(SMALL)
    linear = [m for m in xar.modules() if isinstance(m, torch.nn.Linear)]
    adaln = [block.adaln for block in xar.blocks]
    assert len(linear) == 4 + 5 * SMALL.gen_layers
    for m in linear:
        bound = math.sqrt(6 / (m.in_features + m.out_features)) if m not in adaln else 0
        assert m.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert not m.bias.any()


@pytest.mark.parametrize("layers", [2, 3])
@torch.no_grad()
def test_positions_enter_before_each_half_of_the_blocks(layers):
    xar = XAR(replace(SMALL, gen_layers=layers))  # its blocks add nothing: their gates are 0
    z = torch.randn(1, 4, 16, 16)
    velocity = xar.velocity(z, torch.rand(1, 4), torch.tensor([1]))

    def normalised(x):
        return x / (x.square().mean(1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    x = z[0].flatten(0, 1) @ xar.proj_in.weight.T + xar.position[0]
    x = normalised(x) + xar.position[1]
    expected = normalised(x) @ xar.proj_out.weight.T
    torch.testing.assert_close(velocity[0].flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_alone():
    xar = fill_zero_weights(XAR(replace(SMALL, gen_dropout=0.5)))
    cells = torch.randn(1, 4, 16, 16)

    def answers(xar):
        velocities = [xar.velocity(cells, torch.ones(1, 4), torch.tensor([1])) for _ in range(3)]
        return {v.sum().item() for v in velocities}

    assert len(answers(xar.eval())) == 1
    assert len(answers(xar.train())) == 3


@torch.no_grad()
def test_a_conditional_block_in_numpy():
    """AdaLN's six vectors, in the order scale, shift, gate of attention, then of the MLP."""
    block = glotok.XARBlock(8, 1, dropout=0.0).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    x = torch.randn(1, 6, 8, dtype=torch.float64)  # two cells of three tokens
    condition = torch.randn(1, 2, 8, dtype=torch.float64)
    positions = 9 * torch.rand(6, 2, dtype=torch.float64)
    mask = torch.tensor([[j // 3 <= i // 3 for j in range(6)] for i in range(6)])
    found = block(x, condition, glotok.rotary_tables(positions, 8), mask)

    w = {name: p.numpy() for name, p in block.named_parameters()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normalised(x):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + np.finfo(np.float64).eps)

    c = condition[0].numpy()
    modulation = linear(c / (1 + np.exp(-c)), "adaln").repeat(3, axis=0)  # SiLU; a row a token
    scale1, shift1, gate1, scale2, shift2, gate2 = np.split(modulation, 6, axis=1)
    h = x[0].numpy()
    q, k, v = np.split(linear(normalised(h) * (1 + scale1) + shift1, "qkv"), 3, axis=1)
    row, column = positions.numpy().T
    turn = np.exp(1j * np.stack([row, row / 100, column, column / 100], axis=1))
    scores = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            a = (q[i, :4] + 1j * q[i, 4:]) * turn[i]
            b = (k[j, :4] + 1j * k[j, 4:]) * turn[j]
            scores[i, j] = (a * b.conj()).real.sum() / math.sqrt(8)
    weights = np.exp(scores) * mask.numpy()
    weights /= weights.sum(1, keepdims=True)
    h = h + gate1 * linear(weights @ v, "proj")
    gate, up = np.split(linear(normalised(h) * (1 + scale2) + shift2, "mlp.linear_in"), 2, axis=1)
    gelu = gate * scipy.stats.norm.cdf(gate)
    h = h + gate2 * linear(gelu * up, "mlp.linear_out")
    np.testing.assert_allclose(found[0], h, atol=1e-9)


# ---- What the paper argues against: local supervision of FQGAN and VA-VAE


def test_fqgans_loss_is_infonce_without_temperature():
    rng = np.random.default_rng(0)
    prediction = rng.normal(size=(5, 7))
    target = rng.normal(size=(5, 7))

    def infonce(prediction):
        total = 0
        for i in range(5):
            lengths = np.linalg.norm(prediction[i]) * np.linalg.norm(target, axis=1)
            similarity = target @ prediction[i] / lengths  # of each image's target to prediction i
            total -= np.log(np.exp(similarity[i]) / np.exp(similarity).sum())
        return total / 5

    x = torch.tensor(prediction, dtype=torch.float32, requires_grad=True)
    y = torch.tensor(target, dtype=torch.float32, requires_grad=True)
    loss = glotok.contrastive_loss(x, y)
    assert loss.item() == pytest.approx(infonce(prediction), abs=1e-6)
    loss.backward()
    assert y.grad is None
    np.testing.assert_allclose(x.grad, numerical_gradient(infonce, prediction), atol=1e-5)


def numerical_gradient(f, x, eps=1e-5):
    """Central differences of f, a function of an array, at x."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = eps
        gradient[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return gradient


def vf_by_loops(z, f):
    """VA-VAE's loss of z (B, T, D) and f (B, T, D)."""

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    images, tokens, _ = z.shape
    mdms = 0
    mcos = 0
    for b in range(images):
        for i in range(tokens):
            mcos += max(0, 1 - 0.5 - cos(z[b, i], f[b, i]))
            for j in range(tokens):
                difference = cos(z[b, i], z[b, j]) - cos(f[b, i], f[b, j])
                mdms += max(0, abs(difference) - 0.25)
    return mdms / (images * tokens**2) + mcos / (images * tokens)


def test_vavaes_loss_has_both_margins():
    """Of maps that are averaged over each token's area."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 4, 3))
    f = z + 0.8 * rng.normal(size=(2, 4, 3))  # so near that both margins forgive some
    maps = f.transpose(0, 2, 1).reshape(2, 3, 2, 2).repeat(2, axis=2).repeat(2, axis=3)
    maps += np.tile([[1, -2], [-2, 3]], (2, 2))  # nothing, on average
    x = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    y = torch.tensor(maps, dtype=torch.float32, requires_grad=True)
    loss = glotok.vf_loss(x, y)
    assert loss.item() == pytest.approx(vf_by_loops(z, f), abs=1e-6)
    loss.backward()
    assert y.grad is None
    expected = numerical_gradient(lambda z: vf_by_loops(z, f), z)
    np.testing.assert_allclose(x.grad, expected, atol=1e-4)


def teacher_answer(n=2):
    """A vector and a map of random features for each of n images."""
    return torch.randn(n, 64), torch.randn(n, 64, 16, 16)


@pytest.mark.parametrize("semantic, name", [("fqgan", "contrastive"), ("vavae", "vf")])
def test_local_supervision_reads_the_semantic_codes_straight_through(semantic, name):
    model = GloTok(replace(TINY, semantic=semantic, teacher="convnet")).eval()
    vectors, maps = teacher_answer()
    x = random_images()
    _, losses = model(x, (vectors, maps))
    losses[name].backward()
    # No codebook, nothing visual, no decoder.
    assert modules_with_gradient(model) == {"encoder", "adapter_sem", "semantic_head"}

    sem, _ = model.encode(x)
    prediction = model.semantic_head(model.codebook_sem[sem.flatten(1)])
    if semantic == "fqgan":
        expected = glotok.contrastive_loss(prediction, vectors)
    else:
        expected = glotok.vf_loss(prediction, maps)
    assert losses[name].item() == pytest.approx(expected.item(), abs=1e-5)


@torch.no_grad()
def test_fqgans_head_sees_every_position_and_where_it_is():
    head = glotok.ContrastiveHead(8, 64, 4).eval()
    codes = torch.randn(1, 16, 8)
    before = head(codes)
    assert before.shape == (1, 64)
    for k in range(16):
        changed = codes.clone()
        changed[0, k] += 1
        assert (head(changed) - before).abs().max() > 1e-5
    assert (head(codes.flip(1)) - before).abs().max() > 1e-5
    torch.testing.assert_close(before, F.layer_norm(before, [64]), atol=1e-2, rtol=0)  # comes last


@pytest.mark.parametrize("layers", [0, 1])
def test_vavaes_weight_is_the_ratio_of_gradients_at_the_last_layer_before_the_latent(layers):
    c = replace(TINY, semantic="vavae", teacher="convnet", adapter_layers=layers)
    model = GloTok(c)
    x = random_images()
    recon, losses = model(x, teacher_answer())
    losses = {"vf": losses["vf"], "quantize": 0, "residual": 0}
    last = model.adapter_sem.proj_out.weight if layers else model.adapter_sem.weight
    (of_pixels,) = torch.autograd.grad(F.mse_loss(recon, x), last, retain_graph=True)
    (of_vf,) = torch.autograd.grad(losses["vf"], last, retain_graph=True)
    of_vf = 0.1 * of_pixels.norm() / of_vf.norm() * of_vf

    loss = glotok.total_loss(c, model, x, recon, losses)
    (found,) = torch.autograd.grad(loss, last)
    assert (found - of_pixels - of_vf).norm() < 2e-2 * of_vf.norm()  # 1e-4 guards the division


@pytest.mark.parametrize("semantic", ["global", "none"])
def test_no_other_supervision_has_local_losses(semantic):
    c = replace(TINY, semantic=semantic)
    assert GloTok(c)(random_images())[1].keys() == {"quantize", "residual", "coverage"}
    c = replace(c, lambda_coverage=0.0)
    assert GloTok(c)(random_images())[1].keys() == {"quantize", "residual"}


# ================================================================================================
# Part II. Networks, data, measures
# ================================================================================================

# ---- borrowed networks, k-means


def test_lpips_has_the_published_names():
    state = LPIPS().state_dict()
    assert len(state) == 26 + 5  # weights and biases of 13 convolutions; 5 heads
    assert state["features.28.weight"].shape == (512, 512, 3, 3)
    assert state["lin0.model.1.weight"].shape == (1, 64, 1, 1)
    assert state["lin3.model.1.weight"].shape == (1, 512, 1, 1)


def test_lpips_follows_its_formula():
    net = LPIPS()
    assert net.training is False
    x = random_images(3, 32)
    y = random_images(3, 32)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    a = (x - shift) / scale
    b = (y - shift) / scale
    head_of = {3: "lin0", 8: "lin1", 15: "lin2", 22: "lin3", 29: "lin4"}
    expected = torch.zeros(3)
    for i in range(30):
        a = net.features[i](a)
        b = net.features[i](b)
        if i in head_of:
            unit_a = a / (a.norm(dim=1, keepdim=True) + 1e-10)
            unit_b = b / (b.norm(dim=1, keepdim=True) + 1e-10)
            weight = net.state_dict()[f"{head_of[i]}.model.1.weight"].view(1, -1, 1, 1)
            expected += (weight * (unit_a - unit_b) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(net(x, y), expected, atol=1e-5, rtol=1e-3)
    assert net(x, x).abs().max() == 0


def test_a_block_of_dinov2_in_numpy():
    """The published layout: rows of qkv are those of q, then k, then v; within each, by head."""
    net = DINOv2(width=12, depth=1, heads=3)
    for p in net.blocks.parameters():
        p.normal_(0, 0.5)
    x = torch.randn(1, 5, 12)
    w = {name: p.double().numpy() for name, p in net.blocks[0].named_parameters()}

    def layer_norm(x, name):
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    tokens = x[0].double().numpy()
    qkv = linear(layer_norm(tokens, "norm1"), "attn.qkv")  # (5, 36)
    heads = []
    for h in range(3):
        q, k, v = (qkv[:, 12 * i + 4 * h : 12 * i + 4 * h + 4] for i in range(3))
        attention = np.exp(q @ k.T / math.sqrt(4))
        heads.append(attention / attention.sum(1, keepdims=True) @ v)
    tokens = tokens + w["ls1.gamma"] * linear(np.hstack(heads), "attn.proj")
    hidden = linear(layer_norm(tokens, "norm2"), "mlp.fc1")
    hidden = hidden * scipy.stats.norm.cdf(hidden)  # GELU
    tokens = tokens + w["ls2.gamma"] * linear(hidden, "mlp.fc2")
    np.testing.assert_allclose(net.blocks[0](x)[0], tokens, atol=1e-4, rtol=1e-4)
    assert [block.attn.heads for block in DINOv2().blocks] == [6] * 12


def test_dinov2_has_the_published_names_and_shapes():
    net = DINOv2()
    state = net.state_dict()
    assert len(state) == 5 + 12 * 14 + 2  # a block has 14, the last norm 2
    assert state["cls_token"].shape == (1, 1, 384)
    assert state["pos_embed"].shape == (1, 1370, 384)
    assert state["patch_embed.proj.weight"].shape == (384, 3, 14, 14)
    assert state["blocks.0.norm1.weight"].shape == (384,)
    assert state["blocks.11.attn.qkv.weight"].shape == (1152, 384)
    assert state["blocks.5.ls1.gamma"].shape == (384,)
    assert state["blocks.7.mlp.fc1.weight"].shape == (1536, 384)
    assert state["norm.bias"].shape == (384,)
    assert net(torch.rand(2, 3, 28, 42)).shape == (2, 1 + 6, 384)


@pytest.mark.parametrize("height, width", [(224, 224), (28, 42)])
@torch.no_grad()
def test_dinov2s_positions_are_resized_by_the_published_factor(height, width):
    """Bicubic, A = -0.75: row i of h comes from 37 (i + 0.5) / (h + 0.1) - 0.5."""
    net = DINOv2(depth=1)
    for scale in (net.blocks[0].ls1, net.blocks[0].ls2):
        scale["gamma"].zero_()
    torch.nn.init.zeros_(net.patch_embed["proj"].weight)  # the tokens are then the positions
    torch.nn.init.zeros_(net.patch_embed["proj"].bias)
    net.norm = torch.nn.Identity()

    def weights(n):
        """(n, 37): how much each published position counts at each of n."""

        def cubic(x):
            x = abs(x)
            if x <= 1:
                return 1.25 * x**3 - 2.25 * x**2 + 1
            return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3 if x < 2 else 0.0

        matrix = np.zeros((n, 37))
        for i in range(n):
            position = 37 * (i + 0.5) / (n + 0.1) - 0.5
            first = math.floor(position) - 1
            for k in range(first, first + 4):
                matrix[i, min(max(k, 0), 36)] += cubic(position - k)
        return matrix

    grid = net.pos_embed[0, 1:].view(37, 37, 384).double().numpy()
    expected = np.einsum("ri,cj,ijd->rcd", weights(height // 14), weights(width // 14), grid)
    tokens = net(torch.rand(1, 3, height, width))[0]
    found = tokens[1:].view(height // 14, width // 14, 384)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    torch.testing.assert_close(tokens[0], (net.cls_token + net.pos_embed[:, :1])[0, 0])


def test_kmeans_finds_separated_blobs():
    middles = 20 * torch.randn(12, 5)
    blobs = middles[:, None] + 0.1 * torch.randn(12, 40, 5)
    x = blobs.flatten(0, 1)[torch.randperm(480)]
    centres = kmeans(x, 12)
    assert centres.shape == (12, 5)
    distance, nearest = torch.cdist(middles, centres).min(1)
    assert distance.max() < 0.2
    assert len(nearest.unique()) == 12


def test_kmeans_of_fewer_distinct_points_than_centres():
    points = torch.randn(3, 2)
    distance = torch.cdist(kmeans(points.repeat(4, 1), 6).double(), points.double())
    assert distance.min(1).values.max() < 1e-5  # each centre is one of the points,
    assert distance.min(0).values.max() < 1e-5  # and each point is a centre
    with pytest.raises(ValueError, match="4 centres among 3 points"):
        kmeans(torch.randn(3, 3), 4)


def test_kmeans_starts_greedily():
    """Of several candidates the one that lowers the error most: far ahead of one candidate each."""
    x = (4 * torch.randn(60, 1, 8) + torch.randn(60, 20, 8)).flatten(0, 1)

    def error(centres):
        return torch.cdist(x, centres).min(1).values.square()

    plain = x[:1]
    while len(plain) < 60:  # k-means++ by its definition, one candidate a centre
        plain = torch.cat([plain, x[torch.multinomial(error(plain), 1)]])
    greedy = kmeans(x, 60, iterations=0)
    assert error(greedy).sum() < 0.9 * error(plain).sum()


def test_the_teachers_histogram_is_that_of_its_k_means_centres():
    features = torch.randn(200, 6)
    torch.manual_seed(3)
    centres = kmeans(features, 12)
    expected = histogram_by_loops(centres, 20, alpha_of(20))
    torch.manual_seed(3)
    found = glotok.teacher_histogram(features, 12, bins=20)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    assert glotok.teacher_centres(features[:5], 12).shape == (5, 6)  # fewer than centres


def test_vqgan_lcs_centres_are_found_class_by_class():
    labels = torch.arange(300) % 3
    features = 100.0 * labels[:, None] + torch.randn(300, 2)
    centres = glotok.teacher_centres(features, 12, labels)
    assert centres.shape == (12, 2)
    for label, of_class in enumerate(centres.split(4)):
        assert (of_class - 100 * label).abs().max() < 5


# ---- t-SNE and uniformity (table 3)


def neighbours_by_loops(x, perplexity):
    """p of t-SNE by its definition, point by point, in float64 -> (n, n)."""
    n = len(x)
    distance = np.asarray(torch.cdist(x, x).double()) ** 2
    p = np.zeros((n, n))
    for i in range(n):
        others = [j for j in range(n) if j != i]
        d = distance[i, others]
        low = 1e-6
        high = 1e6
        for _ in range(200):  # bisect the precision until the entropy fits
            precision = math.sqrt(low * high)
            w = np.exp(-precision * (d - d.min()))
            w /= w.sum()
            entropy = -(w * np.log(np.maximum(w, 1e-300))).sum()
            if entropy > math.log(perplexity):
                low = precision
            else:
                high = precision
        p[i, others] = w
    return (p + p.T) / p.sum() / 2


def test_tsne_minimises_its_divergence():
    """KL(p || q) by loops: far below that of other planes, and of any plane nearby."""
    x = torch.randn(60, 5)
    p = neighbours_by_loops(x, 15)

    def divergence(y):
        q = 1 / (1 + np.asarray(torch.cdist(y, y).double()) ** 2)
        np.fill_diagonal(q, 0)
        q /= q.sum()
        total = 0
        for i in range(60):
            for j in range(60):
                if p[i, j] > 1e-15:
                    total += p[i, j] * math.log(p[i, j] / q[i, j])
        return total

    y = tsne(x, perplexity=15)
    first_coordinates = divergence(x[:, :2])
    random_plane = divergence(torch.randn(60, 2))
    assert divergence(y) < 0.75 * min(first_coordinates, random_plane)
    for _ in range(5):
        assert divergence(y + 0.3 * torch.randn_like(y)) > divergence(y)


def test_table_3_takes_one_position_an_image_and_normalises_each_channel(monkeypatch):
    seen = []

    def tsne_of_nothing(z):
        seen.append(z)
        return torch.randn(len(z), 2)

    monkeypatch.setattr(sample, "tsne", tsne_of_nothing)
    n = 50
    tokens = torch.arange(n * 16).view(n, 4, 4)  # no two alike, rising from image to image
    scales = torch.tensor([1.0, 1e-3, 1e3])
    codebook = torch.arange(n * 16.0)[:, None] * scales + 7
    sample.repeat_uniformity(codebook, tokens, 3)
    assert len(seen) == 3
    for z in seen:
        np.testing.assert_allclose(z.mean(0), np.zeros(3), atol=1e-4)
        np.testing.assert_allclose(z.std(0), np.ones(3), rtol=1e-3)
        steps = z[1:, 0] - z[:-1, 0]
        assert (steps > 0).all()  # one token of each image, in order
        assert steps.std() > 0.1 * steps.mean()  # not at the same position in each
    assert not torch.allclose(seen[0], seen[1])  # each run draws its own


def test_uniformity_by_hand():
    """A Gaussian kernel with Scott's bandwidth, then the three measures by their definitions."""
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    covariance = np.cov(points.T) * 4 ** (-2 / 6)  # n^(-1 / (d + 4)), squared
    inverse = np.linalg.inv(covariance)
    scale = 1 / (4 * 2 * math.pi * math.sqrt(np.linalg.det(covariance)))
    density = np.zeros(4)
    for i, p in enumerate(points):
        for q in points:
            density[i] += scale * math.exp(-(p - q) @ inverse @ (p - q) / 2)
    mean = density.mean()
    share = density / density.sum()
    deviation = np.sqrt(((density - mean) ** 2).mean())
    entropy = -sum(q * math.log(q) for q in share)
    differences = np.abs(density[:, None] - density).sum()

    found = uniformity(torch.tensor(points, dtype=torch.float32))
    assert found["density_cv"] == pytest.approx(deviation / mean, rel=1e-5)
    assert found["normalized_entropy"] == pytest.approx(entropy / math.log(4), rel=1e-5)
    assert found["gini"] == pytest.approx(differences / (2 * 4 * 4 * mean), rel=1e-5)


# ---- fid.py: the network


def seeded_inception():
    """InceptionV3 with random weights that let its input through.

    The recipe of the golden values below, also for a reference package: save its state_dict(), and
    give the file to torch-fidelity 0.4.0's FeatureExtractorInceptionV3("x", ["2048",
    "logits_unbiased"], feature_extractor_weights_path=FILE) (in its module
    feature_extractor_inceptionv3, which loads without torchvision once an empty module stands in
    for the parent package). Same images, `golden_images`.
    """
    net = fid.InceptionV3()
    g = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight.data.normal_(0, (2 / m.weight[0].numel()) ** 0.5, generator=g)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=g)
            m.running_var.uniform_(0.5, 1.5, generator=g)
            m.weight.data.uniform_(0.8, 1.2, generator=g)
            m.bias.data.normal_(0, 0.1, generator=g)
    net.fc.weight.data.normal_(0, 0.02, generator=g)
    net.fc.bias.data.normal_(0, 1, generator=g)  # which the logits leave out
    return net


def golden_images(size):
    g = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=g)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of seeded_inception's weights."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(seeded_inception().state_dict(), path)
    return path


# size: of torch-fidelity's features their sum, deviation, and a partial sum; of its logits their
# deviation and a partial sum
GOLDEN = {
    32: [5617.712402, 1.907288, 710.924805, 2.102827, 37.434746],
    64: [6299.687988, 2.137265, 798.183533, 2.357011, 43.734692],
    256: [6694.3125, 2.269577, 847.363281, 2.505479, 48.165813],
}


@pytest.mark.parametrize("size", [32, 64, 256])
def test_inception_agrees_with_torch_fidelity(size):
    net = seeded_inception()
    plain = net(golden_images(size))
    folded = net.fold()(golden_images(size))
    for features, logits, spatial in (plain, folded):
        assert features.shape == (2, 2048)
        assert logits.shape == (2, 1008)
        assert spatial.shape == (2, 2023)
        sums = [features.sum(), features.std(), features[1, :512].sum()]
        sums += [logits.std(), logits[0, :504].sum()]
        np.testing.assert_allclose(torch.stack(sums), GOLDEN[size], rtol=1e-4)


def test_inception_names_are_the_published_ones():
    state = fid.InceptionV3().state_dict()
    names = [name for name in state if "num_batches" not in name]
    assert len(names) == 94 * 5 + 2  # a weight and four of the batch norm each; fc
    assert state["Mixed_5d.branch3x3dbl_3.bn.running_var"].shape == (96,)
    assert state["Mixed_6a.branch3x3.conv.weight"].shape == (384, 288, 3, 3)
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def test_inception_stays_in_float32_whatever_is_set_outside():
    net = seeded_inception()
    seen = []
    net.Mixed_7c.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    expected = net(golden_images(32))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = net(golden_images(32))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [False, False]
    for x, y in zip(found, expected):
        assert torch.equal(x, y)


def test_sfid_takes_the_first_channels_of_a_branch_channels_last():
    """Mixed_6d.branch1x1 by hand: convolution, batch norm, ReLU; 7 channels."""
    net = seeded_inception()
    inputs = []
    net.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    _, _, found = net(golden_images(32)[:1])
    x = inputs[0][0].double().numpy()  # (768, 17, 17)
    conv = net.Mixed_6d.branch1x1.conv.weight[:7, :, 0, 0].double().numpy()  # (7, 768)
    bn = net.Mixed_6d.branch1x1.bn
    expected = []
    for row in range(17):
        for column in range(17):
            y = conv @ x[:, row, column]
            for c in range(7):
                z = (y[c] - bn.running_mean[c]) / math.sqrt(bn.running_var[c] + 0.001)
                expected.append(max(0, z * bn.weight[c] + bn.bias[c]))
    assert 0 < np.count_nonzero(expected) < 2023
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 32, 299, 500])
def test_resize_is_tensorflow_1s(n):
    """Output i reads the input at i * n / 299, no half pixel; beyond the last point the last."""
    x = np.random.default_rng(0).uniform(0, 255, n)
    expected = []
    for i in range(299):
        position = i * n / 299
        low = int(position)
        high = min(low + 1, n - 1)
        expected.append(x[low] + (position - low) * (x[high] - x[low]))
    found = fid.resize_matrix(n).double() @ torch.from_numpy(x)
    np.testing.assert_allclose(found, expected, atol=2e-2)


# ---- the measures


def test_frechet_distance_equals_the_matrix_root_where_that_works():
    a = np.random.default_rng(0).normal(size=(500, 40))
    b = np.random.default_rng(1).normal(1, 2, size=(300, 40)) * np.linspace(0.1, 3, 40)
    mu1 = a.mean(0)
    mu2 = b.mean(0)
    s1 = np.cov(a.T)
    s2 = np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)
    tensors = [torch.from_numpy(each) for each in (mu2, s2)]
    found = fid.frechet_distance(mu1, s1, *tensors)  # a file's against measured ones
    assert isinstance(found, float)
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_singular_covariances_in_closed_form():
    x = np.random.default_rng(0).normal(size=(20, 100))  # fewer images than dimensions
    mu = x.mean(0)
    s = np.cov(x.T)
    trace = np.trace(s)
    none = np.zeros((100, 100))  # constant features
    assert fid.frechet_distance(mu, s, mu, s) == pytest.approx(0, abs=1e-9 * trace)
    # |shift|^2
    assert fid.frechet_distance(mu, s, mu + 3, s) == pytest.approx(900, rel=1e-9)
    # (2 - 1)^2 tr S
    assert fid.frechet_distance(mu, s, mu, 4 * s) == pytest.approx(trace, rel=1e-9)
    assert fid.frechet_distance(mu, none, mu, none) == 0
    assert fid.frechet_distance(mu, s, mu, none) == pytest.approx(trace, rel=1e-9)
    assert fid.frechet_distance(mu, none, mu, s) == pytest.approx(trace, rel=1e-9)


def kernel_distance_by_loops(x, y, subsets, size, paired=False):
    """KID term by term, float64; the draws are torch-fidelity's, or of pairs."""
    x = x.double().numpy()
    y = y.double().numpy()
    d = x.shape[1]

    def kernel(a, b):
        return (sum(a * b) / d + 1) ** 3

    rng = np.random.RandomState(2020)
    distances = []
    for _ in range(subsets):
        chosen = rng.choice(len(x), size, replace=False)
        a = x[chosen]
        b = y[chosen if paired else rng.choice(len(y), size, replace=False)]
        within = []
        across = []
        for i in range(size):
            for j in range(size):
                if i != j:
                    within.append(kernel(a[i], a[j]) + kernel(b[i], b[j]))
                if i != j or not paired:
                    across.append(kernel(a[i], b[j]))
        distances.append(np.mean(within) - 2 * np.mean(across))
    return np.mean(distances), np.std(distances)


@pytest.mark.parametrize("paired", [False, True])
def test_kid_equals_plain_loops(paired):
    x = torch.rand(14, 6)
    y = x + 0.1 * torch.rand(14, 6) if paired else torch.rand(11, 6) + 0.3
    expected = kernel_distance_by_loops(x, y, 4, 5, paired)
    found = fid.kernel_distance(x, y, subsets=4, size=5, paired=paired)
    assert found == pytest.approx(expected, rel=1e-9)
    arrays = fid.kernel_distance(x.numpy(), y.numpy(), subsets=4, size=5, paired=paired)
    assert arrays == found


def test_kid_of_few_images_has_smaller_subsets():
    x = torch.rand(5, 6)
    y = torch.rand(7, 6)
    expected = kernel_distance_by_loops(x, y, subsets=3, size=5)
    assert fid.kernel_distance(x, y, subsets=3) == pytest.approx(expected, rel=1e-9)
    whole, deviation = fid.kernel_distance(x, x + 1)  # one subset that is everything
    assert whole == pytest.approx(kernel_distance_by_loops(x, x + 1, 1, 5)[0], rel=1e-9)
    assert math.isnan(deviation)
    with pytest.raises(BadInput):
        fid.kernel_distance(x[:1], y)


def inception_score_by_loops(logits, parts):
    """The score of parts, lists of positions: exp of the mean KL of each."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in parts:
        marginal = p[part].mean(0)
        divergences = [(p[i] * np.log(p[i] / marginal)).sum() for i in part]
        scores.append(math.exp(np.mean(divergences)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n", [57, 7, 1])
def test_inception_score_of_shuffled_splits_as_torch_fidelity(n):
    """Split i goes from i N // 10 on; fewer images than splits make one split each."""
    logits = torch.randn(n, 12)
    splits = min(n, 10)
    order = np.random.RandomState(2020).permutation(n)
    parts = [order[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    expected = inception_score_by_loops(logits, parts)
    assert fid.inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_inception_score_in_file_order_as_adm():
    """Parts of so many images, and what is left."""
    logits = torch.randn(57, 12)
    expected, _ = inception_score_by_loops(logits, [range(25), range(25, 50), range(50, 57)])
    scores = [fid.inception_score(part, splits=1)[0] for part in logits.split(25)]
    assert np.mean(scores) == pytest.approx(expected, rel=1e-9)


def precision_recall_by_loops(reference, samples, k):
    def distance(a, b):
        return math.sqrt(sum((a - b) ** 2))

    def share_inside(points, centres):
        radii = []
        for i, a in enumerate(centres):
            others = [distance(a, b) for j, b in enumerate(centres) if j != i]
            radii.append(sorted(others)[k - 1])
        inside = [any(distance(p, a) <= r for a, r in zip(centres, radii)) for p in points]
        return np.mean(inside)

    reference = reference.double().numpy()
    samples = samples.double().numpy()
    return share_inside(samples, reference), share_inside(reference, samples)


@pytest.mark.parametrize("k, rows", [(1, 256), (3, 256), (3, 5)])
def test_precision_and_recall_equal_plain_loops(k, rows, monkeypatch):
    """Sets of unequal size that the rows at once do not divide."""
    monkeypatch.setattr(fid, "ROWS", rows)
    reference = torch.randn(23, 3)
    samples = 1.5 * torch.randn(17, 3) + 2
    expected = precision_recall_by_loops(reference, samples, k)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert expected[0] != expected[1]
    assert fid.precision_recall(reference, samples, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_copies():
    """Images that occur 20 times have balls of radius 0, and copies of them lie inside."""
    once = torch.rand(100, 2048, dtype=torch.float64)
    often = once.repeat(20, 1)
    few = once[:27].repeat(20, 1)
    assert fid.precision_recall(few, few) == (1, 1)
    for m in (5, 11):  # matrix products of other sizes are rounded differently
        samples = torch.cat([once[:m], once[:m] + 1])
        precision, _ = fid.precision_recall(often, samples)
        assert precision == 1 / 2


def test_psnr():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = x.clone()
    y[0] += 51  # a fifth of the range: 20 log10 5
    assert fid.psnr(x, y).tolist() == pytest.approx([20 * math.log10(5), 99], abs=1e-4)


# ---- reading an image


def gradient_picture(width, height):
    """A picture whose red is its column and whose green is its row, in pixels."""
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([column, row, 0 * row], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "crop, left, top, side",
    [
        (None, 40, 0, 100),
        ((1.0, 0.0, 0.9), 0, 0, 100),
        ((0.8, 0.999, 0.999), 100, 20, 80),
        ((0.8, 0.25, 0.5), 25, 10, 80),
    ],
)
def test_a_crop_is_a_square_of_that_share_at_that_place(crop, left, top, side):
    size = 50
    found = np.array(fid.crop_and_resize(gradient_picture(180, 100), size, crop)).astype(float)
    assert found.shape == (size, size, 3)
    # Pixel k covers side / size pixels of the picture; the ramp's mean there is at their middle.
    middles = (np.arange(size) + 0.5) * side / size - 0.5
    inside = slice(3, -3)  # at the picture's edge bicubic interpolation bends the ramp
    np.testing.assert_allclose(found[10, inside, 0], (left + middles)[inside], atol=1.6)
    np.testing.assert_allclose(found[inside, 10, 1], (top + middles)[inside], atol=1.6)


def test_crops_come_from_all_places_alike():
    """A picture 20 pixels wide has 5 places for a square of 16."""
    lefts = []
    for x in torch.arange(100) / 100:
        square = fid.crop_and_resize(gradient_picture(20, 16), 16, (1.0, x.item(), 0.0))
        lefts.append(square.getpixel((0, 0))[0])
    assert np.bincount(lefts).tolist() == [20] * 5


def test_large_pictures_are_halved_by_a_box_filter_first():
    """As ADM's references: 96 is halved once, to 48, which is not twice 32; then bicubically."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    boxes = pixels.reshape(48, 2, 72, 2, 3).mean((1, 3))
    halved = Image.fromarray((boxes + 0.5).astype(np.uint8))
    expected = np.array(halved.resize((48, 32), Image.Resampling.BICUBIC))[:, 8:40]
    found = np.array(fid.crop_and_resize(Image.fromarray(pixels), 32))
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=2)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


GREYS = np.arange(256, dtype=np.uint16).reshape(16, 16)
DEEP = 256 * GREYS + 100  # of 16 bits
TURNED = np.rot90(GREYS, 2).astype(np.uint8)
PICTURES = {
    "16 bits.png": encoded(Image.fromarray(DEEP)),
    "16 bits.pgm": b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(),
    "16 bits.tif": encoded(Image.fromarray(DEEP), "TIFF"),
    "numbers.tif": encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    "floats.tif": encoded(Image.fromarray((GREYS / 255).astype(np.float32)), "TIFF"),
    "floats.png": encoded(Image.fromarray((GREYS / 255).astype(np.float32)), "TIFF"),
    "exif.png": encoded(Image.fromarray(TURNED), exif=orientation(3)),
    "alpha.png": encoded(Image.fromarray(GREYS.astype(np.uint8)).convert("RGBA")),
    "palette.gif": encoded(Image.fromarray(GREYS.astype(np.uint8)), "GIF"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_many_kinds_mean_the_same(name, tmp_path):
    (tmp_path / name).write_bytes(PICTURES[name])
    image = fid.load_image(tmp_path / name)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 16, 16)
    assert (image == torch.from_numpy(GREYS.astype(np.uint8))).all()
    assert fid.load_image(tmp_path / name, 8, (0.9, 0.3, 0.9)).shape == (3, 8, 8)


BROKEN_PICTURES = {
    "torn.png": PICTURES["exif.png"][:50],
    "text.jpg": b"no picture",
    "of another format.png": encoded(Image.fromarray(TURNED), "PCX"),  # or EPS, a program
    "floats to 255.tif": encoded(Image.fromarray(GREYS.astype(np.float32)), "TIFF"),
    "nan.tif": encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "32 bits.tif": encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"),
    "torn.avif": encoded(Image.fromarray(TURNED), "AVIF")[:-20],
}


@pytest.mark.parametrize("name", [*BROKEN_PICTURES, "missing.png"])
def test_pictures_that_cannot_be_read_are_named_in_one_line(name, tmp_path):
    if name in BROKEN_PICTURES:
        (tmp_path / name).write_bytes(BROKEN_PICTURES[name])
    with pytest.raises(BadInput) as caught:
        fid.load_image(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_thin_pictures_take_little_memory(monkeypatch):
    """1 pixel high, 30,000 wide: as a whole it would be 256 x 7,680,000."""
    areas = []
    resize = Image.Image.resize

    def watched_resize(picture, size, *options):
        areas.append(math.prod(size))
        return resize(picture, size, *options)

    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    assert fid.crop_and_resize(Image.new("RGB", (30000, 1)), 256).size == (256, 256)
    assert 0 < max(areas) < 2e6


# ---- measuring two sets


class QuickNet:
    """Stands in for InceptionV3: fixed random projections of the mean colour of each quarter."""

    def __init__(self):
        self.features = []  # of all batches so far
        g = torch.Generator().manual_seed(0)
        self.projection = torch.randn(12, 2048 + 1008 + 2023, generator=g)

    def __call__(self, images):
        quarters = F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        outputs = (quarters - 0.5) @ self.projection
        features, logits, spatial = outputs.split([2048, 1008, 2023], dim=1)
        self.features.append(features)
        return features, logits, spatial


@pytest.fixture
def quick_net(monkeypatch):
    """A QuickNet that fid.py's command takes for the published network."""
    net = QuickNet()
    monkeypatch.setattr(fid, "load_inception", lambda file, device: net)
    return net


def outputs_of_array(images):
    return QuickNet()(torch.tensor(images).permute(0, 3, 1, 2))


def random_pixels(n, low, high):
    """uint8 (n, 16, 16, 3), each image around a colour of its own."""
    rng = np.random.default_rng(n)
    colours = rng.integers(low, high, (n, 1, 1, 3))
    return (colours + rng.integers(0, 30, (n, 16, 16, 3))).astype(np.uint8)


@pytest.fixture
def two_files(tmp_path):
    """A.npz with 9 images and B.npz with 12, and the arrays in them."""
    a = random_pixels(9, 30, 130)
    b = random_pixels(12, 60, 220)
    np.savez(tmp_path / "A.npz", a)
    np.savez(tmp_path / "B.npz", b)
    return tmp_path / "A.npz", tmp_path / "B.npz", a, b


def read_figures(result):
    """The figures that fid.py printed, {name: list of numbers}."""
    assert result.status == 0, result.err
    figures = {}
    for line in result.out.splitlines():
        name, *numbers = line.split()
        figures[name] = [float(number) for number in numbers]
    return figures


@pytest.fixture
def quick_distance(monkeypatch):
    """A number of all four moments, in this order, for frechet_distance, which takes seconds."""

    def stand_in(mu1, sigma1, mu2, sigma2):
        return float(mu1[0] - 2 * mu2[0] + 3 * sigma1[0, 0] - 4 * sigma2[0, 0])

    monkeypatch.setattr(fid, "frechet_distance", stand_in)


def test_moments_are_numpys_mean_and_covariance(tmp_path):
    """Of pictures of two sizes, in batches, from files."""
    folder = save_pictures(tmp_path / "a", 17)
    save_pictures(folder, 8, size=24, seed=50, name="large{}.png")
    items = sorted(folder.iterdir())
    outputs = []
    for path in items:
        outputs.append(outputs_of_array(np.asarray(Image.open(path))[None]))
    features, logits, spatial = [torch.cat(parts) for parts in zip(*outputs)]
    statistics = fid.measure("x", items, QuickNet(), CPU, keep=["features", "logits"])
    torch.testing.assert_close(statistics.features, features)
    torch.testing.assert_close(statistics.logits, logits)
    for found, x in ((statistics.pooled, features), (statistics.spatial, spatial)):
        x = x.double().numpy()
        np.testing.assert_allclose(found[0], x.mean(0), atol=1e-6)
        np.testing.assert_allclose(found[1], np.cov(x.T), atol=1e-6)


def frechet_of_few(x, y):
    """The Frechet distance of features (N, d) with N below d, by another road.

    S = A A' with A = (x - mean)' / sqrt(N - 1), and tr (A A' B B')^(1/2) is the sum of the
    singular values of A' B, which is small.
    """
    a = (x - x.mean(0)).T / math.sqrt(len(x) - 1)
    b = (y - y.mean(0)).T / math.sqrt(len(y) - 1)
    cross = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return shift + (a**2).sum() + (b**2).sum() - 2 * cross


def test_fid_and_all_else_of_two_arrays(two_files, quick_net, run_command, tmp_path):
    path_a, path_b, a, b = two_files
    x, _, spatial_x = outputs_of_array(a)
    y, logits, spatial_y = outputs_of_array(b)
    figures = read_figures(run_command(fid, path_a, path_b))
    assert list(figures) == ["fid", "sfid", "kid", "is", "precision", "recall"]
    expected = frechet_of_few(x.double().numpy(), y.double().numpy())
    assert figures["fid"] == pytest.approx([expected], rel=1e-5)
    expected = frechet_of_few(spatial_x.double().numpy(), spatial_y.double().numpy())
    assert figures["sfid"] == pytest.approx([expected], rel=1e-5)
    assert figures["kid"] == pytest.approx(fid.kernel_distance(x, y), abs=1e-6)
    assert figures["is"] == pytest.approx(fid.inception_score(logits), abs=1e-5)
    expected = precision_recall_by_loops(x, y, 3)
    assert expected[0] != expected[1]
    assert figures["precision"] + figures["recall"] == pytest.approx(expected, abs=1e-6)
    quick_net.features.clear()
    assert list(read_figures(run_command(fid, path_a, path_b, "--only", "is"))) == ["is"]
    assert len(torch.cat(quick_net.features)) == 12  # the reference is not looked at


@pytest.mark.usefixtures("quick_distance")
def test_statistics_of_both_formats_need_no_network(tmp_path, run_command, monkeypatch):
    """ADM's files hold images, too, and those of spatial features; pytorch-fid's neither."""
    monkeypatch.setattr(fid, "load_inception", pytest.fail)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    for name, mu in (("a", 5.0), ("b", 0.5)):
        moments = {"mu": np.full(2048, mu, ">f4"), "sigma": np.full((2048, 2048), mu / 2)}
        np.savez(tmp_path / f"{name}_pytorch_fid.npz", **moments)
        moments |= {"mu_s": np.full(2023, mu / 4), "sigma_s": np.full((2023, 2023), mu / 8)}
        np.savez(tmp_path / f"{name}_no_images.npz", **moments)
        np.savez(tmp_path / f"{name}_adm.npz", **moments, arr_0=images)

    figures = read_figures(run_command(fid, tmp_path / "a_adm.npz", tmp_path / "b_no_images.npz"))
    assert figures == {"fid": [5 - 1 + 7.5 - 1], "sfid": [(5 - 1) / 4 + (7.5 - 1) / 4]}
    words = [tmp_path / "a_pytorch_fid.npz", tmp_path / "b_no_images.npz"]
    saved = tmp_path / "again.npz"
    figures = read_figures(run_command(fid, *words, "--save-stats", saved))
    assert figures == {"fid": [10.5]}
    assert np.load(saved).files == ["mu", "sigma"]


@pytest.mark.usefixtures("quick_distance")
def test_statistics_in_a_file_come_before_its_images(two_files, quick_net, run_command, tmp_path):
    """ADM's reference files: FID of the whole set, all else of the images that came along."""
    a = two_files[2]
    moments = {"mu": np.full(2048, 5.0), "sigma": np.eye(2048)}
    np.savez(tmp_path / "adm.npz", **moments, arr_0=a)
    result = run_command(fid, *[tmp_path / "adm.npz"] * 2, "--only", "fid", "sfid", "precision")
    features, _, spatial = outputs_of_array(a)
    figures = {"fid": [5 - 10 + 3 - 4], "precision": [1]}
    expected = -spatial[:, 0].mean() - spatial[:, 0].var()
    figures["sfid"] = [pytest.approx(expected.item(), abs=1e-5)]
    assert read_figures(result) == figures
    assert torch.equal(torch.cat(quick_net.features[:1]), features)


@pytest.mark.usefixtures("quick_net", "quick_distance")
def test_save_stats_never_overwrites(two_files, tmp_path, run_command):
    path_a, path_b, a, _ = two_files
    before = path_a.read_bytes()
    for words in ([path_a, path_b, "--force"], [path_b, path_a], [path_b, path_b]):
        assert run_command(fid, *words, "--save-stats", path_a).status == 2
        assert path_a.read_bytes() == before
    words = [path_a, path_b, "--only", "fid", "--save-stats", tmp_path / "new" / "s.npz"]
    figures = read_figures(run_command(fid, *words))
    assert run_command(fid, *words).status == 2
    assert read_figures(run_command(fid, *words, "--force")) == figures

    saved = np.load(tmp_path / "new" / "s.npz")
    assert saved.files == ["mu", "sigma", "mu_s", "sigma_s"]
    features = outputs_of_array(a)[0].double().numpy()
    np.testing.assert_allclose(saved["mu"], features.mean(0), atol=1e-6)
    np.testing.assert_allclose(saved["sigma"], np.cov(features.T), atol=1e-6)
    again = run_command(fid, tmp_path / "new" / "s.npz", path_b, "--only", "fid")
    assert read_figures(again) == figures


def test_network_without_classifier(inception_file, tmp_path):
    """fc.* cut off: the same features, no logits."""
    weights = torch.load(inception_file, weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        del weights[name]
    torch.save(weights, tmp_path / "bare.pth")
    net = fid.load_inception(tmp_path / "bare.pth", CPU)
    images = golden_images(32).permute(0, 2, 3, 1).numpy()
    statistics = fid.measure("x", images, net, CPU, keep=["features", "logits"])
    assert statistics.logits is None
    np.testing.assert_allclose(statistics.features.sum().item(), GOLDEN[32][0], rtol=1e-4)
    assert fid.compare(statistics, statistics, ["is", "precision"]) == {}


@pytest.mark.parametrize("kind", ["numbers", "names", "folders", "arrays"])
def test_pairs_go_by_name(kind, tmp_path, quick_net, run_command):
    """Not by order or suffix; numbers with and without zeros in front."""
    names = {
        "numbers": [(f"{i}.png", f"{i:04d}.bmp") for i in range(1, 13)],
        "names": [("b.png", "b.bmp"), ("a.1.bmp", "a.1.png"), ("7.png", "7.png")],
        "folders": [("x/1.png", "x/1.bmp"), ("y/1.png", "y/1.png"), ("y/2.png", "y/2.bmp")],
        "arrays": [(f"{i:03d}.png", f"{i}.png") for i in range(12)],
    }[kind]
    for i, (name_a, name_b) in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        for path in (tmp_path / "a" / name_a, tmp_path / "b" / name_b):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    samples = tmp_path / "b"
    if kind == "arrays":
        samples = tmp_path / "b.npz"
        files = sorted((tmp_path / "a").iterdir())
        np.savez(samples, np.stack([np.asarray(Image.open(path)) for path in files]))
    figures = read_figures(run_command(fid, tmp_path / "a", samples, "--only", "psnr"))
    assert figures == {"psnr": [99]}
    assert quick_net.features == []  # the network is not needed
    figures = read_figures(run_command(fid, tmp_path / "a", samples, "--only", "kid", "--paired"))
    assert figures["kid"][0] == pytest.approx(0, abs=1e-7)  # without the pairs

    (tmp_path / "a" / names[0][0]).rename(tmp_path / "a" / "zz.png")
    result = run_command(fid, tmp_path / "a", samples, "--paired")
    assert (result.status, result.out) == (2, "")


def test_pairs_of_a_name_that_occurs_twice_are_refused(tmp_path, quick_net, run_command):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.png", "01.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name)
    result = run_command(fid, tmp_path / "a", tmp_path / "b", "--paired")
    assert_refused(result, "fid.py")
    assert "2 reference images and 2 samples" in result.err


def test_size_crops_and_shrinks_both_sets(quick_net, tmp_path, run_command):
    """Of pictures 40 x 24, the middle square, 16 x 16. Samples of that size stay as they are."""
    folder = tmp_path / "large"
    folder.mkdir()
    cropped = []
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 40, 3), np.uint8)
        picture = Image.fromarray(pixels)
        picture.save(folder / f"{i}.png")
        shrunk = picture.resize((round(40 * 16 / 24), 16), Image.Resampling.BICUBIC)
        left = (shrunk.width - 16) // 2
        cropped.append(np.asarray(shrunk.crop((left, 0, left + 16, 16))))
    cropped = np.stack(cropped)
    np.savez(tmp_path / "small.npz", cropped)
    words = [folder, tmp_path / "small.npz", "--only", "kid", "psnr"]
    assert read_figures(run_command(fid, *words, "--size", 16))["psnr"] == [99]  # equal
    for features in torch.cat(quick_net.features).chunk(2):
        torch.testing.assert_close(features, outputs_of_array(cropped)[0])
    assert run_command(fid, *words).status == 2  # pairs of unequal size


def test_a_folder_is_all_images_below_it(tmp_path):
    """In order, but for hidden files and other kinds; linked folders once."""
    folder = tmp_path / "photos"
    for part in ("train/cat", "val", ".cache"):
        save_pictures(folder / part, 2)
    save_pictures(tmp_path / "elsewhere", 1, name="{}.JPEG")
    for link in ("again", "link"):
        (folder / link).symlink_to(tmp_path / "elsewhere")
    (folder / "val" / ".hidden.png").write_text("")
    (folder / "val" / "labels.txt").write_text("")
    found = [str(path.relative_to(folder)) for path in fid.read_set(str(folder)).items]
    expected = ["train/cat/000.png", "train/cat/001.png", "val/000.png", "val/001.png"]
    assert found == ["again/0.JPEG", *expected]


# ---- fid.py: bad input


@pytest.fixture(scope="module")
def bad_fid_inputs(tmp_path_factory, inception_file):
    """A folder of what fid.py cannot use; A.npz, B.npz and STATS.npz are good."""
    folder = tmp_path_factory.mktemp("bad")
    images = np.zeros((3, 16, 16, 3), np.uint8)
    np.savez(folder / "A.npz", images[:2])
    np.savez(folder / "B.npz", images)
    np.savez(folder / "STATS.npz", mu=np.zeros(2048), sigma=np.eye(2048))

    (folder / "EMPTY").mkdir()
    save_pictures(folder / "ROTTEN", 4)
    (folder / "ROTTEN/003.png").write_bytes(b"no picture")
    np.savez(folder / "FLOATS.npz", images.astype(float))
    np.savez(folder / "ONE.npz", images[:1])
    np.savez(folder / "NARROW.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "NAN.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    slanted = np.eye(2048)
    slanted[0, 1] = 0.5
    np.savez(folder / "SLANTED.npz", mu=np.zeros(2048), sigma=slanted)
    slanted[1, 0] = 0.5
    slanted[2, 2] = -0.1
    np.savez(folder / "NEGATIVE.npz", mu=np.zeros(2048), sigma=slanted)
    (folder / "TORN.npz").write_bytes((folder / "NAN.npz").read_bytes()[:-100])
    np.savez(folder / "OBJECTS.npz", np.array([RunsCode(str(folder / "code ran"))]))
    (folder / "PICKLE.npz").write_bytes(pickle.dumps(RunsCode(str(folder / "code ran"))))

    torch.save({"a": torch.ones(3)}, folder / "other.pth")
    torch.save(RunsCode(str(folder / "code ran")), folder / "code.pth")
    weights = torch.load(inception_file, weights_only=True)
    torch.save({**weights, "fc.bias": weights["fc.bias"] * math.nan}, folder / "nan.pth")
    del weights["fc.bias"]
    torch.save(weights, folder / "half.pth")
    return folder


# fid.py's words. NET is a good file of weights, '' an empty word.
BAD_FID_WORDS = [
    "nowhere A.npz --weights NET",
    "'' A.npz --weights NET",
    "EMPTY A.npz --weights NET",
    "ROTTEN A.npz --weights NET",
    "FLOATS.npz A.npz --weights NET",
    "A.npz ONE.npz --weights NET",
    "A.npz NARROW.npz --weights NET",
    "A.npz NAN.npz --weights NET",
    "STATS.npz SLANTED.npz",
    "STATS.npz NEGATIVE.npz",
    "A.npz TORN.npz --weights NET",
    "A.npz OBJECTS.npz --weights NET",
    "A.npz PICKLE.npz --weights NET",
    "A.npz A.npz --weights other.pth",
    "A.npz A.npz --weights code.pth",
    "A.npz A.npz --weights nan.pth",
    "A.npz A.npz --weights half.pth",
    "A.npz A.npz",  # the network cannot be downloaded
    "A.npz STATS.npz --only kid is",
    "A.npz B.npz --weights NET --paired",
    "A.npz STATS.npz --weights NET --paired",
    "A.npz A.npz --size 0",
    "A.npz A.npz --weights NET --save-stats x.txt",
    "A.npz A.npz --only fdi",
    "A.npz",
]


@pytest.mark.parametrize("words", BAD_FID_WORDS)
def test_fid_refuses_bad_input(words, bad_fid_inputs, inception_file, run_command, monkeypatch):
    monkeypatch.chdir(bad_fid_inputs)
    monkeypatch.setenv("TORCH_HOME", "cache")
    nowhere = fid.INCEPTION._replace(base_url=bad_fid_inputs.as_uri() + "/nowhere/")
    monkeypatch.setattr(fid, "INCEPTION", nowhere)
    before = sorted(bad_fid_inputs.rglob("*.*"))
    words = [{"NET": str(inception_file), "''": ""}.get(word, word) for word in words.split()]
    result = run_command(fid, *words)
    assert result.status == 2
    assert result.out == ""
    *others, message = result.err.splitlines()
    assert message.startswith("fid.py: ")
    for line in others:
        assert line.startswith(("note: ", "reading "))
    assert sorted(bad_fid_inputs.rglob("*.*")) == before
    assert not Path("code ran").exists()


def test_a_download_of_another_sha256_is_not_used(tmp_path):
    path = tmp_path / "source" / "thing.bin"
    path.parent.mkdir()
    path.write_bytes(b"as published")
    published = fid.Published("thing.bin", path.parent.as_uri() + "/", fid.sha256(path))
    cached = fid.fetch(published, tmp_path / "cache")
    assert cached == fid.cache_path("thing.bin", tmp_path / "cache")
    assert cached.read_bytes() == b"as published"
    cached.write_bytes(b"changed later")
    with pytest.raises(BadInput):
        fid.fetch(published, tmp_path / "cache")
    cached.unlink()
    path.write_bytes(b"changed at its source")
    with pytest.raises(BadInput):
        fid.fetch(published, tmp_path / "cache")
    assert not list(cached.parent.iterdir())


def test_fid_works_in_an_empty_folder(tmp_path, inception_file):
    """With no other file of ours beside it."""
    shutil.copy(REPOSITORY / "fid.py", tmp_path)
    images = random_pixels(4, 0, 200)
    np.savez(tmp_path / "A.npz", images[:2])
    np.savez(tmp_path / "B.npz", images[2:])
    words = ["fid.py", "A.npz", "B.npz", "--weights", inception_file, "--only", "kid"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kid ")


# ---- data


def test_shapes_depend_on_the_seed_alone():
    images, labels = train.draw_shapes(60, 32, 5)
    assert images.shape == (60, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(6))
    same_images, same_labels = train.draw_shapes(60, 32, 5)
    assert torch.equal(images, same_images)
    assert torch.equal(labels, same_labels)
    assert not torch.equal(images, train.draw_shapes(60, 32, 6)[0])


def pixels_of(path):
    """An RGB picture -> uint8 (3, H, W)."""
    return np.asarray(Image.open(path)).transpose(2, 0, 1).copy()


def test_a_folder_of_classes_holds_out_a_fixed_random_twentieth(tmp_path):
    for k, name in enumerate(("dog", "cat", "10", "9")):
        save_pictures(tmp_path / name, 30, seed=100 * k)
    data = train.load_data(str(tmp_path), 16)
    assert (len(data.train), len(data.val)) == (114, 6)
    assert data.classes == ["9", "10", "cat", "dog"]  # numbers as numbers
    assert len(data.val_labels.unique()) > 1  # not the first ones, all of one class
    assert torch.equal(data.val, train.load_data(str(tmp_path), 16).val)
    label_of = {}
    images = torch.cat([data.train, data.val])
    for image, label in zip(images, torch.cat([data.train_labels, data.val_labels])):
        label_of[image.numpy().tobytes()] = label.item()
    for label, name in enumerate(data.classes):
        for path in (tmp_path / name).iterdir():
            assert label_of[pixels_of(path).tobytes()] == label


# folders with as many pictures -> classes, images to train on and held out; None: refused
LAYOUTS = [
    ("train/a 4, train/b 4, val/a 2, val/b 2", "a b", 8, 4),
    ("Training/a 4, Training/b 4, TESTING/a 2", "a b", 8, 2),
    ("train/a 4, validation/a 2, test/a 3", "a", 4, 2),  # val is held out if test is there too
    ("train/a 4, valid/a 2, other/a 3", "a", 4, 2),
    ("train 4, val 2", "", 4, 2),
    ("train/a 30, train/b 30", "a b", 57, 3),  # not a class, since there is no other
    ("train 30, plane 30", "plane train", 57, 3),
    ("cat 20, val 20", "cat val", 38, 2),
    (". 40", "", 38, 2),
    ("a 20, b 20, . 1", "a b", 38, 2),  # an image beside class folders
    ("a 20, b 20, .thumbnails 9, c/.hidden 9", "a b", 38, 2),
    ("train/a 4, train/b 4, val/a 2, val/c 2", "a b", 8, 2),  # no image of c to train on
    ("train/a 4, train/b 4, val 2", None, 0, 0),
    ("7 20, 07 20", "07 7", 38, 2),  # an order of their own, though the numbers are equal
    ("a 38, b 1, c 1", "a b c", 38, 2),  # no class is held out as a whole
    ("a 3, . 30", None, 0, 0),
    ("train/A 4, val/a 4", None, 0, 0),  # nothing is held out of the class that is trained on
    ("data/train/a 4, data/val/a 4", None, 0, 0),
    ("a/train 4, a/val 4, b/train 4, b/val 4", None, 0, 0),
    ("n01440764 20, tench 20", "n01440764 tench", 38, 2),  # words for Imagenette's ten alone
    ("a 1", None, 0, 0),
    ("a 1, b 1", None, 0, 0),
    ("a/b 0", None, 0, 0),
]


@pytest.mark.parametrize("layout, classes, n_train, n_val", LAYOUTS)
def test_splits_and_classes_of_folders(layout, classes, n_train, n_val, tmp_path, capsys):
    for seed, part in enumerate(layout.split(", ")):
        folder, n = part.split()
        save_pictures(tmp_path / folder, int(n), seed=50 * seed)
    if classes is None:
        with pytest.raises(BadInput):
            train.load_data(str(tmp_path), 16)
        return
    data = train.load_data(str(tmp_path), 16)
    assert data.classes == (classes.split() or [""])
    assert (len(data.train), len(data.val)) == (n_train, n_val)
    assert len(data.train_labels) == n_train
    lines = train.describe(data)
    assert f"{n_train} images" in lines[0]
    if len(data.classes) > 1:
        assert len(lines) == 1 + len(data.classes)
    noted = ("other/", "c/", ". 1", "plane", "cat 20")
    if any(word in layout for word in noted):
        assert "note: " in capsys.readouterr().err


def test_linked_folders_are_followed_once_and_unreadable_ones_are_errors(tmp_path, monkeypatch):
    save_pictures(tmp_path / "all" / "cat", 10)
    save_pictures(tmp_path / "all" / "dog", 10, seed=50)
    subset = tmp_path / "subset"
    subset.mkdir()
    for name in ("cat", "dog"):
        (subset / name).symlink_to(tmp_path / "all" / name)
    (subset / "cat" / "round").symlink_to(subset)  # leads back
    data = train.load_data(str(subset), 16)
    assert data.classes == ["cat", "dog"]
    assert len(data.train) + len(data.val) == 20

    iterdir = Path.iterdir

    def refuse_dog(path):
        if path.name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse_dog)
    with pytest.raises((OSError, BadInput)):
        train.load_data(str(subset), 16)


def test_what_is_passed_over_is_named(tmp_path, capsys):
    save_pictures(tmp_path / "cat", 4, name="{}.TIF")
    save_pictures(tmp_path / "dog", 4, name="{}.gif", seed=9)
    (tmp_path / "dog" / "notes.txt").write_text("good boy")
    (tmp_path / "empty").mkdir()
    data = train.load_data(str(tmp_path), 16)
    assert data.classes == ["cat", "dog"]
    err = capsys.readouterr().err
    assert "notes.txt" in err
    assert "empty" in err


def test_one_broken_picture_in_many_is_named_and_left_out(tmp_path, capsys):
    """What is held out is the same as without it; more than 1 % are refused."""
    save_pictures(tmp_path, 150)
    before = train.load_data(str(tmp_path), 16)
    torn = tmp_path / "008.png"
    index = [i for i, x in enumerate(before.train) if np.array_equal(x, pixels_of(torn))]
    assert len(index) == 1  # it is one of the 143 to train on, and not of the 7
    torn.write_bytes(torn.read_bytes()[:50])
    after = train.load_data(str(tmp_path), 16)
    rest = [i for i in range(143) if i != index[0]]
    assert torch.equal(after.train, before.train[rest])
    assert torch.equal(after.val, before.val)
    assert "008.png" in capsys.readouterr().err
    (tmp_path / "010.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match="2 of 143"):
        train.load_data(str(tmp_path), 16)


def test_a_streamed_file_that_cannot_be_read_is_named_once_and_grey(tmp_path, capsys):
    save_pictures(tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    files[1].write_bytes(b"no picture")
    index = torch.arange(3)
    batches = train.stream_batches(files, [index, index], torch.device("cpu"), 16)
    for images in batches:
        assert (images[1] == 128).all()
        assert images[0].float().std() > 0
        assert images[2].float().std() > 0
    assert capsys.readouterr().err.count("grey") == 1


ARRAYS = [
    ("arr_0 labels", 3, ""),
    ("arr_0 arr_1", 3, ""),  # as guided-diffusion writes it
    ("images label", 3, ""),
    ("arr_0", 1, ""),
    ("x_test y_test x_train y_train", 3, "x_test, y_test"),
    ("test_images train_images train_labels", 3, "test_images"),
    ("arr_0 labels mu", 3, "mu"),
]


@pytest.mark.parametrize("names, classes, ignored", ARRAYS)
def test_arrays_with_and_without_labels(names, classes, ignored, tmp_path, capsys):
    arrays = {}
    for seed, name in enumerate(names.split()):
        n = 20 if "test" in name else 40
        rng = np.random.default_rng(seed)
        arrays[name] = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
        if "label" in name or name == "arr_1":
            arrays[name] = np.arange(n) % 3
        if name[0] == "y":
            arrays[name] = np.arange(n)[:, None] % 3  # a column, as Keras has them
        if name == "mu":
            arrays[name] = np.zeros(5)
    np.savez(tmp_path / "a.npz", **arrays)
    data = train.load_data(str(tmp_path / "a.npz"), 16)
    assert (len(data.train), len(data.val), len(data.classes)) == (38, 2, classes)
    images = arrays.get("x_train", arrays.get("train_images", next(iter(arrays.values()))))
    first = data.val[0].permute(1, 2, 0).numpy()
    [i] = [i for i in range(40) if np.array_equal(images[i], first)]
    assert data.val_labels[0] == i % classes
    assert ignored in capsys.readouterr().err


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1] * 4, [0.5] * 4, [0, 10**8, 2, 3], ["a"] * 4])
def test_labels_that_are_no_classes_are_refused(labels, tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((4, 16, 16, 3), np.uint8), labels=np.array(labels))
    with pytest.raises(BadInput):
        train.load_data(str(tmp_path / "a.npz"), 16)
    np.savez(tmp_path / "a.npz", np.zeros((4, 0, 16, 3), np.uint8))
    with pytest.raises(BadInput, match="must hold images"):
        train.load_data(str(tmp_path / "a.npz"), 16)


def test_the_digest_knows_images_classes_and_split_but_not_their_place(tmp_path):
    save_pictures(tmp_path / "one" / "cat", 20)
    save_pictures(tmp_path / "one" / "dog", 20, seed=50)
    first = train.load_data(str(tmp_path / "one"), 16).digest
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = tmp_path / "two"

    def digest():
        return train.load_data(str(two), 16).digest

    assert digest() == first
    save_pictures(two / "cat", 1, seed=99)  # another picture of the same name
    assert digest() != first
    shutil.copy(tmp_path / "one" / "cat" / "000.png", two / "cat" / "000.png")
    assert digest() == first
    (two / "cat" / "000.png").rename(two / "dog" / "100.png")
    assert digest() != first
    (two / "dog" / "100.png").unlink()
    assert digest() != first


def test_quotas_have_the_shares_of_the_counts():
    labels = train.quotas(torch.tensor([95, 5, 0, 100]), 40)
    assert torch.bincount(labels, minlength=4).tolist() == [19, 1, 0, 20]
    assert len(labels[:10].unique()) > 1  # mixed
    labels = train.quotas(torch.tensor([1, 1, 1]), 5)
    assert sorted(torch.bincount(labels, minlength=3).tolist()) == [1, 2, 2]


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_batches_are_cropped_as_asked(kind, tmp_path):
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8))
        for i in range(2)
    ]
    items = np.stack([np.array(p) for p in pictures])
    if kind == "files":
        items = [tmp_path / f"{i}.png" for i in range(2)]
        for path, picture in zip(items, pictures):
            picture.save(path)
    index = torch.tensor([1, 0])
    squares = torch.tensor([[0.5, 0.25, 0.99], [0.8, 0.0, 0.5]])
    device = torch.device("cpu")
    [found] = list(train.stream_batches(items, [index], device, 32, [squares]))
    for image, i, square in zip(found, index, squares.tolist()):
        expected = np.array(fid.crop_and_resize(pictures[i], 32, square))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def add_to_archive(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_cifar_records_are_read_in_place(tmp_path):
    """Records of file i: label i, red 10 i, green 20, blue by position. A name climbs out."""
    path = tmp_path / "cifar.tar.gz"
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate(files):
            colours = bytes([10 * i] * 1024) + bytes([20] * 1024) + bytes(range(256)) * 4
            record = bytes([i]) + colours
            add_to_archive(archive, f"cifar-10-batches-bin/{name}.bin", 2 * record)
        add_to_archive(archive, "../../escaped.txt", b"bad")
    of_train, of_val = train.list_cifar10(path)
    names = [item.name for item in of_train + of_val]
    assert names == [name for name in train.CIFAR10_CLASSES[:6] for _ in range(2)]
    assert (of_train[2].image[:, :, 0] == 10).all()
    assert (of_train[2].image[:, :, 1] == 20).all()
    assert of_val[0].image[:, :, 2].flatten().tolist() == list(range(256)) * 4
    assert list(tmp_path.iterdir()) == [path]  # nothing unpacked


def test_a_line_follows_one_that_a_crash_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    for text in ("first", "second"):
        train.append_line(path, text)
    path.write_text(path.read_text() + "cut sho")
    train.append_line(path, "last")
    assert path.read_text() == "first\nsecond\ncut sho\nlast\n"


@pytest.fixture
def imagenette(tmp_path, monkeypatch):
    """A small archive of Imagenette's layout in data/, believed to be the published one."""
    monkeypatch.chdir(tmp_path)
    path = Path("data/imagenette2-160.tgz")
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for split, n in (("train", 3), ("val", 1)):
            for k, name in enumerate(train.IMAGENETTE_CLASSES):
                content = encoded(Image.new("RGB", (40, 30), (20 * k, 0, 0)), "JPEG")
                for i in range(n):
                    add_to_archive(archive, f"imagenette2-160/{split}/{name}/{i}.JPEG", content)
    monkeypatch.setattr(train, "IMAGENETTE_ARCHIVE", published(path))
    return path


def published(path):
    return fid.Published(path.name, "https://nowhere.invalid/", fid.sha256(path))


def test_imagenette_is_unpacked_once_and_its_classes_are_words(imagenette):
    data = train.load_data("imagenette", 16)
    assert data.classes[:2] == ["tench", "English springer"]
    assert data.train.shape == (30, 3, 16, 16)
    assert data.val.shape == (10, 3, 16, 16)
    for images, labels in ((data.train, data.train_labels), (data.val, data.val_labels)):
        shade = images[:, 0].float().mean((1, 2))
        torch.testing.assert_close(shade, 20.0 * labels, atol=3, rtol=0)
    folder = Path("data/imagenette2-160/train/n01440764")
    shutil.copy(folder / "0.JPEG", folder / "3.JPEG")  # unpacking again would remove it
    assert len(train.load_data("imagenette", 16).train) == 31


@pytest.mark.parametrize("damage", ["cut short", "climbs out", "no space"])
def test_a_bad_archive_leaves_nothing_unpacked(damage, imagenette, monkeypatch):
    if damage == "cut short":
        imagenette.write_bytes(imagenette.read_bytes()[:-200])
    elif damage == "climbs out":
        with tarfile.open(imagenette, "w:gz") as archive:
            add_to_archive(archive, "imagenette2-160/train/n01440764/0.JPEG", b"picture")
            add_to_archive(archive, "../../escaped.txt", b"bad")
    else:

        def write_some(self, path, filter):
            (path / "imagenette2-160").mkdir(parents=True)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tarfile.TarFile, "extractall", write_some)
    if damage != "no space":
        with pytest.raises(BadInput, match="is not the published file"):
            train.load_data("imagenette", 16)
    monkeypatch.setattr(train, "IMAGENETTE_ARCHIVE", published(imagenette))  # as if it were
    with pytest.raises(BadInput, match="cannot unpack"):
        train.load_data("imagenette", 16)
    assert [p.name for p in Path("data").iterdir()] == [imagenette.name]
    assert not list(Path().rglob("escaped*"))


# ================================================================================================
# Part III. Commands, bad input, faults
# ================================================================================================


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """An .npz of 60 shapes. To encode the 20,000 of --data shapes is most of a tiny run's time."""
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    images, labels = train.draw_shapes(60, 16, 0)
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return path


@pytest.fixture(scope="module")
def small_flags(small_data):
    """Flags of a run of TINY on the 60 shapes."""
    return [*FLAGS, "--data", str(small_data)]


@pytest.fixture(scope="module")
def small_run(small_flags, tmp_path_factory):
    """The folder of a finished run of small_flags, with its report. Never changed: copied_run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = run_process(REPOSITORY / "train.py", *small_flags, "--out", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith(f"python sample.py {folder}")
    (folder.parent / "stderr.txt").write_text(done.stderr)
    done = run_process(REPOSITORY / "sample.py", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied_run(small_run, tmp_path):
    """A copy of small_run, in tmp_path / "run"."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


@pytest.fixture
def quick_convnet(monkeypatch):
    """Flags of a convnet teacher that is trained for 20 steps: it need not be good."""
    train_briefly = functools.partial(train.train_convnet, steps=20)
    monkeypatch.setattr(train, "train_convnet", train_briefly)
    return ["--teacher", "convnet", "--teacher_centres", 64]


def load_tokenizer(folder):
    """The tokenizer of a run of TINY, in eval mode."""
    model = GloTok(TINY).eval()
    model.load_state_dict(torch.load(folder / "tokenizer.pt", weights_only=True)["model"])
    return model


# ---- a run and its report


def test_the_first_command_in_miniature(small_run):
    """Training, then the report, each in a process of its own: every file of a run."""
    of_training = {"config.json", "teacher.pt", "tokenizer.pt", "generator.pt", "log.jsonl"}
    pictures = {"reconstructions.png", "histogram.png", "curves.png", "samples.png"}
    assert set(os.listdir(small_run)) == of_training | pictures | {"metrics.json"}
    stderr = (small_run.parent / "stderr.txt").read_text()
    assert "tokenizer step 20/20" in stderr
    assert "generator step 20/20" in stderr
    for name in pictures:
        with Image.open(small_run / name) as picture:
            assert picture.width > 200
    # what was trained on is said, once, and kept
    config = json.loads((small_run / "config.json").read_text())
    assert config["preset"] == "shapes"
    assert config["trained_on"]["counts"] == np.bincount(held_out_of(small_run)[1]).tolist()
    for line in config["trained_on"]["summary"]:
        assert stderr.count(line) == 1


def held_out_of(folder):
    """The held-out images uint8 of a run of the 60 shapes, and the labels of the other 57."""
    config, _, _ = train.load_config(folder)
    data = train.load_data(config.data, 16)
    return data.val, data.train_labels


def test_figures_of_a_run_computed_anew(small_run):
    metrics = read_metrics(small_run)
    model = load_tokenizer(small_run)
    images, _ = held_out_of(small_run)
    with torch.no_grad():
        sem, vis = model.encode(images.float() / 127.5 - 1)
        recon = ((model.decode(sem, vis).clamp(-1, 1) + 1) * 127.5).round()
        hist_kl = histogram_relation_loss(model.codebook_sem, sphere_histogram(8))
    mse = (recon - images.float()).square().mean((1, 2, 3))
    psnr = (10 * torch.log10(255**2 / mse)).mean()
    assert metrics["images"] == 3
    assert metrics["psnr"] == pytest.approx(psnr.item(), abs=0.05)
    assert metrics["usage_sem"] == pytest.approx(len(set(sem.flatten().tolist())) / 16)
    assert metrics["usage_vis"] == pytest.approx(len(set(vis.flatten().tolist())) / 24)
    assert metrics["hist_kl"] == pytest.approx(hist_kl.item(), abs=1e-4)
    assert 0 <= metrics["hist_kl_floor"] < metrics["hist_kl"] + 1e-3
    use = np.bincount(sem.flatten(), minlength=16) / sem.numel() * 16
    used = histogram_by_loops(model.codebook_sem.detach(), 40, ALPHA, use)
    teacher = sphere_histogram(8).double().numpy()
    kl = (teacher * np.log(teacher / np.maximum(used, 1e-10))).sum()
    assert metrics["hist_kl_used"] == pytest.approx(kl, abs=1e-3)
    for stage in ("", "generator_"):
        saved = torch.load(small_run / f"{stage[:-1] or 'tokenizer'}.pt", weights_only=True)
        assert metrics[f"{stage}seconds"] == pytest.approx(saved["seconds"], abs=0.06)
        speed = 20 * 8 / saved["seconds"]
        assert metrics[f"{stage}images_per_second"] == pytest.approx(speed, rel=1e-2)
        assert 0.05 < metrics[f"{stage}peak_memory_gb"] < 20
    assert (metrics["guidance"], metrics["sampling_steps"]) == (TINY.guidance, TINY.sampling_steps)


def test_samples_stand_in_the_row_of_their_class(small_run, tmp_path, monkeypatch):
    """And the class accuracy is the share of those that the teacher gives that class."""
    grids = []

    def generate_grey(model, generator, labels, config, seed):
        yield (40 * labels).byte()[:, None, None, None].expand(-1, 3, 16, 16)

    def classify(images):
        answers = images[:, 0, 0, 0].long() // 40
        answers[:24] = 5  # all of the first class and half of the second
        return answers

    monkeypatch.setattr(sample, "generate", generate_grey)
    monkeypatch.setattr(sample, "save_image_grid", lambda path, rows, title: grids.append(rows))
    trained_on = {"classes": list(train.SHAPES)}
    args = argparse.Namespace(run=small_run, seed=0, trained_on=trained_on)
    model = load_tokenizer(small_run)
    metrics = sample.report_generator(args, TINY, model, classify, torch.device("cpu"))
    assert metrics["samples_class_accuracy"] == pytest.approx(1 - 24 / 96)
    [rows] = grids
    assert len(rows) == 6
    for k, (_, images) in enumerate(rows):
        assert len(images) == 12
        assert (images == 40 * k).all()


def test_of_repeated_rows_in_the_log_the_last_counts(tmp_path):
    rows = [("tokenizer", 20, 1.0), ("tokenizer", 40, 2.0), ("tokenizer", 40, 3.0)]
    lines = [json.dumps({"stage": s, "step": k, "psnr": x}) for s, k, x in rows]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"stage": "tok']))  # cut short
    assert [row["psnr"] for row in sample.read_log(tmp_path)] == [1.0, 3.0]


# ---- schedules, optimizers


def test_batches_visit_every_image_once_an_epoch():
    steps = [train.batch_indices(10, 4, step, 0) for step in range(5)]
    first, second = torch.cat(steps).split(10)
    assert sorted(first.tolist()) == list(range(10))
    assert sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_learning_rate_warms_up_stays_and_falls_by_half_a_cosine():
    peak, end = 3e-4, 1e-5
    rates = [train.learning_rate(step, 100, peak, 10, 0.4, end) for step in range(101)]
    for step in range(10):
        assert rates[step] == pytest.approx(peak * (step + 1) / 10)
    for step in range(10, 61):
        assert rates[step] == pytest.approx(peak)
    for step in range(61, 101):
        share = (1 + math.cos(math.pi * (step - 60) / 40)) / 2
        assert rates[step] == pytest.approx(end + (peak - end) * share, abs=1e-18)
    for step in range(100):  # neither warm-up nor cosine
        assert train.learning_rate(step, 100, peak, 0, 0) == peak


def test_the_weight_of_the_adversarial_loss_grows_from_its_start():
    c = replace(TINY, image_size=16, lambda_adv=0.1, adv_start=100)
    ramp = [train.adversarial_ramp(c, step) for step in (100, 1099, 2099, 9999)]
    assert ramp == pytest.approx([1 / 2000, 0.5, 1, 1])
    assert train.adversarial_ramp(c, 99) is None
    assert train.adversarial_ramp(TINY, 9999) is None


def test_optimizers_are_as_told(small_flags, tmp_path, run_command):
    """Adam and AdamW as their checkpoints hold them; the clipped norms are those of the log."""
    flags = [
        "--tokenizer_steps",
        8,
        "--warmup",
        0,
        "--cooldown",
        0,
        "--lr",
        2e-3,
        "--disc_lr",
        5e-3,
    ]
    flags += ["--lambda_adv", 0.1, "--adv_start", 3, "--generator_steps", 4, "--gen_lr", 1e-3]
    flags += ["--gen_warmup", 0, "--gen_cooldown", 0]
    result = run_command(train, *small_flags, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    saved = torch.load(tmp_path / "run" / "tokenizer.pt", weights_only=True)
    for name, rate, steps in (("optimizer", 2e-3, 8), ("disc_optimizer", 5e-3, 5)):
        [group] = saved[name]["param_groups"]
        assert group["lr"] == pytest.approx(rate)
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0)
        assert {state["step"].item() for state in saved[name]["state"].values()} == {steps}
    saved = torch.load(tmp_path / "run" / "generator.pt", weights_only=True)
    matrices, vectors = saved["optimizer"]["param_groups"]
    assert matrices["lr"] == vectors["lr"] == pytest.approx(1e-3)
    assert matrices["betas"] == vectors["betas"] == (0.9, 0.96)  # xAR's
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.02, 0)
    dims = [p.dim() for p in XAR(TINY).parameters()]
    assert len(vectors["params"]) == dims.count(1)
    assert len(matrices["params"]) == len(dims) - dims.count(1)


def test_a_moving_average_is_made_of_weight_and_average():
    average, weight = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * a + 0.1 * w for a, w in zip(average.parameters(), weight.parameters())]
    train.update_average(average, weight, 0.9)
    for a, e in zip(average.parameters(), expected):
        torch.testing.assert_close(a, e)


def stand_in_for_a_recording(step, arguments, device):
    """As train.record: a replay has the places alone, and leaves its results where they were."""
    places = [None if a is None else torch.as_tensor(a).clone() for a in arguments]
    results = {}

    def launch():
        for name, value in step(*places).items():
            results.setdefault(name, torch.zeros(())).copy_(value)

    return places, results, launch


def test_a_recorded_step_does_what_a_plain_one_does(
    small_flags, tmp_path, run_command, monkeypatch
):
    """Numbers and batches reach it through places that stay; a second one is made with L_G."""
    monkeypatch.setattr(train, "ADV_RAMP", 16)  # with these numbers every product is exact
    flags = [*small_flags, "--lambda_adv", 0.125, "--adv_start", 9]
    assert run_command(train, *flags, "--out", tmp_path / "plain").status == 0
    recordings = []

    def record(*arguments):
        recordings.append(stand_in_for_a_recording(*arguments))
        return recordings[-1]

    monkeypatch.setattr(train, "use_graph", lambda c, device: True)
    monkeypatch.setattr(train, "on_side_stream", lambda step, arguments: step(*arguments))
    monkeypatch.setattr(train, "record", record)
    assert run_command(train, *flags, "--out", tmp_path / "recorded").status == 0
    assert len(recordings) == 3  # two of the tokenizer, one of the generator
    assert_same_weights(tmp_path / "plain", tmp_path / "recorded", "tokenizer")
    assert_close_weights(tmp_path / "plain", tmp_path / "recorded", "generator")
    assert read_rows(tmp_path / "plain") == read_rows(tmp_path / "recorded")

    monkeypatch.undo()  # what is of the device is not of the run
    again = ["--resume", "--stage", "tokenizer", "--tokenizer_steps", 24]
    for run in ("plain", "recorded"):
        (tmp_path / run / "generator.pt").unlink()
        assert run_command(train, *again, "--out", tmp_path / run).status == 0
    assert_same_weights(tmp_path / "plain", tmp_path / "recorded", "tokenizer")
    saved = torch.load(tmp_path / "recorded" / "tokenizer.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["capturable"] is False


def test_a_step_that_cannot_be_recorded_is_called(monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(train, "use_graph", lambda c, device: True)
    monkeypatch.setattr(train, "on_side_stream", lambda step, arguments: step(*arguments))
    monkeypatch.setattr(train, "record", refuse)
    step = train.recorded(lambda x: {"twice": 2 * x}, TINY, CPU)
    assert [step(torch.tensor(k))["twice"].item() for k in range(6)] == [0, 2, 4, 6, 8, 10]
    assert capsys.readouterr().err.count("no CUDA graph") == 1


def test_gradients_are_clipped_before_the_step():
    network = torch.nn.Linear(3, 2)
    network(torch.randn(5, 3)).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    old = [p.clone() for p in network.parameters()]
    norm = train.descend(network, optimizer, 1e-3)
    assert norm.item() == pytest.approx(before.item())
    step = torch.cat([(a - b).flatten() for a, b in zip(old, network.parameters())]).norm()
    assert step.item() == pytest.approx(1e-3, rel=0.02)


# ---- what the loops see


def test_half_of_the_images_are_mirrored_left_to_right():
    x = random_images(400)
    found = train.mirrored(x, TINY)
    turned = (found == x.flip(3)).flatten(1).all(1)
    assert torch.equal(turned, ~(found == x).flatten(1).all(1))
    assert turned.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.manual_seed(train.step_seed(TINY, 3))
    first = train.mirrored(x, TINY)
    torch.manual_seed(train.step_seed(TINY, 4))
    assert not torch.equal(train.mirrored(x, TINY), first)  # another half in each step
    assert torch.equal(train.mirrored(x, replace(TINY, flip=0)), x)


def test_a_short_run_reaches_its_teacher(small_flags, tmp_path, run_command):
    """A teacher of codes that the codebook can be. PSNR rises, too."""
    shift = torch.tensor([0.8] + [0.0] * 7)
    np.save(tmp_path / "teacher.npy", (torch.randn(64, 8) + shift).numpy())
    flags = [*small_flags, "--teacher", tmp_path / "teacher.npy", "--stage", "tokenizer"]
    flags += ["--codes_sem", 64, "--codes_vis", 64, "--lr", 0.01, "--tokenizer_steps", 60]
    result = run_command(train, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["hist"] < 0.01
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 0.5


def test_only_visual_codes_are_revived(small_flags, run_command, tmp_path, monkeypatch):
    """Every 5 steps, if these did not choose them, but not in the last tenth."""
    revived = []

    def revive(quantizer, images):
        revived.append((len(quantizer.weight), images))

    monkeypatch.setattr(glotok, "revive", revive)
    flags = [*small_flags, "--stage", "tokenizer", "--revive_every", 5, "--tokenizer_steps", 20]
    assert run_command(train, *flags, "--out", tmp_path / "run").status == 0
    assert revived == [(TINY.codes_vis, 5 * TINY.batch_size)] * 3  # after steps 5, 10, 15


def test_usage_is_over_a_window_of_images_whatever_is_revived():
    quantizer = Quantizer(200, 8, 0.25)
    quantizer.age.copy_(torch.arange(200) * 10)
    assert train.usage(quantizer).item() == pytest.approx(100 / 200)  # 0 to 990
    quantizer.last_features = F.normalize(torch.randn(50, 8), dim=1)
    train.revive(quantizer, TINY)
    assert train.usage(quantizer).item() == pytest.approx(100 / 200)


def test_every_loss_trains(small_flags, quick_convnet, lpips_file, tmp_path, run_command):
    off = ["--lambda_hist", 0, "--lambda_res", 0, "--semantic", "fqgan", "--image_size", 32]
    on = ["--lambda_perceptual", 0.1, "--lpips", lpips_file, "--lambda_adv", 0.5, "--adv_start", 3]
    flags = [*small_flags, *quick_convnet, *off, *on, "--stage", "tokenizer"]
    result = run_command(train, *flags, "--tokenizer_steps", 6, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    [row] = read_rows(tmp_path / "run")
    assert {"perceptual", "adv", "disc", "disc_grad_norm"} <= row.keys()
    assert row["perceptual"] != 0
    # An untrained head knows nothing of the images: each of 8 is as likely as another.
    assert row["contrastive"] == pytest.approx(math.log(8), abs=0.5)
    assert "hist" not in row


def test_the_moving_average_is_what_samples(small_flags, tmp_path, run_command):
    out = tmp_path / "run"
    steps = ["--tokenizer_steps", 1, "--generator_steps", 1]
    assert run_command(train, *small_flags, *steps, "--out", out).status == 0
    config, _, _ = train.load_config(out)
    torch.manual_seed(config.seed)
    before = XAR(config)
    saved = torch.load(out / "generator.pt", weights_only=True)
    network = sample.load_generator(out, train.load_run(out))
    moved = 0
    for name, weight in before.named_parameters():
        after = saved["model"][name]
        moved += (after != weight).sum()
        expected = weight + (1 - 1 / 10) * (after - weight)  # the first step's decay is 1 / 10
        torch.testing.assert_close(saved["ema_model"][name], expected, atol=1e-7, rtol=1e-6)
        assert torch.equal(network.get_parameter(name), saved["ema_model"][name])
        assert not saved["ema_model"][name].requires_grad
    assert moved > 0


def fake_encoding(monkeypatch, tokens):
    """What train.py takes for the training set's tokens; mirrored ones have the visual code 0."""

    def encode(run, model, mirror=False):
        return tokens * torch.tensor([1, int(not mirror)]).view(1, 2, 1, 1).int()

    monkeypatch.setattr(train, "encode_training_set", encode)


def generator_run(folder, config, labels):
    data = train.Data(labels, labels, labels, labels, ["a"], "digest", "val/")
    return train.Run(config, config, folder, "shapes", data, {}, CPU)


def test_the_latents_deviation_is_that_of_the_whole_training_set(tmp_path, monkeypatch):
    """The first 7,000 images of 8,000 are all alike, as in sorted data."""
    config = replace(TINY, flip=0, generator_steps=1)
    tokens = torch.zeros(8000, 2, 8, 8, dtype=torch.int32)
    tokens[7000:] = torch.randint(16, (1000, 2, 8, 8))
    fake_encoding(monkeypatch, tokens)
    model = GloTok(config)
    for quantizer in (model.quantizer_sem, model.quantizer_vis):
        quantizer.weight.data[0] = 1  # all its components are equal
    run = generator_run(tmp_path / "run", config, torch.zeros(8000, dtype=torch.int64))
    train.train_generator(run, model)
    sem = model.codebook_sem.detach().double().numpy()[tokens[:, 0]]
    vis = model.codebook_vis.detach().double().numpy()[tokens[:, 1]]
    expected = np.concatenate([sem, vis], axis=-1).std()
    saved = torch.load(tmp_path / "run" / "generator.pt", weights_only=True)
    for network in ("model", "ema_model"):
        assert saved[network]["latent_std"].item() == pytest.approx(expected, rel=1e-2)
    assert expected > 0.1  # and of the first 1,000 it is 0


def test_mirrored_images_are_encoded_mirrored():
    model = GloTok(TINY).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    index = torch.arange(3)
    device = torch.device("cpu")
    found = train.encode_all(model, images, index, device, mirror=True)
    expected = train.encode_all(model, images.flip(3), index, device)
    assert torch.equal(found, expected)
    assert not torch.equal(found, train.encode_all(model, images, index, device))


def test_random_crops_differ_by_image_and_step_and_tell_nothing_of_mirroring():
    c = replace(TINY, crop=0.8, batch_size=2000)
    crops = train.random_crops(c, 3)
    share, x, y = crops.T
    assert 0.8 <= share.min() < 0.81
    assert 0.99 < share.max() <= 1
    for place in (x, y):
        assert 0 <= place.min() < 0.01
        assert 0.99 < place.max() <= 1
    torch.manual_seed(train.step_seed(c, 3))
    mirror = torch.rand(c.batch_size)
    for of_image in (share, x, y, crops.flatten()[: c.batch_size]):
        assert abs(torch.corrcoef(torch.stack([of_image, mirror]))[0, 1]) < 0.1
    assert torch.equal(train.random_crops(c, 3), crops)  # a function of the step
    assert not torch.equal(train.random_crops(c, 4), crops)


def test_training_on_crops_of_files_resumes(tmp_path, run_command):
    for k in range(2):
        save_pictures(tmp_path / "data" / f"class{k}", 10, size=40, seed=k)
    flags = [*FLAGS, "--data", tmp_path / "data", "--stage", "tokenizer", "--crop", 0.6]
    flags += ["--cooldown", 0]
    whole = tmp_path / "whole"
    halves = tmp_path / "halves"
    result = run_command(train, *flags, "--tokenizer_steps", 8, "--out", whole)
    assert result.status == 0, result.err
    assert run_command(train, *flags, "--tokenizer_steps", 3, "--out", halves).status == 0
    resumed = ["--resume", "--tokenizer_steps", 8, "--stage", "tokenizer", "--out", halves]
    assert run_command(train, *resumed).status == 0
    assert_same_weights(whole, halves, "tokenizer")


def test_images_found_unreadable_in_training_are_few_or_an_error(tmp_path, run_command):
    """With crops they are decoded in training; before, none is looked at."""
    folder = tmp_path / "data"
    save_pictures(folder / "train" / "a", 20)
    save_pictures(folder / "train" / "a", 10, name="{:03d}.bad.png")
    for path in (folder / "train" / "a").glob("*.bad.png"):
        path.write_bytes(b"no picture")
    save_pictures(folder / "val" / "a", 4, seed=50)
    flags = [*FLAGS, "--teacher", "sphere", "--data", folder, "--crop", 0.6]
    flags += ["--stage", "tokenizer", "--tokenizer_steps", 8, "--out", tmp_path / "run"]
    result = run_command(train, *flags)
    assert_refused(result, "train.py")
    assert "of 30 images cannot be read" in result.err
    assert not (tmp_path / "run" / "tokenizer.pt").exists()


# ---- micro-batches and processes

# Without what looks at a micro-batch as a whole or draws for itself.
DIVISIBLE = ["--flip", 0, "--lambda_coverage", 0, "--revive_every", 0, "--precision", "float32"]


def assert_close_weights(folder, other, stage="tokenizer"):
    a = tensors_in(folder / f"{stage}.pt")
    b = tensors_in(other / f"{stage}.pt")
    for name, tensor in a.items():
        if name.startswith(("model", "ema_model")) and not name.endswith("age"):
            torch.testing.assert_close(tensor, b[name], atol=5e-4, rtol=1e-3)


def run_two_processes(*words, cwd):
    """train.py as torchrun starts it, twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        command = [sys.executable, REPOSITORY / "train.py", *words]
        command = [str(word) for word in command]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, stderr=pipe, text=True, cwd=cwd, env=environment)
        )
    for process in processes:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err


def test_micro_batches_and_processes_make_the_step_of_the_whole(small_flags, tmp_path, run_command):
    """And two processes that stop and go on end in the same weights, bit for bit."""
    flags = [*small_flags, *DIVISIBLE, "--lr", 1e-3, "--cooldown", 0, "--gen_cooldown", 0]
    short = [*flags, "--tokenizer_steps", 4, "--stage", "tokenizer"]
    assert run_command(train, *short, "--out", tmp_path / "whole").status == 0
    assert run_command(train, *short, "--accumulate", 4, "--out", tmp_path / "parts").status == 0
    assert_close_weights(tmp_path / "whole", tmp_path / "parts")

    steps = ["--tokenizer_steps", 4, "--generator_steps", 6]
    run_two_processes(*flags, *steps, "--out", "two", cwd=tmp_path)
    assert_close_weights(tmp_path / "whole", tmp_path / "two")
    [row] = read_rows(tmp_path / "whole")
    for other in ("parts", "two"):
        for name in ("psnr", "recon", "grad_norm"):
            assert read_rows(tmp_path / other)[0][name] == pytest.approx(row[name], rel=2e-3)

    steps = ["--tokenizer_steps", 2, "--generator_steps", 6, "--stage", "tokenizer"]
    run_two_processes(*flags, *steps, "--out", "again", cwd=tmp_path)
    run_two_processes("--resume", "--tokenizer_steps", 4, "--out", "again", cwd=tmp_path)
    for stage in ("tokenizer", "generator"):
        assert_same_weights(tmp_path / "two", tmp_path / "again", stage)


# ---- stopping and resuming


def with_signal(function, at, number=signal.SIGTERM):
    """`function`, but its call number `at` first sends this process a signal. Counts its calls."""

    def counted(*args):
        counted.calls += 1
        if counted.calls == at:
            os.kill(os.getpid(), number)
        return function(*args)

    counted.calls = 0
    return counted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_anywhere_a_run_resumes_to_the_same_weights(
    number, small_run, small_flags, tmp_path, monkeypatch, run_command
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "to_float", with_signal(train.to_float, 8, number))
        assert run_command(train, *small_flags, "--out", folder).status == 130
    # The step was completed first.
    assert torch.load(folder / "tokenizer.pt", weights_only=True)["step"] == 8

    # An unfinished tokenizer is finished before the generator.
    with monkeypatch.context() as patch:
        patch.setattr(XAR, "loss", with_signal(XAR.loss, 12, number))
        flags = ["--resume", "--stage", "generator", "--out", folder]
        assert run_command(train, *flags).status == 130
    assert torch.load(folder / "generator.pt", weights_only=True)["step"] == 12
    assert run_command(train, *flags).status == 0
    assert_same_weights(folder, small_run, "tokenizer")
    assert_same_weights(folder, small_run, "generator")


def test_killed_a_run_resumes_to_the_same_weights(small_flags, small_run, tmp_path):
    """kill -9, as soon as there is a checkpoint."""
    words = [sys.executable, REPOSITORY / "train.py", *small_flags, "--out", tmp_path / "run"]
    with subprocess.Popen([str(w) for w in words], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "run" / "tokenizer.pt").exists():
            time.sleep(0.001)
        process.kill()
    done = run_process(REPOSITORY / "train.py", "--resume", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for stage in ("tokenizer", "generator"):
        assert_same_weights(tmp_path / "run", small_run, stage)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_loss_of_nan_ends_training_and_leaves_the_last_good_checkpoint(
    small_flags, run_command, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    good = ["--tokenizer_steps", 4, "--stage", "tokenizer", "--save_every", 2, "--out", out]
    assert run_command(train, *small_flags, *good).status == 0
    before = (out / "tokenizer.pt").read_bytes()
    monkeypatch.setattr(glotok, "kl_divergence", lambda p, q: math.nan * q.sum())
    resume = ["--resume", "--stage", "tokenizer", "--tokenizer_steps", 9, "--out", out]
    assert_refused(run_command(train, *resume), "train.py")
    assert (out / "tokenizer.pt").read_bytes() == before


def test_what_resume_may_change_and_what_it_says(copied_run, run_command):
    words = ["--resume", "--out", copied_run, "--stage", "tokenizer"]
    (copied_run / "generator.pt").unlink()
    # settings of a generator that does not exist yet are free, and so are losses and rates
    changes = ["--gen_width", 32, "--lr", 1e-4, "--lambda_adv", 0.1, "--adv_start", 0]
    result = run_command(train, *words, *changes, "--tokenizer_steps", 23)
    assert result.status == 0, result.err
    for name in ("gen_width 16 -> 32", "lr 0.003 -> 0.0001", "tokenizer_steps 20 -> 23"):
        assert name in result.err
    assert "learning rate" in result.err
    saved = torch.load(copied_run / "tokenizer.pt", weights_only=True)
    assert saved["step"] == 23
    assert "disc" in saved  # a checkpoint without a discriminator starts one
    config = json.loads((copied_run / "config.json").read_text())
    assert (config["lr"], config["tokenizer_steps"]) == (1e-4, 23)


REFUSED_TO_RESUME = [
    "--tokenizer_steps 19",
    "--tokenizer_steps 21",  # the generator would lose its tokenizer
    "--generator_steps 19",
    "--codes_sem 17",
    "--lambda_res 0",
    "--gen_width 32",
    "--preset shapes",
    "--image_size 24 --cell 3",
    "--lambda_hist 0",  # of a tokenizer that is finished: nothing would be trained by it
    "--semantic none --lr 0.5",
    "--bins 20",  # the teacher would be another
]


@pytest.mark.parametrize("words", REFUSED_TO_RESUME)
def test_what_the_weights_do_not_allow_is_refused(words, copied_run, run_command):
    before = read_files(copied_run)
    result = run_command(train, "--resume", "--out", copied_run, *words.split())
    assert_refused(result, "train.py")
    assert read_files(copied_run) == before


def test_a_run_is_not_overwritten(small_run, small_flags, run_command, tmp_path):
    before = read_files(small_run)
    assert_refused(run_command(train, *small_flags, "--out", small_run), "train.py")
    assert read_files(small_run) == before
    shutil.copy(small_run / "tokenizer.pt", tmp_path)  # a checkpoint without its settings
    assert_refused(run_command(train, *small_flags, "--out", tmp_path), "train.py")


def test_images_may_move_but_not_change(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(Path("data/a"), 20)
    save_pictures(Path("data/b"), 20, seed=50)
    flags = ["--stage", "tokenizer", "--tokenizer_steps", 2, "--out", "run"]
    assert run_command(train, *FLAGS, *flags, "--data", "data").status == 0
    Path("data").rename("elsewhere")
    resume = ["--resume", "--stage", "tokenizer", "--out", "run", "--data", "elsewhere"]
    assert run_command(train, *resume, "--tokenizer_steps", 3).status == 0
    words = ["run", "--reconstruct", "elsewhere", "--out", "x.png", "--force"]
    result = run_command(sample, *words)
    assert "not those of the run" not in result.err
    save_pictures(Path("elsewhere/a"), 1, seed=99)  # another picture of the same name
    before = read_files(Path("run"))
    result = run_command(train, *resume, "--tokenizer_steps", 4)
    assert_refused(result, "train.py")
    assert "as many of each class, but not the same" in result.err
    assert read_files(Path("run")) == before
    result = run_command(sample, *words)
    assert result.status == 0
    assert "not those of the run" in result.err


def test_a_generator_of_another_tokenizer_is_refused(copied_run, run_command, tmp_path):
    aside = (copied_run / "generator.pt").rename(tmp_path / "generator.pt")
    longer = ["--resume", "--stage", "tokenizer", "--tokenizer_steps", 30, "--out", copied_run]
    assert run_command(train, *longer).status == 0
    aside.rename(copied_run / "generator.pt")
    out = ["--n", 2, "--out", tmp_path / "x.png"]
    assert_refused(run_command(sample, copied_run, *out), "sample.py")
    assert_refused(run_command(train, "--resume", "--out", copied_run), "train.py")
    (copied_run / "tokenizer.pt").unlink()
    before = read_files(copied_run)
    assert_refused(run_command(train, "--resume", "--out", copied_run), "train.py")
    assert read_files(copied_run) == before


@pytest.mark.parametrize("script, words", [(train, ["--out", ""]), (sample, [""])])
def test_an_empty_folder_is_no_folder(script, words, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_command(script, *words), f"{script.__name__}.py")
    assert not list(tmp_path.iterdir())


# runs the script that follows, which can write no file of more than 100,000 bytes
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_leaves_the_last_checkpoint(copied_run):
    (copied_run / "generator.pt").unlink()
    before = (copied_run / "tokenizer.pt").read_bytes()
    assert len(before) > 100_000
    flags = ["--resume", "--tokenizer_steps", 40, "--stage", "tokenizer", "--out", copied_run]
    done = run_process("-c", LIMITED, REPOSITORY / "train.py", *flags, cwd=REPOSITORY)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (copied_run / "tokenizer.pt").read_bytes() == before
    assert not list(copied_run.glob(".*"))


# ---- teachers


def test_convnet_teacher_learns_the_shapes_and_is_kept(tmp_path, monkeypatch, run_command):
    images, labels = train.draw_shapes(600, 16, 0)
    np.savez(tmp_path / "s.npz", images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    folder = tmp_path / "run"
    flags = [*FLAGS, "--teacher", "convnet", "--teacher_centres", 64, "--stage", "tokenizer"]
    flags += ["--data", tmp_path / "s.npz", "--tokenizer_steps", 5, "--out", folder]
    assert run_command(train, *flags).status == 0
    teacher = torch.load(folder / "teacher.pt", weights_only=True)
    assert teacher["histogram"].sum().item() == pytest.approx(1, abs=1e-5)
    net = train.load_convnet(teacher, torch.device("cpu"))
    images, labels = train.draw_shapes(500, 16, 1)
    right = net(images.float() / 127.5 - 1).argmax(1) == labels
    assert right.float().mean() > 0.4  # 16 pixels, 570 pictures; chance is 0.17

    monkeypatch.setattr(train, "make_teacher", None)  # resuming must not need it
    flags = ["--resume", "--tokenizer_steps", 6, "--stage", "tokenizer"]
    assert run_command(train, *flags, "--out", folder).status == 0


def test_a_file_or_a_run_as_teacher(small_run, tmp_path, capsys):
    """Vectors are clustered only if there are more than teacher_centres; codes never."""
    vectors = torch.randn(40, 6)
    np.savez(tmp_path / "v.npz", vectors.double().numpy())
    device = torch.device("cpu")

    def histogram(teacher, centres):
        c = replace(TINY, teacher=str(teacher), teacher_centres=centres)
        torch.manual_seed(4)
        return train.make_teacher(c, None, device)["histogram"]

    expected = relation_histogram_direct(vectors.double())
    np.testing.assert_allclose(histogram(tmp_path / "v.npz", 40), expected, atol=1e-4)
    assert "as they are" in capsys.readouterr().err
    torch.manual_seed(4)
    expected = relation_histogram_direct(kmeans(vectors, 10))
    np.testing.assert_allclose(histogram(tmp_path / "v.npz", 10), expected, atol=1e-4)
    assert "clustering 40 vectors" in capsys.readouterr().err
    codes = load_tokenizer(small_run).codebook_sem.detach()
    expected = relation_histogram_direct(codes.double())
    np.testing.assert_allclose(histogram(small_run, 4), expected, atol=1e-4)


def numbered_images(n):
    """Data of n training images (16x16), image i all of colour (i // 256, i % 256, 0)."""
    pixels = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0] = (torch.arange(n) // 256).view(n, 1, 1).byte()
    pixels[:, 1] = (torch.arange(n) % 256).view(n, 1, 1).byte()
    return argparse.Namespace(train=pixels, train_labels=torch.arange(n) * 3 // n)


def numbered_features(x):
    """A teacher network whose features (B, 2, 4, 4) are the image's number and the patch's."""
    images = ((x[:, :2, 0, 0] + 1) * 127.5).round()
    number = (images[:, 0] * 256 + images[:, 1]).view(-1, 1).expand(-1, 16)
    maps = torch.stack([number, torch.arange(16.0).expand(len(x), 16)], dim=1)
    return None, maps.unflatten(2, (4, 4))


@pytest.mark.parametrize("centres, patches", [(12, 1), (36, 3)])
def test_every_training_image_gives_the_teacher_vectors(centres, patches):
    c = replace(TINY, teacher_centres=centres)
    data = numbered_images(300)
    found, labels = train.training_features(c, data, numbered_features, torch.device("cpu"))
    assert labels is None
    number, patch = found.T
    seen, count = number.unique(return_counts=True)
    assert len(seen) == 300
    assert (count == patches).all()
    assert len(found.unique(dim=0)) == 300 * patches  # an image's patches are different ones
    assert len(patch.unique()) == 16  # and any may be chosen


def test_vqgan_lcs_features_are_the_means_of_images():
    c = replace(TINY, teacher_centres=12, teacher_by_class=1)
    data = numbered_images(300)
    found, labels = train.training_features(c, data, numbered_features, torch.device("cpu"))
    assert torch.equal(labels, (found[:, 0] * 3 / 300).floor().long())
    torch.testing.assert_close(found[:, 1], torch.full((300,), 7.5))  # the patches' mean


def test_feature_networks_give_a_vector_and_maps(monkeypatch):
    convnet = glotok.ConvNet(3).eval()
    teacher = {"convnet": convnet.state_dict(), "classes": 3}
    device = torch.device("cpu")
    x = random_images()
    vectors, maps = train.feature_network("convnet", teacher, device)(x)
    expected = convnet.features(x).detach()
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(vectors, expected.mean((2, 3)))
    assert not maps.requires_grad

    small = DINOv2(depth=1)
    monkeypatch.setattr(glotok, "DINOv2", lambda: small)
    monkeypatch.setattr(fid, "fetch", lambda published: published.name)
    monkeypatch.setattr(fid, "load_weights", lambda path, net: None)
    vectors, maps = train.feature_network("dinov2", {}, device)(x)
    resized = F.interpolate((x + 1) / 2, (224, 224), mode="bicubic", antialias=True)
    tokens = small(resized.clamp(0, 1)).detach()
    torch.testing.assert_close(vectors, tokens[:, 0], atol=1e-5, rtol=1e-4)
    place = tokens[:, 1 + 16 * 3 + 5]
    torch.testing.assert_close(maps[:, :, 3, 5], place, atol=1e-5, rtol=1e-4)
    assert not maps.requires_grad


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """A file of LPIPS with random weights, in float16."""
    path = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save({name: x.half() for name, x in LPIPS().state_dict().items()}, path)
    return path


def test_the_two_published_files_of_lpips_are_loaded(lpips_file, tmp_path, monkeypatch):
    """torchvision's VGG16, of which the classifier is left out, and the heads."""
    saved = torch.load(lpips_file, weights_only=True)
    vgg = {k: v for k, v in saved.items() if k.startswith("features")}
    torch.save(vgg | {"classifier.6.bias": torch.ones(2)}, tmp_path / "vgg16-397923af.pth")
    torch.save({k: v for k, v in saved.items() if k.startswith("lin")}, tmp_path / "vgg.pth")
    monkeypatch.setattr(fid, "fetch", lambda published: tmp_path / published.name)
    for name, x in train.load_lpips(None, CPU).state_dict().items():
        assert torch.equal(x, saved[name].float()), name


# ---- precision


@pytest.mark.parametrize("switch", ["older", "newer"])
def test_full_precision_whatever_is_set_outside(switch):
    """A process of its own: torch refuses to read the one kind of switch once both were used."""
    code = f"""
        import torch
        import glotok
        if {switch!r} == "older":
            torch.set_float32_matmul_precision("medium")
        elif hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        a, b = torch.randn(2, 64, 64)
        exact = (a.double() @ b.double()).float()
        with torch.autocast("cpu", torch.bfloat16):
            with glotok.full_precision(a.device):
                assert (a @ b - exact).abs().max() < 1e-4
            assert (a @ b - exact).abs().max() > 1e-2
            z, codes = torch.nn.functional.normalize(torch.randn(2, 300, 8), dim=2)
            nearest = (z.double() @ codes.double().T).argmax(1)
            assert torch.equal(glotok.nearest(z, codes), nearest)
        if {switch!r} == "older":
            assert torch.get_float32_matmul_precision() == "medium"
        elif hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    """
    done = run_process("-c", textwrap.dedent(code), cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


# ---- sample.py


def test_samples_depend_on_the_seed_alone(small_run, run_command, tmp_path):
    arrays = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        options = ["--n", 25, "--classes", 4, 1, 1, "--steps", 1, "--seed", seed, "--out", path]
        assert run_command(sample, small_run, *options).status == 0
        arrays[name] = np.load(path)
    assert arrays["a"].files == ["arr_0", "labels"]
    assert arrays["a"]["arr_0"].shape == (25, 16, 16, 3)
    assert arrays["a"]["arr_0"].dtype == np.uint8
    assert arrays["a"]["labels"].tolist() == [4, 1, 1] * 8 + [4]
    assert (arrays["a"]["arr_0"] == arrays["b"]["arr_0"]).all()
    assert (arrays["a"]["arr_0"] != arrays["c"]["arr_0"]).any()


def test_samples_without_classes_have_the_shares_of_the_training_data(
    copied_run, run_command, tmp_path
):
    config = json.loads((copied_run / "config.json").read_text())
    config["trained_on"]["counts"] = [50, 30, 10, 5, 5, 0]
    (copied_run / "config.json").write_text(json.dumps(config))
    path = tmp_path / "x.npz"
    result = run_command(sample, copied_run, "--n", 20, "--steps", 1, "--out", path)
    assert result.status == 0, result.err
    labels = np.load(path)["labels"]
    assert np.bincount(labels, minlength=6).tolist() == [10, 6, 2, 1, 1, 0]


def test_classes_go_by_name_or_number():
    names = ["cat", "dog", "10", "3"]
    words = ["dog", "10", "0", "3"]
    assert [sample.class_number(word, names) for word in words] == [1, 2, 0, 3]
    for word in ("4", "-1", "mouse", "1.0"):
        with pytest.raises(BadInput):
            sample.class_number(word, names)


@torch.no_grad()
def test_retain_keeps_what_it_says(monkeypatch):
    model = random_residuals(GloTok(TINY)).eval()
    x = random_images(5)
    tokens = torch.stack(model.encode(x), dim=1)
    codes_sem = model.codebook_sem[tokens[:, 0].flatten(1)]
    codes_vis = model.codebook_vis[tokens[:, 1].flatten(1)]
    sem = codes_sem + model.residual_sem(codes_sem)  # (12)
    vis = codes_vis + model.residual_vis(codes_vis)  # (11)

    labels = []
    decoded = []

    def save_image_grid(path, rows, title):
        labels.extend(label.split(":")[0] for label, _ in rows)

    def decode_latents(sem, vis):
        decoded.append((sem, vis))
        return x

    monkeypatch.setattr(sample, "save_image_grid", save_image_grid)
    monkeypatch.setattr(model, "decode_latents", decode_latents)
    sample.retain("x.png", model, train.to_uint8(x), tokens)

    with_sem = [0, 25, 50, 75, 100]  # per cent of the visual latents
    alone = [25, 50, 75, 100]
    expected = [f"semantic + {share} % visual" for share in with_sem]
    expected += [f"{share} % visual alone" for share in alone]
    assert labels == ["original", *expected]

    cases = [(1, share) for share in with_sem] + [(0, share) for share in alone]
    assert len(decoded) == len(cases)
    positions = {}
    for (keeps_sem, share), (sem_part, vis_part) in zip(cases, decoded):
        assert torch.equal(sem_part, keeps_sem * sem)
        whole = (vis_part == vis).all(2)
        empty = (vis_part == 0).all(2)
        assert (whole | empty).all()
        assert (whole.sum(1) == share * 64 // 100).all()  # 64 positions
        assert torch.equal(positions.setdefault(share, whole), whole)  # the same in both rows
    for less, more in zip(with_sem, with_sem[1:]):
        assert (positions[more] | ~positions[less]).all()  # each share holds the smaller ones


@pytest.mark.parametrize("flag", ["--reconstruct", "--retain", "--uniformity"])
def test_sample_shows_held_out_images(flag, small_run, run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "UNIFORMITY_RUNS", 2)
    shown = {
        "--reconstruct": "PSNR",
        "--retain": "held-out images",
        "--uniformity": "density_cv",
    }
    images, labels = train.draw_shapes(400, 16, 3)
    np.savez(tmp_path / "x.npz", images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    words = [flag, tmp_path / "x.npz", "--out", tmp_path / "x.png"]
    result = run_command(sample, small_run, *words)
    assert result.status == 0, result.err
    assert shown[flag] in result.out
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 200


# ---- bad input: each line ends with exit status 2 and one line, and nothing is written


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, small_run):
    """The folder that is called BAD in the tables below. Code in two files would make a folder."""
    folder = tmp_path_factory.mktemp("bad")
    hostile = RunsCode(str(folder / "code ran"))
    save_pictures(folder / "flat", 4)
    x = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(folder / "good.npz", x)
    np.savez(folder / "floats.npz", x.astype(float))
    np.save(folder / "nan.npy", np.full((4, 3), np.nan, np.float32))
    np.save(folder / "zero.npy", np.zeros((4, 3), np.float32))
    np.save(folder / "one.npy", np.ones((1, 3), np.float32))
    np.save(folder / "cube.npy", np.ones((4, 3, 2), np.float32))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.savez(folder / "two.npz", np.ones((4, 3)), np.ones((5, 3)))
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    (folder / "code.npy").write_bytes(pickle.dumps(hostile))
    torch.save(hostile, folder / "code.pth")
    torch.save({"a": torch.ones(3)}, folder / "other.pth")
    (folder / "text.pth").write_text("hello")
    bare = Path(shutil.copytree(small_run, folder / "bare"))
    (bare / "generator.pt").unlink()
    return folder


BAD_TRAIN_WORDS = [
    "--preset cifar",
    "--lambda_hits 1",
    "--lambda_hist abc",
    "--batch_size 1.5",
    "--stage all-of-it",
    "--stage generator",
    "--resume",
    "--lambda_hist nan",
    "--lambda_hist -1",
    "--tokenizer_steps 0",
    "--image_size 31",
    "--width 15",
    "--cell 3",
    "--lambda_adv 0.1 --image_size 10 --cell 1",
    "--lambda_perceptual 1 --image_size 8 --cell 2",
    "--gen_width 20",
    "--semantic nearby",
    "--semantic fqgan --teacher sphere",
    "--semantic vavae --teacher convnet --codes_sem 1",
    "--semantic fqgan --teacher convnet --accumulate 8",
    "--gen_lr 1e-4 --gen_lr_end 2e-4",
    "--label_dropout 0 --guidance 2",
    "--precision half",
    "--batch_size 10 --accumulate 4",
    "--gen_batch 10 --accumulate 4",
    "--data nowhere",
    "--data BAD/floats.npz",
    "--data BAD/flat --teacher convnet",  # one class
    "--teacher nobody",
    "--teacher BAD/nan.npy",
    "--teacher BAD/zero.npy",
    "--teacher BAD/one.npy",
    "--teacher BAD/cube.npy",
    "--teacher BAD/words.npy",
    "--teacher BAD/two.npz",
    "--teacher BAD/objects.npy",
    "--teacher BAD/code.npy",
    "--teacher BAD/flat",  # a folder, but no run
    "--lambda_perceptual 1 --lpips BAD/code.pth",
    "--lambda_perceptual 1 --lpips BAD/other.pth",
    "--lambda_perceptual 1 --lpips gone.pth",
    "--out BAD/text.pth/run",
    "--out /proc/run",
]


@pytest.mark.parametrize("words", BAD_TRAIN_WORDS)
def test_train_refuses_bad_input(words, bad_files, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words.replace("BAD", str(bad_files)).split()
    good = [*FLAGS, "--data", bad_files / "good.npz", "--out", "run"]
    assert_refused(run_command(train, *good, *words), "train.py")
    assert not (bad_files / "code ran").exists()
    assert os.listdir() == []  # nothing was begun


BAD_SAMPLE_WORDS = [
    "nowhere",
    "RUN --gidance 2",
    "BARE --n 4",
    "RUN --retain shapes --uniformity shapes",
    "RUN --retain shapes --out x.npz",
    "RUN --out x.jpg",
    "RUN --n 0",
    "RUN --n 10001",
    "RUN --n 100000000000000000000 --out x.npz",
    "RUN --n x",
    "RUN --seed -1",
    "RUN --seed 2147483648",
    "RUN --out old.png",
    "RUN --out RUN/samples.png --force",
    "RUN --retain shapes --steps 3",
    "RUN --reconstruct shapes --classes 0",
    "RUN --reconstruct shapes --weights gone.pth",
    "RUN --reconstruct shapes --weights BAD/code.pth",
    "RUN --retain nowhere",
    "RUN --uniformity BAD/good.npz",
    "RUN --n 4 --steps 0",
    "RUN --n 4 --guidance -1",
    "RUN --n 4 --guidance nan",
    "RUN --classes 6",
    "RUN --classes -1",
    "RUN --classes mouse",
]


@pytest.mark.parametrize("words", BAD_SAMPLE_WORDS)
def test_sample_refuses_bad_input(words, small_run, bad_files, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.png").write_text("precious")
    before = read_files(small_run)
    words = words.replace("RUN", str(small_run)).replace("BARE", str(bad_files / "bare"))
    result = run_command(sample, *words.replace("BAD", str(bad_files)).split())
    assert_refused(result, "sample.py")
    assert read_files(small_run) == before
    assert not (bad_files / "code ran").exists()
    assert os.listdir() == ["old.png"]
    assert Path("old.png").read_text() == "precious"


BAD_CONFIGS = ["{", "[1]", {"channels": 16}, {"channels": "eight"}, {"channels": -3}]
BAD_CONFIGS += [{"channel_mult": []}, {"channel_mult": [1.5]}, {"colour": 3}, {"trained_on": 0}]


@pytest.mark.parametrize("damage", BAD_CONFIGS)
def test_a_damaged_config_is_refused(damage, copied_run, run_command):
    path = copied_run / "config.json"
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_text()) | damage)
    path.write_text(damage)
    assert_damaged_run_is_refused(run_command, copied_run)


@pytest.mark.parametrize("damage", ["NaN", "missing", "no dict", "code", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_refused(damage, copied_run, run_command):
    path = copied_run / "tokenizer.pt"
    saved = torch.load(path, weights_only=True)
    if damage == "NaN":
        saved["model"]["decoder.0.weight"][0, 0] = math.nan
    elif damage == "missing":
        del saved["model"]["decoder.0.weight"]
    elif damage == "no dict":
        saved = torch.ones(3)
    elif damage == "code":
        saved = RunsCode(str(copied_run / "code ran"))
    torch.save(saved, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gone":
        path.unlink()
        assert_refused(run_command(sample, copied_run), "sample.py")
        return
    assert_damaged_run_is_refused(run_command, copied_run)
    assert not (copied_run / "code ran").exists()


def assert_damaged_run_is_refused(run_command, run):
    before = read_files(run)
    result = run_command(sample, run, "--n", 1, "--out", run.parent / "x.png")
    assert_refused(result, "sample.py")
    assert not (run.parent / "x.png").exists()
    assert_refused(run_command(train, "--resume", "--out", run), "train.py")
    assert read_files(run) == before


@pytest.mark.parametrize(
    "words",
    ["--data cifar10", "--data imagenette", "--teacher dinov2", "--lambda_perceptual 1"],
)
def test_without_network_and_with_a_hostile_file_in_the_place_of_a_download(
    words, small_flags, run_command, tmp_path, monkeypatch
):
    """One line that names the file and its SHA-256; the file there is not read before that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def no_network(*_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    published = {
        "--data cifar10": (train.CIFAR10_ARCHIVE, "data"),
        "--data imagenette": (train.IMAGENETTE_ARCHIVE, "data"),
        "--teacher dinov2": (train.DINOV2, None),
        "--lambda_perceptual 1": (train.VGG16, None),
    }
    file, folder = published[words]
    command = [*small_flags, "--out", "run", *words.split()]
    result = run_command(train, *command)
    assert_refused(result, "train.py")
    assert file.sha256 in result.err.splitlines()[-1]
    path = fid.cache_path(file.name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(RunsCode("code ran")))
    assert_refused(run_command(train, *command), "train.py")
    assert not Path("code ran").exists()
    assert not Path("run").exists()


def test_every_number_among_the_settings_has_a_range():
    for f in fields(Config):
        if isinstance(f.default, str):
            continue
        low, high = f.metadata["low"], f.metadata["high"]
        kind = type(f.default[0]) if isinstance(f.default, tuple) else type(f.default)
        assert math.isfinite(low) and math.isfinite(high)
        for bad in (kind(low - 1), kind(high * 2 + 1), math.nan, math.inf, "text", None):
            value = (bad,) if isinstance(f.default, tuple) else bad
            with pytest.raises(ValueError, match=f.name):
                Config(**{f.name: value})


def test_tensors_that_users_hand_over_are_checked():
    model = GloTok(TINY)
    xar = XAR(TINY)
    x = random_images()
    tokens = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels = torch.zeros(2, dtype=torch.int64)
    latents = torch.zeros(2, 16, 8, 8)
    for function, *arguments in (
        (model, x[0]),
        (model, x.byte()),
        (model.encode, x[:, :, :8]),
        (model.encode, x[:0]),
        (model.encode, x.numpy()),
        (model.decode, tokens, tokens.float()),
        (model.decode, tokens, tokens[:1]),
        (model.from_latents, latents[:, :8]),
        (xar.loss, latents, labels.float()),
        (xar.loss, latents, labels[:1]),
        (xar.sample, labels[:, None]),
        (relation_histogram, x),
        (relation_histogram_direct, labels),
        (histogram_relation_loss, x[0, 0], torch.ones(2, 40)),
        (kmeans, labels, 1),
        (glotok.teacher_histogram, x[0, 0].long(), 2),
        (glotok.contrastive_loss, x[0, 0, :1], x[0, 0, :1]),
    ):
        with pytest.raises(ValueError) as refusal:
            function(*arguments)
        assert "\n" not in str(refusal.value)


# ---- files that stand alone, and the pages


def imports_of(path):
    """The top-level modules that a Python file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_what_each_file_imports():
    standard = set(sys.stdlib_module_names)
    packages = {"torch", "numpy", "PIL", "scipy"}
    assert imports_of(REPOSITORY / "glotok.py") - standard == {"torch"}
    assert not imports_of(REPOSITORY / "glotok.py") & {"argparse", "pathlib", "os", "sys"}
    assert imports_of(REPOSITORY / "fid.py") - standard <= packages
    assert imports_of(REPOSITORY / "train.py") - standard <= packages | {"glotok", "fid"}
    assert imports_of(REPOSITORY / "sample.py") - standard <= packages | {"glotok", "fid", "train"}


def test_glotok_works_in_an_empty_folder(tmp_path):
    shutil.copy(REPOSITORY / "glotok.py", tmp_path)
    code = "import glotok, torch; print(glotok.relation_histogram(torch.randn(9, 3)).sum().item())"
    done = run_process("-c", code, cwd=tmp_path)
    assert float(done.stdout) == pytest.approx(1, abs=1e-5), done.stderr


README = (REPOSITORY / "README.md").read_text()
EVIDENCE = (REPOSITORY / "assets" / "evidence.md").read_text()
PLACEHOLDERS = {"RUN": "runs/shapes", "FOLDER": "shapes"}


def anchors(text):
    """What the headings of a page in Markdown are linked by, as GitHub names them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", ["README.md", "assets/evidence.md"])
def test_links_and_pictures_are_there(page):
    path = REPOSITORY / page
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{page} links to {link}, and there is no such file"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page}: no heading for {link}"


def test_every_asset_is_shown_or_named():
    """A file in assets/ that no page mentions is left over."""
    for path in (REPOSITORY / "assets").iterdir():
        assert path.name in README + EVIDENCE, f"assets/{path.name} is named nowhere"


PYTHON_BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)```", README, re.M | re.S)
]


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_readme_python_runs(code, small_run, tmp_path, monkeypatch, capsys):
    """Each block alone, in a folder with a finished run; the FID network is a stand-in."""
    monkeypatch.setattr(fid, "load_inception", lambda file, device: QuickNet())
    monkeypatch.setattr(train, "draw_shapes", few_shapes)
    monkeypatch.setattr(glotok.histogram_floor, "__defaults__", (40,))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_run, "runs/shapes")
    code = code.replace("range(300)", "range(100)")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()  # each ends by printing what it found


def few_shapes(n, size, seed, draw_shapes=train.draw_shapes):
    return draw_shapes(min(n, 100), size, seed)


def readme_commands(script):
    """README's command lines of a script, in blocks and in the text, from its name on."""
    parts = README.replace("\\\n", "").split("```")
    code = []
    for text in parts[0::2]:
        code += re.findall("`([^`]+)`", text)
    for block in parts[1::2]:
        code += block.splitlines()
    commands = set()
    for each in code:
        each = " ".join(each.split("#")[0].split())  # no comments, no line breaks
        for match in re.findall(rf"(?:python|torchrun --\S+) ({script}\.py[^&;]*)", each):
            commands.add(match.strip())
    assert len(commands) > 1
    return sorted(commands)


def words_of(command):
    return [PLACEHOLDERS.get(word, word) for word in command.split()[1:]]


@pytest.mark.parametrize("command", readme_commands("train"))
def test_readme_commands_of_train_are_understood(command, small_run, tmp_path, monkeypatch):
    words = words_of(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    if "--help" in words:
        with pytest.raises(SystemExit):
            train.parse_arguments()
        return
    if "--resume" in words:
        out = words[words.index("--out") + 1] if "--out" in words else "runs/shapes"
        shutil.copytree(small_run, out)
    args, given = train.parse_arguments()
    base = PRESETS[args.preset or "shapes"]
    assert isinstance(replace(base, **given), Config)


@pytest.mark.parametrize("command", readme_commands("sample"))
def test_readme_commands_of_sample_run(command, small_run, run_command, tmp_path, monkeypatch):
    words = words_of(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_shapes", few_shapes)
    monkeypatch.setattr(sample, "tsne", functools.partial(tsne, steps=20))
    monkeypatch.setattr(sample, "UNIFORMITY_RUNS", 1)
    for run in {word for word in words if word.startswith("runs/")}:
        shutil.copytree(small_run, run)
        config = json.loads(Path(run, "config.json").read_text())
        config["trained_on"]["classes"] = list(train.SHAPES)  # as those of the default run
        Path(run, "config.json").write_text(json.dumps(config))
    if "--n" in words:  # a few images of one step each
        words[words.index("--n") + 1] = "6"
        words += ["--steps", "1"]
    result = run_command(sample, *words)
    assert result.status == 0, result.err
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).exists()


@pytest.mark.parametrize("command", readme_commands("fid"))
def test_readme_commands_of_fid_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fid.py", *words_of(command)])
    fid.parse_arguments()


def test_help_lists_every_setting(run_command):
    result = run_command(train, "--help")
    assert result.status == 0
    for f in fields(Config):
        assert f"--{f.name} " in result.out
