#!/usr/bin/env bash
# The runs behind two-ways-five/: five seeds of every script for continuous actions, with small networks.
# The arguments are much as in tests/test_learning.py; two-ways-five/ is the folders' rows in one file.
set -euo pipefail
run() {  # run <folder> <num_updates> <algorithm>... -- <arguments>
    folder="$1" updates="$2"
    shift 2
    algorithms=()
    while [ "$1" != "--" ]; do algorithms+=("$1"); shift; done
    python -m benchmarks.run --algorithms "${algorithms[@]}" --datasets anchorl/two-ways/mixed-v0 --seeds 5 --workers 1 \
        --out "runs/two-ways/$folder" "$@" --num-updates "$updates" --eval-every $((updates / 5)) \
        --hidden-dims 64 64 --batch-size 128 || true  # a run that ends with an error is a row, too
}
fast="--gamma 0.95 --reward-scale 0.1 --actor-learning-rate 1e-3"
critic="--critic-learning-rate 1e-3 --tau 0.02" value="--value-learning-rate 1e-3"
vae="--vae-hidden-dims 64 64 --num-target-actions 5 --num-acting-actions 20"
dynamics="--dynamics-hidden-dims 64 64 --dynamics-batch-size 256 --max-dynamics-epochs 30 --num-models 3 --num-elites 2"
rollouts="--rollout-batch-size 2000 --rollout-every 250"
# shellcheck disable=SC2086  # these are lists of arguments
{
    run clones 1500 bc "bc --top-fraction 0.1" -- --learning-rate 1e-3
    run idql 4000 idql -- $fast $critic $value --flow-hidden-dims 64 64 --num-acting-actions 32
    run td3_bc 1500 td3_bc -- $fast $critic
    run bcq 1500 bcq -- $fast $critic $vae
    run fql 1500 fql -- $fast $critic --flow-learning-rate 1e-3 --num-acting-actions 10
    run values 1500 iql sql xql -- $fast $critic $value
    run actors 1500 awac sac_bc rebrac -- $fast $critic
    run awr 1500 awr -- $fast $value --returns-every 250
    run edac 1500 edac -- $fast $critic --num-critics 5
    run cql 1500 cql -- $fast $critic --num-samples 4 --cql-alpha 0.5
    run bear 1500 bear -- $fast $critic --alpha-learning-rate 1e-2 --threshold 0.1 --warm-start 300 $vae
    run models 1500 mopo combo morel -- $fast $critic $dynamics $rollouts
    run mobile 1500 mobile -- $fast $critic $dynamics $rollouts --num-samples 2
    run mve 1500 mve -- $fast $critic $dynamics
    run diffusion_ql 3000 diffusion_ql -- $fast $critic --eta 0.03 --actor-tau 0.02 --num-acting-actions 20
    run cal_ql 1500 cal_ql -- $fast $critic --num-samples 4 --cql-alpha 0.5
    run naf 1500 naf -- --gamma 0.95 --reward-scale 0.1 $critic
    run transformer 1500 decision_transformer -- --context-length 5 --learning-rate 2e-3 --warmup-updates 100 --dropout 0
    run pets 1500 pets -- --population 32 --num-best 5
}
