#!/usr/bin/env bash
# Proves the kernels on the GPU at hand and measures them, with the PyTorch that is installed and without a network.
#   scripts/gpu_check.sh [--out DIR] [--quick] [--stages A,B] [--networks A,B] [--dry-run]
# Needs nvcc and, for this Python (PYTHON, default python3): torch, setuptools, ninja, pybind11, typer, rich, pytest, pytest-timeout,
# pytest-benchmark, numpy, and torchvision for the stages fuse and autotune, whose networks --networks names. Installs pyops into it
# from this checkout (editable, for this GPU alone). Exit status: 0 all stages passed, 1 one failed or ran out of time, 2 wrong
# usage, 3 no GPU.
set -uo pipefail

STAGES=(build tests ops memcheck racecheck microbench bench compile fuse autotune report)
declare -A WHAT=(
  [build]="compile the extension for this GPU and install it"
  [tests]="tests/gpu: every path of every kernel, CUDA graphs, streams, second GPU, compile"
  [ops]="tests/test_ops.py and test_gradients.py on the cuda and triton backends"
  [memcheck]="compute-sanitizer memcheck, each kernel on small odd shapes"
  [racecheck]="compute-sanitizer racecheck, the same"
  [microbench]="ceilings of this GPU: bandwidth, matmul, launches, barriers, exchanges"
  [bench]="every op against the baselines that are installed"
  [compile]="every op against torch.compile"
  [fuse]="networks of torchvision after pyops.fuse, bfloat16, channels_last, against eager PyTorch"
  [autotune]="the same against torch.compile(max-autotune), minutes a network: name a few with --networks"
  [report]="report page, results.json and summary.md"
)
# Seconds a stage may take. --quick keeps to three minutes in all, whatever a stage would like.
declare -A LIMIT=([build]=590 [tests]=590 [ops]=590 [memcheck]=590 [racecheck]=590 [microbench]=240 [bench]=590 [compile]=590
  [fuse]=590 [autotune]=590 [report]=120)
declare -A QUICK=([build]=90 [tests]=30 [ops]=20 [memcheck]=25 [racecheck]=25 [microbench]=30 [bench]=40 [compile]=0 [fuse]=0
  [autotune]=0 [report]=15)
QUICK_SECONDS=160 # leaves time to end the last stage and to write the summary
REPORT_SECONDS=12 # kept back for the report in a quick run

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  echo "stages:"
  for stage in "${STAGES[@]}"; do printf '  %-11s at most %3d s, quick %3d s: %s\n' "$stage" "${LIMIT[$stage]}" "${QUICK[$stage]}" "${WHAT[$stage]}"; done
}

die() {
  echo "gpu_check: $2" >&2
  exit "$1"
}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT="" NETWORKS="" QUICK_RUN=0 DRY_RUN=0 WANTED=("${STAGES[@]}")
while (($#)); do
  case $1 in
    --out) OUT=${2:?--out needs a folder} && shift 2 ;;
    --quick) QUICK_RUN=1 && shift ;;
    --stages) IFS=, read -r -a WANTED <<<"${2:?--stages needs a list}" && shift 2 ;;
    --networks) NETWORKS=${2:?--networks needs a list} && shift 2 ;;
    --dry-run) DRY_RUN=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    *) die 2 "unknown option $1; see --help" ;;
  esac
done
for stage in "${WANTED[@]}"; do
  [[ -n ${WHAT[$stage]:-} ]] || die 2 "--stages: expected ${STAGES[*]}, got '$stage'"
done
if ((DRY_RUN)); then
  for stage in "${WANTED[@]}"; do
    limit=${LIMIT[$stage]}
    ((QUICK_RUN)) && limit=${QUICK[$stage]}
    printf '%-11s %3d s  %s\n' "$stage" "$limit" "${WHAT[$stage]}"
  done
  exit 0
fi

OUT=${OUT:-gpu-check-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$OUT/logs" "$OUT/bench" || die 2 "cannot write to $OUT"
OUT=$(cd "$OUT" && pwd)
HELPER="$ROOT/scripts/gpu_report.py"
"$PYTHON" "$HELPER" facts >"$OUT/facts.json" || exit 3
CAPABILITY=$("$PYTHON" "$HELPER" capability "$OUT/facts.json") # 9.0
ARCH="sm_${CAPABILITY/./}"
TORCH_ARCH=$CAPABILITY
[[ $CAPABILITY == 9.0 ]] && ARCH=sm_90a && TORCH_ARCH=9.0a
NVCC=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
cd "$ROOT" || exit 2

# ------------------------------------------------------------------------------------------------------------------ the stages

stage_build() {
  TORCH_CUDA_ARCH_LIST=$TORCH_ARCH PYOPS_BUILD=cuda NVCC_APPEND_FLAGS="-lineinfo ${NVCC_APPEND_FLAGS:-}" \
    "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps -v -e . && "$PYTHON" -m pyops env
}

stage_tests() {
  if ((QUICK_RUN)); then "$PYTHON" -m pytest -q tests/gpu/test_execution.py -k "plain and float32 and not compile"
  else "$PYTHON" -m pytest -q tests/gpu; fi
}

stage_ops() {
  if ((QUICK_RUN)); then "$PYTHON" -m pytest -q tests/test_ops.py -k "test_forward and (cuda or triton) and plain"
  else "$PYTHON" -m pytest -q tests/test_ops.py tests/test_gradients.py -k "cuda or triton"; fi
}

# The kernels as the build stage compiled them, with a driver that needs no PyTorch: a sanitizer slows down little else.
build_memory_check() {
  local objects=() source
  for source in csrc/*/*.cu; do objects+=("build/cuda/${source#csrc/}.o"); done
  "$NVCC" -std=c++17 -O2 -lineinfo "-arch=$ARCH" tests/host_execution/memory_check.cu "${objects[@]}" -o "$OUT/memory_check"
}

stage_sanitizer() {
  command -v compute-sanitizer || { echo "compute-sanitizer is not on PATH: it comes with the CUDA toolkit" && return 1; }
  build_memory_check || return
  local case=() # path, cell, dtype
  ((QUICK_RUN)) && case=(1 0 2)
  compute-sanitizer --tool "$1" --error-exitcode 9 "$OUT/memory_check" "${case[@]}" || return
  ((QUICK_RUN)) && return
  # the convolution family's kernels have no such driver yet: small tests that reach each of them, through PyTorch
  compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m pytest -q tests/test_depthwise.py tests/test_channel_ops.py \
    tests/test_pointwise_ops.py tests/test_dense_ops.py tests/test_expand_depthwise.py -k "cuda and (integers or layout or slices or 2x20x5x3)"
}
stage_memcheck() { stage_sanitizer memcheck; }
stage_racecheck() { stage_sanitizer racecheck; }

stage_microbench() {
  local quick=()
  ((QUICK_RUN)) && quick=(--quick)
  "$NVCC" -std=c++17 -O3 "-arch=$ARCH" scripts/gpu_microbench.cu -o "$OUT/gpu_microbench" || return
  "$OUT/gpu_microbench" "${quick[@]}" | tee "$OUT/microbench.jsonl" && "$PYTHON" "$HELPER" ceilings | tee -a "$OUT/microbench.jsonl"
}

# One name after another, each with its share of the stage's time and a file of its own: what is done stays.
run_benches() { # suffix of the files, baselines, names, pytest's arguments with NAME in a name's place
  local suffix=$1 peers=$2 names name left share failed=0 end=$((SECONDS + STAGE_LIMIT - 15))
  read -r -a names <<<"$3"
  shift 3
  ((${#names[@]})) || return 1
  local remaining=${#names[@]}
  for name in "${names[@]}"; do
    left=$((end - SECONDS)) share=$(((end - SECONDS) / remaining)) remaining=$((remaining - 1))
    ((left > 5)) || { echo "$name: not run, no time left" && failed=1 && continue; }
    # an interrupted pytest still writes what it has
    timeout --foreground --signal=INT --kill-after=10 "$share" "$PYTHON" -m pytest -q "${@//NAME/$name}" --bench-peers "$peers" \
      --benchmark-json "$OUT/bench/$name$suffix.json" || { echo "$name: exit status $?" && failed=1; }
  done
  return $failed
}
bench_ops() { # suffix, baselines, more options
  local names
  names=$("$PYTHON" "$HELPER" ops) || return
  run_benches "$1" "$2" "$names" bench -k "[NAME-" "${@:3}"
}
bench_networks() { # suffix, baselines, more options
  local names=${NETWORKS//,/ }
  [[ $names ]] || names=$("$PYTHON" -c 'from bench.bench_fuse import NETWORKS; print(*NETWORKS)') || return
  run_benches "$1" "$2" "$names" bench/bench_fuse.py --bench-models NAME -k bfloat16 "${@:3}"
}

stage_bench() {
  local peers
  peers=$("$PYTHON" "$HELPER" baselines) || return
  if ((QUICK_RUN)); then # all in one process: starting one takes seconds
    timeout --foreground --signal=INT --kill-after=3 $((STAGE_LIMIT - 4)) "$PYTHON" -m pytest -q bench -k "forward and bfloat16" \
      --bench-peers "$peers" --benchmark-json "$OUT/bench/quick.json" --bench-rounds 3
  else bench_ops "" "$peers" --bench-seconds 2; fi
}
stage_compile() { bench_ops .compile "torch.compile,torch.compile sdpa" --bench-seconds 1; }
stage_fuse() { bench_networks .fuse torch.nn --bench-seconds 2; }
stage_autotune() { bench_networks .autotune "torch.compile max-autotune" --bench-seconds 1; }

stage_report() {
  local files=() file
  for file in "$OUT"/bench/*.json; do [[ -s $file ]] && files+=("$file"); done
  if ((${#files[@]})); then "$PYTHON" -m pyops report "${files[@]}" --out "$OUT/report"
  else echo "no benchmark results: no report page"; fi
}

# ------------------------------------------------------------------------------------------------------- running and recording

export -f stage_build stage_tests stage_ops stage_sanitizer stage_memcheck stage_racecheck stage_microbench stage_bench stage_compile \
  stage_fuse stage_autotune stage_report build_memory_check run_benches bench_ops bench_networks
export ROOT PYTHON OUT NETWORKS QUICK_RUN HELPER ARCH TORCH_ARCH NVCC

printf 'stage\tstatus\tseconds\tlimit\n' >"$OUT/stages.tsv"
failures=0
for stage in "${WANTED[@]}"; do
  limit=${LIMIT[$stage]} status=passed
  if ((QUICK_RUN)); then
    left=$((QUICK_SECONDS - SECONDS))
    [[ $stage == report ]] || left=$((left - REPORT_SECONDS))
    limit=$((QUICK[$stage] < left ? QUICK[$stage] : left))
  fi
  began=$SECONDS
  if ((limit <= 0)); then
    ((QUICK_RUN && QUICK[$stage] == 0)) && status="left out of a quick run" || status="not run, no time left"
  else
    printf '%-11s ' "$stage"
    STAGE_LIMIT=$limit timeout --kill-after=5 "$limit" bash -uo pipefail -c "stage_$stage" >"$OUT/logs/$stage.log" 2>&1
    code=$?
    case $code in
      0) ;;
      124 | 137) status="out of time" ;;
      *) status="failed" ;;
    esac
    printf '%s, %d s\n' "$status" $((SECONDS - began))
    [[ $status == passed ]] || tail -n 5 "$OUT/logs/$stage.log" | sed 's/^/  | /'
  fi
  [[ $status == passed || $status == left* ]] || failures=$((failures + 1))
  printf '%s\t%s\t%d\t%d\n' "$stage" "$status" $((SECONDS - began)) "$limit" >>"$OUT/stages.tsv"
done
"$PYTHON" "$HELPER" summary "$OUT" && echo "results: $OUT/summary.md, $OUT/results.json, $OUT/logs"
((failures == 0))
