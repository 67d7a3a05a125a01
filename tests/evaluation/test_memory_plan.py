"""Planned bytes are those of the real tensors: of the model, its deltas and gradients, and the optimizers' states."""

from __future__ import annotations

import bitsandbytes as bnb
import galore_torch
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny_qwen_moe, tiny_t5
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Mamba2Config, Mamba2ForCausalLM
from transformers.optimization import Adafactor

from adaptq_peft import AdaptQConfig
from adaptq_peft.evaluation import (
    OPTIMIZERS,
    largest_num_adapted_blocks,
    measure_weight_bytes,
    optimizer_state_bytes,
    paper_weight_ratio,
    plan_memory,
    trained_parameters,
)
from adaptq_peft.quantization import QuantizationSettings, quantize_linear, quantize_on_meta


@pytest.fixture
def save(make_model, tmp_path):
    makers = {"llama": make_model, "gpt2": lambda: make_model("gpt2"), "t5": tiny_t5, "qwen-moe": tiny_qwen_moe}

    def run(kind, dtype=torch.bfloat16):
        makers[kind]().to(dtype).save_pretrained(tmp_path)
        return tmp_path

    return run


def load(folder, kind):
    return (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*weights of frozen blocks were not quantized")
@pytest.mark.parametrize("delta_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "qwen-moe"])
def test_planned_bytes_are_those_of_the_tensors(save, kind, quantization, delta_dtype):
    folder = save(kind)
    config = {"layers_to_transform": [0, 2], "quantization": quantization, "delta_dtype": delta_dtype}
    plan = plan_memory(folder, AdaptQConfig(**config))
    assert plan.unquantized == measure_weight_bytes(load(folder, kind))
    model = get_peft_model(load(folder, kind), AdaptQConfig(**config))
    planned = plan.methods["ADAPTQ"]
    assert planned.weights == measure_weight_bytes(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert planned.trained_parameters == sum(parameter.numel() for parameter in trained)
    assert planned.gradients == sum(parameter.nbytes for parameter in trained) == planned.weights.adapters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_and_full_fine_tuning(save, kind):
    folder = save(kind)
    methods = plan_memory(folder, lora_rank=4).methods
    lora = get_peft_model(load(folder, kind), LoraConfig(r=4, target_modules="all-linear"))
    assert methods["LoRA"].weights == measure_weight_bytes(lora)
    assert methods["QLoRA"].weights.adapters == methods["LoRA"].weights.adapters
    assert methods["QLoRA"].weights.dense_linears == 0
    assert methods["full fine-tuning"].weights == measure_weight_bytes(load(folder, kind).float())


def test_each_method_trains_in_the_dtype_of_the_deltas(save):
    plan = plan_memory(save("llama", torch.float32), AdaptQConfig(layers_to_transform=[1], delta_dtype="bfloat16"))
    for method in plan.methods.values():
        assert method.gradients == 2 * method.trained_parameters


def test_lora_of_a_model_with_layers_that_peft_lets_no_lora_onto(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16}
    Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=8, n_groups=1)).save_pretrained(tmp_path)
    methods = plan_memory(tmp_path, AdaptQConfig(layers_to_transform=[1]), lora_rank=4).methods
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["out_proj"])
    assert methods["LoRA"].weights == measure_weight_bytes(get_peft_model(load(tmp_path, "mamba"), lora))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("nested", [True, False])
def test_a_layer_quantized_on_the_meta_device_has_the_bytes_of_a_real_one(bits, nested):
    settings = QuantizationSettings(bits=bits, nested_absmax=nested)
    linear = nn.Linear(100, 36, dtype=torch.bfloat16)
    found = [nn.ModuleList([nn.Sequential(layer)]) for layer in (quantize_linear(linear, settings),)]
    found.append(nn.ModuleList([nn.Sequential(quantize_on_meta(linear.to("meta"), settings))]))
    real, planned = (measure_weight_bytes(nn.Sequential(blocks)) for blocks in found)
    assert planned == real


def optimizers(parameters, names):
    galore = [p for p, name in zip(parameters, names, strict=True) if name == "0.weight"]
    others = [p for p, name in zip(parameters, names, strict=True) if name != "0.weight"]
    group = {"rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return {
        "adamw_torch": lambda: torch.optim.AdamW(parameters),
        "adamw_bnb_8bit": lambda: bnb.optim.AdamW(parameters, optim_bits=8),
        "paged_adamw_8bit": lambda: bnb.optim.PagedAdamW(parameters, optim_bits=8),
        "adafactor": lambda: Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False),
        "sgd": lambda: torch.optim.SGD(parameters),
        "galore_adamw": lambda: galore_torch.GaLoreAdamW([{"params": others}, {"params": galore, **group}]),
    }


def state_bytes(optimizer):
    """Each tensor in an optimizer's states once, those of GaLore's projectors among them."""
    tensors = {}
    for state in optimizer.state.values():
        values = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
        tensors.update({value.data_ptr(): value for value in values if isinstance(value, torch.Tensor)})
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_states_are_those_of_the_real_optimizer_after_a_step(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 72), nn.LayerNorm(72)).to(dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = optimizers(parameters, names)[name]()
    optimizer.step()
    assert optimizer_state_bytes(name, trained_parameters(model), galore_rank=8) == state_bytes(optimizer)


def test_the_trainer_keeps_states_of_embeddings_in_32_bits():
    embedding = trained_parameters(nn.Embedding(96, 64))
    assert optimizer_state_bytes("adamw_bnb_8bit", embedding) == 8 * 96 * 64


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match=r"optimizer is 'lion'; known are \['adamw_torch', "):
        optimizer_state_bytes("lion", [])


def test_blocks_that_need_a_profile_are_taken_to_be_the_last(save):
    plan = plan_memory(save("llama"), AdaptQConfig(selection_ratio=0.5))
    assert (plan.num_blocks, plan.adapted, plan.dtype) == (4, [2, 3], "bfloat16")
    assert plan.paper_ratio == paper_weight_ratio(4, 2)
    assert plan.paper_ratio < plan.planned_ratio < plan.paper_ratio + 0.1  # scales and tables of tiny layers
    weights = plan.methods["ADAPTQ"].weights
    assert plan.peak_in_memory == plan.unquantized.total + weights.quantized_linears + weights.adapters
    assert plan.peak_presplit == weights.total + 2 * 64 * 128


class TestBudget:
    def test_it_is_the_largest_number_that_fits(self, save):
        folder = save("llama")
        needed = [
            plan_memory(folder, AdaptQConfig(num_adapted_blocks=count)).methods["ADAPTQ"].training("sgd")
            for count in (1, 2, 3, 4)
        ]
        assert needed == sorted(needed)
        for count, budget in ((1, needed[1] - 1), (2, needed[1]), (3, needed[3] - 1), (4, needed[3]), (4, "4mb")):
            assert largest_num_adapted_blocks(folder, budget, optimizer="sgd") == count

    def test_it_is_counted_with_the_rank_of_galore(self, save):
        folder = save("llama")
        low, high = (
            plan_memory(folder, AdaptQConfig(num_adapted_blocks=2), galore_rank=rank).methods["ADAPTQ"]
            for rank in (2, 128)
        )
        budget, options = low.training("galore_adamw"), {"optimizer": "galore_adamw", "galore_rank": 2}
        assert budget < high.training("galore_adamw")
        assert largest_num_adapted_blocks(folder, budget, **options) == 2

    def test_too_small_a_budget_says_what_is_needed(self, save):
        folder = save("llama")
        least = plan_memory(folder, AdaptQConfig(num_adapted_blocks=1)).methods["ADAPTQ"].training("adamw_torch")
        with pytest.raises(ValueError, match=rf"1,000 bytes does not fit one adapted block.*takes {least:,} bytes"):
            largest_num_adapted_blocks(folder, "1KB")
        with pytest.raises(ValueError, match="size is 'infGiB'; allowed: bytes as an integer, or a text such as 1"):
            largest_num_adapted_blocks(folder, "infGiB")
