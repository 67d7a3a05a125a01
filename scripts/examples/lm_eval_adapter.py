"""EleutherAI's lm-evaluation-harness with ADAPTQ adapters: its own command line, after ADAPTQ is registered with PEFT.

    pip install lm_eval
    python scripts/examples/lm_eval_adapter.py --model hf --tasks hellaswag \
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,peft=my-adapter,dtype=bfloat16

`dtype` is that in which the adapter's base was loaded for training. After `adaptq autoload on` the harness's own
command, `lm_eval` with the same arguments, does the same.
"""

from lm_eval.__main__ import cli_evaluate

import adaptq_peft  # noqa: F401  (registers the method with PEFT)

if __name__ == "__main__":
    cli_evaluate()
