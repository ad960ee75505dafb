#!/usr/bin/env bash
# The runs behind online/: what acting a little gives. A folder for the scripts that go on from offline, one for RLPD,
# whose arguments are others, and one for SAC, which has no data.
set -euo pipefail
network="--hidden-dims 64 64 --tau 0.02 --actor-learning-rate 1e-3 --critic-learning-rate 1e-3"
tenth="--validation-fraction 0.9"  # a tenth of the episodes, the same for all seeds
# shellcheck disable=SC2086  # these are lists of arguments
{
    python -m benchmarks.run --seeds 5 --workers 1 --out runs/acting/pendulum/on \
        --algorithms "iql --value-learning-rate 1e-3" td3_bc awac "cql --cql-alpha 5" "cal_ql --cql-alpha 5" \
        -- $network $tenth --num-updates 2000 --online-steps 5000 --eval-every 250
    python -m benchmarks.run --seeds 5 --workers 2 --out runs/acting/pendulum/rlpd --algorithms rlpd \
        -- $network $tenth --random-steps 250 --updates-per-step 5 --num-updates 23750 --eval-every 1250
    for seed in 0 1 2 3 4; do
        python algorithms/sac.py --seed $seed --num-updates 4000 --eval-every 250 $network --run-dir runs/acting/pendulum/sac/$seed
    done
}
# shellcheck disable=SC2086  # run is a command with arguments
for task in hopper halfcheetah; do
    run="python -m benchmarks.run --seeds 3 --workers 2 --datasets zoo/$task/medium-v0 --out runs/acting/$task-medium"
    $run/on --algorithms iql td3_bc -- --num-updates 20000 --online-steps 50000 --eval-every 1000 --compile
    $run/awac --algorithms awac -- --num-updates 20000 --online-steps 50000 --eval-every 1000 --compile --precision bf16
    # an update of CQL takes ten times as long: half the offline updates, and fewer steps
    $run/cql --algorithms cql cal_ql -- --num-updates 10000 --online-steps 20000 --eval-every 1000 --compile \
        --precision bf16
    $run/rlpd --algorithms rlpd -- --updates-per-step 2 --num-updates 40000 --eval-every 2000 --compile --precision bf16
    [ $task = hopper ] && env=Hopper-v5 || env=HalfCheetah-v5
    for seed in 0 1 2; do
        python algorithms/sac.py --env-id $env --seed $seed --num-updates 49000 --eval-every 1000 --compile \
            --precision bf16 --run-dir runs/acting/$task-medium/sac/$seed
    done
done
python -m benchmarks.measurements.online runs/acting/pendulum runs/acting/hopper-medium runs/acting/halfcheetah-medium \
    --dip 2000 --at 1000 2000 5000 20000 50000 --out benchmarks/results/online
