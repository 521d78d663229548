from crab.samples.reading import *  # noqa
