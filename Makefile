# Every target makes .venv when it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: demo study test test-slow test-shapes check bench bench-merge bench-methods bench-distance bench-pretrain clean

demo: $(STAMP)
	.venv/bin/modalmerge study tiny
	@echo "report: runs/tiny/report.html"

# the grid of docs/findings.md on two cores; 75 minutes at most, then the same target goes on
STUDY := --set random_seeds=[0,1,2,3,4] --set tasks=retrieval,vqa,nlvr2,postcards,segmentation --set methods=all \
	--set variants=all --set repairs=healed,continued,recipe-healed --set finetuned=regmean,used --set grid=star \
	--set architectures=specific,attention,ffn,norms --set seed_fractions=[0,0.25,0.5,0.75] \
	--set initialisations=random,images --set finetuning_lengths=[0.25,0.5] --set length_tasks=retrieval,vqa,postcards
study: $(STAMP)
	.venv/bin/modalmerge study tiny $(STUDY) --budget 75 -o runs/study

test: $(STAMP)
	.venv/bin/python -m pytest -q

test-slow: $(STAMP)
	.venv/bin/python -m pytest -q -m slow --timeout 1800

# the tests again, with the shapes and types of every annotated call checked
test-shapes: $(STAMP)
	.venv/bin/python -m pytest -q -m "not slow and not messages" --jaxtyping-packages=modalmerge,beartype.beartype

check: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: $(STAMP)
	.venv/bin/python bench/profile_step.py

# against mergekit, on a machine that does nothing else; the files take 14 GB of memory
bench-merge: $(STAMP)
	.venv/bin/modalmerge bench merge --floor --scaling 0.5,1,2,4 --disk . -o bench/results/merge.json

# what collecting statistics costs, and merges by matrix methods at base size; likewise alone on the machine
bench-methods: $(STAMP)
	.venv/bin/modalmerge bench gram --rounds 3 -o bench/results/gram.json
	.venv/bin/python bench/methods_base_size.py -o bench/results/methods_base_size.json

# all distances against the L2 distance alone; likewise alone on the machine, the files take 8 GB of memory
bench-distance: $(STAMP)
	.venv/bin/modalmerge bench distance --scaling 0.2,0.5,1,2,4 -o bench/results/distance.json

# a pre-training step against the straight flow, at size base and, in larger batches, vit-tiny; likewise alone, 11 GB
bench-pretrain: $(STAMP)
	.venv/bin/modalmerge bench pretrain -o bench/results/pretrain.json
	for batch in 8 16 32 64; do .venv/bin/modalmerge bench pretrain --size vit-tiny --batch-size $$batch \
		-o bench/results/pretrain_vit_tiny_$$batch.json || exit; done

# torch goes first and alone: the pin takes the CPU build where the configured index offers one
$(STAMP): pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt torch
	.venv/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs
	find modalmerge tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
