# The commands of a working day. Each uses the environment that the scripts make.
.PHONY: check smoke bench

check:                       ## lint, types, and the tests that take no more than a minute
	bash run_tests.sh -m "not slow"

smoke:                       ## the smallest config on two machines that are both this one
	bash -c 'source environment.sh && python launch.py --config=tiny --name=smoke-$$(date +%s) --machines=2'

bench:                       ## tokens per second here, a row for benchmarks/train.md
	bash -c 'source environment.sh && python -m benchmarks.train --config=demo'
