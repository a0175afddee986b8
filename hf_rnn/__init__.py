"""Recurrent networks as Hugging Face models: `import hf_rnn` registers them with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .attention import ATTENTION_SCORES
from .classification import classify_in_chunks
from .configuration_rnn import RNNConfig
from .configuration_rnn_seq2seq import RNNSeq2SeqConfig
from .fast_paths import FAST_PATHS, loop_only, without_fast_paths
from .generation import align, replace_unknowns
from .model_card import create_model_card, save_model_card, set_card_details
from .modeling_rnn import (
    RNNForCausalLM,
    RNNForMaskedLM,
    RNNForMultipleChoice,
    RNNForQuestionAnswering,
    RNNForSequenceClassification,
    RNNForTokenClassification,
    RNNModel,
)
from .modeling_rnn_seq2seq import RNNSeq2SeqForConditionalGeneration, RNNSeq2SeqModel
from .peft_targets import lora_target_modules, lora_target_parameters
from .pipelines.question_answering import QuestionAnsweringPipeline
from .pipelines.text_to_text import SummarizationPipeline, TranslationPipeline
from .plots import plot_attention, plot_confusion, plot_gates, plot_pooling, plot_states
from .recurrent_cache import detach_state
from .recurrent_cells import RECURRENT_CELLS
from .training_summary import write_cards


__version__ = "0.1.0"

# Configuration, then each class with the Auto classes that find it; the first of them is the one that a checkpoint with
# its own code names. Registration, `__all__` and the test matrix are made from this.
REGISTRATION = {
    RNNConfig: {
        RNNModel: (AutoModel, AutoModelForTextEncoding),
        RNNForCausalLM: (AutoModelForCausalLM,),
        RNNForMaskedLM: (AutoModelForMaskedLM,),
        RNNForSequenceClassification: (AutoModelForSequenceClassification,),
        RNNForTokenClassification: (AutoModelForTokenClassification,),
        RNNForQuestionAnswering: (AutoModelForQuestionAnswering,),
        RNNForMultipleChoice: (AutoModelForMultipleChoice,),
    },
    RNNSeq2SeqConfig: {
        RNNSeq2SeqModel: (AutoModel,),
        RNNSeq2SeqForConditionalGeneration: (AutoModelForSeq2SeqLM,),
    },
}

# Task, then its pipeline and the Auto class that loads its model: what transformers 5 dropped, under other names, since
# it refuses the old ones.
PIPELINES = {
    "extractive-question-answering": (QuestionAnsweringPipeline, AutoModelForQuestionAnswering),
    "text-summarization": (SummarizationPipeline, AutoModelForSeq2SeqLM),
    "text-translation": (TranslationPipeline, AutoModelForSeq2SeqLM),
}


def _saved_name(saved_class: type) -> str:
    return f"{saved_class.__module__.split('.')[-1]}.{saved_class.__name__}"


def _register() -> None:
    for config_class, model_classes in REGISTRATION.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        heads = {"AutoConfig": _saved_name(config_class)}
        for model_class, auto_classes in model_classes.items():
            model_class.register_for_auto_class(auto_classes[0])
            model_class._heads = heads
            for auto_class in auto_classes:
                auto_class.register(config_class, model_class, exist_ok=True)
                heads[auto_class.__name__] = _saved_name(model_class)
    for task, (pipeline_class, auto_class) in PIPELINES.items():
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline_class, pt_model=auto_class, type="text")


_register()
write_cards()

__all__ = [
    "ATTENTION_SCORES",
    "FAST_PATHS",
    "PIPELINES",
    "RECURRENT_CELLS",
    "REGISTRATION",
    "align",
    "classify_in_chunks",
    "create_model_card",
    "detach_state",
    "loop_only",
    "lora_target_modules",
    "lora_target_parameters",
    "plot_attention",
    "plot_confusion",
    "plot_gates",
    "plot_pooling",
    "plot_states",
    "replace_unknowns",
    "save_model_card",
    "set_card_details",
    "without_fast_paths",
] + [name.__name__ for config_class, classes in REGISTRATION.items() for name in (config_class, *classes)]
