#!/usr/bin/env bash
# Everything that wants a GPU, in half an hour at most, the sum of the limits; or its first four minutes, whose
# last lines are worth an issue from the owner of any GPU:
#     bash bench/gpu.sh OUT [DATA_ROOT]
#     bash bench/gpu.sh OUT --short
# or the public challenge three times (bench/race.py --final), which takes hours:
#     bash bench/gpu.sh OUT DATA_ROOT --race
#
# OUT        a new folder for logs and figures; a line of each measurement goes to OUT/summary.txt too.
# DATA_ROOT  holds cifar-10-batches-py; without it the parts that need CIFAR-10 are left out.
# To try it on a CPU with tiny settings: TINY=1 bash bench/gpu.sh OUT ...
set -uo pipefail
out=$(realpath -m "${1:?the folder for the figures}") root=${2:-} short="" challenge=${3:-}
if [ "$root" = --short ]; then short=yes root=""; fi
if [ "$root" = --race ]; then echo "the race needs DATA_ROOT: bash bench/gpu.sh OUT DATA_ROOT --race" >&2; exit 2; fi
if [ -n "$root" ]; then root=$(realpath -m "$root"); fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
if [ -e "$out/summary.txt" ]; then echo "$out: holds measurements already; name a new folder" >&2; exit 2; fi
mkdir -p "$out"
export XDG_CACHE_HOME="$out/cache"

# 200 epochs of SimCLR: 88.7 % after 5.5 minutes on an H200 (RESULTS.md).
race="--epochs 200 --lr 0.06 --compile" whole="--compile"
quick="" steps=40 target=88 best=90 minutes=7 cifar="" at32="--size 32 --batch 512 --width 64"
at128="--size 128 --batch 256 --width 64 --stem imagenet"
if [ -n "${TINY:-}" ]; then
    quick="--quick" steps=2 target=25 best=25 minutes=5 cifar="--width 4 --max-steps 4"
    at32="--size 32 --batch 16 --width 8" at128="--size 64 --batch 16 --width 8 --stem imagenet"
    race="--epochs 1 --width 4 --max-steps 20" whole=$race
fi

say() { echo "$*" | tee -a "$out/summary.txt"; }
try() {  # try NAME SECONDS COMMAND...: its output to OUT/NAME.log; a failure is said and does not stop the rest
    local name=$1 limit=$2 began=$SECONDS; shift 2
    timeout -k 20 "$limit" "$@" > "$out/$name.log" 2>&1 || say "$name: FAILED, exit code $? (see $name.log)"
    say "$name: $((SECONDS - began)) s"
}
show() { sed 's/^/    /' "$out/$1.log" | tail -n "$2" | tee -a "$out/summary.txt"; }

say "$($python -c "import platform, torch, torchvision
print('torch', torch.__version__, 'torchvision', torchvision.__version__, 'Python', platform.python_version())
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU', 'CUDA', torch.version.cuda)")"
say "commit $(git rev-parse --short HEAD 2> /dev/null)"

if [ "$challenge" = --race ]; then
    for seed in 0 1 2; do
        try race-$seed 86400 $python bench/race.py --final --target $best --out "$out/race-$seed" -- \
            simclr.py --data cifar10 --data-root "$root" --knn-split test --seed $seed $whole
        show race-$seed 5
    done
    exit
fi

# The first four minutes: does it run there; images per second of each method, the share of a step outside the
# network, peak memory.
try tests 120 $python -m pytest -k "not compiled" tests/test_gpu.py
show tests 1
try step-32 90 $python bench/run.py --quick --only training $at32 --steps $steps --json "$out/step-32.json"
show step-32 9
if [ -n "$short" ]; then say "all: $SECONDS s"; echo "For an issue: $out/summary.txt"; exit; fi
try compiled-32 150 $python bench/run.py --quick --only training $at32 --steps $steps --methods simclr simsiam rotnet \
    --compile --json "$out/compiled-32.json"
show compiled-32 6

if [ -n "$root" ]; then
    try race $((minutes * 60)) $python bench/race.py --final --target $target --out "$out/race" -- \
        simclr.py --data cifar10 --data-root "$root" --knn-split test $race
    show race 12
    # Seconds per epoch on CIFAR-10: the second of two; with DistributedDataParallel around it, too.
    for method in simsiam moco simclr rotnet; do
        for start in "$python" "$python -m torch.distributed.run --nproc_per_node=1"; do
            name=cifar-$method; [ "$start" = "$python" ] || name=$name-ddp
            try $name 40 $start $method.py --data cifar10 --data-root "$root" --epochs 2 --knn-every 2 \
                --out "$out/$name" $cifar
            say "$name: $($python - "$out/$name" <<'PYTHON'
import sys
from harness.folder import read_metrics
row = read_metrics(sys.argv[1])[-1]
print(f"{45_000 / row['images_per_second']:.2f} s per epoch of 45,000 images, {row['knn_seconds']:.2f} s per evaluation")
PYTHON
)"
        done
    done
fi

# Larger pictures; MoCo compiled, whose compilation was not seen to end yet; the parts.
try step-128 90 $python bench/run.py --quick --only training $at128 --steps $steps --json "$out/step-128.json"
show step-128 9
try compiled-moco 400 $python bench/run.py --quick --only training $at32 --steps $steps --compile --methods moco \
    --json "$out/compiled-moco.json"
show compiled-moco 2
try parts 90 $python bench/run.py $quick --only losses knn optimizer --json "$out/parts.json"
show parts 20
say "all: $SECONDS s"
