#!/usr/bin/env bash
# The whole story on one machine: environment, data, training, evaluation, a sample of text.
#
#     bash single_machine.sh
#
# With wikitext-103 in data/wikitext-103 (python -m txl.data --dataset=wt103 gets it) it trains on that, by the recipe
# one_gpu where there is a GPU. Without, on a text that every Python brings along: its standard library's source code.
# Started again it goes on with an interrupted run, and begins a new one after a finished one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source environment.sh

gpu=$(python -c 'import torch; print(int(torch.cuda.is_available()))')
if [[ -e data/wikitext-103/train.txt || -e data/wikitext-103/wiki.train.tokens ]]; then
    dataset=wt103
    prompt="The"
    config=$([[ $gpu == 1 ]] && echo one_gpu || echo demo_wt103)
else
    dataset=stdlib
    prompt="def main(args"
    config=demo
    echo "No data/wikitext-103, so this trains on the source code of Python's standard library."
fi

run=$config
for ((n = 2; ; n++)); do
    grep -qs '"finished"' "runs/$run/status.json" || break
    run=$config-$n
done

python -m txl.data --dataset="$dataset"
echo
python launch.py --config="$config" --name="$run" --backend=local
echo
python -m txl.evaluate --run="runs/$run"
echo
echo "A sample:"
python -m txl.generate --run="runs/$run" --length=150 --temperature=0.6 --prompt="$prompt"

cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s.
The run is in runs/$run: recipe, plan, log, metrics and checkpoints.
Its curves:  $(command -v tensorboard) --logdir=$PWD/runs     and open http://localhost:6006
END
