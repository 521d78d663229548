"""What trained adapters do: analyses of weights, gradients, routing and hidden states, and times of the I-LoRA layer.

Each module serves one notebook and returns tidy tables; the notebook draws them. To show something else, change the
notebook. To measure something else, add a function here.
"""
