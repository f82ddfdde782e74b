"""Tests of GloTok: every equation against an independent computation, every command against bad input.

    python -m pytest -q
"""
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import glotok
import sample
import train
from glotok import (ALPHA, FAR, LPIPS, PRESETS, XAR, BadInput, Config, DINOv2, GloTok, Quantizer, adaptive_weight, cosine_moments, discriminator,
                    hinge_loss, histogram_relation_loss, kmeans, relation_histogram, relation_histogram_direct, sphere_histogram,
                    straight_through, tsne, uniformity)

TINY = Config(patch=1, channels=8, channel_mult=(1, 2), z_channels=16, width=16, heads=2, codes_sem=16, codes_vis=24, image_size=16, data="shapes",
              teacher="sphere", tokenizer_steps=20, batch_size=8, eval_images=20, save_every=5, revive_every=5, cell=4, gen_width=16, gen_layers=1, gen_heads=2, generator_steps=20, gen_batch=8,
              sampling_steps=3)
FLAGS = [word for k in ("patch", "channels", "channel_mult", "z_channels", "width", "heads", "codes_sem", "codes_vis", "image_size", "teacher",
                        "tokenizer_steps", "batch_size", "eval_images", "save_every", "revive_every", "cell", "gen_width", "gen_layers", "gen_heads",
                        "generator_steps", "gen_batch", "sampling_steps")
         for word in [f"--{k}", *str(getattr(TINY, k)).strip("()").split(", ")]]

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def script(monkeypatch, capsys, module, *argv):
    """`python MODULE.py ARGV` in this process -> its exit status, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        glotok.run(module.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    return status, said.out.strip(), said.err.strip()

def random_images(n=2, size=16):
    return torch.rand(n, 3, size, size) * 2 - 1

# ---------------------------------------------------------------------------------------------------------- quantizer (1)

def test_look_up_finds_the_nearest_code_in_distance_and_in_any_chunk():
    q = Quantizer(50, 8, 0.25)
    z = F.normalize(torch.randn(3, 7, 8), dim=-1)
    expected = ((z[..., None, :] - q.codebook) ** 2).sum(-1).argmin(-1)
    assert torch.equal(q.look_up(z), expected)
    assert torch.equal(q.look_up(z, chunk=1), expected)

@pytest.mark.parametrize("beta", [0.25, 0.0, 1.0])
def test_equation_1_sends_each_term_to_its_own_side(beta):
    q = Quantizer(5, 4, beta)
    f = torch.randn(2, 3, 4, requires_grad=True)
    z, codes, index, loss = q(f)
    loss.backward()
    # by hand, in float64 NumPy: unit vectors, mean over all elements
    c, x = q.weight.detach().double().numpy(), f.detach().double().numpy()
    unit_c, unit_z = c / np.linalg.norm(c, axis=1, keepdims=True), x / np.linalg.norm(x, axis=-1, keepdims=True)
    i = index.numpy()
    gap = unit_z - unit_c[i]
    assert loss.item() == pytest.approx((1 + beta) * (gap**2).mean(), rel=1e-5)
    tangent = lambda g, unit, raw: (g - (g * unit).sum(-1, keepdims=True) * unit) / np.linalg.norm(raw, axis=-1, keepdims=True)
    expected_c = np.zeros_like(c)
    np.add.at(expected_c, i, -2 * gap / gap.size)
    np.testing.assert_allclose(q.weight.grad.numpy(), tangent(expected_c, unit_c, c), atol=1e-6)  # beta is not in it
    np.testing.assert_allclose(f.grad.numpy(), tangent(beta * 2 * gap / gap.size, unit_z, x), atol=1e-6)  # beta alone

def test_straight_through_is_exact_in_value_and_the_identity_in_gradient():
    z, codes = torch.randn(100, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    out, up = straight_through(z, codes), torch.randn(100, 8)
    assert torch.equal(out, codes)
    out.backward(up)
    assert torch.equal(z.grad, up) and codes.grad is None

def test_revival_moves_only_unused_codes_onto_features():
    q = Quantizer(6, 4, 0.25)
    with torch.no_grad():
        q.weight.copy_(F.normalize(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0], [0, 0, 0, -1], [-1, 0, 0, 0], [0, -1, 0, 0]]), dim=1))
    before = q.weight.clone()
    features = torch.tensor([[[1.0, 0.1, 0, 0], [0.1, 1.0, 0, 0]]]).expand(4, 2, 4)
    q(features)
    assert q.hits.tolist() == [4, 4, 0, 0, 0, 0]
    q.revive()
    assert torch.equal(q.weight[:2], before[:2])
    candidates = F.normalize(features[0], dim=1)
    assert all((candidates - w).abs().sum(1).min() < 1e-6 for w in q.weight[2:].detach())
    assert q.hits.sum() == 0
    q.eval()(features)
    assert q.hits.sum() == 0  # looking does not count

# ----------------------------------------------------------------------------------- histogram relation loss (4)-(7)

def histogram_by_loops(codes, bins, alpha):
    """Eqs. (4)-(6) in plain Python and float64."""
    p, c = np.zeros(bins), np.asarray(codes, np.float64)
    for i in range(len(c)):
        for j in range(i, len(c)):
            d = c[i] @ c[j] / np.sqrt((c[i] @ c[i]) * (c[j] @ c[j]))
            for k in range(bins):
                p[k] += math.exp(-alpha * (d - (-1 + 2 * k / (bins - 1))) ** 2)
    return p / p.sum()

@pytest.mark.parametrize("bins, alpha", [(40, ALPHA), (12, 30.0)])
def test_histograms_follow_equations_4_to_6(bins, alpha):
    codes = torch.randn(17, 5) + 0.3
    expected = histogram_by_loops(codes, bins, alpha)
    np.testing.assert_allclose(relation_histogram_direct(codes.double(), bins, alpha), expected, atol=1e-12)
    np.testing.assert_allclose(relation_histogram(codes, bins, alpha), expected, atol=1e-4 * expected.max())

def test_equation_7_is_kl_of_teacher_from_student():
    codes, other = torch.randn(15, 4), torch.randn(9, 4) + 1
    teacher = histogram_by_loops(other, 40, ALPHA)
    student = np.maximum(histogram_by_loops(codes, 40, ALPHA), 1e-10)
    floor = np.maximum(teacher, 1e-10)
    forward, backward = (floor * np.log(floor / student)).sum(), (student * np.log(student / floor)).sum()
    assert abs(forward - backward) > 0.1  # the example tells the directions apart
    t = torch.tensor(teacher, dtype=torch.float32, requires_grad=True)
    loss = histogram_relation_loss(codes.requires_grad_(), t)
    assert loss.item() == pytest.approx(forward, rel=1e-3)
    loss.backward()
    assert t.grad is None and codes.grad.abs().sum() > 0  # sg[P_t]

def test_direct_histogram_has_the_right_gradient():
    codes, weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(40, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: relation_histogram_direct(c) @ weight, codes)

@pytest.mark.parametrize("tile", [2**20, 1000])  # one band of rows, and many of uneven height
@pytest.mark.parametrize("n, d, shift", [(2, 8, 0), (10, 3, 0.5), (300, 8, 0), (700, 8, 1.0)])
def test_fast_histogram_equals_the_direct_one(n, d, shift, tile, monkeypatch):
    monkeypatch.setattr(glotok, "TILE", tile)
    codes = torch.randn(n, d) + shift
    fast, direct = codes.clone().requires_grad_(), codes.double().requires_grad_()
    teacher = relation_histogram_direct(torch.rand(50, 16).double())
    p = relation_histogram_direct(direct)
    assert (relation_histogram(fast) - p).abs().max() < 1e-4 * p.max()
    histogram_relation_loss(fast, teacher.float()).backward()
    (teacher.clamp_min(1e-10) * (teacher.clamp_min(1e-10) / p.clamp_min(1e-10)).log()).sum().backward()
    assert (fast.grad - direct.grad).norm() < 1e-3 * direct.grad.norm()

def test_fast_histogram_of_many_tiles_and_of_equal_codes():
    codes = torch.randn(3000, 8)  # 3000 rows do not divide into whole tiles
    d = F.normalize(codes.double(), dim=1) @ F.normalize(codes.double(), dim=1).T
    p = torch.stack([torch.exp(-ALPHA * (d - b) ** 2).sum() + len(d) * math.exp(-ALPHA * (1 - b) ** 2) for b in torch.linspace(-1, 1, 40).tolist()])
    assert (relation_histogram(codes) - p / p.sum()).abs().max() < 1e-4 * (p / p.sum()).max()
    equal = relation_histogram(torch.ones(10, 4))
    np.testing.assert_allclose(equal, histogram_by_loops(np.ones((1, 4)), 40, ALPHA), atol=1e-5)

def test_fast_histogram_passes_nan_on():
    codes = torch.randn(5, 3)
    codes[2, 1] = math.nan
    assert relation_histogram(codes).isnan().all()

def test_fast_histogram_ignores_autocast():
    codes = torch.randn(200, 8, requires_grad=True)
    teacher = sphere_histogram(8)
    plain = torch.autograd.grad(histogram_relation_loss(codes, teacher), codes)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.autograd.grad(histogram_relation_loss(codes, teacher), codes)[0]
    assert torch.equal(plain, mixed)

def test_fast_histogram_is_much_faster():
    codes, teacher = torch.randn(2048, 8), sphere_histogram(8)

    def seconds(histogram, times):
        best = math.inf
        for _ in range(times):
            c, start = codes.clone().requires_grad_(), time.perf_counter()
            F.kl_div(histogram(c).clamp_min(1e-10).log(), teacher, reduction="sum").backward()
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(relation_histogram_direct, 1) > 25 * seconds(relation_histogram, 3)  # 100 and more at 4,096 on a quiet machine

def test_fast_histogram_is_small():
    """Peak memory at n = 16,384, in a process of its own: eq. (6) as printed would take 21 GB."""
    code = """if True:
        import resource, torch, glotok
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        loss = lambda n: glotok.histogram_relation_loss(torch.randn(n, 8, requires_grad=True), glotok.sphere_histogram(8)).backward()
        loss(64)
        before = peak()
        loss(16384)
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(glotok.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200

def test_smoothing_gives_every_similarity_the_same_weight():
    """The Poisson-summation argument for alpha = 1 / w^2."""
    x = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)
    total = torch.exp(-ALPHA * (x[:, None] - torch.linspace(-1, 1, 40, dtype=torch.float64)) ** 2).sum(1)
    assert total.mean().item() == pytest.approx(math.sqrt(math.pi), rel=1e-4)
    ripple = (total.max() - total.min()) / 2 / total.mean()
    assert ripple.item() == pytest.approx(2 * math.exp(-math.pi**2), rel=0.02)

@pytest.mark.parametrize("dim", [2, 3, 8])
def test_sphere_histogram_is_that_of_a_million_random_vectors(dim):
    x = F.normalize(torch.randn(2, 1_000_000, dim), dim=2)
    cosines = (x[0] * x[1]).sum(1)
    p = torch.stack([torch.exp(-ALPHA * (cosines - b) ** 2).sum() for b in torch.linspace(-1, 1, 40)])
    assert (sphere_histogram(dim) - p / p.sum()).abs().max() < 1e-3

def test_cosine_moments_are_those_of_all_pairs_and_respect_the_welch_bound():
    v = torch.randn(60, 8) + 0.4
    d = F.normalize(v, dim=1) @ F.normalize(v, dim=1).T
    mean, square = cosine_moments(v)
    assert mean == pytest.approx(d.mean().item(), abs=1e-5) and square == pytest.approx((d**2).mean().item(), abs=1e-5)
    assert square >= 1 / 8
    assert cosine_moments(torch.eye(8))[1] == pytest.approx(1 / 8)  # reached by an orthonormal basis

def test_loss_alone_pulls_a_random_codebook_to_a_teacher_it_can_reach():
    teacher = relation_histogram(torch.randn(256, 8) + torch.tensor([1.5] + [0.0] * 7))
    codes = torch.randn(256, 8, requires_grad=True)
    optimizer, first = torch.optim.Adam([codes], 0.02), histogram_relation_loss(codes, teacher).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss = histogram_relation_loss(codes, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first

def test_loss_moves_the_semantic_codebook_alone():
    model = GloTok(TINY)
    histogram_relation_loss(model.codebook_sem, sphere_histogram(8)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["quantizer_sem.weight"]

# -------------------------------------------------------------------------------------- residual module and tokenizer (8)-(13)

def random_residuals(model):
    """Residual modules start at zero; give them something to say."""
    for module in (model.residual_sem, model.residual_vis):
        torch.nn.init.normal_(module.out.weight, 0, 0.3)
    return model

def test_equation_10_value_and_stop_gradients():
    model = random_residuals(GloTok(TINY)).eval()
    x = random_images()
    _, losses = model(x)
    expected = 0
    for f, q, r in zip(model.features(x), (model.quantizer_sem, model.quantizer_vis), (model.residual_sem, model.residual_vis)):
        z = f / f.norm(dim=-1, keepdim=True)
        codes = q.codebook[q.look_up(z)]
        expected += ((z - codes - r(codes)) ** 2).mean()
    assert losses["residual"].item() == pytest.approx(expected.item(), rel=1e-4)
    losses["residual"].backward()
    touched = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"quantizer_sem", "quantizer_vis", "residual_sem", "residual_vis"}  # sg[Z]: neither encoder nor adapters

def test_equation_10_pulls_the_codes_towards_the_features():
    model = GloTok(TINY)  # residuals are zero here, so (10) is the first term of (1) and has its gradient
    _, losses = model(random_images())
    residual = torch.autograd.grad(losses["residual"], model.quantizer_sem.weight, retain_graph=True)[0]
    quantize = torch.autograd.grad(losses["quantize"], model.quantizer_sem.weight)[0]
    torch.testing.assert_close(residual, quantize)

def test_decoder_gradient_reaches_the_encoder_and_the_residual_modules():
    model = random_residuals(GloTok(TINY))
    recon, _ = model(random_images())
    recon.square().sum().backward()
    for name in ("encoder.1.weight", "adapter_sem.weight", "adapter_vis.weight", "residual_sem.out.weight", "residual_vis.blocks.0.qkv.weight"):
        assert dict(model.named_parameters())[name].grad.abs().sum() > 0, name

@pytest.mark.parametrize("lambda_res", [0.5, 0.0])
def test_encode_then_decode_is_what_forward_does(lambda_res):
    model = GloTok(replace(TINY, lambda_res=lambda_res)).eval()
    if lambda_res:
        random_residuals(model)
    x = random_images()
    sem, vis = model.encode(x)
    assert sem.shape == vis.shape == (2, 8, 8) and sem.dtype == vis.dtype == torch.int64
    assert sem.max() < 16 and vis.max() < 24
    assert torch.equal(model.decode(sem, vis), model(x)[0])

def test_semantic_and_visual_halves_take_their_own_channels():
    model = GloTok(TINY).eval()
    sem, vis = torch.randn(1, 64, 8), torch.randn(1, 64, 8)
    z = torch.cat([sem.transpose(1, 2).reshape(1, 8, 8, 8), vis.transpose(1, 2).reshape(1, 8, 8, 8)], 1)
    torch.testing.assert_close(model.decode_latents(sem, vis), model.decoder(z))

def test_codebooks_lie_on_the_unit_sphere():
    model = GloTok(TINY)
    for codes, n in ((model.codebook_sem, 16), (model.codebook_vis, 24)):
        assert codes.shape == (n, 8)
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(n))

def test_adapters_of_the_papers_presets_are_transformers():
    model = GloTok(replace(TINY, adapter_layers=2))
    assert len(model.adapter_sem.blocks) == 2
    assert model(random_images())[0].shape == (2, 3, 16, 16)

def test_down_sampling_pads_right_and_bottom():
    down = glotok.downsample(1)
    with torch.no_grad():
        down[1].weight.zero_(), down[1].bias.zero_()
        down[1].weight[0, 0, 0, 0] = 1  # picks the top left of each window
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])

def test_paper_presets_have_the_papers_sizes():
    c = PRESETS["imagenet256"]
    with torch.device("meta"):
        model = GloTok(c)
        z = model.encoder(torch.empty(1, 3, 256, 256))
    assert z.shape == (1, 256, 16, 16) and model.codebook_sem.shape == (4096, 8) and model.codebook_vis.shape == (12288, 8)
    assert [m.body[2].in_channels for m in model.encoder if isinstance(m, glotok.ResBlock)] == [128, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512]
    assert len(model.adapter_sem.blocks) == 6 and len(model.residual_sem.blocks) == 1
    assert (c.bins, c.lambda_hist, c.lambda_res, c.lr, c.beta1, c.beta2, c.batch_size) == (40, 0.01, 0.5, 2e-4, 0.9, 0.95, 240)
    assert PRESETS["imagenet256-2x"].codes_sem == PRESETS["imagenet256-2x"].codes_vis == 16384

def test_hinge_loss():
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])).item() == pytest.approx(0.5 * (0.25 + 0.5))

def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert adaptive_weight((3 * w).sum(), (w * torch.tensor([0.0, 0.5])).sum(), w).item() == pytest.approx(3 * math.sqrt(2) / 0.5, rel=1e-3)

def test_discriminator_judges_patches():
    net = discriminator(PRESETS["imagenet256"])
    assert net(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in net) == 3

# --------------------------------------------------------------------------------------------------- the generator (xAR)

SMALL = replace(TINY, image_size=16, cell=4, gen_width=32, gen_layers=2, gen_heads=2, classes=3)  # 8x8 tokens, 4 cells of 4x4

def awake(generator):
    """Layers that start at zero would hide everything: give them weights."""
    for p in generator.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, 0, 0.1)
    return generator.eval()

def test_cells_run_row_by_row_and_back():
    x = XAR(SMALL)
    grid = torch.arange(64.0).view(1, 1, 8, 8)
    cells = x.cells(grid)
    assert cells[0, 1, :, 0].tolist() == [8 * r + c for r in range(4) for c in range(4, 8)]  # the second cell is top right
    assert cells[0, 2, 5, 0] == 8 * 5 + 1
    z = torch.randn(2, 16, 8, 8)
    assert torch.equal(x.grid(x.cells(z)), z)

def test_rotary_positions_see_differences_in_both_directions():
    x = XAR(SMALL)
    at = lambda row, column: (row // 4 * 2 + column // 4) * 16 + row % 4 * 4 + column % 4  # token of a place in the grid
    q, k = torch.randn(2, 1, 1, 1, 16)
    score = lambda a, b: (glotok.rotate(q, x.angles[a:a + 1]) * glotok.rotate(k, x.angles[b:b + 1])).sum().item()
    assert score(at(1, 2), at(3, 7)) == pytest.approx(score(at(4, 0), at(6, 5)), abs=1e-4)  # the same (+2, +5)
    assert abs(score(at(1, 2), at(3, 7)) - score(at(1, 2), at(3, 6))) > 1e-3 < abs(score(at(1, 2), at(3, 7)) - score(at(1, 2), at(4, 7)))

def test_a_cell_sees_itself_and_earlier_cells_only():
    x, z, t, labels = awake(XAR(SMALL)), torch.randn(1, 4, 16, 16), torch.rand(1, 4), torch.tensor([1])
    before = x.velocity(z, t, labels)
    for cell in range(4):
        for what in ("latents", "time"):
            z2, t2 = z.clone(), t.clone()
            if what == "latents":
                z2[:, cell] += 1
            else:
                t2[:, cell] = 1 - t2[:, cell]
            changed = (x.velocity(z2, t2, labels) - before).abs().amax((0, 2, 3)) > 1e-5
            assert changed.tolist() == [k >= cell for k in range(4)], (cell, what)

def test_cached_sampling_equals_uncached():
    x, labels = awake(XAR(replace(SMALL, stochastic=1))), torch.tensor([0, 2])
    torch.manual_seed(3)
    a = x.sample(labels, steps=4, guidance=2.0)
    clean, velocity = [], x.velocity

    def from_scratch(z, t, labels, first, caches, keep=False):  # all cells anew in each call: the clean ones at t = 0, then this one
        whole = velocity(torch.cat([*clean, z], dim=1), torch.cat([t.new_zeros(len(t), first), t], dim=1), labels)
        clean.extend([z] if keep else [])
        return whole[:, -1:]

    x.velocity = from_scratch
    torch.manual_seed(3)
    b = x.sample(labels, steps=4, guidance=2.0)
    assert a.shape == (2, 16, 8, 8) and a.std() > 0.1
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

def test_sampling_is_deterministic_and_leaves_the_module_alone():
    x, labels = awake(XAR(SMALL)), torch.tensor([0, 2])
    state, attributes = {k: v.clone() for k, v in x.state_dict().items()}, set(vars(x))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(x.sample(labels, steps=3, guidance=1.5))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert all(torch.equal(v, x.state_dict()[k]) for k, v in state.items()) and set(vars(x)) == attributes

def test_guidance_1_is_conditional_and_grows_over_the_cells():
    x, labels = awake(XAR(SMALL)), torch.tensor([1])

    def sample(guidance):
        torch.manual_seed(0)
        return x.cells(x.sample(labels, steps=3, guidance=guidance))

    # by hand: the first cell with the label alone
    torch.manual_seed(0)
    z = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        for t, after in ((1.0, 0.52), (0.52, 0.04), (0.04, 0.0)):
            z = z + x.velocity(z, torch.full((1, 1), t), labels, caches=[[], []]) * (after - t)
    torch.testing.assert_close(sample(1.0)[:, :1], z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sample(3.0)[:, :1], z, atol=1e-5, rtol=1e-4)  # 1 at the first cell whatever the guidance
    assert (sample(3.0)[:, 1] - sample(1.0)[:, 1]).abs().max() > 1e-3

def test_flow_loss_is_the_error_of_the_velocity():
    x, latents = XAR(SMALL), torch.randn(4, 16, 8, 8)  # its first answer is 0 everywhere
    torch.manual_seed(5)
    loss = x.loss(latents, torch.tensor([0, 1, 2, 0]))
    torch.manual_seed(5)
    torch.randn(4, 4)  # the times
    noise = torch.randn(4, 4, 16, 16)
    assert loss.item() == pytest.approx(((noise - x.cells(latents)) ** 2).mean().item(), rel=1e-5)

@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_dropout_hides_a_share_of_the_labels(share):
    x, seen, labels = XAR(replace(SMALL, label_dropout=share)), [], torch.arange(3).repeat(500)
    x.velocity = lambda z, t, y: seen.append(y) or torch.zeros_like(z)
    x.loss(torch.randn(1500, 16, 8, 8), labels)
    hidden = seen[0] == 3  # "no label"
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.05) and torch.equal(seen[0][~hidden], labels[~hidden])

class GaussianVelocity(XAR):
    """The optimal velocity for data N(m, s^2): E[eps - z_0 | z_t] in closed form."""

    m, s = 0.7, 0.5

    def velocity(self, z, t, labels, first=0, caches=None, keep=False):
        t = t[:, :, None, None]
        variance = (1 - t) ** 2 * self.s**2 + t**2
        gap = z - (1 - t) * self.m
        return t / variance * gap - (self.m + (1 - t) * self.s**2 / variance * gap)

@pytest.mark.parametrize("stochastic", [1, 0])
def test_both_samplers_carry_noise_to_a_known_gaussian(stochastic):
    latents = GaussianVelocity(replace(SMALL, stochastic=stochastic)).sample(torch.zeros(64, dtype=torch.int64), steps=200)
    assert latents.mean().item() == pytest.approx(0.7, abs=0.02) and latents.std().item() == pytest.approx(0.5, abs=0.02)

def test_training_finds_the_velocity_of_a_known_gaussian():
    x = XAR(SMALL)
    optimizer = torch.optim.Adam(x.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        x.loss(0.7 + 0.5 * torch.randn(16, 16, 8, 8), torch.zeros(16, dtype=torch.int64)).backward()
        optimizer.step()
    z, t = 0.35 + 0.3125**0.5 * torch.randn(16, 4, 16, 16), torch.full((16, 4), 0.5)  # as z_t lies at t = 1/2
    labels = torch.zeros(16, dtype=torch.int64)
    best = GaussianVelocity(SMALL).velocity(z, t, labels)
    with torch.no_grad():
        assert ((x.velocity(z, t, labels) - best) ** 2).mean() < 0.05 * best.var()

# ------------------------------------------------------------------------------------------- the rivals: FAR, local supervision

def far_and_tokens(B=3):
    far = FAR(replace(TINY, gen_layers=2))
    tokens = torch.stack([torch.randint(n, (B, 64)) for n in (TINY.codes_sem, TINY.codes_vis)], dim=2)  # (B, T, 2)
    return far, tokens, torch.randint(TINY.classes, (B,))

@torch.no_grad()
def test_far_sees_earlier_positions_only():
    far, tokens, labels = far_and_tokens()
    before = far.context(labels, tokens[:, :-1])
    assert before.shape == (3, 64, 16)
    for kind, size in enumerate((TINY.codes_sem, TINY.codes_vis)):
        other = tokens.clone()
        other[:, 20, kind] = (other[:, 20, kind] + 1) % size
        changed = (far.context(labels, other[:, :-1]) - before).abs().amax((0, 2)) > 1e-6
        assert not changed[:21].any() and changed[21:].all()  # position 21 is the first that sees token 20
    assert (far.context((labels + 1) % TINY.classes, tokens[:, :-1]) - before).abs().amax((0, 2)).min() > 1e-6  # the class counts everywhere

@torch.no_grad()
def test_fars_head_predicts_the_semantic_index_first():
    far, _, _ = far_and_tokens()
    context, sem = torch.randn(5, 16), torch.arange(5)
    (alone,), (one, vis), (two, other) = far.logits(context), far.logits(context, sem), far.logits(context, sem + 1)
    assert torch.allclose(alone, one, atol=1e-6) and torch.allclose(one, two, atol=1e-6) and alone.shape == (5, TINY.codes_sem)
    assert vis.shape == (5, TINY.codes_vis) and (vis - other).abs().amax(1).min() > 1e-4

@torch.no_grad()
def test_far_with_a_cache_equals_far_without():
    far, tokens, labels = far_and_tokens()
    caches = [[] for _ in far.blocks]
    steps = [far.context(labels, tokens[:, :k], k, caches) for k in range(64)]
    assert torch.allclose(torch.cat(steps, dim=1), far.context(labels, tokens[:, :63]), atol=1e-5)

@torch.no_grad()
def test_fars_loss_is_the_mean_negative_log_likelihood():
    far, tokens, labels = far_and_tokens()
    far.config = replace(far.config, label_dropout=0.0)
    total = 0
    for b in range(3):
        for k in (0, 5, 63):
            h = far.context(labels[b:b + 1], tokens[b:b + 1, :k])[:, -1]
            sem, vis = far.logits(h, tokens[b:b + 1, k, 0])
            total -= sem.log_softmax(1)[0, tokens[b, k, 0]] + vis.log_softmax(1)[0, tokens[b, k, 1]]
    only = torch.zeros(3, 64, dtype=torch.bool)
    only[:, [0, 5, 63]] = True
    picked, real = [], F.cross_entropy
    def cross_entropy(logits, index):
        picked.append(-logits.log_softmax(1).gather(1, index[:, None])[:, 0].view(3, 64)[only].sum())
        return real(logits, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", cross_entropy)
        loss = far.loss(tokens.transpose(1, 2).unflatten(2, (8, 8)), labels)
    assert sum(picked).item() == pytest.approx(total.item(), rel=1e-5)
    h = far.context(labels, tokens[:, :-1]).flatten(0, 1)
    nll = [-x.log_softmax(1).gather(1, tokens.flatten(0, 1)[:, k, None]).mean() for k, x in enumerate(far.logits(h, tokens.flatten(0, 1)[:, 0]))]
    assert loss.item() == pytest.approx(sum(nll).item() / 2, rel=1e-5)

def test_far_learns_what_depends_on_the_class_and_samples_it():
    c = replace(TINY, generator="far", image_size=8, cell=2, gen_width=32, label_dropout=0.2)  # 4x4 positions
    far = FAR(c)
    pattern = torch.stack([torch.randint(c.codes_sem, (2, 4, 4)), torch.randint(c.codes_vis, (2, 4, 4))], dim=1)  # one for each of two classes
    optimizer = torch.optim.Adam(far.parameters(), 3e-3)
    for _ in range(150):
        labels = torch.randint(2, (16,))
        loss = far.loss(pattern[labels], labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    far.config = replace(c, top_k=1)
    assert torch.equal(far.sample(torch.tensor([0, 1, 1]), guidance=3.0), pattern[[0, 1, 1]])
    far.config = c
    torch.manual_seed(5)
    one = far.sample(torch.tensor([0, 1]), guidance=1.0)
    torch.manual_seed(5)
    assert torch.equal(one, far.sample(torch.tensor([0, 1]), guidance=1.0)) and one.dtype == torch.int64 and one.shape == (2, 2, 4, 4)

@torch.no_grad()
def test_fars_guidance_moves_away_from_the_answer_without_label(monkeypatch):
    far, _, labels = far_and_tokens()
    seen, real = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n: seen.append(p) or real(p, n))
    far.sample(labels, guidance=2.5)
    with_label, without = (far.logits(far.context(y, torch.zeros(3, 0, 2, dtype=torch.int64))[:, 0])[0] for y in (labels, torch.full_like(labels, TINY.classes)))
    expected = (without + 2.5 * (with_label - without)).softmax(1).sort(descending=True).values
    assert len(seen) == 128 and torch.allclose(seen[0], expected, atol=1e-6)
    seen.clear()
    far.config = replace(far.config, top_k=3)
    far.sample(labels, guidance=2.5)
    assert all(p.shape == (3, 3) for p in seen) and torch.allclose(seen[0], expected[:, :3] / expected[:, :3].sum(1, keepdim=True), atol=1e-6)

def test_local_supervision_is_one_minus_the_cosine_and_moves_the_encoder():
    model = GloTok(replace(TINY, semantic="local", teacher="convnet"))
    x, target = random_images(), torch.randn(2, 64, 16, 16)  # finer than the grid of 8: averaged over 2x2
    losses = model(x, target)[1]
    with torch.no_grad():
        z = F.embedding(model.encode(x)[0].flatten(1), model.codebook_sem)
        a, b = model.head(z).numpy(), target.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5)).flatten(2).transpose(1, 2).numpy()
    expected = 1 - np.mean([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(p, q)] for p, q in zip(a, b)])
    assert losses["local"].item() == pytest.approx(expected, abs=1e-5)
    losses["local"].backward()
    moved = lambda m: any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())
    assert moved(model.encoder) and moved(model.adapter_sem) and moved(model.head)  # straight through the quantizer
    assert not moved(model.adapter_vis) and not moved(model.quantizer_vis) and not moved(model.decoder)
    assert "local" not in GloTok(TINY)(x)[1]

@pytest.mark.parametrize("after, snap", [(0, 0), (1, 0), (0, 1)])
def test_true_latents_decode_to_the_reconstruction(after, snap):
    model = random_residuals(GloTok(replace(TINY, latent_residual=after, snap=snap))).eval()
    sem, vis = model.encode(random_images())
    latents = model.to_latents(sem, vis)
    assert latents.shape == (2, 16, 8, 8)
    torch.testing.assert_close(model.from_latents(latents), model.decode(sem, vis), atol=1e-5, rtol=1e-4)
    if snap:
        torch.testing.assert_close(model.from_latents(1.1 * latents), model.decode(sem, vis), atol=1e-5, rtol=1e-4)

# ------------------------------------------------------------------------------------------------------ borrowed networks

def test_lpips_names_shapes_and_formula():
    net = LPIPS()
    names = set(net.state_dict())
    assert {"features.0.weight", "features.28.bias", "lin0.model.1.weight", "lin4.model.1.weight"} <= names and len(names) == 26 + 5
    assert net.state_dict()["lin3.model.1.weight"].shape == (1, 512, 1, 1)
    x, y = random_images(3, 32), random_images(3, 32)
    expected, head = torch.zeros(3), 0
    a, b = ((v - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1) for v in (x, y))
    for i in range(30):
        a, b = net.features[i](a), net.features[i](b)
        if i in (3, 8, 15, 22, 29):
            weight = net.state_dict()[f"lin{head}.model.1.weight"].view(1, -1, 1, 1)
            difference = a / (a.norm(dim=1, keepdim=True) + 1e-10) - b / (b.norm(dim=1, keepdim=True) + 1e-10)
            expected += (weight * difference**2).sum(1).mean((1, 2))
            head += 1
    torch.testing.assert_close(net(x, y), expected, atol=1e-5, rtol=1e-3)
    assert net(x, x).abs().max() == 0 and net.training is False

def test_dinov2_names_and_shapes():
    net = DINOv2()
    state = net.state_dict()
    shapes = {"cls_token": (1, 1, 384), "mask_token": (1, 384), "pos_embed": (1, 1370, 384), "patch_embed.proj.weight": (384, 3, 14, 14),
              "blocks.0.norm1.weight": (384,), "blocks.11.attn.qkv.weight": (1152, 384), "blocks.3.attn.proj.bias": (384,),
              "blocks.5.ls1.gamma": (384,), "blocks.5.ls2.gamma": (384,), "blocks.7.mlp.fc1.weight": (1536, 384),
              "blocks.7.mlp.fc2.bias": (384,), "norm.bias": (384,)}
    assert all(tuple(state[k].shape) == v for k, v in shapes.items()) and len(state) == 4 + 12 * 14 + 2 + 1
    with torch.no_grad():
        assert net(torch.rand(2, 3, 28, 42)).shape == (2, 6, 384)
        # a permutation of far-away patches moves their tokens only through attention: with zero scales nothing mixes
        for b in net.blocks:
            b["ls1"]["gamma"].zero_(), b["ls2"]["gamma"].zero_()
        x = torch.rand(1, 3, 518, 518)
        mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        patch = ((x[0] - mean) / std)[:, 14:28, 28:42].flatten()  # row 1, column 2
        token = state["patch_embed.proj.weight"].flatten(1) @ patch + state["patch_embed.proj.bias"] + state["pos_embed"][0, 1 + 37 + 2]
        torch.testing.assert_close(net(x)[0, 37 + 2], net.norm(token), atol=1e-4, rtol=1e-4)

def test_kmeans_finds_separated_blobs():
    middles = 20 * torch.randn(12, 5)
    x = (middles[:, None] + 0.1 * torch.randn(12, 40, 5)).flatten(0, 1)[torch.randperm(480)]
    centres = kmeans(x, 12)
    assert centres.shape == (12, 5)
    nearest = torch.cdist(middles, centres).min(1)
    assert nearest.values.max() < 0.2 and len(set(nearest.indices.tolist())) == 12

def test_kmeans_lowers_the_error_and_knows_too_few_points():
    x = torch.randn(500, 3)
    error = lambda c: torch.cdist(x, c).min(1).values.square().mean()
    torch.manual_seed(1)
    start = kmeans(x, 20, iterations=0)
    torch.manual_seed(1)
    assert error(kmeans(x, 20)) < 0.9 * error(start)
    assert kmeans(torch.zeros(5, 2), 3).abs().sum() == 0  # equal points
    with pytest.raises(BadInput):
        kmeans(x[:3], 4)

# ------------------------------------------------------------------------------------------------- t-SNE and uniformity (table 3)

def test_tsne_separates_blobs_and_keeps_neighbours():
    centres = 10 * torch.eye(4, 6)
    x, label = (centres[:, None] + torch.randn(4, 40, 6)).flatten(0, 1), torch.arange(4).repeat_interleave(40)
    y = tsne(x, steps=400)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).topk(10, largest=False).indices
    assert y.shape == (160, 2) and (label[nearest] == label[:, None]).all()  # every one of the ten nearest is of the same blob
    line = torch.linspace(0, 100, 200)[:, None] * torch.ones(1, 3)  # a line stays in order: neighbours at either end of each step
    y = tsne(line, perplexity=10, steps=400)
    step = (y[1:] - y[:-1]).norm(dim=1)
    assert step.median() < 0.1 * torch.pdist(y).median()

def test_tsne_descends_its_own_divergence_from_conditional_neighbours():
    """KL(p || q) of the plane, by loops in float64, far below that of a random plane and of the first two coordinates."""
    x = torch.randn(60, 5)
    d = np.asarray(torch.cdist(x, x).double()) ** 2
    p = np.zeros((60, 60))
    for i in range(60):
        others = [j for j in range(60) if j != i]
        low, high = 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            w = np.exp(-beta * (d[i, others] - d[i, others].min()))
            w /= w.sum()
            entropy = -(w * np.log(np.maximum(w, 1e-300))).sum()
            low, high = (beta, high) if entropy > math.log(15) else (low, beta)
        p[i, others] = w
    p = (p + p.T) / p.sum() / 2

    def divergence(y):
        q = 1 / (1 + np.asarray(torch.cdist(y, y).double()) ** 2)
        np.fill_diagonal(q, 0)
        q /= q.sum()
        return sum(p[i, j] * math.log(p[i, j] / q[i, j]) for i in range(60) for j in range(60) if p[i, j] > 1e-15)

    y = tsne(x, perplexity=15)
    assert divergence(y) < 0.75 * min(divergence(x[:, :2]), divergence(torch.randn(60, 2)))
    assert all(divergence(y + 0.3 * torch.randn_like(y)) > divergence(y) for _ in range(5))  # a minimum

def test_uniformity_by_hand():
    """Four points: the density by the formula of a Gaussian kernel with Scott's bandwidth, the three measures by their definitions."""
    points = np.array([[0.0, 0], [1, 0], [0, 2], [5, 5]])
    covariance = np.cov(points.T) * 4 ** (-2 / 6)  # n^(-1 / (d + 4)), squared
    inverse, norm = np.linalg.inv(covariance), 1 / (4 * 2 * math.pi * math.sqrt(np.linalg.det(covariance)))
    density = np.array([norm * sum(math.exp(-(p - q) @ inverse @ (p - q) / 2) for q in points) for p in points])
    share = density / density.sum()
    found = uniformity(torch.tensor(points, dtype=torch.float32))
    assert found["density_cv"] == pytest.approx(np.sqrt(((density - density.mean()) ** 2).mean()) / density.mean(), rel=1e-5)
    assert found["normalized_entropy"] == pytest.approx(-sum(q * math.log(q) for q in share) / math.log(4), rel=1e-5)
    assert found["gini"] == pytest.approx(np.abs(density[:, None] - density).sum() / (2 * 4 * 4 * density.mean()), rel=1e-5)
    even = uniformity(torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(12) * math.pi / 6]))
    assert even["density_cv"] < 1e-4 and even["normalized_entropy"] == pytest.approx(1) and even["gini"] < 1e-4

# ------------------------------------------------------------------------------------------------------------------ data

def save_pictures(folder, n, size=16, offset=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.random.default_rng(i + offset).integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{i:03d}{suffix}")
    return folder

def test_shapes_are_the_same_for_a_seed_and_differ_otherwise():
    x, y = glotok.draw_shapes(60, 32, 5)
    again, other = glotok.draw_shapes(60, 32, 5), glotok.draw_shapes(60, 32, 6)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert x.shape == (60, 3, 32, 32) and x.dtype == torch.uint8 and set(y.tolist()) == set(range(6))

def test_folder_with_classes_holds_out_a_fixed_twentieth(tmp_path):
    save_pictures(tmp_path / "cat", 30), save_pictures(tmp_path / "dog", 30, offset=100)
    a, b = fid.load_data(str(tmp_path), 16), fid.load_data(str(tmp_path), 16)
    assert (len(a.train), len(a.held), a.classes) == (57, 3, ["cat", "dog"])
    assert torch.equal(a.held, b.held)
    every = {x.numpy().tobytes(): y.item() for x, y in zip(torch.cat([a.train, a.held]), torch.cat([a.train_labels, a.held_labels]))}
    for label, name in enumerate(a.classes):
        for path in (tmp_path / name).iterdir():
            assert every[np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()] == label

def test_folder_with_train_and_val_uses_them(tmp_path):
    for part, n in (("train", 4), ("val", 2)):
        save_pictures(tmp_path / part / "a", n), save_pictures(tmp_path / part / "b", n, offset=50)
    data = fid.load_data(str(tmp_path), 16)
    assert (len(data.train), len(data.held)) == (8, 4) and data.held_labels.tolist() == [0, 0, 1, 1]
    save_pictures(tmp_path / "val" / "c", 1)
    with pytest.raises(BadInput, match="'c'"):
        fid.load_data(str(tmp_path), 16)

def test_flat_folder_is_one_class_and_odd_pictures_are_fitted(tmp_path, capsys):
    save_pictures(tmp_path, 3), save_pictures(tmp_path, 2, 40, suffix=".jpg")
    Image.new("L", (20, 50), 77).save(tmp_path / "grey.png")
    data = fid.load_data(str(tmp_path), 16)
    assert data.classes == [""] and len(data.train) + len(data.held) == 6
    assert (torch.cat([data.train, data.held]) == 77).all((1, 2, 3)).sum() == 1
    assert "3 of 6 images" in capsys.readouterr().err

def test_photographs_are_turned_upright(tmp_path):
    picture, exif = Image.new("RGB", (16, 16)), Image.Exif()
    picture.paste((255, 0, 0), (0, 0, 16, 8))  # red above
    exif[0x0112] = 3  # stored upside down
    save_pictures(tmp_path, 1)
    picture.save(tmp_path / "turned.png", exif=exif)
    data = fid.load_data(str(tmp_path), 16)
    turned = next(x for x in torch.cat([data.train, data.held]) if x[1:].sum() == 0)
    assert turned[0, 12, 8] == 255 and turned[0, 3, 8] == 0

def test_one_broken_picture_in_many_is_named_and_left_out(tmp_path, capsys):
    save_pictures(tmp_path / "a", 150)
    whole = (tmp_path / "a" / "007.png").read_bytes()
    (tmp_path / "a" / "007.png").write_bytes(whole[: len(whole) // 2])
    data = fid.load_data(str(tmp_path), 16)
    said = capsys.readouterr().err
    assert len(data.train) + len(data.held) == 149 and "007.png" in said and "1 of 150" in said
    (tmp_path / "a" / "008.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match="2 of 150"):
        fid.load_data(str(tmp_path), 16)

def test_npz_with_and_without_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images, labels=np.arange(40) % 3)
    data = fid.load_data(str(tmp_path / "a.npz"), 16)
    assert (len(data.train), len(data.held), len(data.classes)) == (38, 2, 3)
    i = next(i for i in range(40) if (images[i].transpose(2, 0, 1) == data.held[0].numpy()).all())
    assert data.held_labels[0] == i % 3
    np.savez(tmp_path / "b.npz", arr_0=images)
    assert len(fid.load_data(str(tmp_path / "b.npz"), 8).classes) == 1

def cifar_archive(path, names=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")):
    """A small archive of CIFAR-10's layout, two records a file: label i, red 10 i, green 20, blue by position."""
    with tarfile.open(path, "w:gz") as archive:
        for i, name in enumerate(names):
            record = bytes([i]) + bytes([10 * i] * 1024) + bytes([20] * 1024) + bytes(k % 256 for k in range(1024))
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = 2 * len(record)
            archive.addfile(info, io.BytesIO(2 * record))
        info = tarfile.TarInfo("../../escaped.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"bad"))

def test_cifar_records_are_read_in_place(tmp_path):
    cifar_archive(tmp_path / "cifar.tar.gz")
    data = fid.read_cifar10(tmp_path / "cifar.tar.gz", 32)
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and data.held_labels.tolist() == [5, 5] and len(data.classes) == 10
    assert (data.train[2, 0] == 10).all() and (data.train[2, 1] == 20).all()
    assert data.held[0, 2].flatten().tolist() == [k % 256 for k in range(1024)]
    assert list(tmp_path.iterdir()) == [tmp_path / "cifar.tar.gz"]  # nothing unpacked

def test_downloads_are_checked_and_put_in_place_whole(tmp_path, monkeypatch):
    (tmp_path / "thing").write_bytes(b"published bytes")
    (tmp_path / "other").write_bytes(b"published bytes")
    url, digest = tmp_path.as_uri() + "/", hashlib.sha256(b"published bytes").hexdigest()
    monkeypatch.setitem(fid.PUBLISHED, "thing", (url, digest))
    assert fid.fetch("thing", tmp_path / "cache").read_bytes() == b"published bytes"
    (tmp_path / "cache" / "thing").write_bytes(b"tampered")
    with pytest.raises(BadInput, match="SHA-256"):
        fid.fetch("thing", tmp_path / "cache")
    monkeypatch.setitem(fid.PUBLISHED, "other", (url, "0" * 64))
    with pytest.raises(BadInput, match="SHA-256"):
        fid.fetch("other", tmp_path / "cache")
    monkeypatch.setitem(fid.PUBLISHED, "absent", (url + "nowhere/", digest))
    with pytest.raises(BadInput, match=digest):  # says where to put it and how to check it
        fid.fetch("absent", tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thing"]

def test_psnr():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = x.clone()
    y[0] += 51  # a fifth of the range: 20 log10 5
    assert glotok.psnr(x, y).tolist() == pytest.approx([20 * math.log10(5), 99], abs=1e-4)

def test_batches_visit_every_image_once_an_epoch():
    seen = torch.cat([glotok.batch_indices(10, 4, step, 0) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10)) and seen[:10].tolist() != seen[10:].tolist()

# ---------------------------------------------------------------------------------------------------------------- teachers

def test_vectors_are_read_from_every_kind_of_file(tmp_path):
    v = torch.randn(9, 4)
    np.save(tmp_path / "v.npy", v.numpy())
    np.savez(tmp_path / "v.npz", v.numpy())
    torch.save({"model": {"codebook": v, "bias": torch.zeros(4)}, "step": 3}, tmp_path / "v.pt")
    torch.save({"a": v, "b": torch.randn(3, 2)}, tmp_path / "two.pth")
    for spec in ("v.npy", "v.npz", "v.pt", "two.pth:a"):
        assert torch.equal(glotok.read_vectors(str(tmp_path / spec)), v), spec
    with pytest.raises(BadInput, match=r"a \(9, 4\), b \(3, 2\)"):
        glotok.read_vectors(str(tmp_path / "two.pth"))

def test_teacher_of_a_file_is_its_histogram(tmp_path):
    v = torch.randn(20, 6)
    np.save(tmp_path / "v.npy", v.numpy())
    teacher = train.make_teacher(replace(TINY, teacher=str(tmp_path / "v.npy")), None, torch.device("cpu"))
    np.testing.assert_allclose(teacher["histogram"], histogram_by_loops(v, 40, ALPHA), atol=1e-4)

# ------------------------------------------------------------------------------------------------------------------- FID

def seeded_inception(scale=1.0):
    """InceptionV3 with random weights that let its input through. Recipe of the golden values below, also for a reference package:
    save its state_dict(), and give the file to torch-fidelity 0.4.0's FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"],
    feature_extractor_weights_path=FILE) (in its module feature_extractor_inceptionv3, which loads without torchvision once an empty
    module stands in for the parent package). Same images, `golden_images`."""
    net, g = fid.InceptionV3(), torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight.data.normal_(0, (2 / m.weight[0].numel()) ** 0.5, generator=g)
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=g), m.running_var.uniform_(0.5, 1.5, generator=g)
            m.weight.data.uniform_(0.8, 1.2, generator=g), m.bias.data.normal_(0, 0.1, generator=g)
    net.fc.weight.data.normal_(0, 0.02, generator=g), net.fc.bias.data.zero_()
    return net

def golden_images(size):
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(seeded_inception().state_dict(), path)
    return path

GOLDEN = {  # size: of the features their sum, deviation, and a partial sum; of the logits their deviation and a partial sum
    32: [5617.712402, 1.907288, 710.924805, 2.102827, 37.434746],
    64: [6299.687988, 2.137265, 798.183533, 2.357011, 43.734692],
    256: [6694.3125, 2.269577, 847.363281, 2.505479, 48.165813]}

@pytest.mark.parametrize("size", [32, 64, 256])
def test_inception_agrees_with_torch_fidelity(size):
    net = seeded_inception()
    for features, logits in (net(golden_images(size)), net.fold()(golden_images(size))):
        assert features.shape == (2, 2048) and logits.shape == (2, 1008)
        found = [features.sum(), features.std(), features[1, :512].sum(), logits.std(), logits[0, :504].sum()]
        np.testing.assert_allclose([v.item() for v in found], GOLDEN[size], rtol=1e-4)

def test_inception_names_are_the_published_ones():
    names = {k: tuple(v.shape) for k, v in fid.InceptionV3().state_dict().items() if "num_batches" not in k}
    assert len(names) == 94 * 5 + 2  # a weight and four of the batch norm each; fc
    for name, shape in (("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)), ("Mixed_5b.branch1x1.conv.weight", (64, 192, 1, 1)),
                        ("Mixed_5d.branch3x3dbl_3.bn.running_var", (96,)), ("Mixed_6a.branch3x3.conv.weight", (384, 288, 3, 3)),
                        ("Mixed_6e.branch7x7dbl_5.conv.weight", (192, 192, 1, 7)), ("Mixed_7a.branch7x7x3_4.conv.weight", (192, 192, 3, 3)),
                        ("Mixed_7c.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)), ("fc.weight", (1008, 2048)), ("fc.bias", (1008,))):
        assert names[name] == shape

def test_resizing_is_tensorflow_1s():
    """By its definition, in a loop: output i reads the input at i * n / 299, no half pixel; beyond the last point the last."""
    for n in (2, 32, 299, 500):
        x, out = np.random.default_rng(0).uniform(0, 255, n), []
        for i in range(299):
            at = i * n / 299
            low = int(at)
            out.append(x[low] + (at - low) * (x[min(low + 1, n - 1)] - x[low]))
        np.testing.assert_allclose(fid.resize_matrix(n).double() @ torch.from_numpy(x), out, atol=2e-2)

def test_frechet_distance_equals_the_matrix_root_where_that_works():
    a, b = np.random.default_rng(0).normal(size=(500, 40)), np.random.default_rng(1).normal(1, 2, size=(300, 40)) @ np.diag(np.linspace(0.1, 3, 40))
    mu1, s1, mu2, s2 = a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-6)

def test_frechet_distance_where_the_matrix_root_fails():
    x = np.random.default_rng(0).normal(size=(20, 100))  # fewer images than dimensions
    mu, s = x.mean(0), np.cov(x.T)
    assert fid.frechet_distance(mu, s, mu, s) == pytest.approx(0, abs=1e-5 * np.trace(s))
    assert fid.frechet_distance(mu, s, mu + 3, s) == pytest.approx(900, rel=1e-6)  # |shift|^2
    assert fid.frechet_distance(mu, s, mu, 4 * s) == pytest.approx(np.trace(s), rel=1e-5)  # (2 - 1)^2 tr S
    nothing = np.zeros((100, 100))  # constant features
    assert fid.frechet_distance(mu, nothing, mu, nothing) == 0 and fid.frechet_distance(mu, s, mu, nothing) == pytest.approx(np.trace(s), rel=1e-9)

def test_inception_score_by_hand():
    """Shuffled as torch-fidelity does, split i from i N // 10 on, exp of the mean KL, in a loop."""
    logits = torch.randn(57, 12)
    p = np.exp(logits.double().numpy()[np.random.RandomState(2020).permutation(57)])
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 57 // 10:(i + 1) * 57 // 10]
        scores.append(math.exp(np.mean([(q * np.log(q / part.mean(0))).sum() for q in part])))
    assert fid.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert fid.inception_score(50 * torch.eye(7).repeat(100, 1), splits=1)[0] == pytest.approx(7)  # sure, and of seven kinds

def fid_command(monkeypatch, capsys, *argv):
    status, out, err = script(monkeypatch, capsys, fid, *argv)
    return status, dict(line.split(" ", 1) for line in out.splitlines()), err

def test_fid_command(tmp_path, inception_file, monkeypatch, capsys):
    """Folders of mixed sizes and arrays give the distance that NumPy finds from the same network's features; statistics stand in for images."""
    save_pictures(tmp_path / "a", 5, 20), save_pictures(tmp_path / "a" / "more", 3, 40, offset=9), save_pictures(tmp_path / "b", 8, 30, offset=50)
    arrays = np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / "b").iterdir())])
    np.savez(tmp_path / "b.npz", arr_0=arrays)
    net = seeded_inception()
    x = [torch.cat([net(torch.from_numpy(np.asarray(Image.open(p)).transpose(2, 0, 1).copy())[None])[0] for p in sorted((tmp_path / name).rglob("*.png"))])
         .double().numpy() for name in "ab"]
    mu1, s1, mu2, s2 = x[0].mean(0), np.cov(x[0].T), x[1].mean(0), np.cov(x[1].T)
    values, vectors = np.linalg.eigh(s1)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s2 @ root), 0)).sum()
    weights = ["--weights", inception_file]
    status, out, err = fid_command(monkeypatch, capsys, tmp_path / "a", tmp_path / "b", *weights, "--save-stats", tmp_path / "a.npz")
    assert status == 0 and float(out["fid"]) == pytest.approx(expected, rel=1e-3) and len(out["is"].split()) == 2
    assert "biased upward" in err and "not the published network" in err
    stats = np.load(tmp_path / "a.npz")
    np.testing.assert_allclose(stats["mu"], mu1, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.diag(stats["sigma"]), np.diag(s1), rtol=1e-2, atol=1e-6)
    again = fid_command(monkeypatch, capsys, tmp_path / "a.npz", tmp_path / "b.npz", *weights)[1]
    assert float(again["fid"]) == pytest.approx(float(out["fid"]), rel=1e-4)
    np.savez(tmp_path / "adm.npz", arr_0=arrays, mu=mu2, sigma=s2)
    monkeypatch.setattr(fid, "load_inception", None)  # statistics against statistics need no network
    np.savez(tmp_path / "b_stats.npz", mu=mu2, sigma=s2)
    status, out, _ = fid_command(monkeypatch, capsys, tmp_path / "adm.npz", tmp_path / "b_stats.npz")
    assert status == 0 and float(out["fid"]) == pytest.approx(0, abs=1e-2) and "is" not in out

def test_paired_psnr_and_bad_images(tmp_path, inception_file, monkeypatch, capsys):
    images = np.full((3, 24, 24, 3), 100, np.uint8)
    np.savez(tmp_path / "a.npz", images), np.savez(tmp_path / "b.npz", images + np.uint8(51))
    weights = ["--weights", inception_file]
    out = fid_command(monkeypatch, capsys, tmp_path / "a.npz", tmp_path / "b.npz", "--paired", *weights)[1]
    assert float(out["psnr"]) == pytest.approx(20 * math.log10(5), abs=1e-3)
    save_pictures(tmp_path / "c", 4)
    (tmp_path / "c" / "torn.png").write_bytes((tmp_path / "c" / "000.png").read_bytes()[:100])
    status, _, err = fid_command(monkeypatch, capsys, tmp_path / "a.npz", tmp_path / "c", *weights)
    assert status == 2 and "torn.png" in err
    status, _, err = fid_command(monkeypatch, capsys, tmp_path / "a.npz", tmp_path / "c", *weights, "--skip-bad")
    assert status == 0 and "torn.png" in err

@pytest.mark.parametrize("words, expected", [
    ("nowhere A.npz", "no data at"), ("EMPTY A.npz", "no images"), ("FLOATS.npz A.npz", "uint8"), ("A.npz STATS.npz", "mu (2048,)"), ("A.npz ONE.npz", "at least 2"),
    ("A.npz A.npz --weights text.pth", "cannot read"), ("A.npz A.npz --weights other.pth", "other weights"), ("A.npz A.npz --weights gone.pth", "cannot read"),
    ("A.npz B.npz --paired", "--paired"), ("A.npz A.npz --save-stats x.txt", ".npz"), ("A.npz", "samples"), ("A.npz A.npz --wieghts x", "'--weights'"),
    ("A.npz NAN.npz", "finite statistics"), ("A.npz OBJECTS.npz", "cannot read"), ("A.npz TORN.npz", "cannot read"), ("A.npz A.npz --weights code.pth", "cannot read"),
    ("A.npz NOBODY.npz", "at least 2"), ("ROTTEN A.npz", "1 of 4 images"), ("A.npz A.npz --weights nan.pth", "NaN or infinity"), ("A.npz text.npz", "cannot read"),
    ("A.npz A.npz", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")])
def test_fid_refuses_bad_input(words, expected, tmp_path, inception_file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir(), Path("text.pth").write_text("hello"), torch.save({"a": torch.ones(3)}, "other.pth")
    x = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez("NAN.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048)), np.savez("OBJECTS.npz", np.array([RunsCode("code ran")])), np.savez("NOBODY.npz", x[:0])
    save_pictures(Path("ROTTEN"), 4), Path("ROTTEN/000.png").write_bytes(b"no picture"), Path("text.npz").write_text("hello"), torch.save(RunsCode("code ran"), "code.pth")
    Path("TORN.npz").write_bytes(Path("NAN.npz").read_bytes()[:-100])
    if "nan.pth" in words:
        weights = torch.load(inception_file, weights_only=True)
        torch.save({**weights, "fc.bias": weights["fc.bias"] * math.nan}, "nan.pth")
    np.savez("A.npz", x), np.savez("B.npz", x[:3]), np.savez("ONE.npz", x[:1]), np.savez("FLOATS.npz", x.astype(float)), np.savez("STATS.npz", mu=np.zeros(64), sigma=np.eye(64))
    monkeypatch.setitem(fid.PUBLISHED, fid.WEIGHTS, (tmp_path.as_uri() + "/nowhere/", fid.PUBLISHED[fid.WEIGHTS][1]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    more = [] if "--weights" in words or expected.startswith("67") else ["--weights", inception_file]
    before = sorted(os.listdir())
    status, out, err = fid_command(monkeypatch, capsys, *words.split(), *more)
    assert status == 2 and expected in err.splitlines()[-1] and err.splitlines()[-1].startswith("fid.py: ") and not out
    assert set(os.listdir()) - set(before) <= {"cache"} and not Path("code ran").exists()

# ---------------------------------------------------------------------------------------------------------------- commands

def command(monkeypatch, capsys, *argv):
    status, _, err = script(monkeypatch, capsys, train, *argv)
    return status, err.splitlines()  # of standard error

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A 20-step run of the real command, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run([sys.executable, Path(train.__file__), *FLAGS, "--out", out], capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out, done

def test_a_run_lowers_its_loss_and_writes_every_file(finished):
    out, done = finished
    assert {p.name for p in out.iterdir()} == {"config.json", "teacher.pt", "tokenizer.pt", "generator.pt", "log.jsonl", "metrics.json",
                                               "reconstructions.png", "histogram.png", "curves.png", "samples.png"}
    for name in ("reconstructions", "histogram", "curves", "samples"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 200 and len(picture.convert("RGB").getcolors(10**6)) > 5
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"psnr", "usage_sem", "usage_vis", "hist_kl", "seconds", "device"} <= set(metrics)
    assert json.loads((out / "config.json").read_text())["preset"] == "shapes"
    assert "tokenizer step 20/20" in done.stderr and "generator step 20/20" in done.stderr and "left" in done.stderr
    # its figures, computed anew
    model = GloTok(TINY).eval()
    model.load_state_dict(torch.load(out / "tokenizer.pt", weights_only=True)["model"])
    held = glotok.draw_shapes(1000, 16, 1)[0][::50]  # 20, evenly
    with torch.no_grad():
        x = held.float() / 127.5 - 1
        recon = ((model(x)[0].clamp(-1, 1) + 1) * 127.5).round()
        sem, vis = model.encode(x)
    mse = ((recon - held.float()) ** 2).mean((1, 2, 3))
    assert metrics["psnr"] == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), abs=0.05)
    assert metrics["usage_sem"] == pytest.approx(len(set(sem.flatten().tolist())) / 16)
    assert metrics["usage_vis"] == pytest.approx(len(set(vis.flatten().tolist())) / 24)
    assert metrics["hist_kl"] == pytest.approx(histogram_relation_loss(model.codebook_sem, sphere_histogram(8)).item(), abs=1e-4)

def test_training_lowers_the_loss(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, capsys, *FLAGS, "--stage", "tokenizer", "--tokenizer_steps", 200, "--batch_size", 16,
                   "--out", tmp_path / "run")[0] == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(20, 201, 20))
    assert sum(r["recon"] for r in log[-3:]) / 3 < 0.7 * log[0]["recon"]

@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_anywhere_a_run_resumes_to_the_same_weights(signal_number, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    real, calls = train.to_float, []

    def stop_at_8(*args):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal_number)
        return real(*args)

    monkeypatch.setattr(train, "to_float", stop_at_8)
    status, _ = command(monkeypatch, capsys, *FLAGS, "--out", out)
    assert status == 130 and torch.load(out / "tokenizer.pt", weights_only=True)["step"] == 8  # the step was completed first
    monkeypatch.setattr(train, "to_float", real)
    assert command(monkeypatch, capsys, "--resume", "--stage", "generator", "--out", out)[0] == 0  # an unfinished tokenizer is finished first
    for stage in ("tokenizer", "generator"):
        a, b = (dict(glotok.tensors_in(torch.load(run / f"{stage}.pt", weights_only=True))) for run in (out, finished[0]))
        assert a.keys() == b.keys() and len(a) > 10 and all(torch.equal(v, b[k]) for k, v in a.items())

@pytest.mark.parametrize("step", [3, 12])
def test_a_generator_stopped_anywhere_resumes_to_the_same_weights(step, finished, tmp_path, monkeypatch, capsys):
    for name in ("config.json", "teacher.pt", "tokenizer.pt", "metrics.json"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    real, calls = XAR.forward, []

    def stop(self, *args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(XAR, "forward", stop)
    flags = ["--resume", "--stage", "generator", "--out", tmp_path]
    assert command(monkeypatch, capsys, *flags)[0] == 130
    assert command(monkeypatch, capsys, *flags)[0] == 0 and len(calls) == 20
    a, b = (dict(glotok.tensors_in(torch.load(run / "generator.pt", weights_only=True))) for run in (tmp_path, finished[0]))
    assert len(a) > 10 and all(torch.equal(v, b[k]) for k, v in a.items())
    assert {"psnr", "generator_seconds"} <= set(json.loads((tmp_path / "metrics.json").read_text()))

def test_the_moving_average_keeps_no_graph(tmp_path, monkeypatch, capsys):
    """It once did, of every step: memory grew by a megabyte a step."""
    seen = []
    monkeypatch.setattr(train, "report_generator", lambda c, out, data, teacher, model, generator, *_: seen.extend(generator.parameters()) or {})
    assert command(monkeypatch, capsys, *FLAGS, "--out", tmp_path / "run")[0] == 0
    assert seen and not any(p.requires_grad or p.grad_fn for p in seen)

@pytest.mark.parametrize("kind, parts", [("xar", 2), ("xar", 4), ("far", 4)])
def test_parts_of_a_generators_batch_make_the_loss_of_the_whole(kind, parts):
    c = replace(TINY, label_dropout=0.5)
    generator, labels = glotok.GENERATORS[kind](c) if kind == "far" else awake(XAR(c)), torch.arange(8) % TINY.classes
    latents = torch.randn(8, 16, 8, 8) if kind == "xar" else torch.randint(16, (8, 2, 8, 8))
    def loss(part, parts, *batch):
        torch.manual_seed(1)
        return generator.loss(*batch, part, parts)
    whole = loss(0, 1, latents, labels)
    divided = [loss(k, parts, z, y) for k, (z, y) in enumerate(zip(latents.chunk(parts), labels.chunk(parts)))]
    assert sum(divided).item() / parts == pytest.approx(whole.item(), rel=1e-5)
    assert len({round(x.item(), 5) for x in divided}) == parts  # each part has its own images and noise

def test_two_processes_and_parts_follow_one_process_step_by_step(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(Path(train.__file__).parent)!r})\nimport train\ntrain.LOG_EVERY = 1\ntrain.run(train.main)\n")
    launcher, logs = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], []
    for name, start, parts in (("one", [sys.executable], "1"), ("two", launcher, "2")):
        done = subprocess.run([*start, driver, *FLAGS, "--precision", "float32", "--revive_every", "0", "--accumulate", parts, "--out", tmp_path / name],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        logs.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    assert [(r["stage"], r["step"]) for r in logs[1]] == [(stage, k) for stage in ("tokenizer", "generator") for k in range(1, 21)]
    for one, two in zip(*logs):
        assert one.keys() == two.keys()
        assert all(one[k] == two[k] or one[k] == pytest.approx(two[k], rel=1e-4, abs=1e-6) for k in one), (one, two)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[1]["processes"] == 2 and metrics[0]["psnr"] == pytest.approx(metrics[1]["psnr"], abs=0.01)

def test_streamed_files_train_as_those_in_memory(tmp_path, monkeypatch, capsys):
    for k in range(3):
        save_pictures(tmp_path / "data" / f"class{k}", 20, 16, offset=k)
    flags, memory = [*FLAGS, "--data", tmp_path / "data", "--tokenizer_steps", 30, "--generator_steps", 2], fid.room
    for name in ("memory", "files"):
        monkeypatch.setattr(fid, "room", memory if name == "memory" else lambda: 0)
        status, said = command(monkeypatch, capsys, *flags, "--out", tmp_path / name)
        assert status == 0 and any(("in memory" if name == "memory" else "by worker processes") in line for line in said), said
    for stage in ("tokenizer", "generator"):
        a, b = (dict(glotok.tensors_in(torch.load(tmp_path / name / f"{stage}.pt", weights_only=True))) for name in ("memory", "files"))
        assert all(torch.equal(v, b[k]) for k, v in a.items())

def test_a_streamed_file_that_cannot_be_read_is_named_and_grey(tmp_path, capsys):
    save_pictures(tmp_path, 3)
    files = sorted(tmp_path.iterdir())
    files[1].write_bytes(b"no picture")
    images = fid.decode(files, 16)
    assert files[1].name in capsys.readouterr().err and images.shape == (3, 3, 16, 16)
    assert (images[1] == 128).all() and images[0].float().std() > 0 and images[2].float().std() > 0

def test_exact_products_whatever_reigns_outside():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    truth = (a.double() @ b.double()).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (a @ b - truth).abs().max() > 1e-2
            with glotok.exact(a.device):
                assert torch.get_float32_matmul_precision() == "highest"
                assert (a @ b - truth).abs().max() < 1e-4
            q = Quantizer(500, 8, 0.25)
            z = F.normalize(torch.randn(300, 8), dim=-1)
            assert torch.equal(q.look_up(z), (z.double() @ q.codebook.double().T).argmax(1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)

@pytest.mark.parametrize("works", [True, False])
def test_compiling_is_tried_first(works, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("no compiler\nin this place")
    monkeypatch.setattr(torch, "compile", (lambda f: f) if works else fails)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    net = torch.nn.Linear(2, 2)
    glotok.compile_all(replace(TINY, compile=1), torch.device("cpu"), net)
    assert compiled == [net] * works
    assert ("no compiler): not compiled" in capsys.readouterr().err) != works
    glotok.compile_all(TINY, torch.device("cpu"), net)
    assert compiled == [net] * works

def on_a_full_disk(*words):
    """A command that can write no file of more than 100,000 bytes."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([sys.executable, "-c", limited, *map(str, words)], capture_output=True, text=True)

def test_samples_on_a_full_disk_go_on_where_they_stopped(finished, tmp_path, monkeypatch, capsys):
    words = [finished[0], "--n", 250, "--out"]
    done = on_a_full_disk(sample.__file__, *words, tmp_path / "new" / "x.npz")  # 250 x 768 bytes
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("sample.py: "), done.stderr
    assert not (tmp_path / "new" / "x.npz").exists()
    status, _, said = sample_command(monkeypatch, capsys, *words, tmp_path / "new" / "x.npz")
    assert status == 0 and sample_command(monkeypatch, capsys, *words, tmp_path / "y.npz")[0] == 0
    x, y = (np.load(tmp_path / name)["arr_0"] for name in ("new/x.npz", "y.npz"))
    assert (x == y).all() and [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]

def test_a_full_disk_leaves_the_last_checkpoint(finished, tmp_path):
    for name in ("config.json", "teacher.pt", "tokenizer.pt", "log.jsonl"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    before = (tmp_path / "tokenizer.pt").read_bytes()
    assert len(before) > 100000
    done = on_a_full_disk(train.__file__, "--resume", "--tokenizer_steps", "40", "--stage", "tokenizer", "--out", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "cannot write" in done.stderr.splitlines()[-1]
    assert (tmp_path / "tokenizer.pt").read_bytes() == before and not list(tmp_path.glob(".*"))

@pytest.mark.parametrize("words, when, kept", [
    ("train.py --preset shapes", 0.8, False), ("sample.py RUN", 0.8, False), ("fid.py A.npz A.npz", 0.8, False),  # among the imports
    ("train.py --preset shapes", "data: ", False),  # next its teacher is trained
    ("train.py FLAGS --tokenizer_steps 90000", "tokenizer: ", True),
    ("train.py FLAGS --generator_steps 90000", "tokenizer step 20/20", True),  # next pictures are drawn, then the generator is trained
    ("fid.py A.npz A.npz --weights NET", "not the published", False)])
def test_ctrl_c_at_each_stage(words, when, kept, finished, inception_file, tmp_path):
    """Status 130, or among the imports death by the signal, which shells call 130; no traceback, nothing half-written."""
    np.savez(tmp_path / "A.npz", np.zeros((500, 64, 64, 3), np.uint8))
    words = words.replace("FLAGS", " ".join([*FLAGS, "--out", "run"])).replace("RUN", str(finished[0])).replace("NET", str(inception_file)).split()
    with subprocess.Popen([sys.executable, Path(train.__file__).with_name(words[0]), *words[1:]], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        for line in process.stderr if isinstance(when, str) else ():
            if when in line:
                break
        time.sleep(when if isinstance(when, float) else 0.3)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode in ((130, -signal.SIGINT) if isinstance(when, float) else (130,)) and "Traceback" not in said, said
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert {"config.json", "teacher.pt", "tokenizer.pt"} <= set(os.listdir(tmp_path / "run")) if kept else os.listdir(tmp_path) == ["A.npz"]

@pytest.mark.parametrize("words, expected", [
    ("--data cifar10", "cannot download cifar-10-binary"), ("--teacher dinov2", "cannot download dinov2"), ("--semantic local --teacher dinov2", "cannot download"),
    ("--lambda_perceptual 1", "cannot download vgg16"), ("HOSTILE --data cifar10", "not the published file"), ("HOSTILE --teacher dinov2", "not the published file")])
@pytest.mark.parametrize("home", ["home", "absent", "file"])
def test_without_network_or_home(home, words, expected, tmp_path, monkeypatch, capsys):
    """And with a hostile archive or pickle in the place of a download: refused by its SHA-256 before anything reads it."""
    monkeypatch.chdir(tmp_path)
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    Path("file").write_text("no folder"), Path("home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    for name, (_, digest) in list(fid.PUBLISHED.items()):
        monkeypatch.setitem(fid.PUBLISHED, name, (tmp_path.as_uri() + "/nowhere/", digest))
    words = words.split()
    if words[0] == "HOSTILE":
        del words[0]
        for path in (Path("data/cifar-10-binary.tar.gz"), tmp_path / home / ".cache/torch/hub/checkpoints/dinov2_vits14_pretrain.pth"):
            if home == "file" and path.is_absolute():
                pytest.skip("there is no place for it")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(RunsCode("code ran")))
    before = sorted(p for p in Path().rglob("*") if p.is_file())
    status, said = command(monkeypatch, capsys, *FLAGS, "--out", "run", *words)
    assert status == 2 and expected in said[-1] and said[-1].startswith("train.py: ") and not any("Traceback" in line for line in said), said
    assert sorted(p for p in Path().rglob("*") if p.is_file()) == before and not Path("run").exists() and not Path("code ran").exists()

def test_two_runs_do_not_share_a_folder(finished, tmp_path, monkeypatch, capsys):
    for file in finished[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as the other run does
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    try:
        status, said = command(monkeypatch, capsys, "--resume", "--generator_steps", 21, "--out", tmp_path)
    finally:
        os.close(folder)
    assert status == 2 and "another process is training there" in said[-1] and before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for _ in range(2):  # a run that has ended, in this very process, holds nothing
        assert command(monkeypatch, capsys, "--resume", "--out", tmp_path)[0] == 0

@pytest.mark.parametrize("line", ["{x}", '{"step": 3}', '["stage"]}', '{"stage": "generator", "step": null}', '"\\ud800}'])
def test_a_damaged_log_is_named(line, finished, tmp_path, monkeypatch, capsys):
    for file in finished[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "log.jsonl").write_text(line + "\n")
    status, said = command(monkeypatch, capsys, "--resume", "--out", tmp_path)
    assert status == 2 and "log.jsonl is damaged" in said[-1] and (tmp_path / "log.jsonl").read_text() == line + "\n"

def test_every_loss_can_be_switched_on_and_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_lpips", lambda device: LPIPS().to(device))
    status, said = command(monkeypatch, capsys, *FLAGS, "--image_size", 32, "--lambda_hist", 0, "--lambda_res", 0, "--lambda_perceptual", 0.1,
                           "--lambda_adv", 0.5, "--adv_start", 10, "--adv_ramp", 5, "--disc_channels", 8, "--disc_layers", 1, "--stage", "tokenizer", "--out", tmp_path / "run")
    assert status == 0, said
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"perceptual", "adv", "critic"} <= set(row) and "hist" not in row and row["perceptual"] != 0

def test_the_rivals_train_resume_and_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "draw_shapes", lambda n, size, seed, real=glotok.draw_shapes: real(n // 10, size, seed))
    flags = [*FLAGS, "--teacher", "convnet", "--teacher_centres", 64, "--semantic", "local", "--generator", "far", "--top_k", 8]
    for name, steps in (("whole", 20), ("halves", 7)):
        assert command(monkeypatch, capsys, *flags, "--generator_steps", steps, "--tokenizer_steps", 20, "--out", tmp_path / name)[0] == 0
    assert command(monkeypatch, capsys, "--resume", "--generator_steps", 20, "--out", tmp_path / "halves")[0] == 0
    a, b = (dict(glotok.tensors_in(torch.load(tmp_path / name / "tokenizer.pt", weights_only=True))) for name in ("whole", "halves"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert 0 < rows[0]["local"] < 2 and "hist" not in rows[0] and rows[-1]["entropy"] < math.log(24)
    status, *said = sample_command(monkeypatch, capsys, tmp_path / "whole", "--n", 4, "--out", tmp_path / "x.npz")
    assert status == 0 and np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3), said
    assert command(monkeypatch, capsys, *FLAGS, "--semantic", "none", "--stage", "tokenizer", "--out", tmp_path / "none")[0] == 0
    assert "hist" not in json.loads((tmp_path / "none" / "log.jsonl").read_text().splitlines()[-1])

def test_convnet_teacher_learns_the_shapes_and_is_cached(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "draw_shapes", lambda n, size, seed, real=glotok.draw_shapes: real(n // 10, size, seed))
    flags = [*FLAGS, "--teacher", "convnet", "--teacher_centres", 64, "--tokenizer_steps", 5, "--out", tmp_path / "run"]
    assert command(monkeypatch, capsys, *flags)[0] == 0
    teacher = torch.load(tmp_path / "run" / "teacher.pt", weights_only=True)
    assert teacher["histogram"].sum().item() == pytest.approx(1, abs=1e-5) and teacher["made_by"]["teacher"] == "convnet"
    net = glotok.ConvNet(6).eval()
    net.load_state_dict(teacher["convnet"])
    held, labels = glotok.draw_shapes(1000, 16, 1)
    assert (net(held.float() / 127.5 - 1).argmax(1) == labels).float().mean() > 0.5  # 16 pixels, 2,000 pictures; chance is 0.17
    monkeypatch.setattr(train, "make_teacher", None)  # resuming must not need it
    assert command(monkeypatch, capsys, "--resume", "--tokenizer_steps", 6, "--out", tmp_path / "run")[0] == 0

# --------------------------------------------------------------------------------------------------------------- bad input

@functools.lru_cache
def strange_pictures():
    """name -> bytes of one picture of a kind that must be accepted, or must be refused by name."""
    base, out = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 20, 3), np.uint8)), {}
    def encode(picture, kind="PNG", **more):
        picture.save(file := io.BytesIO(), kind, **more)
        return file.getvalue()
    out["tiny.png"] = encode(base.resize((1, 1)))
    out["wide.png"] = encode(Image.new("RGB", (20000, 3), "red"))
    out["cmyk.jpg"] = encode(base.convert("CMYK"), "JPEG")
    out["deep.png"] = encode(Image.fromarray(np.random.RandomState(0).randint(0, 65536, (16, 16)).astype(np.uint16)))
    out["palette.png"] = encode(base.convert("P"))
    out["bits.png"] = encode(base.convert("1"))
    out["alpha.png"] = encode(base.convert("RGBA"))
    out["greyalpha.png"] = encode(base.convert("LA"))
    out["moving.webp"] = encode(base, "WEBP", save_all=True, append_images=[base.rotate(90)])
    out["moving.png"] = encode(base, save_all=True, append_images=[base.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    out["turned.jpg"] = encode(base, "JPEG", exif=exif)
    out["na\u00efve \u732b\nnew line.png"] = encode(base)
    whole = encode(base)
    return out, {"bomb.png": encode(Image.new("1", (20000, 20000))), "torn.png": whole[:len(whole) // 2], "blank.png": b"", "text.jpg": b"hello\n" * 50,
                 "head.jpg": encode(base, "JPEG")[:30], "other.bmp": b"BM" + bytes(20)}

@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of files that must not be accepted."""
    tmp = tmp_path_factory.mktemp("broken")
    (tmp / "empty").mkdir(), save_pictures(tmp / "flat", 4), save_pictures(tmp / "single", 1)
    save_pictures(tmp / "rotten", 10)
    for i in range(3):
        (tmp / "rotten" / f"{i:03d}.png").write_bytes(b"\x89PNG broken")
    for name, data in strange_pictures()[1].items():
        save_pictures(tmp / name.split(".")[0], 4)
        (tmp / name.split(".")[0] / name).write_bytes(data)
    save_pictures(tmp / "dangling", 4), (tmp / "dangling" / "x.png").symlink_to(tmp / "gone.png")
    save_pictures(tmp / "folder", 4), (tmp / "folder" / "x.png").mkdir()
    save_pictures(tmp / "split" / "train" / "a", 4), save_pictures(tmp / "split" / "val" / "b", 4)
    (tmp / "text.npz").write_text("hello"), (tmp / "nothing.npz").write_bytes(b""), np.savez(tmp / "none.npz")
    x = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(tmp / "nobody.npz", x[:0]), np.savez(tmp / "somebody.npz", x[:1]), np.savez(tmp / "flat.npz", x.transpose(0, 3, 1, 2))
    np.savez(tmp / "few.npz", x, labels=np.zeros(3, int)), np.savez(tmp / "minus.npz", x, labels=np.full(4, -1)), np.savez(tmp / "half.npz", x, labels=np.full(4, .5))
    with zipfile.ZipFile(tmp / "huge.npz", "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)})
        archive.writestr("arr_0.npy", header.getvalue())
    np.savez(tmp / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(tmp / "grey.npz", np.zeros((4, 8, 8), np.uint8))
    np.savez(tmp / "objects.npz", np.array([{}], dtype=object))
    (tmp / "torn.npz").write_bytes((tmp / "floats.npz").read_bytes()[:200])
    np.save(tmp / "nan.npy", np.full((4, 3), np.nan, np.float32))
    np.save(tmp / "vast.npy", np.full((4, 3), 1e30, np.float32))
    np.save(tmp / "one.npy", np.ones((1, 3), np.float32))
    np.save(tmp / "zero.npy", np.zeros((4, 3), np.float32))
    np.save(tmp / "cube.npy", np.ones((4, 3, 2), np.float32))
    np.save(tmp / "words.npy", np.array(["a", "b"]))
    np.save(tmp / "objects.npy", np.array([{}], dtype=object))
    torch.save({"step": 3}, tmp / "none.pt")
    torch.save({"a": torch.ones(3, 2), "b": {"c": torch.ones(4, 2)}}, tmp / "two.pt")
    torch.save(RunsCode(str(tmp / "code ran")), tmp / "code.pt")
    (tmp / "code.npy").write_bytes(pickle.dumps(RunsCode(str(tmp / "code ran"))))
    with open(tmp / "long.pt", "w") as file:
        file.truncate(2**30)
    (tmp / "text.pt").write_text("hello")
    return tmp

class RunsCode:
    """What a hostile pickle does when it is read: here it makes a file."""
    def __init__(self, path):
        self.path = path
    def __reduce__(self):
        return os.mkdir, (self.path,)

BAD = [
    ("--preset cifar", "did you mean 'cifar10'"),
    ("--lambda_hits 1", "did you mean '--lambda_hist'"),
    ("--lambda_hist abc", "--lambda_hist"),
    ("--lambda_hist nan", "lambda_hist is nan"),
    ("--lambda_hist -1", "lambda_hist is -1"),
    ("--tokenizer_steps 0", "tokenizer_steps is 0"),
    ("--batch_size 1.5", "--batch_size"),
    ("--image_size 31", "multiple of 2"),
    ("--precision half", "precision"),
    ("--semantic nearby", "one of global, local, none"),
    ("--generator gan", "one of xar, far"),
    ("--semantic local --teacher sphere", "convnet or dinov2"),
    ("--batch_size 10 --accumulate 4", "multiples of 1 process(es) times accumulate, 4"),
    ("--stage all-of-it", "--stage"),
    ("--data nowhere", "no data at"),
    ("--data TMP/empty", "no images"),
    ("--data TMP/single", "too few"),
    ("--data TMP/rotten", "3 of 10"),
    ("--data TMP/bomb", "1 of 5 images"), ("--data TMP/torn", "torn.png"), ("--data TMP/blank", "blank.png"), ("--data TMP/blank/blank.png", "no data at"), ("--data TMP/text", "text.jpg"),
    ("--data TMP/head", "head.jpg"), ("--data TMP/other", "other.bmp"), ("--data TMP/dangling", "x.png"), ("--data TMP/folder", "x.png"),
    ("--data TMP/split", "class that train/ has not: 'b'"),
    ("--data TMP/floats.npz", "uint8"),
    ("--data TMP/grey.npz", "uint8"),
    ("--data TMP/flat.npz", "uint8"),
    ("--data TMP/none.npz", "uint8"),
    ("--data TMP/objects.npz", "cannot read"),
    ("--data TMP/torn.npz", "cannot read"),
    ("--data TMP/text.npz", "cannot read"),
    ("--data TMP/nothing.npz", "cannot read"),
    ("--data TMP/huge.npz", "cannot read"),
    ("--data TMP/nobody.npz", "too few"), ("--data TMP/somebody.npz", "too few"),
    ("--data TMP/few.npz", "labels"), ("--data TMP/minus.npz", "labels"), ("--data TMP/half.npz", "labels"),
    ("--data TMP/flat --teacher convnet", "one class"),
    ("--teacher nobody", "no teacher"),
    ("--teacher TMP/nan.npy", "not finite"),
    ("--teacher TMP/vast.npy", "not finite"),
    ("--teacher TMP/zero.npy", "zero"),
    ("--teacher TMP/one.npy", "n > 1"),
    ("--teacher TMP/cube.npy", "(4, 3, 2)"),
    ("--teacher TMP/words.npy", "nothing"),
    ("--teacher TMP/objects.npy", "cannot read"),
    ("--teacher TMP/code.npy", "cannot read"),
    ("--teacher TMP/none.pt", "nothing"),
    ("--teacher TMP/two.pt", "b.c (4, 2)"),
    ("--teacher TMP/code.pt", "cannot read"),
    ("--teacher TMP/long.pt", "cannot read"),
    ("--teacher TMP/text.pt", "cannot read"),
    ("--out TMP/text.pt/run", "cannot write"), ("--out /proc/run", "cannot write"),
    ("--resume", "no run"),
    ("--lr 1 --lambda_recon 1e9 --clip 0 --tokenizer_steps 40", "NaN"),
]

@pytest.mark.parametrize("words, expected", BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line_and_status_2(words, expected, broken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if expected == "NaN":
        monkeypatch.setattr(train, "psnr", lambda x, y: torch.zeros(1))
        monkeypatch.setattr(train.F, "mse_loss", lambda x, y, real=F.mse_loss: real(x, y) * math.nan)
    status, said = command(monkeypatch, capsys, *FLAGS, "--out", tmp_path / "run", *words.replace("TMP", str(broken)).split())
    assert status == 2 and expected in said[-1] and said[-1].startswith("train.py: "), said
    assert not (broken / "code ran").exists()
    assert not any("Traceback" in line for line in said)
    assert expected == "NaN" or not (tmp_path / "run").exists()  # nothing was begun

@pytest.mark.parametrize("name", strange_pictures()[0])
def test_strange_pictures_are_trained_on(name, tmp_path, monkeypatch, capsys):
    save_pictures(tmp_path / "data" / "one\nclass", 3), save_pictures(tmp_path / "data" / "\u732b", 3)
    (tmp_path / "data" / "\u732b" / name).write_bytes(strange_pictures()[0][name])
    status, said = command(monkeypatch, capsys, *FLAGS, "--data", tmp_path / "data", "--tokenizer_steps", 1, "--generator_steps", 1, "--sampling_steps", 1, "--out", tmp_path / "run")
    assert status == 0 and "7 images" not in said, said
    assert sum(int(line.split()[1]) + int(line.split()[4]) for line in said if line.startswith("data: ")) == 7
    if name == "deep.png":
        picture = fid.decode([tmp_path / "data" / "\u732b" / name], 16)[0, 0].float()
        assert 100 < picture.mean() < 156  # 16 bits are scaled, not clipped

@pytest.mark.parametrize("semantic", ["global", "local"])
def test_two_images_are_enough(semantic, tmp_path, monkeypatch, capsys):
    """One to train on, one held out; of two classes, so that a classifier can be their teacher."""
    save_pictures(tmp_path / "data" / "a", 1), save_pictures(tmp_path / "data" / "b", 1, offset=9)
    status, said = command(monkeypatch, capsys, *FLAGS, "--data", tmp_path / "data", "--teacher", "convnet", "--semantic", semantic, "--out", tmp_path / "run")
    assert status == 0 and "data: 1 training and 1 held-out images, 2 classes" in "".join(said), said

@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e30", "text", ""])
@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_setting_is_in_its_range_or_refused(name, value, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--{name}", value, "--out", "nowhere"])
    try:
        _, c = train.parse()
    except BadInput as error:
        assert name in str(error) or "multiple" in str(error) or "divide" in str(error), error
        return
    kept, default = getattr(c, name), next(f.default for f in fields(Config) if f.name == name)
    assert type(kept) is type(default) and (isinstance(kept, str) or all(math.isfinite(v) and 0 <= v <= 1e9 for v in np.atleast_1d(kept)))

def spoil(run, what):
    """Damage a finished run in one way."""
    config = json.loads((run / "config.json").read_text())
    tokenizer = torch.load(run / "tokenizer.pt", weights_only=True)
    if what == "NaN":
        tokenizer["model"]["decoder.0.weight"][0, 0] = math.nan
    elif what == "keys":
        del tokenizer["model"]["decoder.0.weight"]
    elif what == "not a dict":
        tokenizer = torch.ones(3)
    elif what == "code":
        tokenizer = RunsCode(str(run / "code ran"))
    torch.save(tokenizer, run / "tokenizer.pt")
    changed = {"other preset": {**config, "channels": 16}, "type": {**config, "channels": "eight"}, "list": [1], "range": {**config, "channels": -3},
               "null": {**config, "channels": None}, "unknown": {**config, "colour": 3}, "no preset": {k: v for k, v in config.items() if k != "preset"}}
    if what in changed:
        (run / "config.json").write_text(json.dumps(changed[what]))
    if what == "text":
        (run / "config.json").write_text("{")
    if what == "torn":
        (run / "tokenizer.pt").write_bytes((run / "tokenizer.pt").read_bytes()[:-100])
    if what == "gone":
        (run / "tokenizer.pt").unlink()

@pytest.mark.parametrize("what", ["NaN", "keys", "not a dict", "code", "other preset", "type", "list", "range", "null", "unknown", "no preset", "text", "torn", "gone"])
def test_a_damaged_run_is_refused_by_sample_and_by_resume(what, finished, tmp_path, monkeypatch, capsys):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path, what)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    status, _, err = sample_command(monkeypatch, capsys, tmp_path, "--n", 1, "--out", tmp_path / "x.png")
    assert status == 2 and len(err.splitlines()) == 1 and err.startswith("sample.py: "), err
    if what != "gone":  # a run without a tokenizer simply starts again
        status, said = command(monkeypatch, capsys, "--resume", "--out", tmp_path)
        assert status == 2 and said[-1].startswith("train.py: ") and not any("Traceback" in line for line in said), said
        after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert {k: v for k, v in after.items() if k != "config.json"} == {k: v for k, v in before.items() if k != "config.json"}

def test_a_folder_with_a_run_is_not_overwritten(finished, monkeypatch, capsys):
    out, _ = finished
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for words in (FLAGS, ["--resume", "--codes_sem", 17], ["--resume", "--preset", "cifar10"]):
        status, said = command(monkeypatch, capsys, *words, "--out", out)
        assert status == 2 and len(said) == 1 and "another --out" in said[0], said
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}

def sample_command(monkeypatch, capsys, *argv):
    return script(monkeypatch, capsys, sample, *argv)

def test_sample_draws_classes_and_reconstructs(finished, tmp_path, monkeypatch, capsys):
    grids = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        status, said, _ = sample_command(monkeypatch, capsys, finished[0], "--n", 10, "--classes", 3, 5, "--steps", 2, "--guidance", 2, "--seed", seed,
                                         "--out", tmp_path / f"{name}.png")
        assert status == 0 and "10 pictures of classes 3, 5" in said
        grids.append((tmp_path / f"{name}.png").read_bytes())
    assert grids[0] == grids[1] != grids[2]
    for flag, expected in (("--reconstruct", f"{json.loads((finished[0] / 'metrics.json').read_text())['psnr']:.2f} dB"), ("--retain", "visual codes alone: a linear probe"),
                           ("--uniformity", "density_cv")):
        status, said, _ = sample_command(monkeypatch, capsys, finished[0], flag, "shapes", "--runs", 2, "--out", tmp_path / f"{flag}.png")
        assert status == 0 and expected in said
        with Image.open(tmp_path / f"{flag}.png") as picture:
            assert picture.width > 200 and len(picture.convert("RGB").getcolors(10**6)) > 5

def test_samples_as_arrays_and_their_resumption(finished, tmp_path, monkeypatch, capsys):
    words = [finished[0], "--n", 250, "--classes", 4, 1, "--steps", 1, "--out"]
    assert sample_command(monkeypatch, capsys, *words, tmp_path / "whole.npz")[0] == 0
    whole = np.load(tmp_path / "whole.npz")
    assert whole.files == ["arr_0", "labels"] and whole["arr_0"].shape == (250, 16, 16, 3) and whole["arr_0"].dtype == np.uint8
    assert whole["labels"].tolist() == [4, 1] * 125
    real, calls = XAR.sample, []

    def stop(self, *args):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(XAR, "sample", stop)
    assert sample_command(monkeypatch, capsys, *words, tmp_path / "again.npz")[0] == 130 and not (tmp_path / "again.npz").exists()
    part = next(tmp_path.glob(".again.npz.*"))
    part.write_bytes(part.read_bytes() + b"half a batch")
    assert sample_command(monkeypatch, capsys, *words, tmp_path / "again.npz")[0] == 0
    assert calls == [100, 100, 50, 50]  # the first two batches were kept
    assert (np.load(tmp_path / "again.npz")["arr_0"] == whole["arr_0"]).all() and sorted(os.listdir(tmp_path)) == ["again.npz", "whole.npz"]

@torch.no_grad()
def test_retain_keeps_what_it_says(tmp_path, monkeypatch):
    model, x, rows = GloTok(TINY).eval(), random_images(5), {}
    monkeypatch.setattr(sample, "grid", lambda path, labelled, title: rows.update({label.split(":")[0]: images for label, images in labelled}))
    kept = []
    monkeypatch.setattr(model, "decode_latents", lambda sem, vis: kept.append((sem, vis)) or x)
    indices = torch.stack(model.encode(x), dim=1)
    sample.retain("x.png", model, glotok.to_uint8(x), indices)
    sem, vis = model.composite(*indices.unbind(1))
    assert list(rows)[1:] == [f"semantic + {k} % visual" for k in (0, 25, 50, 75, 100)] + [f"{k} % visual alone" for k in (25, 50, 75, 100)]
    for (s, v), with_sem, share in zip(kept, [1] * 5 + [0] * 4, (0, 25, 50, 75, 100, 25, 50, 75, 100)):
        assert torch.equal(s, sem * with_sem)
        whole = (v == vis).all(2)
        assert ((v == 0).all(2) | whole).all() and (whole.sum(1) == share * 64 // 100).all()  # 64 positions

def test_probe_is_ridge_regression_of_each_half(monkeypatch):
    """Images of one colour each, whose level decides class and visual codes alone; the regression solved anew by least squares."""
    torch.manual_seed(0)
    model, level = GloTok(TINY).eval(), torch.rand(400)
    images, labels = (255 * level)[:, None, None, None].expand(-1, 3, 16, 16).byte(), (level > 0.5).long()
    indices = torch.randint(len(model.codebook_sem), (400, 2, 8, 8))
    indices[:, 1] = (level * len(model.codebook_vis)).long()[:, None, None]
    monkeypatch.setattr(sample, "encode_all", lambda model, images, at, device: indices.int())
    found, n = sample.probe(model, images, labels, 300, torch.device("cpu")), 300
    for half, name, codes in ((0, "semantic", model.codebook_sem), (1, "visual", model.codebook_vis)):
        x = codes.detach()[indices[:, half]].reshape(400, -1).double().numpy()
        x = (x - x[:n].mean(0)) / x[:n].std(0, ddof=1)
        y = np.concatenate([np.eye(2)[labels], images[:, :, 0, 0].numpy()], axis=1)
        rows, targets = np.concatenate([x[:n], np.sqrt(0.3 * n) * np.eye(x.shape[1])]), np.concatenate([y[:n] - y[:n].mean(0), np.zeros((x.shape[1], 5))])
        guess = x[n:] @ np.linalg.lstsq(rows, targets, rcond=None)[0] + y[:n].mean(0)
        r2 = 1 - ((guess - y[n:])[:, 2:] ** 2).sum() / ((y[n:] - y[:n].mean(0))[:, 2:] ** 2).sum()
        assert found[name] == pytest.approx(((guess[:, :2].argmax(1) == labels[n:].numpy()).mean(), r2), abs=2e-3)
    assert found["visual"][0] > found["semantic"][0] + 0.2 and found["visual"][1] > found["semantic"][1] + 0.2  # their half decides

README = (Path(train.__file__).parent / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun --nproc_per_node=\d) ((?:train|sample|fid)\.py(?: [^`\n]*)?)[`\n]", README.replace("\\\n", ""))))

@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_of_the_readme(words, finished, tmp_path, monkeypatch, capsys):
    """sample.py's are run, on a small run; of train.py's and fid.py's the flags and values are read."""
    script, *words = re.sub(r"\$[A-Z]+", lambda name: re.search(f'^{name[0][1:]}="(.*)"$', README, re.M)[1], words.split("#")[0]).split()
    monkeypatch.chdir(tmp_path)
    if script == "sample.py" or "--resume" in words:
        folder = Path("runs/shapes" if script == "train.py" else words[0])
        folder.mkdir(parents=True)
        for file in finished[0].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    if script == "sample.py":
        words = [re.sub("FOLDER|CIFAR", "shapes", word) for word in words]
        assert sample_command(monkeypatch, capsys, *words)[0] == 0 and Path(words[words.index("--out") + 1]).exists()
    elif script == "train.py":
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        if "--help" in words:
            pytest.raises(SystemExit, train.parse)
            return
        assert isinstance(train.parse()[1], Config)
    else:
        monkeypatch.setattr(sys, "argv", ["fid.py", *words])
        looked_for = []
        monkeypatch.setattr(fid, "fetch", lambda name, **_: looked_for.append(name) or Path("not there"))
        monkeypatch.setattr(fid, "load_data", lambda *_: looked_for.append("data") or sys.exit())
        with pytest.raises((SystemExit, glotok.BadInput)) as stopped:
            fid.main()
        assert looked_for or re.search(re.escape(words[0]), str(stopped.value))

@pytest.mark.parametrize("words, expected", [
    ("nowhere", "no run"), ("RUN --classes 6", "classes 0 to 5"), ("RUN --steps 0", "sampling_steps is 0"),
    ("RUN --n 0", "--n 0"), ("RUN --out x.jpg", "x.jpg"),
    ("RUN --retain shapes --out x.npz", "x.npz"), ("RUN --retain shapes --uniformity shapes", "at most one"), ("RUN --retain nowhere", "no data at"), ("RUN --runs 0", "--runs 0"),
    *((f"RUN {flag} {value}", flag[1:].replace("-steps", "steps")) for flag in ("--n", "--seed", "--runs", "--steps", "--classes") for value in ("-1", "nan", "1e30", 10**20, "x")),
    *((f"RUN --guidance {value}", "guidance") for value in ("-1", "nan", "1e30", "x", "inf")), ("RUN --n 10001", "10,000"), ("RUN --out old.png", "exists"), ("RUN --gidance 2", "'--guidance'"), ("BARE", "--stage generator")])
def test_sample_refuses_bad_input(words, expected, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old.png").write_text("precious")
    Path("bare").mkdir()
    for name in ("config.json", "tokenizer.pt"):
        Path("bare", name).write_bytes((finished[0] / name).read_bytes())
    status, _, said = sample_command(monkeypatch, capsys, *words.replace("RUN", str(finished[0])).replace("BARE", "bare").split())
    assert status == 2 and expected in said and len(said.splitlines()) == 1 and said.startswith("sample.py: ")
    assert Path("old.png").read_text() == "precious" and sorted(os.listdir()) == ["bare", "old.png"]

def test_a_torn_checkpoint_is_refused(finished, tmp_path, monkeypatch, capsys):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 500 if path.name == "tokenizer.pt" else None])
    status, said = command(monkeypatch, capsys, "--resume", "--out", tmp_path)
    assert status == 2 and "tokenizer.pt" in said[-1] and len((tmp_path / "tokenizer.pt").read_bytes()) == 500

def test_the_process_itself_says_one_line(tmp_path):
    done = subprocess.run([sys.executable, Path(train.__file__), "--preset", "shape"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert os.listdir(tmp_path) == []

def test_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name} " in text for name in Config.__dataclass_fields__)
