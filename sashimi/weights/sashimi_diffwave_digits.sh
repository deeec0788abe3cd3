#!/usr/bin/env bash
# Makes the weights of sashimi_diffwave_digits from the Free Spoken Digit Dataset, chooses the
# guidance, scores them and puts them in their place. In a clone, with the environment of the README
# active:
#
#     bash sashimi/weights/sashimi_diffwave_digits.sh fsdd/recordings runs/diffwave
#
# FROM skips the first runs, and what comes after the folders goes to every run: on a GPU, this goes
# on from the shipped weights,
#
#     FROM=sashimi/weights/sashimi_diffwave_digits.safetensors \
#         bash sashimi/weights/sashimi_diffwave_digits.sh fsdd/recordings runs/longer \
#         max_steps=200000 batch_size=32
#
# A run that was stopped goes on where it was. Seed 1775 (train.py's), Python 3.11, PyTorch 2.13.
# score.sh says what else can be set.
set -euo pipefail
source "$(dirname "$0")/score.sh"
splits+=(peak=0.9)
network=(model=diffwave model.sample_rate=8000 model.l_max=6000 model.clip_length=6000
    model.d_model=48 model.n_layers=2 model.tied=true model.beta_first=2e-5 model.beta_last=0.04
    model.data_std=0.13 batch_size=8 grad_clip=1 precision=bfloat16 compile=true)

before=("${FROM:-}")  # the weights that the last run starts from, and theirs
if [ -z "${FROM:-}" ]; then
    python train.py "${network[@]}" "${splits[@]}" checkpoint_path="$run/1" max_steps=3387 \
        start_lr=3e-3 ssm_lr=1e-3 warmup_steps=100 ema=0.999 validation_interval=500 \
        checkpoint_interval=250 "${@:3}"
    # from here on told what is said, and by whom; the rate stays, so that hours can be added
    python train.py "${network[@]}" "${splits[@]}" checkpoint_path="$run/2" max_steps=2750 \
        init_from="$run/1/best.safetensors" conditions=[label,speaker] schedule=constant \
        start_lr=1.5e-3 ssm_lr=7e-4 warmup_steps=100 ema=0.999 validation_interval=250 "${@:3}"
    # Muon from here on
    python train.py "${network[@]}" "${splits[@]}" checkpoint_path="$run/3" max_steps=4000 \
        init_from="$run/2/best.safetensors" conditions=[label,speaker] schedule=constant \
        optimizer=muon start_lr=2e-3 ssm_lr=7e-4 warmup_steps=50 ema=0.998 \
        validation_interval=250 "${@:3}"
    before=("$run"/{1,2,3}/best.safetensors)
fi
# annealed, to be published
python train.py "${network[@]}" "${splits[@]}" checkpoint_path="$run/4" max_steps=2000 \
    init_from="${before[-1]}" conditions=[label,speaker] model.guided=[label] optimizer=muon \
    start_lr=2e-3 ssm_lr=7e-4 warmup_steps=20 ema=0.99 validation_interval=250 "${@:3}"

# how strongly to push towards the label that is told: judged beside the validation clips
sweep sashimi_diffwave_digits "$run/4/best.safetensors" 2.0 3.0 4.0

publish sashimi_diffwave_digits "$run/4/best.safetensors" guidance=3.0 \
    before="[$(IFS=,; echo "${before[*]}")]"
score sashimi_diffwave_digits "$run/clips"
