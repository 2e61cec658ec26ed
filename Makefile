# PairLoRA. `make` alone lists the verbs.
#
# The environment: .venv is created and filled from requirements.txt when it is missing or the pins
# have changed. VENV=DIR puts it elsewhere. PYTHON=/path/to/python uses that interpreter as it is
# and installs nothing.

BEFORE   ?=
AFTER    ?=
MASK     ?=
INSTANCE ?=
OUT      ?=
PROMPT   ?=
STEPS    ?=
STRENGTH ?= 1
ARGS     ?=

# A name on the command line that is not among ours is a slip, which would go unnoticed, unless it is
# one of make's or for the programs.
FREE   := BEFORE AFTER MASK INSTANCE OUT PROMPT STRENGTH MODEL RUN INPUT F ARGS
KNOWN  := $(sort $(FREE) CHANGE FUZZ PYTHON SEEDS STEPS VENV)
OTHERS := -*-% .% MAKE% GNUMAKEFLAGS MFLAGS SHELL CURDIR VPATH KILLS NO_COLOR PYTHON% TMPDIR %_proxy \
  $(addsuffix _%,CUBLAS CUDA HF LD MKL NCCL OMP PIP PYTEST PYTORCH TORCH TORCHINDUCTOR TRITON WANDB XDG)
$(foreach v,$(filter-out $(KNOWN) $(OTHERS),$(.VARIABLES)),$(if $(filter command,$(origin $(v))),\
  $(error $(v)=$(value $(v)): there is no such variable; those on the command line are $(KNOWN))))

# a $ in what the user gives is a dollar, not a variable of make's
$(foreach v,$(FREE),\
  $(if $(filter-out file undefined,$(origin $(v))),$(eval override $(v) := $$(value $(v)))))

# With no images given, everything uses the embedded scenes: their base model, 64 pairs to train on,
# 32 others to evaluate on. CHANGE= selects another of their changes. Images of the user's own, INPUT=
# too, are of a run of their own, unless CHANGE= says which.
CHANGE ?= solar
SCENES := $(if $(strip $(BEFORE)$(AFTER)$(INSTANCE)),,data/scenes/$(CHANGE))
MODEL  ?= $(if $(SCENES),scenes/base,runwayml/stable-diffusion-v1-5)
RUN    ?= $(if $(and $(SCENES),$(or $(call given,CHANGE),$(if $(call given,INPUT),,x))),runs/$(CHANGE),runs/pairs)
INPUT  ?= $(if $(SCENES),$(SCENES)/test/before,$(BEFORE))
SCENE_FLAGS := --instance_prompt "an aerial view of fields" --resolution 64 --train_batch_size 8 \
  --learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 20 \
  --lora_targets attn,ff,conv,proj --lora_rank 32 --random_flip --views 16 \
  --checkpointing_steps 100 --validation_pairs 4 --validation_epochs 25 \
  $(if $(findstring --overwrite,$(ARGS)),,--resume_from_checkpoint latest)
# A change that is random given the before image is learnt with bridge: without random scaling, as
# upscaled images would make its results soft; in fewer steps, before it overfits; and evaluated on
# several outcomes of each scene. One that the image determines is trained so long that delta comes
# nearer without the base.
ifneq ($(filter urban clearing craters,$(CHANGE)),)
  SCENE_FLAGS += --pair_objective bridge --loss mse --max_train_steps 300
  SCENE_JUDGE := --samples 4 --outcome_dirs $(foreach k,1 2 3,data/scenes/$(CHANGE)/test/outcome-$(k))
else
  SCENE_FLAGS += --loss l1 --random_scale 1.25 --max_train_steps 500 \
    $(if $(findstring --pair_objective,$(subst --pair_objective delta,,$(ARGS))),,--no-delta_base)
endif

CHANGES := autumn clearing craters flood snow solar urban

# make ablate F=FILE first makes the scenes and the random base model that the file mentions
F      ?= experiments/objective_solar.txt
SEEDS  ?= 0
NEEDED  = $(addsuffix /.done,$(sort $(shell grep -oshE 'data/(scenes/($(subst $() ,|,$(CHANGES)))|random_base)\b' $(call quote,$(F)))))

VENV ?= .venv
ifneq ($(words $(VENV)),1)
  $(error VENV=$(VENV): a folder without spaces in its name, which make cannot have in a target)
endif
ifdef PYTHON
  PY     = $(call quote,$(PYTHON))
  READY :=
  READY_DEV :=
else
  PY     = $(call quote,$(VENV)/bin/python)
  READY := $(VENV)/.installed
  READY_DEV := $(VENV)/.installed-dev
endif

# $(call given,NAME): what the command line or the environment sets NAME to, never a default here
given = $(if $(filter-out file,$(origin $(1))),$($(1)))

# keeps a variable's spaces and quotes in one shell word
quote = '$(subst ','\'',$(1))'
flag  = $(if $(2),$(1) $(call quote,$(2)))

.PHONY: help setup check-data train evaluate ablate base sample generate bench test test-fast check-gpu fuzz lint docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train                       on the embedded scenes, in minutes on a CPU, then evaluate'
	@echo '  make train BEFORE=data/before AFTER=data/after PROMPT="..." [MODEL= OUT= STEPS= ARGS="--lora_rank 4"]'
	@echo '  make train INSTANCE=data/images PROMPT="a photo of [cls]"'
	@echo '  make sample INPUT=data/new OUT=samples [RUN=runs/pairs STRENGTH=0.5]'

setup: $(READY) ## create the environment

$(VENV)/.installed: requirements.txt
	@test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

check-data: $(READY) ## check pairs before training: BEFORE= AFTER= [MASK=]
	$(PY) check_data.py $(call flag,--before,$(BEFORE)) $(call flag,--after,$(AFTER)) $(call flag,--mask_dir,$(MASK)) $(call flag,--out,$(OUT)) $(ARGS)

train: $(READY) $(if $(SCENES),$(SCENES)/.done) ## train a LoRA on BEFORE= AFTER= (pairs), INSTANCE= (single images) or the scenes
	$(if $(findstring --output_dir,$(ARGS)),$(error ARGS has --output_dir: the folder of a run is OUT=))
	$(PY) train.py --pretrained_model_name_or_path $(call quote,$(MODEL)) \
	  $(call flag,--before_data_dir,$(or $(BEFORE),$(SCENES:%=%/train/before))) \
	  $(call flag,--after_data_dir,$(or $(AFTER),$(SCENES:%=%/train/after))) \
	  $(call flag,--mask_dir,$(MASK)) $(call flag,--instance_data_dir,$(INSTANCE)) \
	  --output_dir $(call quote,$(or $(OUT),$(RUN))) $(if $(SCENES),$(SCENE_FLAGS)) \
	  $(call flag,--instance_prompt,$(PROMPT)) $(call flag,--max_train_steps,$(STEPS)) $(ARGS)
	$(if $(SCENES),@$(MAKE) --no-print-directory evaluate RUN=$(call quote,$(or $(OUT),$(RUN))) OUT= ARGS= MASK= PROMPT=)

evaluate: $(READY) $(if $(SCENES),$(SCENES)/.done) ## evaluate on held-out pairs: RUN= BEFORE= AFTER= [MASK=]
	$(if $(SCENES),@echo 'no BEFORE= and AFTER=: on the embedded scenes of $(SCENES)')
	$(PY) evaluate.py --lora $(call quote,$(RUN)) --out $(call quote,$(or $(OUT),$(RUN)/evaluation)) \
	  $(call flag,--before_data_dir,$(or $(BEFORE),$(SCENES:%=%/test/before))) \
	  $(call flag,--after_data_dir,$(or $(AFTER),$(SCENES:%=%/test/after))) \
	  $(call flag,--mask_dir,$(or $(MASK),$(SCENES:%=%/test/mask))) \
	  $(call flag,--model,$(call given,MODEL)) $(call flag,--prompt,$(PROMPT)) $(if $(SCENES),$(SCENE_JUDGE)) $(ARGS)

ablate: $(READY) $(NEEDED) ## compare the arms of a file, one training per arm and seed: F= [SEEDS="0 1 2" OUT=]
	$(PY) ablate.py $(call quote,$(F)) --seeds $(SEEDS) $(call flag,--out,$(OUT)) $(ARGS)

data/scenes/%/.done: scenes/world.py scenes/paint.py scenes/render.py Makefile $(READY)
	@test ! -e $@ || touch $(@D)/train/scenes.json $(@D)/test/scenes.json  # drawn by an older revision
	$(PY) -m scenes.render --change $* --pairs 64 --seed 0 --times 0.25,0.5,0.75 --out $(@D)/train
	$(PY) -m scenes.render --change $* --pairs 32 --seed 1 --times 0.25,0.5,0.75 --outcomes 4 --out $(@D)/test
	@touch $@

data/random_base/.done: scenes/random_base.py model/unet.py $(wildcard scenes/base/*/*) $(READY)
	$(PY) -m scenes.random_base --out $(@D)
	@touch $@

base: $(READY) ## retrain the embedded base model (two hours on two CPU cores)
	$(PY) -m scenes.train_base --out $(call quote,$(or $(OUT),scenes/base)) $(ARGS)

sample: $(READY) ## apply a LoRA to new before images: RUN= INPUT= STRENGTH= [MASK=]
	$(if $(call given,INPUT)$(BEFORE),,@echo 'no INPUT=: on $(INPUT)')
	$(PY) sample.py edit --lora $(call quote,$(RUN)) $(call flag,--input,$(INPUT)) $(call flag,--mask,$(MASK)) \
	  --strength $(call quote,$(STRENGTH)) --out $(call quote,$(or $(OUT),samples)) \
	  $(call flag,--model,$(call given,MODEL)) $(call flag,--prompt,$(PROMPT)) $(ARGS)

generate: $(READY) ## generate images from a prompt: PROMPT= [RUN=]
	$(PY) sample.py generate $(call flag,--lora,$(call given,RUN)) \
	  $(call flag,--model,$(if $(call given,RUN),$(call given,MODEL),$(MODEL))) \
	  $(if $(call given,RUN)$(filter-out scenes/base,$(MODEL)),,--height 64 --width 64) \
	  --out $(call quote,$(or $(OUT),generated)) $(call flag,--prompt,$(PROMPT)) $(ARGS)

bench: $(READY) $(READY_DEV) ## benchmark speed and memory against diffusers + peft: ARGS=[--quick | --device cuda]
	$(PY) -m bench $(ARGS)

test: $(READY) $(READY_DEV) ## run all tests
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto --maxprocesses 8 $(ARGS)

test-fast: $(READY) $(READY_DEV) ## run the tests that are quick each, in minutes
	$(PY) -m pytest -n auto --maxprocesses 8 -m "not slow" $(ARGS)

check-gpu: $(READY) $(READY_DEV) ## run the tests that need a GPU, on this machine's, in minutes
	$(PY) -m pytest -m gpu tests/test_gpu.py $(ARGS)

fuzz: $(READY) $(READY_DEV) ## fuzz every reader with generated and mutated inputs: FUZZ= inputs each [2000]
	FUZZ=$(or $(FUZZ),2000) $(PY) -m pytest -s tests/test_fuzz.py tests/test_fuzz_formats.py $(ARGS)

lint: $(READY_DEV) ## check the style
	$(PY) -m ruff check .

docs: $(READY) ## write docs/flags.md from config.py
	$(PY) -m docs.flags > docs/.flags.md && mv docs/.flags.md docs/flags.md

clean: ## remove caches (never runs or data)
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
