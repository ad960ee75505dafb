#!/usr/bin/env bash
# The runs behind model-medium/: MOPO and, in the model that it trained, MOReL, MOBILE and COMBO, with OfflineRL-Kit's
# arguments for each task (it has no MOReL), but for tau and rates, which are for runs as short as these, and fewer epochs
# of the model. So have its own MOPO and COMBO beside them, of
#   python benchmarks/peers/offlinerlkit_scores.py --algorithms mopo combo --num-updates 10000 --eval-every 2000 \
#       --max-dynamics-epochs 20 --more tau=0.02 actor-lr=1e-3 alpha-lr=1e-3 critic-lr=1e-3
set -euo pipefail
shared="--num-updates 10000 --eval-every 2000 --compile --precision bf16"
shared="$shared --tau 0.02 --actor-learning-rate 1e-3 --critic-learning-rate 1e-3"
for task in ${1:-hopper/medium-expert hopper/medium halfcheetah/medium}; do
    mopo=5 combo=5 mobile=1.5
    [ "$task" != halfcheetah/medium ] || mopo=0.5 combo=0.5 mobile=0.5
    for seed in 0 1 2; do
        data="--dataset-id zoo/$task-v0 --seed $seed $shared" folder="runs/model-medium/$task-$seed"
        # shellcheck disable=SC2086  # these are lists of arguments
        {
            python algorithms/mopo.py $data --run-dir "$folder/mopo" --penalty-coefficient $mopo --cosine-decay \
                --max-dynamics-epochs 20
            data="$data --dynamics $folder/mopo"
            python algorithms/morel.py $data --run-dir "$folder/morel"
            python algorithms/mobile.py $data --run-dir "$folder/mobile" --penalty-coefficient $mobile --min-target 0 \
                --cosine-decay
            python algorithms/combo.py $data --run-dir "$folder/combo" --beta $combo --regularizer logsumexp --cosine-decay
        }
    done
done
