# Sourced by the scripts beside it. What the environment may say, to try them out, or to leave the
# shipped files as they are:
#
#     OUT             folder for weights, pictures, pages and golden outputs: this clone
#     SPLITS          folder of fsdd-train.csv, fsdd-valid.csv and fsdd-test.csv: splits
#     CLIPS           clips that are scored: 1000; for each way to sample a fifth of that
#     GUIDANCES       that are tried: three to five
data=$(realpath "${1:?the folder of the recordings}")
run=$(realpath -m "${2:?a folder for the runs}")
out=$(realpath -m "${OUT:-$(dirname "$0")/../..}")
csv=$(realpath "${SPLITS:-$(dirname "$0")/../../splits}")/fsdd
splits=(train_csv="$csv-train.csv" valid_csv="$csv-valid.csv" data_root="$data")
clips=${CLIPS:-1000}
cd "$(dirname "$0")/../.."

# The recordings that the shipped weights were trained on: all 3,000, byte by byte.
expected=1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959
found=$(cd "$data" && LC_ALL=C sha256sum -- *.wav | sha256sum | cut -d ' ' -f 1)
if [ "$found" != "$expected" ]; then
    echo "note: $data holds other recordings ($found), expect other weights" >&2
fi

# Clips of the weights of that name, in a folder, scored against real ones.
score() {
    python -m rawaudio.generate model="$1" checkpoint="$out/sashimi/weights/$1.safetensors" \
        n_samples="$clips" n_batch=50 seed=0 out_dir="$2" page=false
    python -m metrics samples="$2" real_csv="$csv-train.csv" test_csv="$csv-test.csv" \
        data_root="$data" bootstrap=200 nearest=true
}

# sweep NAME WEIGHTS GUIDANCE ...: the picture of how strongly to push, unless GUIDANCES says others.
sweep() {
    local guidance folders=()
    for guidance in ${GUIDANCES:-"${@:3}"}; do
        folders+=("$run/sweep/$guidance")
        python -m rawaudio.generate checkpoint="$2" n_samples=$((clips / 5)) n_batch=50 seed=1 \
            out_dir="${folders[-1]}" page=false guidance="$guidance"
    done
    python -m metrics.sweep samples="[$(IFS=,; echo "${folders[*]}")]" data_root="$data" \
        over=guidance real_csv="$csv-valid.csv" out="$out/sashimi/weights/$1-sampling.webp"
}

# publish NAME WEIGHTS [SETTING ...]: what is shipped, from the best weights of a run.
publish() {
    python -m rawaudio.publish name="$1" checkpoint="$2" out_dir="$out" "${splits[@]}" \
        test_csv="$csv-test.csv" licence="CC BY-SA 4.0" \
        data="Free Spoken Digit Dataset, takes 8-49 of six speakers" "${@:3}"
}
