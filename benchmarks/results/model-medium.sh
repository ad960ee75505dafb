#!/usr/bin/env bash
# The runs behind model-medium/: MOPO and, in the model that it trained, MOReL, COMBO and MOBILE, with OfflineRL-Kit's
# arguments for each task (it has no MOReL; of MOBILE on hopper/medium it fixes the temperature), and beside them its own
# MOPO and COMBO. Tau, rates and epochs of the model are for short runs, the same in both. Observations are as they are,
# as in the kit, and so the penalties have its units. COMBO draws one action of each kind: of the kit's ten, each has its
# own logsumexp, so that one gives the same loss on average, in a tenth of the time.
set -euo pipefail
shared="--num-updates 10000 --eval-every 2000 --compile --no-normalize-observations"
shared="$shared --tau 0.02 --actor-learning-rate 1e-3 --critic-learning-rate 1e-3"
tasks=${1:-hopper/medium-expert hopper/medium halfcheetah/medium}
for task in $tasks; do
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
            python algorithms/combo.py $data --run-dir "$folder/combo" --cosine-decay --regularizer logsumexp \
                --num-samples 1 --beta $combo
            python algorithms/mobile.py $data --run-dir "$folder/mobile" --cosine-decay --penalty-coefficient $mobile \
                --min-target 0 --precision bf16
        }
    done
done
for task in $tasks; do
    kit="python benchmarks/peers/offlinerlkit_scores.py --datasets zoo/$task-v0 --num-updates 10000 --eval-every 2000
        --out runs/model-medium/kit --max-dynamics-epochs 20
        --more tau=0.02 actor-lr=1e-3 alpha-lr=1e-3 critic-lr=1e-3"
    $kit --algorithms mopo
    $kit num-repeat-actions=1 --algorithms combo
done
