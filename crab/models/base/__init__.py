"""How a small base is trained from random weights: `train` runs it.

`probes` holds the questions, `perception` trains the encoders, `bank` keeps what they see and hear, `packing` puts many
questions into one row, `curriculum` trains the language model by stages, `optimize` steps.

A newcomer may add a skill: one entry in `probes.STAGES`, and a line that asks for it in the function of its context.
Any change to this code trains the base anew.
"""
