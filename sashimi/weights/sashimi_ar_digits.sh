#!/usr/bin/env bash
# Makes the weights of sashimi_ar_digits from the Free Spoken Digit Dataset, chooses how to sample
# from them, scores them and puts them in their place. In a clone, with the environment of the
# README active:
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

before=("${FROM:-}")  # the weights that the last run starts from, and theirs
if [ -z "${FROM:-}" ]; then
    python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/1" max_steps=3115 "${@:3}"
    # most of the time on the words themselves: little silence after them
    python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/2" max_steps=2866 \
        init_from="$run/1/best.safetensors" precision=bfloat16 start_lr=3e-3 \
        append_silence=800 seq_len=6000 "${@:3}"
    before=("$run/1/best.safetensors" "$run/2/best.safetensors")
fi
# and at the end as much of it as there is in the clips that are generated
python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/3" max_steps=451 \
    init_from="${before[-1]}" precision=bfloat16 start_lr=1e-3 append_silence=2400 "${@:3}"

# how to sample: clips for each temperature and nucleus, judged beside the validation clips
folders=()
for temperature in ${TEMPERATURES:-0.9 0.95 1.0 1.05}; do
    for nucleus_p in 0.98 1.0; do
        folder="$run/sweep/$temperature-$nucleus_p"
        python -m rawaudio.generate checkpoint="$run/3/best.safetensors" \
            n_samples=$((clips / 5)) n_batch=50 seed=1 out_dir="$folder" page=false \
            temperature=$temperature nucleus_p=$nucleus_p
        folders+=("$folder")
    done
done
python -m metrics.sweep samples="[$(IFS=,; echo "${folders[*]}")]" data_root="$data" \
    real_csv="$csv-valid.csv" out="$out/sashimi/weights/sashimi_ar_digits-sampling.webp"

publish sashimi_ar_digits "$run/3/best.safetensors" temperature=1.0 nucleus_p=0.98 \
    before="[$(IFS=,; echo "${before[*]}")]"
score sashimi_ar_digits "$run/clips"
