"""The generated AV-UIE v2: scenes, their pictures and sounds, and records whose reasoning chains are true.

One random scene graph is the source of everything. The modules, in reading order:

- `scene`: things with a place, a look, a sound and times; random scenes. `render`: their pixels, masks and sound.
- `chains`: the statements of a reasoning chain. `verify`: reads such statements and checks them against a scene.
- `staging`: scenes made for a wanted answer. `questions`, `references`: what is asked about a scene.
- `views/`: one module per task family. A view makes the records of one slot.
- `generate`: writes the whole tree to disk. `vocabulary`: every word that its texts use.

To add a view: write a function ``(Stage) -> View`` in the module of its family and enter it in that module's table
``VIEWS`` under the slot's name. The slot itself is an entry of :mod:`crab.tasks.registry`. The verifier, the vocabulary
and the build take the new view from the table.

To add a class of things: its name in :mod:`crab.world.scene`, its shape and sound in :mod:`crab.world.render`.
A change of scenes, words or the order of random draws changes the data, so the base must be trained again.
"""
