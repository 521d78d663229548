"""The generated AV-UIE v2: scenes, their pictures and sounds, and records whose reasoning chains are true.

One random scene graph is the source of everything. The modules, in reading order:

- `scene`: things with a place, a look, a sound and times; random scenes. `render`: their pixels, masks and sound.
- `chains`: the statements of a reasoning chain. `verify`: reads such statements and checks them against a scene.
- `staging`: scenes made for a wanted answer. `views/`: one module per task family; a view makes the records of a slot.
- `generate`: writes the whole tree to disk. `vocabulary`: every word that its texts use.

To add a view: write a function ``(Stage) -> View`` in the module of its family and enter it in that module's table
``VIEWS`` under the slot's name. A new family is a new module, named in `views/__init__.py`. The slot itself is an entry
of :mod:`crab.tasks.registry`. Build, vocabulary and verifier take the view from the table.

To add a class of things: its name in `scene`, its shape and its sound in `render`. A change of scenes, of words or of
the order of random draws changes the data, so the base must be trained again.
"""
