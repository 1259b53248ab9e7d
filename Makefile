# Names only: what each target does stands in tools/, in CMakeLists.txt and in setup.py.
.PHONY: build test demo lab wheel asan tsan bundle docs fuzz-long chaos parity-random bench-cpu gpu-test clean

build: ## the engine, the extension and the package, installed in .venv
	@tools/build

test: ## every check and every test
	@tools/test

demo: build ## the main job: two stages of training on the standard library's source
	@.venv/bin/python -m pantheraml.lessons.demo

lab: build ## JupyterLab on the first notebook
	@tools/bootstrap lab
	@.venv/bin/jupyter lab --allow-root notebooks/01-first-run.ipynb

wheel: ## dist/: one self-contained wheel
	@tools/wheel

asan: ## unit and protocol tests under the address and undefined-behaviour sanitizers
	@tools/asan

tsan: ## unit, protocol and two-worker tests under the thread sanitizer
	@tools/tsan

bundle: ## the panel's TypeScript into its Python package
	@tools/bundle

docs: build ## site/: the guides and the API reference
	@tools/bootstrap docs
	@.venv/bin/mkdocs build --quiet --strict

fuzz-long: ## every fuzz target for an hour (five hours in all, two at a time)
	@tools/fuzz 3600

chaos: build ## every campaign against kills, power cuts, full disks, flipped bits; SHORT=1 takes a minute
	@tools/build -DPML_TESTS=ON
	@SHORT=$(SHORT) tools/chaos/run

parity-random: build ## random cases against transformers; PEER=… is a Python with torch, transformers, peft; SEEDS=1-100
	@tools/build -DPML_TESTS=ON
	@.venv/bin/python tools/try_parity.py --peer $(PEER) --seeds $(SEEDS)

bench-cpu: build ## tokens per second on the CPU; PEER=… is a Python with torch, transformers and peft
	@.venv/bin/python tools/bench/cpu.py --peer-python $(PEER)

gpu-test: ## the CUDA backend against the CPU, on a machine with a GPU
	@tests/gpu/run

clean: ## everything that was built; not .venv and not runs
	@rm -rf build dist site ext/pantheraml/bin ext/pantheraml/_native.abi3.so *.egg-info
