#!/usr/bin/env bash
# Everything that wants a GPU, in under 25 minutes:      bash bench/gpu.sh OUT [DATA_ROOT]
#
# OUT        a folder for logs and figures; a line of each measurement goes to OUT/summary.txt too.
# DATA_ROOT  holds cifar-10-batches-py; without it the parts that need CIFAR-10 are left out.
# To try it on a CPU with tiny settings: TINY=1 bash bench/gpu.sh OUT
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?the folder for the figures}") root=${2:-}
python=${PYTHON:-python}
mkdir -p "$out"
export XDG_CACHE_HOME="$out/cache"

size32="--image-size 32 --batch-size 512 --width 64" size128="--image-size 128 --stem imagenet --batch-size 256 --width 64"
steps=200 quick="" minutes=10 tests="" target=90 race="--epochs 100 --batch-size 512 --lr 0.06"
if [ -n "${TINY:-}" ]; then
    size32="--image-size 32 --batch-size 64 --width 8" size128="--image-size 64 --stem imagenet --batch-size 16 --width 8"
    steps=4 quick="--quick" minutes=1 tests="-k test_augment" target=30 race="--width 8 --epochs 2"
fi

say() { echo "$*" | tee -a "$out/summary.txt"; }
try() {  # try NAME SECONDS COMMAND...: its output to OUT/NAME.log; a failure is said and does not stop the rest
    local name=$1 limit=$2 began=$SECONDS; shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || say "$name: FAILED, exit code $? (see $name.log)"
    say "$name: $((SECONDS - began)) s"
}
last() {  # last RUN FIELD: a figure of the last line of its metrics
    $python -c "import common, sys; print(common.read_metrics(sys.argv[1])[-1][sys.argv[2]])" "$out/$1" "$2" 2> /dev/null
}

say "$($python -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')")"
say "commit $(git rev-parse --short HEAD 2> /dev/null)"

# Does all run there?
try tests 240 $python -m pytest -q -x $tests tests/test_augment.py tests/test_resume.py tests/test_distributed.py

# Images a second at both sizes, with and without DistributedDataParallel, and compiled.
for method in simsiam moco simclr rotnet; do
    for kind in "32 $size32" "128 $size128"; do
        set -- $kind; px=$1; shift
        try $method-$px 90 $python $method.py "$@" --max-steps $steps --knn-every 0 --out "$out/$method-$px"
        say "$method $px px: $(last $method-$px images_per_second) images/s"
    done
    try $method-ddp 90 torchrun --nproc_per_node=1 $method.py $size32 --max-steps $steps --knn-every 0 \
        --out "$out/$method-ddp"
    say "$method 32 px, DDP with one process: $(last $method-ddp images_per_second) images/s"
done
try simclr-compile 120 $python simclr.py $size32 --max-steps $steps --knn-every 0 --compile --out "$out/simclr-compile"
say "simclr 32 px, --compile, compilation included: $(last simclr-compile images_per_second) images/s"

# The share of a step that is not the network; losses, kNN, optimisers.
set -- $size32
try bench 240 $python bench/run.py $quick --only losses knn optimizer training --batch "$4" --width "$6" \
    --json "$out/bench.json"

# The race on CIFAR-10.
if [ -n "$root" ]; then
    try race $((minutes * 60)) $python bench/race.py --target $target --out "$out/race" -- \
        simclr.py --data cifar10 --data-root "$root" --knn-split test $race
    tail -n 3 "$out/race.log" | tee -a "$out/summary.txt"
fi
say "all: $SECONDS s"
