"""What the server of warm_process.py imports before it forks: everything that scripts/train.py imports."""

import datasets
import evaluate
import transformers

import forge_lib.training.evaluation_metrics
import scripts.train

LOADED = (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, datasets, evaluate, forge_lib, scripts)
