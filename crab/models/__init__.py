"""Audio-visual language models: a frozen base, its processor, and batches for training and generation.

- `protocol`: what the study asks of a model, and which module serves which base.
- `omni`: Qwen2.5-Omni, published or small; `small` builds the small one; `base` trains it.
- `bridge`: a frozen `language` model behind frozen `encoders` and projectors; `bridge_model` has its classes.
- `checkpoint`: where a base lies, and how it is loaded.
- `batches`: batches of encoded samples, their segments, loss and hidden states.
- `published`: media as the published loader of Crab+ shows them.
- `segment`: from a box and points to a mask.

A newcomer may change the sizes of the small model (``base.size`` in params.yaml), add a segmenter with the signature
`segment.Segmenter`, or add another model: a module with the names of `protocol.AudioVisualModel`, and one entry in
`protocol.MODELS`, which chooses the module by the model type in ``config.json``.
"""
