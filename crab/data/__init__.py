"""AV-UIE v2 on disk: media, records, the check of a whole tree, and converters from raw data sets.

`media` reads and writes clips, sounds, images and masks, with the help of `containers`, `sounds`, `pictures` and
`writers`. `records` reads lists of records and their media. `validate` checks a whole tree with the help of `probe`
(single media files), and says what it found in the terms of `findings`. `names` knows files of nearly the same name.
`words` splits text. `sources` converts original data sets. `export` writes a tree in the format of other training
programs.

What a newcomer may change: a format that files may have (`probe.SUFFIXES`), how media are resampled or resized
(`media`), a check of records (`validate`). A new data set is one entry in `crab.tasks.registry`; its converter lives in
`sources`.
"""
