#!/usr/bin/env bash
# Which term of the VQ loss beta weighs, in tokenizers of two widely used libraries. The paper that it
# comes from weighs the commitment term, which moves the encoder: with beta = 0.25 the codes learn four
# times as fast as the features follow.
#
# A good guess: that old slip, beta on the codebook's term, is mended in libraries of today, or there
# is a setting for it.
# What happens: diffusers' VectorQuantizer has the setting (legacy), and its VQModel neither passes it
# on nor lets a config set it: its beta weighs the codebook's term. So does that of the tokenizers of
# Chameleon and Janus in transformers, which have no such setting at all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy diffusers==0.42.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'P'
import inspect

import torch
from diffusers import VQModel
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAEVectorQuantizer
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEVectorQuantizer

torch.manual_seed(0)
model = VQModel(
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    block_out_channels=(32,),
    latent_channels=8,
    num_vq_embeddings=64,
)
assert "legacy" not in inspect.signature(VQModel.__init__).parameters
quantizers = {
    "diffusers VQModel": model.quantize,
    "transformers Chameleon": ChameleonVQVAEVectorQuantizer(
        ChameleonVQVAEConfig(embed_dim=8, num_embeddings=64)
    ),
    "transformers Janus": JanusVQVAEVectorQuantizer(JanusVQVAEConfig(embed_dim=8, num_embeddings=64)),
}
for name, quantizer in quantizers.items():
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(64, 8, 1, 1, requires_grad=True)
    _, loss, *_ = quantizer(z)
    loss.backward()
    # one vector alone moves its code, or several do: the sums of both gradients are opposite
    of_features = z.grad.sum((0, 2, 3))
    of_codes = quantizer.embedding.weight.grad.sum(0)
    ratio = -(of_features / of_codes).median().item()
    print(f"{name}: beta {quantizer.beta}, features' gradient {ratio:.2f} times the codes'")
    assert abs(ratio - 4) < 0.01  # as in the paper it would be 0.25
P
# Seen:
#   diffusers VQModel: beta 0.25, features' gradient 4.00 times the codes'
#   transformers Chameleon: beta 0.25, features' gradient 4.00 times the codes'
#   transformers Janus: beta 0.25, features' gradient 4.00 times the codes'
