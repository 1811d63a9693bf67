"""Tests of transformers that cannot apply to RETRO or to fits.

Each with the cases that it holds for ("" = all), the error with which it fails there, and why. An entry whose test
passes fails itself, and so does one whose test fails in another way.
"""

_OF_ONE_KERNEL = ("", "attends by 'sdpa' only", "RETRO has no eager attention, which the test asks for.")
_NO_CHECKPOINTED_LAYERS = (
    "",
    "StopIteration|\\[\\] is not true",
    "RetroModel itself hands the parts of its layers to the checkpoint function: none is a GradientCheckpointingLayer.",
)
CANNOT = {
    "control": {},
    "retro": {
        "test_can_set_attention_dynamically": _OF_ONE_KERNEL,
        "test_retain_grad_hidden_states_attentions": _OF_ONE_KERNEL,
        "test_gradient_checkpointing_enable_disable": _NO_CHECKPOINTED_LAYERS,
        "test_training_gradient_checkpointing": _NO_CHECKPOINTED_LAYERS,
        "test_training_gradient_checkpointing_use_reentrant_false": _NO_CHECKPOINTED_LAYERS,
        "test_training_gradient_checkpointing_use_reentrant_true": _NO_CHECKPOINTED_LAYERS,
    },
    "fit": {
        "test_correct_missing_keys": (
            "",
            "no RETRO-fitted model",
            "A base's folder does not open as a fit, whose new weights would be missing; retrofit() makes one of it.",
        ),
        "test_model_weights_reload_no_missing_tied_weights": (
            "",
            "holds no base and names none",
            "A folder without its weights is refused, where transformers fills in random ones.",
        ),
        "test_retain_grad_hidden_states_attentions": (
            "",
            "retain_grad on Tensor that has requires_grad=False",
            "A fit's base is frozen, so that the embeddings, the first of the hidden states, have no gradient.",
        ),
    },
}
