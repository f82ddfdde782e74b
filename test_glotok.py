"""The paper, checked: its equations against independent computations; then the commands.

    python -m pytest -q

Part I     the paper, equation by equation
Part II    networks, data, measures
Part III   commands, bad input, faults
"""

import argparse
import ast
import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict, fields, replace
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
import scipy.spatial
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fid
import glotok
import sample
import train
from fid import BadInput, named_tensors
from glotok import (
    ALPHA,
    FAR,
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
    disc_layers=1,
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
    """run_command(module, *words): `python MODULE.py WORDS` in this process -> Result."""

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of TINY. Never changed: see copied_run.

    It is trained on 1,000 shapes, as in few_shapes: to encode all 20,000 would take most of the
    time.
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    driver = """
        import fid, train
        draw_shapes = fid.draw_shapes
        fid.draw_shapes = lambda n, size, seed: draw_shapes(min(n, 1000), size, seed)
        fid.run_script(train.main)
    """
    done = run_process("-c", textwrap.dedent(driver), *FLAGS, "--out", folder, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    (folder.parent / "stderr.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def copied_run(finished, tmp_path):
    """A copy of the finished run, in tmp_path / "run", for a test to go on with or to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tensors_in(path):
    """{dotted name: tensor} of a checkpoint."""
    return dict(named_tensors(torch.load(path, weights_only=True)))


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


def assert_refused(result, script, message):
    """Status 2; the message in one line, the last on standard error; no traceback."""
    last = result.err.splitlines()[-1]
    assert result.status == 2, result.err
    assert last.startswith(f"{script}: "), result.err
    assert message in last, result.err
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


def save_pictures(folder, n, size=16, seed=0, suffix=".png"):
    """n random pictures, 000.png and so on, in a new or old folder -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        rng = np.random.default_rng(seed + i)
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}{suffix}")
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
    assert c.image_size == 256
    assert c.grid_size == 16
    assert c.code_dim == 8
    assert c.codes_sem == 4096
    assert c.codes_vis == 12288
    assert c.bins == 40
    assert c.lambda_hist == 0.01
    assert c.lambda_res == 0.5
    assert c.lr == 2e-4
    assert c.warmup == c.cooldown == 0  # a constant learning rate
    assert c.beta1 == 0.9
    assert c.beta2 == 0.95
    assert c.batch_size == 240
    assert c.tokenizer_steps == math.ceil(150 * 1281167 / 240)  # 150 epochs of ImageNet

    double = PRESETS["imagenet256-2x"]
    assert double == replace(c, codes_sem=16384, codes_vis=16384, teacher_centres=16384)

    # xAR-B and FQGAN's adversarial loss as released
    assert (c.gen_width, c.gen_layers, c.gen_heads) == (768, 16, 12)
    assert (c.gen_dropout, c.label_dropout, c.sampling_steps) == (0.1, 0.1, 40)
    assert (c.gen_lr, c.gen_lr_end, c.gen_decay) == (4e-4, 1e-5, 0.02)
    assert (c.lambda_adv, c.adv_adaptive, c.adv_start) == (0.5, 0, 20000)

    assert (c.gen_batch, c.gen_warmup, c.gen_cooldown, c.ema) == (2048, 62557, 0.25, 0.9999)
    assert (c.guidance, c.guidance_first, c.stochastic, c.time_shift) == (2.7, 1.0, 1, 0.0)
    assert (c.lambda_recon, c.lambda_quantize, c.lambda_perceptual, c.beta) == (1, 1, 1, 0.25)
    assert (c.cell, c.crop, c.teacher_by_class, c.adapter_layers) == (8, 0.8, 1, 6)

    far = PRESETS["imagenet256-far"]
    assert (far.gen_lr, far.gen_batch, far.gen_decay) == (1e-4, 256, 0.05)
    assert (far.guidance, far.gen_dropout, far.label_dropout) == (2.0, 0.1, 0.1)


def test_presets_for_imagenette_have_16_by_16_tokens():
    small = PRESETS["imagenette-small"]
    assert (small.data, small.image_size, small.grid_size) == ("imagenette", 64, 16)
    whole = PRESETS["imagenette"]
    assert (whole.data, whole.image_size, whole.grid_size) == ("imagenette", 128, 16)
    assert whole.lambda_perceptual and whole.lambda_adv and whole.generator == "xar"
    for c in (small, whole):
        assert c.classes == 10
        assert c.eval_images == 3925  # all of the published validation photographs
        with torch.device("meta"):
            model = GloTok(c)
            z = model.encoder(torch.empty(1, 3, c.image_size, c.image_size))
        assert z.shape == (1, c.z_channels, 16, 16)


def test_paper_preset_builds_the_papers_networks():
    c = PRESETS["imagenet256"]
    with torch.device("meta"):
        model = GloTok(c)
        z = model.encoder(torch.empty(1, 3, 256, 256))
    assert z.shape == (1, 256, 16, 16)
    assert model.codebook_sem.shape == (4096, 8)
    assert model.codebook_vis.shape == (12288, 8)
    blocks = [m for m in model.encoder if isinstance(m, glotok.ResBlock)]
    channels = [block.body[2].in_channels for block in blocks]
    assert channels == [128, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512]
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


def test_codebooks_lie_on_the_unit_sphere():
    model = GloTok(TINY)
    assert model.codebook_sem.shape == (16, 8)
    assert model.codebook_vis.shape == (24, 8)
    torch.testing.assert_close(model.codebook_sem.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(model.codebook_vis.norm(dim=1), torch.ones(24))


def test_straight_through_is_exact_in_value_and_the_identity_in_gradient():
    z = torch.randn(100, 8, requires_grad=True)
    codes = torch.randn(100, 8, requires_grad=True)
    gradient = torch.randn(100, 8)
    out = glotok.straight_through(z, codes)
    out.backward(gradient)
    assert torch.equal(out, codes)
    assert torch.equal(z.grad, gradient)
    assert codes.grad is None


def test_training_counts_how_often_codes_are_used():
    quantizer = Quantizer(5, 4, 0.25)
    features = torch.randn(2, 30, 4)
    index = quantizer(features)[2]
    assert quantizer.usage_count.tolist() == [(index == k).sum() for k in range(5)]
    quantizer.eval()
    quantizer(features)
    assert quantizer.usage_count.sum() == 60  # evaluation does not count


def test_revival_moves_only_unused_codes_onto_features():
    quantizer = Quantizer(6, 4, 0.25)
    codes = [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, -1.0, 0.0],
        [0.0, 0.0, 0.0, -1.0],
        [-1.0, 0.0, 0.0, 0.0],
        [0.0, -1.0, 0.0, 0.0],
    ]
    with torch.no_grad():
        quantizer.weight.copy_(torch.tensor(codes))
    before = quantizer.weight.clone()
    features = torch.tensor([[1.0, 0.1, 0.0, 0.0], [0.1, 1.0, 0.0, 0.0]]).expand(4, 2, 4)
    quantizer(features)
    assert quantizer.usage_count.tolist() == [4, 4, 0, 0, 0, 0]

    quantizer.revive()
    assert torch.equal(quantizer.weight[:2], before[:2])
    candidates = F.normalize(features[0], dim=1)
    for code in quantizer.weight[2:].detach():
        assert (candidates - code).abs().sum(1).min() < 1e-6


def test_revival_moves_what_is_used_less_than_a_twentieth_of_the_mean():
    quantizer = Quantizer(4, 4, 0.25)
    quantizer.last_features = F.normalize(torch.randn(50, 4), dim=1)
    quantizer.usage_count.copy_(torch.tensor([49, 51, 1900, 2000]))  # mean 1,000
    before = quantizer.weight.clone()
    quantizer.revive()
    moved = (quantizer.weight != before).any(1)
    assert moved.tolist() == [True, False, False, False]


def test_revived_codes_are_drawn_apart_from_one_another():
    quantizer = Quantizer(40, 4, 0.25)
    quantizer.last_features = F.normalize(torch.randn(1000, 4), dim=1)
    quantizer.usage_count[0] = 1000
    quantizer.revive()
    # 39 draws out of 1,000: less than one pair in the mean
    assert len(quantizer.weight.unique(dim=0)) > 30


def test_only_visual_codes_are_revived(small_flags, run_command, tmp_path, monkeypatch):
    """Every 5 steps, by what these steps used, but not in the last tenth."""
    revived = []

    def revive(quantizer):
        revived.append((len(quantizer.weight), quantizer.usage_count.sum().item()))

    monkeypatch.setattr(Quantizer, "revive", revive)
    flags = [*small_flags, "--stage", "tokenizer", "--revive_every", 5, "--tokenizer_steps", 20]
    assert run_command(train, *flags, "--out", tmp_path / "run").status == 0
    tokens = 5 * TINY.batch_size * 64
    assert revived == [(TINY.codes_vis, tokens)] * 3  # after steps 5, 10, 15


def test_coverage_draws_the_nearest_feature_to_each_unused_code():
    quantizer = Quantizer(40, 4, 0.25)
    features = torch.randn(2, 15, 4, requires_grad=True)
    z, _, index, _ = quantizer(features)
    z.retain_grad()
    loss = quantizer.coverage_loss(z, index)
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


def test_coverage_of_a_codebook_in_full_use_is_0():
    quantizer = Quantizer(6, 4, 0.25)
    z = quantizer.codebook.detach()[None]
    assert quantizer.coverage_loss(z, quantizer.look_up(z)).item() == 0


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


@pytest.mark.parametrize("bins", [2, 12, 20, 40, 100])
def test_eq05_bin_centres(bins):
    expected = [-1 + 2 * k / (bins - 1) for k in range(bins)]
    centres = glotok.bin_centres(bins, torch.zeros(1, dtype=torch.float64))
    assert centres.dtype == torch.float64
    np.testing.assert_allclose(centres, expected, rtol=0, atol=1e-15)
    centres = glotok.bin_centres(bins, torch.zeros(1))
    assert centres.dtype == torch.float32
    np.testing.assert_allclose(centres, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bins, alpha", [(40, ALPHA), (12, 30.0)])
def test_eq04_eq05_eq06_histograms_equal_plain_loops(bins, alpha):
    codes = torch.randn(17, 5) + 0.3
    expected = histogram_by_loops(codes, bins, alpha)
    direct = relation_histogram_direct(codes.double(), bins, alpha)
    fast = relation_histogram(codes, bins, alpha)
    np.testing.assert_allclose(direct, expected, atol=1e-12)
    np.testing.assert_allclose(fast, expected, atol=1e-4 * expected.max())


@pytest.mark.parametrize("bins", [20, 40, 100])
def test_eq06_default_alpha_gives_every_similarity_the_same_weight(bins):
    """The Poisson-summation argument for alpha = 1 / w^2."""
    alpha = glotok.default_alpha(bins)
    assert alpha == pytest.approx(alpha_of(bins), rel=1e-12)
    centres = np.linspace(-1, 1, bins)

    x = np.linspace(-0.5, 0.5, 1001)
    total = np.exp(-alpha * (x[:, None] - centres) ** 2).sum(1)
    assert total.mean() == pytest.approx(math.sqrt(math.pi), rel=1e-4)
    ripple = (total.max() - total.min()) / 2 / total.mean()
    assert ripple == pytest.approx(2 * math.exp(-(math.pi**2)), rel=0.02)

    # At +1 the row of bins ends: what lies beyond it is lost.
    share = np.exp(-alpha * (1 - centres) ** 2).sum() / total.mean()
    expected = (1 + sum(math.exp(-(j**2)) for j in range(1, 10))) / math.sqrt(math.pi)
    assert share == pytest.approx(expected, rel=1e-4)
    assert share == pytest.approx(0.782, abs=5e-4)


def test_eq06_alpha_at_the_papers_40_bins():
    assert ALPHA == 380.25
    assert glotok.default_alpha(40) == ALPHA


@pytest.mark.parametrize("bins", [20, 40, 100])
def test_eq06_histograms_use_the_default_alpha_of_their_bins(bins):
    alpha = alpha_of(bins)
    codes = torch.randn(30, 5)

    fast = relation_histogram(codes, bins)
    torch.testing.assert_close(fast, relation_histogram(codes, bins, alpha))
    assert (fast - relation_histogram(codes, bins, 1.1 * alpha)).abs().max() > 1e-4

    direct = relation_histogram_direct(codes, bins)
    torch.testing.assert_close(direct, relation_histogram_direct(codes, bins, alpha))
    assert (direct - relation_histogram_direct(codes, bins, 1.1 * alpha)).abs().max() > 1e-4

    sphere = sphere_histogram(5, bins)
    torch.testing.assert_close(sphere, sphere_histogram(5, bins, alpha))
    assert (sphere - sphere_histogram(5, bins, 1.1 * alpha)).abs().max() > 1e-6


def test_eq06_direct_histogram_has_the_right_gradient():
    codes = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, dtype=torch.float64)

    def weighted_sum(codes):
        return relation_histogram_direct(codes) @ weight

    assert torch.autograd.gradcheck(weighted_sum, codes)


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


def test_eq07_alone_pulls_a_random_codebook_to_a_teacher_it_can_reach():
    shift = torch.tensor([1.5] + [0.0] * 7)
    teacher = relation_histogram(torch.randn(256, 8) + shift)
    codes = torch.randn(256, 8, requires_grad=True)
    optimizer = torch.optim.Adam([codes], 0.02)
    first = histogram_relation_loss(codes, teacher).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = histogram_relation_loss(codes, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first


def test_eq07_floor_of_a_teacher_that_can_be_reached_is_0():
    shift = torch.tensor([1.0] + [0.0] * 7)
    teacher = relation_histogram(torch.randn(128, 8) + shift)
    assert 0 <= glotok.histogram_floor(teacher, 128, 8) < 1e-3


def test_eq07_floor_of_a_teacher_that_cannot_be_reached_is_the_least_that_is_found():
    """Near-orthogonal vectors are none of dimension 3: the Welch bound."""
    teacher = relation_histogram(torch.randn(128, 64))
    floor = glotok.histogram_floor(teacher, 128, 3)
    assert floor > 0.3
    codes = torch.randn(128, 3, requires_grad=True)  # another start, another optimizer
    optimizer = torch.optim.SGD([codes], 3.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss = histogram_relation_loss(codes, teacher)
        loss.backward()
        optimizer.step()
    assert floor < loss.item() + 0.01


@pytest.mark.parametrize("tile", [2**20, 60])
def test_eq06_used_histogram_weighs_pairs_by_use(tile, monkeypatch):
    monkeypatch.setattr(glotok, "TILE", tile)  # one band of rows, or many
    codes = torch.randn(17, 5) + 0.3
    counts = torch.randint(0, 9, (17,))
    counts[3] = 0
    use = counts.double().numpy() / counts.sum().item() * 17
    expected = histogram_by_loops(codes, 40, ALPHA, use)
    found = glotok.used_histogram(codes, counts)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    codes[3] = -codes.sum(0)  # of no use
    np.testing.assert_allclose(glotok.used_histogram(codes, counts), found, atol=1e-7)
    alike = glotok.used_histogram(codes, torch.full((17,), 5))
    np.testing.assert_allclose(alike, relation_histogram(codes), atol=1e-6)


def test_eq07_moves_the_semantic_codebook_alone():
    model = GloTok(TINY)
    histogram_relation_loss(model.codebook_sem, sphere_histogram(8)).backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None]
    assert moved == ["quantizer_sem.weight"]


# The fast histogram against the direct one.


@pytest.mark.parametrize("tile", [2**20, 1000])  # one band of rows, and many of uneven height
@pytest.mark.parametrize("n, d, shift", [(2, 8, 0), (10, 3, 0.5), (300, 8, 0), (700, 8, 1.0)])
def test_eq06_fast_histogram_equals_the_direct_one(n, d, shift, tile, monkeypatch):
    monkeypatch.setattr(glotok, "TILE", tile)
    codes = torch.randn(n, d) + shift
    fast = codes.clone().requires_grad_()
    direct = codes.double().requires_grad_()
    teacher = relation_histogram_direct(torch.rand(50, 16).double())

    p = relation_histogram_direct(direct)
    assert (relation_histogram(fast) - p).abs().max() < 1e-4 * p.max()

    histogram_relation_loss(fast, teacher.float()).backward()
    kl_by_hand(teacher, p).backward()
    assert (fast.grad - direct.grad).norm() < 1e-3 * direct.grad.norm()


def test_eq06_fast_histogram_of_many_tiles():
    n = 2000
    rows = glotok.TILE // n
    assert n > 3 * rows
    assert n % rows > 0  # the last tile is smaller
    codes = torch.randn(n, 8)

    unit = F.normalize(codes.double(), dim=1)
    i, j = torch.triu_indices(n, n)
    similarity = (unit @ unit.T)[i, j]
    centres = torch.linspace(-1, 1, 40, dtype=torch.float64)
    p = torch.stack([torch.exp(-ALPHA * (similarity - centre) ** 2).sum() for centre in centres])
    p = p / p.sum()
    assert (relation_histogram(codes) - p).abs().max() < 1e-4 * p.max()


def test_eq06_fast_histogram_of_equal_codes():
    p = relation_histogram(torch.ones(10, 4))
    np.testing.assert_allclose(p, histogram_by_loops(np.ones((1, 4)), 40, ALPHA), atol=1e-5)


# What one pair of codes weighs, and how it is pushed: the bounds that glotok.py states. The pairs
# lie at random between the points of the table.

SIMILARITIES = np.random.default_rng(0).uniform(-0.9, 0.9, 150).tolist()


def pair_at(similarity):
    """Two unit vectors, float32 (2, 2), and their cosine, a float64 number near `similarity`."""
    angle = math.acos(similarity)
    t = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    return t, (t[0].double() @ t[1].double()).item()


@pytest.mark.parametrize("bins", [40, 100])
def test_eq06_fast_histogram_weighs_a_pair_within_the_stated_bound(bins):
    alpha = alpha_of(bins)
    centres = np.linspace(-1, 1, bins)
    diagonal = 2 * np.exp(-alpha * (1 - centres) ** 2)  # i = j, twice
    errors = []
    for similarity in SIMILARITIES:
        t, cosine = pair_at(similarity)
        p = glotok.SmoothedHistogram.apply(t, bins, alpha).double().numpy()
        exact = np.exp(-alpha * (cosine - centres) ** 2)
        errors.append(np.abs(p - diagonal - exact).max())
    bound = math.sqrt(2 * alpha / math.e) / glotok.TABLE
    assert max(errors) < 1.02 * bound  # 2 %: float32 rounding
    assert max(errors) > 0.8 * bound  # the bound is no larger than it must be


def test_eq06_fast_histogram_pushes_a_pair_within_the_stated_bound():
    centres = np.linspace(-1, 1, 40)
    errors = []
    for similarity in SIMILARITIES:
        t, cosine = pair_at(similarity)
        t.requires_grad_()
        nearest = int(np.abs(cosine - centres).argmin())  # there |f''| is largest
        p = glotok.SmoothedHistogram.apply(t, 40, ALPHA)
        (grad,) = torch.autograd.grad(p[nearest], t)
        # dp/dt_0 = g(D) t_1, and something along t_0 from i = j: look across t_0 = (1, 0).
        force = grad[0, 1].item() / t[1, 1].item()
        offset = cosine - centres[nearest]
        exact = -2 * ALPHA * offset * math.exp(-ALPHA * offset**2)
        errors.append(abs(force - exact))
    bound = 2 * ALPHA / glotok.TABLE
    assert max(errors) < 1.02 * bound  # 2 %: float32 rounding
    assert max(errors) > 0.8 * bound


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


def seconds_of(histogram, codes, teacher, times):
    """The least of `times` measurements of a pass forward and backward."""
    best = math.inf
    for _ in range(times):
        student = codes.clone().requires_grad_()
        start = time.perf_counter()
        log_p = histogram(student).clamp_min(1e-10).log()
        F.kl_div(log_p, teacher, reduction="sum").backward()
        best = min(best, time.perf_counter() - start)
    return best


def test_eq06_fast_histogram_is_much_faster():
    codes = torch.randn(1536, 8)
    teacher = sphere_histogram(8)
    direct = seconds_of(relation_histogram_direct, codes, teacher, times=1)
    fast = seconds_of(relation_histogram, codes, teacher, times=3)
    assert direct > 5 * fast  # 100 and more at 4,096 on a quiet machine


# Eq. (6) as printed would take 21 GB. A process of its own, for its peak memory.
PEAK_MEMORY = """
import resource
import torch
import glotok

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def loss_of(n):
    codes = torch.randn(n, 8, requires_grad=True)
    glotok.histogram_relation_loss(codes, glotok.sphere_histogram(8)).backward()

loss_of(64)
before = peak()
loss_of(16384)
print(peak() - before)
"""


def test_eq06_fast_histogram_of_16384_codes_is_small():
    done = run_process("-c", PEAK_MEMORY, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200  # MB


# What a codebook can imitate.


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_eq06_sphere_histogram_is_that_of_a_million_random_vectors(dim):
    x = F.normalize(torch.randn(1_000_000, dim), dim=1)
    y = F.normalize(torch.randn(1_000_000, dim), dim=1)
    cosines = (x * y).sum(1)
    centres = torch.linspace(-1, 1, 40)
    p = torch.stack([torch.exp(-ALPHA * (cosines - centre) ** 2).sum() for centre in centres])
    assert (sphere_histogram(dim) - p / p.sum()).abs().max() < 1e-3


def test_cosine_moments_are_those_of_all_pairs_and_respect_the_welch_bound():
    vectors = torch.randn(60, 8) + 0.4
    unit = F.normalize(vectors, dim=1)
    cosines = unit @ unit.T
    mean, mean_square = glotok.cosine_moments(vectors)
    assert mean == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert mean_square == pytest.approx((cosines**2).mean().item(), abs=1e-5)
    assert mean_square >= 1 / 8
    # An orthonormal basis reaches the bound.
    assert glotok.cosine_moments(torch.eye(8))[1] == pytest.approx(1 / 8)


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
    expected_sem = squared_error(f_sem, model.quantizer_sem, model.residual_sem)
    expected_vis = squared_error(f_vis, model.quantizer_vis, model.residual_vis)
    expected = expected_sem + expected_vis
    assert losses["residual"].item() == pytest.approx(expected.item(), rel=1e-4)

    # Zhat is stopped nowhere, neither as R's input nor beside Zres.
    codebooks = [model.quantizer_sem.weight, model.quantizer_vis.weight]
    pulls = torch.autograd.grad(losses["residual"], codebooks, retain_graph=True)
    for pull, whole in zip(pulls, torch.autograd.grad(expected, codebooks)):
        torch.testing.assert_close(pull, whole, atol=1e-7, rtol=1e-3)

    losses["residual"].backward()
    # sg[Z]: neither the encoder nor the adapters.
    moved = {"quantizer_sem", "quantizer_vis", "residual_sem", "residual_vis"}
    assert modules_with_gradient(model) == moved


def test_coverage_moves_the_encoder_towards_unused_semantic_codes():
    model = GloTok(replace(TINY, codes_sem=256))  # more codes than features: some are unused
    x = random_images()[:1]
    _, losses = model(x)
    losses["coverage"].backward()
    assert modules_with_gradient(model) == {"encoder", "adapter_sem"}

    f_sem, _ = model.features(x)
    z = f_sem[0] / f_sem[0].norm(dim=1, keepdim=True)  # (64, 8)
    distance = ((z[:, None] - model.codebook_sem) ** 2).sum(2)  # (64, 256)
    unused = torch.ones(256).index_fill(0, distance.argmin(1), 0)
    expected = (unused * distance.min(0).values / 8).mean()
    assert losses["coverage"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_eq10_pulls_the_codes_towards_the_features():
    # The residuals are zero here, so (10) is the first term of (1) and has its gradient.
    model = GloTok(TINY)
    _, losses = model(random_images())
    weight = model.quantizer_sem.weight
    (residual,) = torch.autograd.grad(losses["residual"], weight, retain_graph=True)
    (quantize,) = torch.autograd.grad(losses["quantize"], weight)
    torch.testing.assert_close(residual, quantize)


def test_decoder_gradient_reaches_the_encoder_and_the_residual_modules():
    model = random_residuals(GloTok(TINY))
    recon, _ = model(random_images())
    recon.square().sum().backward()
    weights = [
        model.encoder[1].weight,
        model.adapter_sem.weight,
        model.adapter_vis.weight,
        model.residual_sem.proj_out.weight,
        model.residual_vis.blocks[0].attention.qkv.weight,
    ]
    for weight in weights:
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("lambda_res", [0.5, 0.0])
def test_encode_then_decode_is_what_forward_does(lambda_res):
    model = GloTok(replace(TINY, lambda_res=lambda_res)).eval()
    if lambda_res:
        random_residuals(model)
    x = random_images()
    sem, vis = model.encode(x)
    assert sem.shape == vis.shape == (2, 8, 8)
    assert sem.dtype == vis.dtype == torch.int64
    assert sem.max() < 16
    assert vis.max() < 24
    recon, _ = model(x)
    assert torch.equal(model.decode(sem, vis), recon)


def test_semantic_and_visual_halves_take_their_own_channels():
    model = GloTok(TINY).eval()
    sem = torch.randn(1, 64, 8)
    vis = torch.randn(1, 64, 8)
    map_sem = sem.transpose(1, 2).reshape(1, 8, 8, 8)
    map_vis = vis.transpose(1, 2).reshape(1, 8, 8, 8)
    expected = model.decoder(torch.cat([map_sem, map_vis], dim=1))
    torch.testing.assert_close(model.decode_latents(sem, vis), expected)


def test_adapters_of_several_layers_are_transformers():
    model = GloTok(replace(TINY, adapter_layers=2))
    assert len(model.adapter_sem.blocks) == 2
    recon, _ = model(random_images())
    assert recon.shape == (2, 3, 16, 16)


def count_modules(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("res_blocks", [1, 2])
@pytest.mark.parametrize("channel_mult", [(1, 2), (1, 1, 2, 4)])
def test_encoder_and_decoder_have_vqgans_blocks(res_blocks, channel_mult):
    """Two blocks and an attention in the middle; the decoder has a block more at each level."""
    c = replace(TINY, image_size=64, res_blocks=res_blocks, channel_mult=channel_mult)
    levels = len(channel_mult)
    assert count_modules(glotok.encoder(c), glotok.ResBlock) == levels * res_blocks + 2
    assert count_modules(glotok.decoder(c), glotok.ResBlock) == levels * (res_blocks + 1) + 2
    # at the lowest resolution, after each block
    assert count_modules(glotok.encoder(c), glotok.SpatialAttention) == res_blocks + 1
    assert count_modules(glotok.decoder(c), glotok.SpatialAttention) == res_blocks + 2


@torch.no_grad()
def test_attention_over_positions_by_hand():
    attention = glotok.SpatialAttention(4).double()
    attention.norm = torch.nn.Identity()
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    expected = x.numpy().copy()
    w_qkv = attention.qkv.weight[:, :, 0, 0].numpy()
    b_qkv = attention.qkv.bias.numpy()
    w_out = attention.proj.weight[:, :, 0, 0].numpy()
    b_out = attention.proj.bias.numpy()
    for image in expected:
        tokens = image.reshape(4, 6)  # a column a position
        q, k, v = np.split(w_qkv @ tokens + b_qkv[:, None], 3)
        weights = np.exp(q.T @ k / math.sqrt(4))  # a row a query
        weights /= weights.sum(1, keepdims=True)
        out = w_out @ (v @ weights.T) + b_out[:, None]
        image += out.reshape(4, 2, 3)
    np.testing.assert_allclose(attention(x), expected, atol=1e-12)


def test_networks_in_bfloat16_say_nearly_the_same():
    """As on a GPU. Losses, codes and similarities stay in float32."""
    model = random_residuals(GloTok(TINY))
    xar = fill_zero_weights(XAR(TINY))
    x = random_images(8)
    labels = torch.arange(8) % 6
    latents = torch.randn(8, 16, 8, 8)
    draws = xar.draw(8, "cpu")
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            recon, losses = model(x)
            flow = xar(latents, labels, draws)
        assert recon.dtype == torch.float32
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert flow.dtype == torch.float32
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


@pytest.mark.parametrize("latent_residual, snap", [(0, 0), (1, 0), (0, 1)])
def test_true_latents_decode_to_the_reconstruction(latent_residual, snap):
    model = GloTok(replace(TINY, latent_residual=latent_residual, snap=snap))
    model = random_residuals(model).eval()
    sem, vis = model.encode(random_images())
    recon = model.decode(sem, vis)
    latents = model.to_latents(sem, vis)
    assert latents.shape == (2, 16, 8, 8)
    torch.testing.assert_close(model.from_latents(latents), recon, atol=1e-5, rtol=1e-4)
    longer = model.from_latents(1.1 * latents)
    if snap:
        torch.testing.assert_close(longer, recon, atol=1e-5, rtol=1e-4)
    else:
        assert (longer - recon).abs().max() > 1e-3


# ---- The whole loss (2), (3), (13)

# Distinct weights and distinct terms. "adv" and "vf" are weighed by GRADIENT_WEIGHTS, not by the
# settings.
LOSS_CONFIG = replace(
    TINY,
    lambda_recon=0.9,
    lambda_quantize=0.3,
    lambda_perceptual=0.7,
    lambda_adv=0.8,
    lambda_res=0.5,
    lambda_hist=0.01,
    lambda_contrastive=0.6,
    lambda_disentangle=0.15,
    lambda_entropy=0.05,
    lambda_vf=0.85,
    lambda_coverage=0.4,
)
GRADIENT_WEIGHTS = {"adv": 0.2, "vf": 0.35}
TERMS = {
    "recon": 2.0,
    "quantize": 3.0,
    "perceptual": 5.0,
    "adv": 7.0,
    "residual": 11.0,
    "hist": 13.0,
    "contrastive": 17.0,
    "coverage": 19.0,
    "disentangle": 23.0,
    "entropy": 29.0,
    "vf": 31.0,
}
TERM_WEIGHTS = {
    "recon": 0.9,
    "quantize": 0.3,
    "perceptual": 0.7,
    "adv": 0.2,
    "residual": 0.5,
    "hist": 0.01,
    "contrastive": 0.6,
    "coverage": 0.4,
    "disentangle": 0.15,
    "entropy": 0.05,
    "vf": 0.35,
}
SWITCHED_ON = ["recon", "quantize", "residual"]  # always
NOT_IN_EQ13 = ["coverage", "contrastive", "disentangle", "entropy", "vf"]


def loss_terms(without=()):
    """TERMS as float64 scalars with gradient, but for those switched off."""
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in TERMS.items()
        if name not in without
    }


def test_eq02_is_the_mean_squared_error():
    recon = random_images()
    x = random_images()
    expected = np.mean((x.double().numpy() - recon.double().numpy()) ** 2)
    assert glotok.reconstruction_loss(recon, x).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "without, expected",
    [
        ([], 0.9 * 2 + 0.3 * 3 + 0.7 * 5 + 0.2 * 7),
        (["perceptual"], 0.9 * 2 + 0.3 * 3 + 0.2 * 7),
        (["adv"], 0.9 * 2 + 0.3 * 3 + 0.7 * 5),
        (["perceptual", "adv"], 0.9 * 2 + 0.3 * 3),
    ],
)
def test_eq03_is_the_weighted_sum(without, expected):
    loss = glotok.vqgan_loss(LOSS_CONFIG, loss_terms(without), GRADIENT_WEIGHTS)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "without, expected",
    [
        ([], 1.8 + 0.9 + 0.7 * 5 + 0.2 * 7 + 0.5 * 11 + 0.01 * 13),
        (["perceptual"], 1.8 + 0.9 + 0.2 * 7 + 0.5 * 11 + 0.01 * 13),
        (["adv"], 1.8 + 0.9 + 0.7 * 5 + 0.5 * 11 + 0.01 * 13),
        (["hist"], 1.8 + 0.9 + 0.7 * 5 + 0.2 * 7 + 0.5 * 11),
        (["perceptual", "adv", "hist"], 1.8 + 0.9 + 0.5 * 11),
    ],
)
def test_eq13_is_the_weighted_sum(without, expected):
    terms = loss_terms([*without, *NOT_IN_EQ13])
    loss = glotok.total_loss(LOSS_CONFIG, terms, GRADIENT_WEIGHTS)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "term, expected",
    [
        ("coverage", 0.4 * 19),
        ("contrastive", 0.6 * 17),
        ("disentangle", 0.15 * 23),
        ("entropy", 0.05 * 29),
        ("vf", 0.35 * 31),
    ],
)
def test_what_stands_beside_eq13_is_added_with_its_weight(term, expected):
    terms = loss_terms([name for name in NOT_IN_EQ13 if name != term])
    loss = glotok.total_loss(LOSS_CONFIG, terms, GRADIENT_WEIGHTS)
    eq13 = 1.8 + 0.9 + 0.7 * 5 + 0.2 * 7 + 0.5 * 11 + 0.01 * 13
    assert loss.item() == pytest.approx(eq13 + expected, rel=1e-12)


@pytest.mark.parametrize("without", [[], *[[name] for name in TERMS if name not in SWITCHED_ON]])
def test_eq13_gives_each_term_its_weight_as_gradient(without):
    losses = loss_terms(without)
    glotok.total_loss(LOSS_CONFIG, losses, GRADIENT_WEIGHTS).backward()
    for name, term in losses.items():
        assert term.grad.item() == TERM_WEIGHTS[name], name


@pytest.mark.parametrize(
    "name, weight",
    [
        ("recon", "lambda_recon"),
        ("quantize", "lambda_quantize"),
        ("residual", "lambda_res"),
    ],
)
def test_eq13_weight_0_switches_off_a_term_that_is_always_there(name, weight):
    c = replace(LOSS_CONFIG, **{weight: 0.0})
    expected = sum(TERM_WEIGHTS[k] * value for k, value in TERMS.items() if k != name)
    loss = glotok.total_loss(c, loss_terms(), GRADIENT_WEIGHTS)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


# The adversarial part.


def small_discriminator():
    return glotok.discriminator(replace(TINY, disc_channels=4, disc_layers=1))


def test_discriminator_judges_patches():
    disc = glotok.discriminator(PRESETS["imagenet256"])
    assert disc(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    norms = [m for m in disc if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 3


def test_eq03_adversarial_loss_moves_the_reconstruction_alone():
    disc = small_discriminator()
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


def test_hinge_loss():
    real = torch.tensor([2.0, 0.5])
    fake = torch.tensor([-3.0, 0.0])
    assert glotok.hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_discriminator_loss_moves_the_discriminator_alone():
    disc = small_discriminator()
    recon = random_images().requires_grad_()
    x = random_images()
    loss = glotok.discriminator_loss(disc, recon, x)
    loss.backward()
    assert recon.grad is None
    for name, p in disc.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert disc[0].weight.grad.abs().sum() > 0

    real = disc(x).detach().numpy()
    fake = disc(recon).detach().numpy()
    expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "step, adv_ramp, expected",
    [
        (100, 4, 0.2),  # the first step: 1 / adv_ramp of lambda_adv
        (101, 4, 0.4),
        (102, 4, 0.6),
        (103, 4, 0.8),  # full after adv_ramp steps
        (104, 4, 0.8),
        (100000, 4, 0.8),
        (100, 1, 0.8),
        (100, 0, 0.8),
    ],
)
def test_adversarial_weight_grows_over_its_ramp(step, adv_ramp, expected):
    c = replace(TINY, lambda_adv=0.8, adv_start=100, adv_ramp=adv_ramp, adv_adaptive=0)
    assert glotok.adversarial_weight(c, step, {}, None) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step, ramp", [(100, 0.25), (103, 1.0)])
def test_adversarial_weight_is_adaptive_by_the_ratio_of_gradient_norms(step, ramp):
    c = replace(
        TINY,
        lambda_recon=1.5,
        lambda_perceptual=2.0,
        lambda_adv=0.8,
        adv_start=100,
        adv_ramp=4,
        adv_adaptive=1,
    )
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = {
        "recon": (torch.tensor([2.0, 2.0]) * w).sum(),
        "perceptual": (torch.tensor([0.0, 0.5]) * w).sum(),
        "adv": (torch.tensor([0.0, 0.5]) * w).sum(),
    }
    # Gradient of the pixels' losses: 1.5 (2, 2) + 2 (0, 0.5) = (3, 4), of length 5.
    weight = glotok.adversarial_weight(c, step, losses, w)
    assert weight.item() == pytest.approx(0.8 * ramp * 5 / 0.5, rel=1e-3)
    assert not weight.requires_grad
    assert w.grad is None

    del losses["perceptual"]
    weight = glotok.adversarial_weight(c, step, losses, w)
    assert weight.item() == pytest.approx(0.8 * ramp * 3 * math.sqrt(2) / 0.5, rel=1e-3)


def test_gradient_ratio():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = (3 * w).sum()
    other = (w * torch.tensor([0.0, 0.5])).sum()
    ratio = glotok.gradient_ratio(loss, other, w)
    assert ratio.item() == pytest.approx(3 * math.sqrt(2) / 0.5, rel=1e-3)
    nothing = (0 * w).sum()
    assert glotok.gradient_ratio(loss, nothing, w).item() == 1e4  # its largest value


def test_adversarial_weight_equalizes_gradients_at_the_decoders_last_convolution():
    c = replace(TINY, lambda_recon=1.5, lambda_adv=0.8, adv_start=0, adv_ramp=1, adv_adaptive=1)
    model = GloTok(c)
    x = random_images()
    recon, losses = model(x)
    losses["recon"] = glotok.reconstruction_loss(recon, x)
    # A louder discriminator, or the 1e-4 that guards the division would show.
    losses["adv"] = 1000 * glotok.adversarial_loss(small_discriminator(), recon)
    weight = glotok.adversarial_weight(c, 0, losses, model.last_layer)

    convolutions = [m for m in model.decoder if isinstance(m, torch.nn.Conv2d)]
    last = convolutions[-1].weight
    assert model.last_layer is last
    (of_pixels,) = torch.autograd.grad(1.5 * losses["recon"], last, retain_graph=True)
    (of_adv,) = torch.autograd.grad(weight * losses["adv"], last, retain_graph=True)
    assert of_adv.norm().item() == pytest.approx(0.8 * of_pixels.norm().item(), rel=1e-2)
    # the graph is still there
    glotok.total_loss(c, losses, glotok.gradient_weights(c, 0, losses, model)).backward()


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


def test_rotary_angles_by_hand():
    """A quarter of the width turns with the row, a quarter with the column."""
    angles = glotok.rotary_angles(torch.tensor([[3.0, 5.0], [0.0, 1.0]]), 16)
    frequencies = [1, 0.1, 0.01, 0.001]
    by_hand = [
        [row * f for f in frequencies] + [col * f for f in frequencies]
        for row, col in [(3, 5), (0, 1)]
    ]
    np.testing.assert_allclose(angles, by_hand, rtol=1e-6)


def test_embedding_of_times_by_hand():
    embedding = glotok.timestep_embedding(torch.tensor([0.0, 0.003]), 8)
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    by_hand = [math.cos(3 * f) for f in (1, 0.1, 0.01, 0.001)]
    by_hand += [math.sin(3 * f) for f in (1, 0.1, 0.01, 0.001)]
    np.testing.assert_allclose(embedding[1], by_hand, atol=1e-5)


def test_rotary_positions_see_differences_in_both_directions():
    xar = XAR(SMALL)
    q = torch.randn(1, 1, 1, 16)
    k = torch.randn(1, 1, 1, 16)

    def token(row, column):
        """Where a place of the grid stands in the order of the cells."""
        cell = row // 4 * 2 + column // 4
        return cell * 16 + row % 4 * 4 + column % 4

    def score(place_q, place_k):
        a = token(*place_q)
        b = token(*place_k)
        rotated_q = glotok.rotate(q, xar.angles[a : a + 1])
        rotated_k = glotok.rotate(k, xar.angles[b : b + 1])
        return (rotated_q * rotated_k).sum().item()

    same = score((1, 2), (3, 7))
    assert same == pytest.approx(score((4, 0), (6, 5)), abs=1e-4)  # again (+2, +5)
    assert abs(same - score((1, 2), (3, 6))) > 1e-3
    assert abs(same - score((1, 2), (4, 7))) > 1e-3


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


def test_flow_loss_is_the_error_of_the_velocity():
    xar = XAR(SMALL)
    torch.nn.init.zeros_(xar.proj_out.weight)  # its velocity is then 0 everywhere
    latents = torch.randn(4, 16, 8, 8)
    torch.manual_seed(5)
    loss = xar.loss(latents, torch.tensor([0, 1, 2, 0]))
    torch.manual_seed(5)
    torch.randn(4, 4)  # the times
    noise = torch.randn(4, 4, 16, 16)
    expected = ((noise - xar.to_cells(latents)) ** 2).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_flow_loss_noises_each_cell_at_its_own_time():
    xar = fill_zero_weights(XAR(SMALL))
    latents = torch.randn(2, 16, 8, 8)
    t = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.7, 0.2, 0.0, 1.0]])
    noise = torch.randn(2, 4, 16, 16)
    hidden = torch.tensor([False, True])
    loss = xar.loss(latents, torch.tensor([1, 2]), (t, noise, hidden))

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
    draws = xar.draw(2, torch.device("cpu"))
    loss = xar.loss(latents, labels, draws).item()
    torch.manual_seed(5)
    sampled = xar.sample(labels, steps=2)

    xar.latent_std.fill_(4)
    assert xar.loss(4 * latents, labels, draws).item() == pytest.approx(loss, rel=1e-6)
    torch.manual_seed(5)
    assert torch.equal(xar.sample(labels, steps=2), 4 * sampled)


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_times_are_logit_normal_and_each_cells_own(shift):
    xar = XAR(replace(SMALL, label_dropout=0.3, time_shift=shift))
    t, noise, hidden = xar.draw(4000, torch.device("cpu"))
    assert t.shape == (4000, 4)
    assert noise.shape == (4000, 4, 16, 16)
    assert hidden.shape == (4000,)
    normal = t.logit()
    assert normal.mean().item() == pytest.approx(shift, abs=0.05)
    assert normal.std().item() == pytest.approx(1, abs=0.05)
    correlation = torch.corrcoef(normal.T) - torch.eye(4)
    assert correlation.abs().max() < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("generator_class", [XAR, FAR])
@torch.no_grad()
def test_loss_with_given_draws_equals_the_loss_that_draws_inside(generator_class):
    generator = fill_zero_weights(generator_class(replace(SMALL, label_dropout=0.5)))
    labels = torch.randint(3, (8,))
    if generator_class is XAR:
        batch = torch.randn(8, 16, 8, 8)
    else:
        batch = torch.randint(16, (8, 2, 8, 8))
    torch.manual_seed(5)
    inside = generator.loss(batch, labels)
    torch.manual_seed(5)
    draws = generator.draw(8, torch.device("cpu"))
    assert torch.equal(generator.loss(batch, labels, draws), inside)
    other_draws = generator.draw(8, torch.device("cpu"))
    assert not torch.equal(generator.loss(batch, labels, other_draws), inside)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_dropout_hides_a_share_of_the_labels(share):
    xar = XAR(replace(SMALL, label_dropout=share))
    labels = torch.arange(3).repeat(500)
    seen = []

    def record_labels(z, t, labels):
        seen.append(labels)
        return torch.zeros_like(z)

    xar.velocity = record_labels
    xar.loss(torch.randn(1500, 16, 8, 8), labels)
    (seen_labels,) = seen
    hidden = seen_labels == 3  # "no label"
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.05)
    assert torch.equal(seen_labels[~hidden], labels[~hidden])


def test_cached_sampling_equals_uncached():
    xar = fill_zero_weights(XAR(replace(SMALL, stochastic=1)))
    labels = torch.tensor([0, 2])
    torch.manual_seed(3)
    cached = xar.sample(labels, steps=4, guidance=2.0)

    velocity = xar.velocity
    clean = []

    def from_scratch(z, t, labels, first_cell, caches, store=False):
        """All cells anew in each call: the clean ones at t = 0, then this one."""
        clean_times = torch.zeros(len(t), first_cell)
        all_cells = torch.cat([*clean, z], dim=1)
        all_times = torch.cat([clean_times, t], dim=1)
        if store:
            clean.append(z)
        return velocity(all_cells, all_times, labels)[:, -1:]

    xar.velocity = from_scratch
    torch.manual_seed(3)
    uncached = xar.sample(labels, steps=4, guidance=2.0)
    assert cached.shape == (2, 16, 8, 8)
    assert cached.std() > 0.1
    torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)


def test_sampling_is_deterministic_and_leaves_the_module_alone():
    xar = fill_zero_weights(XAR(SMALL))
    labels = torch.tensor([0, 2])
    state = {name: tensor.clone() for name, tensor in xar.state_dict().items()}
    attributes = set(vars(xar))

    def sample_with(seed):
        torch.manual_seed(seed)
        return xar.sample(labels, steps=3, guidance=1.5)

    first = sample_with(1)
    assert torch.equal(first, sample_with(1))
    assert not torch.equal(first, sample_with(2))
    assert set(vars(xar)) == attributes
    for name, tensor in xar.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def sample_cells(xar, labels, guidance):
    """The cells (B, 4, 16, 16) of samples in 3 steps, from seed 0."""
    torch.manual_seed(0)
    return xar.to_cells(xar.sample(labels, steps=3, guidance=guidance))


@pytest.mark.parametrize("guidance, guidance_first", [(1.0, 1.0), (3.0, 1.0), (1.0, 2.0)])
@torch.no_grad()
def test_guidance_is_1_at_the_first_cell(guidance, guidance_first):
    """As xAR has it; and without guidance, whatever the first cell may have."""
    xar = fill_zero_weights(XAR(replace(SMALL, guidance_first=guidance_first)))
    labels = torch.tensor([1])
    cells = sample_cells(xar, labels, guidance)

    # By hand: the first cell, with the label alone.
    torch.manual_seed(0)
    z = torch.randn(1, 1, 16, 16)
    for t, t_next in ((1.0, 0.52), (0.52, 0.04), (0.04, 0.0)):
        v = xar.velocity(z, torch.full((1, 1), t), labels, caches=[[], []])
        z = z + v * (t_next - t)
    torch.testing.assert_close(cells[:, :1], z, atol=1e-5, rtol=1e-4)


def test_guidance_changes_the_second_cell():
    xar = fill_zero_weights(XAR(replace(SMALL, guidance_first=1.0)))
    labels = torch.tensor([1])
    weak = sample_cells(xar, labels, 1.0)
    strong = sample_cells(xar, labels, 3.0)
    assert (strong[:, 1] - weak[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_first, step", [(1.0, 1.0), (2.5, 0.5), (9.0, 0.0)])
@pytest.mark.parametrize("cell", [0, 1, 2, 3])
@torch.no_grad()
def test_guidance_grows_over_the_cells_to_its_full_value(cell, guidance_first, step):
    """v(no label) + g (v(label) - v(no label)), at guidance 4: g = 4 at the last of 4 cells."""
    strength = 4 - step * (3 - cell)
    xar = fill_zero_weights(XAR(replace(SMALL, guidance_first=guidance_first)))
    labels = torch.tensor([1, 0])
    no_label = torch.tensor([3, 3])
    cells = sample_cells(xar, labels, guidance=4.0)

    # By hand: all cells in one pass under the mask, the finished ones clean, at t = 0.
    torch.manual_seed(0)
    noise = torch.stack([torch.randn(2, 1, 16, 16) for _ in range(4)])
    z = noise[cell]
    for t, t_next in ((1.0, 0.52), (0.52, 0.04), (0.04, 0.0)):
        so_far = torch.cat([cells[:, :cell], z], dim=1)
        times = torch.zeros(2, cell + 1)
        times[:, -1] = t
        with_label = xar.velocity(so_far, times, labels)[:, -1:]
        without = xar.velocity(so_far, times, no_label)[:, -1:]
        v = without + strength * (with_label - without)
        z = z + v * (t_next - t)
    torch.testing.assert_close(cells[:, cell : cell + 1], z, atol=1e-4, rtol=1e-4)


class GaussianVelocity(XAR):
    """The best velocity for data N(0.7, 0.5^2): E[eps - z_0 | z_t] in closed form."""

    MEAN = 0.7
    STD = 0.5

    def velocity(self, z, t, labels, first_cell=0, caches=None, store=False):
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


def test_the_last_step_keeps_the_drift_of_the_noisy_path():
    """With one step, from t = 1 to 0. There z_t is the noise, v = noise - 0.7, s = -noise."""
    labels = torch.zeros(3, dtype=torch.int64)
    torch.manual_seed(4)
    noise = torch.cat([torch.randn(3, 1, 16, 16) for _ in range(4)], dim=1)

    xar = GaussianVelocity(replace(SMALL, stochastic=1))
    torch.manual_seed(4)
    cells = xar.to_cells(xar.sample(labels, steps=1))
    torch.testing.assert_close(cells, 0.7 - noise)  # noise - (v - s)

    xar = GaussianVelocity(replace(SMALL, stochastic=0))
    torch.manual_seed(4)
    cells = xar.to_cells(xar.sample(labels, steps=1))
    torch.testing.assert_close(cells, torch.full_like(noise, 0.7), atol=1e-6, rtol=0)  # noise - v


def test_two_steps_of_euler_maruyama_by_hand():
    xar = GaussianVelocity(replace(SMALL, stochastic=1, cell=8))  # one cell
    torch.manual_seed(4)
    found = xar.to_cells(xar.sample(torch.tensor([0]), steps=2)).numpy()[0, 0]

    torch.manual_seed(4)
    z = torch.randn(1, 1, 64, 16).double().numpy()[0, 0]
    fresh = torch.randn(1, 1, 64, 16).double().numpy()[0, 0]

    def drift(z, t):
        """v - t s, from the density of z_t, N(0.7 (1 - t), variance)."""
        variance = 0.25 * (1 - t) ** 2 + t**2
        gap = z - 0.7 * (1 - t)
        noise = t / variance * gap
        data = 0.7 + 0.25 * (1 - t) / variance * gap
        return noise - data + t * gap / variance  # s = -gap / variance

    z = z - 0.96 * drift(z, 1.0) + math.sqrt(2 * 1.0 * 0.96) * fresh
    z = z - 0.04 * drift(z, 0.04)  # without noise
    np.testing.assert_allclose(found, z, atol=1e-5)


def test_training_finds_the_velocity_of_a_known_gaussian():
    xar = XAR(SMALL)
    labels = torch.zeros(16, dtype=torch.int64)
    optimizer = torch.optim.Adam(xar.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        latents = 0.7 + 0.5 * torch.randn(16, 16, 8, 8)
        xar.loss(latents, labels).backward()
        optimizer.step()

    t = torch.full((16, 4), 0.5)
    z = 0.35 + 0.3125**0.5 * torch.randn(16, 4, 16, 16)  # as z_t lies at t = 1/2
    best = GaussianVelocity(SMALL).velocity(z, t, labels)
    with torch.no_grad():
        velocity = xar.velocity(z, t, labels)
    assert ((velocity - best) ** 2).mean() < 0.05 * best.var()


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


@pytest.mark.parametrize("layers", [2, 3, 4])
@torch.no_grad()
def test_positions_enter_before_each_half_of_the_blocks(layers):
    xar = XAR(replace(SMALL, gen_layers=layers))  # its blocks add nothing: their gates are 0
    z = torch.randn(1, 4, 16, 16)
    velocity = xar.velocity(z, torch.rand(1, 4), torch.tensor([1]))

    def normalised(x):
        return x / np.sqrt((x**2).mean(1, keepdims=True) + np.finfo(np.float32).eps)

    weight, bias, out = (
        p.double().numpy() for p in (xar.proj_in.weight, xar.proj_in.bias, xar.proj_out.weight)
    )
    first, second = xar.position.double().numpy()
    x = z[0].flatten(0, 1).double().numpy() @ weight.T + bias + first
    x = normalised(x) + second
    expected = normalised(x) @ out.T
    np.testing.assert_allclose(velocity[0].flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("generator_class", [XAR, FAR])
def test_dropout_acts_in_training_alone(generator_class):
    torch.manual_seed(1)
    generator = fill_zero_weights(generator_class(replace(SMALL, gen_dropout=0.5)))
    batch = torch.randn(4, 16, 8, 8) if generator_class is XAR else torch.zeros(4, 2, 8, 8).long()
    labels = torch.arange(4) % 3
    draws = generator.draw(4, torch.device("cpu"))

    def losses(generator):
        return {generator.loss(batch, labels, draws).item() for _ in range(3)}

    assert len(losses(generator.eval())) == 1
    assert len(losses(generator.train())) == 3


def test_dropout_of_a_block_is_that_of_its_three_places():
    """Attention weights, what attention adds, what the MLP adds: each kept with probability 1/2."""
    block = glotok.Block(8, 1, dropout=0.5).train()
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.ones_(block.attention.proj.bias)  # attention adds 1, or, kept, 2
    x = torch.zeros(500, 1, 8)
    added = block(x)
    assert set(added.unique().tolist()) == {0.0, 2.0}
    assert (added > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)

    torch.nn.init.zeros_(block.attention.proj.bias)
    torch.nn.init.ones_(block.mlp_out.bias)
    added = block(x)
    assert set(added.unique().tolist()) == {0.0, 2.0}

    # one token of value 1: its attention weight is 1, or with dropout 0 or 2
    torch.nn.init.zeros_(block.mlp_out.bias)
    torch.nn.init.ones_(block.attention.qkv.bias)
    torch.nn.init.eye_(block.attention.proj.weight)
    added = block(x)
    assert set(added.unique().tolist()) == {0.0, 4.0}
    assert (added > 0).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_the_gate_of_the_mlp_is_gelu():
    block = glotok.Block(8, 1)
    x = torch.randn(5, 8)
    gate, up = (x @ block.mlp_in.weight.T + block.mlp_in.bias).double().chunk(2, dim=1)
    gelu = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    expected = (gelu * up) @ block.mlp_out.weight.double().T + block.mlp_out.bias
    torch.testing.assert_close(block.mlp(x).double(), expected, atol=1e-6, rtol=1e-5)


# ---- The rivals: local supervision of FQGAN and VA-VAE


def test_fqgans_loss_is_infonce_without_temperature():
    rng = np.random.default_rng(0)
    prediction = rng.normal(size=(5, 7))
    target = rng.normal(size=(5, 7))

    def infonce(prediction):
        total = 0
        for i in range(5):
            similarity = []
            for j in range(5):
                dot = prediction[i] @ target[j]
                lengths = np.linalg.norm(prediction[i]) * np.linalg.norm(target[j])
                similarity.append(dot / lengths)
            total -= np.log(np.exp(similarity[i]) / np.exp(similarity).sum())
        return total / 5

    x = torch.tensor(prediction, dtype=torch.float32, requires_grad=True)
    y = torch.tensor(target, dtype=torch.float32, requires_grad=True)
    loss = glotok.contrastive_loss(x, y)
    assert loss.item() == pytest.approx(infonce(prediction), abs=1e-6)
    loss.backward()
    assert y.grad is None
    expected = numerical_gradient(infonce, prediction)
    np.testing.assert_allclose(x.grad, expected, atol=1e-5)


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
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 4, 3))
    f = z + 0.8 * rng.normal(size=(2, 4, 3))  # so near that both margins forgive some
    maps = np.ascontiguousarray(f.transpose(0, 2, 1)).reshape(2, 3, 2, 2)
    x = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    y = torch.tensor(maps, dtype=torch.float32, requires_grad=True)
    loss = glotok.vf_loss(x, y)
    assert loss.item() == pytest.approx(vf_by_loops(z, f), abs=1e-6)
    loss.backward()
    assert y.grad is None
    expected = numerical_gradient(lambda z: vf_by_loops(z, f), z)
    np.testing.assert_allclose(x.grad, expected, atol=1e-4)


def test_vavaes_loss_forgives_what_lies_within_the_margins():
    angle = math.acos(0.6)  # 0.6 > 0.5
    z = torch.tensor([[[1.0, 0.0]]])
    maps = torch.tensor([math.cos(angle), math.sin(angle)]).view(1, 2, 1, 1)
    assert glotok.vf_loss(z, maps).item() == 0
    angle = math.acos(0.3)
    maps = torch.tensor([math.cos(angle), math.sin(angle)]).view(1, 2, 1, 1)
    assert glotok.vf_loss(z, maps).item() == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("angle, expected", [(0.7, 0.0), (1.0, (1 - math.cos(1.0) - 0.25) / 2)])
def test_vavaes_distances_between_tokens_have_a_margin(angle, expected):
    """The first pair of tokens and the second are alike; z turns the second pair by the angle."""
    turned = [math.cos(angle), math.sin(angle)]
    z = torch.tensor([[[1.0, 0.0], [1.0, 0.0], turned, turned]])
    maps = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).view(1, 2, 2, 2)
    # 8 of the 16 pairs differ, by 1 - cos(angle); every cos(z_i, f_i) is above 0.5
    assert glotok.vf_loss(z, maps).item() == pytest.approx(expected, abs=1e-6)


def test_vavaes_maps_are_averaged_over_each_tokens_area():
    z = torch.randn(2, 4, 3)
    maps = torch.randn(2, 3, 4, 4)
    f = maps.numpy().reshape(2, 3, 2, 2, 2, 2).mean((3, 5))  # (2, 3, 2, 2)
    f = f.reshape(2, 3, 4).transpose(0, 2, 1)
    assert glotok.vf_loss(z, maps).item() == pytest.approx(vf_by_loops(z.numpy(), f), abs=1e-6)


def teacher_answer(n=2):
    """A vector and a map of random features for each of n images."""
    return torch.randn(n, 64), torch.randn(n, 64, 16, 16)


@pytest.mark.parametrize("semantic, loss, used", [("fqgan", "contrastive", 0), ("vavae", "vf", 1)])
def test_local_supervision_moves_the_semantic_branch_alone(semantic, loss, used):
    model = GloTok(replace(TINY, semantic=semantic, teacher="convnet", width=16))
    answer = teacher_answer()
    _, losses = model(random_images(), answer)
    losses[loss].backward()
    # Straight through the quantizer; no codebook, nothing visual, no decoder.
    assert modules_with_gradient(model) == {"encoder", "adapter_sem", "semantic_head"}

    other = list(answer)
    other[1 - used] = torch.randn_like(other[1 - used])
    x = random_images()
    assert model(x, answer)[1][loss] == model(x, other)[1][loss]  # the other kind is not looked at


def test_local_supervision_reads_the_quantized_codes():
    for semantic, loss in (("fqgan", "contrastive"), ("vavae", "vf")):
        model = GloTok(replace(TINY, semantic=semantic, teacher="convnet")).eval()
        x = random_images()
        answer = teacher_answer()
        found = model(x, answer)[1][loss]
        sem, _ = model.encode(x)
        codes = F.embedding(sem.flatten(1), model.codebook_sem)
        prediction = model.semantic_head(codes)
        if semantic == "fqgan":
            expected = glotok.contrastive_loss(prediction, answer[0])
        else:
            expected = glotok.vf_loss(prediction, answer[1])
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)


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
    # LayerNorm comes last: mean 0, deviation 1
    assert before.mean().item() == pytest.approx(0, abs=1e-5)
    assert before.std(correction=0).item() == pytest.approx(1, abs=1e-2)


def test_disentanglement_is_the_mean_squared_cosine():
    sem = F.normalize(torch.randn(2, 5, 8), dim=2).requires_grad_()
    vis = F.normalize(torch.randn(2, 5, 8), dim=2).requires_grad_()
    loss = glotok.disentangle_loss(sem, vis)
    dots = np.einsum("btd,btd->bt", sem.detach().double(), vis.detach().double())
    assert loss.item() == pytest.approx((dots**2).mean(), rel=1e-5)
    loss.backward()
    expected = 2 * dots[:, :, None] * vis.detach().double().numpy() / 10
    np.testing.assert_allclose(sem.grad, expected, atol=1e-6)


def test_entropy_loss_by_loops():
    rng = np.random.default_rng(0)

    def unit(shape):
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    z = unit((2, 3, 4))
    codebook = unit((5, 4))

    def entropy(q):
        return -(q * np.log(q)).sum()

    def loss_of(z, codebook):
        q = []
        for feature in z.reshape(6, 4):
            distance = ((feature - codebook) ** 2).sum(1)
            weight = np.exp(-distance / 0.5)
            q.append(weight / weight.sum())
        return np.mean([entropy(row) for row in q]) - entropy(np.mean(q, axis=0))

    x = torch.tensor(z, dtype=torch.float32)
    y = torch.tensor(codebook, dtype=torch.float32)
    found = glotok.entropy_loss(x, y, temperature=0.5)
    assert found.item() == pytest.approx(loss_of(z, codebook), abs=1e-5)
    # At FQGAN's temperature, 0.01: each feature is sure, so only the use of the codes counts.
    codebook = torch.eye(5)
    sure = codebook[[0, 1, 2, 0]].view(1, 4, 5).clone().requires_grad_()
    loss = glotok.entropy_loss(sure, codebook)
    expected = -(1.5 * math.log(2))  # shares 1/2, 1/4, 1/4
    assert loss.item() == pytest.approx(expected, abs=1e-2)
    loss.backward()
    assert sure.grad.isfinite().all()  # though the shares of two codes underflow


@pytest.mark.parametrize("name", ["disentangle", "entropy"])
def test_fqgans_further_losses_have_a_flag_each(name):
    c = replace(TINY, semantic="fqgan", teacher="convnet")
    _, losses = GloTok(c)(random_images(), teacher_answer())
    assert name in losses
    _, losses = GloTok(replace(c, **{f"lambda_{name}": 0.0}))(random_images(), teacher_answer())
    assert name not in losses
    assert "contrastive" in losses


def test_fqgans_further_losses_are_of_both_codebooks():
    model = GloTok(replace(TINY, semantic="fqgan", teacher="convnet")).eval()
    x = random_images()
    _, losses = model(x, teacher_answer())
    entropy = 0
    codes = []
    for name, tokens, features in zip(("sem", "vis"), model.encode(x), model.features(x)):
        codebook = model.get_parameter(f"quantizer_{name}.weight").detach().double()
        codebook = codebook / codebook.norm(dim=1, keepdim=True)
        codes.append(codebook[tokens.flatten()])
        z = features.detach().double().flatten(0, 1)
        z = z / z.norm(dim=1, keepdim=True)
        q = scipy.special.softmax(
            -scipy.spatial.distance.cdist(z, codebook, "sqeuclidean") / 0.01, 1
        )
        entropy += scipy.stats.entropy(q, axis=1).mean() - scipy.stats.entropy(q.mean(0))
    cosines = (codes[0] * codes[1]).sum(1)
    assert losses["disentangle"].item() == pytest.approx((cosines**2).mean().item(), rel=1e-4)
    assert losses["entropy"].item() == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("disentangle", {"encoder", "adapter_sem", "adapter_vis"}),  # straight through
        ("entropy", {"encoder", "adapter_sem", "adapter_vis", "quantizer_sem", "quantizer_vis"}),
    ],
)
def test_what_fqgans_further_losses_move(name, expected):
    model = GloTok(replace(TINY, semantic="fqgan", teacher="convnet"))
    _, losses = model(random_images(), teacher_answer())
    losses[name].backward()
    assert modules_with_gradient(model) == expected


@pytest.mark.parametrize("adapter_layers", [0, 1])
def test_vavaes_weight_is_the_ratio_of_gradients_at_the_last_layer_before_the_latent(
    adapter_layers,
):
    c = replace(TINY, semantic="vavae", teacher="convnet", adapter_layers=adapter_layers)
    c = replace(c, lambda_vf=0.2, lambda_recon=1.5)
    model = GloTok(c)
    x = random_images()
    recon, losses = model(x, teacher_answer())
    losses["recon"] = glotok.reconstruction_loss(recon, x)
    weights = glotok.gradient_weights(c, 0, losses, model)
    assert weights.keys() == {"vf"}

    adapter = model.adapter_sem
    last = adapter.weight if adapter_layers == 0 else adapter.proj_out.weight
    (of_pixels,) = torch.autograd.grad(1.5 * losses["recon"], last, retain_graph=True)
    (of_vf,) = torch.autograd.grad(losses["vf"], last, retain_graph=True)
    expected = 0.2 * of_pixels.norm().item() / of_vf.norm().item()
    assert weights["vf"].item() == pytest.approx(expected, rel=2e-2)  # 1e-4 guards the division
    assert not weights["vf"].requires_grad
    glotok.total_loss(c, losses, weights).backward()  # the graph is still there


@pytest.mark.parametrize("semantic", ["global", "none"])
def test_no_other_supervision_has_local_losses(semantic):
    _, losses = GloTok(replace(TINY, semantic=semantic))(random_images())
    assert losses.keys() == {"quantize", "residual", "coverage"}


def test_coverage_can_be_switched_off():
    _, losses = GloTok(replace(TINY, lambda_coverage=0.0))(random_images())
    assert losses.keys() == {"quantize", "residual"}


# ---- The rivals: FAR


def far_and_tokens():
    """A small FAR, tokens (3, 64, 2) and labels (3,)."""
    far = fill_zero_weights(FAR(replace(TINY, gen_layers=2)))
    sem = torch.randint(TINY.codes_sem, (3, 64))
    vis = torch.randint(TINY.codes_vis, (3, 64))
    labels = torch.randint(TINY.classes, (3,))
    return far, torch.stack([sem, vis], dim=2), labels


@pytest.mark.parametrize("kind, codes", [(0, TINY.codes_sem), (1, TINY.codes_vis)])
@torch.no_grad()
def test_far_sees_earlier_positions_only(kind, codes):
    far, tokens, labels = far_and_tokens()
    before = far.context(labels, tokens[:, :-1])
    assert before.shape == (3, 64, 16)
    tokens[:, 20, kind] = (tokens[:, 20, kind] + 1) % codes
    after = far.context(labels, tokens[:, :-1])
    changed = (after - before).abs().amax((0, 2)) > 1e-6
    assert not changed[:21].any()
    assert changed[21:].all()  # position 21 is the first that sees token 20


@torch.no_grad()
def test_far_sees_the_label_everywhere():
    far, tokens, labels = far_and_tokens()
    before = far.context(labels, tokens[:, :-1])
    after = far.context((labels + 1) % TINY.classes, tokens[:, :-1])
    assert (after - before).abs().amax((0, 2)).min() > 1e-6


@torch.no_grad()
def test_fars_head_predicts_the_visual_index_first():
    far, _, _ = far_and_tokens()
    context = torch.randn(5, 16)
    indices = torch.arange(5)
    alone = far.visual_logits(context)
    vis, sem = far.both_logits(context, indices)
    other_vis, other_sem = far.both_logits(context, indices + 1)
    assert alone.shape == (5, TINY.codes_vis)
    assert sem.shape == (5, TINY.codes_sem)
    # The visual logits see no index, the semantic ones see the visual index.
    assert torch.allclose(alone, vis, atol=1e-6)
    assert torch.allclose(vis, other_vis, atol=1e-6)
    assert (sem - other_sem).abs().amax(1).min() > 1e-5


def test_far_b_has_the_published_number_of_parameters():
    """415 M in table 2. Counted by hand for weights without biases, 16,384 codes of each kind."""
    c = PRESETS["imagenet256-far"]
    assert (c.gen_width, c.gen_layers, c.gen_heads, c.head_layers) == (1024, 24, 16, 3)
    with torch.device("meta"):
        far = FAR(c)
    found = sum(p.numel() for p in far.parameters())
    assert found / 1e6 == pytest.approx(415, rel=0.015)
    block = 4 * 1024**2 + 3 * 1024 * 2730
    codes = 2 * 2 * 16384 * 1024  # embeddings and logits
    by_hand = 27 * block + codes + 2 * 1024**2 + 1001 * 1024
    assert found / by_hand == pytest.approx(1, abs=1e-3)


def test_an_untrained_far_finds_all_codes_equally_likely():
    far = FAR(TINY)
    indices = torch.randint(16, (2, 2, 8, 8))
    expected = (math.log(TINY.codes_sem) + math.log(TINY.codes_vis)) / 2
    assert far.loss(indices, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_far_knows_where_it_is_by_rotary_positions_alone():
    far, _, labels = far_and_tokens()
    same = torch.ones(3, 63, 2, dtype=torch.int64)
    contexts = far.context(labels, same)
    assert (contexts[:, 2:] - contexts[:, 1:-1]).abs().amax((0, 2)).min() > 1e-6
    far.angles.zero_()
    far.label_embedding.weight.copy_(
        far.proj_in(torch.cat([far.embed_vis.weight[1], far.embed_sem.weight[1]]))
    )
    contexts = far.context(labels, same)  # nothing tells one position from another
    torch.testing.assert_close(contexts, contexts[:, :1].expand(-1, 64, -1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_far_with_a_cache_equals_far_without():
    far, tokens, labels = far_and_tokens()
    caches = [[] for _ in far.blocks]
    steps = [far.context(labels, tokens[:, :k], k, caches) for k in range(64)]
    expected = far.context(labels, tokens[:, :63])
    assert torch.allclose(torch.cat(steps, dim=1), expected, atol=1e-5)


@torch.no_grad()
def test_fars_loss_is_the_mean_negative_log_likelihood():
    far, tokens, labels = far_and_tokens()
    indices = tokens.transpose(1, 2).unflatten(2, (8, 8))  # (3, 2, 8, 8)
    show_labels = (torch.zeros(3, dtype=torch.bool),)
    loss = far.loss(indices, labels, show_labels)

    # One position after the other, from the earlier tokens alone.
    total = 0
    for k in range(64):
        context = far.context(labels, tokens[:, :k])[:, -1]
        sem, vis = tokens[:, k].unbind(1)
        logits_vis, logits_sem = far.both_logits(context, vis)
        for b in range(3):
            total -= logits_sem[b].log_softmax(0)[sem[b]].item()
            total -= logits_vis[b].log_softmax(0)[vis[b]].item()
    assert loss.item() == pytest.approx(total / (3 * 64 * 2), rel=1e-5)


@torch.no_grad()
def test_fars_label_dropout_hides_the_labels():
    far, tokens, labels = far_and_tokens()
    indices = tokens.transpose(1, 2).unflatten(2, (8, 8))
    no_label = torch.full_like(labels, TINY.classes)
    show_all = (torch.zeros(3, dtype=torch.bool),)
    hide_all = (torch.ones(3, dtype=torch.bool),)
    hidden = far.loss(indices, labels, hide_all)
    assert torch.equal(hidden, far.loss(indices, no_label, show_all))
    assert not torch.equal(hidden, far.loss(indices, labels, show_all))


def test_far_learns_what_depends_on_the_class_and_samples_it():
    # 4x4 positions
    c = replace(TINY, generator="far", image_size=8, cell=2, gen_width=32, label_dropout=0.2)
    far = FAR(c)
    pattern_sem = torch.randint(c.codes_sem, (2, 4, 4))
    pattern_vis = torch.randint(c.codes_vis, (2, 4, 4))
    pattern = torch.stack([pattern_sem, pattern_vis], dim=1)  # one for each of two classes
    optimizer = torch.optim.Adam(far.parameters(), 3e-3)
    for _ in range(150):
        labels = torch.randint(2, (16,))
        loss = far.loss(pattern[labels], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    far.config = replace(c, top_k=1)
    labels = torch.tensor([0, 1, 1])
    assert torch.equal(far.sample(labels, guidance=3.0), pattern[labels])

    far.config = c
    labels = torch.tensor([0, 1])
    torch.manual_seed(5)
    first = far.sample(labels, guidance=1.0)
    torch.manual_seed(5)
    again = far.sample(labels, guidance=1.0)
    assert first.dtype == torch.int64
    assert first.shape == (2, 2, 4, 4)
    assert torch.equal(first, again)


@pytest.mark.parametrize("top_k", [0, 3])
@torch.no_grad()
def test_fars_guidance_moves_away_from_the_answer_without_label(top_k, monkeypatch):
    far, _, labels = far_and_tokens()
    far.config = replace(far.config, top_k=top_k)
    multinomial = torch.multinomial
    seen = []
    drawn = []

    def record(p, n):
        seen.append(p)
        drawn.append(multinomial(p, n))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", record)
    far.sample(labels, guidance=2.5)
    assert len(seen) == 128  # 64 positions, two indices each

    no_label = torch.full_like(labels, TINY.classes)
    no_tokens = torch.zeros(3, 0, 2, dtype=torch.int64)
    context = far.context(labels, no_tokens)[:, 0]
    without_label = far.context(no_label, no_tokens)[:, 0]

    def expected(logits, without):
        guided = without + 2.5 * (logits - without)
        p, order = guided.softmax(1).sort(descending=True)
        if top_k:
            p = p[:, :top_k] / p[:, :top_k].sum(1, keepdim=True)
        return p, order

    p, order = expected(far.visual_logits(context), far.visual_logits(without_label))
    assert torch.allclose(seen[0], p, atol=1e-6)
    vis = order.gather(1, drawn[0])[:, 0]
    logits = far.both_logits(context, vis)[1]
    p, _ = expected(logits, far.both_logits(without_label, vis)[1])
    assert torch.allclose(seen[1], p, atol=1e-6)


# ================================================================================================
# Part II. Networks, data, measures
# ================================================================================================

# ---- borrowed networks


def test_lpips_has_the_published_names():
    state = LPIPS().state_dict()
    for name in (
        "features.0.weight",
        "features.28.bias",
        "lin0.model.1.weight",
        "lin4.model.1.weight",
    ):
        assert name in state
    assert len(state) == 26 + 5  # weights and biases of 13 convolutions; 5 heads
    assert state["lin3.model.1.weight"].shape == (1, 512, 1, 1)


def test_lpips_reads_the_two_published_files(tmp_path, monkeypatch):
    """torchvision's VGG16, of which the classifier is left out, and the heads of LPIPS."""
    net = LPIPS()
    vgg = {k: torch.randn_like(v) for k, v in net.state_dict().items() if k[:3] == "fea"}
    vgg |= {"classifier.0.weight": torch.ones(2, 2), "classifier.6.bias": torch.ones(2)}
    heads = {k: torch.rand_like(v) for k, v in net.state_dict().items() if k[:3] == "lin"}
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(heads, tmp_path / "vgg.pth")
    monkeypatch.setattr(train, "fetch", tmp_path.joinpath)
    found = train.load_lpips(None, torch.device("cpu")).state_dict()
    assert len(found) == 31
    for name, value in found.items():
        assert torch.equal(value, (vgg | heads)[name])


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


DINOV2_SHAPES = {
    "cls_token": (1, 1, 384),
    "mask_token": (1, 384),
    "pos_embed": (1, 1370, 384),
    "patch_embed.proj.weight": (384, 3, 14, 14),
    "blocks.0.norm1.weight": (384,),
    "blocks.11.attn.qkv.weight": (1152, 384),
    "blocks.3.attn.proj.bias": (384,),
    "blocks.5.ls1.gamma": (384,),
    "blocks.5.ls2.gamma": (384,),
    "blocks.7.mlp.fc1.weight": (1536, 384),
    "blocks.7.mlp.fc2.bias": (384,),
    "norm.bias": (384,),
}


def test_dinov2_has_the_published_names_and_shapes():
    net = DINOv2()
    state = net.state_dict()
    for name, shape in DINOV2_SHAPES.items():
        assert state[name].shape == shape, name
    assert len(state) == 4 + 12 * 14 + 2 + 1
    assert net(torch.rand(2, 3, 28, 42)).shape == (2, 1 + 6, 384)


@torch.no_grad()
def test_dinov2_puts_each_patch_at_its_place():
    """With both scales of every block at zero nothing mixes: a token is its patch and position."""
    net = DINOv2(depth=2)
    for block in net.blocks:
        block.ls1["gamma"].zero_()
        block.ls2["gamma"].zero_()
    x = torch.rand(1, 3, 518, 518)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    row = 1
    column = 2
    patch = ((x[0] - mean) / std)[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
    state = net.state_dict()
    token = state["patch_embed.proj.weight"].flatten(1) @ patch.flatten()
    token += state["patch_embed.proj.bias"]
    token += state["pos_embed"][0, 1 + 37 * row + column]
    found = net(x)[0, 1 + 37 * row + column]
    torch.testing.assert_close(found, net.norm(token), atol=1e-4, rtol=1e-4)


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


def test_kmeans_lowers_the_error():
    x = torch.randn(500, 3)

    def error(centres):
        return torch.cdist(x, centres).min(1).values.square().mean()

    torch.manual_seed(1)
    start = kmeans(x, 20, iterations=0)
    torch.manual_seed(1)
    assert error(kmeans(x, 20)) < 0.9 * error(start)


def test_kmeans_of_equal_and_of_too_few_points():
    assert kmeans(torch.zeros(5, 2), 3).abs().sum() == 0
    with pytest.raises(ValueError, match="4 centres among 3 points"):
        kmeans(torch.randn(3, 3), 4)


# ---- t-SNE and uniformity (table 3)


def test_tsne_separates_blobs():
    centres = 10 * torch.eye(4, 6)
    x = (centres[:, None] + torch.randn(4, 40, 6)).flatten(0, 1)
    label = torch.arange(4).repeat_interleave(40)
    y = tsne(x, steps=400)
    assert y.shape == (160, 2)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).topk(10, largest=False).indices
    assert (label[nearest] == label[:, None]).all()  # all ten of the nearest are of the same blob


def test_tsne_keeps_neighbours():
    """A line stays in order: its steps are short beside the distances between its points."""
    line = torch.linspace(0, 100, 200)[:, None] * torch.ones(1, 3)
    y = tsne(line, perplexity=10, steps=400)
    step = (y[1:] - y[:-1]).norm(dim=1)
    assert step.median() < 0.1 * torch.pdist(y).median()


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


def test_uniformity_of_an_even_circle():
    angles = torch.arange(12) * math.pi / 6
    found = uniformity(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert found["density_cv"] < 1e-4
    assert found["normalized_entropy"] == pytest.approx(1)
    assert found["gini"] < 1e-4


# ---- data


def test_shapes_depend_on_the_seed_alone():
    images, labels = fid.draw_shapes(60, 32, 5)
    assert images.shape == (60, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(6))
    same_images, same_labels = fid.draw_shapes(60, 32, 5)
    assert torch.equal(images, same_images)
    assert torch.equal(labels, same_labels)
    other_images, _ = fid.draw_shapes(60, 32, 6)
    assert not torch.equal(images, other_images)


def all_images(data):
    """Training and held-out images and their labels, together."""
    images = torch.cat([data.train, data.val])
    labels = torch.cat([data.train_labels, data.val_labels])
    return images, labels


def pixels_of(path):
    """An RGB picture -> uint8 (3, H, W)."""
    return np.asarray(Image.open(path)).transpose(2, 0, 1).copy()


def test_folder_with_classes_holds_out_a_fixed_twentieth(tmp_path):
    save_pictures(tmp_path / "cat", 30)
    save_pictures(tmp_path / "dog", 30, seed=100)
    data = fid.load_data(str(tmp_path), 16)
    assert len(data.train) == 57
    assert len(data.val) == 3
    assert data.classes == ["cat", "dog"]
    again = fid.load_data(str(tmp_path), 16)
    assert torch.equal(data.val, again.val)
    label_of = {}
    for image, label in zip(*all_images(data)):
        label_of[image.numpy().tobytes()] = label.item()
    for label, name in enumerate(data.classes):
        for path in (tmp_path / name).iterdir():
            assert label_of[pixels_of(path).tobytes()] == label


def test_folder_with_train_and_val_uses_them(tmp_path):
    for part, n in (("train", 4), ("val", 2)):
        save_pictures(tmp_path / part / "a", n)
        save_pictures(tmp_path / part / "b", n, seed=50)
    data = fid.load_data(str(tmp_path), 16)
    assert len(data.train) == 8
    assert len(data.val) == 4
    assert data.val_labels.tolist() == [0, 0, 1, 1]
    save_pictures(tmp_path / "val" / "c", 1)
    with pytest.raises(BadInput, match="'c'"):
        fid.load_data(str(tmp_path), 16)


def test_flat_folder_is_one_class_and_odd_pictures_are_fitted(tmp_path, capsys):
    save_pictures(tmp_path, 3)
    save_pictures(tmp_path, 2, size=40, suffix=".jpg")
    Image.new("L", (20, 50), 77).save(tmp_path / "grey.png")
    data = fid.load_data(str(tmp_path), 16)
    assert data.classes == [""]
    images, _ = all_images(data)
    assert len(images) == 6
    assert (images == 77).all((1, 2, 3)).sum() == 1
    assert "3 of 6 images" in capsys.readouterr().err


def test_photographs_are_turned_upright(tmp_path):
    picture = Image.new("RGB", (16, 16))
    picture.paste((255, 0, 0), (0, 0, 16, 8))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    save_pictures(tmp_path, 1)
    picture.save(tmp_path / "turned.png", exif=exif)
    images, _ = all_images(fid.load_data(str(tmp_path), 16))
    (turned,) = [x for x in images if x[1:].sum() == 0]
    assert turned[0, 12, 8] == 255
    assert turned[0, 3, 8] == 0


def names_of(images, folder):
    """The names of the files in a folder whose pictures are images uint8 (N, 3, H, W)."""
    name_of = {}
    for path in folder.glob("*.png"):
        with contextlib.suppress(OSError):  # broken
            name_of[pixels_of(path).tobytes()] = path.name
    return [name_of[x.numpy().tobytes()] for x in images]


def test_one_broken_picture_in_many_is_named_and_left_out(tmp_path, capsys):
    """What is held out is the same as without it, and however the others are read."""
    save_pictures(tmp_path, 150)
    before = fid.load_data(str(tmp_path), 16)
    torn = tmp_path / "008.png"  # one of those that are looked at if they are decoded later
    index = [i for i, x in enumerate(before.train) if np.array_equal(x, pixels_of(torn))]
    assert len(index) == 1  # it is one of the 143 to train on, and not of the 7
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    after = fid.load_data(str(tmp_path), 16)
    kept = [i for i in range(143) if i != index[0]]
    assert torch.equal(after.train, before.train[kept])
    assert torch.equal(after.val, before.val)
    message = capsys.readouterr().err
    assert "008.png" in message
    assert "1 of 150" in message
    later = fid.load_data(str(tmp_path), 16, decode_later=True)
    assert [path.name for path in later.val] == names_of(before.val, tmp_path)
    assert len(later.train) == 143
    (tmp_path / "010.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match="2 of 150"):
        fid.load_data(str(tmp_path), 16)


def jpeg_with_tags(*entries):
    """A JPEG file whose EXIF tags are entries (number, type, count, four bytes)."""
    tags = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    for number, kind, count, value in entries:
        tags += struct.pack(">HHI", number, kind, count) + value
    tags += struct.pack(">I", 0)
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(file, "JPEG", exif=b"Exif\0\0" + tags)
    return file.getvalue()


@pytest.mark.parametrize("number", [0x0100, 0x011A])  # width, resolution: here they are text
def test_a_picture_with_a_broken_tag_is_named_and_left_out(number, tmp_path, capsys):
    turned = (0x0112, 3, 1, b"\0\6\0\0")
    (tmp_path / "whole.jpg").write_bytes(jpeg_with_tags(turned))
    assert fid.load_image(tmp_path / "whole.jpg").problem is None
    path = tmp_path / "broken.jpg"
    path.write_bytes(jpeg_with_tags((number, 2, 4, b"abc\0"), turned))
    assert fid.load_image(path).image is None
    assert "broken.jpg" in fid.load_image(path).problem


def test_a_folder_with_train_alone_holds_out_a_twentieth_of_it(tmp_path):
    save_pictures(tmp_path / "train" / "cat", 30)
    save_pictures(tmp_path / "train" / "dog", 30, seed=100)
    data = fid.load_data(str(tmp_path), 16)
    assert data.classes == ["cat", "dog"]
    assert len(data.val) == 3
    save_pictures(tmp_path / "car", 1)  # so `train` is a class beside it
    assert fid.load_data(str(tmp_path), 16).classes == ["car", "train"]


def test_npz_with_and_without_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images, labels=np.arange(40) % 3)
    data = fid.load_data(str(tmp_path / "a.npz"), 16)
    assert len(data.train) == 38
    assert len(data.val) == 2
    assert len(data.classes) == 3
    first = data.val[0].permute(1, 2, 0).numpy()
    (i,) = [i for i in range(40) if np.array_equal(images[i], first)]
    assert data.val_labels[0] == i % 3
    np.savez(tmp_path / "b.npz", arr_0=images)
    assert len(fid.load_data(str(tmp_path / "b.npz"), 8).classes) == 1
    labels = np.full(40, 255, np.uint8)  # the highest number of this type
    np.savez(tmp_path / "c.npz", arr_0=images, labels=labels)
    assert len(fid.load_data(str(tmp_path / "c.npz"), 8).classes) == 256


def test_hidden_files_and_folders_are_left_out(tmp_path):
    save_pictures(tmp_path / "cat", 4)
    save_pictures(tmp_path / ".ipynb_checkpoints", 4)
    save_pictures(tmp_path / "cat" / ".thumbnails", 4)
    shutil.copy(tmp_path / "cat" / "000.png", tmp_path / "cat" / "._000.png")
    data = fid.load_data(str(tmp_path), 16)
    assert data.classes == ["cat"]
    assert len(data.train) + len(data.val) == 4


CIFAR10_FILES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def add_to_archive(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def save_cifar10(path):
    """A small archive of CIFAR-10's layout, two records a file, and a name that climbs out.

    Records of file i: label i, red 10 i, green 20, blue by position.
    """
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate(CIFAR10_FILES):
            red = bytes([10 * i] * 1024)
            green = bytes([20] * 1024)
            blue = bytes(k % 256 for k in range(1024))
            record = bytes([i]) + red + green + blue
            add_to_archive(archive, f"cifar-10-batches-bin/{name}.bin", 2 * record)
        add_to_archive(archive, "../../escaped.txt", b"bad")


def test_cifar_records_are_read_in_place(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    save_cifar10(path)
    data = fid.read_cifar10(path, 32)
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.val_labels.tolist() == [5, 5]
    assert len(data.classes) == 10
    assert (data.train[2, 0] == 10).all()
    assert (data.train[2, 1] == 20).all()
    assert data.val[0, 2].flatten().tolist() == [k % 256 for k in range(1024)]
    assert list(tmp_path.iterdir()) == [path]  # nothing unpacked


def jpeg(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def publish(path, monkeypatch):
    """Let the file at `path` be the published one of its name."""
    published = fid.Published("https://nowhere.invalid/", fid.sha256(path))
    monkeypatch.setitem(fid.PUBLISHED, path.name, published)


@pytest.fixture
def imagenette(tmp_path, monkeypatch):
    """A small archive of Imagenette's layout in data/, believed to be the published one."""
    monkeypatch.chdir(tmp_path)
    path = Path("data/imagenette2-160.tgz")
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for split, n in (("train", 3), ("val", 1)):
            for k, name in enumerate(fid.IMAGENETTE_CLASSES):
                for i in range(n):
                    content = jpeg(20 * k)
                    add_to_archive(archive, f"imagenette2-160/{split}/{name}/{i}.JPEG", content)
    publish(path, monkeypatch)
    return path


def test_imagenette_is_unpacked_once_and_its_classes_are_words(imagenette):
    data = fid.load_data("imagenette", 16)
    assert data.classes[:2] == ["tench", "English springer"]
    assert data.train.shape == (30, 3, 16, 16)
    assert data.val.shape == (10, 3, 16, 16)
    for images, labels in ((data.train, data.train_labels), (data.val, data.val_labels)):
        shade = images[:, 0].float().mean((1, 2))
        torch.testing.assert_close(shade, 20.0 * labels, atol=3, rtol=0)
    assert sorted(p.name for p in Path("data").iterdir()) == ["imagenette2-160", imagenette.name]

    marker = Path("data/imagenette2-160/train/n01440764/3.JPEG")
    marker.write_bytes(jpeg(0))  # unpacking again would remove it
    assert len(fid.load_data("imagenette", 16).train) == 31


def spoil_archive(path, damage, monkeypatch):
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    if damage == "climbs out":
        with tarfile.open(path, "w:gz") as archive:
            add_to_archive(archive, "imagenette2-160/train/n01440764/0.JPEG", jpeg(0))
            add_to_archive(archive, "../../escaped.txt", b"bad")
    if damage == "no space":

        def write_some(self, path, filter):
            (path / "imagenette2-160").mkdir(parents=True)
            (path / "imagenette2-160" / "0.JPEG").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tarfile.TarFile, "extractall", write_some)


@pytest.mark.parametrize("damage", ["cut short", "climbs out", "no space"])
def test_a_bad_archive_leaves_nothing_unpacked(damage, imagenette, monkeypatch):
    spoil_archive(imagenette, damage, monkeypatch)
    with pytest.raises(BadInput, match="is not the published file|No space"):
        fid.load_data("imagenette", 16)
    publish(imagenette, monkeypatch)  # even if its hash were right
    with pytest.raises(BadInput, match="cannot unpack data/imagenette2-160.tgz"):
        fid.load_data("imagenette", 16)
    assert [p.name for p in Path("data").iterdir()] == [imagenette.name]
    assert not list(Path().rglob("escaped*"))


def test_downloads_are_checked_and_put_in_place_whole(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (tmp_path / "thing").write_bytes(b"published bytes")
    (tmp_path / "other").write_bytes(b"published bytes")
    folder = tmp_path.as_uri() + "/"
    digest = hashlib.sha256(b"published bytes").hexdigest()

    monkeypatch.setitem(fid.PUBLISHED, "thing", fid.Published(folder, digest))
    assert fid.fetch("thing", cache).read_bytes() == b"published bytes"
    (cache / "thing").write_bytes(b"tampered")
    with pytest.raises(BadInput, match="SHA-256"):
        fid.fetch("thing", cache)

    monkeypatch.setitem(fid.PUBLISHED, "other", fid.Published(folder, "0" * 64))
    with pytest.raises(BadInput, match="SHA-256"):
        fid.fetch("other", cache)

    # The message says where to put it and how to check it.
    monkeypatch.setitem(fid.PUBLISHED, "absent", fid.Published(folder + "nowhere/", digest))
    with pytest.raises(BadInput, match=digest) as refusal:
        fid.fetch("absent", cache)
    assert str(cache / "absent") in str(refusal.value)
    assert [p.name for p in cache.iterdir()] == ["thing"]


def test_published_files_lie_in_the_cache_of_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert fid.cache_path("thing") == tmp_path / "hub" / "checkpoints" / "thing"
    assert fid.cache_path("thing", "data") == Path("data") / "thing"


def test_psnr():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = x.clone()
    y[0] += 51  # a fifth of the range: 20 log10 5
    assert fid.psnr(x, y).tolist() == pytest.approx([20 * math.log10(5), 99], abs=1e-4)


# ---- schedules


def test_batches_visit_every_image_once_an_epoch():
    steps = [train.batch_indices(10, 4, step, 0) for step in range(5)]
    first, second = torch.cat(steps).split(10)
    assert sorted(first.tolist()) == list(range(10))
    assert sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_learning_rate_warms_up_stays_and_falls_by_half_a_cosine():
    peak = 3e-4
    rates = [train.learning_rate(step, 100, peak, 10, 0.4) for step in range(101)]
    for step in range(10):
        assert rates[step] == pytest.approx(peak * (step + 1) / 10)
    for step in range(10, 61):
        assert rates[step] == pytest.approx(peak)
    for step in range(61, 101):
        angle = math.pi * (step - 60) / 40
        assert rates[step] == pytest.approx(peak * (1 + math.cos(angle)) / 2, abs=1e-18)
    assert rates[80] == pytest.approx(peak / 2)
    assert rates[100] == 0


def test_learning_rate_falls_to_its_end():
    rates = [train.learning_rate(step, 100, 4e-4, 10, 0.4, 1e-5) for step in range(101)]
    assert rates[4] == pytest.approx(4e-4 / 2)
    assert rates[60] == pytest.approx(4e-4)
    assert rates[80] == pytest.approx((4e-4 + 1e-5) / 2)
    assert rates[90] == pytest.approx(1e-5 + (4e-4 - 1e-5) * (1 + math.cos(3 * math.pi / 4)) / 2)
    assert rates[100] == pytest.approx(1e-5)


def test_learning_rate_without_warm_up_or_cosine():
    for step in range(100):
        assert train.learning_rate(step, 100, 3e-4, warmup=0, cooldown=0) == 3e-4


def test_learning_rate_falls_while_it_still_warms_up():
    """Where the two overlap, as in a run of a few steps, they multiply."""
    for step in range(20):
        up = min(1, (step + 1) / 50)
        down = (1 + math.cos(math.pi * step / 20)) / 2
        assert train.learning_rate(step, 20, 1.0, 50, 1.0) == pytest.approx(up * down)


# ---- plots


def test_limits_are_apart():
    one_point = [np.array([3.0])]
    assert sample.limits(one_point, room=0.05) == (3, 4)
    all_equal = [np.full(5, -2.0), np.full(3, -2.0)]
    assert sample.limits(all_equal, room=0.05) == (-2, -1)
    assert sample.limits([np.array([0, 10]), np.array([-10])]) == (-10, 10)
    assert sample.limits([np.array([0, 10]), np.array([-10])], room=0.05) == (-10, 11)


@pytest.mark.parametrize("style", ["line", "log", "dots"])
@pytest.mark.parametrize(
    "xs, ys",
    [
        ([20], [0.5]),
        ([20], [0.0]),
        ([20, 40, 60], [0.5, 0.5, 0.5]),
        ([20, 20, 20], [0.1, 0.5, 0.9]),
        ([20, 20], [0.0, 0.0]),
    ],
    ids=["one point", "one zero", "equal ys", "equal xs", "equal points"],
)
def test_degenerate_curves_are_drawn(xs, ys, style, tmp_path):
    panel = sample.Panel("title", "step", [("name", xs, ys)], style)
    with np.errstate(all="raise"):
        sample.save_plot(tmp_path / "plot.png", [panel])
    picture = Image.open(tmp_path / "plot.png")
    assert picture.size == (560, 320)
    # Inside the axes, away from the legend, there is something of the curve's colour.
    inside = picture.crop((64, 50, 560 - 16, 320 - 44 + 1))
    colours = [colour for _, colour in inside.getcolors(10**6)]
    assert tuple(bytes.fromhex(sample.COLOURS[0][1:])) in colours


def test_no_log_makes_no_curves(tmp_path):
    sample.draw_curves(tmp_path, floor=0.0)
    assert not (tmp_path / "curves.png").exists()


# ---- teachers


def test_vectors_are_read_from_every_kind_of_file(tmp_path):
    vectors = torch.randn(9, 4)
    np.save(tmp_path / "v.npy", vectors.numpy())
    np.savez(tmp_path / "v.npz", vectors.numpy())
    nested = {"model": {"codebook": vectors, "bias": torch.zeros(4)}, "step": 3}
    torch.save(nested, tmp_path / "v.pt")
    torch.save({"a": vectors, "b": torch.randn(3, 2)}, tmp_path / "two.pth")
    for spec in ("v.npy", "v.npz", "v.pt", "two.pth:a"):
        path, name = train.split_teacher_spec(str(tmp_path / spec))
        assert torch.equal(train.read_vectors(path, name), vectors), spec
    with pytest.raises(BadInput, match=r"a \(9, 4\), b \(3, 2\)"):
        train.read_vectors(tmp_path / "two.pth")


def numbered_images(n):
    """Data of n training images (16x16), image i all of colour (i // 256, i % 256, 0)."""
    pixels = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    pixels[:, 0] = (torch.arange(n) // 256).view(n, 1, 1).byte()
    pixels[:, 1] = (torch.arange(n) % 256).view(n, 1, 1).byte()
    labels = torch.arange(n) * 3 // n
    return fid.Data(pixels, labels, pixels[:2], labels[:2], ["a", "b", "c"])


def numbered_features(x):
    """A teacher network whose features (B, 2, 4, 4) are the image's number and the patch's."""
    images = ((x[:, :2, 0, 0] + 1) * 127.5).round()
    number = images[:, 0] * 256 + images[:, 1]
    maps = torch.stack(
        [number.view(-1, 1).expand(-1, 16), torch.arange(16.0).expand(len(x), 16)], dim=1
    )
    return None, maps.unflatten(2, (4, 4))


@pytest.fixture
def clustered(monkeypatch):
    """What train.py gives to k-means: a list of (vectors, k)."""
    calls = []

    def record(x, k):
        calls.append((x, k))
        return x[:k]

    monkeypatch.setattr(train, "kmeans", record)
    return calls


@pytest.mark.parametrize("cap, images, patches", [(0, 300, 1), (100, 100, 3)])
def test_every_training_image_gives_the_teacher_vectors(cap, images, patches, clustered):
    c = replace(TINY, teacher_centres=12, teacher_images=cap)
    train.feature_centres(c, numbered_images(300), numbered_features, torch.device("cpu"))
    [(vectors, k)] = clustered
    assert k == 12
    number, patch = vectors.T
    seen, count = number.unique(return_counts=True)
    assert len(seen) == images
    assert (count == patches).all()
    assert len(vectors.unique(dim=0)) == images * patches  # an image's patches are different ones
    assert len(patch.unique()) == 16  # and any may be chosen
    if cap:
        assert seen.max() > 200  # the images are not the first ones


def test_kmeans_sees_a_sample_of_too_many_vectors(clustered, monkeypatch):
    monkeypatch.setattr(train, "MOST_PER_CENTRE", 5)
    c = replace(TINY, teacher_centres=12)
    train.feature_centres(c, numbered_images(300), numbered_features, torch.device("cpu"))
    [(vectors, _)] = clustered
    assert vectors.shape == (60, 2)
    assert len(vectors[:, 0].unique()) == 60
    assert vectors[:, 0].max() > 200


def test_vqgan_lcs_centres_are_found_class_by_class(clustered):
    c = replace(TINY, teacher_centres=12, teacher_by_class=1)
    found = train.feature_centres(c, numbered_images(300), numbered_features, torch.device("cpu"))
    assert found.shape == (12, 2)
    assert len(clustered) == 3
    for label, (vectors, k) in enumerate(clustered):
        assert k == 4
        numbers = torch.arange(100.0) + 100 * label
        torch.testing.assert_close(vectors[:, 0].sort().values, numbers)
        torch.testing.assert_close(vectors[:, 1], torch.full((100,), 7.5))  # the patches' mean


def test_feature_networks_give_a_vector_and_maps(monkeypatch):
    convnet = glotok.ConvNet(3).eval()
    teacher = {"convnet": convnet.state_dict(), "classes": 3}
    device = torch.device("cpu")
    x = random_images()
    vectors, maps = train.load_feature_network(teacher, device)(x)
    expected = convnet.features(x).detach()
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(vectors, expected.mean((2, 3)))
    assert not maps.requires_grad

    small = DINOv2(depth=1)
    monkeypatch.setattr(train, "DINOv2", lambda: small)
    monkeypatch.setattr(train, "fetch", lambda name: name)
    monkeypatch.setattr(train, "load_weights", lambda path, net: None)
    vectors, maps = train.load_feature_network({}, device)(x)
    resized = F.interpolate((x + 1) / 2, (224, 224), mode="bicubic", antialias=True)
    tokens = small(resized.clamp(0, 1)).detach()
    torch.testing.assert_close(vectors, tokens[:, 0], atol=1e-5, rtol=1e-4)
    place = tokens[:, 1 + 16 * 3 + 5]
    torch.testing.assert_close(maps[:, :, 3, 5], place, atol=1e-5, rtol=1e-4)
    assert not maps.requires_grad


def test_teacher_vectors_of_any_byte_order_and_under_any_name(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((20, 3))
    np.save(tmp_path / "swapped.npy", vectors.astype(">f8"))
    np.savez(tmp_path / "v.npz", vectors)
    (tmp_path / "v.npz").rename(tmp_path / "really_npz.npy")
    for name in ("swapped.npy", "really_npz.npy"):
        found = train.read_vectors(tmp_path / name)
        np.testing.assert_array_equal(found.numpy(), vectors.astype(np.float32))


def test_the_smallest_image_that_a_discriminator_takes():
    for layers in (2, 3):
        c = replace(TINY, image_size=3 * 2**layers, cell=2, disc_layers=layers, lambda_adv=0.1)
        x = torch.zeros(2, 3, c.image_size, c.image_size)
        disc = glotok.discriminator(c).eval()
        assert disc(x).shape == (2, 1, 1, 1)
        with pytest.raises(RuntimeError):
            disc(x[..., :-1, :-1])


def test_teacher_of_a_file_is_its_histogram(tmp_path):
    vectors = torch.randn(20, 6)
    np.save(tmp_path / "v.npy", vectors.numpy())
    config = replace(TINY, teacher=str(tmp_path / "v.npy"))
    teacher = train.make_teacher(config, None, torch.device("cpu"))
    expected = relation_histogram_direct(vectors.double(), 40, ALPHA)
    np.testing.assert_allclose(teacher["histogram"], expected, atol=1e-4)


# ---- FID


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


# size: of the features their sum, deviation, and a partial sum; of the logits their deviation and
# a partial sum
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
        found = [
            features.sum(),
            features.std(),
            features[1, :512].sum(),
            logits.std(),
            logits[0, :504].sum(),
        ]
        np.testing.assert_allclose([v.item() for v in found], GOLDEN[size], rtol=1e-4)


INCEPTION_SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.bn.running_var": (96,),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


def test_inception_names_are_the_published_ones():
    state = fid.InceptionV3().state_dict()
    names = [name for name in state if "num_batches" not in name]
    assert len(names) == 94 * 5 + 2  # a weight and four of the batch norm each; fc
    for name, shape in INCEPTION_SHAPES.items():
        assert state[name].shape == shape, name


def test_spatial_features_are_the_first_channels_of_a_branch():
    """Mixed_6d.branch1x1 by hand: convolution, batch norm, ReLU; 7 channels, channels last."""
    net = seeded_inception()
    inputs = []
    net.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    _, _, found = net(golden_images(32)[:1])
    x = inputs[0][0].double().numpy()  # (768, 17, 17)
    conv = net.Mixed_6d.branch1x1.conv.weight[:, :, 0, 0].double().numpy()  # (192, 768)
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


@pytest.mark.parametrize("n", [2, 32, 299, 500])
def test_resizing_is_tensorflow_1s(n):
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


def test_frechet_distance_equals_the_matrix_root_where_that_works():
    a = np.random.default_rng(0).normal(size=(500, 40))
    b = np.random.default_rng(1).normal(1, 2, size=(300, 40)) * np.linspace(0.1, 3, 40)
    mu1 = a.mean(0)
    mu2 = b.mean(0)
    s1 = np.cov(a.T)
    s2 = np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_where_the_matrix_root_fails():
    x = np.random.default_rng(0).normal(size=(20, 100))  # fewer images than dimensions
    mu = x.mean(0)
    s = np.cov(x.T)
    trace = np.trace(s)
    none = np.zeros((100, 100))  # constant features
    assert fid.frechet_distance(mu, s, mu, s) == pytest.approx(0, abs=1e-5 * trace)
    # |shift|^2
    assert fid.frechet_distance(mu, s, mu + 3, s) == pytest.approx(900, rel=1e-6)
    # (2 - 1)^2 tr S
    assert fid.frechet_distance(mu, s, mu, 4 * s) == pytest.approx(trace, rel=1e-5)
    assert fid.frechet_distance(mu, none, mu, none) == 0
    assert fid.frechet_distance(mu, s, mu, none) == pytest.approx(trace, rel=1e-9)


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


def test_inception_score_by_hand():
    """Shuffled as torch-fidelity does; split i goes from i N // 10 on."""
    logits = torch.randn(57, 12)
    order = np.random.RandomState(2020).permutation(57)
    parts = [order[i * 57 // 10 : (i + 1) * 57 // 10] for i in range(10)]
    expected = inception_score_by_loops(logits, parts)
    assert fid.inception_score(logits) == pytest.approx(expected, rel=1e-9)


def test_inception_score_in_file_order_as_adm():
    """Each split_size images, and what is left."""
    logits = torch.randn(57, 12)
    parts = [range(25), range(25, 50), range(50, 57)]
    expected = inception_score_by_loops(logits, parts)
    assert fid.inception_score(logits, split_size=25) == pytest.approx(expected, rel=1e-9)
    whole = inception_score_by_loops(logits, [range(57)])
    assert fid.inception_score(logits, split_size=5000) == pytest.approx(whole, rel=1e-9)


def test_inception_score_of_sure_logits_counts_the_classes():
    logits = 50 * torch.eye(7).repeat(100, 1)
    mean, _ = fid.inception_score(logits, splits=1)
    assert mean == pytest.approx(7)


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


def test_kernel_distance_equals_plain_loops():
    x = torch.rand(14, 6)
    y = torch.rand(11, 6) + 0.3
    expected = kernel_distance_by_loops(x, y, subsets=4, size=5)
    assert fid.kernel_distance(x, y, subsets=4, size=5) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_pairs_leaves_the_pairs_out():
    x = torch.rand(14, 6)
    y = x + 0.1 * torch.rand(14, 6)
    expected = kernel_distance_by_loops(x, y, subsets=4, size=5, paired=True)
    found = fid.kernel_distance(x, y, subsets=4, size=5, paired=True)
    assert found == pytest.approx(expected, rel=1e-9)
    perfect, _ = fid.kernel_distance(x, x, subsets=4, size=5, paired=True)
    assert perfect == pytest.approx(0, abs=1e-12)
    biased, _ = fid.kernel_distance(x, x, subsets=4, size=14)
    assert biased < -1e-3


def test_one_subset_that_is_everything_has_no_deviation():
    x = torch.rand(6, 4)
    y = torch.rand(6, 4)
    expected, _ = kernel_distance_by_loops(x, y, subsets=1, size=6)
    mean, deviation = fid.kernel_distance(x, y)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert math.isnan(deviation)
    assert fid.kernel_distance(x, torch.rand(7, 4), subsets=3)[1] > 0


def test_kernel_distance_is_unbiased():
    """Two sets from one distribution: 0 on average, however few there are."""
    distances = [
        fid.kernel_distance(*torch.rand(2, 8, 6), subsets=1, size=8)[0] for _ in range(400)
    ]
    error = np.std(distances) / math.sqrt(400)
    assert abs(np.mean(distances)) < 4 * error
    assert error < 0.005
    assert min(distances) < 0 < max(distances)


def test_kernel_distance_of_few_images_has_smaller_subsets(capsys):
    x = torch.rand(5, 6)
    y = torch.rand(7, 6)
    expected = kernel_distance_by_loops(x, y, subsets=3, size=5)
    assert fid.kernel_distance(x, y, subsets=3) == pytest.approx(expected, rel=1e-9)
    assert "subsets are of 5 images, not 1000" in capsys.readouterr().err
    with pytest.raises(BadInput, match="at least 2 images"):
        fid.kernel_distance(x[:1], y)


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


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tile", [2, 5, 2048])
def test_precision_and_recall_equal_plain_loops(k, tile, monkeypatch):
    """Sets of unequal size that the tiles do not divide."""
    monkeypatch.setattr(fid, "TILE", tile)
    reference = torch.randn(23, 3)
    samples = 1.5 * torch.randn(17, 3) + 2
    expected = precision_recall_by_loops(reference, samples, k)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert expected[0] != expected[1]
    assert fid.precision_recall(reference, samples, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_copies():
    """References that come four times have balls of radius 0, and copies of them lie inside."""
    once = torch.rand(27, 2048)
    for m in range(4, 12):  # matrix products of other sizes are rounded differently
        samples = torch.cat([once[:m], once[:m] + 1])
        precision, _ = fid.precision_recall(once.repeat(4, 1), samples)
        assert precision == 1 / 2
    assert fid.precision_recall(once, once) == (1, 1)


def test_precision_and_recall_of_close_points():
    """Distances of 1e-4 between vectors of length 2: float32 would lose their squares."""
    reference = 1 + 1e-4 * torch.randn(20, 4)
    samples = 1 + 1.5e-4 * torch.randn(20, 4)
    expected = precision_recall_by_loops(reference, samples, 3)
    assert fid.precision_recall(reference, samples) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_want_more_than_k_images():
    with pytest.raises(BadInput, match="more than 3 images a set, not 3 and 4"):
        fid.precision_recall(torch.randn(3, 5), torch.randn(4, 5))


def test_precision_and_recall_take_10000_references_from_the_whole_set(monkeypatch, capsys):
    seen = []

    def no_precision_recall(reference, samples):
        seen.append((reference, samples))
        return 0.25, 0.5

    monkeypatch.setattr(fid, "precision_recall", no_precision_recall)
    features = torch.arange(25000.0)[:, None]
    stats = fid.NOTHING_KNOWN._replace(features=features)
    figures = fid.compare(stats, stats, ["recall"], torch.device("cpu"))
    assert figures == {"recall": 0.5}
    [(reference, samples)] = seen
    assert reference[:, 0].tolist() == [i * 25000 // 10000 for i in range(10000)]
    assert len(samples) == 25000
    assert "10,000 of the 25000 reference images" in capsys.readouterr().err


# ---- fid.py's command


def read_figures(result):
    """The figures that fid.py printed, {name: text}."""
    return dict(line.split(" ", 1) for line in result.out.splitlines())


def outputs_of(net, folder):
    """The network's outputs for each picture below a folder, by itself: three float64 (N, d)."""
    outputs = []
    for path in sorted(folder.rglob("*.png")):
        outputs.append(net(torch.from_numpy(pixels_of(path))[None]))
    return [torch.cat(parts).double().numpy() for parts in zip(*outputs)]


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


def distance_for_tests(mu1, sigma1, mu2, sigma2):
    """Of all four, and in this order: a quick stand-in for frechet_distance."""
    [d] = mu1.shape
    assert d in (2048, 2023)
    assert mu2.shape == (d,)
    assert sigma1.shape == sigma2.shape == (d, d)
    return float(mu1[0] - 2 * mu2[0] + 3 * sigma1[0, 0] - 4 * sigma2[0, 0])


def test_fid_command(tmp_path, inception_file, run_command, monkeypatch):
    """Folders of mixed sizes, arrays and statistics: NumPy's distance of the same features."""
    a = tmp_path / "a"
    b = tmp_path / "b"
    save_pictures(a, 3, size=20)
    save_pictures(a / "more", 2, size=40, seed=9)
    save_pictures(b, 5, size=30, seed=50)
    net = seeded_inception()
    features_a, _, spatial_a = outputs_of(net, a)
    features_b, _, spatial_b = outputs_of(net, b)

    # folder against folder
    words = ["--weights", inception_file, "--save-stats", tmp_path / "a.npz"]
    result = run_command(fid, a, b, *words)
    assert result.status == 0
    figures = read_figures(result)
    assert list(figures) == ["fid", "sfid", "kid", "is", "precision", "recall"]
    expected = frechet_of_few(features_a, features_b)
    assert float(figures["fid"]) == pytest.approx(expected, rel=1e-3)
    expected = frechet_of_few(spatial_a, spatial_b)
    assert float(figures["sfid"]) == pytest.approx(expected, rel=1e-3)
    assert len(figures["kid"].split()) == 2
    assert len(figures["is"].split()) == 2
    assert "biased upward" in result.err
    assert "not the published file" in result.err
    stats = np.load(tmp_path / "a.npz")
    for mu, sigma, outputs in (("mu", "sigma", features_a), ("mu_s", "sigma_s", spatial_a)):
        np.testing.assert_allclose(stats[mu], outputs.mean(0), rtol=1e-4, atol=1e-5)
        variance = outputs.var(0, ddof=1)
        np.testing.assert_allclose(np.diag(stats[sigma]), variance, rtol=1e-2, atol=1e-6)

    # the saved statistics against an array of the same images
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(b.iterdir())])
    np.savez(tmp_path / "b.npz", arr_0=images)
    monkeypatch.setattr(fid, "frechet_distance", distance_for_tests)
    words = [tmp_path / "a.npz", tmp_path / "b.npz", "--weights", inception_file]
    result = run_command(fid, *words, "--only", "fid")
    moments = [features_a.mean(0), np.cov(features_a.T), features_b.mean(0), np.cov(features_b.T)]
    assert list(read_figures(result)) == ["fid"]
    found = float(read_figures(result)["fid"])
    assert found == pytest.approx(distance_for_tests(*moments), rel=1e-3)


@pytest.fixture
def quick_distance(monkeypatch):
    """For tests of the rest: the distance takes seconds, and test_fid_command measures it."""
    monkeypatch.setattr(fid, "frechet_distance", distance_for_tests)


@pytest.mark.usefixtures("quick_distance")
def test_fid_of_statistics_needs_no_network(tmp_path, run_command, monkeypatch):
    """ADM's files hold images, too, and those of spatial features; pytorch-fid's neither."""
    monkeypatch.setattr(fid, "load_inception", None)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    for name, mu in (("a", 5.0), ("b", 0.5)):
        moments = {"mu": np.full(2048, mu), "sigma": np.full((2048, 2048), mu / 2)}
        np.savez(tmp_path / f"{name}_pytorch_fid.npz", **moments)
        moments |= {"mu_s": np.full(2023, mu / 4), "sigma_s": np.full((2023, 2023), mu / 8)}
        np.savez(tmp_path / f"{name}_no_images.npz", **moments)
        np.savez(tmp_path / f"{name}_adm.npz", arr_0=images, **moments)

    paths = [tmp_path / "a_adm.npz", tmp_path / "b_no_images.npz"]
    result = run_command(fid, *paths)
    assert result.status == 0
    figures = {name: float(text) for name, text in read_figures(result).items()}
    assert figures == {"fid": 5 - 1 + 7.5 - 1, "sfid": (5 - 1) / 4 + (7.5 - 1) / 4}
    reason = f"{paths[1]} holds statistics, but no images"
    assert result.err == f"note: left out: kid, is, precision, recall, for {reason}"

    paths = [tmp_path / "a_pytorch_fid.npz", tmp_path / "b_no_images.npz"]
    result = run_command(fid, *paths, "--only", "sfid", "fid")
    assert result.out == "fid 10.500000"
    reason = f"{paths[0]} holds mu and sigma, but not mu_s and sigma_s"
    assert result.err == f"note: left out: sfid, for {reason}"
    result = run_command(fid, *paths, "--only", "sfid", "kid")
    assert result.status == 2
    assert result.out == ""
    assert result.err.endswith("none of sfid, kid can be had of these two sets")
    # what is known is written again
    saved = tmp_path / "again.npz"
    assert run_command(fid, *paths, "--save-stats", saved).status == 0
    assert np.load(saved).files == ["mu", "sigma"]


class QuickNet:
    """Stands in for InceptionV3: fixed random projections of the mean colour of each quarter."""

    def __init__(self, fc=True):
        self.fc = fc
        self.features = []  # of all batches so far
        g = torch.Generator().manual_seed(0)
        self.projection = torch.randn(12, 2048 + 1008 + 2023, generator=g)

    def __call__(self, images):
        quarters = F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        outputs = (quarters - 0.5) @ self.projection
        features, logits, spatial = outputs.split([2048, 1008, 2023], dim=1)
        self.features.append(features)
        return features, logits if self.fc else None, spatial

    def to(self, device):
        return self


@pytest.fixture
def quick_net(monkeypatch):
    """A QuickNet that fid.py's command takes for the published network."""
    net = QuickNet()
    monkeypatch.setattr(fid, "load_inception", lambda file, device: net)
    return net


def random_pixels(n, low, high):
    """uint8 (n, 16, 16, 3), each image around a colour of its own."""
    rng = np.random.default_rng(n)
    colours = rng.integers(low, high, (n, 1, 1, 3))
    return (colours + rng.integers(0, 30, (n, 16, 16, 3))).astype(np.uint8)


def outputs_of_array(images):
    return QuickNet()(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.fixture
def two_files(tmp_path):
    """A.npz with 9 images and B.npz with 12, and the arrays in them."""
    a = random_pixels(9, 30, 130)
    b = random_pixels(12, 60, 220)
    np.savez(tmp_path / "A.npz", a)
    np.savez(tmp_path / "B.npz", b)
    return tmp_path / "A.npz", tmp_path / "B.npz", a, b


def test_fid_command_prints_kid_inception_score_precision_and_recall(
    two_files, quick_net, run_command, monkeypatch
):
    path_a, path_b, a, b = two_files
    x, _, _ = outputs_of_array(a)
    y, logits, _ = outputs_of_array(b)
    result = run_command(fid, path_a, path_b, "--only", "recall", "is", "kid", "precision")
    figures = read_figures(result)
    assert list(figures) == ["kid", "is", "precision", "recall"]

    # 9 of 9 and 9 of 12; the order of the sets matters
    distances = []
    rng = np.random.RandomState(2020)
    for _ in range(100):
        subsets = [each[rng.choice(len(each), 9, replace=False)].double() for each in (x, y)]
        grams = [(u @ v.T / 2048 + 1) ** 3 for u in subsets for v in subsets]
        within = (grams[0] + grams[3]).fill_diagonal_(0).sum() / 72
        distances.append(within - 2 * grams[1].mean())
    kid = [float(value) for value in figures["kid"].split()]
    assert kid == pytest.approx([np.mean(distances), np.std(distances)], abs=1e-6)
    precision, recall = precision_recall_by_loops(x, y, 3)
    assert precision != recall
    assert float(figures["precision"]) == pytest.approx(precision, abs=1e-6)
    assert float(figures["recall"]) == pytest.approx(recall, abs=1e-6)
    order = np.random.RandomState(2020).permutation(12)
    parts = [order[i * 12 // 10 : (i + 1) * 12 // 10] for i in range(10)]
    score = [float(value) for value in figures["is"].split()]
    assert score == pytest.approx(inception_score_by_loops(logits, parts), abs=1e-5)

    # ADM's splits are of 5,000: here there is one. The reference is not looked at.
    quick_net.features.clear()
    result = run_command(fid, path_a, path_b, "--only", "is", "--unshuffled")
    whole, _ = inception_score_by_loops(logits, [range(12)])
    assert result.out == f"is {whole:.6f} 0.000000"
    assert len(torch.cat(quick_net.features)) == 12


@pytest.mark.usefixtures("quick_distance")
def test_fid_of_a_network_without_classifier(two_files, inception_file, tmp_path, run_command):
    weights = torch.load(inception_file, weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        del weights[name]
    torch.save(weights, tmp_path / "bare.pth")
    np.savez(tmp_path / "four.npz", two_files[2][:4])
    words = [tmp_path / "four.npz"] * 2 + ["--weights", tmp_path / "bare.pth"]
    result = run_command(fid, *words)
    assert result.status == 0
    assert list(read_figures(result)) == ["fid", "sfid", "kid", "precision", "recall"]
    assert "left out: is, for the network has no classifier" in result.err
    assert read_figures(result)["precision"] == "1.000000"

    net = fid.load_inception(tmp_path / "bare.pth", torch.device("cpu"))
    features, logits, spatial = net(golden_images(32))
    assert logits is None
    np.testing.assert_allclose(features.sum().item(), GOLDEN[32][0], rtol=1e-4)
    assert spatial.shape == (2, 2023)


@pytest.mark.usefixtures("quick_net", "quick_distance")
def test_fid_of_few_images_has_no_precision(two_files, tmp_path, run_command):
    np.savez(tmp_path / "three.npz", two_files[2][:3])
    result = run_command(fid, two_files[0], tmp_path / "three.npz")
    assert list(read_figures(result)) == ["fid", "sfid", "kid", "is"]
    reason = "they take at least 4 images a set, and there are 3"
    assert f"left out: precision, recall, for {reason}" in result.err
    result = run_command(fid, two_files[0], tmp_path / "three.npz", "--only", "recall")
    assert result.status == 2
    assert result.err.endswith("none of recall can be had of these two sets")


def test_fid_measures_nothing_if_nothing_can_be_had(two_files, tmp_path, run_command, monkeypatch):
    np.savez(tmp_path / "s.npz", mu=np.full(2048, 5.0), sigma=np.eye(2048))
    monkeypatch.setattr(fid, "load_inception", lambda *args: QuickNet())
    monkeypatch.setattr(fid, "statistics_of", None)
    result = run_command(fid, two_files[0], tmp_path / "s.npz", "--only", "kid")
    assert_refused(result, "fid.py", "none of kid can be had of these two sets")


def test_fid_saves_statistics_even_if_there_is_no_figure(
    two_files, quick_net, tmp_path, run_command
):
    np.savez(tmp_path / "s.npz", mu=np.full(2048, 5.0), sigma=np.eye(2048))
    words = ["--only", "kid", "--save-stats", tmp_path / "new.npz"]
    result = run_command(fid, two_files[0], tmp_path / "s.npz", *words)
    assert (result.status, result.out) == (0, "")
    features = outputs_of_array(two_files[2])[0]
    assert np.load(tmp_path / "new.npz")["mu"] == pytest.approx(features.mean(0).numpy(), abs=1e-4)


@pytest.mark.usefixtures("quick_distance")
def test_statistics_in_a_file_come_before_its_images(two_files, quick_net, run_command, tmp_path):
    """ADM's reference files: FID of the whole set, all else of the images that came along."""
    _, path_b, a, _ = two_files
    moments = {"mu": np.full(2048, 5.0), "sigma": np.eye(2048)}
    np.savez(tmp_path / "adm.npz", arr_0=a, **moments)
    result = run_command(fid, *[tmp_path / "adm.npz"] * 2, "--only", "fid")
    assert result.out == "fid -6.000000"  # 5 - 10 + 3 - 4
    assert quick_net.features == []
    result = run_command(fid, path_b, tmp_path / "adm.npz", "--only", "is")
    assert result.status == 0
    assert torch.equal(torch.cat(quick_net.features), outputs_of_array(a)[0])
    result = run_command(fid, *[tmp_path / "adm.npz"] * 2, "--only", "fid", "precision")
    assert result.out == "fid -6.000000\nprecision 1.000000"


def test_fid_only_psnr_needs_no_network(two_files, monkeypatch, run_command):
    monkeypatch.setattr(fid, "load_inception", None)
    result = run_command(fid, two_files[0], two_files[0], "--only", "psnr")
    assert result.out == "psnr 99.000000"


@pytest.mark.usefixtures("quick_distance")
def test_fid_paired_prints_the_psnr(tmp_path, inception_file, run_command):
    images = np.full((3, 24, 24, 3), 100, np.uint8)
    np.savez(tmp_path / "a.npz", images)
    np.savez(tmp_path / "b.npz", images + np.uint8(51))
    words = ["--paired", "--weights", inception_file]
    result = run_command(fid, tmp_path / "a.npz", tmp_path / "b.npz", *words)
    psnr = float(read_figures(result)["psnr"])
    assert psnr == pytest.approx(20 * math.log10(5), abs=1e-3)


@pytest.mark.usefixtures("quick_distance")
def test_fid_skip_bad_leaves_unreadable_images_out(tmp_path, inception_file, run_command):
    np.savez(tmp_path / "a.npz", np.full((3, 24, 24, 3), 100, np.uint8))
    b = save_pictures(tmp_path / "b", 4)
    (b / "torn.png").write_bytes((b / "000.png").read_bytes()[:100])
    words = [tmp_path / "a.npz", b, "--weights", inception_file]
    result = run_command(fid, *words)
    assert result.status == 2
    assert "torn.png" in result.err
    result = run_command(fid, *words, "--skip-bad")
    assert result.status == 0
    assert "torn.png" in result.err


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
    (folder / "ROTTEN/000.png").write_bytes(b"no picture")
    np.savez(folder / "FLOATS.npz", images.astype(float))
    np.savez(folder / "ONE.npz", images[:1])
    np.savez(folder / "NOBODY.npz", images[:0])
    np.savez(folder / "NARROW.npz", mu=np.zeros(64), sigma=np.eye(64))
    narrow = {"mu_s": np.zeros(64), "sigma_s": np.eye(64)}
    np.savez(folder / "NARROW_S.npz", mu=np.zeros(2048), sigma=np.eye(2048), **narrow)
    np.savez(folder / "NAN.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    (folder / "TORN.npz").write_bytes((folder / "NAN.npz").read_bytes()[:-100])
    np.savez(folder / "OBJECTS.npz", np.array([RunsCode(str(folder / "code ran"))]))
    (folder / "text.npz").write_text("hello")

    (folder / "text.pth").write_text("hello")
    torch.save({"a": torch.ones(3)}, folder / "other.pth")
    torch.save(RunsCode(str(folder / "code ran")), folder / "code.pth")
    weights = torch.load(inception_file, weights_only=True)
    torch.save({**weights, "fc.bias": weights["fc.bias"] * math.nan}, folder / "nan.pth")
    del weights["fc.bias"]
    torch.save(weights, folder / "half.pth")
    return folder


# fid.py's words, a part of its message. NET is a good file of weights.
BAD_FID_WORDS = [
    ("nowhere A.npz --weights NET", "no data at"),
    ("EMPTY A.npz --weights NET", "no images"),
    ("ROTTEN A.npz --weights NET", "1 of 4 images"),
    ("FLOATS.npz A.npz --weights NET", "uint8"),
    ("A.npz ONE.npz --weights NET", "at least 2"),
    ("A.npz NOBODY.npz --weights NET", "at least 2"),
    ("A.npz NARROW.npz --weights NET", "mu (2048,)"),
    ("A.npz NAN.npz --weights NET", "holds NaN or infinity"),
    ("A.npz OBJECTS.npz --weights NET", "cannot read"),
    ("A.npz TORN.npz --weights NET", "cannot read"),
    ("A.npz text.npz --weights NET", "cannot read"),
    ("A.npz A.npz --weights text.pth", "cannot read"),
    ("A.npz A.npz --weights code.pth", "cannot read"),
    ("A.npz A.npz --weights gone.pth", "cannot read"),
    ("A.npz A.npz --weights half.pth", "other weights than this network, with these settings, has"),
    ("A.npz A.npz --paired --skip-bad", "PSNR (--paired) needs every image"),
    ("A.npz A.npz --only psnr --skip-bad", "PSNR (--paired) needs every image"),
    ("A.npz A.npz --only fid fdi", "argument --only: invalid choice: 'fdi'"),
    ("A.npz A.npz --only", "argument --only: expected at least one argument"),
    ("A.npz STATS.npz --only kid is", "none of kid, is can be had of these two sets"),
    ("A.npz NARROW_S.npz --weights NET", "mu_s (2023,)"),
    ("A.npz A.npz A.npz", "one argument too many: 'A.npz'"),
    ("A.npz A.npz --weights other.pth", "other weights"),
    ("A.npz A.npz --weights nan.pth", "NaN or infinity"),
    ("A.npz A.npz", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    ("A.npz B.npz --weights NET --paired", "--paired: 2 reference images, but 3 samples"),
    ("A.npz STATS.npz --weights NET --paired", "--paired wants images, not statistics"),
    ("STATS.npz A.npz --weights NET --paired", "--paired wants images, not statistics"),
    ("A.npz A.npz --size 0", "--size is 0: it must lie in 1 to 4,096 pixels"),
    ("imagenette A.npz", "name a folder, for instance data/imagenette2-160/val, and give --size"),
    ("A.npz A.npz --weights NET --save-stats x.txt", "--save-stats is x.txt: it must end in .npz"),
    ("A.npz --weights NET", "samples"),
    ("A.npz A.npz --wieghts x", "'--weights'"),
]


@pytest.mark.parametrize("words, expected", BAD_FID_WORDS)
def test_fid_refuses_bad_input(
    words, expected, bad_fid_inputs, inception_file, run_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(bad_fid_inputs)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    digest = fid.PUBLISHED[fid.INCEPTION_FILE].sha256
    unreachable = fid.Published(tmp_path.as_uri() + "/nowhere/", digest)
    monkeypatch.setitem(fid.PUBLISHED, fid.INCEPTION_FILE, unreachable)
    before = sorted(os.listdir())

    words = [str(inception_file) if word == "NET" else word for word in words.split()]
    result = run_command(fid, *words)
    assert result.status == 2
    assert result.out == ""
    message = result.err.splitlines()[-1]
    assert message.startswith("fid.py: ")
    assert expected in message
    assert sorted(os.listdir()) == before
    assert not Path("code ran").exists()


def test_inception_score_of_fewer_images_than_splits():
    assert fid.inception_score(torch.randn(4, 12)) == pytest.approx((1, 0))  # one image a split


def test_fid_paired_wants_images_of_one_size(run_command, inception_file, tmp_path, quick_distance):
    images = np.zeros((3, 24, 24, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images)
    np.savez(tmp_path / "b.npz", images[:, :, :20])
    words = [tmp_path / "a.npz", tmp_path / "b.npz", "--paired", "--weights", inception_file]
    result = run_command(fid, *words)
    assert_refused(result, "fid.py", "--paired: the images 0 are (3, 24, 24) and (3, 24, 20)")


@pytest.mark.usefixtures("quick_distance")
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
    result = run_command(fid, *words, "--size", 16)
    assert result.status == 0, result.err
    assert read_figures(result)["psnr"] == "99.000000"  # equal
    x, y = torch.cat(quick_net.features).chunk(2)
    expected, _, _ = outputs_of_array(cropped)
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(y, expected)

    result = run_command(fid, *words)
    assert_refused(result, "fid.py", "the images 0 are (3, 24, 40) and (3, 16, 16)")


def test_fid_reads_images_beside_statistics(tmp_path):
    """np.savez puts keywords first: the images are not the file's first array."""
    images = np.zeros((3, 24, 24, 3), np.uint8)
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "both.npz", **statistics, arr_0=images)
    both = fid.read_set(str(tmp_path / "both.npz"))
    assert np.array_equal(both.items, images)
    assert np.array_equal(both.known.pooled.sigma, np.eye(2048))


def test_statistics_of_any_type_of_number_are_read_in_float64():
    mu = np.linspace(-300, 300, 40)
    sigma = np.full((40, 40), 300.0)  # their sum is beyond float16
    for kind in (np.float16, ">f4", np.int64):
        arrays = {"mu": mu.astype(kind), "sigma": sigma.astype(kind)}
        moments = fid.read_moments("x.npz", arrays, "mu", "sigma", 40)
        assert moments.mu.dtype == moments.sigma.dtype == np.float64
        np.testing.assert_allclose(moments.mu, mu, atol=1)
    with pytest.raises(BadInput, match="not of numbers"):
        fid.read_moments("x.npz", {"mu": mu.astype(str) + "?", "sigma": sigma}, "mu", "sigma", 40)
    sigma[3, 5] = np.inf
    with pytest.raises(BadInput, match="NaN or infinity"):
        fid.read_moments("x.npz", {"mu": mu, "sigma": sigma}, "mu", "sigma", 40)


def test_fid_takes_cifar10_where_memory_is_short(monkeypatch):
    """load_data then gives a list of arrays, not a tensor."""
    images = list(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8))

    def load_in_place(spec, size):
        return fid.Data(images, torch.zeros(5), [], torch.zeros(0), ["a"])

    monkeypatch.setattr(fid, "load_data", load_in_place)
    read = [image for _, image in fid.read_images("cifar10", fid.read_set("cifar10").items)]
    for image, expected in zip(read, images, strict=True):
        assert (image.permute(1, 2, 0).numpy() == expected).all()


def test_measure_keeps_what_is_asked_for_and_forgets_unreadable_images(tmp_path):
    folder = save_pictures(tmp_path / "a", 25)
    (folder / "013.png").write_bytes(b"torn")
    items = sorted(folder.iterdir())
    images = np.stack([np.asarray(Image.open(p)) for p in items if p.name != "013.png"])
    features, logits, _ = outputs_of_array(images)
    cpu = torch.device("cpu")
    stats = fid.measure("x", items, QuickNet(), cpu, ["features"], skip_bad=True)
    torch.testing.assert_close(stats.features, features)
    assert stats.logits is None
    expected = np.cov(features.double().numpy().T)
    np.testing.assert_allclose(stats.pooled.sigma, expected, atol=1e-6)
    stats = fid.measure("x", images, QuickNet(), cpu, ["logits"])
    torch.testing.assert_close(stats.logits, logits)
    assert stats.features is None


def test_a_measure_does_not_depend_on_its_callers_precision():
    seen = []

    def precision():
        convolutions = torch.backends.cudnn.allow_tf32
        return torch.get_float32_matmul_precision(), convolutions, torch.is_autocast_enabled("cpu")

    def net(images):
        seen.append(precision())
        return [torch.zeros(len(images), d) for d in (2048, 1008, 2023)]

    products, convolutions, _ = precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            fid.measure("x", np.zeros((3, 8, 8, 3), np.uint8), net, torch.device("cpu"))
            assert precision() == ("high", True, True)
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
    assert seen == [("highest", False, False)]


# ---- files that stand alone


def imports_of(path):
    """The top-level modules that a Python file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    return found


def test_glotok_is_the_paper_alone():
    """It imports torch and a little mathematics: no files, flags or processes."""
    imports = imports_of(REPOSITORY / "glotok.py")
    assert imports - sys.stdlib_module_names == {"torch"}
    unwanted = {"argparse", "json", "os", "pathlib", "pickle", "signal", "sys", "zipfile"}
    assert not imports & unwanted


def test_fid_imports_no_other_file():
    imports = imports_of(REPOSITORY / "fid.py")
    assert not imports & {"glotok", "sample", "train"}
    assert imports - sys.stdlib_module_names == {"torch", "numpy", "PIL"}


def test_glotok_works_in_an_empty_folder(tmp_path):
    shutil.copy(REPOSITORY / "glotok.py", tmp_path)
    done = run_process("-c", "import glotok; print(glotok.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "glotok.py")


def test_fid_works_in_an_empty_folder(tmp_path, inception_file):
    shutil.copy(REPOSITORY / "fid.py", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "A.npz", images[:2])
    np.savez(tmp_path / "B.npz", images[2:])
    words = ["fid.py", "A.npz", "B.npz", "--weights", inception_file, "--only", "fid", "kid"]
    done = run_process(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"fid \S+\nkid \S+ \S+\n", done.stdout)


# ================================================================================================
# Part III. Commands, bad input, faults
# ================================================================================================


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """An .npz of 60 shapes. To encode the 20,000 of --data shapes is most of a tiny run's time."""
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    images, labels = fid.draw_shapes(60, 16, 0)
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    return path


@pytest.fixture(scope="module")
def small_flags(small_data):
    """Flags of a run of TINY on the 60 shapes."""
    return [*FLAGS, "--data", str(small_data)]


@pytest.fixture(scope="module")
def small_run(small_flags, tmp_path_factory):
    """The folder of a finished run of small_flags. Never changed: see copied_small_run."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = run_process(REPOSITORY / "train.py", *small_flags, "--out", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied_small_run(small_run, tmp_path):
    """A copy of small_run, in tmp_path / "run"."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


@pytest.fixture
def few_shapes(monkeypatch):
    """Data `shapes` with 1,000 training images, not 20,000. The held-out ones are the same."""

    def draw_few(n, size, seed, draw_shapes=fid.draw_shapes):
        return draw_shapes(min(n, 1000), size, seed)

    monkeypatch.setattr(fid, "draw_shapes", draw_few)


@pytest.fixture
def quick_convnet(monkeypatch):
    """Flags of a convnet teacher that is trained for 20 steps: it need not be good."""
    train_briefly = functools.partial(train.train_convnet, steps=20)
    monkeypatch.setattr(train, "train_convnet", train_briefly)
    return ["--teacher", "convnet", "--teacher_centres", 64]


# ---- a run


def test_a_run_writes_every_file_and_shows_its_progress(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "teacher.pt",
        "tokenizer.pt",
        "generator.pt",
        "log.jsonl",
        "metrics.json",
        "reconstructions.png",
        "histogram.png",
        "curves.png",
        "samples.png",
    }
    assert json.loads((finished / "config.json").read_text())["preset"] == "shapes"
    stderr = (finished.parent / "stderr.txt").read_text()
    assert "tokenizer step 20/20" in stderr
    assert "generator step 20/20" in stderr
    assert "left" in stderr


@pytest.mark.parametrize("name", ["reconstructions", "histogram", "curves", "samples"])
def test_pictures_of_a_run_are_not_empty(name, finished):
    with Image.open(finished / f"{name}.png") as picture:
        assert picture.width > 200
        assert len(picture.convert("RGB").getcolors(10**6)) > 5


def load_tokenizer(folder):
    """The tokenizer of a run of TINY, in eval mode."""
    model = GloTok(TINY).eval()
    model.load_state_dict(torch.load(folder / "tokenizer.pt", weights_only=True)["model"])
    return model


@torch.no_grad()
def held_out_and_recon(model):
    """20 of the 1,000 held-out shapes, evenly spaced, and their reconstructions: uint8 images."""
    images = fid.draw_shapes(1000, 16, 1)[0][::50]
    recon = model.decode(*model.encode(images.float() / 127.5 - 1))
    return images, ((recon.clamp(-1, 1) + 1) * 127.5).round().byte()


def test_figures_of_a_run_computed_anew(finished):
    metrics = read_metrics(finished)
    assert {"psnr", "usage_sem", "usage_vis", "seconds", "device"} <= metrics.keys()
    assert {"hist_kl", "hist_kl_floor", "hist_kl_used"} <= metrics.keys()

    model = load_tokenizer(finished)
    images, recon = held_out_and_recon(model)
    with torch.no_grad():
        sem, vis = model.encode(images.float() / 127.5 - 1)
        hist_kl = histogram_relation_loss(model.codebook_sem, sphere_histogram(8))
    mse = (recon.float() - images.float()).square().mean((1, 2, 3))
    psnr = (10 * torch.log10(255**2 / mse)).mean()
    assert metrics["psnr"] == pytest.approx(psnr.item(), abs=0.05)
    assert metrics["usage_sem"] == pytest.approx(len(set(sem.flatten().tolist())) / 16)
    assert metrics["usage_vis"] == pytest.approx(len(set(vis.flatten().tolist())) / 24)
    assert metrics["hist_kl"] == pytest.approx(hist_kl.item(), abs=1e-4)
    use = np.bincount(sem.flatten(), minlength=16) / sem.numel() * 16
    used = histogram_by_loops(model.codebook_sem.detach(), 40, ALPHA, use)
    teacher = sphere_histogram(8).double().numpy()
    kl = (teacher * np.log(teacher / np.maximum(used, 1e-10))).sum()
    assert metrics["hist_kl_used"] == pytest.approx(kl, abs=1e-3)


def test_agreement_of_classes_is_the_share_of_equal_answers(finished, tmp_path, monkeypatch):
    """The convnet teacher's answers to the held-out images, then to their reconstructions."""
    shown = []

    def load_classifier(run):
        def classify(images):
            shown.append(images)
            answers = torch.zeros(len(images))
            answers[:3] = len(shown)  # three answers differ from call to call
            return answers

        return classify

    monkeypatch.setattr(sample, "load_classifier", load_classifier)
    config, _ = sample.load_config(finished)
    model = sample.load_run(finished)
    data = fid.load_data("shapes", 16)
    teacher = torch.load(finished / "teacher.pt", weights_only=True)
    run = sample.Run(config, tmp_path, data, teacher, torch.device("cpu"), None)
    metrics = sample.report_tokenizer(run, model, teacher["histogram"], {})
    assert metrics["class_agreement"] == pytest.approx(17 / 20)
    images, recon = shown
    assert torch.equal(images, data.val[fid.evenly_spaced(len(data.val), 20)])
    tokens = sample.encode_all(model, images, torch.arange(20), torch.device("cpu"))
    assert torch.equal(recon, sample.decode_all(model, tokens, torch.device("cpu")))


def test_samples_stand_in_the_row_of_their_class(finished, tmp_path, monkeypatch):
    """And the class accuracy is the share of those that the teacher gives that class."""
    grids = []

    def generate_grey(model, generator, labels, config, seed):
        yield (40 * labels).byte()[:, None, None, None].expand(-1, 3, 16, 16)

    def load_classifier(run):
        def classify(images):
            answers = images[:, 0, 0, 0].long() // 40
            answers[:24] = 5  # all of the first class and half of the second
            return answers

        return classify

    def save_image_grid(path, rows, title):
        grids.append(rows)

    monkeypatch.setattr(sample, "generate", generate_grey)
    monkeypatch.setattr(sample, "load_classifier", load_classifier)
    monkeypatch.setattr(sample, "save_image_grid", save_image_grid)
    config, _ = sample.load_config(finished)
    data = fid.load_data("shapes", 16)
    run = sample.Run(config, tmp_path, data, {}, torch.device("cpu"), None)
    metrics = sample.report_generator(run, None, None, {})
    assert metrics == {"samples_class_accuracy": pytest.approx(1 - 24 / 96)}
    [rows] = grids
    assert [name for name, _ in rows] == data.classes
    for k, (_, images) in enumerate(rows):
        assert len(images) == 12
        assert (images == 40 * k).all()


@pytest.fixture
def optimizer_steps():
    """A list that fills with what each optimizer's step sees: kind, settings, dims, norm."""
    steps = []

    def record(optimizer, args, kwargs):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        dims = [{p.dim() for p in g["params"]} for g in optimizer.param_groups]
        steps.append((type(optimizer), groups, dims, norm))

    handle = register_optimizer_step_pre_hook(record)
    yield steps
    handle.remove()


def test_the_tokenizers_two_optimizers_are_as_told(
    small_flags, optimizer_steps, tmp_path, run_command
):
    flags = ["--stage", "tokenizer", "--tokenizer_steps", 10, "--warmup", 4, "--cooldown", 0.4]
    flags += ["--lr", 2e-3, "--disc_lr", 5e-3, "--beta1", 0.3, "--beta2", 0.7, "--clip", 1e-3]
    flags += ["--lambda_adv", 0.1, "--adv_start", 3]
    result = run_command(train, *small_flags, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    shares = [0.25, 0.5, 0.75, 1, 1, 1]
    shares += [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    rates = [2e-3 * share for share in shares[:3]]
    for share in shares[3:]:  # from step 3 on the discriminator, too
        rates += [2e-3 * share, 5e-3 * share]
    of_floor = len(optimizer_steps) - len(
        rates
    )  # first the teacher's floor was sought, at another rate
    assert of_floor == 300
    for (kind, groups, _, norm), rate in zip(optimizer_steps[of_floor:], rates):
        [group] = groups
        assert kind is torch.optim.Adam
        assert group["lr"] == pytest.approx(rate)
        assert group["betas"] == (0.3, 0.7)
        assert group["weight_decay"] == 0
        assert norm == pytest.approx(1e-3, rel=0.02)


def test_the_generators_optimizer_is_as_told(small_flags, optimizer_steps, tmp_path, run_command):
    flags = ["--tokenizer_steps", 1, "--generator_steps", 10, "--clip", 1e-3]
    flags += ["--gen_lr", 2e-3, "--gen_lr_end", 1e-3, "--gen_warmup", 2, "--gen_cooldown", 0.4]
    flags += ["--gen_decay", 0.07]
    result = run_command(train, *small_flags, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    rates = [1e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3]
    rates += [1e-3 + 1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    of_generator = [step for step in optimizer_steps if step[0] is torch.optim.AdamW]
    assert len(of_generator) == 10
    for (_, groups, dims, norm), rate in zip(of_generator, rates):
        matrices, vectors = groups
        assert matrices["lr"] == vectors["lr"] == pytest.approx(rate)
        assert matrices["betas"] == vectors["betas"] == (0.9, 0.96)  # xAR's
        assert matrices["weight_decay"] == 0.07
        assert vectors["weight_decay"] == 0
        assert min(dims[0]) > 1
        assert dims[1] == {1}
        assert norm == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("flip", [0, 1])
def test_the_local_teacher_sees_what_the_tokenizer_sees_mirrored_or_not(
    flip, small_data, small_flags, quick_convnet, tmp_path, monkeypatch, run_command
):
    seen_by_teacher = []
    seen_by_model = []
    load_feature_network = train.load_feature_network
    forward = GloTok.forward

    def load_and_record(teacher, device):
        network = load_feature_network(teacher, device)

        def look(x):
            seen_by_teacher.append(x)
            return network(x)

        return look

    def forward_and_record(model, x, teacher_features=None):
        if model.training:
            seen_by_model.append(x)
        return forward(model, x, teacher_features)

    monkeypatch.setattr(train, "load_feature_network", load_and_record)
    monkeypatch.setattr(GloTok, "forward", forward_and_record)
    flags = [*small_flags, *quick_convnet, "--semantic", "vavae", "--stage", "tokenizer"]
    flags += ["--flip", flip, "--tokenizer_steps", 10]
    result = run_command(train, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    originals = torch.from_numpy(np.load(small_data)["arr_0"]).permute(0, 3, 1, 2)
    as_they_are = {image.contiguous().numpy().tobytes() for image in originals}
    turned = {image.flip(2).contiguous().numpy().tobytes() for image in originals}
    mirrored = 0
    assert len(seen_by_model) == 10
    for x, y in zip(seen_by_teacher[-10:], seen_by_model):  # before them, for its centres
        assert torch.equal(x, y)
        for image in ((x + 1) * 127.5).round().byte():
            pixels = image.contiguous().numpy().tobytes()
            assert pixels in as_they_are | turned
            mirrored += pixels not in as_they_are
    if flip:
        assert 25 <= mirrored <= 55  # of 80
    else:
        assert mirrored == 0


def test_training_lowers_the_loss(small_flags, tmp_path, run_command):
    small_model = ["--patch", 2, "--channel_mult", 1]
    flags = [*small_flags, *small_model, "--stage", "tokenizer"]
    flags += ["--tokenizer_steps", 160, "--lr", 0.01, "--save_every", 1000]
    assert run_command(train, *flags, "--out", tmp_path / "run").status == 0
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(20, 161, 20))
    late = [row["recon"] for row in rows[-3:]]
    assert sum(late) / 3 < 0.7 * rows[0]["recon"]


def revive_every_5_steps(monkeypatch):
    """What many codebases do: codes that a batch left unused are put onto features of it."""
    forward = Quantizer.forward
    last = {}  # quantizer: the steps it has seen, and its last features and indices

    def forward_with_revival(self, z):
        steps, features, index = last.get(self, (0, None, None))
        if self.training and steps and steps % 5 == 0:
            unused = torch.bincount(index, minlength=len(self.weight)) == 0
            chosen = torch.randint(len(features), (int(unused.sum()),))
            self.weight.data[unused] = features[chosen]
        result = forward(self, z)
        last[self] = (steps + 1, result[0].detach().flatten(0, 1), result[2].flatten())
        return result

    monkeypatch.setattr(Quantizer, "forward", forward_with_revival)


@pytest.mark.parametrize("revival", [False, True])
def test_a_short_run_reaches_its_teacher_unless_codes_are_moved(
    revival, small_flags, tmp_path, run_command, monkeypatch
):
    """A teacher of codes that the codebook can be, so that the floor is 0."""
    shift = torch.tensor([0.8] + [0.0] * 7)
    np.save(tmp_path / "teacher.npy", (torch.randn(64, 8) + shift).numpy())
    if revival:
        revive_every_5_steps(monkeypatch)
    flags = [*small_flags, "--teacher", tmp_path / "teacher.npy", "--stage", "tokenizer"]
    flags += ["--codes_sem", 64, "--codes_vis", 64, "--lr", 0.01, "--tokenizer_steps", 60]
    result = run_command(train, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    metrics = read_metrics(tmp_path / "run")
    assert metrics["hist_kl_floor"] < 1e-3
    reached = metrics["hist_kl"] < metrics["hist_kl_floor"] + 0.01
    assert reached != revival


def test_20_bins_train_report_and_draw(small_flags, tmp_path, run_command):
    """It once crashed: the report compared 20 bins of the teacher with 40 of the codebook."""
    folder = tmp_path / "run"
    flags = ["--bins", 20, "--tokenizer_steps", 4, "--generator_steps", 2]
    result = run_command(train, *small_flags, *flags, "--out", folder)
    assert result.status == 0, result.err

    teacher = torch.load(folder / "teacher.pt", weights_only=True)["histogram"]
    assert torch.equal(teacher, sphere_histogram(8, 20))
    codes = sample.load_run(folder).codebook_sem.detach()
    p_teacher = teacher.double().numpy()
    p_codes = relation_histogram_direct(codes.double(), 20).numpy()
    kl = (p_teacher * np.log(p_teacher / p_codes)).sum()
    assert read_metrics(folder)["hist_kl"] == pytest.approx(kl, abs=1e-4)
    assert read_rows(folder)[0]["hist"] > 0
    with Image.open(folder / "histogram.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 5

    result = run_command(sample, folder, "--n", 4, "--out", tmp_path / "x.npz")
    assert result.status == 0, result.err
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3)


# ---- stopping and resuming


def with_signal(function, at, number=signal.SIGINT):
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
    flags = ["--resume", "--stage", "generator"]
    assert run_command(train, *flags, "--out", folder).status == 0
    assert_same_weights(folder, small_run, "tokenizer")
    assert_same_weights(folder, small_run, "generator")


@pytest.mark.parametrize("step", [3, 12])
def test_a_generator_stopped_anywhere_resumes_to_the_same_weights(
    step, small_run, tmp_path, monkeypatch, run_command
):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "teacher.pt", "tokenizer.pt", "metrics.json"):
        shutil.copy(small_run / name, folder)
    forward = with_signal(XAR.forward, step)
    monkeypatch.setattr(XAR, "forward", forward)
    flags = ["--resume", "--stage", "generator", "--out", folder]
    assert run_command(train, *flags).status == 130
    assert torch.load(folder / "generator.pt", weights_only=True)["step"] == step
    assert run_command(train, *flags).status == 0
    assert forward.calls == 20
    assert_same_weights(folder, small_run, "generator")
    assert {"psnr", "generator_seconds"} <= read_metrics(folder).keys()


# stage: a function that is called once a step, a picture of its report
LAST_STEPS = {
    "tokenizer": (train, "to_float", "reconstructions.png"),
    "generator": (XAR, "forward", "samples.png"),
}


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_stopped_in_the_very_last_step_a_run_lacks_only_its_report(
    stage, small_run, copied_small_run, monkeypatch, run_command
):
    module, function, report = LAST_STEPS[stage]
    folder = copied_small_run
    checkpoint = folder / f"{stage}.pt"
    (folder / "generator.pt").unlink()
    checkpoint.unlink(missing_ok=True)
    (folder / report).unlink()
    (folder / "metrics.json").unlink()
    counted = with_signal(getattr(module, function), 20)
    monkeypatch.setattr(module, function, counted)
    flags = ["--resume", "--stage", stage, "--out", folder]

    result = run_command(train, *flags)
    assert result.status == 130
    assert "stopped after step 20" in result.err
    assert torch.load(checkpoint, weights_only=True)["step"] == 20
    assert not (folder / report).exists()
    before = checkpoint.read_bytes()

    result = run_command(train, *flags)
    assert result.status == 0, result.err
    assert counted.calls == 20  # no step came after
    assert checkpoint.read_bytes() == before
    assert_same_weights(folder, small_run, stage)
    assert (folder / report).exists()
    assert read_metrics(folder).keys() >= {"psnr", "seconds"}
    assert ("generator_seconds" in read_metrics(folder)) == (stage == "generator")
    steps = [row["step"] for row in read_rows(folder) if row["stage"] == stage]
    assert steps == [20]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--tokenizer_steps 21", "move it away to train the tokenizer further"),
        ("--tokenizer_steps 19", "trained for 20 steps already"),
        ("--generator_steps 19", "trained for 20 steps already"),
    ],
)
def test_refused_steps_leave_the_run_as_it_was(words, expected, copied_small_run, run_command):
    config = (copied_small_run / "config.json").read_text()
    log = (copied_small_run / "log.jsonl").read_text()
    flags = ["--resume", "--out", copied_small_run]
    result = run_command(train, *flags, *words.split())
    assert_refused(result, "train.py", expected)
    assert (copied_small_run / "config.json").read_text() == config
    assert (copied_small_run / "log.jsonl").read_text() == log
    assert run_command(train, *flags).status == 0


@pytest.fixture
def going_on(small_run):
    """Flags of a run that starts from small_run's tokenizer, with learning rate 0."""
    return ["--start_from", small_run, "--tokenizer_steps", 3, "--stage", "tokenizer", "--lr", 0]


def test_a_tokenizer_starts_from_that_of_another_run(
    going_on, small_flags, small_run, run_command, tmp_path
):
    folder = tmp_path / "run"
    result = run_command(train, *small_flags, *going_on, "--out", folder)
    assert result.status == 0, result.err
    start = torch.load(small_run / "tokenizer.pt", weights_only=True)["model"]
    after = torch.load(folder / "tokenizer.pt", weights_only=True)["model"]
    assert start.keys() == after.keys()
    for name in start:
        if not name.endswith("usage_count"):
            assert torch.equal(start[name], after[name]), name

    # killed before its first checkpoint, it starts from there again
    (folder / "tokenizer.pt").unlink()
    assert run_command(train, "--resume", "--stage", "tokenizer", "--out", folder).status == 0
    again = torch.load(folder / "tokenizer.pt", weights_only=True)["model"]
    for name in after:
        assert torch.equal(again[name], after[name]), name


def test_a_run_goes_on_without_the_one_that_it_started_from(
    going_on, small_flags, small_run, copied_small_run, run_command, tmp_path
):
    """Its checkpoint holds what it needs: the histogram of the first codebook, for a picture."""
    folder = tmp_path / "started"
    start = torch.load(small_run / "tokenizer.pt", weights_only=True)["model"]
    flags = [*going_on, "--start_from", copied_small_run]
    assert run_command(train, *small_flags, *flags, "--out", folder).status == 0
    codes = start["quantizer_sem.weight"].double()
    before = relation_histogram_direct(codes, TINY.bins).float()
    saved = torch.load(folder / "tokenizer.pt", weights_only=True)["at_start"]
    torch.testing.assert_close(saved, before, atol=1e-5, rtol=0)

    shutil.rmtree(copied_small_run)
    flags = ["--resume", "--stage", "tokenizer", "--tokenizer_steps", 4, "--out", folder]
    result = run_command(train, *flags)
    assert result.status == 0, result.err
    resumed = torch.load(folder / "tokenizer.pt", weights_only=True)
    assert resumed["step"] == 4
    assert torch.equal(resumed["at_start"], saved)


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            "--width 32",
            "tokenizer.pt holds other weights than this network, with these settings, has",
        ),
        ("--start_from nowhere", "cannot read nowhere/tokenizer.pt"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    words, expected, going_on, small_flags, run_command, tmp_path
):
    flags = [*small_flags, *going_on, *words.split()]
    assert_refused(run_command(train, *flags, "--out", tmp_path / "run"), "train.py", expected)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_other_data(run_command, tmp_path):
    data = save_pictures(tmp_path / "data" / "a", 30).parent
    flags = ["--stage", "tokenizer", "--tokenizer_steps", 2, "--save_every", 1]
    out = tmp_path / "run"
    assert run_command(train, *FLAGS, *flags, "--data", data, "--out", out).status == 0
    before = read_files(out)
    save_pictures(data / "b", 30, seed=100)
    resume = ["--resume", "--stage", "tokenizer", "--tokenizer_steps", 3, "--out", out]
    result = run_command(train, *resume)
    message = "began with 29 training and 1 held-out images of 1 classes; now there are 57, 3 and 2"
    assert_refused(result, "train.py", message)
    assert read_files(out) == before
    shutil.rmtree(data / "b")
    assert run_command(train, *resume).status == 0


def test_the_moving_average_keeps_no_graph(small_flags, tmp_path, monkeypatch, run_command):
    """It once did, of every step: memory grew by a megabyte a step."""
    weights = []

    def report_generator(run, model, generator, figures):
        weights.extend(generator.parameters())
        return {}

    monkeypatch.setattr(train, "report_generator", report_generator)
    steps = ["--tokenizer_steps", 1, "--generator_steps", 3]
    assert run_command(train, *small_flags, *steps, "--out", tmp_path / "run").status == 0
    assert weights
    for weight in weights:
        assert not weight.requires_grad
        assert weight.grad_fn is None


def test_the_moving_average_of_the_weights_is_what_samples(small_flags, tmp_path, run_command):
    out = tmp_path / "run"
    steps = ["--tokenizer_steps", 1, "--generator_steps", 1]
    assert run_command(train, *small_flags, *steps, "--out", out).status == 0
    config, _ = sample.load_config(out)
    torch.manual_seed(config.seed)
    before = XAR(config)
    saved = torch.load(out / "generator.pt", weights_only=True)
    network = sample.load_generator(out)
    moved = 0
    for name, weight in before.named_parameters():
        after = saved["model"][name]
        moved += (after != weight).sum()
        expected = weight + (1 - 1 / 10) * (after - weight)  # the first step's decay is 1 / 10
        torch.testing.assert_close(saved["ema_model"][name], expected, atol=1e-7, rtol=1e-6)
        assert torch.equal(network.get_parameter(name), saved["ema_model"][name])
    assert moved > 0


# ---- micro-batches and processes


@pytest.mark.parametrize("kind, parts", [("xar", 2), ("xar", 4), ("far", 4)])
def test_parts_of_a_generators_batch_make_the_loss_of_the_whole(kind, parts):
    c = replace(TINY, label_dropout=0.5, accumulate=parts)
    generator = glotok.GENERATORS[kind](c)
    with torch.no_grad():  # layers that start at 0 would hide the labels
        for weight in generator.parameters():
            weight += 0.1 * torch.randn_like(weight)
    labels = torch.arange(8) % c.classes
    latents = torch.randn(8, 16, 8, 8)
    if kind == "far":
        latents = torch.randint(16, (8, 2, 8, 8))
    draws = generator.draw(8, torch.device("cpu"))
    whole = generator.loss(latents, labels, draws)

    losses = []
    for part_latents, part_labels, *part_draws in train.micro_batches(c, latents, labels, *draws):
        assert len(part_latents) == 8 / parts
        losses.append(generator.loss(part_latents, part_labels, part_draws).item())
    assert len(losses) == parts
    assert sum(losses) / parts == pytest.approx(whole.item(), rel=1e-5)
    # Each part has images and noise of its own.
    assert len({round(loss, 5) for loss in losses}) == parts


DRIVER = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import train
train.LOG_EVERY = 1
train.run_script(train.main)
"""


def test_two_processes_and_parts_follow_one_process_step_by_step(
    small_flags, tmp_path, monkeypatch, run_command
):
    flags = [*small_flags, "--tokenizer_steps", 10, "--generator_steps", 10]
    # coverage and revival look at micro-batches
    flags += ["--precision", "float32", "--lambda_coverage", 0, "--revive_every", 0]
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    assert run_command(train, *flags, "--accumulate", 1, "--out", tmp_path / "one").status == 0
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags += ["--accumulate", 2, "--out", tmp_path / "two"]
    done = run_process(*torchrun, "driver.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    rows = read_rows(tmp_path / "one")
    other_rows = read_rows(tmp_path / "two")
    expected = [(stage, k) for stage in ("tokenizer", "generator") for k in range(1, 11)]
    assert [(row["stage"], row["step"]) for row in rows] == expected
    assert [(row["stage"], row["step"]) for row in other_rows] == expected
    for row, other in zip(rows, other_rows):
        del row["stage"]
        del other["stage"]
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    metrics = read_metrics(tmp_path / "one")
    other_metrics = read_metrics(tmp_path / "two")
    assert metrics["processes"] == 1
    assert other_metrics["processes"] == 2
    assert metrics["psnr"] == pytest.approx(other_metrics["psnr"], abs=0.01)


# ---- streaming


def test_streamed_files_train_as_those_in_memory(tmp_path, monkeypatch, run_command):
    for k in range(3):
        save_pictures(tmp_path / "data" / f"class{k}", 20, seed=k)
    flags = [*FLAGS, "--data", tmp_path / "data", "--tokenizer_steps", 10, "--generator_steps", 2]

    result = run_command(train, *flags, "--out", tmp_path / "memory")
    assert result.status == 0, result.err
    assert "in memory" in result.err
    monkeypatch.setattr(fid, "memory_budget", lambda: 0)
    result = run_command(train, *flags, "--out", tmp_path / "files")
    assert result.status == 0, result.err
    assert "by worker processes" in result.err

    assert_same_weights(tmp_path / "files", tmp_path / "memory", "tokenizer")
    assert_same_weights(tmp_path / "files", tmp_path / "memory", "generator")


def test_a_streamed_file_that_cannot_be_read_is_named_and_grey(tmp_path, capsys):
    save_pictures(tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    files[1].write_bytes(b"no picture")
    images = fid.decode_batch([(file, None) for file in files], 16)
    assert files[1].name in capsys.readouterr().err
    assert images.shape == (3, 3, 16, 16)
    assert (images[1] == 128).all()
    assert images[0].float().std() > 0
    assert images[2].float().std() > 0


# ---- crops


def gradient_picture(width, height):
    """A picture whose red is its column and whose green is its row, in pixels."""
    column, row = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([column, row, 0 * row], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "crop, left, top, side",
    [
        (None, 40, 0, 100),
        ((1.0, 0.5, 0.5), 40, 0, 100),
        ((1.0, 0.0, 0.9), 0, 0, 100),
        ((0.8, 0.0, 0.0), 0, 0, 80),
        ((0.8, 1.0, 1.0), 100, 20, 80),
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


def test_large_pictures_are_halved_by_a_box_filter_first():
    """As ADM's evaluator: stripes of 2 pixels, 4 times too large, average to grey."""
    pixels = np.zeros((128, 192, 3), np.uint8)
    pixels[:, ::2] = 255
    found = np.array(fid.crop_and_resize(Image.fromarray(pixels), 32))
    assert found.min() >= 127
    assert found.max() <= 128

    # 96 is halved once, to 48, which is not twice 32; then bicubically
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (96, 144, 3)).astype(np.uint8)
    boxes = pixels.reshape(48, 2, 72, 2, 3).mean((1, 3))
    halved = Image.fromarray((boxes + 0.5).astype(np.uint8))
    expected = np.array(halved.resize((48, 32), Image.Resampling.BICUBIC))[:, 8:40]
    found = np.array(fid.crop_and_resize(Image.fromarray(pixels), 32))
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=2)


def test_random_crops_stay_within_their_bounds():
    c = replace(TINY, crop=0.8, batch_size=2000)
    crops = train.random_crops(c, 3)
    share, x, y = crops.T
    assert 0.8 <= share.min() < 0.81
    assert 0.99 < share.max() <= 1
    for place in (x, y):
        assert 0 <= place.min() < 0.01
        assert 0.99 < place.max() <= 1
    assert abs(torch.corrcoef(crops.T) - torch.eye(3)).max() < 0.1
    # Nor does a crop tell whether the loop mirrors its image.
    torch.manual_seed(train.step_seed(c, 3))
    mirror = torch.rand(c.batch_size, 1, 1, 1).flatten()
    for of_image in (*crops.T, crops.flatten()[: c.batch_size]):
        assert abs(torch.corrcoef(torch.stack([of_image, mirror]))[0, 1]) < 0.1
    assert torch.equal(train.random_crops(c, 3), crops)  # a function of the step
    assert not torch.equal(train.random_crops(c, 4), crops)
    for crop in crops[:200].tolist():  # never beyond the picture
        found = np.array(fid.crop_and_resize(gradient_picture(90, 60), 16, crop))
        assert found[:, :, 2].max() == 0
        assert found.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["tensor", "arrays", "files"])
def test_batches_are_cropped_as_asked(kind, tmp_path):
    pictures = [gradient_picture(32, 32), gradient_picture(32, 32).rotate(90)]
    if kind == "tensor":
        items = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    elif kind == "arrays":
        items = np.stack([np.array(p) for p in pictures])
    else:
        items = [tmp_path / f"{i}.png" for i in range(2)]
        for path, picture in zip(items, pictures):
            picture.save(path)
    index = torch.tensor([1, 0])
    squares = torch.tensor([[0.5, 0.25, 1.0], [0.8, 0.0, 0.5]])
    device = torch.device("cpu")
    [found] = list(fid.stream_batches(items, [index], device, 32, [squares]))
    for image, i, square in zip(found, index, squares.tolist()):
        expected = np.array(fid.crop_and_resize(pictures[i], 32, square))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_training_on_crops_resumes_and_decodes_whole_pictures(tmp_path, run_command):
    for k in range(2):
        save_pictures(tmp_path / "data" / f"class{k}", 10, size=40, seed=k)
    flags = [
        *FLAGS,
        "--data",
        tmp_path / "data",
        "--stage",
        "tokenizer",
        "--crop",
        0.6,
        "--cooldown",
        0,
    ]
    whole = tmp_path / "whole"
    halves = tmp_path / "halves"
    result = run_command(train, *flags, "--tokenizer_steps", 8, "--out", whole)
    assert result.status == 0, result.err
    assert "by worker processes" in result.err
    assert run_command(train, *flags, "--tokenizer_steps", 3, "--out", halves).status == 0
    resumed = ["--resume", "--tokenizer_steps", 8, "--stage", "tokenizer", "--out", halves]
    assert run_command(train, *resumed).status == 0
    assert_same_weights(whole, halves, "tokenizer")


# ---- precision and compilation


def test_full_precision_whatever_is_set_outside():
    a = torch.randn(64, 64)
    b = torch.randn(64, 64)
    exact = (a.double() @ b.double()).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (a @ b - exact).abs().max() > 1e-2
            with glotok.full_precision(a.device):
                assert torch.get_float32_matmul_precision() == "highest"
                assert (a @ b - exact).abs().max() < 1e-4
            quantizer = Quantizer(500, 8, 0.25)
            z = F.normalize(torch.randn(300, 8), dim=-1)
            nearest = (z.double() @ quantizer.codebook.double().T).argmax(1)
            assert torch.equal(quantizer.look_up(z), nearest)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("works", [True, False])
def test_compilation_is_tried_first(works, monkeypatch, capsys):
    def compile_function(function):
        if not works:
            raise RuntimeError("no compiler\nin this place")
        return function

    compiled = []

    def compile_network(network, **_):
        compiled.append(network)

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_network)
    cpu = torch.device("cpu")
    network = torch.nn.Linear(2, 2)
    train.compile_networks(replace(TINY, compile=1), cpu, network)
    assert compiled == ([network] if works else [])
    note = "(no compiler): not compiled"
    assert (note in capsys.readouterr().err) == (not works)

    compiled.clear()
    train.compile_networks(TINY, cpu, network)  # not asked for
    assert compiled == []


# ---- full disks

# runs the script that follows, which can write no file of more than 100,000 bytes
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_samples_on_a_full_disk_go_on_where_they_stopped(small_run, tmp_path, run_command):
    words = [small_run, "--n", 250, "--out"]  # 250 x 768 bytes
    path = tmp_path / "new" / "x.npz"
    done = run_process("-c", LIMITED, REPOSITORY / "sample.py", *words, path, cwd=REPOSITORY)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sample.py: ")
    assert not path.exists()

    assert run_command(sample, *words, path).status == 0
    assert os.listdir(path.parent) == ["x.npz"]
    assert run_command(sample, *words, tmp_path / "whole.npz").status == 0
    images = np.load(path)["arr_0"]
    assert (images == np.load(tmp_path / "whole.npz")["arr_0"]).all()


def test_what_a_stopped_longer_command_left_does_not_change_a_shorter_one(
    small_run, tmp_path, run_command, monkeypatch
):
    """The noise of a last, smaller batch is not the beginning of a whole one's."""
    monkeypatch.setattr(sample, "GENERATE_BATCH", 4)
    with monkeypatch.context() as stopping:
        decode_generated = sample.decode_generated
        decoded = []

        def decode_three_batches(model, latents):
            if len(decoded) == 3:
                raise KeyboardInterrupt
            decoded.append(len(latents))
            return decode_generated(model, latents)

        stopping.setattr(sample, "decode_generated", decode_three_batches)
        words = [small_run, "--n", 20, "--out", tmp_path / "x.npz"]
        assert run_command(sample, *words).status != 0
        assert decoded == [4, 4, 4]
    [part] = tmp_path.glob(".x.npz.*.part")
    assert part.stat().st_size == 12 * 16 * 16 * 3
    for name in ("x.npz", "fresh.npz"):
        result = run_command(sample, small_run, "--n", 6, "--out", tmp_path / name)
        assert result.status == 0, result.err
    images = np.load(tmp_path / "x.npz")["arr_0"]
    assert images.shape == (6, 16, 16, 3)
    assert (images == np.load(tmp_path / "fresh.npz")["arr_0"]).all()


def test_a_full_disk_leaves_the_last_checkpoint(copied_small_run):
    folder = copied_small_run
    (folder / "generator.pt").unlink()
    before = (folder / "tokenizer.pt").read_bytes()
    assert len(before) > 100_000
    flags = ["--resume", "--tokenizer_steps", 40, "--stage", "tokenizer", "--out", folder]
    done = run_process("-c", LIMITED, REPOSITORY / "train.py", *flags, cwd=REPOSITORY)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert (folder / "tokenizer.pt").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_a_disk_that_is_full_within_one_tensor_ends_in_one_line(tmp_path):
    """torch.save then raises a RuntimeError."""
    script = tmp_path / "save.py"
    script.write_text(
        "import fid, pathlib, torch\n"
        "def main():\n"
        "    fid.write_atomically(pathlib.Path('x.pt'), lambda f: torch.save(tensor, f))\n"
        "tensor = torch.zeros(10**5)\n"
        "fid.run_script(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", LIMITED, script]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("save.py: cannot write x.pt: ")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["save.py"]


def test_errors_of_code_that_saves_keep_their_traceback(tmp_path):
    def save(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fid.write_atomically(tmp_path / "x", save)
    assert not os.listdir(tmp_path)


def test_a_gpu_without_memory_ends_in_one_line(run_command, monkeypatch):
    def main():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(train, "main", main)
    result = run_command(train)
    assert_refused(result, "train.py", "the GPU has too little memory")


# ---- Ctrl-C


def interrupted(words, text, folder, options=(), pause=0.3):
    """`python OPTIONS WORDS` in folder, with a Ctrl-C -> exit status, standard error.

    It comes `pause` seconds after the first line that holds the text.
    """
    script, *words = words
    words = [sys.executable, *options, REPOSITORY / script, *[str(w) for w in words]]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if text in line:
                break
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        lines += process.stderr.readlines()
    return process.returncode, "".join(lines)


@pytest.mark.parametrize(
    "words",
    [
        "train.py --preset shapes",
        "sample.py RUN",
        "fid.py A.npz A.npz",
    ],
)
def test_ctrl_c_among_the_imports(words, small_run, tmp_path):
    """Death by the signal, which shells call status 130, and no traceback."""
    np.savez(tmp_path / "A.npz", np.zeros((500, 64, 64, 3), np.uint8))
    words = words.replace("RUN", str(small_run)).split()
    # Python then reports every import, with a time: torch's own parts come early in torch's.
    status, err = interrupted(words, " torch.", tmp_path, ["-X", "importtime"], pause=0)
    assert status in (130, -signal.SIGINT)
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["A.npz"]


def test_openmps_threads_sleep_soon():
    """libgomp reads the number when torch is loaded, and not again."""
    code = """
        import os, sys

        os.environ.pop("GOMP_SPINCOUNT", None)

        class Spy:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"))

        sys.meta_path.insert(0, Spy())
        import train
    """
    assert run_process("-c", textwrap.dedent(code), cwd=REPOSITORY).stdout.split() == ["5000"]


def test_ctrl_c_before_the_teacher_is_trained(tmp_path):
    status, err = interrupted(["train.py", "--preset", "shapes"], "data: ", tmp_path)
    assert status == 130, err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "steps, line",
    [
        ("--tokenizer_steps", "tokenizer: "),
        ("--generator_steps", "tokenizer step 20/20"),  # the report comes, then the generator
    ],
)
def test_ctrl_c_in_training(steps, line, tmp_path):
    words = ["train.py", *FLAGS, steps, 90000, "--out", "run"]
    status, err = interrupted(words, line, tmp_path)
    assert status == 130, err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.part"))
    assert {"config.json", "teacher.pt", "tokenizer.pt"} <= set(os.listdir(tmp_path / "run"))


def test_ctrl_c_while_fid_is_measured(inception_file, tmp_path):
    np.savez(tmp_path / "A.npz", np.zeros((500, 64, 64, 3), np.uint8))
    words = ["fid.py", "A.npz", "A.npz", "--weights", inception_file]
    status, err = interrupted(words, "not the published", tmp_path)
    assert status == 130, err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["A.npz"]


# ---- without network


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["home", "absent", "file"])
def home(request, tmp_path, monkeypatch):
    """$HOME: a folder, a path where nothing is, or a file. Downloads come from nowhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("no folder")
    for name, published in list(fid.PUBLISHED.items()):
        nowhere = published._replace(base_url=tmp_path.as_uri() + "/nowhere/")
        monkeypatch.setitem(fid.PUBLISHED, name, nowhere)
    path = tmp_path / request.param
    monkeypatch.setenv("HOME", str(path))
    return path


def assert_leaves_nothing(run_command, words, expected):
    """Training with these words in the working folder is refused, and leaves no file."""
    before = files_below(Path())
    result = run_command(train, *FLAGS, "--out", "run", *words)
    assert result.status == 2
    assert "Traceback" not in result.err
    last_line = result.err.splitlines()[-1]
    assert last_line.startswith("train.py: ")
    assert expected in last_line
    assert files_below(Path()) == before
    assert not Path("run").exists()


@pytest.mark.usefixtures("few_shapes", "home")
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--data cifar10", "cannot download cifar-10-binary"),
        ("--data imagenette", "cannot download imagenette2-160.tgz"),
        ("--teacher dinov2", "cannot download dinov2"),
        ("--semantic fqgan --teacher dinov2", "cannot download"),
        ("--lambda_perceptual 1", "cannot download vgg16"),
    ],
)
def test_without_network_or_home(words, expected, run_command):
    assert_leaves_nothing(run_command, words.split(), expected)


HUB = ".cache/torch/hub/checkpoints"


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("words", ["--data cifar10", "--data imagenette", "--teacher dinov2"])
def test_a_hostile_file_in_the_place_of_a_download_is_not_read(words, home, run_command):
    """An archive and a pickle; their SHA-256 comes first."""
    places = {
        "--data cifar10": Path("data/cifar-10-binary.tar.gz"),
        "--data imagenette": Path("data/imagenette2-160.tgz"),
        "--teacher dinov2": home / HUB / "dinov2_vits14_pretrain.pth",
    }
    path = places[words]
    if home.is_file() and home in path.parents:
        pytest.skip("there is no place for it")
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(RunsCode("code ran")))
    assert_leaves_nothing(run_command, words.split(), "not the published file")
    assert not Path("code ran").exists()


# ---- locks and logs


def test_two_processes_do_not_draw_into_one_file(tmp_path):
    part = tmp_path / ".x.npz.KEY.part"
    part.write_bytes(b"images")
    with open(part) as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as the other process does
        with pytest.raises(BadInput, match="another process is drawing"):
            sample.write_npz(tmp_path / "x.npz", torch.zeros(1), 16, "KEY", None)
    assert part.read_bytes() == b"images"


def test_two_runs_do_not_share_a_folder(copied_small_run, run_command):
    folder = copied_small_run
    before = read_files(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as the other run does
    try:
        result = run_command(train, "--resume", "--generator_steps", 21, "--out", folder)
    finally:
        os.close(descriptor)
    assert_refused(result, "train.py", "another process is training there")
    assert read_files(folder) == before

    # A run that has ended, in this very process, holds no lock.
    assert run_command(train, "--resume", "--out", folder).status == 0
    assert run_command(train, "--resume", "--out", folder).status == 0


@pytest.mark.parametrize(
    "line",
    [
        "{x}",
        '{"step": 3}',
        '["stage"]}',
        '{"stage": "generator", "step": null}',
        '"\\ud800}',
    ],
)
def test_a_damaged_log_is_named(line, copied_small_run, run_command):
    log = copied_small_run / "log.jsonl"
    log.write_text(line + "\n")
    result = run_command(train, "--resume", "--out", copied_small_run)
    assert_refused(result, "train.py", "log.jsonl is damaged")
    assert log.read_text() == line + "\n"


# ---- losses, rivals, teachers


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """A file of LPIPS with random weights, in float16."""
    path = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save({name: x.half() for name, x in LPIPS().state_dict().items()}, path)
    return path


def test_lpips_is_loaded_from_a_local_file(lpips_file):
    net = train.load_lpips(lpips_file, torch.device("cpu"))
    saved = torch.load(lpips_file, weights_only=True)
    assert net.state_dict().keys() == saved.keys()
    for name, x in net.state_dict().items():
        assert torch.equal(x, saved[name].float()), name


@pytest.mark.parametrize("damage", ["no head", "other shape", "other names"])
def test_another_lpips_file_is_refused(damage, lpips_file, small_flags, tmp_path, run_command):
    state = torch.load(lpips_file, weights_only=True)
    if damage == "no head":
        del state["lin4.model.1.weight"]
    if damage == "other shape":
        state["lin0.model.1.weight"] = torch.zeros(1, 32, 1, 1)
    if damage == "other names":
        state = {f"vgg.{name}": x for name, x in state.items()}
    torch.save(state, tmp_path / "bad.pth")
    words = ["--lambda_perceptual", 1, "--lpips", tmp_path / "bad.pth", "--out", tmp_path / "run"]
    result = run_command(train, *small_flags, *words)
    assert_refused(result, "train.py", "bad.pth holds other weights")
    assert not (tmp_path / "run").exists()


def test_every_loss_can_be_switched_on_and_off(small_flags, lpips_file, tmp_path, run_command):
    off = ["--lambda_hist", 0, "--lambda_res", 0]
    perceptual = ["--image_size", 32, "--lambda_perceptual", 0.1, "--lpips", lpips_file]
    adversarial = ["--lambda_adv", 0.5, "--adv_start", 3, "--adv_ramp", 2]
    disc = ["--disc_channels", 8, "--disc_layers", 1]
    flags = [*small_flags, *off, *perceptual, *adversarial, *disc]
    flags += ["--stage", "tokenizer", "--tokenizer_steps", 8]
    result = run_command(train, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    row = read_rows(tmp_path / "run")[-1]
    assert {"perceptual", "adv", "disc"} <= row.keys()
    assert row["perceptual"] != 0
    assert "hist" not in row


def test_vavaes_supervision_trains(small_flags, quick_convnet, tmp_path, run_command):
    flags = ["--semantic", "vavae", "--stage", "tokenizer", "--tokenizer_steps", 5]
    result = run_command(train, *small_flags, *quick_convnet, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    [row] = read_rows(tmp_path / "run")
    assert 0 < row["vf"] < 3.25  # 2 - 0.25 and 2 - 0.5 at most
    assert "hist" not in row


def test_the_rivals_train_resume_and_sample(small_flags, quick_convnet, tmp_path, run_command):
    flags = [*small_flags, *quick_convnet, "--semantic", "fqgan"]
    flags += ["--generator", "far", "--top_k", 8]
    whole = tmp_path / "whole"
    halves = tmp_path / "halves"
    assert run_command(train, *flags, "--out", whole).status == 0
    assert run_command(train, *flags, "--generator_steps", 7, "--out", halves).status == 0
    resumed = ["--resume", "--generator_steps", 20, "--out", halves]
    assert run_command(train, *resumed).status == 0
    assert_same_weights(whole, halves, "tokenizer")
    assert torch.load(halves / "generator.pt", weights_only=True)["step"] == 20

    rows = read_rows(whole)
    # An untrained head knows nothing of the images: each of 8 is as likely as another.
    assert rows[0]["contrastive"] == pytest.approx(math.log(8), abs=0.3)
    assert "hist" not in rows[0]
    # 16 and 24 codes: an untrained FAR has 2.98
    assert rows[-1]["cross_entropy"] < (math.log(16) + math.log(24)) / 2 - 0.01
    result = run_command(sample, whole, "--n", 4, "--out", tmp_path / "x.npz")
    assert result.status == 0, result.err
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_a_single_semantic_code_teaches_the_encoder_nothing():
    """The gradients are those of a tokenizer whose semantic latent is a constant."""
    torch.manual_seed(3)
    model = GloTok(replace(TINY, codes_sem=1, lambda_res=0.0)).train()
    x = random_images(4)
    recon, losses = model(x)
    (F.mse_loss(recon, x) + losses["quantize"]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in found if name.startswith("adapter_sem")]

    z = model.encoder(x).flatten(2).transpose(1, 2)
    z_vis = F.normalize(model.adapter_vis(z), dim=2)
    codes = F.normalize(model.quantizer_vis.weight, dim=1)
    nearest = codes[(z_vis @ codes.T).argmax(2)]
    vis = z_vis + (nearest - z_vis).detach()
    sem = F.normalize(model.quantizer_sem.weight, dim=1).detach().expand(4, 64, 8)
    latents = torch.cat([sem, vis], dim=2).transpose(1, 2).unflatten(2, (8, 8))
    loss = F.mse_loss(model.decoder(latents), x)
    loss = loss + ((nearest - z_vis.detach()) ** 2).mean()
    loss = loss + TINY.beta * ((nearest.detach() - z_vis) ** 2).mean()
    encoder = [p for name, p in model.named_parameters() if name.startswith("encoder")]
    expected = torch.autograd.grad(loss, encoder)
    for p, gradient in zip(encoder, expected):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.usefixtures("few_shapes")
def test_a_single_semantic_code_is_a_vq_vae(small_flags, tmp_path, monkeypatch, run_command):
    """Tables 2 and 3's baseline by one setting: it trains, saves, samples, and is measured."""
    folder = tmp_path / "run"
    result = run_command(train, *small_flags, "--codes_sem", 1, "--out", folder)
    assert result.status == 0, result.err
    rows = read_rows(folder)
    assert "hist" not in rows[0]
    model = sample.load_run(folder)
    x = random_images()
    sem, vis = model.encode(x)
    assert not sem.any()  # nothing of the image is in it
    assert len(vis.unique()) > 4
    assert run_command(sample, folder, "--n", 2, "--out", tmp_path / "x.npz").status == 0

    seen = []

    def record_codebook(codebook, tokens, runs):
        seen.append((codebook, tokens))
        return [{"gini": 0.1}], torch.randn(len(tokens), 2)

    monkeypatch.setattr(sample, "repeat_uniformity", record_codebook)
    monkeypatch.setattr(sample, "save_scatter", lambda *args: None)
    words = ["--uniformity", "shapes", "--out", tmp_path / "u.png"]
    assert run_command(sample, folder, *words).status == 0
    [(codebook, tokens)] = seen
    assert torch.equal(codebook, model.codebook_vis)
    assert len(tokens.unique()) > 4


def test_a_discriminator_that_would_enter_after_the_end_is_named(capsys):
    args = argparse.Namespace(stage="all", out=Path("run"))
    c = replace(TINY, lambda_adv=0.5, adv_start=10, tokenizer_steps=10)
    train.print_plan(args, c)
    assert "enter at step 10" in capsys.readouterr().err
    train.print_plan(args, replace(c, adv_start=9))
    assert "enter at step" not in capsys.readouterr().err


def test_the_discriminators_gradient_is_clipped_too(
    small_flags, tmp_path, monkeypatch, run_command
):
    clip = torch.nn.utils.clip_grad_norm_
    clipped = []

    def record(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        after = torch.stack([p.grad.norm() for p in parameters]).norm().item()
        clipped.append((len(parameters), after))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    flags = ["--lambda_adv", 0.5, "--adv_start", 2, "--disc_channels", 8, "--disc_layers", 1]
    flags += ["--clip", 1e-3, "--stage", "tokenizer", "--tokenizer_steps", 4]
    result = run_command(train, *small_flags, *flags, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    disc = glotok.discriminator(replace(TINY, disc_channels=8, disc_layers=1))
    of_disc = [after for n, after in clipped if n == len(list(disc.parameters()))]
    assert len(clipped) == 4 + 2
    assert of_disc == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_weight_decay_is_for_matrices_alone():
    xar = XAR(SMALL)
    with_decay, without = train.decay_groups(xar, 0.05)
    assert with_decay["weight_decay"] == 0.05
    assert without["weight_decay"] == 0
    names = {id(p): name for name, p in xar.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in without["params"]} == {"bias"}
    assert len(with_decay["params"]) + len(without["params"]) == len(names)


def fake_encoding(monkeypatch, n):
    """All tokens of image i are the semantic code i % 16 and the visual code 1, mirrored 0."""

    def encode(run, model, mirror=False):
        tokens = torch.zeros(n, 2, 8, 8, dtype=torch.int32)
        tokens[:, 0] = (torch.arange(n) % 16).view(n, 1, 1)
        tokens[:, 1] = int(not mirror)
        return tokens

    monkeypatch.setattr(train, "encode_training_set", encode)


def generator_run(folder, config, labels):
    data = fid.Data(labels, labels, labels, labels, ["a", "b", "c"])
    folder.mkdir()
    return sample.Run(config, folder, data, {}, torch.device("cpu"), None)


@pytest.mark.parametrize("flip", [0, 1])
def test_the_generator_learns_mirrored_images_too(flip, tmp_path, monkeypatch):
    config = replace(TINY, flip=flip, generator="far", generator_steps=12, gen_batch=8)
    labels = torch.arange(48) % 16 % 3
    fake_encoding(monkeypatch, 48)
    seen = []
    loss = FAR.loss

    def record(self, indices, labels, draws=None):
        seen.append((indices[:, :, 0, 0], labels))
        return loss(self, indices, labels, draws)

    monkeypatch.setattr(FAR, "forward", record)
    run = generator_run(tmp_path / "run", config, labels)
    train.train_generator(run, GloTok(config))
    tokens = torch.cat([tokens for tokens, _ in seen])
    assert torch.equal(torch.cat([labels for _, labels in seen]), tokens[:, 0] % 3)
    assert set(tokens[:, 1].tolist()) == ({0, 1} if flip else {1})
    if flip:  # 96 images in an epoch of 12 steps of 8: each and its mirror image once
        assert len(tokens) == 96
        assert (tokens[:, 1] == 0).sum() == 48


def test_the_latents_deviation_is_that_of_the_whole_training_set(tmp_path, monkeypatch):
    """The first 7,000 images of 8,000 are all alike, as in sorted data."""
    config = replace(TINY, flip=0, generator_steps=1)
    tokens = torch.zeros(8000, 2, 8, 8, dtype=torch.int32)
    tokens[7000:] = torch.randint(16, (1000, 2, 8, 8))
    monkeypatch.setattr(train, "encode_training_set", lambda *args: tokens)
    model = GloTok(config)
    for quantizer in (model.quantizer_sem, model.quantizer_vis):
        quantizer.weight.data[0] = 1  # all its components are equal
    run = generator_run(tmp_path / "run", config, torch.zeros(8000, dtype=torch.int64))
    ema_model, _ = train.train_generator(run, model)
    sem = model.codebook_sem.detach().double().numpy()[tokens[:, 0]]
    vis = model.codebook_vis.detach().double().numpy()[tokens[:, 1]]
    expected = np.concatenate([sem, vis], axis=-1).std()
    assert ema_model.latent_std.item() == pytest.approx(expected, rel=1e-2)
    assert expected > 0.1  # and of the first 1,000 it is 0


def test_mirrored_images_are_encoded_mirrored():
    model = GloTok(TINY).eval()
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    index = torch.arange(3)
    device = torch.device("cpu")
    found = sample.encode_all(model, images, index, device, mirror=True)
    expected = sample.encode_all(model, images.flip(3), index, device)
    assert torch.equal(found, expected)
    assert not torch.equal(found, sample.encode_all(model, images, index, device))


def test_semantic_none_trains_without_the_histogram_loss(small_flags, tmp_path, run_command):
    flags = ["--semantic", "none", "--stage", "tokenizer"]
    assert run_command(train, *small_flags, *flags, "--out", tmp_path / "run").status == 0
    assert "hist" not in read_rows(tmp_path / "run")[-1]


@pytest.mark.usefixtures("few_shapes")
def test_convnet_teacher_learns_the_shapes_and_is_cached(tmp_path, monkeypatch, run_command):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--teacher", "convnet", "--teacher_centres", 64, "--stage", "tokenizer"]
    assert run_command(train, *flags, "--tokenizer_steps", 5, "--out", folder).status == 0
    teacher = torch.load(folder / "teacher.pt", weights_only=True)
    assert teacher["histogram"].sum().item() == pytest.approx(1, abs=1e-5)
    assert teacher["made_by"]["teacher"] == "convnet"

    net = glotok.ConvNet(6).eval()
    net.load_state_dict(teacher["convnet"])
    images, labels = fid.draw_shapes(1000, 16, 1)
    right = net(images.float() / 127.5 - 1).argmax(1) == labels
    assert right.float().mean() > 0.5  # 16 pixels, 2,000 pictures; chance is 0.17

    monkeypatch.setattr(train, "make_teacher", None)  # resuming must not need it
    flags = ["--resume", "--tokenizer_steps", 6, "--stage", "tokenizer"]
    assert run_command(train, *flags, "--out", folder).status == 0


# ---- bad input of train.py


def encode_picture(picture, kind="PNG", **options):
    """A PIL picture -> the bytes of its file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def random_picture(width=20, height=24):
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8))


def save_unreadable_pictures(folder):
    """For each of many kinds, a folder named after it: 4 good pictures and a bad one."""
    png = encode_picture(random_picture())
    bad = {
        "bomb.png": encode_picture(Image.new("1", (14000, 14000))),  # beyond PIL's limit
        "torn.png": png[: len(png) // 2],
        "blank.png": b"",
        "text.jpg": b"hello\n" * 50,
        "head.jpg": encode_picture(random_picture(), "JPEG")[:30],
        "other.bmp": b"BM" + bytes(20),
    }
    for name, data in bad.items():
        (save_pictures(folder / Path(name).stem, 4) / name).write_bytes(data)
    (save_pictures(folder / "dangling", 4) / "x.png").symlink_to(folder / "gone.png")
    (save_pictures(folder / "folder", 4) / "x.png").mkdir()
    save_pictures(folder / "rotten", 10)
    for i in range(3):
        (folder / "rotten" / f"{i:03d}.png").write_bytes(b"\x89PNG broken")


def save_bad_data(folder):
    """Folders and .npz files of pictures that cannot be trained on; good.npz alone can."""
    (folder / "empty").mkdir()
    save_pictures(folder / "flat", 4)
    save_pictures(folder / "single", 1)
    save_pictures(folder / "split" / "train" / "a", 4)
    save_pictures(folder / "split" / "val" / "b", 4)

    x = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(folder / "good.npz", x)
    np.savez(folder / "nobody.npz", x[:0])
    np.savez(folder / "somebody.npz", x[:1])
    np.savez(folder / "floats.npz", x.astype(float))
    np.savez(folder / "grey.npz", x[..., 0])
    np.savez(folder / "channels_first.npz", x.transpose(0, 3, 1, 2))
    np.savez(folder / "few.npz", x, labels=np.zeros(3, int))
    np.savez(folder / "minus.npz", x, labels=np.full(4, -1))
    np.savez(folder / "half.npz", x, labels=np.full(4, 0.5))
    np.savez(folder / "objects.npz", np.array([{}], dtype=object))
    np.savez(folder / "none.npz")
    (folder / "torn.npz").write_bytes((folder / "floats.npz").read_bytes()[:200])
    (folder / "text.npz").write_text("hello")
    (folder / "nothing.npz").write_bytes(b"")

    # A header that promises more than any memory holds.
    promise = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, promise)
    with zipfile.ZipFile(folder / "huge.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())


def save_bad_teachers(folder):
    """Files of vectors that cannot be teachers. Two hold code that makes the folder "code ran"."""
    hostile = RunsCode(str(folder / "code ran"))
    np.save(folder / "nan.npy", np.full((4, 3), np.nan, np.float32))
    np.save(folder / "vast.npy", np.full((4, 3), 1e30, np.float32))
    np.save(folder / "zero.npy", np.zeros((4, 3), np.float32))
    np.save(folder / "one.npy", np.ones((1, 3), np.float32))
    np.save(folder / "cube.npy", np.ones((4, 3, 2), np.float32))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    (folder / "code.npy").write_bytes(pickle.dumps(hostile))
    torch.save({"step": 3}, folder / "none.pt")
    torch.save({"a": torch.ones(3, 2), "b": {"c": torch.ones(4, 2)}}, folder / "two.pt")
    torch.save(hostile, folder / "code.pt")
    (folder / "text.pt").write_text("hello")
    with open(folder / "long.pt", "w") as file:
        file.truncate(2**30)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """The folder that is called BAD in the table below."""
    folder = tmp_path_factory.mktemp("bad")
    save_unreadable_pictures(folder)
    save_bad_data(folder)
    save_bad_teachers(folder)
    return folder


# Words that are added to good ones, and what the line must say.
BAD_TRAIN_WORDS = [
    # flags
    ("--preset cifar", "no preset 'cifar'; did you mean 'cifar10'?"),
    ("--lambda_hits 1", "no flag '--lambda_hits'; did you mean '--lambda_hist'?"),
    ("--lambda_hist abc", "argument --lambda_hist: invalid float value: 'abc'"),
    ("--batch_size 1.5", "argument --batch_size: invalid int value: '1.5'"),
    ("--stage all-of-it", "argument --stage: invalid choice: 'all-of-it'"),
    ("--stage generator", "has no tokenizer yet: train it first, with --stage tokenizer"),
    ("--resume", "no run in"),
    # a setting out of its range
    ("--lambda_hist nan", "lambda_hist is nan: it must lie in [0, 1e+09]"),
    ("--lambda_hist -1", "lambda_hist is -1.0: it must lie in [0, 1e+09]"),
    ("--tokenizer_steps 0", "tokenizer_steps is 0: it must lie in [1, 1e+09]"),
    # one message for each of Config's further checks
    ("--image_size 31", "image_size is 31: 2 levels of patch 1 need a multiple of 2"),
    ("--width 15", "width is 15: it must be a multiple of heads, 2"),
    ("--cell 3", "cell is 3: it must divide the grid of 8 tokens"),
    ("--lambda_adv 0.1 --disc_layers 3", "a discriminator of 3 layers takes at least 24"),
    ("--lambda_perceptual 1 --image_size 8", "image_size is 8: LPIPS takes at least 16"),
    ("--gen_width 20", "gen_width is 20: it must be a multiple of 4 gen_heads"),
    ("--semantic nearby", "semantic is 'nearby': it must be global, fqgan, vavae or none"),
    ("--semantic fqgan --teacher sphere", "--teacher convnet or dinov2"),
    ("--semantic vavae --teacher sphere", "--teacher convnet or dinov2"),
    ("--semantic vavae --teacher convnet --codes_sem 1", "vavae has nothing to teach"),
    ("--gen_lr 1e-4 --gen_lr_end 2e-4", "gen_lr_end is 0.0002: it must not exceed gen_lr, 0.0001"),
    ("--generator gan", "generator is 'gan': it must be xar or far"),
    ("--precision half", "precision is 'half': it must be auto, bf16 or float32"),
    # batches that cannot be divided
    (
        "--batch_size 10 --accumulate 4",
        "batch_size is 10: it must be a multiple of 1 process(es) times accumulate, 4",
    ),
    (
        "--gen_batch 10 --accumulate 4",
        "gen_batch is 10: it must be a multiple of 1 process(es) times accumulate, 4",
    ),
    # data: folders
    ("--data nowhere", "no data at 'nowhere'"),
    ("--data BAD/blank/blank.png", "no data at"),
    ("--data BAD/empty", "no images"),
    ("--data BAD/single", "too few"),
    ("--data BAD/split", "class that train/ has not: 'b'"),
    ("--data BAD/rotten", "3 of 10 images"),
    ("--data BAD/bomb", "1 of 5 images"),
    ("--data BAD/torn", "torn.png"),
    ("--data BAD/blank", "blank.png"),
    ("--data BAD/text", "text.jpg"),
    ("--data BAD/head", "head.jpg"),
    ("--data BAD/other", "other.bmp"),
    ("--data BAD/dangling", "x.png"),
    ("--data BAD/folder", "x.png"),
    # data: arrays
    ("--data BAD/floats.npz", "must be uint8 (N, H, W, 3), and is float64"),
    ("--data BAD/grey.npz", "must be uint8 (N, H, W, 3), and is uint8 (4, 16, 16)"),
    ("--data BAD/channels_first.npz", "must be uint8 (N, H, W, 3), and is uint8 (4, 3, 16, 16)"),
    ("--data BAD/none.npz", "must be uint8 (N, H, W, 3)"),
    ("--data BAD/objects.npz", "cannot read"),
    ("--data BAD/torn.npz", "cannot read"),
    ("--data BAD/text.npz", "cannot read"),
    ("--data BAD/nothing.npz", "cannot read"),
    ("--data BAD/huge.npz", "cannot read"),
    ("--data BAD/nobody.npz", "too few"),
    ("--data BAD/somebody.npz", "too few"),
    ("--data BAD/few.npz", "labels must be 4 integers from 0 up"),
    ("--data BAD/minus.npz", "labels must be 4 integers from 0 up"),
    ("--data BAD/half.npz", "labels must be 4 integers from 0 up"),
    # teachers
    ("--data BAD/flat --teacher convnet", "one class"),
    ("--teacher nobody", "no teacher 'nobody'"),
    ("--teacher BAD/nan.npy", "not finite"),
    ("--teacher BAD/vast.npy", "not finite"),
    ("--teacher BAD/zero.npy", "zero"),
    ("--teacher BAD/one.npy", "n > 1"),
    ("--teacher BAD/cube.npy", "it holds array (4, 3, 2)"),
    ("--teacher BAD/words.npy", "it holds nothing"),
    ("--teacher BAD/none.pt", "it holds nothing"),
    ("--teacher BAD/two.pt", "it holds a (3, 2), b.c (4, 2)"),
    ("--teacher BAD/objects.npy", "cannot read"),
    ("--teacher BAD/code.npy", "cannot read"),
    ("--teacher BAD/code.pt", "cannot read"),
    ("--teacher BAD/long.pt", "cannot read"),
    ("--teacher BAD/text.pt", "cannot read"),
    # the FID network
    ("--weights gone.pth", "cannot read gone.pth"),
    ("--weights BAD/code.pt", "cannot read"),
    # a run folder that cannot be made
    ("--out BAD/text.pt/run", "cannot write"),
    ("--out /proc/run", "cannot write"),
]


@pytest.mark.parametrize("words, message", BAD_TRAIN_WORDS, ids=[w for w, _ in BAD_TRAIN_WORDS])
def test_train_refuses_bad_input(words, message, bad_files, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words.replace("BAD", str(bad_files)).split()
    good = [*FLAGS, "--data", bad_files / "good.npz", "--out", "run"]
    result = run_command(train, *good, *words)
    assert_refused(result, "train.py", message)
    assert not (bad_files / "code ran").exists()
    assert os.listdir() == []  # nothing was begun


def test_a_loss_of_nan_ends_training(bad_files, run_command, tmp_path, monkeypatch):
    def nan_loss(recon, x):
        return math.nan * F.mse_loss(recon, x)

    monkeypatch.setattr(train, "reconstruction_loss", nan_loss)
    steps = ["--tokenizer_steps", 6, "--save_every", 2]
    words = [*FLAGS, *steps, "--data", bad_files / "good.npz", "--out", tmp_path / "run"]
    result = run_command(train, *words)
    assert_refused(result, "train.py", "a loss became NaN")
    assert not (tmp_path / "run" / "tokenizer.pt").exists()


SETTINGS = {f.name: f for f in fields(Config)}


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e30", "text", ""])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_in_its_range_or_refused(name, value, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--{name}", value, "--out", "nowhere"])
    try:
        _, config = train.parse_arguments()
    except BadInput as error:
        assert name in str(error)
        return
    accepted = getattr(config, name)
    assert type(accepted) is type(SETTINGS[name].default)
    if not isinstance(accepted, str):
        for number in np.atleast_1d(accepted):
            assert math.isfinite(number)
            assert 0 <= number <= 1e9


def test_a_run_is_not_overwritten(finished, run_command):
    before = read_files(finished)
    conflicts = [
        (FLAGS, "holds a run: continue it with --resume"),
        (["--resume", "--codes_sem", 17], "was made with codes_sem 16"),
        (["--resume", "--preset", "cifar10"], "was made with preset shapes"),
    ]
    for words, message in conflicts:
        result = run_command(train, *words, "--out", finished)
        assert_refused(result, "train.py", message)
        assert "choose another --out" in result.err
        assert len(result.err.splitlines()) == 1
    assert read_files(finished) == before


@pytest.mark.parametrize("name", ["tokenizer.pt", "generator.pt"])
def test_a_checkpoint_without_its_settings_is_no_empty_folder(
    name, finished, run_command, tmp_path
):
    shutil.copy(finished / name, tmp_path)
    result = run_command(train, *FLAGS, "--out", tmp_path)
    assert_refused(result, "train.py", "holds a run: continue it with --resume")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_error_of_the_process_is_one_line(tmp_path):
    done = run_process(REPOSITORY / "train.py", "--preset", "shape", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


# ---- odd pictures, few pictures


def deep_pixels():
    return np.random.RandomState(0).randint(0, 65536, (16, 16)).astype(np.uint16)


def odd_pictures():
    """{name: bytes} of kinds that must be accepted."""
    picture = random_picture()
    turned = picture.rotate(90)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    return {
        "tiny.png": encode_picture(picture.resize((1, 1))),
        "wide.png": encode_picture(Image.new("RGB", (20000, 3), "red")),
        "cmyk.jpg": encode_picture(picture.convert("CMYK"), "JPEG"),
        "deep.png": encode_picture(Image.fromarray(deep_pixels())),
        "palette.png": encode_picture(picture.convert("P")),
        "bits.png": encode_picture(picture.convert("1")),
        "alpha.png": encode_picture(picture.convert("RGBA")),
        "greyalpha.png": encode_picture(picture.convert("LA")),
        "moving.webp": encode_picture(picture, "WEBP", save_all=True, append_images=[turned]),
        "moving.png": encode_picture(picture, save_all=True, append_images=[turned]),
        "turned.jpg": encode_picture(picture, "JPEG", exif=orientation),
        "na\u00efve \u732b\nnew line.png": encode_picture(picture),
    }


ODD_PICTURES = odd_pictures()


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_are_trained_on(name, run_command, tmp_path):
    save_pictures(tmp_path / "data" / "one\nclass", 3)
    (save_pictures(tmp_path / "data" / "\u732b", 3) / name).write_bytes(ODD_PICTURES[name])
    short = ["--tokenizer_steps", 1, "--generator_steps", 1, "--sampling_steps", 1]
    words = [*FLAGS, "--data", tmp_path / "data", *short, "--out", tmp_path / "run"]
    result = run_command(train, *words)
    assert result.status == 0, result.err
    assert "data: 6 training and 1 held-out images, 2 classes" in result.err
    assert "cannot be read" not in result.err


def test_16_bits_are_scaled_not_clipped(tmp_path):
    path = tmp_path / "deep.png"
    path.write_bytes(ODD_PICTURES["deep.png"])
    picture = fid.decode_batch([(path, None)], 16)[0].numpy()
    assert np.abs(picture - deep_pixels() / 257).max() <= 1  # 65535 / 257 = 255


@pytest.mark.parametrize("semantic", ["global", "fqgan", "vavae"])
def test_two_images_are_enough(semantic, run_command, tmp_path, monkeypatch):
    """One to train on, one held out; of two classes, so that a classifier can be their teacher."""
    short = functools.partial(train.train_convnet, steps=30)
    monkeypatch.setattr(train, "train_convnet", short)
    save_pictures(tmp_path / "data" / "a", 1)
    save_pictures(tmp_path / "data" / "b", 1, seed=9)
    teacher = ["--teacher", "convnet", "--semantic", semantic]
    words = [*FLAGS, "--data", tmp_path / "data", *teacher, "--out", tmp_path / "run"]
    result = run_command(train, *words)
    assert result.status == 0, result.err
    assert "data: 1 training and 1 held-out images, 2 classes" in result.err


# ---- damaged runs


# Changes to config.json, and what is then refused.
BAD_SETTINGS = {
    "other size": ({"channels": 16}, "tokenizer.pt holds other weights"),
    "text": ({"channels": "eight"}, "channels is 'eight': it must be of type int"),
    "null": ({"channels": None}, "channels is None: it must be of type int"),
    "negative": ({"channels": -3}, "channels is -3: it must lie in [4, 4096]"),
    "no levels": ({"channel_mult": []}, "channel_mult is (): it must be of type tuple"),
    "levels of text": ({"channel_mult": ["1", 2]}, "channel_mult is ('1', 2): it must hold whole"),
    "half a level": ({"channel_mult": [1.5]}, "channel_mult is (1.5,): it must hold whole numbers"),
    "unknown": ({"colour": 3}, "config.json is not a run's settings"),
}


def spoil_config(run, damage):
    path = run / "config.json"
    saved = json.loads(path.read_text())
    if damage == "no preset":
        del saved["preset"]
    elif damage == "list":
        saved = [1]
    else:
        saved |= BAD_SETTINGS[damage][0]
    path.write_text(json.dumps(saved))


def spoil_tokenizer(run, damage):
    path = run / "tokenizer.pt"
    data = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    weights = saved["model"]
    if damage == "NaN":
        weights["decoder.0.weight"][0, 0] = math.nan
        torch.save(saved, path)
    elif damage == "missing weight":
        del weights["decoder.0.weight"]
        torch.save(saved, path)
    elif damage == "not a dict":
        torch.save(torch.ones(3), path)
    elif damage == "code":
        torch.save(RunsCode(str(run / "code ran")), path)
    elif damage == "end cut off":
        path.write_bytes(data[:-100])
    elif damage == "one dot":
        path.write_bytes(b".")
    else:
        assert damage == "start alone"
        path.write_bytes(data[:500])


# file, damage, what the line must say
DAMAGES = [
    *[("config.json", damage, message) for damage, (_, message) in BAD_SETTINGS.items()],
    ("config.json", "no preset", "config.json is not a run's settings"),
    ("config.json", "list", "config.json is not a run's settings"),
    ("tokenizer.pt", "NaN", "NaN or infinity in model.decoder.0.weight"),
    ("tokenizer.pt", "missing weight", "tokenizer.pt holds other weights"),
    ("tokenizer.pt", "not a dict", "tokenizer.pt holds other weights"),
    ("tokenizer.pt", "code", "tokenizer.pt"),
    ("tokenizer.pt", "end cut off", "tokenizer.pt"),
    ("tokenizer.pt", "one dot", "tokenizer.pt"),
    ("tokenizer.pt", "start alone", "tokenizer.pt"),
]


def assert_sample_refuses(run_command, run, message):
    result = run_command(sample, run, "--n", 1, "--out", run.parent / "x.png")
    assert_refused(result, "sample.py", message)
    assert len(result.err.splitlines()) == 1
    assert not (run.parent / "x.png").exists()


def assert_resume_refuses(run_command, run, message):
    """And leaves the run as it is; config.json alone may be written anew."""
    before = read_files(run)
    result = run_command(train, "--resume", "--out", run)
    assert_refused(result, "train.py", message)
    after = read_files(run)
    before.pop("config.json")
    after.pop("config.json")
    assert after == before


# In a process, a warning would be further lines; those that Python hides there are ignored.
@pytest.mark.filterwarnings(
    "error", "ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"
)
@pytest.mark.parametrize("file, damage, message", DAMAGES)
def test_a_damaged_run_is_refused(file, damage, message, copied_run, run_command, few_shapes):
    if file == "config.json":
        spoil_config(copied_run, damage)
    else:
        spoil_tokenizer(copied_run, damage)
    assert_sample_refuses(run_command, copied_run, message)
    assert_resume_refuses(run_command, copied_run, message)
    assert not (copied_run / "code ran").exists()


def test_a_config_that_is_no_json_is_refused(copied_run, run_command):
    (copied_run / "config.json").write_text("{")
    assert_sample_refuses(run_command, copied_run, "config.json is not a run's settings")
    assert_resume_refuses(run_command, copied_run, "config.json is not a run's settings")


def test_sample_refuses_a_run_without_tokenizer(copied_run, run_command):
    (copied_run / "tokenizer.pt").unlink()  # --resume would simply start again
    assert_sample_refuses(run_command, copied_run, "tokenizer.pt")


# ---- the commands of sample.py


def test_steps_and_guidance_reach_the_generator(finished, run_command, tmp_path, monkeypatch):
    seen = []
    draw = XAR.sample

    def record(generator, labels, steps, guidance):
        seen.append((steps, guidance))
        return draw(generator, labels, steps, guidance)

    monkeypatch.setattr(XAR, "sample", record)
    options = ["--n", 2, "--steps", 2, "--guidance", 1.7, "--out", tmp_path / "a.png"]
    assert run_command(sample, finished, *options).status == 0
    assert seen == [(2, 1.7)]


def test_samples_depend_on_the_seed_alone(finished, run_command, tmp_path):
    options = ["--n", 10, "--classes", 3, 5, "--steps", 2, "--guidance", 2]
    grids = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.png"
        result = run_command(sample, finished, *options, "--seed", seed, "--out", path)
        assert result.status == 0
        assert "10 pictures of classes 3, 5" in result.out
        grids[name] = path.read_bytes()
    assert grids["a"] == grids["b"]
    assert grids["a"] != grids["c"]


@pytest.mark.parametrize("flag", ["--reconstruct", "--retain", "--uniformity"])
def test_sample_shows_held_out_images(flag, finished, few_shapes, run_command, tmp_path):
    lines = {
        "--reconstruct": f"PSNR {read_metrics(finished)['psnr']:.2f} dB",
        "--retain": "visual codes alone: a linear probe",
        "--uniformity": "density_cv",
    }
    path = tmp_path / "x.png"
    words = ["--runs", 2] if flag == "--uniformity" else []
    result = run_command(sample, finished, flag, "shapes", *words, "--out", path)
    assert result.status == 0, result.err
    assert lines[flag] in result.out
    with Image.open(path) as picture:
        assert picture.width > 200
        assert len(picture.convert("RGB").getcolors(10**6)) > 5


@pytest.fixture
def bare_network(monkeypatch):
    """A QuickNet without classifier, which sample.py reads from the file bare.pth alone."""
    net = QuickNet(fc=False)

    def load_inception(file, device):
        assert file == "bare.pth"
        torch.rand(3)  # as InceptionV3 does for its first weights
        return net

    monkeypatch.setattr(sample, "load_inception", load_inception)
    return net


def distances_of_seen(net, images, recon):
    """Of 20 images and reconstructions that a QuickNet saw: distance_for_tests, KID by loops."""
    features = torch.cat(net.features).double()
    fresh = QuickNet(fc=False)
    expected = torch.cat([fresh(images)[0], fresh(recon)[0]]).double()
    torch.testing.assert_close(features, expected, atol=2e-3, rtol=0)
    moments = []
    for x in features.split(20):
        moments += [x.mean(0), torch.cov(x.T)]
    kid, _ = kernel_distance_by_loops(features[:20], features[20:], subsets=1, size=20, paired=True)
    return distance_for_tests(*moments), kid


@pytest.mark.usefixtures("quick_distance", "few_shapes")
def test_reconstruct_reports_fid_and_kid(finished, bare_network, run_command, tmp_path):
    words = ["--reconstruct", "shapes", "--weights", "bare.pth", "--out", tmp_path / "x.png"]
    result = run_command(sample, finished, *words)
    assert result.status == 0, result.err
    images, recon = held_out_and_recon(load_tokenizer(finished))
    distance, kid = distances_of_seen(bare_network, images, recon)
    assert f"FID {distance:.3f}, KID {kid:.6f}" in result.out


@pytest.mark.usefixtures("few_shapes")
def test_reconstructions_of_several_runs_stand_side_by_side(finished, run_command, tmp_path):
    """A row of originals, and one of each run: here of a run and of one that knows nothing."""
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    model = GloTok(TINY)
    state = {"model": model.state_dict()}
    torch.save(state, other / "tokenizer.pt")
    path = tmp_path / "x.png"
    words = ["--reconstruct", "shapes", "--beside", other, "--out", path]
    result = run_command(sample, finished, *words)
    assert result.status == 0, result.err
    first, second = result.out.splitlines()
    assert f"{finished}, 20 held-out images of shapes: PSNR" in first
    assert f"PSNR {read_metrics(finished)['psnr']:.2f} dB" in first

    images, recon = held_out_and_recon(model.eval())
    recon = recon.numpy()
    error = ((images.numpy().astype(float) - recon) ** 2).mean((1, 2, 3))
    expected = (10 * np.log10(255**2 / error)).mean()
    assert f"{other}, 20 held-out images of shapes: PSNR {expected:.2f} dB" in second

    # The bottom right picture is the eighth of the other run's, each pixel 8 times 8.
    corner = np.asarray(Image.open(path))[-132:-4, -132:-4][::8, ::8]
    assert (corner == recon[7 * 20 // 8].transpose(1, 2, 0)).all()


@pytest.mark.usefixtures("quick_distance", "few_shapes")
def test_training_reports_rfid_and_kid(bare_network, run_command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    draws = []

    def make_teacher(*args, make_teacher=train.make_teacher):
        draws.append(torch.rand(1).item())
        return make_teacher(*args)

    monkeypatch.setattr(train, "make_teacher", make_teacher)
    steps = ["--stage", "tokenizer", "--tokenizer_steps", 2]
    out = tmp_path / "run"
    result = run_command(train, *FLAGS, *steps, "--weights", "bare.pth", "--out", out)
    assert result.status == 0, result.err
    metrics = read_metrics(out)
    found = metrics["rfid"], metrics["kid"]
    images, recon = held_out_and_recon(load_tokenizer(out))
    assert found == pytest.approx(distances_of_seen(bare_network, images, recon), abs=1e-6)

    result = run_command(train, *FLAGS, *steps, "--out", tmp_path / "other")
    assert result.status == 0
    assert "FID and KID will not be measured" in result.err
    assert not {"rfid", "kid"} & read_metrics(tmp_path / "other").keys()
    assert draws[0] == draws[1]  # the network's own draws change nothing

    # Resumed without the network: the same tokenizer keeps its distances, unless they are of other
    # images; a longer one has none.
    other = Path(shutil.copytree(out, tmp_path / "fewer"))
    for folder, words, names in (
        (out, ["--tokenizer_steps", 2], {"rfid", "kid"}),
        (out, ["--tokenizer_steps", 3], set()),
        (other, ["--eval_images", 10], set()),
    ):
        flags = ["--resume", "--stage", "tokenizer", *words, "--out", folder]
        assert run_command(train, *flags).status == 0
        assert {"rfid", "kid"} & read_metrics(folder).keys() == names


@pytest.mark.usefixtures("quick_distance", "few_shapes", "bare_network")
def test_a_single_held_out_image_has_no_distances(run_command, tmp_path):
    flags = ["--stage", "tokenizer", "--tokenizer_steps", 2, "--eval_images", 1]
    out = tmp_path / "run"
    weights = ["--weights", "bare.pth"]
    result = run_command(train, *FLAGS, *flags, *weights, "--out", out)
    assert result.status == 0, result.err
    assert not {"rfid", "kid"} & read_metrics(out).keys()
    words = ["--reconstruct", "shapes", *weights, "--out", tmp_path / "x.png"]
    result = run_command(sample, out, *words)
    assert result.status == 0, result.err
    assert "PSNR" in result.out and "FID" not in result.out
    words = ["--uniformity", "shapes", "--out", tmp_path / "u.png"]
    assert_refused(run_command(sample, out, *words), "sample.py", "shapes has 1 held-out images")
    assert not (tmp_path / "u.png").exists()


def peak_memory(metrics, name):
    prefix = "generator_" if name == "generator" else ""
    return metrics[f"{prefix}peak_memory_gb"]


@pytest.mark.usefixtures("few_shapes")
def test_peak_memory_is_that_of_the_process_which_trained(copied_run, run_command):
    """A finished run's checkpoint keeps it: to read the run again takes less."""
    before = read_metrics(copied_run)
    for name in ("tokenizer", "generator"):
        path = copied_run / f"{name}.pt"
        saved = torch.load(path, weights_only=True)
        assert saved["peak"] / 2**30 == pytest.approx(peak_memory(before, name), abs=0.2)
        torch.save({**saved, "peak": 3 * 2**30}, path)
    assert run_command(train, "--resume", "--out", copied_run).status == 0
    after = read_metrics(copied_run)
    assert (peak_memory(after, "tokenizer"), peak_memory(after, "generator")) == (3.0, 3.0)


def test_samples_as_arrays(finished, run_command, tmp_path):
    path = tmp_path / "x.npz"
    options = ["--n", 25, "--classes", 4, 1, 1, "--steps", 1]
    assert run_command(sample, finished, *options, "--out", path).status == 0
    arrays = np.load(path)
    assert arrays.files == ["arr_0", "labels"]
    assert arrays["arr_0"].shape == (25, 16, 16, 3)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["labels"].tolist() == [4, 1, 1] * 8 + [4]
    assert os.listdir(tmp_path) == ["x.npz"]


def test_samples_go_on_where_they_stopped(finished, run_command, tmp_path, monkeypatch):
    words = [finished, "--n", 250, "--classes", 4, 1, "--steps", 1, "--out"]
    assert run_command(sample, *words, tmp_path / "whole.npz").status == 0
    whole = np.load(tmp_path / "whole.npz")
    assert whole["labels"].tolist() == [4, 1] * 125

    batch_sizes = []

    def stop_at_the_third_batch(self, labels, *args, sample=XAR.sample):
        batch_sizes.append(len(labels))
        if len(batch_sizes) == 3:
            raise KeyboardInterrupt
        return sample(self, labels, *args)

    monkeypatch.setattr(XAR, "sample", stop_at_the_third_batch)
    assert run_command(sample, *words, tmp_path / "again.npz").status == 130
    assert not (tmp_path / "again.npz").exists()
    [part] = tmp_path.glob(".again.npz.*")
    part.write_bytes(part.read_bytes() + b"half a batch")

    assert run_command(sample, *words, tmp_path / "again.npz").status == 0
    assert batch_sizes == [100, 100, 50, 50]  # the first two batches were kept
    assert (np.load(tmp_path / "again.npz")["arr_0"] == whole["arr_0"]).all()
    assert sorted(os.listdir(tmp_path)) == ["again.npz", "whole.npz"]


# RUN is a finished run, BARE one without generator, LARGE one of larger images; old.png is there.
BAD_SAMPLE_WORDS = [
    ("nowhere", "no run in nowhere"),
    ("RUN --gidance 2", "no flag '--gidance'; did you mean '--guidance'?"),
    ("BARE", "has no generator yet: python train.py --stage generator"),
    # one message for each of check_arguments' checks
    ("RUN --retain shapes --uniformity shapes", "at most one of --reconstruct, --retain,"),
    ("RUN --reconstruct shapes --retain shapes", "at most one of --reconstruct, --retain,"),
    ("RUN --retain shapes --out x.npz", "--out x.npz must end in .png"),
    ("RUN --out x.jpg", "--out x.jpg must end in .png or .npz"),
    ("RUN --n 0", "--n 0 must lie in 1 to 10,000 for a picture"),
    ("RUN --n -1", "--n -1 must lie in 1 to 10,000 for a picture"),
    ("RUN --n 10001", "--n 10001 must lie in 1 to 10,000 for a picture"),
    ("RUN --n 100000000000000000000", "must lie in 1 to 10,000 for a picture"),
    ("RUN --n 0 --out x.npz", "--n 0 must lie in 1 to 10 million"),
    ("RUN --n 10000001 --out x.npz", "--n 10000001 must lie in 1 to 10 million"),
    ("RUN --seed -1", "--seed -1 must lie in 0 to 2^31 - 1"),
    ("RUN --seed 2147483648", "--seed 2147483648 must lie in 0 to 2^31 - 1"),
    ("RUN --seed 100000000000000000000", "must lie in 0 to 2^31 - 1"),
    ("RUN --uniformity shapes --runs 0", "--runs 0 must lie in 1 to 1,000"),
    ("RUN --uniformity shapes --runs -1", "--runs -1 must lie in 1 to 1,000"),
    ("RUN --uniformity shapes --runs 1001", "--runs 1001 must lie in 1 to 1,000"),
    ("RUN --uniformity shapes --runs 100000000000000000000", "must lie in 1 to 1,000"),
    ("RUN --out old.png", "old.png exists: choose another --out"),
    ("RUN --retain shapes --steps 3", "--n, --classes, --steps and --guidance are of new images"),
    ("RUN --retain shapes --n 3", "are of new images alone"),
    ("RUN --retain shapes --runs 3", "--runs counts the t-SNE runs of --uniformity alone"),
    ("RUN --uniformity shapes --guidance 2", "are of new images alone"),
    ("RUN --reconstruct shapes --classes 0", "are of new images alone"),
    ("RUN --beside RUN", "--beside names runs to compare with, for --reconstruct alone"),
    ("RUN --reconstruct shapes --beside gone", "no run in gone"),
    ("RUN --reconstruct shapes --beside BARE LARGE", "large is of images of 32 pixels"),
    ("RUN --weights x.pth", "--weights is the network of FID and KID, of --reconstruct alone"),
    # what the run does not fit
    ("RUN --reconstruct shapes --weights gone.pth", "cannot read gone.pth"),
    ("RUN --retain nowhere", "no data at 'nowhere'"),
    ("RUN --steps 0", "sampling_steps is 0: it must lie in [1, 10000]"),
    ("RUN --steps -1", "sampling_steps is -1: it must lie in [1, 10000]"),
    ("RUN --steps 100000000000000000000", "it must lie in [1, 10000]"),
    ("RUN --guidance -1", "guidance is -1.0: it must lie in [0, 100]"),
    ("RUN --guidance nan", "guidance is nan: it must lie in [0, 100]"),
    ("RUN --guidance inf", "guidance is inf: it must lie in [0, 100]"),
    ("RUN --guidance 1e30", "guidance is 1e+30: it must lie in [0, 100]"),
    ("RUN --guidance x", "argument --guidance: invalid float value: 'x'"),
    ("RUN --classes 6", "--classes 6: the run has classes 0 to 5"),
    ("RUN --classes -1", "--classes -1: the run has classes 0 to 5"),
    ("RUN --classes 100000000000000000000", "the run has classes 0 to 5"),
    # no integers
    *[
        (f"RUN {flag} {value}", f"argument {flag}: invalid int value: '{value}'")
        for flag in ("--n", "--seed", "--runs", "--steps", "--classes")
        for value in ("nan", "1e30", "x")
    ],
]


@pytest.mark.parametrize("words, message", BAD_SAMPLE_WORDS, ids=[w for w, _ in BAD_SAMPLE_WORDS])
def test_sample_refuses_bad_input(words, message, finished, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.png").write_text("precious")
    Path("bare").mkdir()
    for name in ("config.json", "tokenizer.pt"):
        shutil.copy(finished / name, "bare")
    Path("large").mkdir()
    large = replace(TINY, image_size=32)
    settings = {"preset": "shapes", **asdict(large)}
    Path("large", "config.json").write_text(json.dumps(settings))
    torch.save({"model": GloTok(large).state_dict()}, "large/tokenizer.pt")
    words = words.replace("RUN", str(finished)).replace("BARE", "bare").replace("LARGE", "large")
    result = run_command(sample, *words.split())
    assert_refused(result, "sample.py", message)
    assert len(result.err.splitlines()) == 1
    assert Path("old.png").read_text() == "precious"
    assert sorted(os.listdir()) == ["bare", "large", "old.png"]


# ---- figure 4 of the paper: retain and probe


@torch.no_grad()
def test_retain_keeps_what_it_says(monkeypatch):
    model = GloTok(TINY).eval()
    for module in (model.residual_sem, model.residual_vis):
        torch.nn.init.normal_(module.proj_out.weight)  # it starts at zero
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
    sample.retain("x.png", model, sample.to_uint8(x), tokens)

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


def test_probe_is_ridge_regression_of_each_half(monkeypatch):
    """The regression solved anew, by least squares.

    The images have one colour each; its level decides the class, and the visual codes alone.
    """
    n = 300  # to fit on; 100 to test
    torch.manual_seed(0)
    model = GloTok(TINY).eval()
    level = torch.rand(400)
    images = (255 * level)[:, None, None, None].expand(-1, 3, 16, 16).byte()
    labels = (level > 0.5).long()
    tokens = torch.randint(len(model.codebook_sem), (400, 2, 8, 8))
    tokens[:, 1] = (level * len(model.codebook_vis)).long()[:, None, None]

    def encode_all(model, images, index, device):
        return tokens.int()

    monkeypatch.setattr(sample, "encode_all", encode_all)
    found = sample.probe(model, images, labels, n, torch.device("cpu"))

    y = np.concatenate([np.eye(2)[labels], images[:, :, 0, 0].numpy()], axis=1)
    y_mean = y[:n].mean(0)
    codebooks = {"semantic": model.codebook_sem, "visual": model.codebook_vis}
    for half, (name, codebook) in enumerate(codebooks.items()):
        x = codebook.detach()[tokens[:, half]].reshape(400, -1).double().numpy()
        x = (x - x[:n].mean(0)) / x[:n].std(0, ddof=1)
        # ||x w - y||^2 + 0.3 n ||w||^2, as further rows of one least-squares problem
        d = x.shape[1]
        rows = np.concatenate([x[:n], np.sqrt(0.3 * n) * np.eye(d)])
        targets = np.concatenate([y[:n] - y_mean, np.zeros((d, 5))])
        weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
        guess = x[n:] @ weight + y_mean
        accuracy = (guess[:, :2].argmax(1) == labels[n:].numpy()).mean()
        error = ((guess - y[n:])[:, 2:] ** 2).sum()
        variance = ((y_mean - y[n:])[:, 2:] ** 2).sum()
        assert found[name] == pytest.approx((accuracy, 1 - error / variance), abs=2e-3)

    # The half that decides is the better one.
    assert found["visual"][0] > found["semantic"][0] + 0.2
    assert found["visual"][1] > found["semantic"][1] + 0.2


# ---- the README and assets/evidence.md: links, flags of the commands, the README's code; --help

README = (REPOSITORY / "README.md").read_text()
EVIDENCE = (REPOSITORY / "assets" / "evidence.md").read_text()
PLACEHOLDERS = {"FOLDER": "shapes", "N": "64", "S": "32"}


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


@pytest.fixture(scope="module")
def printed_evidence(tmp_path_factory):
    """What the evidence page's block prints, and the folder where it draws."""
    [code] = re.findall(r"^```python\n(import csv.*?)```", EVIDENCE, re.M | re.S)
    folder = tmp_path_factory.mktemp("evidence")
    shutil.copytree(REPOSITORY / "assets", folder / "assets")
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(compile(code, "evidence.md", "exec"), {})
    return out.getvalue(), folder


def evidence_values():
    """assets/evidence.csv -> {(row, measure): {seed: value}}."""
    values = {}
    for r in csv.DictReader((REPOSITORY / "assets" / "evidence.csv").read_text().splitlines()):
        values.setdefault((r["row"], r["measure"]), {})[r["seed"]] = float(r["value"])
    return values


def test_means_on_the_evidence_page_are_those_of_its_csv(printed_evidence):
    """Each "mean ± spread" is one row's, or a difference, by seed, that the page's block prints."""
    values = evidence_values()
    of_rows = []
    for runs in values.values():
        x = list(runs.values())
        if len(x) > 1:
            of_rows.append((np.mean(x), np.std(x, ddof=1)))
    differences = []
    text, _ = printed_evidence
    for row, other, measure in re.findall(r"^(.+) - (.+) \| (\S+) ", text, re.M):
        d = [value - values[other, measure][seed] for seed, value in values[row, measure].items()]
        differences.append((np.mean(d), np.std(d, ddof=1) / math.sqrt(len(d))))
    assert len(differences) > 90

    part = EVIDENCE[EVIDENCE.index("## Does L_hist") : EVIDENCE.index("## What each loss")]
    printed = re.findall(r"([+-]?\d+\.\d+) ±\s+(\d+\.\d+)", part)
    assert len(printed) > 50
    for mean, spread in set(printed):
        digits = len(spread.split(".")[1])
        if mean[0] in "+-":
            found = {(f"{m:+.{digits}f}", f"{s:.{digits}f}") for m, s in differences}
        else:  # a row's, or the size of a difference
            both = of_rows + [(abs(m), s) for m, s in differences]
            found = {(f"{m:.{digits}f}", f"{s:.{digits}f}") for m, s in both}
        assert (mean, spread) in found, f"{mean} ± {spread} is not in assets/evidence.csv"


@pytest.mark.parametrize(
    "section, generator", [("## Rivals, unif", ""), ("## Does L_hist improve gen", "xAR: ")]
)
def test_the_tables_of_rivals_are_the_csv_cell_by_cell(section, generator):
    """Each cell under a measure is its own row's, and each "against none" its own difference."""
    values = {key: list(of_seed.values()) for key, of_seed in evidence_values().items()}
    measures = {"PSNR, dB": "psnr", "tokenizer's PSNR, dB": "psnr", "KID": "kid"}
    measures |= {"class found": "accuracy", "semantic codes used": "usage_sem"}

    table = re.search(
        r"^\| semantic codes taught by .*?\n\n", EVIDENCE.split(section)[1], re.M | re.S
    )
    header, _, *lines = table[0].strip().splitlines()
    columns = [cell.strip() for cell in header.split("|")[2:-1]]
    checked = 0
    for line in lines:
        label, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        name = label.strip("()").removeprefix("a ")
        here = generator
        if name.endswith(", FAR"):
            name, here = name.removesuffix(", FAR"), "FAR: "
        if name in ("FQGAN, convnet", "VA-VAE, convnet"):
            name = name.removesuffix(", convnet")
        for column, cell in zip(columns, cells, strict=True):
            if column in measures:  # "against none" stands right of its measure
                measure = measures[column]
            if not cell:
                continue
            x = np.array(values[here + name, measure])
            spread, sign = x.std(ddof=1), ""
            if column == "against none":
                x = x - values[here + "none", measure]
                spread, sign = x.std(ddof=1) / math.sqrt(3), "+"
            digits = len(cell.split(".")[-1])
            expected = f"{x.mean():{sign}.{digits}f} ± {spread:.{digits}f}"
            assert cell == expected, f"{label}, {column}: {cell}, and the csv has {expected}"
            checked += 1
    assert checked > 30


def test_the_evidence_is_computed_by_the_block_that_is_printed(printed_evidence):
    """Its figures, and the plot; one difference by hand, from the csv."""
    text, folder = printed_evidence
    d = np.array([23.502, 23.3416, 23.4631]) - [23.4019, 23.3784, 23.4222]
    spread = d.std(ddof=1) / np.sqrt(3)
    line = f"L_hist, sphere - none | psnr {d.mean():+.4f} ± {spread:.4f}\n"
    assert line in text
    assert Image.open(folder / "dose.png").size == Image.open(folder / "assets/dose.png").size


PYTHON_BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)```", README, re.M | re.S)
]


def test_the_readme_has_python_blocks():
    assert len(PYTHON_BLOCKS) >= 3


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_readme_python_runs(code, finished, tmp_path, monkeypatch, capsys):
    """Each block alone, in a folder with a finished run; the FID network has random weights."""

    def random_network(file, device):
        return fid.InceptionV3().eval()

    monkeypatch.setattr(fid, "load_inception", random_network)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs/shapes")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()  # each ends by printing what it found


def readme_commands(script):
    """The pages' command lines of a script, in blocks and in the text, from its name on."""
    parts = f"{README}\n{EVIDENCE}".replace("\\\n", "").split("```")
    code = []
    for text in parts[0::2]:
        code += re.findall("`([^`]+)`", text)
    for block in parts[1::2]:
        code += block.splitlines()
    commands = set()
    for each in code:
        each = " ".join(each.split("#")[0].split())  # no comments, no line breaks
        match = re.search(rf"(?:python|torchrun --nproc_per_node=\d) ({script}\.py.*)", each)
        if match:
            commands.add(match[1])
    return sorted(commands)


def words_of(command):
    """A command of the pages -> its words after the script's name, all of them values.

    A loop's variable has the first of its values.
    """

    def value(variable):
        return re.search(rf"for {variable[1]} in ([^\s;]+)", README + EVIDENCE)[1]

    words = re.sub(r"\$([a-z]+)", value, command).split()[1:]
    return [PLACEHOLDERS.get(word, word) for word in words]


@pytest.mark.parametrize("script", ["train", "sample", "fid"])
def test_the_readme_has_commands_of_each_script(script):
    assert len(readme_commands(script)) > 1


@pytest.mark.parametrize("command", readme_commands("train"))
def test_readme_commands_of_train_are_understood(command, finished, tmp_path, monkeypatch):
    words = words_of(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    if "--help" in words:
        with pytest.raises(SystemExit):
            train.parse_arguments()
        return
    if "--resume" in words:
        out = words[words.index("--out") + 1] if "--out" in words else "runs/shapes"
        shutil.copytree(finished, out)
    _, config = train.parse_arguments()
    assert isinstance(config, Config)


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("command", readme_commands("sample"))
def test_readme_commands_of_sample_run(command, finished, run_command, tmp_path, monkeypatch):
    words = words_of(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "tsne", functools.partial(tsne, steps=50))
    for run in {word for word in words if word.startswith("runs/")}:
        shutil.copytree(finished, run)
    result = run_command(sample, *words)
    assert result.status == 0, result.err
    assert Path(words[words.index("--out") + 1]).exists()


@pytest.mark.parametrize("command", readme_commands("fid"))
def test_readme_commands_of_fid_are_understood(command, tmp_path, monkeypatch):
    """The words are; then the first data set is looked for, and is not there."""
    words = words_of(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fid.py", *words])

    def load_data(spec, size):
        raise BadInput(f"no data at {spec!r}")

    monkeypatch.setattr(fid, "load_data", load_data)
    with pytest.raises(BadInput, match=f"no data at '{re.escape(words[0])}'"):
        fid.main()


def test_help_lists_every_setting(run_command):
    result = run_command(train, "--help")
    assert result.status == 0
    for name in SETTINGS:
        assert f"--{name} " in result.out
