#!/usr/bin/env bash
# Two processes train a small GPT with sharded Muon on the Python standard library's sources, then with AdamW: tables, a page, a picture.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<USAGE
usage: bash launch/quickstart.sh [--steps N] [--data FILE] [--nproc N] [--out DIR] [--setup-only]

  --steps N      steps of each of the two runs (default 100)
  --data FILE    text to train on (default: the Python standard library's sources)
  --nproc N      processes (default 2)
  --out DIR      where both runs go, and report.html, a page about them (default runs/quickstart)
  --setup-only   make or complete .venv, run nothing
USAGE
}

steps=100 nproc=2 out="runs/quickstart" data="" setup_only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --steps | --data | --nproc | --out)
            [ $# -ge 2 ] || { usage >&2; fail "$1 needs a value"; }
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        --setup-only) setup_only=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
done
[[ "$steps" =~ ^[1-9][0-9]*$ ]] || fail "--steps must be a positive number, got '$steps'"
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "--nproc must be a positive number, got '$nproc'"
[ -z "$data" ] || [ -f "$data" ] || fail "--data $data is not a file"
[ -z "$data" ] || [ "$(wc -c <"$data")" -ge 513 ] || fail "--data $data is too short: two windows of 256 bytes, one to train on and one held out, need 513 bytes"

prepare_environment plot
[ -z "$setup_only" ] || { echo "ready: $VENV"; exit 0; }

choose_threads "$nproc"
arguments=(--steps "$steps" --batch $((4 * nproc)) --save-every 0)
[ -z "$data" ] || arguments+=(--data "$data")
for optimizer in muon_dist adamw; do
    echo
    "$VENV/bin/python" -m torch.distributed.run --standalone --nproc_per_node "$nproc" \
        "$ROOT/launch/train_gpt.py" "${arguments[@]}" --optimizer "$optimizer" --out "$out/$optimizer"
done
echo
"$VENV/bin/muon-dist" report "$out/muon_dist" "$out/adamw" --out "$out/report.html"
if [ -f "$out/muon_dist/spectrum.jsonl" ]; then
    printf '\nwhat each matrix got, as measured last:\n'
    "$VENV/bin/muon-dist" spectrum "$out/muon_dist" --picture "$out/spectrum.png"
fi
