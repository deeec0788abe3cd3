#!/usr/bin/env bash
# Makes the weights of sashimi_diffwave_digits from the Free Spoken Digit Dataset, scores them and
# puts them in their place. In a clone, with the environment of the README active:
#
#     bash sashimi/weights/sashimi_diffwave_digits.sh fsdd/recordings runs/diffwave
#
# What comes after the folders goes to train.py: on a GPU, this goes on from the shipped weights,
#
#     bash sashimi/weights/sashimi_diffwave_digits.sh fsdd/recordings runs/longer \
#         init_from=sashimi/weights/sashimi_diffwave_digits.safetensors max_steps=200000 batch_size=32
#
# A run that was stopped goes on where it was. Seed 1775 (train.py's), Python 3.11, PyTorch 2.13.
# score.sh says what else can be set.
set -euo pipefail
source "$(dirname "$0")/score.sh"
splits+=(peak=0.9)

python train.py model=diffwave "${splits[@]}" checkpoint_path="$run" max_steps=3387 \
    model.sample_rate=8000 model.l_max=6000 model.clip_length=6000 model.d_model=48 \
    model.n_layers=2 model.tied=true model.beta_first=2e-5 model.beta_last=0.04 \
    model.data_std=0.13 batch_size=8 start_lr=3e-3 ssm_lr=1e-3 warmup_steps=100 grad_clip=1 \
    ema=0.999 precision=bfloat16 compile=true validation_interval=500 checkpoint_interval=250 \
    "${@:3}"

publish sashimi_diffwave_digits "$run/best.safetensors"
score sashimi_diffwave_digits "$run/clips"
