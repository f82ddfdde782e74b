#!/usr/bin/env bash
# Since torch 2.9 there are two kinds of switches for TF32: the older torch.*_float32_matmul_precision
# and allow_tf32, and fp32_precision on each backend.
#
# A good guess: both are views of one state, so that a library may read the older one, change it for
# a while and put it back, whatever its caller has used.
# What happens: once a caller has set the newer switch of one backend, merely reading the older one
# raises a RuntimeError. Code that saves and restores it fails in such a program alone. Setting it
# does not raise, and neither does reading the newer one after the older was set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'P'
import torch

print("torch", torch.__version__)


def read():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as error:
        return f"RuntimeError: {str(error).split(',')[0]}"


print("at first:", read())
torch.set_float32_matmul_precision("high")
newer = torch.backends.cuda.matmul.fp32_precision
print("older switch set to 'high': older reads", read() + ", newer reads", newer)
assert (read(), newer) == ("high", "tf32")

torch.set_float32_matmul_precision("highest")
torch.backends.cuda.matmul.fp32_precision = "tf32"
after = read()
print("newer switch set to 'tf32': older reads", after)
assert after.startswith("RuntimeError")
torch.set_float32_matmul_precision("highest")
print("set, not read:", torch.backends.cuda.matmul.fp32_precision)
P
# Seen, with the CPU build:
#   torch 2.13.0+cpu
#   at first: highest
#   older switch set to 'high': older reads high, newer reads tf32
#   newer switch set to 'tf32': older reads RuntimeError: PyTorch is checking the matmul precision without a specific backend name
#   set, not read: ieee
