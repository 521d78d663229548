"""Audio-visual language models: a frozen base, its processor, and batches for training and generation.

- `omni`: Qwen2.5-Omni, published or small; `small` builds the small one; `base` trains it.
- `checkpoint`: where a base lies, and how it is loaded.
- `batches`: batches of encoded samples, their segments, loss and hidden states.
- `published`: media as the published loader of Crab+ shows them.
- `segment`: from a box and points to a mask.

A newcomer may change the sizes of the small model (``base.size`` in params.yaml), add a segmenter with the signature
`segment.Segmenter`, or add another model. A model is a module with the names that the study uses of `omni`: ``load``,
``prepare`` (one sample through its processor), ``encode`` (the frozen encoders), ``collate``, ``generate``,
``LANGUAGE_TARGETS`` (where adapters go), and a configuration with the token ids that `batches.segments` reads.
`checkpoint.load_base` and `batches.batch` then choose the module by the model type in ``config.json``.
"""
