#!/usr/bin/env bash
# The runs behind mujoco-model.csv: COMBO and, in the model that it trained, MOPO with its penalty and, on medium, without.
# The arguments were chosen on seed 0 of the medium datasets.
set -euo pipefail
shared="--compile --num-updates 50000 --eval-every 10000 --tau 0.02 --actor-learning-rate 1e-3 --critic-learning-rate 1e-3"
for seed in 0 1 2; do
    for task in hopper/medium halfcheetah/medium hopper/medium-expert; do
        rollouts="--rollout-length 20 --rollout-batch-size 12500" combo="--cosine-decay" mopo="" penalties="20"
        if [ "$task" = halfcheetah/medium ]; then
            rollouts="--target-entropy -30 --cosine-decay" combo="" mopo="--real-ratio 0.5" penalties="5"
        fi
        [ "$task" = hopper/medium-expert ] || penalties="$penalties 0"
        data="--dataset-id zoo/$task-v0 --seed $seed" folder="runs/model/$task-$seed"
        # shellcheck disable=SC2086  # these are lists of arguments
        python algorithms/combo.py $data --run-dir "$folder/combo" --beta 5 $rollouts $combo $shared
        for lambda in $penalties; do
            # shellcheck disable=SC2086
            python algorithms/mopo.py $data --run-dir "$folder/mopo-$lambda" --dynamics "$folder/combo" \
                --penalty ensemble_std --penalty-coefficient $lambda $rollouts $mopo $shared
        done
    done
done
