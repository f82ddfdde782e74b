#!/usr/bin/env bash
# What becomes of codes that no input chooses, in a codebook that follows its inputs by a moving average.
#
# A good guess: they stay where they are. A code is the average of its inputs' sum over the average of
# their number; without inputs both shrink by the same factor, and the ratio stays.
# What happens: by vector-quantize-pytorch's defaults they shrink to zero within 200 steps. The number
# alone is smoothed, so that it stops shrinking, and the sum goes on; and the threshold that would revive
# such codes is off by default. With use_cosine_sim the codebook is then no longer on the unit sphere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy vector-quantize-pytorch==1.32.0
"$folder/venv/bin/python" - <<'P'
import torch
from vector_quantize_pytorch import VectorQuantize

torch.manual_seed(0)
x = 1 + 0.1 * torch.randn(4, 16, 8)  # near one another: one code serves all
for cosine in (False, True):
    quantizer = VectorQuantize(dim=8, codebook_size=64, use_cosine_sim=cosine).train()
    before = quantizer.codebook.norm(dim=-1)
    for _ in range(200):
        quantizer(x + 0.01 * torch.randn_like(x))
    after = quantizer.codebook.norm(dim=-1)
    few = (after < 1e-6 * before.min()).sum().item()
    print(f"use_cosine_sim {cosine}: {few} of 64 codes shorter than 1e-6 of the shortest at first")
    assert few > 50
P
# Seen:
#   use_cosine_sim False: 63 of 64 codes shorter than 1e-6 of the shortest at first
#   use_cosine_sim True: 63 of 64 codes shorter than 1e-6 of the shortest at first
