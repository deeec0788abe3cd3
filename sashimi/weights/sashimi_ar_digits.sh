#!/usr/bin/env bash
# Makes the weights of sashimi_ar_digits from the Free Spoken Digit Dataset, chooses the guidance,
# scores them and puts them in their place. In a clone, with the environment of the README active:
#
#     bash sashimi/weights/sashimi_ar_digits.sh fsdd/recordings runs/ar
#
# FROM skips the first runs, and what comes after the folders goes to every run: on a GPU, this goes
# on from the shipped weights,
#
#     FROM=sashimi/weights/sashimi_ar_digits.safetensors \
#         bash sashimi/weights/sashimi_ar_digits.sh fsdd/recordings runs/longer \
#         max_steps=200000 batch_size=32 start_lr=2e-3 compile=true
#
# A run that was stopped goes on where it was. Seed 1775 (train.py's), Python 3.11, PyTorch 2.13.
# score.sh says what else can be set.
set -euo pipefail
source "$(dirname "$0")/score.sh"
varied=("${splits[@]}" precision=bfloat16 compile=true conditions=[label,speaker] condition_lr=2e-2
    optimizer=muon start_lr=2e-3 weight_decay=0.1 gain_db=6 speed=0.08)

before=("${FROM:-}")  # the weights that the last run starts from, and theirs
if [ -z "${FROM:-}" ]; then
    python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/1" max_steps=3115 "${@:3}"
    # most of the time on the words themselves: little silence after them
    words=("${splits[@]}" precision=bfloat16 append_silence=800 seq_len=6000)
    python train.py recipe=digits "${words[@]}" checkpoint_path="$run/2" max_steps=2866 \
        init_from="$run/1/best.safetensors" start_lr=3e-3 "${@:3}"
    python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/3" max_steps=451 \
        init_from="$run/2/best.safetensors" precision=bfloat16 start_lr=1e-3 append_silence=2400 \
        "${@:3}"
    # from here on told what is said, and by whom; the rate stays, so that hours can be added
    words+=(conditions=[label,speaker] condition_lr=2e-2 compile=true)
    hours=(schedule=constant warmup_steps=100 validation_interval=250)
    python train.py recipe=digits "${words[@]}" "${hours[@]}" checkpoint_path="$run/4" max_steps=2500 \
        init_from="$run/3/best.safetensors" start_lr=1.5e-3 ssm_lr=7e-4 ema=0.998 "${@:3}"
    # the first 511 steps of these had a rate of 1.5e-3 and a shorter average
    python train.py recipe=digits "${words[@]}" "${hours[@]}" checkpoint_path="$run/5" max_steps=2250 \
        init_from="$run/4/best.safetensors" optimizer=muon start_lr=2e-3 ema=0.995 "${@:3}"
    # no clip is heard twice alike; validation, of clips as they are, says nothing about these weights
    python train.py recipe=digits "${varied[@]}" checkpoint_path="$run/6" max_steps=3090 \
        init_from="$run/5/best.safetensors" schedule=constant warmup_steps=100 ema=0.998 \
        append_silence=800 seq_len=6000 validation_interval=250 "${@:3}"
    # annealed: half of the clips are as recorded
    python train.py recipe=digits "${varied[@]}" checkpoint_path="$run/7" max_steps=3800 \
        init_from="$run/6/last.pt" ssm_lr=7e-4 warmup_steps=30 ema=0.99 augmented=0.5 \
        append_silence=2400 seq_len=8000 validation_interval=200 "${@:3}"
    # hours may be added here
    python train.py recipe=digits "${varied[@]}" checkpoint_path="$run/8" max_steps=2202 \
        init_from="$run/7/best.safetensors" schedule=constant ssm_lr=1e-3 warmup_steps=50 ema=0.998 \
        augmented=0.5 append_silence=1600 seq_len=7000 validation_interval=250 "${@:3}"
    before=("$run"/{1,2,3,4,5}/best.safetensors "$run/6/last.pt" "$run/7/best.safetensors"
        "$run/8/last.pt")
fi
# annealed, to be published; silence after the word is what a generated clip has
python train.py recipe=digits "${varied[@]}" checkpoint_path="$run/9" max_steps=7616 \
    init_from="${before[-1]}" ssm_lr=7e-4 warmup_steps=30 ema=0.99 augmented=0.5 \
    append_silence=2400 seq_len=8000 seed=3 validation_interval=300 \
    model.guided=[label] model.temperature=0.95 "${@:3}"

# how strongly to push towards what is told: judged beside the validation clips
sweep sashimi_ar_digits "$run/9/best.safetensors" 1.0 2.0 2.5 3.0 4.0

publish sashimi_ar_digits "$run/9/best.safetensors" guidance=3.0 \
    before="[$(IFS=,; echo "${before[*]}")]"
score sashimi_ar_digits "$run/clips"
