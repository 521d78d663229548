from crab.samples.encode import *  # noqa
from crab.samples.encode import load_media, prepared  # noqa
