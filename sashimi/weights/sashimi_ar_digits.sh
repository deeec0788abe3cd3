#!/usr/bin/env bash
# Makes the weights of sashimi_ar_digits from the Free Spoken Digit Dataset, chooses how to sample
# from them, scores them and puts them in their place. In a clone, with the environment of the
# README active:
#
#     bash sashimi/weights/sashimi_ar_digits.sh fsdd/recordings runs/ar
#
# FROM skips the first runs, and what comes after the folders goes to the last one: on a GPU, this
# goes on from the shipped weights,
#
#     FROM=sashimi/weights/sashimi_ar_digits.safetensors \
#         bash sashimi/weights/sashimi_ar_digits.sh fsdd/recordings runs/longer \
#         max_steps=200000 batch_size=32 start_lr=2e-3 compile=true
#
# A run that was stopped goes on where it was. Seed 1775 (train.py's), Python 3.11, PyTorch 2.13.
set -euo pipefail
data=$(realpath "${1:?the folder of the recordings}") run=$(realpath -m "${2:?a folder for the runs}")
cd "$(dirname "$0")/../.."
source sashimi/weights/score.sh
check_data "$data"
splits=(train_csv=splits/fsdd-train.csv valid_csv=splits/fsdd-valid.csv data_root="$data")

if [ -z "${FROM:-}" ]; then
    python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/1" max_steps=3115
    # most of the time on the words themselves: little silence after them
    python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/2" max_steps=2866 \
        init_from="$run/1/best.safetensors" precision=bfloat16 start_lr=3e-3 \
        append_silence=800 seq_len=6000
    FROM="$run/2/best.safetensors"
fi
# and at the end as much of it as there is in the clips that are generated
python train.py recipe=digits "${splits[@]}" checkpoint_path="$run/3" max_steps=451 \
    init_from="$FROM" precision=bfloat16 start_lr=1e-3 append_silence=2400 "${@:3}"

publish() {
    python -m sashimi.publish checkpoint="$run/3/best.safetensors" name=sashimi_ar_digits \
        "${splits[@]}" test_csv=splits/fsdd-test.csv licence="CC BY-SA 4.0" \
        data="Free Spoken Digit Dataset, takes 8-49 of six speakers" "$@"
}

# how to sample: 200 clips for each temperature and nucleus, judged beside the validation clips
folders=()
for temperature in 0.9 0.95 1.0 1.05; do
    for nucleus_p in 0.98 1.0; do
        folder="$run/sweep/$temperature-$nucleus_p"
        python -m sashimi.generate checkpoint="$run/3/best.safetensors" n_samples=200 n_batch=50 \
            seed=1 temperature=$temperature nucleus_p=$nucleus_p out_dir="$folder" page=false
        folders+=("$folder")
    done
done
python -m metrics.sweep samples="[$(IFS=,; echo "${folders[*]}")]" data_root="$data" \
    real_csv=splits/fsdd-valid.csv out=sashimi/weights/sashimi_ar_digits-sampling.webp

publish temperature=1.0 nucleus_p=0.98 step=6432
score sashimi_ar_digits "$data" "$run/clips"
