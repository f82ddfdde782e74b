#!/usr/bin/env bash
# Precision and recall of two equal sets in which every point occurs more than k times (a data set
# with copies in it, or a model that repeats itself).
#
# A good guess: 1 and 1, since every point lies in the ball around its own copy.
# What happens: prdc 0.2 gives 0 for all four of its measures. A ball reaches to the k-th nearest
# other point, which is a copy at distance 0, and a point counts as inside a ball only if its distance
# is below the radius, not equal to it. (Of features that are no whole numbers rounding decides: 0.16 of
# 50 random points.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet prdc==0.2 numpy scikit-learn
"$folder/venv/bin/python" - <<'P'
import contextlib
import io

import numpy as np
from prdc import compute_prdc

once = np.random.default_rng(0).integers(-9, 10, (50, 16)).astype(float)  # distances without rounding
for copies in (1, 3, 20):
    points = np.repeat(once, copies, axis=0)
    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(points, points, nearest_k=3)
    print(copies, {name: float(value) for name, value in found.items()})
    expected = 1 if copies <= 3 else 0
    assert found["precision"] == found["recall"] == expected
P
# Seen:
#   1 {'precision': 1.0, 'recall': 1.0, 'density': 1.0, 'coverage': 1.0}
#   3 {'precision': 1.0, 'recall': 1.0, 'density': 1.0, 'coverage': 1.0}
#   20 {'precision': 0.0, 'recall': 0.0, 'density': 0.0, 'coverage': 0.0}
