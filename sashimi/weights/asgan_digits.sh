#!/usr/bin/env bash
# Makes the weights of asgan_digits from the Free Spoken Digit Dataset, scores them and puts them in
# their place. In a clone, with the environment of the README active:
#
#     bash sashimi/weights/asgan_digits.sh fsdd/recordings runs/asgan
#
# FROM starts the generator from weights, and what comes after the folders goes to the run. A run
# that was stopped goes on where it was. Seed 1775 (train.py's), Python 3.11, PyTorch 2.13.
# score.sh says what else can be set.
set -euo pipefail
source "$(dirname "$0")/score.sh"
splits+=(peak=0.9)

python train.py recipe=asgan-digits conditions=[label,speaker] "${splits[@]}" \
    checkpoint_path="$run/1" max_steps=9000 ${FROM:+init_from="$FROM"} "${@:3}"

publish asgan_digits "$run/1/best.safetensors" before="[${FROM:-}]" most=0.3
score asgan_digits "$run/clips"
