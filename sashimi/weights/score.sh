# Sourced by the scripts beside it: 1,000 clips of a shipped model, scored against real ones.
#
#     score NAME FOLDER_OF_THE_RECORDINGS FOLDER_FOR_CLIPS

score() {
    python -m sashimi.generate model="$1" n_samples=1000 n_batch=50 seed=0 out_dir="$3" page=false
    python -m metrics samples="$3" real_csv=splits/fsdd-train.csv test_csv=splits/fsdd-test.csv \
        data_root="$2" bootstrap=200 nearest=true
}

# The recordings that the shipped weights were trained on: all 3,000, byte by byte.
check_data() {
    local found expected=1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959
    found=$(cd "$1" && LC_ALL=C sha256sum -- *.wav | sha256sum | cut -d ' ' -f 1)
    [ "$found" = "$expected" ] || echo "note: $1 holds other recordings ($found), expect other weights" >&2
}
